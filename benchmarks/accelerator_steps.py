"""The stages of benchmarks/accelerator.py that measure training steps."""

from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import shutil
import statistics
import subprocess
import time
import types
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.interop import huggingface_config
from realm_jax.models import components as components_lib
from realm_jax.models import flops
from realm_jax.models import fused_attention
from realm_jax.runtime import mesh as mesh_lib

_MOST_BYTES = 16e6  # Limit for a file that is kept.

Figures = harness.Figures


_SIZES: dict[str, tuple[Any, Any]] = {  # The paper's, and toy sizes.
    'preset': ('base', 'tiny'),
    'vocab_size': (30522, 2000),
    'query': (96, 24),
    'document': (288, 40),
    'candidates': (8, 3),
    'quick_layers': (3, 1),
    'batch': (16, 2),  # With all layers; doubled for `quick_layers`.
    'rounds': (3, 2),  # The median of these is reported.
    'matmul': (8192, 256),
    'floats': (2**28, 2**20),  # Copied.
    'rows': (13_353_718, 20_000),  # Passages of the paper's corpus.
    'queries': (512, 16),
    'embed_rows': (224, 8),  # The index builder embeds this many at once.
    'ict_batch': (4096, 16),
    'ict_accumulate': (16, 4),
    'world': ('world:0:2000', 'world:0:100'),
    'interval': (50, 10),  # Steps between two refreshes.
    'refreshes': (8, 3),
}
Sizes = types.SimpleNamespace


def sizes(small: bool) -> Sizes:
  return Sizes(**{name: pair[small] for name, pair in _SIZES.items()})


def memory(name: str) -> float | None:
  """Bytes of `bytes_limit`, ...; None if the device does not report them."""
  return (jax.devices()[0].memory_stats() or {}).get(name)


def make_config(size: Sizes, objective: Any = 'realm') -> config_lib.Config:
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


def _quick(size: Sizes, objective: Any = 'realm') -> config_lib.Config:
  """The same with few layers, which compile in a fraction of the time."""
  config = make_config(size, objective)
  config.model.num_layers = size.quick_layers
  if objective == 'realm':
    config.batch_size = 2 * size.batch
  return config


def changed(config: config_lib.Config, **changes: Any) -> config_lib.Config:
  """A copy with another batch size, or other fields of `model`."""
  batch_size = changes.pop('batch_size', config.batch_size)
  model = dataclasses.replace(config.model, **changes)
  return dataclasses.replace(config, model=model, batch_size=batch_size)


class _Step(training.Training):
  """A training step that is traced, compiled, started and run in turn."""

  def __init__(self, config: config_lib.Config):
    super().__init__(config)
    passes = self.stage.passes()
    self.model_flop = flops.model_flop(config, passes)
    self.hardware_flop = flops.hardware_flop(
        config, passes, self.stage.in_batch
    )
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

  @contextlib.contextmanager
  def on_device(self) -> Iterator[None]:
    """State and batch are on the device within this context."""
    params = {name: random_params(c) for name, c in self.components.items()}
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


def random_params(component: components_lib.Component) -> Any:
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


def _count(context: Any, seconds: float) -> int:
  """The number of steps that take about a second."""
  return 2 if context.small else int(np.clip(1 / seconds, 2, 20))


def _measure(context: Any, case: str, step: _Step) -> None:
  """Runs a compiled step and reports it, or why it does not run."""
  try:
    with step.on_device():
      step.run(1)
      count = _count(context, step.run(1))
      seconds = statistics.median(
          step.run(count) for _ in range(context.size.rounds)
      )
    peak = memory('peak_bytes_in_use')
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
    context: Any, **cases: config_lib.Config
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


def quick(context: Any) -> None:
  """Few layers: kernels of attention, dropout of its weights, remat."""
  config = _quick(context.size)
  _cases(context, fused=config)
  _cases(
      context,
      xla=changed(config, attention='xla'),
      dots=changed(config, remat='dots'),
      attention_dropout=changed(config, attention_dropout=0.1),
      no_dropout=changed(config, dropout=0.0),
  )


def step(context: Any) -> None:
  """All layers, and the largest batch that fits."""
  config = make_config(context.size)
  batch = config.batch_size
  found = _cases(context, fused=config)
  found |= _cases(
      context,
      twice=changed(config, batch_size=2 * batch),
      dots=changed(config, batch_size=2 * batch, remat='dots'),
  )
  if not {'fused', 'twice'} <= found.keys():
    raise RuntimeError('The largest batch needs two that could be compiled.')
  each = (found['twice'].bytes - found['fused'].bytes) / batch
  fixed = found['fused'].bytes - each * batch
  # A device of unknown memory is taken to fit five times the first batch.
  limit = memory('bytes_limit') or fixed + 5 * each * batch
  # Memory is not quite linear in the batch, and the allocator leaves gaps.
  largest = int((0.94 * limit - fixed) / each)
  largest -= largest % (8 if largest > 8 else 1)
  context.report(
      largest_batch=largest,
      gigabytes_of_an_example=each / 1e9,
      gigabytes_of_no_example=fixed / 1e9,
  )
  if largest > 2 * batch:  # Else `twice` measured it.
    _cases(context, largest=changed(config, batch_size=largest))


def torch(context: Any) -> None:
  """PyTorch and ours in turns, first with few layers, then with all."""
  probe = [
      context.torch_python,
      '-c',
      'import importlib.util as i; print(*(n for n in ("torch",'
      ' "transformers") if i.find_spec(n) is None))',
  ]
  missing = subprocess.run(probe, check=True, capture_output=True, text=True)
  if missing.stdout.strip():
    context.report(
        skipped=f'not installed: {missing.stdout.strip()};'
        ' --torch_python=PYTHON names a Python that has them'
    )
    return
  theirs = harness.Child(context.torch_python, 'accelerator_torch.py')
  for case, config in (
      ('quick', _quick(context.size)), ('', make_config(context.size))
  ):
    model, lengths = config.model, config.lengths
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      opened = pool.submit(
          theirs.ask,
          'open',
          model=huggingface_config.config_json('bert', model)
          | {'attention_probs_dropout_prob': model.attention_dropout},
          batch=config.batch_size,
          candidates=config.num_candidates,
          query=lengths.query,
          document=lengths.document,
          masks=lengths.masks,
      )
      ours = _Step(config).compile()
      opened.result()
    with ours.on_device():
      ours.run(2), theirs.ask('steps', count=2)  # Both tune kernels.
      count = _count(context, ours.run(1))
      pairs = [
          (ours.run(count), theirs.ask('steps', count=count))
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
        torch_peak_gigabytes=theirs.ask('memory'),
    )
    context.report(versions=theirs.versions('torch', 'transformers'))


def ict(context: Any) -> None:
  """The ICT step with a large batch, in parts, by gradient cache."""
  for case, config in (
      ('quick', _quick(context.size, 'ict')),
      ('fused', make_config(context.size, 'ict')),
  ):
    context.report(case, accumulate=config.accumulate)
    _cases(context, **{case: config})


def profile(context: Any) -> None:
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
        target = context.output.with_suffix(suffix)
        shutil.copyfile(path, target)
        figures['file'] = target.name
      context.report(suffix.strip('.').replace('.', '_'), **figures)


