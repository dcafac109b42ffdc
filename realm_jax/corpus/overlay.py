"""A corpus with documents added to it and removed from it, for reading.

Public: `Overlay`. It is a row of corpora of one tokenizer and a set of removed
rows; the first corpus, whose rows keep their numbers, is never changed. What
reads a `Corpus` reads an `Overlay`.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from realm_jax.corpus import concatenated
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import trivial


class Overlay(corpus_lib.Corpus):
  """A corpus, further ones behind it, and the rows that count no more.

  Fingerprint, manifest and sentences are those of the first. Sentences of an
  article of which a passage was removed are left out: what stands in its place
  now would give away what is masked in them, and could not be excluded.
  """

  def __init__(
      self, parts: Sequence[corpus_lib.Corpus], removed: np.ndarray
  ):
    """Takes corpora of one tokenizer, and sorted, distinct rows of them all.

    Raises:
      ValueError: if tokenizers differ, or a removed row is not there.
    """
    base = parts[0]
    for part in parts[1:]:
      if part.tokenizer.digest != base.tokenizer.digest:
        raise ValueError(
            f'{part.directory} was made with another tokenizer than '
            f'{base.directory}: {part.tokenizer.digest[:16]}, '
            f'{base.tokenizer.digest[:16]}.'
        )
    self.directory, self.manifest = base.directory, base.manifest
    self.fingerprint, self.tokenizer = base.fingerprint, base.tokenizer
    self.parts, self.removed = tuple(parts), removed
    sizes = [len(part.passages) for part in parts]
    self._starts = np.cumsum([0, *sizes])
    self.passages = _joined([part.passages for part in parts])
    if len(removed) and not 0 <= removed[0] <= removed[-1] < self._starts[-1]:
      raise ValueError(
          f'Rows {removed[0]} to {removed[-1]} were removed from '
          f'{self._starts[-1]} passages.'
      )
    # A removed row beyond the first corpus is of no sentence here.
    gone = base.passages.articles[removed[: np.searchsorted(removed, sizes[0])]]
    self._kept = {
        name: _outside(table, base.passages.articles, np.unique(gone))
        for name, table in base.sentences.items()
    }
    self.sentences = {
        name: table if kept.all() else _chosen(table, kept)
        for name, kept in self._kept.items()
        if kept.any()
        for table in [base.sentences[name]]
    }

  def verify(self) -> None:
    for part in self.parts:
      part.verify()

  def trivial(self, split: str) -> corpus_lib.Ranges | None:
    """As of a `Corpus`; what was added is looked through now."""
    known = self.parts[0].trivial(split)
    if known is None:
      return None
    kept = self._kept[split]
    counts = np.where(kept, np.diff(known.offsets), 0)
    table = self.sentences[split]
    owners = [np.repeat(np.cumsum(kept) - 1, counts)]
    rows = [known.rows[np.repeat(kept, np.diff(known.offsets))]]
    for start, part in zip(self._starts[1:], self.parts[1:], strict=False):
      found = trivial.find(
          part.passages,
          # Its passages are none of these.
          dataclasses.replace(table, passages=np.full(len(table), -1)),
      )
      owners.append(np.repeat(np.arange(len(table)), np.diff(found.offsets)))
      rows.append(found.rows + start)
    return trivial.by_sentence(
        np.concatenate(owners), np.concatenate(rows), len(table)
    )

  def passage_text(self, row: int) -> dict[str, str]:
    if not 0 <= row < len(self.passages):
      raise IndexError(
          f'There is no passage {row}; the corpus has {len(self.passages)} '
          'with those that were added.'
      )
    part = int(np.searchsorted(self._starts[1:], row, side='right'))
    return self.parts[part].passage_text(int(row - self._starts[part]))

  def record_rows(self, ids: Sequence[str]) -> list[np.ndarray]:
    """As of a `Corpus`; what was removed is not found."""
    found = [np.zeros(0, np.int64) for _ in ids]
    for start, part in zip(self._starts, self.parts, strict=False):
      for i, rows in enumerate(part.record_rows(ids)):
        rows = rows + start
        before = np.searchsorted(self.removed, rows, side='left')
        after = np.searchsorted(self.removed, rows, side='right')
        found[i] = np.concatenate([found[i], rows[before == after]])
    return found


def _joined(
    tables: Sequence[corpus_lib.PassageTable],
) -> corpus_lib.PassageTable:
  """The rows of several tables as one; only the wordpieces stay on disk."""
  if len(tables) == 1:
    return tables[0]
  offsets, articles = [np.zeros(1, np.int64)], []
  num_tokens = num_articles = 0
  for table in tables:
    offsets.append(table.offsets[1:] + num_tokens)
    articles.append(table.articles + num_articles)
    num_tokens += len(table.tokens)
    num_articles += table.num_articles
  return corpus_lib.PassageTable(
      concatenated.Chained([table.tokens for table in tables]),
      np.concatenate(offsets),
      np.concatenate([table.title_lengths for table in tables]),
      np.concatenate(articles).astype(np.int32),
  )


def _outside(
    table: corpus_lib.SentenceTable, articles: np.ndarray, gone: np.ndarray
) -> np.ndarray:
  """Returns which sentences are not of some articles."""
  passages = np.asarray(table.passages)
  return (passages < 0) | ~np.isin(articles[np.maximum(passages, 0)], gone)


def _chosen(
    table: corpus_lib.SentenceTable, kept: np.ndarray
) -> corpus_lib.SentenceTable:
  counts = np.diff(table.span_offsets)
  return dataclasses.replace(
      table,
      starts=table.starts[kept],
      lengths=table.lengths[kept],
      passages=table.passages[kept],
      span_offsets=np.concatenate([[0], np.cumsum(counts[kept])]),
      spans=table.spans[np.repeat(kept, counts)],
  )
