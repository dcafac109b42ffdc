"""Loss and gradients of a batch that is divided over devices and in time.

Each device computes its rows of the batch in `accumulate` parts. The exchange
between devices is written out here and happens once a step, whatever the number
of parts. XLA divides the work along the mesh axis `model`.
"""

from collections.abc import Callable, Collection, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import stages

LossAndMetrics = tuple[jax.Array, stages.Metrics]
_Part = tuple[Any, dropout.Noise]  # Some rows of a batch, and their noise.


def make_gradients(
    stage: stages.Stage,
    components: Mapping[str, components_lib.Component],
    specs: Any,
    mesh: jax.sharding.Mesh,
    accumulate: int,
    frozen: Collection[str] = (),
) -> Callable[[Any, Any, dropout.Noise], tuple[LossAndMetrics, Any]]:
  """Returns gradients(params, batch, noise) -> ((loss, metrics), gradients).

  It is called under jit. Loss, metrics and gradients are those of the whole
  batch, up to the order of the sums.

  Args:
    stage: of the job.
    components: networks of the stage.
    specs: how each parameter is divided, as `mesh_lib.rule_for` has it; so are
      the gradients.
    mesh: of the job.
    accumulate: in how many parts each device computes its rows. If the loss is
      in-batch, first all rows are embedded without keeping activations, and
      then the parts once more, with the gradients of their embeddings given
      (Gao et al. 2021, section 3.2).
    frozen: components without gradients; they have no backward pass.
  """
  over_data = jax.tree.map(mesh_lib.over_data, specs)
  learned = [name for name in specs if name not in frozen]

  def on_device(
      params: Any, batch: Any, noise: dropout.Noise
  ) -> tuple[LossAndMetrics, Any]:
    params = jax.tree.map(mesh_lib.gather, params, specs)
    fixed = {name: params.pop(name) for name in frozen}
    totals = jax.lax.psum(stage.counts(batch), mesh_lib.DATA)

    def share(outputs: Any, batch: Any) -> LossAndMetrics:
      """Returns the share of these rows in loss and metrics of the batch."""
      loss, metrics = stage.loss(outputs, batch, mesh_lib.DATA)
      loss_share, metrics_share = (
          count / jnp.maximum(total, 1)
          for count, total in zip(
              stage.counts(batch), totals, strict=True
          )
      )
      return loss * loss_share, {
          name: value * metrics_share for name, value in metrics.items()
      }

    def encode(params: Any, batch: Any, noise: dropout.Noise) -> Any:
      models = components_lib.bind(components, params | fixed)
      return stage.outputs(models, batch, noise)

    if accumulate == 1:
      value, grads = _at_once(encode, share, params, (batch, noise))
    elif stage.in_batch:
      value, grads = _cached(encode, share, params, (batch, noise), accumulate)
    else:
      value, grads = _in_turn(encode, share, params, (batch, noise), accumulate)
    return (
        jax.lax.psum(value, mesh_lib.DATA),
        {
            name: jax.tree.map(mesh_lib.reduce_gradient, x, specs[name])
            for name, x in grads.items()
        },
    )

  rows = jax.P(mesh_lib.DATA)
  return jax.shard_map(
      on_device,
      mesh=mesh,
      in_specs=(over_data, rows, dropout.Noise(jax.P(), rows)),
      out_specs=(jax.P(), {name: over_data[name] for name in learned}),
      axis_names={mesh_lib.DATA},
      # The kernels of attention do not say over what their results vary.
      check_vma=False,
  )


def _at_once(
    encode: Callable, share: Callable, params: Any, part: _Part
) -> tuple[LossAndMetrics, Any]:
  batch, noise = part
  return jax.value_and_grad(
      lambda params: share(encode(params, batch, noise), batch),
      has_aux=True,
  )(params)


def _in_turn(
    encode: Callable,
    share: Callable,
    params: Any,
    whole: _Part,
    accumulate: int,
) -> tuple[LossAndMetrics, Any]:
  def add(sums: Any, part: _Part) -> tuple[Any, None]:
    found = _at_once(encode, share, params, part)
    return jax.tree.map(jnp.add, sums, found), None

  parts = _split(whole, accumulate)
  shapes = jax.eval_shape(
      functools.partial(_at_once, encode, share),
      params,
      jax.tree.map(lambda x: x[0], parts),
  )
  return jax.lax.scan(add, _zeros(shapes), parts)[0]


def _cached(
    encode: Callable,
    share: Callable,
    params: Any,
    whole: _Part,
    accumulate: int,
) -> tuple[LossAndMetrics, Any]:
  parts = _split(whole, accumulate)
  outputs = jax.lax.map(lambda part: encode(params, *part), parts)
  value, grad_outputs = jax.value_and_grad(
      lambda outputs: share(jax.tree.map(_join, outputs), whole[0]),
      has_aux=True,
  )(outputs)

  def add(sums: Any, given: tuple[_Part, Any]) -> tuple[Any, None]:
    part, grad_outputs = given
    # The same noise as before, so the same embeddings.
    _, backward = jax.vjp(lambda p: encode(p, *part), params)
    return jax.tree.map(jnp.add, sums, backward(grad_outputs)[0]), None

  sums, _ = jax.lax.scan(add, _zeros(params), (parts, grad_outputs))
  return value, sums


def _split(whole: _Part, accumulate: int) -> _Part:
  """Returns part i = rows i, i + accumulate, ...; all have a dimension more."""
  batch, noise = whole

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return x.swapaxes(0, 1)

  keys = jnp.broadcast_to(noise.key, (accumulate,))
  return jax.tree.map(split, batch), dropout.Noise(keys, split(noise.row_B))


def _join(x: jax.Array) -> jax.Array:
  """Inverse of `split`."""
  x = x.swapaxes(0, 1)
  return x.reshape(-1, *x.shape[2:])


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
