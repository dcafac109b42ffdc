"""Own passages of held-out sentences, from an untrained model."""

import helpers
import numpy as np
import pytest
import retrieval_test

from realm_jax.builder import documents
from realm_jax.corpus import inputs
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import metrics
from realm_jax.evaluation import report
from realm_jax.inference import trained as trained_lib

_TOWNS = ('Oslo', 'Rome', 'Lima', 'Kyiv', 'Bonn', 'Cork', 'Nice', 'York')
_RECORDS = [
    {
        'id': f'{town}#{part}',
        'title': town,
        'sentences': [
            f'{town} had {part + 2} mayors in {1900 + 7 * i + part} .',
            f'The river of {_TOWNS[(i + part + 1) % 8]} is long .',
        ],
        'split': 'validation' if i % 2 else 'train',
    }
    for i, town in enumerate(_TOWNS)
    for part in range(3)
]
_HELD_OUT = [record for record in _RECORDS if record['split'] == 'validation']


def _prepare(folder, records):
  source = helpers.write_records(
      folder / 'source.jsonl',
      [{**r, 'text': ' '.join(r['sentences'])} for r in records],
  )
  return helpers.prepare_corpus(source, folder / 'corpus')


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  return _prepare(tmp_path_factory.mktemp('cloze'), _RECORDS)


def _workdir(path, corpus, sharpen=4.0, prefix=''):
  config = retrieval_test._config(corpus, 'ict')
  config.model.query_prefix = prefix
  params = retrieval_test._params(config, sharpen=sharpen)
  return retrieval_test._make_workdir(path, corpus, config, {7: params})


def _ranks(trained, params, cut):
  """Ranks by hand: each sentence against all passages, its own one changed."""
  embed = trained.embed_passages
  whole_NE = embed(
      params, [(r['title'], ' '.join(r['sentences'])) for r in _RECORDS]
  )
  ranks = []
  for row, record in enumerate(_RECORDS):
    if record['split'] == 'train':
      continue
    for i, sentence in enumerate(record['sentences']):
      query_1Q = inputs.encode_queries(
          [sentence], trained.template.text_length, trained.tokenizer
      )
      query_emb_E = trained.embed_queries(params, query_1Q)[0]
      scores_N = whole_NE @ query_emb_E
      if cut:
        rest = record['sentences'][1 - i]
        changed_1E = embed(params, [(record['title'], rest)])
        scores_N[row] = changed_1E[0] @ query_emb_E
      ranks.append(1 + int((scores_N > scores_N[row]).sum()))
  return np.array(ranks)


@pytest.mark.parametrize('prefix', ['', 'find: '])
def test_ranks_equal_those_by_hand(tmp_path, corpus, prefix, monkeypatch):
  workdir = _workdir(tmp_path / 'job', corpus, prefix=prefix)
  (result,) = evaluate.evaluate(workdir)
  found = result['held_out_sentences']
  assert found['sentences'] == 2 * len(_HELD_OUT) == 24
  assert found['clusters'] == 4
  trained = trained_lib.Trained.open(workdir)
  params = trained.load(7)
  ranks = {
      'cut_out': _ranks(trained, params, cut=True),
      'whole': _ranks(trained, params, cut=False),
  }
  for name, rank_B in ranks.items():
    assert 1 < rank_B.max() <= 24
    assert found[name]['mrr'] == pytest.approx((1 / rank_B).mean())
    for depth in (1, 5, 20):
      assert found[name][f'recall_at_{depth}'] == pytest.approx(
          (rank_B <= depth).mean()
      )
    assert found[name]['recall_at_100'] == 1.0  # All were retrieved.
  # Beyond the last cutoff nothing is found, even if the whole passage is.
  assert ((ranks['whole'] <= 10) & (ranks['cut_out'] > 10)).any()
  monkeypatch.setattr(metrics, 'CUTOFFS', (10,))
  (result,) = evaluate.evaluate(workdir)
  for name, rank_B in ranks.items():
    among = rank_B <= 10
    assert result['held_out_sentences'][name] == pytest.approx(
        {'recall_at_10': among.mean(), 'mrr': (among / rank_B).mean()}
    )


def test_a_retriever_that_embeds_all_alike_finds_nothing(tmp_path, corpus):
  (result,) = evaluate.evaluate(_workdir(tmp_path / 'job', corpus, sharpen=0))
  for name in ('cut_out', 'whole'):
    assert result['held_out_sentences'][name]['recall_at_20'] == 0.0


def test_a_limit_and_the_report(tmp_path, corpus):
  workdir = _workdir(tmp_path / 'job', corpus)
  results = evaluate.evaluate(workdir, limit=9)
  assert results[0]['held_out_sentences']['sentences'] == 9
  tables = report.tables(results)
  rows = tables['Own passages retrieved for sentences held out, in per cent']
  assert [row[1] for row in rows[1:]] == ['without the sentence', 'whole']
  mrr = 100 * results[0]['held_out_sentences']['whole']['mrr']
  assert rows[2][-1] == f'{mrr:.1f}'


def test_articles_that_lost_a_passage_are_left_out(tmp_path, corpus):
  workdir = _workdir(tmp_path / 'job', corpus)
  trained = trained_lib.Trained.open(workdir)
  retrieval_test.publish(workdir, trained.config, corpus, trained.load(7), 7)
  gone = [{'id': 'Rome#1'}, {'id': 'Oslo#0'}]  # Held out, and not.
  documents.delete(
      workdir, helpers.write_records(tmp_path / 'gone.jsonl', gone)
  )
  (result,) = evaluate.evaluate(workdir)
  assert result['passages'] == len(_RECORDS) - 2
  assert result['held_out_sentences']['sentences'] == 2 * (len(_HELD_OUT) - 3)
  assert result['held_out_sentences']['clusters'] == 3


def test_without_sentences_of_passages_nothing_is_measured(tmp_path):
  made = _prepare(
      tmp_path, [{**record, 'split': 'train'} for record in _RECORDS]
  )
  assert 'validation' not in made.sentences
  with pytest.raises(ValueError, match='sentences of the passages in'):
    evaluate.evaluate(_workdir(tmp_path / 'job', made))
