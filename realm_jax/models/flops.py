"""FLOP of the networks, in closed form.

Counted are matrix products, two FLOP for each multiply-add, as in "model FLOP
utilisation". XLA also counts elementwise operations, 1 to 9 % more at the
shapes tried.
"""

import dataclasses
from typing import Any

from realm_jax import config as config_lib
from realm_jax.models import encoders


@dataclasses.dataclass(frozen=True)
class Pass:
  """An encoder over `rows` inputs of `length` wordpieces, with its head."""

  component: str
  rows: int
  length: int
  outputs: int  # Positions of a row at which the last layer is computed.
  head_flop: float  # Forward, all rows together.
  dropout: bool = True
  # Values in float32 that the head keeps for its gradient, all rows together.
  head_values: float = 0.0


def embed(
    config: config_lib.Config,
    rows: int,
    length: int,
    extra_flop: float = 0.0,
    dropout: bool = False,
) -> Pass:
  """Returns the pass that embeds `rows` texts; `extra_flop` counts as head."""
  model = config.model
  head = float(rows * _embedder_head(model))
  outputs = _embedder_outputs(model, length)
  return Pass('embedder', rows, length, outputs, head + extra_flop, dropout)


def _embedder_outputs(model: config_lib.ModelConfig, length: Any) -> Any:
  return length if model.pooling == 'mean' else 1


def _embedder_head(model: config_lib.ModelConfig) -> int:
  """Returns the FLOP of the pooler and the projection for one text."""
  pooler = model.width if model.pooling == 'cls_tanh' else 0
  projected = 0 if model.projection == 'none' else model.embedding_width
  return 2 * model.width * (pooler + projected)


def fill(config: config_lib.Config, rows: int) -> Pass:
  """Returns the reader's pass over `rows` inputs with masks."""
  lengths = config.lengths
  masks = rows * lengths.masks
  return Pass(
      'reader',
      rows,
      lengths.joint,
      lengths.masks,
      head_flop(config.model, masks),
      head_values=float(masks * config.model.vocab_size),  # The logits.
  )


def pass_flop(
    model: config_lib.ModelConfig, rows: int, length: float, outputs: float
) -> float:
  """Returns the FLOP of an encoder's forward pass without a head.

  The last layer computes keys and values at all positions, and the rest at
  `outputs` positions of each row.
  """
  d, f = model.width, model.mlp_width
  encoder, total = encoders.load(model), 0.0
  depth = encoder.depth(model)
  for layer in range(depth):
    last = layer == depth - 1
    at = min(outputs, length) if last else length
    keys_and_values = 2 * length * 2 * d * d
    query_output_and_mlp = 2 * at * (2 * d * d + encoder.mlp_kernels * d * f)
    attention = 2 * 2 * at * encoder.attended(model, layer, length) * d
    total += rows * (keys_and_values + query_output_and_mlp + attention)
  return total


def head_flop(model: config_lib.ModelConfig, positions: int) -> float:
  """Returns the forward FLOP of the MLM head at `positions` in all."""
  return 2.0 * positions * model.width * (model.width + model.vocab_size)


def embed_flop(
    model: config_lib.ModelConfig, passages: int, wordpieces: float
) -> float:
  """Returns the FLOP to embed passages of a mean number of wordpieces."""
  outputs = _embedder_outputs(model, wordpieces)
  body = pass_flop(model, passages, wordpieces, outputs)
  return body + passages * _embedder_head(model)


def search_flop(config: config_lib.Config, passages: int) -> float:
  """Returns the FLOP of the exact search of a batch."""
  return 2.0 * config.batch_size * passages * config.model.embedding_width


def model_flop(config: config_lib.Config, passes: list[Pass]) -> float:
  """Returns the FLOP that a step needs, all devices together.

  The backward pass, which frozen components lack, computes two products for
  each of the forward pass.
  """
  learned = learned_passes(config, passes)
  return _forward(config, passes) + 2 * _forward(config, learned)


def hardware_flop(
    config: config_lib.Config, passes: list[Pass], in_batch: bool
) -> float:
  """Returns the FLOP that a step computes, with recomputation (`model.remat`).

  XLA's count is that of one part if a step has several (config.accumulate): it
  counts one iteration of a loop.

  Args:
    config: resolved.
    passes: of the stage.
    in_batch: whether the stage's loss combines rows, which are then embedded
      twice in a step of several parts.
  """
  model, again = config.model, 0.0
  if in_batch and config.accumulate > 1:
    again += _forward(config, passes)
  for p in learned_passes(config, passes):
    if model.remat == 'full':
      again += pass_flop(model, p.rows, p.length, p.outputs)
    elif model.remat == 'dots':  # Attention, in all layers but the last.
      encoder = encoders.load(model)
      attended = sum(
          encoder.attended(model, layer, p.length)
          for layer in range(encoder.depth(model) - 1)
      )
      again += 4.0 * p.rows * p.length * attended * model.width
  return model_flop(config, passes) + again


def learned_passes(config: config_lib.Config, passes: list[Pass]) -> list[Pass]:
  """Returns the passes that have a backward pass."""
  return [p for p in passes if p.component not in config.optimizer.frozen]


def _forward(config: config_lib.Config, passes: list[Pass]) -> float:
  return sum(
      pass_flop(config.model, p.rows, p.length, p.outputs) + p.head_flop
      for p in passes
  )
