"""Inference with a tagger: labels, their F1, and corpora with its spans."""

from collections.abc import Sequence
import dataclasses
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.index import embedding
from realm_jax.inference import trained as trained_lib
from realm_jax.models import components as components_lib
from realm_jax.prepare import replace_spans
from realm_jax.prepare import salient_spans
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib


class SentenceTagger:
  """The tagger of a workdir, on all devices."""

  def __init__(self, workdir: pathlib.Path | str):
    """Loads the newest checkpoint.

    Raises:
      FileNotFoundError, ValueError: see `trained.Trained.open`; or the
        objective of the workdir is not `tagger`.
    """
    trained = trained_lib.Trained.open_parameters(workdir)
    if 'tagger' not in trained.components:
      raise ValueError(
          f'{workdir} has no tagger: its objective is'
          f' {trained.config.objective!r}. Train the objective `tagger`:'
          ' docs/tagging.md.'
      )
    self.config = trained.config
    self.tokenizer = trained.tokenizer
    self.types = trained.config.model.entity_types
    self.step = checkpoint.newest_step(trained.workdir)
    self.params = trained.load(self.step)['tagger']
    self._component = trained.components['tagger']
    self._mesh = mesh_lib.make_mesh(config_lib.MeshConfig())
    self._encoder: embedding.RowEncoder | None = None

  def __call__(self, table: entities.TaggedTable) -> np.ndarray:
    """Returns the labels of sentences, int32 [N, L]; -1: no label."""
    lengths_N = (table.ids_NL != self.tokenizer.pad_id).sum(axis=1)

    def tag(params: components_lib.Params, *arrays_BL: jax.Array) -> jax.Array:
      return self._component.module(params).tags(*arrays_BL)

    def assemble(rows: np.ndarray, width: int) -> tuple[np.ndarray, ...]:
      # A row of -1 is padding; the last row takes its place.
      return tuple(
          array_NL[rows, :width]
          for array_NL in (table.ids_NL, table.types_NL, table.begins_NL)
      )

    if self._encoder is None:
      # The first table decides the buckets; a later one may be longer.
      length = self.config.tagger.length
      sizes = np.append(lengths_N, length)
      self._encoder = embedding.RowEncoder(tag, sizes, length, self._mesh)
    labels_NL = np.full(table.ids_NL.shape, entities.NO_LABEL, np.int32)
    with tqdm.tqdm(
        total=len(table), desc='tagging', unit='sentence', disable=None
    ) as bar:
      for rows, labels_BL in self._encoder(
          self.params, np.arange(len(table)), assemble, lengths_N
      ):
        labels_NL[rows, : labels_BL.shape[1]] = labels_BL
        bar.update(len(rows))
    return labels_NL


def evaluate(
    workdir: pathlib.Path | str,
    sources: str,
    tag_column: str | None = None,
    tag_names: Sequence[str] | None = None,
) -> dict[str, Any]:
  """Precision, recall and F1 over the entities of tagged sentences.

  `sources`, `tag_column` and `tag_names` are those of `entities.read`; None: as
  in training. If the types of the sources are not those of the tagger, only the
  figures of `any` are meaningful. Returns plain JSON, for `report.save`.
  """
  start = time.perf_counter()
  tagger = SentenceTagger(workdir)
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
      table, tagger(table), tagger.types,
      [len(sentence.tokens) for sentence in sentences],
  )
  gold = [entities.entities(sentence.tags) for sentence in sentences]
  scores = score(gold, [entities.entities(tags) for tags in predicted])
  return {
      'step': tagger.step,
      'objective': tagger.config.objective,
      'sentences': len(sentences),
      'entities': {
          name: dataclasses.asdict(value) for name, value in scores.items()
      },
      'seconds': round(time.perf_counter() - start, 3),
  }


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


def tag_corpus(
    corpus: corpus_lib.Corpus,
    workdir: pathlib.Path | str,
    output: pathlib.Path | str,
    *,
    dates_and_numbers: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
  """Writes a copy of a corpus with the names of a tagger as salient spans.

  The tagger's spans replace the names that the rules found; dates and numbers
  stay, unless `dates_and_numbers` is False. The longer one of two overlapping
  spans stays; of equally long ones, the tagger's. Returns the manifest.

  Raises:
    ValueError: another tokenizer; see also `replace_spans.replace_spans`.
  """
  tagger = SentenceTagger(workdir)
  if tagger.tokenizer.digest != corpus.tokenizer.digest:
    raise ValueError(
        f'{workdir} was trained with another vocabulary than that of'
        f' {corpus.directory}: tokenizer {tagger.tokenizer.digest[:16]} there,'
        f' {corpus.tokenizer.digest[:16]} here.'
    )

  def find(
      sentences: list[replace_spans.Sentence],
  ) -> list[list[replace_spans.Span]]:
    pieces = [
        entities.Wordpieces.of_text(s.text, s.ids, s.starts, s.begins)
        for s in sentences
    ]
    table = entities.TaggedTable.of_wordpieces(
        pieces, tagger.config.tagger.length, tagger.tokenizer
    )
    names: list[list[replace_spans.Span]] = [[] for _ in sentences]
    words = [np.append(np.flatnonzero(s.begins), len(s.ids)) for s in sentences]
    marked = entities.entities_of_words(table, tagger(table))
    for number, first, behind in zip(*marked, strict=True):
      start, limit = words[number][[first, behind]].tolist()
      s = sentences[number]
      bounds = int(s.starts[start]), int(s.limits[limit - 1])
      names[number].append(replace_spans.Span(start, limit, *bounds))
    found = []
    for s, of_one in zip(sentences, names, strict=True):
      text, kept = s.text.encode(), []
      for span in s.spans if dates_and_numbers else ():
        words_of = text[span.byte_start : span.byte_limit].decode()
        if salient_spans.kind(words_of) != 'name':
          kept.append(span)
      found.append(replace_spans.longest(of_one, kept))
    return found

  about = {
      'tagger': checkpoint.params_digest(tagger.params),
      'tagger_types': list(tagger.types),
      'rules_dates_and_numbers': dates_and_numbers,
  }
  return replace_spans.replace_spans(
      corpus, output, find, about, overwrite=overwrite
  )
