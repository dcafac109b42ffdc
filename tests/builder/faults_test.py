"""Faults that are really made: full disks, damaged files, a stopped builder.

Each ends as docs/index.md says. Other tests cover single modules: builder_test
(killed, resumed, a second one), generation_test (every kind of damage),
refresh_test (generations of other jobs), supervisor_test.
"""

import contextlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.builder import status
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import embedding
from realm_jax.index import generation
from realm_jax.index import scann
from realm_jax.index import shards
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import process
from realm_jax.trainer import loader
from realm_jax.trainer import refresh

_INTERVAL = 10


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


@pytest.fixture(scope='module')
def config(corpus):
  config = config_lib.Config(
      corpus=str(corpus.directory),
      model=config_lib.ModelConfig(
          preset='tiny', num_layers=1, width=32, embedding_width=16,
          vocab_size=corpus.tokenizer.vocab_size,
      ),
      lengths=config_lib.LengthsConfig(query=16, document=40),
      refresh=config_lib.RefreshConfig(
          policy='eager', interval=_INTERVAL, lag=_INTERVAL, timeout=60.0
      ),
  )
  return config_lib.resolve(config)


@pytest.fixture(scope='module')
def component(config):
  return components.make('embedder', config.model)


@pytest.fixture(scope='module')
def built(tmp_path_factory, config, component):
  """A workdir with the generation 0."""
  workdir = tmp_path_factory.mktemp('built') / 'workdir'
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  _snapshot(workdir, component, 0)
  builder.build(workdir)
  return workdir


@pytest.fixture
def workdir(built, tmp_path):
  return shutil.copytree(built, tmp_path / 'workdir')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
  monkeypatch.setattr(builder, '_SHARD_ROWS', {'cpu': 16})
  monkeypatch.setattr(builder, '_ROOM_SECONDS', 0.05)
  monkeypatch.setattr(process, '_BEAT_SECONDS', 0.05)


def _snapshot(workdir, component, step, seed=None):
  params = component.init(seed=step if seed is None else seed)
  return checkpoint.save_snapshot(workdir, step, params)


def _refresher(workdir, config, corpus, policy='eager', **kwargs):
  config = config_lib.from_dict(config_lib.to_dict(config))
  config.refresh.policy = policy
  probe = types.SimpleNamespace(
      k=3,
      embed=lambda _: np.ones((2, config.model.embedding_width), np.float32),
  )
  return refresh.Refresher(
      workdir, config, corpus=corpus, probe=probe, **kwargs
  )


def _step(refresher, step):
  """Begins a step, whose snapshots the test takes itself."""
  return refresher.before_step(step, None, lambda step, wait: None)


@contextlib.contextmanager
def _following(workdir):
  """The index builder in a thread, until training is done."""
  errors = []

  def follow():
    try:
      builder.follow(workdir)
    except Exception as error:  # Whatever it is, the test shall see it.
      errors.append(error)

  thread = threading.Thread(target=follow, daemon=True)
  thread.start()
  try:
    yield
  finally:  # A builder that continued would disturb the next test.
    files.write_json(workdir / 'summary.json', {})
    thread.join(60)
  assert not thread.is_alive()
  assert not errors, errors


def _until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'it did not come about'
    time.sleep(0.02)


@contextlib.contextmanager
def _no_file_beyond(size):
  """Writes beyond a file size fail, as on a full disk."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _state(workdir):
  return process.read_heartbeat(workdir / 'index')['state']


def test_a_full_disk_while_building(workdir, config, corpus, component, caplog):
  """Training continues with the last generation; the builder waits."""
  index = workdir / 'index'
  refresher = _refresher(workdir, config, corpus)
  _step(refresher, 0)
  with caplog.at_level(logging.INFO), _following(workdir):
    _until(lambda: _state(workdir) == 'waiting')
    with _no_file_beyond(1000):
      _snapshot_made_before(workdir, component)
      _until(lambda: _state(workdir) == 'waiting for room on the disk')
      assert not _step(refresher, _INTERVAL)
      assert refresher.generation_step == 0
      assert refresher.metrics(_INTERVAL)['refresh/age_steps'] == _INTERVAL
      assert checkpoint.steps_in(index) == [0]
      generation.load(index / '0')
    _until(lambda: _step(refresher, _INTERVAL))
  assert refresher.generation_step == _INTERVAL
  message = f'No room to write {index}/.building-{_INTERVAL}/shard-00000.npy'
  assert message in caplog.text and 'File too large' in caplog.text
  assert caplog.text.count('No room') == 1  # However often it was tried.
  assert not [*status.partial_builds(index)]


def _snapshot_made_before(workdir, component):
  """A snapshot appears at once, although the disk is full."""
  aside = workdir / 'aside'
  with _no_file_beyond(resource.RLIM_INFINITY):
    _snapshot(aside, component, _INTERVAL)
  (aside / checkpoint.SNAPSHOTS / str(_INTERVAL)).rename(
      workdir / checkpoint.SNAPSHOTS / str(_INTERVAL)
  )


def test_a_disk_that_is_really_full(workdir, component):
  """Shards written before the disk was full are not embedded again."""
  index, full = workdir / 'index', workdir / 'full'
  full.mkdir()

  def mount(option):
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', option, 'tmpfs', str(full)],
        capture_output=True, check=False,
    )
    if done.returncode:
      pytest.skip('A small tmpfs cannot be mounted here: needs root.')

  rows = generation.read_manifest(index / '0')['num_rows']
  shutil.rmtree(index)
  mount('size=28k')
  try:
    index.symlink_to(full)
    with pytest.raises(shards.NoRoom) as error:
      builder.build(workdir)
    message = str(error.value)
    assert 'No space left on device' in message
    assert f'No room to write {index}/.building-0/' in message
    assert checkpoint.steps_in(index) == []
    partial = status.partial_builds(index)[0]
    assert 0 < partial['done'] < rows
    mount('remount,size=1m')
    path = builder.build(workdir)
    generation.load(path)
  finally:
    subprocess.run(['umount', str(full)], check=False)


@pytest.mark.parametrize('size', [40, 400, 4000])
def test_a_full_disk_under_scann(tmp_path, monkeypatch, size):
  """Its files are written by native code, which has words of its own."""
  monkeypatch.setattr(scann, 'BRUTE_FORCE', 400)
  table = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
  lineage = generation.Lineage(3, 'p', 't', 'c', *table.shape)
  with generation.Writer(tmp_path, lineage) as writer:
    writer.add(table)
    with (
        _no_file_beyond(size),
        pytest.raises(shards.NoRoom, match='No room to write .*/scann: '),
    ):
      writer.add_backend(config_lib.MipsConfig(backend='scann'))
  assert os.listdir(tmp_path) == []


def test_a_full_disk_while_checkpointing(tmp_path, caplog):
  """The checkpoint is missing, training continues, the next one is saved."""
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
  noise = np.random.default_rng(0).normal(size=(100, 100))
  params = {'reader': {'w': jnp.asarray(noise)}}
  state = {'step': jnp.zeros(())}
  folder = tmp_path / checkpoint.CHECKPOINTS

  def save(step):
    checkpoints.save(step, params, state, {'index_generation': 0})

  save(1)
  checkpoints.wait()
  with _no_file_beyond(4096), caplog.at_level(logging.ERROR):
    save(2)
    save(3)  # Says what became of 2.
    with pytest.raises(ValueError, match=f'{folder}/3.*File too large'):
      checkpoints.wait()
  assert 'There is no checkpoint of step 2: ' in caplog.text
  assert f'{folder}/2.orbax' in caplog.text
  assert 'the newest checkpoint is of step 1' in caplog.text
  save(4)
  checkpoints.close()
  assert checkpoint.steps_in(folder) == [1, 4]
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=3)
  restored, _ = checkpoints.restore(4, params, state)
  np.testing.assert_array_equal(restored['reader']['w'], params['reader']['w'])
  save(5)  # A restart sweeps in the background; its first save waits for that.
  checkpoints.close()
  assert sorted(os.listdir(folder)) == ['1', '4', '5']


@pytest.mark.parametrize('required', [True, False])
def test_a_full_disk_while_a_snapshot_is_taken(tmp_path, caplog, required):
  """Only `eager` can do without one."""
  snapshots = checkpoint.Snapshots(tmp_path, keep=3, required=required)
  params = {'w': np.random.default_rng(0).normal(size=(100, 100))}
  raises = pytest.raises(ValueError, match='File too large')
  with _no_file_beyond(4096):
    snapshots.save(0, params, in_use=0)
    with raises if required else contextlib.nullcontext():
      snapshots.wait()
  assert os.listdir(tmp_path / checkpoint.SNAPSHOTS) == []
  if not required:
    assert f'{tmp_path}/{checkpoint.SNAPSHOTS}/0.orbax' in caplog.text
    assert 'Training continues with the present index' in caplog.text
  snapshots.save(10, params, in_use=0)
  snapshots.wait()
  assert checkpoint.snapshot_steps(tmp_path) == [10]
  snapshots.close()


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    'name, damage',
    [
        ('shard-00001.npy', _flip),
        ('shard-00000.npy', _truncate),
        ('shard-00002.npy', os.unlink),
        ('manifest.json', _flip),
        ('manifest.json', _truncate),
    ],
)
def test_damage_on_disk_is_never_searched(
    workdir, config, corpus, component, caplog, name, damage
):
  """`scheduled` has it built again; `eager` continues without it."""
  path = workdir / 'index' / str(_INTERVAL)
  _snapshot(workdir, component, _INTERVAL)
  builder.build(workdir)
  whole = {file.name: file.read_bytes() for file in path.glob('shard-*')}
  if name == 'manifest.json' and damage is _truncate:  # At the end of a line.
    _truncate(path / name)
  damage(path / name)
  eager = _refresher(workdir, config, corpus, step=_INTERVAL, generation=0)
  with caplog.at_level(logging.WARNING):
    _until(lambda: _step(eager, _INTERVAL) or 'continues with' in caplog.text)
  assert eager.generation_step == 0
  assert str(path) in caplog.text
  scheduled = _refresher(
      workdir, config, corpus, 'scheduled', step=_INTERVAL, generation=0
  )
  with _following(workdir):
    assert _step(scheduled, 2 * _INTERVAL)
  assert scheduled.generation_step == _INTERVAL
  assert whole == {file.name: file.read_bytes() for file in path.glob('shard*')}
  assert all(not found.problems for found in status.verify(workdir))


def test_a_builder_slower_than_the_interval(
    workdir, config, corpus, component, monkeypatch
):
  """It leaves out snapshots, and never those that it began with."""
  embed = embedding.PassageEmbedder.__call__

  def slowly(*args):
    time.sleep(0.05)
    return embed(*args)

  monkeypatch.setattr(embedding.PassageEmbedder, '__call__', slowly)
  refresher = _refresher(workdir, config, corpus)
  used, ages = [], []
  last = 12 * _INTERVAL
  with _following(workdir):
    for step in range(0, last + 1, _INTERVAL):
      _step(refresher, step)
      used.append(refresher.generation_step)
      ages.append(refresher.metrics(step)['refresh/age_steps'])
      _snapshot(workdir, component, step)
      time.sleep(0.15)
    published = set(checkpoint.steps_in(workdir / 'index')) | set(used)
  assert used == sorted(used) and used[-1] > 0  # Ever newer, and some.
  assert len(published) < 12
  assert ages == [
      step - one
      for step, one in zip(range(0, last + 1, _INTERVAL), used, strict=True)
  ]
  assert max(ages) > _INTERVAL
  assert checkpoint.steps_in(workdir / 'index')[-1] == last  # In the end.


def test_a_snapshot_deleted_under_the_builder(
    workdir, component, monkeypatch, caplog
):
  """The build is dropped; the builder takes the next snapshot."""
  write = generation.Writer.add
  written = []

  def add(writer, rows, shard=None):
    write(writer, rows, shard)
    written.append((writer.step, shard))
    if written == [(10, 0), (10, 1)]:
      shutil.rmtree(workdir / checkpoint.SNAPSHOTS / '10')

  monkeypatch.setattr(generation.Writer, 'add', add)
  _snapshot(workdir, component, 10)
  files.write_json(workdir / 'summary.json', {})
  with caplog.at_level(logging.INFO):
    builder.follow(workdir)
  assert written == [(10, 0), (10, 1)]
  assert 'The snapshot of step 10 was taken back; not published' in caplog.text
  assert checkpoint.steps_in(workdir / 'index') == [0]
  assert not [*status.partial_builds(workdir / 'index')]
  _snapshot(workdir, component, 20)
  builder.follow(workdir)
  assert checkpoint.steps_in(workdir / 'index') == [0, 20]


@pytest.mark.parametrize('name', ['checkpoints/5/_CHECKPOINT_METADATA',
                                  'index/in_use.json'])
def test_in_doubt_nothing_is_deleted(workdir, component, caplog, name):
  for step in range(10, 60, 10):
    (workdir / 'index' / str(step)).mkdir()
  files.write_json(workdir / name, {'steps': [0]})
  _truncate(workdir / name)
  _truncate(workdir / name)
  _snapshot(workdir, component, 60)
  builder.build(workdir)
  assert len(checkpoint.steps_in(workdir / 'index')) == 7
  assert f'No old generation is deleted: {workdir / name}' in caplog.text


def test_a_stopped_builder(
    workdir, config, corpus, component, monkeypatch, caplog
):
  """`scheduled` waits and names the builder, `eager` continues."""
  monkeypatch.setattr(loader, '_STALE_SECONDS', 0.2)
  command = f'-m realm_jax index --workdir={workdir} --follow'.split()
  with open(workdir / 'log', 'wb') as file:
    process = subprocess.Popen([sys.executable, *command], stderr=file)
  try:
    _until(lambda: _state(workdir) == 'waiting')
    process.send_signal(signal.SIGSTOP)
    eager = _refresher(workdir, config, corpus)
    _step(eager, 0)
    _snapshot(workdir, component, _INTERVAL)
    assert not _step(eager, _INTERVAL)
    assert eager.metrics(2 * _INTERVAL)['refresh/age_steps'] == 2 * _INTERVAL
    scheduled = _refresher(
        workdir, config, corpus, 'scheduled', step=_INTERVAL, generation=0
    )

    def on_again():
      _until(lambda: 'No index builder seems to run' in caplog.text)
      process.send_signal(signal.SIGCONT)

    with caplog.at_level(logging.WARNING):
      threading.Thread(target=on_again).start()
      assert _step(scheduled, 2 * _INTERVAL)
    assert f'process {process.pid} on ' in caplog.text
    assert scheduled.generation_step == _INTERVAL
    _until(lambda: _step(eager, 2 * _INTERVAL))
    assert eager.generation_step == _INTERVAL
  finally:
    process.kill()
    process.wait()
