"""The setting of the paper: BERT-base, Wikipedia, 13 million passages.

Guu et al. 2020, section 4 and appendix A: 200,000 steps of 512 examples with 8
candidates (the null document among them) at 3e-5, after 100,000 steps of ICT
with batches of 4,096 at 1e-4; 64 chips train, 16 embed the corpus. A refresh
every 250 steps, the default, takes more of them: docs/scaling.md. Table 1:
exact match 39.2 on NaturalQuestions-Open; table 2: zero-shot recall@5 38.5 with
REALM, 13.9 with ICT alone. Not run here at this size.

  realm-jax import --source=bert-base-uncased --workdir=bert
  realm-jax prepare --source=enwiki-pages-articles.xml.bz2 --vocab=bert \
      --output=wikipedia
  realm-jax train --config=experiments/realm_base.py:ict --workdir=runs/ict \
      --config.corpus=wikipedia --config.init_from=bert \
      --config.model.activation=gelu
  realm-jax train --config=experiments/realm_base.py:realm \
      --workdir=runs/realm --config.corpus=wikipedia \
      --config.init_from=bert,runs/ict --config.model.activation=gelu
  realm-jax index --workdir=runs/realm --follow    # on devices of its own

Both BERTs begin with the published weights, whose activation is `gelu`: ICT's
in the first stage, the reader's in the second. Without them, the stage `mlm`
trains the reader: `ict` has no init_from then, and `realm` has
--config.init_from=runs/mlm,runs/ict.
"""

from realm_jax import config as config_lib

STAGES = ('mlm', 'ict', 'realm')


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage: 'mlm', 'ict' or 'realm'."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  config = config_lib.Config(objective=stage)  # The defaults are the paper's.
  config.model.compute_dtype = 'bfloat16'
  config.mips.dtype = 'bfloat16'
  if stage == 'mlm':
    config.optimizer.learning_rate = 1e-4
  elif stage == 'ict':
    config.steps, config.batch_size = 100_000, 4096
    config.optimizer.learning_rate = 1e-4
    config.lengths.query = 64
  return config
