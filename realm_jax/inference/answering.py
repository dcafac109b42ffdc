"""Questions answered: retrieve, read, and take the best span.

Public: `Answerer`, `Answer`, `Passage` (Guu et al. 2020, section 4.3). An
answer is a part of a passage's own text, never put together from wordpieces.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.corpus import inputs
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import span_reader
from realm_jax.qa import passage_answers as passage_answers_lib
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions

_BATCH_WORDPIECES = 2**14  # Read at once.
_SEARCH_BATCH = 256  # Questions searched for at once.


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage that was read for a question.

  row, id, title, text: of the corpus.
  score: inner product with the question.
  probability: p(z|x) among those that were read.
  answer: the best span in it; empty if it has no wordpiece that could be read.
  start, limit: where the answer stands in the text, in UTF-8 bytes.
  answer_probability: of this passage and this span together, of all spans of
    all passages that were read.
  """

  row: int
  id: str
  title: str
  text: str
  score: float
  probability: float
  answer: str
  start: int
  limit: int
  answer_probability: float


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was answered, and from what.

  text: the answer; empty if nothing could be read.
  probability: of the passage and the span that it is from.
  passages: that were read, best first by relevance.
  best: the number of the passage that it is from; None without an answer.
  """

  question: str
  text: str
  probability: float
  passages: tuple[Passage, ...]
  best: int | None


class Answerer:
  """Answers questions with the retriever and the reader of one step."""

  def __init__(
      self,
      trained: trained_lib.Trained,
      step: int,
      params: trained_lib.Params | None = None,
      index: trained_lib.Index | None = None,
  ):
    """Takes, or loads, the parameters of a checkpoint and its index.

    Raises:
      FileNotFoundError: there is no such checkpoint, or no index for it.
      ValueError: the workdir has no reader of answers.
    """
    if 'span_reader' not in trained.components:
      raise ValueError(
          f'{trained.workdir} cannot answer questions: it has'
          f' {", ".join(trained.components)}. Train the objective `open_qa`:'
          ' docs/question_answering.md.'
      )
    self.trained, self.step = trained, step
    self.params = trained.load(step) if params is None else params
    self.index = trained.index(self.params, step) if index is None else index
    self.passage_answers = passage_answers_lib.PassageAnswers(trained.corpus)

  def retrieve(self, query_ids_BQ: np.ndarray, k: int) -> np.ndarray:
    """Returns the k best passage rows of each question, [B, k].

    Raises:
      ValueError: there are not so many passages.
    """
    query_emb_BE = self.trained.embed_queries(self.params, query_ids_BQ)
    return np.concatenate([
        self.index.search.search(
            query_emb_BE[start : start + _SEARCH_BATCH], k
        )
        for start in range(0, len(query_emb_BE), _SEARCH_BATCH)
    ])

  def answer(
      self, texts: Sequence[str], k: int | None = None
  ) -> list[Answer]:
    """Answers questions.

    Args:
      texts: the questions.
      k: passages to read for each; None: as many as in training.

    Raises:
      ValueError: no question, an empty one, or k is not between 1 and the
        number of passages.
    """
    config, live = self.trained.config, self.trained.corpus.num_live
    k = min(config.open_qa.read, live) if k is None else k
    if not 1 <= k <= live:
      raise ValueError(f'k={k}: must be between 1 and {live}, the passages.')
    if not texts or not all(text.strip() for text in texts):
      raise ValueError('Give at least one question, and none that is empty.')
    table = question_table_lib.QuestionTable.of(
        [questions.Question(text, ()) for text in texts],
        config.lengths.query,
        self.trained.corpus.tokenizer,
    )
    return self.read(table, self.retrieve(table.query_ids_NQ, k))

  def read(
      self, table: question_table_lib.QuestionTable, rows_BK: np.ndarray
  ) -> list[Answer]:
    """Answers questions from given passages, best first."""
    size = max(
        _BATCH_WORDPIECES
        // (rows_BK.shape[1] * self.trained.config.lengths.joint),
        1,
    )
    found = []
    for start in range(0, len(table), size):
      some = slice(start, min(start + size, len(table)))
      found += self._read(
          [question.question for question in table.questions[some]],
          table.query_ids_NQ[some],
          table.query_lengths_N[some],
          rows_BK[some],
          size if len(table) > size else len(table),
      )
    return found

  def _read(
      self,
      texts: list[str],
      query_ids_BQ: np.ndarray,
      query_lengths_B: np.ndarray,
      rows_BK: np.ndarray,
      size: int,
  ) -> list[Answer]:
    """`size`: questions of a batch, padded, so that it compiles once."""
    trained, config = self.trained, self.trained.config
    corpus, titles = trained.corpus, config.open_qa.title
    length = config.lengths.joint
    ids_BKT, types_BKT = inputs.assemble_joint(
        corpus.passages, rows_BK, query_ids_BQ, query_lengths_B, length,
        corpus.tokenizer, titles,
    )
    body_BK2 = inputs.body_bounds(
        corpus.passages, rows_BK, query_lengths_B, length, titles
    )
    arrays = (
        trained.embed_queries(self.params, query_ids_BQ),
        search_lib.gather(self.index.table, rows_BK),
        ids_BKT,
        types_BKT,
        body_BK2,
    )
    result = self._jitted(
        self.params, *(trained_lib.pad_rows(array, size) for array in arrays)
    )
    score_BK, logp_BK, start_BK, end_BK = (
        np.asarray(array)[: len(texts)] for array in result
    )
    found = []
    for b, text in enumerate(texts):
      score_K = score_BK[b].astype(np.float64)
      p_K = np.exp(score_K - score_K.max())
      passages = tuple(
          self._passage(
              int(rows_BK[b, k]),
              float(score_K[k]),
              float(p_K[k] / p_K.sum()),
              float(np.exp(logp_BK[b, k])),
              int(start_BK[b, k] - body_BK2[b, k, 0]),
              int(end_BK[b, k] - body_BK2[b, k, 0]),
              bool(body_BK2[b, k, 0] < body_BK2[b, k, 1]),
          )
          for k in range(rows_BK.shape[1])
      )
      best = int(logp_BK[b].argmax())
      answer = passages[best]
      found.append(
          Answer(
              text,
              answer.answer,
              answer.answer_probability,
              passages,
              best if answer.answer else None,
          )
      )
    return found

  def _passage(
      self,
      row: int,
      score: float,
      probability: float,
      answer_probability: float,
      first: int,
      last: int,
      readable: bool,
  ) -> Passage:
    about = self.trained.corpus.passage_text(row)
    start = limit = 0
    if readable:
      offsets_L2 = self.passage_answers.wordpieces(row, about['text'])
      start, limit = int(offsets_L2[first, 0]), int(offsets_L2[last, 1])
    text = about['text'].encode('utf-8')
    return Passage(
        row,
        about['id'],
        about['title'],
        about['text'],
        score,
        probability,
        text[start:limit].decode('utf-8'),
        start,
        limit,
        answer_probability if readable else 0.0,
    )

  @functools.cached_property
  def _jitted(self) -> Any:
    config, components = self.trained.config, self.trained.components

    def read(
        params: trained_lib.Params,
        query_emb_BE: jax.Array,
        doc_emb_BKE: jax.Array,
        ids_BKT: jax.Array,
        types_BKT: jax.Array,
        body_BK2: jax.Array,
    ) -> tuple[jax.Array, ...]:
      b, k, t = ids_BKT.shape
      score_BK = embedder_lib.score(query_emb_BE, doc_emb_BKE)
      logits = components['span_reader'].apply(  # (B*K) P
          params['span_reader'],
          'span_logits',
          ids_BKT.reshape(b * k, t),
          types_BKT.reshape(b * k, t),
          span_reader.inside(body_BK2, t).reshape(b * k, t),
      )
      total_BKP = span_reader.joint_scores(
          logits.reshape(b, k, -1), score_BK, config.open_qa.normalization
      )
      logp_BKP = jax.nn.log_softmax(
          total_BKP.reshape(b, -1), axis=-1
      ).reshape(total_BKP.shape)
      best_BK = logp_BKP.argmax(-1)
      starts_P, ends_P = span_reader.spans(t, config.model.max_span_width)
      return (
          score_BK,
          logp_BKP.max(-1),
          jnp.asarray(starts_P)[best_BK],
          jnp.asarray(ends_P)[best_BK],
      )

    return jax.jit(read)
