"""Texts from TFDS, the Hugging Face hub, ir_datasets, and files of articles.

A dataset must have a text and may have titles and ids, under the usual names
(`fields`). The pages of a dump are streamed by mwxml; their markup is parsed by
mwparserfromhell, in the worker processes.
"""

from collections.abc import Iterator, Mapping
import html
import itertools
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

from realm_jax.prepare import sources
from realm_jax.runtime import extension
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import lines as lines_lib

# A version begins with a digit, a split with a letter.
_TFDS_NAME = re.compile(
    r'tfds:(?P<dataset>[\w/.]+(?::[\d*.]+)?)(?::(?P<split>[A-Za-z]\w*))?'
)
_FIELDS = ('id', 'title', 'text')  # Others, such as URLs, are not used.
_SAMPLE = 20  # Records that tell the fields.

_DOC = re.compile(
    r'<doc id="(?P<id>[^"]*)"[^>]*? title="(?P<title>.*)">\s*'
)
# WikiExtractor escapes <, > and &, to tell text from its own tags.
_ESCAPED = (('<', '&lt;'), ('>', '&gt;'), ('&', '&amp;'))

# Links to files and categories are not text. These are the names of their
# namespaces in English, which every wiki understands, and names that a dump in
# Chinese or Serbian does not declare; it declares the others of its language.
_NOT_TEXT = frozenset(
    'file image media category 分类 分類 категорија kategorija'.split()
)
_NAMESPACES = (-2, 6, 14)  # Media, files, categories.
# A file by its ending: older names of the namespace, such as Bild, are not
# declared.
_MEDIA = re.compile(
    r'[^:|\[\]]+:[^|]*\.(?:jpe?g|png|gif|svg|tiff?|webp|xcf|bmp|pdf|djvu|og[gvax]'
    r'|opus|webm|mp[34g]|mpeg|wav|flac|midi?|stl)\s*',
    re.IGNORECASE,
)
# A link to the same page of another language, which is shown elsewhere.
_LANGUAGE = re.compile(
    r'(?:simple|[a-z]{2,3}(?:-[a-z]{1,10}){0,2}):\S.*', re.DOTALL
)
_REMOVED_TAGS = frozenset(
    'ref references table gallery imagemap math chem timeline score graph hiero'
    ' mapframe maplink templatestyles templatedata inputbox categorytree'
    ' indicator'.split()
)
# Removed templates leave brackets such as '(; )'; '(; born 1950)' stays.
_EMPTY_BRACKETS = re.compile(r' ?\([\s,;]*\)')
# Tags of HTML at which a line ends; a line end itself would break links.
_MARK = '\u2028'
_LINE_END = re.compile(
    r'</?(?:br|p|div|blockquote|center|[uod]l|li|d[td]|h[1-6])\b[^<>]*>', re.I
)
_SWITCH = re.compile(r'__[^\W_]+(?:_[^\W_]+)*__')  # Such as __NOTOC__.
# -{zh-hans:..; zh-hant:..}-, -{text}-, -{FLAGS|...}-: one text in several
# scripts of Chinese or Serbian. Some flags hide it.
_VARIANTS = re.compile(r'-\{(?:([^|{}]*)\|)?([^{}]*)\}-')
_VARIANT = re.compile(r'\s*[a-z]+(?:-[a-z]+)?\s*:\s*(.*?)\s*', re.DOTALL)
_HIDING = frozenset('HT-')
# A redirect of a dump that does not mark it, in the words of any language.
_REDIRECT = re.compile(
    r'\s*#[^\s\[]+\s*\[\[[^\[\]]+\]\]\s*(?:\{\{|\[\[|$)'
)


class TfdsSource:
  """`tfds:NAME[:VERSION][:SPLIT]`: a dataset in the folder of TFDS.

  Without TensorFlow, TFDS reads array_record files only and cannot download or
  build a dataset; the command `tfds build` does that.
  """

  kind = 'dataset of TFDS'

  def __init__(self, name: str, given: Mapping[str, str] | None = None):
    """Opens the dataset.

    Raises:
      FileNotFoundError: the dataset does not exist.
      ValueError: it cannot be read, or has no such split or no field `text`.
    """
    # Imported late: the import takes seconds.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    self.name = name
    match = _TFDS_NAME.fullmatch(name)
    if match is None:
      raise ValueError(
          f'The source {name!r} is not of the form tfds:NAME[:VERSION][:SPLIT].'
      )
    dataset, split = match['dataset'], match['split'] or 'train'
    try:
      builder = read_only_builder.builder_from_files(dataset)
    except tfds.core.registered.DatasetNotFoundError:
      raise FileNotFoundError(
          f'{name}: the folders of TFDS, '
          f'{", ".join(map(str, file_utils.list_data_dirs()))}, have no such'
          f' dataset. Run `tfds build {dataset} --file_format=array_record`, or'
          ' set TFDS_DATA_DIR to the folder that contains it.'
      ) from None
    except ValueError as error:
      raise ValueError(f'{name}: {lines_lib.first_line(error)}') from None
    if split not in builder.info.splits:
      raise ValueError(
          f'{name}: no split {split!r}; the splits are '
          f'{", ".join(sorted(builder.info.splits))}.'
      )
    try:
      self._source = builder.as_data_source(split=split)
    except NotImplementedError:
      raise ValueError(
          f'{name}: the files in {builder.data_dir} are not of array_record, '
          'the only format that TFDS reads without TensorFlow. Run `tfds build '
          f'{dataset} --file_format=array_record`.'
      ) from None
    sample = [self._source[i] for i in range(min(_SAMPLE, len(self._source)))]
    self.fields = _fields(name, sample, builder.info.features or {}, given)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i in range(len(self._source)):
      yield f'{self.name}:{i}', self._source[i]


class HuggingFaceSource:
  """`hf:NAME[:CONFIG[:SPLIT]]`: a dataset of the hub, cached, or a folder."""

  kind = 'dataset of Hugging Face'

  def __init__(self, name: str, given: Mapping[str, str] | None = None):
    """Opens the dataset; the errors are those of `extension.dataset`."""
    self.name, self._rows = name, extension.dataset(name)
    sample = itertools.islice(self._rows, _SAMPLE)
    self.fields = _fields(name, [*sample], self._rows.features, given)
    # Others, such as embeddings and images, take time to decode.
    columns = {
        name if name in self._rows.features else name.split('.')[0]
        for name in self.fields.taken.values()
    }
    self._rows = self._rows.select_columns(sorted(columns))

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate(self._rows):
      yield f'{self.name}:{i}', row


class IrDataset:
  """`ir:NAME`: the documents of a dataset of ir_datasets."""

  kind = 'dataset of ir_datasets'

  def __init__(self, name: str, given: Mapping[str, str] | None = None):
    """Opens the dataset; see `extension.ir_dataset` for other errors.

    Raises:
      ValueError: it has no documents, or no text.
    """
    self.name, self._dataset = name, extension.ir_dataset(name)
    if not self._dataset.has_docs():
      raise ValueError(f'{name}: the dataset has no documents.')
    names = self._dataset.docs_cls()._fields
    sample = [row for _, row in itertools.islice(self, _SAMPLE)]
    self.fields = _fields(name, sample, names, given)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i, document in enumerate(self._dataset.docs_iter(), start=1):
      yield f'{self.name}, record {i}', document._asdict()


class PlainText(sources.File):
  """A file that is one article; the title is the name of the file.

  A first line that repeats the title is removed.
  """

  kind = 'plain text, an article a file'

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    data = b''.join(lines_lib.lines(self.path))
    title = pathlib.Path(lines_lib.plain_name(self.path)).stem
    title = title.replace('_', ' ')
    text = _without_title(data, title)
    yield f'{self.path}:1', {'id': self.id, 'title': title, 'text': text}


class WikiExtractor(sources.File):
  """A file of <doc id=... title=...> blocks, or of JSON lines."""

  kind = 'output of WikiExtractor'

  def __iter__(self) -> Iterator[tuple[str, Any]]:
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
        yield f'{self.path}:{i}', _wiki_object(line)
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


class MediaWikiDump(sources.File):
  """Articles of a dump such as enwiki-latest-pages-articles.xml.bz2.

  Redirects and pages of other namespaces are skipped. The last revision of a
  page is used.
  """

  kind = 'dump of MediaWiki'

  def __init__(self, path: pathlib.Path, *options: Any):
    super().__init__(path)
    try:
      import mwparserfromhell  # noqa: F401
      import mwxml  # noqa: F401
    except ImportError as error:
      raise ImportError(
          f'{path}: Reading a dump of MediaWiki needs the packages mwxml and'
          " mwparserfromhell; run `pip install 'realm_jax[wiki]'`."
      ) from error

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    import mwxml

    damaged = (
        ElementTree.ParseError,
        mwxml.errors.MalformedXML,
        *lines_lib.DAMAGED,
        # From mwxml, for XML of another structure.
        *(AssertionError, AttributeError, KeyError, TypeError, ValueError),
    )
    title = 'the beginning'
    with lines_lib.opened(self.path) as file:
      try:
        dump = mwxml.Dump.from_file(file)
        names = [
            namespace.name.lower()
            for namespace in getattr(dump.site_info, 'namespaces', None) or ()
            if namespace.id in _NAMESPACES and namespace.name
        ]
        markup = f'wikitext:{"|".join(names)}'
        if names:
          self.kind = (
              f'dump of MediaWiki; not text: links to {", ".join(names)}'
          )
        for page in dump:
          title = page.title
          if page.namespace or page.redirect is not None:
            continue
          text = ''
          for revision in page:
            text = revision.text or ''
          if _REDIRECT.match(text):
            continue
          yield f'{self.path}:{page.id}', {
              'id': str(page.id),
              'title': title,
              'text': text,
              'markup': markup,
          }
      except (*damaged, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
          raise
        raise ValueError(
            f'{self.path}: damaged or cut off after the page {title!r:.100} '
            f'({lines_lib.first_line(error):.200}).'
        ) from None


def plain_text(text: str, markup: str = 'wikitext') -> str:
  """Returns wikitext without markup: a line for each paragraph, heading, item.

  Templates, tables, references, files and categories are removed.

  Args:
    text: wikitext.
    markup: 'wikitext', or 'wikitext:NAME|NAME' with the names of the namespaces
      of files and categories in the language of the wiki.
  """
  import mwparserfromhell

  names = {name.lower() for name in markup.partition(':')[2].split('|')}
  names |= _NOT_TEXT

  def is_not_text(node: Any) -> bool:
    if hasattr(node, 'tag'):
      return str(node.tag).strip().lower() in _REMOVED_TAGS
    target = str(node.title).strip()
    if target.startswith(':'):  # Shows a link to the file or category.
      node.title = target[1:]
      return False
    namespace, colon, _ = target.partition(':')
    if not colon:
      return False
    return (
        namespace.replace('_', ' ').strip().lower() in names
        or _MEDIA.fullmatch(target) is not None
        or (node.text is None and _LANGUAGE.fullmatch(target) is not None)
    )

  text = _LINE_END.sub(_MARK, _SWITCH.sub(_without_switch, text))
  text = _VARIANTS.sub(_variant, text)
  code = mwparserfromhell.parse(text, skip_style_tags=True)
  nodes = mwparserfromhell.nodes
  for node in code.ifilter(
      recursive=True,
      forcetype=(nodes.Wikilink, nodes.Tag),
      matches=is_not_text,
  ):
    try:
      code.remove(node)
    except ValueError:  # Its parent was removed.
      continue
  plain = code.strip_code(normalize=True, collapse=True)
  plain = plain.replace(_MARK, '\n').replace("'''", '').replace("''", '')
  plain = _EMPTY_BRACKETS.sub('', plain)
  # Expressions would take time by the square of a long run of blanks or `=`.
  lines = map(_without_marks, plain.split('\n'))
  return '\n'.join(filter(None, lines))


def _without_marks(line: str) -> str:
  """Returns a line without blanks at its ends, and a heading without `==`."""
  text = line.strip()
  is_heading = len(text) > 1 and line[0] == text[-1] == '='
  return text.strip('=').strip() if is_heading else text


def _without_switch(match: re.Match[str]) -> str:
  return match[0] if match[0].islower() else ''


def _variant(match: re.Match[str]) -> str:
  """Returns the first text of a conversion between scripts."""
  flags = {flag.strip() for flag in (match[1] or '').split(';')}
  if flags & _HIDING:
    return ''
  first = _VARIANT.fullmatch(match[2].partition(';')[0])
  return first[1] if first else match[2]


def _fields(
    name: str,
    sample: list[dict[str, Any]],
    columns: Any,
    given: Mapping[str, str] | None,
) -> fields_lib.Fields:
  """Chooses the fields of a dataset; it must have a text."""
  found = sources.layout(sample, given, name, [*columns], _FIELDS)
  if 'text' not in found.taken:
    raise ValueError(
        f'{name}: the dataset has no field `text`; its fields are '
        f'{fields_lib.listed(sorted(columns))}. Name it: --fields=text:NAME'
    )
  return found


def _wiki_object(line: bytes) -> Any:
  try:
    record = lines_lib.json_object(line)
  except ValueError as error:
    return error
  for name in ('title', 'text'):
    for mark, escaped in _ESCAPED:
      if isinstance(record.get(name), str):
        record[name] = record[name].replace(escaped, mark)
  return record


def _block(header: re.Match[str], body: bytes) -> dict[str, Any]:
  title = html.unescape(header['title'])
  for mark, escaped in _ESCAPED:
    body = body.replace(escaped.encode(), mark.encode())
  text = _without_title(body, title)
  return {'id': header['id'], 'title': title, 'text': text}


def _without_title(body: bytes, title: str) -> bytes:
  first, _, rest = body.partition(b'\n')
  # Also a heading of Markdown.
  first = first.removeprefix(b'\xef\xbb\xbf').strip().lstrip(b'#').strip()
  return rest if title and first == title.strip().encode() else body
