"""A trainer and its builder, each killed once: the result is the same."""

import json
import pathlib
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]


def test_killed_processes_change_nothing(tmp_path):
  """Short; benchmarks/results/chaos.json is of 50 and 20 kills."""
  output = tmp_path / 'chaos.json'
  done = subprocess.run(
      [
          sys.executable, _ROOT / 'benchmarks' / 'chaos.py',
          f'--output={output}', f'--scratch={tmp_path / "scratch"}',
          # Past the step 60, so that the generation of 50 is waited for.
          '--builder_kills=1', '--trainer_kills=1', '--steps=65',
      ],
      capture_output=True,
      text=True,
      timeout=600,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  found = json.loads(output.read_text())
  assert found['ok'] and found['all_kills_done']
  assert found['builder_kills'] == found['trainer_kills'] == 1
  assert found['adoptions'] >= 3
  assert found['generations'] == 4  # 0, 25, 50 and the last step's.
