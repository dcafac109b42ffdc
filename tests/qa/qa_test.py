"""Question files: what is read, and how errors name their place."""

import gzip
import json
import lzma

import pytest

from realm_jax.prepare import world
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib


def _write(path, *lines):
  path.write_bytes(b''.join(line.encode() + b'\n' for line in lines))
  return path


_GOOD = json.dumps({'question': 'Where is it?', 'answers': ['here']})


def test_reads_all_fields_and_ignores_others(tmp_path):
  path = _write(
      tmp_path / 'questions.jsonl',
      json.dumps({
          'question': 'Which pet was owned by Névek?',
          'answers': ['toad', 'a toad'],
          'match': 'regex',
          'passage_id': 'person-0001#2',
          'title': 'Névek',
          'held_out': True,
          'difficulty': 3,
      }),
      _GOOD,
  )
  full, bare = question_sets.read(path)
  assert full == questions_lib.Question(
      question='Which pet was owned by Névek?',
      answers=('toad', 'a toad'),
      match='regex',
      passage_id='person-0001#2',
      held_out=True,
      title='Névek',
  )
  assert bare == questions_lib.Question('Where is it?', ('here',), 'string')
  assert bare.passage_id is None
  assert bare.held_out is None
  assert bare.title is None


@pytest.mark.parametrize(
    'ending, opener', [('', open), ('.gz', gzip.open), ('.xz', lzma.open)]
)
def test_reads_compressed_files(tmp_path, ending, opener):
  path = tmp_path / f'questions.jsonl{ending}'
  with opener(path, 'wb') as file:
    file.write(b'\xef\xbb\xbf' + _GOOD.encode() + b'\r\n' + _GOOD.encode())
  assert len(question_sets.read(str(path))) == 2


def test_reads_the_questions_of_a_world(tmp_path):
  questions = world.generate(seed=0, entities=20).questions
  path = _write(tmp_path / 'q.jsonl', *map(json.dumps, questions))
  read = question_sets.read(path)
  assert [q.question for q in read] == [q['question'] for q in questions]
  assert sum(bool(q.held_out) for q in read) == sum(
      q['held_out'] for q in questions
  )


@pytest.mark.parametrize(
    'line, message',
    [
        ('{"question": "q", ', 'malformed JSON'),
        ('[1, 2]', 'a JSON list; each line must be an object'),
        ('{}', 'no field "question"'),
        ('{"question": " ", "answers": ["a"]}', '"question" is " "'),
        ('{"question": 7, "answers": ["a"]}', '"question" is 7'),
        ('{"question": "q", "answers": {"x": 1}}', r'"answers" is {"x": 1}'),
        ('{"question": "q", "answers": "[1 2"}{"', 'malformed JSON'),
        (
            """{"question": "q", "answers": "['a' 'b']"}""",
            "'b'.*no list of JSON or Python",
        ),
        ('{"question": "q", "answers": "[not, a list]"}', 'no list of JSON'),
        ('{"question": "q", "answers": ["a", " "]}', 'contains " "'),
        ('{"question": "q", "answers": ["a", true]}', 'contains true'),
        ('{"question": "q", "answers": ["a", true]}', 'contains true'),
        ('{"question": "q", "id": ["a", "b"]}', r'"id" is \["a", "b"\]'),
        ('{"question": "q", "id": 1.5}', '"id" is 1.5'),
        (
            '{"question": "q", "passage_id": ["a"], "grades": [1, 2]}',
            'each of the 1 gold',
        ),
        (
            '{"question": "q", "passage_id": "a", "grades": [0]}',
            'a positive integer',
        ),
        ('{"question": "q", "answers": ["\\ud800"]}', r'contains "\\ud800"'),
        (
            '{"question": "q", "answers": ["a"], "match": "fuzzy"}',
            '"match" is "fuzzy"',
        ),
        (
            '{"question": "q", "answers": ["a"], "passage_id": 1.5}',
            r'"passage_id" is \[1.5\]',
        ),
        (
            '{"question": "q", "answers": ["a"], "held_out": "no"}',
            '"held_out" is "no"',
        ),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path, line, message):
  path = _write(tmp_path / 'questions.jsonl', _GOOD, line, _GOOD)
  with pytest.raises(ValueError, match=message) as error:
    question_sets.read(path)
  assert str(error.value).startswith(f'{path}:2: ')


@pytest.mark.parametrize(
    'answers, expected',
    [
        (None, ()),
        ([], ()),
        ('Quorra', ('Quorra',)),
        (1978, ('1978',)),
        (['a', 3, 'a'], ('a', '3', 'a')),
        ('["zoo keeper", "it\'s"]', ('zoo keeper', "it's")),
        ("""['a', "b's", 'c']""", ('a', "b's", 'c')),
        ('[31, 32]', ('31', '32')),
        ({'text': ['a', 'a'], 'answer_start': [0, 9]}, ('a',)),
        ({'value': 'a', 'aliases': ['b', 'c']}, ('a', 'b', 'c')),
        ([{'text': 'a'}, {'answer': 'b'}], ('a', 'b')),
    ],
)
def test_answers_in_the_forms_of_data_sets(answers, expected):
  record = {'question': 'q', 'answers': answers}
  assert questions_lib.parse(record).answers == expected


def test_a_pattern_is_no_list():
  record = {'question': 'q', 'answers': '[0-9]+ [a-z]', 'match': 'regex'}
  assert questions_lib.parse(record).answers == ('[0-9]+ [a-z]',)


def test_gold_passages_are_one_or_several():
  record = {'question': 'q', 'id': 7, 'passage_id': [12, 'b', 'b', '']}
  question = questions_lib.parse(record)
  assert (question.id, question.passage_id) == ('7', ('12', 'b'))
  assert question.gold == {'12': 1, 'b': 1}
  record = {'question': 'q', 'passage_id': ['a', 'b'], 'grades': [2, 1]}
  assert questions_lib.parse(record).gold == {'a': 2, 'b': 1}
  record = {'question': 'q', 'passage_id': ['a']}
  assert questions_lib.parse(record).passage_id == 'a'
  assert questions_lib.Question('q', ()).gold == {}


def test_blank_lines_are_skipped(tmp_path):
  path = _write(tmp_path / 'questions.jsonl', _GOOD, '', _GOOD, '')
  assert len(question_sets.read(path)) == 2


def test_not_utf8_names_its_line(tmp_path):
  path = tmp_path / 'questions.jsonl'
  path.write_bytes(_GOOD.encode() + b'\n{"question": "caf\xe9"}\n')
  with pytest.raises(ValueError, match=':2: not UTF-8: byte 17 of the line is'):
    question_sets.read(path)


def test_an_empty_file_is_refused(tmp_path):
  path = _write(tmp_path / 'questions.jsonl')
  with pytest.raises(ValueError, match='holds no question'):
    question_sets.read(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.jsonl'):
    question_sets.read(tmp_path / 'nowhere.jsonl')


@pytest.mark.parametrize('ending, module', [('.gz', gzip), ('.xz', lzma)])
def test_a_damaged_file_is_named(tmp_path, ending, module):
  path = tmp_path / f'questions.jsonl{ending}'
  data = module.compress(_GOOD.encode() * 50)
  for damaged in (data[:-9], b'\x01' + data):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f'questions.jsonl{ending}: .*damaged'):
      question_sets.read(path)
