"""Length-bucketed batches change no embedding."""

import builder_test
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import embedding
from realm_jax.runtime import mesh as mesh_lib

corpus, config = builder_test.corpus, builder_test.config
component, check_some = builder_test.component, builder_test.check_some


@pytest.fixture
def mesh():
  return mesh_lib.make_mesh(config_lib.MeshConfig(data=4, model=2))


@pytest.mark.parametrize('widths', [[24], [8, 12, 16, 24]])
def test_buckets_and_devices_change_no_embedding(
    corpus, component, check_some, mesh, monkeypatch, widths
):
  assert corpus.passages.lengths.max() > 24  # Some are cut.
  monkeypatch.setattr(embedding, '_widths', lambda *_: widths)
  embedder = embedding.PassageEmbedder(
      component, corpus.passages, corpus.tokenizer, 24, mesh, batch_tokens=700
  )
  params = component.init(seed=0)
  seen = []
  found = embedder(params, progress=seen.append)
  check_some(found, params, 24)
  assert sum(seen) == len(corpus.passages)
  assert embedder._encoder._encode._cache_size() <= len(widths)
  # A part is that part of the whole; parameters are not baked in.
  part = embedder(params, range(11, 40))
  np.testing.assert_allclose(part, found[11:40], atol=2e-6)
  other = embedder(component.init(seed=1))
  assert np.abs(other - found).max() > 0.1
  assert embedder._encoder._encode._cache_size() <= len(widths)


def test_number_of_streams_changes_no_bit(corpus, component, mesh):
  embedder = embedding.PassageEmbedder(
      component, corpus.passages, corpus.tokenizer, 24, mesh, batch_tokens=700
  )
  params = component.init(seed=0)
  found = []
  for streams in (1, 5):
    embedder._encoder._streams = streams
    found.append(embedder(params, range(60)))
  np.testing.assert_array_equal(*found)


def test_error_of_a_batch_is_raised(mesh):
  encoder = embedding.RowEncoder(
      lambda params, *arrays: arrays[0], np.full(99, 9), 16, mesh, 1
  )

  def assemble(rows, width):
    if 70 in rows:
      raise OSError('disk')
    return (np.zeros((len(rows), width), np.int32),)

  with pytest.raises(OSError, match='disk'):
    list(encoder({}, np.arange(99), assemble))


def test_widths_are_few_and_pay_for_themselves():
  def widths(lengths, most):
    return embedding._widths(np.array(lengths), most, 2**16)

  assert widths([20] * 100, 288) == [24]
  assert widths([20, 70] * 100, 288) == [72]
  assert widths([20, 70] * 100_000, 288) == [24, 72]
  assert widths([20, 288] * 100_000, 288) == [24, 288]
  assert widths([5], 7) == [7]
  even = np.arange(8, 289).repeat(1_000)
  assert 8 <= len(widths(even, 288)) <= 20
  assert widths(even, 300)[-1] == 288


def test_only_a_large_encoder_has_more_widths(mesh):
  lengths = np.arange(8, 129).repeat(1_000)

  def widths(flop):
    encode = lambda params, *arrays: arrays[0]  # noqa: E731
    return embedding.RowEncoder(encode, lengths, 128, mesh, flop=flop)._widths

  assert widths(1e6) == widths(0)
  assert len(widths(1e8)) > 1.5 * len(widths(0))


def test_batches_are_static_and_mostly_full(corpus, mesh):
  encoder = embedding.RowEncoder(
      lambda params, *arrays: arrays[0],
      corpus.passages.lengths,
      40,
      mesh,
      2**14,
  )
  lengths = np.minimum(corpus.passages.lengths, 40)
  sizes = dict(zip(encoder._widths, encoder._batch_rows, strict=True))
  for rows in (np.arange(len(lengths)), np.arange(7, 60), np.array([3])):
    seen = []
    for mine, width, size in encoder._batches(lengths[rows]):
      assert size == sizes[width] and size % mesh.size == 0
      assert 0 < len(mine) <= size
      assert (lengths[rows[mine]] <= width).all()
      seen.extend(mine)
    assert sorted(seen) == [*range(len(rows))]  # Each once.


def test_rests_join_the_next_width(mesh, monkeypatch):
  monkeypatch.setattr(embedding, '_widths', lambda *_: [10, 20, 40])
  lengths = [5] * 9 + [15] * 7 + [35]
  encoder = embedding.RowEncoder(
      lambda params, *arrays: arrays[0], np.array(lengths), 40, mesh, 1
  )
  encoder._batch_rows = [8, 8, 8]
  batches = [
      ([lengths[i] for i in mine], width)
      for mine, width, _ in encoder._batches(np.array(lengths))
  ]
  assert batches == [([5] * 8, 10), ([5] + [15] * 7, 20), ([35], 40)]
