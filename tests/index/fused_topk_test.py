"""The kernel of fused search, emulated on a CPU, against plain search."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.config import validation
from realm_jax.index import fused_topk
from realm_jax.index import search as search_lib
from realm_jax.index import topk
from realm_jax.runtime import mesh as mesh_lib

_WIDTH = 96


def _ranges(rng, size, rows):
  start = rng.integers(0, rows, (size, 2))
  limit = start + rng.integers(-2, rows // 3, (size, 2))
  return np.clip(np.stack([start, limit], axis=-1), 0, rows).astype(np.int32)


def _plain_and_fused(search, queries, exclude, k):
  part = search._part
  return [
      topk.search(part, queries, exclude, search._mesh, k, fused=fused)
      for fused in (False, True)
  ]


def _calls(monkeypatch):
  """Returns the list of the shapes of tables that the kernel is given."""
  shapes, group_maxima = [], fused_topk.group_maxima

  def counted(query, table, *args):
    shapes.append(table.shape)
    return group_maxima(query, table, *args)

  monkeypatch.setattr(fused_topk, 'group_maxima', counted)
  return shapes


@pytest.mark.parametrize('devices', [1, 8])
def test_same_rows_with_ties_exclusions_and_removed_rows(devices, monkeypatch):
  mesh = mesh_lib.one_device()
  if devices > 1:
    mesh = mesh_lib.make_mesh(config_lib.MeshConfig(model=2))
  assert mesh.size == devices
  rng = np.random.default_rng(0)
  rows, size, k = devices * 128 * 25 - 5, 21, 3
  shapes = _calls(monkeypatch)
  jax.clear_caches()
  # Small integers: sums are exact in any order, and ties abound.
  table = rng.integers(-2, 3, (rows, _WIDTH)).astype(np.float32)
  queries = rng.integers(-2, 3, (size, _WIDTH)).astype(np.float32)
  table[[900, 901, 2500]] = table[3]  # Equal scores, in other groups, too.
  queries[0] = 10 * table[3]
  removed = np.sort(rng.choice(rows, rows // 3, replace=False))
  for hidden in (None, removed):
    search = search_lib.ExactSearch(table, mesh, 'bfloat16', hidden)
    for exclude in (
        np.zeros((size, 1, 2), np.int32),
        _ranges(rng, size, rows),
        np.tile(np.array([[[0, 3000], [1500, rows - k]]]), (size, 1, 1)),
    ):
      if hidden is not None and exclude[0, -1, 1] == rows - k:
        continue  # Fewer than k rows are left.
      plain, fused = _plain_and_fused(search, queries, exclude, k)
      np.testing.assert_array_equal(plain[0], fused[0])
      np.testing.assert_array_equal(plain[1], fused[1])
  assert set(shapes) == {(128 * 25, _WIDTH)}
  jax.clear_caches()


@pytest.mark.parametrize(
    ('size', 'width'), [(1, 32), (64, 128), (130, 128), (40, 384)]
)
def test_real_numbers(size, width, monkeypatch):
  shapes = _calls(monkeypatch)
  rng = np.random.default_rng(size)
  table = rng.normal(size=(128 * 40, width)).astype(jnp.bfloat16)
  queries = rng.normal(size=(size, width)).astype(np.float32)
  search = search_lib.ExactSearch(table, dtype='bfloat16')
  exclude = _ranges(rng, size, len(table))
  plain, fused = _plain_and_fused(search, queries, exclude, 8)
  np.testing.assert_array_equal(plain[1], fused[1])
  np.testing.assert_allclose(plain[0], fused[0], rtol=1e-6)
  assert shapes


def test_the_maxima_of_groups():
  rng = np.random.default_rng(1)
  rows, first = 128 * 11, 1000  # Not a multiple of the groups of a program.
  table = jnp.asarray(rng.normal(size=(rows, _WIDTH)), jnp.bfloat16)
  queries = jnp.asarray(rng.normal(size=(2, 37, _WIDTH)), jnp.bfloat16)
  hidden = rng.random(rows) < 0.3
  hidden[256:384] = True
  exclude = _ranges(rng, 37, rows) + first
  found = fused_topk.group_maxima(
      queries, table, jnp.asarray(hidden), jnp.asarray(exclude),
      jnp.int32(first), interpret=True,
  )
  score = np.asarray(queries, np.float64).sum(0) @ np.asarray(table, float).T
  row = first + np.arange(rows)
  excluded = (row >= exclude[..., :1]) & (row < exclude[..., 1:])
  score[hidden | excluded.any(axis=1)] = -np.inf
  expected = score.reshape(37, -1, fused_topk.GROUP).max(axis=2)
  assert np.isneginf(expected[:, 2]).all()
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_queries_that_are_not_finite_get_allowed_rows(monkeypatch):
  shapes = _calls(monkeypatch)
  table = np.random.default_rng(0).normal(size=(128 * 20, 32))
  search = search_lib.ExactSearch(table.astype(np.float32), dtype='bfloat16')
  queries = np.full((2, 32), np.nan, np.float32)
  queries[1] = -np.inf
  exclude = np.tile(np.array([[[0, 2500]]], np.int32), (2, 1, 1))
  _, (_, rows) = _plain_and_fused(search, queries, exclude, 2)
  for row in rows:
    assert len(set(row)) == 2
    assert row.min() >= 2500
  assert shapes


def test_a_small_table_needs_no_kernel(monkeypatch):
  shapes = _calls(monkeypatch)
  table = np.eye(32, dtype=np.float32)
  search = search_lib.ExactSearch(table, dtype='bfloat16')
  exclude = np.zeros((32, 1, 2), np.int32)
  _, (_, rows) = _plain_and_fused(search, table, exclude, 1)
  np.testing.assert_array_equal(rows[:, 0], np.arange(32))
  assert not shapes


def test_tables_that_the_kernel_takes():
  assert fused_topk.takes(13_353_728, 128, 15)
  assert not fused_topk.takes(13_353_728, 256, 15)  # Beyond int32.
  assert fused_topk.takes(128 * 30, 128, 15)
  assert not fused_topk.takes(128 * 30 - 1, 128, 15)


def test_the_kernel_lowers_for_cuda():
  def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  lowered = jax.jit(fused_topk.group_maxima).trace(
      array(jnp.bfloat16, 2, 64, 128),
      array(jnp.bfloat16, 128 * 40, 128),
      array(jnp.bool_, 128 * 40),
      array(jnp.int32, 64, 1, 2),
      array(jnp.int32),
  ).lower(lowering_platforms=('cuda',))
  assert 'triton' in lowered.as_text()


@pytest.mark.parametrize(
    ('platform', 'values', 'fused'),
    [
        ('gpu', {}, True),
        ('cpu', {}, False),
        ('tpu', {}, False),
        ('gpu', {'kernel': 'xla'}, False),
        ('gpu', {'dtype': 'float32'}, False),
    ],
)
def test_the_kernel_is_chosen_by_config_and_device(
    platform, values, fused, monkeypatch
):
  config = config_lib.MipsConfig(dtype='bfloat16', kernel='pallas')
  for name, value in values.items():
    setattr(config, name, value)
  runs_on = fused_topk.runs_on
  monkeypatch.setattr(
      fused_topk, 'runs_on',
      lambda _, *args: runs_on(types.SimpleNamespace(platform=platform), *args),
  )
  shapes = _calls(monkeypatch)
  jax.clear_caches()
  table = np.random.default_rng(0).normal(size=(128 * 22, 32))
  search = search_lib.make_search(config, table.astype(np.float32))
  plain = search_lib.ExactSearch(table.astype(np.float32), None, config.dtype)
  queries = table[:5].astype(np.float32)
  np.testing.assert_array_equal(
      search.search(queries, 3), plain.search(queries, 3)
  )
  assert bool(shapes) == fused


def test_widths_that_the_kernel_multiplies():
  device = types.SimpleNamespace(platform='gpu')
  widths = [16, 32, 100, 128, 312, 384, 768, 1024, 2048]
  assert [w for w in widths if fused_topk.runs_on(device, 'bfloat16', w)] == [
      32, 128, 384, 768, 1024,
  ]


def test_the_kernel_does_not_change_the_job():
  config = config_lib.Config(corpus='corpus')
  config.mips.dtype = 'bfloat16'
  before = validation.digest(config)
  config.mips.kernel = 'pallas'
  assert validation.digest(config) == before


def test_float32_tables_are_refused_by_name():
  config = config_lib.Config(corpus='corpus')
  config.mips.kernel = 'pallas'
  with pytest.raises(ValueError, match='mips.kernel.*bfloat16, not float32'):
    validation.validate(config)
