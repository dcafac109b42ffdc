"""AdamW as in BERT, with a learning rate for each component.

Unlike the released code, Adam's bias correction is on and the decay of the
learning rate starts where the warm-up ends.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from realm_jax import config as config_lib
from realm_jax.models import components as components_lib


def learning_rates(
    config: config_lib.Config, components: Iterable[str], step: int
) -> dict[str, np.float32]:
  """Linear warm-up, then linear decay to final_fraction of the peak.

  The embedder has its own peak and may start later (retriever_delay): a reader
  that does not use its passages yet would teach it that none is useful.
  """
  c, f32 = config.optimizer, np.float32
  # Rounded as by XLA, since the formula was once a part of the compiled step.
  decay_steps = max(config.steps - c.warmup_steps, 1)
  decayed = min(max(step - c.warmup_steps, 0), decay_steps)
  left = f32(max(1 - decayed * float(f32(1) / f32(decay_steps)), 0))

  def rate(peak: float, start: int) -> np.float32:
    final = peak * c.final_fraction
    decay = f32(float(f32(peak - final)) * float(left) + float(f32(final)))
    warm = f32(step - start + 1) * (f32(1) / f32(max(c.warmup_steps, 1)))
    return decay * np.clip(warm, f32(0), f32(1))

  rates = dict.fromkeys(components, rate(c.learning_rate, 0))
  if 'embedder' in rates:
    # The warm-up starts at the delay. A retriever that starts at its full rate
    # forgets in twenty steps what ICT taught it.
    rates['embedder'] = rate(c.retriever_learning_rate, c.retriever_delay)
  return rates


def make_optimizer(
    config: config_lib.Config, components: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation for params {component: {name: array}}.

  Its updates are for a learning rate of 1. The rate, an argument of the step,
  multiplies them, so that another `config.steps` needs no compilation.
  `update` takes the keyword `step`, the number of updates so far, which decides
  whether the clip counts the retriever; without it, every component learns.
  """
  c = config.optimizer

  adamw = optax.adamw(
      lambda step: 1.0, c.b1, c.b2, c.eps, weight_decay=c.weight_decay,
      mask=_decayed,
  )
  transforms = {
      name: optax.set_to_zero() if name in c.frozen else adamw
      for name in components
  }
  if set(c.frozen) - set(components):
    transforms['part'] = optax.set_to_zero()  # The frozen part of a component.

  def labels(params: Any) -> Any:
    learned, frozen = components_lib.partition(config, params)
    return {
        name: dict.fromkeys(learned[name], name)
        | dict.fromkeys(frozen[name], name if name in c.frozen else 'part')
        for name in params
    }

  return optax.chain(_clip(config), optax.partition(transforms, labels))


def _clip(config: config_lib.Config) -> optax.GradientTransformationExtraArgs:
  """Clips by the global norm of the parameters that learn at a step.

  Gradients of parameters that do not change must not scale down the others.
  During the retriever's delay, Adam already averages its gradients; they are
  clipped by the norm of all components, as after the delay.
  """
  c = config.optimizer

  def update(
      grads: Any,
      state: optax.EmptyState,
      params: Any = None,
      *,
      step: jax.typing.ArrayLike | None = None,
  ) -> tuple[Any, optax.EmptyState]:
    del params
    learned, frozen = components_lib.partition(config, grads)
    norm = norm_of_all = optax.tree.norm(learned)
    if c.retriever_delay and step is not None:
      others = {name: x for name, x in learned.items() if name != 'embedder'}
      norm = jnp.where(
          step >= c.retriever_delay, norm_of_all, optax.tree.norm(others)
      )

    def clip(leaves: Any, norm: jax.Array) -> Any:
      return jax.tree.map(
          lambda x: jnp.where(norm < c.clip_norm, x, x / norm * c.clip_norm),
          leaves,
      )

    clipped = {
        name: clip(x, norm_of_all if name == 'embedder' else norm)
        for name, x in learned.items()
    }
    return {name: clipped[name] | frozen[name] for name in grads}, state

  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
  )


def _decayed(params: Any) -> Any:
  """Marks weights, which decay; biases and LayerNorm scales do not."""
  # By name, not rank: optax.partition has placeholders of other components.
  return {
      component: {n: not n.endswith(('bias', 'scale')) for n in leaves}
      for component, leaves in params.items()
  }
