"""REALM from scratch on a corpus of your own, at a size that a CPU can train.

Guu et al. 2020, section 3, with the lengths and steps of a first look: 18,896
paragraphs of Wikipedia take half an hour on two CPU cores. Use `tiny` on a
CPU, `mini` or `small` (--config.model.preset=mini) on one GPU.

  realm-jax prepare --source=passages.jsonl --output=corpus \
      --max_wordpieces=160
  realm-jax train --config=experiments/small_corpus.py:mlm --workdir=runs/mlm \
      --config.corpus=corpus
  realm-jax train --config=experiments/small_corpus.py:ict --workdir=runs/ict \
      --config.corpus=corpus
  realm-jax train --config=experiments/small_corpus.py:realm \
      --workdir=runs/realm --config.corpus=corpus \
      --config.init_from=runs/mlm,runs/ict --with_index_builder

Recorded: benchmarks/results/real_text.json.
"""

from realm_jax import config as config_lib
from realm_jax import recipes

STAGES = ('mlm', 'ict', 'realm')


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage: 'mlm', 'ict' or 'realm'."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  config = recipes.from_scratch(stage)
  config.lengths.query = 48
  config.lengths.document = 160
  config.lengths.masks = 6
  config.optimizer.warmup_steps = 50
  config.checkpoint.interval = 200
  if stage == 'mlm':
    config.steps, config.batch_size = 300, 32
    config.mlm.own_passage_rate = 0.5
  elif stage == 'ict':
    config.steps, config.batch_size = 600, 64
  else:
    config.steps, config.batch_size = 250, 16
    config.num_candidates = 5
    config.optimizer.learning_rate = 5e-4
    config.optimizer.retriever_learning_rate = 1e-4
    config.optimizer.retriever_delay = 50
    config.refresh.interval = 50
    config.refresh.lag = 50
    config.refresh.keep = 0
  return config
