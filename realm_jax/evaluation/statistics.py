"""How sure a mean over questions is, and whether two runs differ.

Public: `interval`, `paired_test`. Both take one figure per question, such as
1 for a right answer and 0 for a wrong one, and resample the questions; the
same figures give the same result.
"""

import numpy as np

_RESAMPLES = 2_000
_PERMUTATIONS = 10_000
_CHUNK = 2**22  # Figures drawn at once.


def interval(
    values_B: np.ndarray, confidence: float = 0.95
) -> tuple[float, float]:
  """Bootstrap interval of the mean (percentile method, Efron 1979).

  Args:
    values_B: one figure per question.
    confidence: of the interval.

  Returns:
    Lower and upper bound.

  Raises:
    ValueError: there is no question.
  """
  values_B = np.asarray(values_B, np.float64)
  if not values_B.size:
    raise ValueError('There is no question to take the mean over.')
  rng = np.random.default_rng(0)
  rows = max(_CHUNK // values_B.size, 1)
  means = []
  for done in range(0, _RESAMPLES, rows):
    size = (min(rows, _RESAMPLES - done), values_B.size)
    means.append(values_B[rng.integers(values_B.size, size=size)].mean(axis=1))
  tail = (1 - confidence) / 2
  low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
  return float(low), float(high)


def paired_test(ours_B: np.ndarray, theirs_B: np.ndarray) -> dict[str, float]:
  """Compares two runs on the same questions.

  The p-value is that of a randomisation test: how often a difference of means
  as large arises when, question by question, it is tossed up which run gave
  which figure (Smucker et al. 2007).

  Args:
    ours_B: one figure per question.
    theirs_B: of the same questions, in the same order.

  Returns:
    difference (ours - theirs), its 95 % interval `low` and `high`, p_value,
    and how many questions ours does `better` and `worse`.

  Raises:
    ValueError: the runs are of different lengths, or empty.
  """
  ours_B, theirs_B = np.asarray(ours_B), np.asarray(theirs_B)
  if ours_B.shape != theirs_B.shape:
    raise ValueError(
        f'{ours_B.size} questions in one run, {theirs_B.size} in the other:'
        ' only runs over the same questions can be compared.'
    )
  difference_B = ours_B.astype(np.float64) - theirs_B.astype(np.float64)
  low, high = interval(difference_B)
  # Where both agree, the toss changes nothing.
  moved = difference_B[difference_B != 0]
  rng = np.random.default_rng(0)
  rows = max(_CHUNK // max(moved.size, 1), 1)
  extreme = 0
  for done in range(0, _PERMUTATIONS, rows):
    size = (min(rows, _PERMUTATIONS - done), moved.size)
    signs = rng.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
    sums = signs @ moved
    extreme += int((np.abs(sums) >= abs(moved.sum()) - 1e-12).sum())
  return {
      'difference': float(difference_B.mean()),
      'low': low,
      'high': high,
      # The run itself counts as one of the outcomes (Phipson & Smyth 2010).
      'p_value': (extreme + 1) / (_PERMUTATIONS + 1),
      'better': int((difference_B > 0).sum()),
      'worse': int((difference_B < 0).sum()),
  }
