"""The quickstart's stages and its report, without running it."""

import importlib.util
import json
import pathlib

import helpers
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.evaluation import report
from realm_jax.trainer import examples as examples_lib

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def quickstart():
  path = _ROOT / 'experiments' / 'quickstart.py'
  spec = importlib.util.spec_from_file_location('quickstart', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_null_reader_is_trained_as_realm_is(quickstart, world):
  realm = quickstart.get_config('realm')
  null_reader = quickstart.get_config('null_reader')
  for name in ('steps', 'batch_size', 'model', 'optimizer', 'masking', 'seed'):
    assert getattr(null_reader, name) == getattr(realm, name), name
  assert null_reader.lengths.query == realm.lengths.query
  assert null_reader.lengths.masks == realm.lengths.masks
  corpus = corpus_lib.Corpus.open(world)
  sentences = corpus.sentences[examples_lib.sentences_of(corpus, realm)]
  batch = next(helpers.batches(corpus, null_reader))
  # [CLS] sentence [SEP] [SEP]: nothing of a passage.
  assert (
      (batch.inputs.joint_ids_BT != corpus.tokenizer.pad_id).sum(axis=1)
      == sentences.lengths[batch.row_B] + 3
  ).all()


def test_the_null_reader_is_not_warned_of_passages_that_it_never_reads(
    quickstart, world, caplog
):
  config = quickstart.get_config('null_reader')
  corpus = corpus_lib.Corpus.open(world)
  cuts.warn_of_passages(corpus, config)
  assert not caplog.records
  config.mlm.null_rate = 0.5
  cuts.warn_of_passages(corpus, config)
  assert 'what is beyond is not seen' in caplog.text


def test_the_report_has_both_readers_without_retrieval(quickstart, tmp_path):
  jobs = {stage: tmp_path / stage for stage in quickstart.STAGES}
  recall = {'recall_at_1': 0.5, 'recall_at_5': 0.75}
  group = {
      'gold': recall,
      'open_qa': {'exact_match': 0.5, 'exact_match_random_passages': 0.25},
  }
  result = {
      'step': 5,
      'passages': 9,
      'questions': {'held_out': group, 'seen': group},
      'masked': {
          'accuracy_with_retrieval': 0.9, 'accuracy_without_retrieval': 0.1,
      },
  }
  for stage in ('ict', 'realm', 'open_qa'):
    report.save(jobs[stage], result)
  report.save(
      jobs['null_reader'],
      {'step': 5, 'masked': {'accuracy_without_retrieval': 0.2}},
  )
  line = {'step': 5, 'refresh/adopted': 3, 'refresh/age_steps': 7}
  (jobs['realm'] / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  found = quickstart._report(jobs, 1.0)
  assert found['masked_accuracy'] == {
      'with_retrieval': 0.9, 'without_retrieval': 0.1, 'null_reader': 0.2,
  }
  assert {'seconds', 'passages', 'refreshes', 'max_staleness_steps',
          'recall_at_1', 'recall_at_5', 'recall_at_5_seen'} <= set(found)
  lines = quickstart._table(found).splitlines()
  (row,) = [
      number for number, line in enumerate(lines)
      if 'masked spans filled in' in line
  ]
  cells = [[c.strip() for c in lines[i].strip('|').split('|')]
           for i in (row, row + 2)]
  assert dict(zip(*cells, strict=True)) == {
      'masked spans filled in': 'held-out facts',
      'with retrieval': '0.900',
      'the same reader, null document': '0.100',
      'a reader trained on the null document alone': '0.200',
  }
