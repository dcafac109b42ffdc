"""config.json of transformers, and the model config for it and back."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from realm_jax import config as config_lib
from realm_jax.corpus import entities
from realm_jax.interop import encoder_names
from realm_jax.interop import huggingface_names
from realm_jax.models import encoders

# Two functions with all names that transformers has for them.
_ACTIVATIONS: dict[Any, Literal['gelu', 'gelu_new']] = {
    'gelu': 'gelu',
    'gelu_python': 'gelu',
    'gelu_new': 'gelu_new',
    'gelu_pytorch_tanh': 'gelu_new',
    'gelu_python_tanh': 'gelu_new',
    'gelu_fast': 'gelu_new',
    'gelu_accurate': 'gelu_new',
}
_MAX_LAYERS, _MAX_SIZE = 1000, 2**31 - 1


def encoder_of(values: Mapping[str, Any]) -> str:
  """Returns the encoder of a config.json.

  Raises:
    ValueError: its architecture is not known.
  """
  kind = values.get('model_type', 'bert')
  if kind not in encoder_names.MODEL_TYPES:
    raise ValueError(
        f'config.json has model_type={kind!r}; only'
        f' {", ".join(map(repr, encoder_names.MODEL_TYPES))} can be read.'
    )
  return encoder_names.MODEL_TYPES[kind]


def model_config(values: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Returns the model config for the contents of a config.json.

  Unknown keys are ignored; a missing key has the default of transformers.

  Raises:
    ValueError: the architecture is not BERT as it was published.
  """
  kind = values.get('model_type', 'bert')
  config = config_lib.ModelConfig(encoder=encoder_of(values))
  names = encoder_names.NAMES[config.encoder]
  act = values.get(names.activation, 'gelu_new' if kind == 'realm' else 'gelu')
  if not isinstance(act, str) or act not in _ACTIVATIONS:
    raise ValueError(
        f'config.json has {names.activation}={act!r}; known are'
        f' {[*_ACTIVATIONS]}.'
    )
  for key, (default, only) in {
      **names.only, 'classifier_activation': (act, act)
  }.items():
    value = values.get(key, default)
    if value != only:
      raise ValueError(
          f'config.json has {key}={value!r}; only {only!r} can be read.'
      )
  config.activation = _ACTIVATIONS[act]
  for field, key, default in names.sizes:
    value = values.get(key, default)
    least, most = (0, 1) if isinstance(default, float) else (1, _MAX_SIZE)
    if field == 'num_layers':
      most = _MAX_LAYERS
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not least <= value <= most
        or type(default)(value) != value
    ):
      raise ValueError(
          f'config.json has {key}={value!r}; expected a number from {least} to'
          f' {most}, as in {key}={default}.'
      )
    setattr(config, field, type(default)(value))
  encoder = encoders.load(config)
  if encoder.options:
    config.encoder_options = encoder_names.options(values)
  problems = [f'{field}: {why}' for field, why in encoder.problems(config)]
  if problems:
    raise ValueError(f'config.json cannot be read: {"; ".join(problems)}.')
  if config.encoder != 'bert':  # REALM's have 1, and the padding is at 0.
    pad_id = values.get('pad_token_id', 1)
    config.pad_id = pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0
  config.max_positions -= encoder.unused_positions(config)
  if config.width % config.num_heads:
    raise ValueError(
        f'config.json has hidden_size={config.width}, not a multiple of '
        f'num_attention_heads={config.num_heads}.'
    )
  return config


def set_pad_id(config: config_lib.ModelConfig, pad_id: int) -> None:
  """Sets the id of the padding to that of the tokenizer.

  Raises:
    ValueError: the positions of the checkpoint are numbered from another one.
  """
  encoder, given = encoders.load(config), config.pad_id
  before, config.pad_id = encoder.unused_positions(config), pad_id
  if encoder.unused_positions(config) != before:
    raise ValueError(
        f'config.json has pad_token_id={given}, from which positions are'
        f' numbered, and the tokenizer has the padding at {pad_id}: give the'
        " checkpoint's own with --vocab."
    )


def foreign_config(
    kind: str,
    config: config_lib.ModelConfig,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the contents of config.json for a model, one of `KINDS`.

  `base` has further keys, such as those of the imported checkpoint.
  """
  names = encoder_names.NAMES[config.encoder]
  is_realm = kind not in huggingface_names.BERT_KINDS
  model_type = 'realm' if is_realm else names.model_types[0]
  values = dict(base or {})
  if model_type != 'bert' and values.get('model_type') in names.model_types:
    model_type = values['model_type']  # XLM-R has another than RoBERTa.
  values |= {
      'architectures': [huggingface_names.class_of(kind, config)],
      'model_type': model_type,
      names.activation: config.activation,
      'torch_dtype': 'float32',
      **{key: getattr(config, field) for field, key, _ in names.sizes},
  }
  unused = encoders.load(config).unused_positions(config)
  values['max_position_embeddings'] += unused
  if 'type_vocab_size' in names.only:
    values['type_vocab_size'] = names.only['type_vocab_size'][1]
  if encoders.load(config).options:
    values |= encoder_names.foreign_options(config)
  # The default of REALM's class is another row, which is then not trained.
  values.setdefault('pad_token_id', config.pad_id)
  values.setdefault(names.attention_dropout, config.dropout)
  if kind in huggingface_names.BERT_KINDS:
    for key in encoder_names.REALM_KEYS:
      values.pop(key, None)
  return values


def tags(values: Mapping[str, Any]) -> list[str] | None:
  """Returns the tags of a classifier, or None if they are no tagger's.

  A tagger has O, and for each type of entities B- and I-, in any order.
  """
  labels = values.get('id2label')
  if not isinstance(labels, dict):
    return None
  found = [str(labels.get(str(i))) for i in range(len(labels))]
  known = entities.labels(types(found))
  same = len(known) > 1 and sorted(known) == sorted(found)
  return found if same else None


def types(tags: Sequence[str]) -> list[str]:
  """Returns the types of entities in the order of their B- tags."""
  return [tag[2:] for tag in tags if tag.startswith('B-')]
