"""Conversion of published weights to our parameters and back.

Each tensor of a checkpoint becomes a parameter, is a copy of another tensor, or
is dropped with a reason. An unknown tensor of the network itself, and a missing
one, is an error. `huggingface_names` has the names.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import re
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import entities
from realm_jax.interop import huggingface_config
from realm_jax.interop import huggingface_names
from realm_jax.interop import sentence_transformers as st
from realm_jax.interop import weights
from realm_jax.models import components
from realm_jax.runtime import lines

_BLOCK_EMB = 'block_emb'
_MAX_LISTED = 20
# Embeddings are padded to a multiple of at most this, so that more rows without
# a wordpiece are a sign of another model's vocabulary.
_MAX_PADDING = 512
_LAYER = re.compile(r'encoder\.layer\.(\d+)\.')
_ADAPTER = re.compile(r'\b(lora_|adapters?\b|base_layer\b|prefix_)')

Tensor = np.ndarray | weights.FileTensor


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A converted checkpoint.

  kind: one of `huggingface_config.KINDS`, or RETRIEVER.
  config: sizes of the model; its `towers` are those of the checkpoint.
  params: of each component, float32 numpy arrays.
  sources: names in the file to 'component/name' of the parameter.
  copies: names in the file to the tensor that each is a copy of.
  dtypes: of the tensors in the file that are not float32.
  unused: tensors without a parameter, by name in the file.
  dropped: names in the file of tensors that become no parameter, and why.
  rows_cut: rows of the embedding behind the vocabulary.
  fresh: 'component/name' of the parameters that the checkpoint lacks, which are
    at their random initial values.
  block_emb: the document embeddings of an open-QA checkpoint, in their file.
  """

  kind: str
  config: config_lib.ModelConfig
  params: dict[str, components.Params]
  sources: dict[str, str]
  copies: dict[str, str]
  dtypes: dict[str, str]
  unused: dict[str, Tensor]
  dropped: dict[str, str]
  rows_cut: int
  fresh: list[str]
  block_emb: weights.FileTensor | None


def components_in(
    tensors: Mapping[str, weights.FileTensor],
    values: Mapping[str, Any] | None = None,
    body: str | None = None,
    head: st.Head | None = None,
) -> list[str]:
  """Returns the names of the components that a checkpoint has; as `load`.

  Raises:
    ValueError: it is neither BERT nor REALM.
  """
  values = values or {}
  encoder = huggingface_config.encoder_of(values)
  names = huggingface_names.modern_names(tensors, encoder)
  kind, prefix = huggingface_names.kind_of(names, body)
  if head is not None and kind != 'bert':
    raise ValueError(
        f'The checkpoint is a {huggingface_config.KINDS[kind]}, whose retriever'
        f' has its own pooling, not {head.fields["pooling"]!r}.'
    )
  classifier = huggingface_names.tagging_head(names, prefix, encoder)
  is_tagger = huggingface_config.tags(values) is not None
  tagger = kind == 'bert' and classifier is not None and is_tagger
  return {
      'bert': ['embedder', 'reader'] + ['tagger'] * tagger,
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
    *,
    vocab_size: int | None = None,
    body: str | None = None,
    head: st.Head | None = None,
) -> Loaded:
  """Converts a checkpoint; its tensor names tell its kind.

  Args:
    tensors: of the checkpoint's files, by name.
    values: its config.json.
    wanted: components to convert; None: all but a tagger.
    seed: for parameters that a BERT does not have.
    vocab_size: wordpieces of the tokenizer; an embedding that was padded has
      more rows, which are cut. None: as many as the embedding has rows.
    body: see `huggingface_names.kind_of`.
    head: of a retriever that is not REALM's; `tensors` has its modules.

  Raises:
    ValueError: lists every tensor that is missing, unexpected, or of a wrong
      shape; or names a component that the checkpoint lacks; or the embedding
      does not fit the vocabulary.
  """
  config = huggingface_config.model_config(values)
  if head is not None:
    head.apply(config)
  modern = huggingface_names.modern_names(tensors, config.encoder)
  named = {name: tensors[theirs] for name, theirs in modern.items()}
  kind, prefix = huggingface_names.kind_of(named, body)
  if kind == 'scorer' and _differ(named):
    config.towers = 'separate'
  known = components_in(tensors, values, body, head)
  names = [n for n in known if n != 'tagger'] if wanted is None else [*wanted]
  if not names or set(names) - set(known):
    raise ValueError(
        f'The checkpoint is of the kind {kind!r} and has the components'
        f' {known}; wanted: {names}.'
    )
  tags = (huggingface_config.tags(values) or []) if 'tagger' in names else []
  if tags:
    config.entity_types = tuple(huggingface_config.types(tags))
    config.capitals = values.get('capitals') is True
  _set_rows(config, named, vocab_size)
  if kind == 'bert':
    modules = head.modules if head else None
    layout = huggingface_names.bert_layout(
        config, named, prefix, bool(tags), modules
    )
    pooling = head.fields['pooling'] if head is not None else None
    dropped = huggingface_names.dropped(layout, named, prefix, pooling)
    classifier = huggingface_names.tagging_head(dropped, prefix)
    if classifier is not None and 'tagger' in known:
      dropped[classifier] += ' of tokens, which --components=tagger takes'
  else:
    layout = huggingface_names.LAYOUTS[kind](config)
    dropped = {
        name: 'no component computes with it'
        for name in named
        if name in layout.unused or name.endswith(huggingface_names.BUFFERS)
    }
  dropped |= _other_copies(layout, named)
  parts = {name: components.make(name, config) for name in known}
  block_emb = named.pop(_BLOCK_EMB, None) if kind == 'openqa' else None
  _check(kind, config, layout, parts, named, dropped, block_emb)
  rows_cut = config.vocab_size - (vocab_size or config.vocab_size)
  if rows_cut:
    config.vocab_size -= rows_cut
    parts = {name: components.make(name, config) for name in known}
  params, sources = _params(layout, named, config.vocab_size, names)
  if tags:
    order = [tags.index(tag) for tag in entities.labels(config.entity_types)]
    for name in ('output.kernel', 'output.bias'):
      params['tagger'][name] = params['tagger'][name][..., order]
  fresh = []
  for name in names:
    missing = parts[name].abstract.keys() - params[name].keys()
    if missing:
      initial = parts[name].init(seed)
      params[name] |= {key: np.asarray(initial[key]) for key in missing}
      fresh += [f'{name}/{key}' for key in sorted(missing)]
  # An export returns the tensors of REALM's classes by the names of the class.
  original = {n: t.name if kind == 'bert' else n for n, t in named.items()}
  kind = 'tagger' if names == ['tagger'] else kind
  return Loaded(
      kind=kind if head is None else huggingface_config.RETRIEVER,
      config=config,
      params=params,
      sources={original[name]: ours for name, ours in sources.items()},
      copies={
          original[name]: original[target]
          for name, target in layout.copies.items()
          if name in named.keys() - dropped.keys()
      },
      dtypes={
          original[name]: str(named[name].dtype)
          for name in sources
          if named[name].dtype != np.float32
      },
      unused={
          original[name]: _without_padding(named[name], name, config.vocab_size)
          for name in dropped
          if not name.endswith(huggingface_names.BUFFERS)
      },
      dropped={
          named[name].name: dropped.get(name, 'of another component')
          for name in named
          if name in dropped or name not in sources | layout.copies
      },
      rows_cut=rows_cut,
      fresh=fresh,
      block_emb=block_emb,
  )


def _set_rows(
    config: config_lib.ModelConfig,
    named: Mapping[str, weights.FileTensor],
    vocab_size: int | None,
) -> None:
  """Sets the size of the vocabulary to the rows of the embedding.

  Raises:
    ValueError: the vocabulary is another one.
  """
  if vocab_size is None:
    return
  rows = config.vocab_size
  for name, tensor in named.items():
    if name.endswith(huggingface_names.WORD_EMBED) and tensor.shape:
      rows = tensor.shape[0]
  # config.json may state the size before the padding.
  if config.vocab_size not in (rows, vocab_size):
    return  # The shapes of the tensors are refused later.
  config.vocab_size = rows
  if not 0 <= rows - vocab_size < _MAX_PADDING:
    raise ValueError(
        f'the vocabulary has {vocab_size} wordpieces, but the checkpoint was'
        f' made for {rows} (rows of its word embeddings)'
        + f'; at most {_MAX_PADDING - 1} rows more are taken for padding. Give'
        ' its own with --vocab.'
    )


def _other_copies(
    layout: huggingface_names.Layout, named: Mapping[str, weights.FileTensor]
) -> dict[str, str]:
  """Returns the tensors that should equal another one and do not.

  A decoder that is not tied to the word embeddings is the usual case.
  """
  found = {}
  for name, target in layout.copies.items():
    if name not in named or target not in named:
      continue
    both = named[name], named[target]
    if both[0].shape != both[1].shape or _equal(*both):
      continue
    ours, other = (tensor.read().astype(np.float32) for tensor in both)
    difference = np.abs(ours - other).max()
    found[name] = (
        f'differs from {target} by up to {difference:.3g}; here both are'
        ' one parameter, so the outputs of this head are others until it is'
        ' trained'
    )
  return found


def _differ(named: Mapping[str, weights.FileTensor]) -> bool:
  """Whether the two towers of a scorer have different weights."""
  for name, tensor in named.items():
    if name.startswith('query_embedder.') and 'predictions' not in name:
      other = named.get(name.removeprefix('query_'))
      if other is not None and not _equal(tensor, other):
        return True
  return False


def _equal(a: weights.FileTensor, b: weights.FileTensor) -> bool:
  if dataclasses.replace(a, name=b.name) == b:  # The same bytes of one file.
    return True
  return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _check(
    kind: str,
    config: config_lib.ModelConfig,
    layout: huggingface_names.Layout,
    parts: Mapping[str, components.Component],
    named: Mapping[str, weights.FileTensor],
    dropped: Mapping[str, str],
    block_emb: weights.FileTensor | None,
) -> None:
  """Raises a ValueError that lists all tensors that do not fit."""
  shapes = dict(layout.unused)
  for entry in layout.entries:
    component, _, name = entry.ours.partition('/')
    shape = tuple(parts[component].abstract[name].shape)
    shapes[entry.theirs] = shape[::-1] if entry.transposed else shape
  layers = {
      int(match[1]) + 1
      for name in named.keys() - dropped.keys()
      if (match := _LAYER.search(name))
  }
  problems = []
  if layers and max(layers) != config.num_layers:
    problems.append(
        f'config.json has num_hidden_layers={config.num_layers}, the weights'
        f' have {max(layers)} layers; correct the one that is wrong'
    )
  problems += [
      f'missing: {e.theirs} {shapes[e.theirs]}'
      for e in layout.entries
      if e.theirs not in named
  ]
  for name, tensor in named.items():
    if name in dropped and name not in shapes:
      continue
    if name in layout.copies:
      target = layout.copies[name]
      if target in named and tensor.shape != named[target].shape:
        problems.append(
            f'of shape {tensor.shape}, and {target} of'
            f' {named[target].shape}: {name}'
        )
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
    found = dict.fromkeys(problems)  # BERT's entries appear twice.
    problems = [huggingface_config.from_bert(p, config.encoder) for p in found]
    shown = lines.listed(problems, _MAX_LISTED, '\n  ')
    mend = 'Give config.json and weights of one model.'
    if any(map(_ADAPTER.search, named)):
      mend = 'Merge the adapter into the weights (peft: merge_and_unload).'
    raise ValueError(
        'The checkpoint does not fit its config.json as a'
        f' {huggingface_config.class_of(kind, config)}:\n  {shown}\n{mend}'
    )


def _without_padding(
    tensor: weights.FileTensor, name: str, rows: int
) -> Tensor:
  """Returns a tensor, still in its file if it has no row of padding.

  `name` is that in its layout; a table has a row for each of `rows` wordpieces.
  """
  is_table = name.endswith(huggingface_names.TABLES)
  if not is_table or not tensor.shape or tensor.shape[0] <= rows:
    return tensor
  return tensor.read()[:rows]


def _params(
    layout: huggingface_names.Layout,
    named: Mapping[str, weights.FileTensor],
    rows: int,
    wanted: Iterable[str],
) -> tuple[dict[str, components.Params], dict[str, str]]:
  """Returns the parameters, and the name of one for each tensor."""
  params: dict[str, components.Params] = {name: {} for name in wanted}
  sources: dict[str, str] = {}
  arrays: dict[str, np.ndarray] = {}  # Components of a BERT share them.
  for entry in layout.entries:
    component, _, name = entry.ours.partition('/')
    if component not in params:
      continue
    if entry.theirs not in arrays:
      tensor = _without_padding(named[entry.theirs], entry.theirs, rows)
      array = tensor if isinstance(tensor, np.ndarray) else tensor.read()
      if entry.transposed:
        array = np.ascontiguousarray(array.T)
      arrays[entry.theirs] = array.astype(np.float32, copy=False)
      sources[entry.theirs] = entry.ours
    params[component][name] = arrays[entry.theirs]
  return params, sources


def tensors_of(
    kind: str,
    config: config_lib.ModelConfig,
    params: Mapping[str, components.Params],
    unused: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
  """Returns all tensors of a class, one of `huggingface_config.KINDS`, by name.

  They are float32, without `block_emb`; copies are the same objects. 'bert' is
  the reader. `unused` has values of tensors that the class never uses, which
  stay as given. Without a value, the scale of a LayerNorm is 1 and any other
  tensor 0.

  Raises:
    ValueError: a component is missing, or the class cannot hold the towers.
  """
  layout = huggingface_names.LAYOUTS[kind](config)
  needs_tower = any(e.ours.startswith('embedder/') for e in layout.entries)
  if needs_tower and kind != 'scorer' and config.towers != 'shared':
    raise ValueError(
        f'The retriever has config.model.towers={config.towers!r}; of the '
        "classes of transformers only 'scorer' has a tower for queries."
    )
  found: dict[str, Tensor] = {
      entry.theirs: torch_tensor(entry.ours, params)
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
  return huggingface_config.tensors_from_bert(found, config.encoder)


def torch_tensor(
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
