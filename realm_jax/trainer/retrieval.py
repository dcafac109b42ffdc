"""Search for the queries of a batch, by all processes of a job together."""

from collections.abc import Callable
import contextlib
from typing import Any

import jax
import numpy as np

from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import refresh as refresh_lib


class Retriever:
  """Embeds with the current parameters, searches in the index in use.

  Implements `stages.Retriever` for this process' rows of a batch.
  """

  def __init__(
      self,
      embedder: components_lib.Component,
      mesh: jax.sharding.Mesh,
      refresher: refresh_lib.Refresher,
      rows: np.ndarray,
      template: inputs.Template,
      waiting: Callable[[], Any] = contextlib.nullcontext,
  ):
    """Compiles nothing yet.

    Args:
      embedder: of the job.
      mesh: of the job.
      refresher: has the index in use.
      rows: this process' rows of a batch.
      template: of the job.
      waiting: context of the wait for the step before.
    """
    self.params: components_lib.Params = {}  # Current parameters.
    self._mesh, self._refresher, self._rows = mesh, refresher, rows
    self._embedder = embedding.Embedder(embedder, mesh)
    self._template, self._waiting = template, waiting

  def search(
      self, query_ids_BQ: np.ndarray, k: int, exclude_BR2: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    # Embeddings of the whole batch, of which each process gave its rows. They
    # begin on the devices as soon as the step before has ended there.
    query_ids = self._on_devices(self._template.queries(query_ids_BQ))
    query_emb = self._embedder.queries(self.params, query_ids)
    with self._waiting():
      jax.block_until_ready(self.params)
    search = self._refresher.search
    if not search.collective:
      own_emb_BE = distributed.fetch(query_emb)[self._rows]
      return search.search(own_emb_BE, k, exclude_BR2), own_emb_BE
    # The table lies on the devices of all processes, which search together.
    if jax.process_count() > 1:
      query_emb = distributed.fetch(query_emb)
      if exclude_BR2 is not None:
        exclude_BR2 = distributed.fetch(self._on_devices(exclude_BR2))
    rows_BK = search.search(query_emb, k, exclude_BR2)[self._rows]
    return rows_BK, distributed.fetch(query_emb)[self._rows]

  def embeddings(self, rows_BN: np.ndarray) -> np.ndarray:
    return search_lib.gather(self._refresher.embeddings, rows_BN)

  def embed_documents(
      self, ids_BLS: np.ndarray, types_BLS: np.ndarray
  ) -> np.ndarray:
    ids, types = self._on_devices(ids_BLS), self._on_devices(types_BLS)
    emb_BLE = self._embedder.documents(self.params, ids, types)
    return distributed.fetch(emb_BLE)[self._rows]

  def _on_devices(self, array: np.ndarray) -> Any:
    return mesh_lib.to_devices(self._mesh, array)
