"""The networks of a job by name, with their parameters as flat dictionaries.

The parameters of a component, `{'bert.layers.0.query.kernel': array, ...}`, are
what the optimizer, the checkpoints, the digests and the importers see.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import math
import types
from typing import Any
import zlib

from flax import nnx
import jax

from realm_jax import config as config_lib
from realm_jax.models import attention
from realm_jax.models import embedder
from realm_jax.models import reader
from realm_jax.models import span_reader
from realm_jax.models import tagger

Params = dict[str, Any]  # Of one component: dotted name -> array.

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
  config: config_lib.ModelConfig  # `attention` is the kernel in use.
  graphdef: Any
  abstract: dict[str, jax.ShapeDtypeStruct]

  @property
  def size(self) -> int:
    """Number of parameters."""
    return sum(math.prod(x.shape) for x in self.abstract.values())

  def init(self, seed: int) -> Params:
    """Fresh parameters; each component draws from a stream of its own."""
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

  def apply(
      self, params: Params, method: str, *args: Any, **kwargs: Any
  ) -> Any:
    """Calls `method` of the module that holds `params`."""
    return getattr(self.module(params), method)(*args, **kwargs)


class Models(types.SimpleNamespace):
  """The networks of a job with their parameters; it has those of its stage."""

  embedder: embedder.Embedder
  reader: reader.Reader
  span_reader: span_reader.SpanReader
  tagger: tagger.Tagger


def bind(
    components: Mapping[str, Component], params: Mapping[str, Params]
) -> Models:
  """Returns the modules that hold `params`; inside jit, at no cost."""
  return Models(**{n: c.module(params[n]) for n, c in components.items()})


def make(
    name: str,
    config: config_lib.ModelConfig,
    device: jax.Device | None = None,
) -> Component:
  """Returns a component.

  Args:
    name: one of `_MODULES`.
    config: resolved.
    device: a device of the kind that computes, which decides the kernel of the
      attention; None for the one that JAX computes on.
  """
  config = dataclasses.replace(
      config, attention=attention.choose(config, device)
  )
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
  """Returns several components by name; see `make`."""
  return {name: make(name, config, device) for name in names}


def _flatten(state: nnx.State) -> dict[str, Any]:
  return {
      '.'.join(map(str, path)): variable[...]
      if not isinstance(variable.get_value(), jax.ShapeDtypeStruct)
      else variable.get_value()
      for path, variable in nnx.to_flat_state(state)
  }


def _path(name: str) -> tuple[str | int, ...]:
  return tuple(int(p) if p.isdigit() else p for p in name.split('.'))
