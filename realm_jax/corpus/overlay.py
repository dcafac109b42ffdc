"""A corpus with documents added and removed, which reads like a `Corpus`."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import trivial


class Overlay(corpus_lib.Corpus):
  """A base corpus, the corpora added to it, and the rows removed from them.

  Rows count through all parts. Fingerprint, manifest and sentences are those of
  the base, without the sentences of articles that lost a passage: the passage
  that replaces it could give away the masked text, and could not be excluded.

  live: bool [N], whether a row is not removed.
  """

  def __init__(self, parts: Sequence[corpus_lib.Corpus], removed: np.ndarray):
    """Joins corpora; `removed` are sorted and distinct rows, int64.

    Raises:
      ValueError: the tokenizers differ, or a removed row does not exist.
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
    self._starts = np.cumsum([0, *(len(part.passages) for part in parts)])
    total = self._starts[-1]
    if len(removed) and not 0 <= removed[0] <= removed[-1] < total:
      raise ValueError(
          f'Rows {removed[0]} to {removed[-1]} were removed from {total} '
          'passages.'
      )
    self.live = np.ones(total, bool)
    self.live[removed] = False
    self.passages = _joined([part.passages for part in parts])
    articles = base.passages.articles
    shortened = articles[~self.live[: len(articles)]]
    self._kept = {
        name: (rows < 0) | ~np.isin(articles[np.maximum(rows, 0)], shortened)
        for name, table in base.sentences.items()
        for rows in [np.asarray(table.passages)]
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
    """As of a `Corpus`; the passages added are searched in this call."""
    known = self.parts[0].trivial(split)
    if known is None:
      return None
    kept, counts = self._kept[split], np.diff(known.offsets)
    owners = [np.repeat(np.cumsum(kept) - 1, np.where(kept, counts, 0))]
    rows = [known.rows[np.repeat(kept, counts)]]
    # A sentence has no own passage among those added.
    table = self.sentences[split]
    table = dataclasses.replace(table, passages=np.full(len(table), -1))
    for start, part in zip(self._starts[1:], self.parts[1:], strict=False):
      found = trivial.find(part.passages, table)
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
    """As of a `Corpus`, without the rows removed."""
    found = [
        [rows + start for rows in part.record_rows(ids)]
        for start, part in zip(self._starts, self.parts, strict=False)
    ]
    joined = [np.concatenate(rows) for rows in zip(*found, strict=True)]
    return [rows[self.live[rows]] for rows in joined]


def _joined(
    tables: Sequence[corpus_lib.PassageTable],
) -> corpus_lib.PassageTable:
  """Joins tables; only the wordpieces stay on disk."""
  tokens = np.cumsum([0, *(len(table.tokens) for table in tables)])
  articles = np.cumsum([0, *(table.num_articles for table in tables)])
  offsets = [t.offsets[1:] + n for t, n in zip(tables, tokens, strict=False)]
  numbers = [t.articles + n for t, n in zip(tables, articles, strict=False)]
  return corpus_lib.PassageTable(
      corpus_lib.Chained([table.tokens for table in tables]),
      np.concatenate([np.zeros(1, np.int64), *offsets]),
      np.concatenate([table.title_lengths for table in tables]),
      np.concatenate(numbers).astype(np.int32),
      tables[0].num_specials,
  )


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
