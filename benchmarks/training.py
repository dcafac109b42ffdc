"""The training step of a config, for the benchmarks that time or compile it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib


class Training:
  """Stage, components, optimizer and compiled step of a resolved config."""

  def __init__(
      self,
      config: config_lib.Config,
      corpus: corpus_lib.Corpus | None = None,
      mesh: jax.sharding.Mesh | None = None,
  ):
    self.config = config
    self.mesh = mesh or mesh_lib.make_mesh(config.mesh, config.batch_size)
    self.stage = stages.load(config)(config, corpus)
    self.components = stages.components_of(config)
    self.tx = optimizer.make_optimizer(config, tuple(self.components))
    self.step = step_lib.make_train_step(
        self.stage, self.components, self.tx, self.mesh
    )
    self.shardings = step_lib.state_shardings(
        config, self.components, self.tx, self.mesh
    )
    self.abstract_state = step_lib.abstract_state(self.components, self.tx)

  def lower(self) -> jax.stages.Lowered:
    return self.step.lower(self.abstract_state, self.stage.abstract_batch())

  def start(self, params: Any = None) -> step_lib.TrainState:
    """Returns the state of step 0 on the devices."""
    if params is None:
      params = {name: c.init(0) for name, c in self.components.items()}
    return jax.device_put(
        step_lib.TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=self.tx.init(params),
            rng=jax.random.key(0),
        ),
        self.shardings,
    )

  def random_batch(self) -> Any:
    """Returns a batch of random wordpieces at full lengths, in numpy."""
    rng = np.random.default_rng(0)

    def value(name: str, x: Any) -> np.ndarray:
      if 'types' in name or x.dtype == bool:
        return np.ones(x.shape, x.dtype)
      if name == 'positions_BM':
        one_row = np.arange(1, x.shape[1] + 1, dtype=x.dtype)
        return np.tile(one_row, (x.shape[0], 1))
      if name == 'passage_B':
        return np.arange(len(x), dtype=x.dtype)
      return rng.integers(5, self.config.model.vocab_size, x.shape, x.dtype)

    abstract = self.stage.abstract_batch()
    return dataclasses.replace(
        abstract,
        **{
            field.name: value(field.name, getattr(abstract, field.name))
            for field in dataclasses.fields(abstract)
        },
    )
