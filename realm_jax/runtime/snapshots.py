"""Snapshots of the retriever, which the trainer takes for the index builder.

Public: `Snapshots` (of a running job), `save`, `load`, `steps_of`,
`digest_of`. A snapshot is the embedder's parameters of a step. As of
checkpoints, what can be listed can be read.
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
  """Publishes the embedder's parameters for the index builder.

  For one process; a running job uses `Snapshots`.

  Returns:
    Their digest, by which the trainer knows the generation made from them. A
    snapshot of this step and digest that is already there is kept.
  """
  path = pathlib.Path(workdir).absolute() / DIRECTORY / str(step)
  params = jax.device_get(params)
  digest = checkpoint.params_digest(params)
  if _has(workdir, step, digest):
    return digest
  about = {'step': step, 'params_digest': digest}
  ocp.save(path, params, overwrite=True, custom_metadata=about)
  return digest


class Snapshots:
  """The snapshots that a training job takes, saved while it goes on."""

  def __init__(
      self, workdir: checkpoint.Path, keep: int, required: bool = True
  ):
    """Of the older snapshots the `keep` newest are kept; 0 keeps all.

    Where none is `required`, that one could not be saved, as on a full disk, is
    logged and no more.
    """
    self._workdir, self._keep = pathlib.Path(workdir), keep
    self._required = required or jax.process_count() > 1
    self._threads = concurrent.futures.ThreadPoolExecutor(1, 'snapshot')
    self._saving: concurrent.futures.Future[None] | None = None

  def save(
      self, step: int, params: Any, in_use: int, saving: int | None = None
  ) -> None:
    """Publishes parameters as `save`, in the background.

    Args:
      step: that the parameters are of.
      params: of the embedder; the next training step may take them over.
      in_use: the snapshots after this step are all kept: their generations may
        still be adopted.
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
    # Where a job resumes, the last snapshot before may be yet to be adopted.
    saved = set(checkpoint.steps_in(self._workdir / checkpoint.CHECKPOINTS))
    for resumed in saved if saving is None else {*saved, saving}:
      wanted.update([step for step in steps if step < resumed][-1:])
    for step in steps:
      if step < in_use and step not in wanted:
        files.remove(self._workdir / DIRECTORY / str(step))

  def _begin(self, step: int, params: Any) -> Callable[[], object]:
    """Does what must be done at once, and returns what is left to do."""
    if jax.process_count() == 1:
      return lambda: save(self._workdir, step, params)
    # Orbax wants all processes, and that on their main threads.
    digest = checkpoint.params_digest(params) if distributed.is_main() else ''
    if distributed.any(
        distributed.is_main() and _has(self._workdir, step, digest)
    ):
      return lambda: None
    return ocp.save_async(
        self._workdir.absolute() / DIRECTORY / str(step),
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
      checkpoint.remove_unfinished(self._workdir / DIRECTORY)
      if self._required:
        raise
      log.error(
          'A snapshot of the retriever was not saved: %s. Training goes on '
          'with the index that there is.', error,
      )

  def close(self) -> None:
    self._threads.shutdown()


def steps_of(workdir: checkpoint.Path) -> list[int]:
  """Steps of the snapshots that can be read."""
  return checkpoint.steps_in(pathlib.Path(workdir) / DIRECTORY)


def digest_of(workdir: checkpoint.Path, step: int) -> str:
  """The digest that `save` returned for this step."""
  path = pathlib.Path(workdir).absolute() / DIRECTORY / str(step)
  return checkpoint.custom_metadata(path)['params_digest']


def load(
    workdir: checkpoint.Path, step: int, abstract: dict[str, Any]
) -> tuple[dict[str, Any], str]:
  """Loads a snapshot onto one device.

  Returns:
    The embedder's parameters and their digest.

  Raises:
    ValueError: if it is of another shape, or its bytes are not those that
      were saved.
  """
  path = pathlib.Path(workdir).absolute() / DIRECTORY / str(step)
  checkpoint.check_leaves(ocp.metadata(path).metadata, abstract, path)
  with checkpoint.alone():
    params = ocp.load(path, checkpoint.on_one_device(abstract))
  digest, expected = checkpoint.params_digest(params), digest_of(workdir, step)
  if digest != expected:
    raise ValueError(
        f'{path} is damaged: its parameters have the digest {digest[:16]},'
        f' {expected[:16]} was written.'
    )
  return params, digest


def _has(workdir: checkpoint.Path, step: int, digest: str) -> bool:
  try:
    return digest_of(workdir, step) == digest
  except FileNotFoundError:
    return False
