"""Cost of a fresh index: embedding, refreshing, stalls of the trainer.

  python benchmarks/refresh.py --corpus=CORPUS --torch_python=hf/bin/python \
      --output=benchmarks/results/refresh.json [--parts=embedding,stall]

CORPUS is an output of `realm-jax prepare`; `hf/bin/python` has PyTorch and
transformers 4.40.2 (tests/interop/make_huggingface_fixtures.py). Without
--corpus a generated world is prepared. Parts:

  embedding  passages/s of the index builder's embedder, of the same model with
             every batch padded to the maximum length, and of PyTorch with the
             same weights; in turns, on the same passages
  growth     seconds of a refresh, from embedding to publishing, over the
             number of passages; the last point is the whole corpus
  stall      a job, `train --with_index_builder`, with a core each for trainer
             and builder: stalls of the trainer at a refresh, and its steps
             while a generation is loading
  steps      a training step with its search by ScaNN, over the number of rows
             of a random index

Measure on an idle machine. `--small` takes about a minute.
"""

import argparse
from collections.abc import Callable
import contextlib
import copy
import functools
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest import mock

import harness
import jax
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import generation
from realm_jax.index import search
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process
from realm_jax.trainer import examples
from realm_jax.trainer.stages import realm

_HERE = pathlib.Path(__file__).resolve().parent
_LONGEST = 288  # Wordpieces of a passage, as in the paper.
# Wordpieces of a padded batch: the embedder's own, and a large one.
_PADDED_TOKENS = (2**12, 2**15)
_TORCH_TOKENS = (2**12, 2**14)

Figures = dict[str, Any]


def _job(corpus: corpus_lib.Corpus) -> config_lib.Config:
  """The tiny preset with the paper's lengths."""
  config = config_lib.Config(corpus=str(corpus.directory.absolute()))
  config.model.preset = 'tiny'
  config.model.vocab_size = corpus.tokenizer.vocab_size
  config.lengths.document = _LONGEST
  return config_lib.resolve(config)


def _padded(
    component: components.Component,
    params: components.Params,
    corpus: corpus_lib.Corpus,
    tokens: int,
) -> Callable[[np.ndarray], np.ndarray]:
  """The embedder's model and pipeline, every batch of the longest width."""
  size = max(tokens // _LONGEST, 1)
  embed = jax.jit(
      lambda params, ids_BS, types_BS: component.module(params).embed_document(
          ids_BS, types_BS
      )
  )

  template = inputs.Template(corpus.tokenizer, _LONGEST, _LONGEST)

  def run(rows: np.ndarray) -> np.ndarray:
    found, running = [], []
    for start in range(0, len(rows), size):
      some = np.full(size, inputs.NULL_DOCUMENT, np.int64)
      mine = rows[start : start + size]
      some[: len(mine)] = mine
      arrays = template.documents(corpus.passages, some)
      running.append(embed(params, *arrays))
      if len(running) > 1:
        found.append(np.asarray(running.pop(0)))
    return np.concatenate([*found, *map(np.asarray, running)])[: len(rows)]

  return run


def _open_torch(
    python: str,
    config: config_lib.Config,
    params: components.Params,
    corpus: corpus_lib.Corpus,
    rounds: list[np.ndarray],
    folder: pathlib.Path,
) -> tuple[harness.Child, Figures]:
  """Starts refresh_torch.py with the same weights and passages."""
  np.savez(
      folder / 'weights.npz',
      **convert.tensors_of('embedder', config.model, {'embedder': params}),
  )
  passages = {}
  template = inputs.Template(corpus.tokenizer, _LONGEST, _LONGEST)
  for number, rows in enumerate(rounds):
    ids_BS, types_BS = template.documents(corpus.passages, rows)
    real = ids_BS != corpus.tokenizer.pad_id
    passages |= {
        f'{number}/tokens': ids_BS[real],
        f'{number}/segments': types_BS[real],
        f'{number}/offsets': np.concatenate([[0], real.sum(1).cumsum()]),
    }
  np.savez(folder / 'passages.npz', **passages)
  child = harness.Child(python, _HERE / 'refresh_torch.py')
  versions = child.ask(
      'open',
      threads=len(os.sched_getaffinity(0)),
      config=huggingface_config.config_json('embedder', config.model, None),
      weights=str(folder / 'weights.npz'),
      passages=str(folder / 'passages.npz'),
      longest=_LONGEST,
  )
  return child, versions


def measure_embedding(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Passages per second of each way, in turns on the same passages."""
  config = _job(corpus)
  component = components.make('embedder', config.model)
  params = component.init(0)
  ours = embedding.PassageEmbedder(
      component,
      corpus.passages,
      corpus.tokenizer,
      _LONGEST,
      mesh_lib.make_mesh(config_lib.MeshConfig()),
  )
  size, count = (256, 3) if arguments.small else (2048, 9)
  size = min(size, len(corpus.passages))
  rng = np.random.default_rng(0)
  starts = rng.integers(0, len(corpus.passages) - size, count, endpoint=True)
  # Round 0 warms up: it compiles, and chooses the best variants.
  rounds = [np.arange(start, start + size) for start in starts]
  rounds[0] = rounds[0][:256]
  ways = {'bucketed': functools.partial(ours, params)}
  for tokens in _PADDED_TOKENS:
    ways[f'padded {tokens}'] = _padded(component, params, corpus, tokens)
  seconds: dict[str, list[float]] = {}
  figures: Figures = {}

  def difference(name: str, found: np.ndarray) -> None:
    largest = float(np.abs(found - reference).max())
    figures[f'largest_difference {name}'] = largest

  with contextlib.ExitStack() as stack:
    variants: list[str] = []
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if arguments.torch_python:
      torch, figures['versions_of_torch_side'] = _open_torch(
          arguments.torch_python, config, params, corpus, rounds, folder
      )
      stack.callback(torch.close)
      variants = [
          f'{how} {attention} {tokens}'
          for how in ('bucketed', 'padded')
          for attention in ('sdpa', 'eager')
          for tokens in _TORCH_TOKENS
      ]
    for number, rows in enumerate(rounds):
      order = list(ways)
      shift = number % len(order)
      for name in order[shift:] + order[:shift]:
        taken, found = harness.timed(ways[name], rows)
        if number:
          seconds.setdefault(name, []).append(taken)
        elif name == 'bucketed':
          reference = found
        else:
          difference(name, found)
      times = {}
      for variant in variants:
        request: dict[str, Any] = {'round': number, 'variant': variant}
        if number == 0:
          torch.ask('embed', **request)  # Allocates memory.
          request['save'] = str(folder / 'found.npy')
        times[variant] = torch.ask('embed', **request)['seconds']
        if number:
          seconds.setdefault(f'torch {variant}', []).append(times[variant])
        else:
          difference(f'torch {variant}', np.load(folder / 'found.npy'))
      if number == 0 and variants:  # The faster of each kind takes part.
        variants = [
            min((v for v in variants if v.startswith(how)), key=times.get)
            for how in ('bucketed', 'padded')
        ]
  figures['embedding_sample_passages'] = size * (count - 1)
  figures['embedding_mean_wordpieces'] = float(corpus.passages.lengths.mean())
  for name, values in seconds.items():
    key = name.replace(' ', '_')
    figures[f'passages_per_second_{key}'] = size / statistics.median(values)
    if name != 'bucketed':
      # Within a round: the machine may be slower in some of them.
      figures[f'times_as_fast_as_{key}'] = float(
          np.median(np.divide(values, seconds['bucketed']))
      )
  figures['padded_ok'] = min(
      value
      for name, value in figures.items()
      if name.startswith('times_as_fast_as_padded')
  ) >= 1.5
  return figures


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
  compiling: list[tuple[float, float]] = []  # From when to when.

  def on_duration(event: str, seconds: float, **_: Any) -> None:
    if event.startswith('/jax/core/compile'):
      now = time.perf_counter()
      compiling.append((now - seconds, now))

  jax.monitoring.register_event_duration_secs_listener(on_duration)
  seconds, compile_seconds, wordpieces = [], [], []
  # The first is left out: it imports ScaNN, which a builder does only once.
  for size in [min(2_000, sizes[0]), *sizes]:
    subset = _first(corpus, size)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
      workdir = pathlib.Path(name)
      config = _job(corpus)
      config.mips.backend = 'scann'
      component = components.make('embedder', config.model)
      files.write_json(workdir / 'config.json', config_lib.to_dict(config))
      checkpoint.save_snapshot(workdir, 0, component.init(0))
      compiling.clear()
      with mock.patch.object(corpus_lib.Corpus, 'open', lambda *_, s=subset: s):
        seconds.append(harness.timed(builder.build, workdir)[0])
    compile_seconds.append(_union(compiling))
    wordpieces.append(int(subset.passages.lengths.sum()))
    print(f'{size} passages: {seconds[-1]:.1f} s', flush=True)
  del seconds[0], compile_seconds[0], wordpieces[0]
  # The builder of a job compiles once, for its first generation.
  net = np.subtract(seconds, compile_seconds)
  # Seconds for each passage or wordpiece, over those of all refreshes together.
  each = net / np.array(sizes)
  deviation = each / (net.sum() / sum(sizes)) - 1
  by_pieces = net / wordpieces / (net.sum() / sum(wordpieces)) - 1
  return {
      'growth_backend': 'scann',
      'growth_passages': sizes,
      'growth_wordpieces': wordpieces,
      'growth_seconds': seconds,
      'growth_compile_seconds': compile_seconds,
      'growth_passages_per_second': (1 / each).tolist(),
      'growth_deviation': deviation.tolist(),
      'growth_deviation_by_wordpieces': by_pieces.tolist(),
      'growth_ok': bool(np.abs(deviation).max() <= 0.15),
      'whole_corpus_passages': sizes[-1],
      'whole_corpus_seconds': seconds[-1],
  }


def _union(intervals: list[tuple[float, float]]) -> float:
  """The length of what they cover; one may lie in another."""
  total, reached = 0.0, 0.0
  for start, limit in sorted(intervals):
    total += max(limit - max(start, reached), 0.0)
    reached = max(reached, limit)
  return total


def measure_stall(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Runs a job with its builder, and reads its metrics."""
  workdir = arguments.scratch / 'stall'
  shutil.rmtree(workdir, ignore_errors=True)
  cores = sorted(os.sched_getaffinity(0))
  interval = 20 if arguments.small else 200
  steps = interval * ((4 if arguments.small else arguments.refreshes) + 1)
  overrides = {
      'corpus': corpus.directory.absolute(),
      'steps': steps,
      'batch_size': 8,
      'num_candidates': 4,
      'log_interval': 1,
      'lengths.query': 32,
      'lengths.document': 96,
      'refresh.interval': interval,
      'refresh.lag': 3 * interval // 4,
      'refresh.keep': 3,
      'checkpoint.interval': 10 * steps,
      'mips.backend': 'exact',
  }
  words = [
      'train',
      f'--config={_HERE.parent / "experiments" / "small_corpus.py"}:realm',
      f'--workdir={workdir}',
      '--with_index_builder',
      *harness.flags(overrides),
  ]
  print('$ ' + shlex.join(['realm-jax', *words]), flush=True)
  trainer = subprocess.Popen(
      [
          'taskset', '-c', str(cores[0]),
          sys.executable, '-m', 'realm_jax', *words,
      ],
      stdout=subprocess.DEVNULL,
  )
  try:
    pid = _builder_pid(workdir, trainer)
    # With all its threads, and those to come.
    subprocess.run(
        ['taskset', '-acp', str(cores[-1]), str(pid)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    if trainer.wait():
      raise RuntimeError(f'The trainer ended with {trainer.returncode}.')
  finally:
    trainer.kill()
  return _stall_figures(
      metrics_lib.read_metrics(workdir),
      interval,
      len(corpus.passages),
      overrides['batch_size'],
  )


def _builder_pid(
    workdir: pathlib.Path, trainer: subprocess.Popen[bytes]
) -> int:
  while trainer.poll() is None:
    heartbeat = process.read_heartbeat(workdir / generation.DIRECTORY)
    if heartbeat is not None:
      return heartbeat['pid']
    time.sleep(0.05)
  raise RuntimeError(f'The trainer ended with {trainer.returncode}.')


def _stall_figures(
    lines: list[dict[str, Any]], interval: int, passages: int, batch: int
) -> Figures:
  """Figures of a job that logged every step."""
  steps = training.LoggedSteps(lines, interval, batch)
  seconds, busy = steps.seconds, steps.busy
  step = float(np.median(seconds[steps.quiet]))
  while_loading = float(np.median(seconds[busy])) if busy.any() else step
  stall = statistics.median(steps.stalls)
  return {
      'stall_passages': passages,
      'stall_refreshes': len(steps.stalls),
      'stall_step_seconds': step,
      'stall_median_seconds': stall,
      'stall_worst_seconds': max(steps.stalls),
      'stall_of_which_waiting_seconds': statistics.median(steps.waits),
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
  config = _job(corpus)
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
  searches = {}
  for size in sizes:
    print(f'Building an index of {size} rows', flush=True)
    searches[size] = search.make_search(config.mips, _clustered(size, 128))
  data = examples.training_batches(job.stage)
  seconds: dict[int, list[float]] = {size: [] for size in sizes}
  search_seconds: dict[int, list[float]] = {size: [] for size in sizes}
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
      if number >= 2:  # The first steps compile and warm up.
        seconds[size].append(time.perf_counter() - start)
        search_seconds[size].append(searched)
  medians = [statistics.median(seconds[size]) for size in sizes]
  return {
      'steps_rows': sizes,
      'steps_seconds': medians,
      'steps_search_seconds': [
          statistics.median(search_seconds[size]) for size in sizes
      ],
      'steps_growth': medians[-1] / medians[0] - 1,
      'steps_ok': medians[-1] < 1.2 * medians[0],
  }


def _clustered(size: int, width: int) -> np.ndarray:
  """Rows around centres, as embeddings of texts are."""
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(max(size // 100, 10), width)).astype(np.float32)
  rows = centres[rng.integers(len(centres), size=size)]
  rows += 0.5 * rng.normal(size=rows.shape).astype(np.float32)
  return rows


def _plot_embedding(axis: Any, figures: Figures) -> None:
  prefix = 'passages_per_second_'
  bars = {
      key.removeprefix(prefix).replace('_', ' '): value
      for key, value in figures.items()
      if key.startswith(prefix)
  }
  axis.barh(list(bars), list(bars.values()))
  axis.set(xlabel='passages/s', title='Embedding')


def _plot_growth(axis: Any, figures: Figures) -> None:
  sizes = np.array(figures['growth_passages'])
  net = np.subtract(
      figures['growth_seconds'], figures['growth_compile_seconds']
  )
  axis.loglog(sizes, net, 'o-', label='measured, less compiling')
  axis.loglog(sizes, sizes * net.sum() / sizes.sum(), '--', label='linear')
  axis.set(xlabel='passages', ylabel='seconds', title='One refresh')


def _plot_stall(axis: Any, figures: Figures) -> None:
  seconds = np.array(figures['curve_step_seconds'])
  busy = np.array(figures['curve_busy'], bool)
  steps = np.arange(1, len(seconds) + 1)
  axis.plot(steps[~busy], seconds[~busy], '.', label='otherwise')
  axis.plot(steps[busy], seconds[busy], 'r.', label='loading or swapping')
  axis.set(
      ylim=(0, 3 * np.median(seconds)),
      xlabel='step',
      ylabel='seconds',
      title='Steps of the trainer',
  )


def _plot_steps(axis: Any, figures: Figures) -> None:
  for key, label in (
      ('steps_seconds', 'step'), ('steps_search_seconds', 'of which search')
  ):
    axis.semilogx(figures['steps_rows'], figures[key], 'o-', label=label)
  axis.set(
      ylim=(0, None),
      xlabel='rows of the index',
      ylabel='seconds',
      title='A training step with ScaNN',
  )


# Part -> what measures and what plots it, and a key of its figures.
_PARTS = {
    'embedding': (
        measure_embedding, _plot_embedding, 'passages_per_second_bucketed'
    ),
    'growth': (measure_growth, _plot_growth, 'growth_passages'),
    'stall': (measure_stall, _plot_stall, 'curve_step_seconds'),
    'steps': (measure_steps, _plot_steps, 'steps_rows'),
}


def main() -> None:
  parser = harness.parser(__doc__, torch='PyTorch and transformers 4.40.2')
  parser.set_defaults(torch_python=None)
  parser.add_argument('--corpus', type=pathlib.Path)
  parser.add_argument(
      '--stall_corpus', type=pathlib.Path, help='of `stall`; default: --corpus'
  )
  parser.add_argument('--parts', default=','.join(_PARTS))
  parser.add_argument('--refreshes', type=int, default=6, help='of `stall`')
  parser.add_argument(
      '--scratch', type=pathlib.Path, default=pathlib.Path('runs/refresh')
  )
  arguments = parser.parse_args()
  parts = arguments.parts.split(',')
  if unknown := set(parts) - set(_PARTS):
    parser.error(f'no part {sorted(unknown)}; the parts are {list(_PARTS)}')
  arguments.scratch.mkdir(parents=True, exist_ok=True)
  if arguments.corpus is None:
    arguments.corpus = arguments.scratch / 'world'
    prepare.prepare(
        ['world:0:300' if arguments.small else 'world:0:20000'],
        str(arguments.corpus),
        overwrite=True,
    )
  # The record keeps the figures of other parts.
  figures: Figures = {}
  if arguments.output.exists() and parts != list(_PARTS):
    figures = files.read_json(arguments.output)
  commands = figures.get('commands', [])
  for part in parts:
    print(f'-- {part}', flush=True)
    corpus = arguments.corpus
    if part == 'stall':
      corpus = arguments.stall_corpus or corpus
    figures |= _PARTS[part][0](arguments, corpus_lib.Corpus.open(corpus))
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
