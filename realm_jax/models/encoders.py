"""The interface of encoders, how a config's is loaded, and common layers.

`config.ENCODERS` has the built-in ones. The networks hold their encoder as the
attribute `bert`, whatever its class, so that all parameters are named alike.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import dropout
from realm_jax.runtime import extension


class Encoder(nnx.Module):
  """Base class of the encoders.

  Attributes:
    word_embed: embeddings of the wordpieces, which are the weights of the
      masked-LM head's last layer, too.
    segments: whether the two segments of an input are told apart.
    head_bias: whether dense layer and LayerNorm of the masked-LM head have a
      bias.
    mlp_kernels: matrices of width x mlp_width in a layer, for FLOP.
    options: names and defaults of the settings in config.model.encoder_options.
  """

  word_embed: nnx.Embed
  segments: ClassVar[bool] = True
  head_bias: ClassVar[bool] = True
  mlp_kernels: ClassVar[int] = 2
  options: ClassVar[Mapping[str, Any]] = {}

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    """Makes the parameters; `config` is resolved."""
    raise NotImplementedError

  def __call__(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      positions_BM: jax.Array | None = None,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Encodes wordpieces; padding, config.pad_id, is not attended.

    Args:
      ids_BL: wordpiece ids, int32; the padding is at the end of a row.
      types_BL: segments, 0 or 1.
      positions_BM: positions of the output; None for all. The last layer is
        computed only there, which saves most of it: the embedder needs [CLS],
        the reader its masks.
      noise: for dropout; None for none.

    Returns:
      Hidden states, BLD, or BMD with `positions_BM`, in compute_dtype.
    """
    raise NotImplementedError

  @classmethod
  def unused_positions(cls, config: config_lib.ModelConfig) -> int:
    """Returns the rows of a table of positions before the first position."""
    return 0

  @classmethod
  def depth(cls, config: config_lib.ModelConfig) -> int:
    """Returns the number of layers that an input passes."""
    return config.num_layers

  @classmethod
  def attended(
      cls, config: config_lib.ModelConfig, layer: int, length: float
  ) -> float:
    """Returns the number of positions that one of a layer attends to."""
    return length

  @classmethod
  def settings(cls, config: config_lib.ModelConfig) -> dict[str, Any]:
    """Returns the options with their defaults."""
    return {**cls.options, **config.encoder_options}

  @classmethod
  def problems(
      cls, config: config_lib.ModelConfig
  ) -> Iterator[tuple[str, str]]:
    """Yields fields of a config and why their values are wrong."""
    for name in config.encoder_options.keys() - cls.options.keys():
      yield (
          'model.encoder_options',
          f'the encoder {config.encoder!r} has no option {name!r}; it has'
          f' {sorted(cls.options)}',
      )


def load(config: config_lib.ModelConfig) -> type[Encoder]:
  """Returns the class of a config's encoder.

  Raises:
    ValueError: there is no such encoder.
  """
  return extension.load(
      'config.model.encoder',
      config.encoder,
      {name: one.path for name, one in config_lib.ENCODERS.items()},
  )


def make(config: config_lib.ModelConfig, *, rngs: nnx.Rngs) -> Encoder:
  """Makes the encoder of a resolved config."""
  return load(config)(config, rngs=rngs)


def linear(
    config: config_lib.ModelConfig,
    inputs: int,
    outputs: int,
    rngs: nnx.Rngs,
    result: str | None = None,
    *,
    bias: bool = True,
    stddev: float | None = None,
) -> nnx.Linear:
  """Returns a dense layer with BERT's initialisation.

  It computes in compute_dtype; `result` is the dtype of its output, if another.
  `stddev` replaces that of the config.
  """
  return nnx.Linear(
      inputs,
      outputs,
      use_bias=bias,
      kernel_init=nnx.initializers.truncated_normal(
          config.init_stddev if stddev is None else stddev
      ),
      dtype=jnp.dtype(config.compute_dtype),
      preferred_element_type=result,
      rngs=rngs,
  )


def layer_norm(
    config: config_lib.ModelConfig,
    width: int,
    rngs: nnx.Rngs,
    scale_init: float = 1.0,
    *,
    bias: bool = True,
) -> nnx.LayerNorm:
  """Returns a LayerNorm in float32, with two-pass variance as in BERT."""
  return nnx.LayerNorm(
      width,
      use_bias=bias,
      epsilon=config.layer_norm_eps,
      use_fast_variance=False,
      scale_init=nnx.initializers.constant(scale_init),
      dtype=jnp.float32,
      rngs=rngs,
  )


def embed(
    config: config_lib.ModelConfig, rows: int, rngs: nnx.Rngs
) -> nnx.Embed:
  """Returns a table of embeddings with BERT's initialisation."""
  return nnx.Embed(
      rows,
      config.width,
      embedding_init=nnx.initializers.truncated_normal(config.init_stddev),
      rngs=rngs,
  )
