"""Input records of `prepare` and their validation.

A record is a line of JSON in UTF-8, or the equivalent from another source:

  {"id": "12", "title": "Anarchism", "text": "...", "article": "12",
   "spans": [[0, 9]], "split": "validation", "markup": "wikitext"}

Only `text` is required. `spans` are ranges of UTF-8 bytes of `text`.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import corpus
from realm_jax.prepare import sources as sources_lib
from realm_jax.runtime import lines as lines_lib

_LISTED = 20  # Skipped records that are listed; all are counted.
_NO_ID = 'no field `id`, which identifies a document'
_RECENT = 1 << 19  # Hashes kept as Python objects; older ones take 12 bytes.


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """A valid article or passage."""

  id: str  # The given id, or the number of the record.
  title: str
  text: str
  article: str | None  # Key of its article; None: an article of its own.
  spans: tuple[tuple[int, int], ...] | None  # Bytes; None: not given.
  validation: bool  # Marked with `split: 'validation'`.
  wikitext: bool = False  # Whether the text is MediaWiki markup.


class Records:
  """The records of several sources, which can be read repeatedly.

  The first reading must be `check`, which finds all errors.

  Attributes:
    count: number of good records, after `check`.
    marked: whether a record is marked for validation.
    skipped: number of bad records.
    skipped_list: the errors of the first bad records, with file and line.
  """

  def __init__(
      self,
      sources: Sequence[sources_lib.Source],
      skip_bad: bool = False,
      need_ids: bool = False,
  ):
    self._sources = list(sources)
    self._skip_bad, self._need_ids = skip_bad, need_ids
    self._bad: set[int] = set()  # Numbers over all sources.
    self.count = 0
    self.marked = False
    self.skipped = 0
    self.skipped_list: list[str] = []

  def check(self) -> Iterator[Record]:
    """Reads all records once and yields the good ones.

    Raises:
      ValueError: a record is bad (unless bad ones are skipped) or a file is
        damaged, with file and line; or no good record is left.
    """
    seen = HashNumbers()
    for number, place, content in self._contents():
      try:
        record = _parse(content, None if self._need_ids else number)
        if seen.setdefault(corpus.id_hash(record.id), number) != number:
          first = self._place_of(record.id, before=number)
          if first is not None:
            raise ValueError(
                f'the id {record.id!r} is already that of {first}; ids must be'
                ' unique'
            )
      except ValueError as error:
        problem = f'{place}: {error}.'
        if not self._skip_bad:
          raise ValueError(problem) from None
        self._bad.add(number)
        self.skipped += 1
        if len(self.skipped_list) < _LISTED:
          self.skipped_list.append(problem)
        continue
      self.count += 1
      self.marked = self.marked or record.validation
      yield record
    if not self.count:
      names = ', '.join(source.name for source in self._sources[:5])
      raise ValueError(f'There is no usable record in {names}.')

  def __iter__(self) -> Iterator[Record]:
    """Yields the good records; call `check` first.

    Raises:
      ValueError: this reading gives another number of records than `check`.
    """
    number = -1
    for number, _, content in self._contents():
      if number not in self._bad:
        yield _parse(content, number)
    if number + 1 != self.count + self.skipped:
      names = ', '.join(source.name for source in self._sources[:5])
      raise ValueError(
          f'{names}: {self.count + self.skipped} records when checked and'
          f' {number + 1} when read again; all readings must give the same.'
      )

  def texts(self) -> Iterator[str]:
    """Yields titles and texts, to train a vocabulary on."""
    for record in self:
      if record.title:
        yield record.title
      yield record.text

  def _contents(self) -> Iterator[tuple[int, str, sources_lib.Content]]:
    """Yields (number over all sources, 'file:line', content)."""
    number = 0
    for source in self._sources:
      for place, content in source:
        yield number, place, content
        number += 1

  def _place_of(self, name: str, before: int) -> str | None:
    """Finds the first record with an id, by reading again."""
    if self.skipped > _LISTED:  # Errors are only counted from here on.
      return 'another record'
    for number, place, content in self._contents():
      if number == before:
        break
      if number not in self._bad and _parse(content, number).id == name:
        return place
    return None  # Two different ids with the same hash.


class Texts:
  """The texts of records, which can be iterated over more than once."""

  def __init__(self, sources: Sequence[Records]):
    self._sources = sources

  def __iter__(self) -> Iterator[str]:
    for source in self._sources:
      yield from source.texts()


def read_ids(path: pathlib.Path) -> list[str]:
  """Returns the distinct ids in a file, which may be compressed.

  By its name, the file is JSON Lines of objects with an `id`, or text with an
  id on each line.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: a line is wrong, with file and line; or there is no id.
  """
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {str(path)!r}.')
  ids: dict[str, None] = {}
  for i, line in enumerate(lines_lib.lines(path), start=1):
    try:
      if sources_lib.is_json_lines(path):
        name = _string(lines_lib.json_object(line), 'id', or_number=True)
        if not name:
          raise ValueError(_NO_ID)
      else:
        name = lines_lib.decoded(line).strip()
    except ValueError as error:
      raise ValueError(f'{path}:{i}: {error}.') from None
    if name:
      ids[name] = None
  if not ids:
    raise ValueError(f'{path} names no id.')
  return list(ids)


def is_validation(key: str, fraction: float) -> bool:
  """Returns whether an article is in a pseudo-random share of all articles."""
  return corpus.id_hash(f'validation {key}') < fraction * 2**64


class HashNumbers:
  """Maps 64-bit hashes to int32 numbers, in about 12 bytes for each hash."""

  def __init__(self) -> None:
    self._recent: dict[int, int] = {}
    self._older = np.zeros(0, np.uint64)
    self._numbers = np.zeros(0, np.int32)

  def setdefault(self, value: int, number: int) -> int:
    """Returns the number of a hash; a new hash gets `number`."""
    if value in self._recent:
      return self._recent[value]
    at = int(np.searchsorted(self._older, np.uint64(value)))
    if at < len(self._older) and int(self._older[at]) == value:
      return int(self._numbers[at])
    self._recent[value] = number
    if len(self._recent) >= _RECENT:
      size = len(self._recent)
      hashes = np.fromiter(self._recent, np.uint64, size)
      numbers = np.fromiter(self._recent.values(), np.int32, size)
      hashes = np.concatenate([self._older, hashes])
      order = np.argsort(hashes, kind='stable')  # Fast: most is sorted.
      self._older = hashes[order]
      self._numbers = np.concatenate([self._numbers, numbers])[order]
      self._recent.clear()
    return number


def _parse(content: sources_lib.Content, number: int | None) -> Record:
  """Returns the record of a content.

  Args:
    content: of a source.
    number: the id of a record without one; None: such a record is an error.

  Raises:
    ValueError: a field is missing or wrong.
  """
  if isinstance(content, ValueError):
    raise content
  fields = (
      lines_lib.json_object(content) if isinstance(content, bytes) else content
  )
  text = _string(fields, 'text')
  if text is None:
    raise ValueError(
        'no field `text`; the fields are '
        f'{", ".join(sorted(map(str, fields))) or "none"}'
    )
  if not text.strip():
    raise ValueError('the field `text` is empty')
  name = _string(fields, 'id', or_number=True)
  if name == '':
    raise ValueError('the field `id` is empty; leave it out instead')
  if name is None and number is None:
    raise ValueError(_NO_ID)
  title = (_string(fields, 'title') or '').strip()
  split = _string(fields, 'split')
  if split not in (None, 'train', 'validation'):
    raise ValueError(
        f"the field `split` is {split!r}; it can be 'train' or 'validation'"
    )
  markup, spans = _string(fields, 'markup'), _spans(fields, text)
  if markup not in (None, 'wikitext'):
    raise ValueError(f"the field `markup` is {markup!r}; it can be 'wikitext'")
  if markup and spans is not None:
    raise ValueError('`spans` are of plain text; this record has `markup`, too')
  return Record(
      str(number) if name is None else name,
      title,
      text,
      _string(fields, 'article', or_number=True) or title or None,
      spans,
      split == 'validation',
      markup == 'wikitext',
  )


def _string(
    fields: Mapping[str, Any], name: str, or_number: bool = False
) -> str | None:
  value = fields.get(name)
  if value is None:
    return None
  if or_number and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, bytes):  # From a source that is not JSON.
    return lines_lib.decoded(value, f'the {name}')
  if not isinstance(value, str):
    raise ValueError(
        f'the field `{name}` is of type {type(value).__name__}; it must be a '
        f'string{" or an integer" if or_number else ""}'
    )
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(
        f'the field `{name}` has half of a surrogate pair, which is not a'
        ' character'
    ) from None
  return value


def _spans(
    fields: Mapping[str, Any], text: str
) -> tuple[tuple[int, int], ...] | None:
  spans = fields.get('spans')
  if spans is None:
    return None
  size = len(text.encode('utf-8'))
  if not isinstance(spans, (list, tuple)):
    raise ValueError('the field `spans` is not a list of [start, limit] pairs')
  for span in spans:
    if (
        not isinstance(span, (list, tuple))
        or len(span) != 2
        or not all(type(end) is int for end in span)
        or not 0 <= span[0] < span[1] <= size
    ):
      raise ValueError(
          f'the field `spans` has {span!r}; it must be a list of pairs of '
          f'bytes, start < limit, of the text of {size} bytes'
      )
  return tuple(sorted((int(start), int(limit)) for start, limit in spans))
