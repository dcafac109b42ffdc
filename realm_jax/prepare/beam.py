"""The work of `prepare` on many machines: an Apache Beam pipeline.

Public: `run`, `check_installed`. Reading the sources and writing the corpus are
a twentieth of the work and stay on one machine. In between, every task is
turned into its part by the same code, so that the corpus has the same bytes.
Tasks and parts go through a folder that all machines see.
"""

from collections.abc import Iterable, Sequence
import functools
import os
import pathlib

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import chunk_files as chunk_files_lib
from realm_jax.prepare import passages

_TASK_ENDING = '.task'


def check_installed() -> None:
  """Raises ImportError if Apache Beam is missing."""
  try:
    import apache_beam  # noqa: F401
  except ImportError as error:
    raise ImportError(
        '--beam needs the package apache-beam; run `pip install '
        "'realm_jax[beam]'`."
    ) from error


def run(
    tasks: Iterable[passages.Task],
    tokenizer: tokenizer_lib.Tokenizer,
    settings: passages.Settings,
    parts: chunk_files_lib.Parts,
    options: Sequence[str],
) -> None:
  """Makes the parts of all tasks that have none yet.

  Args:
    tasks: they are written down first, one after the other.
    tokenizer, settings: as of `passages.Packer`.
    parts: in a folder that the workers can write to.
    options: of the pipeline, such as '--runner=FlinkRunner'.

  Raises:
    RuntimeError: the pipeline failed.
  """
  import apache_beam as beam
  from apache_beam.options import pipeline_options

  waiting = []
  for task in tasks:
    path = parts.path(task)
    if not path.exists():
      waiting.append(os.fspath(path))
      path.with_suffix(_TASK_ENDING).write_bytes(task.to_bytes())
  if not waiting:
    return
  about = (tuple(tokenizer.vocab), tokenizer.lowercase, settings)
  with beam.Pipeline(
      options=pipeline_options.PipelineOptions(list(options))
  ) as pipeline:
    # The functions are named by module, not pickled by content: realm_jax is
    # installed on the workers.
    _ = (
        pipeline
        | 'Tasks' >> beam.Create(waiting)
        | 'Spread' >> beam.Reshuffle()
        | 'Pack' >> beam.Map(_make_part, about)
    )


def _make_part(
    path: str, about: tuple[tuple[str, ...], bool, passages.Settings]
) -> None:
  part = pathlib.Path(path)
  file = part.with_suffix(_TASK_ENDING)
  try:
    task = passages.Task.from_bytes(file.read_bytes())
  except FileNotFoundError:
    if part.exists():  # Done by a worker that was thought dead.
      return
    raise
  chunk_files_lib.save(part, _packer(about)(task))
  file.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def _packer(
    about: tuple[tuple[str, ...], bool, passages.Settings],
) -> passages.Packer:
  vocab, lowercase, settings = about
  return passages.Packer(tokenizer_lib.Tokenizer(vocab, lowercase), settings)
