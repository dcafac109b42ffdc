"""The documents of a workdir: its corpus, and those added and removed since.

  documents/manifest.json     the current version: its parts, the removed rows
  documents/removed-V.npy     rows removed up to version V
  documents/corpus-V/         corpus that version V added, or compacted
  documents/index-V/<step>/   its generations

The trainer and the index builder read the corpus of the job alone.
"""

from collections.abc import Callable
import copy
import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import embedding
from realm_jax.index import generation as generation_lib
from realm_jax.index import search
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
DIRECTORY = 'documents'  # In a workdir.
MANIFEST = 'manifest.json'
_UNCHANGED: dict[str, Any] = {
    'version': 0,
    'origin': None,  # Fingerprint of the corpus that was trained on.
    'parts': [{'corpus': None, 'index': None, 'fingerprint': None}],
    'removed': None,
    'manifest_sha256': None,
}

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Part:
  """A corpus and the folder of its generations."""

  corpus: corpus_lib.Corpus
  index: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Documents:
  """One version of the documents; rows count through all parts.

  config: resolved.
  parts: the corpus of the job, or a compacted one, and each addition.
  removed: sorted rows that no search returns, int64.
  manifest: of documents/.
  """

  workdir: pathlib.Path
  config: config_lib.Config
  parts: tuple[Part, ...]
  removed: np.ndarray
  manifest: dict[str, Any]

  @classmethod
  def open(
      cls,
      workdir: Path,
      config: config_lib.Config,
      corpus: Path | None = None,
      another: bool = False,
  ) -> 'Documents':
    """Opens the current version, or another corpus instead.

    Args:
      workdir: of a job.
      config: of the job, resolved.
      corpus: where the corpus of the training is now; None: where it was.
      another: whether `corpus` may replace all documents by others.

    Raises:
      FileNotFoundError: a corpus or the file of removed rows is missing.
      ValueError: a file is damaged or of a newer format, or the corpus is not
        the one that was trained on, or that the documents were added to.
    """
    workdir, config = pathlib.Path(workdir), copy.deepcopy(config)
    folder = workdir / DIRECTORY
    manifest, opened = read_manifest(folder), None
    if corpus is not None:
      opened = open_corpus(workdir, config, corpus, another)
      if not _is_of_training(workdir, opened):
        manifest = _UNCHANGED
      elif manifest['version']:
        log.info('With the additions and removals of %s.', folder)
    parts = []
    for names in manifest['parts']:
      if names['corpus']:
        opened = corpus_lib.Corpus.open(folder / names['corpus'])
      elif opened is None:
        opened = open_corpus(workdir, config)
      expected = names['fingerprint']
      if expected not in (None, opened.fingerprint):
        raise ValueError(
            f'The corpus {opened.directory} is not the one that {folder} was '
            f'made for: its fingerprint is {opened.fingerprint[:16]}, '
            f'{expected[:16]} in {MANIFEST}. Put that corpus back, or remove '
            f'{folder} and add its documents again.'
        )
      index = workdir / generation_lib.DIRECTORY
      index = folder / names['index'] if names['index'] else index
      parts.append(Part(opened, index))
    base = parts[0].corpus
    if manifest is _UNCHANGED:
      names = {**manifest['parts'][0], 'fingerprint': base.fingerprint}
      manifest = {**manifest, 'origin': base.fingerprint, 'parts': [names]}
    if not config.model.vocab_size:
      base.tokenizer.complete(config.model)
    removed = _read_removed(folder, manifest['removed'])
    return cls(workdir, config, tuple(parts), removed, manifest)

  @property
  def folder(self) -> pathlib.Path:
    return self.workdir / DIRECTORY

  @property
  def version(self) -> int:
    return self.manifest['version']

  @property
  def is_compacted(self) -> bool:
    """Whether the first part is not the corpus that was trained on."""
    return self.parts[0].corpus.fingerprint != self.manifest['origin']

  @functools.cached_property
  def corpus(self) -> corpus_lib.Corpus:
    """All parts as one corpus."""
    if len(self.parts) == 1 and not len(self.removed):
      return self.parts[0].corpus
    return overlay_lib.Overlay([p.corpus for p in self.parts], self.removed)

  @functools.cached_property
  def component(self) -> components.Component:
    """The embedder, without parameters."""
    return components.make('embedder', self.config.model)

  def part(self, corpus: pathlib.Path) -> Part:
    """Returns the part that the next version has of a corpus."""
    index = self.folder / f'index-{self.version + 1}'
    return Part(corpus_lib.Corpus.open(corpus), index)

  def about(self) -> dict[str, Any] | None:
    """Returns how results describe the changes; None before the first."""
    if not self.version:
      return None
    return {
        'version': self.version,
        'digest': self.manifest['manifest_sha256'],
        'added': sum(len(part.corpus.passages) for part in self.parts[1:]),
        'removed': len(self.removed),
    }

  def find(self, params_digest: str) -> int | None:
    """Returns the step of the newest generation made from parameters."""
    base = self.parts[0]
    found = find(base.index, base.corpus.fingerprint, params_digest)
    return None if found is None else found['step']

  def newest(self) -> dict[str, Any]:
    """Returns the manifest of the newest generation.

    Raises:
      FileNotFoundError: there is none yet.
      ValueError: there are only generations of other corpora.
    """
    base = self.parts[0]
    newest = find(base.index, base.corpus.fingerprint)
    if newest is not None:
      return newest
    other = find(base.index)
    if other is not None:
      raise ValueError(
          f'The index in {base.index} is of the corpus '
          f'{other["corpus_fingerprint"][:16]}; {base.corpus.directory} is '
          f'{base.corpus.fingerprint[:16]}.'
      )
    raise FileNotFoundError(
        f'{self.workdir} has no index yet; build one with `realm-jax index '
        f'--workdir={self.workdir}`.'
    )

  def index(
      self, step: int, params: Callable[[], components.Params] | None = None
  ) -> 'Index':
    """Opens a generation with the embeddings of all documents added.

    Where the latter are of other parameters or damaged, they are computed in
    memory: embeddings of different parameters are never searched together.

    `params` returns the parameters of the step; None: `load_params`.

    Raises:
      FileNotFoundError: there is no such generation.
      ValueError: it is damaged or of another corpus, or the parameters are
        needed and not found.
    """
    base = self.parts[0]
    loaded = generation_lib.load(
        base.index / str(step), self.lineage(base, step)
    )
    like = loaded.manifest
    params = params or functools.cache(lambda: self.load_params(like))
    tables: list[corpus_lib.Rows] = [loaded.embeddings]
    embedded = 0
    for part in self.parts[1:]:
      table: corpus_lib.Rows | None = self.table(part, like)
      if table is None:
        table = self.embedder(part)(params()).astype(loaded.embeddings.dtype)
        embedded += len(part.corpus.passages)
      tables.append(table)
    if embedded:
      log.info(
          '%d added passages were embedded by the parameters of step %d, in '
          'memory; the next `realm-jax index add`, `update`, `delete` or '
          '`compact` saves the embeddings.',
          embedded, step,
      )
    table = corpus_lib.Chained(tables)
    return Index(loaded, table, self.removed, embedded)

  def table(
      self, part: Part, like: dict[str, Any]
  ) -> corpus_lib.Chained | None:
    """Returns the saved embeddings of `has_table`, if they are not damaged."""
    if not self.has_table(part, like):
      return None
    path, expected = part.index / str(like['step']), self.lineage(part)
    try:
      return generation_lib.load(path, expected).embeddings
    except (FileNotFoundError, ValueError) as error:
      log.warning('Not used: %s', error)
      return None

  def has_table(self, part: Part, like: dict[str, Any]) -> bool:
    """Whether a part has embeddings made like those with a manifest."""
    try:
      found = generation_lib.read_manifest(part.index / str(like['step']))
    except (FileNotFoundError, files.Damaged):
      return False
    return all(found[name] == like[name] for name in ('params_digest', 'dtype'))

  def lineage(
      self,
      part: Part,
      step: int | None = None,
      params_digest: str | None = None,
  ) -> generation_lib.Lineage:
    """Returns the lineage of a generation of a part; None: any."""
    width = self.config.model.embedding_width
    return generation_lib.Lineage.of(part.corpus, width, step, params_digest)

  def embedder(self, part: Part) -> embedding.PassageEmbedder:
    return embedding.PassageEmbedder(
        self.component,
        part.corpus.passages,
        part.corpus.tokenizer,
        self.config.lengths.document,
        mesh_lib.make_mesh(config_lib.MeshConfig()),
    )

  def load_params(self, like: dict[str, Any]) -> components.Params:
    """Loads the parameters of a generation from a snapshot or checkpoint.

    Raises:
      ValueError: they are in none; names the digests found.
    """
    workdir, step, digest = self.workdir, like['step'], like['params_digest']
    name, abstract = self.component.name, self.component.abstract
    seen = {}

    def nearest(steps: list[int]) -> list[int]:
      return sorted(steps, key=lambda one: (one != step, -one))

    for one in nearest(checkpoint.snapshot_steps(workdir)):
      try:
        seen[f'snapshot {one}'] = checkpoint.snapshot_digest(workdir, one)
        if seen[f'snapshot {one}'] == digest:
          return checkpoint.load_snapshot(workdir, one, abstract)[0]
      except FileNotFoundError:  # Just deleted by a trainer.
        continue
    for one in nearest(checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS)):
      params = checkpoint.load_params(workdir, {name: abstract}, one)[0][name]
      seen[f'checkpoint {one}'] = checkpoint.params_digest(params)
      if seen[f'checkpoint {one}'] == digest:
        return params
    found = ', '.join(f'{where}: {d[:16]}' for where, d in seen.items())
    raise ValueError(
        f'The index of step {step} was made from the parameters {digest[:16]}, '
        f'which are no longer in {workdir} ({found or "nothing"}), so that no '
        'document can be embedded to join it. Build an index of the newest '
        f'snapshot: `realm-jax index --workdir={workdir}`.'
    )


@dataclasses.dataclass(frozen=True)
class Index:
  """The embeddings of all documents, made from the same parameters.

  generation: of the first part.
  table: all rows, the removed ones included.
  removed: as of `Documents`.
  embedded: rows that had no saved embeddings.
  """

  generation: generation_lib.Generation
  table: corpus_lib.Rows
  removed: np.ndarray
  embedded: int = 0

  @functools.cached_property
  def live_rows(self) -> np.ndarray:
    """int64: the rows that are not removed."""
    return np.delete(np.arange(self.table.shape[0]), self.removed)

  def make_search(
      self, config: config_lib.MipsConfig, mesh: jax.sharding.Mesh | None = None
  ) -> search.Search:
    """Returns the backend of `config` over the rows that are not removed.

    A saved index of the first part stays in use; the rows added since are
    searched exactly.
    """
    base, removed = self.generation.embeddings, self.removed
    rows, total = len(base), self.table.shape[0]
    if rows == total:
      return self.generation.make_search(config, mesh, removed)
    if search.backend(config).folder is None:
      return search.make_search(config, self.table, mesh, removed=removed)
    split = np.searchsorted(removed, rows)
    first = self.generation.make_search(config, mesh, removed[:split])
    rest = search.ExactSearch(
        self.table[rows:total], removed=removed[split:] - rows
    )
    return search.MergedSearch((first, rest), self.table, removed)


def open_corpus(
    workdir: Path,
    config: config_lib.Config,
    corpus: Path | None = None,
    another: bool = False,
) -> corpus_lib.Corpus:
  """Opens the corpus that a workdir was trained on.

  The arguments and errors are those of `Documents.open`.
  """
  workdir = pathlib.Path(workdir)
  if corpus is not None:
    opened = corpus_lib.Corpus.open(corpus)
    if not another and not _is_of_training(workdir, opened):
      raise ValueError(
          f'--corpus={corpus} is not the corpus of {workdir}: its fingerprint'
          f' is {opened.fingerprint[:16]}, that of the training was'
          f' {_trained_on(workdir)[:16]}. Give the new folder of that corpus.'
      )
    return opened
  if not config.corpus:
    raise ValueError(
        f'{workdir} has no corpus: its config names none. Give --corpus=FOLDER.'
    )
  path = pathlib.Path(config.corpus)
  if not path.is_dir() and (workdir / 'corpus').is_dir():
    path = workdir / 'corpus'  # An imported workdir has moved.
  return corpus_lib.Corpus.open(path, '--corpus')


def _trained_on(workdir: pathlib.Path) -> str:
  """Returns the fingerprint of the corpus of a workdir; '': unknown."""
  origin = read_manifest(workdir / DIRECTORY)['origin']
  steps = checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS)
  if steps and not origin:
    about = checkpoint.saved_about(workdir, steps[-1])
    origin = about.get('corpus_fingerprint')
  return origin or ''


def _is_of_training(workdir: pathlib.Path, corpus: corpus_lib.Corpus) -> bool:
  return _trained_on(workdir) in ('', corpus.fingerprint)


def find(
    index: pathlib.Path,
    fingerprint: str | None = None,
    params_digest: str | None = None,
) -> dict[str, Any] | None:
  """Returns the manifest of the newest generation in a folder.

  It has the given fingerprint of the corpus and digest of the parameters, where
  these are not None.
  """
  for step in reversed(checkpoint.steps_in(index)):
    try:
      found = generation_lib.read_manifest(index / str(step))
    except FileNotFoundError:  # Just deleted by the index builder.
      continue
    if fingerprint in (None, found['corpus_fingerprint']) and (
        params_digest in (None, found['params_digest'])
    ):
      return found
  return None


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """Reads the manifest of documents/, or that of version 0 if there is none.

  Raises:
    ValueError: it is damaged or of a newer format.
  """
  mend = f'Remove {folder} and add its documents again.'
  try:
    return files.read_manifest(folder / MANIFEST, FORMAT_VERSION, mend)
  except FileNotFoundError:
    return _UNCHANGED


def _read_removed(
    folder: pathlib.Path, record: dict[str, Any] | None
) -> np.ndarray:
  if record is None:
    return np.zeros(0, np.int64)
  path = folder / record['file']
  if not path.is_file():
    raise FileNotFoundError(f'{folder} lacks the file {record["file"]}.')
  found = files.sha256(path)
  if found != record['sha256']:
    raise ValueError(
        f'{path} is damaged: its SHA-256 is {found}, {MANIFEST} says '
        f'{record["sha256"]}.'
    )
  return np.load(path, allow_pickle=False)
