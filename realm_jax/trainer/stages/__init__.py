"""The objectives ("stages"), one file each, in the order of the paper.

A stage makes examples from the corpus (mask), retrieves documents for them if
it searches, computes its networks' outputs, its loss, and says what a step
costs. `config.objective` names one of `STAGES` or a class of one's own, as
`package.module:Class`; docs/extending.md has an example.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import typing
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import flops
from realm_jax.runtime import distributed
from realm_jax.runtime import extension
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import examples

STAGES = {
    'mlm': 'realm_jax.trainer.stages.mlm:Mlm',
    'ict': 'realm_jax.trainer.stages.ict:Ict',
    'realm': 'realm_jax.trainer.stages.realm:Realm',
    'open_qa': 'realm_jax.trainer.stages.open_qa:OpenQa',
    'tagger': 'realm_jax.trainer.stages.tagger:Tagger',
}

Metrics = dict[str, jax.Array]
Problems = Iterator[tuple[str, str]]
T = TypeVar('T')


class Index(Protocol):
  """An index generation: a search, and the table that it searches."""

  @property
  def search(self) -> search_lib.Search: ...

  @property
  def embeddings(self) -> Any: ...


class Retriever:
  """Embeds with the current parameters, searches in the index in use.

  All processes of a job search together, each for its rows of a batch.
  """

  def __init__(
      self,
      embedder: components_lib.Component,
      mesh: jax.sharding.Mesh,
      index: Index,
      rows: np.ndarray,
      template: inputs.Template,
      wait: Callable[[components_lib.Params], Any] = jax.block_until_ready,
  ):
    """Compiles nothing yet.

    Args:
      embedder: of the job.
      mesh: of the job.
      index: the one in use, which may change from step to step.
      rows: this process' rows of a batch.
      template: of the job.
      wait: blocks until the step before has made the parameters.
    """
    self.params: components_lib.Params = {}  # Current parameters.
    self._mesh, self._index, self._rows = mesh, index, rows
    self._embedder = embedding.Embedder(embedder, mesh)
    self._template, self._wait = template, wait

  def search(
      self, query_ids_BQ: np.ndarray, k: int, exclude_BR2: np.ndarray | None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the passage rows [B, k], best first, and query_emb_BE."""
    # Embeddings of the whole batch, of which each process gave its rows. They
    # begin on the devices as soon as the step before has ended there.
    query_ids = self._on_devices(self._template.queries(query_ids_BQ))
    query_emb = self._embedder.queries(self.params, query_ids)
    self._wait(self.params)
    search = self._index.search
    if not search.collective:
      own_emb_BE = distributed.fetch(query_emb)[self._rows]
      return search.search(own_emb_BE, k, exclude_BR2), own_emb_BE
    # The table lies on the devices of all processes, which search together.
    if jax.process_count() > 1:
      query_emb = distributed.fetch(query_emb)
      if exclude_BR2 is not None:
        exclude_BR2 = distributed.fetch(self._on_devices(exclude_BR2))
    rows_BK = search.search(query_emb, k, exclude_BR2)[self._rows]
    return rows_BK, distributed.fetch(query_emb)[self._rows]

  def embeddings(self, rows_BN: np.ndarray) -> np.ndarray:
    """Returns the embeddings of passages in the index, float32 [B, N, E]."""
    return search_lib.gather(self._index.embeddings, rows_BN)

  def embed_documents(
      self, ids_BLS: np.ndarray, types_BLS: np.ndarray
  ) -> np.ndarray:
    """Returns embeddings with the current parameters, float32 [B, L, E]."""
    ids, types = self._on_devices(ids_BLS), self._on_devices(types_BLS)
    emb_BLE = self._embedder.documents(self.params, ids, types)
    return distributed.fetch(emb_BLE)[self._rows]

  def _on_devices(self, array: np.ndarray) -> Any:
    return mesh_lib.to_devices(self._mesh, array)


class Stage:
  """An objective. A stage overrides what it needs; no method calls another.

  A batch is a dataclass of arrays, a JAX pytree, whose first dimension is B.
  `outputs` treats each row of it alone; `loss` may combine rows (`in_batch`).

  Attributes:
    components: networks that it trains, keys of `models.components`.
    searches: whether batches need documents from an index.
    in_batch: whether the loss of a row depends on the other rows.
    headline: the metric that the progress bar shows, with the loss.
    config: resolved.
    lineage: digests of inputs other than the corpus; saved with checkpoints
      and compared when a job resumes.
  """

  components: ClassVar[tuple[str, ...]]
  searches: ClassVar[bool] = False
  in_batch: ClassVar[bool] = False
  headline: ClassVar[str] = ''

  def __init__(
      self, config: config_lib.Config, corpus: corpus_lib.Corpus | None = None
  ):
    """Opens the stage of a job.

    Args:
      config: resolved.
      corpus: of the job; None for a stage whose step is only traced.

    Raises:
      ValueError, FileNotFoundError: the corpus or another input is not fit.
    """
    self.config = config
    self._corpus = corpus
    self.lineage: dict[str, str] = {}

  @property
  def corpus(self) -> corpus_lib.Corpus:
    if self._corpus is None:
      raise ValueError('This stage was opened without a corpus.')
    return self._corpus

  @functools.cached_property
  def template(self) -> inputs.Template:
    """The form of the retriever's queries and documents."""
    return inputs.Template.of(
        self.config.model, self.config.lengths, self.corpus.tokenizer
    )

  @classmethod
  def problems(cls, config: config_lib.Config) -> Problems:
    """Yields (field, what is wrong with it) of a config with right types."""
    del config
    yield from ()

  @classmethod
  def complete(cls, config: config_lib.Config) -> None:
    """Fills in fields of a resolved config that its inputs determine."""

  @classmethod
  def longest_input(cls, config: config_lib.Config) -> int:
    """Returns the length of the longest input of a network, in wordpieces."""
    return config.lengths.joint

  # On the host, in numpy.

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    """Returns what examples are drawn from: name -> (source, its share).

    The names are those of the random streams.
    """
    raise NotImplementedError

  def assemble(self, samples: Any) -> examples.Examples:
    """Makes a batch of stacked samples of the sources."""
    raise NotImplementedError

  def retrieve(self, queries: Any, retriever: Retriever) -> Any:
    """Completes the inputs of a batch with documents (`searches` only)."""
    raise NotImplementedError

  def figures(self, batch: Any) -> dict[str, np.ndarray]:
    """Returns metrics of each row, float [B], that the host computes.

    `train/*` has the means over the rows of process 0.
    """
    del batch
    return {}

  def probe_queries(self, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns fixed queries to compare indexes with (`searches` only).

    Returns:
      query_ids_BQ, exclude_BR2 and how many documents a step uses of each.
    """
    raise NotImplementedError

  # On devices, in JAX.

  def outputs(
      self,
      models: components_lib.Models,
      batch: Any,
      noise: dropout.Noise | None,
  ) -> Any:
    """Computes what the loss needs of each row, with the models' parameters."""
    raise NotImplementedError

  def loss(
      self, outputs: Any, batch: Any, axis: str | None = None
  ) -> tuple[jax.Array, Metrics]:
    """Returns loss and metrics, means over the rows given.

    Args:
      outputs: of `outputs`.
      batch: the same rows.
      axis: mesh axis over which other devices have the rest of the batch.
    """
    raise NotImplementedError

  def counts(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns how many terms the means of loss and of metrics are over.

    With them, means of parts of a batch add up to that of the whole.
    """
    raise NotImplementedError

  def learned(self, metrics: Metrics) -> jax.Array | None:
    """Returns whether a step learned from its batch; None: it always does."""
    del metrics
    return None

  # Cost.

  def passes(self) -> list[flops.Pass]:
    """Returns the forward passes of a step, all devices together."""
    raise NotImplementedError

  def abstract_batch(self) -> Any:
    """Returns a batch of jax.ShapeDtypeStruct, to trace a step without data."""
    raise NotImplementedError


@typing.dataclass_transform(frozen_default=True)
def batch(cls: type[T]) -> type[T]:
  """Decorator: a frozen dataclass that is a JAX pytree."""
  frozen = dataclasses.dataclass(frozen=True)(cls)
  return jax.tree_util.register_dataclass(frozen)


def load(config: config_lib.Config) -> type[Stage]:
  """Returns the class that `config.objective` names.

  Raises:
    ValueError: no such stage, or what is named is not one.
  """
  name = config.objective
  found = extension.load('config.objective', name, STAGES)
  if not (isinstance(found, type) and issubclass(found, Stage)):
    raise ValueError(
        f'config.objective={name!r} names {found!r}, which is not a subclass of'
        ' realm_jax.trainer.stages.Stage.'
    )
  return found


def components_of(
    config: config_lib.Config, device: jax.Device | None = None
) -> dict[str, components_lib.Component]:
  """Returns the components that a config's stage trains; see `make`."""
  names = load(config).components
  return components_lib.make_all(names, config.model, device)
