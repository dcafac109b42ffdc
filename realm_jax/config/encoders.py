"""The encoders by name, and the defaults that depend on them."""

import dataclasses
from typing import Any, Literal

# Layers, width and heads of the published small BERTs (Turc et al. 2019) and of
# BERT-base.
PRESETS = {
    'tiny': (2, 128, 2),
    'mini': (4, 256, 4),
    'small': (4, 512, 8),
    'base': (12, 768, 12),
}


@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder and the defaults of `ModelConfig` that are its own.

  path: of its class, a subclass of `realm_jax.models.encoders.Encoder`.
  base: layers, width and heads of the preset 'base'.
  mlp_ratio: width of the MLP / width of the encoder.
  """

  path: str
  base: tuple[int, int, int] = PRESETS['base']
  mlp_ratio: float = 4.0
  activation: Literal['gelu', 'gelu_new'] = 'gelu'
  layer_norm_eps: float = 1e-5


ENCODERS = {
    'bert': Encoder(
        'realm_jax.models.bert:Bert',
        activation='gelu_new',
        layer_norm_eps=1e-12,
    ),
    'roberta': Encoder('realm_jax.models.bert:Roberta'),
    'modernbert': Encoder(
        'realm_jax.models.modernbert:ModernBert',
        base=(22, 768, 12),
        mlp_ratio=1.5,
    ),
}


def complete(model: Any) -> None:
  """Sets the fields of a `ModelConfig` that stand for a default.

  An encoder of your own has the defaults of BERT.
  """
  encoder = ENCODERS.get(model.encoder, ENCODERS['bert'])
  if model.preset in PRESETS:
    base = model.preset == 'base'
    sizes = encoder.base if base else PRESETS[model.preset]
    model.num_layers = model.num_layers or sizes[0]
    model.width = model.width or sizes[1]
    model.num_heads = model.num_heads or sizes[2]
    model.mlp_width = model.mlp_width or int(encoder.mlp_ratio * model.width)
  if model.activation == 'auto':
    model.activation = encoder.activation
  if model.layer_norm_eps < 0:
    model.layer_norm_eps = encoder.layer_norm_eps
