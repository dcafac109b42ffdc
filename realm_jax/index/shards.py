"""Rows of a matrix in files: written one by one, checked, read as one table.

Public: `ShardFolder`, `begun`, `open_table`, `facts`, `problems`, `writing`,
`NoRoom`, `RECORDS`. A shard counts once its record, with its
checksum, is there; so what a killed process leaves behind can be told from what
it had finished.
"""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from realm_jax.corpus import concatenated
from realm_jax.runtime import files as files_lib

RECORDS = 'records'  # A folder, deleted once all shards are there.
_BEGUN = f'{RECORDS}/begun.json'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(OSError):
  """The disk, a quota or a limit of the file size is exhausted."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Makes a full disk an error that names the file, as a context."""
  try:
    yield
  except OSError as error:
    if error.errno not in _FULL:
      raise
    try:
      free = f'{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free.'
    except OSError:
      free = 'Its folder is gone.'
    raise NoRoom(
        error.errno, f'No room to write {path}: {error.strerror}; {free}'
    ) from error


class ShardFolder:
  """Shards as they are finished, in any order and by several processes."""

  def __init__(self, path: pathlib.Path, dtype: str):
    """Will write `path`/shard-*.npy in `dtype`, float32 or bfloat16."""
    self.path, self._dtype = path, dtype

  def begin(self, made_from: dict[str, Any]) -> float:
    """Makes the folder, or goes on with one that was made from the same.

    What is not whole, or from something else, is deleted.

    Args:
      made_from: JSON.

    Returns:
      When it was begun, in seconds of the epoch.

    Raises:
      NoRoom: if the disk is full.
    """
    try:
      begun = files_lib.read_json(self.path / _BEGUN)
    except (FileNotFoundError, ValueError):
      begun = {}
    if begun.get('made_from') != made_from:
      begun = {'made_from': made_from, 'started': time.time()}
      shutil.rmtree(self.path, ignore_errors=True)
      with writing(self.path):
        (self.path / RECORDS).mkdir(parents=True)
        files_lib.write_json(self.path / _BEGUN, begun)
    keep = {RECORDS}
    for number, record in self.records().items():
      if any(problems(self.path, [record])):
        self._record(number).unlink()
      else:
        keep.add(record['name'])
    for entry in [*self.path.iterdir()]:
      if entry.name not in keep:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return begun['started']

  def records(self) -> dict[int, dict[str, Any]]:
    """Returns the facts of each finished shard, by its number, in order."""
    found = {}
    for path in sorted((self.path / RECORDS).glob('[0-9]*.json')):
      with contextlib.suppress(ValueError):
        record = files_lib.read_json(path)
        if {*record} == {'name', 'bytes', 'sha256'}:
          found[int(path.stem)] = record
    return found

  def write(self, number: int, rows_NE: np.ndarray) -> None:
    """Writes a shard, whole and on disk when this returns.

    Raises:
      NoRoom: if the disk is full; nothing of the shard is left.
    """
    path = self.path / f'shard-{number:05d}.npy'
    array = np.ascontiguousarray(rows_NE.astype(jnp.dtype(self._dtype)))
    if self._dtype == 'bfloat16':  # Unknown to the .npy format.
      array = array.view(np.uint16)
    with writing(path):
      try:
        with open(path, 'wb') as file:
          # Not np.save, whose error on a full disk does not say so.
          header = np.lib.format.header_data_from_array_1_0(array)
          np.lib.format.write_array_header_1_0(file, header)
          file.write(array.data)
          file.flush()
          os.fsync(file.fileno())
        files_lib.write_json(
            self._record(number), facts(self.path, path.name)
        )
      except OSError:
        path.unlink(missing_ok=True)
        raise

  def _record(self, number: int) -> pathlib.Path:
    return self.path / RECORDS / f'{number:05d}.json'


def begun(path: pathlib.Path) -> dict[str, Any] | None:
  """What a folder was begun with, and when: made_from, started; or None."""
  try:
    return files_lib.read_json(path / _BEGUN)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None


def open_table(
    directory: pathlib.Path, files: list[dict[str, Any]], dtype: str
) -> concatenated.Chained:
  """Maps shards into memory, in the order given."""
  shards = []
  for one in files:
    path = directory / one['name']
    shard = np.load(path, mmap_mode='r', allow_pickle=False)
    if dtype == 'bfloat16':
      shard = shard.view(jnp.bfloat16)
    shards.append(shard)
  return concatenated.Chained(shards)


def facts(directory: pathlib.Path, name: str) -> dict[str, Any]:
  """Name, size and checksum of a file."""
  with open(directory / name, 'rb') as file:
    digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return {'name': name, 'bytes': file.tell(), 'sha256': digest}


def problems(
    directory: pathlib.Path, files: Iterable[dict[str, Any]]
) -> Iterator[str]:
  """Yields how files differ from what was recorded of them, one line each."""
  for expected in files:
    name = expected['name']
    if not (directory / name).is_file():
      yield f'the file {name} is not there'
      continue
    found = facts(directory, name)
    for what in ('bytes', 'sha256'):
      if found[what] != expected[what]:
        yield (
            f'{name} has {what} {found[what]}, its manifest says '
            f'{expected[what]}'
        )
        break
