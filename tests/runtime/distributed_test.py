"""Jobs of several processes: real ones, on CPU, that find each other by TCP.

One long run covers most of it: a trainer of 2 processes x 4 devices with an
index builder of 2 processes. One of the four receives SIGTERM, and 1 process x
8 devices resumes the job. The result equals that of 1 process x 8 devices.
"""

import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process as process_lib
from realm_jax.trainer import loop
from realm_jax.trainer import stages
from realm_jax.trainer.stages import realm

_ROOT = pathlib.Path(__file__).parents[2]
_STOPPED = 143  # See cli/actions.py.

# Notes what a step reads, gathered from all devices, and who writes a shard;
# stops at a given step.
_DRIVER = """
import os, signal, sys
import distributed_test
from realm_jax import main
from realm_jax.builder import builder
from realm_jax.index import generation
from realm_jax.trainer import loop

builder._SHARD_ROWS = {'cpu': 16}
distributed_test.note_batches(os.environ['NOTES'])
original = loop._Loop._refresh

def refresh(self, step):
  if step == int(os.environ['STOP_AT']):
    os.kill(os.getpid(), signal.SIGTERM)
  original(self, step)

loop._Loop._refresh = refresh
add = generation.Writer.add

def noted_add(self, emb_NE, number):
  print(f'wrote shard {number}', file=sys.stderr)
  add(self, emb_NE, number)

generation.Writer.add = noted_add
main.run()
"""


def get_config():
  """The long run; also called by the processes, as an experiment file."""
  return training_test.make_config(
      pathlib.Path('set by the test'), 'realm',
      refresh__policy='scheduled', optimizer__learning_rate=1e-3,
      checkpoint__interval=4, checkpoint__keep=0,
  )


def note_batches(path):
  """Has a digest of each batch, whole and in order, appended to a file."""
  original = mesh_lib.to_devices

  def to_devices(mesh, batch):
    arrays = original(mesh, batch)
    if isinstance(arrays, realm.Batch):
      # The masked sentences and their passages, in the order of retrieval.
      joint = distributed.fetch(arrays.joint_ids_BKT)
      if distributed.is_main():
        with open(path, 'a', encoding='utf-8') as file:
          file.write(hashlib.sha256(joint.tobytes()).hexdigest() + '\n')
    return arrays

  mesh_lib.to_devices = to_devices


def _port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def _start(count, devices, *arguments, code=None, each=(), **environment):
  """Starts the processes of a job; `each` has further flags of one of them."""
  port = _port()
  program = ['-c', code] if code else ['-m', 'realm_jax']
  started = []
  for process in range(count):
    command = [sys.executable, *program, *map(str, arguments)]
    command += [
        f'--coordinator=127.0.0.1:{port}', f'--num_processes={count}',
        f'--process_id={process}', *(each[process] if each else ()),
    ]
    started.append(
        subprocess.Popen(
            command,
            cwd=_ROOT,
            env={
                **os.environ,
                'JAX_NUM_CPU_DEVICES': str(devices),
                'PYTHONPATH': os.pathsep.join(sys.path),
                **{name: value[process] for name, value in environment.items()},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
  return started


def _ends(processes, timeout=240):
  """Returns exit codes and what was written to stderr."""
  try:
    found = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [p.returncode for p in processes], [stderr for _, stderr in found]


def _train_here(config, workdir):
  """Trains on the 8 devices of this process, which also builds the index."""

  def build_what_is_missing():
    steps = checkpoint.snapshot_steps(workdir)
    if steps and not (workdir / 'index' / str(steps[-1])).exists():
      builder.build(workdir)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, 'to_devices', mesh_lib.to_devices)
    note_batches(workdir.with_suffix('.notes'))
    return loop.train(config, workdir, health=build_what_is_missing)


def _params(workdir, step):
  abstract = {
      name: component.abstract
      for name, component in stages.components_of(
          config_lib.read(workdir)
      ).items()
  }
  params, _ = checkpoint.load_params(workdir, abstract, step)
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def _difference(workdir, other, step):
  ours, theirs = _params(workdir, step), _params(other, step)
  return np.linalg.norm(ours - theirs) / np.linalg.norm(ours)


def test_two_processes_stopped_and_resumed_by_one_are_the_run_of_one(
    world, tmp_path
):
  config = get_config()
  config.corpus = str(world)
  one, two = tmp_path / 'one', tmp_path / 'two'
  jobs = _start(
      2, 4, 'train', f'--config={__file__}', f'--workdir={two}',
      f'--config.corpus={world}', code=_DRIVER,
      NOTES=[f'{two}.notes'] * 2, STOP_AT=['-1', '7'],
  )
  builders = _start(
      2, 1, 'index', '--follow', f'--workdir={two}',
      code=_DRIVER,
      NOTES=[''] * 2, STOP_AT=['-1'] * 2,
  )
  try:
    expected = _train_here(config, one)
    codes, errors = _ends(jobs)
    assert codes == [_STOPPED] * 2, '\n'.join(errors)
    for error in errors:
      # One was told at step 7, all agreed upon it one later.
      assert 'step 8 is saved' in error
    # Process 0 alone writes; both searched the generation due at step 6.
    lines = metrics_lib.read_metrics(two)
    assert [line['step'] for line in lines] == list(range(1, 9))
    assert [line['refresh/generation'] for line in lines] == [0] * 6 + [4] * 2
    assert checkpoint.saved_about(two, 8)['layout'] == (
        '2 process(es) x 4 device(s) (data 8, model 1)'
    )
    assert _difference(one, two, step=8) < 1e-5
    # The builders still run for the trainer that resumes.
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(builder, 'build', lambda _: None)
      summary = _train_here(config, two)
    codes, errors = _ends(builders)
    assert codes == [0, 0], '\n'.join(errors)
  finally:
    for process in jobs + builders:
      process.kill()
  assert summary['index_generation'] == expected['index_generation'] == 8
  assert _difference(one, two, step=config.steps) < 1e-5
  # The same data in the same order, bit for bit, retrieved passages included.
  notes = [path.with_suffix('.notes').read_text() for path in (one, two)]
  assert notes[0] == notes[1]
  assert len(notes[0].splitlines()) == config.steps
  # Both builders did their share.
  wrote = [set(re.findall(r'wrote shard (\d+)', error)) for error in errors]
  assert all(wrote) and not wrote[0] & wrote[1]


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.seed=1', 'config.seed is 1 in process 1 on {host}'),
        ('--config.corpus=/no/where', 'There is no corpus /no/where'),
    ],
)
def test_processes_that_differ_are_refused(flag, message, world, tmp_path):
  codes, errors = _ends(
      _start(
          2, 1, 'train', f'--config={__file__}', f'--workdir={tmp_path}/job',
          each=[[f'--config.corpus={world}'],
                [f'--config.corpus={world}', flag]],
      ),
      timeout=90,
  )
  assert codes == [1, 1]
  for error in errors:
    assert message.format(host=socket.gethostname()) in error
    assert 'Traceback' not in error
  assert not (tmp_path / 'job').exists()


def test_another_corpus_is_refused_and_the_host_named(monkeypatch):
  found = [
      ['hostA', {'corpus_fingerprint': 'abc', 'tokenizer_digest': 'd'}],
      ['hostB', {'corpus_fingerprint': 'xyz', 'tokenizer_digest': 'd'}],
  ]
  monkeypatch.setattr(distributed, 'gather', lambda value, what: found)
  with pytest.raises(
      ValueError,
      match="corpus.corpus_fingerprint is 'xyz' in process 1 on hostB, "
      "'abc' in process 0 on hostA",
  ) as error:
    distributed.same('corpus', found[0][1])
  assert 'tokenizer' not in str(error.value)


def test_a_coordinator_that_is_not_there_is_named_in_time(tmp_path):
  port = _port()
  done = subprocess.run(
      [sys.executable, '-m', 'realm_jax', 'index', f'--workdir={tmp_path}',
       f'--coordinator=127.0.0.1:{port}', '--num_processes=2',
       '--process_id=1', '--coordinator_timeout=2'],
      cwd=_ROOT, capture_output=True, text=True, timeout=30,
  )
  assert done.returncode == 1
  assert f'127.0.0.1:{port} could not be reached within 2 s' in done.stderr


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((None, 2, 0), 'need --coordinator'),
        (('host:1', None, None), 'needs --num_processes and --process_id'),
        (('host', 2, 0), 'must be HOST:PORT'),
        (('host:99999', 2, 0), 'must be HOST:PORT'),
        (('host:1', 2, 2), 'between 0 and --num_processes - 1 = 1'),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*arguments)


class _Leaving:
  """A coordination service; the other process leaves after the nth listing."""

  def __init__(self, listings):
    self._listings = listings

  def key_value_dir_get(self, folder):
    there = [(f'{folder}1', 'ours')]
    self._listings -= 1
    if self._listings < 0:  # Its value first, then the end.
      there.append((f'{folder}0', 'theirs'))
    return there

  def blocking_key_value_get(self, key, milliseconds):
    del key, milliseconds
    raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')


@pytest.mark.parametrize('listings', range(6))
def test_who_leaves_while_it_is_waited_for_is_not_missed(listings, monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  client = _Leaving(listings)
  for folder in (f'{distributed._END}/', 'realm/7/'):
    assert distributed._wait_for_all(client, folder) == ['theirs', 'ours']


class _Slow:
  """The client of a process whose questions take long."""

  def key_value_set(self, key, value):
    pass

  def key_value_dir_get(self, folder):
    return [(f'{folder}0', '')]

  def key_value_try_get(self, key):
    time.sleep(0.5)
    raise jax.errors.JaxRuntimeError('NOT_FOUND')


def test_no_thread_is_left_inside_of_jax(monkeypatch):
  """It would abort the process that ends, in place of the exit status."""
  before = threading.active_count()
  monkeypatch.setattr(distributed, 'initialize', lambda: None)
  monkeypatch.setattr(distributed, '_client', _Slow)
  monkeypatch.setattr(distributed, '_leaving', threading.Event())
  monkeypatch.setattr(distributed, '_WATCH_SECONDS', 0.001)
  with distributed.job():
    time.sleep(0.1)
    assert threading.active_count() == before + 1
  assert threading.active_count() == before


def test_one_process_needs_nobody():
  with distributed.job('127.0.0.1:1', 1, 0):
    assert distributed.is_main()
    assert distributed.broadcast({'step': 3}) == {'step': 3}
    assert distributed.any(True) and not distributed.any(False)
    distributed.barrier('here')
    distributed.same('config', {'seed': 0})


def test_a_second_sigterm_ends_the_process():
  with process_lib.note_sigterm() as came:
    os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_batch_keeps_its_order_wherever_the_devices_are():
  batch = {'row': np.arange(16), 'ids': np.arange(32).reshape(16, 2)}
  for shape in ((8, 1), (4, 2), (1, 8)):
    for devices in (jax.devices(), jax.devices()[::-1]):
      mesh = jax.sharding.Mesh(
          np.array(devices).reshape(shape), (mesh_lib.DATA, mesh_lib.MODEL)
      )
      rows = mesh_lib.local_rows(mesh, 16)
      np.testing.assert_array_equal(rows, np.arange(16))
      for name, array in mesh_lib.to_devices(mesh, batch).items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == mesh_lib.over_batch(mesh)
