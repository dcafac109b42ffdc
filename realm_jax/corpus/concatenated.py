"""Arrays joined along their first axis, read on demand and never copied.

The parts may be memory-mapped and together larger than the memory.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Rows(Protocol):
  """Rows that are read by slice or by number, as of a numpy array."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...

  def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Chained:
  """The rows of at least one part; ValueError if dtypes or widths differ."""

  def __init__(self, parts: Sequence[Rows]):
    kinds = {(str(part.dtype), part.shape[1:]) for part in parts}
    if len(kinds) != 1:
      raise ValueError(f'Parts of one table are of several kinds: {kinds}.')
    self._parts = list(parts)
    self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
    self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
    self.dtype = parts[0].dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Returns a slice of step 1, or the rows of an array of row numbers."""
    if isinstance(rows, slice):
      start, limit, step = rows.indices(len(self))
      if step != 1:
        raise ValueError(f'{rows}: a table gives ranges of step 1 only.')
      found = [
          part[max(start - first, 0) : limit - first]
          for first, part in zip(self._starts, self._parts, strict=False)
          if first < limit and first + part.shape[0] > start
      ]
      if len(found) == 1:
        return found[0]
      nothing = np.empty((0, *self.shape[1:]), self.dtype)
      return np.concatenate([*found, nothing])
    rows = np.asarray(rows)
    taken = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
    owners = np.searchsorted(self._starts[1:], rows, side='right')
    for owner in np.unique(owners):
      mine = owners == owner
      taken[mine] = self._parts[owner][rows[mine] - self._starts[owner]]
    return taken
