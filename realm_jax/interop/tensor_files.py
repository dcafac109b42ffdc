"""Tensors in safetensors and PyTorch files, read and written without PyTorch.

Public: `FileTensor`, `open_folder`, `open_file`, `write_safetensors`,
`Chunked`, `dtype_of`, `WEIGHT_FILES`. Opening reads only the table of contents;
each tensor is read when asked for, so that memory holds one of them at a time.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import json
import math
import os
import pathlib
import struct
from typing import IO, Any, Protocol
import zipfile
import zlib

import ml_dtypes
import numpy as np

from realm_jax.interop import pickled

_SAFETENSORS_DTYPES = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype('<i8'),
    'I32': np.dtype('<i4'),
    'I16': np.dtype('<i2'),
    'I8': np.dtype('i1'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
_TORCH_STORAGES = {
    'DoubleStorage': 'F64',
    'FloatStorage': 'F32',
    'HalfStorage': 'F16',
    'BFloat16Storage': 'BF16',
    'LongStorage': 'I64',
    'IntStorage': 'I32',
    'ShortStorage': 'I16',
    'CharStorage': 'I8',
    'ByteStorage': 'U8',
    'BoolStorage': 'BOOL',
}
# In the order of preference: what is in several formats is the same.
WEIGHT_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
_MAX_HEADER = 100 << 20  # As the safetensors library has it.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_WRITE_BYTES = 1 << 26


class Chunked(Protocol):
  """A tensor that comes in pieces: consecutive rows."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  @property
  def nbytes(self) -> int: ...

  def chunks(self) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
  """A tensor that is still in its file.

  name: in the file.
  shape, dtype: of the tensor.
  path, offset: the file, and the byte at which the storage begins.
  storage_size: elements in the storage.
  storage_offset, strides: of the tensor in its storage, in elements.
  crc: of the storage's bytes, where the file has one.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  path: pathlib.Path
  offset: int
  storage_size: int
  storage_offset: int = 0
  strides: tuple[int, ...] | None = None
  crc: int | None = None

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize

  @property
  def is_whole(self) -> bool:
    """Whether it is all of its storage, in order."""
    return (
        self.size == self.storage_size and self.strides in (None, self._dense)
    )

  @property
  def _dense(self) -> tuple[int, ...]:
    return tuple(
        math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))
    )

  def same_storage(self, other: 'FileTensor') -> bool:
    """Whether both are the same bytes of the same file."""
    return dataclasses.replace(self, name=other.name) == other

  def read(self) -> np.ndarray:
    """Returns the tensor as an array of its own.

    Raises:
      ValueError: if the file is truncated or its checksum does not fit.
    """
    if self.is_whole:
      rows = list(self.chunks(max(1, self.nbytes)))
      return (rows[0] if rows else np.empty(0, self.dtype)).reshape(self.shape)
    storage = dataclasses.replace(
        self, shape=(self.storage_size,), strides=None, storage_offset=0
    ).read()
    strides = self._dense if self.strides is None else self.strides
    view = np.lib.stride_tricks.as_strided(
        storage[self.storage_offset :],
        self.shape,
        [s * self.dtype.itemsize for s in strides],
    )
    return view.copy()

  def mapped(self) -> np.ndarray:
    """Returns it as a memory-mapped array, unchecked.

    Raises:
      ValueError: if the file ends within it, or it is not all of its storage.
    """
    if not self.is_whole:
      raise ValueError(f'{self.path}: {self.name} is part of a storage.')
    return np.memmap(self.path, self.dtype, 'r', self.offset, self.shape)

  def chunks(self, max_bytes: int = _WRITE_BYTES) -> Iterator[np.ndarray]:
    """Yields consecutive rows, a bounded number of bytes at a time."""
    if not self.is_whole:
      yield self.read()
      return
    rows = self.shape[0] if self.shape else 1
    width = self.size // rows if rows else 0
    step = max(1, max_bytes // max(1, width * self.dtype.itemsize))
    crc = 0
    with open(self.path, 'rb') as file:
      file.seek(self.offset)
      for start in range(0, rows, step):
        count = min(step, rows - start) * width
        part = np.empty(count, self.dtype)
        if file.readinto(part.view(np.uint8).data) != part.nbytes:
          raise ValueError(
              f'{self.path} is truncated: it ends within {self.name}.'
          )
        if self.crc is not None:
          crc = zlib.crc32(part.view(np.uint8).data, crc)
        if self.crc is not None and start + step >= rows and crc != self.crc:
          raise ValueError(
              f'{self.path} is corrupted: {self.name} has the checksum '
              f'{crc:08x}, the file says {self.crc:08x}.'
          )
        yield part.reshape(-1, *self.shape[1:]) if self.shape else part


def dtype_of(name: str) -> np.dtype:
  """Returns the type that `str(dtype)` gave the name of, also 'bfloat16'."""
  return next(d for d in _SAFETENSORS_DTYPES.values() if str(d) == name)


def open_folder(
    folder: str | os.PathLike[str],
) -> dict[str, FileTensor]:
  """Opens the weights of a checkpoint's folder, or of one weight file.

  Returns:
    All tensors by name.

  Raises:
    FileNotFoundError: if the folder has none of the known weight files, or
      lacks one that its index names.
    ValueError: if a file is truncated, damaged or refused.
  """
  folder = pathlib.Path(folder)
  if folder.is_file():
    return open_file(folder)
  for name in WEIGHT_FILES:
    path = folder / name
    if path.is_file():
      return _open_index(path) if name.endswith('.json') else open_file(path)
  raise FileNotFoundError(
      f'{folder} has no weights: expected one of {", ".join(WEIGHT_FILES)}.'
  )


def _open_index(path: pathlib.Path) -> dict[str, FileTensor]:
  try:
    files = json.loads(path.read_bytes())['weight_map']
    shards = sorted(set(files.values()))
  except (ValueError, KeyError, TypeError, AttributeError):
    raise ValueError(f'{path} is damaged: no readable weight_map.') from None
  tensors: dict[str, FileTensor] = {}
  for shard in shards:
    file = path.parent / shard
    if file.parent != path.parent or not file.is_file():
      raise FileNotFoundError(f'{path} names {shard}, which is not there.')
    tensors |= open_file(file)
  if set(tensors) != set(files):
    raise ValueError(
        f'{path} does not fit its files; only in one of them: '
        + ', '.join(sorted(set(tensors) ^ set(files)))
    )
  return tensors


def open_file(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
  """Opens one safetensors or PyTorch file, whatever its name.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is neither, truncated, damaged or refused.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')
  with open(path, 'rb') as file:
    start = file.read(9)
    if start.startswith(b'PK'):
      return _open_zip(path)
    if start.startswith(b'\x80'):
      return _open_legacy(path)
    if start[8:] == b'{':
      return _open_safetensors(path)
  raise ValueError(
      f'{path} is neither a safetensors file nor one of PyTorch: it starts '
      f'with {start!r}.'
  )


def _open_safetensors(path: pathlib.Path) -> dict[str, FileTensor]:
  size = path.stat().st_size
  with open(path, 'rb') as file:
    length = struct.unpack('<Q', file.read(8))[0]
    if length > _MAX_HEADER or 8 + length > size:
      raise ValueError(
          f'{path} is truncated or damaged: its header would be {length} bytes'
          f' long, the file has {size}.'
      )
    header = file.read(length)
  tensors = {}
  ends = [0]
  try:
    for name, facts in json.loads(header).items():
      if name == '__metadata__':
        continue
      begin, end = facts['data_offsets']
      shape = tuple(int(s) for s in facts['shape'])
      if facts['dtype'] not in _SAFETENSORS_DTYPES:
        raise ValueError(
            f'{path}: {name} is of type {facts["dtype"]}; known are '
            + ', '.join(_SAFETENSORS_DTYPES)
        )
      dtype = _SAFETENSORS_DTYPES[facts['dtype']]
      tensors[name] = tensor = FileTensor(
          name, shape, dtype, path, 8 + length + begin, math.prod(shape)
      )
      if begin < 0 or min(shape, default=1) < 0 or end - begin != tensor.nbytes:
        raise ValueError(f'{path} is damaged: {name} has a wrong size.')
      ends.append(8 + length + end)
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
    raise ValueError(f'{path} is damaged: its header is unreadable.') from None
  if max(ends) > size:
    raise ValueError(
        f'{path} is truncated: it has {size} bytes, its header asks for '
        f'{max(ends)}.'
    )
  return tensors


# PyTorch's formats. A tensor's entry in the pickle names a storage by a key;
# until the storage's place is known, it is a `_Storage`.


@dataclasses.dataclass(eq=False)
class _Storage:
  key: str
  dtype: np.dtype
  size: int
  offset: int = -1
  crc: int | None = None


@dataclasses.dataclass(frozen=True)
class _Entry:
  storage: _Storage
  storage_offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


def _entry(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> _Entry:
  """Stands for torch._utils._rebuild_tensor_v2."""
  numbers = (offset, *shape, *strides)
  if not isinstance(storage, _Storage) or not all(
      isinstance(n, int) and n >= 0 for n in numbers
  ):
    raise TypeError('a tensor has no storage or a strange shape')
  last = offset + sum(
      (n - 1) * s for n, s in zip(shape, strides, strict=True)
  )
  if math.prod(shape) and last >= storage.size:
    raise TypeError('a tensor is larger than its storage')
  return _Entry(storage, offset, tuple(shape), tuple(strides))


_FUNCTIONS: dict[str, Any] = {
    'collections.OrderedDict': dict,
    'torch._utils._rebuild_tensor_v2': _entry,
    **{f'torch.{name}': dtype for name, dtype in _TORCH_STORAGES.items()},
}


def _read_contents(
    file: IO[bytes], path: pathlib.Path
) -> tuple[Any, dict[str, _Storage]]:
  storages: dict[str, _Storage] = {}

  def storage(reference: Any) -> _Storage:
    match reference:
      case ('storage', str() as kind, str() as key, _, int() as size, *_):
        dtype = _SAFETENSORS_DTYPES.get(kind)
        if dtype is not None and size >= 0:
          return storages.setdefault(key, _Storage(key, dtype, size))
    raise ValueError(f'{path} is damaged: {reference!r} is no storage.')

  return pickled.read(file, str(path), _FUNCTIONS, storage), storages


def _tensors(contents: Any, path: pathlib.Path) -> dict[str, FileTensor]:
  if not isinstance(contents, dict) or not all(
      isinstance(entry, _Entry) for entry in contents.values()
  ):
    raise ValueError(
        f'{path} is no state dictionary: expected tensors by name.'
    )
  return {
      str(name): FileTensor(
          str(name),
          entry.shape,
          entry.storage.dtype,
          path,
          entry.storage.offset,
          entry.storage.size,
          entry.storage_offset,
          entry.strides,
          entry.storage.crc,
      )
      for name, entry in contents.items()
  }


def _open_zip(path: pathlib.Path) -> dict[str, FileTensor]:
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename: info for info in archive.infolist()}
      roots = [n for n in members if n.endswith('/data.pkl')]
      if len(roots) != 1:
        raise ValueError(f'{path} is a zip file, but not one of PyTorch.')
      root = roots[0].removesuffix('data.pkl')
      if f'{root}byteorder' in members:
        order = archive.read(f'{root}byteorder')
        if order != b'little':
          raise ValueError(f'{path} has the byte order {order!r}; not little.')
      with archive.open(roots[0]) as file:
        contents, storages = _read_contents(file, path)
  except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
    raise ValueError(
        f'{path} is truncated or corrupted: {error}.'
    ) from None
  with open(path, 'rb') as raw:
    for storage in storages.values():
      info = members.get(f'{root}data/{storage.key}')
      size = storage.size * storage.dtype.itemsize
      if (
          info is None
          or info.compress_type != zipfile.ZIP_STORED
          or info.file_size != size
      ):
        raise ValueError(
            f'{path} is damaged: storage {storage.key} of {size} bytes is '
            'missing, compressed or of another size.'
        )
      # The local header has a name and padding of its own lengths.
      raw.seek(info.header_offset)
      local = raw.read(30)
      if len(local) != 30 or not local.startswith(b'PK\x03\x04'):
        raise ValueError(f'{path} is corrupted at storage {storage.key}.')
      storage.offset = info.header_offset + 30 + sum(
          struct.unpack('<HH', local[26:])
      )
      storage.crc = info.CRC
  return _tensors(contents, path)


def _open_legacy(path: pathlib.Path) -> dict[str, FileTensor]:
  """The format before PyTorch 1.6: pickles, then the storages, in a row."""
  size = path.stat().st_size
  with open(path, 'rb') as file:
    if pickled.read(file, str(path), {}) != _LEGACY_MAGIC:
      raise ValueError(f'{path} is a pickle, but not one of PyTorch.')
    version = pickled.read(file, str(path), {})
    system = pickled.read(file, str(path), {})
    if version != 1001 or not system.get('little_endian', False):
      raise ValueError(f'{path} is of an unknown version or byte order.')
    contents, storages = _read_contents(file, path)
    keys = pickled.read(file, str(path), {})
    if sorted(map(str, keys)) != sorted(storages):
      raise ValueError(f'{path} is damaged: its storages are not those named.')
    for key in keys:
      storage = storages[key]
      head = file.read(8)
      storage.offset = file.tell()
      end = storage.offset + storage.size * storage.dtype.itemsize
      if len(head) != 8 or end > size:
        raise ValueError(f'{path} is truncated: it ends within a storage.')
      if struct.unpack('<q', head)[0] != storage.size:
        raise ValueError(f'{path} is damaged: a storage has a wrong size.')
      file.seek(end)
  return _tensors(contents, path)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray | Chunked],
    metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file, one tensor after the other.

  What comes in pieces, such as a tensor that is still in a file, is never in
  memory as a whole. The file appears under its name when it is complete.
  """
  path = pathlib.Path(path)
  names = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}
  header: dict[str, Any] = {}
  if metadata:
    header['__metadata__'] = dict(metadata)
  offset = 0
  for name, tensor in tensors.items():
    end = offset + tensor.nbytes
    header[name] = {
        'dtype': names[tensor.dtype],
        'shape': list(tensor.shape),
        'data_offsets': [offset, end],
    }
    offset = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # So that the data is aligned.
  partial = path.with_name(path.name + '.partial')
  try:
    with open(partial, 'wb') as file:
      file.write(struct.pack('<Q', len(text)) + text)
      for tensor in tensors.values():
        parts: Iterable[np.ndarray] = (
            [tensor] if isinstance(tensor, np.ndarray) else tensor.chunks()
        )
        for part in parts:
          flat = np.ascontiguousarray(part).reshape(-1)
          file.write(flat.view(np.uint8).data)
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
