"""The ablations of the paper on a generated world, with error bars.

  python benchmarks/ablations.py --output=benchmarks/results/ablations.json \
      [--rows=realm,ict,...] [--seeds=3] [--jobs=2] [--small]

Each row of experiments/ablations.py is trained and evaluated with each seed,
which determines world, initial parameters and batches. All rows of a seed start
from the same reader and retriever. Finished runs are not repeated, so rows and
seeds can be added later; the record keeps rows without runs in the workdir.
Questions and masked sentences are about facts that no sentence of the
pretraining corpus states (its passages do, and the warm-up reads them).
Intervals are those of Student's t over the seeds.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import subprocess
import sys
from typing import Any

import ablations_table
import harness

from realm_jax.evaluation import report
from realm_jax.prepare import world
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

# Rows and stages on another corpus than `corpus`.
_CORPORA = {
    'own_corpus': 'joined_corpus',
    'trivial': 'joined_corpus',
    'pieces': 'pieces_corpus',
    'token': 'pieces_corpus',
    'mlm_pieces': 'pieces_corpus',
    'ict_pieces': 'pieces_corpus',
}
# Rows that start from another reader and retriever than those of `mlm`, `ict`.
_STARTS = {
    'shared_bert': ('mlm', 'ict_shared_bert'),
    'separate': ('mlm', 'ict_separate'),
    'pieces': ('mlm_pieces', 'ict_pieces'),
    'token': ('mlm_pieces', 'ict_pieces'),
}
_PIECES = 1000  # Wordpieces of a vocabulary that divides nine names in ten.
_SMALL = ('--config.steps=300', '--config.optimizer.retriever_delay=60')


class _Seed:
  """The runs of one seed, in a folder."""

  def __init__(self, arguments: argparse.Namespace, seed: int, run: Any):
    self.folder = arguments.workdir / f'seed{seed}'
    self._seed, self._run, self._small = seed, run, arguments.small
    self._number = 300 + seed  # The world was not used for tuning.
    self._entities = 300 if arguments.small else 400

  def prepare(self, rows: list[str]) -> None:
    """Prepares the world, and its other forms if rows need them.

    `joined_corpus`: every sentence is in a passage. `pieces_corpus`: the same
    text in a vocabulary that divides names.
    """
    names = ['corpus', *(_CORPORA[row] for row in rows if row in _CORPORA)]
    for name in dict.fromkeys(names):
      if (self.folder / name).exists():
        continue
      flags = [f'--source=world:{self._number}:{self._entities}']
      if name == 'joined_corpus':
        flags = [
            f'--source={self._join()}',
            f'--vocab={self.folder / "corpus"}',
            '--validation_fraction=0',
        ]
      elif name == 'pieces_corpus':
        flags.append(f'--vocab_size={_PIECES}')
      output = f'--output={self.folder / name}'
      self._run('prepare', *flags, output, log=self._log())

  def _join(self) -> str:
    made = world.generate(self._number, self._entities)
    said = [r for r in made.pretraining if 'split' not in r]
    source = self.folder / 'joined.jsonl'
    return harness.write_lines(source, (*made.knowledge, *said))

  def train_and_evaluate(self, name: str) -> None:
    """Runs a stage or a row, unless it is finished."""
    workdir = self.folder / name
    stage = name.split('_')[0] if name.startswith(('mlm', 'ict')) else 'realm'
    corpus = self.folder / _CORPORA.get(name, 'corpus')
    if not (workdir / 'summary.json').exists():
      more: list[str] = []
      if stage == 'realm':
        more += _SMALL if self._small else ()
        earlier = ','.join(str(self.folder / s) for s in _start(name))
        more += [f'--config.init_from={earlier}', '--with_index_builder']
      self._run(
          'train',
          f'--config=experiments/ablations.py:{name}',
          f'--workdir={workdir}',
          f'--config.corpus={corpus}',
          f'--config.seed={self._seed}',
          *more,
          log=self._log(name),
      )
    steps = checkpoint.steps_in(workdir / 'checkpoints')
    missing = set(steps) - {r['step'] for r in report.load_all(workdir)}
    if corpus.name == 'joined_corpus':  # Evaluated as the others.
      corpus = self.folder / 'corpus'
    if missing and stage != 'mlm':
      self._run(
          'evaluate',
          f'--workdir={workdir}',
          f'--corpus={corpus}',
          f'--questions={corpus / "questions.jsonl"}',
          f'--steps={",".join(map(str, sorted(missing)))}',
          log=self._log(name),
      )

  def _log(self, name: str = 'prepare') -> pathlib.Path:
    return self.folder / f'{name}.log'


def _start(row: str) -> tuple[str, str]:
  """Returns the stages that train a row's first reader and retriever."""
  return _STARTS.get(row, ('mlm', 'ict'))


def run(arguments: argparse.Namespace, rows: list[str]) -> None:
  """Trains and evaluates, `jobs` runs at a time, each on cores of its own."""
  realm_jax = harness.Commands()
  available = sorted(os.sched_getaffinity(0))
  free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
  for i in range(arguments.jobs):
    free.put(available[i :: arguments.jobs] or available)

  def on_free_cores(*words: str, log: pathlib.Path) -> None:
    cores = free.get()
    try:
      realm_jax(*words, log=log, cores=cores)
    except subprocess.CalledProcessError as error:
      raise RuntimeError(
          f'A command failed with exit code {error.returncode}, see {log}.'
      ) from error
    finally:
      free.put(cores)

  seeds = [
      _Seed(arguments, seed, on_free_cores) for seed in range(arguments.seeds)
  ]
  stages = dict.fromkeys(stage for row in rows for stage in _start(row))
  with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
    try:
      for names in ([None], stages, [row for row in rows if row != 'ict']):
        # All seeds of a row come before the next row.
        for future in [
            pool.submit(seed.train_and_evaluate, name)
            if name
            else pool.submit(seed.prepare, rows)
            for name in names
            for seed in seeds
        ]:
          future.result()
    finally:
      pool.shutdown(cancel_futures=True)


def main() -> int:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument('--rows', default=','.join(ablations_table.ROWS))
  parser.add_argument('--seeds', type=int, default=3, help='how many')
  parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
  parser.add_argument('--workdir', type=pathlib.Path)
  arguments = parser.parse_args()
  rows = arguments.rows.split(',')
  known = ', '.join(ablations_table.ROWS)
  if unknown := [row for row in rows if row not in ablations_table.ROWS]:
    parser.error(f'no row {unknown[0]!r}; the rows are {known}')
  name = 'ablations_small' if arguments.small else 'ablations'
  arguments.workdir = arguments.workdir or pathlib.Path('runs') / name
  arguments.output = arguments.output or arguments.workdir / f'{name}.json'
  arguments.workdir.mkdir(parents=True, exist_ok=True)
  try:
    run(arguments, rows)
  except RuntimeError as error:
    sys.exit(str(error))
  exists = arguments.output.exists()
  recorded = files.read_json(arguments.output) if exists else None
  figures = ablations_table.collect(arguments.workdir, recorded)
  figures |= harness.about('jax', 'flax')
  files.write_json(arguments.output, figures)
  table = ablations_table.markdown(figures)
  arguments.output.with_suffix('.md').write_text(table, encoding='utf-8')
  ablations_table.plot(figures, arguments.output.with_suffix('.png'))
  print(f'\n{table}\nWritten: {arguments.output}, also as .md and .png')
  return 0


if __name__ == '__main__':
  sys.exit(main())
