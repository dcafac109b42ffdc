"""Files and folders that appear complete or not at all; checksums.

No JAX: workers of the input pipeline import this module. Temporary names begin
with a dot, so that no reader takes them for results.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import shutil
from typing import IO, Any
import uuid

Path = pathlib.Path | str
TEMPORARY = '.tmp-'  # First letters of a folder that is being deleted.


class Damaged(ValueError):
  """Bytes on disk differ from those that were written."""


@contextlib.contextmanager
def atomic_file(
    path: Path, mode: str = 'w', durable: bool = True
) -> Iterator[IO[Any]]:
  """Opens a temporary file that replaces `path` if the block succeeds.

  A reader sees the whole new content or the whole old one, also after a power
  failure unless `durable` is False. `mode` is 'w' (UTF-8 text) or 'wb'.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  encoding = None if 'b' in mode else 'utf-8'
  try:
    with open(temporary, mode, encoding=encoding) as file:
      yield file
      file.flush()
      if durable:
        os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file; see `atomic_file`."""
  with atomic_file(path) as file:
    json.dump(value, file, indent=2)
    file.write('\n')


def read_json(path: Path) -> Any:
  """Reads a JSON file; a ValueError names a file that is not JSON."""
  try:
    return json.loads(pathlib.Path(path).read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not readable as JSON: {error}') from error


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
  """Reads a JSON object; {} if `optional` and there is no such file.

  Raises:
    ValueError: the file is not JSON, or not an object.
  """
  if optional and not pathlib.Path(path).is_file():
    return {}
  value = read_json(path)
  if not isinstance(value, dict):
    raise ValueError(f'{path} is not a JSON object.')
  return value


def read_lines(path: Path) -> list[str]:
  """Reads lines of UTF-8, with LF or CRLF, without a byte order mark.

  Raises:
    ValueError: the file is not UTF-8; names the line.
  """
  data = pathlib.Path(path).read_bytes()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b'\n') + 1
    raise ValueError(f'{path}:{line}: not UTF-8 ({error.reason}).') from None
  # Not splitlines(): lines may contain U+2028 and similar characters.
  lines = text.removesuffix('\n').split('\n') if text else []
  return [line.removesuffix('\r') for line in lines]


@contextlib.contextmanager
def atomic_folder(
    output: Path, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """Gives a temporary folder that is renamed to `output` if all succeeds.

  Temporary folders of killed runs are removed first.

  Raises:
    FileExistsError: the output exists and `overwrite` is False, or another
      process is writing it.
  """
  output = pathlib.Path(output)
  parent, name = output.parent, output.name
  parent.mkdir(parents=True, exist_ok=True)
  for leftover in leftovers(output):
    with folder_lock(leftover, output):
      shutil.rmtree(leftover)
  replaced = parent / f'.{name}.old'
  if replaced.exists():  # A run was killed between or after the two renames.
    if output.exists():
      shutil.rmtree(replaced)
    else:
      os.rename(replaced, output)
  if output.exists() and not overwrite:
    raise FileExistsError(
        f'The output {output} exists; give --overwrite to replace it.'
    )
  temporary = parent / f'.{name}.tmp-{os.getpid()}'
  temporary.mkdir()
  try:
    with folder_lock(temporary, output):
      yield temporary
      if output.exists():
        os.rename(output, replaced)
      os.rename(temporary, output)
      if replaced.exists():
        shutil.rmtree(replaced)
  except OSError as error:
    if isinstance(error, (FileExistsError, FileNotFoundError)):
      raise
    raise OSError(f'Writing {output} failed; nothing was kept: {error}') from (
        error
    )
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def leftovers(output: Path) -> list[pathlib.Path]:
  """Returns the temporary folders of unfinished or killed writers."""
  output = pathlib.Path(output)
  return sorted(output.parent.glob(f'.{glob.escape(output.name)}.tmp-*'))


@contextlib.contextmanager
def folder_lock(directory: pathlib.Path, output: Path) -> Iterator[None]:
  """Locks a folder itself, while it is written or removed."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise FileExistsError(
          f'Another process is writing {output} (in {directory}). Wait for it'
          ' or end it.'
      ) from None
    yield
  finally:
    os.close(descriptor)


def remove(path: Path) -> None:
  """Deletes a folder, which is first renamed: no reader sees half of it."""
  path = pathlib.Path(path)
  renamed = path.with_name(f'{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}')
  try:
    os.rename(path, renamed)
  except FileNotFoundError:
    return
  shutil.rmtree(renamed, ignore_errors=True)


def sha256(path: Path) -> str:
  """Returns the SHA-256 of a file as hexadecimal digits."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_manifest(path: Path, format_version: int, mend: str) -> dict[str, Any]:
  """Reads a manifest and compares it with its checksum.

  `format_version` is the newest that is known. `mend` says in a message what to
  do about a manifest that cannot be read.

  Raises:
    FileNotFoundError: there is no such file.
    Damaged: the manifest differs from what was written.
    ValueError: its format is newer.
  """
  text = pathlib.Path(path).read_text(encoding='utf-8', errors='replace')
  try:
    manifest = json.loads(text)
    version, recorded = manifest['format_version'], manifest['manifest_sha256']
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise Damaged(f'{path} is damaged: not readable. {mend}') from error
  if isinstance(version, int) and version > format_version:
    raise ValueError(
        f'{path} has format {version}, from a newer realm_jax; this one reads'
        f' format {format_version}. Install the newer version. Or: {mend}'
    )
  found = manifest_digest(manifest)
  if found != recorded:
    raise Damaged(
        f'{path} is damaged: its SHA-256 is {found}, it says {recorded}. {mend}'
    )
  return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
  """Returns the SHA-256 of a manifest without its field `manifest_sha256`."""
  rest = {k: v for k, v in manifest.items() if k != 'manifest_sha256'}
  return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
