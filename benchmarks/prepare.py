"""How fast `prepare` is, how much memory it takes, and that it repeats itself.

  python benchmarks/prepare.py --source='runs/articles/*.jsonl.xz' \
      --vocab=runs/vocab/vocab.txt --workdir=runs/prepare \
      --output=benchmarks/results/prepare.json [--small]

The same sources are prepared with several numbers of workers, and once more by
a run that is killed (SIGKILL) and started again; the files must be the same.
Other work on the machine makes wall time longer, so that CPU time, which
includes all processes, is given beside it, and the load before each run.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import nupunkt
import tokenizers

from realm_jax.data import corpus as corpus_lib
from realm_jax.runtime import checkpoint

_WORKERS = (1, 2, 4)
# generate_retrieval_corpus of the original, by its README: Wikipedia in three
# hours on 12 cores.
_ORIGINAL_PASSAGES_PER_CORE_SECOND = 13_353_718 / (3 * 3600 * 12)


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


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns flat figures."""
  shutil.rmtree(arguments.workdir, ignore_errors=True)
  arguments.workdir.mkdir(parents=True)
  figures: dict[str, Any] = {}
  first: dict[str, str] = {}
  manifest: dict[str, Any] = {}
  for workers in arguments.workers:
    run = Run(arguments, workers, f'workers{workers}')
    files = _files(run.output)
    first = first or files
    manifest = corpus_lib.Corpus.open(run.output).manifest
    counts = manifest['counts']
    name = f'workers{workers}'
    figures |= {
        f'{name}_seconds': round(run.seconds, 1),
        f'{name}_cpu_seconds': round(run.cpu_seconds, 1),
        f'{name}_load_before': round(run.load, 1),
        f'{name}_resident_mib': round(run.peak / 2**20),
        f'{name}_wordpieces_per_second': round(
            counts['wordpieces'] / run.seconds
        ),
        f'{name}_wordpieces_per_cpu_second': round(
            counts['wordpieces'] / run.cpu_seconds
        ),
        f'{name}_passages_per_cpu_second': round(
            counts['passages'] / run.cpu_seconds
        ),
        f'{name}_times_the_original_per_core': round(
            counts['passages']
            / run.cpu_seconds
            / _ORIGINAL_PASSAGES_PER_CORE_SECOND,
            1,
        ),
        f'{name}_same_bytes': files == first,
    }
    print(json.dumps(figures, indent=2), flush=True)
    if workers != arguments.workers[0]:
      shutil.rmtree(run.output)
  killed = Run(arguments, 2, 'killed', arguments.kill_at)
  parts = killed.num_parts()
  again = Run(arguments, 2, 'killed')
  return {
      'records': manifest['counts']['records'],
      'passages': manifest['counts']['passages'],
      'wordpieces': manifest['counts']['wordpieces'],
      'fingerprint': manifest['fingerprint'],
      **figures,
      'killed_after_seconds': round(killed.seconds, 1),
      'killed_parts_kept': parts,
      'restarted_seconds': round(again.seconds, 1),
      'restarted_cpu_seconds': round(again.cpu_seconds, 1),
      'restarted_same_bytes': _files(again.output) == first,
      'original_passages_per_core_second': round(
          _ORIGINAL_PASSAGES_PER_CORE_SECOND, 1
      ),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--source', required=True)
  parser.add_argument('--vocab', required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--small', action='store_true', help='one worker and two')
  arguments = parser.parse_args()
  arguments.workers = _WORKERS[:2] if arguments.small else _WORKERS
  arguments.kill_at = 2 if arguments.small else 300
  results = {
      **measure(arguments),
      'command': shlex.join(['python', *sys.argv]),
      'hardware': f'{os.cpu_count()} CPU cores, {platform.machine()}',
      'versions': {
          'python': platform.python_version(),
          'nupunkt': nupunkt.__version__,
          'tokenizers': tokenizers.__version__,
      },
  }
  checkpoint.write_json(arguments.output, results)
  print(json.dumps(results, indent=2))


if __name__ == '__main__':
  main()
