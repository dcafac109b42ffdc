"""Cost of a fresh index: embedding, refreshing, stalls of the trainer.

  python benchmarks/refresh.py --corpus=CORPUS --torch_python=hf/bin/python \
      --output=benchmarks/results/refresh.json [--parts=embedding,stall]

CORPUS is an output of `realm-jax prepare`; `hf/bin/python` has PyTorch and
transformers 4.40.2 (tests/interop/make_huggingface_fixtures.py). Without
--corpus an invented world is prepared. Parts:

  embedding  passages/s of the index builder's embedder, of the same model with
             every batch padded to the maximum length, and of PyTorch with the
             same weights; in turns, on the same passages
  growth     seconds of a refresh, embedding to publishing, over the number of
             passages; the last point is the whole corpus
  stall      a job, `train --with_index_builder`, trainer and builder on a core
             each: stalls of the trainer at a refresh, and its steps while a
             generation is loading
  steps      a training step with its search by ScaNN, over the number of rows
             of an invented index

Measure on an idle machine. `--small` takes about a minute.
"""

import argparse
import contextlib
import copy
import functools
import json
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
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import files
from realm_jax.runtime import heartbeat as heartbeat_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import snapshots as snapshots_lib
from realm_jax.trainer import examples
from realm_jax.trainer.stages import realm

_HERE = pathlib.Path(__file__).resolve().parent
PARTS = ('embedding', 'growth', 'stall', 'steps')
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


# ------------------------------------------------------------------ embedding


class _Padded:
  """The embedder's model and pipeline, every batch of the longest width."""

  def __init__(
      self,
      component: components.Component,
      corpus: corpus_lib.Corpus,
      tokens: int,
  ):
    self._corpus = corpus
    self._size = max(tokens // _LONGEST, 1)
    self._embed = jax.jit(
        lambda params, ids_BS, types_BS: component.module(
            params
        ).embed_document(ids_BS, types_BS)
    )

  def __call__(self, params: components.Params, rows: np.ndarray) -> np.ndarray:
    found, running = [], []
    for start in range(0, len(rows), self._size):
      some = np.full(self._size, inputs.NULL_DOCUMENT, np.int64)
      mine = rows[start : start + self._size]
      some[: len(mine)] = mine
      arrays = inputs.assemble_documents(
          self._corpus.passages, some, _LONGEST, self._corpus.tokenizer
      )
      running.append(self._embed(params, *arrays))
      if len(running) > 1:
        found.append(np.asarray(running.pop(0)))
    found += [np.asarray(rest) for rest in running]
    return np.concatenate(found)[: len(rows)]


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
  for number, rows in enumerate(rounds):
    ids_BS, types_BS = inputs.assemble_documents(
        corpus.passages, rows, _LONGEST, corpus.tokenizer
    )
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
      config=convert.foreign_config('embedder', config.model, None),
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
  ways: dict[str, Any] = {'bucketed': lambda rows: ours(params, rows)}
  for tokens in _PADDED_TOKENS:
    padded = _Padded(component, corpus, tokens)
    ways[f'padded {tokens}'] = functools.partial(padded, params)
  seconds: dict[str, list[float]] = {}
  figures: Figures = {}
  with contextlib.ExitStack() as stack:
    torch: harness.Child | None = None
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
      order = list(ways.items())
      order = order[number % len(order) :] + order[: number % len(order)]
      for name, embed in order:
        start = time.perf_counter()
        found = embed(rows)
        taken = time.perf_counter() - start
        if number == 0:
          if name == 'bucketed':
            reference = found
          else:
            figures[f'largest_difference {name}'] = float(
                np.abs(found - reference).max()
            )
        else:
          seconds.setdefault(name, []).append(taken)
      times = {}
      for variant in variants:
        assert torch is not None
        request: dict[str, Any] = {'round': number, 'variant': variant}
        if number == 0:
          torch.ask('embed', **request)  # Allocates memory.
          request['save'] = str(folder / 'found.npy')
        times[variant] = torch.ask('embed', **request)['seconds']
        if number:
          seconds.setdefault(f'torch {variant}', []).append(times[variant])
        else:
          found = np.load(folder / 'found.npy')
          figures[f'largest_difference torch {variant}'] = float(
              np.abs(found - reference).max()
          )
      if number == 0:  # Go on with the faster of each kind.
        variants = [
            min(
                (v for v in variants if v.startswith(how)),
                key=times.__getitem__,
            )
            for how in ('bucketed', 'padded')
            if variants
        ]
  rates = {
      name: size / statistics.median(values) for name, values in seconds.items()
  }
  figures['embedding_sample_passages'] = size * (count - 1)
  figures['embedding_mean_wordpieces'] = float(corpus.passages.lengths.mean())
  for name, rate in rates.items():
    key = name.replace(' ', '_')
    figures[f'passages_per_second_{key}'] = round(rate, 1)
    if name != 'bucketed':
      # Of each round by itself: the machine may be slower in some of them.
      ratios = [
          theirs / mine
          for theirs, mine in zip(
              seconds[name], seconds['bucketed'], strict=True
          )
      ]
      figures[f'times_as_fast_as_{key}'] = round(statistics.median(ratios), 3)
  slowest = min(
      value
      for name, value in figures.items()
      if name.startswith('times_as_fast_as_padded')
  )
  figures['padded_ok'] = slowest >= 1.5
  return figures


# --------------------------------------------------------------------- growth


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
  open_corpus = corpus_lib.Corpus.open
  # The first is left out: it imports ScaNN, which a builder does only once.
  for size in [min(2_000, sizes[0]), *sizes]:
    subset = _first(corpus, size)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
      workdir = pathlib.Path(name)
      config = _job(corpus)
      config.mips.backend = arguments.backend
      component = components.make('embedder', config.model)
      files.write_json(
          workdir / 'config.json', config_lib.to_dict(config)
      )
      snapshots_lib.save(workdir, 0, component.init(0))
      compiling.clear()
      start = time.perf_counter()
      try:
        corpus_lib.Corpus.open = lambda *_, s=subset: s  # type: ignore
        builder.build(workdir)
      finally:
        corpus_lib.Corpus.open = open_corpus  # type: ignore
    seconds.append(time.perf_counter() - start)
    compile_seconds.append(_union(compiling))
    wordpieces.append(int(subset.passages.lengths.sum()))
    print(
        f'{size} passages, {wordpieces[-1]} wordpieces: {seconds[-1]:.1f} s, '
        f'of which {compile_seconds[-1]:.1f} s compiling',
        flush=True,
    )
  del seconds[0], compile_seconds[0], wordpieces[0]
  # A builder that follows a job compiles once, for its first generation.
  net = np.subtract(seconds, compile_seconds)
  # Seconds for each passage, over those of all refreshes together.
  each = net / np.array(sizes)
  deviation = each / (net.sum() / sum(sizes)) - 1
  each_piece = net / np.array(wordpieces)
  by_pieces = each_piece / (net.sum() / sum(wordpieces)) - 1
  return {
      'growth_backend': arguments.backend,
      'growth_passages': sizes,
      'growth_wordpieces': wordpieces,
      'growth_seconds': [round(x, 2) for x in seconds],
      'growth_compile_seconds': [round(x, 2) for x in compile_seconds],
      'growth_passages_per_second': [round(float(1 / x), 1) for x in each],
      'growth_deviation': [round(float(x), 4) for x in deviation],
      'growth_deviation_by_wordpieces': [round(float(x), 4) for x in by_pieces],
      'growth_ok': bool(np.abs(deviation).max() <= 0.15),
      'whole_corpus_passages': sizes[-1],
      'whole_corpus_seconds': round(seconds[-1], 1),
  }


def _union(intervals: list[tuple[float, float]]) -> float:
  """The length of what they cover; one may lie in another."""
  total, reached = 0.0, 0.0
  for start, limit in sorted(intervals):
    total += max(limit - max(start, reached), 0.0)
    reached = max(reached, limit)
  return total


# ---------------------------------------------------------------------- stall


def measure_stall(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Runs a job with its builder, and reads its metrics."""
  workdir = arguments.scratch / 'stall'
  shutil.rmtree(workdir, ignore_errors=True)
  cores = sorted(os.sched_getaffinity(0))
  interval = 20 if arguments.small else arguments.interval
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
      'refresh.policy': arguments.policy,
      'checkpoint.interval': 10 * steps,
      'mips.backend': arguments.stall_backend,
  }
  words = [
      'train',
      f'--config={_HERE.parent / "experiments" / "small_corpus.py"}:realm',
      f'--workdir={workdir}',
      '--with_index_builder',
      *(f'--config.{name}={value}' for name, value in overrides.items()),
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
  lines = metrics_lib.read_metrics(workdir)
  return _stall_figures(
      lines, interval, len(corpus.passages), overrides['batch_size']
  )


def _builder_pid(
    workdir: pathlib.Path, trainer: subprocess.Popen[bytes]
) -> int:
  while trainer.poll() is None:
    heartbeat = heartbeat_lib.read(workdir / generation.DIRECTORY)
    if heartbeat is not None:
      return heartbeat['pid']
    time.sleep(0.05)
  raise RuntimeError(f'The trainer ended with {trainer.returncode}.')


def _stall_figures(
    lines: list[dict[str, Any]], interval: int, passages: int, batch: int
) -> Figures:
  """Figures of a job that logged every step."""
  seconds = np.array([batch / x['time/examples_per_second'] for x in lines])
  loading = np.array([bool(x['refresh/loading']) for x in lines])
  adopted = np.array([x['refresh/adopted'] for x in lines])
  swapped = np.diff(adopted, prepend=adopted[0]) > 0
  busy = loading | swapped
  # A line is written in the middle of the next step, after that one's swap and
  # snapshot: its seconds hold the end of the one step and the top of the next.
  busy[:-1] |= busy[1:]
  # Steps in which a snapshot is taken and written are neither.
  near = [(x['step'] - 1) % interval in (0, 1, 2, interval - 1) for x in lines]
  started = np.arange(len(lines)) >= interval  # Compiled, and an index there.
  quiet = ~busy & ~np.array(near) & started
  busy &= started
  step = float(np.median(seconds[quiet]))
  stalls = [
      x['refresh/last_stall_seconds']
      for x, swap in zip(lines, swapped, strict=True)
      if swap
  ]
  waits = [
      x['refresh/last_wait_seconds']
      for x, swap in zip(lines, swapped, strict=True)
      if swap
  ]
  while_loading = float(np.median(seconds[busy])) if busy.any() else step
  return {
      'stall_passages': passages,
      'stall_refreshes': len(stalls),
      'stall_step_seconds': round(step, 4),
      'stall_median_seconds': round(statistics.median(stalls), 4),
      'stall_worst_seconds': round(max(stalls), 4),
      'stall_of_which_waiting_seconds': round(statistics.median(waits), 4),
      'stall_median_in_steps': round(statistics.median(stalls) / step, 3),
      'stall_load_seconds': round(lines[-1]['refresh/load_seconds'], 4),
      'stall_swap_seconds': round(lines[-1]['refresh/swap_seconds'], 6),
      'steps_while_loading': int(busy.sum()),
      'step_seconds_while_loading': round(while_loading, 4),
      'step_while_loading_over_otherwise': round(while_loading / step, 3),
      'stall_ok': statistics.median(stalls) <= step,
      'step_while_loading_ok': while_loading <= 1.1 * step,
      'curve_step_seconds': [round(float(x), 4) for x in seconds],
      'curve_busy': [int(x) for x in busy],
  }


# ---------------------------------------------------------------------- steps


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
      before = time.perf_counter()
      rows_BJ = searches[size].search(query_emb_BE, config.num_candidates - 1)
      searched = time.perf_counter() - before
      batch = realm.with_candidates(
          queries, rows_BJ % len(corpus.passages), corpus, config.lengths
      )
      state, _ = job.step(state, mesh_lib.to_devices(job.mesh, batch))
      jax.block_until_ready(state)
      if number >= 2:  # The first steps compile and warm up.
        seconds[size].append(time.perf_counter() - start)
        search_seconds[size].append(searched)
  medians = [statistics.median(seconds[size]) for size in sizes]
  return {
      'steps_rows': sizes,
      'steps_seconds': [round(x, 4) for x in medians],
      'steps_search_seconds': [
          round(statistics.median(search_seconds[size]), 5) for size in sizes
      ],
      'steps_growth': round(medians[-1] / medians[0] - 1, 4),
      'steps_ok': medians[-1] < 1.2 * medians[0],
  }


def _clustered(size: int, width: int) -> np.ndarray:
  """Rows around centres, as embeddings of texts are."""
  rng = np.random.default_rng(1)
  centres = rng.normal(size=(max(size // 100, 10), width)).astype(np.float32)
  rows = centres[rng.integers(len(centres), size=size)]
  rows += 0.5 * rng.normal(size=rows.shape).astype(np.float32)
  return rows


# ---------------------------------------------------------------------- output


def _plot(figures: Figures, path: pathlib.Path) -> None:
  shown = [
      name
      for name, key in (
          ('embedding', 'passages_per_second_bucketed'),
          ('growth', 'growth_passages'),
          ('stall', 'curve_step_seconds'),
          ('steps', 'steps_rows'),
      )
      if key in figures
  ]
  figure, axes = harness.panels(len(shown))
  for name, axis in zip(shown, axes, strict=True):
    match name:
      case 'embedding':
        bars = {
            key.removeprefix('passages_per_second_').replace('_', ' '): value
            for key, value in figures.items()
            if key.startswith('passages_per_second_')
        }
        axis.barh(list(bars), list(bars.values()))
        axis.set_xlabel('passages/s')
        axis.set_title('Embedding')
      case 'growth':
        sizes = np.array(figures['growth_passages'])
        net = np.subtract(
            figures['growth_seconds'], figures['growth_compile_seconds']
        )
        axis.loglog(sizes, net, 'o-', label='measured, less compiling')
        axis.loglog(
            sizes, sizes * net.sum() / sizes.sum(), '--', label='proportional'
        )
        axis.set_xlabel('passages')
        axis.set_ylabel('seconds')
        axis.set_title('One refresh')
        axis.legend()
      case 'stall':
        seconds = np.array(figures['curve_step_seconds'])
        busy = np.array(figures['curve_busy'], bool)
        steps = np.arange(1, len(seconds) + 1)
        axis.plot(steps[~busy], seconds[~busy], '.', label='otherwise')
        axis.plot(steps[busy], seconds[busy], 'r.', label='loading or swapping')
        axis.set_ylim(0, 3 * np.median(seconds))
        axis.set_xlabel('step')
        axis.set_ylabel('seconds')
        axis.set_title('Steps of the trainer')
        axis.legend()
      case 'steps':
        axis.semilogx(
            figures['steps_rows'], figures['steps_seconds'], 'o-', label='step'
        )
        axis.semilogx(
            figures['steps_rows'],
            figures['steps_search_seconds'],
            'o-',
            label='of which search',
        )
        axis.set_ylim(0)
        axis.set_xlabel('rows of the index')
        axis.set_ylabel('seconds')
        axis.set_title('A training step with ScaNN')
        axis.legend()
  figure.savefig(path, dpi=110)


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--corpus', type=pathlib.Path)
  parser.add_argument(
      '--stall_corpus', type=pathlib.Path, help='of `stall`; default: --corpus'
  )
  parser.add_argument('--parts', default=','.join(PARTS))
  parser.add_argument('--torch_python', help='has PyTorch, transformers 4.40.2')
  parser.add_argument('--backend', default='scann', help='of `growth`')
  parser.add_argument('--stall_backend', default='exact')
  parser.add_argument('--policy', default='scheduled', help='of `stall`')
  parser.add_argument(
      '--interval', type=int, default=200, help='refresh.interval of `stall`'
  )
  parser.add_argument('--refreshes', type=int, default=6, help='of `stall`')
  parser.add_argument(
      '--scratch', type=pathlib.Path, default=pathlib.Path('runs/refresh')
  )
  arguments = parser.parse_args()
  parts = arguments.parts.split(',')
  if unknown := set(parts) - set(PARTS):
    parser.error(f'no part {sorted(unknown)}; there are {PARTS}')
  arguments.scratch.mkdir(parents=True, exist_ok=True)
  if arguments.corpus is None:
    arguments.corpus = arguments.scratch / 'world'
    prepare.prepare(
        ['world:0:300' if arguments.small else 'world:0:20000'],
        str(arguments.corpus),
        overwrite=True,
    )
  corpus = corpus_lib.Corpus.open(arguments.corpus)
  # Another job, or another corpus, may have been recorded before.
  figures: Figures = {}
  if arguments.output.exists() and parts != list(PARTS):
    figures = files.read_json(arguments.output)
  commands = figures.get('commands', [])
  for part in parts:
    print(f'-- {part}', flush=True)
    match part:
      case 'embedding':
        found = measure_embedding(arguments, corpus)
      case 'growth':
        found = measure_growth(arguments, corpus)
      case 'stall':
        stall_corpus = corpus_lib.Corpus.open(
            arguments.stall_corpus or arguments.corpus
        )
        found = measure_stall(arguments, stall_corpus)
      case _:
        found = measure_steps(arguments, corpus)
    figures |= found
    shown = {k: v for k, v in found.items() if not k.startswith('curve_')}
    print(json.dumps(shown, indent=2), flush=True)
  figures |= harness.about('jax', 'flax', 'numpy')
  figures['commands'] = [*commands, figures['command']]
  files.write_json(arguments.output, figures)
  _plot(figures, arguments.output.with_suffix('.png'))


if __name__ == '__main__':
  main()
