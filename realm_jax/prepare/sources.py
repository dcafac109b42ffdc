"""Sources of texts: what `--source` of `prepare` can name.

A source yields (place, content) for each record, in the same order every time.
A file is recognised by its content. `records` checks the content.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import glob
import inspect
import itertools
import logging
import os
import pathlib
import re
from typing import Any, Protocol

from realm_jax.runtime import extension
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import lines as lines_lib
from realm_jax.runtime import tables

log = logging.getLogger(__name__)

# A record before it is checked: a line of JSON, its fields, or an error.
Content = bytes | Mapping[str, Any] | ValueError

# The class of each kind of data set, by the prefix of its name.
_DATASETS = {
    'tfds': 'realm_jax.prepare.datasets:TfdsSource',
    'hf': 'realm_jax.prepare.datasets:HuggingFaceSource',
    'ir': 'realm_jax.prepare.datasets:IrDataset',
}
# The class of each format of a file; the keys are the values of --format.
_FILES = {
    **dict.fromkeys(tables.FORMATS, 'realm_jax.prepare.sources:TableFile'),
    'text': 'realm_jax.prepare.datasets:PlainText',
    'wikiextractor': 'realm_jax.prepare.datasets:WikiExtractor',
    'mediawiki': 'realm_jax.prepare.datasets:MediaWikiDump',
}
FORMATS = tuple(_FILES)
_KINDS = _DATASETS | _FILES

_TEXTS = ('.txt', '.md', '.markdown', '.text')
_WIKI_NAME = re.compile(r'wiki_\d+')
# Files about a data set that are no part of it.
_NOTES = re.compile(
    r'(?i:readme|licen[cs]e)(\..*)?|(COPYING|NOTICE|CHANGELOG|CITATION'
    r'|CONTRIBUTING|AUTHORS)(\..*)?|(dataset_infos?|datapackage|package)\.json'
    r'|.*\.ipynb'
)
# A data set for retrieval has a corpus, and other files that are none.
_CORPORA = ('corpus', 'collection')
_NO_CORPORA = ('queries', 'qrels', 'topics')
_HEAD = 1 << 16  # Bytes that tell a format.
_LISTED = 5  # Files that a warning names.
_LONGEST_TITLE = 200  # Characters of a first line that is a title.

# Fields of a record; only the text is required.
FIELDS = ('id', 'title', 'text', 'article', 'spans', 'split', 'markup')
OWN = fields_lib.Fields({name: name for name in FIELDS})
_SAMPLE = 100  # Records from Python that tell the fields.


class Source(Protocol):
  """Records that are not yet checked.

  name: for messages.
  kind: what was recognised.
  fields: names of the fields in the records; known at the first record.
  """

  name: str
  kind: str
  fields: fields_lib.Fields

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    """Yields ('file:line' or similar, content)."""


class Items:
  """Records in memory."""

  kind = 'records'
  fields = OWN

  def __init__(self, items: Sequence[dict[str, Any]], name: str):
    self.items, self.name = items, name

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    for i, item in enumerate(self.items, start=1):
      yield f'{self.name}:{i}', item


class PythonObject:
  """`package.module:Name[:TEXT]`: records from a class or function.

  The object is called for every reading, so a generator function will do. All
  readings must give the same records.
  """

  kind = 'records from Python'
  fields = OWN

  def __init__(self, name: str, given: Mapping[str, str] | None = None):
    """Imports the object.

    Raises:
      ValueError: it cannot be imported or called.
    """
    self.name, self._given = name, given
    path, self._arguments = _python_path(name)
    self._call = extension.load('--source', path, _KINDS)
    try:
      inspect.signature(self._call).bind(*self._arguments)
    except TypeError as error:
      raise ValueError(
          f'{name}: {path} cannot be called with {self._arguments} ({error}).'
      ) from None

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    records = self._call(*self._arguments)
    try:
      records = iter(records)
    except TypeError:
      raise ValueError(
          f'{self.name} gives a {type(records).__name__}; expected is an'
          ' iterable of records, dicts with `text`.'
      ) from None
    first = [*itertools.islice(records, _SAMPLE)]
    sample = [record for record in first if isinstance(record, Mapping)]
    self.fields = layout(sample, self._given, self.name)
    for i, record in enumerate(itertools.chain(first, records), start=1):
      if not isinstance(record, Mapping):
        record = ValueError(
            f'a {type(record).__name__}; each record must be a dict'
        )
      yield f'{self.name}, record {i}', record


class File:
  """A source that is one file."""

  kind = ''
  fields = OWN

  def __init__(
      self,
      path: pathlib.Path,
      id: str = '',
      format: str = '',
      given: Mapping[str, str] | None = None,
  ):
    """Opens a file.

    Args:
      path: of the file.
      id: its path in the folder of the source.
      format: a key of `FORMATS`.
      given: names of fields that the user gave.
    """
    self.path, self.name, self.id = path, str(path), id


class TableFile(File):
  """A file of records: JSON Lines, JSON, CSV, TSV or Parquet."""

  def __init__(
      self,
      path: pathlib.Path,
      id: str = '',
      format: str = '',
      given: Mapping[str, str] | None = None,
  ):
    super().__init__(path)
    self._table = tables.open_table(path, format, given, tables.CORPUS_SHAPES)
    table = self._table
    self.kind = tables.FORMATS[table.format]
    if table.delimiter:
      self.kind += f' {"with" if table.header else "without"} header'
      self.kind += '' if table.quoted else ', quotes are characters'
    self.fields = layout(table.sample, given, self.name, table.columns)
    if table.columns and 'text' not in self.fields.taken:
      columns = fields_lib.listed(table.columns)
      mend = _mend(table.columns)
      if table.delimiter and not table.header and table.sample:
        first = [*table.sample[0].values()]
        columns += f', without known names; the first row is {first}'
        if all(map(str.isidentifier, first)):
          mend += f', or, if this row has their names, {_mend(first)}'
      raise ValueError(
          f'{path}: no column has the text; the columns are {columns:.400}.'
          f' Say which: {mend}.'
      )
    self._table = dataclasses.replace(table, sample=())

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    names = [*self.fields.taken.values()]
    names += [path.split('.')[0] for path in self.fields.paths]
    yield from self._table.contents(names)


def _mend(columns: Sequence[str]) -> str:
  id_ = f'id:{columns[0]},' if len(columns) > 1 else ''
  return f'--fields={id_}text:{columns[-1]}'


def layout(
    sample: Sequence[Mapping[str, Any]],
    given: Mapping[str, str] | None,
    where: str,
    columns: Sequence[str] | None = None,
    wanted: Sequence[str] = FIELDS,
) -> fields_lib.Fields:
  """Chooses the fields of the records of a corpus; see `fields.choose`.

  Pyserini's `contents` has the title in its first line.

  Args:
    sample, given, where, wanted: see `fields.choose`.
    columns: all names that a record has; None: records after the sample may
      have fields of other names.
  """
  if columns and not sample:
    sample = [dict.fromkeys(columns)]
  found = fields_lib.choose(wanted, sample, given, where)
  if columns is None:
    used = {*found.taken.values(), *found.ignored, *found.taken, *(given or {})}
    later = {name: name for name in wanted if name not in used}
    found = dataclasses.replace(found, later=later)
  name = found.taken.get('text', '')
  texts = [row[name] for row in sample if row.get(name)]
  if (
      texts
      and fields_lib.normal(name) == 'contents'
      and 'title' not in {*found.taken, *(given or {})}
      and all(isinstance(text, str) and _has_title(text) for text in texts)
  ):
    return dataclasses.replace(found, title_line=True)
  return found


def _has_title(text: str) -> bool:
  first, end, _ = text.lstrip().partition('\n')
  return bool(end) and len(first) <= _LONGEST_TITLE


def find(
    sources: Sequence[str],
    format: str | None = None,
    fields: str | Mapping[str, str] | None = None,
) -> list[Source]:
  """Opens the sources that the user named, in order; folders sorted by path.

  Args:
    sources: a file, a folder or a glob pattern; tfds:, hf: or ir: and a name;
      or package.module:Name[:TEXT]. docs/corpora.md has a table.
    format: one of `FORMATS`, of all files; None: recognised.
    fields: names of the fields, see `fields.parse`; others are found.

  Raises:
    FileNotFoundError: a source does not exist.
    ImportError: reading a source needs a package that is not installed.
    ValueError: a file is named twice, has an unknown format or no text, or a
      Python object cannot be imported.
  """
  if isinstance(sources, str):
    raise ValueError('The sources must be a list of strings, not a string.')
  if format not in (None, *FORMATS):
    raise ValueError(
        f'--format={format}: must be one of {", ".join(FORMATS)}.'
    )
  given = fields_lib.parse(fields, FIELDS)
  found: list[Source] = []
  seen: set[str] = set()
  for name in sources:
    prefix = name.partition(':')[0]
    if ':' in name and prefix in _DATASETS:
      found.append(extension.load('--source', prefix, _KINDS)(name, given))
      continue
    if _python_path(name)[0] and not os.path.exists(name):
      found.append(PythonObject(name, given))
      continue
    for path, id_, kind in _files(name, format):
      real = os.path.realpath(path)
      if real in seen:
        raise ValueError(f'The sources name the file {path} twice.')
      seen.add(real)
      opened = extension.load('--source', kind, _KINDS)
      found.append(opened(path, id_, kind, given))
  if not found:
    raise FileNotFoundError('No source was given.')
  if given and all(
      isinstance(source, File) and source.fields is OWN for source in found
  ):
    raise ValueError(
        f'{found[0].name} is read as {found[0].kind}, which has no fields that'
        ' --fields could name; --format says what else it is.'
    )
  return found


def _python_path(name: str) -> tuple[str, tuple[str, ...]]:
  """Returns package.module:Name and arguments; '' for any other name."""
  module, _, rest = name.partition(':')
  attribute, colon, text = rest.partition(':')
  path = f'{module}:{attribute}'
  if not extension.is_path(path):
    return '', ()
  return path, (text,) if colon else ()


def _files(
    source: str, format: str | None
) -> list[tuple[pathlib.Path, str, str]]:
  """Returns path, short name and format of the files of a path or pattern."""
  path = pathlib.Path(source)
  if path.is_dir():
    base = os.fspath(path)
    if (path / 'dataset_dict.json').is_file() or [*path.glob('*.arrow')]:
      raise ValueError(
          f'The folder {source} is a saved dataset of Hugging Face; give it as'
          f' hf:{source}.'
      )
    paths = sorted(file for file in path.rglob('*') if file.is_file())
  elif path.is_file():
    kind = format or _recognise(path)
    if not kind:
      raise ValueError(
          f'{path}: neither name nor content tells the format. Say which:'
          f' --format={"|".join(FORMATS)}.'
      )
    return [(path, path.name, kind)]
  elif glob.has_magic(source):
    names = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
    if not names:
      raise FileNotFoundError(f'No file matches the pattern {source!r}.')
    paths = [*map(pathlib.Path, names)]
    base = os.path.commonpath([os.path.dirname(name) for name in names])
  else:
    raise FileNotFoundError(f'There is no file or folder {source!r}.')
  names_in = {file: file.relative_to(base).as_posix() for file in paths}
  kinds: dict[pathlib.Path, str] = {}
  passed_over: dict[str, list[str]] = {}
  queries = _not_of_corpora(pathlib.Path(base), paths)
  for file, name in names_in.items():
    if re.search(r'(^|/)(\.|__MACOSX/)', name):  # Hidden files are no data.
      continue
    kind, why = '', 'not of the corpus of a data set for retrieval'
    if file not in queries:
      kind, why = _recognise_in_folder(file, format)
    if kind:
      kinds[file] = kind
    else:
      passed_over.setdefault(why, []).append(name)
  if len(set(kinds.values()) - {'text'}) and 'text' in kinds.values():
    # Next to files of other kinds, a text is a note.
    for file in [file for file, kind in kinds.items() if kind == 'text']:
      passed_over.setdefault('text next to files of records', []).append(
          names_in[file]
      )
      del kinds[file]
  for why, names in passed_over.items():
    log.warning(
        '%s: %d files are not read (%s): %s%s',
        source, len(names), why, ', '.join(names[:_LISTED]),
        ', ...' if len(names) > _LISTED else '',
    )
  if not kinds:
    raise FileNotFoundError(
        f'The folder {source} holds no file to read; the formats are'
        f' {", ".join(FORMATS)}.'
    )
  return [(file, names_in[file], kind) for file, kind in kinds.items()]


def _recognise_in_folder(
    path: pathlib.Path, format: str | None
) -> tuple[str, str]:
  """Returns the format of a file, or why it is passed over."""
  plain = lines_lib.plain_name(path)
  if _NOTES.fullmatch(plain):
    return '', 'notes'
  if plain.lower().endswith(('~', '.bak', '.tmp', '.swp', '.orig', '#')):
    return '', 'copies of an editor'
  try:
    return format or _recognise(path), 'unknown format'
  except ValueError:
    if tables.suffix(path) in (*tables.ENDINGS, *_TEXTS, '.xml'):
      raise
    return '', 'unknown format'


def _recognise(path: pathlib.Path) -> str:
  """Returns the format of a file, one of `FORMATS`; '' if it is unknown.

  Raises:
    ValueError: the format is ambiguous, or known but not read.
  """
  head = lines_lib.head(path, _HEAD)
  start = head.removeprefix(b'\xef\xbb\xbf').lstrip()
  suffix = tables.suffix(path)
  if re.match(rb'<doc\s+id=', start):
    return 'wikiextractor'
  if re.match(rb'(<\?xml[^>]*>|<!--.*?-->|\s)*<mediawiki\b', start, re.S):
    return 'mediawiki'
  found = tables.recognise(path, head)
  if found == 'jsonl' and (
      _WIKI_NAME.match(path.name) or _is_wikiextractor(path)
  ):
    return 'wikiextractor'
  if found:
    return found
  if suffix == '.xml' or start.startswith(b'<?xml'):
    if start:
      raise ValueError(f'{path}: XML, but no dump of MediaWiki.')
    return 'mediawiki'
  if suffix in _TEXTS:
    _check_is_text(path, head)
    return 'text'
  return 'wikiextractor' if _WIKI_NAME.match(path.name) else ''


def _is_wikiextractor(path: pathlib.Path) -> bool:
  """Returns whether JSON Lines are those of WikiExtractor, by their URLs."""
  sample = tables.open_table(path, 'jsonl').sample
  return bool(sample) and all(
      {'id', 'title', 'text'} <= {*row} and '?curid=' in str(row.get('url'))
      for row in sample
  )


def _check_is_text(path: pathlib.Path, head: bytes) -> None:
  """Refuses a text that could be a table, and one that is no text."""
  if b'\x00' in head:
    raise ValueError(f'{path}: not a text: it has the byte 0x00.')
  lines = [line for line in head.split(b'\n')[:-1] if line.strip()]
  tabs = {line.count(b'\t') for line in lines}
  format, width = 'tsv', min(tabs, default=0) + 1 if len(tabs) == 1 else 1
  first = lines[0] if lines else b''
  names = re.split('[,;|]', first.decode('utf-8', 'replace'))
  if len(names) > 1 and all(map(fields_lib.is_usual, names)):
    format, width = 'csv', len(names)
  if len(lines) > 1 and width > 1:
    raise ValueError(
        f'{path}: a text, or a table of {width} columns? Say which:'
        f' --format=text or --format={format}.'
    )


def _not_of_corpora(
    base: pathlib.Path, paths: Sequence[pathlib.Path]
) -> set[pathlib.Path]:
  """Returns the files next to the corpora of data sets such as BEIR's."""
  stems: dict[pathlib.Path, set[str]] = {}
  found = set()
  for path in paths:
    entry = path
    while entry != base and entry.parent != entry:
      folder = entry.parent
      if folder not in stems:
        stems[folder] = {*map(_stem, os.listdir(folder))}
      here, stem = stems[folder], _stem(entry.name)
      others = here & {*_NO_CORPORA}
      if stem in others and (len(others) > 1 or here & {*_CORPORA}):
        found.add(path)
      if others and here & {*_CORPORA} and stem not in _CORPORA:
        found.add(path)
      entry = folder
  return found


def _stem(name: str) -> str:
  return re.split(r'[._\-]', name)[0].lower()
