"""Conversion of published weights to our parameters and back.

Each tensor of a checkpoint becomes a parameter, is a copy of another tensor, or
belongs to the class without being used. Any other tensor, and a missing one, is
an error. `huggingface_names` has the names.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any, Literal

import numpy as np

from realm_jax import config as config_lib
from realm_jax.interop import huggingface_names
from realm_jax.interop import weights
from realm_jax.models import components

_BLOCK_EMB = 'block_emb'
# 'gelu_pytorch_tanh' is the same function as 'gelu_new'.
_ACTIVATIONS: dict[Any, Literal['gelu', 'gelu_new']] = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_new',
    'gelu_pytorch_tanh': 'gelu_new',
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
_MAX_LISTED = 20

Tensor = np.ndarray | weights.FileTensor


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A converted checkpoint.

  kind: one of `huggingface_names.KINDS`.
  config: sizes of the model; its `towers` are those of the checkpoint.
  params: of each component, float32 numpy arrays.
  sources: names in the file to 'component/name' of the parameter.
  copies: names in the file to the tensor that each is a copy of.
  unused: tensors that the class never uses, still in their file.
  fresh: 'component/name' of the parameters that the checkpoint lacks, which are
    at their random initial values.
  block_emb: the document embeddings of an open-QA checkpoint, in their file.
  """

  kind: str
  config: config_lib.ModelConfig
  params: dict[str, components.Params]
  sources: dict[str, str]
  copies: dict[str, str]
  unused: dict[str, weights.FileTensor]
  fresh: list[str]
  block_emb: weights.FileTensor | None


def model_config(values: Mapping[str, Any]) -> config_lib.ModelConfig:
  """Returns the model config for the contents of a config.json.

  Unknown keys are ignored; a missing key has the default of transformers.

  Raises:
    ValueError: the architecture is not BERT as it was published.
  """
  kind = values.get('model_type', 'bert')
  if kind not in ('bert', 'realm'):
    raise ValueError(
        f"config.json is of the architecture {kind!r}; only 'bert' and 'realm'"
        ' can be read.'
    )
  act = values.get('hidden_act', 'gelu' if kind == 'bert' else 'gelu_new')
  if act not in _ACTIVATIONS:
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
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise ValueError(f'config.json has {key}={value!r}; expected a number.')
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


def components_in(tensors: Mapping[str, weights.FileTensor]) -> list[str]:
  """Returns the names of the components that a checkpoint has.

  Raises:
    ValueError: it is neither BERT nor REALM.
  """
  kind, _ = huggingface_names.kind_of(
      map(huggingface_names.modern_name, tensors)
  )
  return {
      'bert': ['embedder', 'reader'],
      'embedder': ['embedder'],
      'scorer': ['embedder'],
      'encoder': ['reader'],
      'reader': ['span_reader'],
      'openqa': ['embedder', 'span_reader'],
  }[kind]


def load(
    tensors: Mapping[str, weights.FileTensor],
    values: Mapping[str, Any],
    wanted: Iterable[str] | None = None,
    seed: int = 0,
) -> Loaded:
  """Converts a checkpoint; its tensor names tell its kind.

  Args:
    tensors: of the checkpoint's files, by name.
    values: its config.json.
    wanted: components to convert; None: all.
    seed: for parameters that a BERT does not have.

  Raises:
    ValueError: lists every tensor that is missing, unexpected, of a wrong
      shape, or differs from what it is a copy of; or names a component that the
      checkpoint lacks.
  """
  config = model_config(values)
  named = {
      huggingface_names.modern_name(name): tensor
      for name, tensor in tensors.items()
      if not name.endswith('embeddings.position_ids')
  }
  kind, prefix = huggingface_names.kind_of(named)
  if kind == 'scorer' and _differ(named):
    config.towers = 'separate'
  layout = (
      huggingface_names.bert_layout(config, named, prefix)
      if kind == 'bert'
      else huggingface_names.layout_of(kind, config)
  )
  known = sorted({e.ours.partition('/')[0] for e in layout.entries})
  names = known if wanted is None else list(wanted)
  if not names or set(names) - set(known):
    raise ValueError(
        f'The checkpoint is of the kind {kind!r} and has the components'
        f' {known}; wanted: {names}.'
    )
  parts = {name: components.make(name, config) for name in known}
  block_emb = named.pop(_BLOCK_EMB, None) if kind == 'openqa' else None
  _check(kind, config, layout, parts, named, block_emb)
  params, sources = _read(layout, named, names)
  fresh = []
  for name in names:
    missing = parts[name].abstract.keys() - params[name].keys()
    if missing:
      initial = parts[name].init(seed)
      params[name] |= {key: np.asarray(initial[key]) for key in missing}
      fresh += [f'{name}/{key}' for key in sorted(missing)]
  unused = {n: named[n] for n in layout.unused if n in named}
  copies = {
      tensor.name: named[layout.copies[name]].name
      for name, tensor in named.items()
      if name in layout.copies
  }
  return Loaded(
      kind, config, params, sources, copies, unused, fresh, block_emb
  )


def _differ(named: Mapping[str, weights.FileTensor]) -> bool:
  """Whether the two towers of a scorer have different weights."""
  for name, tensor in named.items():
    if name.startswith('query_embedder.') and 'predictions' not in name:
      other = named.get(name.removeprefix('query_'))
      if other is not None and not _equal(tensor, other):
        return True
  return False


def _equal(a: weights.FileTensor, b: weights.FileTensor) -> bool:
  if a.same_storage(b):
    return True
  return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _check(
    kind: str,
    config: config_lib.ModelConfig,
    layout: huggingface_names.Layout,
    parts: Mapping[str, components.Component],
    named: Mapping[str, weights.FileTensor],
    block_emb: weights.FileTensor | None,
) -> None:
  """Raises a ValueError that lists all tensors that do not fit."""
  shapes = dict(layout.unused)
  for entry in layout.entries:
    component, _, name = entry.ours.partition('/')
    shape = tuple(parts[component].abstract[name].shape)
    shapes[entry.theirs] = shape[::-1] if entry.transposed else shape
  problems = [
      f'missing: {e.theirs} {shapes[e.theirs]}'
      for e in layout.entries
      if e.theirs not in named
  ]
  for name, tensor in named.items():
    if name in layout.copies:
      target = layout.copies[name]
      if target in named and not _equal(tensor, named[target]):
        problems.append(f'differs from {target}: {name}')
    elif name not in shapes:
      problems.append(f'unexpected: {name} {tensor.shape}')
    elif tensor.shape != shapes[name]:
      problems.append(
          f'of shape {tensor.shape}, expected {shapes[name]}: {name}'
      )
    elif tensor.dtype.kind not in 'fV':  # 'V' is bfloat16.
      problems.append(f'of type {tensor.dtype}, expected floats: {name}')
  if kind == 'openqa':
    width = config.embedding_width
    if block_emb is None:
      problems.append(f'missing: {_BLOCK_EMB} (documents, {width})')
    elif block_emb.shape[1:] != (width,):
      problems.append(
          f'of shape {block_emb.shape}, expected (documents, {width}): '
          + _BLOCK_EMB
      )
  if problems:
    problems = list(dict.fromkeys(problems))  # BERT's entries appear twice.
    more = len(problems) - _MAX_LISTED
    raise ValueError(
        'The checkpoint does not fit its config.json as a'
        f' {huggingface_names.KINDS[kind]}:\n  '
        + '\n  '.join(problems[:_MAX_LISTED])
        + (f'\n  and {more} more' if more > 0 else '')
    )


def _read(
    layout: huggingface_names.Layout,
    named: Mapping[str, weights.FileTensor],
    wanted: Iterable[str],
) -> tuple[dict[str, components.Params], dict[str, str]]:
  params: dict[str, components.Params] = {name: {} for name in wanted}
  sources: dict[str, str] = {}
  arrays: dict[str, np.ndarray] = {}
  shared = {}
  for entry in layout.entries:
    shared[entry.theirs] = entry.theirs in shared
  for entry in layout.entries:
    component, _, name = entry.ours.partition('/')
    if component not in params:
      continue
    array = arrays.get(entry.theirs)
    if array is None:
      array = named[entry.theirs].read()
      if entry.transposed:
        array = np.ascontiguousarray(array.T)
      array = array.astype(np.float32, copy=False)
      if shared[entry.theirs]:  # Both components of a BERT share the array.
        arrays[entry.theirs] = array
      sources[named[entry.theirs].name] = entry.ours
    params[component][name] = array
  return params, sources


def tensors_of(
    kind: str,
    config: config_lib.ModelConfig,
    params: Mapping[str, components.Params],
    unused: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
  """Returns all tensors of a class of transformers, by name.

  Args:
    kind: one of `huggingface_names.KINDS`; 'bert' is the reader.
    config: resolved.
    params: of the components that the class consists of.
    unused: values of tensors that the class never uses. Without a value, the
      scale of a LayerNorm is 1 and any other tensor 0.

  Returns:
    float32 arrays; those of `unused` as given. Copies are the same objects.
    `block_emb` of an open-QA model is not included.

  Raises:
    ValueError: a component is missing, or the class cannot hold the towers.
  """
  layout = huggingface_names.layout_of(kind, config)
  needs_tower = any(e.ours.startswith('embedder/') for e in layout.entries)
  if needs_tower and kind != 'scorer' and config.towers != 'shared':
    raise ValueError(
        f'The retriever has config.model.towers={config.towers!r}; of the '
        "classes of transformers only 'scorer' has a tower for queries."
    )
  found: dict[str, Tensor] = {
      entry.theirs: foreign_tensor(entry.ours, params)
      for entry in layout.entries
  }
  given = unused or {}
  for name, shape in layout.unused.items():
    tensor = given.get(name)
    if tensor is None:
      make = np.ones if name.endswith('LayerNorm.weight') else np.zeros
      tensor = make(shape, np.float32)
    elif tensor.shape != shape:
      raise ValueError(f'{name} has the shape {tensor.shape}, not {shape}.')
    found[name] = tensor
  for name, target in layout.copies.items():
    found[name] = found[target]
  return found


def tower_tensors(
    config: config_lib.ModelConfig, params: components.Params, encoder: str
) -> dict[str, np.ndarray]:
  """Returns the tensors of a BertModel for one tower of an embedder.

  Args:
    config: resolved.
    params: of the embedder.
    encoder: 'encoder' or 'query_encoder'.
  """
  return {
      entry.theirs: foreign_tensor(entry.ours, {'embedder': params})
      for entry in huggingface_names.tower(config, encoder)
  }


def foreign_tensor(
    ours: str, params: Mapping[str, components.Params]
) -> np.ndarray:
  """Returns the parameter 'component/name' in the layout of PyTorch.

  Raises:
    ValueError: `params` lacks the component.
  """
  component, _, name = ours.partition('/')
  if component not in params:
    raise ValueError(
        f'There is no {component}; only {", ".join(sorted(params))}.'
    )
  array = np.asarray(params[component][name])
  if name.endswith('.kernel'):
    array = np.ascontiguousarray(array.T)
  return array
