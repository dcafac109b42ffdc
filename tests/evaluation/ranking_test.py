"""Ranked passages against metrics worked out by hand."""

import numpy as np
import pytest

from realm_jax.evaluation import metrics

_DOC_IDS_BK = np.array([[7, 3, 5], [1, 2, 0], [4, 6, 8], [9, 0, 1]])


def test_gold_ranks():
  ranks = metrics.gold_ranks(_DOC_IDS_BK, [[3], [5], [8, 6], []])
  np.testing.assert_array_equal(ranks, [2, 0, 2, 0])


def test_answer_ranks_look_at_texts_with_the_questions_own_matcher():
  texts = {i: f'passage {i}' for i in range(10)} | {5: 'the U.S.A. won'}
  asked = []

  def text_of(row):
    asked.append(row)
    return texts[row]

  ranks = metrics.answer_ranks(
      _DOC_IDS_BK,
      [['USA'], ['age 2'], ['passage .*8$'], ['9', 'passage 1']],
      ['string', 'string', 'regex', 'string'],
      text_of,
  )
  np.testing.assert_array_equal(ranks, [3, 0, 3, 1])
  assert 0 in asked and asked.count(9) == 1  # Nothing is read after a hit.


def test_summarize():
  found = metrics.ranking(
      np.array([1, 2, 0, 10, 6]), depth=10, num_documents=1000
  )
  assert found == {
      'recall_at_1': pytest.approx(1 / 5),
      'recall_at_5': pytest.approx(2 / 5),
      'mrr': pytest.approx((1 + 1 / 2 + 0 + 1 / 10 + 1 / 6) / 5),
  }


def test_a_small_corpus_has_every_cutoff():
  found = metrics.ranking(np.array([3, 0]), depth=4, num_documents=4)
  assert found['recall_at_1'] == 0.0
  assert found['recall_at_5'] == 0.5
  assert found['recall_at_100'] == 0.5


def test_random_ranks_agree_with_counting():
  rng = np.random.default_rng(0)
  doc_ids_BK = np.stack([rng.permutation(50)[:20] for _ in range(40)])
  gold = rng.integers(0, 50, 40)
  ranks = metrics.gold_ranks(doc_ids_BK, [[g] for g in gold])
  found = metrics.ranking(ranks, 20, 50)
  for k in (1, 5, 20):
    hits = [g in row[:k] for g, row in zip(gold, doc_ids_BK, strict=True)]
    assert found[f'recall_at_{k}'] == pytest.approx(np.mean(hits))


def test_ndcg_of_graded_passages():
  discount = 1 / np.log2(np.arange(2, 12))
  found = metrics.ndcg(
      _DOC_IDS_BK,
      [np.array([3, 7]), np.array([2]), np.array([5]), np.array([], int)],
      [np.array([3, 1]), np.array([1]), np.array([2]), np.array([], int)],
      [[], [2], [], []],
  )
  first = (1 * discount[0] + 3 * discount[1]) / (3 * discount[0] + discount[1])
  second = discount[1] / (2 * discount[0] + discount[1])
  np.testing.assert_allclose(found, [first, second, 0, 0])
