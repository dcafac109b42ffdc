"""The index builder: right embeddings, newest snapshot, alone, clean end."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.builder import status
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import generation
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import process as process_lib


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  directory = tmp_path_factory.mktemp('corpus') / 'world'
  prepare.prepare(['world:3:20'], str(directory))
  return corpus_lib.Corpus.open(directory)


@pytest.fixture(scope='module')
def config(corpus):
  config = config_lib.Config(
      corpus=str(corpus.directory),
      model=config_lib.ModelConfig(
          preset='tiny', num_layers=1, width=32, embedding_width=16
      ),
      lengths=config_lib.LengthsConfig(query=16, document=40),
      refresh=config_lib.RefreshConfig(keep=2),
  )
  config = config_lib.resolve(config)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  return config


@pytest.fixture(scope='module')
def component(config):
  return components.make('embedder', config.model)


@pytest.fixture
def workdir(tmp_path, config):
  files.write_json(tmp_path / 'config.json', config_lib.to_dict(config))
  return tmp_path


@pytest.fixture(scope='module')
def check_some(corpus, component):
  """Compares some passages with themselves alone and without padding."""
  embed = jax.jit(
      lambda params, ids, types: component.module(params).embed_document(
          ids, types
      )
  )

  def check(emb_NE, params, length):
    lengths = np.minimum(corpus.passages.lengths, length)
    template = inputs.Template(corpus.tokenizer, length, length)
    assert emb_NE.shape == (len(lengths), 16)
    order = np.argsort(lengths)
    for row in order[[0, len(order) // 3, len(order) // 2, -1]]:
      ids, types = template.documents(
          corpus.passages, np.array([row]), lengths[row]
      )
      assert (ids != 0).all()
      np.testing.assert_allclose(
          emb_NE[row], embed(params, ids, types)[0], atol=2e-5
      )

  return check


def _snapshot(workdir, component, step, seed=None):
  params = component.init(seed=step if seed is None else seed)
  return params, checkpoint.save_snapshot(workdir, step, params)


def test_build_makes_the_generation_of_a_snapshot(
    workdir, corpus, config, component, check_some
):
  _snapshot(workdir, component, 5)
  params, digest = _snapshot(workdir, component, 10)
  path = builder.build(workdir)
  assert path == workdir / 'index' / '10'
  loaded = generation.load(
      path,
      generation.Lineage(
          step=10,
          params_digest=digest,
          tokenizer_digest=corpus.tokenizer.digest,
          corpus_fingerprint=corpus.fingerprint,
          num_rows=len(corpus.passages),
          width=16,
      ),
  )
  check_some(loaded.embeddings[:], params, config.lengths.document)
  assert builder.build(workdir, step=5) == workdir / 'index' / '5'
  assert checkpoint.steps_in(workdir / 'index') == [5, 10]
  with pytest.raises(FileNotFoundError, match=r'\[5, 10\], not of 7'):
    builder.build(workdir, step=7)


@pytest.mark.parametrize('left', [[], [5]])
def test_build_takes_the_snapshot_that_training_did_not(
    workdir, config, component, left
):
  """As of ICT, or of REALM without refresh when it is done."""
  for step in left:
    _snapshot(workdir, component, step)
  params = component.init(seed=9)
  reader = {'w': np.zeros(3, np.float32)}
  checkpoint.save_params(
      workdir, 20, {'embedder': params, 'reader': reader},
      {'step': 20, 'index_generation': 0},
  )
  if left:  # It may be of a step that is yet to come.
    assert builder.build(workdir).name == '5'
  files.write_json(workdir / 'summary.json', {})
  path = builder.build(workdir)
  assert path.name == '20'
  manifest = generation.read_manifest(path)
  assert manifest['params_digest'] == checkpoint.params_digest(params)
  frozen = dataclasses.replace(
      config,
      objective='open_qa',
      open_qa=config_lib.OpenQaConfig(documents='frozen'),
  )
  shutil.rmtree(workdir / 'retriever' / '20')
  assert builder._checkpoint_without_snapshot(workdir, config, left) == 20
  # Its documents are to stay those of step 0.
  assert builder._checkpoint_without_snapshot(workdir, frozen, [0]) is None


def test_build_needs_a_job_and_a_snapshot(tmp_path, workdir):
  with pytest.raises(FileNotFoundError, match='not of any'):
    builder.build(workdir)
  with pytest.raises(FileNotFoundError):
    builder.build(tmp_path / 'nowhere')
  assert not (tmp_path / 'nowhere').exists()


class _Follower(threading.Thread):
  """`follow` in a thread; `join` returns what it raised."""

  def __init__(self, workdir, **kwargs):
    super().__init__(daemon=True)
    self._call = lambda: builder.follow(workdir, **kwargs)
    self.error = None
    self.start()

  def run(self):
    try:
      self._call()
    except Exception as error:  # Whatever it is, the test looks at it.
      self.error = error

  def end(self):
    self.join(60)
    assert not self.is_alive()
    if self.error is not None:
      raise self.error


def _until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'it did not come about'
    time.sleep(0.02)


def test_follow_builds_the_newest_and_leaves_when_training_is_done(
    tmp_path, config, component
):
  workdir = tmp_path / 'later'
  index = workdir / 'index'
  follower = _Follower(workdir, start_timeout=60)
  _until((index / 'heartbeat.json').exists)
  assert process_lib.read_heartbeat(index)['state'] in (
      'starting', 'waiting for the trainer'
  )
  for step in (0, 10, 20):  # A backlog: only the newest is of use.
    _snapshot(workdir, component, step)
  (index / '.tmp-20-1-dead').mkdir()
  (index / '.building-10').mkdir()
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  _until((index / '20').exists)
  assert checkpoint.steps_in(index) == [20]
  _, digest = _snapshot(workdir, component, 30)
  files.write_json(workdir / 'summary.json', {})
  follower.end()  # Not before the generation of the last snapshot.
  assert checkpoint.steps_in(index) == [20, 30]
  assert generation.read_manifest(index / '30')['params_digest'] == digest
  heartbeat = process_lib.read_heartbeat(index)
  assert heartbeat['state'] == 'gone' and heartbeat['pid'] == os.getpid()


def test_a_builder_removes_what_a_killed_one_left(workdir, component):
  _snapshot(workdir, component, 0)
  left = workdir / 'index' / '.tmp-0-4711-dead'
  left.mkdir(parents=True)
  (left / 'shard-00000.npy').write_bytes(b'half')
  files.write_json(workdir / 'summary.json', {})
  builder.follow(workdir)
  assert not left.exists()
  assert checkpoint.steps_in(workdir / 'index') == [0]


def test_what_is_taken_back_while_it_is_published_is_removed(
    workdir, component, monkeypatch
):
  """A trainer that resumes then may not have seen it."""
  original = generation.Writer.publish

  def publish(writer):
    shutil.rmtree(workdir / 'retriever' / '7')
    return original(writer)

  _snapshot(workdir, component, 7)
  monkeypatch.setattr(generation.Writer, 'publish', publish)
  with pytest.raises(FileNotFoundError, match='was replaced'):
    builder.build(workdir)
  assert checkpoint.steps_in(workdir / 'index') == []


def test_retention(workdir, component):
  """The two newest, those of checkpoints, the one in use; nothing else."""
  index = workdir / 'index'
  for step in range(0, 60, 10):
    (index / str(step)).mkdir(parents=True)
  saved = workdir / 'checkpoints' / '25'
  saved.mkdir(parents=True)
  (saved / '_CHECKPOINT_METADATA').write_text(
      json.dumps({'custom_metadata': {'index_generation': 10}})
  )
  generation.mark_in_use(index, [30])
  _snapshot(workdir, component, 60)
  builder.build(workdir)
  assert checkpoint.steps_in(index) == [10, 30, 50, 60]


def test_keep_zero_keeps_all(workdir, config, component):
  config = config_lib.from_dict(config_lib.to_dict(config))
  config.refresh.keep = 0
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  for step in range(0, 60, 10):
    (workdir / 'index' / str(step)).mkdir(parents=True)
  _snapshot(workdir, component, 60)
  builder.build(workdir)
  assert len(checkpoint.steps_in(workdir / 'index')) == 7


def test_a_damaged_or_foreign_generation_is_built_again(
    workdir, component
):
  index = workdir / 'index'
  _snapshot(workdir, component, 0, seed=1)
  builder.build(workdir)
  files.write_json(workdir / 'summary.json', {})
  before = (index / '0' / 'manifest.json').read_bytes()
  builder.follow(workdir)
  assert (index / '0' / 'manifest.json').read_bytes() == before  # Unchanged.
  _, digest = _snapshot(workdir, component, 0, seed=2)
  builder.follow(workdir)
  assert generation.read_manifest(index / '0')['params_digest'] == digest
  (index / '0' / 'manifest.json').write_bytes(before[: len(before) // 2])
  builder.follow(workdir)
  assert generation.read_manifest(index / '0')['params_digest'] == digest


def test_a_snapshot_taken_back_is_not_published(
    workdir, component, monkeypatch
):
  _snapshot(workdir, component, 0, seed=1)
  add = generation.Writer.add_backend

  def resumed_meanwhile(writer, *args):
    _snapshot(workdir, component, 0, seed=2)
    return add(writer, *args)

  monkeypatch.setattr(generation.Writer, 'add_backend', resumed_meanwhile)
  with pytest.raises(FileNotFoundError, match='replaced'):
    builder.build(workdir)
  assert [n for n in os.listdir(workdir / 'index') if n[0] != '.'] == [
      'heartbeat.json'
  ]


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(builder, '_SHARD_ROWS', {'cpu': 16})


def _stop_in_shard(monkeypatch, number):
  """Ends a builder in a shard, or with -1 in the backend; as SIGTERM would."""
  add, patch = generation.Writer.add, monkeypatch.context()

  def stopping(writer, rows, shard=None):
    if shard == number:
      raise process_lib.Stopped('SIGTERM')
    add(writer, rows, shard)

  def stopped(*_):
    raise process_lib.Stopped('SIGTERM')

  context = patch.__enter__()
  if number < 0:
    context.setattr(generation.Writer, 'add_backend', stopped)
  else:
    context.setattr(generation.Writer, 'add', stopping)
  return lambda: patch.__exit__(None, None, None)


def _files(path):
  return {
      file.name: file.read_bytes()
      for file in path.iterdir()
      if file.name != 'manifest.json'
  }


def test_an_interrupted_build_is_resumed(
    workdir, component, monkeypatch, small_shards
):
  index = workdir / 'index'
  _snapshot(workdir, component, 0)
  path = builder.build(workdir)
  expected = _files(path)
  assert len(expected) > 5
  rows = generation.read_manifest(path)['num_rows']
  files.remove(path)
  embedded = []
  add = generation.Writer.add
  for number in (3, 5, -1):
    again = _stop_in_shard(monkeypatch, number)
    builder.follow(workdir)  # Leaves without an error.
    again()
    assert status.partial_builds(index)[0]['done'] == (
        min(16 * number, rows) if number > 0 else rows
    )
    assert checkpoint.steps_in(index) == []
  # Damaged in the meantime: a bit, an end, a record, a file of no use.
  left = index / '.building-0'
  (left / 'shard-00001.npy').write_bytes(expected['shard-00001.npy'][:-1])
  torn = bytearray(expected['shard-00002.npy'])
  torn[-1] ^= 1
  (left / 'shard-00002.npy').write_bytes(torn)
  (left / 'records' / '00003.json').write_text('{')
  (left / 'records' / '00004.json').unlink()
  (left / 'scann').mkdir()

  def counted(writer, rows, shard=None):
    embedded.append(shard)
    add(writer, rows, shard)

  monkeypatch.setattr(generation.Writer, 'add', counted)
  path = builder.build(workdir)
  assert embedded == [1, 2, 3, 4]
  assert _files(path) == expected
  generation.load(path)
  assert not left.exists()


@pytest.mark.parametrize('change', ['params', 'length', 'dtype', 'newer'])
def test_an_unfinished_build_of_another_kind_is_deleted(
    workdir, config, component, monkeypatch, small_shards, change
):
  _snapshot(workdir, component, 0)
  again = _stop_in_shard(monkeypatch, 3)
  builder.follow(workdir)
  again()
  config = config_lib.from_dict(config_lib.to_dict(config))
  step = 0
  match change:
    case 'params':
      _snapshot(workdir, component, 0, seed=5)
    case 'length':
      config.lengths.document = 24
    case 'dtype':
      config.mips.dtype = 'bfloat16'
    case 'newer':
      step = 10
      _snapshot(workdir, component, 10)
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  embedded = []
  add = generation.Writer.add

  def counted(writer, rows, shard=None):
    embedded.append(shard)
    add(writer, rows, shard)

  monkeypatch.setattr(generation.Writer, 'add', counted)
  path = builder.build(workdir)
  assert path.name == str(step)
  assert embedded == [*range(len(_files(path)))]
  assert status.partial_builds(workdir / 'index') == {}


def test_a_second_builder_names_the_first(workdir, component):
  _snapshot(workdir, component, 0)
  with process_lib.lock(workdir / 'index', 'index builder'):
    for start in (builder.build, builder.follow):
      with pytest.raises(RuntimeError, match=f'process {os.getpid()} on '):
        start(workdir)
  builder.build(workdir)  # The lock is free again.


def test_start_timeout(tmp_path, workdir, monkeypatch):
  with pytest.raises(TimeoutError, match='no config.json after 0 s'):
    builder.follow(tmp_path / 'new', start_timeout=0.1)
  with pytest.raises(TimeoutError, match='no first snapshot'):
    builder.follow(workdir, start_timeout=0.1)
  files.write_json(workdir / 'summary.json', {})
  with pytest.raises(ValueError, match='took no snapshot'):
    builder.follow(workdir)


def test_a_snapshot_of_another_model_is_refused(workdir, config, component):
  other = config_lib.from_dict(config_lib.to_dict(config))
  other.model.embedding_width = 24
  _snapshot(workdir, components.make('embedder', other.model), 0)
  with pytest.raises(ValueError, match='another model'):
    builder.follow(workdir)


def _command(workdir, *argv):
  return [
      sys.executable, '-m', 'realm_jax', 'index', f'--workdir={workdir}', *argv
  ]


def test_as_a_process_it_leaves_on_sigterm_and_with_its_parent(
    tmp_path, workdir, component
):
  _snapshot(workdir, component, 0)
  with open(tmp_path / 'log', 'wb') as log:
    process = subprocess.Popen(_command(workdir, '--follow'), stderr=log)
  # A shell that starts one and dies: its child must not live on.
  orphaned = tmp_path / 'orphaned'
  line = ' '.join(_command(orphaned, '--follow', '--parent_pid=$$'))
  with open(tmp_path / 'log2', 'wb') as log:
    shell = subprocess.Popen(
        ['/bin/sh', '-c', f'{line} & wait'], stderr=log, stdout=log
    )
  try:
    _until((workdir / 'index' / '0').exists)
    assert (workdir / 'index' / '.builder.lock').read_text().startswith(
        f'process {process.pid} on '
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert 'leaves: SIGTERM' in (tmp_path / 'log').read_text()
    _until((orphaned / 'index' / 'heartbeat.json').exists)
    child = process_lib.read_heartbeat(orphaned / 'index')['pid']
    os.kill(child, 0)  # It exists.
    shell.kill()
    shell.wait()
    _until(
        lambda: process_lib.read_heartbeat(orphaned / 'index')['state']
        == 'gone'
    )
  finally:
    process.kill()
    shell.kill()
