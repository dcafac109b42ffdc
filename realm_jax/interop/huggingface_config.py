"""How transformers describes models: classes, tensor names, config.json.

`NAMES` has one entry for each encoder. The rest of `interop` knows the tensor
names of BERT alone: those of other encoders are read under these names, as far
as the modules are the same.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import re
from typing import Any, Literal

from realm_jax import config as config_lib
from realm_jax.corpus import entities
from realm_jax.models import encoders

# Kinds of checkpoint and their classes in transformers; `class_of` has those of
# other encoders.
KINDS = {
    'bert': 'BertForMaskedLM',
    'embedder': 'RealmEmbedder',
    'scorer': 'RealmScorer',
    'encoder': 'RealmKnowledgeAugEncoder',
    'reader': 'RealmReader',
    'openqa': 'RealmForOpenQA',
    'tagger': 'BertForTokenClassification',
}
BERT_KINDS = ('bert', 'tagger')  # In every version of transformers.
# An import with the head of a retriever, which is not REALM's (`Head`).
RETRIEVER = 'retriever'
# Two functions with all names that transformers has for them.
_ACTIVATIONS: dict[Any, Literal['gelu', 'gelu_new']] = {
    'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_new',
    'gelu_pytorch_tanh': 'gelu_new', 'gelu_python_tanh': 'gelu_new',
    'gelu_fast': 'gelu_new', 'gelu_accurate': 'gelu_new',
}
_MAX_LAYERS, _MAX_SIZE = 1000, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Names:
  """How transformers names an encoder.

  masked_lm: its class with a masked-LM head.
  tagger: its class that labels wordpieces; None: it has more layers than ours.
  model_types: of config.json, the first one for an export.
  embeddings: tables of the embeddings, and their parameters.
  modules: of a layer, and their parameters.
  sizes: field of ModelConfig, key in config.json, its default there.
  activation: key of the activation.
  attention_dropout: key of the dropout of attention weights.
  only: keys for which one value can be read: the default, and that value.
  renamed: parts of its tensor names, and of those of BERT; in this order.
  first_layer_lacks: modules that the first layer does not have.
  final: modules after the layers, and their parameters.
  bias: whether dense layers and LayerNorms have a bias.
  """

  masked_lm: str
  tagger: str | None
  model_types: tuple[str, ...]
  embeddings: Mapping[str, str]
  modules: Mapping[str, str]
  sizes: tuple[tuple[str, str, Any], ...]
  activation: str
  attention_dropout: str
  only: Mapping[str, tuple[Any, Any]]
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  first_layer_lacks: tuple[str, ...] = ()
  final: Mapping[str, str] = dataclasses.field(default_factory=dict)
  bias: bool = True


_SIZES = {
    'num_layers': ('num_hidden_layers', 12),
    'width': ('hidden_size', 768),
    'num_heads': ('num_attention_heads', 12),
    'mlp_width': ('intermediate_size', 3072),
    'vocab_size': ('vocab_size', 30522),
    'max_positions': ('max_position_embeddings', 512),
    'layer_norm_eps': ('layer_norm_eps', 1e-12),
    'dropout': ('hidden_dropout_prob', 0.1),
    'init_stddev': ('initializer_range', 0.02),
}
# Of REALM's classes.
_REALM_SIZES = {
    'embedding_width': ('retriever_proj_size', 128),
    'span_width': ('span_hidden_size', 256),
    'max_span_width': ('max_span_width', 10),
    'span_norm_eps': ('reader_layer_norm_eps', 1e-3),
}
REALM_KEYS = tuple(key for key, _ in _REALM_SIZES.values())
_MODULES = {
    'attention.self.query': 'query',
    'attention.self.key': 'key',
    'attention.self.value': 'value',
    'attention.output.dense': 'attention_output',
    'attention.output.LayerNorm': 'attention_norm',
    'intermediate.dense': 'mlp_in',
    'output.dense': 'mlp_out',
    'output.LayerNorm': 'mlp_norm',
}
_ONLY = {
    'position_embedding_type': ('absolute', 'absolute'),
    'is_decoder': (False, False),
    'add_cross_attention': (False, False),
}


def _sizes(**changes: tuple[str, Any]) -> tuple[tuple[str, str, Any], ...]:
  return tuple((k, *v) for k, v in {**_SIZES, **changes}.items())


_BERT = Names(
    masked_lm='BertForMaskedLM',
    tagger='BertForTokenClassification',
    model_types=('bert', 'dpr', 'realm'),
    embeddings={
        'word_embeddings': 'word_embed',
        'position_embeddings': 'position_embed',
        'token_type_embeddings': 'type_embed',
    },
    modules=_MODULES,
    sizes=_sizes(**_REALM_SIZES),
    activation='hidden_act',
    attention_dropout='attention_probs_dropout_prob',
    only={**_ONLY, 'type_vocab_size': (2, 2)},
)
_HEAD = 'cls.predictions.'
NAMES = {
    'bert': _BERT,
    'roberta': dataclasses.replace(
        _BERT,
        masked_lm='RobertaForMaskedLM',
        tagger='RobertaForTokenClassification',
        model_types=('roberta', 'xlm-roberta', 'camembert'),
        renamed={
            'roberta.': 'bert.',
            'lm_head.dense.': f'{_HEAD}transform.dense.',
            'lm_head.layer_norm.': f'{_HEAD}transform.LayerNorm.',
            'lm_head.': _HEAD,
        },
        sizes=_sizes(),
        only={**_ONLY, 'type_vocab_size': (2, 1)},
    ),
    'modernbert': Names(
        masked_lm='ModernBertForMaskedLM',
        tagger=None,
        model_types=('modernbert',),
        renamed={
            'model.': 'bert.',
            'head.dense.': f'{_HEAD}transform.dense.',
            'head.norm.': f'{_HEAD}transform.LayerNorm.',
            'decoder.': f'{_HEAD}decoder.',
            'embeddings.tok_embeddings.': 'embeddings.word_embeddings.',
            'embeddings.norm.': 'embeddings.LayerNorm.',
            'layers.': 'encoder.layer.',
            'final_norm.': 'encoder.final_norm.',
        },
        embeddings={'word_embeddings': 'word_embed'},
        modules={
            'attn_norm': 'attention_norm',
            'attn.Wqkv': 'qkv',
            'attn.Wo': 'attention_output',
            'mlp_norm': 'mlp_norm',
            'mlp.Wi': 'mlp_in',
            'mlp.Wo': 'mlp_out',
        },
        first_layer_lacks=('attn_norm',),
        final={'encoder.final_norm': 'final_norm'},
        bias=False,
        sizes=_sizes(
            num_layers=('num_hidden_layers', 22),
            mlp_width=('intermediate_size', 1152),
            vocab_size=('vocab_size', 50368),
            max_positions=('max_position_embeddings', 8192),
            layer_norm_eps=('norm_eps', 1e-5),
            dropout=('mlp_dropout', 0.0),
        ),
        activation='hidden_activation',
        attention_dropout='attention_dropout',
        only={
            'norm_bias': (False, False),
            'attention_bias': (False, False),
            'mlp_bias': (False, False),
            'classifier_bias': (False, False),
            'decoder_bias': (True, True),
            'tie_word_embeddings': (True, True),
        },
    ),
}
MODEL_TYPES = {
    model_type: encoder
    for encoder, names in NAMES.items()
    for model_type in names.model_types
}
_THETAS = {
    'full_attention': ('global_theta', 'global_rope_theta', 160_000.0),
    'sliding_attention': ('local_theta', 'local_rope_theta', 10_000.0),
}


def as_bert(name: str, encoder: str) -> str:
  """Returns the name of a tensor as BERT has it, with its prefix."""
  for theirs, ours in NAMES[encoder].renamed.items():
    if not (ours == 'bert.' or ours.startswith(_HEAD)):
      name = _replace(name, theirs, ours)
    elif name.startswith(theirs):
      name = ours + name.removeprefix(theirs)
  return name


def from_bert(text: str, encoder: str) -> str:
  """Returns a text in which names of `as_bert` are those of the encoder."""
  names = NAMES[encoder].renamed.items()
  for theirs, ours in sorted(names, key=lambda pair: -len(pair[1])):
    text = _replace(text, ours, theirs)
  return text


def tensors_from_bert(
    tensors: Mapping[str, Any], encoder: str
) -> dict[str, Any]:
  """Returns tensors by the names of the encoder.

  ModernBERT has the bias of the head as that of the decoder only.
  """
  found = {from_bert(name, encoder): x for name, x in tensors.items()}
  if encoder != 'bert':
    found = {n: x for n, x in found.items() if not n.startswith(_HEAD)}
  return found


def _replace(text: str, old: str, new: str) -> str:
  """Replaces the first `old` that is a whole part of a dotted name."""
  return re.sub(rf'(?<!\w){re.escape(old)}', new, text, count=1)


def class_of(kind: str, config: config_lib.ModelConfig) -> str:
  """Returns the class of a kind, for the encoder of a config.

  Raises:
    ValueError: the encoder has no such class.
  """
  names = NAMES.get(config.encoder)
  found: str | None = None
  if config.encoder == 'bert':
    found = KINDS[kind]
  elif names is not None:
    found = {'bert': names.masked_lm, 'tagger': names.tagger}.get(kind)
  if found is None:
    raise ValueError(
        f'transformers has no {kind!r} ({KINDS[kind]}) with the encoder'
        f' {config.encoder!r}.'
    )
  return found


def encoder_of(values: Mapping[str, Any]) -> str:
  """Returns the encoder of a config.json.

  Raises:
    ValueError: its architecture is not known.
  """
  kind = values.get('model_type', 'bert')
  if not isinstance(kind, str) or kind not in MODEL_TYPES:
    raise ValueError(
        f'config.json has model_type={kind!r}; only'
        f' {", ".join(map(repr, MODEL_TYPES))} can be read.'
    )
  return MODEL_TYPES[kind]


def model_config(values: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Returns the model config for the contents of a config.json.

  Unknown keys are ignored; a missing key has the default of transformers.

  Raises:
    ValueError: the architecture is not BERT as it was published.
  """
  kind = values.get('model_type', 'bert')
  config = config_lib.ModelConfig(encoder=encoder_of(values))
  names = NAMES[config.encoder]
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
    config.encoder_options = options(values)
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


def config_json(
    kind: str,
    config: config_lib.ModelConfig,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the contents of config.json for a model, one of `KINDS`.

  `base` has further keys, such as those of the imported checkpoint.
  """
  names = NAMES[config.encoder]
  is_realm = kind not in BERT_KINDS
  model_type = 'realm' if is_realm else names.model_types[0]
  values = dict(base or {})
  if model_type != 'bert' and values.get('model_type') in names.model_types:
    model_type = values['model_type']  # XLM-R has another than RoBERTa.
  values |= {
      'architectures': [class_of(kind, config)],
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
    values |= options_json(config)
  # The default of REALM's class is another row, which is then not trained.
  values.setdefault('pad_token_id', config.pad_id)
  values.setdefault(names.attention_dropout, config.dropout)
  if kind in BERT_KINDS:
    for key in REALM_KEYS:
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


def options(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of ModernBERT in a config.json.

  Raises:
    ValueError: a value is of no known form.
  """
  layers = values.get('layer_types')
  interval = values.get('global_attn_every_n_layers', 3)
  if layers is not None:
    kinds = [one == 'full_attention' for one in layers]
    interval = kinds.index(True, 1) if any(kinds[1:]) else max(1, len(kinds))
    if kinds != [i % interval == 0 for i in range(len(kinds))]:
      raise ValueError(
          f'config.json has layer_types={layers!r}; only global layers at equal'
          ' distances, from the first on, can be read.'
      )
  found = {
      'global_interval': interval,
      'window': values.get('local_attention', 128),
  }
  ropes = values.get('rope_parameters') or {}
  for kind, (ours, theirs, default) in _THETAS.items():
    rope = ropes.get(kind) or {}
    if rope.get('rope_type', 'default') != 'default' or (
        values.get('rope_scaling') is not None
    ):
      raise ValueError(
          f'config.json has rope_parameters={ropes!r} and rope_scaling='
          f'{values.get("rope_scaling")!r}; only the default type can be read.'
      )
    found[ours] = rope.get('rope_theta', values.get(theirs, default))
  return found


def options_json(config: config_lib.ModelConfig) -> dict[str, Any]:
  """Inverse of `options`, in the form of every version of transformers."""
  given = config.encoder_options
  every = given.get('global_interval', 3)
  kinds = ['sliding_attention', 'full_attention']
  found: dict[str, Any] = {
      'global_attn_every_n_layers': every,
      'layer_types': [kinds[i % every == 0] for i in range(config.num_layers)],
      'local_attention': given.get('window', 128),
      'rope_parameters': {},
  }
  for kind, (ours, theirs, default) in _THETAS.items():
    found[theirs] = theta = float(given.get(ours, default))
    found['rope_parameters'][kind] = {
        'rope_type': 'default', 'rope_theta': theta
    }
  return found
