"""What a workdir holds, read and written whole or not at all.

Public: `Checkpoints` (params, train state and data iterator by step),
`save_snapshot` / `load_snapshot` (the embedder alone, for the index builder),
`save_params`, `load_params`, `frugal`, `saved_about`, `params_digest`,
`referenced_generations`, `steps_in`, `write_json` and `read_json`. Orbax
writes beside the final name and renames, so a number that can be listed is a
checkpoint that can be read.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any
import uuid

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

CHECKPOINTS, SNAPSHOTS = 'checkpoints', 'retriever'

Path = pathlib.Path | str


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file so that a reader sees all of it or the one before."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  try:
    with temporary.open('w', encoding='utf-8') as file:
      json.dump(value, file, indent=2)
      file.write('\n')
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
  """Reads a JSON file; ValueError names the file if it is none."""
  try:
    return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not readable as JSON: {error}') from error


def params_digest(params: Any) -> str:
  """SHA-256 over names, shapes, types and bytes of all arrays, by name."""
  leaves = {
      '/'.join(str(getattr(key, 'key', key)) for key in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  hasher = hashlib.sha256()
  for name in sorted(leaves):
    array = np.asarray(jax.device_get(leaves[name]))
    hasher.update(f'{name} {array.dtype} {array.shape};'.encode())
    hasher.update(np.ascontiguousarray(array).data)
  return hasher.hexdigest()


def steps_in(directory: Path) -> list[int]:
  """Steps of the complete checkpoints, snapshots or generations in a folder."""
  try:
    names = os.listdir(directory)
  except FileNotFoundError:
    return []
  return sorted(int(name) for name in names if name.isdigit())


class Checkpoints:
  """The checkpoints of a training job, saved while it goes on."""

  def __init__(self, workdir: Path, keep: int):
    """Opens `workdir`/checkpoints; `keep` newest are kept, 0 keeps all."""
    policies = ocp.training.preservation_policies
    self._directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
    self._checkpointer = ocp.training.Checkpointer(
        self._directory,
        save_decision_policy=(
            ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        ),
        preservation_policy=(
            policies.LatestN(keep) if keep else policies.PreserveAll()
        ),
        cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> int | None:
    """The newest step saved, or None."""
    steps = steps_in(self._directory)
    return steps[-1] if steps else None

  def save(
      self, step: int, params: Any, train_state: Any, data: Any, about: Any
  ) -> None:
    """Saves in the background; `about` is small and JSON."""
    self._checkpointer.save_checkpointables_async(
        step,
        {'params': params, 'train_state': train_state, 'data': data},
        force=True,
        custom_metadata=about,
    )

  def restore(
      self, step: int, params: Any, train_state: Any, data: Any
  ) -> tuple[Any, Any]:
    """Restores onto the shapes and shardings given; `data` in place.

    Returns:
      params and train_state.

    Raises:
      ValueError: naming the parameters whose presence or shape differs.
    """
    path = self._directory / str(step)
    _check_structure(path, 'params', params)
    loaded = self._checkpointer.load_checkpointables(
        step, {'params': params, 'train_state': train_state, 'data': data}
    )
    return loaded['params'], loaded['train_state']

  def wait(self) -> None:
    """Returns when everything handed to `save` is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()


def frugal() -> ocp.Context:
  """A context in which saving neither copies nor compresses the arrays.

  For arrays of the size of the memory that do not change meanwhile.
  """
  context = ocp.Context()
  context.array.saving.use_compression = False
  context.memory.deepcopy_host_arrays = False
  return context


def save_params(
    workdir: Path, step: int, params: dict[str, Any], about: Any
) -> None:
  """Saves a checkpoint of parameters alone, to start from but not to resume.

  Args:
    workdir: of a training job, or one made by an import.
    step: that the parameters are of.
    params: {component: {name: array}}.
    about: small and JSON.
  """
  path = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)
  with frugal():
    ocp.save_checkpointables(path, {'params': params}, custom_metadata=about)


def load_params(
    workdir: Path, abstract: dict[str, Any], step: int | None = None
) -> tuple[dict[str, Any], int]:
  """Loads parameters alone, of the newest checkpoint or of `step`.

  Args:
    workdir: of a training job.
    abstract: {component: {name: ShapeDtypeStruct}}; it may leave out
      components that the checkpoint has.
    step: None for the newest.

  Returns:
    The parameters, and their step.

  Raises:
    FileNotFoundError: if there is no such checkpoint.
    ValueError: naming the parameters whose presence or shape differs.
  """
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  steps = steps_in(directory)
  if not steps:
    raise FileNotFoundError(
        f'{directory} holds no checkpoint; `realm-jax train'
        f' --workdir={workdir}` writes them.'
    )
  if step is None:
    step = steps[-1]
  if step not in steps:
    raise FileNotFoundError(
        f'{directory} has no checkpoint of step {step}; it has {steps}.'
    )
  found = _check_structure(directory / str(step), 'params', abstract)
  template = {
      component: abstract.get(component)
      or {
          name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
          for name, leaf in leaves.items()
      }
      for component, leaves in found.items()
  }
  loaded = ocp.load_checkpointables(
      directory / str(step), {'params': _on_one_device(template)}
  )
  return {name: loaded['params'][name] for name in abstract}, step


def saved_about(workdir: Path, step: int) -> dict[str, Any]:
  """The JSON that was saved with the checkpoint of a step."""
  return _custom_metadata(pathlib.Path(workdir) / CHECKPOINTS / str(step))


def components_in(workdir: Path, step: int | None = None) -> list[str]:
  """Names of the components that a workdir's newest checkpoint holds."""
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  step = step if step is not None else max(steps_in(directory), default=None)
  if step is None:
    raise FileNotFoundError(f'{directory} holds no checkpoint.')
  return sorted(_structure(directory / str(step), 'params'))


def save_snapshot(workdir: Path, step: int, params: Any) -> str:
  """Publishes the embedder's parameters for the index builder.

  Returns:
    Their digest, by which the trainer knows the generation made from them. A
    snapshot of this step and digest that is already there is kept.
  """
  path = pathlib.Path(workdir).absolute() / SNAPSHOTS / str(step)
  params = jax.device_get(params)
  digest = params_digest(params)
  if path.exists() and snapshot_digest(workdir, step) == digest:
    return digest
  ocp.save(
      path,
      params,
      overwrite=True,
      custom_metadata={'step': step, 'params_digest': digest},
  )
  return digest


def snapshot_steps(workdir: Path) -> list[int]:
  """Steps of the snapshots that can be read."""
  return steps_in(pathlib.Path(workdir) / SNAPSHOTS)


def prune_snapshots(workdir: Path, keep: int, before: int) -> None:
  """Deletes snapshots older than step `before`, except the newest `keep`."""
  for step in snapshot_steps(workdir)[:-keep]:
    if step < before:
      shutil.rmtree(pathlib.Path(workdir) / SNAPSHOTS / str(step))


def snapshot_digest(workdir: Path, step: int) -> str:
  """The digest that `save_snapshot` returned for this step."""
  path = pathlib.Path(workdir).absolute() / SNAPSHOTS / str(step)
  return _custom_metadata(path)['params_digest']


def load_snapshot(
    workdir: Path, step: int, abstract: dict[str, Any]
) -> tuple[dict[str, Any], str]:
  """Loads a snapshot onto one device.

  Returns:
    The embedder's parameters and their digest.

  Raises:
    ValueError: if it is of another shape, or its bytes are not those that
      were saved.
  """
  path = pathlib.Path(workdir).absolute() / SNAPSHOTS / str(step)
  _compare(_leaves(ocp.metadata(path).metadata), _leaves(abstract), path)
  params = ocp.load(path, _on_one_device(abstract))
  digest, expected = params_digest(params), snapshot_digest(workdir, step)
  if digest != expected:
    raise ValueError(
        f'{path} is damaged: its parameters have the digest {digest[:16]},'
        f' {expected[:16]} was written.'
    )
  return params, digest


def referenced_generations(workdir: Path) -> set[int]:
  """Steps of the index generations that the checkpoints were using."""
  directory = pathlib.Path(workdir) / CHECKPOINTS
  found = set()
  for step in steps_in(directory):
    try:
      generation = _custom_metadata(directory / str(step)).get(
          'index_generation'
      )
    except FileNotFoundError:  # Deleted by the trainer meanwhile.
      continue
    if generation is not None:
      found.add(int(generation))
  return found


def _custom_metadata(path: pathlib.Path) -> dict[str, Any]:
  # The file is Orbax' own, public format; going through Orbax costs 100 times
  # as much, as it looks at every array.
  return read_json(path / '_CHECKPOINT_METADATA').get('custom_metadata') or {}


def _on_one_device(abstract: Any) -> Any:
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract,
  )


def _structure(path: pathlib.Path, item: str) -> Any:
  # Orbax looks at everything, and warns that the data iterator, being an object
  # with a state of its own, has no metadata. It cannot have any.
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    return ocp.checkpointables_metadata(path).metadata[item]
  finally:
    logger.setLevel(level)


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
  return {
      '/'.join(str(getattr(key, 'key', key)) for key in keys): tuple(leaf.shape)
      for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_structure(path: pathlib.Path, item: str, expected: Any) -> Any:
  """Compares before loading: Orbax' own message for a mismatch misleads."""
  found = _structure(path, item)
  there = {
      name: leaves for name, leaves in found.items() if name in expected
  }
  _compare(_leaves(there), _leaves(expected), path)
  return found


def _compare(found: dict, expected: dict, path: pathlib.Path) -> None:
  problems = []
  for name in sorted(found.keys() | expected.keys()):
    if name not in found:
      problems.append(f'{name}: missing, expected {expected[name]}')
    elif name not in expected:
      problems.append(f'{name}: {found[name]}, not part of this model')
    elif found[name] != expected[name]:
      problems.append(f'{name}: {found[name]}, expected {expected[name]}')
  if problems:
    shown = '\n  '.join(problems[:8])
    more = f'\n  and {len(problems) - 8} more' if len(problems) > 8 else ''
    raise ValueError(f'{path} holds another model:\n  {shown}{more}')
