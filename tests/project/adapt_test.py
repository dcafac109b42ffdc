"""experiments/adapt.py, whole, from a tiny retriever of random weights."""

import importlib.util
import pathlib

import helpers
import numpy as np
import pytest
import training_test

from realm_jax.api import retriever as retriever_lib
from realm_jax.evaluation import evaluate
from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.runtime import metrics

_ROOT = pathlib.Path(__file__).parents[2]
_SOURCE = _ROOT / 'tests/fixtures/retrievers/mean_normalize_prompts'
_NAMES = ('Bo', 'Al', 'Cy', 'Di', 'Ed', 'Jo', 'Lu', 'My')


@pytest.fixture(scope='module')
def adapt():
  path = _ROOT / 'experiments' / 'adapt.py'
  spec = importlib.util.spec_from_file_location('adapt', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def adapted(adapt, tmp_path_factory):
  """The folder with the workdirs of all stages, two steps each."""
  folder = tmp_path_factory.mktemp('adapt')
  importing.run(
      [str(_SOURCE)], folder / 'start', components=['embedder', 'reader']
  )
  texts = (
      f'A cat of {a} is red. The cat is of {b}. Who is the {a} of {b}?'
      for a, b in zip(_NAMES, _NAMES[1:] + _NAMES[:1], strict=True)
  )
  items = [
      {'id': f'{i}', 'title': 'cat', 'text': text}
      for i, text in enumerate(texts)
  ]
  helpers.prepare_corpus(
      helpers.write_records(folder / 'texts.jsonl', items),
      folder / 'corpus',
      vocab=str(folder / 'start'), vocab_size=None, max_wordpieces=14,
  )
  for stage, parents in (('mlm', ['start']), ('realm', ['start', 'mlm'])):
    config = adapt.get_config(stage)
    config.corpus = str(folder / 'corpus')
    config.init_from = ','.join(str(folder / parent) for parent in parents)
    # The model has 32 positions.
    config.lengths.query, config.lengths.document = 15, 17
    config.steps, config.batch_size, config.log_interval = 2, 4, 1
    config.refresh.interval, config.refresh.policy = 1, 'sync'
    config.optimizer.warmup_steps, config.gates.interval = 1, 0
    training_test.run(config, folder / stage)
  return folder


def test_the_retriever_learns_and_is_exported(adapted):
  lines = metrics.read_metrics(adapted / 'realm')
  assert [line['refresh/generation'] for line in lines] == [0.0, 1.0]
  (exported,) = export.run(
      adapted / 'realm', 'sentence-transformers', adapted / 'model'
  )
  start, trained, again = (
      retriever_lib.Retriever.load(folder).embed_queries(['who is Bo'])[0]
      for folder in (adapted / 'start', adapted / 'realm', exported)
  )
  # The scale of the scores is that of the job, 20 times the cosine.
  np.testing.assert_allclose(trained, 20 * again, atol=1e-5)
  assert 0.9 < start @ again < 1 - 1e-7


def test_it_is_compared_with_its_start_and_bm25(adapted):
  pytest.importorskip('bm25s')
  questions = helpers.write_records(
      adapted / 'questions.jsonl',
      [{'question': 'who is Bo', 'answers': ['Al'], 'passage_id': '0'}],
  )
  results = evaluate.evaluate(
      adapted / 'realm', questions, '0,2', bm25=True, limit=4
  )
  assert [result['step'] for result in results] == [0, 2]
  assert 'bm25' in results[-1]['baselines']
