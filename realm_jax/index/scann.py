"""ScaNN (Guo et al. 2020) on the CPU, built part by part.

ScaNN's own builder takes the whole table as one float32 array and copies it.
Here ScaNN is trained on a sample and then given the rows in parts. It keeps
their codes, half a byte for two dimensions, and no vector.
"""

from collections.abc import Iterator
import contextlib
import errno
import math
import os
import pathlib
import re
import tempfile
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import search as search_lib
from realm_jax.index.search import Array

# Tables of fewer rows are compared row by row: a tree would not be faster.
BRUTE_FORCE = 20_000
_SAMPLE_PER_LEAF = 40  # Rows that k-means sees for each leaf.
_PART_ROWS = 2**16  # Rows added at once.
_MAX_CANDIDATES = 2**22  # Candidates of all queries that are searched at once.
_ASSETS = 'scann_assets.pbtxt'
_DOCIDS = 'scann_docids.pkl'
# ScaNN's files with an entry for each row: its leaf and its code.
_ROW_FILES = ('datapoint_to_token.npy', 'hashed_dataset.npy')


def settings(
    config: config_lib.MipsConfig, num_rows: int
) -> tuple[int, int, int]:
  """Returns leaves (0: no tree), leaves to search, and rows to re-rank.

  A setting of 0 is derived from the number of rows N:
    below 20,000 rows: no leaves, every row is compared, exactly;
    leaves: 2 sqrt(N), so that a leaf has sqrt(N) / 2 rows;
    leaves to search: 4 sqrt(leaves), a larger share of fewer leaves;
    rows to re-rank: N^0.4 / 1.5, at least 100: codes of the same size confuse
      more rows in a larger table (benchmarks/mips_scale.py). A search raises
      it to 4 k, and by the number of hidden rows.

  Raises:
    ValueError: the config asks for more leaves than rows.
  """
  leaves = config.num_leaves
  if not leaves and num_rows >= BRUTE_FORCE:
    leaves = round(2 * math.sqrt(num_rows))
  if leaves > num_rows:
    raise ValueError(
        f'config.mips.num_leaves={leaves}: more than the {num_rows} rows.'
    )
  to_search = config.leaves_to_search or math.ceil(4 * math.sqrt(leaves))
  reorder = config.reorder or max(100, round(num_rows**0.4 / 1.5))
  return leaves, min(to_search, leaves), reorder


class ScannSearch(search_lib.Search):
  """Tree, asymmetric hashing and exact re-rank.

  ScaNN finds candidates by their codes in the leaves of a tree; they are ranked
  by the rows of the generation's own table. ScaNN trains on several threads, so
  building is not reproducible bit by bit; searching a saved index is.
  """

  folder = 'scann'
  saved_settings = ('num_leaves',)

  def __init__(
      self,
      embeddings_NE: search_lib.Rows,
      config: config_lib.MipsConfig,
      directory: str | os.PathLike[str] | None = None,
      removed: np.ndarray | None = None,
  ):
    """Builds the index, or loads what `save` wrote to `directory`.

    Raises:
      FileNotFoundError: `directory` has no ScaNN index.
      ValueError: the table or the folder is wrong.
      ImportError: ScaNN is not installed.
    """
    super().__init__(embeddings_NE, removed)
    self._leaves, self._leaves_to_search, self._reorder = settings(
        config, self.num_documents
    )
    # The number of rows stands for a missing candidate.
    self._hidden_N = np.zeros(self.num_documents + 1, bool)
    self._hidden_N[-1] = True
    self._hidden_N[self._removed] = True
    self._live = int(np.count_nonzero(~self._hidden_N))
    if directory is None:
      self._searcher = _build(embeddings_NE, self._leaves)
    else:
      self._searcher = _load(pathlib.Path(directory), self.num_documents)

  @classmethod
  def build(
      cls,
      embeddings_NE: search_lib.Rows,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None,
  ) -> search_lib.Search:
    return cls(embeddings_NE, config, None, removed)

  @classmethod
  def load(
      cls,
      folder: pathlib.Path,
      embeddings_NE: search_lib.Rows,
      config: config_lib.MipsConfig,
      mesh: jax.sharding.Mesh | None,
      removed: np.ndarray | None,
  ) -> search_lib.Search:
    return cls(embeddings_NE, config, folder, removed)

  def save(self, folder: pathlib.Path) -> None:
    with _writing():
      self._searcher.serialize(str(folder), relative_path=True)
    for path in folder.iterdir():
      if not path.stat().st_size:
        raise OSError(errno.ENOSPC, f'ScaNN wrote an empty file: {path}')

  @classmethod
  def settings(
      cls, config: config_lib.MipsConfig, num_rows: int
  ) -> dict[str, Any]:
    names = ('num_leaves', 'leaves_to_search', 'reorder')
    return dict(zip(names, settings(config, num_rows), strict=True))

  @classmethod
  def row_bytes(
      cls, config: config_lib.MipsConfig, width: int
  ) -> search_lib.RowBytes:
    # A float32 row, and half a byte for the code of two dimensions.
    size = width * (4 + 0.25)
    return search_lib.RowBytes(host=size, saved=size)

  def search(
      self, query_emb_BE: Array, k: int, exclude_BR2: np.ndarray | None = None
  ) -> np.ndarray:
    exclude_BR2, allowed_B = self.check(query_emb_BE, k, exclude_BR2)
    query_emb_BE = np.asarray(jax.device_get(query_emb_BE), np.float32)
    # ScaNN fails on queries that are not finite; they may get any rows.
    finite = np.isfinite(query_emb_BE).all(axis=1, keepdims=True)
    query_emb_BE = np.where(finite, query_emb_BE, 0)
    rows_BK = np.zeros((len(query_emb_BE), k), np.int32)
    # Candidates to rank exactly for each query, as far as it may have them.
    wanted = max(self._reorder, 4 * k)
    excluded = int((self._live - allowed_B).max(initial=0))
    fetch = wanted + min(excluded, wanted)
    fetch = fetch * self.num_documents // max(self._live, 1)
    leaves = self._leaves_to_search
    todo = np.arange(len(query_emb_BE))
    # Without leaves up to all rows; with leaves while it is faster than exact.
    limit = self.num_documents * 4 - 1
    limit = limit // 16 if self._leaves else limit
    while todo.size and fetch <= limit:
      fetch = min(fetch, self.num_documents)
      again = []
      step = max(_MAX_CANDIDATES // fetch, 1)
      for start in range(0, len(todo), step):
        chunk = todo[start : start + step]
        rows_BK[chunk], enough_B = self._attempt(
            query_emb_BE[chunk], k, exclude_BR2[chunk], fetch, leaves,
            np.minimum(wanted, allowed_B[chunk]),
        )
        again.append(chunk[~enough_B])
      todo = np.concatenate(again)
      fetch, leaves = 4 * fetch, min(4 * leaves, self._leaves)
    if todo.size:
      # Nearly all rows close to these queries are hidden.
      exact = search_lib.StreamedSearch(self._table_NE, removed=self._removed)
      rows_BK[todo] = exact.search(query_emb_BE[todo], k, exclude_BR2[todo])
    return rows_BK

  def _attempt(
      self,
      query_emb_BE: np.ndarray,
      k: int,
      exclude_BR2: np.ndarray,
      fetch: int,
      leaves: int,
      wanted_B: np.ndarray,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows [B, k] and which queries [B] had enough candidates."""
    # One batch for each core: queries of a batch share the reading of leaves.
    batch = -(-len(query_emb_BE) // (os.cpu_count() or 1))
    found, distance = self._searcher.search_batched_parallel(
        query_emb_BE,
        final_num_neighbors=fetch,
        pre_reorder_num_neighbors=fetch,
        leaves_to_search=leaves or None,
        batch_size=min(max(batch, 16), 256),
    )
    # ScaNN marks a missing candidate by row 0 at distance nan.
    missing = np.int32(self.num_documents)
    found_BN = np.where(np.isnan(distance), missing, found.astype(np.int32))
    allowed_BN = ~self._hidden_N[found_BN]
    for r in range(exclude_BR2.shape[1]):
      first, limit = exclude_BR2[:, r, :1], exclude_BR2[:, r, 1:]
      allowed_BN &= (found_BN < first) | (found_BN >= limit)
    count_B = allowed_BN.sum(axis=1)
    # If the leaves had no more rows, k are enough.
    exhausted_B = (found_BN == self.num_documents).any(axis=1)
    enough_B = (count_B >= wanted_B) | (exhausted_B & (count_B >= k))
    rows_BK = search_lib.rank(
        self._table_NE, query_emb_BE, found_BN, allowed_BN, k
    )
    return rows_BK, enough_B


def _build(embeddings_NE: search_lib.Rows, leaves: int) -> Any:
  """Returns ScaNN's searcher over a table; without leaves, of every row."""
  scann = _scann()
  count = embeddings_NE.shape[0]
  if not leaves:
    table_NE = _finite(embeddings_NE, range(count))
    builder = scann.builder(table_NE, 10, 'dot_product')
    return builder.score_brute_force().build()
  # Evenly spaced rows, row 0 first: see below.
  sample = _SAMPLE_PER_LEAF * leaves
  rows = range(0, count, max(count // sample, 1))[:sample]
  builder = scann.builder(_finite(embeddings_NE, rows), 10, 'dot_product').tree(
      num_leaves=leaves,
      num_leaves_to_search=1,  # Each search sets its own number.
      training_sample_size=len(rows),
      # ScaNN's default, 50, drops most leaves of a sample.
      min_partition_size=1,
      quantize_centroids=True,
  )
  searcher = builder.score_ah(2).build()
  with tempfile.TemporaryDirectory() as folder, _writing():
    # Load the trained index again with row 0 only (ScaNN loads no empty index),
    # so that its row numbers equal those of the table.
    searcher.serialize(folder, relative_path=True)
    for name in _ROW_FILES:
      path = pathlib.Path(folder) / name
      np.save(path, np.load(path, allow_pickle=False)[:1])
    searcher = scann.load_searcher(folder)
  searcher.reserve(count)
  for start in range(1, count, _PART_ROWS):
    limit = min(start + _PART_ROWS, count)
    part_NE = _finite(embeddings_NE, range(start, limit))
    # ScaNN's wrapper would keep names of the rows, gigabytes of Python lists.
    numbers = searcher.searcher.upsert(
        [None] * len(part_NE), part_NE, len(part_NE)
    )
    if numbers[0] != start or numbers[-1] != limit - 1:
      raise RuntimeError(
          f'ScaNN numbered rows {start} to {limit - 1} as '
          f'{numbers[0]} to {numbers[-1]}: this release is not supported.'
      )
  return searcher


def _load(directory: pathlib.Path, num_rows: int) -> Any:
  if not (directory / _ASSETS).is_file():
    raise FileNotFoundError(f'{directory} holds no ScaNN index.')
  if (directory / _DOCIDS).exists():
    raise ValueError(
        f'{directory}/{_DOCIDS} is a pickle, which could run any code; '
        'realm_jax writes none.'
    )
  searcher = _scann().load_searcher(str(directory))
  if searcher.size() != num_rows:
    raise ValueError(
        f'{directory} is a ScaNN index of {searcher.size()} rows; the table '
        f'has {num_rows}.'
    )
  return searcher


def _scann() -> Any:
  # Imported late: it takes long to load, and only this backend needs it.
  from scann.scann_ops.py import scann_ops_pybind

  return scann_ops_pybind


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """Turns ScaNN's error on a full disk, which has no number, into OSError."""
  try:
    yield
  except RuntimeError as error:
    if not re.search('writ|I/O', str(error)):
      raise
    raise OSError(errno.ENOSPC, str(error)) from error


def _finite(embeddings_NE: search_lib.Rows, rows: range) -> np.ndarray:
  """Reads rows as float32; a ValueError names one that is not finite."""
  found = rows if rows.step > 1 else slice(rows.start, rows.stop)
  part_NE = np.ascontiguousarray(embeddings_NE[found], np.float32)
  finite = np.isfinite(part_NE).all(axis=1)
  if not finite.all():
    raise ValueError(
        f'The embedding of row {rows[np.argmin(finite)]} is not finite.'
    )
  return part_NE
