"""The retriever's towers: text to an E-wide vector, scored by inner product.

Public: `Embedder`, `score`. BERT -> tanh-pooled [CLS] -> linear -> LayerNorm
(Guu et al. 2020, section 3.2; the LayerNorm as released). There is no L2 norm
and no temperature.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import bert
from realm_jax.models import dropout


class Projection(nnx.Module):
  """From the pooled [CLS] to the retrieval embedding."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    width = config.embedding_width
    self.dense = bert.linear(config, config.width, width, rngs)
    self.norm = bert.layer_norm(
        config, width, rngs, config.embedding_scale_init
    )

  def __call__(self, pooled_BD: jax.Array) -> jax.Array:
    return self.norm(self.dense(pooled_BD))


class PooledBert(nnx.Module):
  """BERT's [CLS] through the tanh pooler."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.bert = bert.Bert(config, rngs=rngs)
    self.pooler = bert.linear(config, config.width, config.width, rngs)

  def __call__(
      self,
      ids_BL: jax.Array,
      types_BL: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    cls_B1 = jnp.zeros((ids_BL.shape[0], 1), jnp.int32)
    cls_B1D = self.bert(ids_BL, types_BL, cls_B1, noise)
    return jnp.tanh(self.pooler(cls_B1D[:, 0]))


class Embedder(nnx.Module):
  """Queries and documents in one space; `config.towers`: what they share."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.encoder = PooledBert(config, rngs=rngs)
    self.projection = Projection(config, rngs=rngs)
    self.towers = config.towers
    # Towers begin as one: from towers that begin apart, a sentence is no nearer
    # to itself than to any other, and what ICT learns from that is too little
    # for REALM to begin with (docs/results.md).
    if config.towers != 'shared':
      self.query_projection = nnx.clone(self.projection)
    if config.towers == 'separate':
      self.query_encoder = nnx.clone(self.encoder)

  def embed_query(
      self, ids_BQ: jax.Array, noise: dropout.Noise | None = None
  ) -> jax.Array:
    """Embeds `[CLS] x [SEP]`, all of segment 0. Returns float32 BE."""
    separate = self.towers == 'separate'
    encoder = self.query_encoder if separate else self.encoder
    shared = self.towers == 'shared'
    projection = self.projection if shared else self.query_projection
    return projection(encoder(ids_BQ, jnp.zeros_like(ids_BQ), noise))

  def embed_document(
      self,
      ids_BS: jax.Array,
      types_BS: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Embeds `[CLS] title [SEP] body [SEP]`, segments 0 and 1: float32 BE."""
    return self.projection(self.encoder(ids_BS, types_BS, noise))


def score(query_emb_BE: jax.Array, doc_emb_BKE: jax.Array) -> jax.Array:
  """Relevance f(x, z) = Embed_input(x)^T Embed_doc(z), float32 BK."""
  return jnp.einsum('BE,BKE->BK', query_emb_BE, doc_emb_BKE)
