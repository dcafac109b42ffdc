"""What a workdir holds, read and written whole or not at all.

Public: `Checkpoints` (params and train state by step),
`Snapshots`, `save_snapshot`, `load_snapshot` (the embedder alone, for the index
builder),
`save_params`, `load_params`, `frugal`, `saved_about`, `params_digest`,
`referenced_generations`, `steps_in`, `write_json` and `read_json`. Orbax
writes beside the final name and renames, so a number that can be listed is a
checkpoint that can be read. The processes of a job write a checkpoint
together, to a folder that all of them see; everything else is read by each for
itself, and written by process 0.
"""

from collections.abc import Callable
import concurrent.futures
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

from realm_jax.runtime import distributed

log = logging.getLogger(__name__)

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
      _remove_unfinished(self._directory)
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
  with _alone():
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

  For one process; a running job uses `Snapshots`.

  Returns:
    Their digest, by which the trainer knows the generation made from them. A
    snapshot of this step and digest that is already there is kept.
  """
  path = pathlib.Path(workdir).absolute() / SNAPSHOTS / str(step)
  params = jax.device_get(params)
  digest = params_digest(params)
  if _has_snapshot(workdir, step, digest):
    return digest
  about = {'step': step, 'params_digest': digest}
  ocp.save(path, params, overwrite=True, custom_metadata=about)
  return digest


class Snapshots:
  """The snapshots that a training job takes, saved while it goes on."""

  def __init__(self, workdir: Path, keep: int, required: bool = True):
    """Of the older snapshots the `keep` newest are kept; 0 keeps all.

    Where none is `required`, that one could not be saved, as on a full disk, is
    logged and no more.
    """
    self._workdir, self._keep = pathlib.Path(workdir), keep
    self._required = required or jax.process_count() > 1
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'snapshot')
    self._saving: concurrent.futures.Future[None] | None = None

  def save(self, step: int, params: Any, in_use: int) -> None:
    """Publishes parameters as `save_snapshot`, in the background.

    Args:
      step: that the parameters are of.
      params: of the embedder; the next training step may take them over.
      in_use: the snapshots after this step are all kept: their generations may
        still be adopted.
    """
    self.wait()
    params = jax.tree.map(distributed.fetch, params)
    finish = self._begin(step, params)

    def save_and_prune() -> None:
      finish()
      if self._keep and distributed.is_main():
        for old in snapshot_steps(self._workdir)[: -self._keep]:
          if old < in_use:
            shutil.rmtree(self._workdir / SNAPSHOTS / str(old))

    self._saving = self._threads.submit(save_and_prune)

  def _begin(self, step: int, params: Any) -> Callable[[], object]:
    """Does what must be done at once, and returns what is left to do."""
    if jax.process_count() == 1:
      return lambda: save_snapshot(self._workdir, step, params)
    # Orbax wants all processes, and that on their main threads.
    digest = params_digest(params) if distributed.is_main() else ''
    if distributed.any(
        distributed.is_main() and _has_snapshot(self._workdir, step, digest)
    ):
      return lambda: None
    return ocp.save_async(
        self._workdir.absolute() / SNAPSHOTS / str(step),
        params,
        overwrite=True,
        custom_metadata={'step': step, 'params_digest': digest},
    ).result

  def wait(self) -> None:
    """Returns when the last one is on disk."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    except (ValueError, OSError) as error:
      _remove_unfinished(self._workdir / SNAPSHOTS)
      if self._required:
        raise
      log.error(
          'A snapshot of the retriever was not saved: %s. Training goes on '
          'with the index that there is.', error,
      )

  def close(self) -> None:
    self._threads.shutdown()


def snapshot_steps(workdir: Path) -> list[int]:
  """Steps of the snapshots that can be read."""
  return steps_in(pathlib.Path(workdir) / SNAPSHOTS)


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
  with _alone():
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


def _remove_unfinished(directory: pathlib.Path) -> None:
  """Deletes what Orbax leaves of a save that failed."""
  for path in directory.glob('*.orbax-checkpoint-tmp'):
    shutil.rmtree(path, ignore_errors=True)


def _custom_metadata(path: pathlib.Path) -> dict[str, Any]:
  # The file is Orbax' own, public format; going through Orbax costs 100 times
  # as much, as it looks at every array.
  return read_json(path / '_CHECKPOINT_METADATA').get('custom_metadata') or {}


def _alone() -> ocp.Context:
  """A context in which Orbax does not wait for the other processes."""
  context = ocp.Context()
  if jax.process_count() > 1:
    this = jax.process_index()
    context.multiprocessing.primary_host = this
    context.multiprocessing.active_processes = {this}
    context.multiprocessing.barrier_sync_key_prefix = f'process{this}'
  return context


def _has_snapshot(workdir: Path, step: int, digest: str) -> bool:
  path = pathlib.Path(workdir) / SNAPSHOTS / str(step)
  return path.exists() and snapshot_digest(workdir, step) == digest


def _on_one_device(abstract: Any) -> Any:
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
