"""The trainer's side of the index: which generation is searched at which step.

Public: `Refresher`, `drop_future`. Policies (config.refresh.policy):

  none       generation 0, for ever
  sync       at step s that of the newest snapshot up to s; waits for each
  scheduled  that of snapshot s from step s + lag on, exactly; waits if late
  adaptive   as scheduled, but a snapshot is taken only if the index, compared
             with the parameters of the moment, has become too stale
  eager      the newest there is, as soon as it is loaded; waits for the first

With all but `eager`, the search is a function of the step and the parameters,
so a run can be repeated and resumed bit by bit, however fast the index builder
is. With several processes, all search the same generation at the same step.
"""

from collections.abc import Callable, Iterator
import contextlib
import logging
import pathlib
import shutil
import time

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import concatenated
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import snapshots as snapshots_lib
from realm_jax.trainer import loader

log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2  # Between two looks at the folder while training goes on.
# The same under `eager` with several processes, which look together.
_LOOK_STEPS = 8


class Refresher:
  """Holds the search in use and swaps it between two steps."""

  def __init__(
      self,
      workdir: pathlib.Path | str,
      config: config_lib.Config,
      *,
      corpus: corpus_lib.Corpus,
      mesh: jax.sharding.Mesh | None = None,
      step: int = 0,
      generation: int | None = None,
      pending: int | None = None,
      health: Callable[[], int | None] = lambda: None,
      interrupt: Callable[[], None] = lambda: None,
      make_search: loader.MakeSearch | None = None,
  ):
    """Starts, or goes on, at a step.

    Args:
      workdir: of the job. What it holds of later steps is removed.
      config: of the job, resolved.
      corpus: what the index must be of.
      mesh: where `exact` and `approx` keep their table.
      step: the first step to come.
      generation: the one that the checkpoint of this step was using; None at
        the start of a job.
      pending: `pending` as it was then.
      health: called at every step, and while waiting; returns how often the
        builder has failed so far, raises if there is no use in going on.
      interrupt: called while waiting, in all processes equally often; raises
        in all of them to end the wait.
      make_search: by default the backend of config.mips.

    Raises:
      FileNotFoundError: if that generation is gone; names the command that
        builds it again.
      ValueError: if it is damaged or of another job.
    """
    self._workdir = pathlib.Path(workdir)
    self._directory = self._workdir / generation_lib.DIRECTORY
    self._config = config.refresh
    self._health, self._interrupt = health, interrupt
    expected = generation_lib.Lineage(
        step=None,
        params_digest=None,
        tokenizer_digest=corpus.tokenizer.digest,
        corpus_fingerprint=corpus.fingerprint,
        num_rows=len(corpus.passages),
        width=config.model.embedding_width,
    )
    self._loader = loader.Loader(
        self._workdir,
        expected,
        make_search or (lambda loaded: loaded.make_search(config.mips, mesh)),
    )
    self._current: loader.Loaded | None = None
    self._previous: search_lib.Search | None = None
    self._pending = pending
    self._looked = 0.0
    self._refused: set[int] = set()  # Said once, and not tried again.
    self.num_adopted = 0
    self.waited_seconds = 0.0
    self._last_wait = 0.0
    self._stood_seconds = self._stood_since_swap = self._last_stand = 0.0
    # Metrics that are there from some moment on.
    self._measured: dict[str, float] = {}
    self._failures = 0
    self._loading = False  # In this step.
    # SIGTERM ended the wait for a generation. A snapshot of this step, if there
    # is one, is of a run that was killed; the builder would begin with that.
    waiting = generation is not None and generation < self._due(step) < step
    drop_future(self._workdir, step - 1 if waiting else step)
    distributed.barrier('what is of later steps is removed')
    if generation is not None:
      self._current = self._loader.load(generation)
      log.info('The index is that of step %d, as before.', generation)

  @property
  def search(self) -> search_lib.Search:
    """The search to use; it changes in `adopt` only."""
    if self._current is None:
      raise RuntimeError('There is no index before the first adopt().')
    return self._current.search

  @property
  def embeddings(self) -> concatenated.Chained:
    """The documents' embeddings that `search` searches."""
    if self._current is None:
      raise RuntimeError('There is no index before the first adopt().')
    return self._current.embeddings

  @property
  def generation_step(self) -> int | None:
    """The step of the generation in use."""
    return None if self._current is None else self._current.step

  @property
  def generation_digest(self) -> str | None:
    """Digest of the parameters that the generation in use was made from."""
    return None if self._current is None else self._current.digest

  @property
  def pending(self) -> int | None:
    """The snapshot that `adaptive` has taken and not yet adopted."""
    return self._pending

  def age_steps(self, step: int) -> int:
    """How many steps older than `step` the generation in use is."""
    return step - (self.generation_step or 0)

  def snapshot_due(self, step: int, still_right: Callable[[], float]) -> bool:
    """Whether to take a snapshot of this step; to be asked after `adopt`.

    Args:
      step: about to begin.
      still_right: the share of the top k by the index in use that is also
        among the top k by the parameters of the moment, 0 to 1; the same in
        all processes. Only `adaptive` asks, once an interval.
    """
    if step == 0:
      return True
    if self._config.policy == 'none' or step % self._config.interval:
      return False
    if self._config.policy != 'adaptive':
      return True
    if self._pending == step:
      return True  # Decided before the checkpoint that this run began with.
    start = time.perf_counter()
    overlap = distributed.broadcast(still_right())
    due = overlap < self._config.overlap_bound
    if due:
      self._pending = step
    self._measured['refresh/fresh_overlap'] = overlap
    self._measured['refresh/snapshot_due'] = float(due)
    self._measured['refresh/probe_seconds'] = time.perf_counter() - start
    log.info(
        'Step %d: %.1f %% of what the index of step %s finds is still right, '
        'the bound is %.1f %%: %s.',
        step, 100 * overlap, self.generation_step,
        100 * self._config.overlap_bound,
        'a new one is ordered' if due else 'it stays',
    )
    return due

  def adopt(self, step: int) -> bool:
    """Swaps in the generation that the policy wants from this step on.

    To be called at the top of each step, at step 0 and under `sync` after the
    snapshot of that step was handed over, else before it.

    Returns:
      Whether the search changed.

    Raises:
      TimeoutError: if it did not come within config.refresh.timeout seconds.
      FileNotFoundError: if it can never come, as its snapshot is gone.
      ValueError: if it is of another job, of a newer format, or damaged and
        damaged again after it was built anew.
    """
    self._previous = None
    self._loading = self._loader.number is not None and not self._loader.done
    if self._current is not None and self._config.policy == 'none':
      return False  # Whatever becomes of the builder.
    self._look_after_builder(step)
    if self._config.policy == 'eager' and self._current is not None:
      return self._adopt_newest(step)
    due = self._due(step)
    if self._current is not None and self._current.step >= due:
      # Loaded before its time, so that the swap takes none.
      if self._config.policy == 'scheduled':
        self._look(step // self._config.interval * self._config.interval)
      elif self._config.policy == 'adaptive' and self._pending is not None:
        self._look(self._pending)
      return False
    self._swap(self._wait(due, step), step)
    return True

  def probe_overlap(
      self, query_emb_BE: np.ndarray | jax.Array, k: int
  ) -> float | None:
    """Share of the top k that the last swap left the same, on some queries.

    To be called after `adopt` returned True; the old index is then let go.
    None if there was none before.
    """
    previous, self._previous = self._previous, None
    # Also with nothing to compare: what it compiles, no later swap has to.
    found_BK = self.search.search(query_emb_BE, k)
    if previous is None:
      return None
    overlap = search_lib.overlap(previous.search(query_emb_BE, k), found_BK)
    self._measured['refresh/probe_overlap'] = overlap
    return overlap

  @contextlib.contextmanager
  def standing_still(self) -> Iterator[None]:
    """Counts what is done inside as time in which training stood still."""
    start, adopted = time.perf_counter(), self.num_adopted
    try:
      yield
    finally:
      seconds = time.perf_counter() - start
      self._stood_seconds += seconds
      self._stood_since_swap += seconds
      if self.num_adopted != adopted:
        self._last_stand, self._stood_since_swap = self._stood_since_swap, 0.0

  @contextlib.contextmanager
  def training_goes_on(self) -> Iterator[None]:
    """Takes what is done inside out of `standing_still`, around it."""
    start = time.perf_counter()
    try:
      yield
    finally:
      seconds = time.perf_counter() - start
      self._stood_seconds -= seconds
      self._stood_since_swap -= seconds

  def metrics(self, step: int) -> dict[str, float]:
    """How stale the index is, and what keeping it fresh costs.

    See docs/refresh.md for what each of them says.
    """
    if self._current is None:
      return {}
    return {
        'refresh/generation': float(self._current.step),
        'refresh/age_steps': float(self.age_steps(step)),
        'refresh/age_seconds': time.time() - self._current.born,
        'refresh/adopted': float(self.num_adopted),
        'refresh/loading': float(self._loading),
        'refresh/load_seconds': self._current.seconds,
        'refresh/wait_seconds': self.waited_seconds,
        'refresh/last_wait_seconds': self._last_wait,
        'refresh/stall_seconds': self._stood_seconds,
        'refresh/last_stall_seconds': self._last_stand,
        'refresh/builder_failures': float(self._failures),
        **self._measured,
    }

  def close(self) -> None:
    self._loader.close()

  def _look_after_builder(self, step: int) -> None:
    failures = self._health() or 0
    if failures > self._failures and self._current is not None:
      log.warning(
          'The index builder has failed %d times so far. Training goes on with '
          'the index of step %d, %d steps and %.0f seconds old.',
          failures, self._current.step, self.age_steps(step),
          time.time() - self._current.born,
      )
    self._failures = failures

  def _due(self, step: int) -> int:
    """The generation that must be in use at a step, at the least."""
    match self._config.policy:
      case 'sync':
        passed = step
      case 'scheduled':
        passed = max(step - self._config.lag, 0)
      case 'adaptive' if (self._pending or 0) + self._config.lag <= step:
        passed = self._pending or 0
      case _:
        passed = 0
    return passed // self._config.interval * self._config.interval

  def _adopt_newest(self, step: int) -> bool:
    """Process 0 chooses; the swap comes when all processes have loaded it."""
    if jax.process_count() > 1 and step % _LOOK_STEPS:
      return False
    number = distributed.broadcast(
        self._choose(step) if distributed.is_main() else None
    )
    if number is not None and number != self._loader.number:
      self._begin(number)
    if number is None or distributed.any(not self._loader.done):
      return False
    loaded: loader.Loaded | None = None
    refused = False
    try:
      loaded = self._loader.take()
    except FileNotFoundError:
      pass  # Replaced or pruned meanwhile.
    except (ValueError, OSError) as error:
      refused = True
      log.error(
          'Training goes on with the index of step %s: %s',
          self.generation_step,
          error,
      )
    if distributed.any(refused):
      self._refused.add(number)
    # A checkpoint could not refer to one that is gone.
    if distributed.any(loaded is None or not loaded.path.exists()):
      return False
    assert loaded is not None
    self._swap(loaded, step)
    return True

  def _choose(self, step: int) -> int | None:
    """The generation that `eager` is loading, or should begin to load."""
    if self._loader.number is not None or not self._may_look():
      return self._loader.number
    for number in reversed(checkpoint.steps_in(self._directory)):
      newer = (self.generation_step or 0) < number <= step
      if newer and number not in self._refused and self._is_there(number):
        return number
    return None

  def _look(self, number: int) -> None:
    """Begins to load a generation if it is there, newer, and not begun."""
    if number <= (self.generation_step or 0) or self._loader.number is not None:
      return
    if self._may_look() and self._is_there(number):
      self._begin(number)

  def _may_look(self) -> bool:
    now = time.monotonic()
    if now - self._looked < _LOOK_SECONDS:
      return False
    self._looked = now
    return True

  def _is_there(self, number: int) -> bool:
    try:
      return self._loader.is_published(number)
    except ValueError:
      # Under `eager`, loading it will say what is wrong, once; else waiting
      # for it will, when it is due.
      return self._config.policy == 'eager'

  def _begin(self, number: int) -> None:
    self._loading = True
    held = [] if self._current is None else [self._current.step]
    self._loader.begin(number, held)

  def _swap(self, loaded: loader.Loaded, step: int) -> None:
    start = time.perf_counter()
    if self._current is not None:
      self._previous = self._current.search
      self._measured['refresh/drift_cosine'] = _mean_cosine(
          self._current.sample, loaded.sample
      )
    self._current = loaded
    if self._pending == loaded.step:
      self._pending = None
    self._loader.mark([loaded.step])
    self.num_adopted += 1
    self._measured['refresh/swap_seconds'] = time.perf_counter() - start
    log.info(
        'Step %d: index generation %d adopted, loaded in %.2f s; parameters '
        '%s.',
        step, loaded.step, loaded.seconds, loaded.digest,
    )

  def _wait(self, number: int, step: int) -> loader.Loaded:
    """Returns a generation as soon as it is there and loaded."""
    start = time.perf_counter()
    patience = loader.Patience(self._workdir, number, self._config.timeout)
    damaged: generation_lib.Damaged | None = None
    path = self._directory / str(number)
    loaded: loader.Loaded | None = None
    while True:  # In step with the other processes.
      self._interrupt()
      try:
        if self._loader.number == number:
          loaded = self._loader.take(patience.pause())
        elif loaded is not None:
          time.sleep(patience.pause())  # Another process still loads it.
        elif self._loader.number is not None:
          if self._loader.done:
            self._loader.drop()  # Of no use any more.
          time.sleep(patience.pause())
        elif self._loader.is_published(number):
          self._begin(number)
        else:
          time.sleep(patience.pause())
      except TimeoutError:
        pass  # Still loading.
      except FileNotFoundError:
        pass  # Being replaced.
      except generation_lib.Damaged as error:
        if distributed.is_main():  # The others wait for what it decides.
          if damaged is not None:
            raise
          damaged = error
          log.error('%s It is removed, to be built anew.', error)
          files.remove(path)
      self._look_after_builder(step)
      if not distributed.any(loaded is None):
        break
      patience.check()
    assert loaded is not None
    self._last_wait = time.perf_counter() - start
    self.waited_seconds += self._last_wait
    return loaded


def drop_future(workdir: pathlib.Path | str, step: int) -> None:
  """Removes what a killed trainer left of steps that are now run again.

  That is: snapshots and generations of steps after `step`, and generations of
  other parameters than the snapshot of their step.
  """
  if not distributed.is_main():
    return
  workdir = pathlib.Path(workdir)
  snapshots = workdir / snapshots_lib.DIRECTORY
  for left in snapshots.glob(f'{files.TEMPORARY}*'):
    shutil.rmtree(left, ignore_errors=True)
  # Snapshots first: a builder does not publish without its snapshot.
  for number in snapshots_lib.steps_of(workdir):
    if number > step:
      files.remove(snapshots / str(number))
      log.info('Removed the snapshot of step %d: it is run again.', number)
  kept = snapshots_lib.steps_of(workdir)
  directory = workdir / generation_lib.DIRECTORY
  for number in checkpoint.steps_in(directory):
    path = directory / str(number)
    stale = number > step
    if not stale and number in kept:
      try:
        theirs = generation_lib.read_manifest(path)['params_digest']
      except (generation_lib.Damaged, FileNotFoundError):
        continue  # Whoever needs it will say so.
      stale = theirs != snapshots_lib.digest_of(workdir, number)
    if stale:
      files.remove(path)
      log.info('Removed %s, of steps that are run again.', path)


def _mean_cosine(a_NE: np.ndarray, b_NE: np.ndarray) -> float:
  norms = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
  dots = np.einsum('NE,NE->N', a_NE, b_NE)
  return float(np.mean(dots / np.maximum(norms, 1e-30)))
