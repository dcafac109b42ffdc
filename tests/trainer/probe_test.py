"""The probe: what a stale index still finds, against brute force."""

import types

import jax
import numpy as np
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import probe as probe_lib
from realm_jax.trainer import stages


@pytest.fixture(scope='module')
def job(world):
  config = config_lib.resolve(training_test.make_config(world, 'realm'))
  corpus = corpus_lib.Corpus.open(world)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  components = stages.components_of(config)
  return types.SimpleNamespace(
      config=config,
      corpus=corpus,
      components=components,
      mesh=mesh_lib.make_mesh(config.mesh),
      stage=stages.load(config)(config, corpus),
  )


def _embed_all(job, params):
  return embedding.PassageEmbedder(
      job.components['embedder'], job.corpus.passages, job.corpus.tokenizer,
      job.config.lengths.document, job.mesh,
  )(params)


def test_overlap_with_current_equals_brute_force(job):
  stale, other = (job.components['embedder'].init(seed) for seed in (0, 1))
  fresh = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, stale, other)
  search = search_lib.ExactSearch(_embed_all(job, stale))
  probe = probe_lib.Probe(job)
  found = probe.overlap_with_current(fresh, search)
  query_emb_BE = probe.embed(fresh)
  old_NE, new_NE = _embed_all(job, stale), _embed_all(job, fresh)
  k, shares = job.config.num_candidates - 1, []
  for query_E, (first, limit) in zip(
      query_emb_BE, probe._exclude_BR2[:, 0], strict=True
  ):
    allowed = np.delete(np.arange(len(old_NE)), np.arange(first, limit))
    pool = allowed[np.argsort(-(old_NE[allowed] @ query_E), kind='stable')]
    pool = pool[: probe_lib._POOL]
    again = pool[np.argsort(-(new_NE[pool] @ query_E), kind='stable')]
    shares.append(len(set(pool[:k]) & set(again[:k])) / k)
  np.testing.assert_allclose(found, np.mean(shares), atol=0.02)  # Near ties.
  assert 0 < found < 0.9
  # With the parameters that the index was made from, all of it is right.
  assert probe.overlap_with_current(stale, search) >= 0.98
  assert probe._embedder.documents._cache_size() == 1


def test_of_many_candidates_more_are_embedded(job):
  """A pool of only k candidates would always overlap fully."""
  stale, other = (job.components['embedder'].init(seed) for seed in (0, 1))
  search = search_lib.ExactSearch(_embed_all(job, stale))
  probe = probe_lib.Probe(job)
  probe.k = len(job.corpus.passages) // 4
  fresh = probe.overlap_with_current(other, search)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(probe_lib, '_POOL', probe.k)
    assert probe.overlap_with_current(other, search) == fresh < 0.9
    patch.setattr(probe_lib, '_POOL_OF_K', 1)
    assert probe.overlap_with_current(other, search) == 1


def test_the_same_queries_and_result_on_one_device(job):
  stale, other = (job.components['embedder'].init(seed) for seed in (0, 1))
  params = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, stale, other)
  table = _embed_all(job, stale)
  one = jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )
  alone = types.SimpleNamespace(**{**vars(job), 'mesh': one})
  probes = [probe_lib.Probe(job), probe_lib.Probe(alone)]
  np.testing.assert_array_equal(
      probes[0]._query_ids_BQ, probes[1]._query_ids_BQ
  )
  assert len(probes[0]._query_ids_BQ) > 16
  found = [
      probe.overlap_with_current(params, search_lib.ExactSearch(table))
      for probe in probes
  ]
  np.testing.assert_allclose(*found, atol=0.02)
