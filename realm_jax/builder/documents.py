"""`realm-jax index add|update|delete|compact`: changes to the documents.

Nothing is trained: only new texts are embedded, by the parameters of the newest
generation of the index. A command writes all of its files and then replaces the
manifest, which commits the change; see `documents` for the files.
"""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import shutil
import time
from typing import Any

import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import generation
from realm_jax.models import components
from realm_jax.prepare import compaction
from realm_jax.prepare import prepare
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources as sources_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import lines
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import process

# Share of rows changed, and number of parts, above which `compact` pays.
_MAX_CHANGES, _MAX_PARTS = 0.1, 16
_MAX_LISTED = 5  # Ids in an error message.
_OURS = re.compile(r'(corpus|index)-\d+|removed-\d+\.npy|\.corpus-\d+\.tmp-\d+')

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Change:
  """The effect of a command; counts are of passages."""

  version: int  # Version of the documents after the command.
  step: int  # Step of the parameters that embed.
  added: int
  removed: int
  missing: int  # Unknown ids, where the command allows them.
  embedded: int
  seconds: float  # For embedding, with the start.
  live: int  # Found by searches now.
  compact: bool = False  # Whether `compact` is due.
  output: pathlib.Path | None = None  # Corpus that `compact` wrote.


def add(
    workdir: Path,
    sources: Sequence[str],
    *,
    replace: bool = False,
    ignore_missing: bool = False,
    skip_bad_records: bool = False,
    format: str | None = None,
    fields: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    corpus: Path | None = None,
) -> Change:
  """Adds documents, or replaces all passages of documents.

  Args:
    workdir: of a job that has an index.
    sources: as of `prepare`; each record needs an id.
    replace: require that each id exists, not that it is new.
    ignore_missing: with `replace`, add the documents that do not exist.
    skip_bad_records: leave out bad records, instead of failing at the first.
    format, fields: of the sources, see `sources.find`.
    workers: processes that tokenise; None: one for each core.
    progress: whether to show progress bars.
    corpus: where the corpus is now; None: where it was in training.

  Raises:
    FileNotFoundError: a source, the workdir, or its index is missing.
    ValueError: a record or an id is wrong, or no document would remain.
    RuntimeError: another such command is running.
    OSError: the disk is full; then nothing changes.
  """
  with _locked(workdir, corpus) as documents:
    source = records_lib.Records(
        sources_lib.find(sources, format, fields),
        skip_bad=skip_bad_records,
        need_ids=True,
    )
    ids = [record.id for record in source.check()]
    source.report()
    command = 'update' if replace else 'add'
    old_rows, missing = _rows_of(documents, ids, command, ignore_missing)
    documents.newest()  # Fails before any work.
    path = documents.folder / f'corpus-{documents.version + 1}'
    base = documents.parts[0].corpus
    prepare.prepare_more(base, source, path, workers=workers, progress=progress)
    made = documents.part(path)
    cuts.warn_of_passages(made.corpus, documents.config)
    _check_ids(documents, old_rows, made.corpus, ids)
    return _commit(documents, command, old_rows, made, missing, progress)


update = functools.partial(add, replace=True)


def delete(
    workdir: Path,
    source: Path,
    *,
    ignore_missing: bool = False,
    corpus: Path | None = None,
) -> Change:
  """Removes documents: all passages of each id.

  `source` is a table with an id, such as JSON Lines, or a text with an id a
  line. The rest is as of `add`.
  """
  with _locked(workdir, corpus) as documents:
    ids = records_lib.read_ids(pathlib.Path(source))
    old_rows, missing = _rows_of(documents, ids, 'delete', ignore_missing)
    return _commit(documents, 'delete', old_rows, None, missing, progress=True)


def compact(
    workdir: Path,
    output: Path | None = None,
    *,
    progress: bool = True,
    corpus: Path | None = None,
) -> Change | None:
  """Writes the documents as one plain corpus with a generation of its own.

  The corpus becomes the first part of the documents. Its generation is of the
  newest parameters in the workdir; saved embeddings of these are copied.
  `output` is the folder of the corpus; None: documents/corpus-V of the workdir.

  Returns:
    The change; None if the documents are one plain, current corpus already.

  Raises: as `add`, and FileExistsError if `output` exists.
  """
  with _locked(workdir, corpus) as documents, contextlib.ExitStack() as undo:
    newest, removed = documents.newest(), documents.removed
    trained = document_store.find(
        documents.workdir / generation.DIRECTORY, documents.manifest['origin']
    )
    if trained and trained['step'] > newest['step']:
      newest = trained  # Made since the last `compact`.
    same = documents.find(newest['params_digest'])
    plain = len(documents.parts) == 1 and not len(removed)
    if plain and same is not None:
      return None
    path = documents.folder / f'corpus-{documents.version + 1}'
    if output is not None:
      path = pathlib.Path(output).absolute()
    corpora = [part.corpus for part in documents.parts]
    compaction.compact(overlay_lib.Overlay(corpora, removed), path, progress)
    undo.callback(files.remove, path)
    made = documents.part(path)
    start, size = time.perf_counter(), len(made.corpus.passages)
    source: document_store.Index | components.Params
    if same is not None:
      source = documents.index(same)
      embedded = source.embedded
    else:
      source, embedded = documents.load_params(newest), size
    mips = documents.config.mips
    _publish(documents, made, newest, source, mips, progress)
    seconds = time.perf_counter() - start
    change = {'command': 'compact'}
    version = _write(documents, [_names(made)], removed[:0], change)
    undo.pop_all()
  return Change(
      version=version, step=newest['step'], added=0, removed=len(removed),
      missing=0, embedded=embedded, seconds=seconds, live=size, output=path,
  )


@contextlib.contextmanager
def _locked(
    workdir: Path, corpus: Path | None
) -> Iterator[document_store.Documents]:
  """Opens the documents for one command and removes what it leaves behind."""
  workdir = pathlib.Path(workdir)
  config = config_lib.resolve(config_lib.read(workdir))
  with process.lock(
      workdir / document_store.DIRECTORY, 'command that changes documents'
  ):
    documents = document_store.Documents.open(workdir, config, corpus)
    # Also what `compact` superseded: a reader may have used it until now.
    _sweep(documents.folder)
    for part in documents.parts:
      # Not index/, which is the builder's.
      if part.index.parent == documents.folder and part.index.is_dir():
        generation.remove_leftovers(part.index)
    try:
      yield documents
    except BaseException:
      _sweep(documents.folder)
      raise


def _sweep(folder: pathlib.Path) -> None:
  """Deletes the files that do not belong to the current version."""
  manifest = document_store.read_manifest(folder)
  wanted = {part[name] for part in manifest['parts'] for name in part}
  wanted.add(manifest['removed'] and manifest['removed']['file'])
  for path in folder.iterdir():
    if path.name in wanted or not _OURS.fullmatch(path.name):
      continue
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink()


def _rows_of(
    documents: document_store.Documents,
    ids: list[str],
    command: str,
    ignore_missing: bool,
) -> tuple[np.ndarray, int]:
  """Returns the rows of documents, and the number of unknown ids.

  Raises:
    ValueError: `add` knows an id, or another command does not.
  """
  found, adds = documents.corpus.record_rows(ids), command == 'add'
  wrong = [i for i, r in zip(ids, found, strict=True) if bool(len(r)) == adds]
  if wrong and (adds or not ignore_missing):
    shown = lines.listed([*map(repr, wrong)], _MAX_LISTED)
    subject = f'document {shown} is'
    if len(wrong) > 1:
      subject = f'documents {shown} are'
    problem = 'not there; --ignore_missing accepts that.'
    if adds:
      problem = 'there already; `realm-jax index update` replaces documents.'
    raise ValueError(f'The {subject} {problem}')
  return np.concatenate([documents.removed[:0], *found]), len(wrong)


def _check_ids(
    documents: document_store.Documents,
    old_rows: np.ndarray,
    made: corpus_lib.Corpus,
    ids: list[str],
) -> None:
  """Refuses a part ID#1 of a long record whose id is another document's."""
  hashes = np.load(made.directory / 'tables' / 'passage_ids.npy')
  own = np.array([corpus_lib.id_hash(name) for name in ids], np.uint64)
  names = [
      made.passage_text(int(row))['id']
      for row in np.flatnonzero(~np.isin(hashes, own))
  ]
  found = documents.corpus.record_rows(names)
  for name, rows in zip(names, found, strict=True):
    if not np.isin(rows, old_rows).all():
      raise ValueError(
          'A document that is longer than one passage becomes ID#0, ID#1 and '
          f'so on, and another document already has the id {name!r}. Give the '
          'record another id.'
      )


def _commit(
    documents: document_store.Documents,
    command: str,
    old_rows: np.ndarray,
    made: document_store.Part | None,
    missing: int,
    progress: bool,
) -> Change:
  """Saves the embeddings that are missing, then commits the next version."""
  removed = np.union1d(documents.removed, old_rows)
  parts, names = [*documents.parts], documents.manifest['parts']
  if made is not None:
    parts.append(made)
    names = [*names, _names(made)]
  rows = [len(part.corpus.passages) for part in parts]
  live = sum(rows) - len(removed)
  if not live:
    raise ValueError(
        f'Nothing would remain: all {sum(rows)} passages would be removed.'
    )
  newest, start = documents.newest(), time.perf_counter()
  lacking = [p for p in parts[1:] if not documents.has_table(p, newest)]
  if lacking:
    params = documents.load_params(newest)
    # Additions have no ScaNN index of their own.
    exact = dataclasses.replace(documents.config.mips, backend='exact')
    for part in lacking:
      _publish(documents, part, newest, params, exact, progress)
  seconds = time.perf_counter() - start
  added = 0 if made is None else rows[-1]
  newly = len(removed) - len(documents.removed)
  change = {'command': command, 'added': added, 'removed': newly}
  version = _write(documents, names, removed, change)
  # Embeddings for generations that the builder has deleted.
  wanted = set(checkpoint.steps_in(parts[0].index))
  for part in parts[1:]:
    for step in set(checkpoint.steps_in(part.index)) - wanted:
      files.remove(part.index / str(step))
  many = sum(rows[1:]) + len(removed) > _MAX_CHANGES * rows[0]
  return Change(
      version=version, step=newest['step'], added=added, removed=newly,
      missing=missing, embedded=sum(len(p.corpus.passages) for p in lacking),
      seconds=seconds, live=live, compact=many or len(parts) > _MAX_PARTS,
  )


def _publish(
    documents: document_store.Documents,
    part: document_store.Part,
    like: dict[str, Any],
    source: document_store.Index | components.Params,
    config: config_lib.MipsConfig,
    progress: bool,
) -> None:
  """Writes a generation of a part with the lineage of another manifest.

  `source` has parameters to embed with, or an index whose live rows are copied.
  """
  embedder = documents.embedder(part)
  lineage = documents.lineage(part, like['step'], like['params_digest'])
  total = len(part.corpus.passages)
  with (
      generation.Writer(part.index, lineage, like['dtype']) as writer,
      tqdm.tqdm(
          total=total,
          desc='embedding',
          unit=' passages',
          disable=None if progress else True,
      ) as bar,
  ):
    for shard in range(-(-total // generation.ROWS_PER_SHARD)):
      rows = writer.rows(shard)
      if isinstance(source, document_store.Index):
        writer.add(source.table[source.live_rows[rows]], shard)
        bar.update(len(rows))
      else:
        writer.add(embedder(source, rows, bar.update), shard)
    writer.add_backend(config, mesh_lib.make_mesh(config_lib.MeshConfig()))
    writer.publish()


def _names(part: document_store.Part) -> dict[str, str]:
  """Returns the entry of the manifest; `compact` may write elsewhere."""
  corpus, index = part.corpus.directory, part.index
  inside = corpus.parent == index.parent
  return {
      'corpus': corpus.name if inside else str(corpus),
      'index': index.name,
      'fingerprint': part.corpus.fingerprint,
  }


def _write(
    documents: document_store.Documents,
    parts: list[dict[str, Any]],
    removed: np.ndarray,
    change: dict[str, Any],
) -> int:
  """Commits the next version, of which all parts exist; returns it."""
  folder, version = documents.folder, documents.version + 1
  record = None
  if len(removed):
    path = folder / f'removed-{version}.npy'
    with files.atomic_file(path, 'wb') as file:
      np.save(file, removed, allow_pickle=False)
    record = {
        'file': path.name, 'rows': len(removed), 'sha256': files.sha256(path)
    }
  manifest = {
      'format_version': document_store.FORMAT_VERSION,
      'version': version,
      'origin': documents.manifest['origin'],
      'parts': parts,
      'removed': record,
      'change': {**change, 'time': time.time()},
  }
  manifest['manifest_sha256'] = files.manifest_digest(manifest)
  files.write_json(folder / document_store.MANIFEST, manifest)
  return version
