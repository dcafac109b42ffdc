"""BERT, the embedder and the reader: padding, dropout, towers, dtypes."""

import dataclasses
import functools

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import inputs
from realm_jax.models import bert
from realm_jax.models import components
from realm_jax.models import dropout
from realm_jax.models import objectives
from realm_jax.models import span_reader
from realm_jax.trainer.stages import realm

CONFIG = config_lib.resolve(
    config_lib.Config(
        model=config_lib.ModelConfig(
            preset='tiny', width=16, num_heads=2, vocab_size=50,
            embedding_width=8, max_positions=32, init_stddev=0.5,
        )
    )
).model
NULL = inputs.Null((1, 2, 2), (0, 0, 1))


def _ids(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(5, 50, size=shape).astype(np.int32)


def _embed(config, method='embed_document', ids=None, types=None, noise=None):
  embedder = components.make('embedder', config)
  args = (ids,) if method == 'embed_query' else (ids, types)
  return getattr(embedder.module(embedder.init(0)), method)(*args, noise)


def test_padding_does_not_matter():
  ids = _ids(3, 7)
  types = np.zeros_like(ids)
  padded = np.pad(ids, ((0, 0), (0, 5)))
  np.testing.assert_allclose(
      _embed(CONFIG, ids=ids, types=types),
      _embed(CONFIG, ids=padded, types=np.pad(types, ((0, 0), (0, 5)))),
      atol=1e-5,
  )


def test_padding_gets_no_gradient():
  embedder = components.make('embedder', CONFIG)
  params = embedder.init(0)
  ids = np.pad(_ids(2, 6), ((0, 0), (0, 4)))

  def loss(params):
    return embedder.module(params).embed_query(ids).sum()

  grads = jax.grad(loss)(params)
  assert not np.any(grads['encoder.bert.word_embed.embedding'][0])
  assert not np.any(grads['encoder.bert.position_embed.embedding'][6:])
  assert np.any(grads['encoder.bert.position_embed.embedding'][:6])


@pytest.mark.parametrize('name', ['word', 'position', 'segment'])
def test_everything_else_matters(name):
  ids, types = _ids(1, 8), np.zeros((1, 8), np.int32)
  before = _embed(CONFIG, ids=ids, types=types)
  if name == 'word':
    ids = ids.copy()
    ids[0, 5] = 5 + (ids[0, 5] - 4) % 45
  elif name == 'position':
    ids = np.concatenate([ids[:, :1], ids[:, :0:-1]], axis=1)
  else:
    types = np.array([[0] * 4 + [1] * 4], np.int32)
  assert np.abs(before - _embed(CONFIG, ids=ids, types=types)).max() > 1e-3


def test_the_last_layer_at_some_positions_is_the_last_layer_there():
  component = components.make('reader', CONFIG)
  reader = component.module(component.init(0))
  ids, types = _ids(2, 9), np.zeros((2, 9), np.int32)
  everywhere = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
  some = np.array([[4, 0], [8, 4]], np.int32)
  all_logits = reader.mlm_logits(ids, types, everywhere)
  logits = reader.mlm_logits(ids, types, some)
  np.testing.assert_allclose(
      logits,
      np.take_along_axis(np.asarray(all_logits), some[..., None], axis=1),
      atol=2e-5,
  )


def test_token_logp_is_a_log_probability():
  component = components.make('reader', CONFIG)
  reader = component.module(component.init(0))
  ids, types = _ids(1, 6), np.zeros((1, 6), np.int32)
  positions = np.full((1, 50), 2, np.int32)
  targets = np.arange(50, dtype=np.int32)[None]
  logp = reader.token_logp(ids, types, positions, targets)
  np.testing.assert_allclose(np.exp(logp).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ('towers', 'more', 'of_queries'),
    [
        ('shared', 0, set()),
        ('shared_bert', 4, {'query_projection'}),
        ('separate', 43, {'query_projection', 'query_encoder'}),
    ],
)
def test_towers_share_modules_and_initial_weights(towers, more, of_queries):
  config = dataclasses.replace(CONFIG, towers=towers)
  embedder = components.make('embedder', config)
  shared = components.make('embedder', CONFIG).abstract
  assert len(embedder.abstract) == len(shared) + more
  ids = _ids(2, 6)

  def embed(params):
    bound = embedder.module(params)
    return (
        np.asarray(bound.embed_query(ids)),
        np.asarray(bound.embed_document(ids, np.zeros_like(ids))),
    )

  params = embedder.init(0)
  query, document = embed(params)
  np.testing.assert_allclose(query, document, rtol=1e-6)
  for module in ('projection', 'encoder', *sorted(of_queries)):
    rng = np.random.default_rng(0)
    moved = {
        name: x + rng.normal(size=x.shape).astype(np.float32)
        if name.startswith(f'{module}.') else x
        for name, x in params.items()
    }
    moves_query, moves_document = (
        not np.allclose(before, after)
        for before, after in zip((query, document), embed(moved), strict=True)
    )
    assert moves_document == (module not in of_queries)
    own = f'query_{module}' in of_queries
    assert moves_query == (module in of_queries or not own)


def test_embedding_scale_init_bounds_the_scores():
  config = dataclasses.replace(CONFIG, embedding_scale_init=8**-0.25)
  query = _embed(config, 'embed_query', _ids(4, 6))
  np.testing.assert_allclose(
      np.square(query).sum(1), np.sqrt(8), rtol=1e-3
  )


def test_dropout_needs_a_key_and_follows_it():
  ids, types = _ids(2, 6), np.zeros((2, 6), np.int32)

  def embed(key):
    noise = key if key is None else dropout.noise(key, 2)
    return np.asarray(_embed(CONFIG, ids=ids, types=types, noise=noise))

  first = embed(jax.random.key(0))
  np.testing.assert_array_equal(first, embed(jax.random.key(0)))
  assert np.abs(first - embed(jax.random.key(1))).max() > 1e-3
  np.testing.assert_array_equal(embed(None), embed(None))


def _batch(query_ids_BQ, doc_ids_BJS, doc_types_BJS):
  """Returns a batch without what is read."""
  return realm.Batch(
      query_ids_BQ, doc_ids_BJS, doc_types_BJS, *[None] * 5
  )


def test_candidate_scores_embed_documents_without_dropout():
  component = components.make('embedder', CONFIG)
  embedder = component.module(component.init(0))
  docs, types = _ids(2, 3, 8), np.zeros((2, 3, 8), np.int32)
  batch = _batch(_ids(2, 6), docs, types)
  score = realm.candidate_scores(embedder, batch, NULL)
  query = embedder.embed_query(_ids(2, 6))
  doc = embedder.embed_document(
      docs.reshape(6, 8), types.reshape(6, 8)
  ).reshape(2, 3, 8)
  null_emb = embedder.embed_document(
      np.array([NULL.ids]), np.array([NULL.types])
  )
  np.testing.assert_allclose(score[:, 0], query @ null_emb[0], rtol=1e-4)
  np.testing.assert_allclose(
      score[:, 1:], jnp.einsum('be,bke->bk', query, doc), rtol=1e-4
  )


def test_without_a_null_document_the_others_have_all_probability():
  embedder = components.make('embedder', CONFIG)
  params = embedder.init(0)
  bound = embedder.module(params)
  arguments = (_ids(2, 6), _ids(2, 3, 8), np.zeros((2, 3, 8), np.int32))
  full = realm.candidate_scores(bound, _batch(*arguments), NULL)
  without = realm.candidate_scores(bound, _batch(*arguments), None)
  np.testing.assert_array_equal(without[:, 1:], full[:, 1:])
  mask = np.ones((2, 2), bool)
  logp = -np.arange(16, dtype=np.float32).reshape(2, 4, 2)

  def loss(score):
    return objectives.marginal_mlm(score, logp, mask)[0]

  _, aux = objectives.marginal_mlm(without, logp, mask)
  np.testing.assert_array_equal(jnp.exp(aux['retriever_logp_BK'])[:, 0], 0)
  _, alone = objectives.marginal_mlm(full[:, 1:], logp[:, 1:], mask)
  np.testing.assert_allclose(
      aux['marginal_logp_B'], alone['marginal_logp_B'], rtol=1e-6
  )
  summary = objectives.retrieval_metrics(aux, mask.any(-1))
  assert all(np.isfinite(value) for value in summary.values())
  grads = jax.grad(loss)(without)
  assert np.isfinite(grads).all() and not grads[:, 0].any()


def test_each_component_has_its_own_random_stream():
  embedder = components.make('embedder', CONFIG).init(0)
  reader = components.make('reader', CONFIG).init(0)
  assert not np.allclose(
      embedder['encoder.bert.word_embed.embedding'],
      reader['bert.word_embed.embedding'],
  )
  again = components.make('reader', CONFIG).init(0)
  for name, value in reader.items():
    np.testing.assert_array_equal(value, again[name])


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  ids, types = _ids(2, 6), np.zeros((2, 6), np.int32)
  half = _embed(config, ids=ids, types=types)
  full = _embed(CONFIG, ids=ids, types=types)
  assert half.dtype == jnp.float32
  assert not np.array_equal(half, full)
  np.testing.assert_allclose(half, full, atol=0.15)


def _products(jaxpr):
  """Yields the results of all matmuls, nested ones included."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      yield equation.outvars[0].aval
    for inner in core.jaxprs_in_params(equation.params):
      yield from _products(inner)


@pytest.mark.parametrize(
    ('name', 'method', 'outputs'),
    [
        ('reader', 'mlm_logits', 50),
        ('span_reader', 'span_logits', 1),
        ('tagger', 'label_logits', 7),
    ],
)
def test_logits_are_products_in_float32(name, method, outputs):
  # Rounded to bfloat16, a logit of 16 is wrong by up to 0.03.
  config = dataclasses.replace(
      CONFIG, compute_dtype='bfloat16', entity_types=('A', 'B', 'C')
  )
  component = components.make(name, config)
  ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
  arrays = [ids, ids] + [ids] * (name != 'tagger')
  traced = jax.make_jaxpr(
      lambda params, *arrays: getattr(component.module(params), method)(
          *arrays
      )
  )(component.abstract, *arrays)
  found = [x for x in _products(traced.jaxpr) if x.shape[-1] == outputs]
  assert [x.dtype for x in found] == [jnp.float32]
  assert traced.out_avals[0].dtype == jnp.float32


def test_scores_are_products_in_float32():
  config = dataclasses.replace(CONFIG, compute_dtype='bfloat16')
  embedder = components.make('embedder', config)

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  def scores(params, query, document):
    return realm.candidate_scores(
        embedder.module(params), _batch(query, document, document), NULL
    )

  traced = jax.make_jaxpr(scores)(embedder.abstract, ids(2, 6), ids(2, 5, 9))
  # Query by null document, and query by 5 documents.
  found = [
      x.dtype for x in _products(traced.jaxpr) if x.shape in ((2, 1), (2, 5))
  ]
  assert found == [jnp.float32] * 2
  pairs = jax.make_jaxpr(objectives.in_batch_softmax)(
      *[jax.eval_shape(lambda: jnp.zeros((2, 8)))] * 2
  )
  assert [x.dtype for x in _products(pairs.jaxpr)] == [jnp.float32]


def test_sums_of_spans_are_those_of_a_gather_bit_by_bit():
  start, end = np.random.default_rng(0).normal(size=(2, 3, 7, 5))
  arrays = jnp.float32(start), jnp.float32(end)
  starts_P, ends_P = span_reader.spans(7, 4)

  def gathered(start_BTK, end_BTK):
    return start_BTK[:, starts_P] + end_BTK[:, ends_P]

  def sums(start_BTK, end_BTK):
    return span_reader._sums(start_BTK, end_BTK, 4)

  wanted, wanted_backward = jax.vjp(gathered, *arrays)
  found, backward = jax.vjp(sums, *arrays)
  np.testing.assert_array_equal(found, wanted)
  grad_BPK = jnp.sin(jnp.arange(wanted.size)).reshape(wanted.shape)
  for one, other in zip(
      backward(grad_BPK), wanted_backward(grad_BPK), strict=True
  ):
    np.testing.assert_array_equal(one, other)


def test_a_loop_over_layers_is_the_layers_one_by_one():
  config = dataclasses.replace(
      CONFIG, num_layers=4, dropout=0.1, remat='dots', attention='xla'
  )
  ids_BL = np.array([[5, 6, 7, 8], [9, 4, 0, 0]], np.int32)
  positions_BM = np.array([[0, 2], [1, 0]], np.int32)

  def run(scan_layers):
    of_run = dataclasses.replace(config, scan_layers=scan_layers)
    graph, params = nnx.split(bert.Bert(of_run, rngs=nnx.Rngs(0)))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
      noise = dropout.noise(jax.random.key(1), len(ids_BL))
      encoder = nnx.merge(graph, params)
      hidden_BMD = encoder(ids_BL, ids_BL * 0, positions_BM, noise)
      return jnp.square(hidden_BMD[..., :3]).sum()

    products = loss.lower(params).as_text().count('dot_general')
    return products, loss(params)

  one_by_one, expected = run(scan_layers=False)
  products, looped = run(scan_layers=True)
  assert products < one_by_one
  jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=2e-5),
      looped,
      expected,
  )
