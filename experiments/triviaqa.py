"""TriviaQA, unfiltered, as open-domain questions.

Lee et al. 2019, table 5: exact match 45.0 with ORQA (their own split); REALM
does not report it. 2 epochs, as for NaturalQuestions.

  realm-jax questions --source=unfiltered-web-train.json --output=triviaqa
  realm-jax train --config=experiments/triviaqa.py:published \
      --workdir=runs/triviaqa --config.corpus=wikipedia \
      --config.init_from=runs/realm --config.model.activation=gelu \
      --config.open_qa.questions=triviaqa/questions.jsonl --with_index_builder
  realm-jax evaluate --workdir=runs/triviaqa --questions=unfiltered-web-dev.json

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
  return recipes.fine_tuning(recipe, questions=87_622, epochs=2)
