"""One stage of benchmarks/accelerator.py, which starts this file.

Figures are added to the record as they come: `error` is why the stage failed,
`skipped` why it did not apply.
"""

import argparse
from collections.abc import Callable
import contextlib
import functools
import os
import pathlib
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from typing import Any

import accelerator_steps as steps
import harness
import jax
import jax.numpy as jnp
import numpy as np
import training

from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.index import topk
from realm_jax.models import components as components_lib
from realm_jax.models import flops
from realm_jax.models import fused_attention
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib

_K = 8  # Passages per query.
_CHECKED = 16  # Queries whose result is compared with a plain computation.
_STOP_SECONDS = 8  # For the trainer to save and end.
_CUT = 3  # Exit code of a stage that ended in time.

Figures = harness.Figures


class _Context(argparse.Namespace):
  """Arguments of a stage, and the reporting of its figures."""

  def __init__(self) -> None:
    super().__init__(measured=0)  # Steps that could be measured.

  @property
  def size(self) -> steps.Sizes:
    return steps.sizes(self.small)

  @property
  def left(self) -> float:
    """Seconds until the stage is cut."""
    return self.until - time.time()

  def report(self, prefix: str = '', **figures: Any) -> None:
    """Adds figures to the record."""
    record = files.read_json(self.output)
    record['versions'] |= figures.pop('versions', {})
    names = [prefix] if prefix else []
    if self.stage != 'probe' or 'error' in figures:
      names.insert(0, self.stage)
    for name, value in harness.rounded(figures).items():
      record['_'.join([*names, name])] = value
    files.write_json(self.output, record)

  def rate(self, flop: float, seconds: float) -> Figures:
    """TFLOP/s, and their share of the matrix products of stage `peak`."""
    rate = flop / seconds / 1e12
    share = rate / self.peak_tflops if self.peak_tflops else None
    return {'tflops': rate, 'mfu': share}


def probe(context: _Context) -> None:
  device = jax.devices()[0]
  limit = steps.memory('bytes_limit')
  context.report(
      platform=device.platform,
      device=device.device_kind,
      device_memory_gigabytes=limit and limit / 1e9,
  )


def peak(context: _Context) -> None:
  """Peak throughput of the device: matrix products and memory."""
  size = context.size
  n, chain = size.matmul, 8
  key = jax.random.key(0)

  def tflops(dtype: Any, precision: str) -> float:
    @jax.jit
    def products(x: jax.Array, y: jax.Array) -> jax.Array:
      for _ in range(chain):  # Neither grows nor vanishes.
        x = jnp.matmul(x, y, precision=precision) * (1 / n)
      return x

    x = jax.random.normal(key, (n, n), dtype)
    seconds = harness.median_seconds(lambda: products(x, x), 3 * size.rounds)
    return chain * 2 * n**3 / seconds / 1e12

  context.report(bfloat16_tflops=tflops(jnp.bfloat16, 'default'))
  # In TF32 on GPUs that have it.
  context.report(float32_default_tflops=tflops(jnp.float32, 'default'))
  # Read and written: 4 bytes each.
  negative = functools.partial(
      jax.jit(jnp.negative), jnp.full(size.floats, 1.5, jnp.float32)
  )
  seconds = harness.median_seconds(negative, size.rounds, 8)
  context.report(copy_gigabytes_per_second=8 * size.floats / seconds / 1e9)
  # Many small kernels in a row, for the overhead of each.
  rounds = 2000
  small = jnp.ones((8, 128))
  loop = jax.jit(
      lambda x: jax.lax.fori_loop(
          0, rounds, lambda i, x: jax.lax.sort(x + i, dimension=1), x
      )
  )
  seconds = harness.median_seconds(lambda: loop(small), size.rounds)
  context.report(kernel_microseconds=1e6 * seconds / rounds)
  context.report(float32_highest_tflops=tflops(jnp.float32, 'highest'))


def search(context: _Context) -> None:
  """Search over a table of random embeddings, made on the device."""
  size, mesh = context.size, mesh_lib.one_device()
  width = steps.make_config(size).model.embedding_width
  rows = size.rows
  if limit := steps.memory('bytes_limit'):
    # Half: the table is drawn there, too.
    rows = min(rows, int(limit / 2 / (2 * width)))
  key = jax.random.key(0, impl='rbg')
  draw = jax.jit(
      lambda: jax.random.normal(
          key, (topk.aligned(rows, mesh), width), jnp.bfloat16
      ),
      out_shardings=jax.NamedSharding(mesh, jax.P(mesh.axis_names)),
  )
  part = topk.Part(draw(), None, (0, rows))
  rng = np.random.default_rng(0)
  queries = rng.standard_normal((size.queries, width)).astype(np.float32)
  context.report(rows=rows, queries=size.queries, k=_K)

  def find(count: int, exclude_BR2: np.ndarray, **method: Any) -> np.ndarray:
    return topk.search(
        part, queries[:count], exclude_BR2[:count], mesh, _K, **method
    )[1]

  def measure(case: str, run: Callable[[], np.ndarray]) -> np.ndarray:
    first, found = harness.timed(run)
    seconds = harness.median_seconds(run, 2 * size.rounds)
    context.report(case, first_seconds=first, milliseconds=1e3 * seconds)
    return found

  none = np.zeros((size.queries, 1, 2), np.int32)
  arrays = jax.device_put(
      (queries, none, np.array(part.rows, np.int32)),
      jax.NamedSharding(mesh, jax.P()),
  )
  flop = 2.0 * size.queries * rows * width
  exact = np.zeros((size.queries, _K), np.int32)
  # By config.mips.kernel: 'xla', and 'pallas' if it can be compiled.
  cases = {'exact': False, 'fused': True}
  for case, fused in [*cases.items()]:
    try:
      found = measure(
          case, lambda fused=fused: find(size.queries, none, fused=fused)
      )
    except Exception as error:
      if not fused:
        raise
      context.report(case, error=harness.short(error))
      del cases[case]
      continue
    seconds = harness.median_seconds(
        lambda fused=fused: topk.top_rows(
            part.table_NE, arrays[0], arrays[1], None, arrays[2],
            mesh=mesh, k=_K, fused=fused,
        ),
        2 * size.rounds,
        4,
    )
    context.report(
        case,
        device_milliseconds=1e3 * seconds,
        **context.rate(flop, seconds),
        table_gigabytes_per_second=2 * width * rows / seconds / 1e9,
    )
    if fused:
      context.report(fused_overlap=search_lib.overlap(found, exact))
    else:
      exact = found
  # As in training: the passage that a sentence is from, here the best one.
  best = np.stack([exact[:, :1], exact[:, :1] + 1], axis=-1)
  others = measure('exact_excluding', lambda: find(size.queries, best))
  context.report(
      exact_excluding_right=bool((others[:, :-1] == exact[:, 1:]).all())
  )
  count = min(_CHECKED, size.queries)
  plain = _plain_search(part.table_NE, rows, queries[:count])
  context.report(
      exact_overlap_with_plain=search_lib.overlap(exact[:count], plain)
  )
  found = measure(
      'approx', lambda: find(size.queries, none, recall_target=0.95)
  )
  context.report(approx_recall=search_lib.overlap(found, exact))
  for count in (64, 8):
    if count < size.queries:
      for case, fused in cases.items():
        measure(
            f'{case}_{count}_queries',
            functools.partial(find, count, none, fused=fused),
        )


def _plain_search(
    table_NE: jax.Array, rows: int, queries: np.ndarray
) -> np.ndarray:
  """The best rows by products in float32, a block of the table at a time."""
  row_BN, score_BN = [], []
  for start in range(0, rows, 2**20):
    some_ME = table_NE[start : min(start + 2**20, rows)].astype(jnp.float32)
    score_BM = jnp.matmul(queries, some_ME.T, precision='highest')
    score_BK, top_BK = jax.lax.top_k(score_BM, min(_K, len(some_ME)))
    row_BN.append(start + np.asarray(top_BK, np.int64))
    score_BN.append(np.asarray(score_BK))
  rows_BN, scores_BN = np.concatenate(row_BN, 1), np.concatenate(score_BN, 1)
  order = np.lexsort((rows_BN, -scores_BN), axis=1)[:, :_K]
  return np.take_along_axis(rows_BN, order, 1)


def embed(context: _Context) -> None:
  """Passages of full length, by the model alone and from host to host."""
  size = context.size
  config = steps.make_config(size)
  shape = (8 * size.embed_rows, config.lengths.document)
  ids = jax.random.randint(jax.random.key(0), shape, 5, size.vocab_size)

  def report(case: str, rows: int, seconds: float, **more: Any) -> None:
    flop = flops.embed_flop(config.model, rows, config.lengths.document)
    context.report(
        case,
        passages_per_second=rows / seconds,
        **context.rate(flop, seconds),
        **more,
    )

  component = components_lib.make('embedder', config.model)
  params = steps.random_params(component)
  for case, kernel, rows in (
      ('fused', 'auto', size.embed_rows),
      ('fused_large', 'auto', 8 * size.embed_rows),
      ('xla', 'xla', size.embed_rows),
  ):
    model = steps.changed(config, attention=kernel).model
    some = ids[:rows]
    run = functools.partial(
        jax.jit(
            functools.partial(
                training.embed_documents,
                components_lib.make('embedder', model),
            )
        ),
        params,
        some,
        jnp.ones_like(some),
    )
    first, _ = harness.timed(lambda run=run: jax.block_until_ready(run()))
    report(
        case,
        rows,
        harness.median_seconds(run, size.rounds, 4),
        attention=fused_attention.choose(model),
        first_seconds=first,
    )
  # The pipeline of the index builder, without a corpus.
  host_ids = np.asarray(ids)
  encoder = embedding.RowEncoder(
      functools.partial(training.embed_documents, component),
      np.full(len(ids), config.lengths.document),
      config.lengths.document,
      mesh_lib.make_mesh(config.mesh),
  )

  def arrays(rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    return host_ids[rows, :width], np.ones((len(rows), width), np.int32)

  every = np.arange(len(ids))
  report(
      'builder',
      len(ids),
      harness.median_seconds(
          lambda: list(encoder(params, every, arrays)), size.rounds
      ),
  )


def realm(context: _Context) -> None:
  """A real job with its index builder, both on one device."""
  size, small = context.size, context.small
  # Two processes share the device: each has less than half.
  os.environ['XLA_CLIENT_MEM_FRACTION'] = '0.45'
  corpus, workdir = context.scratch / 'corpus', context.scratch / 'realm'
  shutil.rmtree(workdir, ignore_errors=True)
  overrides = {
      'corpus': corpus,
      'steps': size.interval * (size.refreshes + 1),
      'batch_size': 4 if small else 64,
      'num_candidates': size.candidates,
      'log_interval': 1,
      'lengths.query': 24 if small else 48,
      'lengths.document': 40 if small else 160,
      'model.preset': 'tiny' if small else 'small',
      'model.compute_dtype': 'bfloat16',
      'mips.dtype': 'bfloat16',
      'refresh.interval': size.interval,
      # The adoption comes before the next snapshot, to tell them apart.
      'refresh.lag': size.interval * 4 // 5,
      'checkpoint.interval': 10**6,
      'peak_tflops': context.peak_tflops,
  }
  prepare = [
      'prepare',
      f'--source={context.texts or size.world}',
      f'--output={corpus}',
      f'--max_wordpieces={overrides["lengths.document"]}',
      '--overwrite',
  ]
  train = [
      'train',
      f'--config={harness.EXPERIMENTS}/small_corpus.py:realm',
      f'--workdir={workdir}',
      '--with_index_builder',
      *harness.flags(overrides),
  ]
  context.report(
      commands=[_shown(words, context) for words in (prepare, train)]
  )
  start = time.monotonic()
  subprocess.run(harness.command(*prepare), check=True, stdout=sys.stderr)
  context.report(prepare_seconds=time.monotonic() - start)
  start = time.monotonic()
  trainer = subprocess.Popen(harness.command(*train), stdout=sys.stderr)
  first = None
  while trainer.poll() is None and context.left > _STOP_SECONDS:
    time.sleep(0.1)
    if first is None and metrics_lib.read_metrics(workdir):
      first = time.monotonic() - start
      context.report(seconds_to_first_step=first)
  cut = trainer.poll() is None
  # The figures come first: the trainer may not end in time.
  lines = metrics_lib.read_metrics(workdir)
  if cut:
    trainer.send_signal(signal.SIGTERM)
  context.report(steps=len(lines))
  if len(lines) > size.interval + 2:
    context.report(
        **_job_figures(lines, size.interval, overrides['batch_size'])
    )
  if cut:
    with contextlib.suppress(subprocess.TimeoutExpired):
      trainer.wait(_STOP_SECONDS - 2)
    sys.exit(_CUT)
  if trainer.returncode:
    raise RuntimeError(
        f'The trainer ended with exit code {trainer.returncode}; see the log.'
    )


def _shown(words: list[str], context: _Context) -> str:
  """A command in the root of the repository."""
  text = shlex.join(['realm-jax', *words])
  for folder in (context.scratch, harness.ROOT):
    text = text.replace(f'{folder}/', '')
  if context.texts:
    text = text.replace(context.texts, pathlib.Path(context.texts).name)
  return text


def _job_figures(
    lines: list[Figures], interval: int, batch: int
) -> Figures:
  """Figures of a job that logged every step, from the second interval on."""
  logged = training.LoggedSteps(lines, interval, batch)
  lines = lines[interval:]
  seconds, loading = logged.seconds[interval:], logged.loading[interval:]
  quiet = logged.seconds[logged.quiet]
  step_seconds = float(np.median(quiet if len(quiet) else seconds))
  # A line names the parts that took time. Their means add up.
  parts = {
      name.removeprefix('time/').removesuffix('_seconds'): float(
          np.mean([x.get(name, 0.0) for x in lines])
      )
      for name in sorted(set().union(*lines))
      if name.startswith('time/') and name.endswith('_seconds')
  }
  figures: Figures = {
      'batch': batch,
      'step_milliseconds': 1e3 * step_seconds,
      'examples_per_second': batch / step_seconds,
      'step_mean_milliseconds': 1e3 * float(seconds.mean()),
      **{f'{part}_mean_milliseconds': 1e3 * x for part, x in parts.items()},
      'mfu': (
          statistics.median(x['time/mfu'] for x in lines)
          if 'time/mfu' in lines[0]
          else None
      ),
      'adoptions': len(logged.stalls),
  }
  if logged.stalls:
    stall = statistics.median(logged.stalls)
    figures |= {
        'stall_median_seconds': stall,
        'stall_worst_seconds': max(logged.stalls),
        'stall_of_which_waiting_seconds': statistics.median(logged.waits),
        'stall_median_steps': stall / step_seconds,
    }
  if loading.any():
    figures['step_while_loading_milliseconds'] = 1e3 * float(
        np.median(seconds[loading])
    )
  return figures


_STAGES = {
    stage.__name__: stage
    for stage in (
        probe, peak, steps.quick, steps.step, steps.torch, search, embed,
        steps.ict, realm, steps.profile,
    )
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('stage', choices=_STAGES)
  parser.add_argument('--until', type=float, required=True)
  parser.add_argument('--scratch', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--torch_python', default=sys.executable)
  parser.add_argument('--texts', default='')
  parser.add_argument('--peak_tflops', type=float, default=0.0)
  parser.add_argument('--small', action='store_true')
  context = parser.parse_args(namespace=_Context())
  hits: list[str] = []

  def on_event(event: str, **_: Any) -> None:
    if event.endswith('/cache_hits'):
      hits.append(event)

  jax.monitoring.register_event_listener(on_event)
  try:
    _STAGES[context.stage](context)
    if context.stage in ('quick', 'step', 'ict') and not context.measured:
      raise RuntimeError('No case could be measured; each has its own error.')
  except Exception as error:
    traceback.print_exc()
    context.report(error=harness.short(error))
    sys.exit(1)
  if context.stage != 'probe':
    context.report(compile_cache_hits=len(hits))
  sys.stderr.flush()
  os._exit(0)  # Without the seconds in which the libraries clean up.


if __name__ == '__main__':
  main()
