"""Index generations, read and checked in the background during training."""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import logging
import pathlib
import time

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import process

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 1024  # Rows on which the drift of the embeddings is measured.
_POLL_SECONDS = (0.05, 0.5)  # Pause while waiting: first and longest.
_LOG_SECONDS = 30.0
_STALE_SECONDS = 15.0  # Without a new heartbeat, no builder seems to run.
_SNAPSHOT_SECONDS = 60.0  # A snapshot that is being written appears by then.

MakeSearch = Callable[[generation_lib.Generation], search_lib.Search]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A generation that is ready to be searched."""

  step: int
  path: pathlib.Path
  search: search_lib.Search
  embeddings: corpus_lib.Chained
  digest: str  # Digest of the parameters that it was made from.
  snapshot_time: float  # When its build began, in seconds of the epoch.
  sample: np.ndarray  # Embeddings of the same documents in each generation.
  seconds: float  # Time to load it.


class Loader:
  """Loads one generation at a time; for the main thread only."""

  def __init__(
      self,
      workdir: pathlib.Path,
      expected: generation_lib.Lineage,
      make_search: MakeSearch,
  ):
    """Prepares to load.

    Args:
      workdir: workdir of the job.
      expected: lineage that a generation must have.
      make_search: makes the search; called in the loading thread.
    """
    self._workdir = workdir
    self._directory = workdir / generation_lib.DIRECTORY
    self._expected = expected
    self._make_search = make_search
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'index')
    # The generation that is being loaded, or is ready for `take`.
    self.number: int | None = None
    self._future: concurrent.futures.Future[Loaded] | None = None
    self._warned: set[int] = set()

  @property
  def done(self) -> bool:
    """Whether `take` would return or raise at once."""
    return self._future is not None and self._future.done()

  def is_published(self, number: int) -> bool:
    """Returns whether a generation of this job's own snapshot is on disk.

    Raises:
      Damaged, ValueError: see `generation.read_manifest`.
    """
    try:
      manifest = generation_lib.read_manifest(self._directory / str(number))
    except FileNotFoundError:
      return False
    expected, found = self._digest(number), manifest['params_digest']
    if expected is None or expected == found:
      return True
    if number not in self._warned:
      self._warned.add(number)
      log.warning(
          'The index generation %d was made from parameters %.16s, the '
          'snapshot has %.16s: waiting for it to be built again.',
          number, found, expected,
      )
    return False

  def begin(self, number: int, held: list[int]) -> None:
    """Starts to load; the builder keeps the generations in `held`."""

    def load() -> Loaded:
      self._mark([*held, number])
      return self._load(number)

    self.number = number
    self._future = self._threads.submit(load)

  def take(self, timeout: float | None = None) -> Loaded:
    """Returns the generation begun, and forgets it; waits `timeout` seconds.

    Raises:
      TimeoutError: it is still being loaded.
      FileNotFoundError: it was replaced or deleted.
      ValueError, OSError: see `generation.load`.
    """
    assert self._future is not None
    concurrent.futures.wait([self._future], timeout)
    if not self._future.done():
      raise TimeoutError(f'Index generation {self.number} is still loading.')
    future = self._future
    self.drop()
    return future.result()

  def drop(self) -> None:
    """Forgets the generation begun."""
    self.number = self._future = None

  def load(self, number: int) -> Loaded:
    """Loads a generation at once; raises as `take`."""
    self._mark([number])
    return self._load(number)

  def mark(self, held: list[int]) -> None:
    """Asks the builder to keep these generations, in the background."""
    # Syncing a file may take longer than a training step.
    self._threads.submit(self._mark, held)

  def close(self) -> None:
    self._threads.shutdown(wait=False, cancel_futures=True)

  def _mark(self, held: list[int]) -> None:
    if not distributed.is_main():
      return
    try:
      generation_lib.mark_in_use(self._directory, held)
    except OSError as error:
      # The builder keeps the newest two and those of checkpoints in any case.
      log.warning('The generations in use could not be marked: %s', error)

  def _digest(self, number: int) -> str | None:
    try:
      return checkpoint.snapshot_digest(self._workdir, number)
    except FileNotFoundError:
      return None  # Old snapshots are deleted before their generations.

  def _load(self, number: int) -> Loaded:
    start = time.perf_counter()
    path = self._directory / str(number)
    expected = dataclasses.replace(
        self._expected, step=number, params_digest=self._digest(number)
    )
    loaded = generation_lib.load(path, expected)
    size = len(loaded.embeddings)
    rows = np.linspace(0, size - 1, min(size, _SAMPLE_ROWS)).astype(np.int64)
    return Loaded(
        step=number,
        path=path,
        search=self._make_search(loaded),
        embeddings=loaded.embeddings,
        digest=loaded.manifest['params_digest'],
        snapshot_time=loaded.manifest['created'] - loaded.manifest['seconds'],
        sample=loaded.embeddings[rows].astype(np.float32),
        seconds=time.perf_counter() - start,
    )


class GenerationWait:
  """Back-off, log messages and timeout while waiting for a generation."""

  def __init__(self, workdir: pathlib.Path, number: int, timeout: float):
    self._workdir, self._number, self._timeout = workdir, number, timeout
    self._start = self._logged = self._changed = time.monotonic()
    self._heartbeat: object = None
    self._state = 'no index builder was seen'
    self._pause = _POLL_SECONDS[0]

  def pause(self) -> float:
    """Returns the next pause, in seconds."""
    self._pause = min(self._pause * 1.2, _POLL_SECONDS[1])
    return self._pause

  def check(self) -> None:
    """Raises if the wait is hopeless or too long; logs now and then."""
    now = time.monotonic()
    directory = self._workdir / generation_lib.DIRECTORY
    heartbeat = process.read_heartbeat(directory)
    if heartbeat is not None and heartbeat != self._heartbeat:
      # Compared with the last one, not with the clock: the builder may run on
      # another machine.
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
    path = f'{directory}/{self._number}'
    if waited > self._timeout:
      raise TimeoutError(
          f'{path} did not come within config.refresh.timeout='
          f'{self._timeout:.0f} seconds; {self._state}.'
      )
    if waited > _SNAPSHOT_SECONDS and not (
        self._number in checkpoint.snapshot_steps(self._workdir)
        or self._number in checkpoint.steps_in(directory)
    ):
      raise FileNotFoundError(
          f'{path} can never come: its snapshot, '
          f'{self._workdir / checkpoint.SNAPSHOTS}/{self._number}, is gone.'
      )
    stale = now - self._changed > _STALE_SECONDS
    first = self._logged == self._start
    if now - self._logged <= _LOG_SECONDS and not (stale and first):
      return
    self._logged = now
    if stale:
      log.warning(
          'No index builder seems to run for %s: start `realm-jax index '
          '--workdir=%s --follow` or pass --with_index_builder. Waiting for '
          'generation %d since %.0f s; %s.',
          self._workdir, self._workdir, self._number, waited, self._state,
      )
    else:
      log.info(
          'Waiting for generation %d since %.0f s; %s.',
          self._number, waited, self._state,
      )
