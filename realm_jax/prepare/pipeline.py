"""Tasks to chunks: in this process, in a pool of processes, or in Apache Beam.

Every chunk is written to its chunk file (`workers.chunk_files`), which makes a
run resumable and spares the pool to pickle chunks. All ways run the same code,
so the corpus has the same bytes. Reading the sources and writing the corpus are
a twentieth of the work and stay in this process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import functools
import itertools
import os
import pathlib
from typing import NamedTuple

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import passages
from realm_jax.prepare import workers as workers_lib
from realm_jax.runtime import files

_TASK_SUFFIX = '.task'


class _Recipe(NamedTuple):
  """The arguments of a `passages.Packer`, for another process."""

  settings: passages.Settings
  directory: pathlib.Path  # The saved tokenizer.
  lowercase: bool
  digest: str


class Pipeline:
  """Turns tasks into chunks with one tokenizer and one set of settings.

  Args:
    tokenizer: as saved in `directory`, where workers read it.
    settings: of the packer.
    chunk_path: path of a chunk file.
    pool: the workers.
  """

  def __init__(
      self,
      tokenizer: tokenizer_lib.Tokenizer,
      directory: pathlib.Path,
      settings: passages.Settings,
      chunk_path: Callable[[str], pathlib.Path],
      pool: workers_lib.Pool,
  ):
    self._tokenizer, self._settings = tokenizer, settings
    self._chunk_path, self._pool = chunk_path, pool
    self._recipe = _Recipe(
        settings, directory, tokenizer.lowercase, tokenizer.digest
    )

  def run(self, tasks: Iterator[passages.Task]) -> Iterator[passages.Chunk]:
    """Yields the chunks of tasks, in order; existing chunk files are read."""
    first = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(first, tasks)
    if self._pool.workers == 1 or len(first) < 2:
      packer = passages.Packer(self._tokenizer, self._settings)
      for task in tasks:
        path = self._chunk_path(task.digest)
        chunk = _read(path)
        if chunk is None:
          chunk = packer(task)
          if len(first) > 1:  # A single task is not worth a file.
            save(path, chunk)
        yield chunk
      return
    for path in self._pool.map(
        functools.partial(_write_chunk, self._recipe),
        ((task, self._chunk_path(task.digest)) for task in tasks),
    ):
      yield load(path)

  def run_beam(
      self, tasks: Iterable[passages.Task], options: Sequence[str]
  ) -> None:
    """Writes the chunk files of all tasks in an Apache Beam pipeline.

    Tasks and chunks go through the folder of the chunk files, which all workers
    must see.

    Args:
      tasks: written to files first, one after the other.
      options: of the pipeline, such as '--runner=FlinkRunner'.

    Raises:
      RuntimeError: the pipeline failed.
    """
    import apache_beam as beam
    from apache_beam.options import pipeline_options

    paths = []
    for task in tasks:
      path = self._chunk_path(task.digest)
      if not path.exists():
        paths.append(os.fspath(path))
        path.with_suffix(_TASK_SUFFIX).write_bytes(task.to_bytes())
    if not paths:
      return
    with beam.Pipeline(
        options=pipeline_options.PipelineOptions(list(options))
    ) as pipeline:
      # The functions are pickled by module name, not by content: realm_jax is
      # installed on the workers.
      _ = (
          pipeline
          | 'Tasks' >> beam.Create(paths)
          | 'Spread' >> beam.Reshuffle()
          | 'Pack' >> beam.Map(_write_chunk_of_file, self._recipe)
      )


def check_beam_installed() -> None:
  """Raises ImportError if Apache Beam is missing."""
  try:
    import apache_beam  # noqa: F401
  except ImportError as error:
    raise ImportError(
        '--beam needs the package apache-beam; run `pip install '
        "'realm_jax[beam]'`."
    ) from error


def save(path: pathlib.Path, chunk: passages.Chunk) -> None:
  """Writes a chunk file; its checksum shows damage by a power failure."""
  with files.atomic_file(path, 'wb', durable=False) as file:
    file.write(chunk.to_bytes())


def load(path: pathlib.Path) -> passages.Chunk:
  """Reads a chunk file.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the file is damaged, for example after a power failure.
  """
  return passages.Chunk.from_bytes(path.read_bytes())


def _read(path: pathlib.Path) -> passages.Chunk | None:
  try:
    return load(path)
  except (FileNotFoundError, ValueError):
    return None


@functools.lru_cache(maxsize=1)
def _packer(recipe: _Recipe) -> passages.Packer:
  tokenizer = tokenizer_lib.Tokenizer.from_saved(
      recipe.directory, recipe.lowercase
  )
  return passages.Packer(tokenizer, recipe.settings)


def _write_chunk(
    recipe: _Recipe, job: tuple[passages.Task, pathlib.Path]
) -> pathlib.Path:
  task, path = job
  if _read(path) is None:
    save(path, _packer(recipe)(task))
  return path


def _write_chunk_of_file(name: str, recipe: _Recipe) -> None:
  path = pathlib.Path(name)
  file = path.with_suffix(_TASK_SUFFIX)
  try:
    task = passages.Task.from_bytes(file.read_bytes())
  except FileNotFoundError:
    if path.exists():  # Written by a worker that was believed dead.
      return
    raise
  save(path, _packer(recipe)(task))
  file.unlink(missing_ok=True)
