"""Settings that several experiments share."""

from typing import Literal

from realm_jax import config as config_lib

FINE_TUNING = ('published', 'plus_plus')

Stage = Literal['mlm', 'ict', 'realm', 'open_qa']


def from_scratch(stage: Stage) -> config_lib.Config:
  """Trains preset `tiny` without published weights (docs/learning.md)."""
  config = config_lib.Config(objective=stage)
  config.model.preset = 'tiny'
  config.model.init_stddev = 0.05  # At width 128, faster than 0.02.
  config.model.dropout = 0.0  # The runs are too short to overfit.
  config.model.embedding_scale_init = 128**-0.25
  config.optimizer.learning_rate = 1e-3
  config.optimizer.final_fraction = 0.1
  config.optimizer.b2 = 0.98
  config.checkpoint.keep = 1
  return config


def invented_world(stage: Stage) -> config_lib.Config:
  """Trains on `prepare --source=world:SEED`, a world of 1,000 entities."""
  config = from_scratch(stage)
  config.batch_size = 96
  config.num_candidates = 5
  config.log_interval = 10
  config.lengths.query = 16
  config.lengths.document = 34
  config.lengths.masks = 3
  config.optimizer.warmup_steps = 30
  if stage == 'mlm':
    config.steps = 400
    config.mlm.own_passage_rate = 0.7
  elif stage == 'ict':
    config.steps = 200
  elif stage == 'open_qa':
    config.steps = 150
    config.batch_size = 32
    config.open_qa.retrieved = 100  # Of 4,500.
    config.refresh.policy = 'none'
  else:
    config.steps = 600
    config.batch_size = 32
    config.optimizer.retriever_learning_rate = 4e-4
    config.optimizer.retriever_delay = 150
    config.refresh.interval = 25
    config.refresh.lag = 10
  return config


def fine_tuning(
    recipe: str, questions: int, epochs: int
) -> config_lib.Config:
  """Fine-tunes BERT-base on a question set over 13 million passages.

  Args:
    recipe: 'published': one question per step, 5,000 passages retrieved, the
      best 5 read without their titles, documents frozen (Lee et al. 2019,
      section 6.2; Guu et al. 2020, section 4.3). 'plus_plus': batches of 16,
      more passages, with titles (Balachandran et al. 2021, who do not publish
      all values in one place; these are ours).
    questions: number of questions in the training set.
    epochs: passes over them.

  Raises:
    ValueError: the recipe is unknown.
  """
  if recipe not in FINE_TUNING:
    raise ValueError(
        f'No recipe {recipe!r}; there are {", ".join(FINE_TUNING)}.'
    )
  config = config_lib.Config(objective='open_qa')
  config.batch_size, config.optimizer.learning_rate = 1, 1e-5
  if recipe == 'plus_plus':
    config.batch_size, config.optimizer.learning_rate = 16, 5e-5
    config.open_qa.read, config.open_qa.title = 10, True
  config.steps = epochs * questions // config.batch_size
  config.lengths.query, config.lengths.document = 32, 288
  config.open_qa.length_step, config.open_qa.skip_unreadable = 16, True
  config.refresh.policy = 'none'
  config.model.compute_dtype = 'bfloat16'
  config.mips.dtype = 'bfloat16'
  return config
