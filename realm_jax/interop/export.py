"""`realm-jax export`: a workdir in the formats of other tools.

`huggingface` is in export_huggingface.py. `sentence-transformers` serves BEIR,
MTEB, LangChain and vector databases; `index` writes the document embeddings:
`embeddings.npy` [N, E], `ids.jsonl` with the passage id of each row,
`index.json`, and `index.faiss` where FAISS is installed.
"""

from collections.abc import Sequence
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import cuts
from realm_jax.interop import convert
from realm_jax.interop import export_huggingface
from realm_jax.interop import huggingface_config
from realm_jax.interop import weights

Path = export_huggingface.Path

FORMATS = ('huggingface', 'sentence-transformers', 'index')
_ROWS = 2**16

# LayerNorm of sentence-transformers has a fixed epsilon of 1e-5, ours has
# 1e-12. Except for epsilon, LayerNorm does not depend on the scale of its
# input. Scaling the projection by 2**12, which is exact in floating point,
# reduces their epsilon to 1e-5 / 2**24 = 6e-13.
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
document without a title is the pair `('', body)`. If a tool joins title and
body into one text, the embedding differs slightly. Relevance is the inner
product; do not normalise.
"""


def run(
    workdir: Path,
    format: str,
    output: Path,
    *,
    step: int | None = None,
    classes: Sequence[str] | None = None,
    dtype: str = 'float32',
    corpus: Path | None = None,
) -> list[pathlib.Path]:
  """Exports a workdir.

  Args:
    workdir: trained or imported.
    format: one of `FORMATS`.
    output: folder to write; it appears, complete, at the very end.
    step: of a checkpoint or of a snapshot of the retriever; None: the newest
      checkpoint.
    classes: for 'huggingface': of `huggingface_names.KINDS`, the first in
      `output` itself, each further one in a folder of its name.
    dtype: for 'index': 'float32' or 'float16'.
    corpus: where the corpus is now; None: where it was in training.

  Returns:
    The folders that were written.

  Raises:
    FileExistsError: `output` exists and is not empty.
    FileNotFoundError: the workdir, the step or an index does not exist.
    ValueError: the format is unknown, or the workdir lacks a component.
  """
  if format not in FORMATS:
    raise ValueError(f'--format={format}: there are {", ".join(FORMATS)}.')
  model = export_huggingface.Model.open(workdir, step, corpus)
  output = pathlib.Path(output).absolute()
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise FileExistsError(
        f'{output} exists and is not empty; give another --output.'
    )
  match format:
    case 'huggingface':
      return export_huggingface.export(model, output, classes)
    case 'sentence-transformers':
      return _sentence_transformers(model, output)
  return _index(model, output, dtype)


def _index(
    model: export_huggingface.Model, output: pathlib.Path, dtype: str
) -> list[pathlib.Path]:
  """Writes the embeddings of all documents by the model's parameters."""
  if dtype not in ('float32', 'float16'):
    raise ValueError(f"--dtype={dtype}: can be 'float32' or 'float16'.")
  trained = model.trained
  has_corpus = trained.config.corpus or trained.moved
  if 'embedder' not in model.params or not has_corpus:
    raise ValueError(f'{trained.workdir} has no retriever over a corpus.')
  cuts.warn_of_passages(trained.corpus, trained.config.lengths.document)
  index = trained.published(model.params, model.step)
  table, live = index.table, index.live_rows
  with model.folder(output) as folder:
    rows = np.lib.format.open_memmap(
        folder / 'embeddings.npy',
        'w+',
        np.dtype(dtype),
        (len(live), table.shape[1]),
    )
    flat = None
    if importlib.util.find_spec('faiss') is not None:
      import faiss

      flat = faiss.IndexFlatIP(table.shape[1])
    for start in range(0, len(live), _ROWS):
      part_NE = table[live[start : start + _ROWS]].astype(np.float32)
      if dtype == 'float16' and np.abs(part_NE).max() > np.finfo(dtype).max:
        raise ValueError(
            'An embedding does not fit into float16; export float32.'
        )
      rows[start : start + _ROWS] = part_NE
      if flat is not None:
        flat.add(np.ascontiguousarray(part_NE))
    rows.flush()
    if flat is not None:
      faiss.write_index(flat, str(folder / 'index.faiss'))
    with open(folder / 'ids.jsonl', 'w', encoding='utf-8') as file:
      for row in live.tolist():
        file.write(json.dumps(trained.corpus.passage_text(row)['id']) + '\n')
    lineage = index.generation.lineage
    about = {
        'rows': len(live),
        'width': table.shape[1],
        'dtype': dtype,
        'relevance': 'inner product',
        'step': model.step,
        'params_digest': lineage.params_digest,
        'tokenizer_digest': lineage.tokenizer_digest,
        'corpus_fingerprint': lineage.corpus_fingerprint,
        'documents': trained.documents.about(),
        'faiss': 'index.faiss' if flat is not None else None,
    }
    _json(folder / 'index.json', about)
  return [output]


def _sentence_transformers(
    model: export_huggingface.Model, output: pathlib.Path
) -> list[pathlib.Path]:
  """Writes the retriever; two towers become folders `query` and `document`."""
  if 'embedder' not in model.params:
    raise ValueError(
        f'{model.trained.workdir} has no retriever, only'
        f' {", ".join(model.params)}.'
    )
  config = model.trained.config
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
  }[config.model.towers]
  with model.folder(output) as temporary:
    for name, (encoder, projection) in towers.items():
      folder = temporary / name
      folder.mkdir(exist_ok=True)
      lengths = config.lengths
      length = lengths.query if name == 'query' else lengths.document
      length = min(length or config.model.max_positions,
                   config.model.max_positions)
      _tower(model, folder, encoder, projection, length, name)
  return [output / name for name in towers]


def _tower(
    model: export_huggingface.Model,
    folder: pathlib.Path,
    encoder: str,
    projection: str,
    length: int,
    name: str,
) -> None:
  """Writes BERT, [CLS], tanh pooler, projection and LayerNorm as modules."""
  config = model.trained.config.model
  if config.encoder != 'bert':
    raise ValueError(
        f'{model.trained.workdir} has the encoder {config.encoder!r}; as'
        ' sentence-transformers only BERT can be exported.'
    )
  params = {k: np.asarray(v) for k, v in model.params['embedder'].items()}
  values = huggingface_config.foreign_config('bert', config)
  _json(folder / 'config.json', values | {'architectures': ['BertModel']})
  _weights(folder, convert.tower_tensors(config, params, encoder))
  model.write_tokenizer(folder, 'BertTokenizer')
  _json(
      folder / 'modules.json',
      [
          {'idx': i, 'name': str(i), 'path': path, 'type': f'{_PACKAGE}.{kind}'}
          for i, (path, kind) in enumerate(_MODULES)
      ],
  )
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
          'word_embedding_dimension': config.width,
          **{f'pooling_mode_{m}': m == 'cls_token' for m in modes},
      },
  )
  for path, dense, scale, activation in (
      ('2_Dense', f'{encoder}.pooler', 1.0, 'activation.Tanh'),
      ('3_Dense', f'{projection}.dense', _PROJECTION_SCALE, 'linear.Identity'),
  ):
    kernel = params[f'{dense}.kernel'] * np.float32(scale)
    _json(
        folder / path / 'config.json',
        {
            'in_features': kernel.shape[0],
            'out_features': kernel.shape[1],
            'bias': True,
            'activation_function': f'torch.nn.modules.{activation}',
        },
    )
    _weights(
        folder / path,
        {
            'linear.weight': np.ascontiguousarray(kernel.T),
            'linear.bias': params[f'{dense}.bias'] * np.float32(scale),
        },
    )
  _json(
      folder / '4_LayerNorm' / 'config.json',
      {'dimension': config.embedding_width},
  )
  _weights(
      folder / '4_LayerNorm',
      {
          'norm.weight': params[f'{projection}.norm.scale'],
          'norm.bias': params[f'{projection}.norm.bias'],
      },
  )
  model.write_card(
      folder,
      f'Retriever of REALM{f": the {name} tower" if name else ""}',
      'sentence-transformers',
      'Text to a vector, for retrieval by inner product.',
      _USAGE.format(inside=f'/{name}' if name else ''),
  )


def _weights(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  weights.write_safetensors(
      folder / 'model.safetensors', tensors, {'format': 'pt'}
  )


def _json(path: pathlib.Path, values: Any) -> None:
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(values, indent=2) + '\n', 'utf-8')
