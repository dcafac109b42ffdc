"""What the index folder of a workdir holds, and what is wrong with it.

Public: `verify`, `Finding`; `info`, `as_text`, `partial_builds`. They only
read, so they may be called while trainer and builder are at work.
"""

from collections.abc import Iterator
import dataclasses
import datetime
import os
import pathlib
import time
from typing import Any

from realm_jax import config as config_lib
from realm_jax.builder import documents as documents_lib
from realm_jax.builder import edition
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.index import shards
from realm_jax.runtime import checkpoint
from realm_jax.runtime import heartbeat as heartbeat_lib
from realm_jax.runtime import snapshots as snapshots_lib

_ALIVE_SECONDS = 15.0  # A heartbeat is no older while a builder is at work.

Path = pathlib.Path | str


@dataclasses.dataclass(frozen=True)
class Finding:
  """What was found of one generation, or of the workdir itself."""

  path: pathlib.Path
  about: str  # What it is, in a few words; '' if that cannot be read.
  problems: list[str]


def verify(workdir: Path, step: int | None = None) -> Iterator[Finding]:
  """Reads every byte of the index, and compares it with all that it belongs to.

  That is: the checksums of all files, the config, the corpus and its tokenizer,
  the snapshot that a generation was made from, and the checkpoints that refer
  to one.

  Args:
    workdir: of a job.
    step: look at this generation alone; default: at all of them.

  Yields:
    A finding for each generation, by step; then one of the workdir, if
    something is wrong that is of no generation that is there.

  Raises:
    FileNotFoundError: if there is no workdir, or no generation of that step.
    ValueError: if the config is damaged.
  """
  workdir = pathlib.Path(workdir)
  config = config_lib.resolve(config_lib.read(workdir))
  directory = workdir / generation.DIRECTORY
  steps = checkpoint.steps_in(directory)
  if step is not None and step not in steps:
    raise FileNotFoundError(
        f'{directory} has generations of the steps {steps}, not of {step}.'
    )
  elsewhere = []
  corpus = None
  try:
    corpus = corpus_lib.Corpus.open(config.corpus)
  except (ValueError, OSError) as error:
    elsewhere.append(str(error))
  references = _references(workdir)
  for number in steps:
    if step in (None, number):
      yield _verify(workdir, config, number, corpus, references.get(number, {}))
  for number, saved in references.items():
    if number not in steps and step in (None, number):
      elsewhere.append(
          f'{_checkpoints(saved)} refers to the generation {number}, which is '
          'not there; if its snapshot still is, build it with `realm-jax index '
          f'--workdir={workdir} --step={number}`'
      )
  if elsewhere:
    yield Finding(workdir, '', elsewhere)
  if step is None and (workdir / edition.DIRECTORY).exists():
    yield _verify_documents(workdir, config)


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
  problems = [*generation.problems(path, manifest)]
  try:
    digest = snapshots_lib.digest_of(workdir, step)
  except FileNotFoundError:
    digest = None  # Snapshots are deleted before their generations.
  expected = generation.Lineage(
      step=step,
      params_digest=digest,
      tokenizer_digest=corpus.tokenizer.digest if corpus else None,
      corpus_fingerprint=corpus.fingerprint if corpus else None,
      num_rows=len(corpus.passages) if corpus else None,
      width=config.model.embedding_width,
  )
  problems += generation.lineage_of(manifest).differences(expected)
  for saved, about in references.items():
    for name in ('corpus_fingerprint', 'tokenizer_digest'):
      if about.get(name) not in (None, manifest[name]):
        problems.append(
            f'{name}: {manifest[name]!r} in the index, {about[name]!r} in '
            f'{_checkpoints([saved])}, which refers to it'
        )
  return Finding(path, _about(manifest), problems)


def _verify_documents(
    workdir: pathlib.Path, config: config_lib.Config
) -> Finding:
  path = workdir / edition.DIRECTORY
  try:
    documents = documents_lib.Documents.open(workdir, config)
  except (ValueError, OSError) as error:
    return Finding(path, '', [str(error)])
  return Finding(
      path, _changes(documents.about()), [*documents_lib.problems(documents)]
  )


def _changes(about: dict[str, Any] | None) -> str:
  if about is None:
    return 'no changes'
  return (
      f'version {about["version"]}, {about["added"]:,} passage(s) added, '
      f'{about["removed"]:,} removed'
  )


def info(workdir: Path) -> dict[str, Any]:
  """Returns what there is, as JSON: generations, partial builds, the builder.

  Raises:
    FileNotFoundError: if there is no workdir.
  """
  workdir = pathlib.Path(workdir)
  config_lib.read(workdir)
  directory = workdir / generation.DIRECTORY
  references, in_use = _references(workdir), generation.in_use(directory)
  now = time.time()
  generations = []
  for step in checkpoint.steps_in(directory):
    path = directory / str(step)
    one: dict[str, Any] = {
        'step': step,
        'bytes': _bytes(path),
        'checkpoints': sorted(references.get(step, {})),
        'in_use': step in in_use,
    }
    try:
      manifest = generation.read_manifest(path)
    except (ValueError, OSError) as error:
      generations.append({**one, 'problem': str(error)})
      continue
    generations.append({
        **one,
        'age_seconds': round(now - manifest['created'], 1),
        'rows': manifest['num_rows'],
        'width': manifest['width'],
        'dtype': manifest['dtype'],
        'mips': manifest['mips'],
        'recall': manifest['recall'],
        'build_seconds': round(manifest['seconds'], 1),
    })
  heartbeat = heartbeat_lib.read(directory)
  if heartbeat is not None:
    heartbeat['age_seconds'] = round(now - heartbeat['time'], 1)
  return {
      'workdir': str(workdir),
      'generations': generations,
      'partial': [
          {**one, 'step': step, 'bytes': _bytes(pathlib.Path(one['path']))}
          for step, one in partial_builds(directory).items()
      ],
      'snapshots': snapshots_lib.steps_of(workdir),
      'builder': heartbeat,
  }


def partial_builds(directory: Path) -> dict[int, dict[str, Any]]:
  """What is being built or was interrupted, by step.

  Returns:
    Of each: `rows`, how many of them are `done`, `started` (in seconds of the
    epoch) and its `path`.
  """
  found = {}
  for path in pathlib.Path(directory).glob(f'{generation.BUILDING}*'):
    begun = shards.read_build_record(path)
    if begun is None:
      continue  # Published or removed meanwhile.
    made_from = begun['made_from']
    finished = shards.ShardFolder(path, made_from['dtype']).records()
    found[made_from['step']] = {
        'rows': made_from['num_rows'],
        'done': min(
            len(finished) * made_from['shard_rows'], made_from['num_rows']
        ),
        'started': begun['started'],
        'path': str(path),
    }
  return found


def as_text(found: dict[str, Any]) -> str:
  """Returns what `info` found as a table and some lines."""
  rows = [
      'step age rows width dtype backend recall built size used_by'.split()
  ]
  problems = []
  for one in found['generations']:
    used = [f'checkpoint {saved}' for saved in one['checkpoints']]
    used += ['trainer'] * one['in_use']
    size, users = f'{one["bytes"] / 1e6:,.1f} MB', ', '.join(used) or '-'
    if 'problem' in one:
      problems.append(one['problem'])
      rows.append([f'{one["step"]}', *'???????', size, users])
      continue
    settings = ', '.join(
        f'{name}={value}'
        for name, value in one['mips'].items()
        if name != 'backend'
    )
    recall = one['recall']
    rows.append([
        f'{one["step"]}',
        _span(one['age_seconds']),
        f'{one["rows"]:,}',
        f'{one["width"]}',
        one['dtype'],
        one['mips']['backend'] + (f' ({settings})' if settings else ''),
        f'{recall["value"]:.3f}' if recall else 'exact',
        f'in {one["build_seconds"]:.1f} s',
        size,
        users,
    ])
  lines = [f'{found["workdir"]}: {len(rows) - 1} generation(s)']
  if len(rows) > 1:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        '  '.join(map(str.ljust, row, widths)).rstrip().replace('_', ' ')
        for row in rows
    ]
  lines += problems
  lines += [
      f'Partial build of step {one["step"]}: {one["done"]:,} of {one["rows"]:,}'
      f' passages, {one["bytes"] / 1e6:,.1f} MB'
      for one in found['partial']
  ]
  return '\n'.join([*lines, _builder(found['builder'])])


def _builder(heartbeat: dict[str, Any] | None) -> str:
  if heartbeat is None:
    return 'No index builder was here yet.'
  what = heartbeat['state']
  if heartbeat['step'] is not None:
    what += f', step {heartbeat["step"]}'
  if heartbeat['total']:
    what += (
        f', {heartbeat["done"]:,} of {heartbeat["total"]:,} passages,'
        f' {heartbeat.get("rate", 0.0):,.0f}/s'
    )
  age = heartbeat['age_seconds']
  silent = heartbeat['state'] != 'gone' and age > _ALIVE_SECONDS
  gone = ' It is dead, stopped, or in a long computation.' if silent else ''
  return (
      f'Index builder, process {heartbeat["pid"]} on {heartbeat["host"]}: '
      f'{what}, {_span(age)} ago.{gone}'
  )


def _references(workdir: pathlib.Path) -> dict[int, dict[int, dict[str, Any]]]:
  """What was saved with the checkpoints that refer to each generation."""
  found: dict[int, dict[int, dict[str, Any]]] = {}
  for saved in checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS):
    try:
      about = checkpoint.saved_about(workdir, saved)
    except FileNotFoundError:  # Deleted by the trainer meanwhile.
      continue
    if about.get('index_generation') is not None:
      found.setdefault(int(about['index_generation']), {})[saved] = about
  return found


def _checkpoints(steps: Any) -> str:
  return ' and '.join(f'{checkpoint.CHECKPOINTS}/{step}' for step in steps)


def _about(manifest: dict[str, Any]) -> str:
  return (
      f'{manifest["num_rows"]:,} x {manifest["width"]} {manifest["dtype"]}, '
      f'{manifest["mips"]["backend"]}, {len(manifest["files"])} file(s)'
  )


def _bytes(path: pathlib.Path) -> int:
  total = 0
  for folder, _, names in os.walk(path):
    for name in names:
      try:
        total += os.stat(pathlib.Path(folder) / name).st_size
      except FileNotFoundError:
        continue  # Published or removed meanwhile.
  return total


def _span(seconds: float) -> str:
  return str(datetime.timedelta(seconds=round(max(seconds, 0))))
