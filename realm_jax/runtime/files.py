"""A folder that appears complete or not at all, written by one process.

Public: `atomic_directory`, `leftovers`, `locked`.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import glob
import os
import pathlib
import shutil


@contextlib.contextmanager
def atomic_directory(
    output: pathlib.Path, overwrite: bool
) -> Iterator[pathlib.Path]:
  """Gives a temporary folder that becomes `output` if all goes well.

  What earlier, killed runs left behind is removed first.

  Raises:
    FileExistsError: if the output exists and is not to be overwritten, or
      another process is writing it.
  """
  parent, name = output.parent, output.name
  parent.mkdir(parents=True, exist_ok=True)
  for leftover in leftovers(output):
    with locked(leftover, output):
      shutil.rmtree(leftover)
  aside = parent / f'.{name}.old'
  if aside.exists():  # Killed between the two renames below, or after them.
    if output.exists():
      shutil.rmtree(aside)
    else:
      os.rename(aside, output)
  if output.exists() and not overwrite:
    raise FileExistsError(
        f'The output {output} exists; give --overwrite to replace it.'
    )
  temporary = parent / f'.{name}.tmp-{os.getpid()}'
  temporary.mkdir()
  try:
    with locked(temporary, output):
      yield temporary
      if output.exists():
        os.rename(output, aside)
      os.rename(temporary, output)
      if aside.exists():
        shutil.rmtree(aside)
  except OSError as error:
    if isinstance(error, (FileExistsError, FileNotFoundError)):
      raise
    raise OSError(
        f'Writing {output} failed, so that nothing is there now: {error}'
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def leftovers(output: pathlib.Path) -> list[pathlib.Path]:
  """Returns the temporary folders of runs that are going on or were killed."""
  return sorted(output.parent.glob(f'.{glob.escape(output.name)}.tmp-*'))


@contextlib.contextmanager
def locked(directory: pathlib.Path, output: pathlib.Path) -> Iterator[None]:
  """Holds a lock that ends with this process, however it ends."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise FileExistsError(
          f'Another process is writing {output} (in {directory}); wait for it '
          'or end it.'
      ) from None
    yield
  finally:
    os.close(descriptor)
