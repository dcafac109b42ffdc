"""How sure a mean over questions is, and whether two runs differ.

Public: `clusters`, `interval`, `named_interval`, `paired_test`, `UNIT`. One
figure per question comes in, such as 1 for a right answer and 0 for a wrong
one. Clusters of questions are resampled: questions about one article are not
independent, and an interval that treats them so is too narrow. The same
figures give the same result.
"""

from collections.abc import Hashable, Iterable

import numpy as np

# The clusters of questions and of masked sentences, in words.
UNIT = 'the article of the gold passage, else that passage, else the question'

_RESAMPLES = 2_000
_PERMUTATIONS = 10_000
_CHUNK = 2**22  # Figures drawn at once.


def clusters(keys: Iterable[Hashable | None]) -> np.ndarray:
  """Numbers clusters by their keys.

  Args:
    keys: one per question; equal keys are one cluster, and None is a cluster
      of its own.

  Returns:
    int64 [B]: the cluster of each question, from 0 in order of appearance.
  """
  numbers: dict[Hashable, int] = {}
  return np.array(
      [
          numbers.setdefault((i,) if key is None else key, len(numbers))
          for i, key in enumerate(keys)
      ],
      np.int64,
  )


def interval(
    values_B: np.ndarray,
    cluster_B: np.ndarray | None = None,
    confidence: float = 0.95,
) -> tuple[float, float]:
  """Cluster bootstrap interval of the mean.

  Percentile method (Efron 1979); whole clusters are drawn with replacement
  (Davison & Hinkley 1997, section 3.8).

  Args:
    values_B: one figure per question.
    cluster_B: integers, equal for the questions of one cluster, such as
      `clusters` makes; None: each question is one.
    confidence: of the interval.

  Returns:
    Lower and upper bound; nan if there is one cluster only, which tells nothing
    about the spread of clusters.

  Raises:
    ValueError: there is no question, or not one cluster for each.
  """
  values_B = np.asarray(values_B, np.float64)
  if not values_B.size:
    raise ValueError('There is no question to take the mean over.')
  sums, sizes = _totals(values_B, cluster_B)
  if sums.size == 1:
    return float('nan'), float('nan')
  rng = np.random.default_rng(0)
  rows = max(_CHUNK // sums.size, 1)
  means = []
  for done in range(0, _RESAMPLES, rows):
    size = (min(rows, _RESAMPLES - done), sums.size)
    drawn = rng.integers(sums.size, size=size)
    means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1))
  tail = (1 - confidence) / 2
  low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
  return float(low), float(high)


def named_interval(
    name: str, values_B: np.ndarray, cluster_B: np.ndarray | None
) -> dict[str, list[float]]:
  """Returns {NAME_interval: [low, high]}, or nothing if it is not known."""
  bounds = interval(values_B, cluster_B)
  return {} if np.isnan(bounds[0]) else {f'{name}_interval': list(bounds)}


def paired_test(
    ours_B: np.ndarray,
    theirs_B: np.ndarray,
    cluster_B: np.ndarray | None = None,
) -> dict[str, float]:
  """Compares two runs on the same questions.

  The p-value is that of a randomisation test: how often a difference of means
  as large arises when, cluster by cluster, it is tossed up which run gave which
  figures (Smucker et al. 2007, who toss for each question).

  Args:
    ours_B: one figure per question.
    theirs_B: of the same questions, in the same order.
    cluster_B: integers, equal for the questions of one cluster, such as
      `clusters` makes; None: each question is one.

  Returns:
    difference (ours - theirs), its 95 % interval `low` and `high`, p_value,
    how many questions ours does `better` and `worse`, and how many `questions`
    and `clusters` there are.

  Raises:
    ValueError: the runs are of different lengths, or empty, or there is not
      one cluster for each question.
  """
  ours_B, theirs_B = np.asarray(ours_B), np.asarray(theirs_B)
  if ours_B.shape != theirs_B.shape:
    raise ValueError(
        f'{ours_B.size} questions in one run, {theirs_B.size} in the other:'
        ' only runs over the same questions can be compared.'
    )
  difference_B = ours_B.astype(np.float64) - theirs_B.astype(np.float64)
  low, high = interval(difference_B, cluster_B)
  sums, _ = _totals(difference_B, cluster_B)
  # Where both agree, the toss changes nothing.
  moved = sums[sums != 0]
  rng = np.random.default_rng(0)
  rows = max(_CHUNK // max(moved.size, 1), 1)
  extreme = 0
  for done in range(0, _PERMUTATIONS, rows):
    size = (min(rows, _PERMUTATIONS - done), moved.size)
    signs = rng.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
    tossed = signs @ moved
    extreme += int((np.abs(tossed) >= abs(moved.sum()) - 1e-12).sum())
  return {
      'difference': float(difference_B.mean()),
      'low': low,
      'high': high,
      # The run itself counts as one of the outcomes (Phipson & Smyth 2010).
      'p_value': (extreme + 1) / (_PERMUTATIONS + 1),
      'better': int((difference_B > 0).sum()),
      'worse': int((difference_B < 0).sum()),
      'questions': difference_B.size,
      'clusters': sums.size,
  }


def _totals(
    values_B: np.ndarray, cluster_B: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """The sum of the figures of each cluster, and how many it has."""
  if cluster_B is None:
    return values_B, np.ones_like(values_B)
  if np.shape(cluster_B) != values_B.shape:
    raise ValueError(
        f'{np.size(cluster_B)} clusters for {values_B.size} questions: give one'
        ' for each.'
    )
  _, number_B = np.unique(cluster_B, return_inverse=True)
  return (
      np.bincount(number_B, values_B),
      np.bincount(number_B).astype(np.float64),
  )
