"""The networks of a job by name, with their parameters as flat dictionaries.

Optimizer, checkpoints, digests and importers see a component's parameters as
`{'bert.layers.0.query.kernel': array, ...}`.
"""

from collections.abc import Iterable, Mapping
import copy
import dataclasses
import math
import types
from typing import Any
import zlib

from flax import nnx
import jax

from realm_jax import config as config_lib
from realm_jax.models import embedder
from realm_jax.models import fused_attention
from realm_jax.models import reader
from realm_jax.models import span_reader
from realm_jax.models import tagger

Params = dict[str, Any]  # One component's: dotted name -> array.

_MODULES = {
    'embedder': embedder.Embedder,
    'reader': reader.Reader,
    'span_reader': span_reader.SpanReader,
    'tagger': tagger.Tagger,
}


@dataclasses.dataclass(frozen=True)
class Component:
  """A module without its parameters."""

  name: str
  config: config_lib.ModelConfig  # With `attention` resolved to a kernel.
  graphdef: Any
  abstract: dict[str, jax.ShapeDtypeStruct]

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in self.abstract.values())

  def init(self, seed: int) -> Params:
    """Returns initial parameters, drawn from the component's own stream."""
    key = jax.random.fold_in(
        jax.random.key(seed), zlib.crc32(self.name.encode())
    )
    module = _MODULES[self.name](self.config, rngs=nnx.Rngs(key))
    return _flatten(nnx.state(module, nnx.Param))

  def module(self, params: Params) -> Any:
    """Returns the module that holds `params`."""
    state = nnx.from_flat_state(
        [(_path(name), nnx.Param(value)) for name, value in params.items()]
    )
    return nnx.merge(self.graphdef, state)


class Models(types.SimpleNamespace):
  """The networks of a job's stage, with their parameters."""

  embedder: embedder.Embedder
  reader: reader.Reader
  span_reader: span_reader.SpanReader
  tagger: tagger.Tagger


def bind(
    components: Mapping[str, Component], params: Mapping[str, Params]
) -> Models:
  """Returns the modules that hold `params`; costs nothing under jit."""
  return Models(**{n: c.module(params[n]) for n, c in components.items()})


def make(
    name: str, config: config_lib.ModelConfig, device: jax.Device | None = None
) -> Component:
  """Returns a component.

  Args:
    name: 'embedder', 'reader', 'span_reader' or 'tagger'.
    config: a default in it (`config.resolve`) is that of its encoder.
    device: of the kind to compute on, which decides the attention kernel; None
      for JAX's default device.
  """
  config = copy.copy(config)
  config_lib.complete(config)
  config.attention = fused_attention.choose(config, device)
  abstract = nnx.eval_shape(
      lambda: _MODULES[name](config, rngs=nnx.Rngs(jax.random.key(0)))
  )
  graphdef, state = nnx.split(abstract)
  return Component(name, config, graphdef, _flatten(state))


def make_all(
    names: Iterable[str],
    config: config_lib.ModelConfig,
    device: jax.Device | None = None,
) -> dict[str, Component]:
  """Returns components by name; see `make`."""
  return {name: make(name, config, device) for name in names}


def is_frozen(config: config_lib.Config, name: str) -> bool:
  """Returns whether all parameters whose names begin with `name` are frozen."""
  return any(f'{name}.'.startswith(f'{x}.') for x in config.optimizer.frozen)


def partition(config: config_lib.Config, tree: Any) -> tuple[Any, Any]:
  """Divides {component: {name: x}} into the part that learns and the frozen."""
  learned: dict[str, Any] = {name: {} for name in tree}
  frozen: dict[str, Any] = {name: {} for name in tree}
  for component, leaves in tree.items():
    for name, x in leaves.items():
      part = frozen if is_frozen(config, f'{component}.{name}') else learned
      part[component][name] = x
  return learned, frozen


def _flatten(state: nnx.State) -> dict[str, Any]:
  return {
      '.'.join(map(str, path)): variable[...]
      if not isinstance(variable.get_value(), jax.ShapeDtypeStruct)
      else variable.get_value()
      for path, variable in nnx.to_flat_state(state)
  }


def _path(name: str) -> tuple[str | int, ...]:
  return tuple(int(p) if p.isdigit() else p for p in name.split('.'))
