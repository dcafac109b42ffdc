"""`realm-jax evaluate --tagged`: precision, recall and F1 of a tagger."""

import dataclasses
import pathlib
import time
from typing import Any

from realm_jax.corpus import entities
from realm_jax.evaluation import report
from realm_jax.inference import tagging


def evaluate(workdir: pathlib.Path | str, sources: str) -> report.Result:
  """Precision, recall and F1 over the entities of tagged sentences.

  Args:
    workdir: of the objective `tagger`.
    sources: of `entities.read`. If their types are not those of the tagger,
      only the figures of `any` are meaningful.

  Returns:
    The contents of `workdir`/evaluation/<step>.json.
  """
  start = time.perf_counter()
  sentences = entities.read(sources)
  tagger = tagging.SentenceTagger(workdir)
  table = entities.TaggedTable.of(
      sentences, None, tagger.config.tagger.length, tagger.tokenizer
  )
  predicted = entities.tags_of_words(
      table,
      tagger(table),
      tagger.types,
      [len(sentence.tokens) for sentence in sentences],
  )
  scores = entities.score(
      [entities.entities(sentence.tags) for sentence in sentences],
      [entities.entities(tags) for tags in predicted],
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
