"""Requests in batches on one thread, and adoption of new states on another."""

import collections
from collections.abc import Sequence
import concurrent.futures
import dataclasses
import logging
import pathlib
import threading
import time
from typing import Any

import prometheus_client as prometheus

from realm_jax.serving import state as state_lib

log = logging.getLogger(__name__)

_CAPACITY = 64  # Requests that may wait.
_POLL_SECONDS = 1.0  # Between two looks at the workdir.
_RETRY_SECONDS = 60.0  # Before files that were refused are opened again.
_DRAIN_SECONDS = 30.0


class Busy(RuntimeError):
  """The queue is full, or the service is closing; try again later."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One request; its future holds the result.

  operation: `ask`, `fill`, `search` or `embed`.
  text: of all operations but `embed`.
  k: passages of `search`.
  texts, titles: of `embed`; titles None: the texts are queries.
  """

  operation: str
  text: str = ''
  k: int = 1
  texts: Sequence[str] = ()
  titles: Sequence[str] | None = None
  future: concurrent.futures.Future[Any] = dataclasses.field(
      default_factory=concurrent.futures.Future
  )


class Metrics:
  """Prometheus metrics of one service, in a registry of their own."""

  def __init__(self) -> None:
    self.registry = registry = prometheus.CollectorRegistry()
    self.requests = prometheus.Counter(
        'realm_requests', 'Requests answered.', ['path', 'status'],
        registry=registry,
    )
    self.seconds = prometheus.Histogram(
        'realm_request_seconds', 'Time from the request to its answer.',
        ['path'], registry=registry,
        buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    )
    self.batch = prometheus.Histogram(
        'realm_batch_requests', 'Requests of a batch on the device.',
        ['operation'], registry=registry, buckets=(1, 2, 4, 8, 16),
    )
    self.waiting = prometheus.Gauge(
        'realm_waiting_requests', 'Requests in the queue.', registry=registry
    )
    self.adoptions = prometheus.Counter(
        'realm_adoptions', 'States adopted or refused.', ['result'],
        registry=registry,
    )
    self.checkpoint = prometheus.Gauge(
        'realm_checkpoint_step', 'Step of the checkpoint.', registry=registry
    )
    self.generation = prometheus.Gauge(
        'realm_index_generation_step', 'Step of the index generation.',
        registry=registry,
    )
    self.created = prometheus.Gauge(
        'realm_index_created_seconds', 'Time of the index generation.',
        registry=registry,
    )

  def show(self, identity: state_lib.Identity) -> None:
    """Sets the gauges of the state that is served; nan for what is missing."""
    for gauge, value in (
        (self.checkpoint, identity.checkpoint),
        (self.generation, identity.generation),
        (self.created, identity.created),
    ):
      gauge.set(float('nan') if value is None else value)


class Service:
  """Answers requests with the present state of a workdir.

  state: replaced as a whole, so that a batch has one state.
  refused: why the newest files of the workdir are not served, if so.
  """

  def __init__(
      self,
      workdir: pathlib.Path,
      follow: bool = False,
      capacity: int = _CAPACITY,
      poll_seconds: float = _POLL_SECONDS,
      corpus: str | None = None,
  ):
    """Opens the workdir and compiles the operations for single requests.

    With `follow`, new checkpoints, generations and documents are adopted, which
    are looked for every `poll_seconds`. `capacity` requests may wait; further
    ones raise `Busy`.
    """
    self.workdir, self.metrics = workdir, Metrics()
    self._capacity, self._poll = capacity, poll_seconds
    self._corpus = corpus
    self._seen = _signature(workdir)
    self.state = state_lib.State(workdir, corpus=corpus)
    self.refused = self.state.refused
    self.state.warm_up(1)
    self.metrics.show(self.state.identity)
    self._sizes = [1]  # Batch sizes that are compiled.
    self._jobs: collections.deque[Job] = collections.deque()
    self._changed = threading.Condition()
    self._closing = False
    self._stop = threading.Event()
    self._worker = threading.Thread(
        target=self._work, name='device', daemon=True
    )
    self._worker.start()
    self._background = threading.Thread(
        target=self._prepare, args=(follow,), name='adoption', daemon=True
    )
    self._background.start()

  def submit(self, job: Job) -> concurrent.futures.Future[Any]:
    """Queues a job; its result is (state, JSON or embeddings).

    Raises:
      Busy: the queue is full, or the service is closing.
    """
    with self._changed:
      if self._closing:
        raise Busy('The server is shutting down.')
      if len(self._jobs) >= self._capacity:
        raise Busy(f'{self._capacity} requests are waiting; try again later.')
      self._jobs.append(job)
      self.metrics.waiting.set(len(self._jobs))
      self._changed.notify()
    return job.future

  def close(self) -> None:
    """Answers the requests in the queue, then ends the threads."""
    self._stop.set()
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._worker.join(_DRAIN_SECONDS)
    self._background.join(_DRAIN_SECONDS)

  def _work(self) -> None:
    while True:
      with self._changed:
        while not self._jobs and not self._closing:
          self._changed.wait()
        if not self._jobs:
          return
        batch = self._take()
        self.metrics.waiting.set(len(self._jobs))
      # A client that is gone has cancelled its request.
      batch = [j for j in batch if j.future.set_running_or_notify_cancel()]
      if batch:
        self._run(batch)

  def _take(self) -> list[Job]:
    """Removes the oldest job, and others of its operation, from the queue."""
    operation = self._jobs[0].operation
    most = 1 if operation == 'embed' else self._sizes[-1]
    batch: list[Job] = []
    rest: collections.deque[Job] = collections.deque()
    for job in self._jobs:
      fits = job.operation == operation and len(batch) < most
      (batch if fits else rest).append(job)
    self._jobs = rest
    return batch

  def _run(self, batch: list[Job]) -> None:
    state, first = self.state, batch[0]
    self.metrics.batch.labels(first.operation).observe(len(batch))
    try:
      found: list[Any]
      if first.operation == 'embed':
        found = [state.embed(first.texts, first.titles)]
      else:
        size = next(size for size in self._sizes if size >= len(batch))
        found = state.run(first.operation, [j.text for j in batch], size)
        if first.operation == 'search':
          for job, one in zip(batch, found, strict=True):
            rows, scores = one.pop('rows'), one.pop('scores')
            one['results'] = state.passages(rows[: job.k], scores[: job.k])
    except Exception as error:  # The thread must not end.
      for job in batch:
        job.future.set_exception(error)
      return
    for job, one in zip(batch, found, strict=True):
      job.future.set_result((state, one))

  def _prepare(self, follow: bool) -> None:
    """Compiles larger batches, then adopts what appears in the workdir."""
    self._compile()
    refused_at = 0.0
    while follow and not self._stop.wait(self._poll):
      seen = _signature(self.workdir)
      retry = self.refused and time.monotonic() > refused_at + _RETRY_SECONDS
      if seen == self._seen and not retry:
        continue
      self._seen = seen
      try:
        self._adopt()
      except Exception as error:  # The old state stays.
        self._refuse(state_lib.one_line(error))
      if self.refused:
        refused_at = time.monotonic()

  def _compile(self) -> None:
    largest = self.state.largest_batch
    for size in sorted({min(4, largest), largest} - {*self._sizes}):
      if self._stop.is_set():
        return
      try:
        self.state.warm_up(size)
      except Exception as error:  # Such as a lack of memory.
        log.warning('Batches of %d requests are not possible: %s', size, error)
        return
      self._sizes = [*self._sizes, size]

  def _adopt(self) -> None:
    """Opens the newest files; replaces the state if nothing gets lost."""
    old = self.state
    new = state_lib.State(self.workdir, old, self._corpus)
    if self._loses(new):
      return
    if new.refused:
      # The table in use may be the file that is now damaged.
      if new.identity.is_older(old.identity):
        self._refuse(new.refused)
        return
      self.metrics.adoptions.labels('refused').inc()
    self.refused = new.refused
    if (new.identity, new.missing) == (old.identity, old.missing):
      return
    for size in self._sizes:
      new.warm_up(size)
    if self._loses(new):
      return
    self.state = new
    self.metrics.show(new.identity)
    self.metrics.adoptions.labels('adopted').inc()
    log.info('Adopted: %s', new.identity)
    if old.missing and len(self._sizes) == 1:
      self._compile()

  def _loses(self, new: state_lib.State) -> bool:
    """Refuses a state that lacks an operation of the present one."""
    lost = [name for name in new.missing if name not in self.state.missing]
    if lost:
      self._refuse(new.missing[lost[0]])
    return bool(lost)

  def _refuse(self, reason: str) -> None:
    self.metrics.adoptions.labels('refused').inc()
    if reason != self.refused:
      log.warning('Not adopted, the old state is served: %s', reason)
    self.refused = reason


def _signature(workdir: pathlib.Path) -> list[tuple[str, int]]:
  """Returns the files whose appearance or change may give a new state."""
  found = []
  for pattern in (
      'checkpoints/*',
      'index/*/manifest.json',
      'documents/manifest.json',
      'documents/index-*/*/manifest.json',
  ):
    for path in workdir.glob(pattern):
      try:
        found.append((str(path), path.stat().st_mtime_ns))
      except FileNotFoundError:  # Just deleted.
        continue
  return sorted(found)
