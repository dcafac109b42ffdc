"""Command line, commands, child processes and records of all benchmarks."""

import argparse
from collections.abc import Collection
from importlib import metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

from realm_jax.runtime import files

_HUGE_PAGES = 'glibc.malloc.hugetlb=1'  # As in the Makefile.


def parser(doc: str | None, output: bool = True) -> argparse.ArgumentParser:
  """Returns a parser with --output (required if `output`) and --small."""
  made = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  made.add_argument(
      '--output', type=pathlib.Path, required=output, help='JSON of figures'
  )
  made.add_argument(
      '--small', action='store_true', help='toy sizes, to try the code'
  )
  return made


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


def serve(answer: Any) -> None:
  """Answers the requests of a `Child` with answer(do, request) -> dict."""
  out = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Output of libraries must not mix with the answers.
  for line in sys.stdin:
    request = json.loads(line)
    found = answer(request.pop('do'), request)
    print(json.dumps(found), file=out, flush=True)


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


def write(
    path: pathlib.Path | None, figures: dict[str, Any], *packages: str
) -> None:
  """Prints and writes figures; what they lack of `about` is added.

  Args:
    path: of the record; None: figures are only printed.
    figures: plain JSON.
    *packages: see `about`.
  """
  record = about(*packages) | figures
  for name, value in record.items():
    if isinstance(value, float):
      print(f'{name:44} {value:.4g}')
    elif not isinstance(value, list):
      print(f'{name:44} {value}')
  if path is not None:
    files.write_json(path, record)


def panels(count: int, height: float = 4.0) -> tuple[Any, list[Any]]:
  """Returns a matplotlib figure and its axes, in one row."""
  from matplotlib import figure as figure_lib

  figure = figure_lib.Figure(
      figsize=(5.0 * count, height), layout='constrained'
  )
  return figure, list(figure.subplots(1, count, squeeze=False)[0])
