"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), as NNX modules.

Dropout is on if `noise` is given. Activations are flat, `(B*L) D`, around every
matmul: free on accelerators, 1.5 times as fast on CPU.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import attention
from realm_jax.models import dropout
from realm_jax.models import encoders

# Activations of a layer that are kept for the backward pass: all, the results
# of the matmuls with weights, or the layer's input.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    'none': lambda layer: layer,
    'dots': functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    ),
    'full': jax.checkpoint,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns GELU in its erf form ('gelu') or tanh form ('gelu_new')."""
  return functools.partial(jax.nn.gelu, approximate=name == 'gelu_new')


class Layer(nnx.Module):
  """Self-attention and MLP, each followed by a residual LayerNorm."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    d = config.width
    self.query = encoders.linear(config, d, d, rngs)
    self.key = encoders.linear(config, d, d, rngs)
    self.value = encoders.linear(config, d, d, rngs)
    self.attention_output = encoders.linear(config, d, d, rngs)
    self.attention_norm = encoders.layer_norm(config, d, rngs)
    self.mlp_in = encoders.linear(config, d, config.mlp_width, rngs)
    self.mlp_out = encoders.linear(config, config.mlp_width, d, rngs)
    self.mlp_norm = encoders.layer_norm(config, d, rngs)
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
    target_BMD = hidden_BLD
    if positions_BM is not None:
      target_BMD = jnp.take_along_axis(
          hidden_BLD, positions_BM[..., None], axis=1
      )
    m = target_BMD.shape[1]
    target = target_BMD.reshape(b * m, d)  # (B*M) D
    source = hidden_BLD.reshape(b * length, d)  # (B*L) D

    def heads(x: jax.Array, *layers: nnx.Linear) -> Iterator[jax.Array]:
      # One matmul for all, and one sum over devices in the backward pass.
      kernel_DPD = jnp.stack([layer.kernel[...] for layer in layers], axis=1)
      bias_PD = jnp.stack([layer.bias[...] for layer in layers])
      projected = jnp.einsum('ND,DPE->NPE', x, kernel_DPD.astype(dtype))
      projected += bias_PD.astype(dtype)
      for i in range(len(layers)):
        yield projected[:, i].reshape(b, len(x) // b, self.num_heads, -1)

    if positions_BM is None:
      query_BMHC, key_BLHC, value_BLHC = heads(
          source, self.query, self.key, self.value
      )
    else:
      (query_BMHC,) = heads(target, self.query)
      key_BLHC, value_BLHC = heads(source, self.key, self.value)
    mixed_BMHC = attention.attend(
        query_BMHC,
        key_BLHC,
        value_BLHC,
        mask_BL,
        self.kernel,
        self.attention_rate,
        noise,
    )
    mixed = self.attention_output(mixed_BMHC.reshape(b * m, d))
    mixed = dropout.dropout(mixed, self.rate, noise, 1)
    target = self.attention_norm(target + mixed).astype(dtype)
    widened = activation(self.activation)(self.mlp_in(target))
    output = dropout.dropout(self.mlp_out(widened), self.rate, noise, 2)
    output = self.mlp_norm(target + output).astype(dtype)
    return output.reshape(b, m, d)


class Bert(encoders.Encoder):
  """Embeddings and layers, without a head."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.first_position = self.unused_positions(config)
    self.word_embed = encoders.embed(config, config.vocab_size, rngs)
    self.position_embed = encoders.embed(
        config, self.first_position + config.max_positions, rngs
    )
    self.type_embed = encoders.embed(config, 2 if self.segments else 1, rngs)
    self.embed_norm = encoders.layer_norm(config, config.width, rngs)
    self.layers = nnx.List(
        [Layer(config, rngs=rngs) for _ in range(config.num_layers)]
    )
    self.pad_id = config.pad_id
    self.rate = config.dropout
    self.remat, self.scan = config.remat, config.scan_layers
    self.dtype = config.compute_dtype

  def stack(self) -> Sequence[Layer]:
    """Returns the layers in the order of their application."""
    return list(self.layers)

  def __call__(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      positions_BM: jax.Array | None = None,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """See `Encoder`."""
    start, limit = self.first_position, self.first_position + ids_BL.shape[1]
    if not self.segments:
      types_BL = jnp.zeros_like(types_BL)
    hidden_BLD = (
        self.word_embed(ids_BL)
        + self.position_embed.embedding[...][None, start:limit]
        + self.type_embed(types_BL)
    )
    hidden_BLD = self.embed_norm(hidden_BLD).astype(self.dtype)
    hidden_BLD = dropout.dropout(hidden_BLD, self.rate, noise, 0)
    mask_BL = ids_BL != self.pad_id

    def apply(
        layer: Layer, hidden_BLD: jax.Array, i: Any, at_BM: Any = None
    ) -> jax.Array:
      own = None if noise is None else noise.fold(i + 1)
      return REMAT[self.remat](Layer.__call__)(
          layer, hidden_BLD, mask_BL, at_BM, own
      )

    *layers, last = self.stack()
    if self.scan and layers:
      hidden_BLD = _scan(layers, apply, hidden_BLD)
    else:
      for i, layer in enumerate(layers):
        hidden_BLD = apply(layer, hidden_BLD, i)
    return apply(last, hidden_BLD, len(layers), positions_BM)


def _scan(
    layers: Sequence[Layer],
    apply: Callable[[Layer, jax.Array, Any], jax.Array],
    hidden_BLD: jax.Array,
) -> jax.Array:
  """Applies layers by a loop whose body XLA compiles once.

  The parameters are stacked in each step, which costs a copy of them, and stay
  separate arrays in checkpoints and for the optimizer.
  """
  graphs, states = zip(*map(nnx.split, layers), strict=True)

  def body(hidden_BLD: jax.Array, i_and_state: Any) -> tuple[jax.Array, None]:
    i, state = i_and_state
    return apply(nnx.merge(graphs[0], state), hidden_BLD, i), None

  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  numbers = jnp.arange(len(layers), dtype=jnp.uint32)
  return jax.lax.scan(body, hidden_BLD, (numbers, stacked))[0]


class Roberta(Bert):
  """RoBERTa and XLM-R: BERT with other positions and one segment.

  Positions are numbered from the id of the padding on, which has the first.
  """

  segments: ClassVar[bool] = False

  @classmethod
  def unused_positions(cls, config: config_lib.ModelConfig) -> int:
    return config.pad_id + 1
