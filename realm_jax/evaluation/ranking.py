"""Metrics of ranked passages, in plain numpy.

Public: `CUTOFFS`, `gold_ranks`, `answer_ranks`, `summarize`. A rank counts
from 1; 0 stands for "not among those retrieved".
"""

from collections.abc import Callable, Sequence

import numpy as np

from realm_jax.qa import answers as answers_lib

# Recall is reported at these depths, and nothing deeper is looked at.
CUTOFFS = (1, 5, 20, 50, 100)


def gold_ranks(
    doc_ids_BK: np.ndarray, gold_rows: Sequence[Sequence[int]]
) -> np.ndarray:
  """Ranks of the first gold passage.

  Args:
    doc_ids_BK: passage rows, best first.
    gold_rows: of each query the rows that count as right.

  Returns:
    int64 [B]: 1-based rank, 0 where no gold passage was retrieved.

  Raises:
    ValueError: if there is not one entry of `gold_rows` for each query.
  """
  _check_length(doc_ids_BK, len(gold_rows), 'lists of gold rows')
  hits_BK = np.zeros(doc_ids_BK.shape, bool)
  for hits, doc_ids, rows in zip(hits_BK, doc_ids_BK, gold_rows, strict=True):
    hits[:] = np.isin(doc_ids, np.asarray(rows, np.int64))
  return _first(hits_BK)


def answer_ranks(
    doc_ids_BK: np.ndarray,
    answers: Sequence[Sequence[str]],
    matches: Sequence[answers_lib.Match],
    text_of: Callable[[int], str],
) -> np.ndarray:
  """Ranks of the first passage that contains an answer.

  Args:
    doc_ids_BK: passage rows, best first.
    answers: of each query, any of which will do.
    matches: how the answers of each query are compared.
    text_of: gives the text of a passage row (not its title, as in DPR).

  Returns:
    int64 [B]: 1-based rank, 0 where no passage has an answer.

  Raises:
    ValueError: if there is not one list of answers for each query.
  """
  _check_length(doc_ids_BK, len(answers), 'lists of answers')
  ranks = np.zeros(len(doc_ids_BK), np.int64)
  for i, (doc_ids, wanted, match) in enumerate(
      zip(doc_ids_BK, answers, matches, strict=True)
  ):
    for rank, row in enumerate(doc_ids, start=1):
      if answers_lib.has_answer(text_of(int(row)), wanted, match):
        ranks[i] = rank
        break
  return ranks


def summarize(
    ranks: np.ndarray,
    depth: int,
    num_documents: int,
    cutoffs: Sequence[int] = CUTOFFS,
) -> dict[str, float]:
  """Recall and mean reciprocal rank.

  Args:
    ranks: of `gold_ranks` or `answer_ranks`, at least one.
    depth: how many passages were retrieved for each query.
    num_documents: how many there are; if all were retrieved, the recall at
      every greater cutoff is known too.
    cutoffs: those deeper than what was retrieved are left out.

  Returns:
    `recall_at_C` for each cutoff C, and `mrr`, where a passage that was not
    retrieved adds 0 (so it is MRR@depth).

  Raises:
    ValueError: for no ranks at all, or a rank beyond `depth`.
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


def _first(hits_BK: np.ndarray) -> np.ndarray:
  if not hits_BK.shape[1]:
    return np.zeros(len(hits_BK), np.int64)
  return np.where(hits_BK.any(axis=1), hits_BK.argmax(axis=1) + 1, 0)


def _check_length(doc_ids_BK: np.ndarray, size: int, what: str) -> None:
  if doc_ids_BK.ndim != 2 or len(doc_ids_BK) != size:
    raise ValueError(
        f'Retrieved rows of shape {doc_ids_BK.shape} against {size} {what}:'
        f' must be [{size}, K].'
    )
