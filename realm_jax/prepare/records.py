"""Input records of `prepare`: what each must say, and that it says it.

Public: `Record`, `Records` (sources that can be read several times),
`HashNumbers`, `read_ids`, `is_validation`. A record is a line of JSON, UTF-8,
or what another kind of source makes of its texts:

  {"id": "12", "title": "Anarchism", "text": "...", "article": "12",
   "spans": [[0, 9]], "split": "validation", "markup": "wikitext"}

Only `text` is required. `spans` are ranges of UTF-8 bytes of `text`.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import corpus
from realm_jax.prepare import sources as sources_lib
from realm_jax.runtime import lines as lines_lib

_LISTED = 20  # Of the skipped records; the others are only counted.
_RECENT = 1 << 19  # Hashes kept as Python objects; older ones take 12 bytes.


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """One article or passage, checked."""

  id: str  # Given, or the number of the record.
  title: str
  text: str
  article: str | None  # Key of its article; None: it is one by itself.
  spans: tuple[tuple[int, int], ...] | None  # Bytes; None: find them.
  validation: bool  # Marked with `split: 'validation'`.
  wikitext: bool = False  # The text is in MediaWiki's markup.


class Records:
  """All records of some sources, one after the other; can be read again.

  The first reading must be `check`, which finds everything that is wrong.

  Attributes:
    count: good records, after `check`.
    marked: whether any is marked for validation.
    skipped: how many were bad.
    skipped_list: what was wrong with the first of them, with file and line.
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
      ValueError: naming file and line of the first bad record, unless bad ones
        are skipped; if a file is damaged; if no good record is left.
    """
    seen = HashNumbers()
    for number, place, content in self._contents():
      try:
        record = _parse(content, None if self._need_ids else number)
        if seen.setdefault(corpus.id_hash(record.id), number) != number:
          first = self._place_of(record.id, before=number)
          if first is not None:
            raise ValueError(
                f'the id {record.id!r} is already that of {first}; ids must be '
                'unique'
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
      what = ', '.join(source.name for source in self._sources[:5])
      raise ValueError(f'There is no usable record in {what}.')

  def __iter__(self) -> Iterator[Record]:
    """Yields the good records; call `check` first."""
    for number, _, content in self._contents():
      if number not in self._bad:
        yield _parse(content, number)

  def texts(self) -> Iterator[str]:
    """Yields titles and texts, to learn a vocabulary from."""
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
    """Returns where an id was first used, by reading again."""
    if self.skipped > _LISTED:  # Nobody will read it: only count.
      return 'another record'
    for number, place, content in self._contents():
      if number == before:
        break
      if number not in self._bad and _parse(content, number).id == name:
        return place
    return None  # Two ids with the same hash.


def read_ids(path: pathlib.Path) -> list[str]:
  """Returns the ids that a file names, each once.

  JSON Lines of objects with an `id`, by the file's name; else text, an id a
  line. Both can be compressed.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: naming file and line of what is wrong; if there is no id.
  """
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {str(path)!r}.')
  ids: dict[str, None] = {}
  for i, line in enumerate(lines_lib.lines(path), start=1):
    try:
      if sources_lib.is_json_lines(path):
        name = _string(lines_lib.json_object(line), 'id', or_number=True)
        if not name:
          raise ValueError('no field `id`, by which a document is known')
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
  """Whether an article is among a pseudo-random fraction of all articles."""
  return corpus.id_hash(f'validation {key}') < fraction * 2**64


class HashNumbers:
  """Maps 64-bit hashes to int32; 12 bytes for each, in the long run."""

  def __init__(self) -> None:
    self._recent: dict[int, int] = {}
    self._older = np.zeros(0, np.uint64)
    self._numbers = np.zeros(0, np.int32)

  def setdefault(self, value: int, number: int) -> int:
    """Returns the number of a hash, which is `number` if it is a new one."""
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
      order = np.argsort(hashes, kind='stable')  # Fast, as most is in order.
      self._older = hashes[order]
      self._numbers = np.concatenate([self._numbers, numbers])[order]
      self._recent.clear()
    return number


def _parse(content: sources_lib.Content, number: int | None) -> Record:
  """Returns the record of a content; ValueError says what is wrong with it.

  Without an `id`, it is the number; without that, too, an error.
  """
  if isinstance(content, ValueError):
    raise content
  fields = (
      lines_lib.json_object(content) if isinstance(content, bytes) else content
  )
  text = _string(fields, 'text')
  if text is None:
    raise ValueError(
        f'no field `text`; the fields are {", ".join(sorted(fields)) or "none"}'
    )
  if not text.strip():
    raise ValueError('the field `text` is empty')
  name = _string(fields, 'id', or_number=True)
  if name == '':
    raise ValueError('the field `id` is empty; leave it out instead')
  if name is None and number is None:
    raise ValueError('no field `id`, by which a document is known')
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
    fields: dict[str, Any], name: str, or_number: bool = False
) -> str | None:
  value = fields.get(name)
  if value is None:
    return None
  if or_number and isinstance(value, int) and not isinstance(value, bool):
    return str(value)
  if isinstance(value, bytes):  # What is no JSON may come undecoded.
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
        f'the field `{name}` has half of a surrogate pair, which is no'
        ' character'
    ) from None
  return value


def _spans(
    fields: dict[str, Any], text: str
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
