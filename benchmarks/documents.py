"""Cost of `realm-jax index add|update|delete|compact` by corpus size.

  python benchmarks/documents.py [--output=FILE.json] [--small]
      [--sizes=4000,16000] [--width=128]

Corpora of short random passages, with random embeddings of the given width
and an untrained retriever of preset `tiny`. Each figure is the median of three
turns, in seconds: a command for 100 documents in a running process (without
imports, but compiling the embedder), and a whole `index add` or `index delete`
in a process of its own. `compact`, which rewrites the corpus and its index, is
timed once at the end. The last figure is the look-up of 100 ids among those of
the paper's corpus.
"""

import functools
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import documents
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

_DOCUMENTS = 100  # Changed by a command.
_TURNS = 3
_PAPER = 13_353_718  # Passages (Guu et al. 2020, section 4.1).


def _records(count: int, prefix: str, seed: int) -> list[dict[str, str]]:
  rng = np.random.default_rng(seed)
  words = [f'{a}{b}' for a in 'bdfgklmnprst' for b in ('aro', 'eli', 'ino')]
  return [
      {
          'id': f'{prefix}{i}',
          'title': f'{prefix} {i}'.title(),
          'text': f'In {year} it was {" ".join(rng.choice(words, 20))}.',
      }
      for i, year in enumerate(rng.integers(1000, 2000, count))
  ]


def _write(path: pathlib.Path, records: list[dict[str, str]]) -> str:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return str(path)


def _make_workdir(
    folder: pathlib.Path, size: int, width: int
) -> pathlib.Path:
  source = _write(folder / 'source.jsonl', _records(size, 'base', 0))
  prepare.prepare([source], folder / 'corpus', vocab_size=500, progress=False)
  corpus = corpus_lib.Corpus.open(folder / 'corpus')
  config = config_lib.Config(objective='realm', corpus=str(corpus.directory))
  config.model.preset, config.model.embedding_width = 'tiny', width
  config = config_lib.resolve(config)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  workdir = folder / 'job'
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  params = components.make('embedder', config.model).init(0)
  lineage = generation.Lineage(
      step=0,
      params_digest=checkpoint.save_snapshot(workdir, 0, params),
      tokenizer_digest=corpus.tokenizer.digest,
      corpus_fingerprint=corpus.fingerprint,
      num_rows=len(corpus.passages),
      width=width,
  )
  rng = np.random.default_rng(1)
  with generation.Writer(workdir / generation.DIRECTORY, lineage) as writer:
    for start in range(0, len(corpus.passages), generation.ROWS_PER_SHARD):
      rows = min(generation.ROWS_PER_SHARD, len(corpus.passages) - start)
      writer.add(rng.standard_normal((rows, width), np.float32))
    writer.add_backend(config.mips)
    writer.publish()
  return workdir


def _measure(workdir: pathlib.Path, size: int, turn: int) -> dict[str, float]:
  """Returns the seconds of each command; turn 0 only warms up."""

  def records(name: str) -> list[dict[str, str]]:
    return _records(_DOCUMENTS, f'{name} {turn} ', turn)

  def write(name: str, values: list[dict[str, str]]) -> str:
    return _write(workdir.parent / f'{name}.jsonl', values)

  first = 2 * turn * _DOCUMENTS
  newer = [
      {**record, 'id': f'base{first + i}'}
      for i, record in enumerate(records('newer'))
  ]
  gone = [{'id': f'base{first + _DOCUMENTS + i}'} for i in range(_DOCUMENTS)]
  added = write('add', records('added'))
  add, _ = harness.timed(
      functools.partial(documents.add, workdir, [added], progress=False)
  )
  if not turn:
    return {}
  source = write('update', newer)
  update, _ = harness.timed(
      functools.partial(documents.update, workdir, [source], progress=False)
  )
  delete, _ = harness.timed(documents.delete, workdir, write('delete', gone))
  found = {'add': add, 'update': update, 'delete': delete}
  for command in ('add', 'delete'):
    source = write('command', records('command'))
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    found[f'whole_{command}'], _ = harness.timed(
        run,
        [
            sys.executable, '-m', 'realm_jax', 'index', command,
            f'--workdir={workdir}', f'--input={source}',
        ],
    )
  return {f'{name}_seconds_{size}': value for name, value in found.items()}


def _lookup(folder: pathlib.Path) -> float:
  """Returns the seconds to find ids in a file of the paper's size."""
  rng = np.random.default_rng(6)
  path = folder / 'ids.npy'
  np.save(path, rng.integers(0, 2**64, _PAPER, dtype=np.uint64))
  hashes = np.load(path, mmap_mode='r')
  wanted = [int(hashes[row]) for row in rng.choice(_PAPER, _DOCUMENTS)]
  seconds, found = harness.timed(corpus_lib.find_hashes, hashes, wanted)
  assert len(found) == len(set(wanted))
  return seconds


def _plot(result: dict[str, Any], sizes: list[int], path: pathlib.Path) -> None:
  figure, (axes,) = harness.panels(1)
  for name in ('add', 'update', 'delete', 'whole_add', 'whole_delete'):
    seconds = [result[f'{name}_seconds_{size}'] for size in sizes]
    axes.plot(sizes, seconds, marker='o', label=name.replace('_', ' '))
  axes.set(
      xscale='log',
      ylim=(0, None),
      xlabel='passages of the corpus',
      ylabel=f'seconds, for {_DOCUMENTS} documents',
  )
  harness.save(figure, path)


def main() -> None:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument('--sizes', default='4000,16000,64000,256000')
  parser.add_argument('--width', type=int, default=128)
  arguments = parser.parse_args()
  sizes = [int(size) for size in arguments.sizes.split(',')]
  if arguments.small:
    sizes = [1000, 4000]
  result: dict[str, Any] = {
      'documents': _DOCUMENTS, 'width': arguments.width
  }
  with tempfile.TemporaryDirectory() as temporary:
    workdirs = {}
    for size in sizes:
      folder = pathlib.Path(temporary) / str(size)
      folder.mkdir()
      workdirs[size] = _make_workdir(folder, size, arguments.width)
    # Sizes take turns, so that other load on the machine affects all of them.
    seconds: dict[str, list[float]] = {}
    for turn in range(_TURNS + 1):
      for size, workdir in workdirs.items():
        for name, value in _measure(workdir, size, turn).items():
          seconds.setdefault(name, []).append(value)
    result |= {n: float(np.median(values)) for n, values in seconds.items()}
    for size, workdir in workdirs.items():
      result[f'compact_seconds_{size}'], _ = harness.timed(
          functools.partial(documents.compact, workdir, progress=False)
      )
    result[f'lookup_seconds_{_PAPER}'] = _lookup(pathlib.Path(temporary))
  harness.write(arguments.output, result, 'jax', 'numpy')
  if arguments.output:
    _plot(result, sizes, arguments.output)


if __name__ == '__main__':
  main()
