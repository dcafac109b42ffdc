"""The trainer's side of the index: which generation is searched at which step.

With every policy but `eager`, the search is a function of the step and of the
parameters. A run can then be repeated and resumed bit by bit, however fast the
index builder is. All processes of a job search the same generation at the same
step.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.trainer import loader
from realm_jax.trainer import probe as probe_lib

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2  # Between two looks at the folder while training continues.
# Steps between two looks under `eager` with several processes, a collective.
_POLL_STEPS = 8


_Config = config_lib.RefreshConfig


def _none(config: _Config, step: int, ordered: int) -> int:
  """Generation 0, for the whole run."""
  del config, step, ordered
  return 0


def _sync(config: _Config, step: int, ordered: int) -> int:
  """The generation of the newest snapshot."""
  del ordered
  return step // config.interval * config.interval


def _scheduled(config: _Config, step: int, ordered: int) -> int:
  """The generation of snapshot s from step s + lag on."""
  return _sync(config, max(step - config.lag, 0), ordered)


def _adaptive(config: _Config, step: int, ordered: int) -> int:
  """As `_scheduled`; a snapshot is taken only if the index is too stale."""
  return ordered if ordered + config.lag <= step else 0


# The generation that a step must not be without: the trainer waits for it.
# `ordered` is the snapshot that `adaptive` took and has not adopted yet, or 0.
# `eager` waits for generation 0 only; see `Refresher._adopt_newest`.
_DUE = {
    'none': _none,
    'sync': _sync,
    'scheduled': _scheduled,
    'adaptive': _adaptive,
    'eager': _none,
}


class Refresher:
  """Holds the search in use and replaces it between two steps."""

  def __init__(
      self,
      workdir: pathlib.Path | str,
      config: config_lib.Config,
      *,
      corpus: corpus_lib.Corpus,
      probe: probe_lib.Probe,
      mesh: jax.sharding.Mesh | None = None,
      step: int = 0,
      generation: int | None = None,
      pending: int | None = None,
      health: Callable[[], int | None] = lambda: None,
      interrupt: Callable[[], None] = lambda: None,
      make_search: loader.MakeSearch | None = None,
  ):
    """Starts or resumes at a step.

    Args:
      workdir: workdir of the job; files of later steps are removed.
      config: resolved config of the job.
      corpus: corpus of the index.
      probe: queries on which generations are compared.
      mesh: devices for the search.
      step: the first step to come.
      generation: generation in use at the checkpoint of this step, if any.
      pending: value of `pending` at that checkpoint.
      health: called at every step and while waiting; returns the number of
        failures of the builder so far, raises if training cannot continue.
      interrupt: called while waiting, equally often in all processes; raises in
        all of them to end the wait.
      make_search: default: the backend of config.mips.

    Raises:
      FileNotFoundError: the generation is gone; names the command to build it.
      ValueError: the generation is damaged or of another job, or the backend is
        unknown.
    """
    self._workdir = pathlib.Path(workdir)
    self._directory = self._workdir / generation_lib.DIRECTORY
    self._config, self._probe = config.refresh, probe
    self._health, self._interrupt = health, interrupt
    search_lib.backend(config.mips)  # An unknown one fails before the work.
    expected = generation_lib.Lineage.of(corpus, config.model.embedding_width)
    self._loader = loader.Loader(
        self._workdir,
        expected,
        make_search or (lambda loaded: loaded.make_search(config.mips, mesh)),
    )
    self._current: loader.Loaded | None = None
    # The snapshot that `adaptive` took and has not adopted yet.
    self.pending = pending
    self._last_poll = 0.0
    self._refused: set[int] = set()  # Reported once and not tried again.
    self.num_adopted = 0
    self.waited_seconds = self._last_wait = 0.0
    self._stall = self._stall_since_swap = self._last_stall = 0.0
    # Metrics that exist only after the first refresh.
    self._measured: dict[str, float] = {}
    self._failures = 0
    self._loading = False  # Whether a generation is being loaded in this step.
    # If SIGTERM ended the wait for a generation, a snapshot of this step is of
    # the killed run, and the builder would begin with it.
    waiting = generation is not None and generation < self._due(step) < step
    # So is that of the end of a run whose number of steps has grown.
    exact = config.refresh.policy not in ('none', 'eager')
    ended = exact and step < config.steps and step % config.refresh.interval
    drop_future(self._workdir, step - 1 if waiting or ended else step)
    distributed.barrier('files of later steps are removed')
    if generation is not None:
      self._current = self._loader.load(generation)
      log.info('The index is that of step %d, as before.', generation)

  @property
  def search(self) -> search_lib.Search:
    """The search in use; only `before_step` changes it."""
    return self._in_use().search

  @property
  def embeddings(self) -> corpus_lib.Chained:
    """The document embeddings of the generation in use."""
    return self._in_use().embeddings

  def _in_use(self) -> loader.Loaded:
    if self._current is None:
      raise RuntimeError('There is no index before the first step.')
    return self._current

  @property
  def generation_step(self) -> int | None:
    """The step of the generation in use."""
    return None if self._current is None else self._current.step

  def before_step(
      self,
      step: int,
      params: Any,
      take_snapshot: Callable[[int, bool], object],
  ) -> bool:
    """Adopts the generation due at a step and takes a snapshot if one is due.

    Args:
      step: the step that is about to begin.
      params: current parameters of the embedder.
      take_snapshot: take_snapshot(step, wait) hands the parameters to the index
        builder; with `wait` they are on disk when it returns.

    Returns:
      Whether the search changed.

    Raises:
      TimeoutError: the generation did not come within config.refresh.timeout
        seconds.
      FileNotFoundError: its snapshot is gone, so that it can never come.
      ValueError: it is of another job or of a newer format, or it was damaged
        again after a rebuild.
    """
    at_interval = step % self._config.interval == 0
    if at_interval:
      jax.block_until_ready(params)  # The device may be at the last step.
    # The first generation, and each of `sync`, is made from the snapshot of
    # this very step. Otherwise adopt first: the builder works on the newest
    # snapshot only, and must finish the one that this step waits for.
    first = step == 0 or (at_interval and self._config.policy == 'sync')
    with self._stall_timer():
      if first:
        take_snapshot(step, True)
        distributed.barrier('the snapshot is on disk')
      before = None if self._current is None else self._current.search
      adopted = self._adopt(step)
      if adopted:
        with self._stall_timer(-1):  # The device still trains.
          jax.block_until_ready(params)
        query_emb_BE, k = self._probe.embed(params), self._probe.k
        # Also without an index before: compiles for later swaps.
        found_BK = self.search.search(query_emb_BE, k)
        if before is not None:
          self._measured['refresh/probe_overlap'] = search_lib.overlap(
              before.search(query_emb_BE, k), found_BK
          )
      del before  # Frees the table of the old generation.
      if at_interval and not first and self._snapshot_due(step, params):
        take_snapshot(step, False)
    if adopted:
      self._last_stall, self._stall_since_swap = self._stall_since_swap, 0.0
    return adopted

  def _snapshot_due(self, step: int, params: Any) -> bool:
    if self._config.policy in ('none', 'sync'):
      return False
    if self._config.policy != 'adaptive' or self.pending == step:
      return True  # Decided before the checkpoint that this run resumed from.
    start = time.perf_counter()
    overlap = distributed.broadcast(
        self._probe.overlap_with_current(params, self.search)
    )
    due = overlap < self._config.overlap_bound
    if due:
      self.pending = step
    self._measured['refresh/fresh_overlap'] = overlap
    self._measured['refresh/snapshot_due'] = float(due)
    self._measured['refresh/probe_seconds'] = time.perf_counter() - start
    log.info(
        'Step %d: %.1f %% of the results of the index of step %s are still '
        'right, the bound is %.1f %%: %s.',
        step, 100 * overlap, self.generation_step,
        100 * self._config.overlap_bound,
        'a new index is ordered' if due else 'it stays',
    )
    return due

  def _adopt(self, step: int) -> bool:
    """Swaps in the generation that the policy wants from this step on."""
    self._loading = self._loader.number is not None and not self._loader.done
    policy = self._config.policy
    if self._current is not None and policy == 'none':
      return False  # The builder is not needed any more.
    self._check_builder(step)
    if self._current is not None and policy == 'eager':
      return self._adopt_newest(step)
    due = self._due(step)
    if self._current is None or self._current.step < due:
      self._swap(self._wait(due, step), step)
      return True
    number = self._choose(step)  # Loaded ahead, so that the swap takes no time.
    if number != self._loader.number:
      self._begin(number)
    return False

  def _due(self, step: int) -> int:
    return _DUE[self._config.policy](self._config, step, self.pending or 0)

  @contextlib.contextmanager
  def _stall_timer(self, sign: int = 1) -> Iterator[None]:
    """Adds the time inside to that in which training stood still."""
    start = time.perf_counter()
    try:
      yield
    finally:
      seconds = sign * (time.perf_counter() - start)
      self._stall += seconds
      self._stall_since_swap += seconds

  def metrics(self, step: int) -> dict[str, float]:
    """Returns how stale the index is and what its refresh costs.

    docs/refresh.md explains each metric.
    """
    if self._current is None:
      return {}
    return {
        'refresh/generation': float(self._current.step),
        'refresh/age_steps': float(step - self._current.step),
        'refresh/age_seconds': time.time() - self._current.snapshot_time,
        'refresh/adopted': float(self.num_adopted),
        'refresh/loading': float(self._loading),
        'refresh/load_seconds': self._current.seconds,
        'refresh/wait_seconds': self.waited_seconds,
        'refresh/last_wait_seconds': self._last_wait,
        'refresh/stall_seconds': self._stall,
        'refresh/last_stall_seconds': self._last_stall,
        'refresh/builder_failures': float(self._failures),
        **self._measured,
    }

  def close(self) -> None:
    self._loader.close()

  def _check_builder(self, step: int) -> None:
    failures = self._health() or 0
    if failures > self._failures and self._current is not None:
      log.warning(
          'The index builder has failed %d times so far. Training continues '
          'with the index of step %d, %d steps and %.0f seconds old.',
          failures, self._current.step, step - self._current.step,
          time.time() - self._current.snapshot_time,
      )
    self._failures = failures

  def _adopt_newest(self, step: int) -> bool:
    """Process 0 chooses; the swap comes when all processes have loaded it."""
    if jax.process_count() > 1 and step % _POLL_STEPS:
      return False
    number = distributed.broadcast(
        self._choose(step) if distributed.is_main() else None
    )
    if number != self._loader.number:
      self._begin(number)
    if number is None or distributed.any(not self._loader.done):
      return False
    loaded: loader.Loaded | None = None
    refused = False
    try:
      loaded = self._loader.take()
    except FileNotFoundError:
      pass  # It was replaced or deleted.
    except (ValueError, OSError) as error:
      refused = True
      log.error(
          'Training continues with the index of step %s: %s',
          self.generation_step, error,
      )
    if distributed.any(refused):
      self._refused.add(number)
    # A checkpoint could not refer to a generation that is gone.
    if distributed.any(loaded is None or not loaded.path.exists()):
      return False
    assert loaded is not None
    self._swap(loaded, step)
    return True

  def _choose(self, step: int) -> int | None:
    """The generation that is being loaded, or should begin to be loaded."""
    now = time.monotonic()
    if self._loader.number is not None or (
        now - self._last_poll < _POLL_SECONDS
    ):
      return self._loader.number
    self._last_poll = now
    eager = self._config.policy == 'eager'
    numbers = [self.pending or 0]
    if eager:
      steps = reversed(checkpoint.steps_in(self._directory))
      numbers = [n for n in steps if n <= step and n not in self._refused]
    elif self._config.policy == 'scheduled':
      numbers = [_sync(self._config, step, 0)]
    for number in numbers:
      if number > (self.generation_step or 0):
        try:
          if self._loader.is_published(number):
            return number
        except ValueError:  # The wait for it, or loading it, reports the error.
          if eager:
            return number
    return None

  def _begin(self, number: int | None) -> None:
    if number is None:
      return
    self._loading = True
    held = [] if self._current is None else [self._current.step]
    self._loader.begin(number, held)

  def _swap(self, loaded: loader.Loaded, step: int) -> None:
    start = time.perf_counter()
    if self._current is not None:
      self._measured['refresh/drift_cosine'] = _mean_cosine(
          self._current.sample, loaded.sample
      )
    self._current = loaded
    if self.pending == loaded.step:
      self.pending = None
    self._loader.mark([loaded.step])
    self.num_adopted += 1
    self._measured['refresh/swap_seconds'] = time.perf_counter() - start
    log.info(
        'Step %d: index generation %d adopted, loaded in %.2f s; parameters '
        '%s.',
        step, loaded.step, loaded.seconds, loaded.digest,
    )

  def _wait(self, number: int, step: int) -> loader.Loaded:
    """Returns a generation as soon as it is published and loaded."""
    start = time.perf_counter()
    wait = loader.GenerationWait(self._workdir, number, self._config.timeout)
    damaged = False
    loaded: loader.Loaded | None = None
    while True:  # All processes go through it equally often.
      self._interrupt()
      try:
        if self._loader.number == number:
          loaded = self._loader.take(wait.pause())
        elif self._loader.number is None and loaded is None and (
            self._loader.is_published(number)
        ):
          self._begin(number)
        else:
          if loaded is None and self._loader.done:
            self._loader.drop()  # Another generation, not needed any more.
          time.sleep(wait.pause())
      except (TimeoutError, FileNotFoundError):
        pass  # Still loading, or being replaced.
      except files.Damaged as error:
        if distributed.is_main():  # The other processes wait for its decision.
          if damaged:
            raise
          damaged = True
          log.error('%s It is removed, to be built again.', error)
          files.remove(self._directory / str(number))
      self._check_builder(step)
      if not distributed.any(loaded is None):
        break
      wait.check()
    assert loaded is not None
    self._last_wait = time.perf_counter() - start
    self.waited_seconds += self._last_wait
    return loaded


def drop_future(workdir: pathlib.Path | str, step: int) -> None:
  """Removes a killed trainer's files of steps that are run again.

  These are the snapshots and generations of steps after `step`, and generations
  made from other parameters than the snapshot of their step.
  """
  if not distributed.is_main():
    return
  workdir = pathlib.Path(workdir)
  snapshots = workdir / checkpoint.SNAPSHOTS
  for leftover in snapshots.glob(f'{files.TEMPORARY}*'):
    shutil.rmtree(leftover, ignore_errors=True)
  # Snapshots first: a builder does not publish without its snapshot.
  for number in checkpoint.snapshot_steps(workdir):
    if number > step:
      files.remove(snapshots / str(number))
      log.info('Removed the snapshot of step %d: it is run again.', number)
  kept = checkpoint.snapshot_steps(workdir)
  directory = workdir / generation_lib.DIRECTORY
  for number in checkpoint.steps_in(directory):
    path = directory / str(number)
    stale = number > step
    if not stale and number in kept:
      try:
        found = generation_lib.read_manifest(path)['params_digest']
      except (files.Damaged, FileNotFoundError):
        continue  # Loading it reports the error.
      stale = found != checkpoint.snapshot_digest(workdir, number)
    if stale:
      files.remove(path)
      log.info('Removed %s, of steps that are run again.', path)


def _mean_cosine(a_NE: np.ndarray, b_NE: np.ndarray) -> float:
  norms = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
  dots = np.einsum('NE,NE->N', a_NE, b_NE)
  return float(np.mean(dots / np.maximum(norms, 1e-30)))
