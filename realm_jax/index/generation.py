"""A generation of the index on disk: embeddings, ScaNN assets, lineage.

Public: `Lineage`, `Writer`, `publish`, `load`, `read_manifest`, `Generation`,
`Table`, `remove`, `remove_leftovers`, `mark_in_use`, `in_use`, `Damaged`. A
generation is written beside its final name, its manifest last, and then
renamed: what can be listed under its step is whole.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
from typing import Any
import uuid

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import mips
from realm_jax.runtime import checkpoint

FORMAT_VERSION = 1
DIRECTORY = 'index'  # In a workdir.
ROWS_PER_SHARD = 2**16
_MANIFEST = 'manifest.json'
_SCANN = 'scann'
_IN_USE = 'in_use.json'
_TEMPORARY = '.tmp-'
# The recall of an approximate backend is measured on as many documents in the
# place of queries, and on the paper's number of candidates.
_RECALL_QUERIES, _RECALL_K = 256, 8

Path = pathlib.Path | str


class Damaged(ValueError):
  """Bytes on disk are not those that were written."""


@dataclasses.dataclass(frozen=True)
class Lineage:
  """What a generation was made from. None, in an expectation: anything."""

  step: int | None  # Of the snapshot.
  params_digest: str | None  # Of the embedder's parameters.
  tokenizer_digest: str | None
  corpus_fingerprint: str | None
  num_rows: int | None
  width: int | None  # E.

  def differences(self, expected: 'Lineage') -> list[str]:
    """Says in which fields this is not what was expected, with both sides."""
    return [
        f'{field.name}: {getattr(self, field.name)!r} in the index, '
        f'{getattr(expected, field.name)!r} expected'
        for field in dataclasses.fields(self)
        if getattr(expected, field.name)
        not in (None, getattr(self, field.name))
    ]


class Table:
  """The rows of several memory-mapped shards as one matrix, read on demand."""

  def __init__(self, shards: list[np.ndarray]):
    self._shards = shards
    self._starts = np.cumsum([0] + [len(shard) for shard in shards])
    self.shape = (int(self._starts[-1]), shards[0].shape[1])
    self.dtype = shards[0].dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Returns a range of rows (of step 1), or those in an array of numbers."""
    if isinstance(rows, slice):
      start, limit, step = rows.indices(len(self))
      if step != 1:
        raise ValueError(f'{rows}: a table gives ranges of step 1 only.')
      parts = [
          shard[max(start - first, 0) : max(limit - first, 0)]
          for first, shard in zip(self._starts, self._shards, strict=False)
          if first < limit and first + len(shard) > start
      ]
      if len(parts) == 1:
        return parts[0]
      empty = np.empty((0, self.shape[1]), self.dtype)
      return np.concatenate(parts or [empty])
    rows = np.asarray(rows)
    found = np.empty((len(rows), self.shape[1]), self.dtype)
    owners = np.searchsorted(self._starts, rows, side='right') - 1
    for owner in np.unique(owners):
      mine = owners == owner
      found[mine] = self._shards[owner][rows[mine] - self._starts[owner]]
    return found


@dataclasses.dataclass(frozen=True)
class Generation:
  """A generation that was found whole and as expected."""

  path: pathlib.Path
  lineage: Lineage
  manifest: dict[str, Any]
  embeddings: Table

  def make_search(
      self, config: config_lib.MipsConfig, mesh: jax.sharding.Mesh | None
  ) -> mips.Search:
    """Returns the backend of `config` over this generation.

    A saved ScaNN index serves if it has the same settings; else one is built.
    """
    saved = self.path / _SCANN
    same = self.manifest['mips'] == _settings(config, len(self.embeddings))
    return mips.make_search(
        config,
        self.embeddings,
        mesh,
        saved if same and saved.is_dir() else None,
    )


class Writer:
  """Writes one generation; a context that leaves nothing half-done behind."""

  def __init__(self, directory: Path, lineage: Lineage, dtype: str = 'float32'):
    """Prepares to write `directory`/<step>; `dtype` is that of the table."""
    self._directory = pathlib.Path(directory)
    self._lineage = lineage
    self._dtype = dtype
    self._temporary = self._directory / (
        f'{_TEMPORARY}{lineage.step}-{os.getpid()}-{uuid.uuid4().hex[:8]}'
    )
    self._files: list[dict[str, Any]] = []
    self._about: dict[str, Any] = {}
    self._started = time.time()

  def __enter__(self) -> 'Writer':
    self._temporary.mkdir(parents=True)
    return self

  def __exit__(self, *exc: object) -> None:
    shutil.rmtree(self._temporary, ignore_errors=True)

  @property
  def recall(self) -> float | None:
    """Of the backend against exact search; None where it is exact itself."""
    measured = self._about.get('recall')
    return measured['value'] if measured else None

  def add(self, embeddings_NE: np.ndarray) -> None:
    """Writes the next rows as a shard.

    Raises:
      ValueError: if they are not finite or of another width.
      OSError: if the disk is full.
    """
    if embeddings_NE.shape[1] != self._lineage.width:
      raise ValueError(
          f'Embeddings of width {embeddings_NE.shape[1]}; the lineage says '
          f'{self._lineage.width}.'
      )
    finite = np.isfinite(embeddings_NE).all(axis=1)
    if not finite.all():
      row = sum(file['rows'] for file in self._files) + int(np.argmin(finite))
      raise ValueError(
          f'The embedding of document {row} by the snapshot of step '
          f'{self._lineage.step} is not finite.'
      )
    name = f'shard-{len(self._files):05d}.npy'
    array = embeddings_NE.astype(jnp.dtype(self._dtype))
    if self._dtype == 'bfloat16':  # Unknown to the .npy format.
      array = array.view(np.uint16)
    with open(self._temporary / name, 'xb') as file:
      np.save(file, array, allow_pickle=False)
      file.flush()
      os.fsync(file.fileno())
    self._files.append({**_facts(self._temporary, name), 'rows': len(array)})

  def add_backend(
      self,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None = None,
  ) -> None:
    """Builds what the backend needs over all rows, and measures its recall.

    Raises:
      ValueError: if rows are missing, or a setting of the backend is wrong.
      OSError: if the disk is full.
    """
    rows = sum(file['rows'] for file in self._files)
    if rows != self._lineage.num_rows:
      raise ValueError(
          f'{rows} embeddings were written; the lineage says '
          f'{self._lineage.num_rows}.'
      )
    self._about = {
        'dtype': self._dtype,
        'mips': _settings(config, rows),
        'num_shards': len(self._files),
        'recall': None,  # By definition 1 where the search is exact.
    }
    if config.backend == 'exact':
      return
    table = _open_table(self._temporary, self._files, self._dtype)
    search = mips.make_search(config, table, mesh)
    self._about['recall'] = _measure(search, table, mesh)
    if isinstance(search, mips.ScannSearch):
      (self._temporary / _SCANN).mkdir()
      search.save(self._temporary / _SCANN)
      self._files += [
          _facts(self._temporary, f'{_SCANN}/{name}')
          for name in sorted(os.listdir(self._temporary / _SCANN))
      ]

  def publish(self) -> pathlib.Path:
    """Writes the manifest and gives the generation its name.

    Returns:
      The path of the generation. One of the same step is replaced.

    Raises:
      OSError: if the disk is full.
    """
    now = time.time()
    manifest = {
        'format_version': FORMAT_VERSION,
        **dataclasses.asdict(self._lineage),
        **self._about,
        'files': self._files,
        'seconds': now - self._started,
        'created': now,
    }
    manifest['manifest_sha256'] = _manifest_digest(manifest)
    with open(self._temporary / _MANIFEST, 'x', encoding='utf-8') as file:
      json.dump(manifest, file, indent=1)
      file.flush()
      os.fsync(file.fileno())
    path = self._directory / str(self._lineage.step)
    remove(path)
    os.rename(self._temporary, path)
    descriptor = os.open(self._directory, os.O_RDONLY)
    try:
      os.fsync(descriptor)  # The rename itself.
    finally:
      os.close(descriptor)
    return path


def publish(
    directory: Path,
    lineage: Lineage,
    embeddings_NE: np.ndarray,
    config: config_lib.MipsConfig,
    mesh: jax.sharding.Mesh | None = None,
) -> pathlib.Path:
  """Writes embeddings that are in memory as `directory`/<step>."""
  with Writer(directory, lineage, config.dtype) as writer:
    for start in range(0, len(embeddings_NE), ROWS_PER_SHARD):
      writer.add(embeddings_NE[start : start + ROWS_PER_SHARD])
    writer.add_backend(config, mesh)
    return writer.publish()


def load(path: Path, expected: Lineage | None = None) -> Generation:
  """Opens a generation; every byte is read and checked.

  Args:
    path: `index/<step>` of a workdir.
    expected: what the running job needs it to be made from.

  Raises:
    FileNotFoundError: if there is none.
    Damaged: if a file is missing or not what was written.
    ValueError: if it is of a newer format or made from something else; the
      message names both sides.
  """
  path = pathlib.Path(path)
  manifest = read_manifest(path)
  lineage = Lineage(
      *(manifest[field.name] for field in dataclasses.fields(Lineage))
  )
  if expected is not None:
    differences = lineage.differences(expected)
    if differences:
      raise ValueError(
          f'The index generation {path} does not belong to this job:\n  '
          + '\n  '.join(differences)
      )
  for facts in manifest['files']:
    file = path / facts['name']
    if not file.is_file():
      raise Damaged(
          f'The index generation {path} lacks the file {facts["name"]}. '
          + _remedy(path)
      )
    found = _facts(path, facts['name'])
    for what in ('bytes', 'sha256'):
      if found[what] != facts[what]:
        raise Damaged(
            f'The index generation {path} is damaged: {facts["name"]} has '
            f'{what} {found[what]}, its manifest says {facts[what]}. '
            + _remedy(path)
        )
  embeddings = _open_table(
      path, manifest['files'][: manifest['num_shards']], manifest['dtype']
  )
  if embeddings.shape != (lineage.num_rows, lineage.width):
    raise Damaged(
        f'The index generation {path} has embeddings of shape '
        f'{embeddings.shape}, its manifest says '
        f'{(lineage.num_rows, lineage.width)}. ' + _remedy(path)
    )
  return Generation(path, lineage, manifest, embeddings)


def read_manifest(path: Path) -> dict[str, Any]:
  """Reads and checks the manifest of a generation, but none of its arrays.

  Raises:
    FileNotFoundError: if there is no such generation.
    Damaged: if it is not what was written.
    ValueError: if it is of a newer format.
  """
  path = pathlib.Path(path)
  try:
    text = (path / _MANIFEST).read_text(encoding='utf-8', errors='replace')
  except FileNotFoundError as error:
    raise FileNotFoundError(
        f'There is no index generation {path}. ' + _remedy(path)
    ) from error
  try:
    manifest = json.loads(text)
    version, digest = manifest['format_version'], manifest['manifest_sha256']
  except (ValueError, KeyError, TypeError) as error:
    raise Damaged(f'{path}/{_MANIFEST} is damaged. ' + _remedy(path)) from error
  if isinstance(version, int) and version > FORMAT_VERSION:
    raise ValueError(
        f'{path} has index format {version}, from a newer realm_jax; this one '
        f'reads format {FORMAT_VERSION}. Install the newer version, or build '
        'the index again.'
    )
  found = _manifest_digest(manifest)
  if found != digest:
    raise Damaged(
        f'{path}/{_MANIFEST} is damaged: its SHA-256 is {found}, it says '
        f'{digest}. ' + _remedy(path)
    )
  return manifest


def remove(path: Path) -> None:
  """Deletes a generation; nobody ever sees half of it."""
  path = pathlib.Path(path)
  aside = path.with_name(f'{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}')
  try:
    os.rename(path, aside)
  except FileNotFoundError:
    return
  shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(directory: Path) -> list[str]:
  """Deletes what builders that were killed left behind; returns the names.

  Only the holder of the builder's lock may call this.
  """
  directory = pathlib.Path(directory)
  names = [n for n in os.listdir(directory) if n.startswith(_TEMPORARY)]
  for name in names:
    shutil.rmtree(directory / name, ignore_errors=True)
  return names


def mark_in_use(directory: Path, steps: list[int]) -> None:
  """Asks the builder, which deletes old generations, to keep these."""
  checkpoint.write_json(pathlib.Path(directory) / _IN_USE, {'steps': steps})


def in_use(directory: Path) -> set[int]:
  """The generations that the trainer asked to keep."""
  try:
    return set(checkpoint.read_json(pathlib.Path(directory) / _IN_USE)['steps'])
  except FileNotFoundError:
    return set()


def _settings(config: config_lib.MipsConfig, num_rows: int) -> dict[str, Any]:
  """What of the config shapes the saved backend, defaults filled in."""
  settings: dict[str, Any] = {'backend': config.backend}
  if config.backend == 'approx':
    settings['recall_target'] = config.recall_target
  if config.backend == 'scann':
    leaves, to_search, reorder = mips.scann_settings(config, num_rows)
    settings |= {
        'num_leaves': leaves,
        'leaves_to_search': to_search,
        'reorder': reorder,
    }
  return settings


def _measure(
    search: mips.Search, table: Table, mesh: jax.sharding.Mesh | None
) -> dict[str, Any]:
  count = min(_RECALL_QUERIES, len(table))
  rows = np.linspace(0, len(table) - 1, count).astype(np.int64)
  queries = table[rows].astype(np.float32)
  k = min(_RECALL_K, len(table))
  exact_BK = mips.exact_rows(table, queries, k, mesh)
  value = mips.overlap(search.search(queries, k), exact_BK)
  return {'value': value, 'k': k, 'queries': count}


def _open_table(
    directory: pathlib.Path, files: list[dict[str, Any]], dtype: str
) -> Table:
  shards = []
  for facts in files:
    path = directory / facts['name']
    shard = np.load(path, mmap_mode='r', allow_pickle=False)
    if dtype == 'bfloat16':
      shard = shard.view(jnp.bfloat16)
    shards.append(shard)
  return Table(shards)


def _facts(directory: pathlib.Path, name: str) -> dict[str, Any]:
  with open(directory / name, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'name': name, 'bytes': file.tell(), 'sha256': digest}


def _manifest_digest(manifest: dict[str, Any]) -> str:
  rest = {k: v for k, v in manifest.items() if k != 'manifest_sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _remedy(path: pathlib.Path) -> str:
  workdir = path.parent.parent
  return (
      f'Build it from its snapshot: `realm-jax index --workdir={workdir} '
      f'--step={path.name}`.'
  )
