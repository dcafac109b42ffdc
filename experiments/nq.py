"""NaturalQuestions-Open, after pre-training on Wikipedia.

Guu et al. 2020, table 1: exact match 39.2 on the test set (40.4 after CC-News);
REALM++ reports about 5 points more. 2 epochs, as in ORQA.

  realm-jax questions --source=NQ-open.train.jsonl --output=nq --split
  realm-jax train --config=experiments/nq.py:published \
      --workdir=runs/nq --config.corpus=wikipedia \
      --config.init_from=runs/realm --config.model.activation=gelu \
      --config.open_qa.questions=nq/train.jsonl --with_index_builder
  realm-jax evaluate --workdir=runs/nq --questions=NQ-open.dev.jsonl

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
  return recipes.fine_tuning(recipe, questions=79_168, epochs=2)
