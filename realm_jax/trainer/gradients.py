"""Loss and gradients of a batch that is divided over devices and in time.

Public: `Objective`, `make_gradients`. Each device works through its share of
the batch in `accumulate` parts; what the devices have to exchange stands here
in so many words and happens once a step, whatever the number of parts. The
axis `model` is left to XLA, by the rules of runtime/mesh.py.
"""

from collections.abc import Callable, Collection
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax.models import dropout
from realm_jax.runtime import mesh as mesh_lib

Metrics = dict[str, jax.Array]
LossAndMetrics = tuple[jax.Array, Metrics]
_Part = tuple[Any, dropout.Noise]  # Some rows of a batch, and their noise.


@dataclasses.dataclass(frozen=True)
class Objective:
  """What a step minimises, in two halves.

  encode(params, batch, noise) -> outputs: the work, for each row by itself.
  loss(outputs, batch, axis) -> (loss, metrics): means over the rows given;
    `axis` is that over which others have the rest of the batch, or None.
  counts(batch) -> (loss, metrics): over how many those means are, so that the
    means of parts make up that of the whole.
  in_batch: whether the loss of a row depends on the other rows.
  """

  encode: Callable[[Any, Any, dropout.Noise | None], Any]
  loss: Callable[[Any, Any, str | None], LossAndMetrics]
  counts: Callable[[Any], tuple[jax.Array, jax.Array]]
  in_batch: bool = False


def make_gradients(
    objective: Objective,
    specs: Any,
    mesh: jax.sharding.Mesh,
    accumulate: int,
    frozen: Collection[str] = (),
) -> Callable[[Any, Any, dropout.Noise], tuple[LossAndMetrics, Any]]:
  """Returns gradients(params, batch, noise) -> ((loss, metrics), gradients).

  To be called under jit. All are those of the whole batch, up to the order of
  the sums.

  Args:
    objective: of the job.
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
    totals = jax.lax.psum(objective.counts(batch), mesh_lib.DATA)

    def share(outputs: Any, batch: Any) -> LossAndMetrics:
      """What these rows add to the loss and metrics of the whole batch."""
      loss, metrics = objective.loss(outputs, batch, mesh_lib.DATA)
      loss_share, metrics_share = (
          count / jnp.maximum(total, 1)
          for count, total in zip(
              objective.counts(batch), totals, strict=True
          )
      )
      return loss * loss_share, {
          name: value * metrics_share for name, value in metrics.items()
      }

    def encode(params: Any, batch: Any, noise: dropout.Noise) -> Any:
      return objective.encode(params | fixed, batch, noise)

    if accumulate == 1:
      value, grads = _at_once(encode, share, params, (batch, noise))
    elif objective.in_batch:
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
