"""`realm-jax export --format=sentence-transformers`: the retriever, for BEIR,
MTEB, LangChain and vector databases.

Public: `export`. BERT, [CLS], the tanh pooler, the projection and its LayerNorm
become the modules of one folder, or of a folder for each tower.
"""

import json
import pathlib
from typing import Any

import numpy as np

from realm_jax.interop import card
from realm_jax.interop import convert
from realm_jax.interop import exported
from realm_jax.interop import weights

# Their LayerNorm has an epsilon of 1e-5 that no file can change, ours 1e-12.
# LayerNorm does not see the scale of its input but for epsilon: a projection
# that is larger by a power of two, which is exact in floating point, makes
# theirs 1e-5 / 2**24 = 6e-13.
_PROJECTION_SCALE = 2.0**12

_PACKAGE = 'sentence_transformers.models'
_MODULES = (
    ('', 'Transformer'),
    ('1_Pooling', 'Pooling'),
    ('2_Dense', 'Dense'),
    ('3_Dense', 'Dense'),
    ('4_LayerNorm', 'LayerNorm'),
)
_USAGE = """
```python
import sentence_transformers

model = sentence_transformers.SentenceTransformer('FOLDER{inside}')
model.similarity_fn_name = 'dot'
query_emb = model.encode(['a query'])
doc_emb = model.encode([('title', 'body')])  # Title and body as a pair.
score = query_emb @ doc_emb.T
```

A document is a pair, so that the body gets its own segment, as in training; a
document without a title is the pair `('', body)`. Where a tool joins title and
body into one text, the embedding differs a little. Relevance is the inner
product; do not normalise.
"""


def export(
    workdir: exported.Workdir, output: exported.Path
) -> list[pathlib.Path]:
  """Writes the retriever; `query` and `document` apart if it has two towers.

  Args:
    workdir: opened.
    output: folder to write; it appears, complete, at the very end.

  Returns:
    The folders.

  Raises:
    FileExistsError: if `output` is there and not empty.
    ValueError: if the workdir has no retriever.
  """
  if 'embedder' not in workdir.params:
    raise ValueError(
        f'{workdir.path} has no retriever, only {", ".join(workdir.params)}.'
    )
  towers = {
      'shared': {'': ('encoder', 'projection')},
      'shared_bert': {
          'query': ('encoder', 'query_projection'),
          'document': ('encoder', 'projection'),
      },
      'separate': {
          'query': ('query_encoder', 'query_projection'),
          'document': ('encoder', 'projection'),
      },
  }[workdir.config.model.towers]
  with exported.atomic_folder(output) as temporary:
    for name, (encoder, projection) in towers.items():
      folder = temporary / name
      folder.mkdir(exist_ok=True)
      length = workdir.config.model.max_positions
      if name == 'query':
        length = min(length, workdir.config.lengths.query)
      elif workdir.config.lengths.document:
        length = min(length, workdir.config.lengths.document)
      _write(workdir, folder, encoder, projection, length, name)
  return [pathlib.Path(output) / name for name in towers]


def _write(
    workdir: exported.Workdir,
    folder: pathlib.Path,
    encoder: str,
    projection: str,
    length: int,
    name: str,
) -> None:
  model = workdir.config.model
  params = workdir.params['embedder']
  values = convert.foreign_config('bert', model)
  values['architectures'] = ['BertModel']
  _json(folder / 'config.json', values)
  weights.write_safetensors(
      folder / 'model.safetensors',
      convert.tower_tensors(model, params, encoder),
      {'format': 'pt'},
  )
  card.tokenizer_files(folder, workdir, 'BertTokenizer')
  modules = [
      {
          'idx': i,
          'name': str(i),
          'path': path,
          'type': f'{_PACKAGE}.{kind}',
      }
      for i, (path, kind) in enumerate(_MODULES)
  ]
  _json(folder / 'modules.json', modules)
  _json(
      folder / 'sentence_bert_config.json',
      {'max_seq_length': length, 'do_lower_case': False},
  )
  _json(
      folder / 'config_sentence_transformers.json',
      {'similarity_fn_name': 'dot', 'prompts': {}, 'default_prompt_name': None},
  )
  modes = 'mean_tokens max_tokens mean_sqrt_len_tokens cls_token'.split()
  _json(
      folder / '1_Pooling' / 'config.json',
      {
          'word_embedding_dimension': model.width,
          **{f'pooling_mode_{m}': m == 'cls_token' for m in modes},
      },
  )
  _dense(
      folder / '2_Dense',
      np.asarray(params[f'{encoder}.pooler.kernel']),
      np.asarray(params[f'{encoder}.pooler.bias']),
      'torch.nn.modules.activation.Tanh',
  )
  _dense(
      folder / '3_Dense',
      np.asarray(params[f'{projection}.dense.kernel']) * _PROJECTION_SCALE,
      np.asarray(params[f'{projection}.dense.bias']) * _PROJECTION_SCALE,
      'torch.nn.modules.linear.Identity',
  )
  _json(
      folder / '4_LayerNorm' / 'config.json',
      {'dimension': model.embedding_width},
  )
  weights.write_safetensors(
      folder / '4_LayerNorm' / 'model.safetensors',
      {
          'norm.weight': np.asarray(params[f'{projection}.norm.scale']),
          'norm.bias': np.asarray(params[f'{projection}.norm.bias']),
      },
      {'format': 'pt'},
  )
  (folder / 'README.md').write_text(
      card.model_card(
          workdir,
          f'Retriever of REALM{f": the {name} tower" if name else ""}',
          'sentence-transformers',
          'Text to a vector, for retrieval by inner product.',
          _USAGE.format(inside=f'/{name}' if name else ''),
      ),
      'utf-8',
  )


def _dense(
    folder: pathlib.Path,
    kernel: np.ndarray,
    bias: np.ndarray,
    activation: str,
) -> None:
  inputs, outputs = kernel.shape
  _json(
      folder / 'config.json',
      {
          'in_features': inputs,
          'out_features': outputs,
          'bias': True,
          'activation_function': activation,
      },
  )
  weights.write_safetensors(
      folder / 'model.safetensors',
      {
          'linear.weight': np.ascontiguousarray(kernel.T),
          'linear.bias': np.ascontiguousarray(bias),
      },
      {'format': 'pt'},
  )


def _json(path: pathlib.Path, values: Any) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(values, indent=2) + '\n', 'utf-8')
