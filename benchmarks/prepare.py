"""How fast `prepare` is, how much memory it takes, and that it repeats itself.

  python benchmarks/prepare.py --source='runs/articles/*.jsonl.xz' \
      --vocab=runs/vocab/vocab.txt --workdir=runs/prepare \
      --output=benchmarks/results/prepare.json [--small]

The same sources are prepared with several numbers of workers, and once more by
a run that is killed (SIGKILL) and started again; the files must be the same.
Other work on the machine makes wall time longer, so that CPU time, which
includes all processes, is given next to it, and the load before each run.
"""

import argparse
from collections.abc import Iterator
import json
import os
import pathlib
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import harness

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.runtime import files as files_lib

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
    self.words = [
        'prepare',
        f'--source={arguments.source}',
        f'--vocab={arguments.vocab}',
        f'--workers={workers}',
        f'--output={self.output}',
    ]
    self.peak = 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    self.load = os.getloadavg()[0]
    start = time.monotonic()
    self._process = subprocess.Popen(
        [sys.executable, '-m', 'realm_jax', *self.words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    done = threading.Event()
    watcher = threading.Thread(target=self._watch, args=(done,))
    watcher.start()
    try:
      self._wait(kill_at)
    finally:
      done.set()
      watcher.join()
    self.seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    self.cpu_seconds = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )

  def _wait(self, kill_at: int | None) -> None:
    if kill_at is None:
      if self._process.wait():
        raise SystemExit(f'realm-jax {shlex.join(self.words)} failed.')
      return
    while self.num_parts() < kill_at:
      if self._process.poll() is not None:
        raise SystemExit('The run ended before it could be killed.')
      time.sleep(0.05)
    self._process.send_signal(signal.SIGKILL)
    self._process.wait()

  def num_parts(self) -> int:
    folder = self.output.parent / f'.{self.output.name}.parts'
    return len(list(folder.glob('*.part')))

  def _watch(self, done: threading.Event) -> None:
    """Notes the most memory that all processes together had resident."""
    while not done.wait(0.5):
      self.peak = max(self.peak, sum(map(_resident, _tree(self._process.pid))))


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


def _resident(pid: int) -> int:
  """Returns bytes; what processes share is counted in each."""
  try:
    pages = int(pathlib.Path(f'/proc/{pid}/statm').read_text().split()[1])
  except OSError:
    return 0
  return pages * resource.getpagesize()


def _files(output: pathlib.Path) -> dict[str, str]:
  """Returns the SHA-256 of each file, after checking them."""
  corpus = corpus_lib.Corpus.open(output)
  corpus.verify()
  return {
      name: facts['sha256'] for name, facts in corpus.manifest['files'].items()
  }


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields flat figures, more of them after every run."""
  shutil.rmtree(arguments.workdir, ignore_errors=True)
  arguments.workdir.mkdir(parents=True)
  figures: dict[str, Any] = {}
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
          'original_passages_per_core_second': round(_ORIGINAL_PASSAGES, 1),
      }
    per_core = counts['passages'] / run.cpu_seconds
    values = {
        'seconds': round(run.seconds, 1),
        'cpu_seconds': round(run.cpu_seconds, 1),
        'load_before': round(run.load, 1),
        'resident_mib': round(run.peak / 2**20),
        'wordpieces_per_second': round(counts['wordpieces'] / run.seconds),
        'wordpieces_per_cpu_second': round(
            counts['wordpieces'] / run.cpu_seconds
        ),
        'passages_per_cpu_second': round(per_core),
        'times_the_original_per_core': round(per_core / _ORIGINAL_PASSAGES, 1),
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
) -> dict[str, Any]:
  killed = Run(arguments, 2, 'killed', arguments.kill_at)
  parts = killed.num_parts()
  again = Run(arguments, 2, 'killed')
  figures = {
      'killed_after_seconds': round(killed.seconds, 1),
      'killed_parts_kept': parts,
      'restarted_seconds': round(again.seconds, 1),
      'restarted_cpu_seconds': round(again.cpu_seconds, 1),
      'restarted_load_before': round(again.load, 1),
      'restarted_same_bytes': _files(again.output) == expected,
  }
  shutil.rmtree(again.output)
  return figures


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--source', required=True)
  parser.add_argument('--vocab', required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--workers', default='2,4,1')
  parser.add_argument(
      '--kill_at', type=int, default=300, help='parts; 0: no run is killed'
  )
  arguments = parser.parse_args()
  arguments.workers = [int(count) for count in arguments.workers.split(',')]
  if arguments.small:
    arguments.kill_at = 2
  about = harness.about('nupunkt', 'tokenizers')
  for figures in measure(arguments):
    files_lib.write_json(arguments.output, figures | about)
    print(json.dumps(figures, indent=2), flush=True)


if __name__ == '__main__':
  main()
