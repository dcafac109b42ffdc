"""What a run has worked out so far, kept beside its output until it is done.

Public: `Parts`, `kept`, `write`; `save`, `load` (of `prepare`). There a part is
a chunk in a file that is named by the digest of the task it came from, so that
a run that was killed goes on where it was, even if the sources grew meanwhile:
only what is not there is worked out.
"""

from collections.abc import Iterator
import contextlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

from realm_jax.prepare import passages
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_ENDING = '.part'


class Parts:
  """A folder of parts made with the same settings."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory

  def path(self, task: passages.Task) -> pathlib.Path:
    """Returns where the chunk of a task is, or would be."""
    return self.named(task.digest)

  def named(self, name: str) -> pathlib.Path:
    """Returns where the part of a name is, or would be."""
    return self.directory / f'{name}{_ENDING}'

  def __len__(self) -> int:
    return sum(1 for _ in self.directory.glob(f'*{_ENDING}'))


def write(path: pathlib.Path, data: bytes) -> None:
  """Writes a part; it appears complete or not at all."""
  temporary = path.with_suffix(f'.tmp-{os.getpid()}')
  temporary.write_bytes(data)
  os.replace(temporary, path)


def save(path: pathlib.Path, chunk: passages.Chunk) -> None:
  """Writes a chunk as a part."""
  write(path, chunk.to_bytes())


def load(path: pathlib.Path) -> passages.Chunk:
  """Reads a part.

  Raises:
    FileNotFoundError: if there is none.
    ValueError: if it is damaged, as after a loss of power.
  """
  return passages.Chunk.from_bytes(path.read_bytes())


@contextlib.contextmanager
def kept(output: pathlib.Path, made_with: dict[str, Any]) -> Iterator[Parts]:
  """Gives the parts beside an output; only a killed run leaves them there.

  Args:
    output: of the run; the parts are in `.NAME.parts` beside it.
    made_with: everything that a part depends on besides its task, JSON.

  Raises:
    FileExistsError: if another process is writing them.
  """
  directory = output.parent / f'.{output.name}.parts'
  directory.mkdir(parents=True, exist_ok=True)
  with files.folder_lock(directory, output):
    parts = Parts(directory)
    about = directory / 'made_with.json'
    wanted = json.dumps(made_with, indent=2, sort_keys=True)
    found = about.read_text('utf-8') if about.is_file() else None
    if found != wanted and len(parts):
      log.warning(
          'The %d parts of an interrupted run in %s are discarded: they were '
          'made with other settings.',
          len(parts),
          directory,
      )
    elif len(parts):
      log.info(
          'An interrupted run left %d parts in %s; they are not made again.',
          len(parts),
          directory,
      )
    try:
      if found != wanted:
        for file in directory.iterdir():
          file.unlink()
        about.write_text(wanted, 'utf-8')
      yield parts
    except Exception:  # Not an interruption: that is why parts are kept.
      shutil.rmtree(directory, ignore_errors=True)
      raise
    shutil.rmtree(directory)
