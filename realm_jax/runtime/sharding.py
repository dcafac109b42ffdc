"""How parameters lie on the mesh: the rules, as a table, and what follows.

Public: `RULES`, `rule_for`, `shardings`, `gather`, `reduce_gradient`, `check`.
A rule divides a parameter's dimensions over mesh axes by its name; Adam's
moments have their parameter's name and so lie as it does.

    model  heads and MLP by column, then by row (Shoeybi et al. 2019), so that
           a layer exchanges activations twice; the vocabulary by row.
    data   nothing, or with `mesh.zero` one more dimension of every matrix
           (ZeRO, Rajbhandari et al. 2020): gathered when a step begins, and
           its gradient reduced to the part that the device updates.
"""

from collections.abc import Callable
import functools
import re
from typing import Any

import jax

from realm_jax import config as config_lib
from realm_jax.runtime.mesh import DATA
from realm_jax.runtime.mesh import MODEL

# The end of a parameter's name, as a pattern, and how its dimensions are
# divided. The first match counts; what matches none is whole on every device.
# A kernel is (inputs, outputs).
RULES: tuple[tuple[str, jax.P], ...] = (
    (r'layers\.\d+\.(query|key|value|mlp_in)\.kernel', jax.P(None, MODEL)),
    (r'layers\.\d+\.(query|key|value|mlp_in)\.bias', jax.P(MODEL)),
    (r'layers\.\d+\.(attention_output|mlp_out)\.kernel', jax.P(MODEL, None)),
    (r'word_embed\.embedding', jax.P(MODEL, None)),
    (r'output_bias', jax.P(MODEL)),
)


def rule_for(
    name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, zero: bool
) -> jax.P:
  """Returns how the dimensions of an array are divided over the mesh.

  A dimension that its axis does not divide stays whole: BERT's vocabulary of
  30,522 on four devices, say, which costs memory and little time. Heads and
  MLP must divide, see `check`.

  Args:
    name: of a parameter; '' for what is none.
    shape: of it.
    mesh: its axis sizes count.
    zero: whether to divide matrices over `data`, too: along the longest
      dimension that is still whole and that it divides.
  """
  spec = next((p for r, p in RULES if re.search(rf'(^|\.){r}$', name)), jax.P())
  axes = [
      axis if axis is None or size % mesh.shape[axis] == 0 else None
      for axis, size in zip(
          tuple(spec) + (None,) * (len(shape) - len(spec)), shape, strict=True
      )
  ]
  # Vectors are left alone: a collective each would cost more than they weigh.
  if zero and name and len(shape) > 1:
    free = [
        i
        for i, size in enumerate(shape)
        if axes[i] is None and size % mesh.shape[DATA] == 0
    ]
    if free:
      axes[max(free, key=lambda i: shape[i])] = DATA
  return jax.P(*axes)


def shardings(
    tree: Any, mesh: jax.sharding.Mesh, zero: bool = False
) -> Any:
  """Returns the NamedSharding of each array in a tree.

  Args:
    tree: of arrays or their shapes; a dictionary key above an array is the
      name of the parameter that it is, or belongs to.
    mesh: where they are to lie.
    zero: as `config.mesh.zero`.
  """

  def of(path: Any, leaf: Any) -> jax.NamedSharding:
    name = getattr(path[-1], 'key', '') if path else ''
    spec = rule_for(str(name), leaf.shape, mesh, zero)
    return jax.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(of, tree)


def over_data(spec: jax.P) -> jax.P:
  """Returns what of a rule concerns the data axis, for `jax.shard_map`."""
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
      jax.lax.psum_scatter,
      axis_name=DATA,
      scatter_dimension=spec.index(DATA),
      tiled=True,
  )
  return _over_model(run, spec)(x)


def _over_model(run: Callable[..., jax.Array], spec: jax.P) -> Callable:
  """Runs a collective on each device's part of what `model` divides.

  By itself XLA would first gather the parts.
  """
  if MODEL not in spec:
    return run
  parts = jax.P(*(axis if axis == MODEL else None for axis in spec))
  return jax.shard_map(
      run,
      in_specs=parts,
      out_specs=parts,
      axis_names={MODEL},
      check_vma=False,
  )


def check(config: config_lib.Config, mesh: jax.sharding.Mesh) -> None:
  """Checks that the job can be divided over the mesh, and runs on its devices.

  Args:
    config: resolved.
    mesh: of the job.

  Raises:
    ValueError: naming the numbers that do not go together.
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
    # '8.0' on NVIDIA's; AMD's are named otherwise and all know bfloat16.
    capability = re.fullmatch(r'(\d+)\.\d+', str(device.compute_capability))
    if capability and int(capability[1]) < 8:
      problems.append(
          f'config.model.compute_dtype=bfloat16 needs an NVIDIA GPU of compute'
          f' capability 8.0 or later, and {device.device_kind} has'
          f' {device.compute_capability}; set it to float32'
      )
  if problems:
    raise ValueError('; '.join(problems) + '.')
