"""Fixed queries on which indexes are compared during training.

The queries are the same in every process and after every restart, so that a
decision that depends on them (`refresh.policy=adaptive`) can be repeated.
"""

import numpy as np

from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import job as job_lib

_QUERIES = 32
# Candidates of each query that are embedded with the current parameters: the
# larger of a fixed number and a multiple of k.
_POOL, _POOL_OF_K = 64, 4
_BATCH = 64  # Documents embedded at once: one shape, one compilation.


class Probe:
  """Embeds and searches the probe queries of a job.

  The queries are masked sentences of the validation split if it has any, else
  of the training data; for question answering, the first questions.
  """

  def __init__(self, job: job_lib.Job):
    corpus, mesh = job.corpus, job.mesh
    ids_BQ, self._exclude_BR2, self.k = job.stage.probe_queries(_QUERIES)
    self._query_ids_BQ = job.stage.template.queries(ids_BQ)
    self._passages, self._template = corpus.passages, job.stage.template
    self._embedder = embedding.Embedder(job.components['embedder'], mesh)
    self._mesh = mesh

  def embed(self, params: components_lib.Params) -> np.ndarray:
    """Returns the embeddings of the queries, float32 [B, E]."""
    ids = mesh_lib.put_whole(self._mesh, self._query_ids_BQ)
    emb_BE = distributed.fetch(self._embedder.queries(params, *ids))
    return emb_BE[: len(self._query_ids_BQ)]

  def overlap_with_current(
      self, params: components_lib.Params, search: search_lib.Search
  ) -> float:
    """Returns the share of the stale top k that is top k by the parameters.

    The best candidates of each query by the index, 64 or 4 k, are embedded with
    the parameters and ranked again. Documents outside these candidates are not
    seen, so the overlap is an upper bound.

    Args:
      params: current parameters of the embedder.
      search: search over the stale index.

    Returns:
      The mean over the queries, 0 to 1.
    """
    query_emb_BE = self.embed(params)
    ranges_BR = self._exclude_BR2[..., 1] - self._exclude_BR2[..., 0]
    allowed = search.num_documents - int(ranges_BR.sum(axis=1).max())
    size = min(max(_POOL, _POOL_OF_K * self.k), allowed)
    pool_BN = search.search(query_emb_BE, size, self._exclude_BR2)
    rows, places = np.unique(pool_BN, return_inverse=True)
    doc_emb_BNE = self._embed(params, rows)[places.reshape(pool_BN.shape)]
    score_BN = np.einsum('BE,BNE->BN', query_emb_BE, doc_emb_BNE)
    order_BN = np.lexsort((pool_BN, -score_BN), axis=1)
    fresh_BK = np.take_along_axis(pool_BN, order_BN, 1)[:, : self.k]
    return search_lib.overlap(pool_BN[:, : self.k], fresh_BK)

  def _embed(
      self, params: components_lib.Params, rows: np.ndarray
  ) -> np.ndarray:
    data = self._mesh.shape[mesh_lib.DATA]
    size = -(-_BATCH // data) * data
    parts = []
    for start in range(0, len(rows), size):
      numbers = np.full((size, 1), inputs.NULL_DOCUMENT, np.int64)
      numbers[: len(rows) - start, 0] = rows[start : start + size]
      arrays = mesh_lib.put_whole(
          self._mesh, *self._template.documents(self._passages, numbers)
      )
      emb_BLE = self._embedder.documents(params, *arrays)
      parts.append(distributed.fetch(emb_BLE)[:, 0])
    return np.concatenate(parts)
