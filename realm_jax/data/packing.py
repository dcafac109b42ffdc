"""From records to passages and tagged sentences: the work of one chunk.

Public: `Settings`, `Task`, `Chunk`, `Packer`; `example`, `text_field` and
`number_field`, which encode records for TFDS. A chunk is what one process does
at a time; what comes out depends on the chunk's records alone.

Passages as in ORQA (Lee et al. 2019, section 9): whole sentences, greedily,
while 3 + title + body <= 288 wordpieces.
"""

import bisect
import collections
from collections.abc import Iterable
import dataclasses

import numpy as np

from realm_jax.data import corpus
from realm_jax.data import records
from realm_jax.data import spans as spans_lib
from realm_jax.data import tokenizer as tokenizer_lib

_NUM_SPECIALS = 3  # [CLS] title [SEP] body [SEP].


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text becomes passages and sentences; part of the manifest."""

  max_wordpieces: int = 288  # Of a passage with title and special tokens.
  min_sentence: int = 4  # Wordpieces of a sentence to learn from, at least
  max_sentence: int = 200  # and at most.
  min_context: int = 3  # Wordpieces around a span, at least.


@dataclasses.dataclass(frozen=True)
class Task:
  """What a process is given: some records in order."""

  records: list[records.Record]
  articles: list[int]  # Number of the article of each.
  validation: list[bool]  # Whether its sentences are for validation.
  passages: bool  # False: only sentences are wanted.


@dataclasses.dataclass
class Chunk:
  """What a process gives back. Numbers are relative to the chunk."""

  tokens: np.ndarray  # uint32, flat.
  ids: np.ndarray  # uint64 [P], hashes.
  lengths: np.ndarray  # int64 [P], wordpieces of title and body.
  title_lengths: np.ndarray  # int32 [P]
  articles: np.ndarray  # int32 [P]
  passage_records: list[bytes]
  sentence_starts: np.ndarray  # int64 [S], in `tokens`.
  sentence_lengths: np.ndarray  # int32 [S]
  sentence_passages: np.ndarray  # int64 [S], -1: of none.
  sentence_validation: np.ndarray  # bool [S]
  sentence_fields: list[bytes]  # Of their records, all after `passage`.
  span_counts: np.ndarray  # int64 [S]
  spans: np.ndarray  # int32 [total, 2]
  counts: collections.Counter[str]
  num_records: int


class Packer:
  """Turns tasks into chunks."""

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, settings: Settings
  ) -> None:
    self._tokenizer = tokenizer
    self._settings = settings

  def __call__(self, task: Task) -> Chunk:
    """Does the work."""
    builder = _Builder()
    counts = builder.counts
    encoded = self._tokenizer.encode_arrays([r.text for r in task.records])
    titles = self._tokenizer.encode_batch([r.title for r in task.records])
    for record, article, validation, arrays, title in zip(
        task.records,
        task.articles,
        task.validation,
        encoded,
        titles,
        strict=True,
    ):
      counts['records'] += 1
      ids, starts, limits = arrays
      counts['wordpieces'] += len(ids)
      counts['unknown_wordpieces'] += int(
          np.count_nonzero(ids == self._tokenizer.unk_id)
      )
      if not len(ids):
        counts['records_without_wordpieces'] += 1
        continue
      text = _Text(record.text, ids, starts, limits)
      if task.passages:
        self._add_passages(builder, record, article, title, text)
      self._add_sentences(builder, record, text, validation, task.passages)
    return builder.chunk(task.passages)

  def _add_passages(
      self,
      builder: '_Builder',
      record: records.Record,
      article: int,
      title: list[int],
      text: '_Text',
  ) -> None:
    # A longer title would leave less than half of the passage to the text.
    longest = (self._settings.max_wordpieces - _NUM_SPECIALS) // 2
    if len(title) > longest:
      builder.counts['shortened_titles'] += 1
      title = title[:longest]
    budget = self._settings.max_wordpieces - _NUM_SPECIALS - len(title)
    ranges = self._pack(text, budget, builder.counts)
    for i, (start, limit, byte_start, byte_limit) in enumerate(ranges):
      name = record.id if len(ranges) == 1 else f'{record.id}#{i}'
      text.passages.append((
          limit,
          builder.add_passage(
              name,
              article,
              record.title,
              title,
              text,
              start,
              limit,
              text.slice(byte_start, byte_limit),
          ),
          builder.position - limit,
      ))

  def _pack(
      self, text: '_Text', budget: int, counts: collections.Counter[str]
  ) -> list[tuple[int, int, int, int]]:
    """Returns passages as (wordpiece range, byte range)."""
    packed: list[list[int]] = []
    for start, limit, byte_start, byte_limit in text.sentences:
      if limit - start > budget:
        counts['split_sentences'] += 1
        units = self._split(text, start, limit, byte_start, byte_limit, budget)
      else:
        units = [[start, limit, byte_start, byte_limit]]
      for unit in units:
        if packed and unit[1] - packed[-1][0] <= budget:
          packed[-1][1], packed[-1][3] = unit[1], unit[3]
        else:
          packed.append(list(unit))
    return [(a, b, c, d) for a, b, c, d in packed]

  def _split(
      self,
      text: '_Text',
      start: int,
      limit: int,
      byte_start: int,
      byte_limit: int,
      budget: int,
  ) -> list[list[int]]:
    """Cuts a sentence before words, or inside a word longer than a passage."""
    words = self._tokenizer.starts_word[text.ids]
    pieces = []
    while limit - start > budget:
      cut = start + budget
      while cut > start and not words[cut]:
        cut -= 1
      cut = cut if cut > start else start + budget
      pieces.append([start, cut, byte_start, int(text.starts[cut])])
      start, byte_start = cut, int(text.starts[cut])
    return [*pieces, [start, limit, byte_start, byte_limit]]

  def _add_sentences(
      self,
      builder: '_Builder',
      record: records.Record,
      text: '_Text',
      validation: bool,
      passages: bool,
  ) -> None:
    settings, counts = self._settings, builder.counts
    names = None
    if record.spans is None:
      names = spans_lib.document_names(record.text)
    given, used = record.spans or (), 0
    for start, limit, byte_start, byte_limit in text.sentences:
      counts['sentences'] += 1
      length = limit - start
      passage, base = -1, 0
      if passages:
        at = bisect.bisect_left(text.passages, limit, key=lambda p: p[0])
        _, passage, base = text.passages[at]
        if start + base < builder.starts[passage]:  # It was split.
          counts['sentences_split'] += 1
          continue
      if not settings.min_sentence <= length <= settings.max_sentence:
        counts['sentences_too_short_or_long'] += 1
        continue
      sentence = text.slice(byte_start, byte_limit)
      if record.spans is None:
        found = spans_lib.find_spans(sentence, names)
      else:
        inside = [
            (a - byte_start, b - byte_start)
            for a, b in given
            if byte_start <= a and b <= byte_limit
        ]
        used += len(inside)
        found = inside
      ranges: dict[tuple[int, int], tuple[int, int]] = {}
      for a, b in found:
        first = bisect.bisect_left(
            text.starts_list, a + byte_start, start, limit
        )
        last = bisect.bisect_right(
            text.limits_list, b + byte_start, start, limit
        )
        if first >= last:
          counts['spans_without_wordpieces'] += 1
        elif length - (last - first) < settings.min_context:
          counts['spans_without_context'] += 1
        else:
          ranges.setdefault((first - start, last - start), (a, b))
      if not ranges:
        counts['sentences_without_spans'] += 1
        continue
      if not passages:
        base = builder.add_tokens(text.ids[start:limit]) - start
      builder.add_sentence(
          sentence,
          record.title,
          validation,
          start + base,
          length,
          passage,
          ranges,
      )
    counts['spans_outside_sentences'] += len(given) - used


class _Text:
  """A record's text with its wordpieces and sentences."""

  def __init__(
      self, text: str, ids: np.ndarray, starts: np.ndarray, limits: np.ndarray
  ):
    self._data = text.encode('utf-8')
    self.ids, self.starts, self.limits = ids, starts, limits
    self.starts_list, self.limits_list = starts.tolist(), limits.tolist()
    # Last wordpiece + 1, number in the chunk, distance from a wordpiece of the
    # text to its place in the chunk: of each passage.
    self.passages: list[tuple[int, int, int]] = []
    self.sentences = self._find_sentences(text)

  def slice(self, start: int, limit: int) -> str:
    """Returns what is between two bytes, without the spaces around."""
    return self._data[start:limit].decode('utf-8', 'ignore').strip()

  def _find_sentences(self, text: str) -> list[tuple[int, int, int, int]]:
    """Returns sentences as (wordpiece range, byte range), all wordpieces."""
    to_byte = tokenizer_lib.byte_positions(text)
    characters = spans_lib.split_sentences(text) or [(0, len(text))]
    found = to_byte[np.array(characters)]
    # Each goes on to the start of the next, so that none is between them.
    cuts = np.searchsorted(self.starts, found[1:, 0], 'left')
    first = [0, *cuts.tolist()]
    last = [*cuts.tolist(), len(self.ids)]
    return [
        (a, b, byte_start, byte_limit)
        for a, b, (byte_start, byte_limit) in zip(
            first, last, found.tolist(), strict=True
        )
        if a < b
    ]


class _Builder:
  """Collects the parts of a chunk."""

  def __init__(self) -> None:
    self.counts: collections.Counter[str] = collections.Counter()
    self.position = 0
    self.starts: list[int] = []  # Of each passage's body, in the tokens.
    self._tokens: list[np.ndarray] = []
    self._passages: list[tuple[int, int, int, int]] = []
    self._passage_records: list[bytes] = []
    self._sentences: list[tuple[int, int, int, bool, int]] = []
    self._sentence_fields: list[bytes] = []
    self._spans: list[tuple[int, int]] = []

  def add_tokens(self, ids: np.ndarray) -> int:
    """Appends wordpieces and returns where they begin."""
    start = self.position
    self._tokens.append(ids)
    self.position += len(ids)
    return start

  def add_passage(
      self,
      name: str,
      article: int,
      title: str,
      title_ids: list[int],
      text: _Text,
      start: int,
      limit: int,
      body: str,
  ) -> int:
    """Appends a passage and returns its number."""
    self.add_tokens(np.array(title_ids, np.uint32))
    self.starts.append(self.add_tokens(text.ids[start:limit]))
    self._passages.append((
        corpus.id_hash(name),
        len(title_ids) + limit - start,
        len(title_ids),
        article,
    ))
    self._passage_records.append(
        example(
            number_field('article', [article])
            + text_field('id', name)
            + text_field('text', body)
            + text_field('title', title)
        )
    )
    return len(self._passages) - 1

  def add_sentence(
      self,
      sentence: str,
      title: str,
      validation: bool,
      start: int,
      length: int,
      passage: int,
      spans: dict[tuple[int, int], tuple[int, int]],
  ) -> None:
    """Appends a sentence with spans: wordpieces -> bytes."""
    self._sentences.append((start, length, passage, validation, len(spans)))
    self._spans += spans
    self._sentence_fields.append(
        number_field('span_limits', [b for _, b in spans.values()])
        + number_field('span_starts', [a for a, _ in spans.values()])
        + text_field('text', sentence)
        + text_field('title', title)
    )

  def chunk(self, passages: bool) -> Chunk:
    """Returns everything as arrays."""
    hashes = [p[0] for p in self._passages]
    table = np.array([p[1:] for p in self._passages], np.int64).reshape(-1, 3)
    found = np.array(self._sentences, np.int64).reshape(-1, 5)
    return Chunk(
        tokens=np.concatenate(
            [np.zeros(0, np.uint32), *self._tokens], dtype=np.uint32
        ),
        ids=np.array(hashes, np.uint64),
        lengths=table[:, 0],
        title_lengths=table[:, 1].astype(np.int32),
        articles=table[:, 2].astype(np.int32),
        passage_records=self._passage_records,
        sentence_starts=found[:, 0],
        sentence_lengths=found[:, 1].astype(np.int32),
        sentence_passages=found[:, 2],
        sentence_validation=found[:, 3].astype(bool),
        sentence_fields=self._sentence_fields,
        span_counts=found[:, 4],
        spans=np.array(self._spans, np.int32).reshape(-1, 2),
        counts=self.counts,
        num_records=self.counts['records'],
    )


# A record is a `tf.train.Example`, what TFDS stores: a map from names to lists.
# TFDS's own encoder takes longer than everything else here, and leaves the
# order of the fields to a hash map that differs from process to process; ours
# sorts them. The tests compare the two.


def example(fields: bytes) -> bytes:
  """Returns the record made of some fields, which are in order of names."""
  return _tagged(b'\x0a', fields)


def text_field(name: str, value: str) -> bytes:
  """Returns a field of a record that holds a text."""
  return _field(name, _tagged(b'\x0a', _tagged(b'\x0a', value.encode('utf-8'))))


def number_field(name: str, values: Iterable[int]) -> bytes:
  """Returns a field of a record that holds integers."""
  packed = b''.join(_varint(value % 2**64) for value in values)
  return _field(name, _tagged(b'\x1a', packed and _tagged(b'\x0a', packed)))


def _field(name: str, feature: bytes) -> bytes:
  entry = _tagged(b'\x0a', name.encode('ascii')) + _tagged(b'\x12', feature)
  return _tagged(b'\x0a', entry)


def _tagged(tag: bytes, content: bytes) -> bytes:
  return tag + _varint(len(content)) + content


def _varint(value: int) -> bytes:
  encoded = bytearray()
  while value > 0x7F:
    encoded.append(value & 0x7F | 0x80)
    value >>= 7
  encoded.append(value)
  return bytes(encoded)
