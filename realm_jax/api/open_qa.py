"""Open-domain question answering for users: a question in, an answer out.

Public: `OpenQA`. The answers are those of `evaluation.answering`.
"""

from collections.abc import Sequence
import os
import time

from realm_jax.index import generation as generation_lib
from realm_jax.inference import answering
from realm_jax.inference import trained as trained_lib

Path = str | os.PathLike[str]


class OpenQA:
  """Retrieves passages and reads answers in them; `OpenQA.load` makes one."""

  def __init__(self, answerer: answering.Answerer):
    self._answerer = answerer

  @classmethod
  def load(cls, workdir: Path, step: int | None = None) -> 'OpenQA':
    """Loads retriever, reader and index of a workdir.

    Args:
      workdir: of the objective `open_qa`, or an imported open-QA checkpoint.
      step: of a checkpoint; None: the newest.

    Raises:
      FileNotFoundError: there is no such workdir, checkpoint or index.
      ValueError: it has no reader of answers, or something is damaged.
    """
    trained = trained_lib.Trained.open(os.fspath(workdir))
    if step is None:
      checkpoints, _ = trained_lib.steps_available(trained.workdir)
      step = checkpoints[-1]
    return cls(answering.Answerer(trained, step))

  def answer(
      self, question: str | Sequence[str], k: int | None = None
  ) -> answering.Answer | list[answering.Answer]:
    """Answers one question, or several.

    Args:
      question: a text, or a list of them.
      k: passages to read for each; None: as many as in training.

    Returns:
      An `answering.Answer` for each question: text, probability, and the
      passages with their own best answers.

    Raises:
      ValueError: an empty question, or a k that is not possible.
    """
    if isinstance(question, str):
      return self._answerer.answer([question], k)[0]
    return self._answerer.answer(question, k)

  @property
  def step(self) -> int:
    """Of the checkpoint."""
    return self._answerer.step

  @property
  def index_generation(self) -> int | None:
    """The step whose retriever embedded the passages; None: just now."""
    return self._answerer.index.generation

  @property
  def index_age_seconds(self) -> float | None:
    """How long ago the index was published."""
    generation = self.index_generation
    if generation is None:
      return None
    folder = self._answerer.trained.workdir / generation_lib.DIRECTORY
    about = generation_lib.read_manifest(folder / str(generation))
    return time.time() - about['created']
