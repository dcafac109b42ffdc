"""Runs commands of `realm-jax`, and keeps them for the record.

Public: `Commands`.
"""

import shlex
import subprocess
import sys


class Commands:
  """`commands('train', ...)` runs it; `commands.done` lists what was run."""

  def __init__(self) -> None:
    self.done: list[str] = []

  def __call__(self, *words: str) -> None:
    self.done.append(shlex.join(['realm-jax', *words]))
    print(f'$ {self.done[-1]}', flush=True)
    subprocess.run([sys.executable, '-m', 'realm_jax', *words], check=True)
