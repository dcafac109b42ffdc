"""Weight files, safetensors and PyTorch's, read without PyTorch.

Opening a file reads its table of contents; memory holds one tensor at a time.
No function that a pickle names is imported or called.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import struct
from typing import IO, Any, NamedTuple, Protocol
import zipfile
import zlib

import ml_dtypes
import numpy as np
import safetensors

from realm_jax.runtime import files as files_lib

_TYPES = (  # The names in safetensors, PyTorch and numpy.
    ('F64', 'Double', '<f8'),
    ('F32', 'Float', '<f4'),
    ('F16', 'Half', '<f2'),
    ('BF16', 'BFloat16', ml_dtypes.bfloat16),
    ('I64', 'Long', '<i8'),
    ('I32', 'Int', '<i4'),
    ('I16', 'Short', '<i2'),
    ('I8', 'Char', 'i1'),
    ('U8', 'Byte', 'u1'),
    ('BOOL', 'Bool', '?'),
)
_DTYPES = {name: np.dtype(dtype) for name, _, dtype in _TYPES}
# In order of preference; the formats of one checkpoint are equal.
WEIGHT_FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)
# Endings of weights that are not read: other frameworks, adapters, own names.
_OTHER_ENDINGS = frozenset(
    '.bin .ckpt .h5 .index .msgpack .onnx .pt .pth .safetensors'.split()
)
# Where training programs keep the tensors, among other values.
_STATE_DICTS = ('state_dict', 'model_state_dict', 'model_dict', 'model')
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# The allowed pickle instructions: those for plain data and for globals.
_OPCODES = frozenset(
    'PROTO FRAME MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1'
    ' BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES'
    ' BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND'
    ' APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET'
    ' LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID STOP'.split()
)
PUTS = ('BINPUT', 'LONG_BINPUT', 'MEMOIZE')
GETS = ('BINGET', 'LONG_BINGET')
_TUPLES = ('TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3')
_MAX_TUPLES = 50_000  # The hash of a tuple 200,000 deep overflows the C stack.


class Chunked(Protocol):
  """A tensor that is read in chunks of consecutive rows."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def chunks(self) -> Iterator[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class FileTensor:
  """A tensor that is not yet read from its file.

  name: in the file.
  shape, dtype: of the tensor.
  path, offset: the file, and the byte at which the storage begins.
  storage_size: elements in the storage.
  storage_offset, strides: of the tensor in its storage, in elements; None if
    the tensor is the whole storage, in order.
  crc: CRC-32 of the storage's bytes, if the file has one.
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
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def read(self) -> np.ndarray:
    """Returns the tensor as a new array.

    Raises:
      ValueError: the file is truncated or its checksum does not match.
    """
    storage = dataclasses.replace(
        self, shape=(self.storage_size,), storage_offset=0, strides=None
    )
    chunks = storage.chunks(max(1, storage.nbytes))
    found = self._view(next(chunks, np.empty(0, self.dtype)))
    return found if self.strides is None else found.copy()

  def mapped(self) -> np.ndarray:
    """Returns the tensor memory-mapped; its checksum is not verified."""
    if not self.storage_size:
      return np.empty(self.shape, self.dtype)
    with located(self.path, self.name):
      return self._view(
          np.memmap(self.path, self.dtype, 'r', self.offset, self.storage_size)
      )

  def chunks(self, max_bytes: int = 1 << 26) -> Iterator[np.ndarray]:
    """Yields consecutive rows, a bounded number of bytes at a time."""
    if self.strides is not None:
      yield self.read()
      return
    rows = self.shape[0] if self.shape else 1
    step = max(1, max_bytes * rows // max(1, self.nbytes))
    crc = 0
    with open(self.path, 'rb') as file, located(self.path, self.name):
      file.seek(self.offset)
      for start in range(0, rows, step):
        shape = (min(step, rows - start), *self.shape[1:])
        part = np.empty(shape, self.dtype)
        data = part.reshape(-1).view(np.uint8).data
        if file.readinto(data) != part.nbytes:
          raise EOFError('the file ends within the tensor')
        if self.crc is not None:
          crc = zlib.crc32(data, crc)
          if start + step >= rows and crc != self.crc:
            raise ValueError(f'checksum {crc:08x}, expected {self.crc:08x}')
        yield part

  def _view(self, storage: np.ndarray) -> np.ndarray:
    if self.strides is None:
      return storage.reshape(self.shape)
    return np.lib.stride_tricks.as_strided(
        storage[self.storage_offset :],
        self.shape,
        [stride * self.dtype.itemsize for stride in self.strides],
    )


@contextlib.contextmanager
def located(path: pathlib.Path, name: str | None = None) -> Iterator[None]:
  """Raises the errors of a damaged file as a ValueError that names it."""
  try:
    yield
  except Exception as error:  # The libraries document no complete list.
    tensor = f' in {name}' if name else ''
    raise ValueError(
        f'{path} is truncated, damaged or refused{tensor}: '
        f'{str(error) or type(error).__name__}'
    ) from error


def open_folder(folder: str | os.PathLike[str]) -> dict[str, FileTensor]:
  """Returns the tensors of a checkpoint's folder, or of one file, by name.

  Raises:
    FileNotFoundError: the folder has none of the known weight files, or lacks
      one that its index names.
    ValueError: a file is truncated, damaged or refused.
  """
  folder = pathlib.Path(folder)
  if folder.is_file():
    return open_file(folder)
  for name in WEIGHT_FILES:
    path = folder / name
    if path.is_file():
      return _open_index(path) if name.endswith('.json') else open_file(path)
  others = sorted(
      path.name for path in folder.glob('*') if path.suffix in _OTHER_ENDINGS
  )
  raise FileNotFoundError(
      f'{folder} has no weights: expected one of {", ".join(WEIGHT_FILES)}'
      + (f', not {", ".join(others)}' if others else '')
      + '. Write them with `save_pretrained` of transformers.'
  )


def _open_index(path: pathlib.Path) -> dict[str, FileTensor]:
  with located(path):
    files = json.loads(path.read_bytes())['weight_map']
    shards = sorted(set(files.values()))
    if not all(isinstance(shard, str) for shard in shards):
      raise ValueError('weight_map must give the name of a file for each name')
  tensors: dict[str, FileTensor] = {}
  for shard in shards:
    if shard not in os.listdir(path.parent):
      raise FileNotFoundError(f'{path} names {shard[:200]}: no such file.')
    tensors |= open_file(path.parent / shard)
  if set(tensors) != set(files):
    raise ValueError(
        f'{path} does not fit its files; only in one of them: '
        + ', '.join(sorted(set(tensors) ^ set(files)))
    )
  return tensors


def open_file(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
  """Opens one safetensors or PyTorch file; its first bytes tell the format.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is neither, truncated, damaged or refused.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')
  with open(path, 'rb') as file, located(path):
    start = file.read(9)
    file.seek(0)
    if start.startswith(b'PK'):
      return _open_zip(file, path)
    if start.startswith(b'\x80'):
      return _open_legacy(file, path)
    if start[8:] == b'{':
      return _open_safetensors(path, 8 + struct.unpack('<Q', start[:8])[0])
    if start == b'version h':
      raise ValueError('a pointer of Git LFS; run `git lfs pull`')
    raise ValueError(f'neither safetensors nor PyTorch, it starts {start!r}')


def _open_safetensors(path: pathlib.Path, offset: int) -> dict[str, FileTensor]:
  tensors = {}
  with safetensors.safe_open(path, 'numpy') as file:
    # The library has checked that the tensors have no gaps between them.
    for name in file.offset_keys():
      entry = file.get_slice(name)
      kind, shape = entry.get_dtype(), tuple(entry.get_shape())
      if kind not in _DTYPES:
        raise ValueError(f'{name} has type {kind}; known are {[*_DTYPES]}')
      tensors[name] = FileTensor(
          name, shape, _DTYPES[kind], path, offset, math.prod(shape)
      )
      offset += tensors[name].nbytes
  return tensors


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  size: int


class _Entry(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _StateDict(dict):
  def __setstate__(self, state: Any) -> None:
    pass  # The attribute `_metadata`: versions of modules.


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, *_: Any
) -> _Entry:
  entry = _Entry(storage, offset, tuple(shape), tuple(strides))
  numbers = (offset, *entry.shape, *entry.strides)
  if (
      not isinstance(storage, _Storage)
      or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)
      or not len(entry.shape) == len(entry.strides) <= 32
  ):
    raise TypeError('a tensor has no storage or an invalid shape')
  return entry


def _rebuild_parameter(entry: Any, *_: Any) -> _Entry:
  if not isinstance(entry, _Entry):
    raise TypeError('a parameter has no tensor')
  return entry


# The table of contents of a PyTorch file is a pickle. The globals that it may
# name, and their inert stand-ins:
_GLOBALS: dict[str, Any] = {
    'collections.OrderedDict': _StateDict,
    'torch._utils._rebuild_tensor_v2': _rebuild_tensor,
    'torch._utils._rebuild_parameter': _rebuild_parameter,
    **{f'torch.{kind}Storage': name for name, kind, _ in _TYPES},
}


class _Unpickler(pickle.Unpickler):
  """Calls the stand-ins of `_GLOBALS` and no other function."""

  def __init__(self, data: bytes):
    super().__init__(io.BytesIO(data))
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    found = _GLOBALS.get(f'{module}.{name}')
    if found is None:
      raise pickle.UnpicklingError(
          f'it names the global {module}.{name}, which is refused: a'
          f' checkpoint needs only {", ".join(sorted(_GLOBALS))}'
      )
    # A pickle can set attributes of a function; each gets a new function.
    return found if isinstance(found, str) else lambda *args: found(*args)

  def persistent_load(self, pid: Any) -> _Storage:
    match pid:
      case ('storage', str() as kind, str() as key, _, int() as size, *_):
        if kind in _DTYPES and size >= 0:
          storage = _Storage(key, _DTYPES[kind], size)
          if self.storages.setdefault(key, storage) == storage:
            return storage
    raise pickle.UnpicklingError('a reference to a storage is malformed')


def _unpickle(file: IO[bytes]) -> tuple[Any, dict[str, _Storage]]:
  """Returns the value of a pickle and the storages that it names, by key."""
  start = file.tell()
  # The unpickler hashes dictionary keys without a limit. A deep tuple overflows
  # the C stack, and a tuple that holds another one twice, at many levels, takes
  # exponential time. State dictionaries have neither, so both are refused.
  previous, tuples = '', 0
  memo: dict[int, str] = {}  # The instruction that made each entry.
  for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    name, key = opcode.name, argument or 0
    if name not in _OPCODES:
      raise ValueError(f'the pickle instruction {name} is not allowed')
    if name in PUTS:
      if key > count:  # The unpickler would allocate all entries up to it.
        raise ValueError('the memo of the pickle has gaps')
      memo[len(memo) if name == 'MEMOIZE' else key] = previous
    elif name not in ('PROTO', 'FRAME'):
      previous = name
    tuples += name in _TUPLES
    reused = name in GETS and memo.get(key) in _TUPLES
    if reused or tuples > _MAX_TUPLES:
      raise ValueError('the pickle has too many tuples')
  size = file.tell() - start
  file.seek(start)
  unpickler = _Unpickler(file.read(size))
  return unpickler.load(), unpickler.storages


def _tensors(
    table: Any, path: pathlib.Path, places: Mapping[str, tuple[int, int | None]]
) -> dict[str, FileTensor]:
  """Returns the tensors; `places` has each storage's offset and checksum."""
  tensors = {}
  if isinstance(table, dict):
    inner = [table[key] for key in _STATE_DICTS if key in table]
    table = next((x for x in inner if isinstance(x, dict)), table)
  for name, entry in table.items() if isinstance(table, dict) else [(0, 0)]:
    if not isinstance(name, str) or not isinstance(entry, _Entry):
      raise ValueError('no state dictionary: expected tensors by name')
    storage, start, shape, strides = entry
    steps = zip(shape, strides, strict=True)
    last = start + sum((size - 1) * stride for size, stride in steps)
    if math.prod(shape) and last >= storage.size:
      raise ValueError(f'{name} is larger than its storage')
    dense = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    whole = math.prod(shape) == storage.size and strides == dense
    offset, crc = places[storage.key]
    tensors[name] = FileTensor(
        *(name, shape, storage.dtype, path, offset, storage.size),
        *(start, None if whole else strides, crc),
    )
  return tensors


def _open_zip(raw: IO[bytes], path: pathlib.Path) -> dict[str, FileTensor]:
  places: dict[str, tuple[int, int | None]] = {}
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    roots = [name for name in members if name.endswith('/data.pkl')]
    if len(roots) != 1:
      raise ValueError('a zip file, but not one of PyTorch')
    if any(info.compress_type for info in members.values()):
      raise ValueError('the zip file is compressed; those of PyTorch are not')
    root = roots[0].removesuffix('data.pkl')
    order = f'{root}byteorder'
    if order in members and archive.read(order) != b'little':
      raise ValueError('the byte order is not little-endian')
    table, storages = _unpickle(io.BytesIO(archive.read(roots[0])))
  for key, storage in storages.items():
    info = members.get(f'{root}data/{key}')
    size = storage.size * storage.dtype.itemsize
    if info is None or info.file_size != size:
      raise ValueError(
          f'storage {key} of {size} bytes is missing or of another size'
      )
    # The lengths of name and padding differ from those in the directory.
    raw.seek(info.header_offset)
    magic, name, padding = struct.unpack('<4s22xHH', raw.read(30))
    if magic != b'PK\x03\x04':
      raise ValueError(f'storage {key} is not where the zip file says')
    places[key] = raw.tell() + name + padding, info.CRC
  return _tensors(table, path, places)


def _open_legacy(file: IO[bytes], path: pathlib.Path) -> dict[str, FileTensor]:
  """Opens the format before PyTorch 1.6: pickles, then the storages."""
  places: dict[str, tuple[int, int | None]] = {}
  if _unpickle(file)[0] != _LEGACY_MAGIC:
    raise ValueError('a pickle, but not one of PyTorch')
  version, system = _unpickle(file)[0], _unpickle(file)[0]
  little = isinstance(system, dict) and system.get('little_endian')
  if version != 1001 or not little:
    raise ValueError('the version or the byte order is unknown')
  table, storages = _unpickle(file)
  keys = _unpickle(file)[0]
  if {*keys} != {*storages}:
    raise ValueError('the storages are not those of the tensors')
  for key in keys:
    if struct.unpack('<q', file.read(8))[0] != storages[key].size:
      raise ValueError(f'storage {key} has a wrong size')
    places[key] = file.tell(), None
    size = storages[key].size * storages[key].dtype.itemsize
    if file.seek(size, 1) > path.stat().st_size:
      raise EOFError(f'the file ends within storage {key}')
  return _tensors(table, path, places)


def write_folder(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray | Chunked]
) -> None:
  """Writes the weights of a folder that other libraries load."""
  write_safetensors(folder / WEIGHT_FILES[0], tensors)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray | Chunked]
) -> None:
  """Writes a safetensors file, one tensor after the other.

  Unlike the safetensors library, this needs no more than one chunk of a tensor
  in memory. The file appears under its name when it is complete.
  """
  names = {dtype: name for name, dtype in _DTYPES.items()}
  # transformers refuses a file without this entry.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for name, tensor in tensors.items():
    start = offset
    offset += math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {
        'dtype': names[tensor.dtype],
        'shape': list(tensor.shape),
        'data_offsets': [start, offset],
    }
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # Aligns the data.
  with files_lib.atomic_file(pathlib.Path(path), 'wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for tensor in tensors.values():
      for part in (
          [tensor] if isinstance(tensor, np.ndarray) else tensor.chunks()
      ):
        flat = np.ascontiguousarray(part).reshape(-1)
        file.write(flat.view(np.uint8).data)
