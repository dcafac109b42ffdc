"""Writes the corpus artifact, chunk by chunk; see `corpus` for its files.

All files are only appended to, so memory does not depend on the size of the
corpus.
"""

import collections
import hashlib
import json
import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

import realm_jax
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.corpus import trivial
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import tfds_files
from realm_jax.runtime import files as files_lib

log = logging.getLogger(__name__)

# Bound for the sentences set aside, if no record is marked. The article that
# reaches the bound is completed.
_MAX_VALIDATION = 5000

_PASSAGE_FEATURES = {
    'id': tfds.features.Text(),
    'article': np.int64,
    'title': tfds.features.Text(),
    'text': tfds.features.Text(),
}
# Spans are UTF-8 bytes of the text; passage -1 means that there is none.
_SENTENCE_FEATURES = {
    'text': tfds.features.Text(),
    'title': tfds.features.Text(),
    'passage': np.int64,
    'span_starts': tfds.features.Sequence(np.int64),
    'span_limits': tfds.features.Sequence(np.int64),
}


class _SentenceWriter:
  """The tables of one split of sentences."""

  def __init__(self, tables: pathlib.Path, split: str, tokens: str):
    self.tokens = tokens  # Name of the file that `starts` refers to.
    self.count = 0
    self._spans = span_writer(tables, split)
    self._columns = {
        name: tfds_files.ArrayWriter(tables / f'{split}.{name}.npy', dtype)
        for name, dtype in (
            ('starts', np.int64),
            ('lengths', np.int32),
            ('passages', np.int64),
        )
    }

  def append(
      self,
      starts: np.ndarray,
      lengths: np.ndarray,
      passages: np.ndarray,
      span_counts: np.ndarray,
      spans: np.ndarray,
  ) -> None:
    """Appends sentences; `starts` and `passages` are of the whole corpus."""
    self._columns['starts'].append(starts)
    self._columns['lengths'].append(lengths)
    self._columns['passages'].append(passages)
    self._spans.append(span_counts, spans)
    self.count += len(starts)

  def close(self) -> dict[str, Any]:
    for column in self._columns.values():
      column.close()
    return {
        'sentences': self.count,
        'spans': self._spans.close(),
        'tokens': self.tokens,
    }


class CorpusWriter:
  """Writes everything in the folder of a corpus; adds chunks in order."""

  def __init__(
      self,
      directory: pathlib.Path,
      tokenizer: tokenizer_lib.Tokenizer,
      pretraining: bool,
      threads: int = 1,
  ):
    self._directory, self._tokenizer = directory, tokenizer
    self._pretraining, self._threads = pretraining, threads
    self._tables = directory / 'tables'
    self._tables.mkdir()
    self._dtype = np.dtype(
        np.uint16 if tokenizer.vocab_size < 65_536 else np.uint32
    )
    self._passages = tfds_files.DatasetWriter(
        directory / 'passages',
        _PASSAGE_FEATURES,
        'Passages of a realm_jax corpus; the row is the number of a passage.',
    )
    self._sentences = sentence_records(directory)
    self._columns = {
        name: tfds_files.ArrayWriter(self._tables / f'{name}.npy', dtype)
        for name, dtype in (
            ('passage_offsets', np.int64),
            ('title_lengths', np.int32),
            ('articles', np.int32),
            ('passage_ids', np.uint64),
        )
    }
    self._columns['passage_offsets'].append(np.zeros(1, np.int64))
    self.num_passages = 0
    self._tokens: dict[str, tfds_files.TokenWriter] = {}
    self._splits: dict[str, _SentenceWriter] = {}
    # Sentences of passages share the passages' wordpieces. Sentences set aside
    # can come from both inputs, but a split refers to one file only.
    self._files = {
        'knowledge': 'passage_tokens.bin',
        'pretraining': 'pretraining.tokens.bin',
        'validation': (
            'validation.tokens.bin' if pretraining else 'passage_tokens.bin'
        ),
    }
    self._articles_set_aside: set[int] = set()
    self.counts: collections.Counter[str] = collections.Counter()

  def add(
      self, chunk: passages_lib.Chunk, passages: bool, limited: bool
  ) -> None:
    """Appends a chunk.

    Args:
      chunk: of `passages.Packer`.
      passages: whether the chunk has passages, or sentences alone.
      limited: whether `_MAX_VALIDATION` bounds the sentences set aside.
    """
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
    aside = chunk.sentence_aside >= 0
    if limited:
      aside = self._limited(chunk.sentence_aside)
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
        file = self._token_file(self._files[split])
        starts = np.array(
            [
                file.append(chunk.tokens[start : start + length])
                for start, length in zip(starts, lengths, strict=True)
            ],
            np.int64,
        )
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
        passage = tf_example.number_field('passage', [int(rows[i])])
        self._sentences.append(
            split, tf_example.example(passage + chunk.sentence_fields[i])
        )

  def close(
      self,
      settings: dict[str, Any],
      skipped: dict[str, Any],
      need_sentences: bool = True,
  ) -> dict[str, Any]:
    """Completes all files, the manifest last, and returns the manifest.

    Args:
      settings: how the corpus was made.
      skipped: the bad records.
      need_sentences: whether a corpus without sentences is an error. Documents
        that are added to an index are never trained on and need none.
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
          'give `spans` in the records, or --spans=random. A corpus that is '
          'only searched needs none: --spans=none.'
      )
    for column in self._columns.values():
      column.close()
    for file in self._tokens.values():
      file.close()
    self._check_passage_ids()
    digests = {  # First: the buffers of open datasets take 40 MB.
        'passages': self._passages.close(),
        'sentences': self._sentences.close(),
    }
    self.counts.update(self._find_trivial(splits))
    tokenizer = {
        'digest': self._tokenizer.digest,
        'lowercase': self._tokenizer.lowercase,
        'vocab_size': self._tokenizer.vocab_size,
    }
    if self._tokenizer.num_specials != corpus_lib.NUM_SPECIALS:
      tokenizer['num_specials'] = self._tokenizer.num_specials
    return write_manifest(
        self._directory,
        tokenizer,
        digests,
        {
            'counts': {
                'passages': self.num_passages,
                **{name: self.counts[name] for name in sorted(self.counts)},
            },
            'splits': splits,
            'settings': settings,
            'skipped_records': skipped,
            'token_dtype': self._dtype.name,
        },
    )

  def _limited(self, articles: np.ndarray) -> np.ndarray:
    """Returns which sentences to set aside, whole articles only."""
    count = 0
    if 'validation' in self._splits:
      count = self._splits['validation'].count
    chosen = np.zeros(len(articles), bool)
    for i in np.flatnonzero(articles >= 0):
      article = int(articles[i])
      if count < _MAX_VALIDATION or article in self._articles_set_aside:
        self._articles_set_aside.add(article)
        chosen[i] = True
        count += 1
    return chosen

  def _find_trivial(self, splits: dict[str, Any]) -> dict[str, int]:
    """Writes the tables of trivial candidates from the closed other tables."""
    passages, sentences = corpus_lib.open_tables(
        self._tables,
        splits,
        lambda path: corpus_lib.Chained(
            [tfds_files.TokenReader(path, self._dtype)]
        ),
    )
    counts = write_trivial_tables(
        self._tables, passages, sentences, self._threads
    )
    for split, table in sentences.items():
      held = counts[f'{split}_sentences_in_other_passages']
      log.info(
          'Split %s: other passages hold the text of %d of the %d sentences'
          ' (%.1f %%); REALM never retrieves these passages for them. %d'
          ' sentences are in more than %d passages and are left out.',
          split,
          held,
          len(table),
          100 * held / max(len(table), 1),
          counts[f'{split}_sentences_in_too_many'],
          trivial.MOST,
      )
    return counts

  def _token_file(self, name: str) -> tfds_files.TokenWriter:
    if name not in self._tokens:
      path = self._tables / name
      self._tokens[name] = tfds_files.TokenWriter(path, self._dtype)
    return self._tokens[name]

  def _check_passage_ids(self) -> None:
    """Refuses an id ID#N of a part of a record that another record has too."""
    hashes = np.load(self._tables / 'passage_ids.npy', mmap_mode='r')
    if len(np.unique(hashes)) < len(hashes):
      raise ValueError(
          'Two passages have the same id: a record ID that is longer than one '
          'passage becomes ID#0, ID#1 and so on, and another record already '
          'has such an id. Give the records other ids.'
      )


def span_writer(
    tables: pathlib.Path, split: str
) -> tfds_files.RangesWriter:
  """Opens the tables of the spans of a split for writing."""
  return tfds_files.RangesWriter(
      tables, f'{split}.spans', f'{split}.span_offsets'
  )


def sentence_records(directory: pathlib.Path) -> tfds_files.DatasetWriter:
  """Opens the TFDS dataset of the sentences for writing."""
  return tfds_files.DatasetWriter(
      directory / 'sentences',
      _SENTENCE_FEATURES,
      'Sentences of a realm_jax corpus with salient spans (UTF-8 bytes) and '
      'the row of their passage, or -1.',
  )


def write_trivial_tables(
    tables: pathlib.Path,
    passages: corpus_lib.PassageTable,
    sentences: dict[str, corpus_lib.SentenceTable],
    threads: int = 1,
) -> dict[str, int]:
  """Writes `SPLIT.trivial_offsets.npy` and `SPLIT.trivial.npy` for each split.

  Args:
    tables: the folder.
    passages: all passages of the corpus.
    sentences: the splits.
    threads: that search.

  Returns:
    Two counts for each split: `SPLIT_sentences_in_other_passages`, and among
    them `SPLIT_sentences_in_too_many`, for which nothing may be retrieved.
  """
  counts: dict[str, Any] = {}
  writers = {}
  for split in sentences:
    writers[split] = tfds_files.RangesWriter(
        tables, f'{split}.trivial', f'{split}.trivial_offsets'
    )
    counts[f'{split}_sentences_in_other_passages'] = 0
    counts[f'{split}_sentences_in_too_many'] = 0
  splits = list(sentences)
  for number, found in trivial.find_in_blocks(
      passages, list(sentences.values()), threads
  ):
    split, sizes = splits[number], np.diff(found.offsets)
    writers[split].append(sizes, found.rows)
    whole = (found.rows == [0, len(passages)]).all(axis=1)
    counts[f'{split}_sentences_in_other_passages'] += np.count_nonzero(sizes)
    counts[f'{split}_sentences_in_too_many'] += np.count_nonzero(whole)
  for writer in writers.values():
    writer.close()
  return {name: int(count) for name, count in counts.items()}


def write_manifest(
    directory: pathlib.Path,
    tokenizer: dict[str, Any],
    digests: dict[str, Any],
    fields: dict[str, Any],
) -> dict[str, Any]:
  """Writes and returns the manifest of a folder with all other files."""
  files = {
      path.relative_to(directory).as_posix(): {
          'bytes': path.stat().st_size,
          'sha256': files_lib.sha256(path),
      }
      for path in sorted(directory.rglob('*'))
      if path.is_file()
  }
  # The fingerprint covers the content, not how TFDS happens to store it.
  content = {
      'version': corpus_lib.FORMAT_VERSION,
      'tokenizer': tokenizer,
      'records': digests,
      'tables': {
          name: file['sha256']
          for name, file in files.items()
          if name.startswith('tables/')
      },
  }
  manifest = {
      **fields,
      'format': corpus_lib.FORMAT,
      'version': corpus_lib.FORMAT_VERSION,
      'created_by': f'realm_jax {realm_jax.__version__}',
      'fingerprint': hashlib.sha256(
          json.dumps(content, sort_keys=True).encode()
      ).hexdigest(),
      'tokenizer': tokenizer,
      'record_digests': digests,
      'files': files,
  }
  (directory / 'manifest.json').write_text(
      json.dumps(manifest, indent=2, ensure_ascii=False) + '\n',
      encoding='utf-8',
  )
  return manifest


def warn(counts: dict[str, int]) -> None:
  """Logs what is wrong with the texts of a corpus, by its counts."""
  if counts.get('shortened_titles'):
    log.warning(
        '%d titles longer than half a passage were shortened.',
        counts['shortened_titles'],
    )
  unknown = counts.get('unknown_wordpieces', 0)
  if unknown > 0.05 * counts['wordpieces']:
    log.warning(
        '%.0f%% of the wordpieces are [UNK]: the vocabulary does not fit these'
        ' texts.',
        100 * unknown / counts['wordpieces'],
    )
