"""Cost of a fresh index: embedding, refreshing, stalls of the trainer.

  python benchmarks/refresh.py --corpus=CORPUS --torch_python=hf/bin/python \
      --output=benchmarks/results/refresh.json \
      [--parts=embedding,stall] [--small]

CORPUS is an output of `realm-jax prepare`, else a generated world is prepared.
Without --torch_python, PyTorch is left out. Parts:

  embedding  passages/s of the index builder's embedder, of the same with every
             batch padded to the maximum length, and of PyTorch with the same
             weights; in turns, on the same passages
  growth     seconds of a refresh, from embedding to publishing, over the
             number of passages; the last point is the whole corpus
  stall      a job, `train --with_index_builder`, with a core each for trainer
             and builder: stalls of the trainer at a refresh, and its steps
             while a generation is loading
  steps      a training step with its search by ScaNN, over the number of rows
             of a random index
"""

import argparse
import copy
import os
import pathlib
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Any
from unittest import mock

import harness
import jax
import mips_scale
import numpy as np
import refresh_embedding
import training

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import embedding
from realm_jax.index import generation
from realm_jax.index import search
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process
from realm_jax.trainer import examples
from realm_jax.trainer.stages import realm

Figures = harness.Figures


def _first(corpus: corpus_lib.Corpus, count: int) -> corpus_lib.Corpus:
  """A corpus of the first passages."""
  table = corpus.passages
  limit = int(table.offsets[count])
  part = copy.copy(corpus)
  part.fingerprint = f'first-{count}'
  part.passages = corpus_lib.PassageTable(
      table.tokens[:limit],
      table.offsets[: count + 1],
      table.title_lengths[:count],
      table.articles[:count],
  )
  return part


def measure_growth(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Seconds of a refresh over the number of passages."""
  total = len(corpus.passages)
  sizes = [10_000, 30_000, 100_000]
  if arguments.small:
    sizes = [total // 8, total // 4, total // 2]
  sizes = [size for size in sizes if size < 0.9 * total] + [total]
  compiling: list[float] = []

  def on_duration(event: str, seconds: float, **_: Any) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      compiling.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(on_duration)
  seconds, compile_seconds, wordpieces = [], [], []
  # The first is left out: it imports ScaNN, which a builder does only once.
  for size in [min(2_000, sizes[0]), *sizes]:
    subset = _first(corpus, size)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
      workdir = pathlib.Path(name)
      config = refresh_embedding.job(corpus)
      config.mips.backend = 'scann'
      component = components.make('embedder', config.model)
      files.write_json(workdir / 'config.json', config_lib.to_dict(config))
      checkpoint.save_snapshot(workdir, 0, component.init(0))
      compiling.clear()
      with mock.patch.object(corpus_lib.Corpus, 'open', lambda *_, s=subset: s):
        seconds.append(harness.timed(builder.build, workdir)[0])
    compile_seconds.append(sum(compiling))
    wordpieces.append(int(subset.passages.lengths.sum()))
    print(f'{size} passages: {seconds[-1]:.1f} s', flush=True)
  del seconds[0], compile_seconds[0], wordpieces[0]
  # The builder of a job compiles once, for its first generation.
  net = np.subtract(seconds, compile_seconds)

  # Seconds for each passage or wordpiece, over those of all refreshes together.
  def deviation(of: list[int]) -> np.ndarray:
    return net / of / (net.sum() / sum(of)) - 1

  return {
      'growth_backend': 'scann',
      'growth_passages': sizes,
      'growth_wordpieces': wordpieces,
      'growth_seconds': seconds,
      'growth_compile_seconds': compile_seconds,
      'growth_passages_per_second': (sizes / net).tolist(),
      'growth_deviation': deviation(sizes).tolist(),
      'growth_deviation_by_wordpieces': deviation(wordpieces).tolist(),
      'growth_ok': bool(np.abs(deviation(sizes)).max() <= 0.15),
      'whole_corpus_passages': sizes[-1],
      'whole_corpus_seconds': seconds[-1],
  }


def measure_stall(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Runs a job with its builder, and reads its metrics."""
  workdir = arguments.scratch / 'stall'
  shutil.rmtree(workdir, ignore_errors=True)
  cores = sorted(os.sched_getaffinity(0))
  interval = 20 if arguments.small else 200
  steps = interval * ((4 if arguments.small else arguments.refreshes) + 1)
  batch_size = 8
  command = harness.command(
      'train',
      f'--config={harness.EXPERIMENTS}/small_corpus.py:realm',
      f'--workdir={workdir}',
      '--with_index_builder',
      *harness.flags({
          'corpus': corpus.directory.absolute(),
          'steps': steps,
          'batch_size': batch_size,
          'num_candidates': 4,
          'log_interval': 1,
          'lengths.query': 32,
          'lengths.document': 96,
          'refresh.interval': interval,
          'refresh.lag': 3 * interval // 4,
          'refresh.keep': 3,
          'checkpoint.interval': 10 * steps,
          'mips.backend': 'exact',
      }),
  )
  trainer = subprocess.Popen(
      harness.on_cores(cores[:1], command), stdout=subprocess.DEVNULL
  )
  try:
    heartbeat = None
    while heartbeat is None and trainer.poll() is None:
      time.sleep(0.05)
      heartbeat = process.read_heartbeat(workdir / generation.DIRECTORY)
    if heartbeat:
      # With all its threads, and those to come.
      subprocess.run(
          ['taskset', '-acp', str(cores[-1]), str(heartbeat['pid'])],
          check=True,
          stdout=subprocess.DEVNULL,
      )
    if trainer.wait():
      raise RuntimeError(f'The trainer ended with {trainer.returncode}.')
  finally:
    trainer.kill()
  lines = metrics_lib.read_metrics(workdir)
  logged = training.LoggedSteps(lines, interval, batch_size)
  seconds, busy = logged.seconds, logged.busy
  step = float(np.median(seconds[logged.quiet]))
  while_loading = float(np.median(seconds[busy])) if busy.any() else step
  stall = statistics.median(logged.stalls)
  return {
      'stall_passages': len(corpus.passages),
      'stall_refreshes': len(logged.stalls),
      'stall_step_seconds': step,
      'stall_median_seconds': stall,
      'stall_worst_seconds': max(logged.stalls),
      'stall_of_which_waiting_seconds': statistics.median(logged.waits),
      'stall_median_in_steps': stall / step,
      'stall_load_seconds': lines[-1]['refresh/load_seconds'],
      'stall_swap_seconds': lines[-1]['refresh/swap_seconds'],
      'steps_while_loading': int(busy.sum()),
      'step_seconds_while_loading': while_loading,
      'step_while_loading_over_otherwise': while_loading / step,
      'stall_ok': stall <= step,
      'step_while_loading_ok': while_loading <= 1.1 * step,
      'curve_step_seconds': seconds.tolist(),
      'curve_busy': busy.astype(int).tolist(),
  }


def measure_steps(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Training steps with a search over more and more rows, in turns."""
  config = refresh_embedding.job(corpus)
  config.batch_size, config.num_candidates = 16, 5
  config.lengths.query, config.lengths.document = 48, 160
  config.mips.backend = 'scann'
  sizes = [10_000, 100_000, 1_000_000]
  count = 24
  if arguments.small:
    sizes, count = [2_000, 20_000], 6
  job = training.Training(config, corpus)
  embed = embedding.Embedder(job.components['embedder'], job.mesh).queries
  state = job.start()
  table = mips_scale.Vectors(1).table(max(sizes))
  searches = {
      size: search.make_search(config.mips, table[:size]) for size in sizes
  }
  data = examples.training_batches(job.stage)
  seconds: dict[int, list[Any]] = {size: [] for size in sizes}
  for number in range(count + 2):
    shift = number % len(sizes)
    for size in sizes[shift:] + sizes[:shift]:
      queries = next(data).inputs
      jax.block_until_ready(state)
      start = time.perf_counter()
      query_ids = mesh_lib.to_devices(job.mesh, queries.query_ids_BQ)
      query_emb_BE = jax.device_get(embed(state.params['embedder'], query_ids))
      searched, rows_BJ = harness.timed(
          searches[size].search, query_emb_BE, config.num_candidates - 1
      )
      batch = realm.with_candidates(
          queries, rows_BJ % len(corpus.passages), corpus, job.stage.template
      )
      state, _ = job.step(state, mesh_lib.to_devices(job.mesh, batch))
      jax.block_until_ready(state)
      seconds[size].append((time.perf_counter() - start, searched))
  # The first two steps compile and warm up.
  medians, search_medians = np.transpose(
      [np.median(seconds[size][2:], axis=0) for size in sizes]
  ).tolist()
  return {
      'steps_rows': sizes,
      'steps_seconds': medians,
      'steps_search_seconds': search_medians,
      'steps_growth': medians[-1] / medians[0] - 1,
      'steps_ok': medians[-1] < 1.2 * medians[0],
  }


def _plot_growth(axes: Any, figures: Figures) -> None:
  sizes = np.array(figures['growth_passages'])
  net = np.subtract(
      figures['growth_seconds'], figures['growth_compile_seconds']
  )
  axes.loglog(sizes, net, 'o-', label='measured, less compiling')
  axes.loglog(sizes, sizes * net.sum() / sizes.sum(), '--', label='linear')
  axes.set(xlabel='passages', ylabel='seconds', title='One refresh')


def _plot_stall(axes: Any, figures: Figures) -> None:
  seconds = np.array(figures['curve_step_seconds'])
  busy = np.array(figures['curve_busy'], bool)
  steps = np.arange(1, len(seconds) + 1)
  axes.plot(steps[~busy], seconds[~busy], '.', label='otherwise')
  axes.plot(steps[busy], seconds[busy], 'r.', label='loading or swapping')
  axes.set(ylim=(0, 3 * np.median(seconds)), xlabel='step', ylabel='seconds')


def _plot_steps(axes: Any, figures: Figures) -> None:
  for key, label in (
      ('steps_seconds', 'step'), ('steps_search_seconds', 'of which search')
  ):
    axes.semilogx(figures['steps_rows'], figures[key], 'o-', label=label)
  axes.set(ylim=(0, None), xlabel='rows of the index', ylabel='seconds')


# Part -> what measures and what plots it, and a key of its figures.
_PARTS = {
    'embedding': (
        refresh_embedding.measure,
        refresh_embedding.plot,
        'passages_per_second_bucketed',
    ),
    'growth': (measure_growth, _plot_growth, 'growth_passages'),
    'stall': (measure_stall, _plot_stall, 'curve_step_seconds'),
    'steps': (measure_steps, _plot_steps, 'steps_rows'),
}


def main() -> None:
  parser = harness.parser(
      __doc__,
      torch='PyTorch and transformers 4.40.2',
      scratch='runs/refresh',
  )
  parser.set_defaults(torch_python=None)
  parser.add_argument('--corpus', type=pathlib.Path)
  parser.add_argument(
      '--stall_corpus', type=pathlib.Path, help='of `stall`; default: --corpus'
  )
  parser.add_argument('--parts', default=','.join(_PARTS))
  parser.add_argument('--refreshes', type=int, default=6, help='of `stall`')
  arguments = parser.parse_args()
  parts = arguments.parts.split(',')
  if unknown := set(parts) - set(_PARTS):
    parser.error(f'no part {sorted(unknown)}; the parts are {list(_PARTS)}')
  arguments.scratch.mkdir(parents=True, exist_ok=True)
  corpus = arguments.corpus
  if corpus is None:
    corpus = arguments.scratch / 'world'
    world = 'world:0:300' if arguments.small else 'world:0:20000'
    prepare.prepare([world], str(corpus), overwrite=True)
  # The record keeps the figures of other parts.
  figures: Figures = {}
  if arguments.output.exists() and parts != list(_PARTS):
    figures = files.read_json(arguments.output)
  commands = figures.get('commands', [])
  for part in parts:
    print(f'-- {part}', flush=True)
    folder = part == 'stall' and arguments.stall_corpus or corpus
    figures |= _PARTS[part][0](arguments, corpus_lib.Corpus.open(folder))
  figures |= harness.about('jax', 'flax', 'numpy')
  figures['commands'] = [*commands, figures['command']]
  harness.write(arguments.output, figures)
  shown = [(plot, key) for _, plot, key in _PARTS.values() if key in figures]
  figure, axes = harness.panels(len(shown))
  for axis, (plot, _) in zip(axes, shown, strict=True):
    plot(axis, figures)
  harness.save(figure, arguments.output)


if __name__ == '__main__':
  main()
