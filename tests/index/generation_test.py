"""Generations on disk: whole or not there, and of this job or refused."""

import dataclasses
import json
import os
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import generation
from realm_jax.index import scann
from realm_jax.index import search as search_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

_ROWS, _WIDTH = 500, 8
_LINEAGE = generation.Lineage(
    step=20,
    params_digest='a' * 64,
    tokenizer_digest='b' * 64,
    corpus_fingerprint='c' * 64,
    num_rows=_ROWS,
    width=_WIDTH,
)


@pytest.fixture
def table():
  return (
      np.random.default_rng(0).normal(size=(_ROWS, _WIDTH)).astype(np.float32)
  )


@pytest.fixture
def small_shards(monkeypatch):
  monkeypatch.setattr(generation, 'ROWS_PER_SHARD', 128)


def _publish(directory, table, **config):
  return helpers.publish(
      directory, _LINEAGE, table, config_lib.MipsConfig(**config)
  )


def test_what_is_published_is_loaded(tmp_path, table, small_shards):
  path = _publish(tmp_path, table)
  assert path == tmp_path / '20'
  assert checkpoint.steps_in(tmp_path) == [20]
  assert os.listdir(tmp_path) == ['20']  # Nothing temporary is left.
  assert sorted(os.listdir(path)) == [
      'manifest.json', *(f'shard-{i:05d}.npy' for i in range(4))
  ]
  loaded = generation.load(path, _LINEAGE)
  assert loaded.lineage == _LINEAGE
  np.testing.assert_array_equal(loaded.embeddings[:], table)
  search = loaded.make_search(config_lib.MipsConfig(), None)
  np.testing.assert_array_equal(
      search.search(table[:9], 5),
      search_lib.ExactSearch(table).search(table[:9], 5),
  )


def test_a_table_of_shards_reads_like_one_array(tmp_path, table, small_shards):
  loaded = generation.load(_publish(tmp_path, table)).embeddings
  assert loaded.shape == table.shape and len(loaded) == _ROWS
  for rows in (
      slice(0, 1), slice(100, 300), slice(127, 129), slice(128, 256),
      slice(384, 9999), slice(7, 7), slice(None), slice(-5, None),
  ):
    np.testing.assert_array_equal(loaded[rows], table[rows])
  rows = np.array([499, 0, 128, 127, 255, 256, 128])
  np.testing.assert_array_equal(loaded[rows], table[rows])
  assert loaded[np.zeros(0, np.int64)].shape == (0, _WIDTH)
  with pytest.raises(ValueError, match='step 1'):
    loaded[::2]


def test_bfloat16_halves_the_files(tmp_path, table):
  path = _publish(tmp_path, table, dtype='bfloat16')
  assert (path / 'shard-00000.npy').stat().st_size < table.nbytes / 2 + 200
  loaded = generation.load(path).embeddings
  assert loaded.dtype == jnp.bfloat16
  np.testing.assert_array_equal(loaded[:], table.astype(jnp.bfloat16))


def test_scann_assets_and_measured_recall(tmp_path, monkeypatch):
  monkeypatch.setattr(scann, 'BRUTE_FORCE', 400)
  rng = np.random.default_rng(0)
  table = rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32)
  config = config_lib.MipsConfig(backend='scann')
  loaded = generation.load(_publish(tmp_path, table, backend='scann'))
  assert loaded.manifest['recall']['value'] > 0.9
  assert loaded.manifest['recall']['k'] == 8
  assert (loaded.path / 'scann' / 'scann_assets.pbtxt').is_file()
  built = []
  make = search_lib.make_search

  def spy(config, table, mesh, directory, removed):
    built.append(directory)
    return make(config, table, mesh, directory, removed)

  monkeypatch.setattr(search_lib, 'make_search', spy)
  expected = make(config_lib.MipsConfig(), table).search(table[:50], 3)
  for leaves in (0, 7):  # Other settings: the saved index does not serve.
    config.num_leaves = leaves
    found = loaded.make_search(config, None).search(table[:50], 3)
    assert search_lib.overlap(found, expected) > 0.9
  assert built == [loaded.path / 'scann', None]
  # A trainer that wants another backend finds all it needs.
  search = loaded.make_search(config_lib.MipsConfig(), None)
  np.testing.assert_array_equal(search.search(table[:50], 3), expected)


@pytest.mark.parametrize(
    'field, value',
    [
        ('step', 40),
        ('params_digest', 'x' * 64),
        ('tokenizer_digest', 'y' * 64),
        ('corpus_fingerprint', 'z' * 64),
        ('num_rows', 501),
        ('width', 16),
    ],
)
def test_another_jobs_generation_is_refused_with_both_sides(
    tmp_path, table, field, value
):
  path = _publish(tmp_path, table)
  expected = dataclasses.replace(_LINEAGE, **{field: value})
  with pytest.raises(ValueError) as error:
    generation.load(path, expected)
  message = str(error.value)
  assert field in message and str(path) in message
  assert repr(value) in message
  assert repr(getattr(_LINEAGE, field)) in message
  # Fields without an expectation are not compared.
  generation.load(path, dataclasses.replace(_LINEAGE, **{field: None}))


def _flip(path, at):
  data = bytearray(path.read_bytes())
  data[at] ^= 1
  path.write_bytes(bytes(data))


@pytest.mark.parametrize('at', [0, 60, 300, -1])
def test_one_flipped_bit_in_a_shard(tmp_path, table, small_shards, at):
  path = _publish(tmp_path, table)
  _flip(path / 'shard-00002.npy', at)
  with pytest.raises(files.Damaged, match='shard-00002.npy has sha256'):
    generation.load(path)


def test_any_flipped_bit_of_the_manifest(tmp_path, table):
  path = _publish(tmp_path, table)
  size = (path / 'manifest.json').stat().st_size
  whole = (path / 'manifest.json').read_bytes()
  accepted = generation.read_manifest(path)
  for at in range(0, size, 3):
    _flip(path / 'manifest.json', at)
    try:
      # White space may become other white space: then nothing has changed.
      assert generation.read_manifest(path) == accepted
    except files.Damaged as error:
      assert str(path) in str(error)
    except ValueError as error:
      assert 'newer realm_jax' in str(error)
    (path / 'manifest.json').write_bytes(whole)
  for cut in (0, 1, size // 2, size - 2):
    (path / 'manifest.json').write_bytes(whole[:cut])
    with pytest.raises(files.Damaged):
      generation.load(path)


def test_truncated_missing_and_foreign_files(tmp_path, table, small_shards):
  path = _publish(tmp_path, table)
  shard = path / 'shard-00001.npy'
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-1])
  with pytest.raises(files.Damaged) as error:
    generation.load(path)
  assert f'bytes {len(whole) - 1}' in str(error.value)
  assert str(len(whole)) in str(error.value)
  assert f'realm-jax index --workdir={tmp_path.parent} --step=20' in str(
      error.value
  )
  shard.unlink()
  with pytest.raises(files.Damaged, match='shard-00001.npy is not there'):
    generation.load(path)
  with pytest.raises(FileNotFoundError, match='no index generation'):
    generation.load(tmp_path / '40')


def test_a_newer_format_is_named_as_such(tmp_path, table):
  path = _publish(tmp_path, table)
  manifest = json.loads((path / 'manifest.json').read_text())
  manifest['format_version'] = generation.FORMAT_VERSION + 1
  manifest['what_we_cannot_know'] = {}
  (path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match='newer realm_jax.*format 1') as error:
    generation.load(path)
  assert not isinstance(error.value, files.Damaged)


def test_nothing_is_published_without_all_rows(tmp_path, table):
  with pytest.raises(ValueError, match='400 embeddings.*500'):
    _publish(tmp_path, table[:400])
  assert os.listdir(tmp_path) == []
  table[130, 3] = np.nan
  with pytest.raises(ValueError, match='document 130.*step 20.*not finite'):
    _publish(tmp_path, table)
  assert os.listdir(tmp_path) == []
  with pytest.raises(ValueError, match='width 4.*8'):
    _publish(tmp_path, table[:, :4])
  assert os.listdir(tmp_path) == []


def test_a_step_is_replaced_and_a_mapped_table_lives_on(tmp_path, table):
  old = generation.load(_publish(tmp_path, table)).embeddings
  new = generation.load(_publish(tmp_path, table + 1)).embeddings
  np.testing.assert_array_equal(old[:], table)
  np.testing.assert_array_equal(new[:], table + 1)
  files.remove(tmp_path / '20')
  files.remove(tmp_path / '20')  # Twice is no error.
  assert os.listdir(tmp_path) == []
  np.testing.assert_array_equal(new[:], table + 1)


def test_a_generation_may_be_moved(tmp_path, table):
  _publish(tmp_path / 'a', table, backend='scann')
  shutil.move(tmp_path / 'a', tmp_path / 'b')
  loaded = generation.load(tmp_path / 'b' / '20', _LINEAGE)
  search = loaded.make_search(config_lib.MipsConfig(backend='scann'), None)
  exact = search_lib.ExactSearch(
      table, jax.sharding.Mesh(jax.devices()[:2], 'data')
  )
  np.testing.assert_array_equal(
      search.search(table[:20], 4), exact.search(table[:20], 4)
  )


def test_leftovers_and_marks(tmp_path, table):
  _publish(tmp_path, table)
  (tmp_path / '.tmp-40-123-abc').mkdir()
  (tmp_path / '.tmp-40-123-abc' / 'shard-00000.npy').write_bytes(b'half')
  assert checkpoint.steps_in(tmp_path) == [20]
  assert generation.remove_leftovers(tmp_path) == ['.tmp-40-123-abc']
  assert os.listdir(tmp_path) == ['20']
  assert generation.in_use(tmp_path) == set()
  generation.mark_in_use(tmp_path, [20, 40])
  assert generation.in_use(tmp_path) == {20, 40}
