"""Speed and memory on one GPU, within a given time.

  python benchmarks/accelerator.py --output=FILE.json [--seconds=240]
      [--stages=peak,quick,...] [--texts=FILE] [--torch_python=PYTHON] [--small]

Each stage runs in a process of its own (benchmarks/accelerator_stages.py),
since memory statistics and allocations last as long as a process. FILE is
written after every figure. A stage that fails, or exceeds its share of the
time, is recorded, and the next one runs. docs/scaling.md lists the stages and
says what the figures mean.

--small runs toy sizes on any device, to try the code; its figures say nothing
about a GPU. A CPU needs minutes to compile the steps: a small --seconds cuts
these stages.
"""

import argparse
import contextlib
from importlib import metadata
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, TextIO

import harness

from realm_jax.runtime import files

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
  """The stages of one run, which add their figures to the record."""

  def __init__(
      self, arguments: argparse.Namespace, scratch: str, log: TextIO
  ):
    self._arguments, self._scratch, self._log = arguments, scratch, log
    self._environment = _environment(scratch)
    self._write(
        _about()
        | {'small': arguments.small, 'seconds': arguments.seconds}
        | {f'{stage}_status': 'not run' for stage in arguments.stages}
    )

  def _read(self) -> harness.Figures:
    return files.read_json(self._arguments.output)

  def _write(self, record: harness.Figures) -> None:
    files.write_json(self._arguments.output, record)

  def probe(self) -> str | None:
    """Records the device; returns the problem if it cannot be measured."""
    status = self.stage('probe', min(_PROBE_SECONDS, self._arguments.seconds))
    record = self._read()
    error = record.get('probe_error') or status
    record = {k: x for k, x in record.items() if not k.startswith('probe_')}
    if status == 'done':
      record['hardware'] = f'{record["device"]}, {record["hardware"]}'
    self._write(record)
    if status != 'done':
      return f'JAX finds no device: {error}.'
    if record['platform'] == 'cpu' and not self._arguments.small:
      return (
          'JAX finds no GPU here, only a CPU; the sizes are those of a GPU.'
          ' Add --small to try the code at toy sizes.'
      )
    return None

  def stage(self, stage: str, limit: float) -> str:
    """Runs a stage for at most `limit` seconds; returns how it ended."""
    start = time.monotonic()
    arguments = self._arguments
    command = [
        sys.executable,
        str(harness.ROOT / 'benchmarks' / 'accelerator_stages.py'),
        stage,
        f'--until={time.time() + limit}',
        f'--scratch={self._scratch}',
        f'--output={arguments.output}',
        f'--torch_python={arguments.torch_python}',
        f'--texts={arguments.texts}',
        f'--peak_tflops={self._read().get("peak_bfloat16_tflops", 0)}',
        *(['--small'] if arguments.small else []),
    ]
    print(f'-- {stage}, up to {limit:.0f} s', flush=True)
    print(f'---- {stage}', file=self._log, flush=True)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=self._log,
        stderr=self._log,
        env=self._environment,
        start_new_session=True,  # One signal ends it with its children.
    )
    status, error = 'cut', ''  # Unless the stage ends before.
    try:
      code = process.wait(limit)
      if code != _CUT:
        status = 'failed' if code else 'done'
        error = f'The stage ended with exit code {code}.'
    except subprocess.TimeoutExpired:
      pass
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
      record = self._read()
      if status == 'failed':
        record.setdefault(f'{stage}_error', error)
      if f'{stage}_skipped' in record:
        status = 'skipped'
      record |= {
          f'{stage}_status': status,
          f'{stage}_wall_seconds': round(time.monotonic() - start, 1),
          f'{stage}_limit_seconds': round(limit, 1),
      }
      self._write(record)
    found = {k: x for k, x in record.items() if k.startswith(f'{stage}_')}
    harness.show(found)
    return status

  @property
  def failed(self) -> list[str]:
    record = self._read()
    return [
        stage
        for stage in self._arguments.stages
        if record[f'{stage}_status'] == 'failed'
    ]


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
