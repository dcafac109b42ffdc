"""Scaled dot-product attention over padded inputs, with a choice of kernels.

`xla` (matmuls and a softmax) runs everywhere; `cudnn` is NVIDIA's flash
attention, `flash` JAX's for TPU. These two are fused: they never hold the M x L
weights, skip the padding and cannot drop weights.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, Literal

import jax
from jax.experimental.pallas.ops.tpu import flash_attention
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import dropout
from realm_jax.runtime.mesh import MODEL

Kernel = Literal['xla', 'cudnn', 'flash']

_LANES = 128  # Lanes of a TPU's vector registers.
_MAX_BLOCK = 512


def choose(
    config: config_lib.ModelConfig, device: jax.Device | None = None
) -> Kernel:
  """Returns the kernel for a device.

  The one that `config.attention` names, or the fused one for 'auto'; 'xla' on
  a device that cannot run it, as all kernels compute the same function.

  Args:
    config: resolved.
    device: None for JAX's default device.
  """
  device = device or jax.devices()[0]
  kernels: tuple[Kernel, ...] = ('cudnn', 'flash')
  for kernel in kernels:
    wanted = config.attention in ('auto', kernel)
    if wanted and not _obstacles(kernel, config, device):
      return kernel
  return 'xla'


def check(config: config_lib.ModelConfig, device: jax.Device) -> None:
  """Raises ValueError if the device cannot run `config.attention`."""
  obstacles = _obstacles(config.attention, config, device)
  if obstacles:
    raise ValueError(
        f'config.model.attention={config.attention!r} needs'
        f' {" and ".join(obstacles)}; this job has {device.device_kind}'
        f' ({device.platform}), {config.compute_dtype}, heads of'
        f" {config.width // config.num_heads}. 'auto' takes one that runs."
    )


def _obstacles(
    kernel: str, config: config_lib.ModelConfig, device: jax.Device
) -> list[str]:
  """Returns the unmet requirements of a kernel."""
  width = config.width // config.num_heads
  needs: dict[str, list[tuple[bool, str]]] = {
      'cudnn': [
          (device.platform == 'gpu', 'an NVIDIA GPU'),
          (config.compute_dtype == 'bfloat16', 'compute_dtype=bfloat16'),
          (width % 8 == 0 and width <= 128, 'heads of 8, 16, ... or 128'),
      ],
      'flash': [
          (device.platform == 'tpu', 'a TPU'),
          (
              width <= _LANES or width % _LANES == 0,
              f'heads of up to {_LANES} or a multiple of it',
          ),
      ],
  }
  return [need for given, need in needs.get(kernel, []) if not given]


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
    kernel: from `choose`. `xla` takes over if weights are dropped (fused
      kernels cannot) or if queries are at some positions only.
    rate: of the dropout of attention weights.
    noise: None for no dropout.
  """
  if noise is not None and rate > 0:
    b, m, heads, _ = query_BMHC.shape
    keep_BHML = dropout.keep(noise, (b, heads, m, key_BLHC.shape[1]), rate)
  elif kernel != 'xla' and query_BMHC.shape == key_BLHC.shape:
    # A row of padding only attends to its first position.
    length_B = jnp.maximum(mask_BL.sum(axis=1, dtype=jnp.int32), 1)
    fused = _partitioned(functools.partial(_fused, kernel))
    return fused(query_BMHC, key_BLHC, value_BLHC, length_B)
  else:
    keep_BHML = None
  mask_B1L = mask_BL[:, None]
  return attend_where(
      query_BMHC, key_BLHC, value_BLHC, mask_B1L, keep_BHML, rate
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
  arrays = (query_BMHC, key_BLHC, value_BLHC, mask_BML, keep_BHML)
  return _attend_forward(*arrays, rate)[0]


def _attend_forward(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BML: jax.Array,
    keep_BHML: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, Any]:
  logits_BHML = _einsum('BMHC,BLHC->BHML', query_BMHC, key_BLHC)
  logits_BHML = logits_BHML * query_BMHC.shape[-1] ** -0.5
  lowest = jnp.finfo(jnp.float32).min
  logits_BHML = jnp.where(mask_BML[:, None], logits_BHML, lowest)
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
  return (
      jnp.einsum('BHML,BLHC->BMHC', grad_BHML, key_BLHC),
      jnp.einsum('BHML,BMHC->BLHC', grad_BHML, query_BMHC),
      grad_value_BLHC,
      None,
      None,
  )


attend_where.defvjp(_attend_forward, _attend_backward)


def _einsum(shapes: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(shapes, a, b, preferred_element_type=jnp.float32)


def _drop(
    x_BHML: jax.Array, keep_BHML: jax.Array | None, rate: float
) -> jax.Array:
  if keep_BHML is None:
    return x_BHML
  return jnp.where(keep_BHML, x_BHML / (1 - rate), 0).astype(x_BHML.dtype)


def _fused(
    kernel: str,
    query_BLHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
  """`attend` by a fused kernel, padded to a length that the kernel accepts.

  The kernels leave output and gradients at padded positions undefined. `real`
  sets both to 0 there: later layers multiply padding by a weight of 0, and
  0 * nan is nan.
  """
  compute, multiple = _FUSED[kernel]
  length = query_BLHC.shape[1]
  more = -length % multiple
  position_L11 = jnp.arange(length)[:, None, None]
  real_BL11 = position_L11 < length_B[:, None, None, None]

  def real(x_BLHC: jax.Array) -> jax.Array:
    return jnp.where(real_BL11, x_BLHC, 0)

  def padded(x_BLHC: jax.Array) -> jax.Array:
    return jnp.pad(real(x_BLHC), ((0, 0), (0, more), (0, 0), (0, 0)))

  mixed_BLHC = compute(
      padded(query_BLHC), padded(key_BLHC), padded(value_BLHC), length_B
  )
  return real(mixed_BLHC[:, :length])


def _cudnn(
    query_BLHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
  # Lengths, since a mask would become a bias with a gradient of its own.
  return jax.nn.dot_product_attention(
      query_BLHC,
      key_BLHC,
      value_BLHC,
      query_seq_lengths=length_B,
      key_value_seq_lengths=length_B,
      implementation='cudnn',
  )


def _flash(
    query_BLHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
  length, width = query_BLHC.shape[1], query_BLHC.shape[-1]
  sizes = range(_LANES, _MAX_BLOCK + 1, _LANES)
  block = max(size for size in sizes if length % size == 0)
  # The padding is a segment of its own, which attends to itself.
  segment_BL = (jnp.arange(length) < length_B[:, None]).astype(jnp.int32)
  names = (f.name for f in dataclasses.fields(flash_attention.BlockSizes))
  mixed_BHLC = flash_attention.flash_attention(
      *(x.swapaxes(1, 2) for x in (query_BLHC, key_BLHC, value_BLHC)),
      segment_ids=flash_attention.SegmentIds(segment_BL, segment_BL),
      sm_scale=width**-0.5,
      block_sizes=flash_attention.BlockSizes(
          **{name: 1 if name == 'block_b' else block for name in names}
      ),
  )
  return mixed_BHLC.swapaxes(1, 2)


# The fused kernels and the factor that a length must have. JAX refuses the
# gradient of cuDNN's attention at an odd length.
_FUSED = {'cudnn': (_cudnn, 2), 'flash': (_flash, _LANES)}


def _partitioned(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Runs a kernel on each device's shard, as XLA cannot partition it."""
  mesh = jax.sharding.get_abstract_mesh()
  free = {
      name
      for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
      if kind == jax.sharding.AxisType.Auto
  }
  if not free:
    return kernel
  rows = tuple(name for name in mesh.axis_names if name in free - {MODEL})
  heads = MODEL if MODEL in free else None
  divided = jax.P(rows, None, heads)
  return jax.shard_map(
      kernel,
      in_specs=(divided, divided, divided, jax.P(rows)),
      out_specs=divided,
      axis_names=free,
      check_vma=False,
  )
