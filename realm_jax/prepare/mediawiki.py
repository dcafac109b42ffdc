"""Dumps of MediaWiki: the XML here, the markup in the worker processes.

Public: `Dump`, `plain_text`. mwxml streams the pages, mwparserfromhell parses
the markup. Both are maintained and used for research on Wikipedia; TFDS and
Hugging Face made their Wikipedias with the latter. WikiExtractor, the other
tool of the kind, is a command, not a library; its output can be read, too.
"""

from collections.abc import Iterator
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

from realm_jax.runtime import lines as lines_lib

_MISSING = (
    'Reading a dump of MediaWiki needs the packages mwxml and mwparserfromhell;'
    " run `pip install 'realm_jax[wiki]'`."
)
# Links to files and categories are not text. (Their English names; those of
# other languages come with the dump, see `Dump`.)
_NOT_TEXT = frozenset({'file', 'image', 'category', 'media'})
_HEADING = re.compile(r'^=+\s*(.*?)\s*=+\s*$', re.MULTILINE)
# What templates leave: '(; born 1950)' has something to say, '(; )' has not.
_EMPTY_BRACKETS = re.compile(r' ?\([\s,;]*\)')
_BLANK = re.compile(r'\s*\n\s*')


class Dump:
  """Articles of a dump such as enwiki-latest-pages-articles.xml.bz2.

  Pages of other namespaces and redirects are passed over; of a history, the
  last revision counts.
  """

  def __init__(self, path: pathlib.Path):
    try:
      import mwparserfromhell  # noqa: F401
      import mwxml  # noqa: F401
    except ImportError as error:
      raise ImportError(f'{path}: {_MISSING}') from error
    self.path = path
    self.name = str(path)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    import mwxml

    damaged = (ElementTree.ParseError, mwxml.errors.MalformedXML)
    title = 'the beginning'
    with lines_lib.opened(self.path) as file:
      try:
        for page in mwxml.Dump.from_file(file):
          title = page.title
          if page.namespace or page.redirect is not None:
            continue
          text = ''
          for revision in page:
            text = revision.text or ''
          yield f'{self.path}:{page.id}', {
              'id': str(page.id),
              'title': title,
              'text': text,
              'markup': 'wikitext',
          }
      except (*damaged, EOFError) as error:
        raise ValueError(
            f'{self.path}: damaged or cut off after the page {title!r} '
            f'({error}).'
        ) from None


def plain_text(markup: str) -> str:
  """Returns wikitext without its markup: paragraphs, headings, items as lines.

  Templates, tables, references, files and categories are left out.
  """
  import mwparserfromhell

  code = mwparserfromhell.parse(markup, skip_style_tags=True)
  for node in code.ifilter(
      recursive=True,
      forcetype=(
          mwparserfromhell.nodes.Wikilink,
          mwparserfromhell.nodes.Tag,
      ),
      matches=_is_not_text,
  ):
    try:
      code.remove(node)
    except ValueError:  # It was inside one that is gone.
      continue
  text = code.strip_code(normalize=True, collapse=True)
  text = _HEADING.sub(r'\1', text)
  text = text.replace("'''", '').replace("''", '')
  return _BLANK.sub('\n', _EMPTY_BRACKETS.sub('', text)).strip()


def _is_not_text(node: Any) -> bool:
  if hasattr(node, 'tag'):
    return str(node.tag) in ('ref', 'table', 'gallery', 'math', 'timeline')
  namespace = str(node.title).partition(':')[0].strip().lower()
  return ':' in str(node.title) and namespace in _NOT_TEXT
