"""Question files: JSON Lines, plain or compressed (.gz, .xz).

Public: `Question`, `read_questions`, `parse`, `numbered_lines`. A line is an
object with `question` and `answers` (or `answer`, as in NQ-open); `match`,
`passage_id`, `title` and `held_out` may be left out, and other fields are
ignored. Other published formats: `question_sets`.
"""

from collections.abc import Iterator
import dataclasses
import gzip
import json
import lzma
import os
import pathlib
from typing import IO, Any, Literal, cast
import zlib

_EXPECTED = (
    'a line holds {"question": text, "answers": [text, ...], '
    '"match"?: "string" or "regex", "passage_id"?: text, "title"?: text, '
    '"held_out"?: true or false}')


@dataclasses.dataclass(frozen=True)
class Question:
  """A question and the answers that count as right.

  `match` says how a prediction is compared with an answer: `string`, after
  normalisation, or `regex`, the answer being a regular expression (not checked
  here: CuratedTREC as published has a broken one, which matches nothing).
  `passage_id` is the gold passage, `title` its title or the
  article the question is about, `held_out` whether no sentence of the
  pretraining corpus states the fact (a passage does); each is None where the
  file does not say.
  """

  question: str
  answers: tuple[str, ...]
  match: Literal['string', 'regex'] = 'string'
  passage_id: str | None = None
  held_out: bool | None = None
  title: str | None = None


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
  """Reads a question file and checks every line of it.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not a question (named with the file, the line and
      what was expected), the file holds no question, or it is damaged.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
        f'no question file at {path}; expected JSON Lines: .jsonl, .jsonl.gz '
        'or .jsonl.xz')
  questions = []
  for number, line in numbered_lines(path):
    try:
      questions.append(parse(_record(line)))
    except ValueError as error:
      raise ValueError(f'{path}:{number}: {error}; {_EXPECTED}') from error
  if not questions:
    raise ValueError(f'{path} holds no question; {_EXPECTED}')
  return questions


def numbered_lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields number and bytes of each line of a file, which may be compressed.

  Bytes, so that a wrong encoding is an error of its line.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it cannot be decompressed.
  """
  number = 0
  try:
    with _open(path) as file:
      for number, line in enumerate(file, 1):
        yield number, line
  except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
    raise ValueError(
        f'{path} cannot be decompressed after line {number}: {error}; is it '
        'complete, and does its name end in what it was compressed with?'
    ) from error


def _open(path: pathlib.Path) -> IO[bytes]:
  match path.suffix:
    case '.gz':
      return cast(IO[bytes], gzip.open(path, 'rb'))
    case '.xz':
      return cast(IO[bytes], lzma.open(path, 'rb'))
    case _:
      return path.open('rb')


def _record(line: bytes) -> dict[str, Any]:
  """Reads one line; the message of a ValueError says what is wrong with it."""
  if not line.strip():
    raise ValueError('an empty line')
  try:
    record = json.loads(line.decode('utf-8-sig'))  # Windows tools add a mark.
  except UnicodeDecodeError as error:
    raise ValueError(f'not UTF-8 at byte {error.start} of the line') from error
  except RecursionError as error:
    raise ValueError('not JSON: nested too deeply') from error
  except ValueError as error:  # Also numbers of too many digits.
    raise ValueError(f'not JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'{_described(record)} instead of an object')
  return record


def parse(record: dict[str, Any]) -> Question:
  """Makes a question of a record.

  Raises:
    ValueError: a field is missing or wrong; the message names the field.
  """
  if 'answers' not in record and isinstance(record.get('answer'), list):
    record = {**record, 'answers': record['answer']}  # NQ-open.
  for field in ('question', 'answers'):
    if field not in record:
      raise ValueError(
          f'no field "{field}" among {sorted(record) or "no fields"}')
  question, answers = record['question'], record['answers']
  if not _is_text(question):
    raise ValueError(f'"question" is {_described(question)}')
  if not isinstance(answers, list) or not answers:
    raise ValueError(f'"answers" is {_described(answers)}')
  for answer in answers:
    if not _is_text(answer):
      raise ValueError(f'"answers" contains {_described(answer)}')
  match _optional(record, 'match', str):
    case None | 'string':
      match: Literal['string', 'regex'] = 'string'
    case 'regex':
      match = 'regex'
    case other:
      raise ValueError(f'"match" is {_described(other)}')
  return Question(
      question=question, answers=tuple(answers), match=match,
      passage_id=_optional(record, 'passage_id', str),
      held_out=_optional(record, 'held_out', bool),
      title=_optional(record, 'title', str))


def _optional(record: dict[str, Any], field: str, kind: type) -> Any:
  """The field, or None where it is absent or null."""
  value = record.get(field)
  if value is not None and not isinstance(value, kind):
    raise ValueError(f'"{field}" is {_described(value)}')
  return value


def _is_text(value: object) -> bool:
  """Whether it is a string that says something and can be encoded."""
  if not isinstance(value, str) or not value.strip():
    return False
  # JSON can escape half of a surrogate pair, which is no character.
  return not any('\ud800' <= c <= '\udfff' for c in value)


def _described(value: object) -> str:
  """The value as JSON, cut where it is long."""
  text = json.dumps(value)
  return text if len(text) <= 80 else f'{text[:77]}...'
