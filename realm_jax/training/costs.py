"""What the encoders of a step compute: the formulas, in one place.

Public: `Pass`, `passes`, `pass_flop`, `head_flop`, `model_flop`,
`hardware_flop`, `embed_flop`, `search_flop`. FLOP are those of the matrix
products, two for each multiply-add, as of "model FLOP utilisation"; what is
left out is below 5 % of what XLA counts at the paper's shapes.
"""

import dataclasses

from realm_jax import config as config_lib

STATE_BYTES = 12  # Of a parameter in a checkpoint: float32, and Adam's two.
# What XLA keeps of a layer between forward and backward, in arrays of the
# size of the MLP's hidden state (four times that of the layer's output), of the
# attention's logits, and of dropout masks; and of embedding, last layer and
# head together. Fitted to what XLA reports in float32 for 23 small shapes of
# mlm, ict and realm, all of which it meets within 5 %: see tests/plan_test.py.
_NARROW_PER_F, _LOGITS, _MASKS_PER_D, _ENDS_PER_D = 5.9, 3.3, 4.4, 8.2
_GRADIENT_BYTES = 2.4
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


def passes(config: config_lib.Config) -> list[Pass]:
  """Returns the forward passes of one step of a resolved config."""
  c, model, lengths = config, config.model, config.lengths

  def embed(rows: int, length: int, dropout: bool) -> Pass:
    head = 2.0 * rows * (model.width**2 + model.width * model.embedding_width)
    return Pass('embedder', rows, length, 1, head, dropout)

  def fill(rows: int) -> Pass:
    head = head_flop(model, rows * lengths.masks)
    return Pass('reader', rows, lengths.joint, lengths.masks, head)

  queries = embed(c.batch_size, lengths.query, True)
  match c.objective:
    case 'mlm':
      return [fill(c.batch_size)]
    case 'ict':
      return [queries, embed(c.batch_size, lengths.document, False)]
    case 'realm':
      rows = c.batch_size * (c.num_candidates - 1)
      return [
          queries,
          embed(rows, lengths.document, False),
          embed(1, 3, False),  # The null document.
          fill(c.batch_size * c.num_candidates),
      ]
  rows = c.batch_size * c.open_qa.read
  # Its head is linear in the number of spans, and small beside the BERT.
  read = Pass('span_reader', rows, lengths.joint, lengths.joint, 0.0)
  if c.open_qa.documents == 'trained':
    return [queries, embed(rows, lengths.document, False), read]
  return [queries, read]


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


def model_flop(config: config_lib.Config) -> float:
  """FLOP that a step of a resolved config needs, of all devices together."""
  return _FORWARD_AND_BACKWARD * _forward(config)


def hardware_flop(config: config_lib.Config) -> float:
  """FLOP that a step does, with what is computed again in the backward pass."""
  return model_flop(config)


def embed_flop(
    model: config_lib.ModelConfig, passages: int, wordpieces: float
) -> float:
  """FLOP of embedding so many passages, of a mean length, once."""
  head = 2 * model.width * (model.width + model.embedding_width)
  return pass_flop(model, passages, wordpieces, 1) + passages * head


def search_flop(config: config_lib.Config, passages: int) -> float:
  """FLOP of the exact search of one batch."""
  return 2.0 * config.batch_size * passages * config.model.embedding_width


def parameters(config: config_lib.Config) -> dict[str, int]:
  """Returns how many parameters each component of a resolved config has."""
  m = config.model
  d, f, e, w = m.width, m.mlp_width, m.embedding_width, m.span_width
  norm = 2 * d
  layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * norm
  bert = (m.vocab_size + m.max_positions + 2) * d + norm + m.num_layers * layer
  encoder = bert + d * d + d  # With its pooler.
  projection = d * e + e + 2 * e
  sizes = {
      'embedder': encoder
      + projection
      + (m.towers != 'shared') * projection
      + (m.towers == 'separate') * encoder,
      'reader': bert + d * d + d + norm + m.vocab_size,
      'span_reader': bert + 2 * w * d + 2 * w + 2 * w + w + 1,
  }
  return {name: sizes[name] for name in config_lib.COMPONENTS[config.objective]}


def step_memory(
    config: config_lib.Config, data: int, model: int
) -> dict[str, float]:
  """Bytes on each device at the peak of a step, on a mesh of such sizes.

  `data` divides the rows. Parameters are whole on each device, and so is what
  `model` computes.
  """
  del model
  total = sum(parameters(config).values())
  saved = sum(
      _saved_bytes(config.model, p, config.model.dropout > 0)
      for p in passes(config)
  )
  return {
      'weights_gb': 4.0 * total,
      'optimizer_gb': 8.0 * total,
      # Not all of them are there before activations have gone.
      'gradients_gb': _GRADIENT_BYTES * total,
      'activations_gb': saved / data,
  }


def forward_memory(
    model: config_lib.ModelConfig, rows: int, length: int
) -> float:
  """Bytes of activations of a forward pass alone, which keeps one layer's."""
  layer = Pass('', rows, length, 1, 0.0, dropout=False)
  one_layer = dataclasses.replace(model, num_layers=2)
  return _saved_bytes(one_layer, layer, False)


def _saved_bytes(
    model: config_lib.ModelConfig, one: Pass, dropout: bool
) -> float:
  """Bytes that the backward pass of one BERT finds of its forward pass."""
  wordpieces = one.rows * one.length
  logits = one.rows * model.num_heads * one.length**2
  narrow = 2 if model.compute_dtype == 'bfloat16' else 4
  layer = narrow * _NARROW_PER_F * wordpieces * model.mlp_width
  layer += (narrow + 4 * (_LOGITS - 1)) * logits
  if dropout and one.dropout:
    layer += 4 * (logits + _MASKS_PER_D * wordpieces * model.width)
  ends = 4 * _ENDS_PER_D * wordpieces * model.width
  return (model.num_layers - 1) * layer + ends


def _forward(config: config_lib.Config) -> float:
  total = sum(
      pass_flop(config.model, p.rows, p.length, p.outputs) + p.head_flop
      for p in passes(config)
  )
  if config.objective == 'ict':  # Each query with each document.
    total += 2 * config.batch_size**2 * config.model.embedding_width
  return total
