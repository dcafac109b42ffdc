"""A tagger of named entities: BERT with a label for each word.

The paper's salient spans come from such a tagger, trained on CoNLL 2003 and
never released (Guu et al. 2020, section 3.4). Labels: corpus/entities.py.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.models import dropout
from realm_jax.models import encoders

_NEVER = -1e9  # Added to the score of a forbidden transition.


class Tagger(nnx.Module):
  """Scores the labels of each wordpiece of `[CLS] sentence [SEP]`."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.bert = encoders.make(config, rngs=rngs)
    num_labels = 1 + 2 * len(config.entity_types)
    self.output = encoders.linear(
        config, config.width, num_labels, rngs, 'float32'
    )
    self.capitals = config.capitals

  def label_logits(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Returns logits of the labels of each wordpiece, float32 BLC.

    Args:
      ids_BL: `[CLS] sentence [SEP]`, int32.
      types_BL: segment 1 for words with a capital letter; ignored unless
        config.model.capitals.
      noise: for dropout; None for none.
    """
    if not self.capitals:
      types_BL = jnp.zeros_like(types_BL)
    hidden_BLD = self.bert(ids_BL, types_BL, noise=noise)
    b, length, d = hidden_BLD.shape
    logits = self.output(hidden_BLD.reshape(b * length, d))
    return logits.reshape(b, length, -1)

  def tags(
      self, ids_BL: jax.Array, types_BL: jax.Array, begins_BL: jax.Array
  ) -> jax.Array:
    """Returns the best labels, see `decode`."""
    return decode(self.label_logits(ids_BL, types_BL), begins_BL)


def tagging_loss(
    logits_BLC: jax.Array, labels_BL: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns mean cross-entropy and accuracy over labels >= 0."""
  known_BL = labels_BL >= 0
  count = jnp.maximum(known_BL.sum(), 1)
  logp_BLC = jax.nn.log_softmax(logits_BLC)
  logp_BL = jnp.take_along_axis(
      logp_BLC, jnp.maximum(labels_BL, 0)[..., None], axis=-1
  )[..., 0]
  right_BL = known_BL & (logits_BLC.argmax(-1) == labels_BL)
  return (
      -jnp.where(known_BL, logp_BL, 0.0).sum() / count,
      right_BL.sum() / count,
  )


def decode(logits_BLC: jax.Array, begins_BL: jax.Array) -> jax.Array:
  """Returns the most likely labels in which I-x follows only B-x or I-x.

  Viterbi (1967) over the first wordpieces of words.

  Args:
    logits_BLC: scores of the labels O, B-x, I-x, B-y, I-y, ...
    begins_BL: bool, true for the first wordpiece of a word.

  Returns:
    int32 BL: labels; -1 for other wordpieces.
  """
  num_labels = logits_BLC.shape[-1]
  allowed_CC, first_C = _transitions(num_labels)
  logp_LBC = jnp.moveaxis(jax.nn.log_softmax(logits_BLC), 1, 0)
  begins_LB = jnp.moveaxis(begins_BL, 1, 0)
  same_C = jnp.arange(num_labels)

  def forward(
      best_BC: jax.Array, given: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    logp_BC, begins_B = given
    paths_BCC = best_BC[:, :, None] + allowed_CC  # From, to.
    before_BC = jnp.where(begins_B[:, None], paths_BCC.argmax(1), same_C)
    best_BC = jnp.where(
        begins_B[:, None], paths_BCC.max(1) + logp_BC, best_BC
    )
    return best_BC, before_BC

  # The sequence starts in state O.
  start_BC = jnp.broadcast_to(first_C, logp_LBC.shape[1:])
  best_BC, before_LBC = jax.lax.scan(
      forward, start_BC, (logp_LBC, begins_LB)
  )

  def backward(
      label_B: jax.Array, before_BC: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    before_B = jnp.take_along_axis(before_BC, label_B[:, None], axis=1)[:, 0]
    return before_B, label_B

  _, label_LB = jax.lax.scan(
      backward, best_BC.argmax(-1), before_LBC, reverse=True
  )
  return jnp.where(begins_BL, jnp.moveaxis(label_LB, 0, 1), -1)


def _transitions(num_labels: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the scores of transitions (from, to) and of the start state."""
  allowed_CC = np.zeros((num_labels, num_labels), np.float32)
  for inside in range(2, num_labels, 2):
    allowed_CC[:, inside] = _NEVER
    allowed_CC[[inside - 1, inside], inside] = 0.0
  first_C = np.full(num_labels, _NEVER, np.float32)
  first_C[0] = 0.0
  return allowed_CC, first_C
