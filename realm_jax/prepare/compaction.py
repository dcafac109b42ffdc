"""Writes an overlay as a plain corpus, without the rows removed.

Tables and records are copied and renumbered. No text is tokenised or split
again, so that every passage keeps its wordpieces and its text.
"""

import collections
from collections.abc import Iterator
import os
import pathlib
import shutil
from typing import Any

from array_record.python import array_record_data_source
import numpy as np
import tqdm

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import writer as writer_lib
from realm_jax.runtime import files

_ROWS = 2**14  # Passages, or sentences without a passage, of a chunk.
_QUESTIONS = 'questions.jsonl'


def compact(
    overlay: overlay_lib.Overlay,
    output: str | os.PathLike[str],
    progress: bool = True,
) -> dict[str, Any]:
  """Writes the passages that are not removed, in order, and their sentences.

  Args:
    overlay: of the corpora to join.
    output: folder, which appears when it is complete.
    progress: whether to show a progress bar.

  Returns:
    The manifest.

  Raises:
    FileExistsError: `output` exists or is being written.
    ValueError: no sentence with a span is left, or a record is damaged.
    OSError: the disk is full; then nothing is left.
  """
  base = overlay.parts[0]
  with files.atomic_folder(pathlib.Path(output).absolute()) as directory:
    base.tokenizer.save(directory)
    writer = writer_lib.CorpusWriter(
        directory, base.tokenizer, 'pretraining' in base.sentences
    )
    row = article = 0
    for part in overlay.parts:
      limit = row + len(part.passages)
      for chunk in tqdm.tqdm(
          _chunks(part, overlay.live[row:limit], article),
          desc='compacting',
          total=-(-(limit - row) // _ROWS),
          unit=f' x {_ROWS} passages',
          disable=not progress,
      ):
        writer.add(chunk, True, limited=False)
      row, article = limit, article + part.passages.num_articles
    for split, table in base.sentences.items():
      loose = np.flatnonzero(np.asarray(table.passages) < 0)
      for start in range(0, len(loose), _ROWS):
        numbers = {split: loose[start : start + _ROWS]}
        chunk = _chunk(base, np.zeros(0, np.int64), numbers, 0)
        writer.add(chunk, False, limited=False)
    if (base.directory / _QUESTIONS).is_file():
      shutil.copyfile(base.directory / _QUESTIONS, directory / _QUESTIONS)
    origin = [part.fingerprint for part in overlay.parts]
    return writer.close(
        {**base.manifest['settings'], 'compacted_from': origin},
        base.manifest['skipped_records'],
    )


def _chunks(
    corpus: corpus_lib.Corpus, live: np.ndarray, first_article: int
) -> Iterator[passages_lib.Chunk]:
  """Yields the live passages with their sentences."""
  orders = {
      split: (order, np.asarray(table.passages)[order])
      for split, table in corpus.sentences.items()
      for order in [np.argsort(table.passages, kind='stable')]
  }
  for start in range(0, len(live), _ROWS):
    rows = start + np.flatnonzero(live[start : start + _ROWS])
    numbers = {}
    for split, (order, passages) in orders.items():
      here = slice(*np.searchsorted(passages, [start, start + _ROWS]))
      numbers[split] = np.sort(order[here][live[passages[here]]])
    yield _chunk(corpus, rows, numbers, first_article)


def _chunk(
    corpus: corpus_lib.Corpus,
    rows: np.ndarray,
    numbers: dict[str, np.ndarray],
    first_article: int,
) -> passages_lib.Chunk:
  """Returns passages by their rows, in order, and sentences by their numbers.

  The sentences are of these passages or of none. Article 0 becomes number
  `first_article`.
  """
  table = corpus.passages
  tokens = [np.concatenate(table.title_and_body(row)) for row in rows]
  sentences: dict[str, list[Any]] = {
      name: [] for name in ('starts', 'lengths', 'passages', 'aside')
  }
  spans, fields = [np.zeros((0, 2), np.int32)], []
  ends = np.cumsum([0, *map(len, tokens)])
  size = ends[-1]
  for split, chosen in numbers.items():
    found = corpus.sentences[split]
    owners = found.passages[chosen]
    places = np.where(owners < 0, -1, np.searchsorted(rows, owners))
    for number, place in zip(chosen.tolist(), places.tolist(), strict=True):
      ids = found.ids(number)
      if place < 0:
        tokens.append(ids)
        start, size = size, size + len(ids)
      elif found.tokens is table.tokens:
        start = ends[place] + found.starts[number] - table.offsets[rows[place]]
      else:  # The split has copies of the wordpieces.
        start = ends[place] + _find(ids, tokens[place])
      sentences['starts'].append(start)
      spans.append(found.spans_of(number))
    aside = 0 if split == 'validation' else -1
    sentences['lengths'].extend(found.lengths[chosen])
    sentences['passages'].extend(places)
    sentences['aside'].extend([aside] * len(chosen))
    prefix = f'sentences/sentences-{split}'
    fields += _records(corpus, prefix, chosen, 'passage', owners)
  articles = np.asarray(table.articles[rows])
  texts = _records(corpus, 'passages/passages-train', rows, 'article', articles)
  articles = articles + np.int32(first_article)
  return passages_lib.Chunk(
      tokens=np.concatenate([np.zeros(0, np.uint32), *tokens]),
      ids=np.load(
          corpus.directory / 'tables' / 'passage_ids.npy', mmap_mode='r'
      )[rows],
      lengths=np.diff(ends),
      title_lengths=table.title_lengths[rows],
      articles=articles,
      passage_records=[
          tf_example.example(tf_example.number_field('article', [a]) + text)
          for a, text in zip(articles.tolist(), texts, strict=True)
      ],
      sentence_fields=fields,
      span_counts=np.array([*map(len, spans[1:])], np.int64),
      spans=np.concatenate(spans),
      counts=collections.Counter(),
      num_records=0,
      **{f'sentence_{n}': np.array(v, np.int64) for n, v in sentences.items()},
  )


def _find(ids: np.ndarray, passage: np.ndarray) -> int:
  """Returns where a sentence begins in its passage, in wordpieces."""
  windows = np.lib.stride_tricks.sliding_window_view(passage, len(ids))
  return int(np.flatnonzero((windows == ids).all(axis=1))[0])


def _records(
    corpus: corpus_lib.Corpus,
    prefix: str,
    rows: np.ndarray,
    name: str,
    numbers: np.ndarray,
) -> list[bytes]:
  """Returns encoded records without their first field, a known number."""
  if not len(rows):
    return []
  # In order, because the numbers of shards have leading zeros.
  paths = sorted(corpus.directory.glob(f'{prefix}.array_record-*'))
  records = array_record_data_source.ArrayRecordDataSource(
      [os.fspath(path) for path in paths]
  ).__getitems__(rows.tolist())
  found = []
  for number, record in zip(numbers.tolist(), records, strict=True):
    first = tf_example.number_field(name, [number])
    _, _, rest = record.partition(first)
    if tf_example.example(first + rest) != record:
      raise ValueError(f'{paths[0]}: a record of {name} {number} is damaged.')
    found.append(rest)
  return found
