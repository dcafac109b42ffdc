"""A process pool with ordered results, and chunk files that survive a kill.

`prepare` keeps the result of each task in a chunk file next to its output,
named by a digest of the task. A killed run resumes from these files, even if
the sources grew in between: only tasks without a file are computed.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import functools
import gc
import importlib
import json
import logging
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import shutil
import signal
import threading
from typing import Any, TypeVar

from realm_jax.runtime import files

log = logging.getLogger(__name__)

_SUFFIX = '.part'
_IMPORTED = 'realm_jax.prepare.pipeline'  # With all that it imports.
_GC_THRESHOLD = 100_000
_Item = TypeVar('_Item')
_Result = TypeVar('_Result')


class Pool:
  """Processes that start with the first items, or with `start`.

  Args:
    workers: number of processes; with 1, everything runs in this process.
  """

  def __init__(self, workers: int):
    self.workers, self._started = workers, 0

  def __enter__(self) -> 'Pool':
    return self

  def __exit__(self, *_: object) -> None:
    self.stop()

  @functools.cached_property
  def _executor(self) -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        self.workers,
        # Not fork: the tokenizers library and JAX have threads.
        multiprocessing.get_context('spawn'),
        _start_worker,
    )

  def start(self, count: int) -> None:
    """Starts processes for `count` items, to be ready for the first ones."""
    while self._started < min(count, self.workers) > 1:
      self._executor.submit(importlib.import_module, _IMPORTED)
      self._started += 1

  def stop(self) -> None:
    """Ends the processes, without waiting for it."""
    if '_executor' in vars(self):
      self._executor.shutdown(wait=False, cancel_futures=True)

  def map(
      self, function: Callable[[_Item], _Result], items: Iterable[_Item]
  ) -> Iterator[_Result]:
    """Yields `function(item)` for each item, in order of the items.

    At most two items for each worker are in flight, so memory stays bounded.

    Args:
      function: can be pickled, like the items and the results.
      items: read as results are consumed.
    """
    if self.workers == 1:
      yield from map(function, items)
      return
    pending: collections.deque[concurrent.futures.Future[_Result]] = (
        collections.deque()
    )
    try:
      for item in items:
        pending.append(self._executor.submit(function, item))
        if len(pending) > 2 * self.workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:  # After an error, no worker writes a file any more.
      for future in pending:
        future.cancel()
      concurrent.futures.wait(pending)


def _start_worker() -> None:
  # One thread each: every core has a process.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends the pool.
  parent = multiprocessing.parent_process()
  assert parent is not None
  sentinel = parent.sentinel

  def exit_with_parent() -> None:
    # A killed parent cannot end the pool. Its pipes stay open in the other
    # workers, so a worker would wait for a task forever.
    connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=exit_with_parent, daemon=True).start()
  # Tasks make many objects and few cycles.
  gc.set_threshold(_GC_THRESHOLD)


@contextlib.contextmanager
def chunk_files(
    output: pathlib.Path, settings: dict[str, Any]
) -> Iterator[Callable[[str], pathlib.Path]]:
  """Opens the chunk files of an output; they remain only after a kill.

  The result maps the name of a chunk to the path of its file.

  Args:
    output: the output of the run; its chunk files are in `.NAME.parts` in the
      same folder.
    settings: everything besides its task that a chunk depends on, JSON. Chunk
      files of other settings are deleted, with a warning.

  Raises:
    FileExistsError: another process is writing them.
  """
  directory = output.parent / f'.{output.name}.parts'
  directory.mkdir(parents=True, exist_ok=True)
  with files.folder_lock(directory, output):
    count = sum(1 for _ in directory.glob(f'*{_SUFFIX}'))
    record = directory / 'made_with.json'
    wanted = json.dumps(settings, indent=2, sort_keys=True)
    found = record.read_text('utf-8') if record.is_file() else None
    if found != wanted and count:
      log.warning(
          'The %d chunk files of an interrupted run in %s are discarded: they'
          ' were made with other settings.',
          count,
          directory,
      )
    elif count:
      log.info(
          'An interrupted run left %d chunk files in %s; they are reused.',
          count,
          directory,
      )
    try:
      if found != wanted:
        for file in directory.iterdir():
          file.unlink()
        record.write_text(wanted, 'utf-8')
      yield lambda name: directory / f'{name}{_SUFFIX}'
    except Exception:  # An interruption is no Exception and keeps the files.
      shutil.rmtree(directory, ignore_errors=True)
      raise
    shutil.rmtree(directory)
