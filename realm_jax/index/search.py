"""Maximum inner product search over the document embeddings.

`Search` is the base class of the search backends; `backend` looks one up. A
search returns the k best rows that are neither removed nor excluded, best first
by inner product in float32; equal scores are ordered by row.
"""

import abc
from collections.abc import Iterator
import concurrent.futures
import pathlib
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import fused_topk
from realm_jax.index import topk
from realm_jax.runtime import extension
from realm_jax.runtime import mesh as mesh_lib

_STREAMED_ROWS = 2**18  # Rows of a streamed table on the devices at once.
_SCORED_ROWS = 2**12  # Rows scored at once: 2 MiB at width 128 fit the cache.

Rows = corpus_lib.Rows
Array: TypeAlias = np.ndarray | jax.Array


class RowBytes(NamedTuple):
  """Bytes of memory and disk that a search takes for each row."""

  devices: float = 0.0
  host: float = 0.0
  saved: float = 0.0  # On disk, in addition to the table of the generation.


class Search(abc.ABC):
  """Search over a table of embeddings; the base class of the backends.

  `config.mips.backend` names a subclass: one of `config.BACKENDS`, or
  `package.module:Name`. A subclass defines `build` and `search`; the attributes
  and the other methods have defaults.

  Class attributes:
    exact: whether it finds the true top k. If not, the index builder measures
      its recall.
    collective: whether all processes of a job must search together, with the
      same arguments, because the table lies on the devices of all of them.
    folder: the folder of a generation for `save`; None: nothing is saved.
    saved_settings: names of the `settings` on which a saved index depends.

  Attributes:
    num_documents: number of rows, removed ones included.
  """

  exact = False
  collective = False
  folder: str | None = None
  saved_settings: tuple[str, ...] = ()

  def __init__(self, embeddings_NE: Rows, removed: np.ndarray | None = None):
    """Takes a table, which may be memory-mapped; see `build`."""
    shape = embeddings_NE.shape
    if len(shape) != 2 or not shape[0] or not shape[1]:
      raise ValueError(
          f'Embeddings must be a matrix [rows, width], not of shape {shape}.'
      )
    if shape[0] >= 2**31:
      raise ValueError(f'{shape[0]} rows: row numbers are int32.')
    self.num_documents, self._width = shape
    self._table_NE = embeddings_NE
    self._removed = np.zeros(0, np.int64) if removed is None else removed

  @classmethod
  def build(
      cls,
      embeddings_NE: Rows,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None,
  ) -> 'Search':
    """Builds the index of a table.

    Args:
      embeddings_NE: the table; it must stay readable.
      config: the settings; `config.options` are those of other backends.
      mesh: devices of the job; None: the first device.
      removed: sorted int64 rows that must never be returned.
    """
    raise NotImplementedError(f'{cls.__name__} defines no `build`.')

  @classmethod
  def load(
      cls,
      folder: pathlib.Path,
      embeddings_NE: Rows,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None,
  ) -> 'Search':
    """Opens what `save` wrote for the same table; else as `build`."""
    raise NotImplementedError(f'{cls.__name__} defines no `load`.')

  def save(self, folder: pathlib.Path) -> None:
    """Writes the index to an existing, empty folder, which may be moved."""
    raise NotImplementedError(f'{type(self).__name__} defines no `save`.')

  @classmethod
  def settings(
      cls, config: config_lib.MipsConfig, num_rows: int
  ) -> dict[str, Any]:
    """Returns the settings that a generation's manifest records (JSON)."""
    del num_rows
    return dict(config.options)

  @classmethod
  def row_bytes(cls, config: config_lib.MipsConfig, width: int) -> RowBytes:
    """Returns the memory of one row of `width` numbers, for the planner."""
    return RowBytes(host=float(width * jnp.dtype(config.dtype).itemsize))

  @abc.abstractmethod
  def search(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None = None
  ) -> np.ndarray:
    """Returns int32 [B, k]: distinct rows that are not excluded, best first.

    Args:
      query_emb_BE: float32.
      k: number of rows for each query.
      exclude_BR2: integers; R half-open row ranges per query that must not be
        returned. An empty range, such as [0, 0), excludes nothing.

    Raises:
      ValueError: fewer than k rows are left for a query, or a shape is wrong;
        see `check`.
    """

  def check(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Checks the arguments of `search`.

    Returns:
      The ranges as int32 [B, R, 2] within the table, and the number of rows
      that each query may have, [B].
    """
    num_rows, width = self.num_documents, self._width
    if query_emb_BE.ndim != 2 or query_emb_BE.shape[1] != width:
      raise ValueError(
          f'Queries of shape {query_emb_BE.shape} against documents of width '
          f'{width}: must be [B, {width}].'
      )
    size = query_emb_BE.shape[0]
    if exclude_BR2 is None:
      exclude_BR2 = np.zeros((size, 1, 2), np.int32)
    exclude_BR2 = np.asarray(exclude_BR2)
    if exclude_BR2.ndim != 3 or exclude_BR2.shape[::2] != (size, 2):
      raise ValueError(
          f'Excluded ranges of shape {exclude_BR2.shape} for {size} queries: '
          f'must be [{size}, R, 2].'
      )
    exclude_BR2 = np.clip(exclude_BR2, 0, num_rows).astype(np.int32)
    allowed_B = num_allowed(exclude_BR2, self._removed, 0, num_rows)
    if k < 1:
      raise ValueError(f'k={k}: must be at least 1.')
    if size and k > allowed_B.min():
      query, removed = int(allowed_B.argmin()), len(self._removed)
      raise ValueError(
          f'k={k} documents: query {query} may have only {allowed_B[query]}:'
          f' {num_rows} rows less {removed} removed and'
          f' {num_rows - removed - allowed_B[query]} excluded.'
      )
    return exclude_BR2, allowed_B


class ExactSearch(Search):
  """Matmul and top-k; rows sharded over the devices of a mesh.

  Each device scores its rows chunk by chunk and keeps a running top k, so the
  [B, N] scores never exist; then the top k of the devices are merged.
  """

  exact = True
  collective = True
  _recall_target: float | None = None  # None: exact.
  _fused = False  # Whether one kernel selects the rows.

  def __init__(
      self,
      embeddings_NE: Rows,
      mesh: jax.sharding.Mesh | None = None,
      dtype: str = 'float32',
      removed: np.ndarray | None = None,
  ):
    """Puts the table on the devices, in `dtype`; see `build`.

    Raises:
      ValueError: the table is empty, not a matrix, or not finite.
    """
    super().__init__(embeddings_NE, removed)
    self._mesh, self._dtype = mesh or mesh_lib.one_device(), dtype
    self._place_all()

  @classmethod
  def build(
      cls,
      embeddings_NE: Rows,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None,
  ) -> Search:
    search = cls(embeddings_NE, mesh, config.dtype, removed)
    search._recall_target = None if cls.exact else config.recall_target
    search._fused = (
        cls.exact
        and config.kernel == 'pallas'
        and fused_topk.runs_on(
            search._mesh.devices.flat[0], config.dtype, search._width
        )
    )
    return search

  @classmethod
  def settings(
      cls, config: config_lib.MipsConfig, num_rows: int
  ) -> dict[str, Any]:
    return {} if cls.exact else {'recall_target': config.recall_target}

  @classmethod
  def row_bytes(cls, config: config_lib.MipsConfig, width: int) -> RowBytes:
    return RowBytes(devices=float(width * jnp.dtype(config.dtype).itemsize))

  def _place_all(self) -> None:
    rows = topk.aligned(self.num_documents, self._mesh)
    self._part = self._place(0, rows, check=True)

  def _place(self, start: int, rows: int, check: bool) -> topk.Part:
    return topk.place(
        self._table_NE, self._removed, (start, start + rows), self._mesh,
        self._dtype, check,
    )

  def search(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None = None
  ) -> np.ndarray:
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)

    def run(recall_target: float | None) -> tuple[np.ndarray, np.ndarray]:
      return topk.search(
          self._part, query_emb_BE, exclude_BR2, self._mesh, k, recall_target,
          self._fused,
      )

    score_BK, row_BK = run(self._recall_target)
    if np.isneginf(score_BK).any():
      # approx_max_k drops allowed rows if hardly more than k are allowed.
      _, row_BK = run(None)
    return row_BK


class ApproxSearch(ExactSearch):
  """As `ExactSearch` with `lax.approx_max_k`, then an exact re-rank.

  Selects with fast matmuls and the accelerator's approximate top-k (Chern et
  al. 2022), then scores the selected rows in float32. Exact on CPU, where XLA
  has no approximation.
  """

  exact = False


class StreamedSearch(ExactSearch):
  """As `ExactSearch` for a table that the devices cannot hold.

  Every search reads the table part by part; the next part is read while the
  devices score the last. The table is not checked to be finite.
  """

  def _place_all(self) -> None:
    pass

  def search(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None = None
  ) -> np.ndarray:
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)
    found = [
        topk.search(
            part, query_emb_BE, exclude_BR2, self._mesh, min(k, part.num_rows)
        )
        for part in self._parts()
    ]
    score_BN = np.concatenate([score_BK for score_BK, _ in found], axis=1)
    row_BN = np.concatenate([row_BK for _, row_BK in found], axis=1)
    order = np.lexsort((row_BN, -score_BN), axis=1)[:, :k]
    return np.take_along_axis(row_BN, order, 1)

  def _parts(self) -> Iterator[topk.Part]:
    rows = topk.aligned(min(_STREAMED_ROWS, self.num_documents), self._mesh)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      part = thread.submit(self._place, 0, rows, check=False)
      for start in range(rows, self.num_documents, rows):
        ready = part.result()
        part = thread.submit(self._place, start, rows, check=False)
        yield ready
      yield part.result()


class MergedSearch(Search):
  """A saved index and the rows added behind it, searched as one table."""

  def __init__(
      self, searches: tuple[Search, Search], table_NE: Rows, removed: np.ndarray
  ):
    """Joins searches of the first and of the other rows of a table."""
    super().__init__(table_NE, removed)
    self._searches = searches

  def search(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None = None
  ) -> np.ndarray:
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)
    border = self._searches[0].num_documents
    ranges = (0, border), (border, self.num_documents)
    wanted = []
    for first, limit in ranges:
      inside = np.clip(exclude_BR2, first, limit)
      allowed_B = num_allowed(inside, self._removed, first, limit)
      wanted.append(np.minimum(allowed_B, k))
    wanted_B2 = np.stack(wanted, axis=1)
    rows_BK = np.zeros((len(query_emb_BE), k), np.int32)
    # Usually one group: few queries exclude nearly all of a table.
    for counts in np.unique(wanted_B2, axis=0):
      mine = np.flatnonzero((wanted_B2 == counts).all(axis=1))
      rows_BN = np.concatenate(
          [
              search.search(query_emb_BE[mine], n, exclude_BR2[mine] - first)
              + first
              for search, n, (first, _) in zip(
                  self._searches, counts.tolist(), ranges, strict=True
              )
              if n
          ],
          axis=1,
      ).astype(np.int32)
      allowed_BN = np.ones(rows_BN.shape, bool)
      rows_BK[mine] = rank(
          self._table_NE, query_emb_BE[mine], rows_BN, allowed_BN, k
      )
    return rows_BK


def backend(config: config_lib.MipsConfig) -> type[Search]:
  """Returns the class that `config.mips.backend` names.

  Raises:
    ValueError: the name is unknown, or not that of a subclass of `Search`.
  """
  found = extension.load(
      'config.mips.backend', config.backend, config_lib.BACKENDS
  )
  if not (isinstance(found, type) and issubclass(found, Search)):
    raise ValueError(
        f'config.mips.backend={config.backend!r} names {found!r}; it must be a'
        f' subclass of {Search.__module__}.Search.'
    )
  return found


def make_search(
    config: config_lib.MipsConfig,
    embeddings_NE: Rows,
    mesh: jax.sharding.Mesh | None = None,
    saved: pathlib.Path | None = None,
    removed: np.ndarray | None = None,
) -> Search:
  """Returns the backend that the config names; see `Search.build`.

  `saved` is the folder of a saved index of the same rows; None: build one.

  Raises:
    ValueError: the table or a setting is wrong; see also `backend`.
  """
  made = backend(config)
  if saved is None:
    return made.build(embeddings_NE, config, mesh, removed)
  return made.load(saved, embeddings_NE, config, mesh, removed)


def gather(embeddings_NE: Rows, rows_BK: np.ndarray) -> np.ndarray:
  """Returns the embeddings of rows, float32 [B, K, E]."""
  doc_emb = embeddings_NE[rows_BK.reshape(-1)].astype(np.float32)
  return doc_emb.reshape(*rows_BK.shape, -1)


def score(
    embeddings_NE: Rows, query_emb_BE: np.ndarray, rows_BK: np.ndarray
) -> np.ndarray:
  """Returns the inner products of queries and their rows, float32 [B, K].

  The sum of a row does not depend on its place, as that of a matmul may.
  """
  row_C = rows_BK.reshape(-1)
  order_C = np.argsort(row_C)  # Memory-mapped pages are read in order.
  score_C = np.empty(len(row_C), np.float32)
  for start in range(0, len(order_C), _SCORED_ROWS):
    chunk = order_C[start : start + _SCORED_ROWS]
    score_C[chunk] = np.einsum(
        'CE,CE->C',
        query_emb_BE[chunk // rows_BK.shape[1]],
        np.asarray(embeddings_NE[row_C[chunk]], np.float32),
    )
  return score_C.reshape(rows_BK.shape)


def rank(
    embeddings_NE: Rows,
    query_emb_BE: np.ndarray,
    found_BN: np.ndarray,
    allowed_BN: np.ndarray,
    k: int,
) -> np.ndarray:
  """Returns the best of each query's candidates by inner product.

  `found_BN` are row numbers, of which only those in `allowed_BN` count.

  Returns:
    int32 [B, k], best first; undefined beyond the allowed candidates.
  """
  found_BN = np.where(allowed_BN, found_BN, 0)
  score_BN = score(embeddings_NE, query_emb_BE, found_BN)
  # No nan, which has no order; -0 becomes 0.
  score_BN = np.nan_to_num(score_BN) + 0.0
  score_BN = np.where(allowed_BN, score_BN, -np.inf)
  order = np.lexsort((found_BN, -score_BN), axis=1)[:, :k]
  rows_BK = np.zeros((len(found_BN), k), np.int32)
  rows_BK[:, : order.shape[1]] = np.take_along_axis(found_BN, order, 1)
  return rows_BK


def overlap(rows_BK: np.ndarray, other_BK: np.ndarray) -> float:
  """Returns the mean share of rows that two results have in common."""
  common = (rows_BK[:, :, None] == other_BK[:, None, :]).any(axis=2)
  return float(common.mean())


def num_allowed(
    exclude_BR2: np.ndarray, removed: np.ndarray, first: int, limit: int
) -> np.ndarray:
  """Returns the number of rows of a range that each query may have, int [B].

  `exclude_BR2` are clipped to [first, limit); `removed` is sorted.
  """

  def live(start: np.ndarray, limit: np.ndarray) -> np.ndarray:
    before, after = np.searchsorted(removed, np.stack([start, limit]))
    return limit - start - (after - before)

  # The size of the union: of each range, in order of its start, count the rows
  # beyond the furthest limit so far that are not removed.
  order = np.argsort(exclude_BR2[..., 0], axis=1, kind='stable')
  ranges = np.take_along_axis(exclude_BR2, order[..., None], axis=1)
  start, end = ranges[..., 0], ranges[..., 1]
  reach = np.maximum.accumulate(end, axis=1)
  reach = np.pad(reach, ((0, 0), (1, 0)), constant_values=first)[:, :-1]
  start = np.maximum(start, reach)
  excluded_B = live(start, np.maximum(end, start)).sum(axis=1)
  return live(np.array(first), np.array(limit)) - excluded_B
