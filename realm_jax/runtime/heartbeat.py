"""The index builder's heartbeat file, and the progress of a build."""

import datetime
import logging
import os
import pathlib
import socket
import threading
import time
from typing import Any

import tqdm

from realm_jax.runtime import files

log = logging.getLogger(__name__)

FILE = 'heartbeat.json'
_BEAT_SECONDS = 1.0  # Shortest time between two writes.
_REPEAT_SECONDS = 5.0  # Longest time between two writes.
_LOG_SECONDS = 30.0


class Heartbeat:
  """Writes what the builder does to index/heartbeat.json, as a context.

  A thread repeats the last beat, since loading, compiling and indexing may keep
  the main thread for minutes.
  """

  def __init__(self, directory: pathlib.Path, silent: bool = False):
    """Prepares `directory`/heartbeat.json; if `silent`, nothing is written."""
    self._path = directory / FILE
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
          'state': state,
          'step': step,
          'done': done,
          'total': total,
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
      files.write_json(self._path, {**about, **self._values})
    except OSError as error:  # A full disk is reported where it does harm.
      if not self._failed:
        log.warning('No heartbeat: %s', error)
      self._failed = True


def read(directory: pathlib.Path) -> dict[str, Any] | None:
  """Returns the last heartbeat of a builder, or None."""
  try:
    return files.read_json(directory / FILE)
  except (FileNotFoundError, ValueError):
    return None


class Progress:
  """Shows how many passages of a generation are embedded, as a context.

  A bar on a terminal, else log lines; and the heartbeat.
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

    `processes` is the number of those that embed at the same rate.
    """
    self._heartbeat, self._step, self._processes = heartbeat, step, processes
    self._total = total
    self._done = self._first = done
    self._started = self._logged = time.monotonic()
    self._bar = tqdm.tqdm(
        total=total,
        initial=done,
        desc=f'index of step {step}',
        unit='passage',
        disable=None,  # Only on a terminal.
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
      left = datetime.timedelta(
          seconds=round((self._total - self._done) / max(rate, 1e-6))
      )
      log.info(
          'Index of step %d: %d of %d passages, %.0f/s, %s left.',
          self._step, self._done, self._total, rate, left,
      )
