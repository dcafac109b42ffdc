"""What a workdir holds, read and written whole or not at all.

Public: `Checkpoints` (params and train state by step), `save_params`,
`load_params`, `frugal`, `saved_about`, `params_digest`,
`referenced_generations`, `steps_in`, `newest_step`, `components_in`,
`abstract_in`, `check_leaves`; for
snapshots.py, which has those of the retriever alone: `custom_metadata`,
`on_one_device`, `alone`, `remove_unfinished`. Orbax writes beside the final
name and renames, so a number that can be listed is a checkpoint that can be
read. The processes of a job write a checkpoint together, to a folder that all
of them see; everything else is read by each for itself, and written by process
0.
"""

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

log = logging.getLogger(__name__)

CHECKPOINTS = 'checkpoints'

Path = pathlib.Path | str


def params_digest(params: Any) -> str:
  """SHA-256 over names, shapes, types and bytes of all arrays, by name.

  The same however they lie on devices. Where they are spread over those of
  several processes, all of these must call.
  """
  leaves = {
      '/'.join(str(getattr(key, 'key', key)) for key in path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  hasher = hashlib.sha256()
  for name in sorted(leaves):
    array = distributed.fetch(leaves[name])
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
    self._saving: int | None = None

  @property
  def latest(self) -> int | None:
    """The newest step saved, or None."""
    steps = steps_in(self._directory)
    return steps[-1] if steps else None

  @property
  def saving(self) -> int | None:
    """The step last handed to `save`, which may not be on disk yet."""
    return self._saving

  def save(
      self, step: int, params: Any, train_state: Any, about: Any
  ) -> None:
    """Saves in the background; `about` is small and JSON.

    That the one before could not be saved, as on a full disk, is logged and no
    more: the checkpoints before it are there, and the next may succeed. Only
    `wait` and `close` raise what went wrong with the last.
    """
    try:
      self._checkpointer.wait()
    except (ValueError, OSError) as error:
      if jax.process_count() > 1:  # The others wait for it.
        raise
      log.error(
          'There is no checkpoint of step %s: %s. Training goes on; the newest '
          'checkpoint is of step %s.', self._saving, error, self.latest,
      )
    if jax.process_count() == 1:
      remove_unfinished(self._directory)
    self._saving = step
    self._checkpointer.save_checkpointables_async(
        step,
        {'params': params, 'train_state': train_state},
        force=True,
        custom_metadata=about,
    )

  def restore(
      self, step: int, params: Any, train_state: Any
  ) -> tuple[Any, Any]:
    """Restores onto the shapes and shardings given.

    Returns:
      params and train_state.

    Raises:
      ValueError: naming the parameters whose presence or shape differs.
    """
    path = self._directory / str(step)
    _check_structure(path, 'params', params)
    loaded = self._checkpointer.load_checkpointables(
        step, {'params': params, 'train_state': train_state}
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
  step = newest_step(workdir) if step is None else step
  steps = steps_in(directory)
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
  with alone():
    loaded = ocp.load_checkpointables(
        directory / str(step), {'params': on_one_device(template)}
    )
  return {name: loaded['params'][name] for name in abstract}, step


def saved_about(workdir: Path, step: int) -> dict[str, Any]:
  """The JSON that was saved with the checkpoint of a step."""
  return custom_metadata(pathlib.Path(workdir) / CHECKPOINTS / str(step))


def newest_step(workdir: Path) -> int:
  """The step of the newest checkpoint of a workdir.

  Raises:
    FileNotFoundError: if there is none.
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
  """Names of the components that a workdir's newest checkpoint holds."""
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  step = newest_step(workdir) if step is None else step
  return sorted(_structure(directory / str(step), 'params'))


def abstract_in(
    workdir: Path, step: int | None = None
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes of the parameters of a workdir's newest checkpoint, or of `step`."""
  directory = pathlib.Path(workdir).absolute() / CHECKPOINTS
  step = newest_step(workdir) if step is None else step
  return {
      component: {
          name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
          for name, leaf in leaves.items()
      }
      for component, leaves in _structure(
          directory / str(step), 'params'
      ).items()
  }


def referenced_generations(workdir: Path) -> set[int]:
  """Steps of the index generations that the checkpoints were using."""
  directory = pathlib.Path(workdir) / CHECKPOINTS
  found = set()
  for step in steps_in(directory):
    try:
      generation = custom_metadata(directory / str(step)).get(
          'index_generation'
      )
    except FileNotFoundError:  # Deleted by the trainer meanwhile.
      continue
    if generation is not None:
      found.add(int(generation))
  return found


def remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes what Orbax leaves of a save that failed."""
  for path in directory.glob('*.orbax-checkpoint-tmp'):
    shutil.rmtree(path, ignore_errors=True)


def custom_metadata(path: pathlib.Path) -> dict[str, Any]:
  """The JSON that was saved with what Orbax wrote to a folder."""
  # The file is Orbax' own, public format; going through Orbax costs 100 times
  # as much, as it looks at every array.
  metadata = files.read_json(path / '_CHECKPOINT_METADATA')
  return metadata.get('custom_metadata') or {}


def alone() -> ocp.Context:
  """A context in which Orbax does not wait for the other processes."""
  context = ocp.Context()
  if jax.process_count() > 1:
    this = jax.process_index()
    context.multiprocessing.primary_host = this
    context.multiprocessing.active_processes = {this}
    context.multiprocessing.barrier_sync_key_prefix = f'process{this}'
  return context


def on_one_device(abstract: Any) -> Any:
  """Abstract arrays, to be loaded to the first device of this process."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract,
  )


def _structure(path: pathlib.Path, item: str) -> Any:
  return ocp.checkpointables_metadata(path).metadata[item]


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
  check_leaves(there, expected, path)
  return found


def check_leaves(found: Any, expected: Any, where: Path) -> None:
  """Compares names and shapes of two trees of arrays, found and expected.

  Raises:
    ValueError: naming the arrays whose presence or shape differs, and `where`
      the first were found.
  """
  found, expected = _leaves(found), _leaves(expected)
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
    raise ValueError(f'{where} holds another model:\n  {shown}{more}')
