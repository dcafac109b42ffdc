"""CuratedTREC, whose answers are regular expressions.

Guu et al. 2020, table 1: exact match 46.8 on the test set (42.9 after CC-News).
20 epochs, as in ORQA. The released code cannot train on it; here the spans that
a pattern matches are the labels.

  realm-jax questions --source=large2470-train.tsv --output=curatedtrec --split
  realm-jax train --config=experiments/curatedtrec.py:published \
      --workdir=runs/curatedtrec --config.corpus=wikipedia \
      --config.init_from=runs/realm --config.model.activation=gelu \
      --config.open_qa.questions=curatedtrec/train.jsonl --with_index_builder
  realm-jax evaluate --workdir=runs/curatedtrec --questions=large2470-test.tsv

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
  return recipes.fine_tuning(recipe, questions=1_353, epochs=20)
