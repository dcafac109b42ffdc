"""Reads the two kinds of pickle that published checkpoints hold, safely.

Public: `read` (the table of contents of a PyTorch file), `byte_records` (an
.npy file of byte strings) and `byte_records_writer`, its inverse. A pickle is
a program for a small stack machine. The machine here knows only the
instructions that build plain data, and a global only by a name that the caller
listed: nothing that a file names is ever imported or called.
"""

import array
from collections.abc import Callable, Iterable, Iterator, Mapping
import os
import pathlib
import struct
from typing import IO, Any

import numpy as np

# Writing: items per APPENDS, as Python's own pickler does it.
_BATCH = 1000
_ABSENT = 2**64 - 1


class _Mark:
  """Where a tuple, list or dictionary begins on the stack."""


_MARK = _Mark()


class _Machine:
  """The stack machine; `run` yields the items of lists that are streamed."""

  def __init__(
      self,
      file: IO[bytes],
      name: str,
      functions: Mapping[str, Any],
      persistent: Callable[[Any], Any] | None = None,
      stream: bool = False,
  ):
    self.file = file
    self.name = name
    self.functions = functions
    self.persistent = persistent
    self.stream = stream
    self.stack: list[Any] = []
    self.memo: dict[int, Any] = {}
    # In a stream, byte strings are remembered by where they are in the file:
    # all of them together are larger than the memory.
    self.places = array.array('Q')
    self.memo_size = 0
    self.last_place = _ABSENT
    self.result: Any = None

  def run(self) -> Iterator[bytes]:
    handlers = {
        ord(code): getattr(self, f'_{method}')
        for code, method in _INSTRUCTIONS.items()
    }
    file = self.file
    while True:
      code = file.read(1)
      if not code:
        raise self.error('ends early: it is truncated')
      if code == b'.':
        self.result = self.pop()
        return
      if code == b'e':  # APPENDS
        items = self.pop_to_mark()
        yield from self.append(items)
        continue
      if code == b'a':  # APPEND
        yield from self.append([self.pop()])
        continue
      handler = handlers.get(code[0])
      if handler is None:
        raise self.error(f'uses the pickle instruction {code!r}, not allowed')
      handler()

  def error(self, what: str) -> ValueError:
    return ValueError(f'{self.name} {what}.')

  # Input.

  def take(self, size: int) -> bytes:
    # Before the read, so that a damaged length cannot ask for all memory.
    data = self.file.read(size) if size < 2**40 else b''
    if len(data) != size:
      raise self.error('ends early: it is truncated')
    return data

  def number(self, form: str) -> int:
    return struct.unpack(form, self.take(struct.calcsize(form)))[0]

  def line(self) -> str:
    data = self.file.readline(1000)
    if not data.endswith(b'\n'):
      raise self.error('ends early: it is truncated')
    return data[:-1].decode('ascii', 'replace')

  # Stack.

  def pop(self) -> Any:
    if not self.stack:
      raise self.error('is damaged: an instruction lacks its operand')
    return self.stack.pop()

  def pop_to_mark(self) -> list[Any]:
    items = []
    while (item := self.pop()) is not _MARK:
      items.append(item)
    return items[::-1]

  def append(self, items: list[Any]) -> Iterator[bytes]:
    target = self.stack[-1] if self.stack else None
    if not isinstance(target, list):
      raise self.error('is damaged: appends to what is no list')
    if not self.stream:
      target.extend(items)
      return
    for item in items:
      if not isinstance(item, bytes):
        raise self.error(
            f'holds an item of type {type(item).__name__}; expected bytes'
        )
      yield item

  def remember(self, key: int) -> None:
    if not self.stack:
      raise self.error('is damaged: an instruction lacks its operand')
    value = self.stack[-1]
    if self.stream and isinstance(value, bytes):
      if not 0 <= key <= len(self.places) + 1000:
        raise self.error('is damaged: its memo has gaps')
      while len(self.places) <= key:
        self.places.append(_ABSENT)
      self.places[key] = self.last_place
    else:
      self.memo[key] = value

  def recall(self, key: int) -> None:
    if key in self.memo:
      self.stack.append(self.memo[key])
      return
    place = self.places[key] if key < len(self.places) else _ABSENT
    if place == _ABSENT:
      raise self.error('is damaged: refers to what was never said')
    back = self.file.tell()
    self.file.seek(place)
    handler = _INSTRUCTIONS.get(self.take(1).decode('latin-1'), 'none')
    getattr(self, f'_{handler}')()
    self.file.seek(back)

  # Instructions; each method is named after one of `pickletools`.

  def _proto(self) -> None:
    version = self.number('<B')
    if version > 5:
      raise self.error(f'has pickle protocol {version}; 2 to 5 are known')

  def _frame(self) -> None:
    self.take(8)

  def _mark(self) -> None:
    self.stack.append(_MARK)

  def _none(self) -> None:
    self.stack.append(None)

  def _true(self) -> None:
    self.stack.append(True)

  def _false(self) -> None:
    self.stack.append(False)

  def _int1(self) -> None:
    self.stack.append(self.number('<B'))

  def _int2(self) -> None:
    self.stack.append(self.number('<H'))

  def _int4(self) -> None:
    self.stack.append(self.number('<i'))

  def _long1(self) -> None:
    data = self.take(self.number('<B'))
    self.stack.append(int.from_bytes(data, 'little', signed=True))

  def _float(self) -> None:
    self.stack.append(struct.unpack('>d', self.take(8))[0])

  def _text(self, form: str) -> None:
    data = self.take(self.number(form))
    self.stack.append(data.decode('utf-8', 'surrogatepass'))

  def _text1(self) -> None:
    self._text('<B')

  def _text4(self) -> None:
    self._text('<I')

  def _text8(self) -> None:
    self._text('<Q')

  def _data(self, form: str) -> None:
    if self.stream:
      self.last_place = self.file.tell() - 1
    self.stack.append(self.take(self.number(form)))

  def _data1(self) -> None:
    self._data('<B')

  def _data4(self) -> None:
    self._data('<I')

  def _data8(self) -> None:
    self._data('<Q')

  def _empty_tuple(self) -> None:
    self.stack.append(())

  def _tuple(self) -> None:
    self.stack.append(tuple(self.pop_to_mark()))

  def _tuple1(self) -> None:
    self.stack.append((self.pop(),))

  def _tuple2(self) -> None:
    b, a = self.pop(), self.pop()
    self.stack.append((a, b))

  def _tuple3(self) -> None:
    c, b, a = self.pop(), self.pop(), self.pop()
    self.stack.append((a, b, c))

  def _empty_list(self) -> None:
    self.stack.append([])

  def _empty_dict(self) -> None:
    self.stack.append({})

  def _set(self, items: list[Any]) -> None:
    target = self.stack[-1] if self.stack else None
    if not isinstance(target, dict) or len(items) % 2:
      raise self.error('is damaged: sets an item of what is no dictionary')
    for key, value in zip(items[::2], items[1::2], strict=True):
      if not isinstance(key, str | int):
        raise self.error(f'has a key of type {type(key).__name__}')
      target[key] = value

  def _set_item(self) -> None:
    value, key = self.pop(), self.pop()
    self._set([key, value])

  def _set_items(self) -> None:
    self._set(self.pop_to_mark())

  def _put1(self) -> None:
    self.remember(self.number('<B'))

  def _put4(self) -> None:
    self.remember(self.number('<I'))

  def _memoize(self) -> None:
    # Numbered in order: MEMOIZE is never mixed with the older PUT.
    self.remember(self.memo_size)
    self.memo_size += 1

  def _get1(self) -> None:
    self.recall(self.number('<B'))

  def _get4(self) -> None:
    self.recall(self.number('<I'))

  def _global(self) -> None:
    module, name = self.line(), self.line()
    self._find(f'{module}.{name}')

  def _stack_global(self) -> None:
    name, module = self.pop(), self.pop()
    self._find(f'{module}.{name}')

  def _find(self, name: str) -> None:
    if name not in self.functions:
      raise self.error(
          f'wants the global {name}, which is refused: a checkpoint needs only '
          + ', '.join(sorted(self.functions))
      )
    self.stack.append(self.functions[name])

  def _reduce(self) -> None:
    arguments, function = self.pop(), self.pop()
    if not callable(function) or not isinstance(arguments, tuple):
      raise self.error('is damaged: calls what is no function')
    try:
      self.stack.append(function(*arguments))
    except (TypeError, IndexError, AttributeError) as error:
      raise self.error(f'is damaged: {error}') from None

  def _build(self) -> None:
    # Attributes of a dictionary or an array: nothing that is needed here.
    self.pop()

  def _persistent(self) -> None:
    if self.persistent is None:
      raise self.error('refers to data outside of itself')
    self.stack.append(self.persistent(self.pop()))


_INSTRUCTIONS = {
    '\x80': 'proto',
    '\x95': 'frame',
    '(': 'mark',
    'N': 'none',
    '\x88': 'true',
    '\x89': 'false',
    'K': 'int1',
    'M': 'int2',
    'J': 'int4',
    '\x8a': 'long1',
    'G': 'float',
    '\x8c': 'text1',
    'X': 'text4',
    '\x8d': 'text8',
    'C': 'data1',
    'B': 'data4',
    '\x8e': 'data8',
    ')': 'empty_tuple',
    't': 'tuple',
    '\x85': 'tuple1',
    '\x86': 'tuple2',
    '\x87': 'tuple3',
    ']': 'empty_list',
    '}': 'empty_dict',
    's': 'set_item',
    'u': 'set_items',
    'q': 'put1',
    'r': 'put4',
    '\x94': 'memoize',
    'h': 'get1',
    'j': 'get4',
    'c': 'global',
    '\x93': 'stack_global',
    'R': 'reduce',
    'b': 'build',
    'Q': 'persistent',
}


def read(
    file: IO[bytes],
    name: str,
    functions: Mapping[str, Any],
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
  """Reads one pickle of plain data and leaves the file behind it.

  Args:
    file: open for reading bytes.
    name: of the file, for messages.
    functions: what each global that the pickle may name stands for.
    persistent: makes a value of each reference to data outside of the pickle.

  Raises:
    ValueError: if the pickle is truncated or damaged, or names a global that
      is not in `functions`; the message says which.
  """
  machine = _Machine(file, name, functions, persistent)
  for _ in machine.run():
    raise AssertionError('only a stream yields')
  return machine.result


def byte_records(path: str | os.PathLike[str]) -> tuple[int, Iterator[bytes]]:
  """Opens an .npy file of byte strings, such as REALM's block_records.npy.

  Returns:
    Their number, and the strings one after the other; the file is never in
    memory as a whole.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: here or while iterating, if it is not such a file, is truncated
      or names a global of no use for it.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')
  with open(path, 'rb') as file:
    shape, dtype = _npy_header(file, path)
    start = file.tell()
  if dtype != np.dtype(object) or len(shape) != 1:
    raise ValueError(
        f'{path} holds an array of {dtype} and shape {shape}; expected one '
        'dimension of Python byte strings.'
    )
  return shape[0], _stream(path, start, shape[0])


def _npy_header(
    file: IO[bytes], path: pathlib.Path
) -> tuple[tuple[int, ...], np.dtype]:
  try:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
      header = np.lib.format.read_array_header_1_0(file)
    else:
      header = np.lib.format.read_array_header_2_0(file)
  except ValueError as error:
    raise ValueError(f'{path} is not an .npy file: {error}') from None
  return header[0], header[2]


def _stream(path: pathlib.Path, start: int, number: int) -> Iterator[bytes]:
  # The array itself and its dtype are made of these; neither is built.
  functions: dict[str, Any] = {}
  for package in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    functions[f'{package}._reconstruct'] = lambda *arguments: None
  functions['numpy.ndarray'] = 'ndarray'
  functions['numpy.dtype'] = lambda *arguments: None
  found = 0
  with open(path, 'rb', buffering=1 << 20) as file:
    file.seek(start)
    machine = _Machine(file, str(path), functions, stream=True)
    for item in machine.run():
      found += 1
      yield item
  if found != number:
    raise ValueError(
        f'{path} is damaged: it holds {found} records, its header says'
        f' {number}.'
    )


def byte_records_writer(
    path: str | os.PathLike[str], number: int, records: Iterable[bytes]
) -> None:
  """Writes what `byte_records` reads, one record at a time.

  Raises:
    ValueError: if there are not `number` records.
  """
  header = {'descr': '|O', 'fortran_order': False, 'shape': (number,)}
  written = 0
  with open(path, 'wb') as file:
    np.lib.format.write_array_header_1_0(file, header)
    file.write(
        b'\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
        b'K\x00\x85C\x01b\x87R(K\x01'
        + _int4(number)
        + b'\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87R(K\x03'
        b'X\x01\x00\x00\x00|NNN'
        + _int4(-1)
        + _int4(-1)
        + b'K?tb\x89]'
    )
    for record in records:
      if written % _BATCH == 0:
        file.write(b'e(' if written else b'(')
      file.write(b'B' + struct.pack('<I', len(record)) + record)
      written += 1
    file.write(b'etb.' if written else b'tb.')
  if written != number:
    raise ValueError(
        f'{path}: {written} records came, {number} were announced.'
    )


def _int4(number: int) -> bytes:
  return b'J' + struct.pack('<i', number)
