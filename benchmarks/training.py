"""The training step of a config, for the benchmarks that time or compile it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import topk
from realm_jax.models import components as components_lib
from realm_jax.models import flops
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
    self._step = step_lib.make_train_step(
        self.stage, self.components, self.tx, self.mesh
    )
    self.rates = optimizer.learning_rates(config, self.components, 0)
    self.shardings = step_lib.state_shardings(
        config, self.components, self.tx, self.mesh
    )
    self.abstract_state = step_lib.abstract_state(self.components, self.tx)

  def lower(self, state: Any = None, batch: Any = None) -> jax.stages.Lowered:
    """Lowers the step; None: for abstract arrays."""
    return self._step.lower(
        state or self.abstract_state,
        batch or self.stage.abstract_batch(),
        self.rates,
    )

  def step(self, state: step_lib.TrainState, batch: Any) -> Any:
    """Returns the next state and the metrics, at the rates of step 0."""
    return self._step(state, batch, self.rates)

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


def embed_documents(
    component: components_lib.Component,
    params: components_lib.Params,
    ids_NS: jax.Array,
    types_NS: jax.Array,
) -> jax.Array:
  return component.module(params).embed_document(ids_NS, types_NS)


def abstract_search(
    mesh: jax.sharding.Mesh, rows: int, queries: int, config: config_lib.Config
) -> tuple[Any, ...]:
  """Returns abstract arguments of `topk.top_rows` for a bfloat16 table."""
  width, whole = config.model.embedding_width, mesh_lib.replicated(mesh)

  def array(shape: tuple[int, ...], dtype: Any, where: Any = whole) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  divided = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
  return (
      array((topk.aligned(rows, mesh), width), jnp.bfloat16, divided),
      array((queries, width), jnp.float32),
      array((queries, 1, 2), jnp.int32),
      None,
      array((2,), jnp.int32),
  )


def reference_flop(
    config: config_lib.Config, null_once: bool = True, everywhere: bool = False
) -> float:
  """FLOP of the matrix products of the step of transformers.

  The last layer is computed at all positions.

  Args:
    config: of the same step of ours.
    null_once: the null document is embedded once, unpadded; else for each
      example, as long as any document.
    everywhere: the vocabulary is projected at all positions; else at masks.
  """
  lengths, rows = config.lengths, config.batch_size * config.num_candidates
  texts = [(config.batch_size, lengths.query), (rows, lengths.joint)]
  if null_once:
    texts += [(1, 3), (rows - config.batch_size, lengths.document)]
  else:
    texts += [(rows, lengths.document)]
  outputs = rows * (lengths.joint if everywhere else lengths.masks)
  return 3 * (
      flops.head_flop(config.model, outputs)
      + sum(flops.pass_flop(config.model, n, s, s) for n, s in texts)
  )


class LoggedSteps:
  """The steps of a job with refreshes that logged a line for each.

  Attributes:
    seconds, loading, busy, quiet: arrays of an entry for each step: its
      seconds; whether a generation was loading; whether one was loading or
      adopted; whether the step met no part of a refresh.
    stalls, waits: seconds of each adoption, and those of waiting among them.
  """

  def __init__(self, lines: list[dict[str, Any]], interval: int, batch: int):
    self.seconds = np.array(
        [batch / x['time/examples_per_second'] for x in lines]
    )
    self.loading = np.array([bool(x['refresh/loading']) for x in lines])
    adopted = np.array([x['refresh/adopted'] for x in lines])
    swapped = np.diff(adopted, prepend=adopted[0]) > 0
    # A line is written in the middle of the next step, after that one's swap
    # and snapshot: its seconds hold the end of one step and the top of the
    # next.
    busy = self.loading | swapped
    busy[:-1] |= busy[1:]
    # A snapshot is taken and written in these.
    near = np.isin(
        [(x['step'] - 1) % interval for x in lines], (0, 1, 2, interval - 1)
    )
    # Before, steps are compiled, and an index may be missing.
    started = np.arange(len(lines)) >= interval
    self.busy, self.quiet = busy & started, ~busy & ~near & started
    adoptions = [lines[i] for i in np.flatnonzero(swapped)]
    self.stalls = [x['refresh/last_stall_seconds'] for x in adoptions]
    self.waits = [x['refresh/last_wait_seconds'] for x in adoptions]
