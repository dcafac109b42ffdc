"""Published question sets: every format, its traps and its errors."""

import gzip
import json

import pytest
import tensorflow_datasets as tfds

from realm_jax.qa import question_sets
from realm_jax.qa import questions


def _json(path, value):
  path.write_text(json.dumps(value), encoding='utf-8')
  return path


def _lines(path, *records):
  text = '\n'.join(json.dumps(record) for record in records)
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(text.encode()))
  else:
    path.write_text(text, encoding='utf-8')
  return path


def test_nq_open_says_answer_for_answers(tmp_path):
  path = _lines(
      tmp_path / 'NQ-open.dev.jsonl',
      {'question': 'when did it end', 'answer': ['1918', 'November 1918']},
  )
  assert question_sets.read(path) == [
      questions.Question('when did it end', ('1918', 'November 1918'))
  ]


def _span(page, text, tokens):
  """A short answer by bytes of the page; its number of tokens is said."""
  start = page.encode().index(text.encode())
  return {
      'start_byte': start,
      'end_byte': start + len(text.encode()),
      'start_token': 10,
      'end_token': 10 + tokens,
  }


def test_natural_questions_are_filtered_as_published(tmp_path):
  page = '<p>Café <b>Zoë &amp; Söhne</b> opened in May 1918 , they say .</p>'
  records = [
      {
          'question_text': 'whose café',
          'document_title': 'Café',
          'document_html': page,
          'annotations': [
              # Two annotators agree: one answer. The tag is dropped.
              {'short_answers': [_span(page, '<b>Zoë &amp; Söhne</b>', 5)]},
              {'short_answers': [_span(page, 'Zoë &amp; Söhne', 3)]},
              {'short_answers': [_span(page, 'May 1918 , they say .', 6)]},
          ],
      },
      {
          'question_text': 'nothing short enough',
          'document_html': page,
          'annotations': [{'short_answers': []}],
      },
  ]
  path = _lines(tmp_path / 'nq-dev-00.jsonl.gz', *records)
  assert question_sets.read(path) == [
      questions.Question('whose café', ('Zoë & Söhne',), title='Café')
  ]


def test_simplified_natural_questions_give_the_same_answers(tmp_path):
  record = {
      'question_text': 'who',
      'document_text': '<P> It was Ada <B> Lovelace </B> . </P>',
      'annotations': [
          {'short_answers': [{'start_token': 3, 'end_token': 7}]}
      ],
  }
  path = _lines(tmp_path / 'v1.0-simplified.jsonl', record)
  assert question_sets.read(path)[0].answers == ('Ada Lovelace',)


def test_web_questions_in_both_published_forms(tmp_path):
  factoid = _json(
      tmp_path / 'test.json',
      [{'qId': 'wqs1', 'qText': 'what is it?', 'answers': ['this', 'that']}],
  )
  original = _json(
      tmp_path / 'webquestions.json',
      [{
          'utterance': 'who is she?',
          'targetValue': (
              '(list (description "Padmé \\"P\\" Amidala") (description 1982))'
          ),
      }],
  )
  assert question_sets.read(factoid)[0].answers == ('this', 'that')
  assert question_sets.read(original)[0].answers == (
      'Padmé "P" Amidala', '1982'
  )


def test_curated_trec_is_matched_by_regular_expressions(tmp_path):
  path = tmp_path / 'large2470-test.tsv'
  path.write_text(
      'trec1\tfact\tWhen is it?\tSept?(ember)?|Feb(ruary)?\n'
      'lfb000007\tfact\tNot of TREC?\tno\n',
      encoding='utf-8',
  )
  assert question_sets.read(path) == [
      questions.Question(
          'When is it?', ('Sept?(ember)?|Feb(ruary)?',), match='regex',
          id='trec1',
      )
  ]
  path.write_text('trec1\tWhen is it?\nMay\n', encoding='utf-8')
  with pytest.raises(ValueError, match='tsv:2: 1 columns; expected are 2'):
    question_sets.read(path)


def test_trivia_qa_takes_the_aliases(tmp_path):
  path = _json(
      tmp_path / 'unfiltered-web-dev.json',
      {
          'Data': [
              {
                  'Question': 'The VS-300 was a type of what?',
                  'Answer': {'Value': 'Helicopter', 'Aliases': ['Chopper']},
              },
              {'Question': 'of the test set, without an answer'},
          ]
      },
  )
  (question,) = question_sets.read(path)
  assert question.answers == ('Helicopter', 'Chopper')


def test_squad_as_open_questions(tmp_path):
  answerable = {'id': 'q1', 'question': ' Where? ', 'answers': [
      {'text': 'Juneau', 'answer_start': 0},
      {'text': 'Juneau', 'answer_start': 9},
  ]}
  unanswerable = {
      'id': 'q2', 'question': 'Why?', 'answers': [], 'is_impossible': True
  }
  path = _json(
      tmp_path / 'dev-v2.0.json',
      {
          'version': 'v2.0',
          'data': [{
              'title': 'State_Capitals',
              'paragraphs': [
                  {'context': '...', 'qas': [unanswerable]},
                  {'context': '...', 'qas': [answerable]},
              ],
          }],
      },
  )
  assert question_sets.read(path) == [
      questions.Question(
          'Where?', ('Juneau',), passage_id='State_Capitals#1',
          title='State Capitals', id='q1',
      )
  ]


def test_entity_questions_over_several_lines(tmp_path):
  path = tmp_path / 'P106.test.json'
  records = [{'question': 'What does Satie do?', 'answers': ['composer']}]
  path.write_text(json.dumps(records, indent=2), encoding='utf-8')
  assert question_sets.read(path)[0].answers == ('composer',)


def test_a_wrong_record_is_named(tmp_path):
  path = _json(
      tmp_path / 'P106.json',
      [
          {'question': 'a?', 'answers': ['x']},
          {'question': 'b?', 'answers': [' ']},
      ],
  )
  with pytest.raises(ValueError, match=r'P106.json:1: "answers" contains " "'):
    question_sets.read(path)
  for text, name, message in (
      ('{"data": [{"title": "A"}]}', 'squad', "not SQuAD.*'paragraphs.qas'"),
      ('{"data": 3}', 'squad', '"data" is \'3\'; expected is a list'),
      ('{"x": 1}', 'trivia_qa', "not TriviaQA: no field 'Question'"),
      (
          '{"question_text": "q", "document_text": "d", "annotations": null}',
          'natural_questions',
          'first record: not as in Natural Questions',
      ),
  ):
    (tmp_path / 'wrong.json').write_text(text)
    with pytest.raises(ValueError, match=f'wrong.json.*{message}'):
      question_sets.read(tmp_path / 'wrong.json', name)
  (tmp_path / 'wrong.tsv').write_bytes(b'1\t\xff\tx\n')
  with pytest.raises(ValueError, match='wrong.tsv:1: not UTF-8'):
    question_sets.read(tmp_path / 'wrong.tsv')
  with pytest.raises(FileNotFoundError, match='nowhere'):
    question_sets.read(tmp_path / 'nowhere.json')
  path.write_text('{"question": ', encoding='utf-8')
  with pytest.raises(ValueError, match='P106.json:1: malformed JSON'):
    question_sets.read(path)
  with pytest.raises(ValueError, match="format 'xml': must be"):
    question_sets.read(path, 'xml')


@pytest.mark.parametrize(
    'features, example, expected',
    [
        (
            {
                'question': tfds.features.Text(),
                'answer': tfds.features.Sequence(tfds.features.Text()),
            },
            {'question': 'who', 'answer': ['a', 'b']},
            ('a', 'b'),
        ),
        (
            {
                'question': tfds.features.Text(),
                'answer': tfds.features.FeaturesDict({
                    'value': tfds.features.Text(),
                    'aliases': tfds.features.Sequence(tfds.features.Text()),
                }),
            },
            {'question': 'who', 'answer': {'value': 'a', 'aliases': ['c']}},
            ('a', 'c'),
        ),
    ],
)
def test_tfds_sets_are_read_by_their_features(
    tmp_path, features, example, expected
):
  directory = tmp_path / 'tfds'
  directory.mkdir()
  features = tfds.features.FeaturesDict(features)
  writer = tfds.core.SequentialWriter(
      tfds.core.DatasetInfo(
          builder=tfds.core.DatasetIdentity(
              name='questions', version='1.0.0', data_dir=str(directory),
              module_name='',
          ),
          features=features,
      ),
      10,
      file_format='array_record',
  )
  writer.initialize_splits(['test'])
  writer.add_examples({'test': [example]})
  writer.close_all()
  (question,) = question_sets.read(f'tfds:{directory}:test')
  assert question.answers == expected
  with pytest.raises(ValueError, match="no split 'dev'; it has test"):
    question_sets.read(f'tfds:{directory}:dev')


def test_the_published_re_split(tmp_path):
  """Buckets of two questions are published (reference implementation)."""
  dev = questions.Question('who was vincent van gogh inspired by?', ('Millet',))
  train = questions.Question('what type of fuel goes in a zippo', ('butane',))
  assert question_sets.resplit([train, dev]) == ([train], [dev])
  path = _lines(
      tmp_path / 'train.jsonl',
      {'question': dev.question, 'answers': ['Millet']},
      {'question': train.question, 'answers': ['Butan, naïve']},
  )
  counts = question_sets.convert(path, tmp_path / 'out', split=True)
  assert counts == {'train': 1, 'dev': 1}
  assert question_sets.read(tmp_path / 'out' / 'train.jsonl')[0].answers == (
      'Butan, naïve',
  )


def test_a_dataset_of_hugging_face_by_name(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  datasets = pytest.importorskip('datasets')
  datasets.disable_progress_bars()
  rows = [
      {'qid': 7, 'query': 'who?', 'answers': {'text': ['Ada', 'A.']}, 'x': 1},
      {'qid': 8, 'query': 'where?', 'answers': {'text': ['York']}, 'x': 2},
  ]
  datasets.Dataset.from_list(rows).save_to_disk(tmp_path / 'saved')
  found = question_sets.read(f'hf:{tmp_path / "saved"}')
  assert [(q.id, q.question, q.answers) for q in found] == [
      ('7', 'who?', ('Ada', 'A.')),
      ('8', 'where?', ('York',)),
  ]
  with pytest.raises(ValueError, match='not of the form hf:NAME'):
    question_sets.read('hf:a:b:c:d')
