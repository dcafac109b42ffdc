"""The losses, as pure functions of scores and log-probabilities.

All compute in float32; `aux` holds per-example arrays and scalar metrics.
"""

from typing import Any

import jax
import jax.numpy as jnp

Aux = dict[str, jax.Array]


def marginal_mlm(
    score_BK: jax.Array,
    token_logp_BKM: jax.Array,
    mask_BM: jax.Array,
    granularity: str = 'span',
) -> tuple[jax.Array, Aux]:
  """The loss of REALM pre-training (Guu et al. 2020, eq. 1 and 2).

  Negative log-likelihood of the masks, marginal over the K candidates, with
  p(k|x) the softmax of the scores; candidate 0 is the null document:

    span:  - mean_B log sum_k p(k|x) prod_j p(y_j|k,x)
    token: - sum_Bj log sum_k p(k|x) p(y_j|k,x) / number of masks (as released)

  The gradient with respect to a score is -p(k|x) [p(y|k,x) / p(y|x) - 1] / B:
  a document gains when it did better than expected (their section 3.3).

  Args:
    score_BK: relevance of each candidate.
    token_logp_BKM: log p(y_j | k, x); ignored where not masked.
    mask_BM: slots that hold a mask. Examples without a mask are left out.
    granularity: 'span' or 'token'.

  Returns:
    The loss, and aux: retriever_logp_BK, posterior_BK = p(k|x,y), utility_BK
    = log p(y|k,x) - log p(y|null,x), marginal_logp_B = log p(y|x) by span.

  Raises:
    ValueError: for another granularity.
  """
  mask_BM = mask_BM.astype(bool)
  # Before any arithmetic: a nan in an unused slot must not reach the gradient.
  token_logp_BKM = jnp.where(
      mask_BM[:, None], token_logp_BKM.astype(jnp.float32), 0.0
  )
  retriever_logp_BK = jax.nn.log_softmax(score_BK.astype(jnp.float32))
  reader_logp_BK = token_logp_BKM.sum(-1)
  joint_logp_BK = retriever_logp_BK + reader_logp_BK
  marginal_logp_B = jax.nn.logsumexp(joint_logp_BK, axis=1)
  counts_B = mask_BM.any(-1)
  if granularity == 'span':
    total = jnp.where(counts_B, marginal_logp_B, 0.0).sum()
    loss = -total / jnp.maximum(counts_B.sum(), 1)
  elif granularity == 'token':
    marginal_logp_BM = jax.nn.logsumexp(
        retriever_logp_BK[..., None] + token_logp_BKM, axis=1
    )
    total = jnp.where(mask_BM, marginal_logp_BM, 0.0).sum()
    loss = -total / jnp.maximum(mask_BM.sum(), 1)
  else:
    raise ValueError(
        f"granularity={granularity!r}: must be 'span' (the paper) or 'token'"
        ' (the released code).'
    )
  aux = {
      'retriever_logp_BK': retriever_logp_BK,
      'posterior_BK': jnp.exp(joint_logp_BK - marginal_logp_B[:, None]),
      'utility_BK': reader_logp_BK - reader_logp_BK[:, :1],
      'marginal_logp_B': marginal_logp_B,
  }
  return loss, aux


def in_batch_softmax(
    query_emb_BE: jax.Array,
    doc_emb_CE: jax.Array,
    first: jax.typing.ArrayLike = 0,
    same_BC: jax.Array | None = None,
) -> tuple[jax.Array, Aux]:
  """The loss of the inverse cloze task (Lee et al. 2019, section 4.1).

  Cross-entropy of a query's own document among those of the global batch.

  Args:
    query_emb_BE: of the whole batch, or of consecutive rows of it.
    doc_emb_CE: of the whole batch.
    first: the document of query i is number first + i.
    same_BC: documents of the same passage as the query's own document. They are
      no negatives: a copy of the passage from which another sentence was
      removed contains the query. None: all documents are of different passages.

  Returns:
    The mean cross-entropy, and aux: accuracy, the share of queries whose own
    document scores best.
  """
  logits_BC = jnp.einsum('BE,CE->BC', query_emb_BE, doc_emb_CE)
  logits_BC = logits_BC.astype(jnp.float32)
  own = first + jnp.arange(len(query_emb_BE))
  if same_BC is not None:
    others_BC = own[:, None] != jnp.arange(len(doc_emb_CE))
    logits_BC = jnp.where(same_BC & others_BC, -jnp.inf, logits_BC)
  own_B = jnp.take_along_axis(logits_BC, own[:, None], axis=1)[:, 0]
  loss = (jax.nn.logsumexp(logits_BC, axis=1) - own_B).mean()
  # A tie of n best documents counts 1/n: if all embeddings are equal, the
  # accuracy is 1/C.
  best_B = logits_BC.max(axis=1)
  ties_B = (logits_BC == best_B[:, None]).sum(axis=1)
  return loss, {'accuracy': ((own_B == best_B) / ties_B).mean()}


def retrieval_metrics(aux: Aux, counts_B: Any) -> dict[str, jax.Array]:
  """Returns scalar metrics of `marginal_mlm`'s aux; counts_B are weights."""
  weight_B = counts_B / jnp.maximum(counts_B.sum(), 1)
  p_BK = jnp.exp(aux['retriever_logp_BK'])
  real_BK = p_BK[:, 1:]
  utility_B = (real_BK * aux['utility_BK'][:, 1:]).sum(1) / jnp.maximum(
      real_BK.sum(1), 1e-9
  )
  entropy_B = -(p_BK * aux['retriever_logp_BK']).sum(1)
  summary = {
      'null_share': p_BK[:, 0],
      'null_posterior': aux['posterior_BK'][:, 0],
      'retrieval_utility': utility_B,
      'retriever_entropy': entropy_B,
  }
  return {name: (weight_B * x).sum() for name, x in summary.items()}
