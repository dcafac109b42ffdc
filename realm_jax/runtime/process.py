"""Workdir locks, and shutdown on SIGTERM or with the parent process."""

from collections.abc import Iterator
import contextlib
import fcntl
import logging
import os
import pathlib
import signal
import socket
import threading
import time
from typing import IO, Any

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0  # Between a request to stop and the kill.


class Stopped(BaseException):
  """The process was asked to stop; not an error, so not an `Exception`."""


@contextlib.contextmanager
def lock(
    directory: pathlib.Path, what: str, timeout: float = 0.0
) -> Iterator[None]:
  """Keeps a second process of a kind away from a folder.

  Args:
    directory: the folder.
    what: kind of the process, such as 'index builder'.
    timeout: seconds to wait for the other process.

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
    threading.Thread(
        target=_watch_parent, args=(parent_pid,), daemon=True
    ).start()
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
