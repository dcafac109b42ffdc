"""Attention: the kernels agree, and are chosen where they can run.

There is no accelerator here: the TPU's kernel runs in Pallas' interpreter, and
for both kinds the program is lowered, which checks shapes and types.
"""

import dataclasses
import types

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.models import attention
from realm_jax.models import components
from realm_jax.models import dropout
from realm_jax.models import fused_attention

_MODEL = config_lib.ModelConfig(
    width=128, num_heads=2, compute_dtype='bfloat16', attention='auto'
)
_LENGTHS_B1 = np.array([[20], [13]])
_MASK_BL = np.arange(20) < _LENGTHS_B1


def _qkv(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(2, 20, 2, 8)), dtype) for _ in range(3)]


def _gradients(kernel):
  def loss(query, key, value):
    mixed = attention.attend(query, key, value, _MASK_BL, kernel)
    mixed = jnp.where(_MASK_BL[..., None, None], mixed, 0)
    return jnp.square(mixed.astype(jnp.float32)).sum()

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))


def _device(platform):
  return types.SimpleNamespace(
      platform=platform, device_kind=f'Some {platform}'
  )


def _by_hand(query, key, value, keep, rate):
  logits = jnp.einsum('bmhc,blhc->bhml', query, key) * query.shape[-1] ** -0.5
  logits = jnp.where(_MASK_BL[:, None, None], logits, -1e30)
  weights = jax.nn.softmax(logits)
  if keep is not None:
    weights = jnp.where(keep, weights / (1 - rate), 0)
  return jnp.einsum('bhml,blhc->bmhc', weights, value)


@pytest.mark.parametrize('positions', [20, 3])
def test_attention_without_a_gradient(positions):
  query, key, value = _qkv()
  query = query[:, :positions]
  # The second row is padding alone.
  for mask in (_MASK_BL, np.arange(20) < [[20], [0]]):
    found = attention.attend(query, key, value, mask)
    want, _ = jax.vjp(attention.attend, query, key, value, mask)
    np.testing.assert_allclose(found, want, atol=2e-6)


@pytest.mark.parametrize('rate', [0.0, 0.3])
def test_forward_and_hand_written_backward(rate):
  noise = dropout.noise(jax.random.key(3), 2)
  keep = dropout.keep(noise, (2, 2, 20, 20), rate) if rate else None

  def ours(*qkv):
    return attention.attend(*qkv, _MASK_BL, 'xla', rate, noise)

  def theirs(*qkv):
    return _by_hand(*qkv, keep, rate)

  def value(attend):
    return jax.jit(
        jax.value_and_grad(lambda *x: jnp.sin(attend(*x)).sum(), (0, 1, 2))
    )(*_qkv())

  for a, b in zip(
      jax.tree.leaves(value(ours)), jax.tree.leaves(value(theirs)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-6)


def test_flash_is_the_same_and_lowers_for_tpu():
  expected = _gradients('xla')(*_qkv())
  with pltpu.force_tpu_interpret_mode():
    found = _gradients('flash')(*_qkv())
  for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  lowered = _gradients('flash').trace(*_qkv(jnp.bfloat16)).lower(
      lowering_platforms=('tpu',)
  )
  assert 'tpu_custom_call' in lowered.as_text()


def test_cudnn_lowers_for_cuda(monkeypatch):
  # JAX checks for cuDNN at tracing time.
  asked = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(asked, 'check_cudnn_version', lambda: 90300)
  lowered = _gradients('cudnn').trace(*_qkv(jnp.bfloat16)).lower(
      lowering_platforms=('cuda',)
  )
  text = lowered.as_text()
  assert '__cudnn$fmhaSoftmax' in text
  # Padding by lengths: a mask would have become a bias.
  assert 'ScaleBias' not in text


def _leaves_padding_undefined(
    query, key, value, *, query_seq_lengths, key_value_seq_lengths,
    implementation,
):
  """Like cuDNN: even lengths only; nan at padding, forward and backward."""
  assert implementation == 'cudnn'
  assert query.shape == key.shape == value.shape
  assert query.shape[1] % 2 == 0
  del key_value_seq_lengths
  mask_BL = jnp.arange(query.shape[1]) < query_seq_lengths[:, None]

  def padding(x, fill):
    return jnp.where(mask_BL[..., None, None], x, fill)

  @jax.custom_vjp
  def given(x):
    return x

  @jax.custom_vjp
  def result(x):
    return padding(x, jnp.nan)

  given.defvjp(lambda x: (x, None), lambda _, g: (padding(g, jnp.nan),))
  result.defvjp(lambda x: (result(x), None), lambda _, g: (padding(g, 0),))
  return result(
      attention.attend(given(query), given(key), given(value), mask_BL)
  )


@pytest.mark.parametrize('length', [20, 13, 3])
def test_padding_that_a_kernel_leaves_undefined_is_0(monkeypatch, length):
  monkeypatch.setattr(
      jax.nn, 'dot_product_attention', _leaves_padding_undefined
  )
  rng = np.random.default_rng(0)
  qkv = [jnp.asarray(rng.normal(size=(2, length, 2, 8))) for _ in range(3)]
  mask_BL = np.arange(length) < np.array([[length], [2]])

  def values(kernel):
    def loss(*qkv):
      mixed = attention.attend(*qkv, mask_BL, kernel)
      weights = jnp.where(mask_BL[..., None, None], jnp.sin(mixed), 0)
      return weights.sum(), mixed

    return jax.grad(loss, (0, 1, 2), has_aux=True)(*qkv)

  (*grads, mixed), (*expected_grads, expected) = map(
      lambda found: (*found[0], found[1]), map(values, ('cudnn', 'xla'))
  )
  for a in (mixed, *grads):
    assert not np.asarray(a)[~mask_BL].any()
  np.testing.assert_allclose(mixed[mask_BL], expected[mask_BL], rtol=1e-6)
  for a, b in zip(grads, expected_grads, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_undefined_padding_reaches_no_loss_and_no_gradient(monkeypatch):
  monkeypatch.setattr(
      jax.nn, 'dot_product_attention', _leaves_padding_undefined
  )
  config = dataclasses.replace(
      _MODEL, vocab_size=50, num_layers=2, width=32, mlp_width=32,
      attention_dropout=0.0,
  )
  # The first layer is computed by the kernel, the last one by `xla`.
  reader = components.make('reader', config, _device('gpu'))
  ids_BT = jnp.where(_MASK_BL, 7, 0)
  positions_BM = jnp.array([[1, 4], [2, 3]])

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    return reader.module(params).token_logp(
        ids_BT, ids_BT * 0, positions_BM, positions_BM
    ).sum()

  value, grads = loss(reader.init(0))
  assert np.isfinite(value)
  assert not [name for name, x in grads.items() if not np.isfinite(x).all()]


@pytest.mark.parametrize(
    ('platform', 'values', 'kernel'),
    [
        ('cpu', {}, 'xla'),
        ('gpu', {}, 'cudnn'),
        ('tpu', {}, 'flash'),
        ('gpu', {'compute_dtype': 'float32'}, 'xla'),
        ('gpu', {'width': 512}, 'xla'),
        ('tpu', {'width': 384}, 'xla'),
        ('tpu', {'width': 512}, 'flash'),
        ('gpu', {'attention': 'xla'}, 'xla'),
        # All kernels compute one function: a CPU evaluates a GPU run.
        ('cpu', {'attention': 'cudnn'}, 'xla'),
    ],
)
def test_choice(platform, values, kernel):
  config = dataclasses.replace(_MODEL, **values)
  assert fused_attention.choose(config, _device(platform)) == kernel


@pytest.mark.parametrize(
    ('platform', 'values', 'message'),
    [
        ('cpu', {'attention': 'cudnn'}, 'cudnn.*needs an NVIDIA GPU.*Some cpu'),
        ('gpu', {'attention': 'flash'}, 'flash.*needs a TPU'),
        ('gpu', {'attention': 'cudnn', 'compute_dtype': 'float32'},
         'needs compute_dtype=bfloat16; this job has.*float32'),
        ('gpu', {'attention': 'cudnn', 'width': 512}, 'needs heads of.*256'),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(platform, values, message):
  config = dataclasses.replace(_MODEL, **values)
  with pytest.raises(ValueError, match=message):
    fused_attention.check(config, _device(platform))


def test_some_positions_or_dropout_use_xla():
  query, key, value = _qkv()
  # The fused kernel would fail on CPU.
  attention.attend(query[:, :3], key, value, _MASK_BL, 'flash')
  noise = dropout.noise(jax.random.key(0), 2)
  attention.attend(query, key, value, _MASK_BL, 'flash', 0.1, noise)


def test_fused_attention_with_dropout_of_weights_is_refused():
  config = config_lib.Config(corpus='c', objective='mlm')
  config.model.attention = 'cudnn'
  with pytest.raises(ValueError, match='attention_dropout=0, not 0.1'):
    config_lib.validate(config)
  config.model.attention_dropout = 0.0
  config_lib.validate(config)


def test_dropout_drops_as_often_as_it_says_and_scales():
  noise = dropout.noise(jax.random.key(0), 8)
  x = np.asarray(dropout.dropout(jnp.ones((8 * 50, 70)), 0.25, noise, 0))
  share = (x == 0).mean()
  assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / x.size)
  np.testing.assert_allclose(x[x > 0], 1 / 0.75, rtol=1e-6)
  other = np.asarray(dropout.dropout(jnp.ones((8 * 50, 70)), 0.25, noise, 1))
  assert abs(np.corrcoef(x.reshape(-1), other.reshape(-1))[0, 1]) < 0.03
  rows = x.reshape(8, -1)
  assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.08


def test_noise_depends_on_the_row_only():
  noise = dropout.noise(jax.random.key(0), 6)
  whole = dropout.keep(noise, (6, 5, 7), 0.5)
  some = dropout.Noise(noise.key, noise.row_B[jnp.array([4, 1])])
  np.testing.assert_array_equal(
      dropout.keep(some, (2, 5, 7), 0.5), whole[jnp.array([4, 1])]
  )
  copies = noise.repeat(3)
  assert len(set(copies.row_B.tolist())) == 18
  np.testing.assert_array_equal(
      copies.row_B[3:6], dropout.Noise(noise.key, noise.row_B[1:2]).repeat(3)[1]
  )
