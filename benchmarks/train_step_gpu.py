"""The GPU part of benchmarks/train_step.py, in a process of its own.

Prints JSON: matmul peak, the training step at the largest batch that fits, the
exact search and the embedding of passages, in bfloat16. With --small the same
code at toy sizes, on whatever device there is.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import mips
from realm_jax.models import components as components_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.training import costs
from realm_jax.training import optimizer
from realm_jax.training import steps

_NULL = (101, 102, 102)


@dataclasses.dataclass(frozen=True)
class _Size:
  """What is measured."""

  matmul: int = 8192
  first_batch: int = 8
  rows: int = 13_353_718  # Of the paper's corpus.
  queries: int = 512
  embed_rows: int = 224  # Passages of 288 wordpieces at a time.
  repeats: int = 10


_PAPER, _TOY = _Size(), _Size(256, 1, 20_000, 8, 8, 2)


def _median_seconds(run: Any, repeats: int) -> float:
  jax.block_until_ready(run())
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run())
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def matmul_flops(size: _Size) -> float:
  """FLOP/s of a square bfloat16 product, eight in a row."""
  n, chain = size.matmul, 8

  @jax.jit
  def products(x, y):
    for _ in range(chain):
      x = (x @ y) * (1 / n)  # Neither grows nor vanishes.
    return x

  x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
  seconds = _median_seconds(lambda: products(x, x), size.repeats)
  return chain * 2 * n**3 / seconds


def _config(small: bool) -> config_lib.Config:
  config = config_lib.Config(objective='realm', corpus='none')
  config.model.compute_dtype = config.mips.dtype = 'bfloat16'
  config.model.vocab_size = 30522
  if small:
    config.model.preset, config.model.vocab_size = 'tiny', 2000
    config.lengths.query, config.lengths.document = 24, 40
    config.num_candidates = 3
  return config_lib.resolve(config)


def _batch(config: config_lib.Config) -> dict[str, np.ndarray]:
  """Full-length inputs of random wordpieces."""
  rng = np.random.default_rng(0)
  b, k, m = config.batch_size, config.num_candidates, config.lengths.masks
  q, s, t = config.lengths.query, config.lengths.document, config.lengths.joint

  def ids(*shape: int) -> np.ndarray:
    return rng.integers(5, config.model.vocab_size, shape, np.int32)

  def types(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)

  return {
      'query_ids_BQ': ids(b, q),
      'doc_ids_BJS': ids(b, k - 1, s),
      'doc_types_BJS': types(b, k - 1, s),
      'joint_ids_BKT': ids(b, k, t),
      'joint_types_BKT': types(b, k, t),
      'positions_BM': np.tile(np.arange(1, m + 1, dtype=np.int32), (b, 1)),
      'targets_BM': ids(b, m),
      'mask_BM': np.ones((b, m), bool),
  }


def step_seconds(config: config_lib.Config, repeats: int) -> float | None:
  """Median seconds of a step; None if it does not fit into memory."""
  components = components_lib.make_all(config)
  tx = optimizer.make_optimizer(config, tuple(components))
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  train_step = steps.make_train_step(config, components, tx, _NULL, mesh)

  def fresh() -> steps.TrainState:
    params = {name: c.init(0) for name, c in components.items()}
    return steps.TrainState(
        jnp.int32(0), params, tx.init(params), jax.random.key(0)
    )

  try:
    state = jax.jit(fresh, out_shardings=mesh_lib.replicated(mesh))()
    arrays = mesh_lib.to_devices(mesh, _batch(config))

    def run() -> Any:
      nonlocal state
      state, metrics = train_step(state, arrays)
      return metrics

    return _median_seconds(run, repeats)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return None


def largest_batch(
    config: config_lib.Config, size: _Size, most: int
) -> tuple[int, float]:
  """Returns the largest batch that fits, by halves of a doubling, and time."""
  found, batch = (0, 0.0), size.first_batch
  while batch <= most:
    taken = step_seconds(
        dataclasses.replace(config, batch_size=batch), size.repeats
    )
    print(f'batch {batch}: {taken} s', file=sys.stderr, flush=True)
    if taken is None:
      break
    found, batch = (batch, taken), batch * 2
  batch = found[0] + found[0] // 2
  if found[0] > 1 and batch <= most:
    taken = step_seconds(
        dataclasses.replace(config, batch_size=batch), size.repeats
    )
    print(f'batch {batch}: {taken} s', file=sys.stderr, flush=True)
    if taken is not None:
      found = batch, taken
  return found


def search_seconds(config: config_lib.Config, size: _Size) -> float:
  """Median seconds of the exact search of a batch, from and to the host."""
  rng = np.random.default_rng(0)
  width = config.model.embedding_width
  table = np.empty((size.rows, width), jnp.bfloat16)
  for first in range(0, size.rows, 2**20):
    part = table[first : first + 2**20]
    part[:] = rng.standard_normal(part.shape, np.float32)
  mesh = mesh_lib.make_mesh(config.mesh)
  search = mips.ExactSearch(table, mesh, 'bfloat16')
  queries = rng.standard_normal((size.queries, width)).astype(np.float32)
  return _median_seconds(
      lambda: search.search(queries, config.num_candidates - 1), size.repeats
  )


def embed_seconds(config: config_lib.Config, size: _Size) -> float:
  """Median seconds of embedding a batch of passages of full length."""
  embedder = components_lib.make('embedder', config.model)
  params = jax.jit(lambda: embedder.init(0))()
  shape = (size.embed_rows, config.lengths.document)
  ids = jax.random.randint(
      jax.random.key(0), shape, 5, config.model.vocab_size
  )
  embed = jax.jit(
      lambda params, ids: embedder.apply(
          params, 'embed_document', ids, jnp.ones_like(ids)
      )
  )
  return _median_seconds(lambda: embed(params, ids), size.repeats)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--small', action='store_true')
  small = parser.parse_args().small
  size, config = _TOY if small else _PAPER, _config(small)
  peak = matmul_flops(size)
  batch, seconds = largest_batch(config, size, 2 if small else 4096)
  trained = dataclasses.replace(config, batch_size=batch)
  searched = search_seconds(config, size)
  embedded = embed_seconds(config, size)
  embed_flop = costs.embed_flop(
      config.model, size.embed_rows, config.lengths.document
  )
  figures = {
      'gpu_matmul_tflops': peak / 1e12,
      'gpu_batch': batch,
      'gpu_step_seconds': seconds,
      'gpu_mfu': costs.model_flop(trained) / seconds / peak,
      'gpu_search_milliseconds': 1e3 * searched,
      # Of the paper's batch, of which a step takes as much longer.
      'gpu_search_share_of_step': searched / (seconds * size.queries / batch),
      'gpu_embed_mfu': embed_flop / embedded / peak,
  }
  print(json.dumps({'device': str(jax.devices()[0]), **figures}))


if __name__ == '__main__':
  main()
