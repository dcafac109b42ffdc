"""Append-only files of a corpus: arrays, wordpieces, and TFDS records."""

import hashlib
import os
import pathlib
from typing import Any

from array_record.python import array_record_module
import numpy as np
import tensorflow_datasets as tfds

_RECORDS_PER_SHARD = 200_000


class ArrayWriter:
  """A .npy file that grows along its first axis."""

  def __init__(
      self, path: pathlib.Path, dtype: Any, shape: tuple[int, ...] = ()
  ):
    self._dtype, self._shape = np.dtype(dtype), shape
    self._rows = 0
    self._file = open(path, 'wb')  # noqa: SIM115
    self._write_header()

  def append(self, rows: np.ndarray) -> None:
    """Appends rows of a type that casts safely, or within its kind."""
    rows = np.asarray(rows)
    self._file.write(rows.astype(self._dtype, casting='same_kind').tobytes())
    self._rows += len(rows)

  def close(self) -> int:
    """Completes the file and returns its number of rows."""
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


class RangesWriter:
  """Rows of several items: the rows in one .npy file, offsets in another."""

  def __init__(self, tables: pathlib.Path, name: str, offsets_name: str):
    self.count = 0
    self._offsets = ArrayWriter(tables / f'{offsets_name}.npy', np.int64)
    self._rows = ArrayWriter(tables / f'{name}.npy', np.int32, (2,))
    self._offsets.append(np.zeros(1, np.int64))

  def append(self, counts: np.ndarray, rows: np.ndarray) -> None:
    """Appends the number of rows of each item, and the rows, int32 [R, 2]."""
    self._offsets.append(self.count + np.cumsum(counts))
    self._rows.append(rows)
    self.count += len(rows)

  def close(self) -> int:
    """Completes the files and returns the number of rows."""
    self._offsets.close()
    return self._rows.close()


class TokenWriter:
  """A flat file of wordpieces."""

  def __init__(self, path: pathlib.Path, dtype: Any):
    self._dtype = np.dtype(dtype)
    self._file = open(path, 'wb')  # noqa: SIM115
    self.size = 0

  def append(self, ids: np.ndarray) -> int:
    """Appends wordpieces and returns the position of the first."""
    start = self.size
    self._file.write(ids.astype(self._dtype).tobytes())
    self.size += len(ids)
    return start

  def close(self) -> None:
    self._file.close()


class TokenReader:
  """A flat file of wordpieces that is read in slices and not mapped.

  Mapped pages that were read once count as memory of the process.
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

  `tfds.core.SequentialWriter` encodes every record in the calling process;
  here records come encoded, and TFDS writes the metadata alone.
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
    """Completes the dataset; returns the SHA-256 of each split's records."""
    if not self._splits:
      return {}
    splits = dict(sorted(self._splits.items()))
    tfds.folder_dataset.write_metadata(
        data_dir=self._directory,
        features=tfds.features.FeaturesDict(self._features),
        split_infos=[split.close() for split in splits.values()],
        check_data=False,  # The check needs TensorFlow.
        description=self._description,
    )
    return {name: split.digest.hexdigest() for name, split in splits.items()}


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
      # Groups of one record, for random access. zstd would save a tenth of the
      # space of such short groups, and take three times as long.
      self._writer = array_record_module.ArrayRecordWriter(
          os.fspath(path), 'group_size:1,snappy'
      )
      self._lengths.append(0)
    try:
      self._writer.write(record)
    except RuntimeError as error:
      raise _os_error(error) from error
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
    count = len(self._lengths)
    for i in range(count):
      path = template.sharded_filepath(shard_index=i, num_shards=count)
      os.rename(self._directory / f'{self._name}.{i}', path)
    return tfds.core.SplitInfo(
        name=self._name,
        shard_lengths=self._lengths,
        num_bytes=self._bytes,
        filename_template=template,
    )

  def _close_shard(self) -> None:
    if self._writer is not None:
      try:
        self._writer.close()
      except RuntimeError as error:
        raise _os_error(error) from error
      self._writer = None


def _os_error(error: RuntimeError) -> OSError:
  """array_record raises RuntimeError for a full disk, and only for that."""
  return OSError(f'A dataset could not be written: {error}')
