"""Command line, commands, child processes and records of all benchmarks."""

import argparse
from collections.abc import Callable, Collection, Mapping
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


def parser(
    doc: str | None, output: bool = True, torch: str = ''
) -> argparse.ArgumentParser:
  """Returns a parser of the common flags.

  Args:
    doc: docstring of the benchmark.
    output: whether --output is required.
    torch: packages of --torch_python; none: the flag does not exist.
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
  if torch:
    made.add_argument(
        '--torch_python', default=sys.executable, help=f'Python with {torch}'
    )
  return made


def flags(settings: Mapping[str, Any]) -> list[str]:
  """Returns the flags of `train` that set these fields of the config."""
  return [f'--config.{name}={value}' for name, value in settings.items()]


def cpu_seconds() -> float:
  """Returns the processor time of the child processes that ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


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
    print(f'$ {self.done[-1]}', flush=True)
    command = [sys.executable, '-m', 'realm_jax', *words]
    if cores:
      pinned = ','.join(map(str, cores))
      command = ['taskset', '--cpu-list', pinned, *command]
    environment = {'GLIBC_TUNABLES': _HUGE_PAGES} | os.environ
    if log is None:
      subprocess.run(command, check=True, env=environment)
      return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'ab') as file:
      subprocess.run(
          command,
          check=True,
          stdout=file,
          stderr=subprocess.STDOUT,
          env=environment,
      )


class Child:
  """A process that answers JSON requests, each on a line, such as PyTorch."""

  def __init__(self, *command: str | os.PathLike[str], **environment: str):
    # PyTorch has a Python of its own, without the packages of this one.
    inherited = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    if command[0] == sys.executable:
      inherited = dict(os.environ)
    self._process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=inherited | environment,
    )

  def ask(self, do: str, **request: Any) -> dict[str, Any]:
    """Sends {do: ..., **request}; returns the answer.

    Raises:
      RuntimeError: the process ended, or answered with an `error`.
    """
    assert self._process.stdin and self._process.stdout
    request = {'do': do, **request}
    print(json.dumps(request), file=self._process.stdin, flush=True)
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(
          f'{self._process.args} ended with exit code {self._process.wait()},'
          f' asked for {do}.'
      )
    answer = json.loads(line)
    if 'error' in answer:
      raise RuntimeError(
          f'{self._process.args}, asked for {do}: {answer["error"]}'
      )
    return answer

  def close(self) -> None:
    assert self._process.stdin
    self._process.stdin.close()
    self._process.wait()


def serve(answer: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
  """Answers the requests of a `Child` with answer(do, request).

  The answer to a request that fails is its `error`.
  """
  out = private_stdout()
  for line in sys.stdin:
    request = json.loads(line)
    try:
      found = answer(request.pop('do'), request)
    except Exception as error:
      traceback.print_exc()
      found = {'error': short(error)}
    print(json.dumps(found), file=out, flush=True)


def private_stdout() -> Any:
  """Returns the standard output; libraries print to standard error instead."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  return out


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
      'versions': {
          'python': platform.python_version(),
          **{package: metadata.version(package) for package in packages},
      },
  }


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
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=8)
  figure.savefig(output.with_suffix('.png'), dpi=110)
