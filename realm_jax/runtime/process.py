"""Workdir locks, shutdown with the parent process, and the heartbeat."""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import functools
import logging
import os
import pathlib
import signal
import socket
import threading
import time
from typing import IO, Any

import tqdm

from realm_jax.runtime import files

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0  # Between a request to stop and the kill.
HEARTBEAT = 'heartbeat.json'  # The index builder's, in `index`.
_BEAT_SECONDS = 1.0  # Shortest time between two writes.
_REPEAT_SECONDS = 5.0  # Longest time between two writes.
_LOG_SECONDS = 30.0


class Stopped(BaseException):
  """The process was asked to stop; not an error, so not an `Exception`."""


@contextlib.contextmanager
def lock(
    directory: pathlib.Path, what: str, timeout: float = 0.0
) -> Iterator[None]:
  """Keeps a second process of a kind, such as 'index builder', from a folder.

  The other process may end within `timeout` seconds.

  Raises:
    RuntimeError: another process holds the lock; names it.
  """
  path = directory / f'.{what.split()[-1]}.lock'
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(_locked(path, timeout))
      stack.callback(file.truncate, 0)
    except BlockingIOError as error:
      holder = error.args[0] or 'another process'
      raise RuntimeError(
          f'Another {what} is at work on {directory}: {holder}.'
      ) from None
    except OSError as error:  # Some shared file systems have no locks.
      log.warning(
          '%s cannot be locked (%s): make sure that no second %s runs on %s.',
          path, error, what, directory,
      )
    yield


def _locked(path: pathlib.Path, timeout: float) -> IO[str]:
  """Returns a file with an exclusive lock, which ends when it is closed.

  Raises:
    BlockingIOError: another process holds it, whose name is the argument.
    OSError: the file system has no locks.
  """
  deadline = time.monotonic() + timeout
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, 'a+', encoding='utf-8')  # noqa: SIM115
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # The holder before may have removed the file; another process may lock a
      # new one.
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        break
    except FileNotFoundError:
      pass
    except BlockingIOError:
      if time.monotonic() >= deadline:
        file.seek(0)
        raise BlockingIOError(file.read().strip()) from None
      time.sleep(0.1)
    file.close()
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}')
  file.flush()
  return file


@contextlib.contextmanager
def stop_signals(parent_pid: int | None = None) -> Iterator[None]:
  """Turns SIGTERM, and the death of the parent process, into `Stopped`."""
  if threading.current_thread() is not threading.main_thread():
    yield  # Only the main thread can handle signals.
    return

  def stop(number: int, frame: Any) -> None:
    del frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Do not disturb clean-up.
    raise Stopped(signal.Signals(number).name)

  before = signal.signal(signal.SIGTERM, stop)
  if parent_pid is not None:
    # A thread, because native code may keep the main thread for minutes.
    watch = functools.partial(_watch_parent, parent_pid)
    threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def note_sigterm() -> Iterator[list[int]]:
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


def _watch_parent(parent_pid: int) -> None:
  while os.getppid() == parent_pid:
    time.sleep(0.5)
  log.warning('The trainer, process %d, is gone.', parent_pid)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(GRACE_SECONDS)
  os._exit(1)  # Native code did not return.


class Heartbeat:
  """Writes what the builder does to index/heartbeat.json, as a context.

  A thread repeats the last beat, since loading, compiling and indexing may keep
  the main thread for minutes.
  """

  def __init__(self, directory: pathlib.Path, silent: bool = False):
    """Prepares `directory`/heartbeat.json; if `silent`, nothing is written."""
    self._path = directory / HEARTBEAT
    self._silent = silent
    self._values: dict[str, Any] = {}
    self._written = 0.0
    self._failed = False
    self._lock = threading.Lock()
    self._stopped = threading.Event()

  def __enter__(self) -> 'Heartbeat':
    self.beat('starting', at_once=True)
    threading.Thread(target=self._repeat, daemon=True).start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._stopped.set()
    self.beat('gone', at_once=True)

  def beat(
      self,
      state: str,
      step: int | None = None,
      *,
      done: int = 0,
      total: int = 0,
      rate: float = 0.0,
      at_once: bool = False,
  ) -> None:
    """Writes the file, at most once a second unless `at_once`.

    `state` says in a few words what the builder does; `done` of `total`
    passages are embedded, at a rate in passages/s.
    """
    with self._lock:
      self._values = {
          'state': state, 'step': step, 'done': done, 'total': total,
          'rate': round(rate, 1),
      }
      if at_once or time.monotonic() - self._written >= _BEAT_SECONDS:
        self._write()

  def _repeat(self) -> None:
    while not self._stopped.wait(_REPEAT_SECONDS):
      with self._lock:
        if not self._stopped.is_set():
          self._write()

  def _write(self) -> None:
    self._written = time.monotonic()
    if self._silent:
      return
    about = {
        'time': time.time(), 'pid': os.getpid(), 'host': socket.gethostname()
    }
    try:
      files.write_json(self._path, about | self._values)
    except OSError as error:  # A full disk is reported where it does harm.
      if not self._failed:
        log.warning('No heartbeat: %s', error)
      self._failed = True


def read_heartbeat(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns the last heartbeat of a builder, or None."""
  try:
    return files.read_json(directory / HEARTBEAT)
  except (FileNotFoundError, ValueError):
    return None


class Progress:
  """Shows how many passages of a generation are embedded, as a context.

  A bar on a terminal, else log lines; and the heartbeat.
  """

  def __init__(
      self, heartbeat: Heartbeat, step: int, done: int, total: int,
      processes: int,
  ):
    """Begins with `done` of `total`; all `processes` embed at one rate."""
    self._heartbeat, self._step, self._processes = heartbeat, step, processes
    self._total = total
    self._done = self._first = done
    self._started = self._logged = time.monotonic()
    # Only on a terminal.
    self._bar = tqdm.tqdm(
        total=total, initial=done, desc=f'index of step {step}', unit='passage',
        disable=None,
    )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    self._bar.close()

  def __call__(self, count: int) -> None:
    """Counts passages that were just embedded."""
    count = min(count * self._processes, self._total - self._done)
    self._done += count
    self._bar.update(count)
    now = time.monotonic()
    rate = (self._done - self._first) / max(now - self._started, 1e-6)
    self._heartbeat.beat(
        'embedding', self._step, done=self._done, total=self._total, rate=rate
    )
    if self._bar.disable and now - self._logged > _LOG_SECONDS:
      self._logged = now
      seconds = round((self._total - self._done) / max(rate, 1e-6))
      log.info(
          'Index of step %d: %d of %d passages, %.0f/s, %s left.',
          self._step, self._done, self._total, rate,
          datetime.timedelta(seconds=seconds),
      )
