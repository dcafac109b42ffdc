"""Writes the corpus artifact, chunk by chunk.

Public: `CorpusWriter`, `SpanWriter`, `FORMAT`. All files only grow, so that
memory does not depend on the size of the corpus; see `corpus` for what they
hold.
"""

import collections
from collections.abc import Sequence
import hashlib
import json
import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

import realm_jax
from realm_jax.corpus import concatenated
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.corpus import trivial
from realm_jax.prepare import appending
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import trivial_tables
from realm_jax.runtime import files as files_lib

log = logging.getLogger(__name__)

FORMAT = 'realm_jax corpus'
# Sentences, where the input marks none; an article that was begun is finished.
_MAX_VALIDATION = 5000

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


class _SentenceWriter:
  """The tables of one split of sentences."""

  def __init__(self, tables: pathlib.Path, split: str, tokens: str):
    self.tokens = tokens  # Name of the file that `starts` point into.
    self.count = 0
    self._num_spans = 0
    self._columns = {
        name: appending.ArrayWriter(
            tables / f'{split}.{name}.npy', dtype, shape
        )
        for name, dtype, shape in (
            ('starts', np.int64, ()),
            ('lengths', np.int32, ()),
            ('passages', np.int64, ()),
        )
    } | _span_columns(tables, split)

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
    self._passages = appending.DatasetWriter(
        directory / 'passages',
        _PASSAGE_FEATURES,
        'Passages of a realm_jax corpus; the row is the number of a passage.',
    )
    self._sentences = _sentence_writer(directory)
    self._columns = {
        name: appending.ArrayWriter(self._tables / f'{name}.npy', dtype)
        for name, dtype in (
            ('passage_offsets', np.int64),
            ('title_lengths', np.int32),
            ('articles', np.int32),
            ('passage_ids', np.uint64),
        )
    }
    self._columns['passage_offsets'].append(np.zeros(1, np.int64))
    self.num_passages = 0
    self._tokens: dict[str, appending.TokenWriter] = {}
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
    self._begun: set[int] = set()  # Articles of which something is set aside.
    self.counts: collections.Counter[str] = collections.Counter()

  def add(
      self, chunk: passages_lib.Chunk, passages: bool, limited: bool
  ) -> None:
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
            tf_example.example(
                tf_example.number_field('passage', [int(rows[i])])
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
    self.counts.update(self._find_trivial(splits))
    digests = {
        'passages': self._passages.close(),
        'sentences': self._sentences.close(),
    }
    return _write_manifest(
        self._directory,
        {
            'digest': self._tokenizer.digest,
            'lowercase': self._tokenizer.lowercase,
            'vocab_size': self._tokenizer.vocab_size,
        },
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
    """Returns which sentences to set aside: no article is divided."""
    have = 0
    if 'validation' in self._splits:
      have = self._splits['validation'].count
    chosen = np.zeros(len(articles), bool)
    for i in np.flatnonzero(articles >= 0):
      article = int(articles[i])
      if have < _MAX_VALIDATION or article in self._begun:
        self._begun.add(article)
        chosen[i] = True
        have += 1
    return chosen

  def _find_trivial(self, splits: dict[str, Any]) -> dict[str, int]:
    """Writes the tables of trivial candidates; all others must be closed."""

    def load(name: str) -> np.ndarray:
      return np.load(self._tables / f'{name}.npy', mmap_mode='r')

    tokens = {
        name: concatenated.Chained(
            [appending.TokenReader(self._tables / name, self._dtype)]
        )
        for name in self._tokens
    }
    passages = corpus_lib.PassageTable(
        tokens['passage_tokens.bin'],
        load('passage_offsets'),
        load('title_lengths'),
        load('articles'),
    )
    sentences = {
        split: corpus_lib.SentenceTable(
            tokens[facts['tokens']],
            load(f'{split}.starts'),
            load(f'{split}.lengths'),
            load(f'{split}.passages'),
            load(f'{split}.span_offsets'),
            load(f'{split}.spans'),
        )
        for split, facts in splits.items()
    }
    counts = trivial_tables.write(self._tables, passages, sentences)
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

  def _token_file(self, name: str) -> appending.TokenWriter:
    if name not in self._tokens:
      self._tokens[name] = appending.TokenWriter(
          self._tables / name, self._dtype
      )
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


class SpanWriter:
  """What `respan` writes anew: records of sentences, and their spans."""

  def __init__(self, directory: pathlib.Path, splits: Sequence[str]):
    self._directory = directory
    self._records = _sentence_writer(directory)
    self._columns = {
        split: _span_columns(directory / 'tables', split) for split in splits
    }
    self._num_spans = dict.fromkeys(splits, 0)

  def append(
      self,
      split: str,
      spans: Sequence[Sequence[Any]],
      texts: Sequence[bytes],
      passages: np.ndarray,
  ) -> None:
    """Appends sentences.

    Args:
      split: that they are of.
      spans: of each, (start, limit) in wordpieces, then in bytes.
      texts: their fields `text` and `title`, encoded.
      passages: rows of their passages, or -1.
    """
    counts = np.array([len(of_one) for of_one in spans], np.int64)
    offsets = self._num_spans[split] + np.cumsum(counts)
    self._num_spans[split] += int(counts.sum())
    self._columns[split]['span_offsets'].append(offsets)
    self._columns[split]['spans'].append(
        np.array(
            [span[:2] for of_one in spans for span in of_one], np.int32
        ).reshape(-1, 2)
    )
    for of_one, text, row in zip(
        spans, texts, passages.tolist(), strict=True
    ):
      fields = (
          tf_example.number_field('passage', [row])
          + tf_example.number_field('span_limits', [span[3] for span in of_one])
          + tf_example.number_field('span_starts', [span[2] for span in of_one])
          + text
      )
      self._records.append(split, tf_example.example(fields))

  def close(
      self, corpus: corpus_lib.Corpus, settings: dict[str, Any]
  ) -> dict[str, Any]:
    """Finishes all files, and the manifest as the last."""
    if not any(self._num_spans.values()):
      raise ValueError(
          f'There is no salient span left in {corpus.directory}.'
      )
    for columns in self._columns.values():
      for column in columns.values():
        column.close()
    before = corpus.manifest
    if before['version'] < 2:
      counts = trivial_tables.write(
          self._directory / 'tables', corpus.passages, corpus.sentences
      )
      before = {**before, 'counts': {**before['counts'], **counts}}
    return _write_manifest(
        self._directory,
        before['tokenizer'],
        {**before['record_digests'], 'sentences': self._records.close()},
        {
            **before,
            'splits': {
                split: {**facts, 'spans': self._num_spans[split]}
                for split, facts in before['splits'].items()
            },
            'settings': {**before['settings'], **settings},
        },
    )


def _sentence_writer(directory: pathlib.Path) -> appending.DatasetWriter:
  return appending.DatasetWriter(
      directory / 'sentences',
      _SENTENCE_FEATURES,
      'Sentences of a realm_jax corpus with salient spans (UTF-8 bytes) and '
      'the row of their passage, or -1.',
  )


def _span_columns(
    tables: pathlib.Path, split: str
) -> dict[str, appending.ArrayWriter]:
  columns = {
      'span_offsets': appending.ArrayWriter(
          tables / f'{split}.span_offsets.npy', np.int64
      ),
      'spans': appending.ArrayWriter(
          tables / f'{split}.spans.npy', np.int32, (2,)
      ),
  }
  columns['span_offsets'].append(np.zeros(1, np.int64))
  return columns


def _write_manifest(
    directory: pathlib.Path,
    tokenizer: dict[str, Any],
    digests: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
  """Writes and returns the manifest of a folder in which all else is done."""
  files = {
      path.relative_to(directory).as_posix(): {
          'bytes': path.stat().st_size,
          'sha256': files_lib.sha256(path),
      }
      for path in sorted(directory.rglob('*'))
      if path.is_file()
  }
  # Of what the corpus says, not of how TFDS happens to store it.
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
      **facts,
      'format': FORMAT,
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
