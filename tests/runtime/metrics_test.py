"""Metrics of a job: what is written can be read, and reaches each logger."""

import json
import pathlib
import struct
import sys
import threading
import time
import types

import pytest

from realm_jax import config as config_lib
from realm_jax.runtime import metrics
from realm_jax.trainer import step_log


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  for step in range(1, 6):
    writer.write(step, {'train/loss': step / 3})
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 6, "train/lo')  # Killed while it wrote.
  assert len(metrics.read_metrics(tmp_path)) == 5
  writer = metrics.MetricsWriter(tmp_path, 3)
  writer.write(4, {'train/loss': 0.5})
  writer.close()
  lines = metrics.read_metrics(tmp_path)
  assert [line['step'] for line in lines] == [1, 2, 3, 4]
  assert lines[-1]['train/loss'] == 0.5


def test_means_are_over_the_steps_since_they_were_taken():
  means = step_log.Means()
  for value in (1.0, 2.0, 6.0):
    means.add({'loss': value, 'twice': 2 * value})
  assert means.take() == {'loss': 3.0, 'twice': 6.0}
  means.add({'loss': 0.1})
  resumed = step_log.Means(json.loads(json.dumps(means.saved())))
  for each in (means, resumed):
    each.add({'loss': 0.2})
  assert means.take() == resumed.take() == {'loss': (0.1 + 0.2) / 2}


def test_tensorboard_gets_the_same_numbers(tmp_path):
  pytest.importorskip(
      'tensorboardX', reason="pip install 'realm_jax[tensorboard]'"
  )
  written = {
      'train/loss': 2.5,
      'refresh/age_steps': 7.0,
      'refresh/probe_overlap': 0.75,
  }
  writer = metrics.MetricsWriter(tmp_path, 0, ['tensorboard'])
  writer.write(3, written)
  writer.write(4, {'train/loss': 2.0})
  writer.close()
  time.sleep(1.1)  # The files are named by the second.
  # Continues from step 3: what the board has of later steps is void.
  writer = metrics.MetricsWriter(tmp_path, 3, ['tensorboard'])
  writer.write(4, {'train/loss': 1.5})
  writer.write(5, {'train/loss': 'nan'})  # JSON has no number for it.
  writer.close()
  events = _events(tmp_path / 'tensorboard')
  found = {
      (event.step, value.tag): value.simple_value
      for event in events
      for value in event.summary.value
      if value.HasField('simple_value')
  }
  assert found == {
      **{(3, name): value for name, value in written.items()},
      (4, 'train/loss'): 1.5,
  }
  starts = [event.session_log.status for event in events]
  assert any(status == 1 and event.step == 4  # START, which purges.
             for status, event in zip(starts, events, strict=True))


def _events(folder: pathlib.Path):
  """Reads the files in order: records of length, two checksums, message."""
  from tensorboardX.proto import event_pb2

  events = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack('<Q', data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
      data = data[16 + size :]
  return events


@pytest.mark.parametrize('field', ['log_to', 'tensorboard'])
def test_a_missing_package_is_named(monkeypatch, field):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  config = config_lib.Config()
  setattr(config, field, {'log_to': 'jsonl,tensorboard'}.get(field, True))
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[tensorboard"):
    metrics.loggers(config)


def test_loggers_are_named_once_and_without_jsonl(service):
  config = config_lib.Config(log_to=f'{service.name}, jsonl,{service.name}')
  assert metrics.loggers(config) == [service.name]
  assert metrics.loggers(config_lib.Config()) == []


class _Service:
  """Stands in for the module `wandb`, and records what arrives."""

  name = 'wandb'

  def __init__(self):
    self.points, self.runs, self.closed, self.down = [], [], [], False
    self.opened = []  # Whether each opening continued a run.

  def module(self):
    def init(*, project, name, dir, id, resume, config):
      self._check()
      assert pathlib.Path(dir).is_dir() and project and name
      assert resume == ('allow' if id else None)
      self.opened.append(bool(id))
      self.runs.append(id or f'run{len(self.runs)}')
      self.about = config
      run = types.SimpleNamespace(id=self.runs[-1], log=self._log)
      run.finish = lambda exit_code: self.closed.append(exit_code)
      return run

    return types.SimpleNamespace(init=init)

  def _check(self):
    if self.down:
      raise ConnectionError('no\nroute')

  def _log(self, values, step):
    self._check()
    self.points += [(self.runs[-1], step, n, x) for n, x in values.items()]


class _Mlflow(_Service):
  """Stands in for `mlflow`: at most 100 parameters a request, 500 letters."""

  name = 'mlflow'

  def module(self):
    entities = types.SimpleNamespace(
        Param=lambda key, value: (key, value),
        Metric=lambda key, value, timestamp, step: (step, key, value),
    )
    return types.SimpleNamespace(
        entities=entities, MlflowClient=lambda uri: self._at(uri)
    )

  def _at(self, uri):
    assert uri.startswith('file:///') and uri.endswith('/mlruns')
    self._check()
    return self

  def get_experiment_by_name(self, name):
    return types.SimpleNamespace(experiment_id=name) if self.runs else None

  def create_experiment(self, name):
    assert not self.runs
    return name

  def create_run(self, experiment, run_name):
    assert experiment == 'realm_jax' and run_name
    self.opened.append(False)
    self.runs.append(f'run{len(self.runs)}')
    self.about = {}
    info = types.SimpleNamespace(run_id=self.runs[-1])
    return types.SimpleNamespace(info=info)

  def update_run(self, run, status):
    assert status == 'RUNNING'
    self.opened.append(True)
    self.runs.append(run)

  def log_batch(self, run, metrics=(), params=()):
    self._check()
    assert len(params) <= 100 and all(len(v) <= 500 for _, v in params)
    self.about |= dict(params)
    self.points += [(run, *metric) for metric in metrics]

  def set_terminated(self, run, status):
    self.closed.append(['FINISHED', 'FAILED'].index(status))


@pytest.fixture(params=[_Service, _Mlflow], ids=['wandb', 'mlflow'])
def service(request, monkeypatch):
  made = request.param()
  monkeypatch.setitem(sys.modules, made.name, made.module())
  for name in ('WANDB_PROJECT', 'WANDB_NAME', 'MLFLOW_TRACKING_URI',
               'MLFLOW_EXPERIMENT_NAME'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', '')
  return made


def _run(service, workdir, start, steps, about=None):
  with metrics.MetricsWriter(
      workdir, start, [service.name], about
  ) as writer:
    for step in range(start + 1, steps + 1):
      writer.write(step, {'train/loss': step / 4, 'refresh/age_steps': 3})


def _steps(service, run):
  found = [(r, s) for r, s, name, _ in service.points if name == 'train/loss']
  return [step for one, step in found if one == run]


def test_a_logger_gets_names_numbers_and_the_job(tmp_path, service):
  about = {f'field.{i}': 'x' * 600 for i in range(130)}
  about['corpus_fingerprint'] = 'abc'
  with metrics.MetricsWriter(tmp_path, 0, [service.name], about) as writer:
    writer.write(1, {'train/loss': 2.5, 'gates/step': 3})
    writer.write(2, {'train/loss': 'nan'})  # No number.
  assert service.points == [
      ('run0', 1, 'train/loss', 2.5), ('run0', 1, 'gates/step', 3)
  ]
  assert service.about['corpus_fingerprint'] == 'abc'
  assert set(service.about) == set(about)
  assert service.closed == [0]


def test_a_resumed_job_continues_its_run_without_duplicates(tmp_path, service):
  _run(service, tmp_path, 0, 5)
  _run(service, tmp_path, 2, 4)  # Ends before the first did.
  _run(service, tmp_path, 3, 7)
  assert service.opened == [False, True, True]
  assert _steps(service, 'run0') == [1, 2, 3, 4, 5, 6, 7]
  steps = [line['step'] for line in metrics.read_metrics(tmp_path)]
  assert steps == [1, 2, 3, 4, 5, 6, 7]
  # Without a checkpoint the job starts again; so does the run.
  _run(service, tmp_path, 0, 2)
  assert service.opened[-1] is False
  assert _steps(service, service.runs[-1]) == [1, 2]


def test_a_logger_that_is_added_later_gets_the_steps_before(tmp_path, service):
  with metrics.MetricsWriter(tmp_path, 0) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'train/loss': step})
  _run(service, tmp_path, 2, 4)
  assert _steps(service, 'run0') == [1, 2, 3, 4]


def test_a_failure_is_one_warning_and_is_made_up_for(
    tmp_path, service, caplog
):
  with pytest.raises(ValueError), metrics.MetricsWriter(
      tmp_path, 0, [service.name]
  ) as writer:
    writer.write(1, {'train/loss': 1.0})
    while not service.points:
      time.sleep(0.001)
    service.down = True
    for step in (2, 3):
      writer.write(step, {'train/loss': 1.0})
    raise ValueError('of the job')
  (record,) = caplog.records
  text = record.getMessage()
  assert f'config.log_to={service.name} failed after step 1' in text
  assert 'ConnectionError: no route' in text
  assert len(metrics.read_metrics(tmp_path)) == 3
  _run(service, tmp_path, 3, 4)  # It is still down.
  assert len(caplog.records) == 2 and len(service.points) == 1
  service.down = False
  _run(service, tmp_path, 4, 5)
  assert _steps(service, 'run0') == [1, 2, 3, 4, 5]
  assert service.closed == [0]


def test_a_job_that_fails_closes_its_run_as_failed(tmp_path, service):
  with pytest.raises(ValueError), metrics.MetricsWriter(
      tmp_path, 0, [service.name]
  ):
    raise ValueError
  assert service.closed == [1]


def test_a_logger_that_does_not_open_ends_a_new_job(tmp_path, service):
  service.down = True
  with pytest.raises(RuntimeError, match=f'log_to={service.name} cannot be'):
    _run(service, tmp_path, 0, 1)


def test_training_does_not_wait_for_a_logger(tmp_path, service, monkeypatch):
  hangs = threading.Event()
  monkeypatch.setattr(service, '_check', lambda: None)
  with metrics.MetricsWriter(tmp_path, 0, [service.name]) as writer:
    monkeypatch.setattr(service, '_check', hangs.wait)
    monkeypatch.setattr(metrics, '_CLOSE_SECONDS', 0.01)
    writer.write(1, {'train/loss': 1.0})
  assert len(metrics.read_metrics(tmp_path)) == 1
  hangs.set()


def test_only_process_0_writes(tmp_path, service, monkeypatch):
  monkeypatch.setattr(metrics.distributed, 'is_main', lambda: False)
  _run(service, tmp_path, 0, 2)
  assert not service.runs and not list(tmp_path.iterdir())


def test_wandb_itself_keeps_one_run_offline(tmp_path, monkeypatch):
  pytest.importorskip('wandb', reason="pip install 'realm_jax[wandb]'")
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_SILENT', 'true')
  for start in (0, 2):
    with metrics.MetricsWriter(tmp_path, start, ['wandb'], {'a': 1}) as writer:
      writer.write(start + 1, {'train/loss': 1.0})
  run = json.loads((tmp_path / 'wandb.json').read_text())
  assert run['sent'] == 3
  made = list((tmp_path / 'wandb').glob(f'offline-run-*-{run["run"]}'))
  assert len(made) in (1, 2)  # Folders are named by the second.


def test_mlflow_itself_keeps_one_run_in_a_folder(tmp_path, monkeypatch):
  mlflow = pytest.importorskip(
      'mlflow', reason="pip install 'realm_jax[mlflow]'"
  )
  monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
  monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')
  for start in (0, 2):
    with metrics.MetricsWriter(tmp_path, start, ['mlflow'], {'a': 1}) as writer:
      writer.write(start + 1, {'train/loss': 1.0})
  run = json.loads((tmp_path / 'mlflow.json').read_text())['run']
  client = mlflow.MlflowClient((tmp_path / 'mlruns').as_uri())
  history = client.get_metric_history(run, 'train/loss')
  assert sorted(metric.step for metric in history) == [1, 3]
  assert client.get_run(run).data.params == {'a': '1'}
