"""Texts from TFDS, the Hugging Face hub, and MediaWiki dumps.

A dataset must have a field `text` and may have `title` and `id`, as the
Wikipedias of TFDS and Hugging Face do. The pages of a dump are streamed by
mwxml; their markup is parsed by mwparserfromhell, in the worker processes.
"""

from collections.abc import Iterator
import pathlib
import re
from typing import Any
from xml.etree import ElementTree

from realm_jax.runtime import lines as lines_lib

# A version begins with a digit, a split with a letter.
_TFDS_NAME = re.compile(
    r'tfds:(?P<dataset>[\w/.]+(?::[\d*.]+)?)(?::(?P<split>[A-Za-z]\w*))?'
)
_FIELDS = ('id', 'title', 'text')  # Others, such as URLs, are not used.

# Links to files and categories are not text. These are their English names;
# a dump declares those of its language.
_NOT_TEXT = frozenset({'file', 'image', 'category', 'media'})
_HEADING = re.compile(r'^=+\s*(.*?)\s*=+\s*$', re.MULTILINE)
# Removed templates leave brackets such as '(; )'; '(; born 1950)' stays.
_EMPTY_BRACKETS = re.compile(r' ?\([\s,;]*\)')
_BLANK = re.compile(r'\s*\n\s*')


class TfdsSource:
  """`tfds:NAME[:VERSION][:SPLIT]`: a dataset in the folder of TFDS.

  Without TensorFlow, TFDS reads array_record files only and cannot download or
  build a dataset; the command `tfds build` does that.
  """

  def __init__(self, name: str):
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
      raise ValueError(f'{name}: {_first_line(error)}') from None
    if split not in builder.info.splits:
      raise ValueError(
          f'{name}: no split {split!r}; the splits are '
          f'{", ".join(sorted(builder.info.splits))}.'
      )
    _check_fields(name, builder.info.features or {})
    try:
      self._source = builder.as_data_source(split=split)
    except NotImplementedError:
      raise ValueError(
          f'{name}: the files in {builder.data_dir} are not of array_record, '
          'the only format that TFDS reads without TensorFlow. Run `tfds build '
          f'{dataset} --file_format=array_record`.'
      ) from None

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i in range(len(self._source)):
      yield f'{self.name}:{i}', _known_fields(self._source[i])


class HuggingFaceSource:
  """`hf:NAME[:CONFIG[:SPLIT]]`: a dataset of the hub, cached, or a folder."""

  def __init__(self, name: str):
    """Opens the dataset; downloads it if it is not in the cache.

    Raises:
      FileNotFoundError: the dataset does not exist.
      ImportError: the package `datasets` is not installed.
      ValueError: it has no such configuration or split, or no field `text`.
    """
    try:
      import datasets
    except ImportError as error:
      raise ImportError(
          f'{name}: reading it needs the package datasets; run `pip install '
          "'realm_jax[hf]'`."
      ) from error

    self.name = name
    parts = name.removeprefix('hf:').split(':')
    if not parts[0] or len(parts) > 3:
      raise ValueError(
          f'The source {name!r} is not of the form hf:NAME[:CONFIG[:SPLIT]].'
      )
    path, config, split = [*parts, '', ''][:3]
    try:
      if (pathlib.Path(path) / 'state.json').is_file():  # From save_to_disk.
        self._rows = datasets.load_from_disk(path)
      else:
        self._rows = datasets.load_dataset(
            path, config or None, split=split or 'train'
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
      raise FileNotFoundError(
          f'{name}: neither a folder nor a dataset of the hub '
          f'({_first_line(error)}).'
      ) from None
    except ValueError as error:  # Unknown configuration or split.
      raise ValueError(f'{name}: {_first_line(error)}') from None
    _check_fields(name, self._rows.features)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate(self._rows):
      yield f'{self.name}:{i}', _known_fields(row)


class MediaWikiDump:
  """Articles of a dump such as enwiki-latest-pages-articles.xml.bz2.

  Redirects and pages of other namespaces are skipped. The last revision of a
  page is used.
  """

  def __init__(self, path: pathlib.Path):
    try:
      import mwparserfromhell  # noqa: F401
      import mwxml  # noqa: F401
    except ImportError as error:
      raise ImportError(
          f'{path}: Reading a dump of MediaWiki needs the packages mwxml and'
          " mwparserfromhell; run `pip install 'realm_jax[wiki]'`."
      ) from error
    self.path = path
    self.name = str(path)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    import mwxml

    damaged = (ElementTree.ParseError, mwxml.errors.MalformedXML, EOFError)
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
      except damaged as error:
        raise ValueError(
            f'{self.path}: damaged or cut off after the page {title!r} '
            f'({error}).'
        ) from None


def plain_text(markup: str) -> str:
  """Returns wikitext without markup: a line for each paragraph, heading, item.

  Templates, tables, references, files and categories are removed.
  """
  import mwparserfromhell

  code = mwparserfromhell.parse(markup, skip_style_tags=True)
  nodes = mwparserfromhell.nodes
  for node in code.ifilter(
      recursive=True,
      forcetype=(nodes.Wikilink, nodes.Tag),
      matches=_is_not_text,
  ):
    try:
      code.remove(node)
    except ValueError:  # Its parent was removed.
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


def _known_fields(row: dict[str, Any]) -> dict[str, Any]:
  return {name: row[name] for name in _FIELDS if name in row}


def _check_fields(name: str, fields: Any) -> None:
  if 'text' not in fields:
    raise ValueError(
        f'{name}: the dataset has no field `text`; its fields are '
        f'{", ".join(sorted(fields))}.'
    )


def _first_line(error: BaseException) -> str:
  lines = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip().splitlines()
  return lines[0] if lines else type(error).__name__
