"""Embeddings of the passages of a corpus, as fast as the devices can.

Public: `PassageEmbedder`, and the `RowEncoder` underneath.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.models import components
from realm_jax.runtime import mesh as mesh_lib

_WIDTH_MULTIPLE = 8  # Of the widths to choose from, besides the longest.
# Of a further width, in wordpieces that could be embedded meanwhile. Low, as a
# builder compiles once and embeds many times.
_COMPILE_COST = {'cpu': 2**16}
_COMPILE_COST_ELSEWHERE = 2**23
# Of one batch on one device. Larger is slower where the cache is small.
_BATCH_TOKENS = {'cpu': 2**12}
_BATCH_TOKENS_ELSEWHERE = 2**16
_ROW_MULTIPLE = 8  # Rows of a batch on a device.
_MOST_ROWS = 2**16  # That are embedded by one call, as a rule.


class RowEncoder:
  """Runs a model over rows of wordpieces, of whatever lengths.

  Rows are sorted into a few widths by their length, so that short ones are not
  padded to the longest; it is compiled once for each width. The result for a
  row is a function of the rows that it is called with, bit by bit.
  """

  def __init__(
      self,
      encode: Callable[..., jax.Array],
      lengths_N: np.ndarray,
      max_length: int,
      mesh: jax.sharding.Mesh,
      batch_tokens: int | None = None,
  ):
    """Plans the batches.

    Args:
      encode: encode(params, *arrays), a result for each row of the arrays.
      lengths_N: of all rows there are, in wordpieces.
      max_length: at which a longer row is cut.
      mesh: a batch is divided over all its devices.
      batch_tokens: wordpieces of a batch, of all devices together.
    """
    self._lengths = np.minimum(lengths_N, max_length)
    platform = mesh.devices.flat[0].platform
    self._widths = _widths(
        self._lengths,
        max_length,
        _COMPILE_COST.get(platform, _COMPILE_COST_ELSEWHERE),
    )
    if batch_tokens is None:
      batch_tokens = mesh.size * _BATCH_TOKENS.get(
          platform, _BATCH_TOKENS_ELSEWHERE
      )
    buckets = np.searchsorted(self._widths, self._lengths)
    counts = np.bincount(buckets, minlength=len(self._widths))
    multiple = mesh.size * _ROW_MULTIPLE
    self._batch_rows = []
    for width, count in zip(self._widths, counts.tolist(), strict=True):
      most = max(batch_tokens // width // multiple, 1)
      # Equal batches, so that the last one is not mostly padding.
      needed = max(-(-min(count, _MOST_ROWS) // multiple), 1)
      self._batch_rows.append(-(-needed // -(-needed // most)) * multiple)
    self._replicated = mesh_lib.replicated(mesh)
    self._over_rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    rows = self._over_rows.spec

    def encode_all(params: components.Params, arrays: Any) -> jax.Array:
      return encode(params, *arrays)

    # Each device its rows: XLA could not divide the TPU's kernel of attention.
    self._encode = jax.jit(
        jax.shard_map(
            encode_all,
            mesh=mesh,
            in_specs=(jax.P(), rows),
            out_specs=rows,
            check_vma=False,
        )
    )

  @property
  def compilations(self) -> int:
    """How often it was compiled: at most once for each width."""
    return self._encode._cache_size()

  def __call__(
      self,
      params: components.Params,
      rows: np.ndarray,
      assemble: Callable[[np.ndarray, int], tuple[np.ndarray, ...]],
      lengths_N: np.ndarray | None = None,
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields places in `rows` and the results for them, in no fixed order.

    Args:
      params: of the model.
      rows: numbers of rows.
      assemble: assemble(numbers, width), the arrays of some rows, padded to
        the width; where the number is -1, of none.
      lengths_N: of all rows, where they are not those that were planned for.
    """
    lengths_N = self._lengths if lengths_N is None else lengths_N
    params = jax.device_put(params, self._replicated)
    # The next batch is put together while the devices work on this one.
    running: list[tuple[np.ndarray, jax.Array]] = []

    def collect() -> tuple[np.ndarray, np.ndarray]:
      mine, result = running.pop(0)
      return mine, np.asarray(jax.device_get(result))[: len(mine)]

    for mine, width, size in self._batches(lengths_N[rows]):
      numbers = np.full(size, -1, np.int64)
      numbers[: len(mine)] = rows[mine]
      arrays = jax.device_put(assemble(numbers, width), self._over_rows)
      running.append((mine, self._encode(params, arrays)))
      if len(running) > 1:
        yield collect()
    while running:
      yield collect()

  def _batches(
      self, lengths_N: np.ndarray
  ) -> Iterator[tuple[np.ndarray, int, int]]:
    """Yields which of the rows, the width and the size of each batch."""
    buckets = np.searchsorted(self._widths, lengths_N)
    by_width = np.argsort(buckets, kind='stable')
    ends = np.searchsorted(buckets[by_width], range(len(self._widths)), 'right')
    first = 0
    for bucket, end in enumerate(ends.tolist()):
      width, size = self._widths[bucket], self._batch_rows[bucket]
      limit = end - (end - first) % size
      # What does not fill a batch joins the next width, if that costs less
      # than the padding of a batch of its own.
      if end == len(lengths_N) or (
          (end - limit) * self._widths[bucket + 1] >= size * width
      ):
        limit = end
      for start in range(first, limit, size):
        yield by_width[start : min(start + size, limit)], width, size
      first = max(first, limit)


class PassageEmbedder:
  """Embeds passages with given parameters, without dropout."""

  def __init__(
      self,
      component: components.Component,
      passages: corpus_lib.PassageTable,
      tokenizer: tokenizer_lib.Tokenizer,
      max_length: int,
      mesh: jax.sharding.Mesh,
      batch_tokens: int | None = None,
  ):
    """Plans the batches.

    Args:
      component: the embedder.
      passages: the corpus' token table.
      tokenizer: for the special ids.
      max_length: S, at which a longer passage is cut.
      mesh: a batch is divided over all its devices.
      batch_tokens: wordpieces of a batch, of all devices together.
    """
    self._passages, self._tokenizer = passages, tokenizer

    def embed(
        params: components.Params, ids_BS: jax.Array, types_BS: jax.Array
    ) -> jax.Array:
      return component.apply(params, 'embed_document', ids_BS, types_BS)

    self._encoder = RowEncoder(
        embed, passages.lengths, max_length, mesh, batch_tokens
    )

  @property
  def compilations(self) -> int:
    """How often the embedder was compiled: at most once for each width."""
    return self._encoder.compilations

  def __call__(
      self,
      params: components.Params,
      rows: range | np.ndarray | None = None,
      progress: Callable[[int], object] | None = None,
  ) -> np.ndarray:
    """Returns float32 [rows, E] of passages, by default of all.

    Args:
      params: of the embedder.
      rows: passage numbers.
      progress: called with the number of passages that were just embedded.

    Raises:
      ValueError: if there are no rows.
    """
    rows = np.arange(len(self._passages)) if rows is None else np.asarray(rows)
    emb_NE: np.ndarray | None = None
    for mine, part_NE in self._encoder(params, rows, self._assemble):
      if emb_NE is None:
        emb_NE = np.zeros((len(rows), part_NE.shape[1]), np.float32)
      emb_NE[mine] = part_NE
      if progress is not None:
        progress(len(mine))
    if emb_NE is None:
      raise ValueError('There are no passages to embed.')
    return emb_NE

  def _assemble(
      self, numbers: np.ndarray, width: int
  ) -> tuple[np.ndarray, np.ndarray]:
    return inputs.assemble_documents(  # Of -1: the null document.
        self._passages, numbers, width, self._tokenizer
    )


def _widths(lengths: np.ndarray, max_length: int, compiling: int) -> list[int]:
  """Returns the bucket widths for which the least is padded and compiled."""
  widths = [*range(_WIDTH_MULTIPLE, max_length, _WIDTH_MULTIPLE), max_length]
  fitting = [0, *(int((lengths <= width).sum()) for width in widths)]
  # best[i]: cost, and the widths chosen, for the passages of the first i.
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
  # The longest passages need no more than the first width that fits them all.
  return best[fitting.index(fitting[-1])][1]
