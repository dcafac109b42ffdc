"""Scaled dot-product attention over padded inputs.

By matmuls and a softmax, which run everywhere (`xla`), or by a fused kernel of
`fused_attention`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax.models import dropout
from realm_jax.models import fused_attention


def attend(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BL: jax.Array,
    kernel: str = 'xla',
    rate: float = 0.0,
    noise: dropout.Noise | None = None,
) -> jax.Array:
  """Returns softmax(query key^T / sqrt(C)) value: mixed_BMHC, in their dtype.

  Args:
    query_BMHC: queries at M positions.
    key_BLHC: keys at L positions.
    value_BLHC: values at L positions.
    mask_BL: positions to attend to; for a fused kernel each row is true up to
      its length and false after it.
    kernel: from `fused_attention.choose`. `xla` takes over if weights are
      dropped or if queries are at some positions only.
    rate: of the dropout of attention weights.
    noise: None for no dropout.
  """
  keep_BHML = None
  if noise is not None and rate > 0:
    b, m, heads, _ = query_BMHC.shape
    keep_BHML = dropout.keep(noise, (b, heads, m, key_BLHC.shape[1]), rate)
  elif kernel != 'xla' and query_BMHC.shape == key_BLHC.shape:
    return fused_attention.attend(
        kernel, query_BMHC, key_BLHC, value_BLHC, mask_BL
    )
  return attend_where(
      query_BMHC, key_BLHC, value_BLHC, mask_BL[:, None], keep_BHML, rate
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_where(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BML: jax.Array,
    keep_BHML: jax.Array | None,
    rate: float,
) -> jax.Array:
  """`attend` by matmuls and a softmax in float32; M of the mask may be 1."""
  if keep_BHML is not None:
    arrays = (query_BMHC, key_BLHC, value_BLHC, mask_BML, keep_BHML)
    return _attend_forward(*arrays, rate)[0]
  logits_BHML, dtype = _logits(query_BMHC, key_BLHC, mask_BML), value_BLHC.dtype
  # Divided at the end: XLA's CPU backend fuses a whole softmax with the matmul,
  # to an operation that takes four times as long.
  weight_BHML = jnp.exp(logits_BHML - logits_BHML.max(-1, keepdims=True))
  mixed_BHMC = _einsum('BHML,BLHC->BHMC', weight_BHML.astype(dtype), value_BLHC)
  mixed_BHMC *= 1 / weight_BHML.sum(-1, keepdims=True)
  return mixed_BHMC.swapaxes(1, 2).astype(dtype)


def _attend_forward(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BML: jax.Array,
    keep_BHML: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, Any]:
  logits_BHML = _logits(query_BMHC, key_BLHC, mask_BML)
  probs_BHML = jax.nn.softmax(logits_BHML).astype(query_BMHC.dtype)
  mixed_BMHC = jnp.einsum(
      'BHML,BLHC->BMHC', _drop(probs_BHML, keep_BHML, rate), value_BLHC
  )
  arrays = (query_BMHC, key_BLHC, value_BLHC, keep_BHML)
  return mixed_BMHC, (*arrays, probs_BHML, mixed_BMHC)


def _attend_backward(
    rate: float, saved: Any, grad_BMHC: jax.Array
) -> tuple[jax.Array | None, ...]:
  query_BMHC, key_BLHC, value_BLHC, keep_BHML, probs_BHML, mixed_BMHC = saved
  dtype = query_BMHC.dtype
  grad_value_BLHC = jnp.einsum(
      'BHML,BMHC->BLHC', _drop(probs_BHML, keep_BHML, rate), grad_BMHC
  )
  # The gradient of the softmax is p (dp - sum p dp). The sum equals that of the
  # output times its gradient (Dao et al. 2022, appendix B), which saves a pass
  # over BHML: the reason for this hand-written gradient, and 20 % of the time
  # of attention on CPU.
  along_BHM = _einsum('BMHC,BMHC->BHM', mixed_BMHC, grad_BMHC)
  grad_BHML = _einsum('BMHC,BLHC->BHML', grad_BMHC, value_BLHC)
  grad_BHML = _drop(grad_BHML, keep_BHML, rate) - along_BHM[..., None]
  grad_BHML = grad_BHML * probs_BHML * query_BMHC.shape[-1] ** -0.5
  grad_BHML = grad_BHML.astype(dtype)
  grad_query_BMHC = jnp.einsum('BHML,BLHC->BMHC', grad_BHML, key_BLHC)
  grad_key_BLHC = jnp.einsum('BHML,BMHC->BLHC', grad_BHML, query_BMHC)
  return grad_query_BMHC, grad_key_BLHC, grad_value_BLHC, None, None


attend_where.defvjp(_attend_forward, _attend_backward)


def _logits(
    query_BMHC: jax.Array, key_BLHC: jax.Array, mask_BML: jax.Array
) -> jax.Array:
  logits_BHML = _einsum('BMHC,BLHC->BHML', query_BMHC, key_BLHC)
  logits_BHML = logits_BHML * query_BMHC.shape[-1] ** -0.5
  lowest = jnp.finfo(jnp.float32).min
  return jnp.where(mask_BML[:, None], logits_BHML, lowest)


def _einsum(shapes: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(shapes, a, b, preferred_element_type=jnp.float32)


def _drop(
    x_BHML: jax.Array, keep_BHML: jax.Array | None, rate: float
) -> jax.Array:
  if keep_BHML is None:
    return x_BHML
  return jnp.where(keep_BHML, x_BHML / (1 - rate), 0).astype(x_BHML.dtype)
