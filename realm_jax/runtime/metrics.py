"""Metrics of a job: JSON lines as the record of truth, TensorBoard beside it.

Public: `MetricsWriter`, `Clock`, `read_metrics`. One flat namespace,
`train/loss`, `refresh/age_steps`, ...; a line is one step.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import time
from typing import Any


class MetricsWriter:
  """Appends to `workdir`/metrics.jsonl, and to tensorboard/ if asked to."""

  def __init__(
      self, workdir: pathlib.Path | str, step: int, tensorboard: bool = False
  ):
    """Opens the files of a job that starts, or goes on, at `step`.

    Lines of steps after `step` are of a run that was killed; they are dropped,
    for they will be written again.
    """
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    kept = [line for line in read_metrics(workdir) if line['step'] <= step]
    temporary = self._path.with_name('.metrics.jsonl')
    with temporary.open('w', encoding='utf-8') as file:
      file.writelines(json.dumps(line) + '\n' for line in kept)
    os.replace(temporary, self._path)
    self._file = self._path.open('a', encoding='utf-8')
    self._board: Any = None
    if tensorboard:
      try:
        from tensorboardX import SummaryWriter
      except ImportError as error:
        raise ImportError(
            'config.tensorboard needs a package that is not installed:'
            " pip install 'realm-jax[tensorboard]'"
        ) from error
      self._board = SummaryWriter(
          str(pathlib.Path(workdir) / 'tensorboard'), purge_step=step + 1
      )

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Records the values of one step."""
    values = {name: _plain(value) for name, value in values.items()}
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    self._file.close()
    if self._board is not None:
      self._board.close()


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
  """Reads metrics.jsonl; a last line cut short by a kill is left out."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(encoding='utf-8').splitlines():
    try:
      lines.append(json.loads(text))
    except ValueError:
      break
  return lines


class Clock:
  """Splits the wall time of a loop into named parts."""

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def measure(self, part: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
      yield
    finally:
      taken = time.perf_counter() - start
      self._seconds[part] = self._seconds.get(part, 0.0) + taken

  def take(self) -> dict[str, float]:
    """Seconds of each part since the last call."""
    seconds, self._seconds = self._seconds, {}
    return seconds


def _plain(value: Any) -> float | int | str:
  if isinstance(value, (int, str)):
    return value
  # Six digits are what anyone reads, and keep the file small.
  return float(f'{float(value):.6g}')
