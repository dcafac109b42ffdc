"""Maximum inner product search over the document embeddings.

Public: `Search` (what every backend offers), `ExactSearch`, `ApproxSearch`,
`ScannSearch`, `make_search`, `recall`, `overlap`, `exact_rows`. A search
returns the k best rows that are not excluded, best first by inner product in
float32, ties by lower row.
"""

import functools
import math
import os
import pathlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import topk

# Below so many rows ScaNN compares with every row: a tree gains nothing.
SCANN_BRUTE_FORCE = 20_000
_PART_ROWS = 2**18  # Of a table that is visited part by part.
_RERANK_QUERIES = 64  # At once, to bound the gathered candidates.


class Rows(Protocol):
  """A table of rows: a numpy array, or the shards of a generation."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  def __getitem__(self, rows: Any, /) -> np.ndarray: ...


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
  ):
    """Puts the table on the devices of `mesh` (default: the first device).

    Args:
      embeddings_NE: read slice by slice, so it may be memory-mapped.
      mesh: the rows are split over all its axes.
      dtype: of the table on the devices; scores are float32 in any case.

    Raises:
      ValueError: if the table is empty, not a matrix, or not finite.
    """
    self.num_documents, self._width = _table_shape(embeddings_NE)
    self._mesh = mesh or jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1), ('data', 'model')
    )
    rows_here = -(-self.num_documents // self._mesh.size)
    rows_here = -(-rows_here // topk.ALIGN) * topk.ALIGN

    def read(index: tuple[slice, ...]) -> np.ndarray:
      start, limit, _ = index[0].indices(rows_here * self._mesh.size)
      part = np.zeros((limit - start, self._width), jnp.dtype(dtype))
      known = max(0, min(limit, self.num_documents) - start)
      part[:known] = embeddings_NE[start : start + known]
      finite = np.isfinite(part.astype(np.float32)).all(axis=1)
      if not finite.all():
        raise ValueError(
            f'The embedding of row {start + int(np.argmin(finite))} is not '
            f'finite as {dtype}.'
        )
      return part

    self._table_NE = jax.make_array_from_callback(
        (rows_here * self._mesh.size, self._width),
        jax.NamedSharding(self._mesh, jax.P(self._mesh.axis_names)),
        read,
    )

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `Search.search`."""
    exclude_BR2, _ = _check(
        query_emb_BE, k, exclude_BR2, self.num_documents, self._width
    )
    replicated = jax.NamedSharding(self._mesh, jax.P())
    query_emb_BE, exclude_BR2 = jax.device_put(
        (query_emb_BE, exclude_BR2), replicated
    )
    run = functools.partial(
        topk.top_rows,
        self._table_NE,
        query_emb_BE,
        exclude_BR2,
        mesh=self._mesh,
        k=k,
        num_rows=self.num_documents,
    )
    rows_BK, complete = jax.device_get(run(recall_target=self._recall_target))
    if not complete:
      # approx_max_k dropped allowed rows where hardly more than k were left.
      rows_BK, _ = jax.device_get(run(recall_target=None))
    return rows_BK


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
  ):
    super().__init__(embeddings_NE, mesh, dtype)
    self._recall_target = recall_target


class ScannSearch:
  """ScaNN on the CPU (Guo et al. 2020): tree, asymmetric hashing, re-rank.

  Settings left at 0 in the config follow from the number of rows N:
    below 20,000 rows: every row is compared, exactly;
    num_leaves: 2 sqrt(N), so that a leaf has sqrt(N) / 2 rows;
    leaves_to_search: 4 sqrt(num_leaves), the larger share the fewer there are;
    reorder: 100 candidates re-ranked, at least 4 k, and what is excluded.
  On 100,000 clustered rows of width 128 that is 99 % recall of the best 8. The
  recall on the rows at hand is measured whenever an index is published.
  The re-rank reads the rows of the generation's own table, so ScaNN neither
  holds nor writes a second float32 copy of it. Building is not reproducible
  bit by bit: ScaNN draws its own random numbers.
  """

  def __init__(
      self,
      embeddings_NE: Rows,
      config: config_lib.MipsConfig,
      directory: str | os.PathLike[str] | None = None,
  ):
    """Builds the index, or loads what `save` wrote to `directory`.

    Raises:
      FileNotFoundError: if `directory` has no ScaNN index.
      ValueError: if the table is empty or not a matrix, or the folder holds a
        pickle.
      ImportError: if ScaNN is not installed.
    """
    # Imported late: it takes long to load, and only this backend needs it.
    from scann.scann_ops.py import scann_ops_pybind

    self.num_documents, self._width = _table_shape(embeddings_NE)
    self._table_NE = embeddings_NE
    self._leaves, self._leaves_to_search, self._reorder = scann_settings(
        config, self.num_documents
    )
    if directory is None:
      table_NE = np.asarray(embeddings_NE[:], np.float32)
      if not np.isfinite(table_NE).all():
        raise ValueError('An embedding is not finite.')
      builder = scann_ops_pybind.builder(table_NE, 10, 'dot_product')
      if self._leaves:
        builder = builder.tree(
            num_leaves=self._leaves,
            num_leaves_to_search=self._leaves_to_search,
            # k-means on at most 100 rows for each leaf.
            training_sample_size=min(self.num_documents, 100 * self._leaves),
        ).score_ah(2, anisotropic_quantization_threshold=0.2)
      else:
        builder = builder.score_brute_force()
      self._searcher = builder.build()
      return
    directory = pathlib.Path(directory)
    if not (directory / 'scann_assets.pbtxt').is_file():
      raise FileNotFoundError(f'{directory} holds no ScaNN index.')
    if (directory / 'scann_docids.pkl').exists():
      raise ValueError(
          f'{directory}/scann_docids.pkl is a pickle, which could run any '
          'code; realm_jax writes none.'
      )
    self._searcher = scann_ops_pybind.load_searcher(str(directory))

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the index to an existing, empty folder, which may be moved."""
    self._searcher.serialize(str(directory), relative_path=True)

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `Search.search`."""
    exclude_BR2, excluded_B = _check(
        query_emb_BE, k, exclude_BR2, self.num_documents, self._width
    )
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    rows_BK = np.zeros((len(query_emb_BE), k), np.int32)
    for start in range(0, len(query_emb_BE), _RERANK_QUERIES):
      some = np.arange(start, min(start + _RERANK_QUERIES, len(query_emb_BE)))
      fetch = max(self._reorder, 4 * k) + int(excluded_B[some].max())
      leaves = self._leaves_to_search
      while some.size:
        fetch = min(fetch, self.num_documents)
        found, complete = self._attempt(
            query_emb_BE[some], k, exclude_BR2[some], fetch, leaves
        )
        rows_BK[some[complete]] = found[complete]
        some = some[~complete]
        # In the end all leaves and all rows, which cannot fail.
        fetch, leaves = 4 * fetch, min(4 * leaves, self._leaves)
    return rows_BK

  def _attempt(
      self,
      query_emb_BE: np.ndarray,
      k: int,
      exclude_BR2: np.ndarray,
      fetch: int,
      leaves: int,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [B, k] and which queries [B] found k allowed ones."""
    found, distance = self._searcher.search_batched_parallel(
        query_emb_BE,
        final_num_neighbors=fetch,
        pre_reorder_num_neighbors=fetch,
        leaves_to_search=leaves or None,
    )
    found_BN = np.asarray(found, np.int32)
    # ScaNN fills what it did not find with row 0 at distance nan.
    allowed_BN = ~np.isnan(distance)
    for r in range(exclude_BR2.shape[1]):
      first, limit = exclude_BR2[:, r, :1], exclude_BR2[:, r, 1:]
      allowed_BN &= (found_BN < first) | (found_BN >= limit)
    candidate_emb = self._table_NE[found_BN.reshape(-1)].astype(np.float32)
    candidate_emb = candidate_emb.reshape(*found_BN.shape, self._width)
    # Not matmul: its last bit may depend on where a row stands.
    score_BN = np.einsum('BE,BNE->BN', query_emb_BE, candidate_emb)
    score_BN = np.where(allowed_BN, np.nan_to_num(score_BN) + 0.0, -np.inf)
    order = np.lexsort((found_BN, -score_BN), axis=1)[:, :k]
    if order.shape[1] < k:
      return np.zeros((len(order), k), np.int32), np.zeros(len(order), bool)
    return (
        np.take_along_axis(found_BN, order, 1),
        allowed_BN.sum(axis=1) >= k,
    )


def scann_settings(
    config: config_lib.MipsConfig, num_rows: int
) -> tuple[int, int, int]:
  """Returns leaves (0: no tree), leaves to search, and rows to re-rank.

  Raises:
    ValueError: if the config asks for more leaves than there are rows.
  """
  leaves = config.num_leaves
  if not leaves and num_rows >= SCANN_BRUTE_FORCE:
    leaves = round(2 * math.sqrt(num_rows))
  if leaves > num_rows:
    raise ValueError(
        f'config.mips.num_leaves={leaves}: more than the {num_rows} rows.'
    )
  to_search = config.leaves_to_search or math.ceil(4 * math.sqrt(leaves))
  return leaves, min(to_search, leaves), config.reorder or 100


def make_search(
    config: config_lib.MipsConfig,
    embeddings_NE: Rows,
    mesh: jax.sharding.Mesh | None = None,
    scann_directory: str | os.PathLike[str] | None = None,
) -> Search:
  """Returns the backend that the config names over a table of embeddings.

  Args:
    config: the backend and its settings.
    embeddings_NE: an array, or the table of a generation.
    mesh: where `exact` and `approx` keep the table; None: the first device.
    scann_directory: a saved ScaNN index of the same rows; None: build one.

  Raises:
    ValueError: if the table or a setting does not fit.
  """
  match config.backend:
    case 'exact':
      return ExactSearch(embeddings_NE, mesh, config.dtype)
    case 'approx':
      return ApproxSearch(
          embeddings_NE, mesh, config.dtype, config.recall_target
      )
    case 'scann':
      return ScannSearch(embeddings_NE, config, scann_directory)
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
  """As `ExactSearch.search`, for a table too large for the devices.

  Visits a memory-mapped table part by part, so it is slow and small.
  """
  _check(query_emb_BE, k, None, *_table_shape(embeddings_NE))
  query_emb_BE = np.asarray(query_emb_BE, np.float32)
  best_rows, best_scores = [], []
  for start in range(0, embeddings_NE.shape[0], _PART_ROWS):
    part_NE = np.asarray(embeddings_NE[start : start + _PART_ROWS], np.float32)
    rows_BK = ExactSearch(part_NE, mesh).search(
        query_emb_BE, min(k, len(part_NE))
    )
    best_scores.append(np.einsum('BE,BKE->BK', query_emb_BE, part_NE[rows_BK]))
    best_rows.append(rows_BK + start)
  rows_BN = np.concatenate(best_rows, axis=1)
  score_BN = np.concatenate(best_scores, axis=1)
  order = np.lexsort((rows_BN, -score_BN), axis=1)[:, :k]
  return np.take_along_axis(rows_BN, order, 1)


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
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the ranges as int32, and how many rows they hide."""
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
  # The size of their union: in order of where they start, count of each only
  # what lies beyond the furthest limit so far.
  order = np.argsort(exclude_BR2[..., 0], axis=1, kind='stable')
  ranges = np.take_along_axis(exclude_BR2, order[..., None], axis=1)
  start, limit = ranges[..., 0], ranges[..., 1]
  reach = np.maximum.accumulate(limit, axis=1)
  reach = np.pad(reach, ((0, 0), (1, 0)))[:, :-1]
  excluded_B = np.maximum(limit - np.maximum(start, reach), 0).sum(axis=1)
  if k < 1:
    raise ValueError(f'k={k}: must be at least 1.')
  if size and k > num_rows - excluded_B.max():
    worst = int(excluded_B.argmax())
    raise ValueError(
        f'k={k} documents were asked for, but query {worst} may have only '
        f'{num_rows - excluded_B[worst]}: {num_rows} rows less '
        f'{excluded_B[worst]} excluded.'
    )
  return exclude_BR2, excluded_B
