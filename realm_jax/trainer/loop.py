"""The training loop of all stages.

The order inside a step is fixed: adopt an index generation and snapshot the
retriever, save, draw the batch, retrieve, step, log the previous step.
"""

from collections.abc import Callable, Collection, Iterator
import concurrent.futures
import contextlib
import functools
import logging
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.models import flops
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process
from realm_jax.runtime import profile as profile_lib
from realm_jax.runtime import snapshots as snapshots_lib
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import gates as gates_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import probe as probe_lib
from realm_jax.trainer import refresh as refresh_lib
from realm_jax.trainer import retrieval
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib

log = logging.getLogger(__name__)

SUMMARY = 'summary.json'


class Interrupted(Exception):
  """The job received SIGTERM, saved a checkpoint and stopped."""


def train(
    config: config_lib.Config,
    workdir: pathlib.Path | str,
    *,
    health: Callable[[], int | None] = lambda: None,
    profile: tuple[int, int] | None = None,
    explicit: Collection[str] = (),
) -> dict[str, Any]:
  """Trains up to config.steps, from the newest checkpoint of the workdir.

  config.json is written when the first step is about to run; an error before
  that leaves nothing in the workdir.

  Args:
    config: config of the job; see `stages.validate`.
    workdir: folder of the job; see the README, Layout.
    health: called at every step and while waiting for the index builder;
      returns the number of its failures, raises if training cannot continue.
    profile: first and last step to trace, to `workdir`/profile.
    explicit: fields of the config given on the command line; see
      `job.open_job`.

  Returns:
    The contents of `workdir`/summary.json: step, params_sha256,
    index_generation, seconds, compilations.

  Raises:
    ValueError, FileNotFoundError: see `job.open_job`.
    RuntimeError: another process trains in this workdir.
    FloatingPointError: the loss is not finite; the last checkpoint is from
      before.
    Interrupted: on SIGTERM, after saving.
  """
  start_time = time.perf_counter()
  job = job_lib.open_job(config, workdir, explicit)
  with contextlib.ExitStack() as stack:
    if distributed.is_main():
      before = job_lib.names_in(job.workdir)
      # A trainer that was asked to stop may still be saving.
      stack.enter_context(
          process.lock(job.workdir, 'trainer', process.GRACE_SECONDS)
      )
      stack.enter_context(job_lib.removes_failed_start(job.workdir, before))
    job_lib.check_shared(job, '.trainer.lock')
    loop = _Loop(job, health, profile, stack)
    if distributed.is_main():
      if job_lib.replaces_a_start(job):
        refresh_lib.drop_future(job.workdir, -1)
      job_lib.begin(job)
      (job.workdir / SUMMARY).unlink(missing_ok=True)
    if job.stage.searches:
      health()  # The builder may begin: config.json is written.
    loop.run()
    summary = {
        'step': int(loop.state.step),
        'params_sha256': checkpoint.params_digest(loop.state.params),
        'index_generation': loop.generation,
        'seconds': round(time.perf_counter() - start_time, 3),
        'compilations': loop.compilations,
    }
  if distributed.is_main():
    files.write_json(job.workdir / SUMMARY, summary)
  return summary


class _Stopping(Exception):
  """SIGTERM was received while waiting for an index generation."""


class _Pending(NamedTuple):
  """Results of a step, to be logged when the device has finished it."""

  step: int  # Number of updates with this step.
  rows: np.ndarray  # Rows of the sentence or question table.
  metrics: stages.Metrics
  staleness: dict[str, float]  # Metrics of the index that was searched.
  figures: dict[str, np.ndarray]  # Metrics of each row, from the host.


class _Loop:
  """The state of a running job."""

  def __init__(
      self,
      job: job_lib.Job,
      health: Callable[[], int | None],
      profile: tuple[int, int] | None,
      stack: contextlib.ExitStack,
  ):
    self._job, config = job, job.config
    tx = optimizer.make_optimizer(config, tuple(job.components))
    self._checkpoints = checkpoint.Checkpoints(
        job.workdir, config.checkpoint.keep
    )
    stack.callback(self._checkpoints.close)
    self.state, about = job_lib.start_or_resume(job, self._checkpoints, tx)
    self._step = int(self.state.step)
    self._saved: int | None = self._step if about else None
    # This process' rows of each batch.
    self._rows = mesh_lib.local_rows(job.mesh, config.batch_size)
    self._data = examples_lib.training_batches(
        job.stage, self._step, self._rows
    )
    self.compilations = 0  # Compilations of the training step: 1.
    train_step = step_lib.make_train_step(
        job.stage, job.components, tx, job.mesh, self._count_trace
    )
    # XLA compiles while the index builder makes the first generation.
    thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    if self._step < config.steps:
      self._train_step = thread.submit(
          lambda: train_step.lower(
              self.state, job.stage.abstract_batch()
          ).compile()
      )
    self._sigterm = stack.enter_context(_on_sigterm())
    self._any_sigterm = distributed.LateAny(job.mesh)

    def interrupt() -> None:
      """Ends a wait for the index when the job is being shut down."""
      if distributed.any(bool(self._sigterm)):
        raise _Stopping

    self._clock = metrics_lib.Clock()
    self._refresher: refresh_lib.Refresher | None = None
    if job.stage.searches:
      self._refresher = refresh_lib.Refresher(
          job.workdir,
          config,
          corpus=job.corpus,
          probe=probe_lib.Probe(job),
          mesh=job.mesh,
          step=self._step,
          generation=about.get('index_generation'),
          pending=about.get('index_pending'),
          health=health,
          interrupt=interrupt,
      )
      stack.callback(self._refresher.close)
      self._retriever = retrieval.Retriever(
          job.components['embedder'],
          job.mesh,
          self._refresher,
          self._rows,
          job.stage.template,
          functools.partial(self._clock.measure, 'compute'),
      )
    self._gates = gates_lib.Gates.of(job)
    self._gate_figures: dict[str, float] = {}  # Not logged yet.
    self._snapshots = snapshots_lib.Snapshots(
        job.workdir,
        config.refresh.keep,
        # A resumed job needs the generation of every snapshot.
        required=config.refresh.policy != 'eager',
    )
    stack.callback(self._snapshots.close)
    self._writer = stack.enter_context(
        metrics_lib.MetricsWriter(
            job.workdir,
            self._step,
            metrics_lib.loggers(config),
            {**config_lib.flat(config), **job.lineage},
        )
    )
    self._profile = profile_lib.StepProfile(job.workdir, profile)
    stack.callback(self._profile.close)
    self._step_flop = flops.model_flop(config, job.stage.passes())
    self._means = metrics_lib.Means(about.get('metrics'))
    self._bar = stack.enter_context(
        tqdm.tqdm(
            total=config.steps,
            initial=self._step,
            desc=config.objective,
            unit='step',
            # Lines of the log replace the bar where there is no terminal.
            disable=None if distributed.is_main() else True,
            mininterval=0.5,
        )
    )
    self._pending: _Pending | None = None
    self._logged = (self._step, time.perf_counter())
    self._shown = time.perf_counter()

  @property
  def generation(self) -> int | None:
    """The index generation in use; None without an index."""
    return self._refresher.generation_step if self._refresher else None

  def _count_trace(self) -> None:
    self.compilations += 1

  def run(self) -> None:
    config, stage = self._job.config, self._job.stage
    first = self._step
    while self._step < config.steps:
      step = self._step
      self._profile.before(step + 1, self.state)
      try:
        with self._clock.measure('refresh'):
          self._refresh(step)
        stop = self._any_sigterm(bool(self._sigterm))
      except _Stopping:
        stop = True
      if stop:
        self._save(step)
        self._checkpoints.wait()  # A logger may take long to close.
        raise Interrupted(f'Stopped by SIGTERM; step {step} is saved.')
      if step > first and step % config.checkpoint.interval == 0:
        self._save(step)
      if step == first:
        self._measure_gates(step)
      with self._clock.measure('data'):
        examples = next(self._data)
      batch = examples.inputs
      if self._refresher is not None:
        with self._clock.measure('retrieve'):
          self._retriever.params = self.state.params['embedder']
          batch = stage.retrieve(batch, self._retriever)
      with self._clock.measure('compute'):
        arrays = mesh_lib.to_devices(self._job.mesh, batch)
        self.state, metrics = self._train_step.result()(self.state, arrays)
        # The host has time while the devices compute.
        figures = {**examples.figures, **stage.figures(batch)}
        self._log_pending()  # The previous step is finished by now.
      staleness = self._refresher.metrics(step) if self._refresher else {}
      self._pending = _Pending(
          step + 1, examples.row_B, metrics, staleness, figures
      )
      self._step += 1
      self._bar.update()
      if self._gates is not None and self._gates.due(self._step):
        self._measure_gates(self._step)
    self._log_pending()
    self._profile.close()
    if self._refresher is not None and config.refresh.policy != 'none':
      self._take_snapshot(self._step)  # For a final, fresh generation.
    self._save(self._step)

  def _measure_gates(self, step: int) -> None:
    if self._gates is None:
      return
    with self._clock.measure('gates'):
      self._gate_figures = self._gates.measure(
          self.state.params, step, self._refresher
      )

  def _refresh(self, step: int) -> None:
    if self._refresher is not None:
      self._refresher.before_step(
          step, self.state.params['embedder'], self._take_snapshot
      )

  def _take_snapshot(self, step: int, wait: bool = False) -> None:
    """Publishes the embedder for the index builder."""
    self._snapshots.save(
        step,
        self.state.params['embedder'],
        in_use=self.generation or 0,
        saving=self._checkpoints.saving,
    )
    if wait:
      self._snapshots.wait()

  def _save(self, step: int) -> None:
    with self._clock.measure('checkpoint'):
      self._log_pending()  # Raises if the loss is not finite.
      if step == self._saved:
        return  # The job resumed here, and nothing has changed.
      # The snapshots before a checkpoint must be on disk first.
      self._snapshots.wait()
      rest = {
          'step': self.state.step,
          'opt_state': self.state.opt_state,
          'rng': self.state.rng,
      }
      self._checkpoints.save(
          step,
          self.state.params,
          rest,
          {
              **self._job.lineage,
              'layout': self._job.layout,
              'index_generation': self.generation,
              'index_pending': (
                  self._refresher.pending if self._refresher else None
              ),
              'metrics': self._means.saved(),
          },
      )

  def _log_pending(self) -> None:
    """Fetches and checks the metrics of the last step, and records means."""
    if self._pending is None:
      return
    pending, self._pending = self._pending, None
    step = pending.step
    values = {
        f'train/{name}': float(value)
        for name, value in jax.device_get(pending.metrics).items()
    }
    loss = values['train/loss']
    if not np.isfinite(loss) or not np.isfinite(values['train/grad_norm']):
      self._writer.write(step, {'train/loss': str(loss)})
      self._checkpoints.wait()  # For the one that may still be on its way.
      raise FloatingPointError(
          f'The loss of step {step} is {loss}, its gradient norm'
          f' {values["train/grad_norm"]}. Rows of the batch:'
          f' {pending.rows.tolist()}. The last checkpoint, from before it,'
          f' is kept: step {self._checkpoints.latest}.'
      )
    for name, value_B in pending.figures.items():
      values[f'train/{name}'] = float(value_B.mean())
    self._means.add(values)
    if step % self._job.config.log_interval:
      return
    values = self._means.take()
    now = time.perf_counter()
    since_step, since_time = self._logged
    rate = (step - since_step) / (now - since_time)
    self._logged = (step, now)
    values['time/examples_per_second'] = rate * self._job.config.batch_size
    flop_rate = rate * self._step_flop
    values['time/model_tflops'] = flop_rate / 1e12
    if self._job.config.peak_tflops:
      peak = self._job.config.peak_tflops * 1e12 * self._job.mesh.size
      values['time/mfu'] = flop_rate / peak
    for part, seconds in self._clock.take().items():
      values[f'time/{part}_seconds'] = seconds
    values.update(pending.staleness | self._gate_figures)
    self._gate_figures = {}
    self._writer.write(step, values)
    shown = {
        'loss': f'{values["train/loss"]:.3f}',
        'examples/s': f'{values["time/examples_per_second"]:.0f}',
    }
    if self._refresher is not None:
      shown['staleness'] = f'{values["refresh/age_steps"]:.0f}'
    name = self._job.stage.headline
    if f'train/{name}' in values:
      shown[name] = f'{values[f"train/{name}"]:.2f}'
    self._bar.set_postfix(shown, refresh=False)
    if not distributed.is_main():
      return
    if self._bar.disable and now - self._shown > 10:
      self._shown = now
      text = ' '.join(f'{name}={value}' for name, value in shown.items())
      log.info('step %d/%d %s', step, self._job.config.steps, text)


@contextlib.contextmanager
def _on_sigterm() -> Iterator[list[int]]:
  """Yields a list that is no longer empty once SIGTERM has come.

  A second one ends the process at once.
  """
  came: list[int] = []

  def note(number: int, frame: Any) -> None:
    del frame
    came.append(number)
    signal.signal(number, signal.SIG_DFL)

  try:
    before = signal.signal(signal.SIGTERM, note)
  except ValueError:  # Not the main thread: whoever owns it handles signals.
    yield came
    return
  try:
    yield came
  finally:
    signal.signal(signal.SIGTERM, before)
