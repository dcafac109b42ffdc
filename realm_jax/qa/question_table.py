"""Questions over a corpus: wordpieces, gold passages, passages with an answer.

A question's number is its row everywhere, so duplicates stay distinct.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import logging
from typing import Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.qa import answers
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import lines as lines_lib

log = logging.getLogger(__name__)

# Bounds of the caches: passages (about 1 kB each), and results.
_MAX_TEXTS = 2_000_000
_MAX_RESULTS = 200_000_000
_GOLD_TEXTS = 2**14  # Questions about one record are usually adjacent.
_NAMED = 5  # Unknown ids in a message.


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


@dataclasses.dataclass(frozen=True)
class Gold:
  """The gold passages of questions in a corpus.

  rows: for each question int64 rows in order; empty without a gold passage, or
    if the corpus has none of them.
  grades: how relevant each of the rows is.
  unknown: for each question the ids that the corpus lacks, with their grades.
  """

  rows: list[np.ndarray]
  grades: list[np.ndarray]
  unknown: list[dict[str, int]]

  def about_unknown(self) -> dict[str, Any] | None:
    """Returns how many ids are unknown, with examples; None if none is."""
    ids = list(dict.fromkeys(name for one in self.unknown for name in one))
    if not ids:
      return None
    return {
        'ids': len(ids),
        'questions': sum(map(bool, self.unknown)),
        'first': ids[:_NAMED],
    }

  def warn(self, corpus: corpus_lib.Corpus, what: str) -> None:
    """Logs which ids are unknown, and what becomes of them."""
    found = self.about_unknown()
    if found is not None:
      log.warning(
          '%d gold passages of %d of the %d questions are not in the corpus %s:'
          ' %s%s. %s',
          found['ids'], found['questions'], len(self.rows), corpus.directory,
          ', '.join(map(repr, found['first'])),
          ', ...' if found['ids'] > _NAMED else '',
          what,
      )


def find_gold(
    corpus: corpus_lib.Corpus, questions: Sequence[questions_lib.Question]
) -> Gold:
  """Finds the gold passages of questions, which name passages or records.

  Training (`ict.questions`) and evaluation both use this function. If `prepare`
  split a gold record into several passages, the gold passages are those that
  contain an answer, by the rule `squad` of `answers.has_answer`. If none does,
  all are gold: the answer may cross a boundary, or occur only in the title.
  """
  known = sorted({name for question in questions for name in question.gold})
  records = dict(zip(known, corpus.record_rows(known), strict=True))

  @functools.lru_cache(maxsize=_GOLD_TEXTS)
  def text_of(row: int) -> str:
    return corpus.passage_text(row)['text']

  found = Gold([], [], [])
  for question in questions:
    grades: dict[int, int] = {}
    unknown = {}
    for name, grade in question.gold.items():
      rows = records[name].tolist()
      if len(rows) > 1:
        accepted, match = question.answers, question.match
        holding = [
            row
            for row in rows
            if answers.has_answer(text_of(row), accepted, match)
        ]
        rows = holding or rows
      for row in rows:
        grades[row] = max(grade, grades.get(row, 0))
      if not rows:
        unknown[name] = grade
    found.rows.append(np.array(sorted(grades), np.int64))
    found.grades.append(np.array([grades[row] for row in sorted(grades)], int))
    found.unknown.append(unknown)
  return found


def body_bounds(
    passages: corpus_lib.PassageTable,
    rows_BK: np.ndarray,
    query_lengths_B: np.ndarray,
    length: int,
    tokenizer: tokenizer_lib.Tokenizer,
    titles: bool = False,
) -> np.ndarray:
  """Returns the half-open range of the body in `inputs.assemble_joint`.

  The arguments are those of `assemble_joint`; the result is int32 [B, K, 2].
  """
  offsets, title_BK = passages.offsets, passages.title_lengths[rows_BK]
  body_BK = offsets[rows_BK + 1] - offsets[rows_BK] - title_BK
  start_B1 = query_lengths_B[:, None].astype(np.int64)
  start_BK = np.repeat(
      start_B1 + len(tokenizer.between) - 1, rows_BK.shape[1], axis=1
  )
  if titles:
    start_BK += np.minimum(title_BK, length - 2 - start_BK) + 1
  limit_BK = np.minimum(start_BK + body_BK, length - 1)
  return np.stack([start_BK, limit_BK], axis=-1).astype(np.int32)


class PassageAnswers:
  """`answers.has_answer` for thousands of passages at once.

  Passages are read and normalised once, and results are cached.
  """

  def __init__(self, corpus: corpus_lib.Corpus):
    self._corpus = corpus
    self._lowered = functools.lru_cache(maxsize=_MAX_TEXTS)(
        lambda row: answers.lower_with_origins(self._text(row))[0]
    )
    self._offsets: dict[int, np.ndarray] = {}
    # By question: rows in order, and whether each contains an answer.
    self._results: dict[
        questions_lib.Question, tuple[np.ndarray, np.ndarray]
    ] = {}
    self._num_results = 0

  def has_answer(
      self, question: questions_lib.Question, rows_N: np.ndarray
  ) -> np.ndarray:
    """Returns bool [N]: whether the body of each passage contains an answer."""
    known, results = self._results.get(
        question, (np.zeros(0, np.int64), np.zeros(0, bool))
    )
    new = np.setdiff1d(rows_N, known)
    if new.size:
      rows = np.concatenate([known, new])
      order = np.argsort(rows)
      found = np.concatenate([results, self._search(question, new)])
      known, results = rows[order], found[order]
      self._num_results += len(new)
      if self._num_results > _MAX_RESULTS:
        self._results.clear()
        self._num_results = len(known)
      self._results[question] = known, results
    return results[np.searchsorted(known, rows_N)]

  def spans(
      self, question: questions_lib.Question, row: int
  ) -> list[tuple[int, int]]:
    """Returns (first, last) wordpiece of each answer in a passage's body."""
    text = self._text(row)
    offsets_L2 = self.wordpieces(row, text)
    found = set()
    for start, limit in answers.answer_spans(
        text, question.answers, question.match
    ):
      # All wordpieces that share a byte with the answer.
      first = np.searchsorted(offsets_L2[:, 1], start, side='right')
      last = np.searchsorted(offsets_L2[:, 0], limit, side='left') - 1
      if first <= last:
        found.add((int(first), int(last)))
    return sorted(found)

  def wordpieces(self, row: int, text: str) -> np.ndarray:
    """Returns the byte range of each wordpiece of a body, int32 [L, 2]."""
    if row not in self._offsets:
      if len(self._offsets) >= _MAX_TEXTS:
        self._offsets.clear()
      ((_, starts, limits),) = self._corpus.tokenizer.encode_arrays([text])
      self._offsets[row] = np.stack([starts, limits], axis=1).astype(np.int32)
    return self._offsets[row]

  def _search(
      self, question: questions_lib.Question, rows: np.ndarray
  ) -> np.ndarray:
    if question.match == 'regex':
      return np.array([
          answers.has_answer(self._text(row), question.answers, 'regex')
          for row in rows.tolist()
      ])
    texts = [self._lowered(row) for row in rows.tolist()]
    # One long text is searched faster than thousands of short ones. The
    # separator is part of no answer.
    joined = '\0'.join(texts)
    limits = np.cumsum([len(text) + 1 for text in texts])
    found = np.zeros(len(rows), bool)
    for answer in question.answers:
      span = answers.find_answer(joined, answer)
      while span is not None:
        i = int(np.searchsorted(limits, span[0], side='right'))
        found[i] = True
        span = answers.find_answer(joined, answer, int(limits[i]))
    return found

  def _text(self, row: int) -> str:
    return self._corpus.passage_text(row)['text']
