"""What all benchmarks record: commands of `realm-jax`, machine, versions.

Public: `Commands`, `about`.
"""

from collections.abc import Collection
from importlib import metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

_HUGE_PAGES = 'glibc.malloc.hugetlb=1'  # As in the Makefile.


class Commands:
  """`commands('train', ...)` runs it; `commands.done` lists what was run."""

  def __init__(self) -> None:
    self.done: list[str] = []

  def __call__(
      self,
      *words: str,
      log: pathlib.Path | None = None,
      cores: Collection[int] = (),
  ) -> None:
    """Runs a command, and waits for it.

    Args:
      *words: of the command, after `realm-jax`.
      log: file that its output is appended to; None: it is shown.
      cores: that it may use; none: all.

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


def about(*packages: str) -> dict[str, Any]:
  """Returns the figures that say how all others were made.

  Args:
    *packages: whose versions matter, by their names on PyPI.
  """
  return {
      'command': shlex.join(['python', *sys.argv]),
      'hardware': f'{os.cpu_count()} CPU cores, {platform.machine()}',
      'versions': {
          'python': platform.python_version(),
          **{package: metadata.version(package) for package in packages},
      },
  }
