"""A trained workdir whose documents change: helpers and fixtures."""

import json
import shutil

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.api import retriever
from realm_jax.builder import builder
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.qa import question_sets
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.trainer import stages

LONG = ' '.join(
    f'In {1900 + i} the lamp of Bremen number {i} was lit by Ada Brown.'
    for i in range(40)
)


def make_config(corpus, objective='realm'):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.num_candidates = 4
  config.model.preset, config.model.num_layers = 'tiny', 1
  config.model.width, config.model.num_heads = 32, 2
  config.model.embedding_width = 16
  config.model.max_positions = 160
  config.lengths.query, config.lengths.document = 24, 64
  config.lengths.masks = 4
  config = config_lib.resolve(config)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  return config


def make_params(config, seed):
  """Fresh parameters, with embeddings that tell passages apart."""
  return {
      name: {
          key: np.asarray(value) * (4 if key.endswith('kernel') else 1)
          for key, value in component.init(seed).items()
      }
      for name, component in stages.components_of(config).items()
  }


def make_workdir(path, corpus, params, step=10, **changes):
  """A trained workdir, with an index of its newest snapshot."""
  config = make_config(corpus)
  for name, value in changes.items():
    setattr(config.mips, name, value)
  files.write_json(path / 'config.json', config_lib.to_dict(config))
  train(path, corpus, params, step)
  return path


def train(path, corpus, params, step):
  """Imitates training up to a step, and a build from its snapshot."""
  about = {
      'config_digest': '',
      'corpus_fingerprint': corpus.fingerprint,
      'tokenizer_digest': corpus.tokenizer.digest,
      'index_generation': step,
  }
  checkpoint.save_params(path, step, jax.device_put(params), about)
  checkpoint.save_snapshot(path, step, params['embedder'])
  builder.build(path)


def write(path, records):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return str(path)


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


@pytest.fixture(scope='module')
def params(corpus):
  config = make_config(corpus)
  return [make_params(config, seed) for seed in (0, 1)]


@pytest.fixture(scope='module')
def _original(tmp_path_factory, corpus, params):
  path = tmp_path_factory.mktemp('original') / 'job'
  return make_workdir(path, corpus, params[0])


@pytest.fixture
def workdir(tmp_path, _original):
  return shutil.copytree(_original, tmp_path / 'job')


@pytest.fixture(scope='module')
def queries(world):
  questions = question_sets.read(world / 'questions.jsonl')
  return [q.question for q in questions[:20]] + ['who lit the lamp', 'zeppelin']


def find(workdir, queries, k=None):
  """Ids and scores of what a search finds, by default of all documents."""
  loaded = retriever.Retriever.load(workdir)
  hits = loaded.search(queries, k or loaded.corpus.num_live)
  ids = [[loaded.passage(row)['id'] for row in rows] for rows in hits.rows]
  return ids, hits.scores


def open_documents(workdir):
  config = config_lib.resolve(config_lib.read(workdir))
  return document_store.Documents.open(workdir, config)
