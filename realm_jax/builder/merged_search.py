"""A search of two tables as one: a saved index, and rows added behind it."""

import jax
import numpy as np

from realm_jax.index import search as search_lib


class MergedSearch(search_lib.Search):
  """Ranks the results of two searches by inner product in float32."""

  def __init__(
      self,
      searches: tuple[search_lib.Search, search_lib.Search],
      table_NE: search_lib.Rows,
      removed: np.ndarray,
  ):
    """Joins searches of the first and of the other rows of a table."""
    super().__init__(table_NE, removed)
    self._searches = searches

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)
    border = self._searches[0].num_documents
    ranges = (0, border), (border, self.num_documents)
    wanted = []
    for first, limit in ranges:
      inside = np.clip(exclude_BR2, first, limit)
      allowed_B = search_lib.num_allowed(inside, self._removed, first, limit)
      wanted.append(np.minimum(allowed_B, k))
    wanted_B2 = np.stack(wanted, axis=1)
    rows_BK = np.zeros((len(query_emb_BE), k), np.int32)
    # Usually one group: few queries exclude nearly all of a table.
    for counts in np.unique(wanted_B2, axis=0):
      mine = np.flatnonzero((wanted_B2 == counts).all(axis=1))
      rows_BN = np.concatenate(
          [
              search.search(query_emb_BE[mine], n, exclude_BR2[mine] - first)
              + first
              for search, n, (first, _) in zip(
                  self._searches, counts.tolist(), ranges, strict=True
              )
              if n
          ],
          axis=1,
      ).astype(np.int32)
      allowed_BN = np.ones(rows_BN.shape, bool)
      rows_BK[mine] = search_lib.rank(
          self._table_NE, query_emb_BE[mine], rows_BN, allowed_BN, k
      )
    return rows_BK
