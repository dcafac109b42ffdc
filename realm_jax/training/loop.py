"""The training loop of all objectives.

Public: `train`. It reads top to bottom; the order inside a step is fixed:
adopt an index generation, snapshot the retriever, save, draw the batch,
retrieve, step, log the step before.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import logging
import pathlib
import signal
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.data import batches
from realm_jax.data import inputs
from realm_jax.index import refresh as refresh_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.training import optimizer
from realm_jax.training import state as state_lib
from realm_jax.training import steps as steps_lib

log = logging.getLogger(__name__)

SUMMARY = 'summary.json'


class Interrupted(Exception):
  """SIGTERM came: the job saved a checkpoint and stopped."""


def train(
    config: config_lib.Config,
    workdir: pathlib.Path | str,
    *,
    health: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
  """Trains to config.steps, or goes on from where the workdir left off.

  Args:
    config: of the job; see `config.validate`.
    workdir: folder of the job; see the README, Layout.
    health: called while waiting for the index builder; raises if there is no
      use in waiting.

  Returns:
    What is also written to `workdir`/summary.json: step, params_sha256,
    index_generation, seconds, compilations.

  Raises:
    ValueError, FileNotFoundError: see `state.open_job`.
    FloatingPointError: the loss is not finite; the last checkpoint is from
      before.
    Interrupted: on SIGTERM, after saving.
  """
  start_time = time.perf_counter()
  job = state_lib.open_job(config, workdir)
  (job.workdir / SUMMARY).unlink(missing_ok=True)
  with contextlib.ExitStack() as stack:
    loop = _Loop(job, health, stack)
    loop.run()
    summary = {
        'step': int(loop.state.step),
        'params_sha256': checkpoint.params_digest(loop.state.params),
        'index_generation': loop.generation,
        'seconds': round(time.perf_counter() - start_time, 3),
        'compilations': loop.compilations,
    }
  checkpoint.write_json(job.workdir / SUMMARY, summary)
  return summary


class _Stopping(Exception):
  """SIGTERM came while the next index generation was waited for."""


class _Pending(NamedTuple):
  """What a step left to be logged, once the device is done with it."""

  step: int  # Updates done with it.
  sentences: np.ndarray
  metrics: steps_lib.Metrics
  staleness: dict[str, float]  # Of the index that it searched.


class _Loop:
  """The state of a running job."""

  def __init__(
      self,
      job: state_lib.Job,
      health: Callable[[], None],
      stack: contextlib.ExitStack,
  ):
    self._job, config = job, job.config
    tokenizer = job.corpus.tokenizer
    null_ids = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.sep_id)
    tx = optimizer.make_optimizer(config, tuple(job.components))
    self._data = batches.training_batches(
        job.corpus, config, jax.process_index(), jax.process_count()
    )
    self._checkpoints = checkpoint.Checkpoints(
        job.workdir, config.checkpoint.keep
    )
    stack.callback(self._checkpoints.close)
    self.state, generation = state_lib.start_or_resume(
        job, self._checkpoints, tx, self._data
    )
    self._step = int(self.state.step)
    # How often the training step was compiled; 1, whatever the batches.
    self.compilations = 0
    self._train_step = steps_lib.make_train_step(
        config, job.components, tx, null_ids, job.mesh, self._count_trace
    )
    self._stop = stack.enter_context(_on_sigterm())

    def check() -> None:
      if self._stop:  # Do not wait for an index that nobody will search.
        raise _Stopping
      health()

    self._refresher: refresh_lib.Refresher | None = None
    if config.objective == 'realm':
      self._embed_queries = steps_lib.make_query_embedder(
          job.components['embedder'], job.mesh
      )
      self._refresher = refresh_lib.Refresher(
          job.workdir,
          config,
          corpus=job.corpus,
          mesh=job.mesh,
          step=self._step,
          generation=generation,
          health=check,
      )
      stack.callback(self._refresher.close)
    # Queries on which two generations are compared: the first to be searched.
    self._probe: np.ndarray | None = None
    self._snapshots = stack.enter_context(
        concurrent.futures.ThreadPoolExecutor(1, 'snapshot')
    )
    self._snapshot: concurrent.futures.Future | None = None
    self._writer = metrics_lib.MetricsWriter(
        job.workdir, self._step, config.tensorboard
    )
    stack.callback(self._writer.close)
    self._clock = metrics_lib.Clock()
    self._bar = stack.enter_context(
        tqdm.tqdm(
            total=config.steps,
            initial=self._step,
            desc=config.objective,
            unit='step',
            disable=None,  # Not on a terminal: lines instead of a bar.
            mininterval=0.5,
        )
    )
    self._pending: _Pending | None = None
    self._logged = (self._step, time.perf_counter())
    self._said = time.perf_counter()

  @property
  def generation(self) -> int | None:
    """The index generation in use, None where there is no index."""
    return self._refresher.generation_step if self._refresher else None

  def _count_trace(self) -> None:
    self.compilations += 1

  def run(self) -> None:
    config = self._job.config
    first = self._step
    while self._step < config.steps:
      step = self._step
      with self._clock.measure('refresh'), contextlib.suppress(_Stopping):
        self._refresh(step)
      if self._stop:
        self._save(step)
        raise Interrupted(f'Stopped by SIGTERM; step {step} is saved.')
      if step > first and step % config.checkpoint.interval == 0:
        self._save(step)
      # Drawn after saving, so that the saved iterator points at the next
      # batch that nobody has seen.
      with self._clock.measure('data'):
        batch = next(self._data)
      if self._refresher is not None:
        with self._clock.measure('retrieve'):
          batch = self._retrieve(batch)
      with self._clock.measure('compute'):
        arrays = mesh_lib.to_devices(
            self._job.mesh,
            {name: batch[name] for name in _inputs(config.objective)},
        )
        self.state, metrics = self._train_step(self.state, arrays)
        # Of the step before: by now it is done, and nobody waits for it.
        self._log_pending()
      staleness = self._refresher.metrics(step) if self._refresher else {}
      self._pending = _Pending(
          step + 1, batch['sentence_B'], metrics, staleness
      )
      self._step += 1
      self._bar.update()
    self._log_pending()
    if config.objective == 'realm' and config.refresh.policy != 'none':
      self._take_snapshot(self._step)  # For a last, fresh generation.
    self._save(self._step)

  def _refresh(self, step: int) -> None:
    """Adopts the generation due at this step, and takes a snapshot if due."""
    if self._refresher is None:
      return
    config = self._job.config.refresh
    if config.policy == 'none':
      due = step == 0
    else:
      due = step % config.interval == 0
    # The first generation, and every one of `sync`, is made from the snapshot
    # of this very step. Otherwise adopt first: the builder works on the newest
    # snapshot only, and must finish the one that this step waits for.
    first = due and (config.policy == 'sync' or step == 0)
    if first:
      self._take_snapshot(step)
      self._wait_for_snapshot()
    if self._refresher.adopt(step) and self._probe is not None:
      self._refresher.probe_overlap(
          self._embed(self._probe), self._job.config.num_candidates - 1
      )
    if due and not first:
      self._take_snapshot(step)

  def _take_snapshot(self, step: int) -> None:
    """Publishes the embedder for the index builder, in the background."""
    self._wait_for_snapshot()
    assert self._refresher is not None
    # Copied now: the next training step takes over the buffers.
    params = jax.device_get(self.state.params['embedder'])
    keep = self._job.config.refresh.keep
    in_use = self._refresher.generation_step

    def save_and_prune() -> None:
      checkpoint.save_snapshot(self._job.workdir, step, params)
      if keep:
        # What is newer than the index in use may still become one.
        checkpoint.prune_snapshots(self._job.workdir, keep, in_use or 0)

    self._snapshot = self._snapshots.submit(save_and_prune)

  def _wait_for_snapshot(self) -> None:
    if self._snapshot is not None:
      self._snapshot.result()
      self._snapshot = None

  def _retrieve(self, batch: inputs.Batch) -> inputs.Batch:
    config, refresher = self._job.config, self._refresher
    assert refresher is not None
    if self._probe is None:
      self._probe = batch['query_ids_BQ']
    retrieved_BJ = refresher.search.search(
        self._embed(batch['query_ids_BQ']),
        config.num_candidates - 1,
        batch['exclude_BR2'],
    )
    return inputs.with_candidates(
        batch, retrieved_BJ, self._job.corpus, config.lengths
    )

  def _embed(self, query_ids_BQ: np.ndarray) -> np.ndarray:
    """Embeds queries with the current parameters."""
    arrays = mesh_lib.to_devices(
        self._job.mesh, {'query_ids_BQ': query_ids_BQ}
    )
    return jax.device_get(
        self._embed_queries(
            self.state.params['embedder'], arrays['query_ids_BQ']
        )
    )

  def _save(self, step: int) -> None:
    with self._clock.measure('checkpoint'):
      self._log_pending()  # Raises if the parameters are not worth saving.
      if step == self._checkpoints.latest:
        return  # Resumed here, and nothing has changed.
      # A checkpoint must find the snapshots that came before it.
      self._wait_for_snapshot()
      rest = {
          'step': self.state.step,
          'opt_state': self.state.opt_state,
          'rng': self.state.rng,
      }
      self._checkpoints.save(
          step,
          self.state.params,
          rest,
          self._data,
          {**self._job.lineage, 'index_generation': self.generation},
      )

  def _log_pending(self) -> None:
    """Fetches, checks and records the metrics of the last step."""
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
          f' {values["train/grad_norm"]}. Sentences of the batch:'
          f' {pending.sentences.tolist()}. The last checkpoint, from before it,'
          f' is kept: step {self._checkpoints.latest}.'
      )
    if step % self._job.config.log_interval:
      return
    now = time.perf_counter()
    since_step, since_time = self._logged
    rate = (step - since_step) / (now - since_time)
    self._logged = (step, now)
    values['time/examples_per_second'] = rate * self._job.config.batch_size
    for part, seconds in self._clock.take().items():
      values[f'time/{part}_seconds'] = seconds
    values.update(pending.staleness)
    self._writer.write(step, values)
    shown = {
        'loss': f'{loss:.3f}',
        'examples/s': f'{values["time/examples_per_second"]:.0f}',
    }
    if self._refresher is not None:
      shown['staleness'] = f'{values["refresh/age_steps"]:.0f}'
      shown['null'] = f'{values["train/null_share"]:.2f}'
    self._bar.set_postfix(shown, refresh=False)
    if self._bar.disable and now - self._said > 10:
      self._said = now
      text = ' '.join(f'{name}={value}' for name, value in shown.items())
      log.info('step %d/%d %s', step, self._job.config.steps, text)


def _inputs(objective: str) -> list[str]:
  return steps_lib.INPUTS[objective].split()


@contextlib.contextmanager
def _on_sigterm() -> Iterator[list[int]]:
  """Yields a list that is no longer empty once SIGTERM has come."""
  came: list[int] = []
  try:
    before = signal.signal(
        signal.SIGTERM, lambda number, _: came.append(number)
    )
  except ValueError:  # Not the main thread: whoever owns it handles signals.
    yield came
    return
  try:
    yield came
  finally:
    signal.signal(signal.SIGTERM, before)
