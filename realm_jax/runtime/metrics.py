"""Metrics of a job: metrics.jsonl, other loggers, and traces of steps.

All metrics share one flat namespace: `train/loss`, `refresh/age_steps`, ...
"""

import abc
from collections.abc import Mapping, Sequence
import functools
import importlib
import json
import logging
import os
import pathlib
import queue
import threading
import time
from typing import Any, TextIO

import jax

from realm_jax import config as config_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import extension
from realm_jax.runtime import files

log = logging.getLogger(__name__)

# Files that the writer makes in a workdir.
FILES = (
    'metrics.jsonl', 'tensorboard', 'wandb', 'wandb.json', 'mlruns',
    'mlflow.json',
)
PROFILE = 'profile'  # Folder of a workdir, with the trace of some steps.
_CLOSE_SECONDS = 60.0  # For the last lines of a logger to arrive.
_NAME = 'realm_jax'  # Default project of W&B, experiment of MLflow.

Values = Mapping[str, float | int]


class MetricsWriter:
  """Appends to `workdir`/metrics.jsonl, and sends to other loggers.

  Only process 0 writes.
  """

  def __init__(
      self, workdir: pathlib.Path | str, step: int, log_to: Sequence[str] = (),
      about: Mapping[str, Any] | None = None,
  ):
    """Opens the loggers of a job that starts or resumes at `step`.

    Lines of later steps, from a killed run, are dropped. `log_to` is a result
    of `loggers`, which show `about` of the job, such as its config.

    Raises:
      RuntimeError: a logger cannot be used at the start of a job. When a job
        resumes, that is a warning.
    """
    self._file: TextIO | None = None
    self._senders: list[_Sender] = []
    if not distributed.is_main():
      return
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    kept = [line for line in read_metrics(workdir) if line['step'] <= step]
    with files.atomic_file(path) as file:
      file.writelines(json.dumps(line) + '\n' for line in kept)
    self._file = path.open('a', encoding='utf-8')
    for name in log_to:
      try:
        sender = _Sender(name, path.parent, step, about or {})
      except RuntimeError:
        self.close(failed=True)
        raise
      self._senders.append(sender)
      for line in kept:  # Those that an earlier start did not send.
        sender.write(line['step'], line)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Records the values of one step."""
    if self._file is None:
      return
    values = {name: _plain(value) for name, value in values.items()}
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for sender in self._senders:
      sender.write(step, values)

  def close(self, failed: bool = False) -> None:
    """Closes the files; `failed`: the job did not come to its last step."""
    if self._file is not None:
      self._file.close()
    for sender in self._senders:
      sender.close(failed)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, kind: type[BaseException] | None, *exc: Any) -> None:
    self.close(failed=kind is not None)


def loggers(config: config_lib.Config) -> list[str]:
  """Returns the loggers of config.log_to other than metrics.jsonl.

  Raises:
    ImportError: the package of one is not installed; names the command.
  """
  names = [name.strip() for name in config.log_to.split(',')]
  if config.tensorboard:
    names.append('tensorboard')
  names = [name for name in dict.fromkeys(names) if name in _LOGGERS]
  for name in names:
    with extension.needed_by(f'config.log_to={name}', name):
      importlib.import_module(_LOGGERS[name].package)
  return names


class _Logger(abc.ABC):
  """A place for metrics; every method may raise any error.

  package: the module that must be importable.
  continues: whether a later start gets the name of the run, and sends only the
    lines that are new.
  run: its name; None: a new run.
  """

  package: str
  continues: bool = True

  def __init__(
      self, workdir: pathlib.Path, step: int, run: str | None,
      about: Mapping[str, Any],
  ):
    self.workdir, self.step, self.run, self.about = workdir, step, run, about
    self.open()

  @abc.abstractmethod
  def open(self) -> None:
    """Continues the run, or begins one and sets its name."""

  @abc.abstractmethod
  def write(self, step: int, values: Values) -> None: ...

  @abc.abstractmethod
  def close(self, failed: bool) -> None: ...


class _TensorBoard(_Logger):
  """Event files in `workdir`/tensorboard."""

  package = 'tensorboardX'
  continues = False  # Later steps of an earlier start are void.

  def open(self) -> None:
    import tensorboardX

    self._board = tensorboardX.SummaryWriter(
        str(self.workdir / 'tensorboard'), purge_step=self.step + 1
    )
    lines = [f'    {name}: {value}' for name, value in self.about.items()]
    self._board.add_text('job', '\n'.join(lines), self.step)

  def write(self, step: int, values: Values) -> None:
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def close(self, failed: bool) -> None:
    self._board.close()


class _Wandb(_Logger):
  """Weights & Biases; its own environment variables (WANDB_MODE, ...) hold."""

  package = 'wandb'

  def open(self) -> None:
    import wandb

    self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', _NAME),
        name=os.environ.get('WANDB_NAME', self.workdir.name),
        dir=str(self.workdir),
        id=self.run,
        resume='allow' if self.run else None,
        config=dict(self.about),
    )
    self.run = self._run.id

  def write(self, step: int, values: Values) -> None:
    self._run.log(dict(values), step=step)

  def close(self, failed: bool) -> None:
    self._run.finish(exit_code=int(failed))


class _Mlflow(_Logger):
  """MLflow, at MLFLOW_TRACKING_URI, else in `workdir`/mlruns."""

  package = 'mlflow'

  def open(self) -> None:
    import mlflow

    self._entities = mlflow.entities
    where = os.environ.get('MLFLOW_TRACKING_URI')
    if not where:
      # A folder needs no package for databases; MLflow 3 asks for this consent.
      os.environ.setdefault('MLFLOW_ALLOW_FILE_STORE', 'true')
      where = (self.workdir / 'mlruns').absolute().as_uri()
    self._client = mlflow.MlflowClient(where)
    if self.run is not None:
      self._client.update_run(self.run, status='RUNNING')
      return
    name = os.environ.get('MLFLOW_EXPERIMENT_NAME', _NAME)
    found = self._client.get_experiment_by_name(name)
    number = found.experiment_id if found else None
    made = self._client.create_run(
        number or self._client.create_experiment(name),
        run_name=self.workdir.name,
    )
    self.run = made.info.run_id
    params = [
        mlflow.entities.Param(name, str(value)[:500])
        for name, value in self.about.items()
    ]
    for start in range(0, len(params), 100):  # The limit of a request.
      self._client.log_batch(self.run, params=params[start : start + 100])

  def write(self, step: int, values: Values) -> None:
    now = int(time.time() * 1000)
    metric = self._entities.Metric
    found = [metric(name, x, now, step) for name, x in values.items()]
    self._client.log_batch(self.run, metrics=found)

  def close(self, failed: bool) -> None:
    self._client.set_terminated(self.run, 'FAILED' if failed else 'FINISHED')


_LOGGERS: dict[str, type[_Logger]] = {
    'tensorboard': _TensorBoard, 'wandb': _Wandb, 'mlflow': _Mlflow,
}


class _Sender:
  """Sends lines to one logger, in a thread.

  Training neither waits for a logger nor ends with it: an error is a warning,
  and the logger gets no more lines until the next start. `workdir`/NAME.json
  has the run and the last step sent, so that a resumed job continues the run
  and sends each step once.
  """

  def __init__(
      self, name: str, workdir: pathlib.Path, step: int,
      about: Mapping[str, Any],
  ):
    self._name, self._path = name, workdir / f'{name}.json'
    self._failed = False  # The job failed; the logger did not.
    self._logger: _Logger | None = None
    self._lines = queue.SimpleQueue[tuple[int, Values] | None]()
    run, self._sent = None, -1
    # A job at step 0 has nothing in common with an earlier start.
    if step and self._path.exists():
      saved = files.read_json(self._path)
      run, self._sent = saved['run'], saved['sent']
    if not _LOGGERS[name].continues:
      self._sent = step
    self._open = functools.partial(_LOGGERS[name], workdir, step, run, about)
    if not step:
      try:
        self._logger = self._open()
      except Exception as error:  # Each library has errors of its own.
        raise RuntimeError(
            f'config.log_to={name} cannot be used: {_one_line(error)} (Without'
            ' it: --config.log_to=jsonl)'
        ) from error
    self._thread = threading.Thread(target=self._work, daemon=True)
    self._thread.start()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Queues the numbers of a step, unless an earlier start has sent them."""
    if step <= self._sent or not self._thread.is_alive():
      return
    numbers = {
        name: value
        for name, value in values.items()
        # A loss that is not finite is a string.
        if name != 'step' and not isinstance(value, str)
    }
    self._lines.put((step, numbers))

  def close(self, failed: bool) -> None:
    """Waits for the queued lines, for a limited time."""
    self._failed = failed
    self._lines.put(None)
    self._thread.join(_CLOSE_SECONDS)
    if self._thread.is_alive():
      log.warning(
          'config.log_to=%s has not taken all lines after %.0f s; the rest is'
          ' in metrics.jsonl alone.', self._name, _CLOSE_SECONDS,
      )

  def _work(self) -> None:
    try:
      logger = self._logger or self._open()
      self._save(logger)
      while (line := self._lines.get()) is not None:
        logger.write(*line)
        self._sent, _ = line
        self._save(logger)
      logger.close(self._failed)
    except Exception as error:
      log.warning(
          'config.log_to=%s failed after step %d and is left out until the next'
          ' start; metrics.jsonl has all steps. %s',
          self._name, self._sent, _one_line(error),
      )

  def _save(self, logger: _Logger) -> None:
    if logger.continues:
      files.write_json(self._path, {'run': logger.run, 'sent': self._sent})


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
  """Reads metrics.jsonl up to a line that a kill cut short."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  if not path.exists():
    return []
  lines = []
  for text in path.read_text(encoding='utf-8').splitlines():
    try:
      line = json.loads(text)
    except ValueError:
      break
    if not isinstance(line, dict) or not isinstance(line.get('step'), int):
      break
    lines.append(line)
  return lines


def _plain(value: Any) -> float | int | str:
  if isinstance(value, (int, str)):
    return value
  return float(f'{float(value):.6g}')  # Six digits keep the file small.


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())


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

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
    """Plans to trace `steps`, first and last; None: nothing."""
    self._directory = workdir / PROFILE
    self._steps = steps if distributed.is_main() else None
    self._running = False

  def before(self, step: int, *pending: object) -> None:
    """Starts or ends the trace; to be called before each step, from 1 on.

    The trace waits for `pending`, the arrays of the steps before, so that the
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
