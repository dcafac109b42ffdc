"""The reader of open-domain questions: BERT and a score for each answer span.

Lee et al. 2019, section 4.2; Guu et al. 2020, section 4.3. The input is `[CLS]
question [SEP] passage [SEP]`, answers are spans of the passage. The P spans are
numbered by width, then by start.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.models import dropout
from realm_jax.models import encoders

_LOWEST = float(np.finfo(np.float32).min)


def spans(length: int, max_width: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns first and last wordpiece of each span, int32 P each."""
  widths = range(1, min(max_width, length) + 1)
  starts = [np.arange(length - w + 1, dtype=np.int32) for w in widths]
  ends = [s + np.int32(w - 1) for w, s in zip(widths, starts, strict=True)]
  return np.concatenate(starts), np.concatenate(ends)


class SpanReader(nnx.Module):
  """Scores each span by an MLP over its first and last wordpiece."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.bert = encoders.make(config, rngs=rngs)
    # Projections of start and end in one matmul; the MLP sees their sum.
    self.intermediate = encoders.linear(
        config, config.width, 2 * config.span_width, rngs
    )
    self.norm = nnx.LayerNorm(
        config.span_width,
        # Differs from BERT's: the original head was made with Keras.
        epsilon=config.span_norm_eps,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )
    self.output = encoders.linear(config, config.span_width, 1, rngs, 'float32')
    self.max_width = config.max_span_width

  def span_logits(
      self,
      ids_BT: jax.Array,
      types_BT: jax.Array,
      passage_mask_BT: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Returns logits of the spans, float32 BP, without the passage's score.

    Args:
      ids_BT: `[CLS] question [SEP] passage [SEP]`, int32.
      types_BT: 0 for the question, 1 for the passage.
      passage_mask_BT: true where a span may start and end; the logits of other
        spans are the lowest float.
      noise: for dropout; None for none.
    """
    b, t = ids_BT.shape
    hidden_BTD = self.bert(ids_BT, types_BT, noise=noise)
    ends = self.intermediate(hidden_BTD.reshape(b * t, -1))  # (B*T) 2K
    start, end = jnp.split(ends.reshape(b, t, -1), 2, axis=-1)
    hidden = jax.nn.relu(_sums(start, end, self.max_width))
    scores = self.output(self.norm(hidden))[..., 0]
    starts_P, ends_P = spans(t, self.max_width)
    mask_BT = passage_mask_BT.astype(bool)
    usable_BP = mask_BT[:, starts_P] & mask_BT[:, ends_P]
    return jnp.where(usable_BP, scores, _LOWEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _sums(
    start_BTK: jax.Array, end_BTK: jax.Array, max_width: int
) -> jax.Array:
  """Returns start + end of each of `spans`, BPK.

  By slices, with sums of slices as gradient: on CPU, a gather and the
  scatter that is its gradient take a third of the head's time. All sums are in
  the order of the scatter, so that the result is the same bit by bit.
  """
  t = start_BTK.shape[1]
  return jnp.concatenate(
      [
          start_BTK[:, : t - more] + end_BTK[:, more:]
          for more in range(min(max_width, t))
      ],
      axis=1,
  )


def _sums_forward(
    start_BTK: jax.Array, end_BTK: jax.Array, max_width: int
) -> tuple[jax.Array, jax.Array]:
  return _sums(start_BTK, end_BTK, max_width), jnp.zeros_like(start_BTK)


def _sums_backward(
    max_width: int, zeros_BTK: jax.Array, grad_BPK: jax.Array
) -> tuple[jax.Array, jax.Array]:
  t = zeros_BTK.shape[1]
  # A product fused into the sums would be rounded otherwise.
  grad_BPK = jax.lax.optimization_barrier(grad_BPK)
  grad_start_BTK = grad_end_BTK = zeros_BTK
  first = 0
  for more in range(min(max_width, t)):
    part = grad_BPK[:, first : first + t - more]
    grad_start_BTK += jnp.pad(part, ((0, 0), (0, more), (0, 0)))
    grad_end_BTK += jnp.pad(part, ((0, 0), (more, 0), (0, 0)))
    first += t - more
  return grad_start_BTK, grad_end_BTK


_sums.defvjp(_sums_forward, _sums_backward)


def inside(body_BK2: jax.Array, length: int) -> jax.Array:
  """Marks the positions of half-open ranges, bool BKT, T = `length`."""
  start_BK1, limit_BK1 = jnp.split(jnp.asarray(body_BK2), 2, axis=-1)
  place_T = jnp.arange(length)
  return (place_T >= start_BK1) & (place_T < limit_BK1)


def joint_scores(
    logits_BKP: jax.Array, score_BK: jax.Array, normalization: str = 'global'
) -> jax.Array:
  """Returns the joint logits of passage and span, BKP.

    global:  logit(p, k) + score(k), as released
    passage: log p(k|x) + log p(p|k, x), the paper's p(z|x) p(y|z, x)

  Raises:
    ValueError: for another normalization.
  """
  match normalization:
    case 'global':
      return logits_BKP + score_BK[..., None]
    case 'passage':
      span_logp_BKP = jax.nn.log_softmax(logits_BKP)
      return span_logp_BKP + jax.nn.log_softmax(score_BK)[..., None]
  raise ValueError(
      f"normalization={normalization!r}: must be 'global' (as released) or"
      " 'passage' (the paper)."
  )


def span_losses(
    logits_BKP: jax.Array,
    score_BN: jax.Array,
    correct_BKP: jax.Array,
    has_answer_BN: jax.Array,
    normalization: str = 'global',
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Negative log-likelihood of retrieving and of reading an answer.

    retriever: - log sum_{n has an answer} softmax_n(score)
    reader:    - log sum_{(k, p) correct} softmax_{k, p}(joint score)

  Each is 0, without a gradient, for a question without a correct passage or
  span.

  Args:
    logits_BKP: of the spans of the K passages that are read.
    score_BN: relevance of N >= K retrieved passages, best first.
    correct_BKP: spans that are an answer.
    has_answer_BN: passages that hold an answer.
    normalization: see `joint_scores`.

  Returns:
    Their sum, and aux, all means over the questions: `retriever_loss` and
    `reader_loss`; the shares of questions with an answer among the N passages
    (`retrieved`), among the K x P spans (`readable`) and in the best span
    (`exact_match`).
  """
  b, k, p = logits_BKP.shape
  total_BKP = joint_scores(logits_BKP, score_BN[:, :k], normalization)
  total = total_BKP.reshape(b, k * p)
  correct = correct_BKP.reshape(b, k * p)
  best_B1 = jnp.argmax(total, axis=1, keepdims=True)
  aux = {
      'retriever_loss': _marginal(score_BN, has_answer_BN).mean(),
      'reader_loss': _marginal(total, correct).mean(),
      'retrieved': has_answer_BN.any(1).mean(dtype=jnp.float32),
      'readable': correct.any(1).mean(dtype=jnp.float32),
      'exact_match': jnp.take_along_axis(correct, best_B1, axis=1).mean(
          dtype=jnp.float32
      ),
  }
  return aux['retriever_loss'] + aux['reader_loss'], aux


def _marginal(logits_BL: jax.Array, correct_BL: jax.Array) -> jax.Array:
  any_B = correct_BL.any(-1)
  # A row without anything correct counts all as correct: the final `where`
  # cannot remove the nan gradient of an infinite loss.
  correct_BL = jnp.where(any_B[:, None], correct_BL, True)
  found_B = jax.nn.logsumexp(logits_BL, axis=-1, where=correct_BL)
  loss_B = jax.nn.logsumexp(logits_BL, axis=-1) - found_B
  return jnp.where(any_B, loss_B, 0.0)
