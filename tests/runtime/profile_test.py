"""Where the time of a step goes: the split, the utilisation, the trace."""

import gzip
import json
import time

import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.models import flops
from realm_jax.runtime import metrics
from realm_jax.trainer import loop
from realm_jax.trainer import stages
from realm_jax.trainer import step_log


def test_parts_add_up_to_the_time_that_passed(monkeypatch):
  now = 5.0
  monkeypatch.setattr(time, 'perf_counter', lambda: now)
  clock = step_log.Clock()
  with clock.measure('compute'):
    now += 2
    with clock.measure('checkpoint'):
      now += 3
    now += 0.5
    first = clock.take()  # While a part is being measured.
    now += 0.25
  now += 1
  second = clock.take()
  # Each without what its inner part took.
  assert {n: s for n, s in first.items() if s} == {
      'compute': 2.5, 'checkpoint': 3.0
  }
  assert {n: s for n, s in second.items() if s} == {
      'compute': 0.25, 'other': 1.0
  }


@pytest.mark.parametrize('text', ['', 'x', '0-3', '5-4', '3-', '-2', '1-2-3'])
def test_wrong_steps_are_refused(text):
  with pytest.raises(ValueError, match='--profile=10-15'):
    metrics.parse_steps(text)


def test_a_job_splits_its_time_and_traces_the_steps_asked_for(
    world, tmp_path
):
  assert metrics.parse_steps('3-4') == (3, 4)
  config = training_test.make_config(
      world, 'ict', steps=6, log_interval=2, peak_tflops=0.5
  )
  started = time.time()
  loop.train(config, tmp_path, profile=(3, 4))
  lines = metrics.read_metrics(tmp_path)
  assert [line['step'] for line in lines] == [2, 4, 6]
  for line in lines:
    wall = 2 * config.batch_size / line['time/examples_per_second']
    parts = {
        name: value
        for name, value in line.items()
        if name.startswith('time/') and name.endswith('_seconds')
    }
    assert sum(parts.values()) == pytest.approx(wall, rel=0.02, abs=2e-3)
    assert {'time/data_seconds', 'time/compute_seconds'} <= {*parts}
    resolved = config_lib.read(tmp_path)
    passes = stages.load(resolved)(resolved).passes()
    flop = flops.model_flop(resolved, passes) * 2 / wall
    assert line['time/model_tflops'] == pytest.approx(flop / 1e12, rel=1e-3)
    # From eight devices.
    assert line['time/mfu'] == pytest.approx(flop / 4e12, rel=1e-3)
  (trace,) = tmp_path.glob('profile/plugins/profile/*/perfetto_trace.json.gz')
  assert trace.stat().st_mtime >= started - 1
  with gzip.open(trace) as file:
    events = json.load(file)['traceEvents']
  names = [event.get('name') for event in events]
  assert names.count('data') == 2  # One in each step.
