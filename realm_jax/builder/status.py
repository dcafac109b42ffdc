"""`realm-jax index verify` and `index info`: the index of a workdir, read-only.

Both may run while the trainer and the index builder do.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import functools
import os
import pathlib
import time
from typing import Any

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.index import shards
from realm_jax.runtime import checkpoint
from realm_jax.runtime import process

_ALIVE_SECONDS = 15.0  # Age of a running builder's heartbeat, at most.

Path = pathlib.Path | str


@dataclasses.dataclass(frozen=True)
class Finding:
  """The problems of a generation, of the documents, or of the workdir."""

  path: pathlib.Path
  about: str  # A short description; '' if that cannot be read.
  problems: list[str]


def verify(
    workdir: Path, step: int | None = None, corpus: Path | None = None
) -> Iterator[Finding]:
  """Reads every byte of the index and compares it with its sources.

  These are checksums, the config, the corpus and its tokenizer, the snapshots,
  and the checkpoints that refer to a generation.

  Args:
    workdir: of a job.
    step: of the only generation to verify; None: all, and the documents.
    corpus: where the corpus is now; None: where it was in training.

  Yields:
    A finding for each generation, by step; one for the workdir if it has other
    problems; one for the documents.

  Raises:
    FileNotFoundError: there is no workdir, or no generation of that step.
    ValueError: the config is damaged.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.resolve(config_lib.read(workdir))
  directory = workdir / generation.DIRECTORY
  steps = checkpoint.steps_in(directory)
  if step is not None and step not in steps:
    raise FileNotFoundError(
        f'{directory} has generations of the steps {steps}, not of {step}.'
    )
  problems, opened = [], None
  try:
    opened = document_store.open_corpus(workdir, config, corpus)
  except (ValueError, OSError) as error:
    problems.append(str(error))
  references = checkpoint.references(workdir)
  for number in steps:
    if step in (None, number):
      yield _verify(workdir, config, number, opened, references.get(number, {}))
  for number, saved in references.items():
    if number not in steps and step in (None, number):
      problems.append(
          f'{_checkpoints(saved)} refers to the generation {number}, which is '
          'missing; if its snapshot exists, build it with `realm-jax index '
          f'--workdir={workdir} --step={number}`'
      )
  if problems:
    yield Finding(workdir, '', problems)
  if step is None and (workdir / document_store.DIRECTORY).exists():
    yield _verify_documents(workdir, config, corpus)


def _verify(
    workdir: pathlib.Path,
    config: config_lib.Config,
    step: int,
    corpus: corpus_lib.Corpus | None,
    references: dict[int, dict[str, Any]],
) -> Finding:
  path = workdir / generation.DIRECTORY / str(step)
  try:
    manifest = generation.read_manifest(path)
  except (ValueError, OSError) as error:
    return Finding(path, '', [str(error)])
  digest = None  # Snapshots are deleted before their generations.
  with contextlib.suppress(FileNotFoundError):
    digest = checkpoint.snapshot_digest(workdir, step)
  width = config.model.embedding_width
  expected = generation.Lineage(step, digest, width=width)
  if corpus is not None:
    expected = generation.Lineage.of(corpus, width, step, digest)
  problems = [
      *generation.problems(path, manifest),
      *generation.lineage_of(manifest).differences(expected),
  ]
  problems += [
      f'{name}: {manifest[name]!r} in the index, {record[name]!r} in '
      f'{_checkpoints([saved])}, which refers to it'
      for saved, record in references.items()
      for name in ('corpus_fingerprint', 'tokenizer_digest')
      if record.get(name) not in (None, manifest[name])
  ]
  about = (
      f'{manifest["num_rows"]:,} x {manifest["width"]} {manifest["dtype"]}, '
      f'{manifest["mips"]["backend"]}, {len(manifest["files"])} file(s)'
  )
  return Finding(path, about, problems)


def _verify_documents(
    workdir: pathlib.Path, config: config_lib.Config, corpus: Path | None
) -> Finding:
  path, problems = workdir / document_store.DIRECTORY, []
  try:
    documents = document_store.Documents.open(workdir, config, corpus)
  except (ValueError, OSError) as error:
    return Finding(path, '', [str(error)])
  for part in documents.parts:
    if part.index.parent != path:  # Verified above.
      continue
    checks = [part.corpus.verify] + [
        functools.partial(
            generation.load,
            part.index / str(step),
            documents.lineage(part, step),
        )
        for step in checkpoint.steps_in(part.index)
    ]
    for check in checks:
      try:
        check()
      except (ValueError, OSError) as error:
        problems.append(str(error))
  changes, about = documents.about(), 'no changes'
  if changes is not None:
    about = (
        f'version {changes["version"]}, {changes["added"]:,} passage(s) added, '
        f'{changes["removed"]:,} removed'
    )
  return Finding(path, about, problems)


def info(workdir: Path) -> dict[str, Any]:
  """Returns generations, partial builds and the builder's state, as JSON.

  Raises:
    FileNotFoundError: there is no workdir.
  """
  workdir = pathlib.Path(workdir)
  config_lib.read(workdir)
  directory, now = workdir / generation.DIRECTORY, time.time()
  references = checkpoint.references(workdir)
  in_use = generation.in_use(directory)
  generations = []
  for step in checkpoint.steps_in(directory):
    path = directory / str(step)
    record: dict[str, Any] = {
        'step': step,
        'bytes': _bytes(path),
        'checkpoints': sorted(references.get(step, {})),
        'in_use': step in in_use,
    }
    generations.append(record)
    try:
      manifest = generation.read_manifest(path)
    except (ValueError, OSError) as error:
      record['problem'] = str(error)
      continue
    record |= {
        'age_seconds': round(now - manifest['created'], 1),
        'rows': manifest['num_rows'],
        **{n: manifest[n] for n in ('width', 'dtype', 'mips', 'recall')},
        'build_seconds': round(manifest['seconds'], 1),
    }
  heartbeat = process.read_heartbeat(directory)
  if heartbeat is not None:
    heartbeat['age_seconds'] = round(now - heartbeat['time'], 1)
  return {
      'workdir': str(workdir),
      'generations': generations,
      'partial': [
          {**build, 'step': step, 'bytes': _bytes(pathlib.Path(build['path']))}
          for step, build in partial_builds(directory).items()
      ],
      'snapshots': checkpoint.snapshot_steps(workdir),
      'builder': heartbeat,
  }


def partial_builds(directory: Path) -> dict[int, dict[str, Any]]:
  """Returns the builds that run or were interrupted, by step.

  Each has its number of `rows`, how many are `done`, when it `started` (seconds
  of the epoch), and its `path`.
  """
  found = {}
  for path in pathlib.Path(directory).glob(f'{generation.BUILDING}*'):
    begun = shards.read_build_record(path)
    if begun is None:
      continue  # Just published or removed.
    made_from = begun['made_from']
    finished = shards.ShardFolder(path, made_from['dtype']).records()
    rows = made_from['num_rows']
    found[made_from['step']] = {
        'rows': rows,
        'done': min(len(finished) * made_from['shard_rows'], rows),
        'started': begun['started'],
        'path': str(path),
    }
  return found


def as_text(found: dict[str, Any]) -> str:
  """Returns the result of `info` as a table and lines."""
  rows = ['step|age|rows|width|dtype|backend|recall|built|size|used by']
  for record in found['generations']:
    used = [f'checkpoint {saved}' for saved in record['checkpoints']]
    users = ', '.join(used + ['trainer'] * record['in_use']) or '-'
    if 'problem' in record:
      middle = '|'.join('???????')
    else:
      settings = dict(record['mips'])
      backend = settings.pop('backend')
      if settings:
        named = ', '.join(f'{name}={v}' for name, v in settings.items())
        backend += f' ({named})'
      recall = record['recall']
      middle = (
          f'{_duration(record["age_seconds"])}|{record["rows"]:,}|'
          f'{record["width"]}|{record["dtype"]}|{backend}|'
          f'{format(recall["value"], ".3f") if recall else "exact"}|'
          f'in {record["build_seconds"]:.1f} s'
      )
    size = f'{record["bytes"] / 1e6:,.1f} MB'
    rows.append(f'{record["step"]}|{middle}|{size}|{users}')
  lines = [f'{found["workdir"]}: {len(rows) - 1} generation(s)']
  if len(rows) > 1:
    cells = [row.split('|') for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ['  '.join(map(str.ljust, row, widths)).rstrip() for row in cells]
  lines += [r['problem'] for r in found['generations'] if 'problem' in r]
  lines += [
      f'Partial build of step {build["step"]}: {build["done"]:,} of '
      f'{build["rows"]:,} passages, {build["bytes"] / 1e6:,.1f} MB'
      for build in found['partial']
  ]
  return '\n'.join([*lines, _builder(found['builder'])])


def _builder(heartbeat: dict[str, Any] | None) -> str:
  if heartbeat is None:
    return 'No index builder has run yet.'
  state, age = heartbeat['state'], heartbeat['age_seconds']
  silent = state != 'gone' and age > _ALIVE_SECONDS
  if heartbeat['step'] is not None:
    state += f', step {heartbeat["step"]}'
  if heartbeat['total']:
    state += (
        f', {heartbeat["done"]:,} of {heartbeat["total"]:,} passages,'
        f' {heartbeat.get("rate", 0.0):,.0f}/s'
    )
  gone = ' It is dead, stopped, or in a long computation.' if silent else ''
  return (
      f'Index builder, process {heartbeat["pid"]} on {heartbeat["host"]}: '
      f'{state}, {_duration(age)} ago.{gone}'
  )


def _checkpoints(steps: Any) -> str:
  return ' and '.join(f'{checkpoint.CHECKPOINTS}/{step}' for step in steps)


def _bytes(path: pathlib.Path) -> int:
  total = 0
  for folder, _, names in os.walk(path):
    for name in names:
      # Other processes publish and remove files meanwhile.
      with contextlib.suppress(FileNotFoundError):
        total += os.stat(pathlib.Path(folder) / name).st_size
  return total


def _duration(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(max(seconds, 0))))
