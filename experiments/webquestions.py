"""WebQuestions, after pre-training on Wikipedia.

Guu et al. 2020, table 1: exact match 40.2 on the test set (40.7 after CC-News).
20 epochs, as in ORQA.

  realm-jax questions --source=trainmodel.json --output=webquestions --split
  realm-jax train --config=experiments/webquestions.py:published \
      --workdir=runs/webquestions --config.corpus=wikipedia \
      --config.init_from=runs/realm --config.model.activation=gelu \
      --config.open_qa.questions=webquestions/train.jsonl --with_index_builder
  realm-jax evaluate --workdir=runs/webquestions --questions=test.json

The activation is that of the BERT which experiments/realm_base.py starts from.
With `:plus_plus` in the place of `:published`: larger batches, titles, and
`evaluate --read=100`. Hardware: an accelerator of 12 GB. Not run here at this
size.
"""

from realm_jax import config as config_lib
from realm_jax import recipes

STAGES = recipes.FINE_TUNING


def get_config(recipe: str = 'published') -> config_lib.Config:
  """Returns the config of a recipe: 'published' or 'plus_plus'."""
  return recipes.fine_tuning(recipe, questions=3_417, epochs=20)
