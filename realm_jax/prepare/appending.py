"""Files of a corpus that grow: arrays, wordpieces, and records for TFDS.

Public: `ArrayWriter`, `TokenWriter`, `TokenReader`, `DatasetWriter`.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import os
import pathlib
from typing import IO, Any

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds

_RECORDS_PER_SHARD = 200_000


def _create(path: pathlib.Path) -> IO[bytes]:
  return open(path, 'wb')


class ArrayWriter:
  """A .npy file that grows along its first axis."""

  def __init__(
      self, path: pathlib.Path, dtype: Any, shape: tuple[int, ...] = ()
  ):
    self._dtype, self._shape = np.dtype(dtype), shape
    self._rows = 0
    self._file = _create(path)
    self._write_header()

  def append(self, rows: np.ndarray) -> None:
    """Appends rows; their type must fit."""
    rows = np.asarray(rows)
    self._file.write(rows.astype(self._dtype, casting='same_kind').tobytes())
    self._rows += len(rows)

  def close(self) -> int:
    """Finishes the file and returns its rows."""
    self._file.seek(0)
    self._write_header()
    self._file.close()
    return self._rows

  def _write_header(self) -> None:
    # numpy pads the header so that the first axis can grow in place.
    np.lib.format.write_array_header_1_0(
        self._file,
        {
            'descr': np.lib.format.dtype_to_descr(self._dtype),
            'fortran_order': False,
            'shape': (self._rows, *self._shape),
        },
    )


class TokenWriter:
  """A flat file of wordpieces."""

  def __init__(self, path: pathlib.Path, dtype: Any):
    self._dtype = np.dtype(dtype)
    self._file = _create(path)
    self.size = 0

  def append(self, ids: np.ndarray) -> int:
    """Appends wordpieces and returns where they begin."""
    start = self.size
    self._file.write(ids.astype(self._dtype).tobytes())
    self.size += len(ids)
    return start

  def close(self) -> None:
    """Finishes the file."""
    self._file.close()


class TokenReader:
  """A flat file of wordpieces that is read part by part, and not mapped.

  What is mapped counts as memory of the process as soon as it was read once.
  """

  def __init__(self, path: pathlib.Path, dtype: Any):
    self._path, self.dtype = path, np.dtype(dtype)
    self.shape = (path.stat().st_size // self.dtype.itemsize,)

  def __getitem__(self, rows: slice) -> np.ndarray:
    start, limit, _ = rows.indices(self.shape[0])
    offset = start * self.dtype.itemsize
    return np.fromfile(self._path, self.dtype, limit - start, offset=offset)


class DatasetWriter:
  """A TFDS dataset in array_record format, written record by record.

  `tfds.core.SequentialWriter` would do, but it encodes every record itself, in
  one process. Here records come encoded; the metadata are written by TFDS.
  """

  def __init__(
      self, directory: pathlib.Path, features: dict[str, Any], description: str
  ):
    directory.mkdir()
    self._directory = directory
    self._features = features
    self._description = description
    self._splits: dict[str, _Split] = {}

  def append(self, split: str, record: bytes) -> None:
    """Appends an encoded record to a split."""
    if split not in self._splits:
      self._splits[split] = _Split(self._directory, split)
    self._splits[split].append(record)

  def close(self) -> dict[str, str]:
    """Finishes the dataset and returns the SHA-256 of each split's records."""
    if not self._splits:
      return {}
    infos = [split.close() for _, split in sorted(self._splits.items())]
    tfds.folder_dataset.write_metadata(
        data_dir=self._directory,
        features=tfds.features.FeaturesDict(self._features),
        split_infos=infos,
        check_data=False,  # It would need TensorFlow.
        description=self._description,
    )
    return {
        name: split.digest.hexdigest()
        for name, split in sorted(self._splits.items())
    }


class _Split:
  """The shards of a split; their number is known only at the end."""

  def __init__(self, directory: pathlib.Path, name: str):
    self._directory, self._name = directory, name
    self._writer: Any = None
    self._lengths: list[int] = []
    self._bytes = 0
    self.digest = hashlib.sha256()

  def append(self, record: bytes) -> None:
    if self._writer is None or self._lengths[-1] == _RECORDS_PER_SHARD:
      self._close_shard()
      path = self._directory / f'{self._name}.{len(self._lengths)}'
      # Groups of one record, for random access. So short ones zstd would make
      # a tenth smaller, in three times the time.
      self._writer = array_record_module.ArrayRecordWriter(
          os.fspath(path), 'group_size:1,snappy'
      )
      self._lengths.append(0)
    with _as_os_error():
      self._writer.write(record)
    self._lengths[-1] += 1
    self._bytes += len(record)
    self.digest.update(len(record).to_bytes(8, 'little') + record)

  def close(self) -> tfds.core.SplitInfo:
    self._close_shard()
    template = tfds.core.ShardedFileTemplate(
        data_dir=self._directory,
        dataset_name=self._directory.name,
        split=self._name,
        filetype_suffix='array_record',
    )
    for i in range(len(self._lengths)):
      os.rename(
          self._directory / f'{self._name}.{i}',
          template.sharded_filepath(
              shard_index=i, num_shards=len(self._lengths)
          ),
      )
    return tfds.core.SplitInfo(
        name=self._name,
        shard_lengths=self._lengths,
        num_bytes=self._bytes,
        filename_template=template,
    )

  def _close_shard(self) -> None:
    if self._writer is not None:
      with _as_os_error():
        self._writer.close()
      self._writer = None


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """The library reports a full disk, and nothing else, as RuntimeError."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f'A dataset could not be written: {error}') from error
