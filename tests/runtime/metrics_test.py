"""Metrics of a job: what is written can be read, also by TensorBoard."""

import json
import pathlib
import struct
import sys
import time

import pytest

from realm_jax.runtime import metrics


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
  means = metrics.Means()
  for value in (1.0, 2.0, 6.0):
    means.add({'loss': value, 'twice': 2 * value})
  assert means.take() == {'loss': 3.0, 'twice': 6.0}
  means.add({'loss': 0.1})
  resumed = metrics.Means(json.loads(json.dumps(means.saved())))
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
  writer = metrics.MetricsWriter(tmp_path, 0, tensorboard=True)
  writer.write(3, written)
  writer.write(4, {'train/loss': 2.0})
  writer.close()
  time.sleep(1.1)  # The files are named by the second.
  # Goes on from step 3: what the board has of later steps is void.
  writer = metrics.MetricsWriter(tmp_path, 3, tensorboard=True)
  writer.write(4, {'train/loss': 1.5})
  writer.write(5, {'train/loss': 'nan'})  # JSON has no number for it.
  writer.close()
  events = _events(tmp_path / 'tensorboard')
  found = {
      (event.step, value.tag): value.simple_value
      for event in events
      for value in event.summary.value
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


def test_a_missing_package_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[tensorboard"):
    metrics.MetricsWriter(tmp_path, 0, tensorboard=True)
