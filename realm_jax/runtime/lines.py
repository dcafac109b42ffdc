"""Lines of text files, compressed or not, and JSON objects with their place.

Every error names the file and the line.
"""

import bz2
from collections.abc import Iterator
import gzip
import json
import lzma
import pathlib
from typing import IO, Any
import zlib

# In the standard library from Python 3.14 on, as compression.zstd.
from backports import zstd

ENDINGS = ('.gz', '.xz', '.bz2', '.zst')  # Endings of compressed files.


def plain_name(path: pathlib.Path) -> str:
  """Returns a file's name without the ending that tells its compression."""
  return path.stem if path.suffix in ENDINGS else path.name


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
  except (
      EOFError,
      gzip.BadGzipFile,
      lzma.LZMAError,
      zlib.error,
      zstd.ZstdError,
  ) as error:
    raise _damaged(path, count, error) from None
  except OSError as error:
    if path.suffix == '.bz2' and error.errno is None:  # bz2 has no own error.
      raise _damaged(path, count, error) from None
    raise


def opened(path: pathlib.Path) -> IO[bytes]:
  """Opens a file, whose ending tells its compression, for reading."""
  if path.suffix == '.gz':
    return gzip.open(path, 'rb')  # type: ignore[return-value]
  if path.suffix == '.xz':
    return lzma.open(path, 'rb')
  if path.suffix == '.bz2':
    return bz2.open(path, 'rb')
  if path.suffix == '.zst':
    # Large windows, as `zstd --long` makes them, are read, too.
    limits = {int(zstd.DecompressionParameter.window_log_max): 31}
    return zstd.open(path, 'rb', options=limits)  # type: ignore[return-value]
  return open(path, 'rb')


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
  text = decoded(line)
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


def decoded(data: bytes, what: str = 'the line') -> str:
  """Decodes UTF-8; a ValueError names the byte that is not."""
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start)
    where = f' (its line {line + 1})' if line else ''
    raise ValueError(
        f'not UTF-8: byte {error.start} of {what}{where} is'
        f' 0x{data[error.start]:02x}'
    ) from None


def _damaged(path: pathlib.Path, count: int, error: Exception) -> ValueError:
  return ValueError(
      f'{path}: the compressed file is damaged or cut off after line {count}'
      f' ({error}).'
  )
