"""A ScaNN index of many rows that is built part by part.

Public: `Tree`, `settings`. ScaNN's own way is to be handed the whole table as
one float32 array, which it copies. Here it is trained on a sample and then
given the rows in parts; it keeps their codes, half a byte for two dimensions,
and no vector.
"""

import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import topk

# Below so many rows ScaNN compares with every row: a tree gains nothing.
BRUTE_FORCE = 20_000
# ScaNN's k-means sees so many rows for each leaf.
_SAMPLE_PER_LEAF = 40
_PART_ROWS = 2**16  # Added at once.
_ASSETS = 'scann_assets.pbtxt'
_DOCIDS = 'scann_docids.pkl'
# What ScaNN keeps of each row: its leaf and its code.
_OF_ROWS = ('datapoint_to_token.npy', 'hashed_dataset.npy')


def settings(
    config: config_lib.MipsConfig, num_rows: int
) -> tuple[int, int, int]:
  """Returns leaves (0: no tree), leaves to search, and rows to re-rank.

  What the config leaves at 0 follows from the number of rows N:
    below 20,000 rows: no leaves, every row is compared, exactly;
    leaves: 2 sqrt(N), so that a leaf has sqrt(N) / 2 rows;
    leaves to search: 4 sqrt(leaves), the larger share the fewer there are;
    rows to re-rank: N^0.4 / 1.5, at least 100: codes of the same size mix up
      more rows the more there are (benchmarks/mips_scale.py). A search raises
      that to 4 k, and by what is hidden.

  Raises:
    ValueError: if the config asks for more leaves than there are rows.
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


class Tree:
  """Leaves found by k-means, in them codes; or, without leaves, every row.

  Searching returns candidates: rows that are likely the best, by a score that
  is exact only without leaves.
  """

  def __init__(self, searcher: Any):
    self._searcher = searcher
    self.num_rows = int(searcher.size())

  @classmethod
  def build(cls, embeddings_NE: topk.Rows, leaves: int) -> 'Tree':
    """Builds an index.

    Args:
      embeddings_NE: read in slices, which may be memory-mapped.
      leaves: how many; 0: compare with every row, for small tables.

    Raises:
      ValueError: if an embedding is not finite.
    """
    scann = _scann()
    count = embeddings_NE.shape[0]
    if not leaves:
      table_NE = _finite(embeddings_NE, 0, count)
      builder = scann.builder(table_NE, 10, 'dot_product')
      return cls(builder.score_brute_force().build())
    # Every so many rows, and row 0 first: see below.
    sample = _SAMPLE_PER_LEAF * leaves
    step = max(count // sample, 1)
    rows = np.arange(0, count, step)[:sample]
    sample_NE = np.asarray(embeddings_NE[rows], np.float32)
    _check_finite(sample_NE, rows)
    builder = scann.builder(sample_NE, 10, 'dot_product').tree(
        num_leaves=leaves,
        num_leaves_to_search=1,  # Said at each search.
        training_sample_size=len(rows),
        # ScaNN's default, 50, drops most leaves of a sample.
        min_partition_size=1,
        quantize_centroids=True,
    )
    searcher = builder.score_ah(2).build()
    with tempfile.TemporaryDirectory() as folder:
      # The trained index again with nothing in it but row 0; ScaNN does not
      # load an empty one. So its numbers of the rows will be ours.
      searcher.serialize(folder, relative_path=True)
      for name in _OF_ROWS:
        path = pathlib.Path(folder) / name
        np.save(path, np.load(path, allow_pickle=False)[:1])
      searcher = scann.load_searcher(folder)
    searcher.reserve(count)
    for start in range(1, count, _PART_ROWS):
      part_NE = _finite(embeddings_NE, start, min(start + _PART_ROWS, count))
      # Not by ScaNN's wrapper, which wants names of documents: it keeps them
      # in a list and a dict, gigabytes of them.
      numbers = searcher.searcher.upsert(
          [None] * len(part_NE), part_NE, len(part_NE)
      )
      if numbers[0] != start or numbers[-1] != start + len(part_NE) - 1:
        raise RuntimeError(
            f'ScaNN numbered rows {start} to {start + len(part_NE) - 1} as '
            f'{numbers[0]} to {numbers[-1]}: this release is not supported.'
        )
    return cls(searcher)

  @classmethod
  def load(
      cls, directory: str | os.PathLike[str], num_rows: int
  ) -> 'Tree':
    """Loads what `save` wrote.

    Raises:
      FileNotFoundError: if `directory` has no ScaNN index.
      ValueError: if it is of more rows, or holds a pickle.
    """
    directory = pathlib.Path(directory)
    if not (directory / _ASSETS).is_file():
      raise FileNotFoundError(f'{directory} holds no ScaNN index.')
    if (directory / _DOCIDS).exists():
      raise ValueError(
          f'{directory}/{_DOCIDS} is a pickle, which could run any code; '
          'realm_jax writes none.'
      )
    searcher = _scann().load_searcher(str(directory))
    if searcher.size() > num_rows:
      raise ValueError(
          f'{directory} is a ScaNN index of {searcher.size()} rows; the table '
          f'has {num_rows}.'
      )
    return cls(searcher)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the index to an existing, empty folder, which may be moved."""
    self._searcher.serialize(str(directory), relative_path=True)

  def search(
      self, query_emb_BE: np.ndarray, count: int, leaves: int
  ) -> np.ndarray:
    """Returns candidates, int32 [B, count], in no order.

    Where the leaves searched hold fewer rows, the rest is `num_rows`.
    """
    # A batch for each core: within one, queries share the reading of leaves.
    batch = -(-len(query_emb_BE) // (os.cpu_count() or 1))
    found, distance = self._searcher.search_batched_parallel(
        query_emb_BE,
        final_num_neighbors=count,
        pre_reorder_num_neighbors=count,
        leaves_to_search=leaves or None,
        batch_size=min(max(batch, 16), 256),
    )
    # ScaNN fills what it did not find with row 0 at distance nan.
    nothing = np.int32(self.num_rows)
    return np.where(np.isnan(distance), nothing, found.astype(np.int32))


def _scann() -> Any:
  # Imported late: it takes long to load, and only this backend needs it.
  from scann.scann_ops.py import scann_ops_pybind

  return scann_ops_pybind


def _finite(embeddings_NE: topk.Rows, start: int, limit: int) -> np.ndarray:
  part_NE = np.ascontiguousarray(embeddings_NE[start:limit], np.float32)
  _check_finite(part_NE, np.arange(start, limit))
  return part_NE


def _check_finite(part_NE: np.ndarray, rows: np.ndarray) -> None:
  finite = np.isfinite(part_NE).all(axis=1)
  if not finite.all():
    raise ValueError(
        f'The embedding of row {rows[np.argmin(finite)]} is not finite.'
    )
