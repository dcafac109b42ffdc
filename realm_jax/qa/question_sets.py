"""Question sets in the formats in which they were published.

Every set becomes a list of `questions.Question`; `match`, how a prediction is
compared with an answer, is a property of the set. The format is detected from
the content, so `--questions=` takes any of these files, or
`tfds:NAME[/CONFIG][:SPLIT]`.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import html.parser
import json
import os
import pathlib
import re
from typing import Any

import farmhash

from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import files
from realm_jax.runtime import lines as lines_lib

# Longer answers of Natural Questions are dropped (Lee et al. 2019, section 6).
MAX_ANSWER_TOKENS = 5
# In ORQA's re-splits (Lee et al. 2019, section 6.1), a tenth of the published
# training set is `dev`.
_BUCKETS, _DEV_EVERY = 100_000, 10

Path = str | os.PathLike[str]
Record = dict[str, Any]


def read(source: Path, format: str = 'auto') -> list[questions_lib.Question]:
  """Reads a question set.

  Args:
    source: a file, plain or compressed, or `tfds:NAME[/CONFIG][:SPLIT]`.
    format: one of `FORMATS`, or `auto`: detected from the first record.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the format is unknown or a record is wrong; the message names
      the file, the line or record, and the expected content.
  """
  name = os.fspath(source)
  if format not in ('auto', *FORMATS):
    raise ValueError(
        f'format {format!r}: must be auto or one of {", ".join(FORMATS)}.'
    )
  if name.startswith('tfds:'):
    return _checked(_from_tfds(name), name, 'TFDS')
  path = pathlib.Path(name)
  if format == 'auto':
    format = _detect(path)
  if format == 'jsonl':
    return questions_lib.read_questions(path)
  return _checked(_READERS[format](path), name, format)


def resplit(
    questions: Iterable[questions_lib.Question],
) -> tuple[list[questions_lib.Question], list[questions_lib.Question]]:
  """Splits a published training set into train and dev as ORQA did.

  The FarmHash of a question alone decides. NQ-open gives 79,168 and 8,757
  questions, WebQuestions 3,417 and 361, CuratedTREC 1,353 and 133 (Lee et al.
  2019, table 3).
  """
  train: list[questions_lib.Question] = []
  dev: list[questions_lib.Question] = []
  for question in questions:
    bucket = farmhash.fingerprint64(question.question) % _BUCKETS
    (train if bucket % _DEV_EVERY else dev).append(question)
  return train, dev


def convert(
    source: Path,
    output: Path,
    *,
    format: str = 'auto',
    split: bool = False,
) -> dict[str, int]:
  """Writes a question set in JSON Lines, which every command reads.

  Args:
    source: as in `read`.
    output: folder for questions.jsonl, or for train.jsonl and dev.jsonl.
    format: as in `read`.
    split: whether to apply `resplit`.

  Returns:
    The number of questions of each file.
  """
  questions = read(source, format)
  parts = {'questions': questions}
  if split:
    parts = dict(zip(('train', 'dev'), resplit(questions), strict=True))
  for name, part in parts.items():
    with files.atomic_file(pathlib.Path(output) / f'{name}.jsonl') as file:
      for question in part:
        values = {
            field: value
            for field, value in dataclasses.asdict(question).items()
            if value is not None
        }
        file.write(json.dumps(values, ensure_ascii=False) + '\n')
  return {name: len(part) for name, part in parts.items()}


def _checked(
    found: Iterable[tuple[str, Record]], source: str, format: str
) -> list[questions_lib.Question]:
  """Makes questions from pairs of a place, for errors, and a record."""
  questions = []
  place = 'its first record'
  try:
    for where, record in found:
      try:
        questions.append(questions_lib.parse(record))
      except ValueError as error:
        raise ValueError(f'{source}, {where}: {error}') from error
      place = f'the record after {where}'
  except UnicodeDecodeError as error:
    raise ValueError(f'{source}: {place} is not UTF-8: {error}') from error
  except (KeyError, TypeError, AttributeError) as error:
    why = f'no field {error}' if isinstance(error, KeyError) else error
    raise ValueError(
        f'{source}: {place} is not a record of {format}: {why}.'
    ) from error
  if not questions:
    raise ValueError(f'{source} holds no question with an answer.')
  return questions


def _natural_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """Natural Questions 1.0: JSON Lines with whole pages, or simplified."""
  for number, (where, record) in enumerate(lines_lib.json_objects(path), 1):
    missing = {'question_text', 'annotations'} - set(record)
    if missing or not {'document_html', 'document_text'} & set(record):
      raise ValueError(
          f'{where}: not a record of Natural Questions: no field '
          f'{", ".join(sorted(missing)) or "document_html or document_text"}.'
      )
    # A dict keeps the order of appearance.
    answers = dict.fromkeys(
        text
        for annotation in record['annotations']
        for span in annotation['short_answers']
        if span['end_token'] - span['start_token'] <= MAX_ANSWER_TOKENS
        and (text := _short_answer(record, span))
    )
    if answers:
      yield f'line {number}', {
          'question': record['question_text'],
          'answers': list(answers),
          'title': record.get('document_title') or None,
      }


def _short_answer(record: Record, span: Record) -> str:
  if 'document_text' in record:  # The simplified form: tokens of HTML.
    tokens = record['document_text'].split(' ')
    words = tokens[span['start_token'] : span['end_token']]
    return ' '.join(word for word in words if not word.startswith('<')).strip()
  page = record['document_html'].encode()
  text = _TextOnly()
  text.feed(page[span['start_byte'] : span['end_byte']].decode())
  text.close()
  return ''.join(text.parts).strip()


class _TextOnly(html.parser.HTMLParser):
  """Collects the text of HTML, with entities resolved and without tags."""

  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []

  def handle_data(self, data: str) -> None:
    self.parts.append(data)


def _web_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """WebQuestions: a JSON list, as published or as re-published by brmson."""
  for where, record in _records(path):
    if 'qText' in record:  # brmson.
      answers = record.get('answers')
      yield where, {'question': record['qText'], 'answers': answers}
    elif 'utterance' in record:  # Berant et al. 2013.
      yield where, {
          'question': record['utterance'],
          'answers': _descriptions(record.get('targetValue') or ''),
      }
    else:
      raise ValueError(f'{path}, {where}: no field qText or utterance.')


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^\s()]+))\)')


def _descriptions(value: str) -> list[str]:
  """Parses `(list (description "Padmé Amidala") (description 1982))`."""
  return [
      re.sub(r'\\(.)', r'\1', quoted) if quoted else bare
      for quoted, bare in _DESCRIPTION.findall(value)
  ]


def _trivia_qa(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """TriviaQA: a JSON object; answers are a value and its aliases."""
  for where, record in _records(path, 'Data'):
    answer = record.get('Answer') or {}
    if 'Value' not in answer:
      continue  # The published test set has no answers.
    answers = [answer['Value'], *(answer.get('Aliases') or ())]
    yield where, {
        'question': record.get('Question'),
        'answers': list(dict.fromkeys(answers)),
    }


def _squad(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """SQuAD 1.1 and 2.0; passage ids are TITLE#NUMBER, such as `Alaska#0`."""
  for where, article in _records(path, 'data'):
    title = article.get('title', '')
    for number, paragraph in enumerate(article['paragraphs']):
      for question in paragraph['qas']:
        answers = [answer['text'] for answer in question['answers']]
        if question.get('is_impossible') or not answers:
          continue  # An unanswerable question of SQuAD 2.0.
        yield f'{where}, question {question.get("id")}', {
            'question': question['question'].strip(),
            'answers': list(dict.fromkeys(answers)),
            'passage_id': f'{title}#{number}',
            'title': title.replace('_', ' '),
        }


def _entity_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """EntityQuestions and DPR's files: a JSON list of {question, answers}."""
  for where, record in _records(path):
    yield where, {
        name: record.get(name)
        for name in ('question', 'answers', 'match', 'title')
    }


def _curated_trec(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """CuratedTREC: tab-separated id, ..., question and regular expression.

  Rows with an id that begins with `lfb` have another source. ORQA removes them,
  which gives the published 1,486 and 694 questions.
  """
  for number, line in enumerate(lines_lib.lines(path), start=1):
    columns = line.decode('utf-8').rstrip('\r\n').split('\t')
    if len(columns) < 3:
      raise ValueError(
          f'{path}, line {number}: {len(columns)} column(s); expected an id, '
          'the question and a regular expression, separated by tabs.'
      )
    if columns[0].startswith('lfb'):
      continue
    yield f'line {number}', {
        'question': columns[-2].strip(),
        'answers': [columns[-1].strip()],
        'match': 'regex',
    }


_READERS: dict[str, Callable[[pathlib.Path], Iterator[tuple[str, Record]]]] = {
    'natural_questions': _natural_questions,
    'web_questions': _web_questions,
    'trivia_qa': _trivia_qa,
    'squad': _squad,
    'entity_questions': _entity_questions,
    'curated_trec': _curated_trec,
}
FORMATS = ('jsonl', *_READERS)


def _detect(path: pathlib.Path) -> str:
  """Detects the format from the name or the first record."""
  if lines_lib.plain_name(path).endswith('.tsv'):
    return 'curated_trec'
  if not path.is_file():
    return 'jsonl'  # Its reader raises the error.
  start = next(lines_lib.lines(path), b'')
  try:
    record = json.loads(start)
  except ValueError:
    record = None  # A JSON document on several lines.
  if isinstance(record, dict) and 'question_text' in record:
    return 'natural_questions'
  if isinstance(record, dict) and not {'Data', 'data'} & set(record):
    return 'jsonl'
  if record is None and not start.strip().startswith((b'[', b'{')):
    return 'jsonl'
  document = record if record is not None else _document(path)
  match document:
    case {'Data': _}:
      return 'trivia_qa'
    case {'data': _}:
      return 'squad'
    case [{'qText': _}, *_] | [{'utterance': _}, *_]:
      return 'web_questions'
    case [dict(), *_]:
      return 'entity_questions'
  return 'jsonl'


def _document(path: pathlib.Path) -> Any:
  try:
    return json.loads(b''.join(lines_lib.lines(path)))
  except ValueError as error:
    raise ValueError(
        f'{path}: neither JSON Lines nor one JSON document: {error}'
    ) from error


def _records(
    path: pathlib.Path, key: str | None = None
) -> Iterator[tuple[str, Record]]:
  """Yields the records of a JSON list, or of a field that is such a list."""
  values = _document(path)
  if key is not None:
    values = values[key]
  if not isinstance(values, list):
    raise ValueError(
        f'{path}: expected a list of records, not {str(values)[:80]!r}.'
    )
  for number, record in enumerate(values, 1):
    if not isinstance(record, dict):
      raise ValueError(
          f'{path}, record {number}: {str(record)[:80]!r} is not an object.'
      )
    yield f'record {number}', record


def _from_tfds(name: str) -> Iterator[tuple[str, Record]]:
  """Reads a TFDS dataset of {question, answer or answers}, or its folder.

  TriviaQA and SQuAD have answers of a form of their own.
  """
  import tensorflow_datasets as tfds  # Imported late: it takes seconds.

  _, _, rest = name.partition(':')
  dataset, _, split = rest.rpartition(':')
  if not dataset:
    dataset, split = rest, 'train'
  if os.path.isdir(dataset):
    builder = tfds.builder_from_directory(dataset)
  else:
    builder = tfds.builder(dataset, file_format='array_record')
    builder.download_and_prepare()
  if split not in builder.info.splits:
    raise ValueError(
        f'{name}: no split {split!r}; it has {", ".join(builder.info.splits)}.'
    )
  for number, example in enumerate(builder.as_data_source(split=split), 1):
    answers = example.get('answers', example.get('answer'))
    if isinstance(answers, dict) and 'value' in answers:  # TriviaQA.
      answers = [answers['value'], *answers['aliases']]
    elif isinstance(answers, dict):  # SQuAD.
      answers = answers.get('text', ())
    texts = [_text(answer) for answer in (() if answers is None else answers)]
    # Test sets, and unanswerable questions of SQuAD 2.0, have no answers.
    if any(texts):
      yield f'record {number}', {
          'question': _text(example['question']),
          'answers': list(dict.fromkeys(text for text in texts if text)),
          'title': _text(example.get('title')) or None,
      }


def _text(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode()
  return '' if value is None else str(value)
