"""Published question sets, read as they were published.

Public: `read`, `FORMATS`, `convert`, `resplit`. Every set becomes a list of
`questions.Question`; how a prediction is compared with an answer (`match`) is a
property of the set. The format is recognised from the content, so that
`--questions=` takes any of these files; a TFDS data set is named
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

# Natural Questions (Lee et al. 2019, section 6): longer answers are dropped.
MAX_ANSWER_TOKENS = 5
# The re-splits of ORQA (Lee et al. 2019, section 6.1): a tenth of the published
# training set becomes `dev`, as the published test set becomes `test`.
_BUCKETS, _DEV_EVERY = 100_000, 10

Path = str | os.PathLike[str]
Record = dict[str, Any]


def read(source: Path, format: str = 'auto') -> list[questions_lib.Question]:
  """Reads a question set.

  Args:
    source: a file, plain or compressed (.gz, .xz), or `tfds:NAME[:SPLIT]`.
    format: one of `FORMATS`, or `auto`: found out from the first record.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is of no known format, or a record of it is wrong; the
      message names file, line or record, and what was expected.
    ImportError: a TFDS data set without the package.
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
    format = _recognise(path)
  if format == 'jsonl':
    return questions_lib.read_questions(path)
  return _checked(_READERS[format](path), name, format)


def resplit(
    questions: Iterable[questions_lib.Question],
) -> tuple[list[questions_lib.Question], list[questions_lib.Question]]:
  """Divides a published training set into train and dev as ORQA did.

  By FarmHash of the question, so it depends on nothing else: of NQ-open 79,168
  and 8,757 questions, of WebQuestions 3,417 and 361, of CuratedTREC 1,353 and
  133 (Lee et al. 2019, table 3).
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
  """Writes a question set as JSON Lines that every command reads.

  Args:
    source: as in `read`.
    output: folder; gets questions.jsonl, or train.jsonl and dev.jsonl.
    format: as in `read`.
    split: apply `resplit`.

  Returns:
    The number of questions of each file.
  """
  questions = read(source, format)
  parts = {'questions': questions}
  if split:
    parts = dict(zip(('train', 'dev'), resplit(questions), strict=True))
  folder = pathlib.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  for name, part in parts.items():
    temporary = folder / f'.tmp-{name}.jsonl'
    with temporary.open('w', encoding='utf-8') as file:
      for question in part:
        values = {
            field: value
            for field, value in dataclasses.asdict(question).items()
            if value is not None
        }
        file.write(json.dumps(values, ensure_ascii=False) + '\n')
    os.replace(temporary, folder / f'{name}.jsonl')
  return {name: len(part) for name, part in parts.items()}


def _checked(
    found: Iterable[tuple[str, Record]], source: str, format: str
) -> list[questions_lib.Question]:
  """Makes questions of records; `where` of each names it in an error."""
  questions = []
  place = 'its first record'
  try:
    for where, record in found:
      try:
        questions.append(questions_lib.parse(record))
      except ValueError as error:
        raise ValueError(f'{source}, {where}: {error}') from error
      place = f'what follows {where}'
  except UnicodeDecodeError as error:
    raise ValueError(f'{source}: {place} is not UTF-8: {error}') from error
  except (KeyError, TypeError, AttributeError) as error:
    why = f'no field {error}' if isinstance(error, KeyError) else error
    raise ValueError(
        f'{source}: {place} is not as {format} has it: {why}.'
    ) from error
  if not questions:
    raise ValueError(f'{source} holds no question with an answer.')
  return questions


# Natural Questions, version 1.0 (JSON Lines; whole pages, or simplified).


def _natural_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  for number, line in questions_lib.numbered_lines(path):
    where = f'line {number}'
    record = _json(line, f'{path}, {where}')
    missing = {'question_text', 'annotations'} - set(record)
    if missing or not {'document_html', 'document_text'} & set(record):
      raise ValueError(
          f'{path}, {where}: not a record of Natural Questions: no field '
          f'{", ".join(sorted(missing)) or "document_html or document_text"}.'
      )
    # In order of appearance, so that the result never changes.
    answers = dict.fromkeys(
        text
        for annotation in record['annotations']
        for span in annotation['short_answers']
        if span['end_token'] - span['start_token'] <= MAX_ANSWER_TOKENS
        and (text := _short_answer(record, span))
    )
    if answers:
      yield where, {
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
  """The text of a piece of HTML, entities resolved, tags dropped."""

  def __init__(self) -> None:
    super().__init__(convert_charrefs=True)
    self.parts: list[str] = []

  def handle_data(self, data: str) -> None:
    self.parts.append(data)


# WebQuestions, TriviaQA, SQuAD, EntityQuestions: one JSON document each.


def _web_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  for number, record in _items(_document(path), path):
    if 'qText' in record:  # As factoid questions (brmson).
      answers = record.get('answers')
      yield number, {'question': record['qText'], 'answers': answers}
    elif 'utterance' in record:  # As published (Berant et al. 2013).
      yield number, {
          'question': record['utterance'],
          'answers': _descriptions(record.get('targetValue') or ''),
      }
    else:
      raise ValueError(f'{path}, {number}: no field qText or utterance.')


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^\s()]+))\)')


def _descriptions(value: str) -> list[str]:
  """Answers of `(list (description "Padmé Amidala") (description 1982))`."""
  return [
      re.sub(r'\\(.)', r'\1', quoted) if quoted else bare
      for quoted, bare in _DESCRIPTION.findall(value)
  ]


def _trivia_qa(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  for where, record in _items(_document(path)['Data'], path):
    answer = record.get('Answer') or {}
    if 'Value' not in answer:
      continue  # The test set is published without answers.
    answers = [answer['Value'], *(answer.get('Aliases') or ())]
    yield where, {
        'question': record.get('Question'),
        'answers': list(dict.fromkeys(answers)),
    }


def _squad(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """A passage's id is its article's title and its number: `Alaska#0`."""
  for article_where, article in _items(_document(path)['data'], path):
    title = article.get('title', '')
    for number, paragraph in enumerate(article['paragraphs']):
      for question in paragraph['qas']:
        answers = [answer['text'] for answer in question['answers']]
        if question.get('is_impossible') or not answers:
          continue  # SQuAD 2.0: nothing to find.
        yield f'{article_where}, question {question.get("id")}', {
            'question': question['question'].strip(),
            'answers': list(dict.fromkeys(answers)),
            'passage_id': f'{title}#{number}',
            'title': title.replace('_', ' '),
        }


def _entity_questions(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """A list of {question, answers}: EntityQuestions, DPR's files."""
  for where, record in _items(_document(path), path):
    yield where, {
        name: record.get(name)
        for name in ('question', 'answers', 'match', 'title')
    }


def _curated_trec(path: pathlib.Path) -> Iterator[tuple[str, Record]]:
  """Tab-separated: an id first, question and regular expression last.

  Rows whose id begins with `lfb` are of another source and were left out by
  ORQA, which gives the published 1,486 and 694 questions.
  """
  for number, line in questions_lib.numbered_lines(path):
    columns = line.decode('utf-8-sig').rstrip('\r\n').split('\t')
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


def _recognise(path: pathlib.Path) -> str:
  """Finds the format out from the name or the first record."""
  if path.name.removesuffix('.gz').removesuffix('.xz').endswith('.tsv'):
    return 'curated_trec'
  if not path.is_file():
    return 'jsonl'  # Whose reader says what is missing.
  _, start = next(questions_lib.numbered_lines(path), (0, b''))
  try:
    record = json.loads(start)
  except ValueError:
    record = None  # A document over several lines.
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


def _json(line: bytes, where: str) -> Record:
  try:
    record = json.loads(line)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON: {error}') from error
  if not isinstance(record, dict):
    raise ValueError(f'{where}: not an object.')
  return record


def _document(path: pathlib.Path) -> Any:
  text = b''.join(line for _, line in questions_lib.numbered_lines(path))
  try:
    return json.loads(text)
  except ValueError as error:
    raise ValueError(
        f'{path}: neither JSON Lines nor one JSON document: {error}'
    ) from error


def _items(
    values: Any, path: pathlib.Path
) -> Iterator[tuple[str, Record]]:
  if not isinstance(values, list):
    raise ValueError(
        f'{path}: expected a list of records, not {str(values)[:80]!r}.'
    )
  for number, record in enumerate(values, 1):
    if not isinstance(record, dict):
      raise ValueError(
          f'{path}, record {number}: {str(record)[:80]!r} is no object.'
      )
    yield f'record {number}', record


def _from_tfds(name: str) -> Iterator[tuple[str, Record]]:
  """Reads natural_questions_open, web_questions, trivia_qa, squad, and any
  data set of {question, answer or answers}, by name or from its folder."""
  try:
    import tensorflow_datasets as tfds
  except ImportError as error:
    raise ImportError(
        f'{name} needs TFDS: pip install tensorflow-datasets'
    ) from error
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
    # A test set without answers, or a question of SQuAD 2.0 that has none.
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
