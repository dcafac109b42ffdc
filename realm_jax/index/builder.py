"""The index builder: snapshots of the retriever in, index generations out.

Public: `follow` (the process beside the trainer), `build` (one generation),
`PassageEmbedder` and `embed_passages`. It shares nothing with the trainer but
the workdir, and works on the newest snapshot only.
"""

from collections.abc import Callable
import dataclasses
import logging
import pathlib
import time

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.data import corpus as corpus_lib
from realm_jax.data import inputs
from realm_jax.data import tokenizer as tokenizer_lib
from realm_jax.index import generation
from realm_jax.index import presence
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib

log = logging.getLogger(__name__)

# Bucket widths to choose from, besides the longest.
_WIDTHS = (*range(8, 64, 8), *range(64, 512, 32))
# Of a further width, in wordpieces that could be embedded meanwhile. Low, as a
# builder compiles once and embeds many times.
_COMPILE_COST = 2**15
# Of one batch on one device. Larger is slower where the cache is small.
_BATCH_TOKENS = {'cpu': 2**12}
_BATCH_TOKENS_ELSEWHERE = 2**16
_ROW_MULTIPLE = 8  # Rows of a batch on a device.
_LOW_RECALL = 0.9  # Of an approximate backend; below, that is said aloud.
_POLL_SECONDS = 0.25
_SAY_SECONDS = 30.0

Path = pathlib.Path | str


class PassageEmbedder:
  """Embeds passages with given parameters; compiles once for each width.

  Passages are sorted into a few widths by their length, so that short ones are
  not padded to the longest. No dropout.
  """

  def __init__(
      self,
      component: components.Component,
      passages: corpus_lib.PassageTable,
      tokenizer: tokenizer_lib.Tokenizer,
      max_length: int,
      mesh: jax.sharding.Mesh,
      batch_tokens: int | None = None,
  ):
    """Plans the batches.

    Args:
      component: the embedder.
      passages: the corpus' token table.
      tokenizer: for the special ids.
      max_length: S, at which a longer passage is cut.
      mesh: a batch is divided over all its devices.
      batch_tokens: wordpieces of a batch, of all devices together.
    """
    self._passages, self._tokenizer = passages, tokenizer
    self._lengths = np.minimum(passages.lengths, max_length)
    self._widths = _widths(self._lengths, max_length)
    if batch_tokens is None:
      platform = mesh.devices.flat[0].platform
      batch_tokens = mesh.size * _BATCH_TOKENS.get(
          platform, _BATCH_TOKENS_ELSEWHERE
      )
    buckets = np.searchsorted(self._widths, self._lengths)
    counts = np.bincount(buckets, minlength=len(self._widths))
    multiple = mesh.size * _ROW_MULTIPLE
    self._batch_rows = []
    for width, count in zip(self._widths, counts.tolist(), strict=True):
      most = max(batch_tokens // width // multiple, 1)
      # Equal batches, so that the last one is not mostly padding.
      rows = min(count, generation.ROWS_PER_SHARD)
      needed = max(-(-rows // multiple), 1)
      self._batch_rows.append(-(-needed // -(-needed // most)) * multiple)
    self._replicated = mesh_lib.replicated(mesh)
    self._over_rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    self._embed = jax.jit(
        lambda params, ids_BS, types_BS: component.apply(
            params, 'embed_document', ids_BS, types_BS
        ),
        out_shardings=self._over_rows,
    )

  @property
  def compilations(self) -> int:
    """How often the embedder was compiled: at most once for each width."""
    return self._embed._cache_size()

  def __call__(
      self,
      params: components.Params,
      rows: range | None = None,
      progress: Callable[[int], object] | None = None,
  ) -> np.ndarray:
    """Returns float32 [rows, E] of a range of passages, by default all.

    Args:
      params: of the embedder.
      rows: passage numbers, consecutive.
      progress: called with the number of passages that were just embedded.
    """
    rows = range(len(self._passages)) if rows is None else rows
    params = jax.device_put(params, self._replicated)
    buckets = np.searchsorted(
        self._widths, self._lengths[rows.start : rows.stop]
    )
    emb_NE: np.ndarray | None = None
    # The next batch is put together while the devices work on this one.
    running: list[tuple[np.ndarray, jax.Array]] = []

    def collect() -> None:
      nonlocal emb_NE
      mine, result = running.pop(0)
      part_NE = np.asarray(jax.device_get(result), np.float32)
      if emb_NE is None:
        emb_NE = np.zeros((len(rows), part_NE.shape[1]), np.float32)
      emb_NE[mine] = part_NE[: len(mine)]
      if progress is not None:
        progress(len(mine))

    for bucket, (width, size) in enumerate(
        zip(self._widths, self._batch_rows, strict=True)
    ):
      members = np.flatnonzero(buckets == bucket)
      for first in range(0, len(members), size):
        mine = members[first : first + size]
        numbers = np.full(size, inputs.NULL_DOCUMENT, np.int64)
        numbers[: len(mine)] = mine + rows.start
        ids_BS, types_BS = inputs.assemble_documents(
            self._passages, numbers, width, self._tokenizer
        )
        ids_BS, types_BS = jax.device_put((ids_BS, types_BS), self._over_rows)
        running.append((mine, self._embed(params, ids_BS, types_BS)))
        if len(running) > 1:
          collect()
    while running:
      collect()
    if emb_NE is None:
      raise ValueError('There are no passages to embed.')
    return emb_NE


def embed_passages(
    component: components.Component,
    params: components.Params,
    passages: corpus_lib.PassageTable,
    tokenizer: tokenizer_lib.Tokenizer,
    max_length: int,
    mesh: jax.sharding.Mesh,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
  """Returns float32 [N, E]; to do so again, make a `PassageEmbedder`."""
  embedder = PassageEmbedder(component, passages, tokenizer, max_length, mesh)
  return embedder(params, progress=progress)


def build(workdir: Path, step: int | None = None) -> pathlib.Path:
  """Builds the generation of one snapshot, by default the newest.

  Returns:
    The path of the generation.

  Raises:
    FileNotFoundError: if there is no config or no such snapshot.
    ValueError: if corpus, config and snapshot do not fit together.
    RuntimeError: if an index builder is at work on this workdir.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.read(workdir)
  steps = checkpoint.snapshot_steps(workdir)
  if not steps or step not in (None, *steps):
    raise FileNotFoundError(
        f'{workdir}/{checkpoint.SNAPSHOTS} has snapshots of the steps {steps}, '
        f'not of {"any" if step is None else step}; `realm-jax train` writes '
        'them.'
    )
  directory = workdir / generation.DIRECTORY
  with (
      presence.Lock(directory),
      presence.Heartbeat(directory) as heartbeat,
      presence.stop_signals(),
  ):
    generation.remove_leftovers(directory)
    job = _Job.open(workdir, config, heartbeat)
    path = job.build(steps[-1] if step is None else step)
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
) -> None:
  """Builds a generation from the newest snapshot whenever there is one.

  Returns when training is done (summary.json is there and the newest snapshot
  has its generation) or on SIGTERM. With `parent_pid`, that process decides
  when it is time to leave.

  Args:
    workdir: of the training job; it need not exist yet.
    start_timeout: seconds to wait for the job's config and first snapshot;
      None: for ever.
    parent_pid: leave when this is no longer the parent process.

  Raises:
    RuntimeError: if another index builder is at work on this workdir.
    TimeoutError: if the job does not start.
    ValueError, FileNotFoundError: if corpus, config and snapshot do not fit.
    OSError: if the disk is full; nothing half-written remains.
  """
  workdir = pathlib.Path(workdir)
  directory = workdir / generation.DIRECTORY
  directory.mkdir(parents=True, exist_ok=True)
  # The builder of a trainer that was just killed may still be leaving.
  patience = presence.GRACE_SECONDS + 5 if parent_pid else 0.0
  try:
    with (
        presence.stop_signals(parent_pid),
        presence.Lock(directory, patience),
        presence.Heartbeat(directory) as heartbeat,
    ):
      for name in generation.remove_leftovers(directory):
        log.info('Removed %s/%s, left by a killed builder.', directory, name)
      _wait_for_start(workdir, heartbeat, start_timeout)
      config = config_lib.read(workdir)
      _Job.open(workdir, config, heartbeat).follow(supervised=bool(parent_pid))
  except presence.Stopped as stopped:
    log.info('The index builder leaves: %s.', stopped)


@dataclasses.dataclass(frozen=True)
class _Job:
  """What stays the same from snapshot to snapshot."""

  workdir: pathlib.Path
  config: config_lib.Config
  corpus: corpus_lib.Corpus
  mesh: jax.sharding.Mesh
  component: components.Component
  embedder: PassageEmbedder
  heartbeat: presence.Heartbeat

  @classmethod
  def open(
      cls,
      workdir: pathlib.Path,
      config: config_lib.Config,
      heartbeat: presence.Heartbeat,
  ) -> '_Job':
    config = config_lib.resolve(config)
    corpus = corpus_lib.Corpus.open(config.corpus)
    config.model.vocab_size = (
        config.model.vocab_size or corpus.tokenizer.vocab_size
    )
    # All devices of this process, whatever the trainer has.
    mesh = mesh_lib.make_mesh(config_lib.MeshConfig())
    component = components.make('embedder', config.model)
    embedder = PassageEmbedder(
        component,
        corpus.passages,
        corpus.tokenizer,
        config.lengths.document,
        mesh,
    )
    return cls(workdir, config, corpus, mesh, component, embedder, heartbeat)

  @property
  def directory(self) -> pathlib.Path:
    return self.workdir / generation.DIRECTORY

  def follow(self, supervised: bool) -> None:
    while True:
      # Looked for first: a snapshot written after it can then not be missed.
      done = (self.workdir / 'summary.json').exists()
      steps = checkpoint.snapshot_steps(self.workdir)
      if steps and self._is_missing(steps[-1]):
        self.build(steps[-1])
        continue
      if done and not supervised:
        log.info('Training is done and its newest snapshot has an index.')
        return
      self.heartbeat.beat('waiting', step=steps[-1] if steps else None)
      time.sleep(_POLL_SECONDS)

  def _is_missing(self, step: int) -> bool:
    """Whether the snapshot has no generation made from these parameters."""
    path = self.directory / str(step)
    try:
      made_from = generation.read_manifest(path)['params_digest']
      if made_from == checkpoint.snapshot_digest(self.workdir, step):
        return False
      log.warning('%s is of an earlier run; it is built anew.', path)
    except FileNotFoundError:
      pass  # No generation yet, or the snapshot was just taken away.
    except generation.Damaged as error:
      log.warning('%s', error)
    return True

  def build(self, step: int) -> pathlib.Path | None:
    """Returns the path, or None if the snapshot went away meanwhile."""
    self.heartbeat.beat('loading', step=step, at_once=True)
    started = time.perf_counter()
    try:
      params, digest = checkpoint.load_snapshot(
          self.workdir, step, self.component.abstract
      )
    except (ValueError, OSError) as error:
      if step in checkpoint.snapshot_steps(self.workdir):
        raise
      log.info('The snapshot of step %d is gone: %s', step, error)
      return None
    rows = len(self.corpus.passages)
    lineage = generation.Lineage(
        step=step,
        params_digest=digest,
        tokenizer_digest=self.corpus.tokenizer.digest,
        corpus_fingerprint=self.corpus.fingerprint,
        num_rows=rows,
        width=self.config.model.embedding_width,
    )
    with (
        generation.Writer(
            self.directory, lineage, self.config.mips.dtype
        ) as writer,
        # On a terminal only; a log file gets the line below.
        tqdm.tqdm(
            total=rows, desc=f'step {step}', unit='passage', disable=None
        ) as bar,
    ):

      def progress(count: int) -> None:
        bar.update(count)
        self.heartbeat.beat('embedding', step=step, done=bar.n, total=rows)

      for start in range(0, rows, generation.ROWS_PER_SHARD):
        shard = range(start, min(start + generation.ROWS_PER_SHARD, rows))
        writer.add(self.embedder(params, shard, progress))
      embedded = time.perf_counter() - started
      self.heartbeat.beat('indexing', step=step, done=rows, total=rows)
      writer.add_backend(self.config.mips, self.mesh)
      if not self._is_still(step, digest):
        log.info('The snapshot of step %d was taken back; not published.', step)
        return None
      path = writer.publish()
    recall = writer.recall
    if recall is not None:
      say = log.warning if recall < _LOW_RECALL else log.info
      say(
          'The backend %s finds %.1f %% of what exact search finds.',
          self.config.mips.backend, 100 * recall,
      )
    log.info(
        'Published %s: %d passages in %.1f s (%.0f/s), in all %.1f s.',
        path, rows, embedded, rows / embedded, time.perf_counter() - started,
    )
    self._prune(step)
    return path

  def _is_still(self, step: int, digest: str) -> bool:
    """A trainer that resumed takes back the snapshots after its checkpoint."""
    try:
      return checkpoint.snapshot_digest(self.workdir, step) == digest
    except FileNotFoundError:
      return False

  def _prune(self, newest: int) -> None:
    keep = self.config.refresh.keep
    if not keep:
      return
    steps = checkpoint.steps_in(self.directory)
    # At least two: a checkpoint that is being written may refer to the one
    # before the newest, which the trainer holds until it adopts this one.
    wanted = {newest, *steps[-max(keep, 2) :]}
    wanted |= checkpoint.referenced_generations(self.workdir)
    wanted |= generation.in_use(self.directory)
    for step in set(steps) - wanted:
      generation.remove(self.directory / str(step))


def _widths(lengths: np.ndarray, max_length: int) -> list[int]:
  """Returns the bucket widths for which the least is padded and compiled."""
  widths = [*(w for w in _WIDTHS if w < max_length), max_length]
  fitting = [0, *(int((lengths <= width).sum()) for width in widths)]
  # best[i]: cost, and the widths chosen, for the passages of the first i.
  best: list[tuple[int, list[int]]] = [(0, [])]
  for i, width in enumerate(widths, start=1):
    best.append(
        min(
            (
                cost + (fitting[i] - fitting[j]) * width + _COMPILE_COST,
                [*chosen, width],
            )
            for j, (cost, chosen) in enumerate(best)
        )
    )
  # The longest passages need no more than the first width that fits them all.
  return best[fitting.index(fitting[-1])][1]


def _wait_for_start(
    workdir: pathlib.Path,
    heartbeat: presence.Heartbeat,
    timeout: float | None,
) -> None:
  started = said = time.monotonic()
  while True:
    if not (workdir / 'config.json').is_file():
      missing = 'config.json'
    elif not checkpoint.snapshot_steps(workdir):
      if (workdir / 'summary.json').exists():
        raise ValueError(
            f'Training in {workdir} is done and took no snapshot of a '
            'retriever: only the objective `realm` has an index.'
        )
      missing = f'first snapshot in {checkpoint.SNAPSHOTS}/'
    else:
      return
    now = time.monotonic()
    if timeout is not None and now - started > timeout:
      raise TimeoutError(
          f'{workdir} had no {missing} after {timeout:.0f} s: does '
          f'`realm-jax train --workdir={workdir}` run?'
      )
    if now - said > _SAY_SECONDS or said == started:
      log.info('Waiting for the trainer: %s has no %s yet.', workdir, missing)
      said = now
    heartbeat.beat('waiting for the trainer')
    time.sleep(_POLL_SECONDS)
