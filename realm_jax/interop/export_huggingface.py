"""`realm-jax export --format=huggingface`: folders that transformers loads.

Each class of transformers 4.40.2 becomes a folder with config.json, the
tokenizer, a card, and model.safetensors with every tensor of the class. An
import that was not trained is exported exactly as it was.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

import realm_jax
from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import block_records
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.interop import sources
from realm_jax.interop import weights
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

Path = str | os.PathLike[str]

_TEXT = (
    'A query is `[CLS] text [SEP]`, a document `[CLS] title [SEP] body [SEP]`'
)
_SUMMARIES = {
    'bert': 'The reader of REALM as a BERT with its masked-LM head. The input'
    ' is `[CLS] sentence with [MASK] [SEP] document [SEP]`.',
    'embedder': f'The retriever of REALM: text to a vector. {_TEXT} with'
    ' segments 0 and 1. Relevance is the inner product; there is no L2 norm.',
    'scorer': f'The two towers of the retriever of REALM. {_TEXT} with segments'
    ' 0 and 1.',
    'encoder': 'The knowledge-augmented encoder (reader) of REALM. The input is'
    ' `[CLS] sentence with [MASK] [SEP] body [SEP]`, once for each candidate.'
    ' Pass `mlm_mask` with `labels`.',
    'reader': 'The span reader of REALM for open-domain questions. The input is'
    ' `[CLS] question [SEP] body [SEP]`.',
    'openqa': 'REALM for open-domain questions, with its documents. One'
    ' question at a time; documents are the bodies of the passages, without'
    ' their titles.',
    'tagger': 'A tagger of named entities, for salient spans. The input is'
    ' `[CLS] sentence [SEP]`. The label of a word is that of its first'
    ' wordpiece. With config.model.capitals, segment 1 (`token_type_ids`) marks'
    ' the words with a capital letter.',
}
_TABLE_BYTES = 1 << 26
_CARD = """---
library_name: {library}
language: en
tags: [realm, retrieval, open-domain-question-answering]
---

# {title}

{summary}

| | |
|---|---|
{facts}

## Use

{usage}
"""
_RETRIEVER = """
With realm_jax:

```python
import realm_jax

retriever = realm_jax.Retriever.load('FOLDER')
query_emb = retriever.embed_queries(['a query'])
doc_emb = retriever.embed_passages([('title', 'body')])
```
"""


@dataclasses.dataclass(frozen=True)
class Model:
  """The parameters of one step of a workdir, for an export.

  about: the metadata of the checkpoint.
  imported: the sources of the parameters; none after training.
  """

  trained: trained_lib.Trained
  step: int
  params: trained_lib.Params
  about: dict[str, Any]
  imported: list[sources.Imported]

  @classmethod
  def open(
      cls, workdir: Path, step: int | None, corpus: Path | None = None
  ) -> 'Model':
    """Loads a checkpoint, or a snapshot of the retriever; None: the newest.

    `corpus`: where it is now; None: where it was. It is not opened here.
    """
    trained = trained_lib.Trained.open_parameters(workdir, corpus)
    checkpoints, _ = trained_lib.steps_available(workdir)
    step = checkpoints[-1] if step is None else step
    params = trained.load(step)
    about = checkpoint.saved_about(
        trained.workdir, step if step in checkpoints else checkpoints[-1]
    )
    imported = sources.read_imported(workdir) if step == 0 else []
    return cls(trained, step, params, about, imported)

  def write_tokenizer(self, folder: pathlib.Path, tokenizer_class: str) -> None:
    """Writes the files of a WordPiece tokenizer of transformers."""
    tokenizer = self.trained.tokenizer
    tokenizer.save(folder)
    settings: dict[str, Any] = {
        'model_max_length': self.trained.config.model.max_positions
    }
    if tokenizer.rules is not None:
      path = folder / 'tokenizer_config.json'
      files.write_json(path, {**files.read_json(path), **settings})
      return
    specials = {
        f'{name}_token': f'[{name.upper()}]'
        for name in ('pad', 'unk', 'cls', 'sep', 'mask')
    }
    settings |= {
        'do_lower_case': tokenizer.lowercase,
        'strip_accents': None,
        'tokenize_chinese_chars': True,
        'tokenizer_class': tokenizer_class,
        **specials,
    }
    files.write_json(folder / 'tokenizer_config.json', settings)
    files.write_json(folder / 'special_tokens_map.json', specials)

  def write_card(
      self,
      folder: pathlib.Path,
      title: str,
      library: str,
      summary: str,
      usage: str,
  ) -> None:
    """Writes the model card; `usage` is Markdown."""
    config = self.trained.config
    model = config.model
    facts: dict[str, Any] = {
        'training step': self.step,
        'objective': config.objective,
        'corpus fingerprint': self.about.get('corpus_fingerprint') or 'none',
        'tokenizer digest': self.trained.tokenizer.digest,
        'layers, width, heads':
            f'{model.num_layers}, {model.width}, {model.num_heads}',
        'retrieval embedding': f'{model.embedding_width}, inner product',
        'towers': model.towers,
        **{
            f'parameters of the {name}': checkpoint.params_digest(params)[:16]
            for name, params in sorted(self.params.items())
        },
        **self._metrics(),
        'made with': f'realm_jax {realm_jax.__version__}',
    }
    for one in self.imported:
      local = pathlib.Path(one.name)
      name = local.name if local.exists() else one.name
      facts[f'imported from ({one.kind})'] = name
    rows = '\n'.join(f'| {key} | {value} |' for key, value in facts.items())
    text = _CARD.format(
        title=title, library=library, summary=summary, facts=rows,
        usage=usage.strip(),
    )
    (folder / 'README.md').write_text(text, 'utf-8')

  def _metrics(self) -> dict[str, str]:
    """Returns the figures of `realm-jax evaluate` for this step, if any."""
    path = self.trained.workdir / 'evaluation' / f'{self.step}.json'
    found: dict[str, str] = {}

    def visit(prefix: str, value: Any) -> None:
      if isinstance(value, dict):
        for name, part in value.items():
          visit(f'{prefix} {name}'.strip(), part)
      elif isinstance(value, float):
        found[prefix] = f'{value:.4g}'

    visit('', files.read_object(path, optional=True))
    return found


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Rows of a table of embeddings as one float32 tensor."""

  table: corpus_lib.Rows
  rows: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    return len(self.rows), self.table.shape[1]

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float32)

  def chunks(self) -> Iterator[np.ndarray]:
    step = max(1, _TABLE_BYTES // (self.shape[1] * 4))
    for start in range(0, self.shape[0], step):
      yield self.table[self.rows[start : start + step]].astype(np.float32)


def _default_kinds(model: Model) -> list[str]:
  """Returns the kinds of the sources, or else one kind for each component."""
  config = model.trained.config
  # An open-QA model can be imported without its documents, or in part.
  whole = bool(config.corpus) and 'span_reader' in model.params
  kinds = [one.kind for one in model.imported]
  if huggingface_config.RETRIEVER in kinds:
    kinds = []  # No class of transformers has its head.
  if kinds and ('openqa' not in kinds or whole):
    return kinds
  by_component = {
      'embedder': 'embedder' if config.model.towers == 'shared' else 'scorer',
      'reader': 'encoder',
      'span_reader': 'reader',
      'tagger': 'tagger',
  }
  if config.model.encoder != 'bert':  # REALM's classes are BERTs.
    by_component = {'reader': 'bert', 'tagger': 'tagger'}
  return [k for name, k in by_component.items() if name in model.params]


def export(
    model: Model, output: pathlib.Path, kinds: Sequence[str] | None = None
) -> list[pathlib.Path]:
  """Writes `output` for the first kind, `output`/KIND for each further one.

  `kinds` are of `huggingface_config.KINDS`; None: as imported, or else the
  retriever, then the reader. Returns the folders.

  Raises:
    FileNotFoundError: 'openqa' is wanted and there is no index.
    ValueError: a kind is unknown, or the model lacks a component of it.
  """
  kinds = _default_kinds(model) if kinds is None else list(kinds)
  for kind in kinds:
    if kind not in huggingface_config.KINDS:
      raise ValueError(
          f'{kind!r} is no class; there are'
          f' {", ".join(huggingface_config.KINDS)}.'
      )
    huggingface_config.class_of(kind, model.trained.config.model)
  if not kinds:
    raise ValueError(
        f'{model.trained.workdir} has a retriever or span reader alone; for'
        f' the encoder {model.trained.config.model.encoder!r}, transformers has'
        ' no class of them.'
    )
  folders = []
  with files.atomic_folder(output, overwrite=True) as temporary:
    for kind in kinds:
      name = '' if kind == kinds[0] else kind
      folder = temporary / name
      folder.mkdir(exist_ok=True)
      _write(model, folder, kind, name)
      folders.append(output / name)
  return folders


def _write(
    model: Model, folder: pathlib.Path, kind: str, subfolder: str
) -> None:
  source = next((one for one in model.imported if one.kind == kind), None)
  config = model.trained.config
  if kind in ('embedder', 'scorer', 'openqa'):
    _check_head(config.model)
  values = huggingface_config.config_json(
      kind, config.model, source.config if source else None
  )
  if kind not in huggingface_config.BERT_KINDS:
    values.setdefault('num_candidates', config.num_candidates)
  if kind == 'tagger':
    tags = entities.labels(config.model.entity_types)
    values['id2label'] = {str(label): tag for label, tag in enumerate(tags)}
    values['label2id'] = {tag: label for label, tag in enumerate(tags)}
    values['capitals'] = config.model.capitals
  tensors: dict[str, np.ndarray | weights.Chunked]
  if kind == 'bert' and source is not None:
    body = values['architectures'][0].replace('ForMaskedLM', 'Model')
    values['architectures'] = source.config.get('architectures', [body])
    tensors = {
        name: convert.torch_tensor(ours, model.params)
        for name, ours in source.tensors.items()
    }
    tensors |= {name: tensors[of] for name, of in source.copies.items()}
  else:
    unused = source.unused if source else {}
    tensors = {**convert.tensors_of(kind, config.model, model.params, unused)}
  if source is not None:
    tensors |= source.unused
  if kind == 'openqa':
    index = model.trained.published(model.params, model.step)
    live = index.live_rows
    values['num_block_records'] = len(live)
    tensors = {'block_emb': _Rows(index.table, live), **tensors}
  if source is not None and source.dtypes:
    # A conversion from half precision to float32 and back is exact.
    for name, dtype in source.dtypes.items():
      tensor = tensors.get(name)
      if isinstance(tensor, np.ndarray):
        tensors[name] = tensor.astype(np.dtype(dtype))
    values['torch_dtype'] = source.config.get('torch_dtype', 'float16')
  files.write_json(folder / 'config.json', values)
  weights.write_folder(folder, tensors)
  if kind == 'openqa':
    corpus, blanks = model.trained.corpus, set(source.blanks if source else [])
    records = (
        b'' if row in blanks else corpus.passage_text(row)['text'].encode()
        for row in live.tolist()
    )
    path = folder / block_records.FILE
    block_records.byte_records_writer(path, len(live), records)
  realm = kind not in huggingface_config.BERT_KINDS
  model.write_tokenizer(folder, 'RealmTokenizer' if realm else 'BertTokenizer')
  model.write_card(
      folder, huggingface_config.class_of(kind, config.model), 'transformers',
      _SUMMARIES[kind], _usage(kind, subfolder, config.model),
  )


def _check_head(model: config_lib.ModelConfig) -> None:
  """Checks that a class of transformers, REALM's, can hold the retriever."""
  usual = config_lib.ModelConfig()
  others = [
      f'config.model.{name}={getattr(model, name)!r}'
      for name in config_lib.HEAD_FIELDS
      if getattr(model, name) != getattr(usual, name)
      and not name.endswith('score_scale')
  ]
  if others:
    raise ValueError(
        f'The retriever has {", ".join(others)}, which the classes of'
        ' transformers for REALM cannot hold; export it with'
        ' --format=sentence-transformers.'
    )


def _usage(kind: str, subfolder: str, config: config_lib.ModelConfig) -> str:
  name = huggingface_config.class_of(kind, config)
  inside = f", subfolder='{subfolder}'" if subfolder else ''
  version = '4.40.2, the last that has REALM'
  if kind in huggingface_config.BERT_KINDS:
    version = 'any version'
  lines = [f'from transformers import AutoTokenizer, {name}', '']
  if kind == 'openqa':
    lines[0] += ', RealmRetriever'
    lines += [
        "retriever = RealmRetriever.from_pretrained('FOLDER')",
        f"model = {name}.from_pretrained('FOLDER', retriever=retriever)",
        "tokenizer = AutoTokenizer.from_pretrained('FOLDER')",
        "question = tokenizer(['Who?'], return_tensors='pt')",
        'output, answer_ids = model(**question, return_dict=False)',
        'print(tokenizer.decode(answer_ids))',
    ]
  else:
    lines += [
        f"tokenizer = AutoTokenizer.from_pretrained('FOLDER'{inside})",
        f"model = {name}.from_pretrained('FOLDER'{inside})",
    ]
  if kind == 'embedder':
    lines += [
        "inputs = tokenizer('a query', return_tensors='pt')",
        'embedding = model(**inputs).projected_score',
    ]
  code = '\n'.join(lines)
  text = f'With transformers ({version}):\n\n```python\n{code}\n```\n'
  return text + _RETRIEVER * (kind in ('embedder', 'scorer', 'openqa'))
