"""The tables of docs/architecture.md: which files a step and a build run.

The files are those whose functions are entered while a REALM step (batch,
retrieval, update) and an index build run. Those of a step are all listed, in
two tables; those of a build without the services that it shares with a step.
"""

import pathlib
import re
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_test

import realm_jax
from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import examples
from realm_jax.trainer import loop
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib

_PACKAGE = pathlib.Path(realm_jax.__file__).parent
_PAGE = _PACKAGE.parent / 'docs' / 'architecture.md'
# Files behind a call of one line: search, tables, devices, settings.
_SERVICES = ('runtime/', 'index/', 'config/', 'corpus/corpus.py',
             'corpus/exclusion.py', 'corpus/tokenizer.py', 'corpus/trivial.py')


def _entered(run):
  """Returns the files of the package whose functions `run` enters."""
  found = set()

  def profile(frame, event, argument):
    del argument
    if event == 'call':
      found.add(frame.f_code.co_filename)

  threading.setprofile(profile)
  sys.setprofile(profile)
  try:
    run()
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
  prefix = f'{_PACKAGE}/'
  return {name.removeprefix(prefix) for name in found if prefix in name}


@pytest.fixture(scope='module')
def config(world):
  config = config_lib.resolve(training_test.make_config(world, 'realm'))
  corpus = corpus_lib.Corpus.open(world)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  return config


@pytest.fixture(scope='module')
def of_a_step(world, config):
  corpus = corpus_lib.Corpus.open(world)
  components = stages.components_of(config)
  params = {name: c.init(0) for name, c in components.items()}
  tx = optimizer.make_optimizer(config, tuple(components))
  state = step_lib.TrainState(
      jnp.int32(0), params, tx.init(params), jax.random.key(0)
  )
  mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )
  emb_NE = np.random.default_rng(0).normal(
      size=(len(corpus.passages), config.model.embedding_width)
  )

  class Index:
    embeddings = emb_NE.astype(np.float32)
    search = search_lib.ExactSearch(embeddings)

  def run():
    stage = stages.load(config)(config, corpus)
    retriever = stages.Retriever(
        components['embedder'],
        mesh,
        Index(),
        np.arange(config.batch_size),
        stage.template,
    )
    retriever.params = params['embedder']
    train_step = step_lib.make_train_step(stage, components, tx, mesh)
    queries = next(examples.training_batches(stage)).inputs
    batch = stage.retrieve(queries, retriever)
    rates = optimizer.learning_rates(config, components, 0)
    train_step(state, mesh_lib.to_devices(mesh, batch), rates)

  # The loop, whose order `run` repeats, cannot be run for one step.
  return _entered(run) | {loop.__file__.removeprefix(f'{_PACKAGE}/')}


@pytest.fixture(scope='module')
def of_a_build(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('build')
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  embedder = stages.components_of(config)['embedder']
  checkpoint.save_snapshot(workdir, 0, embedder.init(0))
  return _entered(lambda: builder.build(workdir))


def _lines(name):
  return len((_PACKAGE / name).read_text(encoding='utf-8').splitlines())


def _table(title):
  """Returns {file: lines} of the tables under a title of the page."""
  text = _PAGE.read_text(encoding='utf-8').split(f'## {title}\n')[1]
  text = text.split('\n## ')[0]
  rows = re.findall(r'^\| `([\w/]+\.py)` \| (\d+) \|', text, re.MULTILINE)
  return {name: int(lines) for name, lines in rows}


def _check(found, table):
  assert found == set(table), 'The table lists other files than are run.'
  for name, lines in table.items():
    assert abs(lines - _lines(name)) <= 20, (name, _lines(name))


def test_a_realm_step(of_a_step, capsys):
  _check(of_a_step, _table('A REALM step, in the order of reading'))
  own = {n for n in of_a_step if not n.startswith(_SERVICES)}
  for title, names in (('A REALM step', own), ('all of it', of_a_step)):
    with capsys.disabled():
      print(f'\n{title}: {len(names)} files, {sum(map(_lines, names))} lines')
  assert len(own) <= 14
  assert sum(map(_lines, own)) <= 2850


def test_the_index_builder(of_a_build, capsys):
  own = {
      name
      for name in of_a_build
      if name.startswith(('builder/', 'index/embedding', 'index/generation'))
  }
  _check(own, _table('The index builder'))
  with capsys.disabled():
    print(f'\nThe builder: {len(own)} files, {sum(map(_lines, own))} lines')
  assert len(own) <= 3
  assert sum(map(_lines, own)) <= 1200


def test_the_size_of_the_package(capsys):
  paths = [p for p in _PACKAGE.rglob('*.py') if p.stat().st_size]
  lines = {str(p): _lines(p.relative_to(_PACKAGE)) for p in paths}
  with capsys.disabled():
    print(f'\nrealm_jax: {len(paths)} files, {sum(lines.values())} lines')
  assert max(lines.values()) <= 480
