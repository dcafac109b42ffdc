"""Fine-tuning on questions and answers, objective `open_qa`.

Passages are retrieved for a question, the best are read, and spans that match
an answer are the targets (Lee et al. 2019, section 5.2; Guu et al. 2020,
section 4.3). The retriever learns to rank passages that hold an answer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import flops
from realm_jax.models import span_reader
from realm_jax.qa import question_table as question_table_lib
from realm_jax.trainer import examples
from realm_jax.trainer import stages

# Arrays of the size of the spans' hidden layer in a step: sums, relu, LayerNorm
# and their gradients, as XLA reports for CPU.
_SPAN_ARRAYS = 9.0


class Queries(NamedTuple):
  """Questions, in numpy."""

  row_B: np.ndarray  # Rows of the question table.
  query_ids_BQ: np.ndarray
  query_lengths_B: np.ndarray


@stages.batch
class Batch:
  """Questions with N retrieved passages, of which the first K are read.

  The last two fields are None unless documents learn.
  """

  query_ids_BQ: jax.Array
  doc_emb_BNE: jax.Array  # Embeddings in the index.
  has_answer_BN: jax.Array
  joint_ids_BKT: jax.Array  # `[CLS] question [SEP] body [SEP]`.
  joint_types_BKT: jax.Array
  body_BK2: jax.Array  # Where the body lies, half-open.
  correct_BKP: jax.Array  # Which spans are an answer.
  doc_ids_BKS: jax.Array | None = None
  doc_types_BKS: jax.Array | None = None


class _Question(NamedTuple):
  row_B: np.ndarray


class Questions:
  """The rows of a question table, as a source of Grain."""

  def __init__(self, table: question_table_lib.QuestionTable):
    self._table = table

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, index: int) -> int:
    return index

  def sample(self, row: int, rng: np.random.Generator) -> _Question:
    del rng
    return _Question(np.asarray(row))


class OpenQa(stages.Stage):
  """Retrieve, read, and learn from the spans that are answers."""

  components = ('embedder', 'span_reader')
  searches = True
  headline = 'exact_match'

  def __init__(
      self, config: config_lib.Config, corpus: corpus_lib.Corpus | None = None
  ):
    super().__init__(config, corpus)
    if corpus is None:
      return
    if len(corpus.passages) < config.open_qa.read:
      raise ValueError(
          f'The corpus {corpus.directory} has {len(corpus.passages)} passages;'
          f' config.open_qa.read={config.open_qa.read} is more.'
      )
    self._questions = question_table_lib.QuestionTable.read(
        config.open_qa.questions,
        self.template.text_length,
        corpus.tokenizer,
        answered=True,
    )
    self.lineage['questions_digest'] = self._questions.digest
    self._answers = question_table_lib.PassageAnswers(corpus)

  @classmethod
  def problems(cls, config: config_lib.Config) -> stages.Problems:
    c = config.open_qa
    if not c.questions:
      yield 'open_qa.questions', 'give the file of the questions to train on'
    if c.length_step < 0:
      yield 'open_qa.length_step', 'must be 0 or more'
    for field, value in (('read', c.read), ('rerank', c.rerank)):
      if not 0 <= value <= c.retrieved:
        yield (
            f'open_qa.{field}',
            f'must be between 0 and open_qa.retrieved ({c.retrieved})',
        )
    if c.documents == 'frozen' and config.refresh.policy != 'none':
      yield (
          'refresh.policy',
          "must be 'none' where open_qa.documents is 'frozen'",
      )

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    return {'asked': (Questions(self._questions), 1.0)}

  def assemble(self, samples: _Question) -> examples.Examples:
    rows_B, table = samples.row_B, self._questions
    queries = Queries(
        rows_B, table.query_ids_NQ[rows_B], table.query_lengths_N[rows_B]
    )
    return examples.Examples(rows_B, queries)

  def retrieve(self, queries: Queries, retriever: stages.Retriever) -> Batch:
    depth = min(self.config.open_qa.retrieved, len(self.corpus.passages))
    rows_BN, query_emb_BE = retriever.search(
        queries.query_ids_BQ, depth, None
    )
    rows_BN, doc_emb_BNE = self.rerank(
        query_emb_BE,
        rows_BN,
        retriever.embeddings(rows_BN),
        retriever.embed_documents,
    )
    return self.with_passages(queries, rows_BN, doc_emb_BNE)

  def rerank(
      self,
      query_emb_BE: np.ndarray,
      rows_BN: np.ndarray,
      doc_emb_BNE: np.ndarray,
      embed_documents: Callable[[np.ndarray, np.ndarray], np.ndarray],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Reorders the best passages by the current retriever.

    Args:
      query_emb_BE: of the questions.
      rows_BN: passage rows, best first by the index.
      doc_emb_BNE: their embeddings in the index.
      embed_documents: from ids and types, [B, L, S], to embeddings [B, L, E].

    Returns:
      rows_BN and doc_emb_BNE. The first `open_qa.rerank` have embeddings by
      the current parameters and are in the order of their new scores.
    """
    best = min(self.config.open_qa.rerank, rows_BN.shape[1])
    if not best:
      return rows_BN, doc_emb_BNE
    rows_BL = rows_BN[:, :best]
    ids_BLS, types_BLS = self.template.documents(self.corpus.passages, rows_BL)
    emb_BLE = embed_documents(ids_BLS, types_BLS)
    score_BL = np.einsum('BE,BLE->BL', query_emb_BE, emb_BLE)
    order_BL = np.argsort(-score_BL, axis=1, kind='stable')
    rows_BL = np.take_along_axis(rows_BL, order_BL, 1)
    emb_BLE = np.take_along_axis(emb_BLE, order_BL[..., None], 1)
    return (
        np.concatenate([rows_BL, rows_BN[:, best:]], axis=1),
        np.concatenate([emb_BLE, doc_emb_BNE[:, best:]], axis=1),
    )

  def with_passages(
      self, queries: Queries, rows_BN: np.ndarray, doc_emb_BNE: np.ndarray
  ) -> Batch:
    """Returns the batch of questions with passages, best first."""
    config, passages = self.config, self.corpus.passages
    tokenizer, title = self.corpus.tokenizer, config.open_qa.title
    rows_BK = rows_BN[:, : config.open_qa.read]
    lengths_B = queries.query_lengths_B
    length = self._length(rows_BK, lengths_B)
    joint_ids_BKT, joint_types_BKT = inputs.assemble_joint(
        passages,
        rows_BK,
        queries.query_ids_BQ,
        lengths_B,
        length,
        tokenizer,
        title,
    )
    body_BK2 = question_table_lib.body_bounds(
        passages, rows_BK, lengths_B, length, tokenizer, title
    )
    asked = [self._questions.questions[row] for row in queries.row_B]
    has_answer_BN = np.stack([
        self._answers.has_answer(question, rows_N)
        for question, rows_N in zip(asked, rows_BN, strict=True)
    ])
    starts_P, _ = span_reader.spans(length, config.model.max_span_width)
    firsts = np.flatnonzero(starts_P == 0)  # The first span of each width.
    correct_BKP = np.zeros((*rows_BK.shape, len(starts_P)), bool)
    for b, k in np.argwhere(has_answer_BN[:, : rows_BK.shape[1]]):
      spans = self._answers.spans(asked[b], int(rows_BK[b, k]))
      start, limit = body_BK2[b, k].tolist()
      correct_BKP[b, k, _numbers(spans, start, limit, firsts)] = True
    documents: tuple[Any, ...] = ()
    if config.open_qa.documents == 'trained':
      documents = self.template.documents(passages, rows_BK)
    arrays: tuple[Any, ...] = (
        self.template.queries(queries.query_ids_BQ),
        doc_emb_BNE.astype(np.float32),
        has_answer_BN,
        joint_ids_BKT,
        joint_types_BKT,
        body_BK2,
        correct_BKP,
    )
    return Batch(*arrays, *documents)

  def _length(self, rows_BK: np.ndarray, lengths_B: np.ndarray) -> int:
    """Returns T: the longest input of the batch, rounded up."""
    config = self.config
    longest, step = config.lengths.joint, config.open_qa.length_step
    # The arrays of several processes must have one shape.
    if not step or jax.process_count() > 1:
      return longest
    limits_BK = question_table_lib.body_bounds(
        self.corpus.passages,
        rows_BK,
        lengths_B,
        longest,
        self.corpus.tokenizer,
        config.open_qa.title,
    )[..., 1]
    needed = int(limits_BK.max()) + 1  # The last [SEP].
    return min(-(-needed // step) * step, longest)

  def probe_queries(self, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    query_ids_BQ = self._questions.query_ids_NQ[:count]
    nothing_BR2 = np.zeros((len(query_ids_BQ), 1, 2), np.int64)
    return query_ids_BQ, nothing_BR2, self.config.open_qa.read

  def outputs(
      self,
      models: components_lib.Models,
      batch: Batch,
      noise: dropout.Noise | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns logits_BKP of the answer spans and score_BN of the passages."""
    query_emb_BE = models.embedder.embed_query(
        batch.query_ids_BQ, None if noise is None else noise.fold(0)
    )
    score_BN = embedder_lib.score(query_emb_BE, batch.doc_emb_BNE)
    b, k, t = batch.joint_ids_BKT.shape
    if batch.doc_ids_BKS is not None and batch.doc_types_BKS is not None:
      emb = models.embedder.embed_document(  # (B*K) E
          batch.doc_ids_BKS.reshape(b * k, -1),
          batch.doc_types_BKS.reshape(b * k, -1),
      )
      fresh_BK = embedder_lib.score(query_emb_BE, emb.reshape(b, k, -1))
      score_BN = jnp.concatenate([fresh_BK, score_BN[:, k:]], axis=1)

    def read() -> jax.Array:
      logits = models.span_reader.span_logits(  # (B*K) P
          batch.joint_ids_BKT.reshape(b * k, t),
          batch.joint_types_BKT.reshape(b * k, t),
          span_reader.inside(batch.body_BK2, t).reshape(b * k, t),
          None if noise is None else noise.fold(1).repeat(k),
      )
      return logits.reshape(b, k, -1)

    if not self.config.open_qa.skip_unreadable:
      return read(), score_BN
    # Where no span is correct, the logits change neither loss nor metrics.
    logits_BKP = jax.lax.cond(
        batch.correct_BKP.any(),
        read,
        lambda: jnp.zeros(batch.correct_BKP.shape, jnp.float32),
    )
    return logits_BKP, score_BN

  def loss(
      self,
      outputs: tuple[jax.Array, jax.Array],
      batch: Batch,
      axis: str | None = None,
  ) -> tuple[jax.Array, stages.Metrics]:
    del axis  # A row's loss is its own.
    logits_BKP, score_BN = outputs
    return span_reader.span_losses(
        logits_BKP,
        score_BN,
        batch.correct_BKP,
        batch.has_answer_BN,
        self.config.open_qa.normalization,
    )

  def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return (jnp.float32(len(batch.query_ids_BQ)),) * 2

  def learned(self, metrics: stages.Metrics) -> jax.Array | None:
    if self.config.open_qa.update_unanswered:
      return None
    return (metrics['retrieved'] > 0) | (metrics['readable'] > 0)

  def passes(self) -> list[flops.Pass]:
    c = self.config
    rows, length = c.batch_size * c.open_qa.read, c.lengths.joint
    starts_P, _ = span_reader.spans(length, c.model.max_span_width)
    # The MLP's hidden layer of each span, which is multiplied by a vector.
    in_spans = rows * len(starts_P) * c.model.span_width
    projected = rows * length * c.model.width * 2 * c.model.span_width
    passes = [
        flops.embed(c, c.batch_size, c.lengths.query, dropout=True),
        flops.Pass(
            'span_reader.bert',
            rows,
            length,
            length,
            2.0 * (projected + in_spans),
            head_values=_SPAN_ARRAYS * in_spans,
        ),
    ]
    if c.open_qa.documents == 'trained':
      passes.append(flops.embed(c, rows, c.lengths.document))
    return passes

  def abstract_batch(self) -> Batch:
    c, lengths = self.config, self.config.lengths
    b, n, k = c.batch_size, c.open_qa.retrieved, c.open_qa.read
    starts_P, _ = span_reader.spans(lengths.joint, c.model.max_span_width)

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
      return jax.ShapeDtypeStruct(shape, dtype)

    documents: tuple[Any, ...] = ()
    if c.open_qa.documents == 'trained':
      documents = (array(b, k, lengths.document),) * 2
    return Batch(
        array(b, lengths.query),
        array(b, n, c.model.embedding_width, dtype=jnp.float32),
        array(b, n, dtype=jnp.bool_),
        array(b, k, lengths.joint),
        array(b, k, lengths.joint),
        array(b, k, 2),
        array(b, k, len(starts_P), dtype=jnp.bool_),
        *documents,
    )


def _numbers(
    spans: list[tuple[int, int]], start: int, limit: int, firsts: np.ndarray
) -> list[int]:
  """Returns the numbers, among P, of spans of a body at [start, limit)."""
  return [
      int(firsts[last - first]) + start + first
      for first, last in spans
      if last - first < len(firsts) and start + last < limit
  ]
