"""Adapts a published retriever to a corpus of your own, without labels.

Guu et al. 2020, section 3, from a retriever of sentence-transformers in the
place of one that ICT trained. `mlm` makes its encoder a reader; `realm` teaches
the retriever which passages help that reader to fill in names and dates.

  realm-jax import --source=sentence-transformers/all-MiniLM-L6-v2 \
      --components=embedder,reader --workdir=runs/start
  realm-jax prepare --source=passages.jsonl --vocab=runs/start \
      --max_wordpieces=64 --output=corpus
  realm-jax train --config=experiments/adapt.py:mlm --workdir=runs/mlm \
      --config.corpus=corpus --config.init_from=runs/start
  realm-jax train --config=experiments/adapt.py:realm --workdir=runs/adapted \
      --config.corpus=corpus --config.init_from=runs/start,runs/mlm \
      --with_index_builder
  realm-jax evaluate --workdir=runs/adapted --questions=questions.jsonl \
      --steps=all --bm25
  realm-jax export --workdir=runs/adapted --format=sentence-transformers \
      --output=model
"""

from realm_jax import config as config_lib

STAGES = ('mlm', 'realm')


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage: 'mlm' or 'realm'."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  config = config_lib.Config(objective=stage)
  config.sentences = 'knowledge'
  config.lengths.query, config.lengths.document = 40, 64
  config.lengths.masks = 6
  config.model.dropout = 0.0
  config.optimizer.b2 = 0.98
  config.optimizer.warmup_steps = 30
  config.checkpoint.interval = 50
  if stage == 'mlm':
    config.steps, config.batch_size = 400, 32
    config.mlm.views = {
        'own': 0.2, 'answer': 0.3, 'article': 0.15, 'random': 0.2, 'null': 0.15
    }
    config.optimizer.learning_rate = 3e-4
    config.checkpoint.keep = 1
    return config
  config.steps, config.batch_size = 100, 48
  config.num_candidates = 4
  config.granularity = 'token'
  config.model.score_scale = 20.0  # For cosines; of other retrievers, 1.
  config.optimizer.frozen = ('reader',)
  config.optimizer.learning_rate = 2e-5
  config.refresh.interval = config.refresh.lag = 25
  config.refresh.keep = 0  # All, for the curve of recall over training.
  config.checkpoint.keep = 0
  return config
