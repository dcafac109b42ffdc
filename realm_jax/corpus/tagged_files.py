"""Formats of tagged sentences, recognised by their content.

Every format becomes columns with a value for each token. `tagged_columns`
decides which are tokens and tags; docs/tagging.md has the table of formats.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import pathlib
import re
from typing import Any

from realm_jax.runtime import files
from realm_jax.runtime import lines as lines_lib
from realm_jax.runtime import tables

# Tags are IO, IOB1, IOB2, BIOES, BILOU or BMES.
TAG = re.compile(r'O|[BIESLUM]-.+')
TOKEN_NAMES = ('tokens', 'words', 'token', 'word', 'form', 'text')
TAG_NAMES = ('tags', 'ner_tags', 'labels', 'tag', 'ner_tag', 'label', 'ner')
FORMS = (
    'It must have columns (a token and its tag on each line, a blank line after'
    ' a sentence), or be JSON or Parquet of {"tokens", "tags"}'
)
_DOCUMENT_START = '-DOCSTART-'  # A line of CoNLL 2003 that is not a token.
_BLANKS = re.compile(r'[ \t]+')
# Numbers of words in CoNLL-U, and of lines that are no word.
_UNIT = re.compile(r'\d+([-.]\d+)?')
_UNIT_RANGE = re.compile(r'\d+[-.]\d+')
_NAMES_OF_COLUMNS = re.compile(r'#\s*global\.columns\s*=\s*(.*)')
_INFO_FILES = ('dataset_info.json', 'dataset_infos.json', 'features.json')


@dataclasses.dataclass
class Table:
  """The columns of a file.

  path, kind: of the file.
  columns: by name, the values of each sentence.
  places: FILE:LINE of each sentence, or of each of its tokens.
  names: of the tags of a column of numbers.
  notes: further facts for the log.
  """

  path: pathlib.Path
  kind: str
  columns: dict[str, list[list[Any]]]
  places: list[list[str]]
  names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  def examples(self, columns: Sequence[str]) -> str:
    """Returns columns with some of their values, for a message."""
    parts = []
    for name in columns:
      values = [str(v)[:40] for row in self.columns[name][:99] for v in row]
      shown = sorted(dict.fromkeys(values), key='O'.__eq__)[:4]
      parts.append(f'{name} ({", ".join(shown)})')
    return '; '.join(parts)


def open_table(path: pathlib.Path) -> Table:
  """Reads a file of any format."""
  lines = (line.strip() for line in lines_lib.lines(path))
  first = next(filter(None, lines), b'')
  if first.startswith(b'PAR1'):
    names = _class_names(tables.parquet_description(path))
    records = tables.open_table(path, 'parquet').records()
    return _of_records(path, 'Parquet', records, names)
  name = lines_lib.plain_name(path).lower()
  columns = _BLANKS.split(first[:9999].decode('utf-8', 'replace'))
  tagged = len(columns) > 1 and TAG.fullmatch(columns[-1]) is not None
  if first[:1] not in (b'{', b'[') or tagged:
    return _text(path)
  whole = first[:1] == b'[' and not name.endswith('.jsonl')
  format = 'json' if whole else 'jsonl'
  records = tables.open_table(path, format).records()
  return _of_records(path, tables.FORMATS[format], records, {})


def _class_names(info: Any, column: str = '') -> dict[str, list[str]]:
  """Returns the names of classes in a description of `datasets`, by column."""
  found: dict[str, list[str]] = {}
  if isinstance(info, list):
    info = dict.fromkeys(['feature'], info[0]) if info else {}
  if isinstance(info, dict):
    names = info.get('names')
    if column and isinstance(names, list):
      return {column: list(map(str, names))}
    for key, value in info.items():
      inner = _class_names(value, column if key == 'feature' else key)
      found = inner | found
  return found


def _of_records(
    path: pathlib.Path,
    kind: str,
    records: Iterable[tuple[str, Any]],
    names: Mapping[str, Sequence[str]],
) -> Table:
  """Makes a table of the lists of records.

  Raises:
    ValueError: a record lacks a list that the others have, or its lists have
      another length than its tokens.
  """
  columns: dict[str, list[list[Any]]] = {}
  places: list[list[str]] = []
  token_field = ''
  for place, record in records:
    lists = {k: v for k, v in record.items() if isinstance(v, list)}
    if not token_field:
      token_field = next((n for n in TOKEN_NAMES if n in lists), 'tokens')
      columns = {name: [] for name in lists}
      if len(lists) < 2:
        missing = 'tags' if token_field in lists else token_field
        raise ValueError(
            f'{place}: "{missing}" must be a list of strings, or be called by'
            f' one of the usual names ({", ".join(TOKEN_NAMES)};'
            f' {", ".join(TAG_NAMES)}); the record has'
            f' {", ".join(map(repr, record)) or "no field"}.'
        )
    tokens = lists.get(token_field)
    if tokens is None or not all(isinstance(word, str) for word in tokens):
      raise ValueError(f'{place}: "{token_field}" must be a list of strings.')
    places.append([place])
    for name, column in columns.items():
      column.append(lists.get(name, []))
  for name in [*columns]:
    for tokens, values, (place,) in zip(
        columns[token_field], columns[name], places, strict=True
    ):
      if len(values) != len(tokens):
        if name in TAG_NAMES:
          raise ValueError(f'{place}: {len(tokens)} tokens and {len(values)}'
                           f' {name}.')
        del columns[name]
        break
  for name in _INFO_FILES:
    if not names and (path.parent / name).is_file():
      names = _class_names(files.read_json(path.parent / name))
  return Table(path, kind, columns, places, names)


def _text(path: pathlib.Path) -> Table:
  """Reads a file with a token on each line.

  Raises:
    ValueError: a line is not UTF-8, or has another number of columns than the
      line before.
  """
  lines: list[str] = []
  for number, data in enumerate(lines_lib.lines(path), start=1):
    try:
      lines.append(lines_lib.decoded(data).rstrip('\r\n'))
    except ValueError as error:
      raise ValueError(f'{path}:{number}: {error}.') from None
  plain = [
      line
      for line in lines
      if line.strip() and not line.startswith(('#', _DOCUMENT_START))
  ]
  tabs = 2 * sum('\t' in line for line in plain) > len(plain)

  def split(line: str) -> list[str]:
    return line.split('\t') if tabs else _BLANKS.split(line.strip(' \t'))

  widths = collections.Counter(len(split(line)) for line in plain)
  width = max(widths, key=widths.__getitem__, default=0)
  first = [split(line)[0] for line in plain]
  numbered = width > 2 and all(map(_UNIT.fullmatch, first))
  names: list[str] = []
  sentences: list[list[tuple[int, list[str]]]] = [[]]
  skipped: collections.Counter[str] = collections.Counter()
  for number, line in enumerate(lines, start=1):
    cells = split(line)
    sentence = sentences[-1]
    if not line.strip():
      if sentence:
        sentences.append([])
    elif _DOCUMENT_START in cells[:2]:
      skipped['document starts'] += 1
      if sentence:
        sentences.append([])
    elif (
        line.startswith('#')
        and not sentence
        and (len(cells) != width or not any(map(TAG.fullmatch, cells[1:])))
    ):
      skipped['comments'] += 1
      header = _NAMES_OF_COLUMNS.match(line)
      names = header[1].split() if header else names
    elif numbered and _UNIT_RANGE.fullmatch(cells[0]):
      skipped['ranges and empty words of CoNLL-U'] += 1
    elif len(cells) < 2:
      raise ValueError(
          f'{path}:{number}: one column, {cells[0][:40]!r}; a line must have a'
          ' token and its tag, separated by a tab or blanks.'
      )
    elif sentence and len(cells) != len(sentence[0][1]):
      raise ValueError(
          f'{path}:{number}: {len(cells)} columns, but line'
          f' {sentence[0][0]} of the same sentence has {len(sentence[0][1])}.'
          f' Columns are separated by {"tabs" if tabs else "blanks"}.'
      )
    else:
      sentence.append((number, cells))
  if sentences[0] and not names:
    first = [cell.lower() for cell in sentences[0][0][1]]
    if any(name in first[1:] for name in TAG_NAMES):
      names = sentences[0].pop(0)[1]
      skipped['header'] += 1
  sentences = [sentence for sentence in sentences if sentence]
  table = Table(
      path,
      f'columns separated by {"tabs" if tabs else "blanks"}',
      {},
      [[f'{path}:{n}' for n, _ in sentence] for sentence in sentences],
      notes=[f'{count} {what} skipped' for what, count in skipped.items()],
  )
  widths = collections.Counter(len(s[0][1]) for s in sentences)
  taken = list(range(width))
  if len(widths) > 1:
    table.notes.append(
        f'{min(widths)} to {max(widths)} columns, of which the first and the'
        ' last are read'
    )
    taken, names = [0, -1], []
  for place in taken:
    name = names[place] if len(names) == width else str(place % width + 1)
    table.columns[name] = [[c[place] for _, c in s] for s in sentences]
  return table
