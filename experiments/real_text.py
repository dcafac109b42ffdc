"""REALM from scratch on Wikipedia paragraphs, with its controls.

Guu et al. 2020, section 3, without published weights. The passages are the
paragraphs of SQuAD, and the sentences to mask are theirs (X = Z).

  * The reader is warmed up on articles that the later stages do not see: a
    reader that knows the sentences by heart teaches a retriever nothing. It
    sees random passages, too; else, a passage without the answer does harm, and
    the retriever learns to avoid harm, not to find answers.
  * The retriever is warmed up on all articles. ICT on 40 of them finds the
    passages of an article much worse (docs/results.md).
  * `realm` keeps the reader as it is, which leaves time for batches three times
    as large, with a small learning rate: one masked sentence in five has a
    candidate with the answer, so a gradient is mostly noise.

  python benchmarks/real_text.py --texts=TEXTS --seconds=10800 \
      --workdir=runs/real_text --output=real_text.json

runs all stages within a time. Hardware: 2 CPU cores for three hours, or with
`--config.model.preset=small` one GPU for ten minutes.

  ict          warms the retriever up
  mlm          warms the reader up
  realm        trains the retriever by what the reader makes of its passages
  ict_longer   control: ICT continues from `ict` for as long as `realm`
  frozen       control: the reader learns, the retriever does not
  null_reader  control: the reader of `mlm` without passages
"""

from realm_jax import config as config_lib
from realm_jax import recipes

STAGES = ('ict', 'mlm', 'realm', 'ict_longer', 'frozen', 'null_reader')


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage, one of `STAGES`.

  The numbers of steps are upper bounds: the benchmark ends a stage by time.
  """
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  objective = {
      'ict_longer': 'ict', 'frozen': 'realm', 'null_reader': 'mlm'
  }.get(stage, stage)
  config = recipes.from_scratch(objective)
  config.lengths.query = 40
  config.lengths.document = 80
  config.lengths.masks = 6
  config.checkpoint.interval = 500
  if objective == 'mlm':
    config.steps, config.batch_size = 9000, 64
    config.optimizer.warmup_steps = 200
    config.mlm.views = {
        'own': 0.15, 'answer': 0.3, 'article': 0.2, 'random': 0.2, 'null': 0.15
    }
    if stage == 'null_reader':
      config.mlm.views = {'null': 1.0}
      config.lengths.document = 8  # The null document has 3 wordpieces.
      config.optimizer.learning_rate = 5e-4
  elif objective == 'ict':
    config.steps, config.batch_size = 4000, 128
    config.optimizer.warmup_steps = 100
    if stage == 'ict_longer':
      config.steps = 100_000
      config.optimizer.learning_rate = 1e-4  # Where `ict` ended.
      config.optimizer.final_fraction = 1.0
  else:
    config.steps, config.batch_size = 900, 48
    config.num_candidates = 8
    config.granularity = 'token'
    config.optimizer.warmup_steps = 50
    config.optimizer.frozen = ('reader',)
    config.optimizer.learning_rate = 3e-5
    config.checkpoint.interval = 150
    config.refresh.interval = 50
    config.refresh.lag = 25
    config.refresh.keep = 0  # All, for the curve of recall over training.
    if stage == 'frozen':
      config.optimizer.frozen = ('embedder',)
      config.optimizer.learning_rate = 1e-4
      config.refresh.policy = 'none'
  return config
