"""Open-domain question answering: retrieve, read, and take the best span.

Guu et al. 2020, section 4.3. An answer is a substring of a passage and not a
text decoded from wordpieces.
"""

from collections.abc import Sequence
import dataclasses
import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import span_reader
from realm_jax.qa import answers
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions
from realm_jax.runtime import checkpoint

_BATCH_WORDPIECES = 2**14  # In one batch of the reader.


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage that was read for a question.

  row, id, title, text: of the corpus.
  score: inner product with the question.
  probability: p(z|x) among the passages that were read.
  answer: the best span; empty if the reader saw no wordpiece of the text.
  start, limit: position of the answer in the text, in UTF-8 bytes.
  answer_probability: joint probability of passage and span, among all spans of
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
  """An answer and its evidence.

  text: the answer; empty if no passage has a readable wordpiece.
  probability: joint probability of passage and span.
  passages: that were read, most relevant first.
  best: index of the passage with the answer; None without an answer.
  """

  question: str
  text: str
  probability: float
  passages: tuple[Passage, ...]
  best: int | None


class OpenQA:
  """Answers questions with the retriever and the reader of one step.

  `OpenQA.load` makes one from a workdir.
  """

  def __init__(
      self,
      trained: trained_lib.Trained,
      step: int,
      params: trained_lib.Params | None = None,
      index: trained_lib.Index | None = None,
      like: 'OpenQA | None' = None,
  ):
    """Uses the given parameters and index, or loads those of the step.

    What `like`, of the same workdir, compiled is used again.

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
    self.passage_answers = question_table_lib.PassageAnswers(trained.corpus)
    if like is not None:
      self._jitted = like._jitted

  @classmethod
  def load(
      cls,
      workdir: trained_lib.Path,
      step: int | None = None,
      corpus: trained_lib.Path | None = None,
  ) -> 'OpenQA':
    """Loads retriever, reader and index of a workdir.

    Args:
      workdir: of the objective `open_qa`, or an imported open-QA checkpoint.
      step: of a checkpoint; None: the newest.
      corpus: where the corpus is now; None: where it was in training.

    Raises:
      FileNotFoundError: there is no such workdir, checkpoint or index.
      ValueError: it has no reader of answers, or something is damaged.
    """
    trained = trained_lib.Trained.open(workdir, corpus)
    if step is None:
      step = checkpoint.newest_step(trained.workdir)
    loaded = cls(trained, step)
    cuts.warn_of_passages(trained.corpus, trained.config)
    return loaded

  @property
  def index_generation(self) -> int | None:
    """Step of the retriever that embedded the passages; None: unpublished."""
    return self.index.generation

  @property
  def index_age_seconds(self) -> float | None:
    """Seconds since the index was published."""
    if self.index_generation is None:
      return None
    folder = self.trained.workdir / generation_lib.DIRECTORY
    manifest = generation_lib.read_manifest(folder / str(self.index_generation))
    return time.time() - manifest['created']

  def retrieve(self, query_ids_BQ: np.ndarray, k: int) -> np.ndarray:
    """Returns the k best passage rows of each question, [B, k].

    Raises:
      ValueError: the corpus has fewer than k passages.
    """
    query_emb_BE = self.trained.embed_queries(self.params, query_ids_BQ)
    return self.index.ranked(query_emb_BE, k)[0]

  def answer(
      self, question: str | Sequence[str], k: int | None = None
  ) -> Answer | list[Answer]:
    """Answers one question, or several, from k passages each.

    k is None: as many as in training.

    Raises:
      ValueError: no question, an empty one, or k is not between 1 and the
        number of passages.
    """
    texts = [question] if isinstance(question, str) else question
    config, live = self.trained.config, self.trained.corpus.num_live
    k = min(config.open_qa.read, live) if k is None else k
    if not 1 <= k <= live:
      raise ValueError(f'k={k}: must be between 1 and {live}, the passages.')
    if not texts or not all(text.strip() for text in texts):
      raise ValueError('Give at least one question, and none that is empty.')
    table = question_table_lib.QuestionTable.of(
        [questions.Question(text, ()) for text in texts],
        self.trained.template.text_length,
        self.trained.corpus.tokenizer,
    )
    found = self.read(table, self.retrieve(table.query_ids_NQ, k))
    return found[0] if isinstance(question, str) else found

  def read(
      self, table: question_table_lib.QuestionTable, rows_BK: np.ndarray
  ) -> list[Answer]:
    """Answers questions from given passages, best first."""
    each = rows_BK.shape[1] * self.trained.config.lengths.joint
    size = min(max(_BATCH_WORDPIECES // each, 1), len(table))
    found = []
    for start in range(0, len(table), size):
      found += self._read(table, rows_BK, slice(start, start + size), size)
    return found

  def _read(
      self,
      table: question_table_lib.QuestionTable,
      rows_NK: np.ndarray,
      some: slice,
      size: int,
  ) -> list[Answer]:
    """Reads a batch, padded to `size` questions: all compile to one shape."""
    trained, config = self.trained, self.trained.config
    corpus, titles = trained.corpus, config.open_qa.title
    rows_BK, query_lengths_B = rows_NK[some], table.query_lengths_N[some]
    query_ids_BQ, length = table.query_ids_NQ[some], config.lengths.joint
    ids_BKT, types_BKT = inputs.assemble_joint(
        corpus.passages, rows_BK, query_ids_BQ, query_lengths_B, length,
        corpus.tokenizer, titles,
    )
    body_BK2 = question_table_lib.body_bounds(
        corpus.passages, rows_BK, query_lengths_B, length, corpus.tokenizer,
        titles,
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
        np.asarray(array)[: len(rows_BK)] for array in result
    )
    p_BK = special.softmax(score_BK.astype(np.float64), axis=1)
    found = []
    for b, question in enumerate(table.questions[some]):
      passages = []
      for k, row in enumerate(rows_BK[b].tolist()):
        record = corpus.passage_text(row)
        start = limit = 0
        first, behind = body_BK2[b, k].tolist()
        if is_read := first < behind:
          offsets_L2 = self.passage_answers.wordpieces(row, record['text'])
          start = int(offsets_L2[start_BK[b, k] - first, 0])
          limit = int(offsets_L2[end_BK[b, k] - first, 1])
        passage = Passage(
            row,
            **record,
            score=float(score_BK[b, k]),
            probability=float(p_BK[b, k]),
            answer=record['text'].encode()[start:limit].decode(),
            start=start,
            limit=limit,
            answer_probability=float(np.exp(logp_BK[b, k]) if is_read else 0),
        )
        passages.append(passage)
      number = int(logp_BK[b].argmax())
      best = passages[number]
      answer = Answer(
          question.question, best.answer, best.answer_probability,
          tuple(passages), number if best.answer else None,
      )
      found.append(answer)
    return found

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
      reader = components['span_reader'].module(params['span_reader'])
      score_BK = embedder_lib.score(query_emb_BE, doc_emb_BKE)
      logits = reader.span_logits(  # (B*K) P
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


def as_json(loaded: OpenQA, answer: Any) -> str:
  """Returns an `Answer` and where it comes from, in one line of JSON."""
  age = loaded.index_age_seconds
  values = {
      **dataclasses.asdict(answer),
      # Without a passage, a reader of spans has no answer.
      'without_retrieval': '',
      'checkpoint': loaded.step,
      'index_generation': loaded.index_generation,
      'index_age_seconds': None if age is None else round(age),
  }
  return json.dumps(values, ensure_ascii=False)


def for_page(answer: Answer) -> dict[str, Any]:
  """Returns an answer for the API; spans count characters.

  `marginal` sums equal best spans of the passages.
  """
  passages = []
  together: dict[str, list[Passage]] = {}
  for rank, passage in enumerate(answer.passages, 1):
    text = passage.text.encode('utf-8')  # `start` and `limit` count bytes.
    start = len(text[: passage.start].decode('utf-8'))
    limit = start + len(passage.answer)
    passages.append(ranked(rank, passage) | {'start': start, 'limit': limit})
    if passage.answer:
      same = answers.normalize_answer(passage.answer)
      together.setdefault(same, []).append(passage)
  marginal = [
      {
          # The form of the likeliest passage stands for all.
          'answer': max(same, key=lambda one: one.answer_probability).answer,
          'probability': sum(one.answer_probability for one in same),
      }
      for same in together.values()
  ]
  return {
      'question': answer.question,
      'answer': answer.text,
      'probability': answer.probability,
      'best': answer.best,
      'passages': passages,
      # Without a passage, a reader of spans has no answer.
      'without_passages': None,
      'marginal': sorted(marginal, key=lambda one: -one['probability']),
  }


def ranked(rank: int, passage: Any) -> dict[str, Any]:
  """Returns the fields of a passage for JSON, with its rank for its row."""
  fields = dataclasses.asdict(passage)
  del fields['row']
  return {'rank': rank, **fields}


def as_text(loaded: OpenQA, answer: Any) -> str:
  """Returns an `Answer`, its passages and where it comes from."""
  shown = [f'{answer.text or "(no answer)"}   p={answer.probability:.2f}', '']
  for number, passage in enumerate(answer.passages):
    mark = '*' if number == answer.best else ' '
    shown += [
        f'{mark} p(z|x)={passage.probability:.2f} answer'
        f' p={passage.answer_probability:.2f}  {passage.id}  {passage.title}',
        f'    {_marked(passage)}',
    ]
  age = loaded.index_age_seconds
  shown += [
      '',
      'Without retrieval: nothing; this reader answers with a part of a'
      ' passage.',
      f'Checkpoint {loaded.step}, index generation {loaded.index_generation}'
      + ('.' if age is None else f', published {_duration(age)} ago.'),
  ]
  return '\n'.join(shown)


def _marked(passage: Passage) -> str:
  """Returns the text of a passage with brackets around its answer."""
  if not passage.answer:
    return passage.text
  text = passage.text.encode('utf-8')  # `start` and `limit` count bytes.
  before = text[: passage.start].decode('utf-8')
  return f'{before}[{passage.answer}]{text[passage.limit :].decode("utf-8")}'


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86_400), ('hours', 3_600), ('minutes', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.0f} {unit}'
  return f'{seconds:.0f} seconds'
