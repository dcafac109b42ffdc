"""A generation of the index on disk: embeddings, saved search, lineage.

A generation is written under a temporary name, its manifest last, and then
renamed, so a generation that is listed under its step is complete.
"""

from collections.abc import Iterator
import dataclasses
import os
import pathlib
import shutil
import time
from typing import Any
import uuid

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import search as search_lib
from realm_jax.index import shards
from realm_jax.runtime import files as files_lib

FORMAT_VERSION = 1
DIRECTORY = 'index'  # Folder of a workdir.
ROWS_PER_SHARD = 2**16
MANIFEST = 'manifest.json'
_IN_USE = 'in_use.json'
BUILDING = '.building-'  # Prefix of an unfinished build that can be resumed.
# Recall is measured on documents as queries, with the paper's k.
_RECALL_QUERIES, _RECALL_K = 256, 8

Path = pathlib.Path | str


@dataclasses.dataclass(frozen=True)
class Lineage:
  """The inputs of a generation. In an expectation, None matches all."""

  step: int | None = None  # Step of the snapshot.
  params_digest: str | None = None  # Digest of the embedder's parameters.
  tokenizer_digest: str | None = None
  corpus_fingerprint: str | None = None
  num_rows: int | None = None
  width: int | None = None  # E.

  @classmethod
  def of(
      cls,
      corpus: corpus_lib.Corpus,
      width: int,
      step: int | None = None,
      params_digest: str | None = None,
  ) -> 'Lineage':
    """Returns the lineage of an index of a whole corpus."""
    return cls(
        step, params_digest, corpus.tokenizer.digest, corpus.fingerprint,
        len(corpus.passages), width,
    )

  def differences(self, expected: 'Lineage') -> list[str]:
    """Lists the fields that differ from an expectation, with both values."""
    return [
        f'{field.name}: {getattr(self, field.name)!r} in the index, '
        f'{getattr(expected, field.name)!r} expected'
        for field in dataclasses.fields(self)
        if getattr(expected, field.name)
        not in (None, getattr(self, field.name))
    ]


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation that was read and checked."""

  path: pathlib.Path
  lineage: Lineage
  manifest: dict[str, Any]
  embeddings: corpus_lib.Chained

  def make_search(
      self,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None = None,
  ) -> search_lib.Search:
    """Returns the backend of `config` over this generation.

    The saved index is used if it has the backend and settings of `config`; else
    an index is built. Rows in `removed`, sorted int64, are never found.
    """
    backend = search_lib.backend(config)
    ours = _settings(config, len(self.embeddings))
    saved = None if backend.folder is None else self.path / backend.folder
    if saved is None or not saved.is_dir() or any(
        self.manifest['mips'].get(name) != ours.get(name)
        for name in ('backend', *backend.saved_settings)
    ):
      saved = None
    return search_lib.make_search(config, self.embeddings, mesh, saved, removed)


class Writer:
  """Writes one generation, as a context that leaves no unfinished files.

  On a full disk, its methods raise `shards.NoRoom`.
  """

  def __init__(
      self,
      directory: Path,
      lineage: Lineage,
      dtype: str = 'float32',
      *,
      shard_rows: int | None = None,
      resume: dict[str, Any] | None = None,
      main: bool = True,
  ):
    """Prepares to write `directory`/<step>.

    Args:
      directory: `index` of a workdir.
      lineage: what the generation is made from.
      dtype: type of the table.
      shard_rows: rows of each shard but the last; default: ROWS_PER_SHARD.
      resume: (JSON) what the shards depend on besides the lineage. An
        interrupted build then stays on disk and is resumed by the next one with
        the same lineage and `resume`; the caller must hold the builder's lock.
        None: an interrupted build is deleted.
      main: whether this process begins and publishes the generation; other
        processes only add shards.
    """
    assert lineage.step is not None and lineage.num_rows is not None
    self._directory = pathlib.Path(directory)
    self.step, self._num_rows = lineage.step, lineage.num_rows
    self._lineage, self._dtype = lineage, dtype
    self._shard_rows = shard_rows or ROWS_PER_SHARD
    self._resume, self._main = resume, main
    name = f'{BUILDING}{self.step}'
    if resume is None:
      unique = f'{os.getpid()}-{uuid.uuid4().hex[:8]}'
      name = f'{files_lib.TEMPORARY}{self.step}-{unique}'
    self._folder = shards.ShardFolder(self._directory / name, dtype)
    self._record: dict[str, Any] = {}
    self._started = 0.0

  def __enter__(self) -> 'Writer':
    self.begin()
    return self

  def __exit__(self, *exc: object) -> None:
    if self._resume is None:
      self.discard()

  def begin(self) -> list[int]:
    """Creates the folder, or resumes an unfinished build.

    Returns:
      Numbers of the missing shards; [] in a process that is not the main one.
    """
    if not self._main:
      return []
    self._started = self._folder.begin(
        {
            'format_version': FORMAT_VERSION,
            **dataclasses.asdict(self._lineage),
            'dtype': self._dtype,
            'shard_rows': self._shard_rows,
            'resume': self._resume,
        }
    )
    count = -(-self._num_rows // self._shard_rows)
    return sorted({*range(count)} - {*self._folder.records()})

  @property
  def recall(self) -> float | None:
    """Measured recall of the backend; None for an exact backend."""
    measured = self._record.get('recall')
    return measured['value'] if measured else None

  def rows(self, shard: int) -> range:
    """The rows of a shard."""
    start = shard * self._shard_rows
    return range(start, min(start + self._shard_rows, self._num_rows))

  def add(self, embeddings_NE: np.ndarray, shard: int | None = None) -> None:
    """Writes rows as a shard, by default as the next one.

    Raises:
      ValueError: the rows are not finite or of another width.
    """
    if embeddings_NE.shape[1] != self._lineage.width:
      raise ValueError(
          f'Embeddings of width {embeddings_NE.shape[1]}; the lineage says '
          f'{self._lineage.width}.'
      )
    if shard is None:
      shard = len(self._folder.records())
    finite = np.isfinite(embeddings_NE).all(axis=1)
    if not finite.all():
      row = shard * self._shard_rows + int(np.argmin(finite))
      raise ValueError(
          f'The embedding of document {row} by the snapshot of step '
          f'{self.step} is not finite.'
      )
    self._folder.write(shard, embeddings_NE)

  def add_backend(
      self, config: config_lib.MipsConfig, mesh: jax.sharding.Mesh | None = None
  ) -> None:
    """Builds and saves the search over all rows, and measures its recall.

    Raises:
      ValueError: rows are missing, or a setting of the backend is wrong.
    """
    path = self._folder.path
    files = [*self._folder.records().values()]
    table = shards.open_table(path, files, self._dtype) if files else None
    if table is None or len(table) != self._num_rows:
      raise ValueError(
          f'{0 if table is None else len(table)} embeddings were written; the'
          f' lineage says {self._num_rows}.'
      )
    self._record = {
        'dtype': self._dtype,
        'mips': _settings(config, self._num_rows),
        'num_shards': len(files),
        'recall': None,  # 1 by definition for an exact backend.
        'files': files,
    }
    backend = search_lib.backend(config)
    if backend.exact and backend.folder is None:
      return
    with shards.writing(path / (backend.folder or '')):
      search = search_lib.make_search(config, table, mesh)
      if not backend.exact:
        self._record['recall'] = _measure(search, table, mesh)
      if backend.folder is not None:
        folder = path / backend.folder
        folder.mkdir()
        search.save(folder)
        files += [
            shards.file_record(path, f'{backend.folder}/{name}')
            for name in sorted(os.listdir(folder))
        ]

  def publish(self) -> pathlib.Path:
    """Writes the manifest and renames the folder to its step.

    An older generation of the same step is replaced.
    """
    now = time.time()
    manifest = {
        'format_version': FORMAT_VERSION,
        **dataclasses.asdict(self._lineage),
        **self._record,
        'seconds': now - self._started,
        'created': now,
    }
    manifest['manifest_sha256'] = files_lib.manifest_digest(manifest)
    with shards.writing(self._folder.path / MANIFEST):
      files_lib.write_json(self._folder.path / MANIFEST, manifest)
    path = self._directory / str(self.step)
    files_lib.remove(path)
    os.rename(self._folder.path, path)
    descriptor = os.open(self._directory, os.O_RDONLY)
    try:
      os.fsync(descriptor)  # Makes the rename durable.
    finally:
      os.close(descriptor)
    shutil.rmtree(path / shards.RECORDS, ignore_errors=True)
    return path

  def discard(self) -> None:
    """Deletes the unpublished files."""
    if self._main:
      shutil.rmtree(self._folder.path, ignore_errors=True)


def load(path: Path, expected: Lineage | None = None) -> Generation:
  """Opens a generation; every byte is read and checked.

  `expected` is the lineage that the running job needs.

  Raises:
    FileNotFoundError: the generation does not exist.
    files.Damaged: a file is missing or differs from what was written.
    ValueError: the generation has a newer format or another lineage; the
      message names both sides.
  """
  path = pathlib.Path(path)
  manifest = read_manifest(path)
  lineage = lineage_of(manifest)
  if expected is not None:
    differences = lineage.differences(expected)
    if differences:
      raise ValueError(
          f'The index generation {path} does not belong to this job:\n  '
          + '\n  '.join(differences)
      )
  for problem in problems(path, manifest):
    raise files_lib.Damaged(
        f'The index generation {path} is damaged: {problem}. {_remedy(path)}'
    )
  return Generation(path, lineage, manifest, _table(path, manifest))


def lineage_of(manifest: dict[str, Any]) -> Lineage:
  """Returns the lineage that a manifest records."""
  return Lineage(
      *(manifest[field.name] for field in dataclasses.fields(Lineage))
  )


def problems(path: pathlib.Path, manifest: dict[str, Any]) -> Iterator[str]:
  """Yields the differences between a generation's files and its manifest."""
  found = [*shards.problems(path, manifest['files'])]
  yield from found
  expected = (manifest['num_rows'], manifest['width'])
  if not found and (shape := _table(path, manifest).shape) != expected:
    yield f'its embeddings are {shape}, its manifest says {expected}'


def read_manifest(path: Path) -> dict[str, Any]:
  """Reads and checks the manifest of a generation, but none of its arrays.

  Raises:
    FileNotFoundError: the generation does not exist.
    files.Damaged, ValueError: see `files.read_manifest`.
  """
  path = pathlib.Path(path)
  try:
    return files_lib.read_manifest(
        path / MANIFEST, FORMAT_VERSION, _remedy(path)
    )
  except FileNotFoundError as error:
    raise FileNotFoundError(
        f'There is no index generation {path}. {_remedy(path)}'
    ) from error


def remove_leftovers(directory: Path, resume: int | None = None) -> list[str]:
  """Deletes the unfinished files of killed builders; returns their names.

  Only the holder of the builder's lock may call this. An unfinished build of
  the step `resume` is kept.
  """
  directory = pathlib.Path(directory)
  names = [
      name
      for name in os.listdir(directory)
      if name.startswith((files_lib.TEMPORARY, BUILDING))
      and name != f'{BUILDING}{resume}'
  ]
  for name in names:
    shutil.rmtree(directory / name, ignore_errors=True)
  return names


def mark_in_use(directory: Path, steps: list[int]) -> None:
  """Asks the builder to keep these generations."""
  files_lib.write_json(pathlib.Path(directory) / _IN_USE, {'steps': steps})


def in_use(directory: Path) -> set[int]:
  """Returns the generations that the trainer asked to keep."""
  try:
    return set(files_lib.read_json(pathlib.Path(directory) / _IN_USE)['steps'])
  except FileNotFoundError:
    return set()


def _settings(config: config_lib.MipsConfig, num_rows: int) -> dict[str, Any]:
  backend = search_lib.backend(config)
  return {'backend': config.backend, **backend.settings(config, num_rows)}


def _measure(
    search: search_lib.Search,
    table: corpus_lib.Chained,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, Any]:
  count = min(_RECALL_QUERIES, len(table))
  rows = np.linspace(0, len(table) - 1, count).astype(np.int64)
  queries = table[rows].astype(np.float32)
  k = min(_RECALL_K, len(table))
  exact = search_lib.StreamedSearch(table, mesh)
  found_BK, exact_BK = search.search(queries, k), exact.search(queries, k)
  value = search_lib.overlap(found_BK, exact_BK)
  return {'value': value, 'k': k, 'queries': count}


def _table(path: pathlib.Path, manifest: dict[str, Any]) -> corpus_lib.Chained:
  files = manifest['files'][: manifest['num_shards']]
  return shards.open_table(path, files, manifest['dtype'])


def _remedy(path: pathlib.Path) -> str:
  workdir = path.parent.parent
  return (
      f'Build it from its snapshot: `realm-jax index --workdir={workdir} '
      f'--step={path.name}`.'
  )
