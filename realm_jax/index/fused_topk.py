"""Exact selection of rows by one kernel on NVIDIA GPUs, in Pallas.

Without it, the scores of a chunk of the table are written and read again, many
times the bytes of the table itself. The kernel multiplies a tile of queries
with the rows of a group and writes the maximum of the group alone. The k best
rows of a query are in the k groups with the best maxima: otherwise each of
these groups would have a row that precedes them.
"""

import jax
import jax.numpy as jnp

GROUP = 128  # Rows of a group.
_TILE = 2**14  # Numbers in the queries of a program.
_MIN_TILE = 16  # Queries, the fewest that the tensor cores multiply.
_GROUPS = 8  # Groups of a program, which loads the next one ahead.
_MIN_CHUNK = 32  # Numbers of a row in one product, at least.
_STAGES = 3  # Groups in shared memory; fewer of wider rows.


def runs_on(device: jax.Device, dtype: str, width: int) -> bool:
  """Returns whether a device can select from a table of the dtype and width."""
  return (
      device.platform in ('gpu', 'cuda')
      and dtype == 'bfloat16'
      and width % _MIN_CHUNK == 0
      and width * _MIN_TILE <= _TILE
  )


def takes(rows: int, width: int, groups: int) -> bool:
  """Returns whether the kernel selects from a table of this size.

  It pays if there are many more groups than are selected; addresses are int32.
  """
  return rows >= 2 * groups * GROUP and rows * width < 2**31


def group_maxima(
    query_emb_PBE: jax.Array,
    table_NE: jax.Array,
    hidden_N: jax.Array,
    exclude_BR2: jax.Array,
    first_row: jax.Array,
    interpret: bool = False,
) -> jax.Array:
  """Returns the best score of each group of rows, float32 [B, N / GROUP].

  Args:
    query_emb_PBE: bfloat16; a query is the sum of its P parts.
    table_NE: bfloat16; N is a multiple of `GROUP`.
    hidden_N: bool, rows that are hidden from all queries.
    exclude_BR2: int32, ranges of rows that are hidden from a query.
    first_row: int32 [], the number of row 0 in the ranges.
    interpret: whether the kernel is emulated, for tests on a CPU.

  A score is finite; -inf is the maximum of a group without a visible row.
  """
  # Pallas takes a tenth of a second to import.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton

  parts, size, width = query_emb_PBE.shape
  groups, ranges = table_NE.shape[0] // GROUP, exclude_BR2.shape[1]
  most = pl.next_power_of_2(_TILE // width + 1) // 2
  tile = min(max(pl.next_power_of_2(size), _MIN_TILE), most, GROUP)
  tiles = pl.cdiv(size, tile)
  chunk = min(width & -width, GROUP)  # A power of two that divides the width.
  more = tiles * tile - size
  query_emb_PBE = jnp.pad(query_emb_PBE, ((0, 0), (0, more), (0, 0)))
  range_R2B = jnp.pad(exclude_BR2 - first_row, ((0, more), (0, 0), (0, 0)))
  range_R2B = range_R2B.transpose(1, 2, 0)

  def kernel(
      query_ref: jax.Ref,
      table_ref: jax.Ref,
      hidden_ref: jax.Ref,
      range_ref: jax.Ref,
      max_ref: jax.Ref,
  ) -> None:
    # Programs that follow each other read the same rows, which the cache holds.
    program = pl.program_id(0)
    query = pl.ds((program % tiles) * tile, tile)
    columns = [pl.ds(start, chunk) for start in range(0, width, chunk)]
    part_emb_BE = [
        [query_ref[part, query, column] for part in range(parts)]
        for column in columns
    ]
    range_B = [
        (range_ref[r, 0, query][:, None], range_ref[r, 1, query][:, None])
        for r in range(ranges)
    ]

    def visit(i: jax.Array, _: None) -> None:
      # The last groups may be computed twice, with the same result.
      group = jnp.minimum((program // tiles) * _GROUPS + i, groups - 1)
      row_N = group * GROUP + jnp.arange(GROUP)
      score_BN = jnp.zeros((tile, GROUP), jnp.float32)
      for column, some_BE in zip(columns, part_emb_BE, strict=True):
        rows_NE = table_ref[pl.ds(group * GROUP, GROUP), column]
        for emb_BE in some_BE:
          score_BN += jax.lax.dot_general(
              emb_BE,
              rows_NE,
              (((1,), (1,)), ((), ())),
              preferred_element_type=jnp.float32,
          )
      hidden_BN = (hidden_ref[pl.ds(group * GROUP, GROUP)] != 0)[None]
      for first_B1, limit_B1 in range_B:
        hidden_BN |= (row_N >= first_B1) & (row_N < limit_B1)
      # Finite scores, as those of `topk`; -inf marks hidden rows.
      lowest = jnp.finfo(jnp.float32).min
      score_BN = jnp.where(score_BN >= lowest, score_BN, lowest)
      score_BN = jnp.where(hidden_BN, -jnp.inf, score_BN)
      max_ref[group, query] = score_BN.max(axis=1)

    jax.lax.fori_loop(0, _GROUPS, visit, None)

  max_MB = pl.pallas_call(
      kernel,
      grid=(tiles * pl.cdiv(groups, _GROUPS),),
      out_shape=jax.ShapeDtypeStruct((groups, tiles * tile), jnp.float32),
      compiler_params=triton.CompilerParams(
          num_warps=8 if tile == GROUP else 4,
          num_stages=max(_STAGES + 1 - pl.cdiv(width, GROUP), 1),
      ),
      interpret=interpret,
  )(query_emb_PBE, table_NE, hidden_N.astype(jnp.int8), range_R2B)
  return max_MB[:, :size].T
