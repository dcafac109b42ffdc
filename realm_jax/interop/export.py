"""`realm-jax export`: a workdir in the formats of other tools.

`huggingface` is in export_huggingface.py. `sentence-transformers` serves BEIR,
MTEB, LangChain and vector databases; `index` writes the document embeddings:
`embeddings.npy` [N, E], `ids.jsonl` with the passage id of each row,
`index.json`, and `index.faiss` where FAISS is installed.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import math
import pathlib
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import cuts
from realm_jax.interop import convert
from realm_jax.interop import export_huggingface
from realm_jax.interop import huggingface_config
from realm_jax.interop import huggingface_names
from realm_jax.interop import sentence_transformers as st
from realm_jax.interop import sources
from realm_jax.interop import weights
from realm_jax.models import components
from realm_jax.runtime import files

Path = export_huggingface.Path

FORMATS = ('huggingface', 'sentence-transformers', 'index')
_ROWS = 2**16

# Beginnings of the names of tensors that the BertModel of a folder can have.
_LOADABLE = ('embeddings.', 'encoder.', 'pooler.', 'bert.', 'cls.')
_LARGE_SCALE = 2.0**12
# Class, settings and tensors of a module.
_Module = tuple[str, dict[str, Any], dict[str, np.ndarray]]
_USAGE = """
```python
import sentence_transformers

model = sentence_transformers.SentenceTransformer('FOLDER{inside}')
query_emb = model.encode(['a query']{query})
doc_emb = model.encode([{document}]{prompt})
score = query_emb @ doc_emb.T
```

{note}
"""
# A document, and what to know of it, by config.model.titles.
_DOCUMENTS = {
    'segments': (
        "('title', 'body')",
        'A document is a pair, so that the body gets its own segment, as in'
        " training; a document without a title is the pair `('', body)`. If a"
        ' tool joins title and body into one text, the embedding differs'
        ' slightly.',
    ),
    'pair': (
        "'title [SEP] body'",
        'Title and body are one text with `[SEP]` between them.',
    ),
    'text': ("'title{separator}body'", 'Title and body are one text.'),
}


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
    classes: for 'huggingface': of `huggingface_config.KINDS`, the first in
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
  if format == 'huggingface':
    return export_huggingface.export(model, output, classes)
  if format == 'index':
    return _index(model, output, dtype)
  return _sentence_transformers(model, output)


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
  cuts.warn_of_passages(trained.corpus, trained.config)
  index = trained.published(model.params, model.step)
  table, live = index.table, index.live_rows
  with files.atomic_folder(output, overwrite=True) as folder:
    rows = np.lib.format.open_memmap(
        folder / 'embeddings.npy', 'w+', np.dtype(dtype),
        (len(live), table.shape[1]),
    )
    flat = None
    with contextlib.suppress(ImportError):
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
    files.write_json(folder / 'index.json', about)
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
  if config.model.encoder != 'bert':
    raise ValueError(
        f'{model.trained.workdir} has the encoder {config.model.encoder!r}; as'
        ' sentence-transformers only BERT can be exported.'
    )
  separate = config.model.towers != 'shared'
  names = ('query', 'document') if separate else ('',)
  params = model.params['embedder']
  with files.atomic_folder(output, overwrite=True) as temporary:
    for name in names:
      folder = temporary / name
      folder.mkdir(exist_ok=True)
      _write_tower(folder, config, params, name, _source(model, name))
      model.write_tokenizer(folder, 'BertTokenizer')
      model.write_card(
          folder,
          f'Retriever of REALM{f": the {name} tower" if name else ""}',
          'sentence-transformers',
          'Text to a vector, for retrieval by inner product.',
          _usage(config.model, name),
      )
  return [output / name for name in names]


def _source(
    model: export_huggingface.Model, tower: str
) -> sources.Imported | None:
  """Returns the checkpoint that a tower was imported from, if not trained."""
  encoder = 'query_encoder' if tower == 'query' else 'encoder'
  for one in model.imported:
    ours = f'embedder/{encoder}.bert.embed_norm.scale'
    retriever = one.kind == huggingface_config.RETRIEVER
    if retriever and ours in one.tensors.values():
      return one
  return None


def _usage(model: config_lib.ModelConfig, tower: str) -> str:
  """Returns the part of the card that shows how to embed texts."""
  document, note = _DOCUMENTS[model.titles]
  if model.normalize:
    note += ' Embeddings have norm 1, so the score is the cosine.'
    if model.score_scale != 1 or model.learn_score_scale:
      note += ' The scale of training is not part of it.'
  else:
    note += ' Relevance is the inner product; do not normalise.'
  prompts = {
      name: f", prompt_name='{name}'" if name in _prompts(model) else ''
      for name in ('query', 'document')
  }
  return _USAGE.format(
      inside=f'/{tower}' if tower else '',
      query=prompts['query'],
      prompt=prompts['document'],
      document=document.format(separator=model.title_separator),
      note=note,
  )


def _prompts(model: config_lib.ModelConfig) -> dict[str, str]:
  found = {'query': model.query_prefix, 'document': model.document_prefix}
  return {name: text for name, text in found.items() if text}


def _write_tower(
    folder: pathlib.Path,
    config: config_lib.Config,
    params: components.Params,
    tower: str,
    source: sources.Imported | None,
) -> None:
  """Writes one tower: encoder, modules and their settings, no tokenizer.

  `tower` is 'query' or 'document' of two, or '' for the only one. If the
  parameters are those of a `source`, its types and unused tensors are written.
  """
  model = config.model
  own = 'query_' if tower == 'query' else ''
  encoder = 'query_encoder' if own and model.towers == 'separate' else 'encoder'
  modules: list[_Module] = [
      ('Transformer', {}, {}),
      *_modules(model, params, encoder, f'{own}projection', source),
  ]
  listed = []
  for i, (kind, values, tensors) in enumerate(modules):
    path = f'{i}_{kind}' if i else ''  # The encoder has no folder of its own.
    class_name = f'{st.PACKAGE}.models.{kind}'
    listed.append({'idx': i, 'name': str(i), 'path': path, 'type': class_name})
    (folder / path).mkdir(exist_ok=True)
    if values:
      files.write_json(folder / path / 'config.json', values)
    if tensors:
      weights.write_folder(folder / path, tensors)
  files.write_json(folder / st.MODULES, listed)
  lengths = config.lengths
  length = lengths.query if tower == 'query' else lengths.document
  limits = {
      'max_seq_length': min(length, model.max_positions), 'do_lower_case': False
  }
  files.write_json(folder / st.LENGTHS, limits)
  prompts = {k: v for k, v in _prompts(model).items() if tower in ('', k)}
  settings = {
      'similarity_fn_name': 'cosine' if model.normalize else 'dot',
      'prompts': prompts,
      'default_prompt_name': tower if tower in prompts else None,
  }
  files.write_json(folder / st.SETTINGS, settings)
  _write_encoder(folder, config, params, encoder, source)


def _modules(
    model: config_lib.ModelConfig,
    params: components.Params,
    encoder: str,
    projection: str,
    source: sources.Imported | None,
) -> list[_Module]:
  """Returns the modules behind the encoder of a tower."""
  pooling = 'cls' if model.pooling == 'cls_tanh' else model.pooling
  flags = [*st.FLAGS][:4] + [*st.FLAGS][5:] * (pooling == 'last')
  settings: dict[str, Any] = {'word_embedding_dimension': model.width}
  settings |= {f: st.POOLINGS.get(st.FLAGS[f]) == pooling for f in flags}
  found: list[_Module] = [('Pooling', settings, {})]

  def add_dense(name: str, activation: str, scale: float = 1.0) -> None:
    kernel = np.asarray(params[f'{name}.kernel']) * np.float32(scale)
    bias = np.asarray(params[f'{name}.bias']) * np.float32(scale)
    settings = {
        'in_features': kernel.shape[0],
        'out_features': kernel.shape[1],
        'bias': True,
        'activation_function': st.TORCH + activation,
    }
    tensors = {
        'linear.weight': np.ascontiguousarray(kernel.T), 'linear.bias': bias
    }
    tensors = _in_types(tensors, f'{name}.kernel', source)
    found.append(('Dense', settings, tensors))

  if model.pooling == 'cls_tanh':
    add_dense(f'{encoder}.pooler', st.TANH)
  if model.projection == 'linear':
    add_dense(f'{projection}.dense', st.IDENTITY)
  elif model.projection == 'layer_norm':
    # Except for epsilon, LayerNorm does not depend on the scale of its input. A
    # power of two, exact in floating point, turns their epsilon into ours.
    eps = model.projection_norm_eps or model.layer_norm_eps
    scale = 2.0 ** round(math.log2(st.EPS / eps) / 2) if eps else _LARGE_SCALE
    add_dense(f'{projection}.dense', st.IDENTITY, scale)
    norm = {
        'norm.weight': np.asarray(params[f'{projection}.norm.scale']),
        'norm.bias': np.asarray(params[f'{projection}.norm.bias']),
    }
    norm = _in_types(norm, f'{projection}.norm.scale', source)
    found.append(('LayerNorm', {'dimension': model.embedding_width}, norm))
  if model.normalize:
    found.append(('Normalize', {}, {}))
  return found


def _write_encoder(
    folder: pathlib.Path,
    config: config_lib.Config,
    params: components.Params,
    encoder: str,
    source: sources.Imported | None,
) -> None:
  """Writes config.json and the tensors of the encoder."""
  values = huggingface_config.config_json(
      'bert', config.model, source.config if source else None
  )
  values['architectures'] = ['BertModel']
  mapped = {
      entry.theirs: entry.ours
      for entry in huggingface_names.tower(config.model, encoder)
      if entry.ours.removeprefix('embedder/') in params  # Maybe no pooler.
  }
  unused: Mapping[str, weights.FileTensor] = {}
  if source is not None:
    theirs = {n: o for n, o in source.tensors.items() if '/' not in n}
    if all(name.startswith(_LOADABLE) for name in theirs):
      mapped, unused = theirs, source.unused
      own = source.config.get('architectures')
      values['architectures'] = own or values['architectures']
    if source.dtypes:
      values['torch_dtype'] = source.config.get('torch_dtype', 'float16')
  tensors: dict[str, Any] = {}
  for theirs_name, ours in mapped.items():
    array = convert.torch_tensor(ours, {'embedder': params})
    tensors |= _in_types({theirs_name: array}, ours, source)
  files.write_json(folder / 'config.json', values)
  weights.write_folder(folder, tensors | dict(unused))


def _in_types(
    tensors: dict[str, np.ndarray], ours: str, source: sources.Imported | None
) -> dict[str, np.ndarray]:
  """Returns tensors in the type that the parameter `ours` was imported in."""
  if source is None or not source.dtypes:
    return tensors
  ours = f'embedder/{ours.removeprefix("embedder/")}'
  name = next((n for n, o in source.tensors.items() if o == ours), '')
  dtype = np.dtype(source.dtypes.get(name, 'float32'))
  return {key: value.astype(dtype) for key, value in tensors.items()}
