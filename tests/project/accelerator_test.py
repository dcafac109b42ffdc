"""benchmarks/accelerator.py: every stage is recorded, however it ends."""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


def _run(*arguments):
  return subprocess.run(
      [sys.executable, _ROOT / 'benchmarks' / 'accelerator.py', *arguments],
      capture_output=True,
      text=True,
      timeout=300,
  )


@pytest.fixture(scope='module')
def accelerator():
  sys.path.insert(0, str(_ROOT / 'benchmarks'))
  try:
    yield importlib.import_module('accelerator')
  finally:
    sys.path.remove(str(_ROOT / 'benchmarks'))


def test_a_stage_that_fails_or_is_skipped_does_not_stop_the_next(tmp_path):
  bare = tmp_path / 'python'  # Without packages, and so without PyTorch.
  bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
  bare.chmod(0o755)
  output = tmp_path / 'figures.json'
  done = _run(
      '--small',
      '--seconds=200',  # Far more than they need.
      '--stages=realm,torch,peak,search',
      f'--texts={tmp_path / "missing.jsonl"}',
      f'--torch_python={bare}',
      f'--output={output}',
  )
  assert done.returncode == 1, done.stdout + done.stderr
  assert done.stderr.strip() == 'Failed: realm'
  found = json.loads(output.read_text())
  statuses = {
      stage: found[f'{stage}_status']
      for stage in ('realm', 'torch', 'peak', 'search')
  }
  assert statuses == {
      'realm': 'failed', 'torch': 'skipped', 'peak': 'done', 'search': 'done'
  }
  assert 'prepare' in found['realm_error']
  assert 'torch' in found['torch_skipped']
  assert found['platform'] == 'cpu' and found['small']
  for name in ('bfloat16_tflops', 'copy_gigabytes_per_second'):
    assert found[f'peak_{name}'] > 0
  # The share of the peak is of the peak that was measured in the same run.
  assert found['search_exact_mfu'] == pytest.approx(
      found['search_exact_tflops'] / found['peak_bfloat16_tflops'], rel=1e-4
  )
  assert found['search_exact_overlap_with_plain'] == 1
  assert found['search_exact_excluding_right'] is True
  assert found['search_approx_recall'] > 0.9
  assert found['command'] == (
      'python benchmarks/accelerator.py --small --seconds=200'
      ' --stages=realm,torch,peak,search --texts=missing.jsonl'
      ' --torch_python=python --output=figures.json'
  )
  assert 'cpu' in found['hardware'] and 'CPU cores' in found['hardware']
  assert {'python', 'jax', 'flax'} <= found['versions'].keys()
  # Next to the figures lies what the stages said, and nothing else.
  assert 'missing.jsonl' in (tmp_path / 'figures.log').read_text()
  assert {path.name for path in tmp_path.iterdir()} == {
      'python', 'figures.json', 'figures.log'
  }


def test_a_stage_that_takes_too_long_is_cut(accelerator, tmp_path):
  arguments = argparse.Namespace(
      output=tmp_path / 'figures.json',
      seconds=9.0,
      stages=['step', 'peak'],
      texts='',
      torch_python=sys.executable,
      small=True,
  )
  with open(tmp_path / 'log', 'w', encoding='utf-8') as log:
    run = accelerator._Run(arguments, str(tmp_path), log)
    start = time.monotonic()
    run.stage('step', 0.5)
  assert time.monotonic() - start < 20
  found = json.loads(arguments.output.read_text())
  assert found['step_status'] == 'cut' and found['peak_status'] == 'not run'
  assert found['step_limit_seconds'] == 0.5
  assert run.failed == []


def test_the_time_in_all_is_kept(tmp_path, monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')  # All must be compiled.
  output = tmp_path / 'figures.json'
  start = time.monotonic()
  done = _run(
      '--small', '--seconds=10', '--stages=step,ict', f'--output={output}'
  )
  assert time.monotonic() - start < 20  # Minutes, if it were not kept.
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(output.read_text())
  # A stage leaves the next one its share, however much it could use itself.
  assert found['step_status'] == 'cut'
  assert found['step_limit_seconds'] < 10 * 70 / 92


def test_without_a_gpu_toy_sizes_must_be_asked_for(tmp_path):
  done = _run(f'--output={tmp_path / "figures.json"}', '--stages=peak')
  assert done.returncode == 2
  assert 'no GPU here, only a CPU' in done.stderr and '--small' in done.stderr
  assert json.loads((tmp_path / 'figures.json').read_text())[
      'peak_status'
  ] == 'not run'


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--stages=peak,speed', "no stage ['speed']"),
        ('--seconds=0', '--seconds=0.0: must be more than 0'),
        ('--output=.', '--output=.: is a folder'),
    ],
)
def test_wrong_arguments_are_refused(
    accelerator, argument, message, monkeypatch, capsys, tmp_path
):
  words = ['accelerator.py', f'--output={tmp_path / "figures.json"}', argument]
  monkeypatch.setattr(sys, 'argv', words)
  with pytest.raises(SystemExit):
    accelerator.main()
  assert message in capsys.readouterr().err
