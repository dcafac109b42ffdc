"""FLOP of the networks, in closed form, and estimates of memory.

Counted are matrix products, two FLOP for each multiply-add, as in "model FLOP
utilisation". XLA also counts elementwise operations, 1 to 9 % more at the
shapes tried.
"""

import dataclasses
from typing import Any

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.models import encoders

STATE_BYTES = 12  # Per parameter in a checkpoint: float32, Adam's two moments.
# Activations kept for the backward pass. Per layer except the last: arrays of
# the size of the hidden states, of the MLP's, and of the attention logits, and
# bytes for each logit that may be dropped. Embedding, last layer and head
# together: arrays of the size of the hidden states. Gradients: the share that
# is allocated when most activations are. Fitted to XLA's reports in float32 on
# CPU for 16 small shapes of mlm, ict and realm, within 4 % of all of them;
# tests/planner/plan_test.py has other shapes.
_HIDDEN, _MLP, _LOGITS, _LOGIT_DROPOUT_BYTES = 9.05, 3.25, 1.24, 5.8
_ENDS, _GRADIENTS = 18.7, 0.63
# The share of `_HIDDEN` that mesh axis `model` divides: query, key, value, mix.
_BY_HEADS = 4.0
# With remat=dots: a layer's input and the results of its matmuls with weights.
_DOTS_HIDDEN, _DOTS_MLP = 6.0, 1.0


@dataclasses.dataclass(frozen=True)
class Pass:
  """An encoder over `rows` inputs of `length` wordpieces, with its head."""

  network: str  # Its parameters are named network.*, for optimizer.frozen.
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
  """Returns the pass that embeds `rows` texts; `extra_flop` counts as head.

  Queries have dropout, documents have none.
  """
  model = config.model
  head = float(rows * _embedder_head(model))
  outputs = _embedder_outputs(model, length)
  own = dropout and model.towers == 'separate'
  network = 'embedder.query_encoder' if own else 'embedder.encoder'
  return Pass(network, rows, length, outputs, head + extra_flop, dropout)


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
      'reader.bert',
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
  return [p for p in passes if not components_lib.is_frozen(config, p.network)]


def _forward(config: config_lib.Config, passes: list[Pass]) -> float:
  return sum(
      pass_flop(config.model, p.rows, p.length, p.outputs) + p.head_flop
      for p in passes
  )


def step_memory(
    config: config_lib.Config,
    sizes: dict[str, int],
    frozen: int,
    passes: list[Pass],
    data: int,
    model: int,
    fused: bool = False,
) -> dict[str, float]:
  """Returns the bytes on each device at the peak of a step, by use.

  On CPU, XLA recomputes for `remat` but keeps the activations all the same.
  `sizes` are parameters of each component; `frozen` of them never change. The
  mesh axis `data` divides the rows, `model` divides heads, MLP and vocabulary.
  A `fused` kernel of attention keeps no logits.
  """
  total = sum(sizes.values()) / model
  learned = total - frozen / model
  kept = 1 / data if config.mesh.zero else 1.0
  parts = config.accumulate
  passes = learned_passes(config, passes)
  layers = [
      [x / data / parts for x in _layer_bytes(config.model, p, model, fused)]
      for p in passes
  ]
  depth = encoders.load(config.model).depth(config.model)
  # The last layer is computed for the outputs only.
  saved = sum(
      (depth - 1 + (p.outputs == p.length)) * remat
      for p, (_, remat) in zip(passes, layers, strict=True)
  )
  if config.model.remat != 'none':  # Plus one layer during recomputation.
    saved += max(whole for whole, _ in layers)
  width = config.model.width
  ends = sum(
      4 * (_ENDS * p.rows * p.length * width + p.head_values) for p in passes
  )
  saved += ends / data / parts
  return {
      # With ZeRO, the divided weights and the gathered copy.
      'weights': 4.0 * total * (1 + kept if config.mesh.zero else 1),
      'optimizer': 8.0 * learned * kept,
      'gradients': 4.0 * learned * _GRADIENTS * (2 if parts > 1 else 1),
      'activations': saved,
  }


def forward_memory(
    model: config_lib.ModelConfig, rows: int, length: int, fused: bool = False
) -> float:
  """Returns the bytes of a forward pass, which needs one layer at a time."""
  one = Pass('embedder', rows, length, 1, 0.0, dropout=False)
  return _layer_bytes(model, one, 1, fused)[0]


def _layer_bytes(
    model: config_lib.ModelConfig, one: Pass, devices: int, fused: bool
) -> tuple[float, float]:
  """Returns the bytes of a layer's activations: all, and those remat keeps.

  `devices` divide heads and MLP.
  """
  narrow = 2 if model.compute_dtype == 'bfloat16' else 4
  hidden = narrow * one.rows * one.length * model.width
  mlp = narrow * one.rows * one.length * model.mlp_width / devices
  logits = one.rows * model.num_heads * one.length**2 / devices
  whole = (_HIDDEN - _BY_HEADS + _BY_HEADS / devices) * hidden + _MLP * mlp
  if not fused:
    # The weights are in compute_dtype, the rest in float32.
    whole += (narrow + 4 * (_LOGITS - 1)) * logits
    if one.dropout and config_lib.attention_rate(model):
      whole += _LOGIT_DROPOUT_BYTES * logits
  match model.remat:
    case 'full':
      return whole, hidden
    case 'dots':
      return whole, _DOTS_HIDDEN * hidden + _DOTS_MLP * mlp
  return whole, whole
