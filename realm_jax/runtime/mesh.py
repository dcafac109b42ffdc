"""The device mesh; how batches and parameters are divided over it.

Mesh axes are of type Auto, and shardings are pinned at the borders of `jit`.
The model code reads as for one device; tests on 8 devices check that the
compiled program computes the same.

A parameter is divided by its name, see `RULES`. Adam's moments have the names
of their parameters and are divided alike.

    model  heads and MLP by column, then by row (Shoeybi et al. 2019), so that
           a layer exchanges activations twice; the vocabulary by row.
    data   nothing, or with `mesh.zero` one more dimension of every matrix
           (ZeRO, Rajbhandari et al. 2020): gathered when a step begins; its
           gradient is reduced to the part that the device updates.
"""

from collections.abc import Callable
import functools
import math
import re
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib

DATA, MODEL = 'data', 'model'

# Pattern of the end of a parameter's name, and the mesh axis of each dimension.
# The first match counts; other parameters are whole on every device. A kernel
# is (inputs, outputs).
RULES: tuple[tuple[str, jax.P], ...] = (
    (r'layers\.\d+\.(query|key|value|mlp_in)\.kernel', jax.P(None, MODEL)),
    (r'layers\.\d+\.(query|key|value|mlp_in)\.bias', jax.P(MODEL)),
    (r'layers\.\d+\.(attention_output|mlp_out)\.kernel', jax.P(MODEL, None)),
    (r'word_embed\.embedding', jax.P(MODEL, None)),
    (r'output_bias', jax.P(MODEL)),
)


def axis_sizes(
    config: config_lib.MeshConfig, devices: int, batch_size: int | None = None
) -> tuple[int, int]:
  """Returns the numbers of devices along `data` and along `model`.

  Raises:
    ValueError: the sizes do not multiply to the number of devices, or the
      `data` axis does not divide the batch.
  """
  sizes = [config.data, config.model]
  if -1 in sizes:
    known = math.prod(size for size in sizes if size != -1)
    sizes[sizes.index(-1)] = max(devices // known, 1)
  if math.prod(sizes) != devices:
    raise ValueError(
        f'config.mesh: data={config.data} x model={config.model} does not make'
        f' up the {devices} device(s) of this job; -1 stands for the rest.'
    )
  if batch_size is not None and batch_size % sizes[0]:
    raise ValueError(
        f'config.batch_size={batch_size} cannot be divided over the'
        f' {sizes[0]} device(s) of mesh axis `data`.'
    )
  return sizes[0], sizes[1]


def make_mesh(
    config: config_lib.MeshConfig, batch_size: int | None = None
) -> jax.sharding.Mesh:
  """Returns the mesh over all devices of all processes; see `axis_sizes`."""
  return jax.make_mesh(
      axis_sizes(config, jax.device_count(), batch_size),
      (DATA, MODEL),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def one_device() -> jax.sharding.Mesh:
  """Returns a mesh of the first device."""
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  return jax.sharding.Mesh(devices, (DATA, MODEL))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The whole array on every device."""
  return jax.NamedSharding(mesh, jax.P())


def over_batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The first dimension divided over the data axis."""
  return jax.NamedSharding(mesh, jax.P(DATA))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Returns the rows of a batch on this process' devices, ascending."""
  size = batch_size // mesh.shape[DATA]
  parts = _local_parts(mesh)[:, None] * size + np.arange(size)
  return parts.reshape(-1)


def to_devices(mesh: jax.sharding.Mesh, batch: Any) -> Any:
  """Puts this process' rows of a batch, `local_rows`, on its devices.

  The result is the whole batch in its order. If `model` spans processes,
  several of them give the same rows.
  """
  sharding, parts = over_batch(mesh), _local_parts(mesh)

  def put(array: np.ndarray) -> jax.Array:
    size = len(array) // len(parts)

    def read(index: tuple[slice, ...]) -> np.ndarray:
      place = np.searchsorted(parts, (index[0].start or 0) // size)
      return array[place * size : (place + 1) * size]

    shape = (size * mesh.shape[DATA], *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, read)

  return jax.tree.map(put, batch)


def put_whole(mesh: jax.sharding.Mesh, *arrays: np.ndarray) -> Any:
  """Puts arrays that every process has whole on the devices.

  The last row is repeated until the axis `data` divides the rows.
  """
  size = -(-len(arrays[0]) // mesh.shape[DATA]) * mesh.shape[DATA]
  rows = np.minimum(local_rows(mesh, size), len(arrays[0]) - 1)
  return to_devices(mesh, tuple(array[rows] for array in arrays))


def _local_parts(mesh: jax.sharding.Mesh) -> np.ndarray:
  """Returns the indices along `data` that have a device of this process."""
  here = np.vectorize(lambda d: d.process_index == jax.process_index())
  axis = mesh.axis_names.index(DATA)
  others = tuple(i for i in range(mesh.devices.ndim) if i != axis)
  return np.flatnonzero(here(mesh.devices).any(axis=others))


def rule_for(
    name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, zero: bool
) -> jax.P:
  """Returns the mesh axis of each dimension of an array.

  A dimension that its axis does not divide stays whole, such as BERT's
  vocabulary of 30,522 on four devices. Heads and MLP must divide, see `check`.

  `name` is that of a parameter, '' for another array. With `zero`, matrices are
  also divided over `data`, along their longest dimension that is still whole
  and that `data` divides.
  """
  spec = next((p for r, p in RULES if re.search(rf'(^|\.){r}$', name)), jax.P())
  spec = tuple(spec) + (None,) * (len(shape) - len(spec))
  axes = [
      axis if axis is None or size % mesh.shape[axis] == 0 else None
      for axis, size in zip(spec, shape, strict=True)
  ]
  # Vectors stay whole: a collective each would cost more than it saves.
  if zero and name and len(shape) > 1:
    whole = [i for i, axis in enumerate(axes) if axis is None]
    free = [i for i in whole if shape[i] % mesh.shape[DATA] == 0]
    if free:
      axes[max(free, key=lambda i: shape[i])] = DATA
  return jax.P(*axes)


def shardings(tree: Any, mesh: jax.sharding.Mesh, zero: bool = False) -> Any:
  """Returns the NamedSharding of each array or shape in a tree.

  The last dictionary key of an array is the name of its parameter. `zero` is
  `config.mesh.zero`.
  """

  def of(path: Any, leaf: Any) -> jax.NamedSharding:
    name = getattr(path[-1], 'key', '') if path else ''
    spec = rule_for(str(name), leaf.shape, mesh, zero)
    return jax.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(of, tree)


def over_data(spec: jax.P) -> jax.P:
  """Returns the part of a rule for the data axis, for `jax.shard_map`."""
  return jax.P(*(axis if axis == DATA else None for axis in spec))


def gather(x: jax.Array, spec: jax.P) -> jax.Array:
  """Inside `jax.shard_map` over data: the whole of a parameter."""
  if DATA not in spec:
    return x
  run = functools.partial(
      jax.lax.all_gather, axis_name=DATA, axis=spec.index(DATA), tiled=True
  )
  return _over_model(run, spec)(x)


def reduce_gradient(x: jax.Array, spec: jax.P) -> jax.Array:
  """Inside `jax.shard_map` over data: the sum of the devices' gradients."""
  if DATA not in spec:
    return jax.lax.psum(x, DATA)
  run = functools.partial(
      jax.lax.psum_scatter, axis_name=DATA, scatter_dimension=spec.index(DATA),
      tiled=True,
  )
  return _over_model(run, spec)(x)


def _over_model(run: Callable[..., jax.Array], spec: jax.P) -> Callable:
  """Runs a collective on each part of a dimension divided over `model`.

  Otherwise XLA would gather the parts first.
  """
  if MODEL not in spec:
    return run
  parts = jax.P(*(axis if axis == MODEL else None for axis in spec))
  return jax.shard_map(
      run, in_specs=parts, out_specs=parts, axis_names={MODEL}, check_vma=False
  )


def check(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
  """Checks that the mesh divides a job and that its devices can run it.

  Raises:
    ValueError: names the numbers that do not match.
  """
  problems = []
  data, model = mesh.shape[DATA], mesh.shape[MODEL]
  if config.batch_size % (data * config.accumulate):
    problems.append(
        f'config.batch_size={config.batch_size} cannot be divided by'
        f' {data} device(s) of mesh axis `data` x'
        f' config.accumulate={config.accumulate}'
    )
  for field in ('num_heads', 'mlp_width'):
    size = getattr(config.model, field)
    if size % model:
      problems.append(
          f'config.model.{field}={size} cannot be divided by the {model}'
          ' devices of mesh axis `model`'
      )
  device = mesh.devices.flat[0]
  if config.model.compute_dtype == 'bfloat16' and device.platform == 'gpu':
    # '8.0' on NVIDIA GPUs. AMD's have other names, and all support bfloat16.
    capability = re.fullmatch(r'(\d+)\.\d+', str(device.compute_capability))
    if capability and int(capability[1]) < 8:
      problems.append(
          f'config.model.compute_dtype=bfloat16 needs an NVIDIA GPU of compute'
          f' capability 8.0 or later, and {device.device_kind} has'
          f' {device.compute_capability}; set it to float32'
      )
  if problems:
    raise ValueError('; '.join(problems) + '.')
