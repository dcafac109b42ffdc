"""Questions with their answers and gold passages.

A record has a `question`, and what is known of `answers` (or `answer`), `id`,
`passage_id`, `grades`, `match`, `title` and `held_out`; other fields are
ignored. `question_sets` reads the published formats.
"""

import ast
from collections.abc import Iterable
import contextlib
import dataclasses
import io
import json
import math
import re
import tokenize
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Question:
  """A question and its correct answers.

  answers: empty: unknown; the question measures and trains retrieval alone.
  match: how a prediction is compared with an answer: `string`, after
    normalisation; or `regex`, the answer is a regular expression. Expressions
    are not checked here: CuratedTREC as published has an invalid one.
  passage_id: the gold passage, or several of them; None: unknown.
  held_out: whether no sentence of the pretraining corpus states the fact,
    though a passage does; None: unknown.
  title: title of the gold passage or article; None: unknown.
  id: name of the question in its data set; None: it has no name.
  grades: how relevant each gold passage is; empty: 1 each.
  """

  question: str
  answers: tuple[str, ...]
  match: Literal['string', 'regex'] = 'string'
  passage_id: str | tuple[str, ...] | None = None
  held_out: bool | None = None
  title: str | None = None
  id: str | None = None
  grades: tuple[int, ...] = ()

  @property
  def gold(self) -> dict[str, int]:
    """Grades of the gold passages, by id."""
    ids = self.passage_id
    if ids is None or isinstance(ids, str):
      ids = () if ids is None else (ids,)
    return dict(zip(ids, self.grades or (1,) * len(ids), strict=True))


def parse(record: dict[str, Any]) -> Question:
  """Makes a question from a record.

  Numbers as ids and answers become strings; empty answers and gaps of pandas
  (NaN) are none. `answers` may be a list, one string, or an object as in SQuAD
  (`text`) and TriviaQA (`value`, `aliases`), also written as a string, in JSON
  or Python; so may a list in `passage_id`.

  Raises:
    ValueError: a field is missing or wrong; the message names it.
  """
  if 'question' not in record:
    raise ValueError(
        f'no field "question" among {sorted(map(str, record)) or "no fields"}'
    )
  question = record['question']
  if not _is_text(question):
    raise ValueError(f'"question" is {_as_json(question)}')
  match record.get('match') or 'string':
    case 'string' | 'regex' as match:
      pass
    case other:
      raise ValueError(f'"match" is {_as_json(other)}')
  answers = record.get('answers')
  if answers is None:
    answers = record.get('answer')
  ids = _ids(record, 'passage_id')
  grades = record.get('grades') or ()
  if grades and (
      not isinstance(grades, (list, tuple))
      or len(grades) != len(ids)
      or not all(type(grade) is int and grade > 0 for grade in grades)
  ):
    raise ValueError(
        f'"grades" is {_as_json(grades)}; expected is a positive integer for'
        f' each of the {len(ids)} gold passages'
    )
  names = _ids(record, 'id')
  if len(names) > 1:
    raise ValueError(f'"id" is {_as_json(record["id"])}')
  return Question(
      question=question,
      answers=tuple(_answers(answers, match)),
      match=match,
      passage_id=tuple(ids) if len(ids) > 1 else next(iter(ids), None),
      held_out=_optional(record, 'held_out', bool),
      title=_optional(record, 'title', str),
      id=next(iter(names), None),
      grades=tuple(grades),
  )


def is_list(text: str, match: str = 'string') -> bool:
  """Returns whether a text is a list or object; `[ab]` may be a pattern."""
  start = r'\[' if match == 'string' else r'\[\s*["\']'
  text = text.strip()
  if text.endswith('}'):  # An object begins with a name.
    return bool(re.match(r'\{\s*["\']\w+["\']\s*:', text))
  return bool(re.match(start, text)) and text.endswith(']')


def _answers(value: Any, match: str = 'string') -> list[str]:
  """Returns the answers in the forms that `parse` takes."""
  if isinstance(value, str) and is_list(value, match):
    value = _list(value)
  if isinstance(value, dict):
    # Data sets have one of a field's names.
    keys = {key.lower(): key for key in value}
    found = [value[keys[k]] for k in ('value', 'text', 'answer') if k in keys]
    found += [value[keys[k]] for k in ('aliases',) if k in keys]
    if not found:
      raise ValueError(f'"answers" is {_as_json(value)}')
    # Without repetitions, which such objects have for each annotator.
    value = _distinct(
        item
        for part in found
        for item in (part if isinstance(part, list) else [part])
    )
  elif not isinstance(value, (list, tuple)):
    value = [value]
  answers: list[str] = []
  for item in value:
    if isinstance(item, dict):
      answers += _answers(item)
      continue
    item = number_as_text(item, fractions=True)
    if item in (None, ''):
      continue
    if not _is_text(item):
      raise ValueError(f'"answers" contains {_as_json(item)}')
    answers.append(item)
  return answers


def number_as_text(value: Any, fractions: bool = False) -> Any:
  """Returns a number as a string, a gap of pandas (NaN) as None."""
  if isinstance(value, float):  # Also of a column of integers with gaps.
    if math.isnan(value):
      return None
    value = int(value) if abs(value) < 2**53 and value % 1 == 0 else value
  is_number = type(value) is int or (fractions and isinstance(value, float))
  return str(value) if is_number else value


def _distinct(values: Iterable[Any]) -> list[Any]:
  """Returns each value once, in order; they need not be hashable."""
  found: list[Any] = []
  for value in values:
    if value not in found:
      found.append(value)
  return found


def _list(text: str) -> Any:
  """Parses a list or an object in JSON or Python."""
  try:
    return json.loads(text)
  except (ValueError, RecursionError):
    pass
  try:
    found = ast.literal_eval(text.strip())
    # Python joins neighbouring strings, as numpy prints them: ['a' 'b'].
    tokens = tokenize.generate_tokens(io.StringIO(text.strip()).readline)
    strings = [t for t in tokens if t.type == tokenize.STRING]
    if _num_strings(found) == len(strings):
      return found
  except (
      ValueError, SyntaxError, RecursionError, MemoryError, TypeError,
      tokenize.TokenError,
  ):
    pass
  raise ValueError(
      f'"answers" is {_as_json(text)}, which is no list of JSON or Python'
  )


def _num_strings(value: Any) -> int:
  if isinstance(value, dict):
    return sum(map(_num_strings, [*value, *value.values()]))
  if isinstance(value, (list, tuple)):
    return sum(map(_num_strings, value))
  return isinstance(value, str)


def _ids(record: dict[str, Any], field: str) -> list[str]:
  """Returns the distinct ids in a field, without empty ones."""
  value = record.get(field)
  ids: list[str] = []
  values = [*value] if isinstance(value, (list, tuple)) else [value]
  match values:
    case [str(text)] if field == 'passage_id' and is_list(text):
      with contextlib.suppress(ValueError):  # Or else it is an id.
        values = _list(text)
  for item in values:
    item = number_as_text(item)
    if item is None or item == '':
      continue
    if not _is_text(f'{item}.') or not isinstance(item, str):
      raise ValueError(f'"{field}" is {_as_json(value)}')
    ids.append(item)
  return _distinct(ids)


def _optional(record: dict[str, Any], field: str, kind: type) -> Any:
  value = record.get(field)
  value = number_as_text(value) if kind is str else value
  if value is not None and not isinstance(value, kind):
    raise ValueError(f'"{field}" is {_as_json(value)}')
  return value


def _is_text(value: object) -> bool:
  """Returns whether a value is a valid string that is not blank."""
  if not isinstance(value, str) or not value.strip():
    return False
  # JSON can escape half of a surrogate pair, which is not a character.
  return not any('\ud800' <= c <= '\udfff' for c in value)


def _as_json(value: object) -> str:
  text = json.dumps(value, default=str)
  return text if len(text) <= 80 else f'{text[:77]}...'
