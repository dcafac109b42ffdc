"""One builder at a time, seen to be alive, and leaving when told to.

Public: `Lock`, `Heartbeat`, `stop_signals`, `Stopped`, `GRACE_SECONDS`.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import threading
import time
from typing import Any

from realm_jax.runtime import checkpoint

log = logging.getLogger(__name__)

HEARTBEAT = 'heartbeat.json'
GRACE_SECONDS = 10.0  # Between being told to leave and being ended.
_LOCK = '.builder.lock'
_BEAT_SECONDS = 1.0


class Stopped(BaseException):
  """The process was told to leave; not an error, so no `Exception`."""


class Lock:
  """Keeps a second index builder away from a workdir, as a context."""

  def __init__(self, directory: pathlib.Path, patience: float = 0.0):
    """Will lock `directory`; waits at most `patience` seconds for it."""
    self._path = directory / _LOCK
    self._patience = patience

  def __enter__(self) -> 'Lock':
    """Takes the lock; the system frees it when the process dies.

    Raises:
      RuntimeError: if another process has it; names it.
    """
    self._path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self._path, 'a+', encoding='utf-8')
    deadline = time.monotonic() + self._patience
    while True:
      try:
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() < deadline:
          time.sleep(0.1)
          continue
        self._file.seek(0)
        holder = self._file.read().strip() or 'unknown'
        self._file.close()
        raise RuntimeError(
            f'Another index builder is at work on {self._path.parent}: '
            f'{holder}. One is enough; this one leaves.'
        ) from None
    self._file.seek(0)
    self._file.truncate()
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
    self._file.flush()
    return self

  def __exit__(self, *exc: object) -> None:
    self._file.truncate(0)
    self._file.close()


class Heartbeat:
  """Says in index/heartbeat.json what the builder is doing, as a context."""

  def __init__(self, directory: pathlib.Path):
    self._path = directory / HEARTBEAT
    self._last = 0.0
    self._failed = False

  def __enter__(self) -> 'Heartbeat':
    self.beat('starting', at_once=True)
    return self

  def __exit__(self, *exc: object) -> None:
    self.beat('gone', at_once=True)

  def beat(
      self,
      state: str,
      *,
      step: int | None = None,
      done: int = 0,
      total: int = 0,
      at_once: bool = False,
  ) -> None:
    """Writes the file, at most once a second unless `at_once`."""
    now = time.monotonic()
    if now - self._last < _BEAT_SECONDS and not at_once:
      return
    self._last = now
    values = {
        'time': time.time(),
        'pid': os.getpid(),
        'host': socket.gethostname(),
        'state': state,
        'step': step,
        'done': done,
        'total': total,
    }
    try:
      checkpoint.write_json(self._path, values)
    except OSError as error:
      # A full disk: what matters more will say so where it fails.
      if not self._failed:
        log.warning('No heartbeat: %s', error)
      self._failed = True


def read_heartbeat(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns what a builder last said of itself, None if nothing."""
  try:
    return json.loads((directory / HEARTBEAT).read_text(encoding='utf-8'))
  except (FileNotFoundError, ValueError):
    return None


@contextlib.contextmanager
def stop_signals(parent_pid: int | None = None) -> Iterator[None]:
  """Turns SIGTERM, and the death of the parent process, into `Stopped`."""
  if threading.current_thread() is not threading.main_thread():
    yield  # Whoever owns the main thread handles signals.
    return

  def stop(number: int, frame: Any) -> None:
    del frame
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Clean up undisturbed.
    raise Stopped(signal.Signals(number).name)

  before = signal.signal(signal.SIGTERM, stop)
  if parent_pid is not None:
    # A thread, since native code may keep the main one for minutes; portable,
    # unlike asking the kernel for a signal.
    threading.Thread(
        target=_watch_parent, args=(parent_pid,), daemon=True
    ).start()
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _watch_parent(parent_pid: int) -> None:
  while os.getppid() == parent_pid:
    time.sleep(0.5)
  log.warning('The trainer, process %d, is gone.', parent_pid)
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(GRACE_SECONDS)
  os._exit(1)  # Native code did not return.
