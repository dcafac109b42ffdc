"""Input records of `prepare` and their validation.

A record is a line of JSON in UTF-8, or the equivalent from another source:

  {"id": "12", "title": "Anarchism", "text": "...", "article": "12",
   "spans": [[0, 9]], "split": "validation", "markup": "wikitext"}

Only `text` is required. `spans` are ranges of UTF-8 bytes of `text`. Fields may
have other usual names (`fields`), which the source knows. A text may be a list
of paragraphs.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import logging
import math
import numbers
import pathlib
import re
from typing import Any

import numpy as np

from realm_jax.corpus import corpus
from realm_jax.prepare import sources as sources_lib
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import lines as lines_lib
from realm_jax.runtime import tables

log = logging.getLogger(__name__)

_LISTED = 20  # Skipped records that are listed; all are counted.
_LAYOUTS = 8  # Kinds of a source that are logged.
_NO_ID = 'no field `id`, which identifies a document'
_MARKUP = re.compile(r'wikitext(:.*)?', re.DOTALL)
# Marks in paragraphs of KILT's knowledge source.
_KILT_HEADING, _KILT_ITEM = 'Section::::', re.compile(r'^BULLET::::-?\s*')
_EXACT = 2**53  # Integers below are exact as floats.
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
  markup: str = ''  # See `datasets.plain_text`; '': none.


class Records:
  """The records of several sources, which can be read repeatedly.

  The first reading must be `check`, which finds all errors.

  Attributes:
    count: number of good records, after `check`.
    marked: whether a record is marked for validation.
    skipped: number of bad records.
    skipped_list: the errors of the first bad records, with file and line.
    empty: number of records without text, which are passed over.
    repeated: number of records with title and text of an earlier one.
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
    self.empty = self.repeated = 0
    self._first_empty, self._first_repeated = '', ('', 0)
    self._read: list[str] = []  # Formats that were recognised.

  def check(self) -> Iterator[Record]:
    """Reads all records once and yields the good ones; then call `report`.

    Raises:
      ValueError: a record is bad (unless bad ones are skipped) or a file is
        damaged, with file and line; or no good record is left.
    """
    seen, texts = HashNumbers(), HashNumbers()
    for number, place, content, fields in self._contents(summarise=True):
      try:
        record = _parse(content, None if self._need_ids else number, fields)
        if record is None:
          self._first_empty = self._first_empty or place
          self.empty += 1
          continue
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
      text = hash((record.title, record.text)) % 2**64
      if (first_number := texts.setdefault(text, number)) != number:
        if not self.repeated:
          self._first_repeated = place, first_number
        self.repeated += 1
      yield record
    if not self.count:
      names = ', '.join(source.name for source in self._sources[:5])
      empty = f': {self.empty} have no text' if self.empty else ''
      raise ValueError(f'There is no usable record in {names}{empty}.')

  def report(self) -> None:
    """Logs what was recognised, and what is wrong with the records."""
    for line in self._read[:_LAYOUTS]:
      log.info('%s', line)
    if len(self._read) > _LAYOUTS:
      log.info('... and %d other formats.', len(self._read) - _LAYOUTS)
    if self.skipped:
      log.warning(
          '%d bad records are left out:\n%s%s',
          self.skipped,
          '\n'.join(self.skipped_list),
          '\n...' if self.skipped > len(self.skipped_list) else '',
      )
    if self.empty:
      log.warning(
          '%d records have no text and are passed over; the first is %s.',
          self.empty, self._first_empty,
      )
    if self.repeated:
      place, number = self._first_repeated
      log.warning(
          '%d records have title and text of an earlier one under another id,'
          ' the first of them %s, those of record %d of all. They are kept;'
          ' --near_duplicates=1 leaves repetitions out.',
          self.repeated, place, number + 1,
      )

  def __iter__(self) -> Iterator[Record]:
    """Yields the good records; call `check` first.

    Raises:
      ValueError: this reading gives another number of records than `check`.
    """
    number = -1
    for number, _, content, fields in self._contents():
      if number not in self._bad:
        record = _parse(content, number, fields)
        if record is not None:
          yield record
    checked = self.count + self.skipped + self.empty
    if number + 1 != checked:
      names = ', '.join(source.name for source in self._sources[:5])
      raise ValueError(
          f'{names}: {checked} records when checked and'
          f' {number + 1} when read again; all readings must give the same.'
      )

  def texts(self) -> Iterator[str]:
    """Yields titles and texts, to train a vocabulary on."""
    for record in self:
      if record.title:
        yield record.title
      yield record.text

  def _contents(
      self, summarise: bool = False
  ) -> Iterator[tuple[int, str, sources_lib.Content, fields_lib.Fields]]:
    """Yields (number over all sources, 'file:line', content, its fields).

    Args:
      summarise: whether to note what was recognised, for `report`.
    """
    number = 0
    # By kind and fields: a file, number of files, number of records.
    read: dict[str, tuple[str, int, int]] = {}
    for source in self._sources:
      before = number
      for place, content in source:
        yield number, place, content, source.fields
        number += 1
      about = source.kind
      if source.fields is not sources_lib.OWN:
        about += f'; {source.fields}'
      name, files, records = read.get(about, (source.name, 0, 0))
      read[about] = name, files + 1, records + number - before
    if not summarise:
      return
    for about, (name, files, records) in read.items():
      more = f' and {files - 1} more' if files > 1 else ''
      self._read.append(f'{name}{more}: {about}; {records} records.')

  def _place_of(self, name: str, before: int) -> str | None:
    """Finds the first record with an id, by reading again."""
    if self.skipped > _LISTED:  # Errors are only counted from here on.
      return 'another record'
    for number, place, content, fields in self._contents():
      if number == before:
        break
      if number not in self._bad:
        record = _parse(content, number, fields)
        if record is not None and record.id == name:
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

  The file is a table with an id, or text with an id on each line.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: a line is wrong, with file and line; or there is no id.
  """
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {str(path)!r}.')
  ids: dict[str, None] = {}
  for place, content, name in _id_records(path):
    try:
      if isinstance(content, ValueError):
        raise content
      if isinstance(content, bytes):
        found = lines_lib.decoded(content).strip()
      else:
        found = _string(content, name, or_number=True) or ''
        if not found:
          raise ValueError(_NO_ID)
    except ValueError as error:
      raise ValueError(f'{place}: {error}.') from None
    if found:
      ids[found] = None
  if not ids:
    raise ValueError(f'{path} names no id.')
  return list(ids)


def _id_records(
    path: pathlib.Path,
) -> Iterator[tuple[str, sources_lib.Content, str]]:
  """Yields (place, line or record, name of the field with the id)."""
  format = tables.recognise(path)
  if format:
    table = tables.open_table(path, format)
    named = table.columns is None or table.header or format == 'parquet'
    if named:
      fields = fields_lib.choose(['id'], table.sample, where=str(path))
      for place, record in table:
        yield place, record, fields.taken.get('id', 'id')
      return
  for number, line in enumerate(lines_lib.lines(path), start=1):
    yield f'{path}:{number}', line, ''


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
    if len(self._older):
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


def _parse(
    content: sources_lib.Content,
    number: int | None,
    fields: fields_lib.Fields,
) -> Record | None:
  """Returns the record of a content; None if it has no text.

  Args:
    content: of a source.
    number: the id of a record without one; None: such a record is an error.
    fields: of the source.

  Raises:
    ValueError: a field is missing or wrong.
  """
  if isinstance(content, ValueError):
    raise content
  values = (
      lines_lib.json_object(content) if isinstance(content, bytes) else content
  )
  taken = fields.names
  if fields.paths:
    parts = {x: fields_lib.value_at(values, x) for x in fields.paths}
    values = {**parts, **values}
  title = (_string(values, taken.get('title'), or_number=True) or '').strip()
  name = taken.get('text', 'text')
  if name not in values:
    raise ValueError(
        f'no field `{name}`; the fields are '
        f'{fields_lib.listed(sorted(map(str, values)))}. {_mend(values)}'
    )
  text = _text(values, name, title)
  if fields.title_line:
    first, end, rest = text.lstrip().partition('\n')
    if end:
      title, text = _unquoted(first.strip()), rest
  identity = _string(values, taken.get('id'), or_number=True)
  if identity is None and number is None:
    raise ValueError(_NO_ID)
  if not identity and taken.get('id') in values:  # Its number may be an id.
    raise ValueError(
        f'the field `{taken["id"]}` is empty; --fields=id: numbers the records'
    )
  split = _string(values, taken.get('split'))
  if split not in (None, 'train', 'validation'):
    raise ValueError(
        f"the field `{taken['split']}` is {split!r}; it can be 'train' or"
        " 'validation'. --fields=split: ignores it"
    )
  markup = _string(values, taken.get('markup')) or ''
  if markup and not _MARKUP.fullmatch(markup):
    raise ValueError(
        f"the field `{taken['markup']}` is {markup!r}; it can be 'wikitext'"
    )
  spans = _spans(values, taken.get('spans'), text)
  if markup and spans is not None:
    raise ValueError('`spans` are of plain text; this record has `markup`, too')
  article = _string(values, taken.get('article'), or_number=True)
  if not text or text.isspace():
    return None
  return Record(
      str(number) if identity is None else identity,
      title,
      text,
      article or title or None,
      spans,
      split == 'validation',
      markup,
  )


def _text(values: Mapping[str, Any], name: str, title: str) -> str:
  """Returns the text, which may be a list of paragraphs as in KILT."""
  paragraphs = values[name]
  if not isinstance(paragraphs, (list, tuple)):
    return _string(values, name) or ''
  lines = []
  for paragraph in paragraphs:
    line = (_string({name: paragraph}, name) or '').strip()
    if line.startswith(_KILT_HEADING):
      line = line.removeprefix(_KILT_HEADING).rpartition('.:')[2].rstrip('.:')
    lines.append(_KILT_ITEM.sub('', line))
  if lines and lines[0] == title:
    del lines[0]
  return '\n'.join(lines)


def _mend(values: Mapping[str, Any]) -> str:
  """Returns how to state where the text of a record is."""
  if len(values) > 1 and all(isinstance(x, Mapping) for x in values.values()):
    return "`jq -c 'to_entries[] | {id: .key} + .value' FILE` writes records"
  for name, value in values.items():
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
      return f"`jq -c '.{name}[]' FILE` writes the objects in {name} as records"
  return (
      '--fields=text:NAME says which one has the text, or NAME.NAME a part of'
      ' it; a pattern as --source leaves files out'
  )


def _unquoted(title: str) -> str:
  if re.fullmatch(r'"(?:[^"]|"")*"', title):
    return title[1:-1].replace('""', '"')
  return title


def _string(
    fields: Mapping[str, Any], name: str | None, or_number: bool = False
) -> str | None:
  value = fields.get(name) if name else None
  if not isinstance(value, str):
    return None if value is None else _as_string(value, name, or_number)
  try:
    value.encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(
        f'the field `{name}` has half of a surrogate pair, which is not a'
        ' character'
    ) from None
  return value


def _as_string(value: Any, name: str | None, or_number: bool) -> str | None:
  """Returns another value as a string, a gap of pandas (NaN) as None."""
  if isinstance(value, float):  # A column of integers with gaps.
    if math.isnan(value):
      return None
    value = int(value) if abs(value) < _EXACT and value % 1 == 0 else value
  if isinstance(value, bytes):  # From a source that is not JSON.
    return lines_lib.decoded(value, f'the {name}')
  is_number = isinstance(value, numbers.Integral)
  if or_number and is_number and not isinstance(value, bool):
    return str(value)
  mend = 'another one'
  if isinstance(value, Mapping):
    mend = f'a part of it, such as {name}.{next(iter(value), "NAME")}'
  raise ValueError(
      f'the field `{name}` is of type {type(value).__name__}; it must be a '
      f'string{" or an integer" * or_number}. --fields takes {mend}'
  )


def _spans(
    fields: Mapping[str, Any], name: str | None, text: str
) -> tuple[tuple[int, int], ...] | None:
  spans = fields.get(name) if name else None
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
