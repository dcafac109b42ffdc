"""`realm-jax evaluate --tagged`: precision, recall and F1 of a tagger."""

from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

from realm_jax.corpus import entities
from realm_jax.evaluation import report
from realm_jax.inference import tagging


def evaluate(
    workdir: pathlib.Path | str,
    sources: str,
    tag_column: str | None = None,
    tag_names: Sequence[str] | None = None,
) -> report.Result:
  """Precision, recall and F1 over the entities of tagged sentences.

  Args:
    workdir: of the objective `tagger`.
    sources: of `entities.read`. If their types are not those of the tagger,
      only the figures of `any` are meaningful.
    tag_column, tag_names: of `entities.read`; None: as in training.

  Returns:
    The contents of `workdir`/evaluation/<step>.json.
  """
  start = time.perf_counter()
  tagger = tagging.SentenceTagger(workdir)
  given = tagger.config.tagger
  sentences = entities.read(
      sources,
      given.tag_column if tag_column is None else tag_column,
      given.tag_names if tag_names is None else tag_names,
  )
  table = entities.TaggedTable.of(
      sentences, None, tagger.config.tagger.length, tagger.tokenizer
  )
  predicted = entities.tags_of_words(
      table,
      tagger(table),
      tagger.types,
      [len(sentence.tokens) for sentence in sentences],
  )
  scores = score(
      [entities.entities(sentence.tags) for sentence in sentences],
      [entities.entities(tags) for tags in predicted],
  )
  result: dict[str, Any] = {
      'step': tagger.step,
      'objective': tagger.config.objective,
      'sentences': len(sentences),
      'entities': {
          name: dataclasses.asdict(value) for name, value in scores.items()
      },
      'seconds': round(time.perf_counter() - start, 3),
  }
  report.save(workdir, result)
  return result


@dataclasses.dataclass(frozen=True)
class Score:
  """Precision, recall and F1 of entities; `count` is of the gold ones."""

  precision: float
  recall: float
  f1: float
  count: int


def score(
    gold: Sequence[Sequence[entities.Entity]],
    predicted: Sequence[Sequence[entities.Entity]],
) -> dict[str, Score]:
  """Compares the entities of sentences as seqeval does (Nakayama 2018).

  An entity is correct if its type, first and last word are.

  Returns:
    Scores by type; `micro` for all types together; `any` without regard to
    types, where only first and last word count. A share of nothing is 0.
  """
  true = {(i, e) for i, found in enumerate(gold) for e in found}
  found = {(i, e) for i, found in enumerate(predicted) for e in found}
  scores = {'micro': _score(true, found)}
  scores['any'] = _score(
      {(i, e[1:]) for i, e in true}, {(i, e[1:]) for i, e in found}
  )
  for kind in sorted({e[0] for _, e in true | found}):
    scores[kind] = _score(
        {x for x in true if x[1][0] == kind},
        {x for x in found if x[1][0] == kind},
    )
  return scores


def _score(true: set, found: set) -> Score:
  right = len(true & found)
  precision = right / len(found) if found else 0.0
  recall = right / len(true) if true else 0.0
  f1 = 2 * right / (len(true) + len(found)) if true or found else 0.0
  return Score(precision, recall, f1, len(true))
