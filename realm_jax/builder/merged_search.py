"""A search over two tables in a row, as if they were one.

Public: `Beside`. A saved ScaNN index serves for the first, which is large; the
rows added since are few and are searched exactly.
"""

import jax
import numpy as np

from realm_jax.index import search as search_lib


class Beside(search_lib.Search):
  """Merges what two searches find, by inner product in float32."""

  def __init__(
      self,
      searches: tuple[search_lib.Search, search_lib.Search],
      table_NE: search_lib.Rows,
      removed: np.ndarray,
  ):
    """Joins two searches.

    Args:
      searches: over the first rows of the table and over the rest of them.
      table_NE: all rows.
      removed: sorted rows that neither search returns.
    """
    super().__init__(table_NE, removed)
    self._searches = searches
    self._border = searches[0].num_documents

  def search(
      self,
      query_emb_BE: np.ndarray | jax.Array,
      k: int,
      exclude_BR2: np.ndarray | None = None,
  ) -> np.ndarray:
    """As `search.Search.search`."""
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    size = len(query_emb_BE)
    exclude_BR2, _ = self.check(query_emb_BE, k, exclude_BR2)
    borders = (0, self._border, self.num_documents)
    allowed = [
        search_lib.num_allowed(
            np.clip(exclude_BR2, first, limit), self._removed, first, limit
        )
        for first, limit in zip(borders, borders[1:], strict=False)
    ]
    rows_BK = np.zeros((size, k), np.int32)
    # Mostly one group: few queries exclude nearly all of a part.
    wanted_B2 = np.minimum(np.stack(allowed, axis=1), k)
    for wanted in np.unique(wanted_B2, axis=0):
      mine = np.flatnonzero((wanted_B2 == wanted).all(axis=1))
      rows_BK[mine] = self._merged(
          query_emb_BE[mine], k, exclude_BR2[mine], wanted.tolist()
      )
    return rows_BK

  def _merged(
      self,
      query_emb_BE: np.ndarray,
      k: int,
      exclude_BR2: np.ndarray,
      wanted: list[int],
  ) -> np.ndarray:
    found = [
        search.search(query_emb_BE, count, exclude_BR2 - first) + first
        for search, count, first in zip(
            self._searches, wanted, (0, self._border), strict=True
        )
        if count
    ]
    rows_BN = np.concatenate(found, axis=1).astype(np.int32)
    return search_lib.rank(
        self._table_NE, query_emb_BE, rows_BN, np.ones(rows_BN.shape, bool), k
    )
