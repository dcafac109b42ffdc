"""Answer labels: the verdicts of the evaluation, for many passages at once."""

import numpy as np
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import prepare
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import passage_answers
from realm_jax.qa import questions


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  folder = tmp_path_factory.mktemp('answers')
  texts = [
      'Zoë Saldana was born in 1978. The Art of war, and art.',
      'Bart lives in the U.S. Army base; rock-n-roll is here.',
      'Nothing of note: 東京 was mentioned on 1 May 1918 only.',
      'In 1978 the king of the hill met Zoe.',
  ]
  lines = [
      f'{{"id": "{i}", "title": "T{i}", "text": "{text}"}}\n'
      for i, text in enumerate(texts)
  ]
  (folder / 'in.jsonl').write_text(''.join(lines), encoding='utf-8')
  prepare.prepare(
      [str(folder / 'in.jsonl')], folder / 'corpus', vocab_size=300, workers=1
  )
  return corpus_lib.Corpus.open(folder / 'corpus')


_QUESTIONS = [
    questions.Question('?', ('Zoë Saldana',)),
    questions.Question('?', ('art', 'US Army')),
    questions.Question('?', ('king of hill', 'nowhere')),
    questions.Question('?', (r'19\d\d',), match='regex'),
    questions.Question('?', ('1978',)),
    questions.Question('?', ('東京', 'The')),
    questions.Question('?', ('absent',)),
]


@pytest.mark.parametrize('question', _QUESTIONS)
def test_verdicts_are_those_of_the_evaluation(corpus, question):
  found = passage_answers.PassageAnswers(corpus)
  rows = np.array([3, 0, 1, 2, 0])
  expected = [
      answers_lib.has_answer(
          corpus.passage_text(int(row))['text'],
          question.answers,
          question.match,
      )
      for row in rows
  ]
  # In two calls, of which the second knows a part already.
  assert found.has_answer(question, rows[:2]).tolist() == expected[:2]
  assert found.has_answer(question, rows).tolist() == expected


def test_a_verdict_is_found_once(corpus, monkeypatch):
  found = passage_answers.PassageAnswers(corpus)
  found.has_answer(_QUESTIONS[0], np.arange(4))
  monkeypatch.setattr(corpus, 'passage_text', None)
  assert found.has_answer(_QUESTIONS[0], np.array([2, 0])).tolist() == [
      False, True
  ]


@pytest.mark.parametrize('question', _QUESTIONS)
def test_spans_are_wordpieces_of_the_body(corpus, question):
  found = passage_answers.PassageAnswers(corpus)
  for row in range(4):
    text = corpus.passage_text(row)['text'].encode()
    _, body = corpus.passages.title_and_body(row)
    offsets = found.wordpieces(row, text.decode())
    assert len(offsets) == len(body)
    spans = found.spans(question, row)
    assert bool(spans) == found.has_answer(question, np.array([row]))[0]
    for first, last in spans:
      part = text[offsets[first, 0] : offsets[last, 1]].decode()
      assert answers_lib.exact_match(part, question.answers, question.match)


def test_gold_passages_of_a_divided_record_hold_the_answer():
  class Divided:
    texts = ['row 0', 'row 1, R1', 'row 2, R0', 'row 3, R1', 'row 4']

    def record_rows(self, names):
      where = {'a': [0], 'b': [1, 2, 3], 'c': [4]}
      return [np.array(where.get(name, []), np.int64) for name in names]

    def passage_text(self, row):
      return {'id': '', 'text': self.texts[row]}

  def gold(passage_id, answer, match='string'):
    question = questions.Question('?', (answer,), match, passage_id=passage_id)
    (rows,) = passage_answers.gold_rows(Divided(), [question])
    return rows.tolist()

  assert gold('a', 'zz') == [0]
  assert gold('b', 'row 2') == [2]
  assert gold('b', 'R1') == [1, 3]
  assert gold('b', r'R\d$', 'regex') == [1, 2, 3]
  assert gold('b', 'R', 'string') == [1, 2, 3]  # No whole word: in no part.
  assert gold('c', 'zz') == [4]
  assert gold('x', 'zz') == []
  assert gold(None, 'zz') == []
