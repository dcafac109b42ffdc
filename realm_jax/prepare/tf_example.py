"""Encodes records for TFDS.

Public: `example`, `text_field`, `number_field`. A record is a
`tf.train.Example`, what TFDS stores: a map from names to lists. TFDS's own
encoder takes longer than everything else in `prepare`, and leaves the order of
the fields to a hash map that differs from process to process; ours sorts them.
The tests compare the two.
"""

from collections.abc import Iterable
import functools


def example(fields: bytes) -> bytes:
  """Returns the record made of some fields, which are in order of names."""
  return b'\x0a' + _varint(len(fields)) + fields


def text_field(name: str, value: str) -> bytes:
  """Returns a field of a record that holds a text."""
  data = value.encode('utf-8')
  return _field(name, _tagged(_tagged(data)))


def number_field(name: str, values: Iterable[int]) -> bytes:
  """Returns a field of a record that holds integers."""
  packed = b''.join([_varint(value) for value in values])
  packed = packed and _tagged(packed)
  return _field(name, b'\x1a' + _varint(len(packed)) + packed)


def _field(name: str, feature: bytes) -> bytes:
  entry = _name(name) + _varint(len(feature)) + feature
  return b'\x0a' + _varint(len(entry)) + entry


@functools.cache
def _name(name: str) -> bytes:
  return _tagged(name.encode('ascii')) + b'\x12'


def _tagged(content: bytes) -> bytes:
  return b'\x0a' + _varint(len(content)) + content


def _varint(value: int) -> bytes:
  if 0 <= value < len(_SMALL):  # Nearly all: lengths and places in a sentence.
    return _SMALL[value]
  return _long_varint(value)


def _long_varint(value: int) -> bytes:
  value %= 2**64
  encoded = bytearray()
  while value > 0x7F:
    encoded.append(value & 0x7F | 0x80)
    value >>= 7
  encoded.append(value)
  return bytes(encoded)


_SMALL = [_long_varint(value) for value in range(1 << 12)]
