"""The ablations of the paper, one change each, on an invented world.

Guu et al. 2020, table 2 (zero-shot recall@5 on NaturalQuestions): REALM 38.5,
ICT alone 13.9, random-token masks 24.2, random-span masks 26.1, an index 30
times staler 15.1; section 3.4 for the null document and trivial candidates.

  python benchmarks/ablations.py --rows=realm,ict --seeds=3
  realm-jax train --config=experiments/ablations.py:stale_30x \
      --workdir=runs/stale_30x --config.corpus=runs/quickstart/corpus \
      --config.init_from=runs/quickstart/mlm,runs/quickstart/ict \
      --with_index_builder

Hardware: one CPU core for each row, six minutes. Recorded: docs/results.md. The
row `realm` is the quickstart on a world of 400 entities, with an index that is
refreshed every 10 steps, so that one of 30 times that still is refreshed. The
retriever learns twice as fast: with the quickstart's rate some worlds have only
begun to be learned after as many steps.
"""

from realm_jax import config as config_lib
from realm_jax import recipes

_INTERVAL = 10  # Steps between two refreshes.
# For a vocabulary so small that it divides names: 1,000 wordpieces.
_PIECES = {'lengths.query': 24, 'lengths.document': 45, 'lengths.masks': 8}

# Row -> what it changes of the row `realm`.
ROWS = {
    'realm': {},
    'frozen': {'optimizer.frozen': ('embedder',), 'refresh.policy': 'none'},
    'random_token': {'masking': 'random_token'},
    'random_span': {'masking': 'random_span'},
    'no_null': {'null_document': False},
    # The sentences that are masked are those of the passages searched: for a
    # corpus in which facts are stated more than once.
    'own_corpus': {'sentences': 'knowledge'},
    'trivial': {'sentences': 'knowledge', 'trivial': 'none'},
    # Nearly as fresh as `sync`: 7 steps old in the mean, 4.5 there, 14.5 here.
    'fresh': {'refresh.interval': 5, 'refresh.lag': 5},
    'stale_10x': {'refresh.interval': 10 * _INTERVAL},
    'stale_30x': {'refresh.interval': 30 * _INTERVAL},
    'never': {'refresh.policy': 'none'},
    'sync': {'refresh.policy': 'sync'},
    'eager': {'refresh.policy': 'eager'},
    # Where a span is one wordpiece, the two are one function.
    'pieces': _PIECES,
    'token': _PIECES | {'granularity': 'token'},
    'k2': {'num_candidates': 2},
    'k4': {'num_candidates': 4},
    'k8': {'num_candidates': 8},
    'k16': {'num_candidates': 16},
    'shared_bert': {'model.towers': 'shared_bert'},
    'separate': {'model.towers': 'separate'},
    # So few rows ScaNN would compare one by one, exactly.
    'scann': {
        'mips.backend': 'scann',
        'mips.num_leaves': 64,
        'mips.leaves_to_search': 8,
    },
}
# The stages that come before; other towers have an ICT of their own, another
# vocabulary has both of its own.
_BEFORE = {
    'mlm': {},
    'ict': {},
    'ict_shared_bert': {'model.towers': 'shared_bert'},
    'ict_separate': {'model.towers': 'separate'},
    'mlm_pieces': _PIECES,
    'ict_pieces': _PIECES,
}
STAGES = (*_BEFORE, *ROWS)


def get_config(row: str = 'realm') -> config_lib.Config:
  """Returns the config of a row, or of a stage before it."""
  if row not in STAGES:
    raise ValueError(f'No row {row!r}; there are {", ".join(STAGES)}.')
  if row in _BEFORE:
    stage = 'mlm' if row.startswith('mlm') else 'ict'
    config = recipes.invented_world(stage)
    if stage == 'ict':
      config.steps = 400
  else:
    config = recipes.invented_world('realm')
    config.steps, config.optimizer.retriever_delay = 600, 100
    config.optimizer.retriever_learning_rate = 8e-4
    config.lengths.document = 30
    config.refresh.interval = config.refresh.lag = _INTERVAL
    config.checkpoint.interval = 300
    config.checkpoint.keep = 0  # All, for the curve of masked accuracy.
  for name, value in (_BEFORE | ROWS)[row].items():
    *sections, field = name.split('.')
    place = config
    for section in sections:
      place = getattr(place, section)
    setattr(place, field, value)
  return config
