"""Metrics of answered questions: exact match, F1, and what they depend on.

Public: `measure`, `summarize`.
"""

from typing import Any

import numpy as np

from realm_jax.evaluation import statistics
from realm_jax.inference import answering
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib


def measure(
    answerer: answering.OpenQA,
    table: question_table_lib.QuestionTable,
    rows_BN: np.ndarray,
    k: int | None = None,
) -> tuple[dict[str, np.ndarray], list[answering.Answer]]:
  """Answers questions and compares with what is right.

  Args:
    answerer: of a step.
    table: questions with their answers.
    rows_BN: retrieved passages, best first; the first k are read.
    k: None: as many as in training.

  Returns:
    One figure per question, and the answers. The figures: exact_match, f1 (of
    questions with `string` answers; nan else), reader_oracle (a passage that
    was read holds an answer that the reader could give), no_answer,
    probability, and exact_match_random_passages: when as many passages are
    drawn at random and read, that is, without retrieval.
  """
  config = answerer.trained.config
  k = config.open_qa.read if k is None else k
  rows_BK = rows_BN[:, :k]
  found = answerer.read(table, rows_BK)
  rng = np.random.default_rng(0)
  live = np.setdiff1d(
      np.arange(len(answerer.trained.corpus.passages)),
      answerer.trained.corpus.removed,
  )
  blind = answerer.read(table, rng.choice(live, rows_BK.shape))

  def right(answers: list[answering.Answer]) -> np.ndarray:
    return np.array([
        answers_lib.exact_match(answer.text, question.answers, question.match)
        for answer, question in zip(answers, table.questions, strict=True)
    ], float)

  figures = {
      'exact_match': right(found),
      'f1': np.array([
          answers_lib.f1(answer.text, question.answers)
          if question.match == 'string'
          else np.nan
          for answer, question in zip(found, table.questions, strict=True)
      ]),
      'reader_oracle': np.array([
          _can_answer(answerer, question, rows_K)
          for question, rows_K in zip(table.questions, rows_BK, strict=True)
      ], float),
      'no_answer': np.array([not answer.text for answer in found], float),
      'probability': np.array([answer.probability for answer in found]),
      'exact_match_random_passages': right(blind),
  }
  return figures, found


def summarize(
    figures: dict[str, np.ndarray], cluster_B: np.ndarray | None = None
) -> dict[str, Any]:
  """Means over questions, with 95 % bootstrap intervals of the main ones.

  Args:
    figures: of `measure`, each [B]; nan where a question has none.
    cluster_B: what the intervals resample, see `statistics.interval`. Of fewer
      than two clusters there is no interval.
  """
  summary: dict[str, Any] = {}
  for name, values in figures.items():
    values_B = values.astype(float)
    known_B = ~np.isnan(values_B)
    if known_B.any():
      summary[name] = float(values_B[known_B].mean())
      if name in ('exact_match', 'f1'):
        summary |= statistics.named_interval(
            name,
            values_B[known_B],
            None if cluster_B is None else cluster_B[known_B],
        )
  return summary


def _can_answer(
    answerer: answering.OpenQA,
    question: questions_lib.Question,
    rows_K: np.ndarray,
) -> bool:
  width = answerer.trained.config.model.max_span_width
  answers = answerer.passage_answers
  return any(
      last - first < width
      for row in rows_K[answers.has_answer(question, rows_K)].tolist()
      for first, last in answers.spans(question, row)
  )
