"""The retriever: text to a vector of width E, scored by inner product.

By default BERT -> tanh-pooled [CLS] -> linear -> LayerNorm (Guu et al. 2020,
section 3.2; the LayerNorm as released), without L2 norm or temperature. The
config has the poolings and projections of other retrievers.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import dropout
from realm_jax.models import encoders

# Prefix of the names of parameters that only queries pass through.
QUERY_PREFIX = 'query_'
LOG_SCORE_SCALE = 'log_score_scale'  # A parameter, if the scale is learned.
_LEAST_NORM = 1e-12  # As in PyTorch.


class Projection(nnx.Module):
  """From the pooled state to the retrieval embedding."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    width = config.embedding_width
    self.dense = encoders.linear(config, config.width, width, rngs)
    self.has_norm = config.projection == 'layer_norm'
    if self.has_norm:
      eps = config.projection_norm_eps or config.layer_norm_eps
      config = dataclasses.replace(config, layer_norm_eps=eps)
      self.norm = encoders.layer_norm(
          config, width, rngs, config.embedding_scale_init
      )

  def __call__(self, pooled_BD: jax.Array) -> jax.Array:
    emb_BE = self.dense(pooled_BD)
    return self.norm(emb_BE) if self.has_norm else emb_BE


class PooledBert(nnx.Module):
  """A BERT, and one vector of its last hidden states."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.bert = encoders.make(config, rngs=rngs)
    self.pooling, self.pad_id = config.pooling, config.pad_id
    if config.pooling == 'cls_tanh':
      self.pooler = encoders.linear(config, config.width, config.width, rngs)

  def __call__(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    real_BL = ids_BL != self.pad_id
    if self.pooling == 'mean':
      hidden_BLD = self.bert(ids_BL, types_BL, None, noise)
      hidden_BLD = hidden_BLD.astype(jnp.float32)
      total_BD = jnp.einsum('BLD,BL->BD', hidden_BLD, real_BL.astype('float32'))
      # A row of padding alone, which fills a batch, has no wordpiece.
      return total_BD / jnp.maximum(real_BL.sum(1, keepdims=True), 1)
    at_B1 = jnp.zeros((ids_BL.shape[0], 1), jnp.int32)
    if self.pooling == 'last':
      length_B1 = real_BL.sum(1, keepdims=True, dtype=jnp.int32)
      at_B1 = jnp.maximum(length_B1 - 1, 0)
    pooled_BD = self.bert(ids_BL, types_BL, at_B1, noise)[:, 0]
    if self.pooling == 'cls_tanh':
      pooled_BD = jnp.tanh(self.pooler(pooled_BD))
    return pooled_BD


class Embedder(nnx.Module):
  """Embeds queries and documents; `config.towers` says what they share."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.encoder = PooledBert(config, rngs=rngs)
    self.projects = config.projection != 'none'
    if self.projects:
      self.projection = Projection(config, rngs=rngs)
    self.towers, self.normalize = config.towers, config.normalize
    self.score_scale = config.score_scale
    self.learns_scale = config.learn_score_scale
    if self.learns_scale:
      self.log_score_scale = nnx.Param(jnp.log(jnp.float32(self.score_scale)))
    # Both towers start from the same weights. With independent initialisation,
    # ICT does not learn enough for REALM to start from (docs/results.md).
    if config.towers != 'shared' and self.projects:
      self.query_projection = nnx.clone(self.projection)
    if config.towers == 'separate':
      self.query_encoder = nnx.clone(self.encoder)

  def embed_query(
      self, ids_BQ: jax.Array, noise: dropout.Noise | None = None
  ) -> jax.Array:
    """Embeds `[CLS] x [SEP]`, all segment 0; returns float32 BE.

    The embedding is multiplied by the score scale.
    """
    separate = self.towers == 'separate'
    encoder = self.query_encoder if separate else self.encoder
    pooled_BD = encoder(ids_BQ, jnp.zeros_like(ids_BQ), noise)
    own = 'projection' if self.towers == 'shared' else 'query_projection'
    emb_BE = self._finish(pooled_BD, own)
    if self.learns_scale:
      emb_BE *= jnp.exp(self.log_score_scale[...])
    elif self.score_scale != 1:
      emb_BE *= self.score_scale
    return emb_BE

  def embed_document(
      self,
      ids_BS: jax.Array,
      types_BS: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Embeds `[CLS] title [SEP] body [SEP]`, returns float32 BE."""
    pooled_BD = self.encoder(ids_BS, types_BS, noise)
    return self._finish(pooled_BD, 'projection')

  def _finish(self, pooled_BD: jax.Array, projection: str) -> jax.Array:
    emb_BE = pooled_BD
    if self.projects:
      emb_BE = getattr(self, projection)(pooled_BD)
    emb_BE = emb_BE.astype(jnp.float32)
    if self.normalize:
      square_B1 = jnp.square(emb_BE).sum(-1, keepdims=True)
      emb_BE *= jax.lax.rsqrt(jnp.maximum(square_B1, _LEAST_NORM**2))
    return emb_BE


def score(query_emb_BE: jax.Array, doc_emb_BKE: jax.Array) -> jax.Array:
  """Returns f(x, z) = Embed_input(x)^T Embed_doc(z), float32 BK."""
  return jnp.einsum('BE,BKE->BK', query_emb_BE, doc_emb_BKE)
