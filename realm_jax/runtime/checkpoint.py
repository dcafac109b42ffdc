"""Checkpoints of a workdir: parameters and train state by step.

Orbax writes under a temporary name and renames, so a listed step is a complete
checkpoint. The processes of a job write a checkpoint together, to a folder that
all of them see; each process reads for itself.
"""

import contextlib
import hashlib
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from realm_jax.runtime import distributed
from realm_jax.runtime import files
from realm_jax.runtime import lines

log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'
_METADATA = '_CHECKPOINT_METADATA'  # A file of Orbax.

Path = pathlib.Path | str


def params_digest(params: Any) -> str:
  """Returns the SHA-256 over names, shapes, types and bytes of all arrays.

  It does not depend on the sharding. If arrays are spread over the devices of
  several processes, all of these must call.
  """
  leaves = _leaves(params)
  hasher = hashlib.sha256()
  for name in sorted(leaves):
    array = distributed.fetch(leaves[name])
    hasher.update(f'{name} {array.dtype} {array.shape};'.encode())
    hasher.update(np.ascontiguousarray(array).data)
  return hasher.hexdigest()


def steps_in(directory: Path) -> list[int]:
  """Returns the complete checkpoints, snapshots or generations in a folder."""
  try:
    names = os.listdir(directory)
  except FileNotFoundError:
    return []
  return sorted(int(name) for name in names if name.isdigit())


class Checkpoints:
  """The checkpoints of a running job, saved in the background."""

  def __init__(self, workdir: Path, keep: int):
    """Opens `workdir`/checkpoints; the `keep` newest are kept, 0 keeps all."""
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
    # The step last handed to `save`, which may not be on disk yet.
    self.saving: int | None = None

  @property
  def latest(self) -> int | None:
    """The newest step saved, or None."""
    steps = steps_in(self._directory)
    return steps[-1] if steps else None

  def save(self, step: int, params: Any, train_state: Any, about: Any) -> None:
    """Saves in the background; `about` is small and JSON.

    A failure to save the checkpoint before, for example on a full disk, is only
    logged: older checkpoints exist, and this one may succeed. `wait` and
    `close` raise the error of the last one.
    """
    try:
      self._checkpointer.wait()
    except (ValueError, OSError) as error:
      if jax.process_count() > 1:  # The other processes wait for it.
        raise
      log.error(
          'There is no checkpoint of step %s: %s. Training continues; the '
          'newest checkpoint is of step %s.', self.saving, error, self.latest,
      )
    if jax.process_count() == 1:
      remove_unfinished(self._directory)
    self.saving = step
    self._checkpointer.save_checkpointables_async(
        step,
        {'params': params, 'train_state': train_state},
        force=True,
        custom_metadata=about,
    )

  def restore(
      self, step: int, params: Any, train_state: Any
  ) -> tuple[Any, Any]:
    """Returns params and train_state, in the shapes and shardings given.

    Raises:
      ValueError: names the parameters that are missing or of another shape.
    """
    _check_structure(self._directory / str(step), params)
    loaded = self._checkpointer.load_checkpointables(
        step, {'params': params, 'train_state': train_state}
    )
    return loaded['params'], loaded['train_state']

  def wait(self) -> None:
    """Waits until every `save` is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()


def uncompressed_context() -> ocp.Context:
  """Returns a context in which saving neither copies nor compresses arrays.

  For arrays of the size of the memory that do not change during the save.
  """
  context = ocp.Context()
  context.array.saving.use_compression = False
  context.memory.deepcopy_host_arrays = False
  return context


def save_params(
    workdir: Path, step: int, params: dict[str, Any], about: Any
) -> None:
  """Saves a checkpoint of parameters alone, which cannot be resumed.

  `params` are {component: {name: array}}; `about` is small and JSON.
  """
  path = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)
  with uncompressed_context():
    ocp.save_checkpointables(path, {'params': params}, custom_metadata=about)


def load_params(
    workdir: Path, abstract: dict[str, Any], step: int | None = None
) -> tuple[dict[str, Any], int]:
  """Loads the parameters of a checkpoint, by default the newest.

  Args:
    workdir: workdir of a training job.
    abstract: {component: {name: ShapeDtypeStruct}}, for some or all components
      of the checkpoint.
    step: step of the checkpoint.

  Returns:
    The parameters and their step.

  Raises:
    FileNotFoundError: the checkpoint does not exist.
    ValueError: names the parameters that are missing or of another shape.
  """
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  step = newest_step(workdir) if step is None else step
  steps = steps_in(directory)
  if step not in steps:
    raise FileNotFoundError(
        f'{directory} has no checkpoint of step {step}; it has {steps}.'
    )
  _check_structure(directory / str(step), abstract)
  template = {**abstract_in(workdir, step), **abstract}
  with single_process_context():
    loaded = ocp.load_checkpointables(
        directory / str(step), {'params': on_one_device(template)}
    )
  return {name: loaded['params'][name] for name in abstract}, step


def saved_about(workdir: Path, step: int) -> dict[str, Any]:
  """Returns the JSON that was saved with the checkpoint of a step."""
  path = pathlib.Path(workdir) / CHECKPOINTS / str(step)
  if path.is_dir() and not (path / _METADATA).exists():
    raise _damaged(path, 'metadata')
  return custom_metadata(path)


def newest_step(workdir: Path) -> int:
  """Returns the step of the newest checkpoint of a workdir.

  Raises:
    FileNotFoundError: no checkpoint exists.
  """
  directory = pathlib.Path(workdir) / CHECKPOINTS
  steps = steps_in(directory)
  if not steps:
    raise FileNotFoundError(
        f'{directory} holds no checkpoint; `realm-jax train'
        f' --workdir={workdir}` writes them.'
    )
  return steps[-1]


def components_in(workdir: Path, step: int | None = None) -> list[str]:
  """Returns the names of the components in a checkpoint; default: newest."""
  return sorted(abstract_in(workdir, step))


def abstract_in(
    workdir: Path, step: int | None = None
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Returns the parameter shapes of a checkpoint, by default the newest."""
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  step = newest_step(workdir) if step is None else step
  return {
      component: {
          name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
          for name, leaf in leaves.items()
      }
      for component, leaves in _structure(directory / str(step)).items()
  }


def references(workdir: Path) -> dict[int, dict[int, dict[str, Any]]]:
  """Returns the metadata of the checkpoints that use each index generation.

  Raises:
    ValueError: the metadata of a checkpoint is damaged.
  """
  directory = pathlib.Path(workdir) / CHECKPOINTS
  found: dict[int, dict[int, dict[str, Any]]] = {}
  for step in steps_in(directory):
    with contextlib.suppress(FileNotFoundError):  # The trainer deletes some.
      about = custom_metadata(directory / str(step))
      if about.get('index_generation') is not None:
        found.setdefault(int(about['index_generation']), {})[step] = about
  return found


def remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes the temporary folders of Orbax saves that failed."""
  for path in directory.glob('*.orbax-checkpoint-tmp'):
    shutil.rmtree(path, ignore_errors=True)


def custom_metadata(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON that was saved with an Orbax folder."""
  # The file format is public. Orbax's own function takes 100 times as long,
  # because it looks at every array.
  metadata = files.read_json(path / _METADATA)
  return metadata.get('custom_metadata') or {}


def single_process_context() -> ocp.Context:
  """Returns a context in which Orbax does not wait for other processes."""
  context = ocp.Context()
  if jax.process_count() > 1:
    this = jax.process_index()
    context.multiprocessing.primary_host = this
    context.multiprocessing.active_processes = {this}
    context.multiprocessing.barrier_sync_key_prefix = f'process{this}'
  return context


def on_one_device(abstract: Any) -> Any:
  """Returns abstract arrays on the first device of this process."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract,
  )


def _structure(path: pathlib.Path) -> Any:
  found = ocp.checkpointables_metadata(path).metadata
  if 'params' not in found:
    raise _damaged(path, 'parameters')
  return found['params']


def _damaged(path: pathlib.Path, lacks: str) -> ValueError:
  return ValueError(
      f'{path} is damaged: it has no {lacks}. Remove this folder to use an'
      ' older checkpoint.'
  )


def _leaves(tree: Any) -> dict[str, Any]:
  """Returns the arrays of a tree by their names."""
  return {
      '/'.join(str(getattr(key, 'key', key)) for key in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _check_structure(path: pathlib.Path, expected: Any) -> None:
  """Compares before loading: Orbax's message for a mismatch is misleading."""
  found = _structure(path)
  check_leaves(
      {name: found[name] for name in found if name in expected}, expected, path
  )


def check_leaves(found: Any, expected: Any, where: Path) -> None:
  """Compares names and shapes of two trees of arrays.

  Raises:
    ValueError: names the arrays that are missing or of another shape, and
      `where` they were found.
  """
  found = {name: tuple(leaf.shape) for name, leaf in _leaves(found).items()}
  expected = {name: tuple(x.shape) for name, x in _leaves(expected).items()}
  problems = []
  for name in sorted(found.keys() | expected.keys()):
    if name not in found:
      problems.append(f'{name}: missing, expected {expected[name]}')
    elif name not in expected:
      problems.append(f'{name}: {found[name]}, not part of this model')
    elif found[name] != expected[name]:
      problems.append(f'{name}: {found[name]}, expected {expected[name]}')
  if problems:
    shown = lines.listed(problems, 8, '\n  ')
    raise ValueError(f'{where} holds another model:\n  {shown}')
