"""The device part of exact and approximate search: chunked, sharded top-k.

Equal scores are ordered by row: `lax.top_k` does so within a chunk, and the
merges keep it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import fused_topk

# The rows of a shard are padded to a multiple. Otherwise the sums of rows at an
# edge of the matmul could have another order and so another last bit.
ALIGN = fused_topk.GROUP
_MAX_SCORES = 2**24  # Scores on a device at once: 64 MiB of float32.
_MAX_CHUNK = 2**16
_CHECKED = 2**14  # Rows that are checked at once, to need little memory.
_SPARE = 8  # Groups selected in addition to k, as their maxima are rounded.

Ranked = tuple[jax.Array, jax.Array]  # Scores and rows.


@dataclasses.dataclass(frozen=True)
class Part:
  """Rows of a table on the devices, split over all axes of the mesh."""

  table_NE: jax.Array
  removed_N: jax.Array | None  # bool; None: no row is removed.
  rows: tuple[int, int]  # The first row, and the number of rows of the table.

  @property
  def num_rows(self) -> int:
    """The number of rows of the part, with padding."""
    return self.table_NE.shape[0]


def aligned(rows: int, mesh: jax.sharding.Mesh) -> int:
  """Returns the padded number of rows."""
  step = mesh.size * ALIGN
  return -(-rows // step) * step


def place(
    embeddings_NE: corpus_lib.Rows,
    removed: np.ndarray | None,
    rows: tuple[int, int],
    mesh: jax.sharding.Mesh,
    dtype: str,
    check: bool,
) -> Part:
  """Puts a range of rows on the devices, with padding beyond the last row.

  Args:
    embeddings_NE: read slice by slice.
    removed: sorted row numbers.
    rows: the range; its length is a result of `aligned`.
    mesh: rows are split over all its axes.
    dtype: type of the table on the devices.
    check: whether every row must be finite.

  Raises:
    ValueError: a row is not finite.
  """
  first, count = rows[0], rows[1] - rows[0]
  total, width = embeddings_NE.shape

  def read(index: tuple[slice, ...]) -> np.ndarray:
    start, limit, _ = index[0].indices(count)
    start, limit = first + start, first + limit
    known = max(0, min(limit, total) - start)
    given = embeddings_NE[start : start + known]
    part = given
    if known < limit - start or given.dtype != jnp.dtype(dtype):
      part = np.zeros((limit - start, width), jnp.dtype(dtype))
      part[:known] = given
    for first_row in range(0, known if check else 0, _CHECKED):
      rows = part[first_row : first_row + _CHECKED].astype(np.float32)
      finite = np.isfinite(rows).all(axis=1)
      if not finite.all():
        row = start + first_row + int(np.argmin(finite))
        raise ValueError(
            f'The embedding of row {row} is not finite as {dtype}.'
        )
    return part

  sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
  table_NE = jax.make_array_from_callback((count, width), sharding, read)
  if removed is None or not len(removed):
    return Part(table_NE, None, (first, total))
  here = slice(*np.searchsorted(removed, rows))
  hidden_N = np.zeros(count, bool)
  hidden_N[removed[here] - first] = True
  removed_N = jax.make_array_from_callback(
      (count,), sharding, lambda index: hidden_N[index]
  )
  return Part(table_NE, removed_N, (first, total))


def search(
    part: Part,
    query_emb_BE: np.ndarray | jax.Array,
    exclude_BR2: np.ndarray,
    mesh: jax.sharding.Mesh,
    k: int,
    recall_target: float | None = None,
    fused: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `top_rows` of a part, on the host."""
  query_emb_BE, exclude_BR2, rows_2 = jax.device_put(
      (query_emb_BE, exclude_BR2, np.array(part.rows, np.int32)),
      jax.NamedSharding(mesh, jax.P()),
  )
  return jax.device_get(
      top_rows(
          part.table_NE, query_emb_BE, exclude_BR2, part.removed_N, rows_2,
          mesh=mesh, k=k, recall_target=recall_target, fused=fused,
      )
  )


@functools.partial(
    jax.jit, static_argnames=('mesh', 'k', 'recall_target', 'split', 'fused')
)
def top_rows(
    table_NE: jax.Array,
    query_emb_BE: jax.Array,
    exclude_BR2: jax.Array,
    removed_N: jax.Array | None,
    rows_2: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    k: int,
    recall_target: float | None = None,
    split: bool | None = None,
    fused: bool = False,
) -> Ranked:
  """Returns the best scores and rows, float32 and int32 [B, k].

  Args:
    table_NE: a part of the table, split over all axes of the mesh.
    query_emb_BE: whole on every device, as `exclude_BR2` and `rows_2`.
    exclude_BR2: ranges of rows per query.
    removed_N: bool, rows of the part that are hidden from all queries.
    rows_2: the first row of the part, and the number of rows of the table;
      later rows are padding.
    mesh: mesh of the table.
    k: at most the number of rows of the part.
    recall_target: for `lax.approx_max_k`; None: exact.
    split: whether rows in bfloat16 are selected by three products in bfloat16,
      for tensor cores, and ranked in float32; None: unless on CPU.
    fused: whether the kernel of `fused_topk` selects the rows of a table in
      bfloat16, which are ranked in float32, if it takes the table.

  Rows beyond those that a query may have get the score -inf.
  """
  axes = mesh.axis_names
  if split is None:
    split = mesh.devices.flat[0].platform != 'cpu'
  split = split and table_NE.dtype == jnp.bfloat16
  in_one = recall_target is None and not split  # Selected by the final scores.

  def local(
      table_NE: jax.Array,
      query_emb_BE: jax.Array,
      exclude_BR2: jax.Array,
      removed_N: jax.Array | None,
      rows_2: jax.Array,
  ) -> Ranked:
    rows_here, width = table_NE.shape
    size = query_emb_BE.shape[0]
    chunk = max(_MAX_SCORES // max(size, 1) // ALIGN, 1) * ALIGN
    chunk = min(chunk, _MAX_CHUNK, rows_here)
    first_row = rows_2[0] + jax.lax.axis_index(axes) * rows_here
    keep = min(k if in_one else 2 * k + 8, chunk)
    held = min(k, rows_here)

    def visit(i: jax.Array, best: Ranked) -> Ranked:
      # The last chunk overlaps the one before; the repeated rows are hidden.
      start = jnp.minimum(i * chunk, rows_here - chunk)
      part_NE = jax.lax.dynamic_slice_in_dim(table_NE, start, chunk)
      here_N = start + jnp.arange(chunk)
      row_N = first_row + here_N
      hidden_BN = _excluded(row_N, exclude_BR2)
      hidden_BN |= (here_N < i * chunk) | (row_N >= rows_2[1])
      if removed_N is not None:
        hidden_BN |= jax.lax.dynamic_slice_in_dim(removed_N, start, chunk)
      if in_one:
        score_BN = _score('BE,NE->BN', query_emb_BE, part_NE, 'highest')
        score_BN = jnp.where(hidden_BN, -jnp.inf, score_BN)
        top_BK, at_BK = _top(score_BN, keep)
      else:
        fast_BN = (
            _split_score(query_emb_BE, part_NE)
            if recall_target is None
            else _score('BE,NE->BN', query_emb_BE, part_NE, 'default')
        )
        fast_BN = jnp.where(hidden_BN, -jnp.inf, fast_BN)
        fast_BK, at_BK = (
            _top(fast_BN, keep)
            if recall_target is None
            else jax.lax.approx_max_k(
                fast_BN, keep, recall_target=recall_target
            )
        )
        exact_BK = _score('BE,BKE->BK', query_emb_BE, part_NE[at_BK], 'highest')
        top_BK = jnp.where(fast_BK == -jnp.inf, -jnp.inf, exact_BK)
      return _best(best, (top_BK, row_N[at_BK]), best[0].shape[1])

    if fused and fused_topk.takes(rows_here, width, k + _SPARE):
      best = _best_of_groups(
          table_NE, query_emb_BE, exclude_BR2, removed_N, first_row, rows_2[1],
          held, interpret=mesh.devices.flat[0].platform == 'cpu',
      )
    else:
      best = (
          jnp.full((size, held), -jnp.inf, jnp.float32),
          jnp.full((size, held), rows_2[1], jnp.int32),
      )
      best = jax.lax.fori_loop(0, -(-rows_here // chunk), visit, best)
    merged = jax.tree.map(
        lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), best
    )
    return _best(None, merged, k)

  return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P(axes), jax.P(), jax.P(), jax.P(axes), jax.P()),
      out_specs=jax.P(),
      check_vma=False,
  )(table_NE, query_emb_BE, exclude_BR2, removed_N, rows_2)


def _best_of_groups(
    table_NE: jax.Array,
    query_emb_BE: jax.Array,
    exclude_BR2: jax.Array,
    removed_N: jax.Array | None,
    first_row: jax.Array,
    limit: jax.Array,
    k: int,
    interpret: bool,
) -> Ranked:
  """Returns the best rows of a shard, from groups that a kernel selects.

  The kernel takes two of the three parts of a query. The third is below 2**-16
  of it, and a sum of 128 products in float32 is rounded as much.
  """
  hidden_N = first_row + jnp.arange(table_NE.shape[0]) >= limit
  if removed_N is not None:
    hidden_N |= removed_N
  max_BN = fused_topk.group_maxima(
      jnp.stack(_parts(query_emb_BE, 2)),
      table_NE, hidden_N, exclude_BR2, first_row, interpret,
  )
  more = -max_BN.shape[1] % ALIGN  # Else `_top` sorts all of them.
  max_BN = jnp.pad(max_BN, ((0, 0), (0, more)), constant_values=-jnp.inf)
  _, group_BK = _top(max_BN, k + _SPARE)
  group_BK = jnp.sort(group_BK, axis=1)  # So that equal scores stay in order.
  here_BN = group_BK[..., None] * ALIGN + jnp.arange(ALIGN)
  here_BN = here_BN.reshape(len(group_BK), -1)
  score_BN = _score('BE,BNE->BN', query_emb_BE, table_NE[here_BN], 'highest')
  hidden_BN = hidden_N[here_BN] | _excluded(first_row + here_BN, exclude_BR2)
  top_BK, at_BK = _top(jnp.where(hidden_BN, -jnp.inf, score_BN), k)
  return top_BK, first_row + jnp.take_along_axis(here_BN, at_BK, axis=1)


def _excluded(row_BN: jax.Array, exclude_BR2: jax.Array) -> jax.Array:
  """Returns whether rows, [N] or [B, N], are in a range of the query."""
  row_BRN = jnp.expand_dims(row_BN, -2)
  first_BR1, limit_BR1 = exclude_BR2[..., :1], exclude_BR2[..., 1:]
  return ((row_BRN >= first_BR1) & (row_BRN < limit_BR1)).any(axis=1)


def _score(
    shapes: str, query_emb_BE: jax.Array, rows: jax.Array, precision: str
) -> jax.Array:
  """Returns finite inner products in float32; -inf marks hidden rows."""
  score = jnp.einsum(
      shapes,
      query_emb_BE.astype(jnp.float32),
      rows.astype(jnp.float32),
      precision=precision,
  )
  return _finite(score)


def _split_score(query_emb_BE: jax.Array, rows_NE: jax.Array) -> jax.Array:
  """As `_score`, to float32's rounding, of rows in bfloat16.

  A float32 is the sum of three bfloat16, and a float32 holds the product of two
  bfloat16 exactly.
  """
  score_BN = jnp.float32(0)
  for part_BE in _parts(query_emb_BE, 3):
    score_BN += jnp.einsum(
        'BE,NE->BN', part_BE, rows_NE, preferred_element_type=jnp.float32
    )
  return _finite(score_BN)


def _finite(score: jax.Array) -> jax.Array:
  lowest = jnp.finfo(jnp.float32).min
  return jnp.where(score >= lowest, score, lowest)


def _parts(query_emb_BE: jax.Array, count: int) -> list[jax.Array]:
  """Returns the largest of the bfloat16 arrays whose sum is the query."""
  rest_BE, parts = query_emb_BE.astype(jnp.float32), []
  for _ in range(count):
    # XLA may leave out a conversion to bfloat16 and back, but not this.
    part_BE = jax.lax.reduce_precision(rest_BE, 8, 7)
    rest_BE -= part_BE
    parts.append(part_BE.astype(jnp.bfloat16))
  return parts


def _top(score_BN: jax.Array, k: int) -> Ranked:
  """As `lax.top_k`, but only among the k groups with the best maximum.

  Every row of the top k is in one of these groups: otherwise each of the k
  groups would have a row that precedes it by score or row.
  """
  size, count = score_BN.shape
  if count % ALIGN or count // ALIGN <= 2 * k:
    return jax.lax.top_k(score_BN, k)
  groups = score_BN.reshape(size, -1, ALIGN)
  _, group_BK = jax.lax.top_k(groups.max(axis=2), k)
  group_BK = jnp.sort(group_BK, axis=1)  # So that equal scores stay in order.
  close = jnp.take_along_axis(groups, group_BK[..., None], axis=1)
  top_BK, at_BK = jax.lax.top_k(close.reshape(size, -1), k)
  group_BK = jnp.take_along_axis(group_BK, at_BK // ALIGN, axis=1)
  return top_BK, group_BK * ALIGN + at_BK % ALIGN


def _best(a: Ranked | None, b: Ranked, k: int) -> Ranked:
  """Returns the k best of (scores, rows): high scores first, then low rows."""
  if a is not None:
    b = (jnp.concatenate([a[0], b[0]], 1), jnp.concatenate([a[1], b[1]], 1))
  score, row = jax.lax.sort((-b[0], b[1]), dimension=1, num_keys=2)
  return -score[:, :k], row[:, :k]
