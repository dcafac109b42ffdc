"""`realm-jax export --format=huggingface`: folders that transformers loads.

Public: `export`, `default_kinds`. Each class of transformers 4.40.2 gets a
folder with config.json, model.safetensors (every name, so that nothing is
missing), the tokenizer and a card. What was imported and not trained comes back
as it was.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import json
import pathlib

import numpy as np

from realm_jax.corpus import concatenated
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.interop import block_records
from realm_jax.interop import card
from realm_jax.interop import checkpoint_sources
from realm_jax.interop import convert
from realm_jax.interop import exported
from realm_jax.interop import huggingface_names
from realm_jax.interop import importing
from realm_jax.interop import weights

_SUMMARIES = {
    'bert': 'The reader of REALM as a BERT with its masked-LM head.',
    'embedder': 'The retriever of REALM: text to a vector.',
    'scorer': 'The two towers of the retriever of REALM.',
    'encoder': 'The knowledge-augmented encoder (reader) of REALM.',
    'reader': 'The span reader of REALM for open-domain questions.',
    'openqa': 'REALM for open-domain questions, with its documents.',
    'tagger': 'A tagger of named entities, for salient spans.',
}
_INPUTS = {
    'bert': 'The input is `[CLS] sentence with [MASK] [SEP] document [SEP]`.',
    'embedder': (
        'A query is `[CLS] text [SEP]`, a document `[CLS] title [SEP] body'
        ' [SEP]` with segments 0 and 1. Relevance is the inner product; there'
        ' is no L2 norm.'
    ),
    'scorer': (
        'A query is `[CLS] text [SEP]`, a document `[CLS] title [SEP] body'
        ' [SEP]` with segments 0 and 1.'
    ),
    'encoder': (
        'The input is `[CLS] sentence with [MASK] [SEP] body [SEP]`, once for'
        ' each candidate. Pass `mlm_mask` with `labels`.'
    ),
    'reader': 'The input is `[CLS] question [SEP] body [SEP]`.',
    'openqa': (
        'One question at a time; documents are the bodies of the passages,'
        ' without their titles.'
    ),
    'tagger': (
        'The input is `[CLS] sentence [SEP]`; what a wordpiece that begins a'
        ' word is labelled counts. Where config.model.capitals was true,'
        ' segment 1 (`token_type_ids`) marks the words with a capital letter.'
    ),
}
_TABLE_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Some embeddings of a table as one float32 tensor."""

  table: concatenated.Rows
  rows: np.ndarray

  @property
  def shape(self) -> tuple[int, ...]:
    return len(self.rows), self.table.shape[1]

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.float32)

  @property
  def nbytes(self) -> int:
    return self.shape[0] * self.shape[1] * 4

  def chunks(self) -> Iterator[np.ndarray]:
    step = max(1, _TABLE_BYTES // (self.shape[1] * 4))
    for start in range(0, self.shape[0], step):
      yield self.table[self.rows[start : start + step]].astype(np.float32)


def default_kinds(workdir: exported.Workdir) -> list[str]:
  """What a workdir is exported as, unless the user says otherwise.

  An import as what it was; else the retriever, then the reader.
  """
  # An open-QA model can come without its documents, or in part.
  whole = workdir.corpus is not None and 'span_reader' in workdir.params
  kinds = [one.kind for one in workdir.imported]
  if kinds and ('openqa' not in kinds or whole):
    return kinds
  shared = workdir.config.model.towers == 'shared'
  kinds = []
  if 'embedder' in workdir.params:
    kinds.append('embedder' if shared else 'scorer')
  if 'reader' in workdir.params:
    kinds.append('encoder')
  if 'span_reader' in workdir.params:
    kinds.append('reader')
  if 'tagger' in workdir.params:
    kinds.append('tagger')
  return kinds


def export(
    workdir: exported.Workdir,
    output: exported.Path,
    kinds: Sequence[str] | None = None,
) -> list[pathlib.Path]:
  """Writes `output` for the first kind, `output`/KIND for each further one.

  Args:
    workdir: opened.
    output: folder to write; it appears, complete, at the very end.
    kinds: of `huggingface_names.KINDS`; None: `default_kinds`.

  Returns:
    The folders.

  Raises:
    FileExistsError: if `output` is there and not empty.
    FileNotFoundError: if 'openqa' is wanted and there is no index.
    ValueError: if a kind is unknown, or the workdir has not what it needs.
  """
  kinds = default_kinds(workdir) if kinds is None else list(kinds)
  for kind in kinds:
    if kind not in huggingface_names.KINDS:
      raise ValueError(
          f'{kind!r} is no class; there are'
          f' {", ".join(huggingface_names.KINDS)}.'
      )
  folders = []
  with exported.atomic_folder(output) as temporary:
    for kind in kinds:
      name = '' if kind == kinds[0] else kind
      folder = temporary / name
      folder.mkdir(exist_ok=True)
      _write(workdir, folder, kind, name)
      folders.append(pathlib.Path(output) / name)
  return folders


def _write(
    workdir: exported.Workdir, folder: pathlib.Path, kind: str, subfolder: str
) -> None:
  source = next((one for one in workdir.imported if one.kind == kind), None)
  model = workdir.config.model
  values = convert.foreign_config(
      kind, model, source.config if source else None
  )
  if kind not in huggingface_names.BERT_KINDS:
    values.setdefault('num_candidates', workdir.config.num_candidates)
  if kind == 'tagger':
    tags = entities.labels(model.entity_types)
    values['id2label'] = {str(label): tag for label, tag in enumerate(tags)}
    values['label2id'] = {tag: label for label, tag in enumerate(tags)}
  tensors: dict[str, np.ndarray | weights.Chunked]
  if kind == 'bert' and source is not None:
    values['architectures'] = source.config.get('architectures', ['BertModel'])
    tensors = {
        name: convert.foreign_tensor(ours, workdir.params)
        for name, ours in source.tensors.items()
    }
    tensors |= {name: tensors[of] for name, of in source.copies.items()}
    tensors |= source.unused
  else:
    tensors = dict(
        convert.tensors_of(
            kind, model, workdir.params, source.unused if source else None
        )
    )
  if kind == 'openqa':
    index = workdir.index()
    live = index.live_rows
    rows = _Rows(index.table, live)
    values['num_block_records'] = rows.shape[0]
    tensors = {'block_emb': rows, **tensors}
  if source is not None and source.dtypes:
    tensors |= _as_it_was(tensors, source)
    values['torch_dtype'] = source.config.get('torch_dtype', 'float16')
  (folder / 'config.json').write_text(
      json.dumps(values, indent=2, sort_keys=True) + '\n', 'utf-8'
  )
  # transformers refuses a file that does not say so.
  weights.write_safetensors(
      folder / 'model.safetensors', tensors, {'format': 'pt'}
  )
  if kind == 'openqa':
    assert workdir.corpus is not None  # Else there were no generation.
    blanks = source.blanks if source else []
    block_records.byte_records_writer(
        folder / checkpoint_sources.BLOCK_RECORDS,
        values['num_block_records'],
        _blocks(workdir.corpus, live, set(blanks)),
    )
  realm = kind not in huggingface_names.BERT_KINDS
  card.tokenizer_files(
      folder, workdir, 'RealmTokenizer' if realm else 'BertTokenizer'
  )
  (folder / 'README.md').write_text(
      card.model_card(
          workdir,
          huggingface_names.KINDS[kind],
          'transformers',
          f'{_SUMMARIES[kind]} {_INPUTS[kind]}',
          _usage(kind, subfolder),
      ),
      'utf-8',
  )


def _as_it_was(
    tensors: dict[str, np.ndarray | weights.Chunked],
    source: importing.Imported,
) -> dict[str, np.ndarray]:
  """Gives half-precision tensors back in half precision: exact both ways."""
  found = {}
  for name, dtype in source.dtypes.items():
    tensor = tensors[name]
    if isinstance(tensor, np.ndarray):
      found[name] = tensor.astype(np.dtype(dtype))
  return found


def _blocks(
    corpus: corpus_lib.Corpus, rows: np.ndarray, blanks: set[int]
) -> Iterator[bytes]:
  for row in rows.tolist():
    yield (
        b''
        if row in blanks
        else corpus.passage_text(row)['text'].encode('utf-8')
    )


def _usage(kind: str, subfolder: str) -> str:
  name = huggingface_names.KINDS[kind]
  inside = f", subfolder='{subfolder}'" if subfolder else ''
  if kind in huggingface_names.BERT_KINDS:
    version, imports = 'any version', f'AutoTokenizer, {name}'
  else:
    version = '4.40.2, the last that has REALM'
    imports = f'AutoTokenizer, {name}'
  lines = [f'from transformers import {imports}', '']
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
  ours = ''
  if kind in ('embedder', 'scorer', 'openqa'):
    ours = (
        '\nWith realm_jax:\n\n```python\nimport realm_jax\n\n'
        "retriever = realm_jax.Retriever.load('FOLDER')\n"
        "query_emb = retriever.embed_queries(['a query'])\n"
        "doc_emb = retriever.embed_passages([('title', 'body')])\n```\n"
    )
  return f'With transformers ({version}):\n\n```python\n{code}\n```\n{ours}'
