"""From records to passages and sentences with spans, one chunk at a time.

A chunk depends on the records of its task alone. Passages are made as in ORQA
(Lee et al. 2019, section 9): whole sentences are added greedily while
3 + title + body <= 288 wordpieces.
"""

import bisect
import collections
from collections.abc import Sequence
import dataclasses
import hashlib
import io
import json
from typing import Any

import numpy as np

from realm_jax.corpus import corpus
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import datasets
from realm_jax.prepare import filters
from realm_jax.prepare import languages
from realm_jax.prepare import records
from realm_jax.prepare import salient_spans as salient_spans_lib
from realm_jax.prepare import texts
from realm_jax.prepare import tf_example

_CHECKSUM_BYTES = 16
# Wordpieces that a passage may have more as a text of its own.
_MORE_PIECES = 2
# BERT drops these line ends as control characters and joins the words around
# them. The replacements have as many bytes.
_LINE_ENDS = '\v\f\x1c\x1d\x1e\x85'
_LINE_ENDS_OF_BERT = str.maketrans(_LINE_ENDS, '\n\n\n\n\n\xa0')


@dataclasses.dataclass(frozen=True)
class Settings:
  """How text becomes passages and sentences; in the manifest.

  See `prepare.Options` for the fields.

  spans: where the spans come from of records that have none: 'rules';
    'english': rules, for records in English; 'random'; 'records': there are
    none. 'none': all sentences are kept, without spans.
  language: code, or `languages.MIXED`.
  """

  max_wordpieces: int = 288
  min_sentence: int = 4
  max_sentence: int = 200
  min_context: int = 3
  exclude: tuple[str, ...] = ()
  spans: str = 'rules'
  language: str = 'en'


@dataclasses.dataclass(frozen=True)
class Task:
  """Records that one process packs at a time."""

  records: list[records.Record]
  articles: list[int]  # Number of each record's article.
  validation: list[bool]  # Whether a record's sentences are for validation.
  passages: bool  # False: sentences only.

  def to_bytes(self) -> bytes:
    """Returns the task as JSON."""
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

  @classmethod
  def from_bytes(cls, data: bytes) -> 'Task':
    """Returns the task that `to_bytes` wrote."""
    values = json.loads(data)
    for record in values['records']:
      if record['spans'] is not None:
        record['spans'] = tuple(map(tuple, record['spans']))
    values['records'] = [records.Record(**r) for r in values['records']]
    return cls(**values)

  @property
  def digest(self) -> str:
    """Hash of the whole task, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    rest = self.articles, self.validation, self.passages
    digest.update(repr(rest).encode())
    for record in self.records:
      text = record.text.encode()
      others = dataclasses.astuple(dataclasses.replace(record, text=''))
      digest.update(f'{others!r} {len(text)} '.encode() + text)
    return digest.hexdigest()


@dataclasses.dataclass
class Chunk:
  """The result of a task. P passages, S sentences, numbered in the chunk."""

  tokens: np.ndarray  # uint32, flat.
  ids: np.ndarray  # uint64 [P], hashes.
  lengths: np.ndarray  # int64 [P], wordpieces of title and body together.
  title_lengths: np.ndarray  # int32 [P]
  articles: np.ndarray  # int32 [P]
  passage_records: list[bytes]
  sentence_starts: np.ndarray  # int64 [S], in `tokens`.
  sentence_lengths: np.ndarray  # int32 [S]
  sentence_passages: np.ndarray  # int64 [S], -1: no passage.
  sentence_aside: np.ndarray  # int64 [S], article if for validation, or -1.
  sentence_fields: list[bytes]  # Encoded fields, all after `passage`.
  span_counts: np.ndarray  # int64 [S]
  spans: np.ndarray  # int32 [total, 2]
  counts: collections.Counter[str]
  num_records: int

  def to_bytes(self) -> bytes:
    """Returns a checksum and the chunk in numpy's .npz format."""
    arrays: dict[str, np.ndarray] = {}
    for name, value in vars(self).items():
      if isinstance(value, np.ndarray):
        arrays[name] = value
      elif isinstance(value, list):
        arrays[f'{name}.sizes'] = np.array([*map(len, value)], np.int64)
        arrays[name] = np.frombuffer(b''.join(value), np.uint8)
    counts = json.dumps(self.counts).encode()
    arrays['counts'] = np.frombuffer(counts, np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    data = buffer.getvalue()
    return _checksum(data) + data

  @classmethod
  def from_bytes(cls, data: bytes) -> 'Chunk':
    """Returns the chunk that `to_bytes` wrote; ValueError if damaged."""
    if data[:_CHECKSUM_BYTES] != _checksum(data[_CHECKSUM_BYTES:]):
      raise ValueError('damaged or cut off')
    values: dict[str, Any] = dict(
        np.load(io.BytesIO(data[_CHECKSUM_BYTES:]), allow_pickle=False)
    )
    for name in [n for n in values if f'{n}.sizes' in values]:
      limits = np.cumsum(values.pop(f'{name}.sizes')).tolist()
      whole = values[name].tobytes()
      values[name] = [
          whole[start:limit]
          for start, limit in zip([0, *limits], limits, strict=False)
      ]
    counts = collections.Counter(json.loads(values['counts'].tobytes()))
    return cls(**{
        **values, 'counts': counts, 'num_records': counts['records']
    })


class Packer:
  """Turns tasks into chunks."""

  def __init__(
      self, tokenizer: tokenizer_lib.Tokenizer, settings: Settings
  ) -> None:
    self._tokenizer = tokenizer
    self._encode = tokenizer_lib.CachedTokenizer(tokenizer)
    self._settings = settings
    self._ends_clause = np.isin(
        [text.strip() for text in tokenizer.piece_texts],
        [*languages.CLAUSE_MARKS],
    )

  def __call__(self, task: Task) -> Chunk:
    builder = _Builder()
    counts = builder.counts
    counts['records'] = len(task.records)
    kept = [
        (_without_markup(record), article, validation)
        for record, article, validation in zip(
            task.records, task.articles, task.validation, strict=True
        )
        if not self._is_excluded(record, counts)
    ]
    encoded = self._encode([_with_line_ends(r.text) for r, _, _ in kept])
    titles = self._encode([record.title for record, _, _ in kept])
    for (record, article, validation), arrays, (title, _, _) in zip(
        kept, encoded, titles, strict=True
    ):
      ids, starts, limits = arrays
      counts['wordpieces'] += len(ids)
      counts['unknown_wordpieces'] += int(
          np.count_nonzero(ids == self._tokenizer.unk_id)
      )
      if not len(ids):
        counts['records_without_wordpieces'] += 1
        continue
      language = self._settings.language
      if language == languages.MIXED:
        language = languages.detect(record.text)
      text = texts.Text(record.text, ids, starts, limits, language)
      # A longer title would leave less than half of the passage to the text.
      room = self._settings.max_wordpieces - self._tokenizer.num_specials
      shown = title[: room // 2]
      budget = room - len(shown)
      if text.other_script:
        shortened = text.shorten(
            min(self._settings.max_sentence, budget),
            self._tokenizer.starts_word,
            self._ends_clause,
        )
        if shortened:
          counts['shortened_sentences'] += shortened
      if task.passages:
        if len(shown) < len(title):
          counts['shortened_titles'] += 1
        self._add_passages(builder, record, article, shown, text, budget)
      aside = article if validation else -1
      self._add_sentences(builder, record, text, aside, task.passages)
    return builder.chunk()

  def _is_excluded(
      self, record: records.Record, counts: collections.Counter[str]
  ) -> bool:
    exclude = self._settings.exclude
    kind = exclude and filters.reason(
        record.title, record.text, exclude, bool(record.markup)
    )
    if kind:
      counts[f'excluded_{kind}'] += 1
    return bool(kind)

  def _add_passages(
      self,
      builder: '_Builder',
      record: records.Record,
      article: int,
      title: np.ndarray,
      text: texts.Text,
      budget: int,
  ) -> None:
    if not self._tokenizer.is_wordpiece:
      budget -= _MORE_PIECES
    ranges = self._pack(text, budget, builder.counts)
    if not self._tokenizer.is_wordpiece:
      ranges = text.encode_again(ranges, self._encode)
    for i, (start, limit, byte_start, byte_limit) in enumerate(ranges):
      number = builder.add_passage(
          record.id if len(ranges) == 1 else f'{record.id}#{i}',
          article,
          record.title,
          title,
          text.ids[start:limit],
          text.slice(byte_start, byte_limit),
      )
      text.passages.append((limit, number, builder.position - limit))

  def _pack(
      self, text: texts.Text, budget: int, counts: collections.Counter[str]
  ) -> list[texts.Range]:
    """Returns the ranges of the passages."""
    packed: list[texts.Range] = []
    for sentence in text.sentences:
      units = [sentence]
      if sentence.limit - sentence.start > budget:
        counts['split_sentences'] += 1
        units = text.cut(sentence, budget, self._tokenizer.starts_word)
      for unit in units:
        if packed and unit.limit - packed[-1].start <= budget:
          start, _, byte_start, _ = packed.pop()
          unit = texts.Range(start, unit.limit, byte_start, unit.byte_limit)
        packed.append(unit)
    return packed

  def _add_sentences(
      self,
      builder: '_Builder',
      record: records.Record,
      text: texts.Text,
      aside: int,
      passages: bool,
  ) -> None:
    settings, counts = self._settings, builder.counts
    names = None
    method = self._span_method(record, text)
    if method == 'rules':
      names = salient_spans_lib.document_names(record.text)
    num_outside = len(record.spans or ()) if method == 'records' else 0
    title = tf_example.text_field('title', record.title)
    for sentence in text.sentences:
      if not self._tokenizer.is_wordpiece:
        sentence = text.without_last_blanks(sentence)
      start, limit, byte_start, byte_limit = sentence
      counts['sentences'] += 1
      passage, base = -1, 0
      if passages:
        at = bisect.bisect_left(text.passages, (limit,))
        _, passage, base = text.passages[at]
        if start + base < builder.starts[passage]:  # The sentence is split.
          counts['sentences_split'] += 1
          continue
      if not settings.min_sentence <= limit - start <= settings.max_sentence:
        counts['sentences_too_short_or_long'] += 1
        continue
      content = text.slice(byte_start, byte_limit)
      found: Sequence[tuple[int, int]] = ()
      if method == 'rules':
        found = salient_spans_lib.find_spans(content, names)
      elif method == 'random':
        found = text.random_spans(
            record.id, sentence, self._tokenizer.starts_word
        )
      elif method == 'records':
        found = [
            (a - byte_start, b - byte_start)
            for a, b in record.spans or ()
            if byte_start <= a and b <= byte_limit
        ]
        num_outside -= len(found)
      spans = self._in_wordpieces(found, text, sentence, counts)
      if not spans and method != 'none':
        counts['sentences_without_spans'] += 1
        continue
      if not passages:
        base = builder.add_tokens(text.ids[start:limit]) - start
      builder.add_sentence(
          content,
          title,
          aside,
          start + base,
          limit - start,
          passage,
          spans,
      )
    counts['spans_outside_sentences'] += num_outside

  def _span_method(
      self, record: records.Record, text: texts.Text
  ) -> str:
    """Returns 'rules', 'random', 'records' or 'none'."""
    method = self._settings.spans
    if method != 'none' and record.spans is not None:
      return 'records'
    if method == 'english':
      return 'rules' if text.language == 'en' else 'records'
    return method

  def _in_wordpieces(
      self,
      spans: Sequence[tuple[int, int]],
      text: texts.Text,
      sentence: texts.Range,
      counts: collections.Counter[str],
  ) -> dict[tuple[int, int], tuple[int, int]]:
    """Maps the wordpiece ranges of usable spans to their byte ranges."""
    start, limit, byte_start, _ = sentence
    ranges: dict[tuple[int, int], tuple[int, int]] = {}
    # Other pieces than WordPiece's may hold more than a word.
    whole = self._tokenizer.is_wordpiece
    for a, b in spans:
      first, last = text.pieces_of(
          a + byte_start, b + byte_start, sentence, whole
      )
      if first >= last:
        counts['spans_without_wordpieces'] += 1
      elif limit - start - (last - first) < self._settings.min_context:
        counts['spans_without_context'] += 1
      else:
        if not whole:
          a = min(a, text.starts_list[first] - byte_start)
          b = max(b, text.limits_list[last - 1] - byte_start)
        ranges.setdefault((first - start, last - start), (a, b))
    return ranges


class _Builder:
  """Collects the columns of a chunk."""

  def __init__(self) -> None:
    self.counts: collections.Counter[str] = collections.Counter()
    self.position = 0
    self.starts: list[int] = []  # Starts of the passages' bodies in the tokens.
    self._tokens: list[np.ndarray] = []
    self._passages: list[tuple[int, int, int, int]] = []
    self._passage_records: list[bytes] = []
    self._sentences: list[tuple[int, int, int, int, int]] = []
    self._sentence_fields: list[bytes] = []
    self._spans: list[tuple[int, int]] = []

  def add_tokens(self, ids: np.ndarray) -> int:
    """Appends wordpieces and returns the position of the first."""
    start = self.position
    self._tokens.append(ids)
    self.position += len(ids)
    return start

  def add_passage(
      self,
      name: str,
      article: int,
      title: str,
      title_ids: np.ndarray,
      body_ids: np.ndarray,
      body: str,
  ) -> int:
    """Appends a passage and returns its number."""
    self.add_tokens(title_ids)
    self.starts.append(self.add_tokens(body_ids))
    length = len(title_ids) + len(body_ids)
    self._passages.append(
        (corpus.id_hash(name), length, len(title_ids), article)
    )
    self._passage_records.append(
        tf_example.example(
            tf_example.number_field('article', [article])
            + tf_example.text_field('id', name)
            + tf_example.text_field('text', body)
            + tf_example.text_field('title', title)
        )
    )
    return len(self._passages) - 1

  def add_sentence(
      self,
      sentence: str,
      title: bytes,  # An encoded field.
      aside: int,
      start: int,
      length: int,
      passage: int,
      spans: dict[tuple[int, int], tuple[int, int]],
  ) -> None:
    """Appends a sentence; `spans` maps wordpiece ranges to byte ranges."""
    self._sentences.append((start, length, passage, aside, len(spans)))
    self._spans += spans
    self._sentence_fields.append(
        tf_example.number_field('span_limits', [b for _, b in spans.values()])
        + tf_example.number_field('span_starts', [a for a, _ in spans.values()])
        + tf_example.text_field('text', sentence)
        + title
    )

  def chunk(self) -> Chunk:
    """Returns the chunk."""
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
        sentence_aside=found[:, 3],
        sentence_fields=self._sentence_fields,
        span_counts=found[:, 4],
        spans=np.array(self._spans, np.int32).reshape(-1, 2),
        counts=self.counts,
        num_records=self.counts['records'],
    )


def _with_line_ends(text: str) -> str:
  """Replaces line ends that BERT would drop; keeps the number of bytes."""
  if any(end in text for end in _LINE_ENDS):
    return text.translate(_LINE_ENDS_OF_BERT)
  return text


def _without_markup(record: records.Record) -> records.Record:
  if not record.markup:
    return record
  text = datasets.plain_text(record.text, record.markup)
  return dataclasses.replace(record, text=text)


def _checksum(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()
