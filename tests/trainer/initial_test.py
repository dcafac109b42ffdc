"""The parameters that a job begins with: values, log lines, refusals."""

import json
import logging
import pathlib

import numpy as np
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.interop import importing
from realm_jax.models import components as components_lib
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages

pytestmark = pytest.mark.usefixtures('optimized')

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_TOWERS = ('shared', 'shared_bert', 'separate')


def make_source(workdir, world, number, *names, towers='shared', **values):
  """Makes a workdir with parameters that are unique to `number`."""
  config = config_lib.resolve(
      training_test.make_config(
          world, 'realm', model__towers=towers,
          model__entity_types=('PER',), **values,
      )
  )
  corpus = corpus_lib.Corpus.open(world)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  params = {}
  for name in names:
    fresh = components_lib.make(name, config.model).init(number)
    params[name] = {
        key: np.asarray(value) + number + (0.5 if 'query_' in key else 0)
        for key, value in fresh.items()
    }
  about = {
      'tokenizer_digest': corpus.tokenizer.digest,
      'corpus_fingerprint': corpus.fingerprint,
  }
  checkpoint.save_params(workdir, number, params, about)
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  return params


def begin(workdir, world, objective, init_from, explicit=(), **values):
  """Returns the initial parameters of a job, and purely random ones."""
  if objective == 'open_qa':
    values['open_qa__questions'] = str(world / 'questions.jsonl')
    values |= {'open_qa__retrieved': 4, 'open_qa__read': 2}
    values |= {'refresh__policy': 'none'}
  if objective == 'tagger':
    sentences = workdir.parent / 'sentences.jsonl'
    sentences.write_text(json.dumps({'tokens': ['Ann'], 'tags': ['B-PER']}))
    values |= {'tagger__files': str(sentences), 'tagger__length': 8}
  config = training_test.make_config(
      world, objective, init_from=','.join(map(str, init_from)), **values
  )
  job = job_lib.open_job(config, workdir, explicit)
  job_lib.begin(job)
  checkpoints = checkpoint.Checkpoints(workdir, 1)
  tx = optimizer.make_optimizer(job.config, tuple(job.components))
  state, _ = job_lib.start_or_resume(job, checkpoints, tx)
  checkpoints.close()
  fresh = {n: c.init(job.config.seed) for n, c in job.components.items()}
  for name, component in job.components.items():
    assert state.params[name].keys() == component.abstract.keys()
  return state.params, fresh


def said(caplog):
  return {
      record.message: record.levelname
      for record in caplog.records
      if record.name == 'realm_jax.trainer.initial'
  }


def assert_equal(params, expected):
  assert params.keys() == expected.keys()
  for name, value in params.items():
    np.testing.assert_array_equal(value, expected[name], err_msg=name)


def _with_bert(fresh, giver, tower=''):
  """Returns random parameters with the BERT of another component."""
  return {
      name: giver.get(
          tower + name[name.index('bert.') :] if 'bert.' in name else '', value
      )
      for name, value in fresh.items()
  }


@pytest.fixture(autouse=True)
def _info(caplog):
  caplog.set_level(logging.INFO)


@pytest.mark.parametrize('towers', _TOWERS)
def test_each_tower_takes_the_bert_of_a_reader(
    world, tmp_path, caplog, towers
):
  mlm = make_source(tmp_path / 'mlm', world, 3, 'reader')['reader']
  params, fresh = begin(
      tmp_path / 'ict', world, 'ict', [tmp_path / 'mlm'], model__towers=towers
  )
  expected = _with_bert(fresh['embedder'], mlm)
  table = 'encoder.bert.word_embed.embedding'
  np.testing.assert_array_equal(expected[table], mlm[table[8:]])
  assert_equal(params['embedder'], expected)
  if towers == 'separate':
    _assert_one_tower(params['embedder'])
  (message,) = said(caplog)
  assert message.startswith(
      f'embedder: its BERT from the reader of {tmp_path}/mlm, step 3; '
  )
  assert 'encoder.pooler, projection.dense, projection.norm' in message
  assert message.endswith('at random.')
  # As in the paper, no other stage precedes ICT.
  assert said(caplog)[message] == 'INFO'


def _assert_one_tower(embedder):
  for name, value in embedder.items():
    other = embedder[name.removeprefix('query_')]
    np.testing.assert_array_equal(value, other, err_msg=name)


@pytest.mark.parametrize(
    'theirs, ours',
    [(a, b) for i, a in enumerate(_TOWERS) for b in _TOWERS[i:]],
)
def test_a_missing_query_tower_takes_the_document_tower(
    world, tmp_path, caplog, theirs, ours
):
  given = make_source(tmp_path / 'a', world, 3, 'embedder', towers=theirs)
  given = given['embedder']
  params, _ = begin(
      tmp_path / 'job', world, 'ict', [tmp_path / 'a'], model__towers=ours
  )
  for name, value in params['embedder'].items():
    there = name if name in given else name.removeprefix('query_')
    np.testing.assert_array_equal(value, given[there], err_msg=name)
  if theirs == 'shared':
    _assert_one_tower(params['embedder'])
  more = '; its query tower is initialised from the document tower'
  assert said(caplog) == {
      f'embedder from {tmp_path}/a, step 3{more if theirs != ours else ""}.':
      'INFO'
  }


@pytest.mark.parametrize(
    'theirs, ours',
    [('separate', 'shared_bert'), ('separate', 'shared'),
     ('shared_bert', 'shared')],
)
def test_a_query_tower_without_a_place_is_refused(
    world, tmp_path, theirs, ours
):
  make_source(tmp_path / 'a', world, 3, 'embedder', towers=theirs)
  with pytest.raises(
      ValueError, match=f"'{ours}' on the command line, '{theirs}' in .*/a"
  ):
    begin(
        tmp_path / 'job', world, 'ict', [tmp_path / 'a'], ['model.towers'],
        model__towers=ours,
    )
  # As a value of the config file, it is replaced.
  begin(tmp_path / 'job', world, 'ict', [tmp_path / 'a'], model__towers=ours)
  assert config_lib.read(tmp_path / 'job').model.towers == theirs


@pytest.mark.parametrize('order', [('bert', 'ict'), ('ict', 'bert')])
def test_an_embedder_is_preferred_to_a_bert(
    world, tmp_path, caplog, order
):
  bert = make_source(tmp_path / 'bert', world, 3, 'reader')
  ict = make_source(tmp_path / 'ict', world, 4, 'embedder')
  params, _ = begin(
      tmp_path / 'job', world, 'realm', [tmp_path / name for name in order]
  )
  assert_equal(params['reader'], bert['reader'])
  assert_equal(params['embedder'], ict['embedder'])
  assert said(caplog) == {
      f'embedder from {tmp_path}/ict, step 4.': 'INFO',
      f'reader from {tmp_path}/bert, step 3.': 'INFO',
  }


def test_later_workdirs_win(world, tmp_path, caplog):
  make_source(tmp_path / 'a', world, 3, 'embedder', 'reader')
  b = make_source(tmp_path / 'b', world, 4, 'embedder')
  c = make_source(tmp_path / 'c', world, 5, 'reader')
  sources = [tmp_path / name for name in 'abc']
  params, _ = begin(tmp_path / 'job', world, 'realm', sources)
  assert_equal(params['embedder'], b['embedder'])
  assert_equal(params['reader'], c['reader'])
  assert f'Nothing of {tmp_path}/a is used.' in said(caplog)
  # The same holds among BERTs of other components.
  caplog.clear()
  sources = [tmp_path / 'c', tmp_path / 'a', tmp_path / 'b']
  params, fresh = begin(tmp_path / 'tags', world, 'tagger', sources)
  body = _with_bert(fresh['tagger'], b['embedder'], 'encoder.')
  assert_equal(params['tagger'], body)
  assert (
      f'tagger: its BERT from the embedder of {tmp_path}/b, step 4; output at'
      ' random.'
  ) in said(caplog)


def test_a_span_reader_takes_the_bert_of_a_reader(
    world, tmp_path, caplog
):
  realm = make_source(tmp_path / 'realm', world, 3, 'embedder', 'reader')
  params, fresh = begin(
      tmp_path / 'qa', world, 'open_qa', [tmp_path / 'realm']
  )
  assert_equal(params['embedder'], realm['embedder'])
  assert_equal(
      params['span_reader'], _with_bert(fresh['span_reader'], realm['reader'])
  )
  assert said(caplog) == {
      f'embedder from {tmp_path}/realm, step 3.': 'INFO',
      f'span_reader: its BERT from the reader of {tmp_path}/realm, step 3;'
      ' intermediate, norm, output at random.': 'INFO',
  }
  # A span reader is preferred to it.
  caplog.clear()
  both = [tmp_path / 'qa_before', tmp_path / 'realm']
  before = make_source(both[0], world, 4, 'span_reader')
  params, _ = begin(tmp_path / 'again', world, 'open_qa', both)
  assert_equal(params['span_reader'], before['span_reader'])


@pytest.mark.parametrize(
    'objective, given, cold',
    [
        ('realm', 'embedder', {'reader': 'mlm'}),
        ('realm', '', {'embedder': 'ict', 'reader': 'mlm'}),
        ('open_qa', 'embedder', {'span_reader': 'mlm'}),
    ],
)
def test_a_random_component_of_a_search_is_a_warning(
    world, tmp_path, caplog, objective, given, cold
):
  sources = [tmp_path / 'a'] if given else []
  if given:
    make_source(tmp_path / 'a', world, 3, given)
  params, fresh = begin(tmp_path / 'job', world, objective, sources)
  for name in cold:
    assert_equal(params[name], fresh[name])
  warnings = [m for m, level in said(caplog).items() if level == 'WARNING']
  assert warnings == [
      f'{name} is initialised at random (no workdir of config.init_from has'
      f" it). Train the objective '{first}' first, or import a checkpoint"
      ' (docs/learning.md).'
      for name, first in cold.items()
  ]


def test_a_retriever_without_ict_is_a_warning(world, tmp_path, caplog):
  mlm = make_source(tmp_path / 'mlm', world, 3, 'reader')['reader']
  params, fresh = begin(
      tmp_path / 'job', world, 'realm', [tmp_path / 'mlm']
  )
  assert_equal(params['reader'], mlm)
  assert_equal(params['embedder'], _with_bert(fresh['embedder'], mlm))
  assert [*said(caplog).values()] == ['WARNING', 'INFO']
  assert "at random. Train the objective 'ict' first" in caplog.text


@pytest.mark.parametrize('objective', ['mlm', 'ict', 'tagger'])
def test_a_random_component_without_a_search_is_no_warning(
    world, tmp_path, caplog, objective
):
  begin(tmp_path / 'job', world, objective, [])
  (name,) = stages.load(config_lib.Config(objective=objective)).components
  assert said(caplog) == {f'{name} is initialised at random.': 'INFO'}


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """A published BERT as a workdir, and a corpus of its wordpieces."""
  tmp_path = tmp_path_factory.mktemp('imported')
  importing.run([str(_FIXTURES / 'bert')], tmp_path / 'bert')
  lines = [
      {'id': str(i), 'title': 'cat', 'text': f'Who is Bo{i}. A red cat {i}.'}
      for i in range(12)
  ]
  source = tmp_path / 'in.jsonl'
  source.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  prepare.prepare(
      [str(source)], tmp_path / 'corpus', vocab=str(tmp_path / 'bert'),
      max_wordpieces=24, workers=1, progress=False,
  )
  return tmp_path


@pytest.mark.parametrize('towers', _TOWERS)
def test_the_stages_of_the_paper_from_an_imported_bert(
    imported, tmp_path, caplog, towers
):
  """The commands of experiments/realm_base.py."""
  bert, corpus = imported / 'bert', imported / 'corpus'
  model = config_lib.read(bert).model
  parts = {n: components_lib.make(n, model) for n in ('embedder', 'reader')}
  given, _ = checkpoint.load_params(
      bert, {name: part.abstract for name, part in parts.items()}
  )
  values = {
      'lengths__query': 12, 'lengths__document': 24, 'seed': 5,
      'trivial': 'none',  # All sentences are alike.
      **{
          f'model__{field}': getattr(model, field)
          for field in (
              'num_layers', 'width', 'num_heads', 'mlp_width',
              'max_positions', 'activation',
          )
      },
      # They differ from those of the imported BERT, which has no projection.
      'model__embedding_width': 8, 'model__embedding_scale_init': 0.25,
      'model__towers': towers,
  }
  params, fresh = begin(tmp_path / 'ict', corpus, 'ict', [bert], **values)
  for name, value in params['embedder'].items():
    there = name.removeprefix('query_')
    expected = (
        fresh['embedder'] if 'projection' in name else given['embedder']
    )
    np.testing.assert_array_equal(value, expected[there], err_msg=name)
  assert np.all(params['embedder']['projection.norm.scale'] == 0.25)
  ((message, level),) = said(caplog).items()
  assert message.startswith(f'embedder from {bert}, step 0; ')
  assert 'projection.dense, projection.norm' in message and level == 'INFO'
  learned = {n: np.asarray(v) + 1 for n, v in params['embedder'].items()}
  about = checkpoint.saved_about(bert, 0)
  about.pop('at_random')
  checkpoint.save_params(
      tmp_path / 'ict', 7, {'embedder': learned}, about
  )
  # The trained retriever is taken, in either order.
  for sources in ([bert, tmp_path / 'ict'], [tmp_path / 'ict', bert]):
    caplog.clear()
    params, _ = begin(
        tmp_path / f'realm{sources[0].name}', corpus, 'realm', sources,
        **values,
    )
    assert_equal(params['reader'], given['reader'])
    assert_equal(params['embedder'], learned)
    assert said(caplog) == {
        f'embedder from {tmp_path}/ict, step 7.': 'INFO',
        f'reader from {bert}, step 0.': 'INFO',
    }
  # Without ICT the projection is random, which is a warning for REALM.
  caplog.clear()
  begin(tmp_path / 'cold', corpus, 'realm', [bert], **values)
  (warning,) = [m for m, level in said(caplog).items() if level == 'WARNING']
  assert warning.startswith(f'embedder from {bert}, step 0; ')
  assert "at random. Train the objective 'ict' first" in warning
