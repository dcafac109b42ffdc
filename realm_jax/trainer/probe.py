"""A few fixed queries on which indexes are compared while training.

Public: `Probe`. The same queries in every process and after every restart, so
that what is decided by them (refresh.policy `adaptive`) can be repeated.
"""

import functools

import jax
import numpy as np

from realm_jax.corpus import inputs
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import job as job_lib

_QUERIES = 32
# Candidates of each query that are embedded anew; of many, so many times k.
_POOL, _POOL_OF_K = 64, 4
_BATCH = 64  # Documents embedded at once, at least: one shape, one compilation.


class Probe:
  """Queries, and what the parameters of the moment find for them."""

  def __init__(self, job: job_lib.Job):
    """Chooses the queries: masked sentences, of validation if there are any.

    Where questions are trained on, the first of them. The documents of a batch
    are divided over all devices of the job.
    """
    config, corpus, mesh = job.config, job.corpus, job.mesh
    embedder = job.components['embedder']
    self._query_ids_BQ, self._exclude_BR2, self.k = job.stage.probe_queries(
        _QUERIES
    )
    self._corpus, self._length = corpus, config.lengths.document
    self._batch = -(-_BATCH // mesh.size) * mesh.size
    self._over_rows = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    rows, whole = self._over_rows.spec, jax.P()

    def embed_queries(
        params: components_lib.Params, ids_BQ: jax.Array
    ) -> jax.Array:
      return embedder.apply(params, 'embed_query', ids_BQ)

    def embed_documents(
        params: components_lib.Params, ids_BS: jax.Array, types_BS: jax.Array
    ) -> jax.Array:
      return embedder.apply(params, 'embed_document', ids_BS, types_BS)

    # All devices the same queries, and each its part of the documents: XLA
    # could not divide the TPU's kernel of attention.
    on_each = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    everywhere = mesh_lib.replicated(mesh)
    self._embed_queries = jax.jit(
        on_each(embed_queries, in_specs=whole, out_specs=whole)
    )
    self._embed_documents = jax.jit(
        on_each(
            embed_documents, in_specs=(whole, rows, rows), out_specs=rows
        ),
        out_shardings=everywhere,
    )

  def embed(self, params: components_lib.Params) -> np.ndarray:
    """Returns the queries' embeddings, float32 [B, E]."""
    return distributed.fetch(self._embed_queries(params, self._query_ids_BQ))

  def still_right(
      self, params: components_lib.Params, search: search_lib.Search
  ) -> float:
    """How much of what a stale index finds holds with other parameters.

    The best candidates of each query by the index, 64 or 4 k, are embedded anew
    and ranked. What the index does not have among them is not seen, so this
    errs on the side of the index.

    Args:
      params: of the embedder.
      search: over the index.

    Returns:
      The mean share of the index's top k that is among the new top k.
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
    parts = []
    for start in range(0, len(rows), self._batch):
      some = np.full(self._batch, inputs.NULL_DOCUMENT, np.int64)
      some[: len(rows) - start] = rows[start : start + self._batch]
      arrays = inputs.assemble_documents(
          self._corpus.passages, some, self._length, self._corpus.tokenizer
      )
      ids_BS, types_BS = (self._on_devices(array) for array in arrays)
      parts.append(self._embed_documents(params, ids_BS, types_BS))
    return np.concatenate([distributed.fetch(part) for part in parts])

  def _on_devices(self, array: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(
        array.shape, self._over_rows, lambda index: array[index]
    )
