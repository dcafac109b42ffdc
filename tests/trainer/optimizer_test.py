"""The optimizer: delays, weight decay, clipping by component."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from realm_jax import config as config_lib
from realm_jax.models import flops
from realm_jax.planner import plan
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages

_BOTH = ('embedder', 'reader')


def _config(**values):
  config = config_lib.Config(objective='realm', steps=20)
  config.optimizer = config_lib.OptimizerConfig(
      learning_rate=1e-2, warmup_steps=2, **values
  )
  return config_lib.resolve(config)


def _params(embedder=1.0, reader=1.0):
  return {
      'embedder': {'kernel': jnp.full(4, embedder)},
      'reader': {'kernel': jnp.full(4, reader)},
  }


def _moments(config, grads, step):
  """Adam's first moments after one update, by component."""
  tx = optimizer.make_optimizer(config, _BOTH)
  state = tx.init(_params())
  _, state = tx.update(grads, state, _params(), step=jnp.int32(step))
  inner = state[1].inner_states
  return {
      name: np.asarray(inner[name].inner_state[0].mu[name]['kernel'])
      for name in _BOTH
      if name not in config.optimizer.frozen
  }


def test_a_delayed_retriever_starts_when_it_should():
  config = _config(retriever_delay=5, retriever_learning_rate=3e-3)
  rates = [optimizer.learning_rates(config, _BOTH, step) for step in range(8)]
  assert [x['embedder'] > 0 for x in rates] == [False] * 5 + [True] * 3
  assert rates[5]['embedder'] == pytest.approx(1.5e-3 * 15 / 18)
  assert rates[2]['reader'] == pytest.approx(1e-2)


@pytest.mark.parametrize('delay', [0, 5])
def test_rates_are_those_of_optax_to_the_bit(delay):
  """Older versions computed them in the compiled step."""
  config = _config(final_fraction=0.3, retriever_delay=delay)
  decay = optax.schedules.linear_schedule(1e-2, 3e-3, 18, 2)

  @jax.jit
  def expected(step):
    warm = jnp.clip((step - delay + 1) / 2, 0, 1)
    return decay(step) * warm * (step >= delay)

  for step in range(config.steps):
    rate = optimizer.learning_rates(config, ('embedder',), step)['embedder']
    assert rate == expected(step), step


def test_another_number_of_steps_needs_no_compilation():
  def program(steps, **values):
    config = _config(**values)
    config.steps = steps
    config.model = config_lib.ModelConfig(
        num_layers=1, width=16, num_heads=2, vocab_size=50, embedding_width=8
    )
    config.lengths = config_lib.LengthsConfig(query=8, document=16, masks=2)
    return plan.trace_step(config, _mesh()).lower().as_text()

  assert program(20) == program(30, final_fraction=0.5)


def _mesh():
  return jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )


def test_only_weights_decay():
  config = _config()
  config.optimizer.warmup_steps = 0
  tx = optimizer.make_optimizer(config, ('reader',))
  params = {'reader': {'a.kernel': jnp.ones(2), 'a.bias': jnp.ones(2),
                       'norm.scale': jnp.ones(2), 'e.embedding': jnp.ones(2)}}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params, step=0)
  decayed = {name for name, u in updates['reader'].items() if np.any(u)}
  assert decayed == {'a.kernel', 'e.embedding'}


def test_a_frozen_component_does_not_scale_down_the_others():
  grads = _params(embedder=100.0, reader=0.1)  # Norms 200 and 0.2.
  free = _moments(_config(), grads, 0)
  np.testing.assert_allclose(free['reader'], 0.1 * 0.1 / 200, rtol=1e-4)
  frozen = _moments(_config(frozen=('embedder',)), grads, 0)
  np.testing.assert_allclose(frozen['reader'], 0.1 * 0.1, rtol=1e-6)


@pytest.mark.parametrize(('step', 'norm'), [(4, 30), (5, 50)])
def test_a_delayed_retriever_does_not_scale_down_the_reader(step, norm):
  """Norms 40 and 30, together 50; the first moment is 0.1 of a gradient."""
  config = _config(retriever_delay=5)
  found = _moments(config, _params(embedder=20.0, reader=15.0), step)
  np.testing.assert_allclose(found['reader'], 0.1 * 15 / norm, rtol=1e-5)
  np.testing.assert_allclose(found['embedder'], 0.1 * 20 / 50, rtol=1e-5)


@pytest.mark.parametrize(
    ('towers', 'frozen'),
    [
        ('shared', ('embedder',)),
        ('separate', ('embedder.encoder', 'embedder.projection')),
        ('shared', ('reader.bert', 'embedder')),
    ],
)
def test_frozen_parameters_have_no_backward_pass(towers, frozen):
  config = _config(frozen=frozen)
  config.batch_size, config.num_candidates = 4, 8
  config.model = config_lib.ModelConfig(
      num_layers=2, width=64, num_heads=2, vocab_size=100, embedding_width=16,
      towers=towers,
  )
  config.lengths = config_lib.LengthsConfig(query=16, document=96, masks=3)
  config = config_lib.resolve(config)
  step = plan.trace_step(config, _mesh()).lower().compile()
  flop = step.cost_analysis()['flops']
  passes = stages.load(config)(config).passes()
  found = flops.hardware_flop(config, passes, in_batch=False)
  assert found == pytest.approx(flop, rel=0.15)
  config.optimizer.frozen = ()
  assert flops.hardware_flop(config, passes, in_batch=False) > 1.25 * flop


def test_the_frozen_part_of_a_component_has_no_moments():
  config = _config(frozen=('reader.bert',))
  config.optimizer.warmup_steps = 0
  params = {'reader': {'bert.kernel': jnp.ones(3), 'head.kernel': jnp.ones(5)}}
  tx = optimizer.make_optimizer(config, ('reader',))
  state = tx.init(params)
  moments = [x for x in jax.tree.leaves(state) if np.ndim(x)]
  assert [x.shape for x in moments] == [(5,), (5,)]
  updates, _ = tx.update(params, state, params, step=0)
  assert not np.any(updates['reader']['bert.kernel'])
  assert np.all(updates['reader']['head.kernel'])
