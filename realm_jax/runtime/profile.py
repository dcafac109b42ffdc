"""Trace of some training steps by JAX's profiler."""

import logging
import pathlib

import jax

from realm_jax.runtime import distributed

log = logging.getLogger(__name__)

DIRECTORY = 'profile'  # Folder of a workdir.


def parse_steps(text: str) -> tuple[int, int]:
  """Parses '10-15', or '10' for one step.

  Raises:
    ValueError: the text is no range of steps, counted from 1.
  """
  first, dash, last = text.partition('-')
  try:
    steps = int(first), int(last if dash else first)
  except ValueError:
    steps = 0, 0
  if not 1 <= steps[0] <= steps[1]:
    raise ValueError(
        f'--profile={text}: give the steps to trace, as in --profile=10-15 or'
        ' --profile=10.'
    )
  return steps


class StepProfile:
  """Traces a range of steps, numbered as in metrics.jsonl, in process 0."""

  def __init__(
      self, workdir: pathlib.Path | str, steps: tuple[int, int] | None
  ):
    """Plans to trace `steps`, first and last; None: nothing."""
    self._directory = pathlib.Path(workdir) / DIRECTORY
    self._steps = steps if distributed.is_main() else None
    self._running = False

  def before(self, step: int, *pending: object) -> None:
    """Starts or ends the trace; to be called before each step, from 1 on.

    Args:
      step: number of the step.
      pending: arrays to wait for where the trace starts and ends, so that the
        work of the devices is counted to its own step.
    """
    if self._steps is None:
      return
    first, last = self._steps
    if self._running and step > last:
      jax.block_until_ready(pending)
      self.close()
    elif not self._running and first <= step <= last:
      jax.block_until_ready(pending)
      jax.profiler.start_trace(str(self._directory), create_perfetto_trace=True)
      self._running = True

  def close(self) -> None:
    """Ends and writes a running trace."""
    if not self._running:
      return
    self._running, self._steps = False, None
    jax.profiler.stop_trace()
    traces = sorted(self._directory.rglob('perfetto_trace.json.gz'))
    log.info(
        'A trace of the steps is written. Open %s at https://ui.perfetto.dev,'
        ' or `pip install xprof` and `xprof --logdir=%s`.',
        traces[-1] if traces else self._directory,
        self._directory,
    )
