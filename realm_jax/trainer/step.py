"""The training step: gradients of a stage's loss, clipped, and AdamW.

A step of REALM in all: embed the masked sentences and search (in the loop, by
`Realm.retrieve`); then, here, score the candidates with current parameters,
read them, marginalise, and update reader and retriever.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import gradients
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages

Components = dict[str, components_lib.Component]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step changes; with the data iterator, all there is to resume."""

  step: jax.Array  # int32, updates done.
  params: dict[str, components_lib.Params]
  opt_state: Any
  rng: jax.Array  # Root key of the run; never changes.


def abstract_state(
    components: Components, tx: optax.GradientTransformation
) -> TrainState:
  """Returns the shapes and types of a job's state."""
  params = {name: c.abstract for name, c in components.items()}
  return TrainState(
      step=jax.ShapeDtypeStruct((), jnp.int32),
      params=params,
      opt_state=jax.eval_shape(tx.init, params),
      rng=jax.eval_shape(lambda: jax.random.key(0)),
  )


def state_shardings(
    config: config_lib.Config,
    components: Components,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> TrainState:
  """Returns the sharding of every array of the state, in its structure."""
  return mesh_lib.shardings(
      abstract_state(components, tx), mesh, config.mesh.zero
  )


def make_train_step(
    stage: stages.Stage,
    components: Components,
    tx: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    on_trace: Callable[[], None] = lambda: None,
) -> jax.stages.Wrapped:
  """Returns the jitted step(state, batch) -> (state, metrics).

  The state has the shardings of `state_shardings`; it is donated. `on_trace` is
  called each time the step is traced, that is, compiled.
  """
  config = stage.config
  shardings = state_shardings(config, components, tx, mesh)
  find_gradients = gradients.make_gradients(
      stage,
      components,
      jax.tree.map(lambda x: x.spec, shardings.params),
      mesh,
      config.accumulate,
      config.optimizer.frozen,
  )

  def train_step(
      state: TrainState, batch: Any
  ) -> tuple[TrainState, stages.Metrics]:
    on_trace()
    key = jax.random.fold_in(stream(state.rng, 'dropout'), state.step)
    (loss, metrics), grads = find_gradients(
        state.params, batch, dropout.noise(key, config.batch_size)
    )
    norm = optax.tree.norm(grads)
    for name in config.optimizer.frozen:
      grads[name] = jax.tree.map(jnp.zeros_like, state.params[name])
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, step=state.step
    )
    learned = stage.learned(metrics)
    if learned is not None:
      # Without anything to learn from, neither weight decay nor old momentum
      # changes the parameters. The learning rate stays that of the step.
      updates = jax.tree.map(lambda x: jnp.where(learned, x, 0), updates)
      opt_state = jax.tree.map(
          lambda new, old: (
              new if _is_schedule(new) else jnp.where(learned, new, old)
          ),
          opt_state,
          state.opt_state,
          is_leaf=_is_schedule,
      )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        **metrics,
        'grad_norm': norm,
        'update_norm': optax.tree.norm(updates),
        'param_norm': optax.tree.norm(params),
    }
    for name in components:
      metrics[f'learning_rate_{name}'] = jnp.asarray(
          optimizer.learning_rate(config, name)(state.step), jnp.float32
      )
    state = TrainState(
        step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng
    )
    return state, metrics

  return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(shardings, mesh_lib.over_batch(mesh)),
      out_shardings=(shardings, mesh_lib.replicated(mesh)),
  )


def _is_schedule(x: Any) -> bool:
  return isinstance(x, optax.ScaleByScheduleState)


def stream(root: jax.Array, name: str) -> jax.Array:
  """A named random stream: independent of how many others there are."""
  return jax.random.fold_in(root, zlib.crc32(name.encode()))
