"""Sequences of wordpieces: 64-bit polynomial hashes, and search.

The hash of the same wordpieces is the same at any position.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C15)


def runs(ids: np.ndarray, lengths: Sequence[int]) -> Iterator[np.ndarray]:
  """Yields the sums of all n-grams of each length, by position.

  A sum, of BASE**i times the i-th wordpiece, differs for other wordpieces; its
  low bits are those of the first ones. `spread` makes a hash of it.
  """
  doubled = [_mixed(ids)]  # Sums over 1, 2, 4, ... wordpieces.
  for length in lengths:
    while 2 ** len(doubled) <= length:
      run, size = doubled[-1], 2 ** (len(doubled) - 1)
      doubled.append(run[: max(len(run) - size, 0)] + _power(size) * run[size:])
    total, done = None, 0
    for i, run in enumerate(doubled):
      if length & 2**i:
        if total is None:
          total = run
        else:
          total = total[: max(len(run) - done, 0)] + _power(done) * run[done:]
        done += 2**i
    assert total is not None
    yield total


def whole(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns the hash of each of several adjacent sentences."""
  powers = np.full(int(lengths.max()), _BASE)
  powers[0] = 1
  values = _mixed(ids) * np.cumprod(powers)[aranges(lengths)]
  begins = np.cumsum(lengths) - lengths
  return spread(np.add.reduceat(values, begins), lengths)


def find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  """Returns the positions at which a sequence begins in `ids`, ascending."""
  at = np.flatnonzero(ids[: max(len(ids) - len(wanted) + 1, 0)] == wanted[0])
  for i in range(1, len(wanted)):
    at = at[ids[at + i] == wanted[i]]
  return at


def held(ids_BKT: Any, wanted_BM: Any, sizes_B: Any) -> np.ndarray:
  """Returns which of K rows hold a whole sequence of their own, bool [B, K].

  `sizes_B` are the lengths of the sequences; no row holds an empty one.
  """
  b, k, at = np.nonzero(ids_BKT == wanted_BM[:, :1, None])
  last = ids_BKT.shape[2] - 1
  for i in range(1, wanted_BM.shape[1]):
    same = ids_BKT[b, k, np.minimum(at + i, last)] == wanted_BM[b, i]
    kept = (i >= sizes_B[b]) | (same & (at + i <= last))
    b, k, at = b[kept], k[kept], at[kept]
  found = np.zeros(ids_BKT.shape[:2], bool)
  found[b, k] = True
  return found & (sizes_B > 0)[:, None]


def aranges(sizes: np.ndarray) -> np.ndarray:
  """Returns the concatenation of arange(size) for each size."""
  total = int(sizes.sum())
  return np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _power(exponent: int) -> np.uint64:
  return np.uint64(pow(int(_BASE), exponent, 2**64))


def _mixed(ids: np.ndarray) -> np.ndarray:
  values = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(
      0xBF58476D1CE4E5B9
  )
  values ^= values >> np.uint64(27)
  return values


def spread(sums: np.ndarray, length: Any) -> np.ndarray:
  """Spreads sums of n-grams of a length over all 64 bits."""
  hashes = sums ^ (np.asarray(length).astype(np.uint64) << np.uint64(56))
  hashes ^= hashes >> np.uint64(31)
  hashes *= np.uint64(0x94D049BB133111EB)
  hashes ^= hashes >> np.uint64(29)
  return hashes
