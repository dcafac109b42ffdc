"""Gradients of a batch that is computed in parts, `config.accumulate`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax.models import dropout

Rows = tuple[Any, dropout.Noise]  # Rows of a batch, and their noise.
Result = tuple[Any, Any]  # Loss and metrics, and the gradients.


def part_by_part(
    gradients_of: Callable[[Rows], Result], rows: Rows, accumulate: int
) -> Result:
  """Sums loss and gradients of parts, where each row has a loss of its own."""
  parts = _split(rows, accumulate)

  def add(sums: Any, part: Rows) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, sums, gradients_of(part)), None

  first = jax.tree.map(lambda x: x[0], parts)
  shapes = jax.eval_shape(gradients_of, first)
  return jax.lax.scan(add, _zeros(shapes), parts)[0]


def with_gradient_cache(
    outputs_of: Callable,
    loss_of: Callable,
    params: Any,
    rows: Rows,
    accumulate: int,
) -> Result:
  """Gradients of a loss that compares all rows (Gao et al. 2021, section 3.2).

  First pass: the outputs of all rows, without keeping activations. Second pass:
  each part again, backward from the gradients of its outputs.
  """
  parts = _split(rows, accumulate)
  outputs = jax.lax.map(lambda part: outputs_of(params, *part), parts)
  value, grad_outputs = jax.value_and_grad(
      lambda outputs: loss_of(jax.tree.map(_join, outputs), rows[0]),
      has_aux=True,
  )(outputs)

  def add(sums: Any, part: tuple[Rows, Any]) -> tuple[Any, None]:
    inputs, grad_outputs = part
    # The noise is that of the first pass, hence the outputs are, too.
    _, backward = jax.vjp(lambda p: outputs_of(p, *inputs), params)
    return jax.tree.map(jnp.add, sums, backward(grad_outputs)[0]), None

  sums, _ = jax.lax.scan(add, _zeros(params), (parts, grad_outputs))
  return value, sums


def _split(rows: Rows, accumulate: int) -> Rows:
  """Adds a leading axis of parts; part i is rows i, i + accumulate, ..."""
  batch, noise = rows

  def split(x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:])
    return x.swapaxes(0, 1)

  keys = jnp.broadcast_to(noise.key, (accumulate,))
  return jax.tree.map(split, batch), dropout.Noise(keys, split(noise.row_B))


def _join(x: jax.Array) -> jax.Array:
  """Inverse of `_split`."""
  x = x.swapaxes(0, 1)
  return x.reshape(-1, *x.shape[2:])


def _zeros(shapes: Any) -> Any:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
