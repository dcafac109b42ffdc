"""The training loop of all stages.

The order inside a step is fixed: adopt an index generation and snapshot the
retriever, save, draw the batch, retrieve, step, log the previous step.
"""

from collections.abc import Callable, Collection
import concurrent.futures
import contextlib
import pathlib
import time
from typing import Any

import jax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import gates as gates_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import probe as probe_lib
from realm_jax.trainer import refresh as refresh_lib
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib
from realm_jax.trainer import step_log

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
    config: config of the job; see `job.validate`.
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
        'compilations': len(loop.compiled),
    }
  if distributed.is_main():
    files.write_json(job.workdir / SUMMARY, summary)
  return summary


class _Stopping(Exception):
  """SIGTERM was received while waiting for an index generation."""


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
    self._jitted = step_lib.make_train_step(
        job.stage, job.components, tx, job.mesh
    )
    # The compiled steps, by the shapes of a batch.
    self.compiled: dict[Any, concurrent.futures.Future] = {}
    self._thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
    if self._step < config.steps:
      # XLA compiles while the index builder makes the first generation.
      self._train_step(job.stage.abstract_batch())
    self._sigterm = stack.enter_context(process.note_sigterm())
    self._any_sigterm = distributed.LateAny(job.mesh)

    def interrupt() -> None:
      """Ends a wait for the index when the job is being shut down."""
      if distributed.any(bool(self._sigterm)):
        raise _Stopping

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
      self._retriever = stages.Retriever(
          job.components['embedder'],
          job.mesh,
          self._refresher,
          self._rows,
          job.stage.template,
          self._wait,
      )
    self._gates = gates_lib.Gates.of(job)
    self._snapshots = checkpoint.Snapshots(
        job.workdir,
        config.refresh.keep,
        # A resumed job needs the generation of every snapshot.
        required=config.refresh.policy != 'eager',
    )
    stack.callback(self._snapshots.close)
    self._log = step_log.StepLog(
        job, self._checkpoints, self._step, about.get('metrics'), stack
    )
    self._clock = self._log.clock
    self._profile = metrics_lib.StepProfile(job.workdir, profile)
    stack.callback(self._profile.close)

  @property
  def generation(self) -> int | None:
    """The index generation in use; None without an index."""
    return self._refresher.generation_step if self._refresher else None

  def _wait(self, params: components_lib.Params) -> None:
    with self._clock.measure('compute'):
      jax.block_until_ready(params)

  def _train_step(self, batch: Any) -> concurrent.futures.Future:
    """Returns the step for the shapes of a batch, compiled once for each."""
    shapes = tuple(x.shape for x in jax.tree.leaves(batch))
    if shapes not in self.compiled:
      self.compiled[shapes] = self._thread.submit(
          lambda rates: self._jitted.lower(self.state, batch, rates).compile(),
          self._rates(0),
      )
    return self.compiled[shapes]

  def _rates(self, step: int) -> step_lib.Rates:
    job = self._job
    return optimizer.learning_rates(job.config, job.components, step)

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
        train_step = self._train_step(arrays).result()
        self.state, metrics = train_step(self.state, arrays, self._rates(step))
        # The host has time while the devices compute.
        figures = {**examples.figures, **stage.figures(batch)}
        self._log.flush()  # The previous step is finished by now.
      staleness = self._refresher.metrics(step) if self._refresher else {}
      self._log.add(
          step_log.Results(
              step + 1, examples.row_B, metrics, staleness, figures
          )
      )
      self._step += 1
      if self._gates is not None and self._gates.due(self._step):
        self._measure_gates(self._step)
    self._log.flush()
    self._profile.close()
    if self._refresher is not None and config.refresh.policy != 'none':
      self._take_snapshot(self._step)  # For a final, fresh generation.
    self._save(self._step)

  def _measure_gates(self, step: int) -> None:
    if self._gates is None:
      return
    with self._clock.measure('gates'):
      self._log.add_once(
          self._gates.measure(self.state.params, step, self._refresher)
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
      self._log.flush()  # Raises if the loss is not finite.
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
              'metrics': self._log.means.saved(),
          },
      )
