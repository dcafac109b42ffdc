"""Index generations read in the background while training goes on.

Public: `Loader`, `Loaded`, `Patience`. One at a time, checked byte by byte,
ready to be searched when handed over.
"""

from collections.abc import Callable
import concurrent.futures
import dataclasses
import logging
import pathlib
import time

import numpy as np

from realm_jax.corpus import concatenated
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import process
from realm_jax.runtime import snapshots as snapshots_lib

log = logging.getLogger(__name__)

_SAMPLE_ROWS = 1024  # For the drift of the embeddings.
_POLL_SECONDS = (0.05, 0.5)  # While waiting: at first, and at most.
_SAY_SECONDS = 30.0
_STALE_SECONDS = 15.0  # Without a new heartbeat no builder seems to run.
_SNAPSHOT_SECONDS = 60.0  # A snapshot that is being written appears by then.

MakeSearch = Callable[[generation_lib.Generation], search_lib.Search]


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A generation ready to be searched."""

  step: int
  path: pathlib.Path
  search: search_lib.Search
  embeddings: concatenated.Chained
  digest: str  # Of the parameters that it was made from.
  born: float  # When its snapshot was read, in seconds of the epoch.
  sample: np.ndarray  # Embeddings of the same documents each time.
  seconds: float  # It took to load.


class Loader:
  """Loads generations of one workdir; all methods are of the main thread."""

  def __init__(
      self,
      workdir: pathlib.Path,
      expected: generation_lib.Lineage,
      make_search: MakeSearch,
  ):
    """Prepares to load.

    Args:
      workdir: of the job.
      expected: what a generation must be made from.
      make_search: the backend; called in the loading thread.
    """
    self._workdir = workdir
    self._directory = workdir / generation_lib.DIRECTORY
    self._expected = expected
    self._make_search = make_search
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'index')
    self._number: int | None = None
    self._future: concurrent.futures.Future[Loaded] | None = None
    self._warned: set[int] = set()

  @property
  def number(self) -> int | None:
    """Of the generation that is being loaded, or waits to be taken."""
    return self._number

  @property
  def done(self) -> bool:
    """Whether `take` would return, or raise, at once."""
    return self._future is not None and self._future.done()

  def is_published(self, number: int) -> bool:
    """Whether a generation is there that was made from our own snapshot.

    Raises:
      Damaged, ValueError: see `generation.read_manifest`.
    """
    try:
      manifest = generation_lib.read_manifest(self._directory / str(number))
    except FileNotFoundError:
      return False
    ours = self._digest(number)
    theirs = manifest['params_digest']
    if ours is None or ours == theirs:
      return True
    if number not in self._warned:
      self._warned.add(number)
      log.warning(
          'The index generation %d was made from parameters %.16s, the '
          'snapshot has %.16s: waiting for it to be built anew.',
          number, theirs, ours,
      )
    return False

  def begin(self, number: int, held: list[int]) -> None:
    """Starts to load; `held` are those to be kept on disk meanwhile."""

    def load() -> Loaded:
      self._mark([*held, number])
      return self._load(number)

    self._number = number
    self._future = self._threads.submit(load)

  def take(self, timeout: float | None = None) -> Loaded:
    """Returns what was loaded, and forgets it; waits `timeout` seconds.

    Raises:
      TimeoutError: if it takes longer; it goes on being loaded.
      FileNotFoundError: if it was replaced or deleted meanwhile.
      ValueError, OSError: see `generation.load`.
    """
    if self._future is None:
      raise RuntimeError('Nothing is being loaded.')
    concurrent.futures.wait([self._future], timeout)
    if not self._future.done():
      raise TimeoutError(f'Index generation {self._number} is still loading.')
    future = self._future
    self.drop()
    return future.result()

  def drop(self) -> None:
    """Forgets what is being loaded."""
    self._number = self._future = None

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
      # The builder keeps the newest two and what checkpoints refer to anyway.
      log.warning('The index builder cannot be told what is in use: %s', error)

  def _digest(self, number: int) -> str | None:
    try:
      return snapshots_lib.digest_of(self._workdir, number)
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
        born=loaded.manifest['created'] - loaded.manifest['seconds'],
        sample=loaded.embeddings[rows].astype(np.float32),
        seconds=time.perf_counter() - start,
    )


class Patience:
  """Of a wait: how long to sleep, what to say, when to give up."""

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
    heartbeat = process.read_heartbeat(directory)
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
        self._number in snapshots_lib.steps_of(self._workdir)
        or self._number in checkpoint.steps_in(directory)
    ):
      raise FileNotFoundError(
          f'{what} can never come: its snapshot, '
          f'{self._workdir / snapshots_lib.DIRECTORY}/{self._number}, is gone.'
      )
    stale = now - self._changed > _STALE_SECONDS
    again = now - self._said > _SAY_SECONDS
    if again and not stale:
      self._said = now
      log.info(
          'Waiting for generation %d since %.0f s; %s.',
          self._number, waited, self._state,
      )
    if stale and (again or self._said == self._start):
      self._said = now
      log.warning(
          'No index builder seems to run for %s: start `realm-jax index '
          '--workdir=%s --follow` or pass --with_index_builder. Waiting for '
          'generation %d since %.0f s; %s.',
          self._workdir, self._workdir, self._number, waited, self._state,
      )
