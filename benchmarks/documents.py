"""Cost of `realm-jax index add|update|delete` in a growing corpus.

  python benchmarks/documents.py [--output=FILE.json] [--small]

Corpora of short invented passages, each with an index of random embeddings and
an untrained retriever of preset `tiny`. For each, the seconds of a command for
100 documents, in a process that has run one before (without imports, but with
compilation of the embedder), and of a whole command in a new process: medians
of three turns. Then the look-up of 100 ids among those of a corpus of the
paper's size.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import editing
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import files
from realm_jax.runtime import snapshots as snapshots_lib

_DOCUMENTS = 100  # That a command changes.
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


def _make_workdir(folder: pathlib.Path, size: int) -> pathlib.Path:
  source = _write(folder / 'source.jsonl', _records(size, 'base', 0))
  prepare.prepare([source], folder / 'corpus', vocab_size=500, progress=False)
  corpus = corpus_lib.Corpus.open(folder / 'corpus')
  config = config_lib.Config(objective='realm', corpus=str(corpus.directory))
  config.model.preset = 'tiny'
  config = config_lib.resolve(config)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  workdir = folder / 'job'
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  params = components.make('embedder', config.model).init(0)
  width = config.model.embedding_width
  lineage = generation.Lineage(
      step=0,
      params_digest=snapshots_lib.save(workdir, 0, params),
      tokenizer_digest=corpus.tokenizer.digest,
      corpus_fingerprint=corpus.fingerprint,
      num_rows=len(corpus.passages),
      width=width,
  )
  table_NE = np.random.default_rng(1).normal(size=(len(corpus.passages), width))
  generation.publish(
      workdir / generation.DIRECTORY, lineage, table_NE, config.mips
  )
  return workdir


def _measure(workdir: pathlib.Path, size: int, turn: int) -> dict[str, float]:
  """Seconds of each command; `turn` 0 only warms up."""

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
  source = write('add', records('added'))
  start = time.perf_counter()
  editing.add(workdir, [source], progress=False)
  found = {'add': time.perf_counter() - start}
  if not turn:
    return {}
  source = write('update', newer)
  start = time.perf_counter()
  editing.update(workdir, [source], progress=False)
  found['update'] = time.perf_counter() - start
  source = write('delete', gone)
  start = time.perf_counter()
  editing.delete(workdir, source)
  found['delete'] = time.perf_counter() - start
  source = write('command', records('command'))
  start = time.perf_counter()
  subprocess.run(
      [
          sys.executable, '-m', 'realm_jax', 'index', 'add',
          f'--workdir={workdir}', f'--input={source}',
      ],
      check=True,
      capture_output=True,
  )
  found['whole_command'] = time.perf_counter() - start
  return {f'{name}_seconds_{size}': value for name, value in found.items()}


def _lookup(folder: pathlib.Path) -> float:
  """Seconds to find ids among those of the paper's corpus, from disk."""
  rng = np.random.default_rng(6)
  path = folder / 'ids.npy'
  np.save(path, rng.integers(0, 2**64, _PAPER, dtype=np.uint64))
  hashes = np.load(path, mmap_mode='r')
  wanted = [int(hashes[row]) for row in rng.choice(_PAPER, _DOCUMENTS)]
  start = time.perf_counter()
  found = corpus_lib.find_hashes(hashes, wanted)
  seconds = time.perf_counter() - start
  assert len(found) == len(set(wanted))
  return seconds


def _plot(result: dict[str, Any], sizes: list[int], path: pathlib.Path) -> None:
  figure, (axes,) = harness.panels(1)
  for name in ('add', 'update', 'delete', 'whole_command'):
    seconds = [result[f'{name}_seconds_{size}'] for size in sizes]
    axes.plot(sizes, seconds, marker='o', label=name.replace('_', ' '))
  axes.set(
      xscale='log',
      ylim=(0, None),
      xlabel='passages of the corpus',
      ylabel=f'seconds, for {_DOCUMENTS} documents',
  )
  axes.legend()
  figure.savefig(path, dpi=120)


def main() -> None:
  parser = harness.parser(__doc__, output=False)
  arguments = parser.parse_args()
  sizes = [1000, 4000] if arguments.small else [4000, 16_000, 64_000, 256_000]
  result: dict[str, Any] = {'documents': _DOCUMENTS}
  with tempfile.TemporaryDirectory() as temporary:
    workdirs = {}
    for size in sizes:
      folder = pathlib.Path(temporary) / str(size)
      folder.mkdir()
      workdirs[size] = _make_workdir(folder, size)
    # In turns, so that what else the machine does is not taken for growth.
    seconds: dict[str, list[float]] = {}
    for turn in range(_TURNS + 1):
      for size, workdir in workdirs.items():
        for name, value in _measure(workdir, size, turn).items():
          seconds.setdefault(name, []).append(value)
    result |= {n: float(np.median(values)) for n, values in seconds.items()}
    result[f'lookup_seconds_{_PAPER}'] = _lookup(pathlib.Path(temporary))
  harness.write(arguments.output, result, 'jax', 'numpy')
  if arguments.output:
    _plot(result, sizes, arguments.output.with_suffix('.png'))


if __name__ == '__main__':
  main()
