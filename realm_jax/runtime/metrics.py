"""Metrics of a job: metrics.jsonl, one line a step, and TensorBoard.

All metrics share one flat namespace: `train/loss`, `refresh/age_steps`, ...
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import time
from typing import Any, TextIO

import jax

from realm_jax.runtime import distributed
from realm_jax.runtime import files


class MetricsWriter:
  """Appends to `workdir`/metrics.jsonl and, optionally, to tensorboard/.

  Only process 0 writes.
  """

  def __init__(
      self, workdir: pathlib.Path | str, step: int, tensorboard: bool = False
  ):
    """Opens the files of a job that starts or resumes at `step`.

    Lines of later steps, from a killed run, are dropped.
    """
    self._file: TextIO | None = None
    self._board: Any = None
    if not distributed.is_main():
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    kept = [line for line in read_metrics(workdir) if line['step'] <= step]
    with files.atomic_file(path) as file:
      file.writelines(json.dumps(line) + '\n' for line in kept)
    self._file = path.open('a', encoding='utf-8')
    if tensorboard:
      try:
        from tensorboardX import SummaryWriter
      except ImportError as error:
        raise ImportError(
            'config.tensorboard needs a package that is not installed:'
            " pip install 'realm_jax[tensorboard]'"
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
  """Reads metrics.jsonl up to a line that a kill cut short."""
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
  """Means over the steps since the last `take`.

  Values of single steps are noisy. During `mlm`, consecutive batches even come
  from different streams.
  """

  def __init__(self, saved: dict[str, Any] | None = None):
    """Starts, or resumes from the result of `saved`."""
    saved = saved or {'steps': 0, 'sums': {}}
    self._steps: int = saved['steps']
    self._sums: dict[str, float] = dict(saved['sums'])

  def add(self, values: dict[str, float]) -> None:
    """Adds the values of one step."""
    self._steps += 1
    for name, value in values.items():
      self._sums[name] = self._sums.get(name, 0.0) + value

  def take(self) -> dict[str, float]:
    """Returns the means and starts again."""
    means = {name: value / self._steps for name, value in self._sums.items()}
    self._steps, self._sums = 0, {}
    return means

  def saved(self) -> dict[str, Any]:
    """Returns the state for a checkpoint (JSON)."""
    return {'steps': self._steps, 'sums': dict(self._sums)}


class Clock:
  """Splits the wall time of a loop into named parts, which profiles show.

  The rest is 'other'. A part inside another one interrupts it, so the parts add
  up to the whole time.
  """

  def __init__(self) -> None:
    self._seconds: dict[str, float] = {}
    self._part, self._since = 'other', time.perf_counter()

  @contextlib.contextmanager
  def measure(self, part: str) -> Iterator[None]:
    """Counts the time inside to a part."""
    outer = self._part
    self._switch_to(part)
    try:
      with jax.profiler.TraceAnnotation(part):
        yield
    finally:
      self._switch_to(outer)

  def take(self) -> dict[str, float]:
    """Returns the seconds of each part since the last call."""
    self._switch_to(self._part)
    seconds, self._seconds = self._seconds, {}
    return seconds

  def _switch_to(self, part: str) -> None:
    now = time.perf_counter()
    self._seconds[self._part] = (
        self._seconds.get(self._part, 0.0) + now - self._since
    )
    self._part, self._since = part, now


def _plain(value: Any) -> float | int | str:
  if isinstance(value, (int, str)):
    return value
  return float(f'{float(value):.6g}')  # Six digits keep the file small.
