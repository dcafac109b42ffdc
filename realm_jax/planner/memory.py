"""Estimates of the memory of a training step and of a forward pass."""

from realm_jax import config as config_lib
from realm_jax.models import encoders
from realm_jax.models import flops

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


def step_memory(
    config: config_lib.Config,
    sizes: dict[str, int],
    passes: list[flops.Pass],
    data: int,
    model: int,
    fused: bool = False,
) -> dict[str, float]:
  """Returns the bytes on each device at the peak of a step, by use.

  On CPU, XLA recomputes for `remat` but keeps the activations all the same.
  `sizes` are parameters of each component. The mesh axis `data` divides the
  rows, `model` divides heads, MLP and vocabulary. A `fused` kernel of attention
  keeps no logits.
  """
  total = sum(sizes.values()) / model
  learned = total - sum(sizes[name] for name in config.optimizer.frozen) / model
  kept = 1 / data if config.mesh.zero else 1.0
  parts = config.accumulate
  passes = flops.learned_passes(config, passes)
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
  one = flops.Pass('embedder', rows, length, 1, 0.0, dropout=False)
  return _layer_bytes(model, one, 1, fused)[0]


def _layer_bytes(
    model: config_lib.ModelConfig, one: flops.Pass, devices: int, fused: bool
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
