"""SQuAD as open-domain questions: from scratch on a CPU, or with BERT-base.

Over the paragraphs of SQuAD alone, with `cpu`: four stages, the two of
small_corpus.py first, then questions with their passages warm the retriever up
(in-batch negatives, Karpukhin et al. 2020), then retriever and reader learn
together while the index is refreshed.

  realm-jax train --config=experiments/squad_open.py:cpu_retriever \
      --workdir=runs/squad_retriever --config.corpus=corpus \
      --config.init_from=runs/ict --config.ict.questions=train.jsonl
  realm-jax train --config=experiments/squad_open.py:cpu \
      --workdir=runs/squad_open --config.corpus=corpus \
      --config.init_from=runs/mlm,runs/squad_retriever \
      --config.open_qa.questions=train.jsonl --with_index_builder
  realm-jax evaluate --workdir=runs/squad_open --questions=dev.jsonl --steps=all

Hardware: two CPU cores. Recorded: benchmarks/results/squad_open.json. Over all
of Wikipedia, with `published` or `plus_plus`: Lee et al. 2019, table 5, exact
match 20.2 with ORQA (SQuAD's questions were written with a paragraph in view).
"""

from realm_jax import config as config_lib
from realm_jax import recipes

STAGES = ('cpu', 'cpu_retriever', *recipes.FINE_TUNING)


def get_config(recipe: str = 'cpu') -> config_lib.Config:
  """Returns a config: 'cpu', 'cpu_retriever', 'published' or 'plus_plus'."""
  if not recipe.startswith('cpu'):
    return recipes.fine_tuning(recipe, questions=87_599, epochs=2)
  config = recipes.from_scratch('open_qa' if recipe == 'cpu' else 'ict')
  config.lengths.query, config.lengths.document = 40, 160
  config.optimizer.warmup_steps = 50
  config.checkpoint.interval = 200
  if recipe == 'cpu_retriever':
    config.steps, config.batch_size = 2000, 64
    return config
  config.steps, config.batch_size = 1000, 16
  config.checkpoint.keep = 0  # All, for the curve over training.
  config.open_qa.retrieved, config.open_qa.read = 200, 5
  config.open_qa.title = True
  config.open_qa.documents = 'trained'
  config.optimizer.retriever_learning_rate = 1e-4
  config.refresh.interval = config.refresh.lag = 200
  config.refresh.keep = 0
  return config
