"""The config tree: validation, JSON, identity."""

import copy
import importlib.util
import json
import pathlib

import pytest

from realm_jax import config as config_lib
from realm_jax.trainer import job
from realm_jax.trainer import stages

_ROOT = pathlib.Path(__file__).parents[2]


def _config(**values):
  config = config_lib.Config(corpus='somewhere')
  for name, value in values.items():
    *sections, field = name.split('__')
    owner = config
    for section in sections:
      owner = getattr(owner, section)
    setattr(owner, field, value)
  return config


def test_the_defaults_are_valid_except_for_the_corpus():
  config_lib.validate(_config())
  with pytest.raises(ValueError, match=r"config\.corpus=''"):
    config_lib.validate(config_lib.Config())


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'batch_size': 0}, r'config\.batch_size=0: must be at least 1'),
        ({'batch_size': '8'}, r"config\.batch_size='8': must be of type int"),
        ({'batch_size': True}, r'batch_size=True: must be of type int'),
        ({'seed': -1}, r'config\.seed=-1'),
        ({'objective': 'bert'}, r"config\.objective='bert': must be one of"),
        ({'num_candidates': 1}, r'counts the null document'),
        ({'model__num_heads': 7}, r'must divide the width, 768'),
        ({'model__dropout': 1.5}, r'config\.model\.dropout=1\.5'),
        ({'model__dropout': 'no'}, r"model\.dropout='no': must be a number"),
        ({'lengths__document': 500}, r'longest input, 596 wordpieces'),
        ({'refresh__lag': 251}, r'between 1 and refresh\.interval \(250\)'),
        ({'refresh__lag': 0}, r'config\.refresh\.lag=0'),
        ({'optimizer__frozen': ('tagger',)}, r"\('embedder', 'reader'\)"),
        (
            {'optimizer__frozen': ('embedder.query_encoder',)},
            r'no parameter is named embedder\.query_encoder\.\*; .*the parts'
            r' embedder\.encoder, embedder\.projection, reader\.bert, ',
        ),
        ({'optimizer__frozen': ('embedder', 'reader.')}, 'is named reader'),
        ({'optimizer__frozen': 'embedder'}, r'must be a tuple of strings'),
        ({'optimizer__frozen': ('embedder', 'reader')}, r'nothing to learn'),
        ({'model__num_layers': -1}, r'model\.num_layers=-1: must not be neg'),
        ({'model__max_span_width': 0}, r'must be at least 1'),
        ({'optimizer__b1': 1.5}, r'must be between 0 and 1'),
        ({'optimizer__clip_norm': 0.0}, r'clip_norm=0\.0: must be more than 0'),
        ({'lengths__masks': 95}, r'more than a query of 96 wordpieces'),
        ({'log_to': 'jsonl,wnadb'}, r"'wnadb' is none of jsonl, tensorboard"),
        ({'stesp': 3}, r'config\.stesp: .*; did you mean config\.steps\?'),
        ({'refresh__intervall': 3}, r'did you mean config\.refresh\.interval'),
        ({'refresh': 'sync'}, r"refresh='sync': must be of type RefreshConfig"),
        ({'mesh__data': -1, 'mesh__model': -1}, r'at most one may be -1'),
    ],
)
def test_a_wrong_field_is_named(values, message):
  with pytest.raises(ValueError, match=message):
    job.validate(_config(**values))


def test_an_object_of_another_type_is_refused():
  with pytest.raises(ValueError, match=r"returns dict: \{'steps': 3\}"):
    config_lib.validate({'steps': 3})


def test_all_wrong_fields_are_named_at_once():
  with pytest.raises(ValueError) as error:
    config_lib.validate(_config(batch_size=0, num_candidates=0))
  assert 'batch_size=0' in str(error.value)
  assert 'num_candidates=0' in str(error.value)


def test_json_round_trip():
  config = _config(optimizer__frozen=('embedder',), model__preset='mini')
  text = json.dumps(config_lib.to_dict(config))
  assert config_lib.from_dict(json.loads(text)) == config


def test_an_older_config_keeps_what_it_was_trained_with():
  """Fields newer than the config take a value that preserves its result."""
  values = config_lib.to_dict(_config(refresh__interval=500, refresh__lag=500))
  older = copy.deepcopy(values)
  del older['mlm']['null_rate']
  read = config_lib.from_dict(older)
  assert (read.refresh.interval, read.refresh.lag) == (500, 500)
  assert config_lib.digest(read) == config_lib.digest(
      config_lib.from_dict(values)
  )
  # An experiment file that relies on the new defaults is another job.
  assert config_lib.differences(_config(), read) == [
      'config.refresh.interval: 500 there, 250 here',
      'config.refresh.lag: 500 there, 250 here',
  ]


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'batchsize': 3}, 'has no field batchsize; it has .*batch_size'),
        ({'refresh': {'lags': 3}}, r'config\.refresh has no field lags'),
        ({'refresh': 3}, r'config\.refresh must be an object of fields, not 3'),
    ],
)
def test_unknown_fields_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    config_lib.from_dict(values)


def test_resolve_sets_derived_defaults_only():
  config = _config(model__preset='mini', model__num_heads=8, steps=1000)
  resolved = config_lib.resolve(config)
  model = resolved.model
  assert (model.num_layers, model.width, model.num_heads) == (4, 256, 8)
  assert model.mlp_width == 1024
  assert resolved.optimizer.warmup_steps == 100
  assert resolved.optimizer.retriever_learning_rate == 3e-5
  assert config.model.width == 0  # The original is unchanged.
  assert config_lib.resolve(resolved) == resolved


def test_the_digest_covers_fields_that_determine_the_result():
  base = config_lib.digest(_config())
  for same in ({'log_interval': 3}, {'checkpoint__keep': 9}, {'mesh__data': 4},
               {'corpus': 'moved'}, {'refresh__timeout': 1.0},
               {'log_to': 'wandb'}):
    assert config_lib.digest(_config(**same)) == base
  for other in ({'seed': 1}, {'steps': 3}, {'refresh__lag': 3},
                {'model__preset': 'tiny'}, {'trivial': 'none'}):
    assert config_lib.digest(_config(**other)) != base
    found = config_lib.differences(_config(**other), _config())
    assert len(found) >= 1
    assert all('there' in line and 'here' in line for line in found)


def test_reading_a_folder_that_is_no_workdir(tmp_path):
  with pytest.raises(FileNotFoundError, match='is not a workdir'):
    config_lib.read(tmp_path)
  (tmp_path / 'config.json').write_text('{"steps": ')
  with pytest.raises(ValueError, match=r'config\.json'):
    config_lib.read(tmp_path)


@pytest.mark.parametrize('path', sorted((_ROOT / 'experiments').glob('*.py')))
def test_every_experiment_is_a_valid_config(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for stage in module.STAGES:
    config = module.get_config(stage)
    config.corpus = config.open_qa.questions = 'somewhere'
    config.tagger.files = 'somewhere'
    job.validate(config)
    assert stage not in stages.STAGES or config.objective == stage
  with pytest.raises(ValueError, match='nonsense'):
    module.get_config('nonsense')


@pytest.mark.parametrize(
    ('objective', 'digest'),
    [
        ('mlm', '8ba0f2f6afcdf2fc'),
        ('ict', '40ab28eb44d06573'),
        ('realm', '74e9b3a61e4feca1'),
        ('open_qa', 'df2a53e5bd36a9c6'),
        ('tagger', 'a5859a48ac1da0cc'),
    ],
)
def test_a_new_field_leaves_the_identity_of_older_jobs(objective, digest):
  """Else no workdir of an older version can be resumed."""
  found = config_lib.digest(_config(objective=objective))
  assert found.startswith(digest)
