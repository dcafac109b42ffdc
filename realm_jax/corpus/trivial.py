"""Finds the trivial candidates of a sentence: passages that contain its text.

Such a passage gives the answer away, so REALM must not retrieve it (Guu et al.
2020, section 3.4). The row of a sentence's own passage is known. This module
finds the others by content, also for sentences of another source.

A passage contains a sentence if they share 8 consecutive wordpieces and, with
the sentence aligned there to the passage's body, at least half of the
sentence's wordpieces agree. Several alignments count together, so a word may be
replaced or inserted. A shorter sentence must be contained whole.

A sentence in more than `MOST` other passages is boilerplate. It gets one range,
that of all rows: nothing may be retrieved for it, and REALM leaves it out. This
bounds the ranges of a sentence.

The search reads all passages once for each block of sentences, so memory
depends on the block alone. (An index of all n-grams of the paper's passages
would take 20 GB.) It looks up at most four n-grams of a sentence, its anchors:
the one with the least hash in each quarter. A passage with an anchor is then
compared with the sentence, wordpiece by wordpiece. A passage that contains the
whole sentence has all anchors and is always found; one that contains only most
of it may have none.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import itertools
from typing import Any, NamedTuple

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import ngrams

_NGRAM = 8  # Wordpieces.
MOST = 8  # Largest number of other passages with a sentence that is used.
_ANCHORS = 4
_SHARE = 0.5  # Least share of the sentence's wordpieces that agree.
# Largest number of sentences of a part with the same anchor. Sentences that
# share even their rarest n-gram with more are boilerplate too.
_MOST_SHARING = 16
_PART = 2**16  # Least sentences in which equal anchors are counted.
_MAX_PARTS = 8
_BLOCK = 2**18  # Sentences, if a part has fewer; one takes about 500 bytes.
_AT_ONCE = 2**16  # Wordpieces that are hashed at a time.
_BATCH = 4  # Times as many wait for each thread.


def find(
    passages: corpus_lib.PassageTable, sentences: corpus_lib.SentenceTable
) -> corpus_lib.Ranges:
  """Returns the other passages that contain each sentence, as ranges of rows.

  Args:
    passages: the passages to search.
    sentences: their `tokens` and `passages` are used.
  """
  parts = [part for _, part in find_in_blocks(passages, [sentences])]
  counts = [np.diff(part.offsets) for part in parts]
  return corpus_lib.Ranges(
      np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts])),
      np.concatenate([np.zeros((0, 2), np.int32), *(p.rows for p in parts)]),
  )


def by_sentence(
    sentences: np.ndarray, rows: np.ndarray, count: int
) -> corpus_lib.Ranges:
  """Groups ranges by sentence, for `count` sentences."""
  offsets = np.cumsum(np.bincount(sentences, minlength=count))
  order = np.argsort(sentences, kind='stable')
  return corpus_lib.Ranges(
      np.concatenate([np.zeros(1, np.int64), offsets]),
      rows[order].astype(np.int32),
  )


_Piece = tuple[int, int, int]  # Number of a table, start, limit.


def find_in_blocks(
    passages: corpus_lib.PassageTable,
    tables: Sequence[corpus_lib.SentenceTable],
    threads: int = 1,
) -> Iterator[tuple[int, corpus_lib.Ranges]]:
  """Yields the number of a table and the ranges of its next sentences.

  Args:
    passages: the passages to search.
    tables: the sentences.
    threads: that search at the same time; numpy runs outside of Python's lock.
  """
  part = max(_PART, -(-sum(map(len, tables)) // _MAX_PARTS))
  size = part * max(1, _BLOCK // part)
  pieces: list[_Piece] = []
  room = size
  for number, table in enumerate(tables):
    start = 0
    while start < len(table):
      limit = min(start + room, len(table))
      pieces.append((number, start, limit))
      room -= limit - start
      start = limit
      if not room:
        yield from _found(passages, tables, pieces, part, threads)
        pieces, room = [], size
  if pieces:
    yield from _found(passages, tables, pieces, part, threads)


def _found(
    passages: corpus_lib.PassageTable,
    tables: Sequence[corpus_lib.SentenceTable],
    pieces: Sequence[_Piece],
    part: int,
    threads: int,
) -> Iterator[tuple[int, corpus_lib.Ranges]]:
  found = _Block(tables, pieces, part).ranges(passages, threads)
  first = 0
  for number, start, limit in pieces:
    offsets = found.offsets[first : first + limit - start + 1]
    rows = found.rows[offsets[0] : offsets[-1]]
    yield number, corpus_lib.Ranges(offsets - offsets[0], rows)
    first += limit - start


class _Block:
  """A block of sentences with their anchors.

  Equal sentences of a part have one number, `self._of`.
  """

  def __init__(
      self,
      tables: Sequence[corpus_lib.SentenceTable],
      pieces: Sequence[_Piece],
      part: int,
  ):
    self._passages = np.concatenate(
        [tables[number].passages[a:b] for number, a, b in pieces]
    )
    lengths = np.concatenate(
        [tables[number].lengths[a:b] for number, a, b in pieces]
    )
    tokens = [
        some
        for number, a, b in pieces
        for some in _tokens(tables[number], a, b)
    ]
    hashes = np.concatenate([ngrams.whole(*some) for some in tokens])
    parts = (np.arange(len(hashes)) // part).astype(np.uint64)
    _, first, inverse, counts = np.unique(
        hashes ^ parts,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    del hashes
    order = np.argsort(first)  # The order of the table.
    first, counts = first[order], counts[order]
    numbers = np.empty(len(order), np.int32)
    numbers[order] = np.arange(len(order))
    self._of = numbers[inverse]
    self._parts = parts[first]
    self._lengths = lengths[first]
    # Equal sentences may have different passages.
    self._own = np.where(counts == 1, self._passages[first], -1)
    self._starts = (np.cumsum(lengths) - lengths)[first]
    self._tokens = np.concatenate([ids for ids, _ in tokens])
    del tokens
    self._anchor()

  def _anchor(self) -> None:
    """Chooses the anchors and sorts them by hash."""
    count = len(self._lengths)
    every = np.arange(count, dtype=np.int32)
    hashes, numbers, places = self._chosen(every)
    # A sentence whose anchors are all boilerplate gets its rarest n-grams.
    usable = np.zeros(count, bool)
    usable[numbers[self._num_equal(hashes, numbers) <= _MOST_SHARING]] = True
    if not usable.all():
      others = self._chosen(every[~usable], rare=True)
      kept = usable[numbers]
      hashes = np.concatenate([hashes[kept], others[0]])
      numbers = np.concatenate([numbers[kept], others[1]])
      places = np.concatenate([places[kept], others[2]])
    kept = self._num_equal(hashes, numbers) <= _MOST_SHARING
    hashes, numbers, places = hashes[kept], numbers[kept], places[kept]
    self._no_anchor = np.ones(count, bool)
    self._no_anchor[numbers] = False
    order = np.argsort(hashes, kind='stable')
    hashes = hashes[order]
    self._numbers, self._places = numbers[order], places[order]
    first = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]))
    self._hashes = hashes[first]
    self._first = np.append(first, len(hashes))
    # A table by first bits rules out most n-grams of the passages quickly.
    self._tables = {}
    sizes = np.minimum(self._lengths[self._numbers[first]], _NGRAM)
    for size in np.unique(sizes).tolist():
      these = self._hashes[sizes == size]
      table = np.zeros(_power_of_two(8 * len(these)), bool)
      table[_cells(these, table)] = True
      self._tables[size] = table

  def _chosen(
      self, sentences: np.ndarray, rare: bool = False
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns hash, sentence and position of anchors, by sentence.

    Each is the n-gram with the least hash in its part of the sentence or, if
    `rare`, the one that the fewest of these sentences have.
    """
    found = []
    for numbers, hashes, places, sizes in self._ngrams(sentences):
      counts = np.maximum(self._lengths[numbers] - _NGRAM + 1, 1)
      parts = _ANCHORS * numbers.astype(np.int64)
      parts += _ANCHORS * places // counts
      at: Any = slice(None)
      if not rare:
        at = _least(ngrams.spread(hashes, sizes), parts)
      found.append((hashes[at], numbers[at], places[at], parts[at]))
    hashes, numbers, places, parts = map(
        np.concatenate, zip(*found, strict=True)
    )
    if rare:
      at = _least(self._num_equal(hashes, numbers), parts)
      hashes, numbers, places = hashes[at], numbers[at], places[at]
    return hashes, numbers, places

  def _num_equal(self, sums: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Returns the number of equal n-grams in the same part, of each."""
    keys = sums ^ self._parts[sentences]
    order = np.argsort(keys)
    ordered = keys[order]
    first = np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))
    sizes = np.diff(first, append=len(keys))
    counts = np.empty(len(keys), np.int64)
    counts[order] = np.repeat(sizes, sizes)
    return counts

  def _ngrams(
      self, sentences: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yields sentence, sum, position and size of n-grams, in order.

    A sentence that is shorter than an n-gram counts as one.
    """
    step = max(1, _AT_ONCE // 32)
    for i in range(0, len(sentences), step):
      some = sentences[i : i + step]
      lengths = self._lengths[some].astype(np.int64)
      starts = self._starts[some]
      ids = self._tokens[starts[0] : starts[-1] + lengths[-1]]
      counts = np.maximum(lengths - _NGRAM + 1, 1)
      places = ngrams.aranges(counts)
      at = np.repeat(starts - starts[0], counts) + places
      sizes = np.repeat(np.minimum(lengths, _NGRAM), counts)
      hashes = np.zeros(len(at), np.uint64)
      wanted = np.unique(sizes).tolist()
      for size, runs in zip(wanted, ngrams.runs(ids, wanted), strict=True):
        these = sizes == size
        hashes[these] = runs[at[these]]
      yield np.repeat(some, counts), hashes, places.astype(np.int32), sizes

  def ranges(
      self, passages: corpus_lib.PassageTable, threads: int
  ) -> corpus_lib.Ranges:
    """Searches all passages for the sentences."""
    count = np.zeros(len(self._lengths), np.int64)
    count[self._no_anchor] = MOST + 2
    numbers, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    todo = _bodies(passages)
    with futures.ThreadPoolExecutor(threads) as pool:
      while some := list(itertools.islice(todo, _BATCH * threads)):
        for number, row in itertools.chain.from_iterable(
            pool.map(lambda bodies: list(self._held(bodies, count)), some)
        ):
          count[:] += np.bincount(number, minlength=len(count))
          numbers.append(number)
          rows.append(row)
    return self._joined(
        np.concatenate(numbers), np.concatenate(rows), count, len(passages)
    )

  def _held(
      self, bodies: '_Bodies', count: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields sentences and rows of the given passages that contain them."""
    runs = ngrams.runs(bodies.ids, list(self._tables))
    found = list(map(self._hits, runs, self._tables.values()))
    if not found:  # No sentence has an anchor.
      return
    at, anchors = (np.concatenate(f) for f in zip(*found, strict=True))
    local = np.searchsorted(bodies.limits, at, 'right')
    numbers = self._numbers[anchors].astype(np.int64)
    length = np.minimum(self._lengths[numbers], _NGRAM)
    # A sentence is known to be in its own passage. After MOST + 1 other
    # passages, one of which may be its own, no further one matters.
    kept = at >= bodies.begins[local]
    kept &= at + length <= bodies.limits[local]
    kept &= self._own[numbers] != bodies.first + local
    kept &= count[numbers] <= MOST + 1
    numbers, local = numbers[kept], local[kept]
    shifts = at[kept] - self._places[anchors[kept]]
    order = np.lexsort((shifts, local, numbers))
    numbers, local, shifts = numbers[order], local[order], shifts[order]
    pair_begins = np.diff(numbers, prepend=-1) != 0
    pair_begins |= np.diff(local, prepend=-1) != 0
    fresh = pair_begins | (np.diff(shifts, prepend=0) != 0)
    numbers, local, shifts = numbers[fresh], local[fresh], shifts[fresh]
    pairs = np.cumsum(pair_begins[fresh]) - 1
    # Split into parts of bounded size, without splitting a pair.
    sizes = np.cumsum(self._lengths[numbers])
    cuts = np.flatnonzero(np.diff(sizes // (8 * _AT_ONCE), prepend=0))
    cuts = np.searchsorted(pairs, pairs[cuts], 'left')
    for some in np.split(np.arange(len(numbers)), np.unique(cuts)):
      if len(some):
        yield self._verified(
            numbers[some], local[some], shifts[some], pairs[some], bodies
        )

  def _hits(
      self, hashes: np.ndarray, table: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of n-grams that are anchors, and the anchors."""
    at = np.flatnonzero(table[_cells(hashes, table)])
    wanted = hashes[at]
    order = np.argsort(wanted)  # Makes searchsorted faster.
    at, wanted = at[order], wanted[order]
    found = np.searchsorted(self._hashes, wanted)
    known = found < len(self._hashes)
    known[known] = self._hashes[found[known]] == wanted[known]
    at, first = at[known], self._first[found[known]]
    sizes = self._first[found[known] + 1] - first
    return np.repeat(at, sizes), np.repeat(first, sizes) + ngrams.aranges(sizes)

  def _verified(
      self,
      numbers: np.ndarray,
      local: np.ndarray,
      shifts: np.ndarray,
      pairs: np.ndarray,
      bodies: '_Bodies',
  ) -> tuple[np.ndarray, np.ndarray]:
    """Compares sentences with passages, wordpiece by wordpiece.

    Args:
      numbers, local: sentences, and passages as indices of `bodies`.
      shifts: the start of each aligned sentence in `bodies.ids`.
      pairs: number of each pair of a sentence and a passage, in order.
      bodies: the passages.

    Returns:
      Sentences and rows of the pairs where the passage contains the sentence.
    """
    lengths = self._lengths[numbers].astype(np.int64)
    places = ngrams.aranges(lengths)
    at = np.repeat(shifts, lengths) + places
    inside = at >= np.repeat(bodies.begins[local], lengths)
    inside &= at < np.repeat(bodies.limits[local], lengths)
    wanted = self._tokens[np.repeat(self._starts[numbers], lengths) + places]
    same = inside & (bodies.ids[np.where(inside, at, 0)] == wanted)
    fresh = np.diff(pairs, prepend=-1) != 0
    sizes = lengths[fresh]
    bases = np.cumsum(sizes) - sizes
    covered = np.zeros(int(sizes.sum()), bool)
    base = bases[pairs - pairs[0]]
    covered[(np.repeat(base, lengths) + places)[same]] = True
    share = np.add.reduceat(covered.astype(np.int64), bases)
    # The anchor of a short sentence is the whole sentence.
    held = np.where(sizes < _NGRAM, share == sizes, share >= _SHARE * sizes)
    return numbers[fresh][held], bodies.first + local[fresh][held]

  def _joined(
      self,
      numbers: np.ndarray,
      rows: np.ndarray,
      count: np.ndarray,
      num_rows: int,
  ) -> corpus_lib.Ranges:
    """Returns ranges for all sentences, equal ones included."""
    order = np.lexsort((rows, numbers))
    numbers, rows = numbers[order], rows[order]
    counts = np.bincount(numbers, minlength=len(count))
    first = np.cumsum(counts) - counts
    sizes = np.where(count[self._of] > MOST + 1, 0, counts[self._of])
    sentences = np.repeat(np.arange(len(sizes)), sizes)
    rows = rows[np.repeat(first[self._of], sizes) + ngrams.aranges(sizes)]
    other = rows != self._passages[sentences]
    sentences, rows = sentences[other], rows[other]
    # Among exactly MOST + 1 passages, one may be the sentence's own.
    too_often = count[self._of] > MOST + 1
    too_often |= np.bincount(sentences, minlength=len(sizes)) > MOST
    kept = ~too_often[sentences]
    sentences, rows = sentences[kept], rows[kept]
    begins = (np.diff(sentences, prepend=-1) != 0) | (
        np.diff(rows, prepend=-1) != 1
    )
    ends = np.append(begins[1:], True)[: len(begins)]
    ranges = np.stack([rows[begins], rows[ends] + 1], axis=-1)
    owners = np.concatenate([sentences[begins], np.flatnonzero(too_often)])
    ranges = np.concatenate(
        [ranges, np.tile([[0, num_rows]], (int(too_often.sum()), 1))]
    )
    return by_sentence(owners, ranges, len(sizes))


def _tokens(
    table: corpus_lib.SentenceTable, start: int, limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields concatenated wordpieces of sentences, and their lengths."""
  step = max(1, _AT_ONCE // 32)
  for first in range(start, limit, step):
    rows = slice(first, min(first + step, limit))
    starts = np.asarray(table.starts[rows])
    lengths = np.asarray(table.lengths[rows]).astype(np.int64)
    # The file has them in the same order, so the range is small.
    low, high = int(starts.min()), int((starts + lengths).max())
    ids = table.tokens[low:high]
    at = np.repeat(starts - low, lengths) + ngrams.aranges(lengths)
    yield ids[at], lengths


class _Bodies(NamedTuple):
  """The bodies of adjacent passages: their ranges in `ids`."""

  first: int  # Row of the first passage.
  ids: np.ndarray
  begins: np.ndarray
  limits: np.ndarray


def _bodies(passages: corpus_lib.PassageTable) -> Iterator[_Bodies]:
  row = 0
  while row < len(passages):
    offsets = passages.offsets[row : row + _AT_ONCE // 8 + 1]
    count = np.searchsorted(offsets, offsets[0] + _AT_ONCE, 'right') - 1
    count = max(1, int(count))
    offsets = np.asarray(offsets[: count + 1])
    ids = passages.tokens[int(offsets[0]) : int(offsets[-1])]
    offsets = offsets - offsets[0]
    titles = np.asarray(passages.title_lengths[row : row + count])
    yield _Bodies(row, ids, offsets[:-1] + titles, offsets[1:])
    row += count


def _least(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Returns the position of the first least value of each group."""
  begins = np.flatnonzero(np.diff(groups, prepend=-1))
  least = np.minimum.reduceat(values, begins)
  sizes = np.diff(begins, append=len(groups))
  at = np.flatnonzero(values == np.repeat(least, sizes))
  return at[np.diff(groups[at], prepend=-1) != 0]


def _cells(hashes: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Returns the place of each hash in a table, by its first bits."""
  unused = 65 - len(table).bit_length()
  return (hashes >> np.uint64(unused)).view(np.int64)


def _power_of_two(number: int) -> int:
  return 1 << max(10, (number - 1).bit_length())
