"""A workdir opened for export and for inference.

Public: `Workdir`, `open_workdir`, `atomic_folder`.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
from typing import Any
import uuid

from realm_jax import config as config_lib
from realm_jax.builder import documents as documents_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import importing
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import snapshots as snapshots_lib

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Workdir:
  """Parameters of one step, and what belongs to them.

  path: of the workdir.
  config: resolved.
  step: of the parameters.
  params: of every component that the checkpoint has.
  components: the same, without parameters.
  tokenizer: that it was trained with.
  about: what was saved with the checkpoint.
  imported: the checkpoints that it is from, if no step was trained since.
  """

  path: pathlib.Path
  config: config_lib.Config
  step: int
  params: dict[str, components_lib.Params]
  components: dict[str, components_lib.Component]
  tokenizer: tokenizer_lib.Tokenizer
  about: dict[str, Any]
  imported: list[importing.Imported]

  @functools.cached_property
  def documents(self) -> documents_lib.Documents | None:
    """What can be retrieved; None if the config names no corpus."""
    if not self.config.corpus:
      return None
    return documents_lib.Documents.open(self.path, self.config)

  @property
  def corpus(self) -> corpus_lib.Corpus | None:
    """The documents as one corpus; None if the config names none."""
    return self.documents.corpus if self.documents is not None else None

  def index(self) -> documents_lib.Index:
    """The embeddings of all documents by just these parameters.

    Raises:
      FileNotFoundError: if there is no generation of them.
      ValueError: if it is damaged, or of another corpus.
    """
    documents, embedder = self.documents, self.params['embedder']
    found = None
    if documents is not None:
      found = documents.find(checkpoint.params_digest(embedder))
    if documents is None or found is None:
      build, condition = 'index', '.'
      if documents is None:
        condition = ', with a corpus in its config.'
      elif documents.is_compacted:
        build, condition = 'index compact', ', after `realm-jax index`.'
      raise FileNotFoundError(
          f'{self.path} has no index of the retriever of step {self.step}.'
          f' Build it: `realm-jax {build} --workdir={self.path}`{condition}'
      )
    return documents.index(found['step'], lambda: embedder)


def open_workdir(path: Path, step: int | None = None) -> Workdir:
  """Opens a workdir that was trained or imported.

  Args:
    path: of the workdir.
    step: of a checkpoint, or of a snapshot of the retriever; None: the newest
      checkpoint.

  Raises:
    FileNotFoundError: if there is no such workdir or step.
    ValueError: if it is damaged.
  """
  path = pathlib.Path(path)
  config = config_lib.resolve(config_lib.read(path))
  if (path / 'vocab.txt').is_file():
    tokenizer = tokenizer_lib.Tokenizer.from_source(str(path))
  else:
    tokenizer = corpus_lib.Corpus.open(config.corpus).tokenizer
  config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size
  steps = checkpoint.steps_in(path / checkpoint.CHECKPOINTS)
  if step is None or step in steps or not steps:
    names = checkpoint.components_in(path, step)
    parts = {n: components_lib.make(n, config.model) for n in names}
    params, step = checkpoint.load_params(
        path, {name: part.abstract for name, part in parts.items()}, step
    )
    about = checkpoint.saved_about(path, step)
  else:
    snapshots = snapshots_lib.steps_of(path)
    if step not in snapshots:
      raise FileNotFoundError(
          f'{path} has nothing of step {step}: checkpoints {steps}, snapshots '
          f'of the retriever {snapshots}.'
      )
    parts = {'embedder': components_lib.make('embedder', config.model)}
    loaded, _ = snapshots_lib.load(path, step, parts['embedder'].abstract)
    params = {'embedder': loaded}
    about = checkpoint.saved_about(path, steps[-1])
  imported = importing.read_imported(path) if step == 0 else []
  return Workdir(
      path, config, step, params, parts, tokenizer, about, imported
  )


@contextlib.contextmanager
def atomic_folder(output: Path) -> Iterator[pathlib.Path]:
  """A folder to write in, which gets its name when all went well.

  Raises:
    FileExistsError: if `output` is there and not an empty folder.
  """
  output = pathlib.Path(output).absolute()
  if output.exists() and (not output.is_dir() or any(output.iterdir())):
    raise FileExistsError(
        f'{output} exists and is not empty; give another --output.'
    )
  temporary = output.with_name(f'.{output.name}-{uuid.uuid4().hex[:8]}')
  temporary.mkdir(parents=True)
  try:
    yield temporary
    os.replace(temporary, output)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
