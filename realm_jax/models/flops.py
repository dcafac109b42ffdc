"""What a step computes and keeps: FLOP, parameters, bytes. The formulas.

Public: `Pass`, `passes`, `pass_flop`, `head_flop`, `model_flop`,
`hardware_flop`, `embed_flop`, `search_flop`, `parameters`, `step_memory`,
`forward_memory`, `STATE_BYTES`. FLOP are those of the matrix products, two for
each multiply-add, as in "model FLOP utilisation"; XLA counts what is done to
single elements too, 1 to 9 % more at the shapes tried.
"""

import dataclasses

from realm_jax import config as config_lib

STATE_BYTES = 12  # Of a parameter in a checkpoint: float32, and Adam's two.
# What the backward pass finds of the forward pass. Of each layer but the last:
# arrays of the size of the hidden states, of the MLP's, and of the attention's
# logits, and bytes for each logit that may be dropped; then, of embedding, last
# layer and head together, arrays of the size of the hidden states; and of the
# gradients what is there when most activations are. Fitted to what XLA reports
# in float32 on CPU for 16 small shapes of mlm, ict and realm, all of which this
# meets within 4 %; tests/plan_test.py has others.
_HIDDEN, _MLP, _LOGITS, _LOGIT_DROPOUT_BYTES = 9.05, 3.25, 1.24, 5.8
_ENDS, _GRADIENTS = 18.7, 0.63
# Of `_HIDDEN`, those that mesh axis `model` divides: query, key, value, mixed.
_BY_HEADS = 4.0
# With remat=dots: a layer's input and the results of its matmuls with weights.
_DOTS_HIDDEN, _DOTS_MLP = 6.0, 1.0
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
    case 'tagger':
      length, labels = c.tagger.length, 1 + 2 * len(model.entity_types)
      head = 2.0 * c.batch_size * length * model.width * labels
      return [Pass('tagger', c.batch_size, length, length, head)]
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
  """FLOP that a step of a resolved config needs, of all devices together.

  Frozen components have no backward pass.
  """
  forward = _forward(config, passes(config))
  return forward + (_FORWARD_AND_BACKWARD - 1) * _forward(
      config, _learned(config)
  )


def hardware_flop(config: config_lib.Config) -> float:
  """FLOP that a step does, with what is computed again in the backward pass.

  XLA's own count is of one part only where a step has several
  (config.accumulate): it looks into a loop, and does not count its rounds.
  """
  c, again = config, 0.0
  if c.objective == 'ict' and c.accumulate > 1:  # All is embedded twice.
    again += _forward(c, passes(c))
  for p in _learned(c):
    if c.model.remat == 'full':
      again += pass_flop(c.model, p.rows, p.length, p.outputs)
    elif c.model.remat == 'dots':  # Attention, in all layers but the last.
      products = 4.0 * p.rows * p.length**2 * c.model.width
      again += (c.model.num_layers - 1) * products
  return model_flop(c) + again


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
      'tagger': bert + (d + 1) * (1 + 2 * len(m.entity_types)),
  }
  return {name: sizes[name] for name in config_lib.COMPONENTS[config.objective]}


def step_memory(
    config: config_lib.Config, data: int, model: int, fused: bool = False
) -> dict[str, float]:
  """Bytes on each device at the peak of a step.

  On CPU XLA computes again what `remat` asks for, but keeps it all the same.

  Args:
    config: resolved.
    data: devices along this axis of the mesh; they divide the rows.
    model: along this one; they divide heads, MLP and vocabulary.
    fused: whether the attention's kernel keeps no logits.
  """
  sizes = parameters(config)
  total = sum(sizes.values()) / model
  learned = total - sum(sizes[name] for name in config.optimizer.frozen) / model
  kept = 1 / data if config.mesh.zero else 1.0
  parts = config.accumulate
  layers = [
      [x / data / parts for x in _layer_bytes(config.model, p, model, fused)]
      for p in _learned(config)
  ]
  saved = sum((config.model.num_layers - 1) * remat for _, remat in layers)
  if config.model.remat != 'none':  # And one layer, while it is computed again.
    saved += max(whole for whole, _ in layers)
  ends = sum(4 * _ENDS * p.rows * p.length for p in _learned(config))
  saved += ends * config.model.width / data / parts
  return {
      # Divided, they are put together for the step.
      'weights': 4.0 * total * (1 + kept if config.mesh.zero else 1),
      'optimizer': 8.0 * learned * kept,
      'gradients': 4.0 * learned * _GRADIENTS * (2 if parts > 1 else 1),
      'activations': saved,
  }


def forward_memory(
    model: config_lib.ModelConfig, rows: int, length: int, fused: bool = False
) -> float:
  """Bytes of a forward pass alone, which needs one layer at a time."""
  one = Pass('embedder', rows, length, 1, 0.0, dropout=False)
  return _layer_bytes(model, one, 1, fused)[0]


def _layer_bytes(
    model: config_lib.ModelConfig, one: Pass, parts: int, fused: bool
) -> tuple[float, float]:
  """Bytes that a layer keeps of its forward pass: all, and with its remat.

  `parts`: over how many devices heads and MLP are divided.
  """
  narrow = 2 if model.compute_dtype == 'bfloat16' else 4
  hidden = narrow * one.rows * one.length * model.width
  mlp = narrow * one.rows * one.length * model.mlp_width / parts
  logits = one.rows * model.num_heads * one.length**2 / parts
  whole = (_HIDDEN - _BY_HEADS + _BY_HEADS / parts) * hidden + _MLP * mlp
  if not fused:
    # The weights are in compute_dtype, what is left over in float32.
    whole += (narrow + 4 * (_LOGITS - 1)) * logits
    if one.dropout and config_lib.attention_rate(model):
      whole += _LOGIT_DROPOUT_BYTES * logits
  match model.remat:
    case 'full':
      return whole, hidden
    case 'dots':
      return whole, _DOTS_HIDDEN * hidden + _DOTS_MLP * mlp
  return whole, whole


def _learned(config: config_lib.Config) -> list[Pass]:
  """The passes that have a backward pass."""
  frozen = config.optimizer.frozen
  return [p for p in passes(config) if p.component not in frozen]


def _forward(config: config_lib.Config, among: list[Pass]) -> float:
  total = sum(
      pass_flop(config.model, p.rows, p.length, p.outputs) + p.head_flop
      for p in among
  )
  if config.objective == 'ict':  # Each query with each document.
    total += 2 * config.batch_size**2 * config.model.embedding_width
  return total
