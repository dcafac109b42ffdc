"""A corpus with other salient spans, and all else as it was.

Public: `Sentence`, `Span`, `respan`, `longest`. Texts, wordpieces and passages
keep their rows, so an index of the one corpus is in order for the other; what
is masked differs, and so does the fingerprint.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import io
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import word_cache as word_cache_lib
from realm_jax.prepare import chunk_files as chunk_files_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import writer as writer_lib
from realm_jax.runtime import files

_SENTENCES = 2**14  # At a time.
_MOST_ODD = 0.1  # Of these: more, and another version made the corpus.


class Span(NamedTuple):
  """Half-open ranges of the same part of a sentence."""

  start: int  # Wordpieces.
  limit: int
  byte_start: int
  byte_limit: int


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A sentence of a corpus with its spans.

  text: as it was.
  starts, limits: the bytes of each of its wordpieces.
  begins: which of them begin a word.
  ids: the wordpieces.
  spans: in order.
  odd: whether they are of other wordpieces, those that it has in its document:
    a sentence can begin inside what is one word to BERT.
  """

  text: str
  starts: np.ndarray
  limits: np.ndarray
  begins: np.ndarray
  ids: np.ndarray
  spans: list[Span]
  odd: bool


Find = Callable[[list[Sentence]], Sequence[Sequence[Span]]]


def respan(
    corpus: corpus_lib.Corpus,
    output: str | os.PathLike[str],
    find: Find,
    about: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes a corpus again with the spans that a function finds.

  What is found is kept beside the output meanwhile: a run that was killed goes
  on from there.

  Args:
    corpus: as `prepare` wrote it.
    output: folder to write. It appears, complete, at the very end.
    find: takes some sentences, and returns the spans of each. Those that leave
      too little of a sentence, by the settings of the corpus, are left out. Odd
      sentences keep the spans they have.
    about: how they were found; goes into the manifest's settings.
    overwrite: whether to replace a corpus at `output`.
    progress: whether to show a progress bar.

  Returns:
    The manifest.

  Raises:
    FileExistsError: if `output` exists, or is being written.
    ValueError: if many a sentence's text does not give its wordpieces: a corpus
      that another version made; if no span is left.
    OSError: if the disk is full. Then, as after any error, nothing is left.
  """
  output = pathlib.Path(output).absolute()
  made_with = {**about, 'corpus': corpus.fingerprint, 'sentences': _SENTENCES}
  with (
      files.atomic_folder(output, overwrite) as directory,
      chunk_files_lib.kept(output, made_with) as parts,
  ):
    for path in sorted(corpus.directory.rglob('*')):
      relative = path.relative_to(corpus.directory)
      changes = relative.parts[0] == 'sentences' or path.name.endswith(
          ('.spans.npy', '.span_offsets.npy')
      )
      if path.is_dir() or changes or path.name == 'manifest.json':
        continue
      (directory / relative.parent).mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, directory / relative)
    writer = writer_lib.SpanWriter(directory, list(corpus.sentences))
    with tqdm.tqdm(
        total=sum(map(len, corpus.sentences.values())),
        desc='finding spans',
        unit=' sentences',
        disable=not progress,
    ) as bar:
      for split in corpus.sentences:
        for rows, titles, sentences in _read(corpus, split):
          part = parts.named(f'{split}-{rows[0]}')
          found = _load(part, len(sentences))
          if found is None:
            found = _usable(find(sentences), sentences, corpus)
            _save(part, found)
          writer.append(
              split,
              found,
              [
                  tf_example.text_field('text', sentence.text)
                  + tf_example.text_field('title', title)
                  for sentence, title in zip(sentences, titles, strict=True)
              ],
              np.asarray(corpus.sentences[split].passages[rows]),
          )
          bar.update(len(rows))
    return writer.close(corpus, about)


def _save(path: pathlib.Path, found: list[list[Span]]) -> None:
  """Writes the spans of some sentences, each with the sentence's number."""
  rows = [
      (number, *span)
      for number, of_one in enumerate(found)
      for span in of_one
  ]
  buffer = io.BytesIO()
  np.save(buffer, np.array(rows, np.int32).reshape(-1, 5))
  chunk_files_lib.write(path, buffer.getvalue())


def _load(path: pathlib.Path, count: int) -> list[list[Span]] | None:
  """Reads them back; None if there are none, or they are damaged."""
  try:
    table = np.load(path)
  except (OSError, ValueError, EOFError):
    return None
  found: list[list[Span]] = [[] for _ in range(count)]
  for number, *span in table.tolist():
    found[number].append(Span(*span))
  return found


def longest(*candidates: Sequence[Span]) -> list[Span]:
  """Joins spans of several origins: where two overlap, the longer one stays.

  Of equally long ones that of the earlier argument, and then the first. The
  length is that in bytes.
  """
  ranked = sorted(
      (span.byte_start - span.byte_limit, rank, span.byte_start, span)
      for rank, spans in enumerate(candidates)
      for span in spans
  )
  chosen: list[Span] = []
  for *_, span in ranked:
    if all(
        span.limit <= other.start or other.limit <= span.start
        for other in chosen
    ):
      chosen.append(span)
  return sorted(chosen)


def _usable(
    found: Sequence[Sequence[Span]],
    sentences: list[Sentence],
    corpus: corpus_lib.Corpus,
) -> list[list[Span]]:
  """Leaves out what hides too much, as `passages` does."""
  context = corpus.manifest['settings']['min_context']
  return [
      sentence.spans
      if sentence.odd
      else [
          span
          for span in spans
          if span.start < span.limit
          and len(sentence.ids) - (span.limit - span.start) >= context
      ]
      for spans, sentence in zip(found, sentences, strict=True)
  ]


def _read(
    corpus: corpus_lib.Corpus, split: str
) -> Iterator[tuple[np.ndarray, list[str], list[Sentence]]]:
  """Yields rows, titles and sentences, some at a time."""
  source = tfds.builder_from_directory(
      str(corpus.directory / 'sentences')
  ).as_data_source(split=split)
  table, tokenizer = corpus.sentences[split], corpus.tokenizer
  encode = word_cache_lib.WordMemo(tokenizer)
  for first in range(0, len(table), _SENTENCES):
    rows = np.arange(first, min(first + _SENTENCES, len(table)))
    records = source.__getitems__(rows.tolist())
    texts = [record['text'].decode() for record in records]
    sentences = []
    for row, record, text, (ids, starts, limits) in zip(
        rows.tolist(),
        records,
        texts,
        encode(texts),
        strict=True,
    ):
      begins = tokenizer.starts_word[ids]
      begins[:1] = True
      sentences.append(
          Sentence(
              text,
              starts,
              limits,
              begins,
              ids,
              [
                  Span(start, limit, int(a), int(b))
                  for (start, limit), a, b in zip(
                      table.spans_of(row).tolist(),
                      record['span_starts'],
                      record['span_limits'],
                      strict=True,
                  )
              ],
              not np.array_equal(ids, table.ids(row)),
          )
      )
    odd = [s.text for s in sentences if s.odd]
    if len(odd) > _MOST_ODD * len(sentences):
      raise ValueError(
          f'{corpus.directory}: {len(odd)} of {len(sentences)} sentences of'
          f' {split} are cut into other wordpieces than the table has, such as'
          f' {odd[0][:60]!r}. Prepare the corpus again with this version.'
      )
    yield rows, [record['title'].decode() for record in records], sentences
