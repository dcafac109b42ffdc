"""A trained tagger in use: labels of sentences, and how right they are.

Public: `SentenceTagger`, `evaluate`.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.data import tagging
from realm_jax.evaluation import report
from realm_jax.evaluation import trained as trained_lib
from realm_jax.index import embedding
from realm_jax.models import components as components_lib
from realm_jax.runtime import mesh as mesh_lib


class SentenceTagger:
  """The tagger of a workdir, on all devices."""

  def __init__(self, workdir: pathlib.Path | str):
    """Loads the newest checkpoint.

    Raises:
      FileNotFoundError, ValueError: see `trained.Trained.open`; or it is no
        workdir of the objective `tagger`.
    """
    trained = trained_lib.Trained.open(workdir)
    if 'tagger' not in trained.components:
      raise ValueError(
          f'{workdir} has no tagger: its objective is'
          f' {trained.config.objective!r}. Train the objective `tagger`:'
          ' docs/tagging.md.'
      )
    self.config = trained.config
    self.tokenizer = trained.corpus.tokenizer
    self.types = trained.config.model.entity_types
    self.step = trained_lib.steps_available(workdir)[0][-1]
    self.params = trained.load(self.step)['tagger']
    self._component = trained.components['tagger']
    self._mesh = mesh_lib.make_mesh(config_lib.MeshConfig())

  def __call__(self, table: tagging.TaggedTable) -> np.ndarray:
    """Returns the labels of sentences, int32 NL; those without are -1."""
    lengths_N = (table.ids_NL != self.tokenizer.pad_id).sum(axis=1)

    def tag(
        params: components_lib.Params, *arrays_BL: jax.Array
    ) -> jax.Array:
      return self._component.apply(params, 'tags', *arrays_BL)

    def assemble(rows: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
      # Of -1, for which there is no row, the last serves as well.
      return tuple(
          array_NL[rows, :width]
          for array_NL in (table.ids_NL, table.types_NL, table.begins_NL)
      )

    encoder = embedding.RowEncoder(
        tag, lengths_N, table.ids_NL.shape[1], self._mesh
    )
    labels_NL = np.full(table.ids_NL.shape, tagging.NO_LABEL, np.int32)
    with tqdm.tqdm(
        total=len(table), desc='tagging', unit='sentence', disable=None
    ) as bar:
      for rows, labels_BL in encoder(
          self.params, np.arange(len(table)), assemble
      ):
        labels_NL[rows, : labels_BL.shape[1]] = labels_BL
        bar.update(len(rows))
    return labels_NL


def evaluate(workdir: pathlib.Path | str, sources: str) -> report.Result:
  """Precision, recall and F1 over the entities of tagged sentences.

  Args:
    workdir: of the objective `tagger`.
    sources: of `tagging.read`. Their types need not be those of the tagger:
      then `any` is what says something.

  Returns:
    What is also written to `workdir`/evaluation/<step>.json.
  """
  start = time.perf_counter()
  sentences = tagging.read(sources)
  tagger = SentenceTagger(workdir)
  table = tagging.TaggedTable.of(
      sentences, None, tagger.config.tagger.length, tagger.tokenizer
  )
  predicted = tagging.tags_of_words(
      table,
      tagger(table),
      tagger.types,
      [len(sentence.tokens) for sentence in sentences],
  )
  scores = tagging.score(
      [tagging.entities(sentence.tags) for sentence in sentences],
      [tagging.entities(tags) for tags in predicted],
  )
  result: dict[str, Any] = {
      'step': tagger.step,
      'objective': tagger.config.objective,
      'sentences': len(sentences),
      'entities': {
          name: dataclasses.asdict(score) for name, score in scores.items()
      },
      'seconds': round(time.perf_counter() - start, 3),
  }
  report.save(workdir, result)
  return result
