"""Metrics of retrieval and question answering, intervals and paired tests.

A rank counts from 1; 0 means that nothing relevant was retrieved. Intervals and
tests resample clusters of questions: questions about one article are not
independent, and intervals that ignore this are too narrow. The same figures
give the same result.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from realm_jax.inference import answering
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib

# Depths of recall; the last one is the number of retrieved passages.
CUTOFFS = (1, 5, 20, 50, 100)
NDCG_CUTOFF = 10
_RESAMPLES = 2_000
_PERMUTATIONS = 10_000
_CHUNK = 2**22  # Figures drawn in one array.


def gold_ranks(
    doc_ids_BK: np.ndarray, gold_rows: Sequence[Sequence[int] | np.ndarray]
) -> np.ndarray:
  """Returns int64 [B]: rank from 1 of the first gold passage, else 0.

  `doc_ids_BK` are passage rows, best first; -1: none.
  """
  return _first_hits(
      np.isin(doc_ids, rows)
      for doc_ids, rows in zip(doc_ids_BK, gold_rows, strict=True)
  )


def answer_ranks(
    doc_ids_BK: np.ndarray,
    answers: Sequence[Sequence[str]],
    matches: Sequence[answers_lib.Rule],
    text_of: Callable[[int], str],
) -> np.ndarray:
  """Returns int64 [B]: rank from 1 of the first passage with an answer, else 0.

  `doc_ids_BK` are passage rows, best first; -1: none. `matches` are rules of
  `answers.has_answer`. `text_of` returns the text of a passage row, without the
  title, as in DPR.
  """

  def hits(
      doc_ids: np.ndarray, accepted: Sequence[str], match: answers_lib.Rule
  ) -> Iterable[bool]:
    for row in doc_ids.tolist():
      yield row >= 0 and answers_lib.has_answer(text_of(row), accepted, match)

  return _first_hits(map(hits, doc_ids_BK, answers, matches))


def _first_hits(hits: Iterable[Iterable[bool]]) -> np.ndarray:
  """Returns the 1-based place of the first True of each row; 0: none."""
  found = [next((i for i, hit in enumerate(row, 1) if hit), 0) for row in hits]
  return np.array(found, np.int64)


def ndcg(
    doc_ids_BK: np.ndarray,
    gold_rows: Sequence[np.ndarray],
    grades: Sequence[np.ndarray],
    unknown: Sequence[Iterable[int]],
) -> np.ndarray:
  """Normalised discounted cumulative gain, as trec_eval's ndcg_cut_10.

  Args:
    doc_ids_BK: passage rows, best first; -1: none.
    gold_rows: for each query, the rows of its gold passages, in order.
    grades: how relevant they are; the gain of a passage is its grade.
    unknown: grades of gold passages that cannot be retrieved.

  Returns:
    float64 [B], 0 without a gold passage.
  """
  discount_K = 1 / np.log2(np.arange(NDCG_CUTOFF) + 2)
  figures = np.zeros(len(doc_ids_BK))
  for i, (doc_ids, rows, grade, missing) in enumerate(
      zip(doc_ids_BK[:, :NDCG_CUTOFF], gold_rows, grades, unknown, strict=True)
  ):
    ideal = np.sort([*grade, *missing])[::-1][:NDCG_CUTOFF]
    if not len(ideal):
      continue
    gain_of = dict(zip(rows.tolist(), grade.tolist(), strict=True))
    gains = np.array([gain_of.get(row, 0) for row in doc_ids.tolist()])
    figures[i] = (gains @ discount_K[: len(gains)]) / (
        ideal @ discount_K[: len(ideal)]
    )
  return figures


def ranking(
    ranks: np.ndarray, depth: int, num_documents: int
) -> dict[str, float]:
  """Returns `recall_at_C` for each known cutoff C, and `mrr`.

  If all `num_documents` passages were retrieved, recall is known at every
  cutoff. A passage that was not retrieved adds 0 to `mrr`, which is MRR@depth.
  `ranks` are those of `gold_ranks` or `answer_ranks`, at least one.
  """
  found = ranks > 0
  metrics = {
      f'recall_at_{cutoff}': float((found & (ranks <= cutoff)).mean())
      for cutoff in CUTOFFS
      if cutoff <= depth or depth >= num_documents
  }
  reciprocal = np.where(found, 1.0 / np.maximum(ranks, 1), 0.0)
  return {**metrics, 'mrr': float(reciprocal.mean())}


def answer_figures(
    model: answering.OpenQA,
    table: question_table_lib.QuestionTable,
    rows_BN: np.ndarray,
    k: int | None = None,
) -> tuple[dict[str, np.ndarray], list[answering.Answer]]:
  """Answers questions from the first k retrieved passages; scores the answers.

  Returns:
    Figures of each question, [B], and the answers. The figures: exact_match,
    f1 (nan unless the match is `string`), reader_oracle (a passage that was
    read holds an answer within the reader's span width), no_answer,
    probability, and exact_match_random_passages, which reads k random passages
    instead of the retrieved ones.
  """
  trained = model.trained
  k = trained.config.open_qa.read if k is None else k
  rows_BK = rows_BN[:, :k]
  found = model.read(table, rows_BK)
  rng = np.random.default_rng(0)
  blind = model.read(table, rng.choice(trained.corpus.live_rows, rows_BK.shape))
  width = trained.config.model.max_span_width

  def exact_match(answers: list[answering.Answer]) -> list[bool]:
    return [
        answers_lib.exact_match(answer.text, question.answers, question.match)
        for answer, question in zip(answers, table.questions, strict=True)
    ]

  def can_answer(question: questions_lib.Question, rows_K: np.ndarray) -> bool:
    answers = model.passage_answers
    return any(
        last - first < width
        for row in rows_K[answers.has_answer(question, rows_K)].tolist()
        for first, last in answers.spans(question, row)
    )

  f1 = [
      answers_lib.f1(answer.text, question.answers)
      if question.match == 'string'
      else np.nan
      for answer, question in zip(found, table.questions, strict=True)
  ]
  figures = {
      'exact_match': exact_match(found),
      'f1': f1,
      'reader_oracle': list(map(can_answer, table.questions, rows_BK)),
      'no_answer': [not answer.text for answer in found],
      'probability': [answer.probability for answer in found],
      'exact_match_random_passages': exact_match(blind),
  }
  return {name: np.array(x, float) for name, x in figures.items()}, found


def means(
    figures: Mapping[str, np.ndarray],
    cluster_B: np.ndarray,
    with_interval: Sequence[str],
) -> dict[str, Any]:
  """Returns NAME, the mean of each figure, and NAME_interval of some.

  Figures are [B] each; nan is left out. A single cluster has no interval.
  """
  summary: dict[str, Any] = {}
  for name, values in figures.items():
    values_B = values.astype(float)
    known_B = ~np.isnan(values_B)
    if known_B.any():
      summary[name] = float(values_B[known_B].mean())
      if name in with_interval:
        summary |= named_interval(name, values_B[known_B], cluster_B[known_B])
  return summary


def clusters(keys: Iterable[Hashable | None]) -> np.ndarray:
  """Returns the number of the cluster of each question, int64 [B].

  Equal keys are one cluster, numbered in order of appearance; None is a cluster
  of its own.
  """
  numbers: dict[Hashable, int] = {}
  found = [
      numbers.setdefault((i,) if key is None else key, len(numbers))
      for i, key in enumerate(keys)
  ]
  return np.array(found, np.int64)


def interval(
    values_B: np.ndarray, cluster_B: np.ndarray | None = None
) -> tuple[float, float]:
  """Cluster bootstrap interval of the mean, 95 %.

  Percentile method (Efron 1979); whole clusters are drawn with replacement
  (Davison & Hinkley 1997, section 3.8).

  Args:
    values_B: one figure per question, at least one.
    cluster_B: integers, equal for the questions of one cluster, such as
      `clusters` makes; None: each question is one.

  Returns:
    Lower and upper bound; nan for a single cluster, which has no spread.
  """
  sums, sizes = _totals(values_B, cluster_B)
  if sums.size == 1:
    return float('nan'), float('nan')
  found = stats.bootstrap(
      (sums, sizes),
      lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
      paired=True, vectorized=True, n_resamples=_RESAMPLES,
      batch=max(_CHUNK // sums.size, 1), confidence_level=0.95,
      method='percentile', rng=np.random.default_rng(0),
  )
  low, high = found.confidence_interval
  return float(low), float(high)


def named_interval(
    name: str, values_B: np.ndarray, cluster_B: np.ndarray | None
) -> dict[str, list[float]]:
  """Returns {NAME_interval: [low, high]}, or nothing for a single cluster."""
  bounds = interval(values_B, cluster_B)
  return {} if np.isnan(bounds[0]) else {f'{name}_interval': list(bounds)}


def paired_test(
    ours_B: np.ndarray,
    theirs_B: np.ndarray,
    cluster_B: np.ndarray | None = None,
) -> dict[str, float]:
  """Compares two runs, one figure per question, in the same order.

  The p-value is that of a randomisation test (Smucker et al. 2007): the share
  of random exchanges of the two runs, cluster by cluster (see `interval`), that
  make a difference at least as large.

  Returns:
    difference (ours - theirs), its 95 % interval `low` and `high`, p_value,
    the number of questions that ours does `better` and `worse`, and the number
    of `questions` and `clusters`.
  """
  difference_B = ours_B.astype(np.float64) - theirs_B.astype(np.float64)
  low, high = interval(difference_B, cluster_B)
  sums, _ = _totals(difference_B, cluster_B)
  moved = sums[sums != 0]  # An exchange of equal figures changes nothing.
  rng = np.random.default_rng(0)
  rows = max(_CHUNK // max(moved.size, 1), 1)
  extreme = 0
  for done in range(0, _PERMUTATIONS, rows):
    size = (min(rows, _PERMUTATIONS - done), moved.size)
    signs = rng.integers(0, 2, size=size, dtype=np.int8) * 2 - 1
    exchanged = signs @ moved
    extreme += int((np.abs(exchanged) >= abs(moved.sum()) - 1e-12).sum())
  return {
      'difference': float(difference_B.mean()),
      'low': low,
      'high': high,
      # The observed difference is one of the outcomes (Phipson & Smyth 2010).
      'p_value': (extreme + 1) / (_PERMUTATIONS + 1),
      'better': int((difference_B > 0).sum()),
      'worse': int((difference_B < 0).sum()),
      'questions': difference_B.size,
      'clusters': sums.size,
  }


def _totals(
    values_B: np.ndarray, cluster_B: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sum of the figures and the size of each cluster."""
  if cluster_B is None:
    return values_B, np.ones_like(values_B)
  _, number_B = np.unique(cluster_B, return_inverse=True)
  return (
      np.bincount(number_B, values_B), np.bincount(number_B).astype(np.float64)
  )
