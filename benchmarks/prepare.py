"""Speed, memory and determinism of `realm-jax prepare`.

  python benchmarks/prepare.py --source='runs/articles/*.jsonl.xz' \
      --vocab=runs/vocab/vocab.txt --workdir=runs/prepare \
      --output=benchmarks/results/prepare.json [--small]

The same sources are prepared with several numbers of workers, and by a run that
is killed (SIGKILL) and restarted; all files must be equal. CPU time includes
all processes; it and the load before each run show the effect of other work on
the machine.
"""

import argparse
from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time

import harness

from realm_jax.corpus import corpus as corpus_lib

# Per second and core: generate_retrieval_corpus of the original takes three
# hours on 12 cores for Wikipedia, by its README.
_ORIGINAL_PASSAGES = 13_353_718 / (3 * 3600 * 12)


class Run:
  """A `realm-jax prepare` in processes of its own, watched."""

  def __init__(
      self,
      arguments: argparse.Namespace,
      workers: int,
      output: str,
      kill_at: int | None = None,
  ):
    self.output = arguments.workdir / output
    command = harness.command(
        'prepare',
        f'--source={arguments.source}',
        f'--vocab={arguments.vocab}',
        f'--workers={workers}',
        f'--output={self.output}',
    )
    self.peak = 0.0  # MiB of the resident memory of all processes.
    before = harness.cpu_seconds()
    self.load = os.getloadavg()[0]
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
      if kill_at is not None and self.num_parts() >= kill_at:
        process.kill()
        break
      resident = sum(map(harness.resident_mib, _tree(process.pid)))
      self.peak = max(self.peak, resident)
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.5 if kill_at is None else 0.05)
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.wait() != expected:
      raise SystemExit(f'It ended with exit code {process.returncode}.')
    self.seconds = time.monotonic() - start
    self.cpu_seconds = harness.cpu_seconds() - before

  def num_parts(self) -> int:
    folder = self.output.parent / f'.{self.output.name}.parts'
    return len(list(folder.glob('*.part')))


def _tree(pid: int) -> list[int]:
  found, todo = [], [pid]
  while todo:
    pid = todo.pop()
    found.append(pid)
    for file in pathlib.Path(f'/proc/{pid}/task').glob('*/children'):
      try:
        todo += map(int, file.read_text().split())
      except OSError:
        continue  # The thread, or the process, has ended.
  return found


def _files(output: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each file, after checking them."""
  corpus = corpus_lib.Corpus.open(output)
  corpus.verify()
  return {
      name: facts['sha256'] for name, facts in corpus.manifest['files'].items()
  }


def measure(arguments: argparse.Namespace) -> Iterator[harness.Figures]:
  """Yields flat figures, more of them after every run."""
  shutil.rmtree(arguments.workdir, ignore_errors=True)
  arguments.workdir.mkdir(parents=True)
  figures: harness.Figures = {}
  first: dict[str, str] = {}
  for workers in arguments.workers:
    run = Run(arguments, workers, f'workers{workers}')
    files = _files(run.output)
    manifest = corpus_lib.Corpus.open(run.output).manifest
    counts = manifest['counts']
    if not first:
      first = files
      figures = {
          'records': counts['records'],
          'passages': counts['passages'],
          'wordpieces': counts['wordpieces'],
          'fingerprint': manifest['fingerprint'],
          'original_passages_per_core_second': _ORIGINAL_PASSAGES,
      }
    per_core = counts['passages'] / run.cpu_seconds
    values = {
        'seconds': run.seconds,
        'cpu_seconds': run.cpu_seconds,
        'load_before': run.load,
        'resident_mib': run.peak,
        'wordpieces_per_second': counts['wordpieces'] / run.seconds,
        'wordpieces_per_cpu_second': counts['wordpieces'] / run.cpu_seconds,
        'passages_per_cpu_second': per_core,
        'times_the_original_per_core': per_core / _ORIGINAL_PASSAGES,
        'same_bytes': files == first,
    }
    figures |= {f'workers{workers}_{k}': v for k, v in values.items()}
    yield figures
    shutil.rmtree(run.output)
    if workers == arguments.workers[0] and arguments.kill_at:
      figures |= _interrupted(arguments, first)
      yield figures


def _interrupted(
    arguments: argparse.Namespace, expected: dict[str, str]
) -> harness.Figures:
  killed = Run(arguments, 2, 'killed', arguments.kill_at)
  parts = killed.num_parts()
  again = Run(arguments, 2, 'killed')
  figures = {
      'killed_after_seconds': killed.seconds,
      'killed_parts_kept': parts,
      'restarted_seconds': again.seconds,
      'restarted_cpu_seconds': again.cpu_seconds,
      'restarted_load_before': again.load,
      'restarted_same_bytes': _files(again.output) == expected,
  }
  shutil.rmtree(again.output)
  return figures


def main() -> None:
  parser = harness.parser(__doc__, 'source', 'vocab', 'workdir')
  parser.add_argument('--workers', default='2,4,1')
  parser.add_argument(
      '--kill_at', type=int, default=300, help='parts; 0: no run is killed'
  )
  arguments = parser.parse_args()
  arguments.workers = [int(count) for count in arguments.workers.split(',')]
  if arguments.small:
    arguments.kill_at = 2
  for figures in measure(arguments):
    harness.write(arguments.output, figures, 'nupunkt', 'tokenizers')


if __name__ == '__main__':
  main()
