"""One stage of benchmarks/accelerator.py, which starts this file.

Figures are printed as lines of JSON as they come: `error` is why the stage
failed, `skipped` why it did not apply.
"""

import argparse
from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
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

import harness
import jax
import jax.numpy as jnp
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.index import topk
from realm_jax.models import components as components_lib
from realm_jax.models import flops
from realm_jax.models import fused_attention
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib

_HERE = pathlib.Path(__file__).resolve().parent
_MOST_BYTES = 16e6  # Limit for a file that is kept.
_K = 8  # Passages per query.
_CHECKED = 16  # Queries whose result is compared with a plain computation.
_STOP_SECONDS = 8  # For the trainer to save and end.
_CUT = 3  # Exit code of a stage that ended in time.

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Size:
  """Sizes of the measured programs: the paper's, or toy sizes."""

  preset: Any = 'base'
  vocab_size: int = 30522
  query: int = 96
  document: int = 288
  candidates: int = 8
  quick_layers: int = 3
  batch: int = 16  # With all layers; doubled for `quick_layers`.
  rounds: int = 3  # The median of these is reported.
  matmul: int = 8192
  floats: int = 2**28  # Copied.
  rows: int = 13_353_718  # Passages of the paper's corpus.
  queries: int = 512
  embed_rows: int = 224  # The index builder embeds this many at once.
  ict_batch: int = 4096
  ict_accumulate: int = 16
  world: str = 'world:0:2000'
  interval: int = 50  # Steps between two refreshes.
  refreshes: int = 8


_PAPER = _Size()
_TOY = _Size(
    preset='tiny',
    vocab_size=2000,
    query=24,
    document=40,
    candidates=3,
    quick_layers=1,
    batch=2,
    rounds=2,
    matmul=256,
    floats=2**20,
    rows=20_000,
    queries=16,
    embed_rows=8,
    ict_batch=16,
    ict_accumulate=4,
    world='world:0:100',
    interval=10,
    refreshes=3,
)


class _Context(argparse.Namespace):
  """Arguments of a stage, and the reporting of its figures."""

  def __init__(self) -> None:
    super().__init__(measured=0)  # Steps that could be measured.

  @property
  def size(self) -> _Size:
    return _TOY if self.small else _PAPER

  @property
  def left(self) -> float:
    """Seconds until the stage is cut."""
    return self.until - time.time()

  def report(self, prefix: str = '', **figures: Any) -> None:
    if prefix:
      figures = {f'{prefix}_{name}': x for name, x in figures.items()}
    print(json.dumps(harness.rounded(figures)), file=self.out, flush=True)

  def rate(self, flop: float, seconds: float) -> Figures:
    """TFLOP/s, and their share of the matrix products of stage `peak`."""
    rate = flop / seconds / 1e12
    share = rate / self.peak_tflops if self.peak_tflops else None
    return {'tflops': rate, 'mfu': share}


def _memory(name: str) -> float | None:
  """Bytes of `bytes_limit`, ...; None if the device does not report them."""
  return (jax.devices()[0].memory_stats() or {}).get(name)


def probe(context: _Context) -> None:
  device = jax.devices()[0]
  limit = _memory('bytes_limit')
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


def _config(size: _Size, objective: Any = 'realm') -> config_lib.Config:
  """The paper's sizes in bfloat16, without dropout of attention weights."""
  config = config_lib.Config(objective=objective, corpus='none')
  config.model.preset = size.preset
  config.model.vocab_size = size.vocab_size
  config.model.compute_dtype = config.mips.dtype = 'bfloat16'
  config.model.attention_dropout = 0.0  # Fused kernels have no dropout.
  config.lengths.query, config.lengths.document = size.query, size.document
  config.num_candidates, config.batch_size = size.candidates, size.batch
  if objective == 'ict':
    config.lengths.query = min(64, size.query)
    config.batch_size = size.ict_batch
    config.accumulate = size.ict_accumulate
  return config_lib.resolve(config)


def _quick(size: _Size, objective: Any = 'realm') -> config_lib.Config:
  """The same with few layers, which compile in a fraction of the time."""
  config = _config(size, objective)
  config.model.num_layers = size.quick_layers
  if objective == 'realm':
    config.batch_size = 2 * size.batch
  return config


def _with(config: config_lib.Config, **changes: Any) -> config_lib.Config:
  """A copy with another batch size, or other fields of `model`."""
  batch_size = changes.pop('batch_size', config.batch_size)
  model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model, batch_size=batch_size)


class _Step(training.Training):
  """A training step that is traced, compiled, started and run in turn."""

  def __init__(self, config: config_lib.Config):
    super().__init__(config)
    self._trace_seconds, self._lowered = harness.timed(self.lower)

  def compile(self) -> '_Step':
    self.compile_seconds, self._compiled = harness.timed(self._lowered.compile)
    return self

  @property
  def bytes(self) -> float:
    """Memory of the device in a step, by XLA's analysis."""
    memory = self._compiled.memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )

  @property
  def model_flop(self) -> float:
    return flops.model_flop(self.config, self.stage.passes())

  @property
  def hardware_flop(self) -> float:
    stage = self.stage
    return flops.hardware_flop(self.config, stage.passes(), stage.in_batch)

  @contextlib.contextmanager
  def on_device(self) -> Iterator[None]:
    """State and batch are on the device within this context."""
    params = {name: _random_params(c) for name, c in self.components.items()}
    self._state = self.start(params)
    self._arrays = mesh_lib.to_devices(self.mesh, self.random_batch())
    try:
      yield
    finally:
      self._state = self._arrays = None

  def run(self, count: int) -> float:
    """Seconds of a step, of `count` in a row.

    The metrics of a step are fetched during the next one, as in the training
    loop.
    """
    start, before = time.perf_counter(), None
    for _ in range(count):
      self._state, metrics = self._compiled(
          self._state, self._arrays, self.rates
      )
      if before is not None:
        jax.device_get(before)
      before = metrics
    metrics = jax.device_get(metrics)
    jax.block_until_ready(self._state)
    seconds = (time.perf_counter() - start) / count
    if not np.isfinite(metrics['loss']):
      raise FloatingPointError(f'The loss is {metrics["loss"]}.')
    return seconds

  def about(self) -> Figures:
    """Figures of the traced step."""
    model = self.config.model
    return {
        'layers': model.num_layers,
        'batch': self.config.batch_size,
        'attention': fused_attention.choose(model),
        'trace_seconds': self._trace_seconds,
    }


def _random_params(component: components_lib.Component) -> Any:
  """Initial parameters of BERT, without a compiled initialisation."""
  draw = jax.jit(
      lambda key, shape: 0.02 * jax.random.normal(key, shape),
      static_argnums=1,
  )
  found = {}
  for i, (name, x) in enumerate(component.abstract.items()):
    if name.endswith('bias'):
      found[name] = jnp.zeros(x.shape)
    elif name.endswith('scale'):
      found[name] = jnp.ones(x.shape)
    else:
      found[name] = draw(jax.random.key(i), x.shape)
  return found


def _count(context: _Context, seconds: float) -> int:
  """The number of steps that take about a second."""
  return 2 if context.small else int(np.clip(1 / seconds, 2, 20))


def _measure(context: _Context, case: str, step: _Step) -> None:
  """Runs a compiled step and reports it, or why it does not run."""
  try:
    with step.on_device():
      step.run(1)
      count = _count(context, step.run(1))
      seconds = statistics.median(
          step.run(count) for _ in range(context.size.rounds)
      )
    peak = _memory('peak_bytes_in_use')
    context.report(
        case,
        seconds=seconds,
        examples_per_second=step.config.batch_size / seconds,
        **context.rate(step.model_flop, seconds),
        hardware_mfu=context.rate(step.hardware_flop, seconds)['mfu'],
        peak_gigabytes=peak and peak / 1e9,
    )
    context.measured += 1
  except Exception as error:  # Mostly a lack of memory.
    context.report(case, error=harness.short(error))


def _cases(
    context: _Context, **cases: config_lib.Config
) -> dict[str, _Step]:
  """Compiles steps at once, on all cores, and measures them one by one.

  Returns those that could be compiled.
  """
  traced, compiled = {}, {}
  for case, config in cases.items():
    try:
      traced[case] = _Step(config)
      context.report(case, **traced[case].about())
    except Exception as error:
      context.report(case, error=harness.short(error))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    futures = {pool.submit(step.compile): case for case, step in traced.items()}
    for future in concurrent.futures.as_completed(futures):
      case = futures[future]
      if error := future.exception():
        context.report(case, error=harness.short(error))
        continue
      step = compiled[case] = future.result()
      context.report(
          case,
          compile_seconds=step.compile_seconds,
          # The steps share the cores, so each takes longer than alone.
          compiled_at_once=len(futures),
          planned_gigabytes=step.bytes / 1e9,
      )
  for case, step in compiled.items():
    _measure(context, case, step)
  return compiled


def quick(context: _Context) -> None:
  """Few layers: kernels of attention, dropout of its weights, remat."""
  config = _quick(context.size)
  _cases(context, fused=config)
  _cases(
      context,
      xla=_with(config, attention='xla'),
      dots=_with(config, remat='dots'),
      attention_dropout=_with(config, attention_dropout=0.1),
      no_dropout=_with(config, dropout=0.0),
  )


def step(context: _Context) -> None:
  """All layers, and the largest batch that fits."""
  config = _config(context.size)
  batch = config.batch_size
  found = _cases(context, fused=config)
  found |= _cases(
      context,
      twice=_with(config, batch_size=2 * batch),
      dots=_with(config, batch_size=2 * batch, remat='dots'),
  )
  if not {'fused', 'twice'} <= found.keys():
    raise RuntimeError('The largest batch needs two that could be compiled.')
  each = (found['twice'].bytes - found['fused'].bytes) / batch
  fixed = found['fused'].bytes - each * batch
  # A device of unknown memory is taken to fit five times the first batch.
  limit = _memory('bytes_limit') or fixed + 5 * each * batch
  # Memory is not quite linear in the batch, and the allocator leaves gaps.
  largest = int((0.94 * limit - fixed) / each)
  largest -= largest % (8 if largest > 8 else 1)
  context.report(
      largest_batch=largest,
      gigabytes_of_an_example=each / 1e9,
      gigabytes_of_no_example=fixed / 1e9,
  )
  if largest > 2 * batch:  # Else `twice` measured it.
    _cases(context, largest=_with(config, batch_size=largest))


def torch(context: _Context) -> None:
  """PyTorch and ours in turns, first with few layers, then with all."""
  probe = subprocess.run(
      [
          context.torch_python,
          '-c',
          'import importlib.util as i; print([n for n in ("torch",'
          ' "transformers") if i.find_spec(n) is None])',
      ],
      check=True,
      capture_output=True,
      text=True,
  )
  missing = probe.stdout.strip()
  if missing != '[]':
    context.report(
        skipped=f'not installed: {missing}; --torch_python=PYTHON names a'
        ' Python that has them'
    )
    return
  theirs = harness.Child(context.torch_python, _HERE / 'accelerator_torch.py')
  for case, config in (
      ('quick', _quick(context.size)), ('', _config(context.size))
  ):
    model, lengths = config.model, config.lengths
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      opened = pool.submit(
          theirs.ask,
          'open',
          batch=config.batch_size,
          candidates=config.num_candidates,
          query=lengths.query,
          document=lengths.document,
          masks=lengths.masks,
          layers=model.num_layers,
          width=model.width,
          heads=model.num_heads,
          vocab_size=model.vocab_size,
          dropout=model.dropout,
          attention_dropout=model.attention_dropout,
      )
      ours = _Step(config).compile()
      versions = opened.result()
    with ours.on_device():
      ours.run(2), theirs.ask('steps', count=2)  # Both tune kernels.
      count = _count(context, ours.run(1))
      pairs = [
          (ours.run(count), theirs.ask('steps', count=count)['seconds'])
          for _ in range(2 * context.size.rounds)
      ]
    seconds, their_seconds = map(statistics.median, zip(*pairs, strict=True))
    their_flop = training.reference_flop(config)
    context.report(
        case,
        layers=model.num_layers,
        batch=config.batch_size,
        ours_seconds=seconds,
        ours_mfu=context.rate(ours.model_flop, seconds)['mfu'],
        torch_seconds=their_seconds,
        torch_mfu=context.rate(their_flop, their_seconds)['mfu'],
        ours_times_faster=statistics.median(b / a for a, b in pairs),
        torch_peak_gigabytes=theirs.ask('memory')['gigabytes'],
    )
    context.report(versions=versions)


def search(context: _Context) -> None:
  """Search over a table of random embeddings, made on the device."""
  size, mesh = context.size, mesh_lib.one_device()
  width = _config(size).model.embedding_width
  rows = size.rows
  if limit := _memory('bytes_limit'):  # Half: the table is drawn there, too.
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

  def find(
      count: int, exclude_BR2: np.ndarray, recall_target: float | None = None
  ) -> np.ndarray:
    return topk.search(
        part, queries[:count], exclude_BR2[:count], mesh, _K, recall_target
    )[1]

  def measure(case: str, run: Callable[[], np.ndarray]) -> np.ndarray:
    first, found = harness.timed(run)
    seconds = harness.median_seconds(run, 2 * size.rounds)
    context.report(case, first_seconds=first, milliseconds=1e3 * seconds)
    return found

  none = np.zeros((size.queries, 1, 2), np.int32)
  exact = measure('exact', lambda: find(size.queries, none))
  arrays = jax.device_put(
      (queries, none, np.array(part.rows, np.int32)),
      jax.NamedSharding(mesh, jax.P()),
  )
  seconds = harness.median_seconds(
      lambda: topk.top_rows(
          part.table_NE, arrays[0], arrays[1], None, arrays[2],
          mesh=mesh, k=_K,
      ),
      2 * size.rounds,
      4,
  )
  flop = 2.0 * size.queries * rows * width
  context.report(
      'exact',
      device_milliseconds=1e3 * seconds,
      **context.rate(flop, seconds),
      table_gigabytes_per_second=2 * width * rows / seconds / 1e9,
  )
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
  found = measure('approx', lambda: find(size.queries, none, 0.95))
  context.report(approx_recall=search_lib.overlap(found, exact))
  for count in (64, 8):
    if count < size.queries:
      measure(f'exact_{count}_queries', functools.partial(find, count, none))


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
  config = _config(size)
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
  params = _random_params(component)
  for case, kernel, rows in (
      ('fused', 'auto', size.embed_rows),
      ('fused_large', 'auto', 8 * size.embed_rows),
      ('xla', 'xla', size.embed_rows),
  ):
    model = _with(config, attention=kernel).model
    some = ids[:rows]
    run = functools.partial(
        jax.jit(
            functools.partial(
                _embed_documents, components_lib.make('embedder', model)
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
      functools.partial(_embed_documents, component),
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


def _embed_documents(
    component: components_lib.Component,
    params: components_lib.Params,
    ids_NS: jax.Array,
    types_NS: jax.Array,
) -> jax.Array:
  return component.module(params).embed_document(ids_NS, types_NS)


def ict(context: _Context) -> None:
  """The ICT step with a large batch, in parts, by gradient cache."""
  for case, config in (
      ('quick', _quick(context.size, 'ict')),
      ('fused', _config(context.size, 'ict')),
  ):
    context.report(case, accumulate=config.accumulate)
    _cases(context, **{case: config})


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
  experiment = _HERE.parent / 'experiments' / 'small_corpus.py'
  prepare = [
      'prepare',
      f'--source={context.texts or size.world}',
      f'--output={corpus}',
      f'--max_wordpieces={overrides["lengths.document"]}',
      '--overwrite',
  ]
  train = [
      'train',
      f'--config={experiment}:realm',
      f'--workdir={workdir}',
      '--with_index_builder',
      *harness.flags(overrides),
  ]
  context.report(
      commands=[_shown(words, context) for words in (prepare, train)]
  )
  seconds, _ = harness.timed(
      functools.partial(subprocess.run, check=True, stdout=sys.stderr),
      [sys.executable, '-m', 'realm_jax', *prepare],
  )
  context.report(prepare_seconds=seconds)
  start = time.monotonic()
  trainer = subprocess.Popen(
      [sys.executable, '-m', 'realm_jax', *train], stdout=sys.stderr
  )
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
  for folder in (context.scratch, _HERE.parent):
    text = text.replace(f'{folder}/', '')
  if context.texts:
    text = text.replace(context.texts, pathlib.Path(context.texts).name)
  return text


def _job_figures(
    lines: list[Figures], interval: int, batch: int
) -> Figures:
  """Figures of a job that logged every step, from the second interval on."""
  steps = training.LoggedSteps(lines, interval, batch)
  lines = lines[interval:]
  seconds, loading = steps.seconds[interval:], steps.loading[interval:]
  quiet = steps.seconds[steps.quiet]
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
      'adoptions': len(steps.stalls),
  }
  if steps.stalls:
    stall = statistics.median(steps.stalls)
    figures |= {
        'stall_median_seconds': stall,
        'stall_worst_seconds': max(steps.stalls),
        'stall_of_which_waiting_seconds': statistics.median(steps.waits),
        'stall_median_steps': stall / step_seconds,
    }
  if loading.any():
    figures['step_while_loading_milliseconds'] = 1e3 * float(
        np.median(seconds[loading])
    )
  return figures


def profile(context: _Context) -> None:
  """Traces three steps of `quick`; the files are kept next to the output."""
  step = _Step(_quick(context.size)).compile()
  folder = context.scratch / 'trace'
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0  # The device is of interest, and files small.
  with step.on_device():
    step.run(2)
    with jax.profiler.trace(str(folder), profiler_options=options):
      step.run(3)
  for suffix in ('.trace.json.gz', '.xplane.pb'):
    for path in folder.rglob(f'*{suffix}'):
      figures = {'megabytes': path.stat().st_size / 1e6}
      if path.stat().st_size < _MOST_BYTES:
        target = context.keep.with_name(context.keep.name + suffix)
        shutil.copyfile(path, target)
        figures['file'] = target.name
      context.report(suffix.strip('.').replace('.', '_'), **figures)


_STAGES = {
    stage.__name__: stage
    for stage in (
        probe, peak, quick, step, torch, search, embed, ict, realm, profile
    )
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('stage', choices=_STAGES)
  parser.add_argument('--until', type=float, required=True)
  parser.add_argument('--scratch', type=pathlib.Path, required=True)
  parser.add_argument('--keep', type=pathlib.Path, required=True)
  parser.add_argument('--torch_python', default=sys.executable)
  parser.add_argument('--texts', default='')
  parser.add_argument('--peak_tflops', type=float, default=0.0)
  parser.add_argument('--small', action='store_true')
  context = parser.parse_args(namespace=_Context())
  context.out = harness.private_stdout()
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
