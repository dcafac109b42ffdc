"""How a job starts and continues: its model, its files, its config."""

import logging
import pathlib
import shutil

import initial_test
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.prepare import prepare
from realm_jax.runtime import process
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import loop

assert_equal, begin = initial_test.assert_equal, initial_test.begin
make_source, said = initial_test.make_source, initial_test.said

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


@pytest.fixture(autouse=True)
def _info(caplog):
  caplog.set_level(logging.INFO)


# ------------------------------------------------- the model of a checkpoint


_OTHER_SIZES = {
    'model__num_layers': 2, 'model__width': 48, 'model__num_heads': 3,
    'model__mlp_width': 32, 'model__activation': 'gelu',
    'model__layer_norm_eps': 1e-5, 'model__max_positions': 24,
    'model__embedding_width': 12,
}


def test_the_model_is_that_of_the_checkpoint(world, tmp_path, caplog):
  given = make_source(tmp_path / 'a', world, 3, 'embedder', **_OTHER_SIZES)
  params, _ = begin(
      tmp_path / 'job', world, 'ict', [tmp_path / 'a'],
      lengths__query=10, lengths__document=40,
  )
  assert_equal(params['embedder'], given['embedder'])
  written = config_lib.read(tmp_path / 'job')
  for name, value in _OTHER_SIZES.items():
    assert getattr(written.model, name.removeprefix('model__')) == value
  assert (written.lengths.query, written.lengths.document) == (10, 24)
  (line,) = [m for m in said(caplog) if m.startswith(f'As in {tmp_path}/a: ')]
  assert 'config.model.num_layers=2 (not 1)' in line
  assert "config.model.activation='gelu' (not 'gelu_new')" in line
  assert 'config.lengths.document=24 (not 40)' in line
  assert 'lengths.query' not in line


def test_a_reader_of_question_and_passage_has_room_for_both(world, tmp_path):
  make_source(tmp_path / 'a', world, 3, 'reader', model__max_positions=40)
  begin(
      tmp_path / 'job', world, 'mlm', [tmp_path / 'a'],
      lengths__query=16, lengths__document=64, lengths__masks=9,
  )
  lengths = config_lib.read(tmp_path / 'job').lengths
  assert (lengths.query, lengths.document, lengths.masks) == (10, 30, 8)


def test_what_a_checkpoint_does_not_fix_stays(world, tmp_path, caplog):
  """The width of the embedding is no size of a reader."""
  make_source(tmp_path / 'a', world, 3, 'reader', model__embedding_width=12)
  begin(
      tmp_path / 'job', world, 'ict', [tmp_path / 'a'],
      model__embedding_width=20, model__dropout=0.25,
  )
  model = config_lib.read(tmp_path / 'job').model
  assert (model.embedding_width, model.dropout) == (20, 0.25)
  assert 'As in' not in caplog.text


def test_contradictions_are_one_error(world, tmp_path):
  make_source(tmp_path / 'a', world, 3, 'embedder', **_OTHER_SIZES)
  make_source(tmp_path / 'b', world, 4, 'reader', **{
      **_OTHER_SIZES, 'model__width': 96,
  })
  vocab = (world / 'vocab.txt').read_text().splitlines()
  (tmp_path / 'vocab.txt').write_text('\n'.join([*vocab[:-1], 'other']) + '\n')
  prepare.prepare(
      ['world:3:20'], tmp_path / 'corpus', workers=1, progress=False,
      vocab=str(tmp_path / 'vocab.txt'),
  )
  with pytest.raises(ValueError) as caught:
    begin(
        tmp_path / 'job', tmp_path / 'corpus', 'realm',
        [tmp_path / 'a', tmp_path / 'b'],
        ['model.preset', 'model.mlp_width', 'seed', 'lengths.document'],
        model__preset='tiny', model__num_layers=0, model__num_heads=2,
        model__mlp_width=64, lengths__document=40,
    )
  lines = str(caught.value).splitlines()
  width = f'config.model.width: 48 in {tmp_path}/a, 96 in {tmp_path}/b'
  assert f'  {width}' in lines
  assert (
      f'  config.model.mlp_width: 64 on the command line, 32 in {tmp_path}/a'
  ) in lines
  assert any('config.lengths.document: 40 on the command' in x for x in lines)
  (size,) = {len(vocab)}
  for name in 'ab':
    (line,) = [x for x in lines if f'{size} wordpieces, digest' in x
               and f'in {tmp_path}/{name};' in x]
    assert line.endswith(f'Prepare the corpus with --vocab={world}')
  assert not any('seed' in line or 'num_layers' in line for line in lines)
  assert not (tmp_path / 'job').exists()


def test_a_preset_of_the_command_line_is_compared_in_its_sizes(
    world, tmp_path
):
  make_source(tmp_path / 'a', world, 3, 'reader', model__num_layers=2)
  with pytest.raises(ValueError, match='num_layers: 4 on the command line, 2'):
    begin(
        tmp_path / 'job', world, 'mlm', [tmp_path / 'a'], ['model.preset'],
        model__preset='mini', model__num_layers=0,
    )


def test_special_tokens_are_named(world, tmp_path):
  """The corpus was prepared with another order of [CLS] and [SEP]."""
  training_test.run(
      training_test.make_config(world, 'mlm', steps=1), tmp_path / 'a'
  )
  vocab = (world / 'vocab.txt').read_text()
  vocab = vocab.replace('[CLS]\n[SEP]\n', '[SEP]\n[CLS]\n')
  (tmp_path / 'vocab.txt').write_text(vocab)
  prepare.prepare(
      ['world:3:20'], tmp_path / 'corpus', workers=1, progress=False,
      vocab=str(tmp_path / 'vocab.txt'),
  )
  with pytest.raises(
      ValueError,
      match=r'(?m)\[CLS\] has id 2 there, \[CLS\] has id 3.*--vocab=\S+/a$',
  ) as caught:
    begin(tmp_path / 'b', tmp_path / 'corpus', 'mlm', [tmp_path / 'a'])
  assert 'digest' in str(caught.value)


def test_a_resumed_job_needs_no_source(world, tmp_path):
  config = training_test.make_config(
      world, 'mlm', steps=2, model__num_layers=2,
      init_from=str(tmp_path / 'a'), checkpoint__interval=1,
  )
  make_source(tmp_path / 'a', world, 3, 'reader', model__mlp_width=32)
  training_test.run(config, tmp_path / 'job')
  shutil.rmtree(tmp_path / 'a')
  job = job_lib.open_job(config, tmp_path / 'job')
  assert (job.config.model.num_layers, job.config.model.mlp_width) == (1, 32)
  with pytest.raises(ValueError, match='num_layers: 1 there, 2 here'):
    job_lib.open_job(config, tmp_path / 'job', ['model.num_layers'])


def test_a_source_without_a_use_is_refused(world, tmp_path):
  make_source(tmp_path / 'tagger', world, 5, 'tagger')
  with pytest.raises(ValueError, match=r"\['tagger'\].*'ict'.*'embedder'"):
    begin(tmp_path / 'job', world, 'ict', [tmp_path / 'tagger'])


def test_a_checkpoint_of_transformers_is_to_be_imported(world, tmp_path):
  with pytest.raises(ValueError, match='of transformers.*`realm-jax import'):
    begin(tmp_path / 'job', world, 'mlm', [_FIXTURES / 'bert'])
  assert not (tmp_path / 'job').exists()


# --------------------------------------------------------- a start that fails


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('exists', [False, True])
def test_a_start_that_fails_leaves_nothing(
    world, tmp_path, monkeypatch, exists
):
  """It fails after the lock is taken and the checkpoints are opened."""
  workdir = tmp_path / 'job'
  if exists:
    workdir.mkdir()
    (workdir / 'notes.txt').write_text('mine')

  def fail(*_):
    raise ValueError('no memory')

  with monkeypatch.context() as patch:
    patch.setattr(job_lib, 'start_or_resume', fail)
    with pytest.raises(ValueError, match='no memory'):
      loop.train(training_test.make_config(world, 'mlm'), workdir)
  assert workdir.exists() == exists
  if exists:
    assert _names(workdir) == ['notes.txt']
  config = training_test.make_config(
      world, 'mlm', steps=1, lengths__document=32
  )
  training_test.run(config, workdir)
  assert config_lib.read(workdir).lengths.document == 32


def test_a_failed_resumption_changes_nothing(world, tmp_path, monkeypatch):
  config = training_test.make_config(world, 'mlm', steps=1)
  training_test.run(config, tmp_path)
  before = {path: path.read_bytes() for path in tmp_path.glob('*.json*')}

  def fail(*_):
    raise ValueError('no memory')

  monkeypatch.setattr(job_lib, 'start_or_resume', fail)
  with pytest.raises(ValueError, match='no memory'):
    training_test.run(
        training_test.make_config(world, 'mlm', steps=2), tmp_path
    )
  assert {path: path.read_bytes() for path in before} == before
  assert tmp_path / 'summary.json' in before


def test_a_start_without_a_checkpoint_is_replaced(world, tmp_path, caplog):
  """The first step failed, for example as it takes too much memory."""
  config = training_test.make_config(world, 'mlm', steps=1)
  job_lib.begin(job_lib.open_job(config, tmp_path))
  (tmp_path / 'index' / '0').mkdir(parents=True)  # The other job's.
  other = training_test.make_config(
      world, 'mlm', steps=1, lengths__document=32
  )
  training_test.run(other, tmp_path)
  assert config_lib.read(tmp_path).lengths.document == 32
  assert 'lengths.document: 40 there, 32 here' in caplog.text
  assert f'Removed {tmp_path}/index/0' in caplog.text


_DOCUMENTS = ('embedder.encoder', 'embedder.projection')


@pytest.mark.parametrize(
    ('objective', 'frozen', 'policy', 'warned'),
    [
        ('realm', ('embedder',), 'scheduled', True),
        ('realm', ('embedder',), 'none', False),
        ('realm', ('reader',), 'scheduled', False),
        ('realm', _DOCUMENTS, 'scheduled', True),
        ('ict', _DOCUMENTS, 'scheduled', False),
    ],
)
def test_refreshes_of_frozen_documents_are_warned_of(
    world, tmp_path, caplog, objective, frozen, policy, warned
):
  config = training_test.make_config(
      world, objective, optimizer__frozen=frozen, refresh__policy=policy,
      model__towers='separate',
  )
  job_lib.open_job(config, tmp_path)
  assert ('leaves all documents as they are' in caplog.text) is warned


def test_two_trainers_are_refused(world, tmp_path, monkeypatch):
  monkeypatch.setattr(process, 'GRACE_SECONDS', 0.1)
  config = training_test.make_config(world, 'mlm', steps=1)
  with (
      process.lock(tmp_path, 'trainer'),
      pytest.raises(RuntimeError, match='Another trainer is at work'),
  ):
    loop.train(config, tmp_path)
  assert _names(tmp_path) == ['.trainer.lock']


def test_a_lock_whose_file_was_removed_keeps_others_away(tmp_path):
  """A start that fails removes the lock file that others may wait for."""
  with process.lock(tmp_path, 'test'):
    (tmp_path / '.test.lock').unlink()
    with (
        process.lock(tmp_path, 'test'),
        pytest.raises(RuntimeError, match=f'{tmp_path}: process '),
        process.lock(tmp_path, 'test'),
    ):
      pass


# ------------------------------------------------------------------- resuming


def test_more_steps_continue_in_place(world, tmp_path, caplog):
  config = training_test.make_config(
      world, 'realm', steps=5, optimizer__warmup_steps=-1
  )
  training_test.run(config, tmp_path)
  config.steps = 7
  caplog.clear()
  summary = training_test.run(config, tmp_path)
  assert (summary['step'], summary['index_generation']) == (7, 4)
  written = config_lib.read(tmp_path)
  assert (written.steps, written.optimizer.warmup_steps) == (7, 0)
  (line,) = [r.message for r in caplog.records if 'grows' in r.message]
  # The peak is 1e-2, and the decay ends at 0.
  assert line == (
      'config.steps grows from 5 to 7. The schedule is that of 7 steps, of'
      ' which 0 are the warm-up: after step 5, where the job resumes, the'
      ' learning rate is 0.00286, not 0.'
  )
  caplog.clear()
  job_lib.open_job(config, tmp_path)
  assert 'grows' not in caplog.text


@pytest.mark.parametrize(
    'change',
    [
        {'steps': 3},
        {'optimizer__learning_rate': 1e-3},
        {'steps': 9, 'optimizer__warmup_steps': 3},
        {'steps': 9, 'seed': 1},
    ],
)
def test_other_changes_name_a_new_job(world, tmp_path_factory, change):
  workdir = tmp_path_factory.getbasetemp() / 'to_continue'
  if not workdir.exists():
    training_test.run(
        training_test.make_config(world, 'mlm', steps=4), workdir
    )
  with pytest.raises(ValueError, match='workdir of another config') as caught:
    job_lib.open_job(
        training_test.make_config(world, 'mlm', **{'steps': 4, **change}),
        workdir,
    )
  text = str(caught.value)
  assert 'only config.steps may grow' in text
  assert text.endswith(
      'from these parameters, without their optimizer state and step:'
      f' --workdir=NEW --config.init_from={workdir}'
  )
  for name in change.keys() - {'steps'}:
    assert f'config.{name.replace("__", ".")}: ' in text
