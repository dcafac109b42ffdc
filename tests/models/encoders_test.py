"""Encoders other than BERT: windows, padding, positions, FLOP, settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.models import components
from realm_jax.models import encoders
from realm_jax.models import flops
from realm_jax.models import modernbert
from realm_jax.trainer import stages


def _config(encoder, **changes):
  model = config_lib.ModelConfig(
      encoder=encoder, preset='tiny', width=16, num_heads=2, num_layers=3,
      vocab_size=50, max_positions=40, pad_id=3, init_stddev=0.5, **changes,
  )
  return config_lib.Config(corpus='none', model=model)


def test_blocks_of_a_window_are_the_window():
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(2, 23, 2, 4)).astype(np.float32) for _ in '123']
  mask_BL = np.arange(23) < np.array([[23], [14]])
  everywhere = np.broadcast_to(np.arange(23), (2, 23))

  def attend(positions, *arrays):
    mixed = modernbert.attend_near(*arrays, mask_BL, 3, positions)
    return jnp.where(mask_BL[:, :, None, None], mixed, 0)

  @jax.jit
  def both(*arrays):
    found = []
    for at in (None, everywhere):
      mixed, backward = jax.vjp(lambda *x, at=at: attend(at, *x), *arrays)
      found.append((mixed, *backward(arrays[0])))
    return found

  blocks, dense = both(*arrays)
  for ours, theirs in zip(blocks, dense, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
  # Position 10 sees 7 to 13.
  changed = [arrays[0], *(x.copy() for x in arrays[1:])]
  for x in changed[1:]:
    x[:, :7] = x[:, 14:] = 9.0
  np.testing.assert_allclose(
      both(*changed)[0][0][0, 10], blocks[0][0, 10], atol=1e-6
  )


@pytest.mark.parametrize('encoder', ['roberta', 'modernbert'])
def test_padding_and_the_positions_of_the_output(encoder):
  options = {'window': 4} if encoder == 'modernbert' else {}
  config = config_lib.resolve(_config(encoder, encoder_options=options)).model
  reader = components.make('reader', config)
  params = reader.init(0)

  @jax.jit
  def encode(ids, at):
    return reader.module(params).bert(ids, ids * 0 + 1, at)

  ids = np.random.default_rng(0).integers(4, 50, (2, 18)).astype(np.int32)
  padded = np.pad(ids, ((0, 0), (0, 5)), constant_values=3)
  whole = np.asarray(encode(ids, None))
  positions = np.array([[0, 17], [5, 9]])
  some = encode(padded, positions)
  np.testing.assert_allclose(
      some, np.take_along_axis(whole, positions[..., None], 1), atol=1e-5
  )


def test_flop_of_modernbert():
  config = config_lib.resolve(
      config_lib.Config(model=config_lib.ModelConfig(encoder='modernbert'))
  ).model
  assert (config.num_layers, config.width, config.num_heads) == (22, 768, 12)
  assert (config.mlp_width, config.activation) == (1152, 'gelu')
  assert config.layer_norm_eps == 1e-5
  d, length = 768, 512
  products = 2 * length * (4 * d * d + 3 * d * 1152)
  seen = [length if i % 3 == 0 else 129 for i in range(22)]
  assert flops.pass_flop(config, 2, length, length) == 2 * (
      22 * products + sum(4 * length * d * size for size in seen)
  )


@pytest.mark.parametrize(
    ('encoder', 'options', 'message'),
    [
        ('albert', {}, "must be one of 'bert', 'roberta', 'modernbert', or"),
        ('bert', {'window': 4}, "'bert' has no option 'window'; it has "),
        ('modernbert', {'window': 0}, 'window must be a whole number of at'),
        ('modernbert', {'local_theta': 0}, 'local_theta must be a positive'),
        ('realm_jax.models.bert:Nothing', {}, "has no 'Nothing'"),
    ],
)
def test_settings_that_are_refused(encoder, options, message):
  config = _config(encoder, encoder_options=options)
  with pytest.raises(ValueError, match=message):
    stages.validate(config)


def test_a_tagger_needs_segments_for_capitals():
  config = _config('roberta')
  config.objective, config.tagger.files = 'tagger', 'file'
  config.tagger.length = 16
  with pytest.raises(ValueError, match="needs two segments; .*'roberta' has"):
    stages.validate(config)
  config.model.capitals = False
  stages.validate(config)


def test_a_path_names_an_encoder_like_the_table():
  config = _config('realm_jax.models.bert:Roberta')
  assert encoders.load(config.model) is encoders.load(_config('roberta').model)
