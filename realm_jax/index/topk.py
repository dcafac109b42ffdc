"""The device part of exact and approximate search: chunked, sharded top-k.

Public: `top_rows`, `ALIGN`. Ties go to the lower row, as `lax.top_k` gives them
within a chunk and the merges keep them.
"""

import functools

import jax
import jax.numpy as jnp

# Rows of a shard are padded to a multiple, so that no row meets an edge of the
# matmul, where the order of the sum (and so the last bit) may be another.
ALIGN = 128
# Scores held at once by one device: 64 MiB of float32.
_MAX_SCORES = 2**24
_MAX_CHUNK = 2**16

Ranked = tuple[jax.Array, jax.Array]  # Scores and rows, or rows and a flag.


@functools.partial(
    jax.jit, static_argnames=('mesh', 'k', 'num_rows', 'recall_target')
)
def top_rows(
    table_NE: jax.Array,
    query_emb_BE: jax.Array,
    exclude_BR2: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    k: int,
    num_rows: int,
    recall_target: float | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns rows BK and whether every one of them is allowed."""
  axes = mesh.axis_names

  def local(
      table_NE: jax.Array, query_emb_BE: jax.Array, exclude_BR2: jax.Array
  ) -> Ranked:
    rows_here = table_NE.shape[0]
    size = query_emb_BE.shape[0]
    chunk = max(_MAX_SCORES // max(size, 1) // ALIGN, 1) * ALIGN
    chunk = min(chunk, _MAX_CHUNK, rows_here)
    first_row = jax.lax.axis_index(axes) * rows_here
    keep = k if recall_target is None else 2 * k + 8
    keep = min(keep, chunk)

    def visit(i: jax.Array, best: Ranked) -> Ranked:
      # The last chunk begins earlier to be whole; what it repeats is hidden.
      start = jnp.minimum(i * chunk, rows_here - chunk)
      part_NE = jax.lax.dynamic_slice_in_dim(table_NE, start, chunk)
      here_N = start + jnp.arange(chunk)
      row_N = first_row + here_N
      hidden_BN = (
          (row_N >= exclude_BR2[..., :1]) & (row_N < exclude_BR2[..., 1:])
      ).any(axis=1)
      hidden_BN |= (here_N < i * chunk) | (row_N >= num_rows)
      if recall_target is None:
        score_BN = _score('BE,NE->BN', query_emb_BE, part_NE, 'highest')
        score_BN = jnp.where(hidden_BN, -jnp.inf, score_BN)
        top_BK, at_BK = jax.lax.top_k(score_BN, keep)
      else:
        fast_BN = _score('BE,NE->BN', query_emb_BE, part_NE, 'default')
        fast_BN = jnp.where(hidden_BN, -jnp.inf, fast_BN)
        fast_BK, at_BK = jax.lax.approx_max_k(
            fast_BN, keep, recall_target=recall_target
        )
        exact_BK = _score(
            'BE,BKE->BK', query_emb_BE, part_NE[at_BK], 'highest'
        )
        top_BK = jnp.where(fast_BK == -jnp.inf, -jnp.inf, exact_BK)
      return _best(best, (top_BK, row_N[at_BK]), best[0].shape[1])

    held = min(k, rows_here)
    best = (
        jnp.full((size, held), -jnp.inf, jnp.float32),
        jnp.full((size, held), num_rows, jnp.int32),
    )
    best = jax.lax.fori_loop(0, -(-rows_here // chunk), visit, best)
    merged = jax.tree.map(
        lambda x: jax.lax.all_gather(x, axes, axis=1, tiled=True), best
    )
    top_BK, row_BK = _best(None, merged, k)
    return row_BK, (top_BK > -jnp.inf).all()

  return jax.shard_map(
      local,
      mesh=mesh,
      in_specs=(jax.P(axes), jax.P(), jax.P()),
      out_specs=jax.P(),
      check_vma=False,
  )(table_NE, query_emb_BE, exclude_BR2)


def _score(
    shapes: str, query_emb_BE: jax.Array, rows: jax.Array, precision: str
) -> jax.Array:
  """Inner products in float32, each above -inf, which marks hidden rows."""
  score = jnp.einsum(
      shapes,
      query_emb_BE.astype(jnp.float32),
      rows.astype(jnp.float32),
      precision=precision,
  )
  lowest = jnp.finfo(jnp.float32).min
  return jnp.where(score >= lowest, score, lowest)


def _best(a: Ranked | None, b: Ranked, k: int) -> Ranked:
  """Returns the k best of (scores, rows): high scores first, then low rows."""
  if a is not None:
    b = (jnp.concatenate([a[0], b[0]], 1), jnp.concatenate([a[1], b[1]], 1))
  score, row = jax.lax.sort((-b[0], b[1]), dimension=1, num_keys=2)
  return -score[:, :k], row[:, :k]
