"""AdamW as in BERT, with a learning rate for each component.

Unlike the released code, Adam's bias correction is on and the decay of the
learning rate starts where the warm-up ends.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib


def learning_rate(config: config_lib.Config, component: str) -> optax.Schedule:
  """Linear warm-up, then linear decay to final_fraction of the peak.

  The embedder has its own peak and may start later (retriever_delay): a reader
  that does not use its passages yet would teach it that none is useful.
  """
  c = config.optimizer
  is_embedder = component == 'embedder'
  peak = c.retriever_learning_rate if is_embedder else c.learning_rate
  decay = optax.schedules.linear_schedule(
      peak,
      peak * c.final_fraction,
      max(config.steps - c.warmup_steps, 1),
      c.warmup_steps,
  )
  # The warm-up starts at the delay. A retriever that starts at its full rate
  # forgets in twenty steps what ICT taught it.
  start = c.retriever_delay if is_embedder else 0

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    warm = (step - start + 1) / max(c.warmup_steps, 1)
    return decay(step) * jnp.clip(warm, 0.0, 1.0) * (step >= start)

  return schedule


def make_optimizer(
    config: config_lib.Config, components: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation for params {component: {name: array}}.

  `update` takes the keyword `step`, the number of updates so far, which decides
  whether the clip counts the retriever; without it, every component learns.
  """
  c = config.optimizer

  def adamw(component: str) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config, component),
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=_decayed,
    )

  by_component = {
      name: optax.set_to_zero() if name in c.frozen else adamw(name)
      for name in components
  }
  return optax.chain(
      _clip(config),
      optax.partition(
          by_component,
          lambda params: {
              name: dict.fromkeys(x, name) for name, x in params.items()
          },
      ),
  )


def _clip(config: config_lib.Config) -> optax.GradientTransformationExtraArgs:
  """Clips by the global norm of the components that learn at a step.

  Gradients of a component that does not change must not scale down the others.
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
    learned = {name: x for name, x in grads.items() if name not in c.frozen}
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
    return grads | clipped, state

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
