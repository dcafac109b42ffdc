"""The index builder as a child process: `train --with_index_builder`."""

from collections.abc import Sequence
import logging
import os
import pathlib
import subprocess
import sys
import time

from realm_jax.index import generation
from realm_jax.runtime import checkpoint
from realm_jax.runtime import process

log = logging.getLogger(__name__)

LOG = 'index_builder.log'
_FIRST_BACKOFF_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 60.0
_TAIL_LINES = 20
_FINISH_SECONDS = 600.0  # For the last generation after training.


class IndexBuilderProcess:
  """Runs `realm-jax index --follow` from the first `health` on, as a context.

  Without an error, the context waits for the last generation at its end.
  """

  def __init__(
      self,
      workdir: pathlib.Path | str,
      argv: Sequence[str] = (),
      *,
      max_failures: int = 3,
      backoff_seconds: float = _FIRST_BACKOFF_SECONDS,
  ):
    """Prepares the command.

    Args:
      workdir: workdir of the job.
      argv: more flags of `realm-jax index`.
      max_failures: failures in a row, without a generation published in
        between, that end the training; 0: no limit.
      backoff_seconds: pause before the first restart; doubled with each further
        failure in a row.
    """
    self._workdir = pathlib.Path(workdir)
    self._log = self._workdir / LOG
    self._command = [
        sys.executable,
        '-m',
        'realm_jax',
        'index',
        f'--workdir={workdir}',
        '--follow',
        f'--parent_pid={os.getpid()}',
        *argv,
    ]
    self._max_failures = max_failures
    self._backoff_seconds = backoff_seconds
    self._process: subprocess.Popen[bytes] | None = None
    self._failures = self._all_failures = 0  # In a row, and in all.
    self._published: set[int] = set()
    self._start_at = 0.0

  def __enter__(self) -> 'IndexBuilderProcess':
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
    if kind is None:
      self._finish()
    self.stop()

  @property
  def pid(self) -> int | None:
    """Id of the child process, or None."""
    return None if self._process is None else self._process.pid

  def health(self) -> int:
    """Starts the builder, or restarts it if it died; to be called regularly.

    Returns:
      The number of failures so far.

    Raises:
      RuntimeError: it failed too often without publishing a generation; the
        message ends with the tail of its log.
    """
    if self._process is None:
      if time.monotonic() >= self._start_at:
        self._start()
      return self._all_failures
    code = self._process.poll()
    if code is None:
      return self._all_failures
    self._process = None
    if self._generations() - self._published:
      self._failures = 0
    self._failures += 1
    self._all_failures += 1
    what = f'signal {-code}' if code < 0 else f'exit code {code}'
    if self._max_failures and self._failures >= self._max_failures:
      raise RuntimeError(
          f'The index builder of {self._workdir} ended {self._failures} times '
          f'without publishing anything, the last time with {what}. '
          f'From {self._log}:\n{self._tail()}'
      )
    wait = min(
        self._backoff_seconds * 2 ** (self._failures - 1), _MAX_BACKOFF_SECONDS
    )
    log.warning(
        'The index builder ended with %s; it is started again in %.0f s. See '
        '%s.', what, wait, self._log,
    )
    self._start_at = time.monotonic() + wait
    return self._all_failures

  def stop(self) -> None:
    """Terminates the builder, and kills it if it does not exit in time."""
    if self._process is None:
      return
    if self._process.poll() is None:
      self._process.terminate()
      try:
        self._process.wait(process.GRACE_SECONDS)
      except subprocess.TimeoutExpired:
        log.warning('The index builder does not stop; it is killed.')
        self._process.kill()
        self._process.wait()
    self._process = None

  def _start(self) -> None:
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._published = self._generations()
    environment = {
        # Trainer and builder may share one accelerator: take memory as needed.
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'PYTHONUNBUFFERED': '1',  # Keeps output in order with the last error.
        **os.environ,
    }
    with open(self._log, 'ab') as file:
      self._process = subprocess.Popen(
          self._command,
          stdin=subprocess.DEVNULL,
          stdout=file,
          stderr=subprocess.STDOUT,
          env=environment,
      )

  def _finish(self) -> None:
    """Waits until the newest snapshot has its generation."""
    deadline = time.monotonic() + _FINISH_SECONDS
    while time.monotonic() < deadline:
      snapshots = checkpoint.snapshot_steps(self._workdir)
      if not snapshots or snapshots[-1] in self._generations():
        return
      try:
        self.health()
      except RuntimeError as error:
        log.error('Training is done, but its last index is missing: %s', error)
        return
      time.sleep(0.1)
    log.error('Training is done, but its last index was not built in time.')

  def _generations(self) -> set[int]:
    return set(checkpoint.steps_in(self._workdir / generation.DIRECTORY))

  def _tail(self) -> str:
    try:
      text = self._log.read_text(encoding='utf-8', errors='replace')
    except FileNotFoundError:
      return '(no log)'
    return '\n'.join(text.splitlines()[-_TAIL_LINES:])
