"""Workdir locks, and shutdown on SIGTERM or with the parent process."""

from collections.abc import Iterator
import contextlib
import logging
import os
import pathlib
import signal
import threading
import time
from typing import Any

from realm_jax.runtime import files

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
      stack.enter_context(files.lock(path, timeout))
    except files.Locked as error:
      raise RuntimeError(
          f'Another {what} is at work on {directory}: {error.holder}.'
      ) from None
    except OSError as error:  # Some shared file systems have no locks.
      log.warning(
          '%s cannot be locked (%s): make sure that no second %s runs on %s.',
          path, error, what, directory,
      )
    yield


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
