"""Copies a corpus with other salient spans, and everything else unchanged.

Texts, wordpieces and passages keep their rows, so an index of one corpus is
valid for the other. The masked text changes, and with it the fingerprint.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import texts as texts_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import workers as workers_lib
from realm_jax.prepare import writer as writer_lib
from realm_jax.runtime import files

_BLOCK = 2**14  # Sentences that are read and tagged at a time.
# Largest share of the sentences of a block whose wordpieces may differ from
# the table. A larger one shows that another version made the corpus.
_MAX_DIFFERENT = 0.1

Span = texts_lib.Range  # A range of a sentence.


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A sentence of a corpus with its spans.

  text: the sentence.
  starts, limits: the UTF-8 bytes of each wordpiece.
  begins: whether each wordpiece begins a word.
  ids: the wordpieces.
  spans: the present spans, in order.
  differs: whether the table has other wordpieces than the text gives by itself,
    because the sentence begins inside a word of its document.
  """

  text: str
  starts: np.ndarray
  limits: np.ndarray
  begins: np.ndarray
  ids: np.ndarray
  spans: list[Span]
  differs: bool


FindSpans = Callable[[list[Sentence]], Sequence[Sequence[Span]]]


def replace_spans(
    corpus: corpus_lib.Corpus,
    output: str | os.PathLike[str],
    find: FindSpans,
    settings: dict[str, Any],
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes a corpus again with the spans that a function finds.

  The spans found so far are kept next to the output, so a killed run resumes.

  Args:
    corpus: a corpus of `prepare`.
    output: folder to write. It appears, complete, at the very end.
    find: returns the spans of each of a list of sentences. Spans that leave
      less than `min_context` of a sentence are dropped. Sentences that differ
      from the table keep the spans they have.
    settings: how the spans were found; added to the manifest's settings.
    overwrite: whether to replace a corpus at `output`.
    progress: whether to show a progress bar.

  Returns:
    The manifest.

  Raises:
    FileExistsError: `output` exists, or another process is writing it.
    ValueError: many sentences differ from the table, because another version
      made the corpus; or no span is left.
    OSError: the disk is full. After any error, nothing remains on disk.
  """
  output = pathlib.Path(output).absolute()
  made_with = {**settings, 'corpus': corpus.fingerprint, 'sentences': _BLOCK}
  with (
      files.atomic_folder(output, overwrite) as directory,
      workers_lib.chunk_files(output, made_with) as chunk_path,
  ):
    _copy_unchanged(corpus, directory)
    writer = _SpanWriter(directory, list(corpus.sentences))
    with tqdm.tqdm(
        total=sum(map(len, corpus.sentences.values())),
        desc='finding spans',
        unit=' sentences',
        disable=not progress,
    ) as bar:
      for split, table in corpus.sentences.items():
        for rows, titles, sentences in read(corpus, split):
          path = chunk_path(f'{split}-{rows[0]}')
          found = _load(path, len(sentences))
          if found is None:
            found = _usable(find(sentences), sentences, corpus)
            _save(path, found)
          passages = np.asarray(table.passages[rows]).tolist()
          writer.append(split, found, sentences, titles, passages)
          bar.update(len(rows))
    return writer.close(corpus, settings)


def longest(*candidates: Sequence[Span]) -> list[Span]:
  """Joins spans from several sources; of overlapping ones the longest stays.

  The length is in bytes. Ties go to the earlier argument, then to the first
  span.
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


def read(
    corpus: corpus_lib.Corpus, split: str
) -> Iterator[tuple[np.ndarray, list[str], list[Sentence]]]:
  """Yields rows, titles and sentences of a split, in blocks.

  Raises:
    ValueError: many sentences differ from the table.
  """
  source = tfds.builder_from_directory(
      str(corpus.directory / 'sentences')
  ).as_data_source(split=split)
  table, tokenizer = corpus.sentences[split], corpus.tokenizer
  encode = tokenizer_lib.CachedTokenizer(tokenizer)
  for first in range(0, len(table), _BLOCK):
    rows = np.arange(first, min(first + _BLOCK, len(table)))
    records = source.__getitems__(rows.tolist())
    texts = [record['text'].decode() for record in records]
    sentences, encoded = [], encode(texts)
    if not tokenizer.is_wordpiece:  # Most follow a blank.
      after_blank = encode([f' {text}' for text in texts])
      for i, (ids, starts, limits) in enumerate(after_blank):
        if np.array_equal(ids, table.ids(int(rows[i]))):
          encoded[i] = ids, np.maximum(starts - 1, 0), limits - 1
    for row, record, text, (ids, starts, limits) in zip(
        rows.tolist(), records, texts, encoded, strict=True
    ):
      begins = tokenizer.starts_word(ids)
      begins[:1] = True
      spans = [
          Span(start, limit, int(byte_start), int(byte_limit))
          for (start, limit), byte_start, byte_limit in zip(
              table.spans_of(row).tolist(),
              record['span_starts'],
              record['span_limits'],
              strict=True,
          )
      ]
      differs = not np.array_equal(ids, table.ids(row))
      sentences.append(
          Sentence(text, starts, limits, begins, ids, spans, differs)
      )
    different = [s.text for s in sentences if s.differs]
    if len(different) > _MAX_DIFFERENT * len(sentences):
      raise ValueError(
          f'{corpus.directory}: {len(different)} of {len(sentences)} sentences'
          f' of {split} give other wordpieces than the table has, such as'
          f' {different[0][:60]!r}. Prepare the corpus again with this version.'
      )
    yield rows, [record['title'].decode() for record in records], sentences


def _copy_unchanged(
    source: corpus_lib.Corpus, target: pathlib.Path
) -> None:
  """Copies all files of a corpus that do not depend on the spans."""
  for name in source.manifest['files']:
    changes = name.startswith('sentences/') or name.endswith(
        ('.spans.npy', '.span_offsets.npy')
    )
    if not changes:
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(source.directory / name, target / name)


def _save(path: pathlib.Path, found: list[list[Span]]) -> None:
  """Writes the spans of sentences, each with its sentence's number."""
  rows = [(i, *span) for i, spans in enumerate(found) for span in spans]
  with files.atomic_file(path, 'wb') as file:
    np.save(file, np.array(rows, np.int32).reshape(-1, 5))


def _load(path: pathlib.Path, count: int) -> list[list[Span]] | None:
  """Reads the spans of `count` sentences; None if missing or damaged."""
  try:
    table = np.load(path)
  except (OSError, ValueError, EOFError):
    return None
  found: list[list[Span]] = [[] for _ in range(count)]
  for number, *span in table.tolist():
    found[number].append(Span(*span))
  return found


def _usable(
    found: Sequence[Sequence[Span]],
    sentences: list[Sentence],
    corpus: corpus_lib.Corpus,
) -> list[list[Span]]:
  """Drops spans that leave too little context, as `passages` does."""
  context = corpus.manifest['settings']['min_context']
  return [
      sentence.spans
      if sentence.differs
      else [
          span
          for span in spans
          if span.start < span.limit
          and len(sentence.ids) - (span.limit - span.start) >= context
      ]
      for spans, sentence in zip(found, sentences, strict=True)
  ]


class _SpanWriter:
  """Writes the records of sentences, and the tables of their spans."""

  def __init__(self, directory: pathlib.Path, splits: Sequence[str]):
    self._directory = directory
    self._records = writer_lib.sentence_records(directory)
    self._columns = {
        split: writer_lib.span_writer(directory / 'tables', split)
        for split in splits
    }

  def append(
      self,
      split: str,
      spans: Sequence[Sequence[Span]],
      sentences: Sequence[Sentence],
      titles: Sequence[str],
      passages: Sequence[int],
  ) -> None:
    """Appends sentences; `passages` are rows, or -1."""
    self._columns[split].append(
        np.array([len(found) for found in spans], np.int64),
        np.array(
            [span[:2] for found in spans for span in found], np.int32
        ).reshape(-1, 2),
    )
    number_field, text_field = tf_example.number_field, tf_example.text_field
    for found, sentence, title, passage in zip(
        spans, sentences, titles, passages, strict=True
    ):
      fields = (
          number_field('passage', [passage])
          + number_field('span_limits', [span.byte_limit for span in found])
          + number_field('span_starts', [span.byte_start for span in found])
          + text_field('text', sentence.text)
          + text_field('title', title)
      )
      self._records.append(split, tf_example.example(fields))

  def close(
      self, corpus: corpus_lib.Corpus, settings: dict[str, Any]
  ) -> dict[str, Any]:
    """Completes all files, the manifest last, and returns the manifest."""
    counts = {split: spans.close() for split, spans in self._columns.items()}
    if not any(counts.values()):
      raise ValueError(f'{corpus.directory} has no salient span left.')
    before = corpus.manifest
    if before['version'] < 2:
      trivial = writer_lib.write_trivial_tables(
          self._directory / 'tables', corpus.passages, corpus.sentences
      )
      before = {**before, 'counts': {**before['counts'], **trivial}}
    return writer_lib.write_manifest(
        self._directory,
        before['tokenizer'],
        {**before['record_digests'], 'sentences': self._records.close()},
        {
            **before,
            'splits': {
                split: {**values, 'spans': counts[split]}
                for split, values in before['splits'].items()
            },
            'settings': {**before['settings'], **settings},
        },
    )
