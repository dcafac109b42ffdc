"""One trainer and one builder at a time, seen to be alive, told to leave.

Public: `Lock`, `Heartbeat`, `read_heartbeat`, `Progress`, `stop_signals`,
`Stopped`, `GRACE_SECONDS`.
"""

from collections.abc import Iterator
import contextlib
import datetime
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

import tqdm

from realm_jax.runtime import files

log = logging.getLogger(__name__)

HEARTBEAT = 'heartbeat.json'
GRACE_SECONDS = 10.0  # Between being told to leave and being ended.
_BEAT_SECONDS = 1.0  # At the least between two.
_REPEAT_SECONDS = 5.0  # At the most.
_SAY_SECONDS = 30.0


class Stopped(BaseException):
  """The process was told to leave; not an error, so no `Exception`."""


class Lock:
  """Keeps a second process of a kind away from a workdir, as a context."""

  def __init__(
      self,
      directory: pathlib.Path,
      patience: float = 0.0,
      what: str = 'index builder',
  ):
    """Will lock `directory`; waits at most `patience` seconds for it."""
    self._path = directory / f'.{what.split()[-1]}.lock'
    self._patience, self._what = patience, what

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
            f'Another {self._what} is at work on {self._path.parent}: '
            f'{holder}. One is enough; this one leaves.'
        ) from None
      except OSError as error:  # Not every shared storage has locks.
        log.warning(
            '%s cannot be locked (%s): see to it that no second %s works on '
            '%s.',
            self._path, error, self._what, self._path.parent,
        )
        break
    self._file.seek(0)
    self._file.truncate()
    self._file.write(f'process {os.getpid()} on {socket.gethostname()}')
    self._file.flush()
    return self

  def __exit__(self, *exc: object) -> None:
    self._file.truncate(0)
    self._file.close()


class Heartbeat:
  """Says in index/heartbeat.json what the builder is doing, as a context.

  It is said again every few seconds, since loading, compiling and indexing may
  keep the main thread for minutes.
  """

  def __init__(self, directory: pathlib.Path, silent: bool = False):
    """Will write `directory`/heartbeat.json, unless `silent`."""
    self._path = directory / HEARTBEAT
    self._silent = silent
    self._said: dict[str, Any] = {}
    self._last = 0.0
    self._failed = False
    self._lock = threading.Lock()
    self._left = threading.Event()

  def __enter__(self) -> 'Heartbeat':
    self.beat('starting', at_once=True)
    threading.Thread(target=self._repeat, daemon=True).start()
    return self

  def __exit__(self, *exc: object) -> None:
    self._left.set()
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

    Args:
      state: what the builder is doing, in a word or some.
      step: of the snapshot that it works on.
      done: how many passages are embedded.
      total: how many there are.
      rate: passages/s.
      at_once: write it in any case.
    """
    with self._lock:
      self._said = {
          'state': state,
          'step': step,
          'done': done,
          'total': total,
          'rate': round(rate, 1),
      }
      if at_once or time.monotonic() - self._last >= _BEAT_SECONDS:
        self._write()

  def _repeat(self) -> None:
    while not self._left.wait(_REPEAT_SECONDS):
      with self._lock:
        if not self._left.is_set():
          self._write()

  def _write(self) -> None:
    self._last = time.monotonic()
    if self._silent:
      return
    values = {
        'time': time.time(),
        'pid': os.getpid(),
        'host': socket.gethostname(),
        **self._said,
    }
    try:
      files.write_json(self._path, values)
    except OSError as error:
      # A full disk: what matters more will say so where it fails.
      if not self._failed:
        log.warning('No heartbeat: %s', error)
      self._failed = True


class Progress:
  """Says how far the passages of a generation are embedded, as a context.

  A bar on a terminal, else a line now and then; and the heartbeat.
  """

  def __init__(
      self,
      heartbeat: Heartbeat,
      step: int,
      done: int,
      total: int,
      processes: int = 1,
  ):
    """Begins with `done` of `total` passages.

    Args:
      heartbeat: to be told.
      step: of the snapshot.
      done: how many were embedded before.
      total: how many there are.
      processes: each of which embeds as many as this one.
    """
    self._heartbeat, self._step, self._processes = heartbeat, step, processes
    self._total = total
    self._done = self._first = done
    self._started = self._said = time.monotonic()
    self._bar = tqdm.tqdm(
        total=total,
        initial=done,
        desc=f'index of step {step}',
        unit='passage',
        disable=None,  # Not on a terminal: lines instead of a bar.
    )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    self._bar.close()

  def __call__(self, count: int) -> None:
    """So many more passages were embedded."""
    count = min(count * self._processes, self._total - self._done)
    self._done += count
    self._bar.update(count)
    now = time.monotonic()
    rate = (self._done - self._first) / max(now - self._started, 1e-6)
    self._heartbeat.beat(
        'embedding',
        self._step,
        done=self._done,
        total=self._total,
        rate=rate,
    )
    if self._bar.disable and now - self._said > _SAY_SECONDS:
      self._said = now
      left = datetime.timedelta(
          seconds=round((self._total - self._done) / max(rate, 1e-6))
      )
      log.info(
          'Index of step %d: %d of %d passages, %.0f/s, %s left.',
          self._step, self._done, self._total, rate, left,
      )


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
