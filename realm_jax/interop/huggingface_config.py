"""config.json of transformers, and the model config for it and back."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from realm_jax import config as config_lib
from realm_jax.corpus import entities
from realm_jax.interop import huggingface_names

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
# Field of ModelConfig, key in config.json, and the default of the key.
_SIZES: tuple[tuple[str, str, Any], ...] = (
    ('num_layers', 'num_hidden_layers', 12),
    ('width', 'hidden_size', 768),
    ('num_heads', 'num_attention_heads', 12),
    ('mlp_width', 'intermediate_size', 3072),
    ('vocab_size', 'vocab_size', 30522),
    ('max_positions', 'max_position_embeddings', 512),
    ('layer_norm_eps', 'layer_norm_eps', 1e-12),
    ('dropout', 'hidden_dropout_prob', 0.1),
    ('init_stddev', 'initializer_range', 0.02),
    ('embedding_width', 'retriever_proj_size', 128),
    ('span_width', 'span_hidden_size', 256),
    ('max_span_width', 'max_span_width', 10),
    ('span_norm_eps', 'reader_layer_norm_eps', 1e-3),
)
_MAX_LAYERS, _MAX_SIZE = 1000, 2**31 - 1


def model_config(values: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Returns the model config for the contents of a config.json.

  Unknown keys are ignored; a missing key has the default of transformers.

  Raises:
    ValueError: the architecture is not BERT as it was published.
  """
  kind = values.get('model_type', 'bert')
  if kind not in ('bert', 'dpr', 'realm'):
    raise ValueError(
        f"config.json has model_type={kind!r}; only 'bert', 'dpr' and 'realm'"
        ' can be read.'
    )
  act = values.get('hidden_act', 'gelu_new' if kind == 'realm' else 'gelu')
  if not isinstance(act, str) or act not in _ACTIVATIONS:
    raise ValueError(
        f'config.json has hidden_act={act!r}; known are {[*_ACTIVATIONS]}.'
    )
  for key, only in (
      ('position_embedding_type', 'absolute'),
      ('type_vocab_size', 2),
      ('is_decoder', False),
      ('add_cross_attention', False),
  ):
    if values.get(key, only) != only:
      raise ValueError(
          f'config.json has {key}={values[key]!r}; only {only!r} can be read.'
      )
  config = config_lib.ModelConfig()
  config.activation = _ACTIVATIONS[act]
  for field, key, default in _SIZES:
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
  if config.width % config.num_heads:
    raise ValueError(
        f'config.json has hidden_size={config.width}, not a multiple of '
        f'num_attention_heads={config.num_heads}.'
    )
  return config


def foreign_config(
    kind: str,
    config: config_lib.ModelConfig,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the contents of config.json for a model.

  Args:
    kind: one of `huggingface_names.KINDS`.
    config: resolved.
    base: further keys, such as those of the imported checkpoint.
  """
  values = dict(base or {})
  values |= {
      'architectures': [huggingface_names.KINDS[kind]],
      'model_type': 'bert' if kind in huggingface_names.BERT_KINDS else 'realm',
      'hidden_act': config.activation,
      'type_vocab_size': 2,
      'torch_dtype': 'float32',
      **{key: getattr(config, field) for field, key, _ in _SIZES},
  }
  # [PAD]; the default of REALM's class is another row, which is then not
  # trained.
  values.setdefault('pad_token_id', 0)
  values.setdefault('attention_probs_dropout_prob', config.dropout)
  if kind in huggingface_names.BERT_KINDS:
    for field in ('embedding_width', 'span_width', 'max_span_width'):
      values.pop(next(key for name, key, _ in _SIZES if name == field))
    values.pop('reader_layer_norm_eps')
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
