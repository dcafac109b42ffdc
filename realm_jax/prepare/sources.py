"""What the `--source` of `prepare` can name: files, folders, datasets.

Public: `Source`, `Content`, `Items`, `find`, `is_json_lines`, `UNDERSTOOD`. A
source yields the contents of its records with their places, in the same order
every time; what is in them is for `records` to judge.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import glob
import html
import os
import pathlib
import re
from typing import Any, Protocol

from realm_jax.prepare import datasets
from realm_jax.prepare import mediawiki
from realm_jax.runtime import lines as lines_lib

UNDERSTOOD = """\
What is understood, files also with .gz, .xz, .bz2 or .zst at the end:
  *.jsonl, *.json      JSON Lines, an object with `text` a line
  *.txt                plain text, an article a file
  wiki_*               what WikiExtractor writes, with --json or without
  *.xml                a dump of MediaWiki
  a folder             all such files in it, at any depth; text if alone
  a glob pattern       such as 'articles/*.jsonl.xz'
  tfds:NAME[:VERSION][:SPLIT]
                       a dataset of TFDS, such as tfds:wikipedia/20230601.en
  hf:NAME[:CONFIG[:SPLIT]]
                       a dataset of the Hugging Face hub, or its folder
  world:SEED[:ENTITIES]
                       an invented world, as the only source"""

# A record before it is checked: a line of JSON, its fields, or what is wrong.
Content = bytes | dict[str, Any] | ValueError

_JSON = ('.jsonl', '.json')
_WIKI_EXTRACTOR = re.compile(r'wiki_\d+')
_DOC = re.compile(
    r'<doc id="(?P<id>[^"]*)"[^>]*? title="(?P<title>.*)">\s*'
)


class Source(Protocol):
  """Records to be; `name` is for messages."""

  @property
  def name(self) -> str:
    """Returns what the user called it."""

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    """Yields ('file:line' or the like, content)."""


@dataclasses.dataclass(frozen=True)
class Items:
  """Records that were made here."""

  items: Sequence[dict[str, Any]]
  name: str

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    for i, item in enumerate(self.items, start=1):
      yield f'{self.name}:{i}', item


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """A file with an object a line."""

  path: pathlib.Path

  @property
  def name(self) -> str:
    return str(self.path)

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    for i, line in enumerate(lines_lib.lines(self.path), start=1):
      yield f'{self.path}:{i}', line


@dataclasses.dataclass(frozen=True)
class PlainText:
  """A file that is one article; its title is the file's name.

  A first line that says the title again is left out.
  """

  path: pathlib.Path
  id: str  # Its path in the folder that was given.

  @property
  def name(self) -> str:
    return str(self.path)

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    data = b''.join(lines_lib.lines(self.path))
    title = pathlib.Path(lines_lib.plain_name(self.path)).stem
    title = title.replace('_', ' ')
    yield f'{self.path}:1', {
        'id': self.id,
        'title': title,
        'text': _without_title(data, title),
    }


@dataclasses.dataclass(frozen=True)
class WikiExtractor:
  """A file of <doc id=... title=...> blocks, or of JSON lines."""

  path: pathlib.Path

  @property
  def name(self) -> str:
    return str(self.path)

  def __iter__(self) -> Iterator[tuple[str, Content]]:
    header: re.Match[str] | None = None
    place, body = '', list[bytes]()
    for i, line in enumerate(lines_lib.lines(self.path), start=1):
      here = f'{self.path}:{i}'
      if header is not None:
        if line.strip() == b'</doc>':
          yield place, _block(header, b''.join(body))
          header, body = None, []
        else:
          body.append(line)
      elif line.lstrip().startswith(b'{'):
        yield here, line
      elif line.strip():
        header = _DOC.fullmatch(line.decode('utf-8', 'replace'))
        place = here
        if header is None:
          yield place, ValueError(
              'neither a JSON object nor <doc id="..." title="...">, as '
              'WikiExtractor writes them'
          )
    if header is not None:
      yield place, ValueError('the <doc> is not closed by </doc>: cut off')


def find(sources: Sequence[str]) -> list[Source]:
  """Returns what the user named, in that order; a folder's by their paths.

  Raises:
    FileNotFoundError: if a source names nothing.
    ImportError: if reading it needs a package that is not installed.
    ValueError: if a file is named twice, or is of an unknown format.
  """
  if isinstance(sources, str):
    raise ValueError('The sources must be a list of strings, not a string.')
  found: list[Source] = []
  seen: set[str] = set()
  for name in sources:
    if name.startswith('tfds:'):
      found.append(datasets.TfdsSource(name))
    elif name.startswith('hf:'):
      found.append(datasets.HuggingFaceSource(name))
    else:
      for path, id_ in _files(name):
        real = os.path.realpath(path)
        if real in seen:
          raise ValueError(f'The sources name the file {path} twice.')
        seen.add(real)
        found.append(_of_file(path, id_))
  if not found:
    raise FileNotFoundError('No source was given.')
  return found


def is_json_lines(path: pathlib.Path) -> bool:
  """Whether a file's name says that it holds an object a line."""
  return lines_lib.plain_name(path).endswith(_JSON)


def _files(source: str) -> list[tuple[pathlib.Path, str]]:
  """Returns the files that a path or pattern names, each with a short name."""
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
    found = _without_notes(found)
    return [(file, file.relative_to(path).as_posix()) for file in found]
  if path.is_file():
    return [(path, path.name)]
  if glob.has_magic(source):
    names = sorted(filter(os.path.isfile, glob.glob(source, recursive=True)))
    if not names:
      raise FileNotFoundError(f'No file matches the pattern {source!r}.')
    base = os.path.commonpath([os.path.dirname(name) for name in names])
    return [
        (file, file.relative_to(base).as_posix())
        for file in _without_notes([*map(pathlib.Path, names)])
    ]
  raise FileNotFoundError(f'There is no file or folder {source!r}.')


def _without_notes(files: list[pathlib.Path]) -> list[pathlib.Path]:
  """Beside files that say what they hold, a README.txt is no article."""
  return [file for file in files if _kind(file) != 'text'] or files


def _kind(path: pathlib.Path) -> str:
  """Returns what a file's name says of its format; '': nothing."""
  name = lines_lib.plain_name(path)
  if name.endswith(_JSON):
    return 'json'
  if _WIKI_EXTRACTOR.fullmatch(name):
    return 'wiki'
  return {'.txt': 'text', '.xml': 'xml'}.get(pathlib.Path(name).suffix, '')


def _of_file(path: pathlib.Path, id_: str) -> Source:
  match _kind(path):
    case 'json':
      return JsonLines(path)
    case 'text':
      return PlainText(path, id_)
    case 'wiki':
      return WikiExtractor(path)
    case 'xml':
      return mediawiki.Dump(path)
  raise ValueError(
      f'The name of the file {path} does not say what it holds. {UNDERSTOOD}'
  )


def _block(header: re.Match[str], body: bytes) -> dict[str, Any]:
  title = html.unescape(header['title'])
  # The tool escapes <, > and & so that its own marks can be told apart.
  for mark, escaped in ((b'<', b'&lt;'), (b'>', b'&gt;'), (b'&', b'&amp;')):
    body = body.replace(escaped, mark)
  return {
      'id': header['id'],
      'title': title,
      'text': _without_title(body, title),
  }


def _without_title(body: bytes, title: str) -> bytes:
  first, _, rest = body.partition(b'\n')
  same = title and first.strip() == title.strip().encode('utf-8')
  return rest if same else body
