"""`realm-jax export`: a workdir becomes what other tools read.

Public: `run`, `FORMATS`.
"""

from collections.abc import Sequence
import pathlib

from realm_jax.interop import export_huggingface
from realm_jax.interop import export_index
from realm_jax.interop import export_sentence_transformers
from realm_jax.interop import exported

FORMATS = ('huggingface', 'sentence-transformers', 'index')


def run(
    workdir: exported.Path,
    format: str,
    output: exported.Path,
    *,
    step: int | None = None,
    classes: Sequence[str] | None = None,
    dtype: str = 'float32',
) -> list[pathlib.Path]:
  """Exports a workdir.

  Args:
    workdir: trained or imported.
    format: one of `FORMATS`.
    output: folder to write; it appears, complete, at the very end.
    step: of a checkpoint or of a snapshot of the retriever; None: the newest
      checkpoint.
    classes: of 'huggingface': of `huggingface_names.KINDS`, the first in
      `output` itself, each further one in a folder of its name.
    dtype: of 'index': 'float32' or 'float16'.

  Returns:
    The folders that were written.

  Raises:
    FileExistsError: if `output` is there and not empty.
    FileNotFoundError: if there is no such workdir, step or index.
    ValueError: if the format is unknown, or the workdir lacks what it needs.
  """
  if format not in FORMATS:
    raise ValueError(
        f'--format={format}: there are {", ".join(FORMATS)}.'
    )
  opened_workdir = exported.open_workdir(workdir, step)
  match format:
    case 'huggingface':
      return export_huggingface.export(opened_workdir, output, classes)
    case 'sentence-transformers':
      return export_sentence_transformers.export(opened_workdir, output)
  return [export_index.export(opened_workdir, output, dtype)]
