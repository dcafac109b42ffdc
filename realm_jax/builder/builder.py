"""The index builder: snapshots of the retriever in, index generations out.

The builder shares only the workdir with the trainer. It builds from the newest
snapshot, and resumes an interrupted build shard by shard. In a job of several
processes, each embeds a part of the shards; process 0 does the rest.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import logging
import pathlib
import time
from typing import TypeVar

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.index import embedding
from realm_jax.index import generation
from realm_jax.index import search as search_lib
from realm_jax.index import shards
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import process

log = logging.getLogger(__name__)

# Rows of a shard. A kill loses the unfinished shard, so shards are smaller
# where embedding is slow.
_SHARD_ROWS = {'cpu': 2**11}
_SHARD_ROWS_ELSEWHERE, _MIN_SHARD_ROWS = 2**16, 2**11
_MAX_SHARDS = 256  # All shards are open files.
_SHARDS_PER_PROCESS = 8  # At least, so that processes finish together.
_LOW_RECALL = 0.9  # A backend of less recall is reported as a warning.
_POLL_SECONDS = 0.25
_LOG_SECONDS = 30.0
_ROOM_SECONDS = 30.0  # Between two attempts while the disk is full.

Path = pathlib.Path | str
T = TypeVar('T')


def build(
    workdir: Path, step: int | None = None, corpus: Path | None = None
) -> pathlib.Path:
  """Builds the generation of one snapshot, by default the newest.

  If training took no snapshot (objective `ict`), or none at its end, one is
  taken from the newest checkpoint. `corpus`: where it is now, if it has moved.

  Raises:
    FileNotFoundError: the config or the snapshot does not exist.
    ValueError: corpus, config and snapshot do not match.
    RuntimeError: another index builder runs on this workdir.
    OSError: the disk is full; the next call resumes the build.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.read(workdir)
  steps = checkpoint.snapshot_steps(workdir)
  unsaved = _checkpoint_without_snapshot(workdir, config, steps)
  known = steps if unsaved is None else sorted({*steps, unsaved})
  if not known or step not in (None, *known):
    raise FileNotFoundError(
        f'{workdir} has retrievers of the steps {known}, not of'
        f' {"any" if step is None else step}: `realm-jax train` writes'
        f' snapshots of them to {checkpoint.SNAPSHOTS}/ (objectives realm'
        ' and open_qa) or checkpoints (ict, too).'
    )
  with process.stop_signals(), _locked(workdir) as heartbeat:
    job = _Job.open(workdir, config, heartbeat, corpus)
    step = distributed.broadcast(known[-1] if step is None else step)
    if step == unsaved and distributed.is_main():
      params, _ = checkpoint.load_params(
          workdir, {'embedder': job.component.abstract}, step
      )
      checkpoint.save_snapshot(workdir, step, params['embedder'])
    distributed.barrier('the snapshot is on disk')
    path = job.build(step)
  if path is None:
    raise FileNotFoundError(
        f'The snapshot of step {step} was replaced while it was being read.'
    )
  return path


def follow(
    workdir: Path,
    *,
    start_timeout: float | None = None,
    parent_pid: int | None = None,
    corpus: Path | None = None,
) -> None:
  """Builds a generation from the newest snapshot whenever a new one appears.

  Returns when training is done (summary.json exists and the newest snapshot has
  its generation) or on SIGTERM. With `parent_pid`, that process decides when to
  stop. While the disk is full, the builder waits for room.

  Args:
    workdir: workdir of the training job; it need not exist yet.
    start_timeout: seconds to wait for config and first snapshot; None: forever.
    parent_pid: stop when this is no longer the parent process.
    corpus: where the corpus is now; None: where it was in training.

  Raises:
    RuntimeError: another index builder runs on this workdir.
    TimeoutError: the job does not start.
    ValueError, FileNotFoundError: corpus, config and snapshot do not match.
  """
  workdir = pathlib.Path(workdir)
  # The builder of a trainer that was just killed may still be stopping.
  timeout = process.GRACE_SECONDS + 5 if parent_pid else 0.0
  try:
    with (
        process.stop_signals(parent_pid), _locked(workdir, timeout) as heartbeat
    ):
      if distributed.is_main():
        _wait_for_start(workdir, heartbeat, start_timeout)
      distributed.barrier('the job to follow has started')
      while not _Job.open(
          workdir, config_lib.read(workdir), heartbeat, corpus
      ).follow(supervised=bool(parent_pid)):
        pass  # The job began again with another config.
  except process.Stopped as stopped:
    log.info('The index builder leaves: %s.', stopped)


def _checkpoint_without_snapshot(
    workdir: pathlib.Path, config: config_lib.Config, snapshots: list[int]
) -> int | None:
  """The newest checkpoint, if its retriever needs a snapshot and has none."""
  saved = checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS)
  if not saved:
    return None
  if snapshots:
    frozen = config_lib.documents_are_frozen(config) and (
        checkpoint.saved_about(workdir, saved[-1]).get('index_generation')
        is not None
    )
    done = (workdir / 'summary.json').exists()
    if frozen or not done or saved[-1] <= snapshots[-1]:
      return None
  return saved[-1] if 'embedder' in checkpoint.abstract_in(workdir) else None


@contextlib.contextmanager
def _locked(
    workdir: pathlib.Path, timeout: float = 0.0
) -> Iterator[process.Heartbeat]:
  """Keeps other builders away; process 0 acts for all processes of this one."""
  directory = workdir / generation.DIRECTORY
  main = distributed.is_main()
  heartbeat = process.Heartbeat(directory, silent=not main)
  if not main:
    yield heartbeat
    return
  with process.lock(directory, 'index builder', timeout), heartbeat:
    yield heartbeat


@dataclasses.dataclass(frozen=True)
class _Job:
  """A job whose snapshots are built; the same for all snapshots."""

  workdir: pathlib.Path
  directory: pathlib.Path  # The folder of the generations.
  given: config_lib.Config  # As in the workdir.
  config: config_lib.Config  # Resolved.
  corpus: corpus_lib.Corpus
  mesh: jax.sharding.Mesh
  component: components.Component
  embedder: embedding.PassageEmbedder
  heartbeat: process.Heartbeat

  @classmethod
  def open(
      cls,
      workdir: pathlib.Path,
      config: config_lib.Config,
      heartbeat: process.Heartbeat,
      moved: Path | None,
  ) -> '_Job':
    given, config = config, config_lib.resolve(config)
    search_lib.backend(config.mips)  # An unknown one fails before the work.
    if moved or not pathlib.Path(config.corpus).is_dir():
      corpus = document_store.open_corpus(workdir, config, moved)
    else:
      corpus = corpus_lib.Corpus.open(config.corpus)
    if distributed.is_main():
      cuts.warn_of_passages(corpus, config)
    if not config.model.vocab_size:
      corpus.tokenizer.complete(config.model)
    # All devices of this process, whatever mesh the trainer has.
    devices = np.array(jax.local_devices()).reshape(-1, 1)
    mesh = jax.sharding.Mesh(devices, (mesh_lib.DATA, mesh_lib.MODEL))
    component = components.make('embedder', config.model)
    embedder = embedding.PassageEmbedder(
        component, corpus.passages, corpus.tokenizer, config.lengths.document,
        mesh,
    )
    directory = workdir / generation.DIRECTORY
    return cls(
        workdir, directory, given, config, corpus, mesh, component, embedder,
        heartbeat,
    )

  def follow(self, supervised: bool) -> bool:
    """Builds until training is done; False: the config has changed."""
    full = False  # Whether the disk was full in the last attempt.
    while True:
      step, stop, changed = distributed.broadcast(
          self._poll(supervised) if distributed.is_main() else None
      )
      if changed:
        log.info('%s has another config now.', self.workdir)
        return False
      if stop:
        generation.remove_leftovers(self.directory)
        log.info('Training is done and its newest snapshot has an index.')
        return True
      if step is None:
        time.sleep(_POLL_SECONDS)
        continue
      try:
        self.build(step)
        full = False
      except shards.NoRoom as error:
        if not full:
          log.error(
              '%s The index stays as it is; trying again every %.0f s.',
              error, _ROOM_SECONDS,
          )
        full = True
        self.heartbeat.beat('waiting for room on the disk', step, at_once=True)
        time.sleep(_ROOM_SECONDS)

  def _poll(self, supervised: bool) -> tuple[int | None, bool, bool]:
    """Returns a snapshot to build, whether to stop, and `_has_changed`."""
    # Checked first, so that a snapshot written before it is not missed.
    done = (self.workdir / 'summary.json').exists()
    steps = checkpoint.snapshot_steps(self.workdir)
    if steps and self._is_missing(steps[-1]):
      return steps[-1], False, self._has_changed()
    if done and not supervised:
      return None, True, False
    self.heartbeat.beat('waiting', steps[-1] if steps else None)
    return None, False, False

  def _is_missing(self, step: int) -> bool:
    """Returns whether the snapshot has no generation of its parameters."""
    path = self.directory / str(step)
    try:
      found = generation.read_manifest(path)['params_digest']
      if found == checkpoint.snapshot_digest(self.workdir, step):
        return False
      log.warning('%s is of an earlier run; it is built again.', path)
    except FileNotFoundError:
      pass  # No generation yet, or the snapshot was just deleted.
    except files.Damaged as error:
      log.warning('%s', error)
    return True

  def build(self, step: int) -> pathlib.Path | None:
    """Returns the path; None if the snapshot was deleted during the build."""
    self.heartbeat.beat('loading', step, at_once=True)
    started = time.perf_counter()
    if distributed.is_main():
      # A newer snapshot makes an unfinished build of an older one useless.
      for name in generation.remove_leftovers(self.directory, resume=step):
        log.info('Removed %s/%s, an unfinished build.', self.directory, name)
    loaded = self._load(step)
    if loaded is None:
      return None
    params, digest = loaded
    rows = len(self.corpus.passages)
    writer = generation.Writer(
        self.directory,
        generation.Lineage.of(
            self.corpus, self.config.model.embedding_width, step, digest
        ),
        self.config.mips.dtype,
        shard_rows=_shard_rows(rows, self.mesh),
        resume={
            'length': self.config.lengths.document,
            'compute_dtype': self.config.model.compute_dtype,
        },
        main=distributed.is_main(),
    )
    missing = _in_all_processes(writer.begin)[0]
    todo = sum(len(writer.rows(shard)) for shard in missing)
    if todo < rows:
      log.info(
          'Resuming the generation of step %d: %d of its %d passages are '
          'embedded.',
          step, rows - todo, rows,
      )
    embedding_started = time.perf_counter()
    with process.Progress(
        self.heartbeat, step, rows - todo, rows, jax.process_count()
    ) as progress:
      numbers = missing[jax.process_index() :: jax.process_count()]
      complete = _in_all_processes(
          lambda: self._embed(writer, numbers, params, digest, progress)
      )
    seconds = time.perf_counter() - embedding_started
    path = None
    if all(complete):
      path = _in_all_processes(lambda: self._finish(writer, digest))[0]
    if path is None:
      log.info('The snapshot of step %d was taken back; not published.', step)
      writer.discard()
      return None
    if distributed.is_main():
      log.info(
          'Published %s: %d passages, %d of them embedded in %.1f s (%.0f/s), '
          'in all %.1f s.',
          path, rows, todo, seconds, todo / seconds,
          time.perf_counter() - started,
      )
    return pathlib.Path(path)

  def _load(self, step: int) -> tuple[components.Params, str] | None:
    """Loads a snapshot, the same one in all processes; None if it is gone."""
    found = None
    try:
      found = checkpoint.load_snapshot(
          self.workdir, step, self.component.abstract
      )
    except (ValueError, OSError) as error:
      if step in checkpoint.snapshot_steps(self.workdir):
        raise
      log.info('The snapshot of step %d is gone: %s', step, error)
    digests = set(distributed.gather(found and found[1]))
    return None if len(digests) > 1 else found

  def _embed(
      self,
      writer: generation.Writer,
      numbers: list[int],
      params: components.Params,
      digest: str,
      progress: process.Progress,
  ) -> bool:
    """Writes shards; False if the snapshot was deleted.

    A newer snapshot does not stop the build: a builder slower than the interval
    would then never publish.
    """
    for number in numbers:
      if not self._is_current(writer.step, digest):
        return False
      rows = writer.rows(number)
      writer.add(self.embedder(params, rows, progress), number)
    return True

  def _finish(self, writer: generation.Writer, digest: str) -> str | None:
    """Publishes the generation; None if the snapshot was deleted."""
    if not distributed.is_main():
      return None
    self.heartbeat.beat('indexing', writer.step, at_once=True)
    writer.add_backend(self.config.mips, self.mesh)
    if not self._is_current(writer.step, digest):
      return None
    path = writer.publish()
    if not self._is_current(writer.step, digest):  # It was deleted just now.
      files.remove(path)
      return None
    recall = writer.recall
    if recall is not None:
      level = logging.WARNING if recall < _LOW_RECALL else logging.INFO
      log.log(
          level, 'The backend %s finds %.1f %% of the results of exact search.',
          self.config.mips.backend, 100 * recall,
      )
    self._prune(writer.step)
    return str(path)

  def _is_current(self, step: int, digest: str) -> bool:
    """A trainer that resumes deletes the snapshots after its checkpoint."""
    try:
      found = checkpoint.snapshot_digest(self.workdir, step)
    except FileNotFoundError:
      return False
    return found == digest and not self._has_changed()

  def _has_changed(self) -> bool:
    """Whether the job began again with other inputs of an embedding."""
    now, given = config_lib.read(self.workdir), self.given
    names = ('model', 'lengths', 'mips', 'corpus')
    return any(getattr(now, n) != getattr(given, n) for n in names)

  def _prune(self, newest: int) -> None:
    if not (keep := self.config.refresh.keep):
      return
    steps = checkpoint.steps_in(self.directory)
    # At least two: a checkpoint that is being written may refer to the one
    # before the newest, which the trainer uses until it adopts the newest.
    wanted = {newest, *steps[-max(keep, 2) :]}
    try:
      wanted |= {*checkpoint.references(self.workdir)}
      wanted |= generation.in_use(self.directory)
    except ValueError as error:  # Damaged: the references are not known.
      log.warning('No old generation is deleted: %s', error)
      return
    for step in set(steps) - wanted:
      files.remove(self.directory / str(step))


def _shard_rows(num_rows: int, mesh: jax.sharding.Mesh) -> int:
  platform = mesh.devices.flat[0].platform
  rows = _SHARD_ROWS.get(platform, _SHARD_ROWS_ELSEWHERE)
  least = min(rows, _MIN_SHARD_ROWS)
  wanted = _SHARDS_PER_PROCESS * jax.process_count()
  while rows > least and rows * wanted > num_rows:
    rows //= 2
  while rows * _MAX_SHARDS < num_rows:
    rows *= 2
  return rows


def _in_all_processes(work: Callable[[], T]) -> list[T]:
  """Returns the (small, JSON) results of `work` in all processes.

  A full disk in one is an error in all.
  """
  result, failure = None, None
  try:
    result = work()
  except shards.NoRoom as error:
    failure = [error.errno, error.strerror]
  found = distributed.gather([result, failure])
  for _, failed in found:
    if failed is not None:
      raise shards.NoRoom(*failed)
  return [each for each, _ in found]


def _wait_for_start(
    workdir: pathlib.Path, heartbeat: process.Heartbeat, timeout: float | None
) -> None:
  started = logged = time.monotonic()
  while True:
    if not (workdir / 'config.json').is_file():
      missing = 'config.json'
    elif checkpoint.snapshot_steps(workdir):
      return
    elif (workdir / 'summary.json').exists():
      raise ValueError(
          f'Training in {workdir} is done and took no snapshot of a '
          'retriever: only the objective `realm` has an index.'
      )
    else:
      missing = f'first snapshot in {checkpoint.SNAPSHOTS}/'
    now = time.monotonic()
    if timeout is not None and now - started > timeout:
      raise TimeoutError(
          f'{workdir} had no {missing} after {timeout:.0f} s: does '
          f'`realm-jax train --workdir={workdir}` run?'
      )
    if now - logged > _LOG_SECONDS or logged == started:
      log.info('Waiting for the trainer: %s has no %s yet.', workdir, missing)
      logged = now
    heartbeat.beat('waiting for the trainer')
    time.sleep(_POLL_SECONDS)
