"""Random passages in the place of retrieved ones."""

import numpy as np

from realm_jax.evaluation import inspect as inspect_lib


def test_random_passages_are_live_and_do_not_hold_the_sentence():
  live = np.array([1, 3, 4, 5, 8])
  exclude_BR2 = np.array([[[3, 6], [0, 0]], [[0, 2], [8, 9]]])
  rows_BJ = inspect_lib._random_rows(
      live, exclude_BR2, 200, np.random.default_rng(0)
  )
  assert [{*rows.tolist()} for rows in rows_BJ] == [{1, 8}, {3, 4, 5}]
