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
_RESAMPLES = 2_000
_PERMUTATIONS = 10_000
_CHUNK = 2**22  # Figures drawn in one array.


def gold_ranks(
    doc_ids_BK: np.ndarray, gold_rows: Sequence[Sequence[int] | np.ndarray]
) -> np.ndarray:
  """Ranks of the first gold passage.

  Args:
    doc_ids_BK: passage rows, best first; -1: none.
    gold_rows: for each query, the rows of its gold passages.

  Returns:
    int64 [B]: 1-based rank, 0 if no gold passage was retrieved.

  Raises:
    ValueError: the number of entries in `gold_rows` is not that of queries.
  """
  _check_length(doc_ids_BK, len(gold_rows), 'lists of gold rows')
  if not doc_ids_BK.shape[1]:
    return np.zeros(len(doc_ids_BK), np.int64)
  hits_BK = np.zeros(doc_ids_BK.shape, bool)
  for hits, doc_ids, rows in zip(hits_BK, doc_ids_BK, gold_rows, strict=True):
    hits[:] = np.isin(doc_ids, np.asarray(rows, np.int64))
  return np.where(hits_BK.any(axis=1), hits_BK.argmax(axis=1) + 1, 0)


def answer_ranks(
    doc_ids_BK: np.ndarray,
    answers: Sequence[Sequence[str]],
    matches: Sequence[answers_lib.Rule],
    text_of: Callable[[int], str],
) -> np.ndarray:
  """Ranks of the first passage that contains an answer.

  Args:
    doc_ids_BK: passage rows, best first; -1: none.
    answers: the accepted answers of each query.
    matches: the rule of `answers.has_answer` for each query.
    text_of: returns the text of a passage row, without the title, as in DPR.

  Returns:
    int64 [B]: 1-based rank, 0 if no passage has an answer.

  Raises:
    ValueError: the number of lists of answers is not that of queries.
  """
  _check_length(doc_ids_BK, len(answers), 'lists of answers')
  ranks = np.zeros(len(doc_ids_BK), np.int64)
  for i, (doc_ids, accepted, match) in enumerate(
      zip(doc_ids_BK, answers, matches, strict=True)
  ):
    for rank, row in enumerate(doc_ids, start=1):
      if row >= 0 and answers_lib.has_answer(
          text_of(int(row)), accepted, match
      ):
        ranks[i] = rank
        break
  return ranks


def ndcg(
    doc_ids_BK: np.ndarray,
    gold_rows: Sequence[np.ndarray],
    grades: Sequence[np.ndarray],
    unknown: Sequence[Iterable[int]] | None = None,
    cutoff: int = 10,
) -> np.ndarray:
  """Normalised discounted cumulative gain, as trec_eval's ndcg_cut.

  Args:
    doc_ids_BK: passage rows, best first; -1: none.
    gold_rows: for each query, the rows of its gold passages, in order.
    grades: how relevant they are; the gain of a passage is its grade.
    unknown: grades of gold passages that cannot be retrieved.
    cutoff: number of passages that count.

  Returns:
    float64 [B], 0 without a gold passage.
  """
  discount_K = 1 / np.log2(np.arange(cutoff) + 2)
  figures = np.zeros(len(doc_ids_BK))
  for i, (doc_ids, rows, grade) in enumerate(
      zip(doc_ids_BK[:, :cutoff], gold_rows, grades, strict=True)
  ):
    missing = [] if unknown is None else [*unknown[i]]
    ideal = np.sort(np.concatenate([grade, missing]))[::-1][:cutoff]
    if not len(ideal):
      continue
    gain_of = dict(zip(rows.tolist(), grade.tolist(), strict=True))
    gains = np.array([gain_of.get(row, 0) for row in doc_ids.tolist()])
    figures[i] = (gains @ discount_K[: len(gains)]) / (
        ideal @ discount_K[: len(ideal)]
    )
  return figures


def ranking(
    ranks: np.ndarray,
    depth: int,
    num_documents: int,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
  """Recall and mean reciprocal rank.

  Args:
    ranks: of `gold_ranks` or `answer_ranks`, at least one.
    depth: number of passages retrieved for each query.
    num_documents: size of the corpus. If all passages were retrieved, recall is
      known at every cutoff.
    cutoffs: of recall; those beyond the known depth are left out.

  Returns:
    `recall_at_C` for each cutoff C, and `mrr`, to which a passage that was not
    retrieved adds 0 (so it is MRR@depth).

  Raises:
    ValueError: there are no ranks, or one exceeds `depth`.
  """
  ranks = np.asarray(ranks)
  if not ranks.size:
    raise ValueError('There is no question to take the mean over.')
  if ranks.min() < 0 or ranks.max() > depth:
    raise ValueError(
        f'Ranks must be between 0 and the depth {depth}; they are between'
        f' {ranks.min()} and {ranks.max()}.'
    )
  found = ranks > 0
  metrics = {
      f'recall_at_{cutoff}': float((found & (ranks <= cutoff)).mean())
      for cutoff in cutoffs
      if cutoff <= depth or depth >= num_documents
  }
  reciprocal = np.where(found, 1.0 / np.maximum(ranks, 1), 0.0)
  return {**metrics, 'mrr': float(reciprocal.mean())}


def _check_length(doc_ids_BK: np.ndarray, size: int, what: str) -> None:
  if doc_ids_BK.ndim != 2 or len(doc_ids_BK) != size:
    raise ValueError(
        f'Retrieved rows of shape {doc_ids_BK.shape} against {size} {what}:'
        f' must be [{size}, K].'
    )


def answer_figures(
    model: answering.OpenQA,
    table: question_table_lib.QuestionTable,
    rows_BN: np.ndarray,
    k: int | None = None,
) -> tuple[dict[str, np.ndarray], list[answering.Answer]]:
  """Answers questions and scores the answers.

  Args:
    model: of the step to evaluate.
    table: questions with their answers.
    rows_BN: retrieved passages, best first; the first k are read.
    k: None: as many as in training.

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

  def exact_match(answers: list[answering.Answer]) -> np.ndarray:
    return np.array([
        answers_lib.exact_match(answer.text, question.answers, question.match)
        for answer, question in zip(answers, table.questions, strict=True)
    ], float)

  def can_answer(question: questions_lib.Question, rows_K: np.ndarray) -> bool:
    answers = model.passage_answers
    return any(
        last - first < width
        for row in rows_K[answers.has_answer(question, rows_K)].tolist()
        for first, last in answers.spans(question, row)
    )

  figures = {
      'exact_match': exact_match(found),
      'f1': np.array([
          answers_lib.f1(answer.text, question.answers)
          if question.match == 'string'
          else np.nan
          for answer, question in zip(found, table.questions, strict=True)
      ]),
      'reader_oracle': np.array([
          can_answer(question, rows_K)
          for question, rows_K in zip(table.questions, rows_BK, strict=True)
      ], float),
      'no_answer': np.array([not answer.text for answer in found], float),
      'probability': np.array([answer.probability for answer in found]),
      'exact_match_random_passages': exact_match(blind),
  }
  return figures, found


def means(
    figures: dict[str, np.ndarray], cluster_B: np.ndarray | None = None
) -> dict[str, Any]:
  """Means of `answer_figures`; intervals of exact_match and f1.

  Args:
    figures: [B] each; nan is left out.
    cluster_B: see `interval`; of a single cluster there is no interval.
  """
  summary: dict[str, Any] = {}
  for name, values in figures.items():
    values_B = values.astype(float)
    known_B = ~np.isnan(values_B)
    if known_B.any():
      summary[name] = float(values_B[known_B].mean())
      if name in ('exact_match', 'f1'):
        summary |= named_interval(
            name,
            values_B[known_B],
            None if cluster_B is None else cluster_B[known_B],
        )
  return summary


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
    Lower and upper bound; nan for a single cluster, which has no spread.

  Raises:
    ValueError: there is no question, or not one cluster for each.
  """
  values_B = np.asarray(values_B, np.float64)
  if not values_B.size:
    raise ValueError('There is no question to take the mean over.')
  sums, sizes = _totals(values_B, cluster_B)
  if sums.size == 1:
    return float('nan'), float('nan')
  found = stats.bootstrap(
      (sums, sizes),
      lambda sums, sizes, axis: sums.sum(axis) / sizes.sum(axis),
      paired=True,
      vectorized=True,
      n_resamples=_RESAMPLES,
      batch=max(_CHUNK // sums.size, 1),
      confidence_level=confidence,
      method='percentile',
      rng=np.random.default_rng(0),
  )
  low, high = found.confidence_interval
  return float(low), float(high)


def named_interval(
    name: str, values_B: np.ndarray, cluster_B: np.ndarray | None
) -> dict[str, list[float]]:
  """Returns {NAME_interval: [low, high]}, or nothing for a single cluster."""
  bounds = interval(values_B, cluster_B)
  return {} if np.isnan(bounds[0]) else {f'{name}_interval': list(bounds)}


def with_intervals(
    figures: Mapping[str, np.ndarray], cluster_B: np.ndarray | None
) -> dict[str, Any]:
  """Returns NAME and NAME_interval, the mean and its 95 % interval."""
  found: dict[str, Any] = {}
  for name, values_B in figures.items():
    found[name] = float(values_B.mean())
    found |= named_interval(name, values_B, cluster_B)
  return found


def paired_test(
    ours_B: np.ndarray,
    theirs_B: np.ndarray,
    cluster_B: np.ndarray | None = None,
) -> dict[str, float]:
  """Compares two runs on the same questions.

  The p-value is that of a randomisation test (Smucker et al. 2007): the share
  of random exchanges of the two runs, cluster by cluster, that make a
  difference at least as large.

  Args:
    ours_B: one figure per question.
    theirs_B: of the same questions, in the same order.
    cluster_B: see `interval`.

  Returns:
    difference (ours - theirs), its 95 % interval `low` and `high`, p_value,
    the number of questions that ours does `better` and `worse`, and the number
    of `questions` and `clusters`.

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
