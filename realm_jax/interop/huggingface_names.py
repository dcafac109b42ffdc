"""Tensor names of published checkpoints and the parameters they map to.

Covers the body of any BERT with the heads that a component has, and the five
REALM classes of transformers 4.40.2. `huggingface_config` has what differs in
other encoders.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses

from realm_jax import config as config_lib
from realm_jax.interop import huggingface_config

WORD_EMBED = 'embeddings.word_embeddings.weight'
_HEAD = 'cls.predictions.'  # The masked-LM head.
# Parts of names that belong to no model: DataParallel, torch.compile, FSDP and
# activation checkpointing.
_WRAPPERS = frozenset((
    'module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'
))
# Parts of the names of tensors that become no parameter, and what these are.
_WITHOUT_USE = {
    'position_ids': 'a buffer of positions, computed here',
    'token_type_ids': 'a buffer of segments, computed here',
    'pooler.': 'a pooler of another form than that of BERT',
    'cls.seq_relationship.': 'the head of next-sentence prediction',
    'qa_outputs.': 'a head for answers in a passage',
    'encode_proj.': 'a projection of DPR',
    'classifier.': 'a classifier',
}
# Ends of the names whose tensors have a row for each wordpiece.
TABLES = (
    WORD_EMBED, f'{_HEAD}bias', f'{_HEAD}decoder.weight', f'{_HEAD}decoder.bias'
)
BUFFERS = ('embeddings.position_ids', 'embeddings.token_type_ids')


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor of a checkpoint and the parameter that it becomes."""

  theirs: str
  ours: str  # 'component/dotted.name'
  transposed: bool = False  # PyTorch's Linear is [out, in].


@dataclasses.dataclass(frozen=True)
class Layout:
  """The tensors of one kind of checkpoint.

  entries: tensors that become parameters.
  copies: a tensor and the one that it must equal; either may be absent.
  unused: shapes of the tensors that the class holds and never computes with.
  """

  entries: list[Entry]
  copies: dict[str, str] = dataclasses.field(default_factory=dict)
  unused: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def _module(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
  """Returns the tensors of a linear layer or of a LayerNorm."""
  norm = theirs.lower().endswith(('norm', 'normalization'))
  kernel = Entry(
      f'{theirs}.weight', f'{ours}.{"scale" if norm else "kernel"}', not norm
  )
  return [kernel] + [Entry(f'{theirs}.bias', f'{ours}.bias')] * bias


def _body(
    theirs: str, ours: str, config: config_lib.ModelConfig
) -> list[Entry]:
  names = huggingface_config.NAMES[config.encoder]
  entries = [
      Entry(f'{theirs}embeddings.{name}.weight', f'{ours}.{own}.embedding')
      for name, own in names.embeddings.items()
  ]
  modules = {f'{theirs}embeddings.LayerNorm': f'{ours}.embed_norm'}
  for i in range(config.num_layers):
    for name, own in names.modules.items():
      if i or name not in names.first_layer_lacks:
        layer = f'{theirs}encoder.layer.{i}.{name}'
        modules[layer] = f'{ours}.layers.{i}.{own}'
  for name, own in names.final.items():
    modules[f'{theirs}{name}'] = f'{ours}.{own}'
  for name, own in modules.items():
    entries += _module(name, own, names.bias)
  return entries


def _mlm_head(
    theirs: str, ours: str, config: config_lib.ModelConfig
) -> list[Entry]:
  bias = huggingface_config.NAMES[config.encoder].bias
  return [
      Entry(f'{theirs}bias', f'{ours}output_bias'),
      *_module(f'{theirs}transform.dense', f'{ours}transform', bias),
      *_module(f'{theirs}transform.LayerNorm', f'{ours}transform_norm', bias),
  ]


def _mlm_shapes(
    prefix: str, config: config_lib.ModelConfig
) -> dict[str, tuple[int, ...]]:
  v, d = config.vocab_size, config.width
  return {entry.theirs: (d,) for entry in _mlm_head(prefix, '', config)} | {
      f'{prefix}bias': (v,),
      f'{prefix}transform.dense.weight': (d, d),
      f'{prefix}decoder.weight': (v, d),
      f'{prefix}decoder.bias': (v,),
  }


def _pooler_shapes(
    prefix: str, config: config_lib.ModelConfig
) -> dict[str, tuple[int, ...]]:
  d = config.width
  return {
      f'{prefix}pooler.dense.weight': (d, d),
      f'{prefix}pooler.dense.bias': (d,),
  }


def _embedder(
    prefix: str,
    config: config_lib.ModelConfig,
    encoder: str = 'encoder',
    projection: str = 'projection',
) -> Layout:
  ours = 'embedder/'
  return Layout(
      [
          *_body(f'{prefix}realm.', f'{ours}{encoder}.bert', config),
          *_module(f'{prefix}realm.pooler.dense', f'{ours}{encoder}.pooler'),
          *_module(f'{prefix}cls.dense', f'{ours}{projection}.dense'),
          *_module(f'{prefix}cls.LayerNorm', f'{ours}{projection}.norm'),
      ],
      unused=_mlm_shapes(f'{prefix}{_HEAD}', config),
  )


def _scorer(config: config_lib.ModelConfig) -> Layout:
  doc = _embedder('embedder.', config)
  query = 'query_embedder.'
  if config.towers == 'shared':
    names = [e.theirs for e in doc.entries] + [*doc.unused]
    copies = {query + name.removeprefix('embedder.'): name for name in names}
    return Layout(doc.entries, copies, doc.unused)
  encoder = 'query_encoder' if config.towers == 'separate' else 'encoder'
  other = _embedder(query, config, encoder, 'query_projection')
  return _joined(doc, other)


def _joined(one: Layout, other: Layout) -> Layout:
  """Returns the layout of a class that consists of two others."""
  return Layout(one.entries + other.entries, unused=one.unused | other.unused)


def _masked_lm(config: config_lib.ModelConfig, prefix: str) -> Layout:
  return Layout(
      [
          *_body(prefix, 'reader/bert', config),
          *_mlm_head(_HEAD, 'reader/', config),
      ],
      _tied(_HEAD, prefix),
  )


def _tied(head: str, prefix: str) -> dict[str, str]:
  """Returns the copies in a masked-LM head of tensors of a BERT's body."""
  return {
      f'{head}decoder.weight': f'{prefix}{WORD_EMBED}',
      f'{head}decoder.bias': f'{head}bias',
  }


def _reader(prefix: str, config: config_lib.ModelConfig) -> Layout:
  head, ours = f'{prefix}qa_outputs.', 'span_reader/'
  return Layout(
      [
          *_body(f'{prefix}realm.', f'{ours}bert', config),
          *_module(f'{head}dense_intermediate', f'{ours}intermediate'),
          *_module(f'{head}dense_output', f'{ours}output'),
          *_module(f'{head}layer_normalization', f'{ours}norm'),
      ],
      unused=_pooler_shapes(f'{prefix}realm.', config)
      | _mlm_shapes(f'{prefix}{_HEAD}', config),
  )


def bert_layout(
    config: config_lib.ModelConfig,
    names: Iterable[str],
    prefix: str,
    tagger: bool = False,
    modules: Mapping[str, str] | None = None,
) -> Layout:
  """Returns the layout of BERT as a reader and as part of an embedder.

  A name may occur in several entries: each component starts from the tensor.
  A pooler and a masked-LM head may be absent from `names`. `prefix` is that of
  the body's tensors; `modules` are those of a retriever's head, to the
  embedder's; None: BERT's pooler.
  """
  names = set(names)
  owners = ['reader/bert', 'embedder/encoder.bert'] + ['tagger/bert'] * tagger
  entries = [e for ours in owners for e in _body(prefix, ours, config)]
  pooler = _module(f'{prefix}pooler.dense', 'embedder/encoder.pooler')
  if modules is not None:
    for theirs, ours in modules.items():
      entries += _module(theirs, f'embedder/{ours}')
  elif all(entry.theirs in names for entry in pooler):
    entries += pooler
  outer = _outer(prefix)
  if tagger:
    entries += _module(f'{outer}classifier', 'tagger/output')
  head = f'{outer}{_HEAD}'
  # A classifier of ModernBERT has modules of the same names.
  bias = huggingface_config.NAMES[config.encoder].bias
  if f'{head}bias' in names or bias and any(
      name.startswith(head) for name in names
  ):
    entries += _mlm_head(head, 'reader/', config)
  return Layout(entries, _tied(head, prefix))


def _outer(prefix: str) -> str:
  """Returns the prefix of the heads, where `prefix` is that of the body."""
  parts = prefix.split('.')[:-1]
  return ''.join(f'{part}.' for part in parts[:-1])


def tagging_head(
    names: Iterable[str], prefix: str, encoder: str = 'bert'
) -> str | None:
  """Returns the name of the weight of a tagger's classifier, if any."""
  if huggingface_config.NAMES[encoder].tagger is None:
    return None
  name = f'{_outer(prefix)}classifier.weight'
  return name if name in set(names) else None


def dropped(
    layout: Layout,
    names: Iterable[str],
    prefix: str,
    pooling: str | None = None,
) -> dict[str, str]:
  """Returns the tensors of a BERT that no component has, and the reasons.

  `pooling` is that of a retriever which is not REALM's.

  A tensor of the embeddings or of the layers that is not in the layout is not
  among them: without it, the network would be another one.
  """
  used = {entry.theirs for entry in layout.entries} | set(layout.copies)
  body = (f'{prefix}embeddings.', f'{prefix}encoder.')
  found = {}
  for name in names:
    inside = name.startswith(body) or '/' in name  # '/': of a head's module.
    if name in used or inside and not name.endswith(BUFFERS):
      continue
    part = next((part for part in _WITHOUT_USE if part in name), '')
    found[name] = _WITHOUT_USE.get(part, 'a head, or another network')
    if pooling is not None and part == 'pooler.':
      found[name] = f'a pooler, and the pooling of the retriever is {pooling!r}'
  return found


# The tensors of each class, given the sizes of the model.
LAYOUTS: dict[str, Callable[[config_lib.ModelConfig], Layout]] = {
    'bert': lambda config: _masked_lm(config, 'bert.'),
    'embedder': lambda config: _embedder('', config),
    'scorer': _scorer,
    'encoder': lambda config: dataclasses.replace(
        _masked_lm(config, 'realm.'), unused=_pooler_shapes('realm.', config)
    ),
    'reader': lambda config: _reader('', config),
    'openqa': lambda config: _joined(
        _embedder('embedder.', config), _reader('reader.', config)
    ),
    'tagger': lambda config: Layout([
        *_body('bert.', 'tagger/bert', config),
        *_module('classifier', 'tagger/output'),
    ]),
}


def kind_of(names: Iterable[str], body: str | None = None) -> tuple[str, str]:
  """Returns the kind of a checkpoint and the prefix of a BERT's body.

  `names` are those of `modern_names`; `body` is the prefix of the body to take,
  as a BERT; None: the only one.

  Raises:
    ValueError: the names are neither of BERT nor of REALM, or there are several
      bodies.
  """
  names = set(names)
  prefixes = sorted(
      name.removesuffix(WORD_EMBED)
      for name in names
      if name.endswith(f'.{WORD_EMBED}') or name == WORD_EMBED
  )
  if body is not None:
    prefix = f'{body.rstrip(".")}.' if body else ''
    if prefix not in prefixes:
      raise ValueError(
          f'No BERT is at the prefix {body!r}; the checkpoint has word'
          f' embeddings at {prefixes}.'
      )
    return 'bert', prefix
  match prefixes:
    case ['embedder.realm.', 'reader.realm.']:
      return 'openqa', ''
    case ['embedder.realm.'] | ['embedder.realm.', 'query_embedder.realm.']:
      return 'scorer', ''
    case ['realm.']:
      for kind, mark in (
          ('reader', 'qa_outputs.dense_output.weight'),
          ('embedder', 'cls.dense.weight'),
          ('encoder', 'cls.predictions.bias'),
      ):
        if mark in names:
          return kind, ''
      return 'bert', 'realm.'
    case [prefix] if not _other_architecture(prefix):
      return 'bert', prefix
    case [_, _, *_]:
      raise ValueError(
          'The checkpoint has several encoders, with word embeddings at'
          f' {prefixes}; name one, such as --body={prefixes[0].rstrip(".")}.'
      )
  shown = ', '.join(sorted(names)[:5])
  raise ValueError(
      'The checkpoint is neither BERT nor REALM: it has word embeddings at '
      f'{prefixes}, and tensors such as {shown}.'
  )


def _other_architecture(prefix: str) -> bool:
  """Whether a prefix is that of another architecture of transformers."""
  if prefix in ('', 'bert.'):
    return False
  import transformers  # Takes a second; few checkpoints need it.

  others = set(transformers.CONFIG_MAPPING) - {'bert', 'dpr', 'realm'}
  return not others.isdisjoint(prefix.split('.'))


def modern_names(names: Iterable[str], encoder: str = 'bert') -> dict[str, str]:
  """Returns the names of tensors in a file by their names in transformers.

  Names are without the parts of wrappers; the LayerNorms of checkpoints from
  before 2019 have `gamma` and `beta`. Those of other encoders than BERT are
  `huggingface_config.as_bert`.

  Raises:
    ValueError: two tensors have the same name.
  """
  found: dict[str, str] = {}
  for name in names:
    modern = '.'.join(p for p in name.split('.') if p not in _WRAPPERS)
    for old, new in (('gamma', 'weight'), ('beta', 'bias')):
      if modern.endswith(f'LayerNorm.{old}'):
        modern = modern.removesuffix(old) + new
    modern = huggingface_config.as_bert(modern, encoder)
    other = found.setdefault(modern, name)
    if other != name:
      raise ValueError(
          f'The checkpoint has {modern} twice, as {other} and as {name}; remove'
          ' one of them.'
      )
  if all(name.startswith('model.') for name in found):
    found = {key.removeprefix('model.'): name for key, name in found.items()}
  for name in [n for n in found if n.endswith(f'{_HEAD}decoder.bias')]:
    found.setdefault(name.replace('decoder.bias', 'bias'), found[name])
  # A file may have either name of two tied tensors.
  for name in [n for n in found if n.endswith(f'{_HEAD}decoder.weight')]:
    outer = name.removesuffix(f'{_HEAD}decoder.weight')
    for body in (f'{outer}bert.', outer):
      if f'{body}{WORD_EMBED}'.replace('word', 'position') in found:
        found.setdefault(f'{body}{WORD_EMBED}', found[name])
  return found


def tower(config: config_lib.ModelConfig, encoder: str) -> list[Entry]:
  """Returns one tower of an embedder as a BertModel, with its pooler."""
  ours = f'embedder/{encoder}'
  return [
      *_body('', f'{ours}.bert', config),
      *_module('pooler.dense', f'{ours}.pooler'),
  ]
