"""Masked sentences: the passages that they are read with."""

import numpy as np
import retrieval_test

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import inspect as inspect_lib


def test_random_passages_are_live_and_do_not_hold_the_sentence():
  live = np.array([1, 3, 4, 5, 8])
  exclude_BR2 = np.array([[[3, 6], [0, 0]], [[0, 2], [8, 9]]])
  rows_BJ = inspect_lib._random_rows(
      live, exclude_BR2, 200, np.random.default_rng(0)
  )
  assert [{*rows.tolist()} for rows in rows_BJ] == [{1, 8}, {3, 4, 5}]


def test_more_passages_are_read_than_in_training(world, tmp_path):
  corpus = corpus_lib.Corpus.open(world)
  masked = {}
  for size, read in ((4, None), (4, 8), (9, None)):
    config = retrieval_test._config(corpus)
    config.num_candidates = size
    workdir = retrieval_test._make_workdir(
        tmp_path / f'{size}-{read}', corpus, config,
        {0: retrieval_test._params(config)},
    )
    (result,) = evaluate.evaluate(workdir, [], read=read, limit=16)
    masked[size, read] = result['masked']
  assert masked[4, 8] == masked[9, None]
  assert masked[4, 8]['num_candidates'] == 9
  figures = [one['retrieval_utility'] for one in masked.values()]
  assert figures[0] != figures[1]
