"""The knowledge-augmented encoder (Guu et al. 2020, section 3.2).

An encoder over sentence and document, with an MLM head. The vocabulary
projection runs at the masked positions only.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from realm_jax import config as config_lib
from realm_jax.models import bert
from realm_jax.models import dropout
from realm_jax.models import encoders


class Reader(nnx.Module):
  """Predicts the masked wordpieces of `[CLS] x [SEP] body [SEP]`."""

  def __init__(self, config: config_lib.ModelConfig, *, rngs: nnx.Rngs):
    self.bert = encoders.make(config, rngs=rngs)
    bias = self.bert.head_bias
    self.transform = encoders.linear(
        config, config.width, config.width, rngs, bias=bias
    )
    self.transform_norm = encoders.layer_norm(
        config, config.width, rngs, bias=bias
    )
    self.output_bias = nnx.Param(jnp.zeros(config.vocab_size))
    self.activation = config.activation
    self.dtype = config.compute_dtype

  def mlm_logits(
      self,
      ids_BT: jax.Array,
      types_BT: jax.Array,
      positions_BM: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Returns logits over the vocabulary, float32 BMV.

    The output embedding is the input embedding.

    Args:
      ids_BT: `[CLS] x [SEP] body [SEP]` with masks, int32.
      types_BT: 0 for the sentence, 1 for the body.
      positions_BM: of the masks; unused slots may hold any position.
      noise: for dropout; None for none.
    """
    hidden_BMD = self.bert(ids_BT, types_BT, positions_BM, noise)
    b, m, d = hidden_BMD.shape
    hidden = self.transform(hidden_BMD.reshape(b * m, d))  # (B*M) D
    hidden = self.transform_norm(bert.activation(self.activation)(hidden))
    table_VD = self.bert.word_embed.embedding[...].astype(self.dtype)
    logits = jnp.einsum(
        'ND,VD->NV',
        hidden.astype(self.dtype),
        table_VD,
        preferred_element_type=jnp.float32,
    )
    logits += self.output_bias[...][None]
    return logits.reshape(b, m, -1)

  def token_logp(
      self,
      ids_BT: jax.Array,
      types_BT: jax.Array,
      positions_BM: jax.Array,
      targets_BM: jax.Array,
      noise: dropout.Noise | None = None,
  ) -> jax.Array:
    """Returns the log-probability of each masked wordpiece, float32 BM."""
    logits_BMV = self.mlm_logits(ids_BT, types_BT, positions_BM, noise)
    target_BM = jnp.take_along_axis(
        logits_BMV, targets_BM[..., None], axis=-1
    )[..., 0]
    return target_BM - jax.nn.logsumexp(logits_BMV, axis=-1)
