"""ModernBERT (Warner et al. 2024), as an NNX module.

Rotary positions (Su et al. 2021), LayerNorm before each block, a gated MLP, no
biases; most layers attend to a window only.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.models import attention
from realm_jax.models import bert
from realm_jax.models import dropout
from realm_jax.models import encoders


class Layer(nnx.Module):
  """Self-attention and gated MLP, each added to its own input."""

  def __init__(
      self, config: config_lib.ModelConfig, number: int, *, rngs: nnx.Rngs
  ):
    d = config.width
    stddev = config.init_stddev / (2 * config.num_layers) ** 0.5
    settings = ModernBert.settings(config)
    # The first layer reads the LayerNorm of the embeddings.
    if number:
      self.attention_norm = encoders.layer_norm(config, d, rngs, bias=False)
    self.qkv = encoders.linear(config, d, 3 * d, rngs, bias=False)
    self.attention_output = encoders.linear(
        config, d, d, rngs, bias=False, stddev=stddev
    )
    self.mlp_norm = encoders.layer_norm(config, d, rngs, bias=False)
    # The MLP's activations, then their gates.
    self.mlp_in = encoders.linear(
        config, d, 2 * config.mlp_width, rngs, bias=False
    )
    self.mlp_out = encoders.linear(
        config, config.mlp_width, d, rngs, bias=False, stddev=stddev
    )
    is_global = _is_global(settings, number)
    self.first = not number
    self.reach = None if is_global else settings['window'] // 2
    self.theta = float(settings[f'{"global" if is_global else "local"}_theta'])
    self.num_heads = config.num_heads
    self.rate = config.dropout
    self.attention_rate = config_lib.attention_rate(config)
    self.kernel = config.attention  # Resolved by `components.make`.
    self.activation = config.activation
    self.dtype = config.compute_dtype

  def __call__(
      self,
      hidden_BLD: jax.Array,
      mask_BL: jax.Array,
      positions_BM: jax.Array | None = None,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Returns the layer's output at all positions, or at `positions_BM`."""
    b, length, d = hidden_BLD.shape
    dtype = jnp.dtype(self.dtype)
    normed = hidden_BLD.reshape(b * length, d)
    if not self.first:
      normed = self.attention_norm(normed).astype(dtype)
    qkv = self.qkv(normed).reshape(b, length, 3, self.num_heads, -1)
    query_BMHC, key_BLHC, value_BLHC = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    key_BLHC = rotate(key_BLHC, jnp.arange(length)[None], self.theta)
    target_BMD = hidden_BLD
    if positions_BM is None:
      query_BMHC = rotate(query_BMHC, jnp.arange(length)[None], self.theta)
    else:
      at = positions_BM[..., None]
      target_BMD = jnp.take_along_axis(hidden_BLD, at, axis=1)
      query_BMHC = jnp.take_along_axis(query_BMHC, at[..., None], axis=1)
      query_BMHC = rotate(query_BMHC, positions_BM, self.theta)
    m = target_BMD.shape[1]
    target = target_BMD.reshape(b * m, d)  # (B*M) D
    if self.reach is None:
      mixed_BMHC = attention.attend(
          query_BMHC,
          key_BLHC,
          value_BLHC,
          mask_BL,
          self.kernel,
          self.attention_rate,
          noise,
      )
    else:
      mixed_BMHC = attend_near(
          query_BMHC,
          key_BLHC,
          value_BLHC,
          mask_BL,
          self.reach,
          positions_BM,
          self.attention_rate,
          noise,
      )
    mixed = self.attention_output(mixed_BMHC.reshape(b * m, d))
    target = target + dropout.dropout(mixed, self.rate, noise, 1)
    widened, gate = jnp.split(
        self.mlp_in(self.mlp_norm(target).astype(dtype)), 2, axis=-1
    )
    widened = bert.activation(self.activation)(widened) * gate
    output = self.mlp_out(dropout.dropout(widened, self.rate, noise, 2))
    return (target + output).reshape(b, m, d)


class ModernBert(encoders.Encoder):
  """Embeddings, layers and the final LayerNorm, without a head."""

  segments: ClassVar[bool] = False
  head_bias: ClassVar[bool] = False
  mlp_kernels: ClassVar[int] = 3
  options: ClassVar[dict[str, Any]] = {
      # From the first on, each third layer attends to all positions.
      'global_interval': 3,
      'window': 128,  # In the other layers: half of it on each side.
      # Bases of the rotary positions.
      'global_theta': 160_000.0,
      'local_theta': 10_000.0,
  }

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    d = config.width
    self.word_embed = encoders.embed(config, config.vocab_size, rngs)
    self.embed_norm = encoders.layer_norm(config, d, rngs, bias=False)
    self.layers = nnx.List(
        [Layer(config, i, rngs=rngs) for i in range(config.num_layers)]
    )
    self.final_norm = encoders.layer_norm(config, d, rngs, bias=False)
    self.pad_id = config.pad_id
    self.rate = config.dropout
    self.remat = config.remat
    self.dtype = config.compute_dtype

  def __call__(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      positions_BM: jax.Array | None = None,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """See `Encoder`; `types_BL` is not read."""
    hidden_BLD = self.embed_norm(self.word_embed(ids_BL)).astype(self.dtype)
    hidden_BLD = dropout.dropout(hidden_BLD, self.rate, noise, 0)
    mask_BL = ids_BL != self.pad_id
    last = len(self.layers) - 1
    for i, layer in enumerate(self.layers):
      hidden_BLD = bert.REMAT[self.remat](Layer.__call__)(
          layer,
          hidden_BLD,
          mask_BL,
          positions_BM if i == last else None,
          None if noise is None else noise.fold(i + 1),
      )
    return self.final_norm(hidden_BLD).astype(self.dtype)

  @classmethod
  def attended(
      cls, config: config_lib.ModelConfig, layer: int, length: float
  ) -> float:
    settings = cls.settings(config)
    if _is_global(settings, layer):
      return length
    return min(length, settings['window'] // 2 * 2 + 1)

  @classmethod
  def problems(
      cls, config: config_lib.ModelConfig
  ) -> Iterator[tuple[str, str]]:
    yield from super().problems(config)
    settings = cls.settings(config)
    for name, least in (('global_interval', 1), ('window', 2)):
      if not isinstance(settings[name], int) or settings[name] < least:
        yield (
            'model.encoder_options',
            f'{name} must be a whole number of at least {least}',
        )
    for name in ('global_theta', 'local_theta'):
      value = settings[name]
      if not isinstance(value, int | float) or not value > 0:
        yield 'model.encoder_options', f'{name} must be a positive number'
    model = config_lib.resolve(config_lib.Config(model=config)).model
    if model.num_heads and model.width // model.num_heads % 2:
      yield 'model.num_heads', 'rotary positions need heads of an even width'


def attend_near(
    query_BMHC: jax.Array,
    key_BLHC: jax.Array,
    value_BLHC: jax.Array,
    mask_BL: jax.Array,
    reach: int,
    positions_BM: jax.Array | None = None,
    rate: float = 0.0,
    noise: dropout.Noise | None = None,
) -> jax.Array:
  """`attention.attend` to keys at most `reach` positions away, by matmuls.

  With queries at all of more than 4 * reach positions, blocks of `reach`
  queries are compared with the keys of their own and of both neighbouring
  blocks only, so time and memory are proportional to the length.

  Args:
    query_BMHC, key_BLHC, value_BLHC, mask_BL, rate, noise: as of `attend`.
    reach: at least 1.
    positions_BM: of the queries; None: M = L, all positions.
  """
  b, m, heads, width = query_BMHC.shape
  length = key_BLHC.shape[1]
  if positions_BM is not None or length <= 4 * reach:
    at_BM = jnp.arange(m)[None] if positions_BM is None else positions_BM
    distance_BML = jnp.abs(at_BM[..., None] - jnp.arange(length))
    near_BML = (distance_BML <= reach) & mask_BL[:, None]
    keep_BHML = None
    if noise is not None and rate > 0:
      keep_BHML = dropout.keep(noise, (b, heads, m, length), rate)
    return attention.attend_where(
        query_BMHC, key_BLHC, value_BLHC, near_BML, keep_BHML, rate
    )
  count = -(-length // reach)

  def blocks(x: jax.Array, neighbours: bool) -> jax.Array:
    before = reach if neighbours else 0
    after = count * reach - length + before
    x = jnp.pad(x, ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2))
    parts = x.reshape(b, -1, reach, *x.shape[2:])
    if neighbours:
      parts = jnp.concatenate(
          [parts[:, i : i + count] for i in range(3)], axis=2
      )
    return parts.reshape(b * count, *parts.shape[2:])

  distance_ML = jnp.arange(reach)[:, None] - jnp.arange(3 * reach) + reach
  near_BML = (jnp.abs(distance_ML) <= reach) & blocks(mask_BL, True)[:, None]
  keep_BHML = None
  if noise is not None and rate > 0:
    shape = (b, count, heads, reach, 3 * reach)
    keep_BHML = dropout.keep(noise, shape, rate).reshape(-1, *shape[2:])
  mixed = attention.attend_where(
      blocks(query_BMHC, False),
      blocks(key_BLHC, True),
      blocks(value_BLHC, True),
      near_BML,
      keep_BHML,
      rate,
  )
  return mixed.reshape(b, -1, heads, width)[:, :length]


def rotate(
    x_BMHC: jax.Array, positions_BM: jax.Array, theta: float
) -> jax.Array:
  """Applies rotary position embeddings (Su et al. 2021, section 3.4.2).

  Dimension c is paired with c + C/2, as in the published weights.

  Args:
    x_BMHC: queries or keys; C is even.
    positions_BM: their positions; B may be 1.
    theta: base of the frequencies.
  """
  half = x_BMHC.shape[-1] // 2
  # With PyTorch's roundings: position 8,191 multiplies an error in the last
  # place to 5e-4.
  power = np.arange(half, dtype=np.float32) / np.float32(half)
  frequency = np.float32(1) / (theta ** power.astype(float)).astype(np.float32)
  angle = positions_BM[..., None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x_BMHC.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x_BMHC.dtype)


def _is_global(settings: dict[str, Any], layer: int) -> bool:
  return layer % settings['global_interval'] == 0
