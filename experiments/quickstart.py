"""The whole of REALM in ten minutes on two CPU cores, on an invented world.

Guu et al. 2020, sections 3.3 and 3.4, at preset `tiny` and from scratch.

  make quickstart                               # all of it
  python experiments/quickstart.py --seed=1     # with a world of another seed
  realm-jax train --config=experiments/quickstart.py:ict --workdir=runs/my_ict \
      --config.corpus=runs/quickstart/corpus    # one stage

Hardware: 2 CPU cores. Stages, in the order that matters (docs/learning.md):
`mlm` warms the reader up, `ict` the retriever, `realm` trains both.
"""

from realm_jax import config as config_lib

STAGES = ('mlm', 'ict', 'realm')


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage: 'mlm', 'ict' or 'realm'."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  config = config_lib.Config(objective=stage)
  config.batch_size = 96
  config.num_candidates = 5
  config.log_interval = 10
  config.model.preset = 'tiny'
  config.model.init_stddev = 0.05  # Width 128 learns faster so than with 0.02.
  config.model.dropout = 0.0  # Too few steps to overfit.
  config.model.embedding_scale_init = 128**-0.25
  config.lengths.query = 18
  config.lengths.document = 36
  config.lengths.masks = 3
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_steps = 30
  config.optimizer.final_fraction = 0.1
  config.optimizer.b2 = 0.98
  config.checkpoint.keep = 1
  if stage == 'mlm':
    config.steps = 300
  elif stage == 'ict':
    config.steps = 150
  else:
    config.steps = 600
    config.batch_size = 32
    config.optimizer.retriever_learning_rate = 5e-4
    config.optimizer.retriever_delay = 100
    config.refresh.interval = 50
    config.refresh.lag = 25
    config.refresh.keep = 0  # All, for the curve of recall over training.
  return config
