"""Metrics of a job: JSON lines as the record of truth, TensorBoard beside it.

Public: `MetricsWriter`, `Means`, `Clock`, `read_metrics`. One flat namespace,
`train/loss`, `refresh/age_steps`, ...; a line is one step.
"""

from collections.abc import Iterator
import contextlib
import json
import os
import pathlib
import time
from typing import Any, TextIO

import jax

from realm_jax.runtime import distributed


class MetricsWriter:
  """Appends to `workdir`/metrics.jsonl, and to tensorboard/ if asked to.

  In process 0 of a job; in the others it does nothing.
  """

  def __init__(
      self, workdir: pathlib.Path | str, step: int, tensorboard: bool = False
  ):
    """Opens the files of a job that starts, or goes on, at `step`.

    Lines of steps after `step` are of a run that was killed; they are dropped,
    for they will be written again.
    """
    self._file: TextIO | None = None
    self._board: Any = None
    if not distributed.is_main():
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    kept = [line for line in read_metrics(workdir) if line['step'] <= step]
    temporary = path.with_name('.metrics.jsonl')
    with temporary.open('w', encoding='utf-8') as file:
      file.writelines(json.dumps(line) + '\n' for line in kept)
    os.replace(temporary, path)
    self._file = path.open('a', encoding='utf-8')
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
    if self._file is None:
      return
    values = {name: _plain(value) for name, value in values.items()}
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    if self._board is not None:
      for name, value in values.items():
        if not isinstance(value, str):
          self._board.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
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


class Means:
  """Means over the steps since they were last taken.

  One step says little, and nothing where steps take turns in what they learn
  from, as in the warm-up: every tenth may be of the rarer kind.
  """

  def __init__(self, saved: dict[str, Any] | None = None):
    """Goes on from what `saved` returned."""
    saved = saved or {'steps': 0, 'sums': {}}
    self._steps: int = saved['steps']
    self._sums: dict[str, float] = dict(saved['sums'])

  def add(self, values: dict[str, float]) -> None:
    """Counts one step in."""
    self._steps += 1
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + value

  def take(self) -> dict[str, float]:
    """Returns the means, and begins anew."""
    means = {name: value / self._steps for name, value in self._sums.items()}
    self._steps, self._sums = 0, {}
    return means

  def saved(self) -> dict[str, Any]:
    """What a resumed job needs for the same means; plain JSON."""
    return {'steps': self._steps, 'sums': dict(self._sums)}


class Clock:
  """Splits the wall time of a loop into named parts, all of it.

  What no part claims is 'other'. A part inside another interrupts it, so that
  the parts always add up to the time that has passed. They are named in
  profiles too.
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}
    self._part, self._since = 'other', time.perf_counter()

  @contextlib.contextmanager
  def measure(self, part: str) -> Iterator[None]:
    outer = self._part
    self._turn_to(part)
    try:
      with jax.profiler.TraceAnnotation(part):
        yield
    finally:
      self._turn_to(outer)

  def take(self) -> dict[str, float]:
    """Seconds of each part since the last call."""
    self._turn_to(self._part)
    seconds, self._seconds = self._seconds, {}
    return seconds

  def _turn_to(self, part: str) -> None:
    now = time.perf_counter()
    taken = now - self._since
    self._seconds[self._part] = self._seconds.get(self._part, 0.0) + taken
    self._part, self._since = part, now


def _plain(value: Any) -> float | int | str:
  if isinstance(value, (int, str)):
    return value
  # Six digits are what anyone reads, and keep the file small.
  return float(f'{float(value):.6g}')
