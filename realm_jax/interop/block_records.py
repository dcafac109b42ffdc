"""Block records: an .npy file of Python byte strings, streamed.

Public: `byte_records`, `byte_records_writer`. REALM's documents come as such a
file, block_records.npy, larger than memory. It holds a pickle; its instructions
are parsed, and none is executed.
"""

import array
from collections.abc import Iterable, Iterator
import os
import pathlib
import pickletools
import struct
from typing import Any

import numpy as np

from realm_jax.interop import weights

# Every word in the pickle of an object array, up to its items.
_WORDS = frozenset(
    'numpy.core.multiarray numpy._core.multiarray _reconstruct numpy ndarray'
    ' dtype O8 |'.split()
)
_LIST_OPCODES = ('MARK', 'APPEND', 'APPENDS', 'FRAME')
_PUTS = ('BINPUT', 'LONG_BINPUT', 'MEMOIZE')
_GETS = ('BINGET', 'LONG_BINGET')
_MAX_GAP = 1000  # Between the numbers of memo entries.
_ABSENT = 2**64 - 1
_BATCH = 1000  # Items per APPENDS, as in Python's own pickler.
# The pickle of an array of %b objects, up to its items.
_HEAD = (
    b'\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
    b'K\x00\x85C\x01b\x87R(K\x01J%b\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8'
    b'\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
    b'K?tb\x89]'
)


def byte_records(path: str | os.PathLike[str]) -> tuple[int, Iterator[bytes]]:
  """Opens an .npy file of byte strings, such as REALM's block_records.npy.

  Returns:
    Their number, and the strings one after the other; the file is never in
    memory as a whole.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: here or while iterating, if it is not such a file, is truncated
      or names a global that such a file does not need.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')
  with open(path, 'rb') as file, weights.located(path):
    if np.lib.format.read_magic(file) == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
      shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype != np.dtype(object) or len(shape) != 1:
      raise ValueError(
          f'an array of {dtype} and shape {shape}; expected one dimension of'
          ' Python byte strings'
      )
    return shape[0], _records(path, file.tell(), shape[0])


def _records(path: pathlib.Path, start: int, number: int) -> Iterator[bytes]:
  # The memo has places in the file: all strings do not fit in memory.
  memo = array.array('Q')
  found, last, in_list = 0, _ABSENT, False
  with open(path, 'rb', buffering=1 << 20) as file, weights.located(path):
    file.seek(start)
    operations: Iterator[Any] = pickletools.genops(file)
    for opcode, argument, place in operations:
      if opcode.name in _PUTS:
        key = len(memo) if argument is None else argument
        if key > len(memo) + _MAX_GAP:
          raise ValueError('the memo of the pickle has gaps')
        memo.extend([_ABSENT] * (key + 1 - len(memo)))
        memo[key] = last
        continue
      if opcode.name in _GETS:
        place = memo[argument] if argument < len(memo) else _ABSENT
        if place == _ABSENT:
          raise ValueError(f'memo entry {argument} is not set')
        back = file.tell()
        file.seek(place)
        opcode, argument, _ = next(pickletools.genops(file))
        file.seek(back)
      last = place
      if in_list and isinstance(argument, bytes):
        found += 1
        yield argument
      elif in_list and opcode.name == 'TUPLE':
        in_list = False
      elif in_list and opcode.name not in _LIST_OPCODES:
        kind = ' '.join(value.name for value in opcode.stack_after)
        raise ValueError(f'an item is of type {kind}; expected bytes')
      elif isinstance(argument, str) and not {*argument.split()} <= _WORDS:
        raise ValueError(
            f'it names {argument!r}, which is refused: byte strings need only '
            + ', '.join(sorted(_WORDS))
        )
      elif opcode.name == 'EMPTY_LIST':
        in_list = True
    if found != number:
      raise ValueError(
          f'it holds {found} records, its header says {number}'
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
    file.write(_HEAD % struct.pack('<i', number))
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
