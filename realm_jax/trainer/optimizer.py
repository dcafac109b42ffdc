"""AdamW as BERT uses it, with a learning rate for each component.

Public: `make_optimizer`, `learning_rate`. Differences from the released code:
Adam's bias correction is on, and the decay starts where the warm-up ends.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from realm_jax import config as config_lib


def learning_rate(config: config_lib.Config, component: str) -> optax.Schedule:
  """Linear warm-up, then linear decay to final_fraction of the peak.

  The embedder has a peak of its own and may start later: a reader that does
  not yet use its passages would teach it that none is of use.
  """
  c = config.optimizer
  peak = c.retriever_learning_rate if component == 'embedder' else (
      c.learning_rate
  )
  decay = optax.schedules.linear_schedule(
      peak,
      peak * c.final_fraction,
      max(config.steps - c.warmup_steps, 1),
      c.warmup_steps,
  )
  # The warm-up is counted from the delay: a retriever that starts at its full
  # rate forgets in twenty steps what ICT taught it.
  start = c.retriever_delay if component == 'embedder' else 0

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    warm = (step - start + 1) / max(c.warmup_steps, 1)
    return decay(step) * jnp.clip(warm, 0.0, 1.0) * (step >= start)

  return schedule


def make_optimizer(
    config: config_lib.Config, components: tuple[str, ...]
) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation for params {component: {name: array}}.

  Its `update` takes the number of the step as the keyword `step`, which the
  clip needs while a retriever waits; without it, every component learns.
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

  return optax.chain(
      _clip(config),
      optax.partition(
          {
              name: optax.set_to_zero() if name in c.frozen else adamw(name)
              for name in components
          },
          lambda params: {
              name: dict.fromkeys(leaves, name)
              for name, leaves in params.items()
          },
      ),
  )


def _clip(config: config_lib.Config) -> optax.GradientTransformationExtraArgs:
  """Clips by the global norm of the components that learn at a step.

  The gradients of a component that does not change must not scale down those
  of another. While the retriever waits, Adam averages its gradients already;
  they are clipped by the norm that holds once it learns, that of all.
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
    norm = whole = optax.tree.norm(learned)
    if c.retriever_delay and step is not None:
      others = {name: x for name, x in learned.items() if name != 'embedder'}
      norm = jnp.where(
          step >= c.retriever_delay, whole, optax.tree.norm(others)
      )

    def clip(leaves: Any, norm: jax.Array) -> Any:
      return jax.tree.map(
          lambda x: jnp.where(norm < c.clip_norm, x, x / norm * c.clip_norm),
          leaves,
      )

    clipped = {
        name: clip(x, whole if name == 'embedder' else norm)
        for name, x in learned.items()
    }
    return grads | clipped, state

  return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), update
  )


def _decayed(params: Any) -> Any:
  """Weights decay; biases and LayerNorm scales do not."""
  # Not by rank: optax.partition leaves placeholders for other components.
  return {
      component: {
          name: not name.endswith(('bias', 'scale')) for name in leaves
      }
      for component, leaves in params.items()
  }
