"""Speed and memory on one GPU, within a given time.

  python benchmarks/accelerator.py --output=FILE.json [--seconds=240]
      [--stages=peak,quick,...] [--texts=FILE] [--torch_python=PYTHON] [--small]

Each stage runs in a process of its own (benchmarks/accelerator_stages.py),
since memory statistics and allocations last as long as a process. FILE is
written after every figure. A stage that fails, or exceeds its share of the
time, is recorded, and the next one runs. Stages:

  peak     matrix products in bfloat16 and float32, memory bandwidth
  quick    the REALM step with 3 of BERT-base's 12 layers, by attention kernel,
           dropout and remat
  step     the same with 12 layers, and the largest batch that fits
  torch    PyTorch (SDPA, fused AdamW) and the same step, in turns
  search   exact and approximate search over the paper's 13,353,718 passages
  embed    embedding of passages of 288 wordpieces
  ict      the ICT step with 4,096 pairs, by gradient cache
  realm    `realm-jax train --with_index_builder` on a generated world or on
           --texts: the parts of a step, and the stall at each refresh
  profile  a trace of a few steps, next to FILE

--small runs toy sizes on any device, to try the code; its figures say nothing
about a GPU. A CPU needs minutes to compile the steps: a small --seconds cuts
these stages. docs/scaling.md says what the figures mean.
"""

import argparse
from importlib import metadata
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, TextIO

import harness

from realm_jax.runtime import files

_HERE = pathlib.Path(__file__).resolve().parent
# Each stage's share of the time, in the default order. Later stages share what
# a stage leaves.
STAGES = {
    'peak': 12,
    'quick': 45,
    'step': 70,
    'torch': 28,
    'search': 20,
    'embed': 14,
    'ict': 22,
    'realm': 60,
    'profile': 9,
}
_PACKAGES = (
    'jax jaxlib flax optax numpy jax-cuda12-plugin jax-cuda13-plugin'
    ' nvidia-cudnn-cu12 nvidia-cudnn-cu13'
).split()
_CUT = 3  # Exit code of a stage that ended in time.
_PROBE_SECONDS = 60  # The longest search for a device.


def _environment(scratch: str) -> dict[str, str]:
  """Returns the environment of the stages."""
  environment = {
      # Stages share compiled steps. `*_compile_cache_hits` counts those that
      # were compiled before, as in a cache of the user's.
      'JAX_COMPILATION_CACHE_DIR': f'{scratch}/cache',
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '1',
      'HF_HUB_OFFLINE': '1',
      **os.environ,
      # A stage shares the device with PyTorch or the index builder.
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
      'XLA_CLIENT_MEM_FRACTION': '0.95',
      'CUDA_VISIBLE_DEVICES': os.environ.get(
          'CUDA_VISIBLE_DEVICES', '0'
      ).split(',')[0],
  }
  # JAX refuses both names of one variable.
  environment.pop('XLA_PYTHON_CLIENT_MEM_FRACTION', None)
  return environment


def _about() -> dict[str, Any]:
  """Command without folders, hardware and versions."""
  found = harness.about()
  for package in _PACKAGES:
    try:
      found['versions'] |= harness.about(package)['versions']
    except metadata.PackageNotFoundError:
      continue
  words = ['python', 'benchmarks/accelerator.py']
  for word in sys.argv[1:]:
    parts = word.split('=', 1)
    words.append('='.join(part.rpartition('/')[2] for part in parts))
  return found | {'command': shlex.join(words)}


class _Run:
  """The stages of one run, and the file of their figures."""

  def __init__(
      self, arguments: argparse.Namespace, scratch: str, log: TextIO
  ):
    self._arguments, self._scratch = arguments, scratch
    self._figures: dict[str, Any] = {
        'small': arguments.small,
        'seconds': arguments.seconds,
        **{f'{stage}_status': 'not run' for stage in arguments.stages},
    }
    self._about = _about()
    self._environment = _environment(scratch)
    self._log = log
    self.write()

  def write(self) -> None:
    files.write_json(self._arguments.output, self._figures | self._about)

  def probe(self) -> str | None:
    """Records the device; returns the problem if it cannot be measured."""
    self.stage('probe', min(_PROBE_SECONDS, self._arguments.seconds))
    error = self._figures.pop('probe_error', None)
    status = self._figures.pop('probe_status')
    for name in ('wall_seconds', 'limit_seconds'):
      del self._figures[f'probe_{name}']
    if status != 'done':
      return f'JAX finds no device: {error or status}.'
    self._about['hardware'] = (
        f'{self._figures["device"]}, {self._about["hardware"]}'
    )
    self.write()
    if self._figures['platform'] == 'cpu' and not self._arguments.small:
      return (
          'JAX finds no GPU here, only a CPU; the sizes are those of a GPU.'
          ' Add --small to try the code at toy sizes.'
      )
    return None

  def stage(self, stage: str, limit: float) -> None:
    """Runs a stage for at most `limit` seconds, and records its end."""
    start = time.monotonic()
    arguments = self._arguments
    command = [
        sys.executable,
        str(_HERE / 'accelerator_stages.py'),
        stage,
        f'--until={time.time() + limit}',
        f'--scratch={self._scratch}',
        f'--keep={arguments.output.with_suffix("")}',
        f'--torch_python={arguments.torch_python}',
        f'--texts={arguments.texts}',
        f'--peak_tflops={self._figures.get("peak_bfloat16_tflops", 0)}',
        *(['--small'] if arguments.small else []),
    ]
    print(f'-- {stage}, up to {limit:.0f} s', flush=True)
    print(f'---- {stage}', file=self._log, flush=True)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=self._log,
        text=True,
        env=self._environment,
        start_new_session=True,  # One signal ends it with its children.
    )
    cut = threading.Event()

    def end() -> None:
      cut.set()
      _kill(process)

    timer = threading.Timer(limit, end)
    timer.start()
    status = 'cut'  # Unless the stage ends before.
    try:
      assert process.stdout is not None
      for line in process.stdout:
        if line.endswith('\n'):  # Else the kill divided it.
          self._take(stage, json.loads(line))
      code = process.wait()
      if not cut.is_set():
        status = {0: 'done', _CUT: 'cut'}.get(code, 'failed')
        if status == 'failed':
          self._figures.setdefault(
              f'{stage}_error', f'The stage ended with exit code {code}.'
          )
        if f'{stage}_skipped' in self._figures:
          status = 'skipped'
    finally:
      timer.cancel()
      _kill(process)
      seconds = round(time.monotonic() - start, 1)
      self._figures |= {
          f'{stage}_status': status,
          f'{stage}_wall_seconds': seconds,
          f'{stage}_limit_seconds': round(limit, 1),
      }
      self.write()
    print(f'-- {stage}: {status} after {seconds} s', flush=True)

  def _take(self, stage: str, line: dict[str, Any]) -> None:
    """Records what a stage printed."""
    self._about['versions'] |= line.pop('versions', {})
    if stage != 'probe':
      line = {f'{stage}_{name}': value for name, value in line.items()}
    self._figures |= line
    self.write()
    harness.show(line)

  @property
  def failed(self) -> list[str]:
    return [
        stage
        for stage in self._arguments.stages
        if self._figures[f'{stage}_status'] == 'failed'
    ]


def _kill(process: subprocess.Popen[str]) -> None:
  """Ends a process and its children."""
  try:
    os.killpg(process.pid, signal.SIGKILL)
  except ProcessLookupError:
    return
  process.wait()


def main() -> int:
  parser = harness.parser(__doc__, torch='PyTorch and transformers 5')
  parser.add_argument('--seconds', type=float, default=240, help='in all')
  parser.add_argument('--stages', default=','.join(STAGES), help='in order')
  parser.add_argument('--texts', default='', help='passages, as of `prepare`')
  arguments = parser.parse_args()
  arguments.stages = stages = arguments.stages.split(',')
  if unknown := [stage for stage in stages if stage not in STAGES]:
    parser.error(f'no stage {unknown}; the stages are {", ".join(STAGES)}')
  if arguments.seconds <= 0:
    parser.error(f'--seconds={arguments.seconds}: must be more than 0')
  if arguments.output.is_dir():
    parser.error(f'--output={arguments.output}: is a folder; give a file')
  end = time.monotonic() + arguments.seconds
  arguments.output.parent.mkdir(parents=True, exist_ok=True)
  # A signal that ends this process ends the stage as well.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  with (
      tempfile.TemporaryDirectory() as scratch,
      open(arguments.output.with_suffix('.log'), 'w', encoding='utf-8') as log,
  ):
    run = _Run(arguments, scratch, log)
    if problem := run.probe():
      print(problem, file=sys.stderr)
      return 2
    for i, stage in enumerate(stages):
      left = end - time.monotonic()
      share = STAGES[stage] / sum(STAGES[other] for other in stages[i:])
      if left * share >= 1:
        run.stage(stage, left * share)
      else:
        print(f'-- {stage}: no time left', flush=True)
  print(f'Written: {arguments.output}')
  if run.failed:
    print(f'Failed: {", ".join(run.failed)}', file=sys.stderr)
  return 1 if run.failed else 0


if __name__ == '__main__':
  sys.exit(main())
