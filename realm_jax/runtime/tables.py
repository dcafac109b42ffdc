"""Files of records: JSON Lines, JSON, CSV, TSV and Parquet, by their content.

`open_table` recognises a format by what a file holds; the ending of its name
only decides between formats that the content does not tell apart.
"""

import codecs
import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import csv
import dataclasses
import io
import itertools
import json
import pathlib
import re
import sys
from typing import Any

from realm_jax.runtime import extension
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import lines as lines_lib

FORMATS = {
    'jsonl': 'JSON Lines',
    'json': 'JSON',
    'csv': 'CSV',
    'tsv': 'TSV',
    'tsv-plain': 'TSV in which a quote is a character',
    'parquet': 'Parquet',
}
ENDINGS = {
    '.jsonl': 'jsonl', '.ndjson': 'jsonl', '.json': 'json', '.csv': 'csv',
    '.tsv': 'tsv', '.tab': 'tsv', '.parquet': 'parquet',
}

# Tables without names of columns: the names, and what the columns look like.
CORPUS_SHAPES = (
    (('id', 'text'), (r'\S+', r'.*\S.*')),  # collection.tsv of MS MARCO.
    (('id', 'url', 'title', 'text'), (r'\S+', r'https?://\S+', '.*', '.*')),
)

# Files that hold no records, by their first bytes.
_NO_TABLES = (
    (b'version https://git-lfs', 'a pointer of Git LFS; run `git lfs pull`'),
    (b'PK\x03\x04', 'a ZIP archive; unpack it'),
    (b'7z\xbc\xaf', 'a 7z archive; unpack it'),
    (b'\x04"M\x18', 'compressed by lz4; run `lz4 -d`'),
    (b'\x1f\x9d', 'compressed by compress; run `uncompress`'),
    (b'\x1f\x8b', 'compressed twice; run `gunzip`'),
    (b'Rar!', 'a RAR archive; unpack it'),
    (b'%PDF', 'a PDF; extract its text'),
    (b'ARROW1', 'an Arrow file; convert it to Parquet'),
    (b'<!doctype html', 'a web page'),
    (b'<html', 'a web page'),
    (b'\xff\xfe', 'text in UTF-16; run `iconv -f UTF-16 -t UTF-8`'),
    (b'\xfe\xff', 'text in UTF-16; run `iconv -f UTF-16 -t UTF-8`'),
)

_HEAD = 1 << 16  # Bytes that tell a format.
_SAMPLE = 1 << 22  # Bytes that tell the columns of a CSV or TSV file.
_SAMPLE_RECORDS = 100  # That tell the fields of other files.
_MOST_LINES = 1000  # A value has no more.
_LONGEST_NAME = 64  # Characters of the name of a column.

Content = bytes | dict[str, Any] | ValueError
Row = list[str]


@dataclasses.dataclass(frozen=True)
class Table:
  """The records of a file; iteration reads the file.

  path: of the file.
  format: a key of `FORMATS`.
  columns: names of the columns of CSV, TSV and Parquet; None: the records name
    their fields. Columns without a name are called '1', '2' and so on.
  header: whether the first line of CSV or TSV names the columns.
  delimiter: between the columns of CSV or TSV.
  quoted: whether '"' encloses values of CSV or TSV.
  sample: the first good records.
  """

  path: pathlib.Path
  format: str
  columns: tuple[str, ...] | None = None
  header: bool = False
  delimiter: str = ''
  quoted: bool = False
  sample: tuple[dict[str, Any], ...] = ()

  def __iter__(self) -> Iterator[tuple[str, dict[str, Any] | ValueError]]:
    """Yields ('FILE:LINE' or 'FILE, record N', record or what is wrong)."""
    for place, content in self.contents():
      if not isinstance(content, bytes):
        yield place, content
        continue
      try:
        record: dict[str, Any] | ValueError = lines_lib.json_object(content)
      except ValueError as error:
        record = error
      yield place, record

  def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields as iteration; ValueError at the first record that is wrong."""
    for place, record in self:
      if isinstance(record, ValueError):
        raise ValueError(f'{place}: {record}')
      yield place, record

  def contents(
      self, columns: Sequence[str] | None = None
  ) -> Iterator[tuple[str, Content]]:
    """Yields the same as iteration, but JSON Lines as bytes.

    `columns` are those of a Parquet file to read; None: all.

    Raises:
      ValueError: the file is damaged, so that its rest cannot be read.
    """
    if self.format == 'jsonl':
      return (
          (f'{self.path}:{number}', line)
          for number, line in enumerate(lines_lib.lines(self.path), start=1)
          if not line.isspace()
      )
    if self.format == 'json':
      return lines_lib.json_values(self.path)
    if self.format == 'parquet':
      return _parquet(self.path, columns)
    return self._separated()

  def _separated(self) -> Iterator[tuple[str, Content]]:
    assert self.columns is not None
    width = len(self.columns)
    rows = _rows(lines_lib.lines(self.path), self.delimiter, self.quoted)
    for number, row in itertools.islice(rows, int(self.header), None):
      place = f'{self.path}:{number}'
      if isinstance(row, list):
        if len(row) == width:
          yield place, dict(zip(self.columns, row, strict=True))
          continue
        row = ValueError(
            f'{len(row)} columns; expected are {width}, divided by'
            f' {self.delimiter!r}, which is no part of a value'
            f'{" without quotes" if self.quoted else ""}'
        )
      if isinstance(row, csv.Error):
        raise ValueError(
            f'{place}: misplaced quotes ({row}). A quote within quotes is'
            ' doubled; where quotes are characters of a TSV file, give'
            ' --format=tsv-plain.'
        )
      yield place, row


def recognise(path: pathlib.Path, head: bytes | None = None) -> str:
  """Returns the format of a file, a key of `FORMATS`; '' if it is no table.

  `head` has its first bytes, without compression.

  Raises:
    ValueError: the file holds something else, such as an archive.
  """
  if head is None:
    head = lines_lib.head(path, _HEAD)
  ending = ENDINGS.get(suffix(path), '')
  start = head.removeprefix(codecs.BOM_UTF8).lstrip()
  if start.startswith(b'PAR1'):
    return 'parquet'
  for magic, what in _NO_TABLES:
    if start[: len(magic)].lower() == magic.lower():
      raise ValueError(f'{path}: {what}.')
  if head[257:262] == b'ustar':
    raise ValueError(f'{path}: a tar archive; unpack it.')
  if ending == 'parquet' and start:
    raise ValueError(f'{path}: not a Parquet file.')
  is_json = ending in ('jsonl', 'json')
  if re.match(rb'\{' if is_json else rb'\{\s*"', start):
    return _lines_or_document(start, is_json, len(head) < _HEAD)
  if re.match(rb'\[' if is_json else rb'\[\s*\{\s*"', start):
    return 'json'
  if ending and not is_json:
    return ending
  return 'jsonl' if is_json else ''


def open_table(
    path: pathlib.Path,
    format: str | None = None,
    fields: Mapping[str, str] | None = None,
    shapes: Sequence[tuple[tuple[str, ...], tuple[str, ...]]] = (),
) -> Table:
  """Opens a file of records, plain or compressed.

  The format is a key of `FORMATS`; None: recognised. `fields` are those of
  `fields.parse`. `shapes` are names and patterns of the columns of tables
  without names.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: the format needs a package that is not installed.
    ValueError: the file is damaged or no table.
  """
  format = format or recognise(path)
  if format == 'parquet':
    table = Table(path, format, tuple(_open_parquet(path).schema_arrow.names))
  elif format in ('csv', 'tsv', 'tsv-plain'):
    return _open_separated(path, format, fields, shapes)
  elif format in FORMATS:
    table = Table(path, format)
  else:
    raise ValueError(
        f'{path}: the content is none of {", ".join(FORMATS.values())};'
        ' --format says which it is.'
    )
  return dataclasses.replace(table, sample=_sample(table))


def suffix(path: pathlib.Path) -> str:
  """Returns the ending of a file in lower case, without compression."""
  return pathlib.Path(lines_lib.plain_name(path)).suffix.lower()


def _lines_or_document(start: bytes, is_json: bool, is_whole: bool) -> str:
  """Tells an object on each line from objects over several lines."""
  line, end, _ = start.partition(b'\n')
  text = start.decode('utf-8', 'replace')
  try:
    _, last = json.JSONDecoder().raw_decode(text)
    return 'json' if '\n' in text[:last] else 'jsonl'
  except RecursionError:
    return 'jsonl'
  except json.JSONDecodeError as error:
    cut = not is_whole and lines_lib.is_cut(error, text)
  except ValueError:  # A number of too many digits.
    cut = False
  if cut and end and line.rstrip()[-1:] in b'{,[':
    return 'json'
  return 'jsonl' if is_json or cut else ''


def _sample(table: Table) -> tuple[dict[str, Any], ...]:
  """Returns the first good records; a later reading reports the bad ones."""
  found: list[dict[str, Any]] = []
  size = 0
  try:
    for _, record in itertools.islice(table, _SAMPLE_RECORDS):
      if isinstance(record, dict):
        found.append(record)
        size += len(str(record))
      if size > _HEAD:
        break
  except ValueError:
    pass
  return tuple(found)


def _import_parquet(path: pathlib.Path) -> tuple[Any, Any]:
  with extension.needed_by(f'{path}: reading Parquet', 'hf'):
    import pyarrow
    from pyarrow import parquet
  return pyarrow, parquet


def _open_parquet(path: pathlib.Path) -> Any:
  pyarrow, parquet = _import_parquet(path)
  with open(path, 'rb') as file:
    is_plain = file.read(4) == b'PAR1'
  source = path
  if not is_plain:
    source = pyarrow.BufferReader(b''.join(lines_lib.lines(path)))
  try:
    return parquet.ParquetFile(source)
  except (pyarrow.ArrowException, ValueError, OSError) as error:
    raise ValueError(
        f'{path}: a damaged Parquet file ({lines_lib.first_line(error)}).'
    ) from None


def parquet_description(path: pathlib.Path) -> Any:
  """Returns what the library `datasets` says of the columns; {}: nothing."""
  metadata = _open_parquet(path).schema_arrow.metadata or {}
  try:
    return json.loads(metadata.get(b'huggingface', b'{}'))
  except (RecursionError, ValueError):
    return {}


def _parquet(
    path: pathlib.Path, columns: Sequence[str] | None
) -> Iterator[tuple[str, Content]]:
  pyarrow, _ = _import_parquet(path)
  number = 0
  file = _open_parquet(path)
  try:
    for batch in file.iter_batches(
        batch_size=256, columns=None if columns is None else list(columns)
    ):
      for row in batch.to_pylist():
        number += 1
        yield f'{path}, record {number}', row
  except (pyarrow.ArrowException, ValueError, OSError) as error:
    reason = lines_lib.first_line(error)
    raise ValueError(
        f'{path}: damaged after record {number} ({reason}).'
    ) from None


def _open_separated(
    path: pathlib.Path,
    format: str,
    fields: Mapping[str, str] | None,
    shapes: Sequence[tuple[tuple[str, ...], tuple[str, ...]]],
) -> Table:
  """Finds delimiter, quotes, and names of columns from the first rows."""
  head = lines_lib.head(path, _SAMPLE)
  if b'\r' in head and b'\n' not in head:
    raise ValueError(
        f"{path}: lines end in a carriage return alone; run `tr '\\r' '\\n'`."
    )
  data = io.BytesIO(head).readlines()
  cut = len(head) == _SAMPLE
  best: tuple[tuple[Any, ...], str, bool, list[Row]] | None = None
  for delimiter in '\t' if format != 'csv' else ',;\t|':
    choices: tuple[bool, ...] = (False,)
    if format == 'csv' or (format == 'tsv' and _uses_quotes(data, delimiter)):
      choices = (True,)  # A misplaced quote is an error.
    elif format != 'tsv-plain':
      choices = (True, False)
    for quoted in choices:
      rows, misplaced = _sample_rows(data, delimiter, quoted, cut)
      if not rows:
        continue
      width = len(rows[0])
      wrong = sum(len(row) != width for row in rows)
      has_header = _is_header(rows[0], fields)
      # In a TSV file without header, as that of MS MARCO, a quote is a
      # character.
      unlikely = quoted != (format == 'csv' or has_header)
      share = wrong / len(rows)
      rank = (width < 2, not has_header, misplaced, share, unlikely)
      if best is None or rank < best[0]:
        best = rank, delimiter, quoted, rows
  if best is None:
    return Table(path, format, (), delimiter='\t' if format != 'csv' else ',')
  _, delimiter, quoted, rows = best
  if format != 'tsv-plain':
    format = 'tsv' if delimiter == '\t' else 'csv'
  header = _is_header(rows[0], fields)
  width = len(rows[0])
  for name, count in collections.Counter(rows[0]).items():
    if count > 1 and fields_lib.is_usual(name):
      raise ValueError(f'{path}:1: two columns are {name!r}; rename one.')
  columns = tuple(map(str, range(1, width + 1)))
  if header:
    columns = tuple(
        name.strip() or str(i) for i, name in enumerate(rows.pop(0), start=1)
    )
  elif not fields:
    for names, patterns in shapes:
      if len(names) == width and _has_shape(rows, patterns):
        columns = names
        break
  sample = tuple(
      dict(zip(columns, row, strict=True))
      for row in rows[:_SAMPLE_RECORDS]
      if len(row) == width
  )
  return Table(path, format, columns, header, delimiter, quoted, sample)


def _is_header(row: Row, fields: Mapping[str, str] | None) -> bool:
  """Returns whether a row has the names of columns.

  The first column, an index of pandas, and the last one may have none.
  """
  names = [name.strip() for name in row]
  last = len(names) - 1
  names = [name for i, name in enumerate(names) if name or 0 < i < last]
  if len(set(names)) < len(names):
    return False
  if any(not name or len(name) > _LONGEST_NAME for name in names):
    return False
  given = {name for name in (fields or {}).values() if not name.isdigit()}
  return bool(given & {*names}) or any(map(fields_lib.is_usual, names))


def _has_shape(rows: Sequence[Row], patterns: Sequence[str]) -> bool:
  """Returns whether all rows of the right width, the most, fit the patterns."""
  fit = [row for row in rows if len(row) == len(patterns)]
  if 2 * len(fit) < len(rows) or not all(
      re.fullmatch(pattern, value, re.DOTALL)
      for row in fit
      for pattern, value in zip(patterns, row, strict=True)
  ):
    return False
  # A first row without a number is a header with unknown names.
  numbers = [row[0].isdigit() for row in fit]
  return numbers[0] or len(fit) == 1 or not all(numbers[1:])


def _uses_quotes(data: Sequence[bytes], delimiter: str) -> bool:
  """Returns whether values of TSV are within quotes, as DPR writes them.

  They are if one of them doubles a quote, or most of a column are.
  """
  if delimiter != '\t':
    return True
  counts: collections.Counter[int] = collections.Counter()
  for line in data:
    for column, value in enumerate(line.strip().split(b'\t')):
      if re.fullmatch(rb'"(?:[^"]|"")+"', value):
        counts[column] += 1
        if b'""' in value[1:-1]:
          return True
  return any(2 * count >= len(data) for count in counts.values())


def _sample_rows(
    data: Sequence[bytes], delimiter: str, quoted: bool, cut: bool
) -> tuple[list[Row], bool]:
  """Returns the first good rows, and whether quotes are misplaced."""
  found: list[Row] = []
  for number, row in _rows(data, delimiter, quoted):
    if isinstance(row, csv.Error):
      # The end of the sample may be within quotes.
      few = len(data) - number < min(len(found), _MOST_LINES)
      return found, not (cut and few)
    if isinstance(row, list):
      found.append(row)
  return found[:-1] if cut else found, False


def _rows(
    lines: Iterable[bytes], delimiter: str, quoted: bool
) -> Iterator[tuple[int, Row | ValueError | csv.Error]]:
  """Yields (number of its first line, row or what is wrong with it)."""
  wrong: list[ValueError] = []

  def decoded() -> Iterator[str]:
    for line in lines:
      try:
        yield lines_lib.decoded(line)
      except ValueError as error:
        wrong.append(error)
        yield line.decode('utf-8', 'replace')

  rows: Iterator[tuple[int, Row | ValueError | csv.Error]]
  if quoted:
    rows = _quoted_rows(decoded(), delimiter)
  else:
    # Not by csv, which has no carriage returns within a value.
    rows = (
        (number, line.rstrip('\r\n').split(delimiter))
        for number, line in enumerate(decoded(), start=1)
    )
  for number, row in rows:
    if isinstance(row, csv.Error):
      yield number, row
    elif isinstance(row, list) and any(value.strip() for value in row):
      yield number, wrong[0] if wrong else row
    wrong.clear()


def _quoted_rows(
    lines: Iterator[str], delimiter: str
) -> Iterator[tuple[int, Row | ValueError | csv.Error]]:
  csv.field_size_limit(sys.maxsize)
  reader = csv.reader(lines, delimiter=delimiter, strict=True)
  while True:
    first = reader.line_num + 1
    try:
      row = next(reader, None)
    except csv.Error as error:
      yield first, error
      return
    if row is None:
      return
    yield first, row
