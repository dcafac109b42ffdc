"""Settings that several experiments share.

Public: `fine_tuning`, `FINE_TUNING`.
"""

from realm_jax import config as config_lib

FINE_TUNING = ('published', 'plus_plus')


def fine_tuning(
    recipe: str, questions: int, epochs: int
) -> config_lib.Config:
  """Fine-tuning BERT-base on a set of questions over 13 million passages.

  Args:
    recipe: 'published': one question a step, 5,000 passages retrieved, the
      best 5 read without their titles, documents frozen (Lee et al. 2019,
      section 6.2; Guu et al. 2020, section 4.3). 'plus_plus': batches of 16,
      more passages, with titles (Balachandran et al. 2021, whose exact values
      are not published in one place; these are ours).
    questions: of the training set.
    epochs: over them.

  Raises:
    ValueError: for another recipe.
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
  config.refresh.policy = 'none'
  config.model.compute_dtype = 'bfloat16'
  config.mips.dtype = 'bfloat16'
  return config
