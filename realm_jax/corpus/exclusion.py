"""Passages that a search must not return for a sentence.

They are the passage of the sentence and the others that contain its text
(`trivial`), or the articles of all of them. Also, the passages of its article
that are left.
"""

import logging

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import ngrams
from realm_jax.corpus import trivial

log = logging.getLogger(__name__)


class Exclusion:
  """The trivial candidates of the sentences of a split.

  sizes: int64 [n]: upper bound for the excluded rows of each sentence.
  largest: rows that are excluded for a sentence of the longest article.
  """

  def __init__(self, corpus: corpus_lib.Corpus, split: str, extent: str):
    """Reads the candidates; `extent` is the value of `config.trivial`."""
    self._table, self._extent = corpus.passages, extent
    self._own = corpus.sentences[split].passages
    count = len(self._own)
    empty = trivial.by_sentence(
        np.zeros(0, np.int64), np.zeros((0, 2), np.int32), count
    )
    found = empty if extent == 'none' else corpus.trivial(split)
    if found is None:
      log.warning(
          'The corpus %s was prepared by an older version, which did not search'
          ' the passages for the text of the sentences. Apart from the passage'
          ' of a sentence, passages that contain its text may be retrieved. To'
          ' exclude them too, run `realm-jax prepare` again.',
          corpus.directory,
      )
      found = empty
    if extent == 'article':
      found = self._articles_of(found)
    self._found = found
    self.sizes = self._own_sizes() + _sums(found)
    self.use(np.arange(count))

  def use(self, rows: np.ndarray) -> None:
    """Restricts `ranges` to some sentences; fixes its number of ranges, R."""
    counts = np.diff(self._found.offsets)[rows]
    self._width = int(counts.max(initial=0))

  def ranges(self, rows: np.ndarray) -> np.ndarray:
    """Returns half-open ranges of rows, int64 [B, R, 2], some of them empty."""
    own = np.asarray(self._own[rows])
    if self._extent == 'article':
      own_ranges = self._table.article_rows(own)
    else:
      own_ranges = np.stack([own, own + 1], axis=-1)[:, None]
      own_ranges[(own < 0) | (self._extent == 'none')] = 0
    first, limit = self._found.offsets[rows], self._found.offsets[rows + 1]
    at = first[:, None] + np.arange(self._width)
    known = at < limit[:, None]
    others = np.zeros((*at.shape, 2), np.int64)
    others[known] = self._found.rows[at[known]]
    return np.concatenate([own_ranges, others], axis=1)

  def others(self, row: int) -> list[tuple[int, int]]:
    """Returns the ranges of one sentence, without that of its own passage."""
    first, limit = self._found.offsets[row : row + 2].tolist()
    return [(a, b) for a, b in self._found.rows[first:limit].tolist()]

  def _own_sizes(self) -> np.ndarray:
    own, articles = np.asarray(self._own), self._table.articles
    if self._extent == 'article':
      sizes = np.bincount(articles)
      self.largest = int(sizes.max())
      return np.where(own >= 0, sizes[articles[own]], 0)
    self.largest = int(self._extent == 'passage')
    return self.largest * (own >= 0)

  def _articles_of(self, found: corpus_lib.Ranges) -> corpus_lib.Ranges:
    """Returns the ranges of the articles of passages, without the own one."""
    owners = np.repeat(np.arange(len(self._own)), np.diff(found.offsets))
    sizes = found.rows[:, 1] - found.rows[:, 0]
    # A range of more rows excludes the whole corpus (see `trivial.MOST`).
    whole = sizes > trivial.MOST
    sizes = np.where(whole, 0, sizes)
    sentences = np.repeat(owners, sizes)
    rows = np.repeat(found.rows[:, 0], sizes) + ngrams.aranges(sizes)
    articles = self._table.articles[rows]
    own = np.asarray(self._own[sentences])
    other = (own < 0) | (self._table.articles[own] != articles)
    pairs = np.unique(np.stack([sentences, articles])[:, other], axis=1)
    first, starts, limits = self._table.article_runs
    counts = first[pairs[1] + 1] - first[pairs[1]]
    at = np.repeat(first[pairs[1]], counts) + ngrams.aranges(counts)
    return trivial.by_sentence(
        np.concatenate([np.repeat(pairs[0], counts), owners[whole]]),
        np.concatenate(
            [np.stack([starts[at], limits[at]], axis=-1), found.rows[whole]]
        ),
        len(self._own),
    )


class ArticlePassages:
  """The other passages of a sentence's article, with and without an answer.

  Trivial candidates of the sentence are neither.
  """

  def __init__(self, corpus: corpus_lib.Corpus, split: str):
    table = corpus.passages
    self._tokens, self._offsets = table.tokens, table.offsets
    self._titles, self._articles = table.title_lengths, table.articles
    self._runs = table.article_runs
    self._own = corpus.sentences[split].passages
    self._exclusion = Exclusion(corpus, split, 'passage')

  def find(
      self, sentence: int, answer: np.ndarray, room: int, holding: bool
  ) -> list[int]:
    """Returns the rows of the passages that hold an answer, or do not.

    Args:
      sentence: row of a sentence that has a passage.
      answer: wordpieces that must stand in the body in a row; empty: none hold
        it.
      room: how many wordpieces of a body are read.
      holding: which of the two.
    """
    own = int(self._own[sentence])
    left_out = {own}
    for low, high in self._exclusion.others(sentence):
      if high - low > trivial.MOST:
        return []  # Boilerplate.
      left_out.update(range(low, high))
    first, starts, limits = self._runs
    article = int(self._articles[own])
    rows: list[int] = []
    for run in range(int(first[article]), int(first[article + 1])):
      start, limit = int(starts[run]), int(limits[run])
      found = self._holding(start, limit, answer, room) - left_out
      if holding:
        rows += sorted(found)
      else:
        found |= left_out
        rows += [row for row in range(start, limit) if row not in found]
    return rows

  def _holding(
      self, start: int, limit: int, answer: np.ndarray, room: int
  ) -> set[int]:
    """Returns which of adjacent passages hold the answer."""
    if not len(answer):
      return set()
    offsets = self._offsets[start : limit + 1]
    base = int(offsets[0])
    ids = self._tokens[base : int(offsets[-1])]
    at = base + ngrams.find(ids, answer)
    if not len(at):
      return set()
    rows = start - 1 + offsets.searchsorted(at, 'right')
    bodies = self._offsets[rows] + self._titles[rows]
    ends = np.minimum(self._offsets[rows + 1], bodies + room)
    inside = (at >= bodies) & (at + len(answer) <= ends)
    return set(rows[inside].tolist())


def _sums(found: corpus_lib.Ranges) -> np.ndarray:
  """Returns the number of rows in the ranges of each sentence."""
  before = np.concatenate([[0], np.cumsum(np.diff(found.rows))])
  return np.diff(before[found.offsets])
