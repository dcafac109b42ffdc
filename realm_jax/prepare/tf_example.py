"""Records of TFDS: the wire format of `tf.train.Example`.

An example is a map from field names to lists. TFDS's own encoder is slower than
all the rest of `prepare`, and orders the fields by a hash map that differs
between processes; this encoder sorts them. The tests compare the two.
"""

from collections.abc import Collection
import functools


def example(fields: bytes) -> bytes:
  """Returns a record from its encoded fields, sorted by name."""
  return _tagged(fields)


def text_field(name: str, value: str) -> bytes:
  """Encodes a field that holds a text."""
  return _field(name, _tagged(_tagged(value.encode('utf-8'))))


def number_field(name: str, values: Collection[int]) -> bytes:
  """Encodes a field that holds integers."""
  if not values:
    return _field(name, _NO_NUMBERS)
  # Most numbers are offsets in a sentence. A call for each would take as long
  # as all the rest of a record.
  if min(values) >= 0 and max(values) < len(_SMALL):
    packed = b''.join(map(_SMALL.__getitem__, values))
  else:
    packed = b''.join(map(_varint, values))
  packed = _tagged(packed)
  return _field(name, b'\x1a' + _varint(len(packed)) + packed)


def _field(name: str, feature: bytes) -> bytes:
  return _tagged(_name(name) + _varint(len(feature)) + feature)


@functools.cache
def _name(name: str) -> bytes:
  return _tagged(name.encode('ascii')) + b'\x12'


def _tagged(content: bytes) -> bytes:
  size = len(content)
  if size < len(_TAGS):
    return _TAGS[size] + content
  return b'\x0a' + _varint(size) + content


def _varint(value: int) -> bytes:
  if 0 <= value < len(_SMALL):
    return _SMALL[value]
  value %= 2**64
  encoded = bytearray()
  while value > 0x7F:
    encoded.append(value & 0x7F | 0x80)
    value >>= 7
  encoded.append(value)
  return bytes(encoded)


_SMALL: list[bytes] = []
_SMALL.extend([_varint(value) for value in range(1 << 12)])
_TAGS = [b'\x0a' + size for size in _SMALL]
_NO_NUMBERS = b'\x1a\x00'
