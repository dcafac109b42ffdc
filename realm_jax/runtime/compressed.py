"""Lines of files that may be compressed.

Public: `ENDINGS`, `plain_name`, `lines`.
"""

import bz2
from collections.abc import Iterator
import gzip
import lzma
import pathlib
from typing import IO
import zlib

# In the standard library from Python 3.14 on, as compression.zstd.
from backports import zstd

ENDINGS = ('.gz', '.xz', '.bz2', '.zst')  # Of compressed files.


def plain_name(path: pathlib.Path) -> str:
  """Returns a file's name without the ending that tells its compression."""
  return path.stem if path.suffix in ENDINGS else path.name


def lines(path: pathlib.Path) -> Iterator[bytes]:
  """Yields the lines of a file with their ends, without a byte order mark.

  Raises:
    ValueError: naming the file and the line where a compressed one is damaged.
  """
  read = 0
  try:
    with opened(path) as file:
      for line in file:
        if not read:
          line = line.removeprefix(b'\xef\xbb\xbf')
        read += 1
        yield line
  except (
      EOFError,
      gzip.BadGzipFile,
      lzma.LZMAError,
      zlib.error,
      zstd.ZstdError,
  ) as error:
    raise _damaged(path, read, error) from None
  except OSError as error:
    if path.suffix == '.bz2' and error.errno is None:  # bz2 has no own error.
      raise _damaged(path, read, error) from None
    raise


def opened(path: pathlib.Path) -> IO[bytes]:
  """Opens a file for reading what was compressed."""
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


def _damaged(path: pathlib.Path, read: int, error: Exception) -> ValueError:
  return ValueError(
      f'{path}: the compressed file is damaged or cut off after line {read} '
      f'({error}).'
  )
