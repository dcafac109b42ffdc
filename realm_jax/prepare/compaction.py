"""A corpus with additions and removals, written anew as a plain corpus.

Public: `compact`. Nothing is tokenised or split again: tables and records are
copied, with the rows that were removed left out, and what refers to rows or
articles renumbered. So a passage has the same wordpieces and text as before.
"""

import collections
from collections.abc import Iterator, Sequence
import os
import pathlib
import shutil
from typing import Any

from array_record.python import array_record_data_source
import numpy as np
import tqdm

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import tfds_files
from realm_jax.prepare import writer as writer_lib
from realm_jax.runtime import files

_ROWS = 2**14  # Passages, and sentences of no passage, copied at a time.
_QUESTIONS = 'questions.jsonl'
# What a chunk says of sentences, and how if there are none.
_SENTENCE_FIELDS = {
    'sentence_starts': np.zeros(0, np.int64),
    'sentence_lengths': np.zeros(0, np.int32),
    'sentence_passages': np.zeros(0, np.int64),
    'sentence_aside': np.zeros(0, np.int64),
    'sentence_fields': [],
    'span_counts': np.zeros(0, np.int64),
    'spans': np.zeros((0, 2), np.int32),
}


def compact(
    overlay: overlay_lib.Overlay,
    output: str | os.PathLike[str],
    progress: bool = True,
) -> dict[str, Any]:
  """Writes the passages of an overlay that can be found, in order of rows.

  Args:
    overlay: what was made of a corpus.
    output: folder to write. It appears, complete, at the very end.
    progress: whether to show a progress bar.

  Returns:
    The manifest.

  Raises:
    FileExistsError: if `output` exists, or is being written.
    ValueError: if nothing is left to learn from: no sentence with a span.
    OSError: if the disk is full. Then, as after any error, nothing is left.
  """
  output = pathlib.Path(output).absolute()
  base = overlay.parts[0]
  has_pretraining = 'pretraining' in base.sentences
  with files.atomic_folder(output, overwrite=False) as directory:
    base.tokenizer.save(directory)
    writer = writer_lib.CorpusWriter(
        directory, base.tokenizer, has_pretraining
    )
    first_row, first_article = 0, 0
    with tqdm.tqdm(
        total=len(overlay.passages),
        desc='compacting',
        unit=' passages',
        disable=not progress,
    ) as bar:
      for part in overlay.parts:
        size = len(part.passages)
        here = overlay.removed - first_row
        kept = np.ones(size, bool)
        kept[here[(here >= 0) & (here < size)]] = False
        source = _Source(part, kept, first_article)
        for start in range(0, size, _ROWS):
          limit = min(start + _ROWS, size)
          writer.add(source.passages(start, limit), True, limited=False)
          bar.update(limit - start)
        first_row += size
        first_article += part.passages.num_articles
    # Of no passage, so that nothing of theirs was removed.
    for chunk in _Source(base, np.ones(0, bool), 0).loose_sentences():
      writer.add(chunk, False, limited=False)
    if (base.directory / _QUESTIONS).is_file():
      shutil.copyfile(base.directory / _QUESTIONS, directory / _QUESTIONS)
    return writer.close(
        {
            **base.manifest['settings'],
            'compacted_from': [part.fingerprint for part in overlay.parts],
        },
        base.manifest['skipped_records'],
    )


class _Records:
  """The encoded records of one split of a dataset of a corpus."""

  def __init__(self, directory: pathlib.Path, split: str):
    self._directory = directory
    # Shards in order: their numbers have leading zeros.
    paths = sorted(directory.glob(f'*-{split}.array_record-*'))
    self._source = array_record_data_source.ArrayRecordDataSource(
        [os.fspath(path) for path in paths]
    )

  def without_first(
      self, rows: np.ndarray, first: Sequence[bytes]
  ) -> list[bytes]:
    """Returns the fields of records but for the first, which is known."""
    found = []
    numbers = rows.tolist()
    records = self._source.__getitems__(numbers) if numbers else []
    for row, record, known in zip(numbers, records, first, strict=True):
      _, _, fields = record.partition(known)
      # All before is the outermost tag, with a length.
      if tfds_files.example(known + fields) != record:
        raise ValueError(f'{self._directory}: record {row} is damaged.')
      found.append(fields)
    return found


class _Source:
  """A corpus, cut into chunks as `passages` makes them of texts."""

  def __init__(
      self, corpus: corpus_lib.Corpus, kept: np.ndarray, first_article: int
  ):
    """Takes which of the passages are kept, and the number of article 0."""
    self._corpus, self._kept = corpus, kept
    self._first_article = first_article
    self._ids = np.load(
        corpus.directory / 'tables' / 'passage_ids.npy', mmap_mode='r'
    )
    self._texts = _Records(corpus.directory / 'passages', 'train')
    self._records = {
        split: _Records(corpus.directory / 'sentences', split)
        for split in corpus.sentences
    }
    self._orders = {
        split: np.argsort(table.passages, kind='stable')
        for split, table in corpus.sentences.items()
    }

  def passages(self, start: int, limit: int) -> passages_lib.Chunk:
    """Returns those of a range of rows that are kept, with their sentences."""
    table = self._corpus.passages
    rows = start + np.flatnonzero(self._kept[start:limit])
    bodies = [
        table.tokens[table.offsets[row] : table.offsets[row + 1]]
        for row in rows.tolist()
    ]
    lengths = np.array([len(body) for body in bodies], np.int64)
    first = np.cumsum(lengths) - lengths
    sentences = []
    for split, order in self._orders.items():
      found = self._corpus.sentences[split]
      low, high = np.searchsorted(found.passages, [start, limit], sorter=order)
      chosen = np.sort(order[low:high])
      chosen = chosen[self._kept[found.passages[chosen]]]
      at = np.searchsorted(rows, found.passages[chosen])
      if found.tokens is table.tokens:
        inside = found.starts[chosen] - table.offsets[rows[at]]
      else:  # Set aside with wordpieces of its own.
        inside = np.array(
            [
                _place(found.ids(sentence), bodies[passage])
                for sentence, passage in zip(chosen, at, strict=True)
            ],
            np.int64,
        )
      sentences.append(self._sentences(split, chosen, first[at] + inside, at))
    articles = np.asarray(table.articles[rows])
    texts = self._texts.without_first(
        rows, [tfds_files.number_field('article', [int(a)]) for a in articles]
    )
    articles = articles + np.int32(self._first_article)
    return _chunk(
        sentences,
        bodies,
        ids=np.asarray(self._ids[rows]),
        lengths=lengths,
        title_lengths=np.asarray(table.title_lengths[rows]),
        articles=articles,
        passage_records=[
            tfds_files.example(
                tfds_files.number_field('article', [int(a)]) + text
            )
            for a, text in zip(articles, texts, strict=True)
        ],
    )

  def loose_sentences(self) -> Iterator[passages_lib.Chunk]:
    """Yields the sentences that are of no passage."""
    for split, table in self._corpus.sentences.items():
      loose = np.flatnonzero(np.asarray(table.passages) < 0)
      for start in range(0, len(loose), _ROWS):
        chosen = loose[start : start + _ROWS]
        ids = [table.ids(row) for row in chosen]
        starts = np.cumsum(table.lengths[chosen]) - table.lengths[chosen]
        passages = np.full(len(chosen), -1)
        yield _chunk(
            [self._sentences(split, chosen, starts, passages)],
            ids,
            ids=np.zeros(0, np.uint64),
            lengths=np.zeros(0, np.int64),
            title_lengths=np.zeros(0, np.int32),
            articles=np.zeros(0, np.int32),
            passage_records=[],
        )

  def _sentences(
      self,
      split: str,
      chosen: np.ndarray,
      starts: np.ndarray,
      passages: np.ndarray,
  ) -> dict[str, Any]:
    """Fields of a chunk; `starts` and `passages` are relative to it."""
    table = self._corpus.sentences[split]
    before = [
        tfds_files.number_field('passage', [int(row)])
        for row in table.passages[chosen]
    ]
    spans = [table.spans_of(row) for row in chosen]
    return {
        'sentence_starts': starts.astype(np.int64),
        'sentence_lengths': np.asarray(table.lengths[chosen]),
        'sentence_passages': passages.astype(np.int64),
        'sentence_aside': np.full(
            len(chosen), 0 if split == 'validation' else -1
        ),
        'sentence_fields': self._records[split].without_first(chosen, before),
        'span_counts': np.array([len(s) for s in spans], np.int64),
        'spans': np.concatenate([np.zeros((0, 2), np.int32), *spans]),
    }


def _chunk(
    sentences: Sequence[dict[str, Any]],
    tokens: Sequence[np.ndarray],
    **passages: Any,
) -> passages_lib.Chunk:
  joined: dict[str, Any] = {}
  for name in _SENTENCE_FIELDS:
    columns = [fields[name] for fields in sentences]
    if name == 'sentence_fields':
      joined[name] = [field for column in columns for field in column]
    elif columns:
      joined[name] = np.concatenate(columns)
    else:
      joined[name] = _SENTENCE_FIELDS[name]
  return passages_lib.Chunk(
      tokens=np.concatenate([np.zeros(0, np.uint32), *tokens]),
      **passages,
      **joined,
      counts=collections.Counter(),
      num_records=0,
  )


def _place(ids: np.ndarray, passage: np.ndarray) -> int:
  """Where in a passage the wordpieces of a sentence are."""
  windows = np.lib.stride_tricks.sliding_window_view(passage, len(ids))
  return int(np.flatnonzero((windows == ids).all(axis=1))[0])
