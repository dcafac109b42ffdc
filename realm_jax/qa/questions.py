"""Question files in JSON Lines, plain or compressed.

A line is an object with `question` and `answers` (or `answer`, as in NQ-open).
`match`, `passage_id`, `title` and `held_out` are optional; other fields are
ignored. `question_sets` reads the other published formats.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any, Literal

from realm_jax.runtime import lines as lines_lib

_EXPECTED = (
    'a line holds {"question": text, "answers": [text, ...], '
    '"match"?: "string" or "regex", "passage_id"?: text, "title"?: text, '
    '"held_out"?: true or false}'
)


@dataclasses.dataclass(frozen=True)
class Question:
  """A question and its correct answers.

  match: how a prediction is compared with an answer: `string`, after
    normalisation; or `regex`, the answer is a regular expression. Expressions
    are not checked here: CuratedTREC as published has an invalid one.
  passage_id: the gold passage; None: unknown.
  held_out: whether no sentence of the pretraining corpus states the fact,
    though a passage does; None: unknown.
  title: title of the gold passage or article; None: unknown.
  """

  question: str
  answers: tuple[str, ...]
  match: Literal['string', 'regex'] = 'string'
  passage_id: str | None = None
  held_out: bool | None = None
  title: str | None = None


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
  """Reads a question file and checks every line.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: a line is not a question (the message has the file, the line and
      the expected fields), or the file is empty or damaged.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
        f'no question file at {path}; expected JSON Lines: .jsonl, .jsonl.gz '
        'or .jsonl.xz'
    )
  questions = []
  for number, line in enumerate(lines_lib.lines(path), start=1):
    try:
      questions.append(parse(lines_lib.json_object(line)))
    except ValueError as error:
      raise ValueError(f'{path}:{number}: {error}; {_EXPECTED}') from error
  if not questions:
    raise ValueError(f'{path} holds no question; {_EXPECTED}')
  return questions


def parse(record: dict[str, Any]) -> Question:
  """Makes a question from a record.

  Raises:
    ValueError: a field is missing or wrong; the message names it.
  """
  if 'answers' not in record and isinstance(record.get('answer'), list):
    record = {**record, 'answers': record['answer']}  # NQ-open.
  for field in ('question', 'answers'):
    if field not in record:
      raise ValueError(
          f'no field "{field}" among {sorted(record) or "no fields"}'
      )
  question, answers = record['question'], record['answers']
  if not _is_text(question):
    raise ValueError(f'"question" is {_as_json(question)}')
  if not isinstance(answers, list) or not answers:
    raise ValueError(f'"answers" is {_as_json(answers)}')
  for answer in answers:
    if not _is_text(answer):
      raise ValueError(f'"answers" contains {_as_json(answer)}')
  match record.get('match'):
    case None | 'string':
      match: Literal['string', 'regex'] = 'string'
    case 'regex':
      match = 'regex'
    case other:
      raise ValueError(f'"match" is {_as_json(other)}')
  return Question(
      question=question,
      answers=tuple(answers),
      match=match,
      passage_id=_optional(record, 'passage_id', str),
      held_out=_optional(record, 'held_out', bool),
      title=_optional(record, 'title', str),
  )


def _optional(record: dict[str, Any], field: str, kind: type) -> Any:
  value = record.get(field)
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
  text = json.dumps(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
