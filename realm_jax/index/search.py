"""Maximum inner product search over the document embeddings.

A search returns the k best rows that are neither removed nor excluded, best
first by inner product in float32; equal scores are ordered by row.
"""

from collections.abc import Iterator
import concurrent.futures
import os
from typing import Protocol

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import scann
from realm_jax.index import topk
from realm_jax.runtime import mesh as mesh_lib

_PART_ROWS = 2**18  # Of a table that is visited part by part.
_MAX_CANDIDATES = 2**22  # Of all queries that are searched at once.
_RANK_ROWS = 2**12  # Scored at once: 2 MiB of width 128 stay in the cache.


Rows = topk.Rows


class Search(Protocol):
  """What every backend offers."""

  num_documents: int

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """Returns int32 [B, k]: distinct rows that are not excluded, best first.

    Args:
      query_emb_BE: float32.
      k: how many rows for each query.
      exclude_BR2: integers; R half-open row ranges per query that must not be
        returned. An empty range, such as [0, 0), excludes nothing.

    Raises:
      ValueError: if fewer than k rows are left for a query, or a shape is off.
    """
    ...


class ExactSearch:
  """Matmul and top-k; rows sharded over the devices of a mesh.

  Each device scores its rows chunk by chunk and keeps a running top k, so the
  [B, N] scores never exist; then the devices' top k are gathered and merged.
  """

  # Of lax.approx_max_k; None: exact.
  _recall_target: float | None = None

  def __init__(
      self,
      embeddings_NE: Rows,
      mesh: jax.sharding.Mesh | None = None,
      dtype: str = 'float32',
      removed: np.ndarray | None = None,
  ):
    """Puts the table on the devices of `mesh` (default: the first device).

    Args:
      embeddings_NE: read slice by slice, so it may be memory-mapped.
      mesh: the rows are split over all its axes.
      dtype: of the table on the devices; scores are float32 in any case.
      removed: sorted int64 rows that are never returned.

    Raises:
      ValueError: if the table is empty, not a matrix, or not finite.
    """
    self.num_documents, self._width = _table_shape(embeddings_NE)
    self._mesh, self._removed = mesh or mesh_lib.one_device(), removed
    rows = topk.aligned(self.num_documents, self._mesh)
    self._part = topk.place(
        embeddings_NE, removed, (0, rows), self._mesh, dtype, check=True
    )

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `Search.search`."""
    exclude_BR2, _ = _check(
        query_emb_BE, k, exclude_BR2, self.num_documents, self._width,
        self._removed,
    )

    def run(recall_target: float | None) -> tuple[np.ndarray, np.ndarray]:
      return topk.search(
          self._part, query_emb_BE, exclude_BR2, self._mesh, k, recall_target
      )

    score_BK, row_BK = run(self._recall_target)
    if np.isneginf(score_BK).any():
      # approx_max_k dropped allowed rows where hardly more than k were left.
      _, row_BK = run(None)
    return row_BK


class ApproxSearch(ExactSearch):
  """As `ExactSearch` with `lax.approx_max_k`, then an exact re-rank.

  Selects with fast matmuls and the accelerator's approximate top-k (Chern et
  al. 2022), then scores the survivors in float32. Exact on CPU, where XLA has
  no approximation.
  """

  def __init__(
      self,
      embeddings_NE: Rows,
      mesh: jax.sharding.Mesh | None = None,
      dtype: str = 'float32',
      recall_target: float = 0.95,
      removed: np.ndarray | None = None,
  ):
    super().__init__(embeddings_NE, mesh, dtype, removed)
    self._recall_target = recall_target


class StreamedSearch:
  """As `ExactSearch` for a table that the devices cannot hold.

  Every search reads the table, which may be memory-mapped, part by part: the
  next while the devices are at work on one. It is not checked to be finite.
  """

  def __init__(
      self,
      embeddings_NE: Rows,
      mesh: jax.sharding.Mesh | None = None,
      dtype: str = 'float32',
      removed: np.ndarray | None = None,
  ):
    """As `ExactSearch`."""
    self.num_documents, self._width = _table_shape(embeddings_NE)
    self._table_NE, self._removed = embeddings_NE, removed
    self._mesh, self._dtype = mesh or mesh_lib.one_device(), dtype

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `Search.search`."""
    exclude_BR2, _ = _check(
        query_emb_BE, k, exclude_BR2, self.num_documents, self._width,
        self._removed,
    )
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
    rows = topk.aligned(min(_PART_ROWS, self.num_documents), self._mesh)

    def place(start: int) -> topk.Part:
      return topk.place(
          self._table_NE, self._removed, (start, start + rows), self._mesh,
          self._dtype, check=False,
      )

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
      part = thread.submit(place, 0)
      for start in range(rows, self.num_documents, rows):
        ready, part = part.result(), thread.submit(place, start)
        yield ready
      yield part.result()


class ScannSearch:
  """ScaNN on the CPU (Guo et al. 2020): tree, asymmetric hashing, re-rank.

  ScaNN finds candidates by their codes; these are ranked by the rows of the
  generation's own table, so ScaNN neither holds nor writes a vector. Building
  is not reproducible bit by bit, since ScaNN trains on several threads;
  searching a saved index is.
  """

  def __init__(
      self,
      embeddings_NE: Rows,
      config: config_lib.MipsConfig,
      directory: str | os.PathLike[str] | None = None,
      removed: np.ndarray | None = None,
  ):
    """Builds the index, or loads what `save` wrote to `directory`.

    Args:
      embeddings_NE: it stays in use; it may be memory-mapped.
      config: its settings.
      directory: of a saved index of the same rows, removed ones included.
      removed: sorted int64 rows that are never returned.

    Raises:
      FileNotFoundError: if `directory` has no ScaNN index.
      ValueError: if the table or the folder is not what it should be.
      ImportError: if ScaNN is not installed.
    """
    self.num_documents, self._width = _table_shape(embeddings_NE)
    self._table_NE, self._removed = embeddings_NE, removed
    self._leaves, self._leaves_to_search, self._reorder = scann.settings(
        config, self.num_documents
    )
    # The number of rows stands for candidates that are none.
    self._hidden_N = np.zeros(self.num_documents + 1, bool)
    self._hidden_N[-1] = True
    if removed is not None:
      self._hidden_N[removed] = True
    self._live = int(np.count_nonzero(~self._hidden_N))
    if directory is None:
      self._tree = scann.Tree.build(embeddings_NE, self._leaves)
    else:
      self._tree = scann.Tree.load(directory, self.num_documents)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the index to an existing, empty folder, which may be moved."""
    self._tree.save(directory)

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `Search.search`."""
    exclude_BR2, allowed_B = _check(
        query_emb_BE, k, exclude_BR2, self.num_documents, self._width,
        self._removed,
    )
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    # ScaNN fails on queries that are not finite; any rows will do for those.
    finite = np.isfinite(query_emb_BE).all(axis=1, keepdims=True)
    query_emb_BE = np.where(finite, query_emb_BE, 0)
    rows_BK = np.zeros((len(query_emb_BE), k), np.int32)
    # So many are ranked exactly for each query, if it may have as many.
    wanted = max(self._reorder, 4 * k)
    excluded = int((self._live - allowed_B).max(initial=0))
    fetch = wanted + min(excluded, wanted)
    fetch = fetch * self.num_documents // max(self._live, 1)
    leaves = self._leaves_to_search
    todo = np.arange(len(query_emb_BE))
    # Without leaves up to all rows; with them up to where it is no quicker.
    limit = self.num_documents * 4 - 1
    limit = limit // 16 if self._leaves else limit
    while todo.size and fetch <= limit:
      fetch = min(fetch, self.num_documents)
      again = []
      step = max(_MAX_CANDIDATES // fetch, 1)
      for start in range(0, len(todo), step):
        some = todo[start : start + step]
        rows_BK[some], enough_B = self._attempt(
            query_emb_BE[some], k, exclude_BR2[some], fetch, leaves,
            np.minimum(wanted, allowed_B[some]),
        )
        again.append(some[~enough_B])
      todo = np.concatenate(again)
      fetch, leaves = 4 * fetch, min(4 * leaves, self._leaves)
    if todo.size:
      # Nearly all rows like these queries are hidden.
      exact = StreamedSearch(self._table_NE, removed=self._removed)
      rows_BK[todo] = exact.search(query_emb_BE[todo], k, exclude_BR2[todo])
    return rows_BK

  def _attempt(
      self,
      query_emb_BE: np.ndarray,
      k: int,
      exclude_BR2: np.ndarray,
      fetch: int,
      leaves: int,
      wanted_B: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [B, k] and which queries [B] had enough candidates."""
    found_BN = self._tree.search(query_emb_BE, fetch, leaves)
    allowed_BN = ~self._hidden_N[found_BN]
    for r in range(exclude_BR2.shape[1]):
      first, limit = exclude_BR2[:, r, :1], exclude_BR2[:, r, 1:]
      allowed_BN &= (found_BN < first) | (found_BN >= limit)
    count_B = allowed_BN.sum(axis=1)
    # The leaves had no more rows: enough, if there are k.
    exhausted_B = (found_BN == self.num_documents).any(axis=1)
    enough_B = (count_B >= wanted_B) | (exhausted_B & (count_B >= k))
    return (
        rank(self._table_NE, query_emb_BE, found_BN, allowed_BN, k), enough_B
    )


def make_search(
    config: config_lib.MipsConfig,
    embeddings_NE: Rows,
    mesh: jax.sharding.Mesh | None = None,
    scann_directory: str | os.PathLike[str] | None = None,
    removed: np.ndarray | None = None,
) -> Search:
  """Returns the backend that the config names over a table of embeddings.

  Args:
    config: the backend and its settings.
    embeddings_NE: an array, or the table of a generation.
    mesh: where `exact` and `approx` keep the table; None: the first device.
    scann_directory: a saved ScaNN index of the same rows; None: build one.
    removed: sorted int64 rows that are never returned.

  Raises:
    ValueError: if the table or a setting does not fit.
  """
  match config.backend:
    case 'exact':
      return ExactSearch(embeddings_NE, mesh, config.dtype, removed)
    case 'approx':
      return ApproxSearch(
          embeddings_NE, mesh, config.dtype, config.recall_target, removed
      )
    case 'scann':
      return ScannSearch(embeddings_NE, config, scann_directory, removed)
    case _:
      raise ValueError(
          f'config.mips.backend={config.backend!r}: must be one of exact, '
          'approx, scann.'
      )


def recall(
    search: Search,
    exact: Search,
    query_emb_BE: np.ndarray | jax.Array,
    k: int,
) -> float:
  """Returns the mean share of the exact top k that `search` finds, 0 to 1."""
  return overlap(search.search(query_emb_BE, k), exact.search(query_emb_BE, k))


def exact_rows(
    embeddings_NE: Rows,
    query_emb_BE: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh | None = None,
) -> np.ndarray:
  """As `StreamedSearch.search`, once."""
  return StreamedSearch(embeddings_NE, mesh).search(query_emb_BE, k)


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
  for start in range(0, len(order_C), _RANK_ROWS):
    chunk = order_C[start : start + _RANK_ROWS]
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
  """Returns the best of each query's candidates by their own embeddings.

  Args:
    embeddings_NE: the table; it may be memory-mapped.
    query_emb_BE: float32.
    found_BN: rows.
    allowed_BN: which of them count; the others may be any number.
    k: of the result.

  Returns:
    int32 [B, k], best first; of no meaning beyond those that are allowed.
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
  """Returns the mean share of common rows of two searches' results."""
  common = (rows_BK[:, :, None] == other_BK[:, None, :]).any(axis=2)
  return float(common.mean())


def _table_shape(embeddings_NE: Rows) -> tuple[int, int]:
  shape = embeddings_NE.shape
  if len(shape) != 2 or not shape[0] or not shape[1]:
    raise ValueError(
        f'Embeddings must be a matrix [rows, width], not of shape {shape}.'
    )
  if shape[0] >= 2**31:
    raise ValueError(f'{shape[0]} rows: row numbers are int32.')
  return shape[0], shape[1]


def _check(
    query_emb_BE: np.ndarray | jax.Array,
    k: int,
    exclude_BR2: np.ndarray | None,
    num_rows: int,
    width: int,
    removed: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ranges as int32, and how many rows each query may have."""
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
  removed = np.zeros(0, np.int64) if removed is None else removed
  allowed_B = num_allowed(exclude_BR2, removed, 0, num_rows)
  if k < 1:
    raise ValueError(f'k={k}: must be at least 1.')
  if size and k > allowed_B.min():
    worst = int(allowed_B.argmin())
    left = num_rows - len(removed)
    raise ValueError(
        f'k={k} documents were asked for, but query {worst} may have only '
        f'{allowed_B[worst]}: {num_rows} rows less {len(removed)} removed and '
        f'{left - allowed_B[worst]} excluded.'
    )
  return exclude_BR2, allowed_B


def num_allowed(
    exclude_BR2: np.ndarray, removed: np.ndarray, first: int, limit: int
) -> np.ndarray:
  """Returns how many rows of a part of a table each query may have, int B.

  Args:
    exclude_BR2: ranges that each query must not have, clipped to the part.
    removed: sorted rows of the table that none may have.
    first, limit: of the part.
  """

  def live(start: np.ndarray, limit: np.ndarray) -> np.ndarray:
    before, after = np.searchsorted(removed, np.stack([start, limit]))
    return limit - start - (after - before)

  # The size of their union: in order of where they start, count of each only
  # what lies beyond the furthest limit so far and is not removed anyway.
  order = np.argsort(exclude_BR2[..., 0], axis=1, kind='stable')
  ranges = np.take_along_axis(exclude_BR2, order[..., None], axis=1)
  start, end = ranges[..., 0], ranges[..., 1]
  reach = np.maximum.accumulate(end, axis=1)
  reach = np.pad(reach, ((0, 0), (1, 0)), constant_values=first)[:, :-1]
  start = np.maximum(start, reach)
  excluded_B = live(start, np.maximum(end, start)).sum(axis=1)
  return live(np.array(first), np.array(limit)) - excluded_B
