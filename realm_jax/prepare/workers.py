"""Processes that turn tasks into chunks.

Public: `Work`, `chunks`.
"""

import collections
from collections.abc import Iterator
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import signal
import threading

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import chunk_files as chunk_files_lib
from realm_jax.prepare import passages


@dataclasses.dataclass(frozen=True)
class Work:
  """How tasks become chunks."""

  tokenizer: tokenizer_lib.Tokenizer
  settings: passages.Settings
  parts: chunk_files_lib.Parts
  workers: int


def chunks(
    tasks: Iterator[passages.Task], work: Work
) -> Iterator[passages.Chunk]:
  """Yields the chunks of tasks in order, with few of them in memory.

  Those that an interrupted run left are taken as they are.
  """
  ahead = list(itertools.islice(tasks, 2))
  tasks = itertools.chain(ahead, tasks)
  if work.workers > 1 and len(ahead) > 1:
    yield from _pooled(tasks, work)
    return
  # Starting processes would take longer.
  packer = passages.Packer(work.tokenizer, work.settings)
  for task in tasks:
    path = work.parts.path(task)
    chunk = _load(path)
    if chunk is None:
      chunk = packer(task)
      if len(ahead) > 1:
        chunk_files_lib.save(path, chunk)
    yield chunk


def _load(path: pathlib.Path) -> passages.Chunk | None:
  try:
    return chunk_files_lib.load(path)
  except (FileNotFoundError, ValueError):
    return None


def _pooled(
    tasks: Iterator[passages.Task], work: Work
) -> Iterator[passages.Chunk]:
  """Has processes write the parts, and reads them in order.

  A chunk takes the way over a file because it is to be kept there anyway, and
  is not pickled and sent as well.
  """
  pool = concurrent.futures.ProcessPoolExecutor(
      work.workers,
      # Not fork: the tokenizers library and JAX have threads.
      multiprocessing.get_context('spawn'),
      _start_worker,
      (work.tokenizer.vocab, work.tokenizer.lowercase, work.settings),
  )
  with pool:
    pending: collections.deque[
        tuple[pathlib.Path, concurrent.futures.Future[None]]
    ] = collections.deque()

    def oldest() -> passages.Chunk:
      path, future = pending.popleft()
      future.result()
      return chunk_files_lib.load(path)

    try:
      for task in tasks:
        path = work.parts.path(task)
        pending.append((path, pool.submit(_work, task, path)))
        if len(pending) > 2 * work.workers:
          yield oldest()
      while pending:
        yield oldest()
    finally:
      pool.shutdown(cancel_futures=True)


_packer: passages.Packer | None = None  # Of a worker process.


def _start_worker(
    vocab: list[str], lowercase: bool, settings: passages.Settings
) -> None:
  global _packer
  # One thread each: there is a process for every core.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends the pool.
  parent = multiprocessing.parent_process()
  assert parent is not None
  sentinel = parent.sentinel

  def leave_with_parent() -> None:
    # A killed parent cannot end the pool, and its pipes stay open in the
    # other workers, so that waiting for a task would never end.
    connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()
  tokenizer = tokenizer_lib.Tokenizer(vocab, lowercase)
  _packer = passages.Packer(tokenizer, settings)


def _work(task: passages.Task, path: pathlib.Path) -> None:
  assert _packer is not None
  if _load(path) is None:
    chunk_files_lib.save(path, _packer(task))
