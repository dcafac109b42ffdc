"""The record of the steps: means of metrics, times, a progress bar.

A step is logged while the devices compute the next one.
"""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.models import flops
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import stages

log = logging.getLogger(__name__)

_LINE_SECONDS = 10.0  # Between lines of the log, where there is no terminal.


class Results(NamedTuple):
  """Results of a step, which the devices may still compute."""

  step: int  # Number of updates with this step.
  rows: np.ndarray  # Rows of the sentence or question table.
  metrics: stages.Metrics
  staleness: Mapping[str, float]  # Metrics of the index that was searched.
  figures: Mapping[str, np.ndarray]  # Metrics of each row, from the host.


class StepLog:
  """Writes metrics.jsonl and the other loggers, and shows progress.

  Attributes:
    clock: splits the time of the loop into parts.
    means: over the steps since the last line, saved with a checkpoint.
  """

  def __init__(
      self,
      job: job_lib.Job,
      checkpoints: checkpoint.Checkpoints,
      step: int,
      means: dict[str, Any] | None,
      stack: contextlib.ExitStack,
  ):
    """Opens the loggers.

    Args:
      job: the job.
      checkpoints: its checkpoints, for the error of a loss that is not finite.
      step: where it starts or resumes.
      means: from the checkpoint that it resumes from.
      stack: closes the loggers.
    """
    self._config, self._stage = job.config, job.stage
    self._checkpoints, self._devices = checkpoints, job.mesh.size
    self.clock, self.means = Clock(), Means(means)
    self._writer = stack.enter_context(
        metrics_lib.MetricsWriter(
            job.workdir,
            step,
            metrics_lib.loggers(job.config),
            {**config_lib.flat(job.config), **job.lineage},
        )
    )
    self._bar = stack.enter_context(
        tqdm.tqdm(
            total=job.config.steps,
            initial=step,
            desc=job.config.objective,
            unit='step',
            # Lines of the log replace the bar where there is no terminal.
            disable=None if distributed.is_main() else True,
            mininterval=0.5,
        )
    )
    self._step_flop = flops.model_flop(job.config, job.stage.passes())
    self._results: Results | None = None
    self._once: dict[str, float] = {}
    self._line = (step, time.perf_counter())  # The last line written.
    self._shown = time.perf_counter()

  def add(self, results: Results) -> None:
    """Takes the results of a step, after `flush` of those before."""
    self._results = results
    self._bar.update()

  def add_once(self, values: dict[str, float]) -> None:
    """Adds values to the next line alone."""
    self._once = values

  def flush(self) -> None:
    """Fetches and checks the results of the last step, and records means.

    Raises:
      FloatingPointError: loss or gradients are not finite.
    """
    if self._results is None:
      return
    results, self._results = self._results, None
    step = results.step
    values = {
        f'train/{name}': float(value)
        for name, value in jax.device_get(results.metrics).items()
    }
    loss = values['train/loss']
    if not np.isfinite(loss) or not np.isfinite(values['train/grad_norm']):
      self._writer.write(step, {'train/loss': str(loss)})
      self._checkpoints.wait()  # For the one that may still be on its way.
      raise FloatingPointError(
          f'The loss of step {step} is {loss}, its gradient norm'
          f' {values["train/grad_norm"]}. Rows of the batch:'
          f' {results.rows.tolist()}. The last checkpoint, from before it,'
          f' is kept: step {self._checkpoints.latest}.'
      )
    for name, value_B in results.figures.items():
      values[f'train/{name}'] = float(value_B.mean())
    self.means.add(values)
    if step % self._config.log_interval:
      return
    values = self.means.take() | self._times(step)
    values |= {**results.staleness, **self._once}
    self._once = {}
    self._writer.write(step, values)
    self._show(step, values)

  def _times(self, step: int) -> dict[str, float]:
    now = time.perf_counter()
    since_step, since_time = self._line
    rate = (step - since_step) / (now - since_time)
    self._line = (step, now)
    values = {'time/examples_per_second': rate * self._config.batch_size}
    flop_rate = rate * self._step_flop
    values['time/model_tflops'] = flop_rate / 1e12
    if self._config.peak_tflops:
      peak = self._config.peak_tflops * 1e12 * self._devices
      values['time/mfu'] = flop_rate / peak
    for part, seconds in self.clock.take().items():
      values[f'time/{part}_seconds'] = seconds
    return values

  def _show(self, step: int, values: Mapping[str, float]) -> None:
    """Shows a line in the bar, and now and then in the log."""
    shown = {
        'loss': f'{values["train/loss"]:.3f}',
        'examples/s': f'{values["time/examples_per_second"]:.0f}',
    }
    if 'refresh/age_steps' in values:
      shown['staleness'] = f'{values["refresh/age_steps"]:.0f}'
    name = self._stage.headline
    if f'train/{name}' in values:
      shown[name] = f'{values[f"train/{name}"]:.2f}'
    self._bar.set_postfix(shown, refresh=False)
    if not distributed.is_main():
      return
    now = time.perf_counter()
    if self._bar.disable and now - self._shown > _LINE_SECONDS:
      self._shown = now
      text = ' '.join(f'{name}={value}' for name, value in shown.items())
      log.info('step %d/%d %s', step, self._config.steps, text)


class Means:
  """Means over the steps since the last `take`.

  Values of single steps are noisy. During `mlm`, consecutive batches even come
  from different streams.
  """

  def __init__(self, saved: dict[str, Any] | None = None):
    """Starts, or resumes from the result of `saved`."""
    saved = saved or {'steps': 0, 'sums': {}}
    self._steps: int = saved['steps']
    self._sums: dict[str, float] = dict(saved['sums'])

  def add(self, values: dict[str, float]) -> None:
    """Adds the values of one step."""
    self._steps += 1
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + value

  def take(self) -> dict[str, float]:
    """Returns the means and starts again."""
    means = {name: value / self._steps for name, value in self._sums.items()}
    self._steps, self._sums = 0, {}
    return means

  def saved(self) -> dict[str, Any]:
    """Returns the state for a checkpoint (JSON)."""
    return {'steps': self._steps, 'sums': dict(self._sums)}


class Clock:
  """Splits the wall time of a loop into named parts, which profiles show.

  The rest is 'other'. A part inside another one interrupts it, so the parts add
  up to the whole time.
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}
    self._part, self._since = 'other', time.perf_counter()

  @contextlib.contextmanager
  def measure(self, part: str) -> Iterator[None]:
    """Counts the time inside to a part."""
    outer = self._part
    self._switch_to(part)
    try:
      with jax.profiler.TraceAnnotation(part):
        yield
    finally:
      self._switch_to(outer)

  def take(self) -> dict[str, float]:
    """Returns the seconds of each part since the last call."""
    self._switch_to(self._part)
    seconds, self._seconds = self._seconds, {}
    return seconds

  def _switch_to(self, part: str) -> None:
    now = time.perf_counter()
    self._seconds[self._part] = (
        self._seconds.get(self._part, 0.0) + now - self._since
    )
    self._part, self._since = part, now
