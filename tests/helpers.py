"""Functions that several test modules share."""

from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.trainer import examples
from realm_jax.trainer import stages


def batches(corpus, config, **options):
  """Returns the training batches of a config's stage."""
  stage = stages.load(config)(config, corpus)
  return examples.training_batches(stage, **options)


def loss_function(stage, components):
  """Returns loss(params, batch, key) -> (loss, metrics), on one device.

  The key is for dropout; None for none.
  """

  def loss(params, batch, key):
    rows = len(batch.query_ids_BQ)
    noise = None if key is None else dropout.noise(key, rows)
    models = components_lib.bind(components, params)
    return stage.loss(stage.outputs(models, batch, noise), batch)

  return loss
