"""Question files: what is read, and how errors name their place."""

import gzip
import json
import lzma

import pytest

from realm_jax.prepare import world
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
  full, bare = questions_lib.read_questions(path)
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
  assert len(questions_lib.read_questions(str(path))) == 2


def test_reads_the_questions_of_a_world(tmp_path):
  questions = world.generate(seed=0, entities=20).questions
  path = _write(tmp_path / 'q.jsonl', *map(json.dumps, questions))
  read = questions_lib.read_questions(path)
  assert [q.question for q in read] == [q['question'] for q in questions]
  assert sum(bool(q.held_out) for q in read) == sum(
      q['held_out'] for q in questions
  )


@pytest.mark.parametrize(
    'line, message',
    [
        ('', 'an empty line'),
        ('{"question": "q", ', 'malformed JSON'),
        ('[1, 2]', 'a JSON list; each line must be an object'),
        ('{"question": "q"}', r'no field "answers" among \[\'question\'\]'),
        ('{}', 'no field "question"'),
        ('{"question": "", "answers": ["a"]}', '"question" is ""'),
        ('{"question": 7, "answers": ["a"]}', '"question" is 7'),
        ('{"question": "q", "answers": []}', r'"answers" is \[\]'),
        ('{"question": "q", "answers": "a"}', '"answers" is "a"'),
        ('{"question": "q", "answers": ["a", " "]}', 'contains " "'),
        ('{"question": "q", "answers": ["a", 3]}', 'contains 3'),
        ('{"question": "q", "answers": ["\\ud800"]}', r'contains "\\ud800"'),
        (
            '{"question": "q", "answers": ["a"], "match": "fuzzy"}',
            '"match" is "fuzzy"',
        ),
        (
            '{"question": "q", "answers": ["a"], "passage_id": 12}',
            '"passage_id" is 12',
        ),
        (
            '{"question": "q", "answers": ["a"], "held_out": "no"}',
            '"held_out" is "no"',
        ),
    ],
)
def test_errors_name_the_file_the_line_and_what_is_expected(
    tmp_path, line, message
):
  path = _write(tmp_path / 'questions.jsonl', _GOOD, line, _GOOD)
  with pytest.raises(ValueError, match=message) as error:
    questions_lib.read_questions(path)
  assert str(error.value).startswith(f'{path}:2: ')
  assert '"answers": [text, ...]' in str(error.value)


def test_not_utf8_names_its_line(tmp_path):
  path = tmp_path / 'questions.jsonl'
  path.write_bytes(_GOOD.encode() + b'\n{"question": "caf\xe9"}\n')
  with pytest.raises(ValueError, match=':2: not UTF-8: byte 17 of the line is'):
    questions_lib.read_questions(path)


def test_an_empty_file_is_refused(tmp_path):
  path = _write(tmp_path / 'questions.jsonl')
  with pytest.raises(ValueError, match='holds no question'):
    questions_lib.read_questions(path)


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere.jsonl'):
    questions_lib.read_questions(tmp_path / 'nowhere.jsonl')


@pytest.mark.parametrize('ending, module', [('.gz', gzip), ('.xz', lzma)])
def test_a_damaged_file_is_named(tmp_path, ending, module):
  path = tmp_path / f'questions.jsonl{ending}'
  data = module.compress(_GOOD.encode() * 50)
  for damaged in (data[:-9], b'not compressed at all'):
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=f'questions.jsonl{ending}: .*damaged'):
      questions_lib.read_questions(path)
