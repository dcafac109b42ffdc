"""The style and type checks, so that `make test` runs them too."""

import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*command: str) -> None:
  done = subprocess.run(
      [sys.executable, '-m', *command],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
  )
  if done.returncode:
    pytest.fail(
        f'{" ".join(command)} found fault:\n{done.stdout}{done.stderr}',
        pytrace=False,
    )


def test_ruff_check():
  _run('ruff', 'check', '--output-format=concise', '.')


def test_mypy():
  _run('mypy')
