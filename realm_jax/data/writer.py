"""Writes the corpus artifact, chunk by chunk.

Public: `CorpusWriter`, `FORMAT`. All files only grow, so
that memory does not depend on the size of the corpus; see `corpus` for what
they hold.
"""

import collections
from collections.abc import Iterator
import contextlib
import hashlib
import json
import os
import pathlib
from typing import IO, Any

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds

import realm_jax
from realm_jax.data import corpus as corpus_lib
from realm_jax.data import examples
from realm_jax.data import packing
from realm_jax.data import tokenizer as tokenizer_lib

FORMAT = 'realm_jax corpus'
_RECORDS_PER_SHARD = 200_000
_MAX_VALIDATION = 5000  # Sentences, where the input marks none.

_PASSAGE_FEATURES = {
    'id': tfds.features.Text(),
    'article': np.int64,
    'title': tfds.features.Text(),
    'text': tfds.features.Text(),
}
# Spans in UTF-8 bytes of the text; -1 is the number of no passage.
_SENTENCE_FEATURES = {
    'text': tfds.features.Text(),
    'title': tfds.features.Text(),
    'passage': np.int64,
    'span_starts': tfds.features.Sequence(np.int64),
    'span_limits': tfds.features.Sequence(np.int64),
}


def _create(path: pathlib.Path) -> IO[bytes]:
  return open(path, 'wb')


class _ArrayWriter:
  """A .npy file that grows along its first axis."""

  def __init__(
      self, path: pathlib.Path, dtype: Any, shape: tuple[int, ...] = ()
  ):
    self._dtype, self._shape = np.dtype(dtype), shape
    self._rows = 0
    self._file = _create(path)
    self._write_header()

  def append(self, rows: np.ndarray) -> None:
    """Appends rows; their type must fit."""
    rows = np.asarray(rows)
    self._file.write(rows.astype(self._dtype, casting='same_kind').tobytes())
    self._rows += len(rows)

  def close(self) -> int:
    """Finishes the file and returns its rows."""
    self._file.seek(0)
    self._write_header()
    self._file.close()
    return self._rows

  def _write_header(self) -> None:
    # numpy pads the header so that the first axis can grow in place.
    np.lib.format.write_array_header_1_0(
        self._file,
        {
            'descr': np.lib.format.dtype_to_descr(self._dtype),
            'fortran_order': False,
            'shape': (self._rows, *self._shape),
        },
    )


class _TokenWriter:
  """A flat file of wordpieces."""

  def __init__(self, path: pathlib.Path, dtype: Any):
    self._dtype = np.dtype(dtype)
    self._file = _create(path)
    self.size = 0

  def append(self, ids: np.ndarray) -> int:
    """Appends wordpieces and returns where they begin."""
    start = self.size
    self._file.write(ids.astype(self._dtype).tobytes())
    self.size += len(ids)
    return start

  def close(self) -> None:
    """Finishes the file."""
    self._file.close()


class _DatasetWriter:
  """A TFDS dataset in array_record format, written record by record.

  `tfds.core.SequentialWriter` would do, but it encodes every record itself, in
  one process. Here records come encoded; the metadata are written by TFDS.
  """

  def __init__(
      self, directory: pathlib.Path, features: dict[str, Any], description: str
  ):
    directory.mkdir()
    self._directory = directory
    self._features = features
    self._description = description
    self._splits: dict[str, _Split] = {}

  def append(self, split: str, record: bytes) -> None:
    """Appends an encoded record to a split."""
    if split not in self._splits:
      self._splits[split] = _Split(self._directory, split)
    self._splits[split].append(record)

  def close(self) -> dict[str, str]:
    """Finishes the dataset and returns the SHA-256 of each split's records."""
    if not self._splits:
      return {}
    infos = [split.close() for _, split in sorted(self._splits.items())]
    tfds.folder_dataset.write_metadata(
        data_dir=self._directory,
        features=tfds.features.FeaturesDict(self._features),
        split_infos=infos,
        check_data=False,  # It would need TensorFlow.
        description=self._description,
    )
    return {
        name: split.digest.hexdigest()
        for name, split in sorted(self._splits.items())
    }


class _Split:
  """The shards of a split; their number is known only at the end."""

  def __init__(self, directory: pathlib.Path, name: str):
    self._directory, self._name = directory, name
    self._writer: Any = None
    self._lengths: list[int] = []
    self._bytes = 0
    self.digest = hashlib.sha256()

  def append(self, record: bytes) -> None:
    if self._writer is None or self._lengths[-1] == _RECORDS_PER_SHARD:
      self._close_shard()
      path = self._directory / f'{self._name}.{len(self._lengths)}'
      # Groups of one record, for random access.
      self._writer = array_record_module.ArrayRecordWriter(
          os.fspath(path), 'group_size:1'
      )
      self._lengths.append(0)
    with _as_os_error():
      self._writer.write(record)
    self._lengths[-1] += 1
    self._bytes += len(record)
    self.digest.update(len(record).to_bytes(8, 'little') + record)

  def close(self) -> tfds.core.SplitInfo:
    self._close_shard()
    template = tfds.core.ShardedFileTemplate(
        data_dir=self._directory,
        dataset_name=self._directory.name,
        split=self._name,
        filetype_suffix='array_record',
    )
    for i in range(len(self._lengths)):
      os.rename(
          self._directory / f'{self._name}.{i}',
          template.sharded_filepath(
              shard_index=i, num_shards=len(self._lengths)
          ),
      )
    return tfds.core.SplitInfo(
        name=self._name,
        shard_lengths=self._lengths,
        num_bytes=self._bytes,
        filename_template=template,
    )

  def _close_shard(self) -> None:
    if self._writer is not None:
      with _as_os_error():
        self._writer.close()
      self._writer = None


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """The library reports a full disk, and nothing else, as RuntimeError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f'A dataset could not be written: {error}') from error


class _SentenceWriter:
  """The tables of one split of sentences."""

  def __init__(self, tables: pathlib.Path, split: str, tokens: str):
    self.tokens = tokens  # Name of the file that `starts` point into.
    self.count = 0
    self._num_spans = 0
    self._columns = {
        name: _ArrayWriter(tables / f'{split}.{name}.npy', dtype, shape)
        for name, dtype, shape in (
            ('starts', np.int64, ()),
            ('lengths', np.int32, ()),
            ('passages', np.int64, ()),
            ('span_offsets', np.int64, ()),
            ('spans', np.int32, (2,)),
        )
    }
    self._columns['span_offsets'].append(np.zeros(1, np.int64))

  def append(
      self,
      starts: np.ndarray,
      lengths: np.ndarray,
      passages: np.ndarray,
      span_counts: np.ndarray,
      spans: np.ndarray,
  ) -> None:
    """Appends sentences; `starts` and `passages` are of the whole corpus."""
    offsets = self._num_spans + np.cumsum(span_counts)
    for name, rows in (
        ('starts', starts),
        ('lengths', lengths),
        ('passages', passages),
        ('span_offsets', offsets),
        ('spans', spans),
    ):
      self._columns[name].append(rows)
    self.count += len(starts)
    self._num_spans += len(spans)

  def close(self) -> dict[str, Any]:
    for column in self._columns.values():
      column.close()
    return {
        'sentences': self.count,
        'spans': self._num_spans,
        'tokens': self.tokens,
    }


class CorpusWriter:
  """Everything in the corpus' folder; adds chunks in order."""

  def __init__(
      self,
      directory: pathlib.Path,
      tokenizer: tokenizer_lib.Tokenizer,
      pretraining: bool,
  ):
    self._directory, self._tokenizer = directory, tokenizer
    self._pretraining = pretraining
    self._tables = directory / 'tables'
    self._tables.mkdir()
    self._dtype = np.dtype(
        np.uint16 if tokenizer.vocab_size < 65_536 else np.uint32
    )
    self._passages = _DatasetWriter(
        directory / 'passages',
        _PASSAGE_FEATURES,
        'Passages of a realm_jax corpus; the row is the number of a passage.',
    )
    self._sentences = _DatasetWriter(
        directory / 'sentences',
        _SENTENCE_FEATURES,
        'Sentences of a realm_jax corpus with salient spans (UTF-8 bytes) and '
        'the row of their passage, or -1.',
    )
    self._columns = {
        name: _ArrayWriter(self._tables / f'{name}.npy', dtype)
        for name, dtype in (
            ('passage_offsets', np.int64),
            ('title_lengths', np.int32),
            ('articles', np.int32),
            ('passage_ids', np.uint64),
        )
    }
    self._columns['passage_offsets'].append(np.zeros(1, np.int64))
    self.num_passages = 0
    self._tokens: dict[str, _TokenWriter] = {}
    self._splits: dict[str, _SentenceWriter] = {}
    # Sentences of the passages need no second copy of their wordpieces; those
    # set aside from both corpora can point into one file only.
    self._files = {
        'knowledge': 'passage_tokens.bin',
        'pretraining': 'pretraining.tokens.bin',
        'validation': (
            'validation.tokens.bin' if pretraining else 'passage_tokens.bin'
        ),
    }
    self.counts: collections.Counter[str] = collections.Counter()

  def add(self, chunk: packing.Chunk, passages: bool, limited: bool) -> None:
    """Appends a chunk; `limited` bounds the sentences set aside."""
    prefix = '' if passages else 'pretraining_'
    for name, value in chunk.counts.items():
      self.counts[prefix + name] += value
    base_row = self.num_passages
    source = 'knowledge' if passages else 'pretraining'
    base = self._token_file(self._files[source]).append(chunk.tokens)
    if passages:
      self._columns['passage_offsets'].append(base + np.cumsum(chunk.lengths))
      self._columns['title_lengths'].append(chunk.title_lengths)
      self._columns['articles'].append(chunk.articles)
      self._columns['passage_ids'].append(chunk.ids)
      self.num_passages += len(chunk.lengths)
      for record in chunk.passage_records:
        self._passages.append('train', record)
    aside = chunk.sentence_validation
    if limited:
      have = (
          self._splits['validation'].count
          if ('validation' in self._splits)
          else 0
      )
      aside = aside & (have + np.cumsum(aside) <= _MAX_VALIDATION)
    rows = np.where(
        chunk.sentence_passages >= 0, chunk.sentence_passages + base_row, -1
    )
    for split, chosen in ((source, ~aside), ('validation', aside)):
      if not chosen.any():
        continue
      starts = chunk.sentence_starts[chosen]
      lengths = chunk.sentence_lengths[chosen]
      if self._files[split] == self._files[source]:
        starts = starts + base
      else:
        starts = self._copy_tokens(split, chunk.tokens, starts, lengths)
      if split not in self._splits:
        self._splits[split] = _SentenceWriter(
            self._tables, split, self._files[split]
        )
      self._splits[split].append(
          starts,
          lengths,
          rows[chosen],
          chunk.span_counts[chosen],
          chunk.spans[np.repeat(chosen, chunk.span_counts)],
      )
      for i in np.flatnonzero(chosen):
        self._sentences.append(
            split,
            examples.example(
                examples.number_field('passage', [int(rows[i])])
                + chunk.sentence_fields[i]
            ),
        )

  def close(
      self,
      settings: dict[str, Any],
      skipped: dict[str, Any],
      need_sentences: bool = True,
  ) -> dict[str, Any]:
    """Finishes all files, and the manifest as the last.

    Without `need_sentences` there may be none: nobody will train on this.
    """
    if not self.num_passages:
      raise ValueError('The texts have no wordpiece, so there is no passage.')
    splits = {n: self._splits[n].close() for n in sorted(self._splits)}
    prefix = 'pretraining_' if self._pretraining else ''
    source = prefix.rstrip('_') or 'knowledge'
    if need_sentences and source not in splits:
      raise ValueError(
          'The texts to learn from have no sentence with a salient span (of '
          f'{self.counts[prefix + "sentences"]} sentences in '
          f'{self.counts[prefix + "records"]} records). '
          'The rules find names, dates and numbers of English; for other text '
          'give `spans` in the records.'
      )
    for column in self._columns.values():
      column.close()
    for file in self._tokens.values():
      file.close()
    self._check_passage_ids()
    digests = {
        'passages': self._passages.close(),
        'sentences': self._sentences.close(),
    }
    files = {
        path.relative_to(self._directory).as_posix(): {
            'bytes': path.stat().st_size,
            'sha256': _sha256(path),
        }
        for path in sorted(self._directory.rglob('*'))
        if path.is_file()
    }
    tokenizer = {
        'digest': self._tokenizer.digest,
        'lowercase': self._tokenizer.lowercase,
        'vocab_size': self._tokenizer.vocab_size,
    }
    # Of what the corpus says, not of how TFDS happens to store it.
    content = {
        'version': corpus_lib.FORMAT_VERSION,
        'tokenizer': tokenizer,
        'records': digests,
        'tables': {
            name: facts['sha256']
            for name, facts in files.items()
            if name.startswith('tables/')
        },
    }
    manifest = {
        'format': FORMAT,
        'version': corpus_lib.FORMAT_VERSION,
        'created_by': f'realm_jax {realm_jax.__version__}',
        'fingerprint': (
            hashlib.sha256(
                json.dumps(content, sort_keys=True).encode()
            ).hexdigest()
        ),
        'counts': {
            'passages': self.num_passages,
            **{name: self.counts[name] for name in sorted(self.counts)},
        },
        'splits': splits,
        'settings': settings,
        'skipped_records': skipped,
        'tokenizer': tokenizer,
        'token_dtype': self._dtype.name,
        'record_digests': digests,
        'files': files,
    }
    (self._directory / 'manifest.json').write_text(
        json.dumps(manifest, indent=2, ensure_ascii=False) + '\n',
        encoding='utf-8',
    )
    return manifest

  def _token_file(self, name: str) -> _TokenWriter:
    if name not in self._tokens:
      self._tokens[name] = _TokenWriter(self._tables / name, self._dtype)
    return self._tokens[name]

  def _copy_tokens(
      self,
      split: str,
      tokens: np.ndarray,
      starts: np.ndarray,
      lengths: np.ndarray,
  ) -> np.ndarray:
    file = self._token_file(self._files[split])
    return np.array(
        [
            file.append(tokens[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ],
        np.int64,
    )

  def _check_passage_ids(self) -> None:
    """Refuses ids that packing made and that a record has, too."""
    hashes = np.load(self._tables / 'passage_ids.npy', mmap_mode='r')
    if len(np.unique(hashes)) < len(hashes):
      raise ValueError(
          'Two passages have the same id: a record ID that is longer than one '
          'passage becomes ID#0, ID#1 and so on, and another record already '
          'has such an id. Give the records other ids.'
      )


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
