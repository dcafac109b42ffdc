"""Poolings, projections, normalisation and the score scale of the embedder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.models import components
from realm_jax.models import flops
from realm_jax.trainer import optimizer

_MODEL = config_lib.ModelConfig(
    preset='tiny', num_layers=1, width=16, num_heads=2, vocab_size=50,
    embedding_width=8, max_positions=32, init_stddev=0.5,
)  # fmt: skip
_IDS = np.array(
    [[2, 9, 8, 7, 6, 3], [2, 9, 8, 3, 0, 0], [2, 3, 0, 0, 0, 0]], np.int32
)


def _component(**model):
  config = config_lib.Config(model=dataclasses.replace(_MODEL, **model))
  return components.make('embedder', config_lib.resolve(config).model)


def _made(**model):
  component = _component(**model)
  return component.module(component.init(0)), component.init(0)


@pytest.mark.parametrize('pooling', ['cls_tanh', 'cls', 'mean', 'last'])
@pytest.mark.parametrize('projection', ['layer_norm', 'linear', 'none'])
def test_each_head_by_hand(pooling, projection):
  """From the hidden states of all positions, in numpy."""
  module, params = _made(
      pooling=pooling, projection=projection, normalize=pooling == 'mean'
  )
  hidden = np.asarray(module.encoder.bert(_IDS, np.zeros_like(_IDS)))
  lengths = [6, 4, 2]
  pooled = {
      'mean': [h[:n].mean(0) for h, n in zip(hidden, lengths, strict=True)],
      'last': [h[n - 1] for h, n in zip(hidden, lengths, strict=True)],
  }.get(pooling, hidden[:, 0])
  want = np.stack([*pooled])
  if pooling == 'cls_tanh':
    kernel, bias = (params[f'encoder.pooler.{x}'] for x in ('kernel', 'bias'))
    want = np.tanh(want @ kernel + bias)
  assert any('pooler' in name for name in params) == (pooling == 'cls_tanh')
  if projection != 'none':
    want = want @ params['projection.dense.kernel']
    want = want + params['projection.dense.bias']
  if projection == 'layer_norm':
    want = want - want.mean(1, keepdims=True)
    want = want / np.sqrt((want**2).mean(1, keepdims=True) + 1e-12)
  if pooling == 'mean':
    want = want / np.linalg.norm(want, axis=1, keepdims=True)
  found = module.embed_document(_IDS, np.zeros_like(_IDS))
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
  assert found.dtype == np.float32
  # A wider padding changes nothing.
  wide = np.pad(_IDS, ((0, 0), (0, 5)))
  np.testing.assert_allclose(
      module.embed_query(wide), found, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('towers', ['shared', 'separate'])
def test_the_scale_multiplies_the_query_alone(towers):
  fixed, _ = _made(normalize=True, score_scale=20.0, towers=towers)
  learned, params = _made(
      normalize=True, score_scale=20.0, towers=towers, learn_score_scale=True
  )
  document = fixed.embed_document(_IDS, np.zeros_like(_IDS))
  np.testing.assert_allclose(np.linalg.norm(document, axis=1), 1, rtol=1e-5)
  query = fixed.embed_query(_IDS)
  np.testing.assert_allclose(query, 20 * document, rtol=1e-5)
  np.testing.assert_allclose(learned.embed_query(_IDS), query, rtol=1e-5)
  assert params['log_score_scale'] == pytest.approx(np.log(20))
  assert not optimizer._decayed({'embedder': params})['embedder'][
      'log_score_scale'
  ]


def test_gradients_are_finite_for_padding_and_reach_the_learned_scale():
  component = _component(
      normalize=True, learn_score_scale=True, pooling='mean', projection='none'
  )
  params = component.init(0)
  ids = np.concatenate([_IDS, np.zeros((1, 6), np.int32)])

  def total(params):
    module = component.module(params)
    query = module.embed_query(ids)
    return jnp.sum(query @ module.embed_document(ids, np.zeros_like(ids)).T)

  gradients = jax.grad(total)(params)
  assert all(np.isfinite(x).all() for x in gradients.values())
  assert abs(gradients['log_score_scale']) > 1e-3


def test_the_epsilon_of_the_projection_is_its_own():
  usual, params = _made()
  component = _component(projection_norm_eps=0.5)
  module = component.module(params)
  types = np.zeros_like(_IDS)
  ours = module.embed_document(_IDS, types)
  theirs = usual.embed_document(_IDS, types)
  assert np.abs(ours - theirs).max() > 1e-2
  np.testing.assert_array_equal(
      module.encoder(_IDS, types), usual.encoder(_IDS, types)
  )


def test_the_widths_towers_and_flop_follow_the_head():
  config = config_lib.Config(corpus='x', model=dataclasses.replace(_MODEL))
  config.model.projection = 'none'
  with pytest.raises(ValueError, match=r'embedding_width=8: without.*16'):
    config_lib.validate(config)
  config.model.embedding_width = 128  # The default.
  config_lib.validate(config)
  assert config_lib.resolve(config).model.embedding_width == 16
  config.model.towers = 'shared_bert'
  with pytest.raises(ValueError, match='two projections'):
    config_lib.validate(config)
  config.model.towers, config.model.score_scale = 'shared', 0.0
  with pytest.raises(ValueError, match='score_scale=0.0: must be more than 0'):
    config_lib.validate(config)
  config = config_lib.resolve(config)
  # Without a pooler and a projection, the head costs nothing.
  config.model.pooling = 'mean'
  assert flops.embed(config, 3, 10).head_flop == 0
  assert flops.embed(config, 3, 10).outputs == 10
  assert flops.embed_flop(config.model, 3, 10.0) == flops.pass_flop(
      config.model, 3, 10.0, 10.0
  )


def test_a_default_head_is_no_part_of_the_identity():
  config = config_lib.Config()
  assert not {'model.pooling', 'model.titles'} & {
      *config_lib.identity(config)
  }
  other = config_lib.Config()
  other.model.pooling = 'mean'
  assert config_lib.differences(config, other) == [
      "config.model.pooling: 'mean' there, 'cls_tanh' here"
  ]
