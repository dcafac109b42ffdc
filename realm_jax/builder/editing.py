"""`realm-jax index add|update|delete`: changes to the documents.

Public: `add`, `update`, `delete`, `Change`, `locked`. Nothing is retrained:
only what is new is embedded, with the parameters of the newest generation of
the index; what is gone is no longer found. All of a command holds, or, if it
is killed or fails, nothing of it. See `documents` for the files.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import shutil
import time
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import documents as documents_lib
from realm_jax.builder import edition as edition_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import generation
from realm_jax.prepare import prepare
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources as sources_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import process

log = logging.getLogger(__name__)

# What a search has to pass over, as a share of all rows, and how many files
# there are: beyond either, a compaction pays.
_MANY_CHANGES, _MANY_PARTS = 0.1, 16
_LISTED = 5  # Of ids that are wrong.
_OURS = re.compile(r'(corpus|index)-\d+|removed-\d+\.npy|\.corpus-\d+\.tmp-\d+')

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Change:
  """What a command did.

  version: of the documents, after it.
  step: of the generation whose parameters embedded.
  added, removed: passages.
  missing: ids that were not there, where that is allowed.
  embedded, seconds: passages, and how long it took to embed them.
  live: passages that can be found now.
  compact: whether it is time to.
  output: the corpus that a compaction wrote.
  """

  version: int
  step: int
  added: int
  removed: int
  missing: int
  embedded: int
  seconds: float
  live: int
  compact: bool
  output: pathlib.Path | None = None


def add(
    workdir: Path,
    sources: Sequence[str],
    *,
    skip_bad_records: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Change:
  """Adds documents.

  Args:
    workdir: of a job that has an index.
    sources: JSON Lines files, folders or glob patterns, as of `prepare`; each
      record needs an `id`.
    skip_bad_records: leave bad records out rather than stopping at the first.
    workers: processes that pack the texts; None: as many as there are cores.
    progress: whether to show progress bars.

  Raises:
    FileNotFoundError: if a source, the workdir, or its index is missing.
    ValueError: if a record is wrong, or an id is there already.
    RuntimeError: if another such command is at work.
    OSError: if the disk is full.
  """
  with locked(workdir) as documents:
    source = _records(sources, skip_bad_records)
    ids = [record.id for record in source.check()]
    known = [
        name
        for name, rows in zip(
            ids, documents.corpus.record_rows(ids), strict=True
        )
        if len(rows)
    ]
    if known:
      raise ValueError(
          f'{_some(known)} there already; `realm-jax index update` replaces'
          ' documents.'
      )
    return _extend(documents, 'add', source, ids, [], 0, workers, progress)


def update(
    workdir: Path,
    sources: Sequence[str],
    *,
    ignore_missing: bool = False,
    skip_bad_records: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Change:
  """Replaces documents: all passages of each id by those of its new text.

  Args:
    workdir, sources, skip_bad_records, workers, progress: as of `add`.
    ignore_missing: add the documents that are not there.

  Raises: as `add`, but ValueError if an id is not there.
  """
  with locked(workdir) as documents:
    source = _records(sources, skip_bad_records)
    ids = [record.id for record in source.check()]
    gone, missing = _rows_of(documents, ids, ignore_missing)
    return _extend(
        documents, 'update', source, ids, gone, missing, workers, progress
    )


def delete(
    workdir: Path, source: Path, *, ignore_missing: bool = False
) -> Change:
  """Removes documents: all passages of each id.

  Args:
    workdir: of a job that has an index.
    source: JSON Lines of objects with an `id`, or a text with an id a line.
    ignore_missing: pass over the ids that are not there.

  Raises:
    FileNotFoundError: if the source, the workdir, or its index is missing.
    ValueError: if a line is wrong or an id is not there, or nothing would
      remain.
    RuntimeError: if another such command is at work.
    OSError: if the disk is full.
  """
  with locked(workdir) as documents:
    ids = records_lib.read_ids(pathlib.Path(source))
    gone, missing = _rows_of(documents, ids, ignore_missing)
    return _commit(documents, 'delete', gone, None, missing, progress=True)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[documents_lib.Documents]:
  """Opens the documents for one command, which leaves nothing half-done.

  Raises:
    FileNotFoundError: if there is no such workdir, or a corpus is missing.
    RuntimeError: if another command is at work.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.resolve(config_lib.read(workdir))
  with process.lock(
      workdir / edition_lib.DIRECTORY, 'command that changes documents'
  ):
    documents = documents_lib.Documents.open(workdir, config)
    # What commands that were killed left behind, and what a compaction made
    # superfluous: until now somebody may have been reading it.
    _sweep(documents.folder)
    for part in documents.parts:
      # Those of the job's own index are the builder's.
      if part.index.parent == documents.folder and part.index.is_dir():
        generation.remove_leftovers(part.index)
    try:
      yield documents
    except BaseException:
      _sweep(documents.folder)
      raise


def _sweep(folder: pathlib.Path) -> None:
  """Deletes what does not belong to the version that holds."""
  edition = edition_lib.read(folder)
  wanted: set[str | None] = set()
  if edition is not None:
    wanted = {f'removed-{edition.version}.npy'}
    wanted |= {name for p in edition.parts for name in (p.corpus, p.index)}
  for name in sorted(os.listdir(folder)):
    if name in wanted or not _OURS.fullmatch(name):
      continue
    if (folder / name).is_dir():
      shutil.rmtree(folder / name, ignore_errors=True)
    else:
      (folder / name).unlink()


def _records(
    sources: Sequence[str], skip_bad_records: bool
) -> records_lib.Records:
  return records_lib.Records(
      sources_lib.find(sources), skip_bad=skip_bad_records, need_ids=True
  )


def _some(ids: Sequence[str]) -> str:
  shown = ', '.join(map(repr, ids[:_LISTED]))
  if len(ids) == 1:
    return f'The document {shown} is'
  more = f' and {len(ids) - _LISTED} more' if len(ids) > _LISTED else ''
  return f'The documents {shown}{more} are'


def _rows_of(
    documents: documents_lib.Documents, ids: list[str], ignore_missing: bool
) -> tuple[list[np.ndarray], int]:
  """Returns the rows of documents, and how many of these are not there."""
  found = documents.corpus.record_rows(ids)
  missing = [
      name for name, rows in zip(ids, found, strict=True) if not len(rows)
  ]
  if missing and not ignore_missing:
    raise ValueError(
        f'{_some(missing)} not there; --ignore_missing goes on nevertheless.'
    )
  return found, len(missing)


def _extend(
    documents: documents_lib.Documents,
    command: str,
    source: records_lib.Records,
    ids: list[str],
    gone: list[np.ndarray],
    missing: int,
    workers: int | None,
    progress: bool,
) -> Change:
  """Writes records as a further part, without the rows that are gone."""
  documents_lib.newest_generation(documents)  # Before any work.
  version = documents.edition.version + 1
  folder = documents.folder
  prepare.prepare_more(
      documents.parts[0].corpus,
      source,
      folder / f'corpus-{version}',
      workers=workers,
      progress=progress,
  )
  made = documents_lib.Part(
      corpus_lib.Corpus.open(folder / f'corpus-{version}'),
      folder / f'index-{version}',
  )
  _check_ids(documents, gone, made.corpus, ids)
  return _commit(documents, command, gone, made, missing, progress)


def _check_ids(
    documents: documents_lib.Documents,
    gone: list[np.ndarray],
    made: corpus_lib.Corpus,
    ids: list[str],
) -> None:
  """Refuses a part ID#1 of a long record where that id is another's."""
  hashes = np.load(made.directory / 'tables' / 'passage_ids.npy')
  own = np.array([corpus_lib.id_hash(name) for name in ids], np.uint64)
  names = [
      made.passage_text(int(row))['id']
      for row in np.flatnonzero(~np.isin(hashes, own))
  ]
  overlay = overlay_lib.Overlay(
      [part.corpus for part in documents.parts],
      _union(documents.removed, gone),
  )
  for name, rows in zip(names, overlay.record_rows(names), strict=True):
    if len(rows):
      raise ValueError(
          f'A document that is longer than one passage becomes ID#0, ID#1 and '
          f'so on, and another document already has the id {name!r}. Give the '
          'record another id.'
      )


def _union(removed: np.ndarray, gone: list[np.ndarray]) -> np.ndarray:
  return np.unique(np.concatenate([removed, *gone])).astype(np.int64)


def _commit(
    documents: documents_lib.Documents,
    command: str,
    gone: list[np.ndarray],
    made: documents_lib.Part | None,
    missing: int,
    progress: bool,
) -> Change:
  """Embeds what has to be, then makes the next version hold."""
  removed = _union(documents.removed, gone)
  parts = [*documents.parts, *([made] if made is not None else [])]
  total = sum(len(part.corpus.passages) for part in parts)
  if len(removed) == total:
    raise ValueError(
        f'Nothing would remain: all {total} passages would be removed.'
    )
  about = documents_lib.newest_generation(documents)
  start = time.perf_counter()
  embedded = _embed_missing(documents, parts[1:], about, progress)
  seconds = time.perf_counter() - start
  on_disk = list(documents.edition.parts) or [
      edition_lib.PartOnDisk(None, None, documents.edition.origin)
  ]
  added = 0
  if made is not None:
    added = len(made.corpus.passages)
    on_disk.append(
        edition_lib.PartOnDisk(
            made.corpus.directory.name,
            made.index.name,
            made.corpus.fingerprint,
        )
    )
  edition = edition_lib.Edition(
      documents.edition.version + 1,
      documents.edition.origin,
      tuple(on_disk),
      removed,
  )
  taken = len(removed) - len(documents.removed)
  edition_lib.write(
      documents.folder,
      edition,
      {'command': command, 'added': added, 'removed': taken},
  )
  _prune(parts)
  rows = len(parts[0].corpus.passages)
  changes = total - rows + len(removed)
  return Change(
      version=edition.version,
      step=about['step'],
      missing=missing,
      added=added,
      removed=taken,
      embedded=embedded,
      seconds=seconds,
      live=total - len(removed),
      compact=changes > _MANY_CHANGES * rows or len(parts) > _MANY_PARTS,
  )


def _embed_missing(
    documents: documents_lib.Documents,
    parts: Sequence[documents_lib.Part],
    about: dict[str, Any],
    progress: bool,
) -> int:
  """Writes the embeddings of parts that a generation has none for yet."""
  lacking = []
  for part in parts:
    try:
      found = generation.read_manifest(part.index / str(about['step']))
      same = all(
          found[name] == about[name] for name in ('params_digest', 'dtype')
      )
    except (FileNotFoundError, generation.Damaged):
      same = False
    if not same:
      lacking.append(part)
  if not lacking:
    return 0
  params = documents.params(about)
  # Searched exactly, whatever is searched beside it.
  exact = dataclasses.replace(documents.config.mips, backend='exact')
  for part in lacking:
    blocks = documents.embed(part, params, progress)
    documents.publish(part, about, blocks, exact)
  return sum(len(part.corpus.passages) for part in lacking)


def _prune(parts: Sequence[documents_lib.Part]) -> None:
  """Deletes embeddings of additions to generations that are gone."""
  wanted = set(checkpoint.steps_in(parts[0].index))
  for part in parts[1:]:
    for step in set(checkpoint.steps_in(part.index)) - wanted:
      files.remove(part.index / str(step))
