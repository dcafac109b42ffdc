"""Tensor names of published checkpoints and the parameters they map to.

Covers two classes of BERT and the five REALM classes of transformers 4.40.2.
"""

from collections.abc import Callable, Iterable
import dataclasses

from realm_jax import config as config_lib

# Kinds of checkpoint and their classes in transformers.
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
_WORD_EMBED = 'embeddings.word_embeddings.weight'
_HEAD = 'cls.predictions.'  # The masked-LM head.

# BERT's tensors: the name in transformers and the name of the parameter.
_EMBEDDINGS = {'word': 'word', 'position': 'position', 'token_type': 'type'}
_LAYER = {
    'attention.self.query': 'query',
    'attention.self.key': 'key',
    'attention.self.value': 'value',
    'attention.output.dense': 'attention_output',
    'attention.output.LayerNorm': 'attention_norm',
    'intermediate.dense': 'mlp_in',
    'output.dense': 'mlp_out',
    'output.LayerNorm': 'mlp_norm',
}


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
  copies: dict[str, str]
  unused: dict[str, tuple[int, ...]]


def _module(theirs: str, ours: str) -> list[Entry]:
  """Returns the two tensors of a linear layer or of a LayerNorm."""
  norm = theirs.endswith(('LayerNorm', 'layer_normalization'))
  return [
      Entry(f'{theirs}.weight', f'{ours}.{"scale" if norm else "kernel"}',
            not norm),
      Entry(f'{theirs}.bias', f'{ours}.bias'),
  ]


def _body(theirs: str, ours: str, num_layers: int) -> list[Entry]:
  entries = [
      Entry(
          f'{theirs}embeddings.{name}_embeddings.weight',
          f'{ours}.{own}_embed.embedding',
      )
      for name, own in _EMBEDDINGS.items()
  ]
  entries += _module(f'{theirs}embeddings.LayerNorm', f'{ours}.embed_norm')
  for i in range(num_layers):
    for name, own in _LAYER.items():
      entries += _module(
          f'{theirs}encoder.layer.{i}.{name}', f'{ours}.layers.{i}.{own}'
      )
  return entries


def _mlm_head(theirs: str, ours: str) -> list[Entry]:
  return [
      Entry(f'{theirs}bias', f'{ours}output_bias'),
      *_module(f'{theirs}transform.dense', f'{ours}transform'),
      *_module(f'{theirs}transform.LayerNorm', f'{ours}transform_norm'),
  ]


def _mlm_shapes(
    prefix: str, config: config_lib.ModelConfig
) -> dict[str, tuple[int, ...]]:
  v, d = config.vocab_size, config.width
  return {entry.theirs: (d,) for entry in _mlm_head(prefix, '')} | {
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
          *_body(f'{prefix}realm.', f'{ours}{encoder}.bert', config.num_layers),
          *_module(f'{prefix}realm.pooler.dense', f'{ours}{encoder}.pooler'),
          *_module(f'{prefix}cls.dense', f'{ours}{projection}.dense'),
          *_module(f'{prefix}cls.LayerNorm', f'{ours}{projection}.norm'),
      ],
      {},
      _mlm_shapes(f'{prefix}{_HEAD}', config),
  )


def _scorer(config: config_lib.ModelConfig) -> Layout:
  doc = _embedder('embedder.', config)
  query = 'query_embedder.'
  if config.towers == 'shared':
    names = [e.theirs for e in doc.entries] + [*doc.unused]
    copies = {
        query + name.removeprefix('embedder.'): name for name in names
    }
    return Layout(doc.entries, copies, doc.unused)
  encoder = 'query_encoder' if config.towers == 'separate' else 'encoder'
  other = _embedder(query, config, encoder, 'query_projection')
  return Layout(doc.entries + other.entries, {}, doc.unused | other.unused)


def _encoder(config: config_lib.ModelConfig) -> Layout:
  return Layout(
      [
          *_body('realm.', 'reader/bert', config.num_layers),
          *_mlm_head(_HEAD, 'reader/'),
      ],
      {
          f'{_HEAD}decoder.weight': f'realm.{_WORD_EMBED}',
          f'{_HEAD}decoder.bias': f'{_HEAD}bias',
      },
      _pooler_shapes('realm.', config),
  )


def _reader(prefix: str, config: config_lib.ModelConfig) -> Layout:
  head, ours = f'{prefix}qa_outputs.', 'span_reader/'
  return Layout(
      [
          *_body(f'{prefix}realm.', f'{ours}bert', config.num_layers),
          *_module(f'{head}dense_intermediate', f'{ours}intermediate'),
          *_module(f'{head}dense_output', f'{ours}output'),
          *_module(f'{head}layer_normalization', f'{ours}norm'),
      ],
      {},
      _pooler_shapes(f'{prefix}realm.', config)
      | _mlm_shapes(f'{prefix}{_HEAD}', config),
  )


def _open_qa(config: config_lib.ModelConfig) -> Layout:
  embedder, reader = _embedder('embedder.', config), _reader('reader.', config)
  return Layout(
      embedder.entries + reader.entries, {}, embedder.unused | reader.unused
  )


def bert_layout(
    config: config_lib.ModelConfig, names: Iterable[str], prefix: str
) -> Layout:
  """Returns the layout of BERT as a reader and as part of an embedder.

  A name may occur in two entries: both components start from the tensor.
  """
  names = set(names)
  d = config.width
  entries = [
      *_body(prefix, 'reader/bert', config.num_layers),
      *_body(prefix, 'embedder/encoder.bert', config.num_layers),
  ]
  if any(name.startswith(f'{prefix}pooler.') for name in names):
    entries += _module(f'{prefix}pooler.dense', 'embedder/encoder.pooler')
  if any(name.startswith(_HEAD) for name in names):
    entries += _mlm_head(_HEAD, 'reader/')
  copies = {
      f'{_HEAD}decoder.weight': f'{prefix}{_WORD_EMBED}',
      f'{_HEAD}decoder.bias': f'{_HEAD}bias',
  }
  unused = {  # Next-sentence prediction.
      'cls.seq_relationship.weight': (2, d),
      'cls.seq_relationship.bias': (2,),
  }
  return Layout(entries, copies, unused)


def _masked_lm(config: config_lib.ModelConfig) -> Layout:
  """Returns the reader as a class of every version of transformers."""
  layout = bert_layout(config, [f'{_HEAD}bias'], 'bert.')
  entries = [e for e in layout.entries if e.ours.startswith('reader/')]
  return Layout(entries, layout.copies, {})


def _tagger(config: config_lib.ModelConfig) -> Layout:
  return Layout(
      [
          *_body('bert.', 'tagger/bert', config.num_layers),
          *_module('classifier', 'tagger/output'),
      ],
      {},
      {},
  )


_LAYOUTS: dict[str, Callable[[config_lib.ModelConfig], Layout]] = {
    'bert': _masked_lm,
    'embedder': lambda config: _embedder('', config),
    'scorer': _scorer,
    'encoder': _encoder,
    'reader': lambda config: _reader('', config),
    'openqa': _open_qa,
    'tagger': _tagger,
}


def kind_of(names: Iterable[str]) -> tuple[str, str]:
  """Returns the kind of a checkpoint and the prefix of a BERT's body.

  Raises:
    ValueError: the names are neither of BERT nor of REALM.
  """
  names = set(names)
  prefixes = {
      name.removesuffix(_WORD_EMBED)
      for name in names
      if name.endswith(_WORD_EMBED)
  }
  match sorted(prefixes):
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
    case ['bert.']:
      return 'bert', 'bert.'
    case ['']:
      return 'bert', ''
  shown = ', '.join(sorted(names)[:5])
  raise ValueError(
      'The checkpoint is neither BERT nor REALM: it has word embeddings at '
      f'{sorted(prefixes)}, and tensors such as {shown}.'
  )


def modern_name(name: str) -> str:
  """Renames the LayerNorm tensors of checkpoints from before 2019."""
  for old, new in (('gamma', 'weight'), ('beta', 'bias')):
    if name.endswith(f'LayerNorm.{old}'):
      return name.removesuffix(old) + new
  return name


def layout_of(kind: str, config: config_lib.ModelConfig) -> Layout:
  """Returns the tensors of a class; 'bert' is the reader."""
  return _LAYOUTS[kind](config)


def tower(config: config_lib.ModelConfig, encoder: str) -> list[Entry]:
  """Returns one tower of an embedder as a BertModel, with its pooler."""
  ours = f'embedder/{encoder}'
  return [
      *_body('', f'{ours}.bert', config.num_layers),
      *_module('pooler.dense', f'{ours}.pooler'),
  ]
