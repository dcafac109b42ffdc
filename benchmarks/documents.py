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
import pathlib
import subprocess
import tempfile

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


def _make_workdir(
    folder: pathlib.Path, size: int, width: int
) -> pathlib.Path:
  folder.mkdir()
  source = harness.write_lines(
      folder / 'source.jsonl', _records(size, 'base', 0)
  )
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


def _measure(workdir: pathlib.Path, turn: int) -> dict[str, float]:
  """Returns the seconds of each command; turn 0 only warms up."""

  def source(name: str, first: int | None = None) -> str:
    """A file of other records, or of newer ones of the corpus."""
    made = _records(_DOCUMENTS, f'{name} {turn} ', turn)
    if first is not None:
      made = [r | {'id': f'base{first + i}'} for i, r in enumerate(made)]
    return harness.write_lines(workdir.parent / f'{name}.jsonl', made)

  first = 2 * turn * _DOCUMENTS
  found = {}
  for name, command, file in (
      ('add', documents.add, [source('added')]),
      ('update', documents.update, [source('newer', first)]),
      ('delete', documents.delete, source('gone', first + _DOCUMENTS)),
  ):
    quiet = {} if name == 'delete' else {'progress': False}
    run = functools.partial(command, workdir, file, **quiet)
    found[name], _ = harness.timed(run)
    if not turn:
      return {}
  for name in ('add', 'delete'):
    command = harness.command(
        'index', name, f'--workdir={workdir}', f'--input={source("command")}'
    )
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    found[f'whole_{name}'], _ = harness.timed(run, command)
  return found


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


def main() -> None:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument('--sizes', default='4000,16000,64000,256000')
  parser.add_argument('--width', type=int, default=128)
  arguments = parser.parse_args()
  sizes = [int(size) for size in arguments.sizes.split(',')]
  if arguments.small:
    sizes = [1000, 4000]
  result: harness.Figures = {
      'documents': _DOCUMENTS, 'width': arguments.width
  }
  with tempfile.TemporaryDirectory() as temporary:
    workdirs = {
        size: _make_workdir(
            pathlib.Path(temporary) / str(size), size, arguments.width
        )
        for size in sizes
    }
    # Sizes take turns, so that other load on the machine affects all of them.
    seconds: dict[str, list[float]] = {}
    for turn in range(_TURNS + 1):
      for size, workdir in workdirs.items():
        for name, value in _measure(workdir, turn).items():
          seconds.setdefault(f'{name}_seconds_{size}', []).append(value)
    result |= {n: float(np.median(values)) for n, values in seconds.items()}
    for size, workdir in workdirs.items():
      result[f'compact_seconds_{size}'], _ = harness.timed(
          functools.partial(documents.compact, workdir, progress=False)
      )
    result[f'lookup_seconds_{_PAPER}'] = _lookup(pathlib.Path(temporary))
  harness.write(arguments.output, result, 'jax', 'numpy')


if __name__ == '__main__':
  main()
