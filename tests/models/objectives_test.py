"""The losses against enumeration; masks and ties that must not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.models import objectives
from realm_jax.trainer.stages import mlm


def _random(seed, b=5, k=4, m=3):
  rng = np.random.default_rng(seed)
  score = rng.normal(size=(b, k)) * 3
  token_logp = np.log(rng.uniform(0.01, 1, size=(b, k, m)))
  mask = rng.random((b, m)) < 0.6
  mask[0] = False  # An example without a single mask.
  mask[1] = True
  return score, token_logp, mask


def _enumerate(score, token_logp, mask, granularity):
  """The definition, term by term, in float64 and in probabilities."""
  total, count = 0.0, 0
  for s, logp, chosen in zip(score, token_logp, mask, strict=True):
    p_doc = np.exp(s) / np.exp(s).sum()
    p_token = np.exp(logp)
    if granularity == 'span' and chosen.any():
      p = sum(
          p_doc[k] * np.prod(p_token[k][chosen]) for k in range(len(p_doc))
      )
      total, count = total + np.log(p), count + 1
    elif granularity == 'token':
      for j in np.flatnonzero(chosen):
        total += np.log(sum(p_doc * p_token[:, j]))
        count += 1
  return -total / count


@pytest.mark.parametrize('granularity', ['span', 'token'])
@pytest.mark.parametrize('seed', range(3))
def test_marginal_mlm_equals_enumeration(granularity, seed):
  score, token_logp, mask = _random(seed)
  loss, _ = objectives.marginal_mlm(score, token_logp, mask, granularity)
  expected = _enumerate(score, token_logp, mask, granularity)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_marginal_mlm_worked_example():
  # By hand: two documents, three masks, one of them unused.
  score = np.array([[0.0, 1.0], [2.0, 0.0]])
  gold = np.array([
      [[0.2, 0.5, 0.9], [0.8, 0.4, 0.1]],
      [[0.5, 0.5, 0.5], [0.25, 0.125, 0.5]],
  ])
  mask = np.array([[1, 1, 0], [1, 0, 0]])
  by_span, _ = objectives.marginal_mlm(score, np.log(gold), mask, 'span')
  by_token, _ = objectives.marginal_mlm(score, np.log(gold), mask, 'token')
  np.testing.assert_allclose(by_span, 1.0492370, rtol=1e-6)
  np.testing.assert_allclose(by_token, 0.6847466, rtol=1e-6)


def test_gradient_of_a_score_is_the_posterior_surprise():
  score, token_logp, _ = _random(0)
  mask = np.ones((5, 3), bool)
  grad = jax.grad(
      lambda s: objectives.marginal_mlm(s, token_logp, mask)[0]
  )(jnp.asarray(score))
  p_doc = np.exp(score) / np.exp(score).sum(1, keepdims=True)
  p_y_given_doc = np.exp(token_logp.sum(-1))
  p_y = (p_doc * p_y_given_doc).sum(1, keepdims=True)
  expected = -p_doc * (p_y_given_doc / p_y - 1) / len(score)
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('granularity', ['span', 'token'])
def test_no_mask_anywhere_is_zero_and_not_nan(granularity):
  score, token_logp, mask = _random(0)

  def loss(score, token_logp):
    return objectives.marginal_mlm(
        score, token_logp, np.zeros_like(mask), granularity
    )[0]

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(
      jnp.asarray(score), jnp.asarray(token_logp)
  )
  assert value == 0
  for grad in grads:
    assert not np.any(np.asarray(grad))


@pytest.mark.parametrize('bad', [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize('granularity', ['span', 'token'])
def test_an_unused_slot_never_leaks(granularity, bad):
  score, token_logp, mask = _random(0)
  poisoned = np.where(mask[:, None], token_logp, bad)

  def loss(score, token_logp):
    return objectives.marginal_mlm(score, token_logp, mask, granularity)[0]

  clean = jax.value_and_grad(loss)(jnp.asarray(score), jnp.asarray(token_logp))
  dirty = jax.value_and_grad(loss)(jnp.asarray(score), jnp.asarray(poisoned))
  np.testing.assert_array_equal(clean[0], dirty[0])
  np.testing.assert_array_equal(clean[1], dirty[1])
  grad = jax.grad(loss, argnums=1)(jnp.asarray(score), jnp.asarray(poisoned))
  unused = ~np.broadcast_to(mask[:, None], grad.shape)
  assert not np.any(np.asarray(grad)[unused])


def test_utility_of_the_null_document_is_zero():
  score, token_logp, mask = _random(1)
  _, aux = objectives.marginal_mlm(score, token_logp, mask)
  np.testing.assert_array_equal(aux['utility_BK'][:, 0], 0)
  same = np.broadcast_to(token_logp[:, :1], token_logp.shape)
  _, aux = objectives.marginal_mlm(score, same, mask)
  summary = objectives.retrieval_metrics(aux, mask.any(-1))
  np.testing.assert_allclose(summary['retrieval_utility'], 0, atol=1e-6)


def test_unknown_granularity_is_refused():
  with pytest.raises(ValueError, match="'document'.*'span'"):
    objectives.marginal_mlm(*_random(0), 'document')


def test_in_batch_softmax_equals_enumeration():
  rng = np.random.default_rng(0)
  queries, docs = rng.normal(size=(2, 6, 8))
  loss, aux = objectives.in_batch_softmax(queries, docs)
  logits = queries @ docs.T
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(loss, -np.log(np.diag(p)).mean(), rtol=1e-5)
  np.testing.assert_allclose(
      aux['accuracy'], np.mean(logits.argmax(1) == np.arange(6))
  )


def test_copies_of_the_own_passage_are_no_negatives():
  rng = np.random.default_rng(1)
  queries, docs = rng.normal(size=(2, 5, 8))
  passages = np.array([3, 7, 3, 9, 3])
  same = passages[:, None] == passages
  loss, aux = objectives.in_batch_softmax(queries, docs, same_BC=same)
  total, right = 0.0, 0
  for i, query in enumerate(queries):
    kept = [j for j in range(5) if j == i or passages[j] != passages[i]]
    logits = docs[kept] @ query
    own = kept.index(i)
    total += np.log(np.exp(logits).sum()) - logits[own]
    right += logits.argmax() == own
  np.testing.assert_allclose(loss, total / 5, rtol=1e-5)
  np.testing.assert_allclose(aux['accuracy'], right / 5)
  # All documents are of one passage: no negatives and no gradient.
  gradient = jax.grad(
      lambda q: objectives.in_batch_softmax(q, docs, same_BC=same | True)[0]
  )(jnp.asarray(queries))
  np.testing.assert_array_equal(gradient, 0)


def test_tied_documents_share_the_accuracy():
  collapsed = np.ones((64, 8))
  loss, aux = objectives.in_batch_softmax(collapsed, collapsed)
  np.testing.assert_allclose(loss, np.log(64), rtol=1e-6)
  np.testing.assert_allclose(aux['accuracy'], 1 / 64, rtol=1e-6)
  # Documents 0 and 1 are equal, so each of their queries counts one half;
  # query 2 is right, query 3 wrong.
  queries = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]])
  docs = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
  _, aux = objectives.in_batch_softmax(queries, docs)
  np.testing.assert_allclose(aux['accuracy'], (0.5 + 0.5 + 1 + 0) / 4)


def test_the_loss_of_mlm_is_the_mean_over_masks():
  token_logp = np.log([[0.5, 0.25], [0.125, 0.9]])
  mask = np.array([[True, True], [True, False]])
  stage = mlm.Mlm(config_lib.resolve(config_lib.Config(objective='mlm')))
  loss, _ = stage.loss(token_logp, mlm.Batch(*[None] * 4, mask))
  np.testing.assert_allclose(loss, np.log(2) * (1 + 2 + 3) / 3, rtol=1e-6)
