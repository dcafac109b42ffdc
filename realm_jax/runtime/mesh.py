"""The device mesh, and how batches and parameters lie on it.

Public: `axis_sizes`, `make_mesh`, `replicated`, `over_batch`, `local_rows`,
`to_devices`, `DATA`, `MODEL`.
Axes are of type Auto with the shardings pinned at the borders of `jit`: the
model code then reads as if there were one device, and the equality tests on 8
devices hold the compiler to it.
"""

import math
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib

DATA, MODEL = 'data', 'model'


def axis_sizes(
    config: config_lib.MeshConfig, devices: int, batch_size: int | None = None
) -> tuple[int, int]:
  """Returns how many devices there are along `data` and along `model`.

  Raises:
    ValueError: if the sizes do not make up the number of devices, or the batch
      cannot be divided over the `data` axis.
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
  """Returns the mesh over all devices of all processes.

  Raises:
    ValueError: see `axis_sizes`.
  """
  return jax.make_mesh(
      axis_sizes(config, jax.device_count(), batch_size),
      (DATA, MODEL),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def one_device() -> jax.sharding.Mesh:
  """Returns a mesh of the first device."""
  return jax.sharding.Mesh(
      np.array(jax.devices()[:1]).reshape(1, 1), (DATA, MODEL)
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The whole array on every device: parameters and optimizer state."""
  return jax.NamedSharding(mesh, jax.P())


def over_batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The first dimension divided over the data axis: batches."""
  return jax.NamedSharding(mesh, jax.P(DATA))


def local_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that this process puts on its devices, ascending."""
  size = batch_size // mesh.shape[DATA]
  parts = _local_parts(mesh)[:, None] * size + np.arange(size)
  return parts.reshape(-1)


def to_devices(
    mesh: jax.sharding.Mesh, batch: Any
) -> Any:
  """Puts this process' rows of a batch, `local_rows`, on its devices.

  The array is the whole batch in its order, wherever the devices are. Where
  `model` goes over processes, several of them give the same rows.
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


def _local_parts(mesh: jax.sharding.Mesh) -> np.ndarray:
  """Which parts of the `data` axis have a device of this process."""
  here = np.vectorize(lambda d: d.process_index == jax.process_index())
  axis = mesh.axis_names.index(DATA)
  others = tuple(i for i in range(mesh.devices.ndim) if i != axis)
  return np.flatnonzero(here(mesh.devices).any(axis=others))
