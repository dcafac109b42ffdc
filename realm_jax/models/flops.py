"""FLOP of the networks, in closed form.

FLOP are those of matrix products, two for each multiply-add, as in "model FLOP
utilisation". XLA also counts elementwise operations, 1 to 9 % more at the
shapes tried.
"""

import dataclasses

from realm_jax import config as config_lib

# A product is done once forward and twice backward, for its two gradients.
_FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class Pass:
  """One BERT over `rows` inputs of `length` wordpieces, and its head.

  outputs: positions of each row at which the last layer is computed.
  head_flop: of the head, forward, all rows together.
  dropout: whether there is any.
  """

  component: str
  rows: int
  length: int
  outputs: int
  head_flop: float
  dropout: bool = True


def embed(
    config: config_lib.Config,
    rows: int,
    length: int,
    extra_flop: float = 0.0,
    dropout: bool = False,
) -> Pass:
  """Returns the pass that embeds `rows` texts; `extra_flop` counts as head."""
  model = config.model
  head = 2.0 * rows * (model.width**2 + model.width * model.embedding_width)
  return Pass('embedder', rows, length, 1, head + extra_flop, dropout)


def fill(config: config_lib.Config, rows: int) -> Pass:
  """Returns the pass of the reader that fills the masks of `rows` inputs."""
  lengths = config.lengths
  head = head_flop(config.model, rows * lengths.masks)
  return Pass('reader', rows, lengths.joint, lengths.masks, head)


def pass_flop(
    model: config_lib.ModelConfig, rows: int, length: float, outputs: int
) -> float:
  """FLOP of a BERT forward, without a head.

  The last layer needs keys and values everywhere, the rest of it at `outputs`
  positions of each row only.
  """
  d, f = model.width, model.mlp_width

  def layer(at: float) -> float:
    keys_and_values = 2 * length * 2 * d * d
    query_output_and_mlp = 2 * at * (2 * d * d + 2 * d * f)
    attention = 2 * 2 * at * length * d
    return float(rows * (keys_and_values + query_output_and_mlp + attention))

  return (model.num_layers - 1) * layer(length) + layer(min(outputs, length))


def head_flop(model: config_lib.ModelConfig, positions: int) -> float:
  """FLOP of the MLM head forward, at so many positions in all."""
  return 2.0 * positions * model.width * (model.width + model.vocab_size)


def model_flop(config: config_lib.Config, passes: list[Pass]) -> float:
  """Returns the FLOP that a step needs, of all devices together.

  Frozen components have no backward pass.

  Args:
    config: resolved.
    passes: of the stage.
  """
  backward = _FORWARD_AND_BACKWARD - 1
  learned = learned_passes(config, passes)
  return _forward(config, passes) + backward * _forward(config, learned)


def hardware_flop(
    config: config_lib.Config, passes: list[Pass], in_batch: bool
) -> float:
  """Returns the FLOP that a step does, with recomputation (`model.remat`).

  XLA's own count is that of one part of a step with several
  (config.accumulate): it counts one round of a loop.

  Args:
    config: resolved.
    passes: of the stage.
    in_batch: whether the stage's loss combines rows. All rows are then embedded
      twice if a step has several parts.
  """
  c, again = config, 0.0
  if in_batch and c.accumulate > 1:
    again += _forward(c, passes)
  for p in learned_passes(c, passes):
    if c.model.remat == 'full':
      again += pass_flop(c.model, p.rows, p.length, p.outputs)
    elif c.model.remat == 'dots':  # Attention, in all layers but the last.
      products = 4.0 * p.rows * p.length**2 * c.model.width
      again += (c.model.num_layers - 1) * products
  return model_flop(c, passes) + again


def embed_flop(
    model: config_lib.ModelConfig, passages: int, wordpieces: float
) -> float:
  """FLOP of embedding so many passages, of a mean length, once."""
  head = 2 * model.width * (model.width + model.embedding_width)
  return pass_flop(model, passages, wordpieces, 1) + passages * head


def search_flop(config: config_lib.Config, passages: int) -> float:
  """FLOP of the exact search of one batch."""
  return 2.0 * config.batch_size * passages * config.model.embedding_width


def learned_passes(
    config: config_lib.Config, passes: list[Pass]
) -> list[Pass]:
  """Returns the passes that have a backward pass."""
  frozen = config.optimizer.frozen
  return [p for p in passes if p.component not in frozen]


def _forward(config: config_lib.Config, passes: list[Pass]) -> float:
  return sum(
      pass_flop(config.model, p.rows, p.length, p.outputs) + p.head_flop
      for p in passes
  )
