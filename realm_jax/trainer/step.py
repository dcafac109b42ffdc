"""The training step: gradients of a stage's loss, then clip and AdamW.

For REALM the loop first embeds the masked sentences and searches
(`Realm.retrieve`). The step then scores the candidates with the current
parameters, reads them, marginalises, and updates reader and retriever.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import accumulation
from realm_jax.trainer import stages

Components = dict[str, components_lib.Component]
Rates = Mapping[str, jax.typing.ArrayLike]
LossAndMetrics = tuple[jax.Array, stages.Metrics]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step changes; with the data iterator, a resumable job."""

  step: jax.Array  # int32, number of updates.
  params: dict[str, components_lib.Params]
  opt_state: Any
  rng: jax.Array  # Root key of the run, constant.


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
  """Returns the sharding of each array of the state."""
  return mesh_lib.shardings(
      abstract_state(components, tx), mesh, config.mesh.zero
  )


def stream(root: jax.Array, name: str) -> jax.Array:
  """Returns the key of a named random stream of the run."""
  return jax.random.fold_in(root, zlib.crc32(name.encode()))


def make_train_step(
    stage: stages.Stage,
    components: Components,
    tx: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
) -> jax.stages.Wrapped:
  """Returns the jitted step(state, batch, rates) -> (state, metrics).

  The state has the shardings of `state_shardings` and is donated. `rates` are
  the learning rates of the components, float32.
  """
  config, whole = stage.config, mesh_lib.replicated(mesh)
  shardings = state_shardings(config, components, tx, mesh)
  specs = jax.tree.map(lambda x: x.spec, shardings.params)
  gradients = make_gradients(stage, components, specs, mesh)

  def train_step(
      state: TrainState, batch: Any, rates: Rates
  ) -> tuple[TrainState, stages.Metrics]:
    key = jax.random.fold_in(stream(state.rng, 'dropout'), state.step)
    (loss, metrics), grads = gradients(
        state.params, batch, dropout.noise(key, config.batch_size)
    )
    norm = optax.tree.norm(grads)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads = {name: zeros[name] | x for name, x in grads.items()}
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, step=state.step
    )
    updates = {
        name: optax.tree.scale(rates[name], x) for name, x in updates.items()
    }
    learned = stage.learned(metrics)
    if learned is not None:
      updates, opt_state = _only_if(
          learned, updates, opt_state, state.opt_state
      )
    params = optax.apply_updates(state.params, updates)
    metrics = {
        'loss': loss,
        **metrics,
        'grad_norm': norm,
        'update_norm': optax.tree.norm(updates),
        'param_norm': optax.tree.norm(params),
        **{f'learning_rate_{name}': rate for name, rate in rates.items()},
    }
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics

  return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(shardings, mesh_lib.over_batch(mesh), whole),
      out_shardings=(shardings, whole),
  )


def _only_if(
    learned: jax.Array, updates: Any, new: Any, old: Any
) -> tuple[Any, Any]:
  """Returns updates and optimizer state, without effect if not `learned`.

  Otherwise weight decay and old momentum would change the parameters. The step
  of the learning rate's schedule always advances.
  """

  def is_schedule(x: Any) -> bool:
    return isinstance(x, optax.ScaleByScheduleState)

  updates = jax.tree.map(lambda x: jnp.where(learned, x, 0), updates)
  state = jax.tree.map(
      lambda new, old: (
          new if is_schedule(new) else jnp.where(learned, new, old)
      ),
      new,
      old,
      is_leaf=is_schedule,
  )
  return updates, state


def make_gradients(
    stage: stages.Stage,
    components: Components,
    specs: Any,
    mesh: jax.sharding.Mesh,
) -> Callable[[Any, Any, dropout.Noise], tuple[LossAndMetrics, Any]]:
  """Returns gradients(params, batch, noise) -> ((loss, metrics), gradients).

  Loss, metrics and gradients are those of the whole batch, up to the order of
  the sums; frozen parameters have no gradient and no backward pass. Each device
  computes its rows in `config.accumulate` parts; devices along `data` exchange
  parameters and gradients once a step, in `on_device`. XLA divides the work
  along the mesh axis `model`. To be called under jit.

  Args:
    stage, mesh: of the job.
    components: networks of the stage.
    specs: partition spec of each parameter, from `mesh_lib.rule_for`; the
      gradients have the same.
  """
  over_data = jax.tree.map(mesh_lib.over_data, specs)
  accumulate = stage.config.accumulate
  partition = functools.partial(components_lib.partition, stage.config)

  def on_device(
      params: Any, batch: Any, noise: dropout.Noise
  ) -> tuple[LossAndMetrics, Any]:
    params, frozen = partition(jax.tree.map(mesh_lib.gather, params, specs))
    totals = jax.lax.psum(stage.counts(batch), mesh_lib.DATA)

    def outputs_of(params: Any, batch: Any, noise: dropout.Noise) -> Any:
      whole = {name: params[name] | frozen[name] for name in params}
      models = components_lib.bind(components, whole)
      return stage.outputs(models, batch, noise)

    def loss_of(outputs: Any, batch: Any) -> LossAndMetrics:
      """Returns these rows' share of the loss and metrics of the batch."""
      loss, metrics = stage.loss(outputs, batch, mesh_lib.DATA)
      loss_share, metrics_share = (
          count / jnp.maximum(total, 1)
          for count, total in zip(stage.counts(batch), totals, strict=True)
      )
      return loss * loss_share, {
          name: value * metrics_share for name, value in metrics.items()
      }

    def gradients_of(rows: accumulation.Rows) -> tuple[LossAndMetrics, Any]:
      return jax.value_and_grad(
          lambda params: loss_of(outputs_of(params, *rows), rows[0]),
          has_aux=True,
      )(params)

    rows = (batch, noise)
    if accumulate == 1:
      value, grads = gradients_of(rows)
    elif stage.in_batch:
      value, grads = accumulation.with_gradient_cache(
          outputs_of, loss_of, params, rows, accumulate
      )
    else:
      value, grads = accumulation.part_by_part(gradients_of, rows, accumulate)
    return (
        jax.lax.psum(value, mesh_lib.DATA),
        jax.tree.map(mesh_lib.reduce_gradient, grads, partition(specs)[0]),
    )

  over_rows = jax.P(mesh_lib.DATA)
  return jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(over_data, over_rows, dropout.Noise(jax.P(), over_rows)),
      out_specs=(jax.P(), partition(over_data)[0]),
      axis_names={mesh_lib.DATA},
      check_vma=False,  # The attention kernels lack the annotation.
  )
