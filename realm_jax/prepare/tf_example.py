"""Records of TFDS: the wire format of `tf.train.Example`.

An example is a map from field names to lists. TFDS's own encoder is slower than
all the rest of `prepare`, and orders the fields by a hash map that differs
between processes; this encoder sorts them. The tests compare the two.
"""

from collections.abc import Collection
import functools


def example(fields: bytes) -> bytes:
  """Returns a record from its encoded fields, sorted by name."""
  return b'\x0a' + _VARINTS[len(fields)] + fields


def text_field(name: str, value: str) -> bytes:
  """Encodes a field that holds a text."""
  data = value.encode('utf-8')
  return _head(name, b'\x0a\x0a', len(data)) + data


def number_field(name: str, values: Collection[int]) -> bytes:
  """Encodes a field that holds integers."""
  if not values:
    return _head(name, b'\x1a', 0)
  packed = b''.join(map(_VARINTS.__getitem__, values))
  return _head(name, b'\x1a\x0a', len(packed)) + packed


@functools.lru_cache(1 << 14)
def _head(name: str, kind: bytes, size: int) -> bytes:
  """Returns what precedes the values of a field.

  Args:
    name: of the field.
    kind: tags of the list of values and, unless it is empty, of the values.
    size: bytes of the values.
  """
  key = b'\x0a' + _VARINTS[len(name)] + name.encode('ascii') + b'\x12'
  head = b''
  for tag in (kind[1:], kind[:1], key, b'\x0a'):
    if tag:
      head = tag + _VARINTS[len(head) + size] + head
  return head


class _Varints(dict[int, bytes]):
  """Encoded numbers. Small ones, such as offsets in a sentence, are kept."""

  def __missing__(self, value: int) -> bytes:
    value %= 2**64
    encoded = bytearray()
    while value > 0x7F:
      encoded.append(value & 0x7F | 0x80)
      value >>= 7
    encoded.append(value)
    return bytes(encoded)


_VARINTS = _Varints()
_VARINTS.update({value: _VARINTS[value] for value in range(1 << 12)})
