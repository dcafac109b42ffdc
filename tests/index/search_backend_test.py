"""A search backend of the user: `config.mips.backend=package.module:Name`."""

import importlib
import sys

import numpy as np
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.evaluation import evaluate
from realm_jax.index import generation
from realm_jax.index import search as search_lib
from realm_jax.planner import plan
from realm_jax.runtime import files

_MODULE = '''
import json
import numpy as np
from realm_jax.index import search

class Brute(search.Search):
  """Brute force in numpy; saves a factor, which scales all scores."""
  exact = False
  folder = 'brute'
  saved_settings = ('scale',)
  calls = []

  @classmethod
  def build(cls, embeddings_NE, config, mesh, removed):
    cls.calls.append('build')
    made = cls(embeddings_NE, removed)
    made.scale = config.options['scale']
    return made

  @classmethod
  def load(cls, folder, embeddings_NE, config, mesh, removed):
    cls.calls.append('load')
    made = cls(embeddings_NE, removed)
    made.scale = json.loads((folder / 'scale.json').read_text())
    return made

  def save(self, folder):
    (folder / 'scale.json').write_text(json.dumps(self.scale))

  @classmethod
  def row_bytes(cls, config, width):
    return search.RowBytes(host=4.0 * width, saved=1000.0)

  def search(self, query_emb_BE, k, exclude_BR2=None):
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)
    table = np.asarray(self._table_NE[:], np.float32)
    score_BN = self.scale * np.asarray(query_emb_BE) @ table.T
    row_N = np.arange(len(table))
    for start_B, limit_B in exclude_BR2.transpose(1, 2, 0):
      hidden = (row_N >= start_B[:, None]) & (row_N < limit_B[:, None])
      score_BN[hidden] = -np.inf
    score_BN[:, self._removed] = -np.inf
    order = np.argsort(-score_BN, axis=1, kind='stable')
    return order[:, :k].astype(np.int32)
'''


@pytest.fixture
def brute(tmp_path, monkeypatch):
  """The class of a module that only the user has."""
  folder = tmp_path / 'modules'
  folder.mkdir()
  (folder / 'my_backend.py').write_text(_MODULE)
  monkeypatch.syspath_prepend(folder)
  yield importlib.import_module('my_backend').Brute
  del sys.modules['my_backend']


_NAME = 'my_backend:Brute'


def test_a_backend_of_the_user_trains_evaluates_and_plans(
    world, tmp_path, brute
):
  workdir = tmp_path / 'job'
  config = training_test.make_config(
      world, 'realm', steps=6, refresh__policy='sync', mips__backend=_NAME,
      mips__options={'scale': 2.0},
  )
  summary = training_test.run(config, workdir)
  assert summary['step'] == 6 and summary['index_generation'] == 4
  # The builder builds each generation, the trainer loads what it saved.
  assert brute.calls == ['build', 'load'] * 2
  manifest = generation.read_manifest(workdir / 'index' / '4')
  assert manifest['mips'] == {'backend': _NAME, 'scale': 2.0}
  assert manifest['recall']['value'] == 1
  assert manifest['files'][-1]['name'] == 'brute/scale.json'
  # The same search by the built-in backend learns the same.
  exact = training_test.make_config(
      world, 'realm', steps=6, refresh__policy='sync'
  )
  assert (
      training_test.run(exact, tmp_path / 'exact')['params_sha256']
      == summary['params_sha256']
  )
  (result,) = evaluate.evaluate(workdir, limit=20)
  assert 0 <= result['masked']['accuracy_with_retrieval'] <= 1
  loaded = generation.load(workdir / 'index' / '4')
  other = config_lib.MipsConfig(backend=_NAME, options={'scale': 3.0})
  brute.calls.clear()
  for mips in (config.mips, other):
    loaded.make_search(mips, None)
  assert brute.calls == ['load', 'build']


def test_the_planner_asks_the_backend_for_its_memory(world, brute):
  config = training_test.make_config(
      world, 'realm', mips__backend=_NAME, model__vocab_size=200
  )
  setting = plan.Setting(10**6, 30.0, plan.CHIPS['h100'])
  ours = plan.plan(config, setting)
  assert 'two_index_tables_gb' not in ours['device_memory']
  assert ours['host_memory']['two_brute_indexes_gb'] == pytest.approx(
      2 * 4 * 16 * 10**6 / 1e9
  )
  config.mips.backend = 'exact'
  exact = plan.plan(config, setting)
  assert ours['disk']['generation_gb'] == pytest.approx(
      exact['disk']['generation_gb'] + 1
  )


def test_names_that_are_no_backend_are_refused(world, brute):
  config = training_test.make_config(world, 'realm', mips__backend='faiss')
  with pytest.raises(ValueError, match="'scann'.*package.module:Name"):
    config_lib.validate(config)
  table = np.ones((3, 2), np.float32)
  for name, message in [
      ('faiss', "one of 'exact', 'approx', 'scann'"),
      ('no_such_module:Name', 'cannot be imported'),
      ('my_backend:Other', "has no 'Other'"),
      ('my_backend:json', 'subclass of realm_jax.index.search.Search'),
  ]:
    with pytest.raises(ValueError, match=message):
      search_lib.make_search(config_lib.MipsConfig(backend=name), table)


def test_an_unknown_backend_fails_before_a_build(world, tmp_path):
  config = training_test.make_config(world, 'ict', steps=1)
  training_test.run(config, tmp_path)
  config = config_lib.read(tmp_path)
  config.mips.backend = 'no_such_module:Name'
  files.write_json(tmp_path / 'config.json', config_lib.to_dict(config))
  with pytest.raises(ValueError, match='no_such_module.*cannot be imported'):
    builder.build(tmp_path)
  assert not list((tmp_path / 'index').glob('.building-*'))


def test_options_identify_a_config_only_if_there_are_any(world):
  config = training_test.make_config(world, 'realm')
  assert not any('options' in name for name in config_lib.identity(config))
  other = training_test.make_config(
      world, 'realm', mips__options={'scale': 2.0}
  )
  assert config_lib.digest(config) != config_lib.digest(other)
  for ours, theirs in ((config, other), (other, config)):
    assert ['mips.options' in line for line in config_lib.differences(
        ours, theirs
    )] == [True]
