"""`realm-jax index compact`: what was added and removed, made plain again.

Public: `compact`. The documents that are there become a corpus of their own
with a generation of its own; searches find the same documents as before, under
other row numbers.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import time
from typing import Any

import numpy as np

from realm_jax.builder import documents as documents_lib
from realm_jax.builder import editing
from realm_jax.builder import edition as edition_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import generation
from realm_jax.prepare import compaction
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files


def compact(
    workdir: editing.Path,
    output: editing.Path | None = None,
    *,
    progress: bool = True,
) -> editing.Change | None:
  """Writes what is there as a plain corpus with a generation of its own.

  From then on it is the first part of the documents, to which others are
  added. Its generation is made from the parameters of the newest one in the
  workdir; where the documents have embeddings of these, they are copied.

  Args:
    workdir: of a job that has an index.
    output: folder for the corpus; None: documents/corpus-V of the workdir.
    progress: whether to show progress bars.

  Returns:
    What was done; None if there was nothing to do.

  Raises:
    FileExistsError: if `output` exists.
    FileNotFoundError: if the workdir or its index is missing.
    RuntimeError: if another command that changes documents is at work.
    OSError: if the disk is full.
  """
  with editing.locked(workdir) as documents:
    about = _newest_of_all(documents)
    removed = documents.removed
    if len(documents.parts) == 1 and not len(removed):
      newest = documents_lib.newest_generation(documents)
      if newest['params_digest'] == about['params_digest']:
        return None
    version = documents.edition.version + 1
    path = documents.folder / f'corpus-{version}'
    if output is not None:
      path = pathlib.Path(output).absolute()
    overlay = overlay_lib.Overlay(
        [part.corpus for part in documents.parts], removed
    )
    compaction.compact(overlay, path, progress)
    with contextlib.ExitStack() as undo:
      undo.callback(files.remove, path)
      made = documents_lib.Part(
          corpus_lib.Corpus.open(path), documents.folder / f'index-{version}'
      )
      start = time.perf_counter()
      # Of each part, the table or None where it has to be embedded.
      tables = [documents.embeddings(part, about) for part in documents.parts]
      embedded = sum(
          len(part.corpus.passages)
          for part, table in zip(documents.parts, tables, strict=True)
          if table is None
      )
      documents.publish(
          made,
          about,
          _live_blocks(documents, tables, about, progress),
          documents.config.mips,
      )
      seconds = time.perf_counter() - start
      edition = edition_lib.Edition(
          version,
          documents.edition.origin,
          (
              edition_lib.PartOnDisk(
                  path.name if output is None else str(path),
                  made.index.name,
                  made.corpus.fingerprint,
              ),
          ),
          np.zeros(0, np.int64),
      )
      edition_lib.write(documents.folder, edition, {'command': 'compact'})
      undo.pop_all()
  return editing.Change(
      version=version,
      step=about['step'],
      added=0,
      removed=len(removed),
      missing=0,
      embedded=embedded,
      seconds=seconds,
      live=len(made.corpus.passages),
      compact=False,
      output=path,
  )


def _live_blocks(
    documents: documents_lib.Documents,
    tables: list[Any],
    about: dict[str, Any],
    progress: bool,
) -> Iterator[np.ndarray]:
  """Yields the embeddings of the rows that were not removed, in order."""
  first = 0
  for part, table in zip(documents.parts, tables, strict=True):
    rows = len(part.corpus.passages)
    here = documents.removed - first
    kept = np.ones(rows, bool)
    kept[here[(here >= 0) & (here < rows)]] = False
    size = generation.ROWS_PER_SHARD
    if table is None:
      blocks = documents.embed(part, documents.params(about), progress)
    else:
      blocks = (table[start : start + size] for start in range(0, rows, size))
    start = 0
    for block in blocks:
      yield block[kept[start : start + len(block)]]
      start += len(block)
    first += rows


def _newest_of_all(documents: documents_lib.Documents) -> dict[str, Any]:
  """As `newest_generation`, or what training made since a compaction."""
  about = documents_lib.newest_generation(documents)
  trained = documents.workdir / generation.DIRECTORY
  for step in checkpoint.steps_in(trained):
    try:
      found = generation.read_manifest(trained / str(step))
    except FileNotFoundError:  # A builder at work just took it away.
      continue
    if (
        found['corpus_fingerprint'] == documents.edition.origin
        and found['step'] > about['step']
    ):
      about = found
  return about
