"""The retriever: text to a vector of width E, scored by inner product.

BERT -> tanh-pooled [CLS] -> linear -> LayerNorm (Guu et al. 2020, section 3.2;
the LayerNorm as released), without L2 norm or temperature.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import bert
from realm_jax.models import dropout
from realm_jax.models import encoders

# Prefix of the names of parameters that only queries pass through.
QUERY_PREFIX = 'query_'


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
    self.bert = encoders.make(config, rngs=rngs)
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
  """Embeds queries and documents; `config.towers` says what they share."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.encoder = PooledBert(config, rngs=rngs)
    self.projection = Projection(config, rngs=rngs)
    self.towers = config.towers
    # Both towers start from the same weights. With independent initialisation,
    # ICT does not learn enough for REALM to start from (docs/results.md).
    if config.towers != 'shared':
      self.query_projection = nnx.clone(self.projection)
    if config.towers == 'separate':
      self.query_encoder = nnx.clone(self.encoder)

  def embed_query(
      self, ids_BQ: jax.Array, noise: dropout.Noise | None = None
  ) -> jax.Array:
    """Embeds `[CLS] x [SEP]`, all segment 0; returns float32 BE."""
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
    """Embeds `[CLS] title [SEP] body [SEP]`, returns float32 BE."""
    return self.projection(self.encoder(ids_BS, types_BS, noise))


def score(query_emb_BE: jax.Array, doc_emb_BKE: jax.Array) -> jax.Array:
  """Returns f(x, z) = Embed_input(x)^T Embed_doc(z), float32 BK."""
  return jnp.einsum('BE,BKE->BK', query_emb_BE, doc_emb_BKE)
