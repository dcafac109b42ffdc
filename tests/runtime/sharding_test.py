"""Dividing a job over devices and in time changes nothing but rounding.

Eight simulated devices; the reference is one device that computes the whole
batch at once. Dropout is on: its noise must not depend on the division.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import embedding
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib

_ROWS, _VOCAB, _NULL = 16, 96, (2, 3, 3)


def _config(objective):
  config = config_lib.Config(objective=objective, corpus='corpus')
  config.batch_size, config.num_candidates = _ROWS, 3
  config.model = config_lib.ModelConfig(
      preset='tiny', num_layers=1, width=32, num_heads=4, mlp_width=64,
      embedding_width=16, max_positions=64, init_stddev=0.2, dropout=0.2,
      vocab_size=_VOCAB, max_span_width=3,
  )
  config.lengths = config_lib.LengthsConfig(query=8, document=12, masks=3)
  config.open_qa.documents, config.open_qa.retrieved = 'trained', 5
  if objective == 'mlm':  # One layer everywhere, one at the masks only.
    config.model.num_layers = 2
  elif objective == 'realm':  # The largest program.
    config.model.dropout = 0.0
  return config_lib.resolve(config)


def _mesh(data, model):
  devices = np.array(jax.devices()[: data * model]).reshape(data, model)
  return jax.sharding.Mesh(devices, (mesh_lib.DATA, mesh_lib.MODEL))


def _batch(config):
  """Random wordpieces, padded; some examples have nothing to predict."""
  rng = np.random.default_rng(0)
  q, s, m, k = 8, 12, 3, 3
  t, n = q + s, 5

  def ids(*shape):
    made = rng.integers(5, _VOCAB, size=shape).astype(np.int32)
    lengths = rng.integers(4, shape[-1] + 1, size=(*shape[:-1], 1))
    return np.where(np.arange(shape[-1]) < lengths, made, 0).astype(np.int32)

  def segments(*shape):
    return np.broadcast_to(np.arange(shape[-1]) > 4, shape).astype(np.int32)

  mask_BM = rng.random((_ROWS, m)) < 0.5
  # A device, and a part of the batch, without a mask.
  mask_BM[:4] = mask_BM[5::4] = False
  correct_BKP = rng.random((_ROWS, k, t + t - 1 + t - 2)) < 0.05
  correct_BKP[3:9] = False
  everything = {
      'query_ids_BQ': ids(_ROWS, q),
      'doc_ids_BS': ids(_ROWS, s),
      'doc_types_BS': segments(_ROWS, s),
      # Rows of several devices and parts are of one passage.
      'passage_B': np.arange(_ROWS, dtype=np.int32) * 5 % 11,
      'doc_ids_BJS': ids(_ROWS, k - 1, s),
      'doc_types_BJS': segments(_ROWS, k - 1, s),
      'doc_ids_BKS': ids(_ROWS, k, s),
      'doc_types_BKS': segments(_ROWS, k, s),
      'doc_emb_BNE': rng.normal(size=(_ROWS, n, 16)).astype(np.float32),
      'has_answer_BN': rng.random((_ROWS, n)) < 0.3,
      'body_BK2': np.broadcast_to(np.int32([q, t]), (_ROWS, k, 2)),
      'correct_BKP': correct_BKP,
      'joint_ids_BT': ids(_ROWS, t),
      'joint_types_BT': segments(_ROWS, t),
      'joint_ids_BKT': ids(_ROWS, k, t),
      'joint_types_BKT': segments(_ROWS, k, t),
      'positions_BM': rng.integers(0, q, (_ROWS, m)).astype(np.int32),
      'targets_BM': rng.integers(5, _VOCAB, (_ROWS, m)).astype(np.int32),
      'mask_BM': mask_BM,
  }
  batch = _stage(config).abstract_batch()
  wanted = {
      field.name: everything[field.name]
      for field in dataclasses.fields(batch)
      if getattr(batch, field.name) is not None
  }
  return type(batch)(**wanted)


def _stage(config):
  return stages.load(config)(config)


@functools.cache
def _found(
    objective, data=1, model=1, zero=False, accumulate=1, remat='none',
    frozen=(),
):
  """Loss, metrics and gradients of a batch."""
  config = _config(objective)
  config.model.remat, config.accumulate = remat, accumulate
  config.optimizer.frozen = frozen
  mesh = _mesh(data, model)
  components = stages.components_of(config)
  params = {name: c.init(0) for name, c in components.items()}
  placed = mesh_lib.shardings(params, mesh, zero)
  rows = mesh_lib.over_batch(mesh)
  run = jax.jit(
      step_lib.make_gradients(
          _stage(config),
          components,
          jax.tree.map(lambda x: x.spec, placed),
          mesh,
      ),
      out_shardings=(
          mesh_lib.replicated(mesh),
          components_lib.partition(config, placed)[0],
      ),
  )
  (loss, metrics), grads = run(
      jax.device_put(params, placed),
      jax.device_put(_batch(config), rows),
      dropout.noise(jax.random.key(7), _ROWS),
  )
  return jax.device_get((loss, metrics, grads))


_CASES = [
    ('realm', {'data': 8}),
    ('realm', {'data': 4, 'model': 2}),
    ('realm', {'data': 4, 'model': 2, 'zero': True,
               'frozen': ('embedder.encoder.bert', 'reader.bert.layers')}),
    ('realm', {'data': 2, 'model': 4, 'zero': True, 'accumulate': 2,
               'remat': 'dots'}),
    ('mlm', {'data': 8, 'zero': True}),
    ('mlm', {'data': 4, 'model': 2, 'accumulate': 2, 'remat': 'full'}),
    ('mlm', {'data': 2, 'model': 4}),
    ('ict', {'data': 8, 'accumulate': 2}),
    ('ict', {'data': 4, 'model': 2, 'zero': True}),
    ('ict', {'data': 2, 'model': 4, 'accumulate': 4}),
    ('ict', {'accumulate': 4}),
    ('open_qa', {'data': 8}),
    ('open_qa', {'data': 4, 'model': 2, 'zero': True}),
    ('open_qa', {'data': 2, 'model': 4, 'accumulate': 2}),
]


@pytest.mark.parametrize(
    ('objective', 'how'),
    _CASES,
    ids=lambda x: '-'.join(f'{k}{v}' for k, v in x.items())
    if isinstance(x, dict)
    else x,
)
def test_divided_is_the_same(objective, how):
  loss, metrics, grads = _found(objective, **how)
  frozen = how.get('frozen', ())
  expected_loss, expected_metrics, expected = _found(objective)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  for name, value in expected_metrics.items():
    np.testing.assert_allclose(
        metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name
    )
  norm = np.sqrt(
      sum(np.square(x).sum() for x in jax.tree.leaves(expected))
  )
  assert norm > 0.1
  for component, leaves in expected.items():
    for name, wanted in leaves.items():
      if f'{component}.{name}'.startswith(frozen):
        assert name not in grads[component]
        continue
      error = np.linalg.norm(grads[component][name] - wanted)
      # Some have no gradient but rounding, as the bias of the keys, which a
      # softmax does not see; hence the second part.
      bound = 1e-5 * np.linalg.norm(wanted) + 1e-6 * norm
      assert error <= bound, (name, error, bound)


def test_whole_steps_are_the_same_and_compile_once():
  config = _config('ict')
  components = stages.components_of(config)
  tx = optimizer.make_optimizer(config, tuple(components))
  batch = _batch(config)

  def train(mesh, zero):
    config.mesh.zero = zero
    traces = []

    def update(*args, **kwargs):
      traces.append(1)
      return tx.update(*args, **kwargs)

    step = step_lib.make_train_step(
        _stage(config), components, tx._replace(update=update), mesh
    )
    placed = step_lib.state_shardings(config, components, tx, mesh)
    params = {name: c.init(0) for name, c in components.items()}
    state = jax.device_put(
        step_lib.TrainState(
            jnp.int32(0), params, tx.init(params), jax.random.key(0)
        ),
        placed,
    )
    for i in range(3):
      rates = optimizer.learning_rates(config, components, i)
      state, metrics = step(state, mesh_lib.to_devices(mesh, batch), rates)
    assert len(traces) == 1
    embed = embedding.Embedder(components['embedder'], mesh).queries
    emb_BE = embed(state.params['embedder'], batch.query_ids_BQ)
    return state, jax.device_get((metrics, emb_BE)), placed

  one, (expected, expected_emb_BE), _ = train(_mesh(1, 1), False)
  many, (metrics, emb_BE), placed = train(_mesh(4, 2), True)
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(emb_BE, expected_emb_BE, atol=2e-5)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_allclose(a, b, atol=2e-5)
  # Parameters and both moments of a matrix: a device has an eighth.
  name = 'encoder.bert.layers.0.mlp_in.kernel'
  pieces = [
      leaf.addressable_shards[0].data.size
      for path, leaf in jax.tree_util.tree_leaves_with_path(many)
      if getattr(path[-1], 'key', '') == name
  ]
  assert pieces == [32 * 64 // 8] * 3
  assert placed.step.spec == jax.P()


def test_bfloat16_leaves_weights_gradients_and_losses_in_float32():
  config = _config('realm')
  config.model.compute_dtype = 'bfloat16'
  components = stages.components_of(config)
  tx = optimizer.make_optimizer(config, tuple(components))
  step = step_lib.make_train_step(
        _stage(config), components, tx, _mesh(1, 1))
  rates = optimizer.learning_rates(config, components, 0)
  state = step_lib.abstract_state(components, tx)
  traced = step.trace(state, _batch(config), rates)
  state, metrics = traced.out_info
  kinds = {str(x.dtype) for x in jax.tree.leaves((state, metrics))}
  assert kinds == {'float32', 'int32', 'key<fry>'}
  assert 'bf16' in str(traced.jaxpr)


def test_the_gradient_cache_needs_the_memory_of_one_part():
  def temporary_bytes(rows, accumulate):
    config = _config('ict')
    config.batch_size, config.accumulate = rows, accumulate
    components = stages.components_of(config)
    tx = optimizer.make_optimizer(config, tuple(components))
    mesh = _mesh(1, 1)
    step = step_lib.make_train_step(
        _stage(config), components, tx, mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
        _batch(config),
    )
    state = step_lib.abstract_state(components, tx)
    rates = optimizer.learning_rates(config, components, 0)
    compiled = step.lower(state, batch, rates).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  # Computed at once, the batch needs eight times as much. The cache adds the
  # scores of all queries for all documents, and their gradients.
  one_part = temporary_bytes(128, 1)
  assert temporary_bytes(1024, 8) < one_part + 2 * 4 * 1024**2


@pytest.mark.parametrize(
    ('name', 'shape', 'spec', 'zero_spec'),
    [
        ('bert.layers.0.query.kernel', (8, 8), (None, 'model'),
         ('data', 'model')),
        ('encoder.bert.layers.11.mlp_in.bias', (8,), ('model',), ('model',)),
        ('bert.layers.0.mlp_out.kernel', (16, 8), ('model', None),
         ('model', 'data')),
        ('bert.word_embed.embedding', (30, 8), ('model', None),
         ('model', 'data')),
        # A dimension that does not divide stays whole.
        ('bert.word_embed.embedding', (31, 8), (None, None), (None, 'data')),
        ('bert.word_embed.embedding', (31, 7), (None, None), (None, None)),
        ('output_bias', (30,), ('model',), ('model',)),
        ('projection.dense.kernel', (8, 16), (None, None), (None, 'data')),
        ('bert.layers.0.mlp_norm.scale', (8,), (None,), (None,)),
        ('', (), (), ()),
    ],
)
def test_rules(name, shape, spec, zero_spec):
  mesh = _mesh(4, 2)
  assert mesh_lib.rule_for(name, shape, mesh, zero=False) == jax.P(*spec)
  assert mesh_lib.rule_for(name, shape, mesh, zero=True) == jax.P(*zero_spec)


def test_every_rule_is_of_use_and_optimizer_state_lies_as_its_parameter():
  config = _config('realm')
  components = stages.components_of(config)
  tx = optimizer.make_optimizer(config, tuple(components))
  placed = step_lib.state_shardings(config, components, tx, _mesh(4, 2))
  divided = {
      name: place.spec
      for leaves in placed.params.values()
      for name, place in leaves.items()
      if any(place.spec)
  }
  assert len(divided) == 2 * (4 + 4 + 2 + 1) + 1
  moments = {
      path[-1].key: place.spec
      for path, place in jax.tree_util.tree_leaves_with_path(placed.opt_state)
      if path and getattr(path[-1], 'key', None) in divided
  }
  assert moments == divided


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        ({'batch_size': 12}, r'batch_size=12 .* 8 device\(s\).*accumulate=1'),
        ({'accumulate': 3, 'batch_size': 20},
         r'batch_size=20 .* 8 device\(s\).*accumulate=3'),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(wrong, message):
  config = _config('mlm')
  for name, value in wrong.items():
    setattr(config, name, value)
  with pytest.raises(ValueError, match=message):
    mesh_lib.check(config, _mesh(8, 1))


def test_more_model_devices_than_heads_are_refused():
  with pytest.raises(ValueError, match='num_heads=4 .* 8 devices'):
    mesh_lib.check(_config('mlm'), _mesh(1, 8))


@pytest.mark.parametrize(('capability', 'ok'), [('7.5', False), ('8.0', True)])
def test_bfloat16_needs_a_gpu_that_has_it(capability, ok):
  config = _config('mlm')
  config.model.compute_dtype = 'bfloat16'
  gpu = types.SimpleNamespace(
      platform='gpu', compute_capability=capability, device_kind='Some GPU'
  )
  mesh = types.SimpleNamespace(
      shape={'data': 1, 'model': 1}, devices=np.array([[gpu]])
  )
  if ok:
    mesh_lib.check(config, mesh)
  else:
    with pytest.raises(ValueError, match=r'bfloat16.*8\.0.*Some GPU has 7\.5'):
      mesh_lib.check(config, mesh)
