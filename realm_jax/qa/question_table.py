"""Questions as wordpieces, for training and evaluation.

A question's number is its row everywhere, so duplicates stay distinct.
"""

import dataclasses
import hashlib
import logging

import numpy as np

from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import lines as lines_lib

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QuestionTable:
  """Questions by row.

  questions: the questions as read.
  query_ids_NQ: int32, `[CLS] question [SEP]`, padded.
  query_lengths_N: int32, wordpieces with special tokens.
  digest: SHA-256 of the questions with `answers` and `match`.
  """

  questions: list[questions_lib.Question]
  query_ids_NQ: np.ndarray
  query_lengths_N: np.ndarray
  digest: str

  def __len__(self) -> int:
    return len(self.questions)

  @classmethod
  def read(
      cls,
      sources: str,
      length: int,
      tokenizer: tokenizer_lib.Tokenizer,
      answered: bool = False,
  ) -> 'QuestionTable':
    """Reads question sets and encodes the questions that are not held out.

    Sources of `question_sets.read` are comma-separated. Questions longer than
    `length`, Q, are cut, with a warning. With `answered`, questions without
    answers are left out.

    Raises:
      FileNotFoundError, ValueError: see `question_sets.read`.
    """
    questions = [
        question
        for source in lines_lib.comma_separated(sources)
        for question in question_sets.read(source)
    ]
    known = [question for question in questions if not question.held_out]
    if not known:
      raise ValueError(
          f'No question to train on in {sources!r}: all of them are marked as'
          ' held out.'
      )
    if len(known) < len(questions):
      log.info(
          '%d of the %d questions are marked as held out and not trained on.',
          len(questions) - len(known), len(questions),
      )
    trained = [question for question in known if question.answers]
    if not answered:
      trained = known
    if not trained:
      raise ValueError(f'No question of {sources!r} has an answer to train on.')
    if len(trained) < len(known):
      log.warning(
          '%d of the %d questions have no answer and are not trained on, the'
          ' first of them: %.80r',
          len(known) - len(trained), len(known),
          next(q.question for q in known if not q.answers),
      )
    return cls.of(trained, length, tokenizer)

  @classmethod
  def of(
      cls,
      questions: list[questions_lib.Question],
      length: int,
      tokenizer: tokenizer_lib.Tokenizer,
  ) -> 'QuestionTable':
    """Encodes questions; see `read`."""
    texts = [question.question for question in questions]
    query_ids_NQ = inputs.encode_queries(texts, length, tokenizer)
    sizes_N = (query_ids_NQ != tokenizer.pad_id).sum(axis=1).astype(np.int32)
    cuts.warn_of_queries(
        texts, query_ids_NQ, tokenizer, 'questions', 'config.lengths.query'
    )
    digest = hashlib.sha256()
    for question in questions:
      values = (question.question, question.answers, question.match)
      digest.update(repr(values).encode())
    return cls(questions, query_ids_NQ, sizes_N, digest.hexdigest())
