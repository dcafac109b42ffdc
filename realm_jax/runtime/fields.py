"""The fields of records: their usual names, and the choice between them.

Data sets call the same thing `_id`, `docid` or `pid`. `choose` finds the fields
that a program needs under their usual names. It does not guess: what is
ambiguous is an error that shows the flag to give.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import re
from typing import Any

from realm_jax.runtime import lines as lines_lib

_SHOWN = 20  # Names in a message.
_LONGEST_NAME = 60  # Characters of each.

# The usual names of each field, in lower case without other characters than
# letters and digits. Names of a later row are used if no field has one of an
# earlier row. Two names of one row with different values are ambiguous.
NAMES: dict[str, tuple[str, ...]] = {
    'id': (
        'id pid passageid psgid chunkid docid docno documentid',
        'wikipediaid wikiid pageid articleid paperid corpusid corduid uid uuid'
        ' key',
    ),
    'title': (
        'title wikipediatitle documenttitle doctitle pagetitle articletitle'
        ' passagetitle',
        'headline heading',
    ),
    'text': (
        'text contents content body passage passagetext documenttext doctext'
        ' pagecontent segment chunk chunktext plaintext fulltext',
        'abstract paragraph paragraphtext context document doc sentence',
    ),
    'article': ('article',),
    'spans': ('spans',),
    'split': ('split',),
    'markup': ('markup',),
    'question': ('question query questiontext querytext', 'text'),
    'answers': ('answers answer possibleanswers',),
}
# A passage is identified by its own id, not by that of its document.
_OF_PASSAGES = {'pid', 'passageid', 'psgid', 'chunkid'}
_OF_DOCUMENTS = {'docid', 'docno', 'documentid'}
_USUAL = {
    name for rows in NAMES.values() for row in rows for name in row.split()
}


@dataclasses.dataclass(frozen=True)
class Fields:
  """The fields of a source that a program takes.

  taken: name in the source of each field, such as {'id': '_id'}.
  ignored: the other names in the source.
  title_line: whether the first line of the text is the title.
  later: names of fields that no record of the sample has; others may.
  """

  taken: Mapping[str, str]
  ignored: tuple[str, ...] = ()
  title_line: bool = False
  later: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def names(self) -> Mapping[str, str]:
    """The name of each field, also of `later` ones."""
    return {**self.later, **self.taken}

  @functools.cached_property
  def paths(self) -> tuple[str, ...]:
    """Names that are paths, such as `document.text`; see `value_at`."""
    return tuple(name for name in self.names.values() if '.' in name)

  def __str__(self) -> str:
    taken = ', '.join(
        f'`{name}`' if name == field else f'{field} from `{name}`'
        for field, name in self.taken.items()
    )
    text = f'fields taken: {taken or "none"}'
    if self.title_line:
      text += ', title from its first line'
    if self.ignored:
      text += f'; ignored: {listed(self.ignored)}'
    return text


def parse(
    text: str | Mapping[str, str] | None, known: Iterable[str] = NAMES
) -> dict[str, str]:
  """Returns {'id': '_id', 'text': 'contents'} of 'id:_id,text:contents'.

  A field without a name, as in 'title:', is not taken from the source.

  Raises:
    ValueError: the text has another form, or a field is not one of `known`.
  """
  if text is None or isinstance(text, Mapping):
    pairs = [*(text or {}).items()]
  else:
    pairs = []
    for item in lines_lib.comma_separated(text):
      field, colon, name = item.partition(':')
      if not colon:
        raise ValueError(
            f'--fields={text}: {item!r} is not of the form FIELD:NAME, such as'
            ' text:contents.'
        )
      pairs.append((field.strip(), name.strip()))
  known = tuple(known)
  for field, _ in pairs:
    if field not in known:
      raise ValueError(
          f'--fields: there is no field {field!r}; the fields are '
          f'{", ".join(known)}.'
      )
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError(f'--fields={text} names a field twice.')
  return found


def choose(
    wanted: Iterable[str],
    sample: Sequence[Mapping[str, Any]],
    given: Mapping[str, str] | None = None,
    where: str = '',
    usual: Mapping[str, tuple[str, ...]] = NAMES,
) -> Fields:
  """Chooses the fields of a source by their usual names.

  `wanted` are keys of `usual`; `sample` has records of the source, which is
  `where`; the user gave the names `given`, see `parse`.

  Raises:
    ValueError: a given name is missing, or two names are ambiguous.
  """
  given = given or {}
  names = list(dict.fromkeys(name for row in sample for name in row))
  taken: dict[str, str] = {}
  for field in wanted:
    if field in given:
      if not given[field]:
        continue
      if names and not any(
          given[field] in row or value_at(row, given[field]) is not None
          for row in sample
      ):
        raise ValueError(
            f'{where}: no field {given[field]!r}, which --fields names; the'
            f' fields are {listed(names)}.'
        )
      taken[field] = given[field]
      continue
    free = [name for name in names if name not in given.values()]
    found = _candidates(field, usual[field], free, sample)
    _check_unambiguous(field, found, sample, where)
    if found:
      taken[field] = found[0]
  used = {x for name in taken.values() for x in (name, name.split('.')[0])}
  return Fields(taken, tuple(name for name in names if name not in used))


def value_at(value: Any, path: str) -> Any:
  """Returns the part of a record at a path; of a list, that of each item."""
  for name in path.split('.') if path else ():
    if isinstance(value, (list, tuple)):
      return [value_at(item, path) for item in value]
    value = value.get(name) if isinstance(value, Mapping) else None
    path = path.partition('.')[2]
  return value


def listed(names: Sequence[Any]) -> str:
  """Returns the names for a message."""
  shown = [f'{name!s:.{_LONGEST_NAME}}' for name in names]
  return lines_lib.listed(shown, _SHOWN) or 'none'


def normal(name: Any) -> str:
  """Returns a name as in `NAMES`."""
  return re.sub(r'[\W_]', '', str(name).lower())


def is_usual(name: Any) -> bool:
  """Returns whether a name is a usual one of some field."""
  return normal(name) in _USUAL


def _candidates(
    field: str,
    rows: Sequence[str],
    names: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
) -> list[str]:
  for row in rows:
    usual = row.split()
    found = [name for name in names if normal(name) in usual]
    # A field of another type has another meaning, such as an object of ids.
    fit = [name for name in found if _fits(field, name, sample)]
    found = fit or ([] if field == 'spans' else found)
    if any(normal(name) in _OF_PASSAGES for name in found):
      found = [name for name in found if normal(name) not in _OF_DOCUMENTS]
    if found:
      return sorted(found, key=lambda name: name != field)
  return []


def _fits(field: str, name: str, sample: Sequence[Mapping[str, Any]]) -> bool:
  """Returns whether a record has a value that the field can have."""
  values = [row[name] for row in sample if row.get(name) is not None]
  # Elsewhere, `spans` may be a string of other meaning.
  wrong = str if field == 'spans' else dict
  return not values or any(not isinstance(value, wrong) for value in values)


def _check_unambiguous(
    field: str,
    names: Sequence[str],
    sample: Sequence[Mapping[str, Any]],
    where: str,
) -> None:
  if len(names) < 2:
    return
  for row in sample:
    values = {str(row[name]) for name in names if row.get(name)}
    # `contents` of Pyserini is a title, a line end, and the text.
    shortest = min(values, key=len, default='')
    if not all(x.endswith('\n' + shortest) for x in values - {shortest}):
      shown = ' and '.join(f'`{name}`' for name in names)
      raise ValueError(
          f'{where}: the field for the {field} is ambiguous: {shown} have'
          f' different values. Say which one: --fields={field}:{names[0]}.'
      )
