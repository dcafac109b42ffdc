"""Which tensors a published checkpoint holds, and which of ours each one is.

Public: `KINDS`, `BERT_KINDS`, `Entry`, `Layout`, `layout_of`, `bert_layout`,
`tower`, `kind_of`, `modern_name`. Pure tables of names for two classes of BERT
and for the five of REALM of transformers 4.40.2.
"""

from collections.abc import Callable, Iterable
import dataclasses

from realm_jax import config as config_lib

# Our name of each kind of checkpoint, and what transformers calls the class.
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


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of theirs and the parameter that it is."""

  theirs: str
  ours: str  # 'component/dotted.name'
  transposed: bool = False  # PyTorch's Linear has [out, in].


@dataclasses.dataclass(frozen=True)
class Layout:
  """What a checkpoint of one kind holds.

  entries: what becomes a parameter.
  copies: a name and the one that it must equal; either may be left out.
  unused: shapes of what the class holds and never computes with.
  """

  entries: list[Entry]
  copies: dict[str, str]
  unused: dict[str, tuple[int, ...]]


def _dense(theirs: str, ours: str) -> list[Entry]:
  return [
      Entry(f'{theirs}.weight', f'{ours}.kernel', True),
      Entry(f'{theirs}.bias', f'{ours}.bias'),
  ]


def _norm(theirs: str, ours: str) -> list[Entry]:
  return [
      Entry(f'{theirs}.weight', f'{ours}.scale'),
      Entry(f'{theirs}.bias', f'{ours}.bias'),
  ]


def _body(theirs: str, ours: str, num_layers: int) -> list[Entry]:
  entries = [
      Entry(
          f'{theirs}embeddings.{kind}_embeddings.weight',
          f'{ours}.{name}_embed.embedding',
      )
      for kind, name in (
          ('word', 'word'),
          ('position', 'position'),
          ('token_type', 'type'),
      )
  ]
  entries += _norm(f'{theirs}embeddings.LayerNorm', f'{ours}.embed_norm')
  for i in range(num_layers):
    layer, own = f'{theirs}encoder.layer.{i}', f'{ours}.layers.{i}'
    for name in ('query', 'key', 'value'):
      entries += _dense(f'{layer}.attention.self.{name}', f'{own}.{name}')
    entries += [
        *_dense(f'{layer}.attention.output.dense', f'{own}.attention_output'),
        *_norm(f'{layer}.attention.output.LayerNorm', f'{own}.attention_norm'),
        *_dense(f'{layer}.intermediate.dense', f'{own}.mlp_in'),
        *_dense(f'{layer}.output.dense', f'{own}.mlp_out'),
        *_norm(f'{layer}.output.LayerNorm', f'{own}.mlp_norm'),
    ]
  return entries


def _mlm_head(theirs: str, ours: str) -> list[Entry]:
  return [
      Entry(f'{theirs}bias', f'{ours}output_bias'),
      *_dense(f'{theirs}transform.dense', f'{ours}transform'),
      *_norm(f'{theirs}transform.LayerNorm', f'{ours}transform_norm'),
  ]


def _mlm_shapes(
    prefix: str, config: config_lib.ModelConfig
) -> dict[str, tuple[int, ...]]:
  v, d = config.vocab_size, config.width
  return {
      f'{prefix}bias': (v,),
      f'{prefix}transform.dense.weight': (d, d),
      f'{prefix}transform.dense.bias': (d,),
      f'{prefix}transform.LayerNorm.weight': (d,),
      f'{prefix}transform.LayerNorm.bias': (d,),
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
          *_body(
              f'{prefix}realm.', f'{ours}{encoder}.bert', config.num_layers
          ),
          *_dense(f'{prefix}realm.pooler.dense', f'{ours}{encoder}.pooler'),
          *_dense(f'{prefix}cls.dense', f'{ours}{projection}.dense'),
          *_norm(f'{prefix}cls.LayerNorm', f'{ours}{projection}.norm'),
      ],
      {},
      _mlm_shapes(f'{prefix}cls.predictions.', config),
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
  head = 'cls.predictions.'
  return Layout(
      [
          *_body('realm.', 'reader/bert', config.num_layers),
          *_mlm_head(head, 'reader/'),
      ],
      {
          f'{head}decoder.weight': f'realm.{_WORD_EMBED}',
          f'{head}decoder.bias': f'{head}bias',
      },
      _pooler_shapes('realm.', config),
  )


def _reader(prefix: str, config: config_lib.ModelConfig) -> Layout:
  head, ours = f'{prefix}qa_outputs.', 'span_reader/'
  return Layout(
      [
          *_body(f'{prefix}realm.', f'{ours}bert', config.num_layers),
          *_dense(f'{head}dense_intermediate', f'{ours}intermediate'),
          *_dense(f'{head}dense_output', f'{ours}output'),
          *_norm(f'{head}layer_normalization', f'{ours}norm'),
      ],
      {},
      _pooler_shapes(f'{prefix}realm.', config)
      | _mlm_shapes(f'{prefix}cls.predictions.', config),
  )


def _open_qa(config: config_lib.ModelConfig) -> Layout:
  embedder, reader = _embedder('embedder.', config), _reader('reader.', config)
  return Layout(
      embedder.entries + reader.entries, {}, embedder.unused | reader.unused
  )


def bert_layout(
    config: config_lib.ModelConfig, names: Iterable[str], prefix: str
) -> Layout:
  """BERT becomes an embedder, as far as it goes, and a reader.

  A name may occur in two entries: both components start from it.
  """
  names = set(names)
  head = 'cls.predictions.'
  d = config.width
  entries = [
      *_body(prefix, 'reader/bert', config.num_layers),
      *_body(prefix, 'embedder/encoder.bert', config.num_layers),
  ]
  if any(name.startswith(f'{prefix}pooler.') for name in names):
    entries += _dense(f'{prefix}pooler.dense', 'embedder/encoder.pooler')
  if any(name.startswith(head) for name in names):
    entries += _mlm_head(head, 'reader/')
  copies = {
      f'{head}decoder.weight': f'{prefix}{_WORD_EMBED}',
      f'{head}decoder.bias': f'{head}bias',
  }
  unused = {  # Next-sentence prediction.
      'cls.seq_relationship.weight': (2, d),
      'cls.seq_relationship.bias': (2,),
  }
  return Layout(entries, copies, unused)


def _masked_lm(config: config_lib.ModelConfig) -> Layout:
  """The reader as a BERT that every version of transformers knows."""
  head = 'cls.predictions.'
  layout = bert_layout(config, [f'{head}bias'], 'bert.')
  entries = [e for e in layout.entries if e.ours.startswith('reader/')]
  return Layout(entries, layout.copies, {})


def _tagger(config: config_lib.ModelConfig) -> Layout:
  return Layout(
      [
          *_body('bert.', 'tagger/bert', config.num_layers),
          *_dense('classifier', 'tagger/output'),
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
  """Returns the kind of a checkpoint, and the prefix of a BERT's body."""
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
  """The name since 2019, when LayerNorm's had still been TensorFlow's."""
  for old, new in (('gamma', 'weight'), ('beta', 'bias')):
    if name.endswith(f'LayerNorm.{old}'):
      return name.removesuffix(old) + new
  return name


def layout_of(kind: str, config: config_lib.ModelConfig) -> Layout:
  """Returns what transformers has in a class; 'bert' is the reader."""
  return _LAYOUTS[kind](config)


def tower(
    config: config_lib.ModelConfig, encoder: str
) -> list[Entry]:
  """Returns one tower of an embedder as a BertModel, with its pooler."""
  ours = f'embedder/{encoder}'
  return [
      *_body('', f'{ours}.bert', config.num_layers),
      *_dense('pooler.dense', f'{ours}.pooler'),
  ]
