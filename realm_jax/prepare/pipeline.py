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

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import passages
from realm_jax.prepare import workers as workers_lib
from realm_jax.runtime import files

_TASK_SUFFIX = '.task'
_Recipe = tuple[tokenizer_lib.Tokenizer, passages.Settings]  # For a `Packer`.


class Pipeline:
  """Turns tasks into chunks with one tokenizer and one set of settings."""

  def __init__(
      self,
      tokenizer: tokenizer_lib.Tokenizer,
      settings: passages.Settings,
      chunk_path: Callable[[str], pathlib.Path],
      workers: int,
  ):
    self._tokenizer, self._settings = tokenizer, settings
    self._chunk_path, self._workers = chunk_path, workers
    self._recipe = (tokenizer, settings)

  def run(self, tasks: Iterator[passages.Task]) -> Iterator[passages.Chunk]:
    """Yields the chunks of tasks, in order; existing chunk files are read."""
    first = list(itertools.islice(tasks, 2))
    tasks = itertools.chain(first, tasks)
    if self._workers == 1 or len(first) < 2:
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
    for path in workers_lib.map_ordered(
        _write_chunk,
        ((task, self._chunk_path(task.digest)) for task in tasks),
        self._workers,
        functools.partial(_set_recipe, self._recipe),
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
  """Writes a chunk file."""
  with files.atomic_file(path, 'wb') as file:
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
  return passages.Packer(*recipe)


_recipe: _Recipe | None = None  # Set in worker processes.


def _set_recipe(recipe: _Recipe) -> None:
  global _recipe
  _recipe = recipe


def _write_chunk(job: tuple[passages.Task, pathlib.Path]) -> pathlib.Path:
  task, path = job
  assert _recipe is not None
  if _read(path) is None:
    save(path, _packer(_recipe)(task))
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
