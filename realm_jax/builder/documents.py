"""The documents of a workdir: its corpus, and what was added and removed.

Public: `Documents`, `Part`, `Index`, `newest_generation`, `load_params`,
`problems`. Readers come through here: `evaluate`, `inspect`, `Retriever`, the
export of the index. The trainer and the index builder do not.

  documents/manifest.json     which version holds; see `edition`
  documents/removed-V.npy     rows that were removed up to version V
  documents/corpus-V/         what version V added: a corpus artifact
  documents/index-V/<step>/   its generations, as those in index/

Rows count through all parts: first the corpus that was trained on, then each
addition. After a compaction the first part is the compacted corpus.
"""

from collections.abc import Callable, Iterable, Iterator
import copy
import dataclasses
import functools
import logging
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.builder import edition as edition_lib
from realm_jax.builder import merged_search
from realm_jax.corpus import concatenated
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import embedding
from realm_jax.index import generation as generation_lib
from realm_jax.index import search
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import snapshots as snapshots_lib

log = logging.getLogger(__name__)

Path = pathlib.Path | str


@dataclasses.dataclass(frozen=True)
class Part:
  """A corpus, and the folder of its generations."""

  corpus: corpus_lib.Corpus
  index: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Documents:
  """What can be found in a workdir; `Documents.open` makes one."""

  workdir: pathlib.Path
  config: config_lib.Config  # Resolved.
  edition: edition_lib.Edition  # Of version 0 if there was no change.
  parts: tuple[Part, ...]

  @classmethod
  def open(
      cls,
      workdir: Path,
      config: config_lib.Config,
      corpus: Path | None = None,
  ) -> 'Documents':
    """Opens the corpus of a job with what was added and removed, if anything.

    Args:
      workdir: of the job.
      config: resolved.
      corpus: to be searched instead, just as it is.

    Raises:
      FileNotFoundError: if a corpus is not there.
      ValueError: if something is damaged, of a newer format, or the corpus is
        not that which the documents were added to; names both sides.
    """
    workdir = pathlib.Path(workdir)
    if not (corpus or config.corpus):
      raise ValueError(f'{workdir} has no corpus: its config names none.')
    folder = workdir / edition_lib.DIRECTORY
    edition = None if corpus else edition_lib.read(folder)
    index = workdir / generation_lib.DIRECTORY
    parts = []
    if edition is None:
      opened = corpus_lib.Corpus.open(corpus or config.corpus)
      parts.append(Part(opened, index))
      edition = edition_lib.Edition(
          0, opened.fingerprint, (), np.zeros(0, np.int64)
      )
    else:
      for part in edition.parts:
        path = folder / part.corpus if part.corpus else config.corpus
        opened = corpus_lib.Corpus.open(path)
        if opened.fingerprint != part.fingerprint:
          raise ValueError(
              f'The corpus {path} is not the one that {folder} was made for: '
              f'its fingerprint is {opened.fingerprint[:16]}, '
              f'{part.fingerprint[:16]} in {edition_lib.MANIFEST}. Put that '
              f'corpus back, or remove {folder} and add its documents anew.'
          )
        parts.append(Part(opened, folder / part.index if part.index else index))
    config = copy.deepcopy(config)
    config.model.vocab_size = (
        config.model.vocab_size or parts[0].corpus.tokenizer.vocab_size
    )
    return cls(workdir, config, edition, tuple(parts))

  @property
  def folder(self) -> pathlib.Path:
    return self.workdir / edition_lib.DIRECTORY

  @property
  def removed(self) -> np.ndarray:
    """Rows that count no more, sorted int64."""
    return self.edition.removed

  @property
  def is_compacted(self) -> bool:
    """Whether the first part is another corpus than was trained on."""
    return self.parts[0].corpus.fingerprint != self.edition.origin

  @functools.cached_property
  def corpus(self) -> corpus_lib.Corpus:
    """All parts as one corpus."""
    if len(self.parts) == 1 and not len(self.removed):
      return self.parts[0].corpus
    return overlay_lib.Overlay(
        [part.corpus for part in self.parts], self.removed
    )

  @functools.cached_property
  def component(self) -> components.Component:
    """The embedder, without parameters."""
    return components.make('embedder', self.config.model)

  def about(self) -> dict[str, Any] | None:
    """What a result should say of the changes; None if there are none."""
    if not self.edition.version:
      return None
    return {
        'version': self.edition.version,
        'digest': self.edition.digest,
        'added': sum(len(part.corpus.passages) for part in self.parts[1:]),
        'removed': len(self.removed),
    }

  def find(self, params_digest: str) -> int | None:
    """The newest generation of the first part made from these parameters."""
    base = self.parts[0]
    for step in reversed(checkpoint.steps_in(base.index)):
      try:
        about = generation_lib.read_manifest(base.index / str(step))
      except FileNotFoundError:  # A builder at work just took it away.
        continue
      if (
          about['params_digest'] == params_digest
          and about['corpus_fingerprint'] == base.corpus.fingerprint
      ):
        return step
    return None

  def index(
      self, step: int, params: Callable[[], components.Params] | None = None
  ) -> 'Index':
    """Opens a generation, and the embeddings of all that was added.

    Where those are of other parameters, or damaged, they are made anew in
    memory: embeddings of different parameters never meet in one table.

    Args:
      step: of the generation of the first part.
      params: gives the parameters that it was made from; None: of whichever
        snapshot or checkpoint has its digest.

    Raises:
      FileNotFoundError: if there is no such generation.
      ValueError: if it is damaged or of another corpus; if the parameters are
        needed and nowhere to be found.
    """
    base = self.parts[0]
    expected = self.lineage(base, step, None)
    loaded = generation_lib.load(base.index / str(step), expected)
    tables: list[Any] = [loaded.embeddings]
    for part in self.parts[1:]:
      table: Any = self.embeddings(part, loaded.manifest)
      if table is None:
        given = self.params(loaded.manifest) if params is None else params()
        table = np.concatenate(list(self.embed(part, given)))
        table = table.astype(loaded.embeddings.dtype)
        log.info(
            '%d added passages were embedded anew by the parameters of step '
            '%d; the next `realm-jax index add`, `update`, `delete` or '
            '`compact` keeps such embeddings.',
            len(table), step,
        )
      tables.append(table)
    return Index(loaded, tuple(tables), self.removed)

  def embeddings(
      self, part: Part, about: dict[str, Any]
  ) -> concatenated.Chained | None:
    """Those of a part made like the generation with this manifest, if any."""
    path = part.index / str(about['step'])
    expected = self.lineage(part, about['step'], about['params_digest'])
    try:
      if generation_lib.read_manifest(path)['dtype'] != about['dtype']:
        return None
      return generation_lib.load(path, expected).embeddings
    except FileNotFoundError:
      return None
    except ValueError as error:  # Damaged, or of other parameters.
      log.warning('Not used: %s', error)
      return None

  def lineage(
      self, part: Part, step: int, digest: str | None
  ) -> generation_lib.Lineage:
    """What a generation of a part must be made from."""
    return generation_lib.Lineage(
        step=step,
        params_digest=digest,
        tokenizer_digest=part.corpus.tokenizer.digest,
        corpus_fingerprint=part.corpus.fingerprint,
        num_rows=len(part.corpus.passages),
        width=self.config.model.embedding_width,
    )

  def params(self, about: dict[str, Any]) -> components.Params:
    """Finds those that the generation with this manifest was made from."""
    return load_params(
        self.workdir, self.component, about['step'], about['params_digest']
    )

  def publish(
      self,
      part: Part,
      about: dict[str, Any],
      blocks: Iterable[np.ndarray],
      config: config_lib.MipsConfig,
  ) -> None:
    """Writes blocks of embeddings as a generation like that of `about`."""
    lineage = self.lineage(part, about['step'], about['params_digest'])
    size = generation_lib.ROWS_PER_SHARD
    with generation_lib.Writer(part.index, lineage, about['dtype']) as writer:
      waiting = np.zeros((0, self.config.model.embedding_width), np.float32)
      for block in blocks:
        waiting = np.concatenate([waiting, block.astype(np.float32)])
        if len(waiting) >= size:
          writer.add(waiting[:size])
          waiting = waiting[size:]
      if len(waiting):
        writer.add(waiting)
      writer.add_backend(config, mesh_lib.make_mesh(config_lib.MeshConfig()))
      writer.publish()

  def embed(
      self, part: Part, params: components.Params, progress: bool = False
  ) -> Iterator[np.ndarray]:
    """Yields float32 [rows, E] of a part, as many rows as a shard has."""
    embedder = embedding.PassageEmbedder(
        self.component,
        part.corpus.passages,
        part.corpus.tokenizer,
        self.config.lengths.document,
        mesh_lib.make_mesh(config_lib.MeshConfig()),
    )
    rows = len(part.corpus.passages)
    with tqdm.tqdm(
        total=rows,
        desc='embedding',
        unit=' passages',
        disable=None if progress else True,
    ) as bar:
      for start in range(0, rows, generation_lib.ROWS_PER_SHARD):
        limit = min(start + generation_lib.ROWS_PER_SHARD, rows)
        yield embedder(params, range(start, limit), bar.update)


@dataclasses.dataclass(frozen=True)
class Index:
  """The embeddings of all parts, made from the same parameters."""

  generation: generation_lib.Generation  # Of the first part.
  tables: tuple[concatenated.Rows, ...]  # Of each part.
  removed: np.ndarray

  @functools.cached_property
  def table(self) -> concatenated.Rows:
    """All rows, those removed too."""
    if len(self.tables) == 1:
      return self.tables[0]
    return concatenated.Chained(self.tables)

  @functools.cached_property
  def live_rows(self) -> np.ndarray:
    """int64: the rows that were not removed."""
    live = np.ones(self.table.shape[0], bool)
    live[self.removed] = False
    return np.flatnonzero(live)

  def make_search(
      self,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None = None,
  ) -> search.Search:
    """Returns the backend of `config` over what was not removed.

    A saved index of the first part is kept, and merged with an exact search of
    the documents added since.
    """
    if len(self.tables) == 1:
      return self.generation.make_search(config, mesh, self.removed)
    if search.backend(config).folder is None:
      return search.make_search(
          config, self.table, mesh, removed=self.removed
      )
    rows = self.tables[0].shape[0]
    split = np.searchsorted(self.removed, rows)
    added = (
        self.tables[1] if len(self.tables) == 2
        else concatenated.Chained(self.tables[1:])
    )
    searches = (
        self.generation.make_search(config, mesh, self.removed[:split]),
        search.ExactSearch(added, removed=self.removed[split:] - rows),
    )
    return merged_search.Beside(searches, self.table, self.removed)


def newest_generation(documents: Documents) -> dict[str, Any]:
  """Returns the manifest of the newest generation of the first part.

  Raises:
    FileNotFoundError: if there is none yet.
    ValueError: if there are only generations of another corpus.
  """
  base = documents.parts[0]
  others = []
  for step in reversed(checkpoint.steps_in(base.index)):
    try:
      about = generation_lib.read_manifest(base.index / str(step))
    except FileNotFoundError:  # A builder at work just took it away.
      continue
    if about['corpus_fingerprint'] == base.corpus.fingerprint:
      return about
    others.append(about['corpus_fingerprint'][:16])
  if others:
    raise ValueError(
        f'The index in {base.index} is of the corpora {sorted(set(others))}; '
        f'{base.corpus.directory} is {base.corpus.fingerprint[:16]}.'
    )
  raise FileNotFoundError(
      f'{documents.workdir} has no index yet; build one with `realm-jax index '
      f'--workdir={documents.workdir}`.'
  )


def load_params(
    workdir: Path, component: components.Component, step: int, digest: str
) -> components.Params:
  """Finds the embedder's parameters that have a digest.

  Args:
    workdir: whose snapshots and checkpoints are looked through.
    component: the embedder.
    step: at which they most likely are.
    digest: as the manifest of a generation names it.

  Raises:
    ValueError: if they are nowhere; names the digests that there are.
  """
  workdir = pathlib.Path(workdir)
  seen = {}
  snapshots = snapshots_lib.steps_of(workdir)
  for one in sorted(snapshots, key=lambda s: (s != step, -s)):
    try:
      seen[f'snapshot {one}'] = snapshots_lib.digest_of(workdir, one)
      if seen[f'snapshot {one}'] == digest:
        return snapshots_lib.load(workdir, one, component.abstract)[0]
    except FileNotFoundError:  # A trainer at work just took it away.
      continue
  checkpoints = checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS)
  for one in sorted(checkpoints, key=lambda s: (s != step, -s)):
    params, _ = checkpoint.load_params(
        workdir, {component.name: component.abstract}, one
    )
    found = params[component.name]
    seen[f'checkpoint {one}'] = checkpoint.params_digest(found)
    if seen[f'checkpoint {one}'] == digest:
      return found
  there = ', '.join(f'{name}: {found[:16]}' for name, found in seen.items())
  raise ValueError(
      f'The index of step {step} was made from the parameters {digest[:16]}, '
      f'which are no longer in {workdir} ({there or "nothing"}), so that no '
      'document can be embedded to join it. Build an index of the newest '
      f'snapshot: `realm-jax index --workdir={workdir}`.'
  )


def problems(documents: Documents) -> Iterator[str]:
  """Reads every byte of what was added, and says what is wrong with it.

  The corpus and the index that training knows are not part of it.
  """
  for part in documents.parts:
    if part.index == documents.workdir / generation_lib.DIRECTORY:
      continue
    try:
      part.corpus.verify()
    except (ValueError, OSError) as error:
      yield str(error)
    for step in checkpoint.steps_in(part.index):
      try:
        generation_lib.load(
            part.index / str(step), documents.lineage(part, step, None)
        )
      except (ValueError, OSError) as error:
        yield str(error)
