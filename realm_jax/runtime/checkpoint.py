"""Checkpoints of a workdir by step, and snapshots of its retriever.

A checkpoint has parameters and train state; a snapshot has the parameters of
the embedder, for the index builder. Orbax writes under a temporary name and
renames, so a listed step is complete. The processes of a job write a checkpoint
together, to a folder that all of them see; each process reads for itself.
"""

from collections.abc import Callable
import concurrent.futures
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

CHECKPOINTS, SNAPSHOTS = 'checkpoints', 'retriever'
_METADATA = '_CHECKPOINT_METADATA'  # A file of Orbax.

Path = pathlib.Path | str


def params_digest(params: Any) -> str:
  """Returns the SHA-256 over names, shapes, types and bytes of all arrays.

  It does not depend on the sharding. If arrays are spread over the devices of
  several processes, all of these must call.
  """
  hasher = hashlib.sha256()
  for name, leaf in sorted(_leaves(params).items()):
    array = distributed.fetch(leaf)
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
    every = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
    kept = policies.LatestN(keep) if keep else policies.PreserveAll()
    self._checkpointer = ocp.training.Checkpointer(
        self._directory, save_decision_policy=every, preservation_policy=kept,
        cleanup_tmp_directories=True, context=_saving_context(),
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
        step, {'params': params, 'train_state': train_state}, force=True,
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


def _saving_context(compress: bool = True) -> ocp.Context:
  """Returns a context in which several threads may save and load at once.

  By default, Orbax creates the folder in the background, and the writers of the
  arrays wait for a signal that is named by a counter of the process. A save or
  load of another thread advances the counter: arrays are written early, and
  deleted when their folder is created.

  `compress=False` neither compresses nor copies arrays: for parameters of the
  size of the memory that do not change during the save.
  """
  context = ocp.Context()
  context.asynchronous.create_directories_asynchronously = False
  context.array.saving.use_compression = compress
  context.memory.deepcopy_host_arrays = compress
  return context


def save_params(
    workdir: Path, step: int, params: dict[str, Any], about: Any
) -> None:
  """Saves a checkpoint of parameters alone, which cannot be resumed.

  `params` are {component: {name: array}}; `about` is small and JSON.
  """
  path = pathlib.Path(workdir).absolute() / CHECKPOINTS / str(step)
  with _saving_context(compress=False):
    ocp.save_checkpointables(path, {'params': params}, custom_metadata=about)


def load_params(
    workdir: Path, abstract: dict[str, Any], step: int | None = None
) -> tuple[dict[str, Any], int]:
  """Loads the parameters of a checkpoint, by default the newest; and its step.

  `abstract` is {component: {name: ShapeDtypeStruct}}, for some or all
  components of the checkpoint.

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
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
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
    here = found.get(name, 'missing')
    if name not in expected:
      problems.append(f'{name}: {here}, not part of this model')
    elif here != expected[name]:
      problems.append(f'{name}: {here}, expected {expected[name]}')
  if problems:
    shown = lines.listed(problems, 8, '\n  ')
    raise ValueError(f'{where} holds another model:\n  {shown}')


def save_snapshot(
    workdir: Path, step: int, params: Any, compress: bool = True
) -> str:
  """Saves a snapshot, for one process; a running job uses `Snapshots`.

  An existing snapshot of this step and digest is kept. Returns the digest, by
  which the trainer knows the generation made from the parameters.
  """
  params = jax.device_get(params)
  digest = params_digest(params)
  if not _has(workdir, step, digest):
    about = {'step': step, 'params_digest': digest}
    path = _path(workdir, step)
    with _saving_context(compress):
      ocp.save(path, params, overwrite=True, custom_metadata=about)
  return digest


class Snapshots:
  """The snapshots of a running job, saved in the background."""

  def __init__(self, workdir: Path, keep: int, required: bool):
    """Keeps the `keep` newest of the older snapshots; 0 keeps all.

    If not `required`, a failed save (for example a full disk) is only logged.
    """
    self._workdir, self._keep = pathlib.Path(workdir), keep
    self._required = required or jax.process_count() > 1
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'snapshot')
    self._saving: concurrent.futures.Future[None] | None = None

  def save(
      self, step: int, params: Any, in_use: int, saving: int | None = None
  ) -> None:
    """Saves a snapshot in the background; the next step may donate `params`.

    Snapshots after `in_use` are kept, as their generations may be adopted.
    `saving` is a checkpoint that may not be on disk yet.
    """
    self.wait()
    params = jax.tree.map(distributed.fetch, params)
    finish = self._begin(step, params)

    def save_and_prune() -> None:
      finish()
      if self._keep and distributed.is_main():
        self._prune(in_use, saving)

    self._saving = self._threads.submit(save_and_prune)

  def _prune(self, in_use: int, saving: int | None) -> None:
    steps = snapshot_steps(self._workdir)
    wanted = set(steps[-self._keep :])
    # A job that resumes may still have to adopt the last snapshot before.
    saved = set(steps_in(self._workdir / CHECKPOINTS))
    for resumed in saved if saving is None else {*saved, saving}:
      wanted.update([step for step in steps if step < resumed][-1:])
    for step in steps:
      if step < in_use and step not in wanted:
        files.remove(_path(self._workdir, step))

  def _begin(self, step: int, params: Any) -> Callable[[], object]:
    """Begins to save; returns the part for the background."""
    if jax.process_count() == 1:
      return lambda: save_snapshot(self._workdir, step, params)
    # Orbax needs all processes, on their main threads.
    main = distributed.is_main()
    digest = params_digest(params) if main else ''
    if distributed.any(main and _has(self._workdir, step, digest)):
      return lambda: None
    about = {'step': step, 'params_digest': digest}
    path = _path(self._workdir, step)
    with _saving_context():
      return ocp.save_async(
          path, params, overwrite=True, custom_metadata=about
      ).result

  def wait(self) -> None:
    """Waits until the last snapshot is on disk."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    except (ValueError, OSError) as error:
      remove_unfinished(self._workdir / SNAPSHOTS)
      if self._required:
        raise
      log.error(
          'A snapshot of the retriever was not saved: %s. Training continues '
          'with the present index.', error,
      )

  def close(self) -> None:
    self._threads.shutdown()


def snapshot_steps(workdir: Path) -> list[int]:
  """Returns the steps of the snapshots."""
  return steps_in(pathlib.Path(workdir) / SNAPSHOTS)


def snapshot_digest(workdir: Path, step: int) -> str:
  """Returns the digest of a snapshot; FileNotFoundError if it is gone."""
  return custom_metadata(_path(workdir, step))['params_digest']


def load_snapshot(
    workdir: Path, step: int, abstract: dict[str, Any]
) -> tuple[dict[str, Any], str]:
  """Returns a snapshot's parameters, on one device, and their digest.

  Raises:
    ValueError: the snapshot has other shapes, or its bytes are damaged.
  """
  path = _path(workdir, step)
  check_leaves(ocp.metadata(path).metadata, abstract, path)
  with single_process_context():
    params = ocp.load(path, on_one_device(abstract))
  digest, expected = params_digest(params), snapshot_digest(workdir, step)
  if digest != expected:
    raise ValueError(
        f'{path} is damaged: its parameters have the digest {digest[:16]},'
        f' {expected[:16]} was written.'
    )
  return params, digest


def _path(workdir: Path, step: int) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / SNAPSHOTS / str(step)


def _has(workdir: Path, step: int, digest: str) -> bool:
  try:
    return snapshot_digest(workdir, step) == digest
  except FileNotFoundError:
    return False
