"""Which columns of a file are tokens and tags.

All rows decide; the log says what was recognised, and an ambiguity is an error.
Tags in files have any notation of `tagged_files.TAG`; those read are IOB2.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import pathlib
import re
from typing import Any

from realm_jax.corpus import tagged_files
from realm_jax.runtime import lines as lines_lib

log = logging.getLogger(__name__)

_NUMBER = re.compile(r'[.,:-]*\d[\d.,:-]*')
# Types of CoNLL 2000, which its later tasks have in a column before the names;
# the last three are those of German.
_CHUNKS = frozenset(
    'NP VP PP ADVP ADJP SBAR PRT CONJP INTJ LST UCP NC VC PC'.split()
)
_HOW = (
    'name it: --tag_column=NAME_OR_NUMBER (training:'
    ' --config.tagger.tag_column)'
)
_MAX_TYPES = 200
_MAX_UNIQUE = 100  # Tokens of which none occurs twice.


@dataclasses.dataclass(frozen=True)
class TaggedSentence:
  """Words and their tags (IOB2)."""

  tokens: list[str]
  tags: list[str]


def read(
    sources: str,
    tag_column: str = '',
    tag_names: Sequence[str] = (),
    quiet: bool = False,
) -> list[TaggedSentence]:
  """Reads files of tagged sentences, comma-separated.

  Args:
    sources: paths.
    tag_column: name of the column of tags, or its number, from 1; '': the only
      one.
    tag_names: tags of the numbers 0, 1, ...; (): those that the file or a
      dataset_info.json in its folder states.
    quiet: whether to leave out the line of the log for each file.

  Raises:
    FileNotFoundError: a file does not exist.
    ValueError: a line is wrong, with file and line; a file has no sentence, or
      it is not clear which column is what; or no token has an entity.
  """
  sentences: list[TaggedSentence] = []
  for source in lines_lib.comma_separated(sources):
    path = pathlib.Path(source)
    if not path.is_file():
      raise FileNotFoundError(f'There is no file of tagged sentences {path}.')
    table = tagged_files.open_table(path)
    if not any(any(column) for column in table.columns.values()):
      raise ValueError(f'{path} has no sentence. {tagged_files.FORMS}.')
    found = _sentences(table, tag_column, tag_names)
    if not quiet:
      log.info('%s: %s.', path, '; '.join([table.kind, *table.notes]))
    sentences += found
  if not sentences:
    raise FileNotFoundError('No file of tagged sentences is given.')
  if all(tag == 'O' for sentence in sentences for tag in sentence.tags):
    raise ValueError(
        f'{sources}: no token has an entity, every tag is O. If another column'
        f' has the tags, {_HOW}.'
    )
  return sentences


def _sentences(
    table: tagged_files.Table, tag_column: str, tag_names: Sequence[str]
) -> list[TaggedSentence]:
  """Returns the sentences of a table; `table.notes` gets what was recognised.

  Raises:
    ValueError: it is not clear which column is what, or not plausible.
  """
  given = dict(table.names)
  if tag_names:
    given |= dict.fromkeys(table.columns, tag_names)
  tags_by_column = {
      name: _as_tags(column, given.get(name))
      for name, column in table.columns.items()
      if not tag_names or not _is_text(column) or name == tag_column
  }
  indices = [n for n in table.columns if _is_index(table, n)]
  tag_name = _tag_column(table, tags_by_column, indices, tag_column, given)
  tags_of_all = tags_by_column[tag_name]
  assert tags_of_all is not None
  tokens_name = _token_column(
      table, {tag_name, *indices}, [n for n, t in tags_by_column.items() if t]
  )
  sentences = [
      TaggedSentence(tokens, iob2(tags))
      for tokens, tags in zip(
          table.columns[tokens_name], tags_of_all, strict=True
      )
      if tokens
  ]
  _check_plausible(table, sentences, tokens_name, tag_name)
  ignored = [n for n in table.columns if n not in (tokens_name, tag_name)]
  written = sorted({f'{t[0]}-' for tags in tags_of_all for t in tags if t[1:]})
  same = [s.tags for s in sentences] == [tags for tags in tags_of_all if tags]
  entities = sum(tag[0] == 'B' for s in sentences for tag in s.tags)
  table.notes[:0] = [
      f'tokens from {tokens_name}, tags from {tag_name}'
      + (f' ({", ".join(written)} converted to IOB2)' if not same else ''),
      *([f'ignored: {", ".join(ignored)}'] if ignored else []),
      f'{len(sentences):,} sentences with'
      f' {sum(len(s.tokens) for s in sentences):,} tokens and {entities:,}'
      f' entities of {len(types_of(sentences))} types',
  ]
  return sentences


def _is_text(column: Sequence[Sequence[Any]]) -> bool:
  return all(isinstance(v, str) for values in column for v in values)


def _as_tags(
    column: Sequence[Sequence[Any]], names: Sequence[str] | None
) -> list[list[str]] | None:
  """Returns a column as tags, or None if a value is no tag."""
  found: list[list[str]] = []
  for values in column:
    tags = []
    for value in values:
      if names and str(value).isdecimal() and int(value) < len(names):
        value = names[int(value)]
      if not isinstance(value, str) or not tagged_files.TAG.fullmatch(value):
        return None
      tags.append(value)
    found.append(tags)
  return found


def _is_index(table: tagged_files.Table, name: str) -> bool:
  """Whether a column counts the tokens, or is the same for all of a sentence.

  The tokens of a file with two columns cannot be in another one.
  """
  column = table.columns[name]
  if len(table.columns) < 3 or not _is_text(column):
    return False
  if all(len(set(values)) == 1 for values in column):
    return any(len(v) > 1 for v in column) and _as_tags(column, None) is None
  return all(
      all(value.isdecimal() for value in values)
      and [int(v) - int(values[0]) for v in values] == [*range(len(values))]
      for values in column
  )


def _tag_column(
    table: tagged_files.Table,
    tags: Mapping[str, list[list[str]] | None],
    indices: Sequence[str],
    wanted: str,
    names: Mapping[str, Sequence[str]],
) -> str:
  """Returns the name of the column of tags."""
  path, columns = table.path, [*table.columns]
  numbers = {
      name: column
      for name, column in table.columns.items()
      if name not in indices
      and column
      and all(type(v) is int for values in column for v in values)
  }
  if wanted:
    if wanted not in columns and wanted.isdecimal():
      number = int(wanted) - 1
      wanted = columns[number] if 0 <= number < len(columns) else wanted
    if wanted not in columns:
      raise ValueError(
          f'{path} has no column {wanted!r}; its columns are'
          f' {table.examples(columns)}.'
      )
    candidates = [wanted]
  else:
    candidates = [
        name
        for name, found in tags.items()
        if found and any(tag != 'O' for values in found for tag in values)
    ]
    types = {
        name: {t[2:] for values in tags[name] or () for t in values} - {''}
        for name in candidates
    }
    names_only = [n for n in candidates if not types[n] <= _CHUNKS]
    candidates = names_only or candidates
    if len(candidates) > 1:
      raise ValueError(
          f'{path} has several columns of tags: {table.examples(candidates)}.'
          f' Of these, {_HOW}.'
      )
    if not candidates:
      candidates = [n for n, found in tags.items() if found is not None][-1:]
  if candidates and tags.get(candidates[0]) is not None:
    return candidates[0]
  usual = tagged_files.TAG_NAMES
  named = [n for n in numbers if n in usual or 'ner' in n.lower()]
  for name in candidates or named[:1]:
    if name in numbers and not names.get(name):
      raise ValueError(
          f'{table.places[0][0]}: {name} has numbers,'
          f' {table.examples([name])}, without the names of the tags. Give them'
          ' in order, --tag_names=O,B-PER,I-PER,... (training:'
          ' --config.tagger.tag_names), or put the dataset_info.json of the'
          ' data set into the folder of the file.'
      )
  # The column that a reader of the file would take, and its first wrong tag.
  known = [n for n in columns if n in usual]
  name = (candidates or known or named or columns)[-1]
  for values, places in zip(table.columns[name], table.places, strict=True):
    for i, value in enumerate(values):
      if _as_tags([[value]], names.get(name)) is None:
        raise ValueError(
            f'{places[min(i, len(places) - 1)]}: the tag {value!r} is neither O'
            ' nor one of B-, I-, E-, S- and a type, such as B-PER. The columns'
            f' are {table.examples(columns)}; if another one has the tags,'
            f' {_HOW}.'
        )
  raise ValueError(f'{path} has no column of tags. {tagged_files.FORMS}.')


def _token_column(
    table: tagged_files.Table, taken: set[str], tag_columns: Sequence[str]
) -> str:
  """Returns the name of the column of tokens: the first that can be."""
  free = [
      name
      for name, column in table.columns.items()
      if name not in taken and _is_text(column)
  ]
  named = [n for n in free if n.lower() in tagged_files.TOKEN_NAMES]
  best = named or [n for n in free if n not in tag_columns] or free
  if not best:
    raise ValueError(
        f'{table.path} has no column of tokens besides'
        f' {table.examples(sorted(taken))}. {tagged_files.FORMS}.'
    )
  return best[0]


def _check_plausible(
    table: tagged_files.Table,
    sentences: Sequence[TaggedSentence],
    tokens_name: str,
    tag_name: str,
) -> None:
  """Raises a ValueError if tokens or tags are something else."""
  where = table.places[0][0]
  words = [word for sentence in sentences for word in sentence.tokens]
  if not words:
    raise ValueError(f'{table.path} has no sentence. {tagged_files.FORMS}.')
  every = table.examples([*table.columns])
  numbers = sum(_NUMBER.fullmatch(word) is not None for word in words)
  unique = len(words) >= _MAX_UNIQUE and len(set(words)) == len(words)
  if numbers >= max(3, 0.9 * len(words)) or (
      unique and all(any(c.isdigit() for c in word) for word in words)
  ):
    raise ValueError(
        f'{where}: the tokens in column {tokens_name} are numbers or indices:'
        f' {", ".join(words[:4])}, ... The columns are {every}. Give the file'
        ' a column of words, before that of the tags.'
    )
  kinds = types_of(sentences)
  if len(kinds) > _MAX_TYPES:
    raise ValueError(
        f'{where}: the tags in column {tag_name} have {len(kinds):,} types,'
        f' such as {", ".join(kinds[:4])}; more than {_MAX_TYPES} are taken for'
        f' a wrong column. The columns are {every}; if another one has the'
        f' tags, {_HOW}.'
    )


def iob2(tags: Sequence[str]) -> list[str]:
  """Converts IO, IOB1, IOB2, BIOES, BILOU and BMES, by the rules of seqeval."""
  written = []
  before, open_type = 'O', ''  # Prefix and type of the previous tag.
  for tag in tags:
    prefix, _, kind = tag.partition('-')
    if tag == 'O':
      written.append('O')
    elif prefix in 'BSU' or before in 'OESLU' or open_type != kind:
      written.append(f'B-{kind}')
    else:
      written.append(f'I-{kind}')
    before, open_type = prefix, kind
  return written


def types_of(sentences: Sequence[TaggedSentence]) -> tuple[str, ...]:
  """Returns the entity types that occur, in alphabetical order."""
  found = {
      tag[2:] for sentence in sentences for tag in sentence.tags if tag != 'O'
  }
  return tuple(sorted(found))
