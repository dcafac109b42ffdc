"""Command line, commands, child processes and records of all benchmarks."""

import argparse
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
import traceback
from typing import Any

_HUGE_PAGES = 'glibc.malloc.hugetlb=1'  # As in the Makefile.
ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / 'experiments'

Figures = dict[str, Any]


def parser(
    doc: str | None,
    *paths: str,
    output: bool = True,
    torch: str = '',
    **folders: str,
) -> argparse.ArgumentParser:
  """Returns a parser of the common flags.

  Args:
    doc: docstring of the benchmark.
    *paths: names of further required flags, which are paths.
    output: whether --output is required.
    torch: packages of --torch_python; none: the flag does not exist.
    **folders: names of flags that are folders, with their defaults.
  """
  made = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument(
      '--output', type=pathlib.Path, required=output, help='JSON of figures'
  )
  made.add_argument(
      '--small', action='store_true', help='toy sizes, to try the code'
  )
  for name in paths:
    made.add_argument(f'--{name}', type=pathlib.Path, required=True)
  for name, default in folders.items():
    made.add_argument(
        f'--{name}', type=pathlib.Path, default=pathlib.Path(default)
    )
  if torch:
    made.add_argument(
        '--torch_python', default=sys.executable, help=f'Python with {torch}'
    )
  return made


def flags(settings: Mapping[str, Any]) -> list[str]:
  """Returns the flags of `train` that set these fields of the config."""
  return [f'--config.{name}={value}' for name, value in settings.items()]


def command(*words: str) -> list[str]:
  """Returns the command line of `realm-jax`, and prints it."""
  print(f'$ {shlex.join(["realm-jax", *words])}', flush=True)
  return [sys.executable, '-m', 'realm_jax', *words]


def cpu_seconds() -> float:
  """Returns the processor time of the child processes that ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def resident_mib(pid: int | str = 'self', kind: str = 'VmRSS') -> float:
  """Returns the memory of a process, with shared pages; 0 if it has ended.

  Args:
    pid: of the process.
    kind: VmRSS, now; VmHWM, the most so far.
  """
  try:
    text = pathlib.Path(f'/proc/{pid}/status').read_text()
  except OSError:
    return 0.0
  found = text.partition(f'{kind}:')[2].split()
  return int(found[0]) / 1024 if found else 0.0


def timed(run: Callable[..., Any], *args: Any) -> tuple[float, Any]:
  """Returns the seconds of a call on the host, and its result."""
  start = time.perf_counter()
  result = run(*args)
  return time.perf_counter() - start, result


def median_seconds(
    run: Callable[[], Any], rounds: int, calls: int = 1
) -> float:
  """Returns the median seconds of a call, of `calls` queued at once."""
  import jax

  def queue() -> Any:
    for _ in range(calls):
      result = run()
    return jax.block_until_ready(result)

  jax.block_until_ready(run())  # Compiles it.
  return statistics.median(timed(queue)[0] for _ in range(rounds)) / calls


def on_cores(cores: Collection[int], command: list[str]) -> list[str]:
  """Returns the command with the CPU cores that it may use."""
  return ['taskset', '--cpu-list', ','.join(map(str, cores)), *command]


class Commands:
  """`commands('train', ...)` runs `realm-jax train`; `done` lists all runs."""

  def __init__(self) -> None:
    self.done: list[str] = []

  def __call__(
      self,
      *words: str,
      log: pathlib.Path | None = None,
      cores: Collection[int] = (),
  ) -> None:
    """Runs a command to its end.

    Args:
      *words: of the command, after `realm-jax`.
      log: file to append the output to; None: the output is shown.
      cores: CPU cores that the command may use; none: all.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    self.done.append(shlex.join(['realm-jax', *words]))
    line = command(*words)
    if cores:
      line = on_cores(cores, line)
    environment = {'GLIBC_TUNABLES': _HUGE_PAGES} | os.environ
    if log is None:
      subprocess.run(line, check=True, env=environment)
      return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'ab') as file:
      subprocess.run(
          line,
          check=True,
          stdout=file,
          stderr=subprocess.STDOUT,
          env=environment,
      )

  def train(
      self,
      experiment: str,
      workdir: pathlib.Path,
      settings: Mapping[str, Any],
      *more: str,
      **how: Any,
  ) -> None:
    """Runs a training job, unless it is finished.

    Args:
      experiment: as 'squad_open.py:cpu', in the folder of experiments.
      workdir: of the job.
      settings: fields of the config.
      *more: flags of `train`.
      **how: see `__call__`.
    """
    if not (workdir / 'summary.json').exists():
      self(
          'train',
          f'--config={os.path.relpath(EXPERIMENTS / experiment)}',
          f'--workdir={workdir}',
          *flags(settings),
          *more,
          **how,
      )


class Child:
  """A process that answers JSON requests, each on a line, such as PyTorch."""

  def __init__(self, python: str, script: str, *words: str, threads: int = 0):
    """Starts a script of this folder, on a CPU.

    Args:
      python: executable; PyTorch has its own.
      script: file name.
      *words: arguments of the script.
      threads: that it may use; 0: all.
    """
    environment = dict(os.environ)
    if python != sys.executable:  # Without the packages of this one.
      environment.pop('PYTHONPATH', None)
    command = [python, str(ROOT / 'benchmarks' / script), *words]
    if threads:
      command = on_cores(sorted(os.sched_getaffinity(0))[:threads], command)
      environment |= {
          'JAX_PLATFORMS': 'cpu',
          'NPROC': str(threads),
          'OMP_NUM_THREADS': str(threads),
      }
    self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )

  def ask(self, do: str, **arguments: Any) -> Any:
    """Returns the result of the method `do`, see `serve`.

    Raises:
      RuntimeError: the process ended, or the method failed.
    """
    assert self._process.stdin and self._process.stdout
    print(json.dumps([do, arguments]), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
          f'{self._process.args} ended with exit code {self._process.wait()},'
          f' asked for {do}.'
      )
    value, error = json.loads(line)
    if error:
      raise RuntimeError(f'{self._process.args}, asked for {do}: {error}')
    return value

  def versions(self, *packages: str) -> dict[str, str]:
    """Returns the versions that the process has."""
    return self.ask('versions', packages=packages)

  def close(self) -> None:
    assert self._process.stdin
    self._process.stdin.close()
    self._process.wait()


def serve(make: Callable[..., Any]) -> None:
  """Answers the requests of a `Child`.

  Args:
    make: called by the request `open`; other requests call methods of its
      result by name.
  """
  out, side = os.fdopen(os.dup(1), 'w'), None
  os.dup2(2, 1)  # Libraries print to standard error instead.
  for line in sys.stdin:
    do, arguments = json.loads(line)
    value = error = None
    try:
      if do == 'open':
        side = None  # Frees the one before.
        side = make(**arguments)
      elif do == 'versions':
        value = versions(*arguments['packages'])
      else:
        value = getattr(side, do)(**arguments)
    except Exception as raised:
      traceback.print_exc()
      error = short(raised)
    print(json.dumps([value, error]), file=out, flush=True)


def short(error: BaseException) -> str:
  return f'{type(error).__name__}: {error}'[:500]


def about(*packages: str) -> dict[str, Any]:
  """Returns command, hardware and versions, which every record has.

  Args:
    *packages: whose versions matter, by their names on PyPI.
  """
  # Folders of this machine mean nothing elsewhere.
  words = [
      '--torch_python=hf/bin/python' if w.startswith('--torch_python') else w
      for w in sys.argv
      if not w.startswith('--folder')
  ]
  return {
      'command': shlex.join(['python', *words]),
      'hardware': f'{os.cpu_count()} CPU cores, {platform.machine()}',
      'versions': {'python': platform.python_version(), **versions(*packages)},
  }


def versions(*packages: str) -> dict[str, str]:
  return {package: metadata.version(package) for package in packages}


def rounded(value: Any) -> Any:
  """Returns plain JSON with each float at six significant digits."""
  if isinstance(value, float):
    return float(f'{value:.6g}')
  if isinstance(value, dict):
    return {name: rounded(one) for name, one in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(one) for one in value]
  return value


def show(figures: dict[str, Any]) -> None:
  """Prints the figures that fit a line each."""
  for name, value in figures.items():
    shown = f'{value:.4g}' if isinstance(value, float) else value
    if not isinstance(value, list):
      print(f'{name:44} {shown}', flush=True)


def write(
    path: pathlib.Path | None, figures: dict[str, Any], *packages: str
) -> None:
  """Prints and writes figures with the parts of `about` that they lack.

  Args:
    path: of the record; None: figures are only printed.
    figures: plain JSON.
    *packages: see `about`.
  """
  # The Python with PyTorch lacks this package.
  from realm_jax.runtime import files

  record = rounded(about(*packages) | figures)
  show(record)
  if path is not None:
    files.write_json(path, record)


def write_lines(path: pathlib.Path, records: Iterable[Any]) -> str:
  """Writes JSON Lines; returns the path."""
  text = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in records)
  path.write_text(text, encoding='utf-8')
  return str(path)


def panels(count: int, height: float = 4.0, rows: int = 1) -> tuple[Any, Any]:
  """Returns a matplotlib figure and its axes, row by row."""
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(
      figsize=(5.0 * count, height * rows), layout='constrained'
  )
  return figure, list(figure.subplots(rows, count, squeeze=False).flat)


def save(figure: Any, output: pathlib.Path) -> None:
  """Writes a figure next to the record, with legends."""
  for axes in figure.axes:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8)
  figure.savefig(output.with_suffix('.png'), dpi=110)
