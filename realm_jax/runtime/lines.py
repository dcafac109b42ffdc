"""Lines of text files, compressed or not, and JSON objects with their place.

Every error names the file and the line.
"""

import bz2
from collections.abc import Callable, Iterator, Sequence
import functools
import gzip
import json
import lzma
import pathlib
import re
from typing import IO, Any
import zlib

# In the standard library from Python 3.14 on, as compression.zstd.
from backports import zstd

# Large windows, as `zstd --long` makes them, are read, too.
_WIDE = {int(zstd.DecompressionParameter.window_log_max): 31}
# Endings of compressed files, their first bytes, and what opens them.
_COMPRESSED: dict[str, tuple[bytes, Callable[..., Any]]] = {
    '.gz': (b'\x1f\x8b', gzip.open),
    '.xz': (b'\xfd7zXZ\x00', lzma.open),
    '.bz2': (b'BZh', bz2.open),
    '.zst': (b'\x28\xb5\x2f\xfd', functools.partial(zstd.open, options=_WIDE)),
}
_CONTROL = re.compile(rb'[\x00-\x08\x0e-\x1f]')  # Bytes that no text has.
# Errors of damaged compressed files; bz2 and gzip have an OSError.
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstd.ZstdError)

_JSON_PART = 1 << 16  # Bytes of a JSON file that are read at a time.
_DECODER = json.JSONDecoder()


def plain_name(path: pathlib.Path) -> str:
  """Returns a file's name without the ending that tells its compression."""
  return path.stem if path.suffix.lower() in _COMPRESSED else path.name


def lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines of a file with their ends, without a byte order mark.

  Raises:
    ValueError: naming the file and the line where a compressed one is damaged.
  """
  count = 0
  try:
    with opened(path) as file:
      for line in file:
        if not count:
          line = line.removeprefix(b'\xef\xbb\xbf')
        count += 1
        yield line
  except DAMAGED as error:
    raise _damage(path, count, error) from None


def head(path: pathlib.Path, size: int) -> bytes:
  """Returns the first bytes of a file, or those before the first damage.

  They are without a byte order mark.

  Raises:
    ValueError: a compressed file is damaged from the start on.
  """
  data = b''
  try:
    with opened(path) as file:
      while part := file.readline(size - len(data)):
        data += part
  except DAMAGED as error:
    damage = _damage(path, 0, error)
    if not data or damage is error:
      raise damage from None
  return data.removeprefix(b'\xef\xbb\xbf')


def opened(path: pathlib.Path) -> IO[bytes]:
  """Opens a file for reading; its content tells the compression.

  The ending tells it for a file that is empty or damaged: a browser that
  decompresses a download keeps the ending.
  """
  file = open(path, 'rb')  # noqa: SIM115
  start, found = file.peek(8), _COMPRESSED.get(path.suffix.lower())
  if start and not _CONTROL.search(start):
    found = None
  for compressed in _COMPRESSED.values():
    if start.startswith(compressed[0]):
      found = compressed
  if found is None:
    return file
  file.close()
  return found[1](path, 'rb')


def first_line(error: BaseException) -> str:
  """Returns the first line of another library's error, without colours."""
  lines = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip().splitlines()
  return lines[0] if lines else type(error).__name__


def listed(items: Sequence[str], most: int, separator: str = ', ') -> str:
  """Returns at most `most` items for a message, and the number of the rest."""
  shown = separator.join(items[:most])
  if len(items) > most:
    shown += f'{separator.lstrip(",")}and {len(items) - most} more'
  return shown


def comma_separated(text: str | None) -> list[str]:
  """Returns the items of a comma-separated list, without blanks around them."""
  items = [item.strip() for item in (text or '').split(',')]
  return [item for item in items if item]


def json_objects(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (FILE:LINE, object) of a JSON Lines file.

  Raises:
    ValueError: a line is no JSON object; names the file and the line.
  """
  for number, line in enumerate(lines(path), start=1):
    where = f'{path}:{number}'
    try:
      yield where, json_object(line)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None


def json_object(line: bytes) -> dict[str, Any]:
  """Returns the object on a line; a ValueError says what is wrong with it."""
  if not line.strip():
    raise ValueError('an empty line; each line must be a JSON object')
  # Files that were joined have a byte order mark between them.
  text = decoded(line).lstrip('\ufeff')
  try:
    value = json.loads(text)
  except RecursionError:
    raise ValueError('malformed JSON: nested too deeply') from None
  except ValueError as error:  # Also numbers of too many digits.
    raise ValueError(f'malformed JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(
        f'a JSON {type(value).__name__}; each line must be an object'
    )
  return value


def json_values(
    path: pathlib.Path,
) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
  """Yields (FILE:LINE, object) of an array, or of objects over several lines.

  A part of the file is in memory at a time. An element that is no object is a
  ValueError.

  Raises:
    ValueError: the file is malformed, so that its rest cannot be read.
  """
  reader = _JsonReader(path)
  in_array = reader.skip('[')
  while not reader.skip(']' if in_array else ''):
    place = reader.place
    value = reader.value()
    if isinstance(value, dict):
      yield place, value
    else:
      yield place, ValueError(
          f'a JSON {type(value).__name__}; each record must be an object'
      )
    if in_array and not reader.skip(','):
      if not reader.skip(']'):
        raise reader.error('neither a comma nor the end of the array')
      break
  if in_array and not reader.skip(''):
    raise reader.error('text after the end of the array')


class _JsonReader:
  """Reads the JSON values of a file one by one."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._lines = lines(path)
    self._text, self._at, self._line = '', 0, 1
    self._size = _JSON_PART
    self._ended = False

  @property
  def place(self) -> str:
    return f'{self._path}:{self._line}'

  def error(self, what: str) -> ValueError:
    return ValueError(
        f'{self.place}: malformed JSON: {what}. The rest of the file cannot be'
        ' read.'
    )

  def skip(self, mark: str) -> bool:
    """Skips blanks and, if it is next, a mark; '' is the end of the file."""
    while True:
      end = self._at
      while end < len(self._text) and self._text[end].isspace():
        end += 1
      self._advance(end)
      if end < len(self._text) or not self._read():
        break
    if not mark:
      return self._at == len(self._text)
    if not self._text.startswith(mark, self._at):
      return False
    self._advance(self._at + 1)
    return True

  def value(self) -> Any:
    """Returns the next value."""
    while True:
      try:
        value, end = _DECODER.raw_decode(self._text, self._at)
        # A number may be cut off.
        if end < len(self._text) or isinstance(value, dict) or self._ended:
          self._advance(end)
          return value
      except RecursionError:
        raise self.error('nested too deeply') from None
      except json.JSONDecodeError as error:
        if not is_cut(error, self._text) or self._ended:
          raise self.error(error.msg) from None
      except ValueError as error:  # A number of too many digits.
        raise self.error(str(error)) from None
      self._size *= 2  # A long value is not parsed again for each line.
      self._read()

  def _advance(self, end: int) -> None:
    self._line += self._text.count('\n', self._at, end)
    self._at = end

  def _read(self) -> bool:
    """Appends further lines; returns whether there are any."""
    data, size = list[bytes](), 0
    for line in self._lines:
      data.append(line)
      size += len(line)
      if size >= self._size:
        break
    self._ended = not data
    try:
      text = b''.join(data).decode('utf-8')
    except UnicodeDecodeError as error:
      self._line += self._text.count('\n', self._at)
      self._line += b''.join(data)[: error.start].count(b'\n')
      raise ValueError(
          f'{self.place}: not UTF-8 (0x{error.object[error.start]:02x}).'
      ) from None
    self._text, self._at = self._text[self._at :] + text, 0
    return not self._ended


def is_cut(error: json.JSONDecodeError, text: str) -> bool:
  """Returns whether JSON is wrong only because the text ends too early."""
  return error.msg.startswith('Unterminated') or error.pos >= len(text) - 16


def decoded(data: bytes, what: str = 'the line') -> str:
  """Decodes UTF-8; a ValueError names the byte that is not."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start)
    where = f' (its line {line + 1})' if line else ''
    raise ValueError(
        f'not UTF-8: byte {error.start} of {what}{where} is'
        f' 0x{data[error.start]:02x}; `iconv -f LATIN1 -t UTF-8` converts'
        ' Latin-1'
    ) from None


def _damage(path: pathlib.Path, count: int, error: Exception) -> Exception:
  """Returns what to raise for an error after some lines of a file.

  An error of the system has a number, and stays as it is.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return error
  return ValueError(
      f'{path}: the compressed file is damaged or cut off after line {count}'
      f' ({error}).'
  )
