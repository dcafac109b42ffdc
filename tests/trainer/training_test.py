"""Training as a whole: it learns, it resumes bit by bit, it spreads.

The index builder works in the trainer's own process here, inside the health
check that waiting calls; tests/cli/main_test.py has it as a process of its own.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import types

import helpers
import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.runtime import process
from realm_jax.trainer import loop
from realm_jax.trainer import stages
from realm_jax.trainer.stages import ict

_STEPS = 12


def make_config(corpus: pathlib.Path, objective: str, **values):
  """A job of a few seconds; `section__field=value` overrides."""
  config = config_lib.Config(objective=objective, corpus=str(corpus))
  config.steps, config.batch_size, config.num_candidates = _STEPS, 8, 3
  config.log_interval = 1
  config.model = config_lib.ModelConfig(
      preset='tiny', num_layers=1, width=32, num_heads=2, mlp_width=64,
      embedding_width=16, max_positions=64, init_stddev=0.1,
  )
  config.lengths.query, config.lengths.document = 24, 40
  config.lengths.masks = 4
  config.optimizer.learning_rate = 1e-2
  config.optimizer.warmup_steps = 2
  config.refresh.interval, config.refresh.lag = 4, 2
  config.refresh.timeout = 120.0
  config.checkpoint.interval = 5
  for name, value in values.items():
    *sections, field = name.split('__')
    owner = config
    for section in sections:
      owner = getattr(owner, section)
    setattr(owner, field, value)
  return config


def run(config, workdir):
  """Trains with the index builder in this process."""

  def build_what_is_missing():
    steps = checkpoint.snapshot_steps(workdir)
    if steps and not (workdir / 'index' / str(steps[-1])).exists():
      builder.build(workdir)

  # On one of the devices: the equality of many is a test of its own, and these
  # jobs are too small to be worth eight.
  mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh_lib, 'make_mesh', lambda *_: mesh)
    return loop.train(config, workdir, health=build_what_is_missing)


# The metrics of docs/refresh.md, which exist after a first refresh.
_STALENESS = {
    'train/null_share', 'train/null_posterior', 'train/retrieval_utility',
    *(
        f'refresh/{name}'
        for name in (
            'generation', 'age_steps', 'age_seconds', 'adopted',
            'probe_overlap', 'drift_cosine', 'stall_seconds',
            'last_stall_seconds', 'wait_seconds', 'last_wait_seconds',
            'loading', 'load_seconds', 'swap_seconds', 'builder_failures',
        )
    ),
}

JOBS = {
    'mlm': ('mlm', {}),
    'ict': ('ict', {'model__dropout': 0.02}),
    'sync': ('realm', {'refresh__policy': 'sync'}),
    'scheduled': ('realm', {'refresh__policy': 'scheduled'}),
    # It asks at steps 4 and 8: the retriever begins to learn in between.
    'adaptive': (
        'realm',
        {
            'refresh__policy': 'adaptive',
            'refresh__overlap_bound': 0.95,
            'refresh__lag': 3,
            'optimizer__retriever_delay': 5,
        },
    ),
}


@pytest.fixture(scope='module')
def undisturbed(world, tmp_path_factory):
  """Summaries and workdirs of the jobs, each run once without a break."""
  done = {}

  def get(name):
    if name not in done:
      objective, values = JOBS[name]
      workdir = tmp_path_factory.mktemp(name)
      config = make_config(world, objective, **values)
      done[name] = run(config, workdir), workdir
    return done[name]

  return get


@pytest.mark.parametrize('name', JOBS)
def test_a_job_leaves_what_it_should(undisturbed, name):
  summary, workdir = undisturbed(name)
  assert summary['step'] == _STEPS
  assert summary['compilations'] == 1
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  lines = metrics_lib.read_metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, _STEPS + 1))
  losses = [line['train/loss'] for line in lines]
  assert np.mean(losses[-3:]) < np.mean(losses[:3])
  if name in ('sync', 'scheduled', 'adaptive'):
    generations = [line['refresh/generation'] for line in lines]
    # Line s + 1 is of the step that began at s.
    expected = {
        'sync': [0] * 4 + [4] * 4 + [8] * 4,
        'scheduled': [0] * 6 + [4] * 4 + [8] * 2,
        'adaptive': [0] * 11 + [8],
    }[name]
    assert generations == expected
    assert summary['index_generation'] == expected[-1]
    assert set(lines[-1]) >= _STALENESS
    pending = checkpoint.saved_about(workdir, 10)['index_pending']
    assert pending == (8 if name == 'adaptive' else None)
  else:
    assert summary['index_generation'] is None


# Runs a job in a process of its own, which dies by SIGKILL when it is about to
# begin a given step; -1: never.
_DRIVER = """
import os, pathlib, signal, sys
import conftest
import training_test
from realm_jax.trainer import loop

kill_at = int(sys.argv[1])
original = loop._Loop._refresh

def refresh(self, step):
  if step == kill_at:
    os.kill(os.getpid(), signal.SIGKILL)
  original(self, step)

loop._Loop._refresh = refresh
objective, values = training_test.JOBS[sys.argv[2]]
world, workdir = map(pathlib.Path, sys.argv[3:5])
config = training_test.make_config(world, objective, **values)
training_test.run(config, workdir)
"""


@pytest.mark.parametrize('name', JOBS)
def test_killed_and_resumed_is_the_same_bit_for_bit(
    undisturbed, name, world, tmp_path
):
  expected, _ = undisturbed(name)
  code = _DRIVER
  killed = subprocess.run(
      [sys.executable, '-c', code, '9', name, world, tmp_path],
      capture_output=True,
      text=True,
  )
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert not (tmp_path / 'summary.json').exists()
  saved = checkpoint.steps_in(tmp_path / 'checkpoints')
  assert saved in ([], [5])  # SIGKILL may come before the save was done.
  objective, values = JOBS[name]
  resumed = run(make_config(world, objective, **values), tmp_path)
  assert resumed['params_sha256'] == expected['params_sha256']
  assert resumed['index_generation'] == expected['index_generation']
  # Every step is in the record once.
  lines = metrics_lib.read_metrics(tmp_path)
  assert [line['step'] for line in lines] == list(range(1, _STEPS + 1))


def test_resuming_really_continues(world, tmp_path, undisturbed):
  """From the checkpoint of step 5, and not from the start."""
  expected, _ = undisturbed('mlm')
  config = make_config(world, 'mlm')
  seen = []
  original = loop._Loop._refresh

  def stop_at_7(self, step):
    seen.append(step)
    if step == 7:
      raise KeyboardInterrupt
    original(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', stop_at_7)
    with pytest.raises(KeyboardInterrupt):
      run(config, tmp_path)
    assert seen == list(range(8))
    seen.clear()
    patch.setattr(
        loop._Loop, '_refresh', lambda self, step: seen.append(step)
    )
    summary = run(config, tmp_path)
  assert seen == list(range(5, _STEPS))
  assert summary['params_sha256'] == expected['params_sha256']


def test_a_line_is_the_mean_of_its_steps_also_after_a_kill(
    world, tmp_path, undisturbed, monkeypatch
):
  """Killed at step 7, in the middle of a line that begins before step 5."""
  _, workdir = undisturbed('mlm')
  each = {
      line['step']: line['train/loss']
      for line in metrics_lib.read_metrics(workdir)
  }
  config = make_config(world, 'mlm', log_interval=4)
  original = loop._Loop._refresh

  def stop_at_7(self, step):
    if step == 7:
      raise KeyboardInterrupt
    original(self, step)

  with monkeypatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', stop_at_7)
    with pytest.raises(KeyboardInterrupt):
      run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [5]
  run(config, tmp_path)
  lines = metrics_lib.read_metrics(tmp_path)
  assert [line['step'] for line in lines] == list(range(4, _STEPS + 1, 4))
  for line in lines:
    last = line['step']
    expected = np.mean([each[step] for step in range(last - 3, last + 1)])
    assert line['train/loss'] == pytest.approx(expected, rel=1e-5)


def test_sigterm_saves_and_says_so(world, tmp_path, undisturbed):
  expected, _ = undisturbed('ict')
  objective, values = JOBS['ict']
  config = make_config(world, objective, **values)
  original = loop._Loop._refresh

  def terminate_at_7(self, step):
    if step == 7:
      os.kill(os.getpid(), signal.SIGTERM)
    original(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', terminate_at_7)
    with pytest.raises(loop.Interrupted, match='step 7 is saved'):
      run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints')[-1] == 7
  summary = run(config, tmp_path)
  assert summary['params_sha256'] == expected['params_sha256']


_LITTLE_KEPT = {'steps': 20, 'refresh__lag': 4, 'refresh__keep': 1}


@pytest.fixture(scope='module')
def little_kept(world, tmp_path_factory):
  """Summary of a job that is never disturbed."""
  config = make_config(world, 'realm', **_LITTLE_KEPT)
  return run(config, tmp_path_factory.mktemp('little_kept'))


@pytest.mark.parametrize('saved, killed', [(10, 17), (11, 17)])
def test_old_checkpoints_can_be_resumed_from(
    little_kept, world, tmp_path, saved, killed
):
  """Also where little is kept: that of step 10 waits for snapshot 8 at 12."""
  config = make_config(
      world, 'realm', checkpoint__interval=saved, **_LITTLE_KEPT
  )
  original = loop._Loop._refresh

  def stop(self, step):
    if step == killed:
      raise KeyboardInterrupt
    original(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', stop)
    with pytest.raises(KeyboardInterrupt):
      run(config, tmp_path / 'killed')
  assert checkpoint.steps_in(tmp_path / 'killed' / 'checkpoints') == [saved]
  summary = run(config, tmp_path / 'killed')
  assert summary['params_sha256'] == little_kept['params_sha256']


def test_a_second_trainer_names_the_first(world, tmp_path, monkeypatch):
  monkeypatch.setattr(process, 'GRACE_SECONDS', 0.0)
  with (
      process.lock(tmp_path, 'trainer'),
      pytest.raises(RuntimeError, match=f'Another trainer .*{os.getpid()} on'),
  ):
    run(make_config(world, 'mlm'), tmp_path)


def test_sigterm_ends_a_wait_for_the_index_builder(world, tmp_path):
  config = make_config(world, 'realm')
  with pytest.MonkeyPatch.context() as patch:
    # Nobody builds the generation that step 0 waits for.
    patch.setattr(
        builder, 'build', lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(loop.Interrupted, match='step 0 is saved'):
      run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [0]
  assert run(config, tmp_path)['step'] == _STEPS


def test_a_finished_job_is_not_trained_further(undisturbed, world):
  summary, workdir = undisturbed('mlm')
  again = run(make_config(world, 'mlm'), workdir)
  assert again['params_sha256'] == summary['params_sha256']
  assert again['compilations'] == 0


def test_another_seed_is_another_result(undisturbed, world, tmp_path):
  summary, _ = undisturbed('mlm')
  other = run(make_config(world, 'mlm', seed=1), tmp_path)
  assert other['params_sha256'] != summary['params_sha256']


@pytest.mark.parametrize(
    ('towers', 'frozen'),
    [
        ('shared', ('embedder',)),
        ('separate', ('embedder.encoder', 'embedder.projection')),  # Documents.
        ('shared', ('embedder', 'reader.bert.layers', 'reader.output_bias')),
    ],
)
def test_frozen_means_frozen(undisturbed, world, tmp_path, towers, frozen):
  _, start = undisturbed('ict')
  _, reader = undisturbed('mlm')
  config = make_config(
      world, 'realm', optimizer__frozen=frozen, model__towers=towers,
      init_from=f'{start},{reader}', refresh__policy='none',
  )
  run(config, tmp_path)
  moved, learned = set(), set()
  for name, source in (('embedder', start), ('reader', reader)):
    after, before = (
        checkpoint.load_params(
            workdir, {name: checkpoint.abstract_in(workdir)[name]}
        )[0][name]
        for workdir in (tmp_path, source)
    )
    learned.update(f'{name}.{leaf}' for leaf in after)
    for leaf, array in after.items():
      if (array != before[leaf.removeprefix('query_')]).any():
        moved.add(f'{name}.{leaf}')
  frozen_leaves = {leaf for leaf in learned if leaf.startswith(frozen)}
  assert frozen_leaves
  assert moved == learned - frozen_leaves
  lines = metrics_lib.read_metrics(tmp_path)
  assert {line['refresh/generation'] for line in lines} == {0.0}
  # The index of step 0 is that of the trained retriever.
  trained, step = trained_lib.Trained.open(tmp_path), config.steps
  index = trained.published(trained.load(step), step)
  assert index.generation.manifest['step'] == 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    world, tmp_path
):
  config = make_config(world, 'ict')
  stream = helpers.batches(corpus_lib.Corpus.open(world), config)
  seventh = [next(stream).row_B for _ in range(7)][-1]
  original = ict.ClozeSentences.assemble

  def poisoned(self, batch):
    # By content: threads assemble batches ahead, in any order.
    batch = original(self, batch)
    if np.array_equal(batch.row_B, seventh):
      types_BS = np.full_like(batch.inputs.doc_types_BS, 99)
      inputs = dataclasses.replace(batch.inputs, doc_types_BS=types_BS)
      return batch._replace(inputs=inputs)
    return batch

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ict.ClozeSentences, 'assemble', poisoned)
    # Out of range in an embedding is nan in JAX.
    with pytest.raises(FloatingPointError, match=r'nan.*Rows.*step 5'):
      run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [5]


def test_a_workdir_of_another_config_is_refused(undisturbed, world):
  _, workdir = undisturbed('mlm')
  with pytest.raises(ValueError, match=r'config\.steps: 12 there, 11 here'):
    run(make_config(world, 'mlm', steps=11), workdir)
  # Fields that do not change the result may change.
  run(make_config(world, 'mlm', log_interval=7, checkpoint__keep=1), workdir)


def test_a_workdir_of_another_corpus_is_refused(
    undisturbed, world, tmp_path
):
  _, workdir = undisturbed('mlm')
  prepare.prepare(['world:4:20'], tmp_path / 'other', workers=1, progress=False,
                  vocab=str(world))
  with pytest.raises(ValueError, match='trained on something else: corpus'):
    run(make_config(tmp_path / 'other', 'mlm'), workdir)


def test_initial_parameters_of_another_vocabulary_are_refused(
    undisturbed, world, tmp_path
):
  """Though it is as large, so that all shapes are the same."""
  _, start = undisturbed('mlm')
  ours = checkpoint.saved_about(start, 12)['tokenizer_digest']
  vocab = (world / 'vocab.txt').read_text().splitlines()
  (tmp_path / 'vocab.txt').write_text('\n'.join([*vocab[:-1], 'other']) + '\n')
  prepare.prepare(['world:3:20'], tmp_path / 'corpus', workers=1,
                  progress=False, vocab=str(tmp_path / 'vocab.txt'))
  config = make_config(tmp_path / 'corpus', 'mlm', init_from=str(start))
  with pytest.raises(ValueError, match=f'wordpieces, digest {ours[:16]}, in'):
    run(config, tmp_path / 'workdir')


def test_a_corpus_smaller_than_k_is_refused(world, tmp_path):
  rows = len(corpus_lib.Corpus.open(world).passages)
  # The null document and all passages, one of which is that of a sentence.
  config = make_config(world, 'realm', num_candidates=rows + 1)
  refused = f'num_candidates={rows + 1} .*needs {rows}.*{rows - 1} at most'
  with pytest.raises(ValueError, match=refused):
    run(config, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_trivial_candidate_is_never_read(world):
  """Under `passage` the own passage is not among the candidates; else it is."""
  corpus = corpus_lib.Corpus.open(world)
  passages = corpus.sentences['knowledge'].passages
  rng = np.random.default_rng(0)

  def own_share(trivial):
    config = config_lib.resolve(
        make_config(
            world, 'realm', sentences='knowledge', trivial=trivial,
            num_candidates=20,
        )
    )
    stage = stages.load(config)(config, corpus)
    emb_NE = rng.normal(size=(len(corpus.passages), 16)).astype(np.float32)
    index = search_lib.make_search(config.mips, emb_NE)
    found = []

    def search(query_ids_BQ, k, exclude_BR2):
      query_emb_BE = rng.normal(size=(len(query_ids_BQ), 16))
      rows_BK = index.search(query_emb_BE.astype(np.float32), k, exclude_BR2)
      found.append(rows_BK)
      return rows_BK, query_emb_BE

    shares = []
    stream = helpers.batches(corpus, config)
    for batch in (next(stream) for _ in range(3)):
      own = passages[batch.row_B]
      stage.retrieve(batch.inputs, types.SimpleNamespace(search=search))
      retrieved = found[-1]
      assert retrieved.shape == (8, 19)
      shares.append((retrieved == own[:, None]).any(1).mean())
      if trivial == 'article':
        (lo, hi), = corpus.passages.article_rows(own).T.swapaxes(0, 1)
        inside = (retrieved >= lo[:, None]) & (retrieved < hi[:, None])
        assert not inside.any()
    return np.mean(shares)

  assert own_share('passage') == 0
  assert own_share('article') == 0
  assert own_share('none') > 0
