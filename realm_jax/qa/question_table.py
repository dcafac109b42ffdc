"""Questions made ready to train on: wordpieces beside what was asked.

Public: `QuestionTable`. A question's number is its row everywhere, so that
duplicated questions stay apart.
"""

import dataclasses
import hashlib
import logging

import numpy as np

from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QuestionTable:
  """Questions by row.

  questions: as they were read.
  query_ids_NQ: int32, `[CLS] question [SEP]`, padded.
  query_lengths_N: int32, of each with the specials.
  digest: SHA-256 over questions, answers and how they match.
  """

  questions: list[questions_lib.Question]
  query_ids_NQ: np.ndarray
  query_lengths_N: np.ndarray
  digest: str

  def __len__(self) -> int:
    return len(self.questions)

  @classmethod
  def read(
      cls, sources: str, length: int, tokenizer: tokenizer_lib.Tokenizer
  ) -> 'QuestionTable':
    """Reads question sets and encodes the questions.

    Args:
      sources: of `question_sets.read`, comma-separated.
      length: Q; what is longer is cut, with a warning.
      tokenizer: that of the corpus.

    Raises:
      FileNotFoundError, ValueError: see `question_sets.read`.
    """
    questions = [
        question
        for source in sources.split(',')
        for question in question_sets.read(source.strip())
    ]
    known = [question for question in questions if not question.held_out]
    if not known:
      raise ValueError(f'{sources}: all questions are marked as held out.')
    if len(known) < len(questions):
      log.info(
          '%d of the %d questions are marked as held out and not trained on.',
          len(questions) - len(known), len(questions),
      )
    return cls.of(known, length, tokenizer)

  @classmethod
  def of(
      cls,
      questions: list[questions_lib.Question],
      length: int,
      tokenizer: tokenizer_lib.Tokenizer,
  ) -> 'QuestionTable':
    """As `read`, of questions that are in memory."""
    texts = [question.question for question in questions]
    query_ids_NQ = inputs.encode_queries(texts, length, tokenizer)
    sizes_N = (query_ids_NQ != tokenizer.pad_id).sum(axis=1).astype(np.int32)
    full = np.flatnonzero(sizes_N == length)
    pieces = tokenizer.encode_batch([texts[row] for row in full])
    cut = [
        row
        for row, ids in zip(full, pieces, strict=True)
        if len(ids) > length - 2
    ]
    if cut:
      log.warning(
          '%d of the %d questions have more than the %d wordpieces of'
          ' config.lengths.query and are cut, the first of them: %.80r',
          len(cut), len(questions), length, texts[cut[0]],
      )
    digest = hashlib.sha256()
    for question in questions:
      said = (question.question, question.answers, question.match)
      digest.update(repr(said).encode())
    return cls(questions, query_ids_NQ, sizes_N, digest.hexdigest())
