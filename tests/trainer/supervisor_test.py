"""The index builder as a child: started again, given up on, never left over."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from realm_jax.trainer import supervise


class _Child(supervise.IndexBuilderProcess):
  """Runs a line of Python in the place of the builder."""

  def __init__(self, workdir, program, backoff_seconds=0.01, **kwargs):
    super().__init__(
        workdir,
        ['--start_timeout=5'],
        backoff_seconds=backoff_seconds,
        **kwargs,
    )
    assert self._command[1:5] == [
        '-m', 'realm_jax', 'index', f'--workdir={workdir}'
    ]
    assert f'--parent_pid={os.getpid()}' in self._command
    assert self._command[-1] == '--start_timeout=5'
    self._command = [sys.executable, '-S', '-c', program]


def _until(condition, seconds=30):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'it did not come about'
    time.sleep(0.01)


_SLEEP = 'import time; time.sleep(100)'
_PUBLISH_AND_DIE = """
import os, sys
os.makedirs('index', exist_ok=True)
os.mkdir(f'index/{len(os.listdir("index"))}')
sys.exit(1)
"""


def test_a_dead_builder_is_started_again(tmp_path):
  with _Child(tmp_path, _SLEEP) as child:
    assert child.pid is None  # Its config is not written yet.
    assert child.health() == 0
    first = child.pid
    assert child.health() == 0
    assert child.pid == first
    os.kill(first, signal.SIGKILL)
    _until(lambda: child.health() and child.pid not in (first, None))
    os.kill(child.pid, 0)
    assert child.health() == 1


def test_three_failures_in_a_row_end_it_with_its_own_words(tmp_path):
  program = """
print('line', 'x' * 10)
print('\\n'.join(str(i) for i in range(100)))
raise SystemExit('ValueError: the corpus is gone')
"""
  backoff = 0.1
  start = time.monotonic()
  with (
      pytest.raises(RuntimeError) as error,
      _Child(tmp_path, program, backoff) as child,
  ):
    _until(lambda: child.health() < 0)  # Until it raises.
  message = str(error.value)
  assert 'ended 3 times' in message and 'exit code 1' in message
  assert message.endswith('ValueError: the corpus is gone')
  assert '\n99\n' in message and '\n70\n' not in message  # The last 20 lines.
  assert (tmp_path / 'index_builder.log').read_text().count('line xxx') == 3
  assert time.monotonic() - start >= backoff * (1 + 2)


def test_failures_with_progress_in_between_do_not_add_up(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with _Child(tmp_path, _PUBLISH_AND_DIE) as child:
    index = tmp_path / 'index'
    _until(lambda: child.health() and len(list(index.glob('*'))) >= 5)


def test_how_many_failures_are_too_many_is_a_setting(tmp_path):
  program = "raise SystemExit('no')"
  with (
      pytest.raises(RuntimeError, match='ended 1 times'),
      _Child(tmp_path, program, max_failures=1) as child,
  ):
    _until(lambda: child.health() < 0)
  with _Child(tmp_path, program, max_failures=0) as child:
    _until(lambda: child.health() >= 4)


def test_left_without_an_error_it_waits_for_the_last_generation(tmp_path):
  (tmp_path / 'retriever' / '8').mkdir(parents=True)
  program = f"""
import os, time
time.sleep(0.5)
os.makedirs({str(tmp_path / 'index' / '8')!r})
time.sleep(100)
"""
  with _Child(tmp_path, program) as child:
    child.health()
    pid = child.pid
  assert (tmp_path / 'index' / '8').exists()
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_left_with_an_error_it_ends_the_builder_at_once(tmp_path):
  (tmp_path / 'retriever' / '8').mkdir(parents=True)
  start = time.monotonic()
  with pytest.raises(KeyError), _Child(tmp_path, _SLEEP) as child:
    child.health()
    pid = child.pid
    raise KeyError
  assert time.monotonic() - start < 5
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_one_that_does_not_listen_is_killed(tmp_path, monkeypatch):
  monkeypatch.setattr(supervise.process, 'GRACE_SECONDS', 0.2)
  program = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open('ready', 'w').close()
time.sleep(100)
"""
  monkeypatch.chdir(tmp_path)
  with _Child(tmp_path, program) as child:
    child.health()
    _until((tmp_path / 'ready').exists)
    pid = child.pid
  with pytest.raises(ProcessLookupError):
    os.kill(pid, 0)


def test_the_builder_does_not_outlive_a_killed_trainer(tmp_path):
  program = f"""
import time
from realm_jax.trainer import supervise
with supervise.IndexBuilderProcess({str(tmp_path)!r}) as child:
  child.health()
  print(child.pid, flush=True)
  time.sleep(100)
"""
  trainer = subprocess.Popen(
      [sys.executable, '-c', program], stdout=subprocess.PIPE, text=True
  )
  try:
    pid = int(trainer.stdout.readline())
    _until((tmp_path / 'index' / 'heartbeat.json').exists, 60)
    assert pathlib.Path(f'/proc/{pid}').exists()
    trainer.kill()
    trainer.wait()
    _until(lambda: _is_gone(pid), 60)
    log = (tmp_path / 'index_builder.log').read_text()
    assert f'process {trainer.pid}, is gone' in log
    assert 'leaves: SIGTERM' in log
  finally:
    trainer.kill()


def _is_gone(pid):
  """A zombie counts as dead: its parent may never reap it."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except FileNotFoundError:
    return True
  return status.rpartition(')')[2].split()[0] == 'Z'
