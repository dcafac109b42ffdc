"""Search against a brute-force reference: order, ties, exclusions, sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import mips
from realm_jax.index import topk


def _mesh(data: int, model: int = 1) -> jax.sharding.Mesh:
  return jax.make_mesh(
      (data, model),
      ('data', 'model'),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
      devices=jax.devices()[: data * model],
  )


def _integers(rng, *shape):
  """Small integers: sums are exact in any order, and ties abound."""
  return rng.integers(-3, 4, shape).astype(np.float32)


def _reference(table, queries, k, exclude=None):
  """One query and one row at a time, in float64."""
  results = []
  for b, query in enumerate(queries):
    scored = []
    for row, emb in enumerate(table):
      ranges = [] if exclude is None else exclude[b]
      if not any(start <= row < limit for start, limit in ranges):
        scored.append((-float(np.dot(query.astype(float), emb)), row))
    results.append([row for _, row in sorted(scored)[:k]])
  return np.array(results)


def _ranges(rng, size, rows):
  """Two ranges per query: overlapping, empty, inverted or beyond the table."""
  start = rng.integers(0, rows, (size, 2))
  limit = start + rng.integers(-2, rows // 3, (size, 2))
  ranges = np.stack([start, limit], axis=-1).astype(np.int64)
  ranges[0] = 0
  ranges[1, 1] = ranges[1, 0]
  ranges[2, 1] = [rows - 3, rows + 1000]
  return ranges


_MESHES = [(1, 1), (4, 2)]


@pytest.mark.parametrize('shape', _MESHES)
@pytest.mark.parametrize('rows', [5, 1100])
@pytest.mark.parametrize('backend', ['exact', 'approx'])
def test_equals_brute_force_with_ties_and_exclusions(shape, rows, backend):
  rng = np.random.default_rng(rows)
  table, queries = _integers(rng, rows, 8), _integers(rng, 6, 8)
  config = config_lib.MipsConfig(backend=backend)
  search = mips.make_search(config, table, _mesh(*shape))
  assert search.num_documents == rows
  k = min(7, rows)
  found = search.search(queries, k)
  np.testing.assert_array_equal(found, _reference(table, queries, k))
  exclude = _ranges(rng, 6, rows)
  k = min(7, rows // 3)
  found = search.search(queries, k, exclude)
  np.testing.assert_array_equal(found, _reference(table, queries, k, exclude))


@pytest.mark.parametrize('shape', [(1, 1), (8, 1)])
def test_many_chunks_on_each_device(shape, monkeypatch):
  """The last chunk overlaps the one before and repeats none of its rows."""
  monkeypatch.setattr(topk, '_MAX_CHUNK', 256)
  jax.clear_caches()
  rng = np.random.default_rng(0)
  table, queries = _integers(rng, 3001, 8), _integers(rng, 5, 8)
  search = mips.ExactSearch(table, _mesh(*shape))
  for k in (1, 20, 300):
    np.testing.assert_array_equal(
        search.search(queries, k), _reference(table, queries, k)
    )
  jax.clear_caches()


def test_all_rows_in_order_and_no_padding():
  rng = np.random.default_rng(0)
  table, queries = -np.abs(_integers(rng, 130, 4)), np.ones((2, 4), np.float32)
  found = mips.ExactSearch(table, _mesh(8)).search(queries, 130)
  # Padding rows score 0, which is more than any row.
  np.testing.assert_array_equal(found, _reference(table, queries, 130))


def test_minus_zero_does_not_break_a_tie():
  # Of width 1, or the sum would begin with a zero and lose the sign.
  table = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float32)
  queries = np.array([[1], [-1]], np.float32)
  for backend in ('exact', 'approx', 'scann'):
    search = mips.make_search(config_lib.MipsConfig(backend=backend), table)
    found = search.search(queries, 4)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3]] * 2, backend)


def test_queries_that_are_not_finite_still_get_distinct_allowed_rows():
  table = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  queries = np.full((2, 4), np.nan, np.float32)
  queries[1] = -np.inf
  exclude = np.tile(np.array([[[0, 10]]]), (2, 1, 1))
  for backend in ('exact', 'approx'):
    search = mips.make_search(config_lib.MipsConfig(backend=backend), table)
    for row in search.search(queries, 40, exclude):
      assert sorted(row) == list(range(10, 50))


def test_real_numbers_float32_and_bfloat16():
  rng = np.random.default_rng(1)
  table = rng.normal(size=(2000, 64)).astype(np.float32)
  queries = rng.normal(size=(9, 64)).astype(np.float32)
  found = mips.ExactSearch(table, _mesh(4, 2)).search(queries, 10)
  np.testing.assert_array_equal(found, _reference(table, queries, 10))
  rounded = table.astype(jnp.bfloat16)
  expected = _reference(rounded.astype(np.float32), queries, 10)
  assert (expected != found).any()  # The rounding matters to some.
  for given in (table, rounded):
    half = mips.ExactSearch(given, _mesh(4, 2), 'bfloat16')
    assert half._part.table_NE.dtype == jnp.bfloat16
    # Scores are in float32, queries unrounded.
    np.testing.assert_array_equal(half.search(queries, 10), expected)


def test_one_compilation_for_each_batch_size_and_k():
  rng = np.random.default_rng(2)
  queries = _integers(rng, 13, 8)
  before = topk.top_rows._cache_size()
  for seed in range(3):  # New tables of one shape: as after each refresh.
    table = _integers(np.random.default_rng(seed), 777, 8)
    search = mips.ExactSearch(table, _mesh(8))
    search.search(queries, 5)
    search.search(jnp.asarray(queries), 5, np.zeros((13, 1, 2), np.int64))
  assert topk.top_rows._cache_size() - before == 1
  search.search(queries, 6)
  assert topk.top_rows._cache_size() - before == 2


def test_the_table_is_read_in_slices():
  table = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)

  class Rows:
    shape = table.shape
    asked: list[slice] = []

    def __getitem__(self, rows):
      self.asked.append(rows)
      return table[rows]

  rows = Rows()
  search = mips.ExactSearch(rows, _mesh(8))
  assert max(r.stop - r.start for r in rows.asked) == 128
  np.testing.assert_array_equal(
      search.search(table[:3], 4), _reference(table, table[:3], 4)
  )


def test_exact_rows_visits_a_large_table_part_by_part(monkeypatch):
  monkeypatch.setattr(mips, '_PART_ROWS', 100)
  rng = np.random.default_rng(3)
  table, queries = _integers(rng, 505, 8), _integers(rng, 4, 8)
  np.testing.assert_array_equal(
      mips.exact_rows(table, queries, 9), _reference(table, queries, 9)
  )


@pytest.mark.parametrize('backend', ['exact', 'approx', 'scann'])
def test_too_few_rows_are_an_error_that_counts_them(backend):
  table = np.ones((10, 4), np.float32)
  search = mips.make_search(config_lib.MipsConfig(backend=backend), table)
  queries = np.ones((2, 4), np.float32)
  with pytest.raises(ValueError, match='k=11.*only 10'):
    search.search(queries, 11)
  # Overlapping ranges count once: rows 2 to 6 are excluded for query 1.
  exclude = np.array([[[0, 0], [0, 0]], [[3, 7], [2, 5]]])
  assert search.search(queries, 5, exclude)[1].tolist() == [0, 1, 7, 8, 9]
  with pytest.raises(ValueError, match='query 1 may have only 5'):
    search.search(queries, 6, exclude)
  with pytest.raises(ValueError, match='k=0'):
    search.search(queries, 0)
  with pytest.raises(ValueError, match=r'must be \[B, 4\]'):
    search.search(np.ones((2, 5), np.float32), 1)
  with pytest.raises(ValueError, match=r'must be \[2, R, 2\]'):
    search.search(queries, 1, np.zeros((3, 1, 2), np.int64))


def test_bad_tables_are_refused():
  for backend in ('exact', 'scann'):
    config = config_lib.MipsConfig(backend=backend)
    with pytest.raises(ValueError, match='matrix'):
      mips.make_search(config, np.zeros((0, 4), np.float32))
    table = np.ones((300, 4), np.float32)
    table[200, 1] = np.inf
    with pytest.raises(ValueError, match='finite'):
      mips.make_search(config, table, _mesh(2))
  with pytest.raises(ValueError, match='backend'):
    mips.make_search(config_lib.MipsConfig(backend='faiss'), table)


def _clustered(rows, width=32, seed=0):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(200, width))
  table = centres[rng.integers(0, 200, rows)]
  table = table + 0.5 * rng.normal(size=(rows, width))
  return table.astype(np.float32)


def test_scann_below_the_threshold_is_exact():
  rng = np.random.default_rng(4)
  table, queries = _integers(rng, 600, 8), _integers(rng, 70, 8)
  search = mips.make_search(config_lib.MipsConfig(backend='scann'), table)
  # Ties at the border of what ScaNN hands over are its own choice; inside they
  # go by row. So compare where all 600 are handed over.
  exclude = _ranges(rng, 70, 600)
  found = search.search(queries, 150, exclude)
  expected = _reference(table, queries, 150, exclude)
  np.testing.assert_array_equal(found, expected)


def test_scann_tree_finds_what_exact_search_finds(tmp_path):
  table = _clustered(mips.SCANN_BRUTE_FORCE)
  queries = _clustered(200, seed=0)[:100] + 0.1
  config = config_lib.MipsConfig(backend='scann')
  search = mips.make_search(config, table)
  assert search._leaves == 283
  exact = mips.ExactSearch(table)
  assert mips.recall(search, exact, queries, 8) > 0.95
  # What is found is ranked exactly.
  found = search.search(queries, 8)
  scores = np.einsum('BE,BKE->BK', queries, table[found])
  assert (np.diff(scores, axis=1) <= 1e-4).all()
  # Excluding what was best brings up the next, and never fewer than k.
  best = found[:, :1].astype(np.int64)
  exclude = np.stack([best, best + 1], axis=-1)
  again = search.search(queries, 7, exclude)
  assert not (again == best).any()
  assert mips.overlap(again, found[:, 1:]) > 0.95
  # Hardly anything but the worst rows: it searches on until it has k.
  everything_but = np.array([[[0, 19_990], [0, 0]]] * 100)
  rows = search.search(queries, 10, everything_but)
  assert (np.sort(rows, axis=1) == np.arange(19_990, 20_000)).all()
  # Saved, moved and loaded it is the same search.
  (tmp_path / 'there').mkdir()
  search.save(tmp_path / 'there')
  (tmp_path / 'there').rename(tmp_path / 'here')
  # The table itself is not written a second time.
  size = sum(f.stat().st_size for f in (tmp_path / 'here').iterdir())
  assert size < table.nbytes / 2
  loaded = mips.make_search(
      config, table, scann_directory=tmp_path / 'here'
  )
  np.testing.assert_array_equal(loaded.search(queries, 8), found)


def test_scann_refuses_what_it_did_not_write(tmp_path):
  table = np.ones((30, 4), np.float32)
  config = config_lib.MipsConfig(backend='scann')
  with pytest.raises(FileNotFoundError, match='no ScaNN index'):
    mips.make_search(config, table, scann_directory=tmp_path)
  mips.make_search(config, table).save(tmp_path)
  (tmp_path / 'scann_docids.pkl').write_bytes(b'cos\nsystem\n')
  with pytest.raises(ValueError, match='pickle'):
    mips.make_search(config, table, scann_directory=tmp_path)
  config.num_leaves = 31
  with pytest.raises(ValueError, match='more than the 30 rows'):
    mips.make_search(config, table)


def test_settings_of_scann_follow_from_the_rows_unless_given():
  config = config_lib.MipsConfig(backend='scann')
  assert mips.scann_settings(config, 1000)[0] == 0
  leaves, to_search, reorder = mips.scann_settings(config, 13_353_718)
  assert 7000 < leaves < 8000
  assert 0 < to_search < leaves
  assert reorder > 0
  config.num_leaves, config.leaves_to_search, config.reorder = 20, 3, 50
  assert mips.scann_settings(config, 1000) == (20, 3, 50)


def test_recall_counts_common_rows():
  a = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
  b = np.array([[3, 2, 9, 8], [7, 6, 5, 4]])
  assert mips.overlap(a, b) == 0.75
