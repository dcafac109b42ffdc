"""The trainer's side of the index: which generation is searched at which step.

Public: `Refresher`, `drop_future`. Policies (config.refresh.policy):

  none       generation 0, for ever
  sync       at step s that of the newest snapshot up to s; waits for each
  scheduled  that of snapshot s from step s + lag on, exactly; waits if late
  eager      the newest there is, as soon as it is loaded; waits for the first

With the first three, the search is a function of the step, so a run can be
repeated and resumed bit by bit, however fast the index builder is.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import logging
import pathlib
import shutil
import time
import uuid

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.data import corpus as corpus_lib
from realm_jax.index import generation as generation_lib
from realm_jax.index import mips
from realm_jax.index import presence
from realm_jax.runtime import checkpoint

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 1024  # For the drift of the embeddings.
_LOOK_SECONDS = 0.2  # Between two looks at the folder while training goes on.
_POLL_SECONDS = (0.05, 0.5)  # While waiting: at first, and at most.
_SAY_SECONDS = 30.0
_STALE_SECONDS = 15.0  # Without a new heartbeat no builder seems to run.
_SNAPSHOT_SECONDS = 60.0  # A snapshot that is being written appears by then.


@dataclasses.dataclass(frozen=True)
class _Loaded:
  """A generation ready to be searched."""

  step: int
  path: pathlib.Path
  search: mips.Search
  digest: str
  born: float  # When its snapshot was read, in seconds of the epoch.
  sample: np.ndarray  # Embeddings of the same documents each time.
  seconds: float  # It took to load.


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
      health: Callable[[], None] = lambda: None,
      make_search: (
          Callable[[generation_lib.Generation], mips.Search] | None
      ) = None,
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
      health: called at every step, and while waiting; raises if there is no
        use in going on.
      make_search: by default the backend of config.mips.

    Raises:
      FileNotFoundError: if that generation is gone; names the command that
        builds it again.
      ValueError: if it is damaged or of another job.
    """
    self._workdir = pathlib.Path(workdir)
    self._directory = self._workdir / generation_lib.DIRECTORY
    self._config = config.refresh
    self._health = health
    self._make_search = make_search or (
        lambda loaded: loaded.make_search(config.mips, mesh)
    )
    self._expected = generation_lib.Lineage(
        step=None,
        params_digest=None,
        tokenizer_digest=corpus.tokenizer.digest,
        corpus_fingerprint=corpus.fingerprint,
        num_rows=len(corpus.passages),
        width=config.model.embedding_width,
    )
    self._current: _Loaded | None = None
    self._previous: mips.Search | None = None
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'index')
    self._loading: tuple[int, concurrent.futures.Future[_Loaded]] | None = None
    self._looked = 0.0
    self._refused: set[int] = set()  # Said once, and not tried again.
    self.num_adopted = 0
    self.waited_seconds = 0.0
    self._last_wait = 0.0
    self._drift: float | None = None
    self._overlap: float | None = None
    drop_future(self._workdir, step)
    if generation is not None:
      self._mark(generation)
      self._current = self._load(generation)
      log.info('The index is that of step %d, as before.', generation)

  @property
  def search(self) -> mips.Search:
    """The search to use; it changes in `adopt` only."""
    if self._current is None:
      raise RuntimeError('There is no index before the first adopt().')
    return self._current.search

  @property
  def generation_step(self) -> int | None:
    """The step of the generation in use."""
    return None if self._current is None else self._current.step

  @property
  def generation_digest(self) -> str | None:
    """Digest of the parameters that the generation in use was made from."""
    return None if self._current is None else self._current.digest

  def age_steps(self, step: int) -> int:
    """How many steps older than `step` the generation in use is."""
    return step - (self.generation_step or 0)

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
    self._health()
    if self._config.policy == 'eager' and self._current is not None:
      return self._adopt_newest(step)
    due = self._due(step)
    if self._current is not None and self._current.step >= due:
      if self._config.policy == 'scheduled':
        # Loaded before its time, so that the swap takes none.
        self._look(step // self._config.interval * self._config.interval)
      return False
    self._swap(self._wait(due))
    return True

  def probe_overlap(
      self, query_emb_BE: np.ndarray | jax.Array, k: int
  ) -> float | None:
    """Share of the top k that the last swap left the same, on some queries.

    To be called after `adopt` returned True; the old index is then let go.
    None if there was none before.
    """
    if self._previous is None:
      return None
    self._overlap = mips.overlap(
        self._previous.search(query_emb_BE, k),
        self.search.search(query_emb_BE, k),
    )
    self._previous = None
    return self._overlap

  def metrics(self, step: int) -> dict[str, float]:
    """How stale the index is, and what keeping it fresh costs."""
    if self._current is None:
      return {}
    values = {
        'refresh/generation': float(self._current.step),
        'refresh/age_steps': float(self.age_steps(step)),
        'refresh/age_seconds': time.time() - self._current.born,
        'refresh/adopted': float(self.num_adopted),
        'refresh/load_seconds': self._current.seconds,
        'refresh/wait_seconds': self.waited_seconds,
        'refresh/last_wait_seconds': self._last_wait,
    }
    if self._drift is not None:
      values['refresh/drift_cosine'] = self._drift
    if self._overlap is not None:
      values['refresh/probe_overlap'] = self._overlap
    return values

  def close(self) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)

  def _due(self, step: int) -> int:
    """The generation that must be in use at a step, at the least."""
    match self._config.policy:
      case 'sync':
        passed = step
      case 'scheduled':
        passed = max(step - self._config.lag, 0)
      case _:
        return 0
    return passed // self._config.interval * self._config.interval

  def _adopt_newest(self, step: int) -> bool:
    if self._loading is not None:
      number, future = self._loading
      if not future.done():
        return False
      self._loading = None
      try:
        loaded = future.result()
      except FileNotFoundError:
        return False  # Replaced or pruned meanwhile.
      except (ValueError, OSError) as error:
        self._refused.add(number)
        log.error(
            'Training goes on with the index of step %s: %s',
            self.generation_step,
            error,
        )
        return False
      if not loaded.path.exists():
        return False  # A checkpoint could not refer to it.
      self._swap(loaded)
      return True
    known = [
        number
        for number in checkpoint.steps_in(self._directory)
        if (self.generation_step or 0) < number <= step
        and number not in self._refused
    ]
    if known:
      self._look(known[-1])
    return False

  def _look(self, number: int) -> None:
    """Begins to load a generation if it is there, newer, and not begun."""
    now = time.monotonic()
    if self._loading is not None or now - self._looked < _LOOK_SECONDS:
      return
    self._looked = now
    if number <= (self.generation_step or 0):
      return
    try:
      published = self._is_published(number)
    except generation_lib.Damaged:
      return  # Dealt with when it is due.
    if published:
      self._begin(number)

  def _begin(self, number: int) -> None:
    self._mark(number)
    self._loading = (number, self._threads.submit(self._load, number))

  def _mark(self, *numbers: int) -> None:
    """Asks the builder to keep these and the one in use."""
    held = [] if self._current is None else [self._current.step]
    generation_lib.mark_in_use(self._directory, [*held, *numbers])

  def _is_published(self, number: int) -> bool:
    """Whether a generation is there that was made from our own snapshot."""
    try:
      manifest = generation_lib.read_manifest(self._directory / str(number))
    except FileNotFoundError:
      return False
    ours = self._digest(number)
    theirs = manifest['params_digest']
    if ours is None or ours == theirs:
      return True
    if number not in self._refused:
      self._refused.add(number)
      log.warning(
          'The index generation %d was made from parameters %.16s, the '
          'snapshot has %.16s: waiting for it to be built anew.',
          number, theirs, ours,
      )
    return False

  def _digest(self, number: int) -> str | None:
    try:
      return checkpoint.snapshot_digest(self._workdir, number)
    except FileNotFoundError:
      return None  # Old snapshots are deleted before their generations.

  def _load(self, number: int) -> _Loaded:
    start = time.perf_counter()
    path = self._directory / str(number)
    expected = dataclasses.replace(
        self._expected, step=number, params_digest=self._digest(number)
    )
    loaded = generation_lib.load(path, expected)
    size = len(loaded.embeddings)
    rows = np.linspace(0, size - 1, min(size, _SAMPLE_ROWS)).astype(np.int64)
    return _Loaded(
        step=number,
        path=path,
        search=self._make_search(loaded),
        digest=loaded.manifest['params_digest'],
        born=loaded.manifest['created'] - loaded.manifest['seconds'],
        sample=loaded.embeddings[rows].astype(np.float32),
        seconds=time.perf_counter() - start,
    )

  def _swap(self, loaded: _Loaded) -> None:
    if self._current is not None:
      self._previous = self._current.search
      self._drift = _mean_cosine(self._current.sample, loaded.sample)
    self._current = loaded
    self._mark()
    self.num_adopted += 1
    log.info(
        'Index generation %d adopted, loaded in %.2f s.',
        loaded.step, loaded.seconds,
    )

  def _wait(self, number: int) -> _Loaded:
    """Returns a generation as soon as it is there and loaded."""
    start = time.perf_counter()
    waiting = _Waiting(self._workdir, number, self._config.timeout)
    damaged: generation_lib.Damaged | None = None
    path = self._directory / str(number)
    while True:
      try:
        if self._loading is not None and self._loading[0] != number:
          if self._loading[1].done():
            self._loading = None  # Of no use any more.
        elif self._loading is None and self._is_published(number):
          self._begin(number)
        if self._loading is None or self._loading[0] != number:
          time.sleep(waiting.pause())
        else:
          loaded = self._loading[1].result(timeout=waiting.pause())
          self._loading = None
          break
      except concurrent.futures.TimeoutError:
        pass  # Still loading.
      except FileNotFoundError:
        self._loading = None  # Being replaced.
      except generation_lib.Damaged as error:
        self._loading = None
        if damaged is not None:
          raise
        damaged = error
        log.error('%s It is removed, to be built anew.', error)
        generation_lib.remove(path)
      except BaseException:
        self._loading = None
        raise
      self._health()
      waiting.check()
    self._last_wait = time.perf_counter() - start
    self.waited_seconds += self._last_wait
    return loaded


class _Waiting:
  """Patience: how long to sleep, what to say, when to give up."""

  def __init__(self, workdir: pathlib.Path, number: int, timeout: float):
    self._workdir, self._number, self._timeout = workdir, number, timeout
    self._start = self._said = self._changed = time.monotonic()
    self._heartbeat: object = None
    self._state = 'no index builder was seen'
    self._pause = _POLL_SECONDS[0]

  def pause(self) -> float:
    self._pause = min(self._pause * 1.2, _POLL_SECONDS[1])
    return self._pause

  def check(self) -> None:
    """Raises if there is no point in going on; logs now and then."""
    now = time.monotonic()
    directory = self._workdir / generation_lib.DIRECTORY
    heartbeat = presence.read_heartbeat(directory)
    if heartbeat is not None and heartbeat != self._heartbeat:
      # Compared with itself, not with our clock: it may be another machine's.
      if self._heartbeat is not None and heartbeat['state'] != 'gone':
        self._changed = now
      self._heartbeat = heartbeat
      self._state = (
          f'the index builder, process {heartbeat["pid"]} on '
          f'{heartbeat["host"]}, was last {heartbeat["state"]}'
      )
      if heartbeat['total']:
        self._state += f' {heartbeat["done"]} of {heartbeat["total"]}'
    waited = now - self._start
    what = f'{directory}/{self._number}'
    if waited > self._timeout:
      raise TimeoutError(
          f'{what} did not come within config.refresh.timeout='
          f'{self._timeout:.0f} seconds; {self._state}.'
      )
    if waited > _SNAPSHOT_SECONDS and not (
        self._number in checkpoint.snapshot_steps(self._workdir)
        or self._number in checkpoint.steps_in(directory)
    ):
      raise FileNotFoundError(
          f'{what} can never come: its snapshot, '
          f'{self._workdir / checkpoint.SNAPSHOTS}/{self._number}, is gone.'
      )
    stale = now - self._changed > _STALE_SECONDS
    if stale and (now - self._said > _SAY_SECONDS or self._said == self._start):
      self._said = now
      log.warning(
          'No index builder seems to run for %s: start `realm-jax index '
          '--workdir=%s --follow` or pass --with_index_builder. Waiting for '
          'generation %d since %.0f s; %s.',
          self._workdir, self._workdir, self._number, waited, self._state,
      )


def drop_future(workdir: pathlib.Path | str, step: int) -> None:
  """Removes what a killed trainer left of steps that are now run again.

  That is: snapshots and generations of steps after `step`, and generations of
  other parameters than the snapshot of their step.
  """
  if jax.process_index() != 0:
    return
  workdir = pathlib.Path(workdir)
  snapshots = workdir / checkpoint.SNAPSHOTS
  # Snapshots first: a builder does not publish without its snapshot.
  for number in checkpoint.snapshot_steps(workdir):
    if number > step:
      aside = snapshots / f'.tmp-{number}-{uuid.uuid4().hex[:8]}'
      (snapshots / str(number)).rename(aside)
      shutil.rmtree(aside, ignore_errors=True)
      log.info('Removed the snapshot of step %d: it is run again.', number)
  kept = checkpoint.snapshot_steps(workdir)
  directory = workdir / generation_lib.DIRECTORY
  for number in checkpoint.steps_in(directory):
    path = directory / str(number)
    stale = number > step
    if not stale and number in kept:
      try:
        theirs = generation_lib.read_manifest(path)['params_digest']
      except (generation_lib.Damaged, FileNotFoundError):
        continue  # Whoever needs it will say so.
      stale = theirs != checkpoint.snapshot_digest(workdir, number)
    if stale:
      generation_lib.remove(path)
      log.info('Removed %s, of steps that are run again.', path)


def _mean_cosine(a_NE: np.ndarray, b_NE: np.ndarray) -> float:
  norms = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
  dots = np.einsum('NE,NE->N', a_NE, b_NE)
  return float(np.mean(dots / np.maximum(norms, 1e-30)))
