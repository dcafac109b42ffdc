"""The device mesh, and how batches and parameters lie on it.

Public: `make_mesh`, `replicated`, `over_batch`, `to_devices`, `DATA`, `MODEL`.
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


def make_mesh(
    config: config_lib.MeshConfig, batch_size: int | None = None
) -> jax.sharding.Mesh:
  """Returns the mesh over all devices of all processes.

  Raises:
    ValueError: if the sizes do not make up the number of devices, or the batch
      cannot be divided over the `data` axis.
  """
  devices = jax.device_count()
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
  return jax.make_mesh(
      tuple(sizes),
      (DATA, MODEL),
      axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The whole array on every device: parameters and optimizer state."""
  return jax.NamedSharding(mesh, jax.P())


def over_batch(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The first dimension divided over the data axis: batches."""
  return jax.NamedSharding(mesh, jax.P(DATA))


def to_devices(
    mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]
) -> dict[str, Any]:
  """Puts this process' part of a batch on its devices."""
  sharding = over_batch(mesh)
  return {
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in batch.items()
  }
