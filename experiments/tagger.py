"""A tagger of named entities, for salient spans: from scratch, or from a BERT.

Guu et al. 2020, section 3.4: a BERT tagger trained on CoNLL 2003 marks the
spans to mask; worth 3 to 6 points of exact match (table 2). CoNLL 2003 is not
free; any tagged sentences serve, such as the Groningen Meaning Bank's.

  realm-jax train --config=experiments/tagger.py:scratch \
      --workdir=runs/tagger --config.corpus=corpus \
      --config.tagger.files=gmb-train.jsonl,wnut17-train.conll
  realm-jax train --config=experiments/tagger.py:pretrained \
      --workdir=runs/tagger --config.corpus=corpus \
      --config.init_from=runs/imported_bert --config.tagger.files=train.jsonl
  realm-jax evaluate --workdir=runs/tagger --tagged=dev.jsonl
  realm-jax tag --corpus=corpus --tagger=runs/tagger --output=tagged_corpus

`scratch` is 2 layers of width 128, a quarter of an hour on one CPU core;
`pretrained` takes size and activation from the flags (--config.model.preset, or
num_layers, width and num_heads). Recorded: benchmarks/results/span_f1.json.
"""

from realm_jax import config as config_lib

STAGES = ('scratch', 'pretrained')


def get_config(stage: str = 'scratch') -> config_lib.Config:
  """Returns the config: 'scratch' or 'pretrained'."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  config = config_lib.Config(objective='tagger')
  # A longer sentence continues in another row: less padding than with 64.
  config.tagger.length = 40
  config.log_interval = 50
  config.checkpoint.keep = 1
  config.model.dropout = 0.1
  config.optimizer.b2 = 0.98
  if stage == 'scratch':
    config.model.preset = 'tiny'
    config.model.init_stddev = 0.05  # Width 128 learns faster so than of 0.02.
    config.steps, config.batch_size = 6_000, 64
    config.optimizer.learning_rate = 1e-3
  else:
    config.model.preset = 'base'
    config.steps, config.batch_size = 4_000, 32
    config.optimizer.learning_rate = 5e-5
  return config
