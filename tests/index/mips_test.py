"""Search against a brute-force reference: order, ties, exclusions, sharding."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import scann
from realm_jax.index import search as search_lib
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


def _reference(table, queries, k, exclude=None, removed=()):
  """One query and one row at a time, in float64."""
  results = []
  for b, query in enumerate(queries):
    scored = []
    for row, emb in enumerate(table):
      if row in removed:
        continue
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


def _recall(search, exact, queries):
  found_BK, exact_BK = search.search(queries, 8), exact.search(queries, 8)
  return search_lib.overlap(found_BK, exact_BK)


_MESHES = [(1, 1), (4, 2)]


@pytest.mark.parametrize('shape', _MESHES)
@pytest.mark.parametrize('rows', [5, 1100])
@pytest.mark.parametrize('backend', ['exact', 'approx'])
def test_equals_brute_force_with_ties_and_exclusions(shape, rows, backend):
  rng = np.random.default_rng(rows)
  table, queries = _integers(rng, rows, 8), _integers(rng, 6, 8)
  config = config_lib.MipsConfig(backend=backend)
  search = search_lib.make_search(config, table, _mesh(*shape))
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
  search = search_lib.ExactSearch(table, _mesh(*shape))
  for k in (1, 20, 300):
    np.testing.assert_array_equal(
        search.search(queries, k), _reference(table, queries, k)
    )
  jax.clear_caches()


def test_all_rows_in_order_and_no_padding():
  rng = np.random.default_rng(0)
  table, queries = -np.abs(_integers(rng, 130, 4)), np.ones((2, 4), np.float32)
  found = search_lib.ExactSearch(table, _mesh(8)).search(queries, 130)
  # Padding rows score 0, which is more than any row.
  np.testing.assert_array_equal(found, _reference(table, queries, 130))


def test_minus_zero_does_not_break_a_tie():
  # Width 1: a longer sum would begin with a zero and lose the sign.
  table = np.array([[-0.0], [0.0], [-0.0], [0.0]], np.float32)
  queries = np.array([[1], [-1]], np.float32)
  for backend in ('exact', 'approx', 'scann'):
    search = search_lib.make_search(
        config_lib.MipsConfig(backend=backend), table
    )
    found = search.search(queries, 4)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3]] * 2, backend)


def test_queries_that_are_not_finite_still_get_distinct_allowed_rows():
  table = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
  queries = np.full((2, 4), np.nan, np.float32)
  queries[1] = -np.inf
  exclude = np.tile(np.array([[[0, 10]]]), (2, 1, 1))
  for backend in ('exact', 'approx'):
    search = search_lib.make_search(
        config_lib.MipsConfig(backend=backend), table
    )
    for row in search.search(queries, 40, exclude):
      assert sorted(row) == list(range(10, 50))


def test_real_numbers_float32_and_bfloat16():
  rng = np.random.default_rng(1)
  table = rng.normal(size=(2000, 64)).astype(np.float32)
  queries = rng.normal(size=(9, 64)).astype(np.float32)
  found = search_lib.ExactSearch(table, _mesh(4, 2)).search(queries, 10)
  np.testing.assert_array_equal(found, _reference(table, queries, 10))
  rounded = table.astype(jnp.bfloat16)
  expected = _reference(rounded.astype(np.float32), queries, 10)
  assert (expected != found).any()  # The rounding matters to some.
  for given in (table, rounded):
    half = search_lib.ExactSearch(given, _mesh(4, 2), 'bfloat16')
    assert half._part.table_NE.dtype == jnp.bfloat16
    # Scores are in float32, queries unrounded.
    np.testing.assert_array_equal(half.search(queries, 10), expected)


def test_products_in_bfloat16_rank_as_those_in_float32():
  rng = np.random.default_rng(3)
  table = rng.normal(size=(2000, 64)).astype(jnp.bfloat16)
  queries = rng.normal(size=(9, 64)).astype(np.float32)
  exact = queries.astype(np.float64) @ table.astype(np.float64).T
  score = jax.jit(topk._split_score)(queries, table)
  np.testing.assert_allclose(score, exact, rtol=0, atol=2e-5)
  rounded = queries.astype(jnp.bfloat16).astype(np.float64)
  assert abs(rounded @ table.astype(np.float64).T - exact).max() > 2e-2
  mesh = _mesh(4, 2)
  search = search_lib.ExactSearch(table, mesh, 'bfloat16')
  exclude = np.tile(np.array([[[7, 900]]], np.int32), (9, 1, 1))
  plain, split = (
      topk.top_rows(
          search._part.table_NE, queries, exclude, None,
          np.array(search._part.rows, np.int32),
          mesh=mesh, k=10, split=split,
      )
      for split in (False, True)
  )
  np.testing.assert_array_equal(plain[1], split[1])
  np.testing.assert_allclose(plain[0], split[0], rtol=1e-6)


def test_one_compilation_for_each_batch_size_and_k():
  rng = np.random.default_rng(2)
  queries = _integers(rng, 13, 8)
  before = topk.top_rows._cache_size()
  for seed in range(3):  # New tables of one shape: as after each refresh.
    table = _integers(np.random.default_rng(seed), 777, 8)
    search = search_lib.ExactSearch(table, _mesh(8))
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
  search = search_lib.ExactSearch(rows, _mesh(8))
  assert max(r.stop - r.start for r in rows.asked) == 128
  np.testing.assert_array_equal(
      search.search(table[:3], 4), _reference(table, table[:3], 4)
  )


def test_exact_rows_visits_a_large_table_part_by_part(monkeypatch):
  monkeypatch.setattr(search_lib, '_STREAMED_ROWS', 100)
  rng = np.random.default_rng(3)
  table, queries = _integers(rng, 505, 8), _integers(rng, 4, 8)
  found = search_lib.StreamedSearch(table).search(queries, 9)
  np.testing.assert_array_equal(found, _reference(table, queries, 9))


@pytest.mark.parametrize('backend', ['exact', 'approx', 'scann'])
def test_too_few_rows_are_an_error_that_counts_them(backend):
  table = np.ones((10, 4), np.float32)
  search = search_lib.make_search(config_lib.MipsConfig(backend=backend), table)
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
      search_lib.make_search(config, np.zeros((0, 4), np.float32))
    table = np.ones((300, 4), np.float32)
    table[200, 1] = np.inf
    with pytest.raises(ValueError, match='finite'):
      search_lib.make_search(config, table, _mesh(2))
  with pytest.raises(ValueError, match='backend'):
    search_lib.make_search(config_lib.MipsConfig(backend='faiss'), table)


def test_the_row_that_is_not_finite_is_named(monkeypatch):
  monkeypatch.setattr(topk, '_CHECKED', 64)  # Rows that are checked at once.
  table = np.ones((300, 4), np.float32)
  table[[257, 299], [1, 0]] = np.nan, np.inf
  for dtype in ('float32', 'bfloat16'):
    config = config_lib.MipsConfig(backend='exact', dtype=dtype)
    with pytest.raises(ValueError, match=f'row 257 is not finite as {dtype}'):
      search_lib.make_search(config, table, _mesh(1))


def _clustered(rows, width=32, seed=0):
  rng = np.random.default_rng(seed)
  centres = rng.normal(size=(200, width))
  table = centres[rng.integers(0, 200, rows)]
  table = table + 0.5 * rng.normal(size=(rows, width))
  return table.astype(np.float32)


def test_scann_below_the_threshold_is_exact():
  rng = np.random.default_rng(4)
  table, queries = _integers(rng, 600, 8), _integers(rng, 70, 8)
  search = search_lib.make_search(config_lib.MipsConfig(backend='scann'), table)
  # Ties at the border of what ScaNN hands over are its own choice; inside they
  # go by row. So compare where all 600 are handed over.
  exclude = _ranges(rng, 70, 600)
  found = search.search(queries, 150, exclude)
  expected = _reference(table, queries, 150, exclude)
  np.testing.assert_array_equal(found, expected)


def test_scann_tree_finds_what_exact_search_finds(tmp_path):
  table = _clustered(scann.BRUTE_FORCE)
  queries = _clustered(200, seed=0)[:100] + 0.1
  config = config_lib.MipsConfig(backend='scann')
  search = search_lib.make_search(config, table)
  assert search._leaves == 283
  exact = search_lib.ExactSearch(table)
  assert _recall(search, exact, queries) > 0.95
  # The candidates are ranked exactly.
  found = search.search(queries, 8)
  scores = np.einsum('BE,BKE->BK', queries, table[found])
  assert (np.diff(scores, axis=1) <= 1e-4).all()
  # Excluding what was best brings up the next, and never fewer than k.
  best = found[:, :1].astype(np.int64)
  exclude = np.stack([best, best + 1], axis=-1)
  again = search.search(queries, 7, exclude)
  assert not (again == best).any()
  assert search_lib.overlap(again, found[:, 1:]) > 0.95
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
  loaded = search_lib.make_search(
      config, table, saved=tmp_path / 'here'
  )
  np.testing.assert_array_equal(loaded.search(queries, 8), found)


def test_scann_refuses_what_it_did_not_write(tmp_path):
  table = np.ones((30, 4), np.float32)
  config = config_lib.MipsConfig(backend='scann')
  with pytest.raises(FileNotFoundError, match='no ScaNN index'):
    search_lib.make_search(config, table, saved=tmp_path)
  search_lib.make_search(config, table).save(tmp_path)
  (tmp_path / 'scann_docids.pkl').write_bytes(b'cos\nsystem\n')
  with pytest.raises(ValueError, match='pickle'):
    search_lib.make_search(config, table, saved=tmp_path)
  config.num_leaves = 31
  with pytest.raises(ValueError, match='more than the 30 rows'):
    search_lib.make_search(config, table)


@pytest.mark.parametrize(
    'rows, expected',
    [
        (1000, (0, 0, 100)),
        (20_000, (283, 68, 100)),
        (1_000_000, (2000, 179, 167)),
        (13_353_718, (7309, 342, 472)),
    ],
)
def test_settings_of_scann_follow_from_the_rows_unless_given(rows, expected):
  config = config_lib.MipsConfig(backend='scann')
  assert scann.settings(config, rows) == expected
  config.num_leaves, config.leaves_to_search, config.reorder = 20, 3, 50
  assert scann.settings(config, rows) == (20, 3, 50)


def test_recall_counts_common_rows():
  a = np.array([[0, 1, 2, 3], [4, 5, 6, 7]])
  b = np.array([[3, 2, 9, 8], [7, 6, 5, 4]])
  assert search_lib.overlap(a, b) == 0.75


# ----------------------------------------------------------- removed, streamed


@pytest.mark.parametrize('shape', [(1, 1), (8, 1), (4, 2), (2, 4)])
def test_removed_rows_are_as_if_excluded_on_any_mesh(shape):
  rng = np.random.default_rng(5)
  table, queries = _integers(rng, 1500, 8), _integers(rng, 6, 8)
  removed = np.sort(rng.choice(1500, 600, replace=False))
  removed = np.union1d(removed, np.arange(1200, 1500))
  exclude = _ranges(rng, 6, 1500)
  for backend in ('exact', 'approx'):
    search = search_lib.make_search(
        config_lib.MipsConfig(backend=backend),
        table,
        _mesh(*shape),
        removed=removed,
    )
    assert search.num_documents == 1500
    for ranges in (None, exclude):
      np.testing.assert_array_equal(
          search.search(queries, 9, ranges),
          _reference(table, queries, 9, ranges, {*removed.tolist()}),
      )


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.data())
def test_how_many_rows_are_left_is_counted(data):
  """Ranges overlap each other and what is removed; a row counts once."""
  rows = 40
  number = st.integers(0, rows + 3)
  ranges = data.draw(st.lists(st.tuples(number, number), max_size=5))
  removed = data.draw(st.sets(st.integers(0, rows - 1), max_size=30))
  exclude = np.array(ranges, np.int64).reshape(1, -1, 2)
  gone = set(removed)
  for start, limit in ranges:
    gone |= {*range(start, min(limit, rows))}
  table = np.arange(rows, dtype=np.float32)[:, None]
  search = scann.ScannSearch(
      table,
      config_lib.MipsConfig(backend='scann'),
      removed=np.array(sorted(removed), np.int64),
  )
  left = [row for row in reversed(range(rows)) if row not in gone]
  query = np.ones((1, 1), np.float32)
  if left:
    found = search.search(query, len(left), exclude)
    assert found[0].tolist() == left
  with pytest.raises(ValueError, match=f'may have only {len(left)}:'):
    search.search(query, len(left) + 1, exclude)


@pytest.mark.parametrize('shape', [(1, 1), (4, 2)])
def test_a_streamed_table_gives_what_one_on_the_devices_gives(
    shape, monkeypatch
):
  monkeypatch.setattr(search_lib, '_STREAMED_ROWS', 1024)
  rng = np.random.default_rng(6)
  table, queries = _integers(rng, 2500, 8), _integers(rng, 5, 8)
  removed = np.sort(rng.choice(2500, 1000, replace=False))
  exclude = _ranges(rng, 5, 2500)
  for dtype in ('float32', 'bfloat16'):
    before = topk.top_rows._cache_size()
    search = search_lib.StreamedSearch(table, _mesh(*shape), dtype, removed)
    found = search.search(queries, 30, exclude)
    # The last part, which is padded, too.
    assert topk.top_rows._cache_size() - before == 1
    whole = search_lib.ExactSearch(table, _mesh(*shape), dtype, removed)
    np.testing.assert_array_equal(found, whole.search(queries, 30, exclude))


def test_the_top_of_many_groups_with_ties_across_them():
  rng = np.random.default_rng(7)
  score = rng.integers(0, 4, (6, 128 * 40)).astype(np.float32)
  score[0] = 1  # All are equal.
  score[1] = -np.inf
  score[2, :300] = -np.inf
  for k in (1, 8, 19, 20):  # With 20 of 40 groups it looks at every score.
    for got, want in zip(
        topk._top(jnp.asarray(score), k),
        jax.lax.top_k(score, k),
        strict=True,
    ):
      np.testing.assert_array_equal(got, want)


# ------------------------------------------------------------- scann, in parts


@pytest.fixture(scope='module')
def parts():
  """Rows added in parts of 700, the last of them smaller."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scann, '_PART_ROWS', 700)
    table = _clustered(6000)
    config = config_lib.MipsConfig(
        backend='scann', num_leaves=60, leaves_to_search=30
    )
    yield table, config, search_lib.make_search(config, table)


def test_scann_built_in_parts_numbers_the_rows_as_the_table(parts, tmp_path):
  table, config, search = parts
  # The row itself is its own best by far, once it is longer.
  rows = np.arange(0, 6000, 97)
  queries = 3 * table[rows]
  exact = search_lib.ExactSearch(table)
  assert _recall(search, exact, queries) > 0.95
  search.save(tmp_path)
  assert not list(tmp_path.glob('dataset*'))  # Codes, but no vectors.
  loaded = search_lib.make_search(config, table, saved=tmp_path)
  np.testing.assert_array_equal(
      loaded.search(queries, 8), search.search(queries, 8)
  )
  with pytest.raises(ValueError, match='of 6000 rows; the table has 5999'):
    search_lib.make_search(config, table[:-1], saved=tmp_path)


def test_scann_never_finds_removed_rows_however_many(parts, tmp_path):
  table, config, built = parts
  built.save(tmp_path)
  rng = np.random.default_rng(8)
  queries = table[rng.integers(0, 6000, 64)] + 0.1
  some = np.sort(rng.choice(6000, 3000, replace=False))
  # Those that are like the queries: whole leaves hold nothing else.
  exact = search_lib.ExactSearch(table)
  near = np.unique(exact.search(queries, 250))
  for removed in (some, near, np.arange(20, 6000)):
    search = scann.ScannSearch(table, config, tmp_path, removed)
    found = search.search(queries, 8)
    assert not np.isin(found, removed).any()
    expected = search_lib.ExactSearch(table, removed=removed).search(queries, 8)
    assert search_lib.overlap(found, expected) > 0.95
  # 20 rows are left: all of them, by exact search in the end.
  np.testing.assert_array_equal(found, expected)


def test_scann_with_queries_that_are_not_finite(parts):
  table, _, tree = parts
  small = search_lib.make_search(
      config_lib.MipsConfig(backend='scann'), table[:50]
  )
  for search in (tree, small):
    queries = np.full((2, 32), np.nan, np.float32)
    queries[1] = np.inf
    for row in search.search(queries, 8):
      assert len({*row.tolist()}) == 8
