"""Retriever snapshots: the embedder's parameters, for the index builder.

As with checkpoints, a listed step is a complete snapshot.
"""

from collections.abc import Callable
import concurrent.futures
import logging
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from realm_jax.runtime import checkpoint
from realm_jax.runtime import distributed
from realm_jax.runtime import files

log = logging.getLogger(__name__)

DIRECTORY = 'retriever'


def save(workdir: checkpoint.Path, step: int, params: Any) -> str:
  """Saves a snapshot, for one process; a running job uses `Snapshots`.

  An existing snapshot of this step and digest is kept.

  Returns:
    The digest of the parameters, by which the trainer knows the generation made
    from them.
  """
  params = jax.device_get(params)
  digest = checkpoint.params_digest(params)
  if not _has(workdir, step, digest):
    about = {'step': step, 'params_digest': digest}
    ocp.save(
        _path(workdir, step), params, overwrite=True, custom_metadata=about
    )
  return digest


class Snapshots:
  """The snapshots of a running job, saved in the background."""

  def __init__(
      self, workdir: checkpoint.Path, keep: int, required: bool = True
  ):
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
    """Saves a snapshot in the background.

    Args:
      step: step of the parameters.
      params: of the embedder; the next step may donate them.
      in_use: later snapshots are kept, as their generations may be adopted.
      saving: a checkpoint that may not be on disk yet.
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
    steps = steps_of(self._workdir)
    wanted = set(steps[-self._keep :])
    # A job that resumes may still have to adopt the last snapshot before.
    saved = set(checkpoint.steps_in(self._workdir / checkpoint.CHECKPOINTS))
    for resumed in saved if saving is None else {*saved, saving}:
      wanted.update([step for step in steps if step < resumed][-1:])
    for step in steps:
      if step < in_use and step not in wanted:
        files.remove(_path(self._workdir, step))

  def _begin(self, step: int, params: Any) -> Callable[[], object]:
    """Begins to save; returns the part for the background."""
    if jax.process_count() == 1:
      return lambda: save(self._workdir, step, params)
    # Orbax needs all processes, on their main threads.
    digest = checkpoint.params_digest(params) if distributed.is_main() else ''
    if distributed.any(
        distributed.is_main() and _has(self._workdir, step, digest)
    ):
      return lambda: None
    return ocp.save_async(
        _path(self._workdir, step),
        params,
        overwrite=True,
        custom_metadata={'step': step, 'params_digest': digest},
    ).result

  def wait(self) -> None:
    """Waits until the last snapshot is on disk."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    except (ValueError, OSError) as error:
      checkpoint.remove_unfinished(self._workdir / DIRECTORY)
      if self._required:
        raise
      log.error(
          'A snapshot of the retriever was not saved: %s. Training continues '
          'with the present index.', error,
      )

  def close(self) -> None:
    self._threads.shutdown()


def steps_of(workdir: checkpoint.Path) -> list[int]:
  """Returns the steps of the snapshots."""
  return checkpoint.steps_in(pathlib.Path(workdir) / DIRECTORY)


def digest_of(workdir: checkpoint.Path, step: int) -> str:
  """Returns the digest of a snapshot; FileNotFoundError if it is gone."""
  return checkpoint.custom_metadata(_path(workdir, step))['params_digest']


def load(
    workdir: checkpoint.Path, step: int, abstract: dict[str, Any]
) -> tuple[dict[str, Any], str]:
  """Loads a snapshot onto one device.

  Returns:
    The parameters of the embedder and their digest.

  Raises:
    ValueError: the snapshot has other shapes, or its bytes are damaged.
  """
  path = _path(workdir, step)
  checkpoint.check_leaves(ocp.metadata(path).metadata, abstract, path)
  with checkpoint.single_process_context():
    params = ocp.load(path, checkpoint.on_one_device(abstract))
  digest, expected = checkpoint.params_digest(params), digest_of(workdir, step)
  if digest != expected:
    raise ValueError(
        f'{path} is damaged: its parameters have the digest {digest[:16]},'
        f' {expected[:16]} was written.'
    )
  return params, digest


def _path(workdir: checkpoint.Path, step: int) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / DIRECTORY / str(step)


def _has(workdir: checkpoint.Path, step: int, digest: str) -> bool:
  try:
    return digest_of(workdir, step) == digest
  except FileNotFoundError:
    return False
