"""Shards: the rows of a table in checksummed files, mapped as one table.

A shard counts as written once its record with its checksum is on disk, so the
finished shards of a killed process can be told from its unfinished ones.
"""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import os
import pathlib
import shutil
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.runtime import files as files_lib

RECORDS = 'records'  # Folder of the records, deleted when all shards exist.
_BUILD_RECORD = f'{RECORDS}/begun.json'
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoom(OSError):
  """The disk, a quota or a limit of the file size is exhausted."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Turns the error of a full disk into `NoRoom`, which names the file."""
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
  """A folder of shards, written in any order and by several processes.

  On a full disk, its methods raise `NoRoom`.
  """

  def __init__(self, path: pathlib.Path, dtype: str):
    """Prepares `path`/shard-*.npy of `dtype`, float32 or bfloat16."""
    self.path, self._dtype = path, dtype

  def begin(self, made_from: dict[str, Any]) -> float:
    """Creates the folder, or resumes one that was made from the same.

    Incomplete shards, and a folder made from something else, are deleted.
    `made_from` (JSON) is all that the shards depend on.

    Returns:
      The time of the first `begin`, in seconds of the epoch.
    """
    record = read_build_record(self.path)
    if record is None or record.get('made_from') != made_from:
      record = {'made_from': made_from, 'started': time.time()}
      shutil.rmtree(self.path, ignore_errors=True)
      with writing(self.path):
        (self.path / RECORDS).mkdir(parents=True)
        files_lib.write_json(self.path / _BUILD_RECORD, record)
    keep = {RECORDS}
    for number, shard in self.records().items():
      if any(problems(self.path, [shard])):
        self._record_path(number).unlink()
      else:
        keep.add(shard['name'])
    for entry in [*self.path.iterdir()]:
      if entry.name not in keep:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    return record['started']

  def records(self) -> dict[int, dict[str, Any]]:
    """Returns the file record of each finished shard, by ascending number."""
    found = {}
    for path in sorted((self.path / RECORDS).glob('[0-9]*.json')):
      with contextlib.suppress(ValueError):
        record = files_lib.read_json(path)
        if {*record} == {'name', 'bytes', 'sha256'}:
          found[int(path.stem)] = record
    return found

  def write(self, number: int, rows_NE: np.ndarray) -> None:
    """Writes a shard to disk, all of it or nothing."""
    path = self.path / f'shard-{number:05d}.npy'
    array = np.ascontiguousarray(rows_NE.astype(jnp.dtype(self._dtype)))
    if self._dtype == 'bfloat16':  # Unknown to the .npy format.
      array = array.view(np.uint16)
    with writing(path):
      try:
        with open(path, 'wb') as file:
          # The error of np.save does not tell that the disk is full.
          header = np.lib.format.header_data_from_array_1_0(array)
          np.lib.format.write_array_header_1_0(file, header)
          file.write(array.data)
          file.flush()
          os.fsync(file.fileno())
        record = file_record(self.path, path.name)
        files_lib.write_json(self._record_path(number), record)
      except OSError:
        path.unlink(missing_ok=True)
        raise

  def _record_path(self, number: int) -> pathlib.Path:
    return self.path / RECORDS / f'{number:05d}.json'


def read_build_record(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns `made_from` and `started` of an unfinished folder, or None."""
  try:
    return files_lib.read_json(path / _BUILD_RECORD)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return None


def open_table(
    directory: pathlib.Path, files: list[dict[str, Any]], dtype: str
) -> corpus_lib.Chained:
  """Maps shards into memory, in the order of `files`."""
  shards = []
  for record in files:
    path = directory / record['name']
    shard = np.load(path, mmap_mode='r', allow_pickle=False)
    if dtype == 'bfloat16':
      shard = shard.view(jnp.bfloat16)
    shards.append(shard)
  return corpus_lib.Chained(shards)


def file_record(directory: pathlib.Path, name: str) -> dict[str, Any]:
  """Returns name, size and checksum of a file."""
  path = directory / name
  return {
      'name': name,
      'bytes': path.stat().st_size,
      'sha256': files_lib.sha256(path),
  }


def problems(
    directory: pathlib.Path, files: Iterable[dict[str, Any]]
) -> Iterator[str]:
  """Yields the differences between files and their records."""
  for expected in files:
    name = expected['name']
    if not (directory / name).is_file():
      yield f'the file {name} is not there'
      continue
    found = file_record(directory, name)
    for field in ('bytes', 'sha256'):
      if found[field] != expected[field]:
        yield (
            f'{name} has {field} {found[field]}, its manifest says '
            f'{expected[field]}'
        )
        break
