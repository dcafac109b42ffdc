"""Formats of question sets: the fields of their records, and of columns.

A row of `FORMATS` for each published set. `columns` finds the meaning of
columns without names. `question_sets` reads the files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import html.parser
import re
from typing import Any

from realm_jax.qa import answers as answers_lib
from realm_jax.qa import questions as questions_lib

# Longer answers of Natural Questions are dropped (Lee et al. 2019, section 6).
MAX_ANSWER_TOKENS = 5
Record = dict[str, Any]

# Usual names of the fields of a question; see `fields.NAMES`.
NAMES = {
    'question': ('question query questiontext querytext', 'text input'),
    'answers': ('answers answer possibleanswers',),
    'id': ('id qid queryid questionid',),
    'passage_id': (
        'passageid passageids psgid',
        'docid docids pid goldpassageid goldpassageids goldids',
    ),
    'grades': ('grades',),
    'match': ('match',),
    'title': ('title documenttitle',),
    'held_out': ('heldout',),
}
_PATTERN = re.compile(r'[\\|*+?^${}()\[\]]')  # More than a name or a number.
_TREC_ID = re.compile(r'(trec|lfb)\d+', re.IGNORECASE)
_ID = re.compile(r'[\w.:#/-]+', re.ASCII)


@dataclasses.dataclass(frozen=True)
class Format:
  """How the records of a published set become records of `questions.parse`.

  about: its name in the log.
  marks: fields by which a record is recognised; `a|b`: one of them, `a.b`: a
    field of an object.
  fields: path of each field, as in --fields; `output.answer` enters the lists
    on its way. Empty: the usual names.
  convert: yields the questions of a record with their place in it, in the
    place of `fields`.
  match: of all its questions; None: as the records say.
  """

  about: str
  marks: str = ''
  fields: str = ''
  convert: Callable[[Record], Iterator[tuple[str, Record]]] | None = None
  match: str | None = None

  def missing(self, record: Record) -> list[str]:
    """Returns the marks that a record lacks."""
    return [
        mark
        for mark in self.marks.split()
        if not any(_has(record, path) for path in mark.split('|'))
    ]


def _has(record: Record, path: str) -> bool:
  *outer, name = path.split('.')
  return any(
      isinstance(part, dict) and name in part
      for parts in values_at(record, outer, lenient=True)
      for part in (parts if isinstance(parts, list) else [parts])
  )


def _natural_questions(record: Record) -> Iterator[tuple[str, Record]]:
  """Natural Questions 1.0 with whole pages, or simplified."""
  # A dict keeps the order of appearance.
  answers = dict.fromkeys(
      text
      for annotation in record['annotations']
      for span in annotation['short_answers']
      if span['end_token'] - span['start_token'] <= MAX_ANSWER_TOKENS
      and (text := _short_answer(record, span))
  )
  if answers:
    yield '', {
        'id': record.get('example_id'),
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


_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^\s()]+))\)')


def _web_questions(record: Record) -> Iterator[tuple[str, Record]]:
  """WebQuestions as published (Berant et al. 2013) or by brmson.

  The published answers are `(list (description "Padmé Amidala") (description
  1982))`.
  """
  answers = record.get('answers') or [
      re.sub(r'\\(.)', r'\1', quoted) if quoted else bare
      for quoted, bare in _DESCRIPTION.findall(record.get('targetValue') or '')
  ]
  question = record.get('qText', record.get('utterance'))
  yield '', {'id': record.get('qId'), 'question': question, 'answers': answers}


def _trivia_qa(record: Record) -> Iterator[tuple[str, Record]]:
  """TriviaQA: answers are a value and its aliases; none in the test set."""
  if _has(record, 'Answer.Value'):
    yield '', {
        'id': record.get('QuestionId'),
        'question': record['Question'],
        'answers': record['Answer'],
    }


def _squad(article: Record) -> Iterator[tuple[str, Record]]:
  """SQuAD 1.1 and 2.0; passage ids are TITLE#NUMBER, such as `Alaska#0`."""
  title = article.get('title', '')
  for number, paragraph in enumerate(article['paragraphs']):
    for question in paragraph['qas']:
      texts = [answer['text'] for answer in question.get('answers', ())]
      if question.get('is_impossible') or question.get('answers') == []:
        continue  # An unanswerable question of SQuAD 2.0.
      yield f', question {question.get("id")}', {
          'id': question.get('id'),
          'question': question['question'].strip(),
          'answers': {'text': texts},
          'passage_id': f'{title}#{number}',
          'title': title.replace('_', ' '),
      }


_ANY = Format('questions')
# The published formats; the first whose marks a record has is taken.
FORMATS: dict[str, Format] = {
    'natural_questions': Format(
        'Natural Questions',
        'question_text annotations document_html|document_text',
        convert=_natural_questions,
    ),
    'squad': Format('SQuAD', 'paragraphs.qas', convert=_squad),
    'trivia_qa': Format(
        'TriviaQA', 'Question Answer.Value', convert=_trivia_qa
    ),
    'web_questions': Format(
        'WebQuestions', 'qText|utterance', convert=_web_questions
    ),
    'dpr': Format(
        'DPR',
        'question positive_ctxs',
        'passage_id:positive_ctxs.passage_id|psg_id',
    ),
    'tevatron': Format(
        'Tevatron, MIRACL or Mr. TyDi',
        'query positive_passages',
        'id:query_id,question:query,passage_id:positive_passages.docid',
    ),
    'kilt': Format(
        'KILT',
        'input output.answer|output.provenance',
        'question:input,answers:output.answer,title:output.provenance.title,'
        'passage_id:output.provenance.wikipedia_id',
    ),
    'popqa': Format('PopQA', 'possible_answers', 'answers:possible_answers'),
    'beir': Format(
        'queries of BEIR',
        '_id text',
        'id:_id,question:text,answers:metadata.answers,match:metadata.match',
    ),
    'curated_trec': Format('CuratedTREC', match='regex'),
    'entity_questions': _ANY,
    'jsonl': _ANY,
}


def detect(record: Record) -> Format:
  """Returns the format of a set from its first record."""
  for found in FORMATS.values():
    if found.marks and not found.missing(record):
      return found
  return _ANY


def columns(
    source: str,
    format: str,
    records: Sequence[tuple[str, Record]],
    given: Mapping[str, str],
) -> tuple[dict[str, str], str, str | None]:
  """Finds the meaning of columns without names from the values of all rows.

  Returns the column of each field, what was found, and `match`.
  """
  if given:
    return dict(given), 'columns as given', FORMATS.get(format, _ANY).match
  if not records:
    raise ValueError(f'{source} holds no question.')
  columns = [*records[0][1]]
  values = [[record[c] for _, record in records] for c in columns]
  last, firsts = columns[-1], values[0]
  are_lists = [questions_lib.is_list(value) for value in values[-1]]
  is_id = all(map(_ID.fullmatch, firsts)) and len({*firsts}) == len(firsts)
  words = [any(map(answers_lib.has_words, column)) for column in values]
  first = {'id': columns[0]} if is_id and len(columns) > 1 else {}
  pair = {'question': columns[max(len(columns) - 2, 0)], 'answers': last}
  if format == 'curated_trec' or (
      len(columns) > 2 and all(map(_TREC_ID.match, firsts))
  ):
    if format == 'auto' or len(columns) > 2:
      pair = {'id': columns[0], **pair}
    if len(columns) > 1:
      return pair, FORMATS['curated_trec'].about, 'regex'
  if len(columns) == 2 and first and words[1] and not all(are_lists):
    return {**first, 'question': last}, 'an id and a question', None
  if len(columns) > 1 and all(are_lists):
    return {**(first if len(columns) > 2 else {}), **pair}, (
        'a question and a list of answers'
    ), None
  if any(are_lists) and not all(are_lists):
    place = records[are_lists.index(False)][0]
    raise ValueError(
        f'{place}: the last column is no list, as it is in other rows.'
    )
  patterns = [i for i, v in enumerate(values[-1]) if _PATTERN.search(v)]
  if (
      len(columns) == 2 and words[0] or len(columns) > 2 and first
  ) and not patterns:
    if len(columns) == 2:
      first = {}
    return {**first, **pair}, 'a question and an answer as text', None
  why = 'the meaning of the columns is not clear'
  if patterns:
    place, record = records[patterns[0]]
    why = (
        f'the answer {record[last]!r} of {place.rpartition("/")[2]} may be text'
        ' or a regular expression'
    )
  names = ','.join(f'{field}:{column}' for field, column in pair.items())
  raise ValueError(
      f'{source}: {len(columns)} column(s) without names, and {why}. The first'
      f' row is {[*records[0][1].values()]}. Name them: --fields={names} for'
      ' questions with answers as text, --fields=id:1,question:2 for ids and'
      ' questions, --format=curated_trec for an id, the question and a regular'
      ' expression.'
  )


def with_fields(
    rows: Iterable[tuple[str, Record]],
    names: Mapping[str, str],
    match: str | None,
) -> Iterator[tuple[str, Record]]:
  """Yields the records with the names of `questions.parse`."""
  for place, record in rows:
    found: Record = {} if match is None else {'match': match}
    for field, path in names.items():
      values = values_at(record, path.split('.'))
      if field in ('passage_id', 'grades') or '.' in path:
        values = [
            item
            for value in values
            for item in (value if isinstance(value, list) else [value])
        ]
        many = field in ('answers', 'passage_id', 'grades')
        found[field] = values if many else next(iter(values), None)
      elif values:
        found[field] = values[0]
    if isinstance(found.get('held_out'), str):  # In CSV and TSV.
      word = found['held_out'].strip().lower()
      found['held_out'] = {'true': True, 'false': False}.get(word, word or None)
    yield place, {
        field: value
        for field, value in found.items()
        if field == 'question' or value not in (None, '')
    }


def values_at(
    value: Any, path: Sequence[str], lenient: bool = False
) -> list[Any]:
  """Returns the values at a path; enters lists on the way."""
  values = [value]
  for name in path:
    found = []
    for part in values:
      for item in part if isinstance(part, list) else [part]:
        if not isinstance(item, dict):
          if lenient:
            continue
          raise TypeError(
              f'{str(item)[:40]!r} instead of an object with {name!r}'
          )
        keys = [key for key in name.split('|') if item.get(key) is not None]
        found += [item[keys[0]]] if keys else []
    values = found
  return values
