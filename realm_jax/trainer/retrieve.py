"""From a batch of queries to what a step reads: search, then put together.

Public: `Retrieval`, `OpenQaInputs`. Queries are embedded with the parameters of
the moment and searched for in the index in use. Wordpieces come from the
corpus' tables, labels of questions from the matcher of the evaluation.
"""

from collections.abc import Callable

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.models import span_reader
from realm_jax.qa import passage_answers as passage_answers_lib
from realm_jax.qa import question_table as question_table_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import refresh as refresh_lib


class Retrieval:
  """Completes the batches of an objective that searches while it trains."""

  def __init__(
      self,
      job: job_lib.Job,
      refresher: refresh_lib.Refresher,
      rows: np.ndarray,
  ):
    """Prepares for `job`; `rows` are this process' rows of a batch."""
    self._job, self._refresher, self._rows = job, refresher, rows
    self._embedder = embedding.Embedder(job.components['embedder'], job.mesh)
    self._open_qa: OpenQaInputs | None = None
    if job.questions is not None:
      self._open_qa = OpenQaInputs(job.config, job.corpus, job.questions)

  def __call__(
      self, batch: inputs.Batch, params: components_lib.Params
  ) -> inputs.Batch:
    """Searches for the queries of a batch and adds what was found.

    Args:
      batch: of `batches.training_batches`, this process' rows of it.
      params: of the embedder.
    """
    job = self._job
    query_emb_BE = self._embed(batch['query_ids_BQ'], params)
    if self._open_qa is None:
      retrieved_BJ = self._search(
          query_emb_BE, job.config.num_candidates - 1, batch['exclude_BR2']
      )
      return inputs.with_candidates(
          batch, retrieved_BJ, job.corpus, job.config.lengths
      )
    rows_BN = self._search(query_emb_BE, self._open_qa.depth)
    doc_emb_BNE = search_lib.gather(self._refresher.embeddings, rows_BN)

    def embed_documents(
        ids_BLS: np.ndarray, types_BLS: np.ndarray
    ) -> np.ndarray:
      arrays = mesh_lib.to_devices(
          job.mesh, {'ids': ids_BLS, 'types': types_BLS}
      )
      emb_BLE = self._embedder.documents(
          params, arrays['ids'], arrays['types']
      )
      return distributed.fetch(emb_BLE)[self._rows]

    rows_BN, doc_emb_BNE = self._open_qa.rerank(
        query_emb_BE[self._rows], rows_BN, doc_emb_BNE, embed_documents
    )
    return self._open_qa(batch, rows_BN, doc_emb_BNE)

  def _search(
      self,
      query_emb_BE: np.ndarray,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """Searches for this process' rows of the batch, given all embeddings."""
    search = self._refresher.search
    if not search.collective or jax.process_count() == 1:
      return search.search(query_emb_BE[self._rows], k, exclude_BR2)
    if exclude_BR2 is not None:
      arrays = mesh_lib.to_devices(self._job.mesh, {'exclude': exclude_BR2})
      exclude_BR2 = distributed.fetch(arrays['exclude'])
    return search.search(query_emb_BE, k, exclude_BR2)[self._rows]

  def _embed(
      self, query_ids_BQ: np.ndarray, params: components_lib.Params
  ) -> np.ndarray:
    """Embeds all queries of a batch, of which each process has its rows."""
    arrays = mesh_lib.to_devices(
        self._job.mesh, {'query_ids_BQ': query_ids_BQ}
    )
    return distributed.fetch(
        self._embedder.queries(params, arrays['query_ids_BQ'])
    )


class OpenQaInputs:
  """Turns retrieved passages into the arrays of `steps.loss_function`."""

  def __init__(
      self,
      config: config_lib.Config,
      corpus: corpus_lib.Corpus,
      questions: question_table_lib.QuestionTable,
  ):
    self._config, self._corpus, self._questions = config, corpus, questions
    self._answers = passage_answers_lib.PassageAnswers(corpus)
    # Where the spans of each width begin in the order of `span_reader.spans`.
    self._length = config.lengths.joint
    starts_P, ends_P = span_reader.spans(
        self._length, config.model.max_span_width
    )
    self._num_spans = len(starts_P)
    self._first_span = np.flatnonzero(starts_P == 0)

  @property
  def depth(self) -> int:
    """How many passages to retrieve, N."""
    return min(self._config.open_qa.retrieved, len(self._corpus.passages))

  def __call__(
      self,
      batch: inputs.Batch,
      rows_BN: np.ndarray,
      doc_emb_BNE: np.ndarray,
  ) -> inputs.Batch:
    """Adds what was retrieved to a batch of questions.

    Args:
      batch: of `batches.training_batches`.
      rows_BN: passage rows, best first.
      doc_emb_BNE: their embeddings.

    Returns:
      The batch with doc_emb_BNE, has_answer_BN; and of the first K passages,
      which are read, joint_ids_BKT, joint_types_BKT, body_BK2 (where the body
      lies), correct_BKP (which spans are an answer) and, if documents learn,
      doc_ids_BKS, doc_types_BKS.
    """
    config, table = self._config, self._corpus.passages
    rows_BK = rows_BN[:, : config.open_qa.read]
    reading = (
        table,
        rows_BK,
        batch['query_ids_BQ'],
        batch['query_lengths_B'],
        self._length,
        self._corpus.tokenizer,
        config.open_qa.title,
    )
    ids_BKT, types_BKT = inputs.assemble_joint(*reading)
    body_BK2 = inputs.body_bounds(
        table, rows_BK, batch['query_lengths_B'], self._length,
        config.open_qa.title,
    )
    asked = [self._questions.questions[row] for row in batch['question_B']]
    has_answer_BN = np.stack([
        self._answers.has_answer(question, rows_N)
        for question, rows_N in zip(asked, rows_BN, strict=True)
    ])
    correct_BKP = np.zeros((*rows_BK.shape, self._num_spans), bool)
    for b, k in np.argwhere(has_answer_BN[:, : rows_BK.shape[1]]):
      spans = self._answers.spans(asked[b], int(rows_BK[b, k]))
      correct_BKP[b, k, self._numbers(spans, *body_BK2[b, k])] = True
    batch = {
        **batch,
        'doc_emb_BNE': doc_emb_BNE.astype(np.float32),
        'has_answer_BN': has_answer_BN,
        'joint_ids_BKT': ids_BKT,
        'joint_types_BKT': types_BKT,
        'body_BK2': body_BK2,
        'correct_BKP': correct_BKP,
    }
    if config.open_qa.documents == 'trained':
      batch['doc_ids_BKS'], batch['doc_types_BKS'] = inputs.assemble_documents(
          table, rows_BK, config.lengths.document, self._corpus.tokenizer
      )
    return batch

  def rerank(
      self,
      query_emb_BE: np.ndarray,
      rows_BN: np.ndarray,
      doc_emb_BNE: np.ndarray,
      embed_documents: Callable[[np.ndarray, np.ndarray], np.ndarray],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Puts the best passages in order by the current retriever.

    Args:
      query_emb_BE: of the questions.
      rows_BN: passage rows, best first by the index.
      doc_emb_BNE: their embeddings in the index.
      embed_documents: from ids and types, [B, L, S], to embeddings [B, L, E].

    Returns:
      rows_BN and doc_emb_BNE, of which the first `open_qa.rerank` are embedded
      anew and in the order of their new scores.
    """
    best = min(self._config.open_qa.rerank, rows_BN.shape[1])
    if not best:
      return rows_BN, doc_emb_BNE
    rows_BL = rows_BN[:, :best]
    ids, types = inputs.assemble_documents(
        self._corpus.passages,
        rows_BL,
        self._config.lengths.document,
        self._corpus.tokenizer,
    )
    emb_BLE = embed_documents(ids, types)
    score_BL = np.einsum('BE,BLE->BL', query_emb_BE, emb_BLE)
    order_BL = np.argsort(-score_BL, axis=1, kind='stable')
    return (
        np.concatenate(
            [np.take_along_axis(rows_BL, order_BL, 1), rows_BN[:, best:]], 1
        ),
        np.concatenate(
            [
                np.take_along_axis(emb_BLE, order_BL[..., None], 1),
                doc_emb_BNE[:, best:],
            ],
            axis=1,
        ),
    )

  def _numbers(
      self, spans: list[tuple[int, int]], start: int, limit: int
  ) -> list[int]:
    """Numbers, among P, of spans of a body that lies at [start, limit)."""
    return [
        int(self._first_span[last - first]) + start + first
        for first, last in spans
        if last - first < len(self._first_span) and start + last < limit
    ]
