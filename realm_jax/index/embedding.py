"""The compiled embedder of queries and documents, and fast batches of passages.

Embeddings are float32; no dropout is applied.
"""

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
import functools
import os
import threading

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.models import components
from realm_jax.models import flops
from realm_jax.runtime import mesh as mesh_lib

_WIDTH_MULTIPLE = 8  # Bucket widths are multiples of it, except the longest.
# On CPU, and elsewhere: cost of compiling one more bucket width, in wordpieces
# embedded in the same time. Low, because a builder embeds many times.
_COMPILE_COST = (2**16, 2**23)
# Upper bound of it on CPU, in FLOP. A large encoder embeds fewer than 2**16
# wordpieces in the time of a compilation.
_COMPILE_FLOP = 4e11
# Wordpieces of a batch on one device; CPU caches are small.
_BATCH_TOKENS = (2**10, 2**16)
# Batches at the same time. XLA runs many operations on one CPU core only; an
# accelerator computes one batch while the next is assembled.
_STREAMS = (max(os.cpu_count() or 1, 2), 2)
_ROW_MULTIPLE = (4, 8)  # A device's share of a batch is a multiple of it.
_MAX_PLANNED_ROWS = 2**16  # Usual number of rows of one call.


class Embedder:
  """The embedder, compiled once for each shape, over the mesh axis `data`.

  queries: embed(params, ids_BQ) -> emb_BE, where the ids have the prefix.
  documents: embed(params, ids_BLS, types_BLS) -> emb_BLE, where L documents
    belong to each row.

  Both are jitted functions. The axis `data` must divide B; every device of the
  mesh gets the whole result.
  """

  def __init__(self, component: components.Component, mesh: jax.sharding.Mesh):
    def documents(
        params: components.Params, ids_BLS: jax.Array, types_BLS: jax.Array
    ) -> jax.Array:
      b, n, length = ids_BLS.shape
      emb = component.module(params).embed_document(  # (B*L) E
          ids_BLS.reshape(b * n, length),
          types_BLS.reshape(b * n, length),
      )
      return emb.reshape(b, n, -1)

    axes = (mesh_lib.DATA,)
    whole = mesh_lib.replicated(mesh)
    self.queries = row_by_row(
        lambda params, ids_BQ: component.module(params).embed_query(ids_BQ),
        mesh, axes, whole,
    )
    self.documents = row_by_row(documents, mesh, axes, whole)


def row_by_row(
    encode: Callable[..., jax.Array],
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...],
    result: jax.NamedSharding,
) -> jax.stages.Wrapped:
  """Compiles encode(params, *arrays) with the rows divided over mesh axes.

  By `shard_map`, because XLA cannot divide the TPU's attention kernel.
  """
  rows = jax.P(axes)

  def run(params: components.Params, *arrays: jax.Array) -> jax.Array:
    return jax.shard_map(
        encode,
        mesh=mesh,
        in_specs=(jax.P(), *(rows for _ in arrays)),
        out_specs=rows,
        axis_names=set(axes),
        check_vma=False,
    )(params, *arrays)

  return jax.jit(run, out_shardings=result)


class RowEncoder:
  """Runs a model over rows of wordpieces of any length.

  Rows are sorted into a few bucket widths by length, so that short rows are not
  padded to the longest; the model is compiled once for each width. The result
  of a row depends on the set of rows of the call only, bit by bit.
  """

  def __init__(
      self,
      encode: Callable[..., jax.Array],
      lengths_N: np.ndarray,
      max_length: int,
      mesh: jax.sharding.Mesh,
      batch_tokens: int | None = None,
      flop: float = 0.0,
  ):
    """Plans the batches.

    Args:
      encode: encode(params, *arrays), one result for each row of the arrays.
      lengths_N: wordpieces of each row of the table.
      max_length: longer rows are cut to it.
      mesh: a batch is divided over all its devices.
      batch_tokens: wordpieces of a batch on all devices together.
      flop: of the model for one wordpiece; 0: few.
    """
    self._lengths = np.minimum(lengths_N, max_length)
    elsewhere = mesh.devices.flat[0].platform != 'cpu'
    compiling = _COMPILE_COST[elsewhere]
    if flop and not elsewhere:
      compiling = min(compiling, int(_COMPILE_FLOP / flop))
    self._widths = _widths(self._lengths, max_length, compiling)
    if batch_tokens is None:
      batch_tokens = mesh.size * _BATCH_TOKENS[elsewhere]
    buckets = np.searchsorted(self._widths, self._lengths)
    counts = np.bincount(buckets, minlength=len(self._widths))
    multiple = mesh.size * _ROW_MULTIPLE[elsewhere]
    self._batch_rows = []
    for width, count in zip(self._widths, counts.tolist(), strict=True):
      most = max(batch_tokens // width // multiple, 1)
      # Equal batches: a smaller last batch would be mostly padding.
      needed = max(-(-min(count, _MAX_PLANNED_ROWS) // multiple), 1)
      self._batch_rows.append(-(-needed // -(-needed // most)) * multiple)
    self._streams = _STREAMS[elsewhere]
    self._replicated = mesh_lib.replicated(mesh)
    self._over_rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    self._encode = row_by_row(encode, mesh, mesh.axis_names, self._over_rows)

  def __call__(
      self,
      params: components.Params,
      rows: np.ndarray,
      assemble: Callable[[np.ndarray, int], tuple[np.ndarray, ...]],
      lengths_N: np.ndarray | None = None,
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields indices into `rows` and their results, in no fixed order.

    assemble(row numbers, width) returns the arrays of these rows, padded to the
    width; -1 stands for a row of padding. `lengths_N` are the wordpieces of
    each row, if not those of the plan.
    """
    lengths_N = self._lengths if lengths_N is None else lengths_N
    params = jax.device_put(params, self._replicated)
    compiling = threading.Lock()

    def run(
        members: np.ndarray, width: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
      numbers = np.full(size, -1, np.int64)
      numbers[: len(members)] = rows[members]
      arrays = jax.device_put(assemble(numbers, width), self._over_rows)
      with compiling:  # Two threads would compile the same width.
        result = self._encode(params, *arrays)
      return members, np.asarray(jax.device_get(result))[: len(members)]

    with futures.ThreadPoolExecutor(self._streams) as pool:
      running: collections.deque[futures.Future] = collections.deque()
      for batch in self._batches(lengths_N[rows]):
        running.append(pool.submit(run, *batch))
        if len(running) > self._streams:
          yield running.popleft().result()
      while running:
        yield running.popleft().result()

  def _batches(
      self, lengths_N: np.ndarray
  ) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields the rows, the width and the padded size of each batch."""
    buckets = np.searchsorted(self._widths, lengths_N)
    by_width = np.argsort(buckets, kind='stable')
    ends = np.searchsorted(buckets[by_width], range(len(self._widths)), 'right')
    first = 0
    for bucket, end in enumerate(ends.tolist()):
      width, size = self._widths[bucket], self._batch_rows[bucket]
      limit = end - (end - first) % size
      # Rows that do not fill a batch join the next width if that costs less
      # than the padding of a batch of their own.
      if end == len(lengths_N) or (
          (end - limit) * self._widths[bucket + 1] >= size * width
      ):
        limit = end
      for start in range(first, limit, size):
        yield by_width[start : min(start + size, limit)], width, size
      first = max(first, limit)


class PassageEmbedder:
  """Embeds the passages of a corpus in length-bucketed batches."""

  def __init__(
      self,
      component: components.Component,
      passages: corpus_lib.PassageTable,
      tokenizer: tokenizer_lib.Tokenizer,
      max_length: int,
      mesh: jax.sharding.Mesh,
      batch_tokens: int | None = None,
  ):
    """Plans the batches; `max_length` is S, the rest as `RowEncoder`."""
    model = component.config
    lengths = config_lib.LengthsConfig(model.max_positions, max_length)
    self._template = inputs.Template.of(model, lengths, tokenizer)
    self._passages = passages

    def embed(
        params: components.Params, ids_BS: jax.Array, types_BS: jax.Array
    ) -> jax.Array:
      return component.module(params).embed_document(ids_BS, types_BS)

    self._encoder = RowEncoder(
        embed,
        self._template.lengths(passages),
        max_length,
        mesh,
        batch_tokens,
        flops.embed_flop(model, 1, max_length) / max_length,
    )

  def __call__(
      self,
      params: components.Params,
      rows: range | np.ndarray | None = None,
      progress: Callable[[int], object] | None = None,
  ) -> np.ndarray:
    """Returns the embeddings of passages, float32 [rows, E].

    `rows` are passage numbers; None: all. `progress` is called with the number
    of passages of each finished batch.

    Raises:
      ValueError: `rows` is empty.
    """
    rows = np.arange(len(self._passages)) if rows is None else np.asarray(rows)
    emb_NE: np.ndarray | None = None
    # -1 is the null document.
    assemble = functools.partial(self._template.documents, self._passages)
    for members, part_NE in self._encoder(params, rows, assemble):
      if emb_NE is None:
        emb_NE = np.zeros((len(rows), part_NE.shape[1]), np.float32)
      emb_NE[members] = part_NE
      if progress is not None:
        progress(len(members))
    if emb_NE is None:
      raise ValueError('There are no passages to embed.')
    return emb_NE


def _widths(lengths: np.ndarray, max_length: int, compiling: int) -> list[int]:
  """Returns the bucket widths of the least cost of padding and compiling."""
  widths = [*range(_WIDTH_MULTIPLE, max_length, _WIDTH_MULTIPLE), max_length]
  fitting = [0, *(int((lengths <= width).sum()) for width in widths)]
  # best[i]: cost and chosen widths for the passages that fit widths[i - 1].
  best: list[tuple[int, list[int]]] = [(0, [])]
  for i, width in enumerate(widths, start=1):
    best.append(
        min(
            (
                cost + (fitting[i] - fitting[j]) * width + compiling,
                [*chosen, width],
            )
            for j, (cost, chosen) in enumerate(best)
        )
    )
  # The longest passages need only the first width that fits all of them.
  return best[fitting.index(fitting[-1])][1]
