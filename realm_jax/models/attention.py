"""Scaled dot-product attention over padded inputs, by the kernel that suits.

Public: `attend`, `choose`, `check`, `Kernel`. The kernels: `xla`, matmuls and a
softmax, which run everywhere; `cudnn`, NVIDIA's flash attention; `flash`, the
one that JAX has for TPU. The fused ones never hold the M x L weights, skip the
padding and know no dropout of the weights.
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
  """Returns the kernel to use on a device.

  That is the one that `config.attention` names, or for 'auto' the fused one;
  'xla' where the device cannot run it, since all compute the same.

  Args:
    config: resolved.
    device: None for the one that JAX computes on.
  """
  device = device or jax.devices()[0]
  kernels: tuple[Kernel, ...] = ('cudnn', 'flash')
  for kernel in kernels:
    wanted = config.attention in ('auto', kernel)
    if wanted and not _obstacles(kernel, config, device):
      return kernel
  return 'xla'


def check(config: config_lib.ModelConfig, device: jax.Device) -> None:
  """Raises ValueError if `config.attention` names what cannot run there."""
  obstacles = _obstacles(config.attention, config, device)
  if obstacles:
    raise ValueError(
        f'config.model.attention={config.attention!r} needs'
        f' {" and ".join(obstacles)}; here is {device.device_kind}'
        f' ({device.platform}), {config.compute_dtype}, heads of'
        f" {config.width // config.num_heads}. 'auto' takes what there is."
    )


def _obstacles(
    kernel: str, config: config_lib.ModelConfig, device: jax.Device
) -> list[str]:
  """Returns what the kernel needs and does not find."""
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
    query_BMHC: of the M positions that attend.
    key_BLHC: of the L positions that are attended.
    value_BLHC: likewise.
    mask_BL: which of them are; for a fused kernel a row is true up to its
      length and false from there on.
    kernel: what `choose` returned. Where `xla` must or should do it, it does:
      with dropout of the weights, and for some of the positions.
    rate: of the dropout of the weights.
    noise: None for no dropout.
  """
  if noise is not None and rate > 0:
    b, m, heads, _ = query_BMHC.shape
    keep_BHML = dropout.keep(noise, (b, heads, m, key_BLHC.shape[1]), rate)
  elif kernel != 'xla' and query_BMHC.shape == key_BLHC.shape:
    # A row of nothing but padding attends its first position.
    length_B = jnp.maximum(mask_BL.sum(axis=1, dtype=jnp.int32), 1)
    fused = _partitioned(functools.partial(_fused, kernel))
    return fused(query_BMHC, key_BLHC, value_BLHC, length_B)
  else:
    keep_BHML = None
  return _attend(query_BMHC, key_BLHC, value_BLHC, mask_BL, keep_BHML, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BL: jax.Array,
    keep_BHML: jax.Array | None,
    rate: float,
) -> jax.Array:
  """`attend` by matmuls and a softmax, which is in float32."""
  arrays = (query_BMHC, key_BLHC, value_BLHC, mask_BL, keep_BHML)
  return _attend_forward(*arrays, rate)[0]


def _attend_forward(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BL: jax.Array,
    keep_BHML: jax.Array | None,
    rate: float,
) -> tuple[jax.Array, Any]:
  logits_BHML = _einsum('BMHC,BLHC->BHML', query_BMHC, key_BLHC)
  logits_BHML = logits_BHML * query_BMHC.shape[-1] ** -0.5
  lowest = jnp.finfo(jnp.float32).min
  logits_BHML = jnp.where(mask_BL[:, None, None, :], logits_BHML, lowest)
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
  # Of the softmax: p (dp - sum p dp). The sum is that of the output times its
  # gradient (Dao et al. 2022, appendix B), which spares a pass over BHML: the
  # reason to write this by hand, worth a fifth of the attention on CPU.
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


_attend.defvjp(_attend_forward, _attend_backward)


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
  """`attend` by a fused kernel, at a length that the kernel takes.

  The kernels leave padded positions undefined, in the output and in the
  gradients. There, `real` selects 0 in both: the layers that follow multiply
  padding by a weight of 0, and 0 * nan is nan.
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
  # Lengths, not a mask: of a mask it would make a bias, and its gradient.
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
  # The padding is a segment of its own, which attends itself.
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


# The fused kernels, and what a length has to be a multiple of. JAX refuses the
# gradient of cuDNN's attention at an odd length.
_FUSED = {'cudnn': (_cudnn, 2), 'flash': (_flash, _LANES)}


def _partitioned(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Runs a kernel on what each device has: XLA cannot divide it by itself."""
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
