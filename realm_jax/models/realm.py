"""Retrieve-then-predict over given candidates: scores and readings.

Public: `candidate_scores`, `read`, `read_targets`. The candidates come as
wordpieces; who chose them is not this module's concern. Scores are computed
with the current parameters, whatever index the candidates came from, and
gradients flow to both towers (Guu et al. 2020, section 3.3).
"""

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.models import components
from realm_jax.models import dropout
from realm_jax.models import embedder as embedder_lib

# Of a null document that is no candidate: exp of it is 0, and unlike with
# -inf, 0 times it is no nan.
_NEVER = -1e9


def candidate_scores(
    embedder: components.Component,
    params: components.Params,
    query_ids_BQ: jax.Array,
    doc_ids_BJS: jax.Array,
    doc_types_BJS: jax.Array,
    null_ids: tuple[int, int, int] | None,
    noise: dropout.Noise | None = None,
) -> jax.Array:
  """Scores the null document and the retrieved ones.

  Args:
    embedder: the component.
    params: its parameters.
    query_ids_BQ: `[CLS] x [SEP]`.
    doc_ids_BJS: `[CLS] title [SEP] body [SEP]` of the retrieved documents.
    doc_types_BJS: their segments.
    null_ids: the null document, `[CLS] [SEP] [SEP]`. It is the same for all
      queries and is embedded once. None: it keeps its place, with a score that
      makes its probability 0.
    noise: for dropout in the query tower; documents are embedded without.

  Returns:
    score_BK, float32; candidate 0 is the null document.
  """
  b, j, s = doc_ids_BJS.shape
  query_emb_BE = embedder.apply(params, 'embed_query', query_ids_BQ, noise)
  doc_emb = embedder.apply(  # (B*J) E
      params,
      'embed_document',
      doc_ids_BJS.reshape(b * j, s),
      doc_types_BJS.reshape(b * j, s),
  )
  real_BJ = embedder_lib.score(query_emb_BE, doc_emb.reshape(b, j, -1))
  if null_ids is None:
    return jnp.pad(real_BJ, ((0, 0), (1, 0)), constant_values=_NEVER)
  null_emb_1E = embedder.apply(
      params,
      'embed_document',
      jnp.asarray(np.array([null_ids], np.int32)),
      jnp.asarray(np.array([[0, 0, 1]], np.int32)),
  )
  null_B1 = jnp.einsum('BE,XE->BX', query_emb_BE, null_emb_1E)
  return jnp.concatenate([null_B1, real_BJ], axis=1)


def read(
    reader: components.Component,
    params: components.Params,
    joint_ids_BKT: jax.Array,
    joint_types_BKT: jax.Array,
    positions_BM: jax.Array,
) -> jax.Array:
  """Returns the logits of each mask given each candidate, logits_BKMV."""
  b, k, _ = joint_ids_BKT.shape
  logits = reader.apply(
      params,
      'mlm_logits',
      *_flat(joint_ids_BKT, joint_types_BKT),
      jnp.repeat(positions_BM, k, axis=0),
  )
  return logits.reshape(b, k, *logits.shape[1:])


def read_targets(
    reader: components.Component,
    params: components.Params,
    joint_ids_BKT: jax.Array,
    joint_types_BKT: jax.Array,
    positions_BM: jax.Array,
    targets_BM: jax.Array,
    noise: dropout.Noise | None = None,
) -> jax.Array:
  """Returns log p(y_j | z_k, x) of the masked wordpieces, token_logp_BKM."""
  b, k, _ = joint_ids_BKT.shape
  token_logp = reader.apply(
      params,
      'token_logp',
      *_flat(joint_ids_BKT, joint_types_BKT),
      # The sentence comes first, so its masks are at the same positions in
      # front of every candidate.
      jnp.repeat(positions_BM, k, axis=0),
      jnp.repeat(targets_BM, k, axis=0),
      None if noise is None else noise.repeat(k),
  )
  return token_logp.reshape(b, k, -1)


def _flat(*arrays_BKT: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(x.reshape(-1, x.shape[-1]) for x in arrays_BKT)  # (B*K) T
