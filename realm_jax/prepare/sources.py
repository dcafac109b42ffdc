"""Sources of texts: what `--source` of `prepare` can name.

A source yields (place, content) for each record, in the same order every time.
`records` checks the content.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import glob
import html
import inspect
import os
import pathlib
import re
from typing import Any, Protocol

from realm_jax.runtime import extension
from realm_jax.runtime import lines as lines_lib

UNDERSTOOD = """\
A source is one of these; files may also end in .gz, .xz, .bz2 or .zst:
  *.jsonl, *.json      JSON Lines: an object with `text` on each line
  *.txt                plain text: one article
  wiki_*               output of WikiExtractor, with --json or without
  *.xml                a dump of MediaWiki
  a folder             all such files in it, at any depth; .txt if no others
  a glob pattern       such as 'articles/*.jsonl.xz'
  tfds:NAME[:VERSION][:SPLIT]
                       a dataset of TFDS, such as tfds:wikipedia/20230601.en
  hf:NAME[:CONFIG[:SPLIT]]
                       a dataset of the Hugging Face hub, or its folder
  package.module:Name[:TEXT]
                       a class or function in Python that, called without
                       argument or with TEXT, gives the records as dicts
  world:SEED[:ENTITIES]
                       an invented world, as the only source"""

# A record before it is checked: a line of JSON, its fields, or an error.
Content = bytes | Mapping[str, Any] | ValueError

# The class of each kind: by the prefix of a name, or by the name of a file.
_DATASETS = {
    'tfds': 'realm_jax.prepare.datasets:TfdsSource',
    'hf': 'realm_jax.prepare.datasets:HuggingFaceSource',
}
_FILES = {
    'json': 'realm_jax.prepare.sources:JsonLines',
    'text': 'realm_jax.prepare.sources:PlainText',
    'wiki': 'realm_jax.prepare.sources:WikiExtractor',
    'xml': 'realm_jax.prepare.datasets:MediaWikiDump',
}
_KINDS = _DATASETS | _FILES

_JSON = ('.jsonl', '.json')
_WIKI_EXTRACTOR = re.compile(r'wiki_\d+')
_DOC = re.compile(
    r'<doc id="(?P<id>[^"]*)"[^>]*? title="(?P<title>.*)">\s*'
)


class Source(Protocol):
  """Records that are not yet checked; `name` is for messages."""

  @property
  def name(self) -> str:
    """The name that the user gave."""

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    """Yields ('file:line' or similar, content)."""


@dataclasses.dataclass(frozen=True)
class Items:
  """Records in memory."""

  items: Sequence[dict[str, Any]]
  name: str

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    for i, item in enumerate(self.items, start=1):
      yield f'{self.name}:{i}', item


class PythonObject:
  """`package.module:Name[:TEXT]`: records from a class or function.

  The object is called for every reading, so a generator function will do. All
  readings must give the same records.
  """

  def __init__(self, name: str):
    """Imports the object.

    Raises:
      ValueError: it cannot be imported or called.
    """
    self.name = name
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
    for i, record in enumerate(records, start=1):
      if not isinstance(record, Mapping):
        record = ValueError(
            f'a {type(record).__name__}; each record must be a dict'
        )
      yield f'{self.name}, record {i}', record


@dataclasses.dataclass(frozen=True)
class _File:
  path: pathlib.Path

  @property
  def name(self) -> str:
    return str(self.path)


class JsonLines(_File):
  """A file with a JSON object on each line."""

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    for i, line in enumerate(lines_lib.lines(self.path), start=1):
      yield f'{self.path}:{i}', line


@dataclasses.dataclass(frozen=True)
class PlainText(_File):
  """A file that is one article; the title is the name of the file.

  A first line that repeats the title is removed.
  """

  id: str  # Its path in the folder of the source.

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    data = b''.join(lines_lib.lines(self.path))
    title = pathlib.Path(lines_lib.plain_name(self.path)).stem
    title = title.replace('_', ' ')
    text = _without_title(data, title)
    yield f'{self.path}:1', {'id': self.id, 'title': title, 'text': text}


class WikiExtractor(_File):
  """A file of <doc id=... title=...> blocks, or of JSON lines."""

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    header: re.Match[str] | None = None
    place, body = '', list[bytes]()
    for i, line in enumerate(lines_lib.lines(self.path), start=1):
      if header is not None:
        if line.strip() == b'</doc>':
          yield place, _block(header, b''.join(body))
          header, body = None, []
        else:
          body.append(line)
      elif line.lstrip().startswith(b'{'):
        yield f'{self.path}:{i}', line
      elif line.strip():
        header = _DOC.fullmatch(line.decode('utf-8', 'replace'))
        place = f'{self.path}:{i}'
        if header is None:
          yield place, ValueError(
              'neither a JSON object nor <doc id="..." title="...">, as '
              'WikiExtractor writes them'
          )
    if header is not None:
      yield place, ValueError('the <doc> is not closed by </doc>: cut off')


def find(sources: Sequence[str]) -> list[Source]:
  """Opens the sources that the user named, in order; folders sorted by path.

  Raises:
    FileNotFoundError: a source does not exist.
    ImportError: reading a source needs a package that is not installed.
    ValueError: a file is named twice or has an unknown format, or a Python
      object cannot be imported.
  """
  if isinstance(sources, str):
    raise ValueError('The sources must be a list of strings, not a string.')
  found: list[Source] = []
  seen: set[str] = set()
  for name in sources:
    prefix = name.partition(':')[0]
    if ':' in name and prefix in _DATASETS:
      found.append(extension.load('--source', prefix, _KINDS)(name))
      continue
    if _python_path(name)[0] and not os.path.exists(name):
      found.append(PythonObject(name))
      continue
    for path, id_ in _files(name):
      real = os.path.realpath(path)
      if real in seen:
        raise ValueError(f'The sources name the file {path} twice.')
      seen.add(real)
      kind = _kind(path)
      if not kind:
        raise ValueError(
            f'The name of the file {path} does not tell its format.'
            f' {UNDERSTOOD}'
        )
      opened = extension.load('--source', kind, _KINDS)
      found.append(opened(path, id_) if kind == 'text' else opened(path))
  if not found:
    raise FileNotFoundError('No source was given.')
  return found


def is_json_lines(path: pathlib.Path) -> bool:
  """Returns whether the name of a file says that it is JSON Lines."""
  return lines_lib.plain_name(path).endswith(_JSON)


def _python_path(name: str) -> tuple[str, tuple[str, ...]]:
  """Returns package.module:Name and arguments; '' for any other name."""
  module, _, rest = name.partition(':')
  attribute, colon, text = rest.partition(':')
  path = f'{module}:{attribute}'
  if not extension.is_path(path):
    return '', ()
  return path, (text,) if colon else ()


def _files(source: str) -> list[tuple[pathlib.Path, str]]:
  """Returns the files of a path or pattern, each with a short name."""
  path = pathlib.Path(source)
  if path.is_dir():
    found = sorted(
        file
        for file in path.rglob('*')
        if _kind(file) and file.is_file() and not file.name.startswith('.')
    )
    if not found:
      raise FileNotFoundError(
          f'The folder {source} holds no file to read. {UNDERSTOOD}'
      )
    base = os.fspath(path)
  elif path.is_file():
    return [(path, path.name)]
  elif glob.has_magic(source):
    names = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
    if not names:
      raise FileNotFoundError(f'No file matches the pattern {source!r}.')
    found = [*map(pathlib.Path, names)]
    base = os.path.commonpath([os.path.dirname(name) for name in names])
  else:
    raise FileNotFoundError(f'There is no file or folder {source!r}.')
  # Next to files of other kinds, a .txt is a note such as README.txt.
  found = [file for file in found if _kind(file) != 'text'] or found
  return [(file, file.relative_to(base).as_posix()) for file in found]


def _kind(path: pathlib.Path) -> str:
  """Returns the key in `_FILES` that the name of a file tells; '' if none."""
  name = lines_lib.plain_name(path)
  if name.endswith(_JSON):
    return 'json'
  if _WIKI_EXTRACTOR.fullmatch(name):
    return 'wiki'
  return {'.txt': 'text', '.xml': 'xml'}.get(pathlib.Path(name).suffix, '')


def _block(header: re.Match[str], body: bytes) -> dict[str, Any]:
  title = html.unescape(header['title'])
  # WikiExtractor escapes <, > and &, to tell text from its own tags.
  for mark, escaped in ((b'<', b'&lt;'), (b'>', b'&gt;'), (b'&', b'&amp;')):
    body = body.replace(escaped, mark)
  text = _without_title(body, title)
  return {'id': header['id'], 'title': title, 'text': text}


def _without_title(body: bytes, title: str) -> bytes:
  first, _, rest = body.partition(b'\n')
  same = title and first.strip() == title.strip().encode('utf-8')
  return rest if same else body
