"""Answer labels: the verdicts of the evaluation, for many passages at once."""

import numpy as np
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import prepare
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_table
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
  found = question_table.PassageAnswers(corpus)
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
  found = question_table.PassageAnswers(corpus)
  found.has_answer(_QUESTIONS[0], np.arange(4))
  monkeypatch.setattr(corpus, 'passage_text', None)
  assert found.has_answer(_QUESTIONS[0], np.array([2, 0])).tolist() == [
      False, True
  ]


@pytest.mark.parametrize('question', _QUESTIONS)
def test_spans_are_wordpieces_of_the_body(corpus, question):
  found = question_table.PassageAnswers(corpus)
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

  def gold(passage_id, answer, match='string', grades=()):
    question = questions.Question(
        '?', (answer,) if answer else (), match, passage_id, grades=grades
    )
    found = question_table.find_gold(Divided(), [question])
    if grades:
      return dict(zip(found.rows[0].tolist(), found.grades[0], strict=True))
    return found.rows[0].tolist()

  assert gold('a', 'zz') == [0]
  assert gold('b', 'row 2') == [2]
  assert gold('b', 'R1') == [1, 3]
  assert gold('b', r'R\d$', 'regex') == [1, 2, 3]
  assert gold('b', 'R', 'string') == [1, 2, 3]  # No whole word: in no part.
  assert gold('c', 'zz') == [4]
  assert gold('x', 'zz') == []
  assert gold(None, 'zz') == []
  assert gold('b', None) == [1, 2, 3]
  assert gold(('c', 'x', 'b'), 'row 2') == [2, 4]
  assert gold(('c', 'b', 'a'), 'R0', grades=(3, 2, 1)) == {0: 1, 2: 2, 4: 3}


def test_unknown_gold_passages_are_counted_and_named(caplog):
  class Small:
    directory = 'DIR'

    def record_rows(self, names):
      return [np.arange(1 if name == 'a' else 0) for name in names]

  found = question_table.find_gold(
      Small(),
      [
          questions.Question('?', (), passage_id=('a', 'x', 'y')),
          questions.Question('?', (), passage_id='x'),
          questions.Question('?', ()),
      ],
  )
  assert found.unknown == [{'x': 1, 'y': 1}, {'x': 1}, {}]
  assert found.about_unknown() == {
      'ids': 2, 'questions': 2, 'first': ['x', 'y']
  }
  found.warn(Small(), 'So.')
  assert caplog.messages == [
      "2 gold passages of 2 of the 3 questions are not in the corpus DIR: 'x',"
      " 'y'. So."
  ]


# Probes of DPR's rule: text, answer, whether the text holds it. The tokens are
# runs of letters, numbers and marks, and all other single characters.
_DPR_PROBES = [
    ('The cup final ended 3-1.', '31', False),
    ('The cup final ended 3-1.', '3-1', True),
    ('The cup final ended 3 - 1.', '3-1', True),
    ('He scored 31 goals.', '31', True),
    ('The rock-n-roll years.', 'rock n roll', False),
    ('The rock-n-roll years.', 'rock', True),
    ('A rock\u2010roll', 'rock-roll', False),  # Another hyphen.
    ("Paris's mayor", 'Paris', True),
    ("Paris's mayor", 'Pariss', False),
    ("O'Neill wrote it", 'O Neill', False),
    ("O'Neill wrote it", "o'neill", True),
    ('O\u2019Neill wrote it', "O'Neill", False),
    ('the U.S. Army', 'US', False),
    ('the U.S. Army', 'U.S.', True),
    ('the U.S. Army', 'U.S', True),
    ('Bart paints', 'art', False),
    ('the art of war', 'The Art', True),
    ('king of the hill', 'king of hill', False),  # Articles count.
    ('Zoe\u0308 and Zo\u00eb', 'ZO\u00cb', True),
    ('Zo\u00eb came', 'Zoe', False),
    ('it costs $5 today', '5', True),
    ('it costs $5 today', '$5', True),
    ('it costs $5 today', '$ 5', True),
    ('it costs \u20ac5 today', '$5', False),
    ('about 6% of it', '6', True),
    ('about 6 percent', '6%', False),
    ('1,000 men', '1000', False),
    ('1,000 men', '1,000', True),
    ('1,000 men', '000', True),
    ('in the 1990s', '1990', False),
    ('Stra\u00dfe', 'Strasse', False),
    ('STRA\u1e9eE', 'stra\u00dfe', True),
    ('\uff21\uff22\uff23', 'ABC', False),  # Full-width letters.
    ('\uff21\uff22\uff23', '\uff41\uff42\uff43', True),
    ('the \ufb01rst', 'first', False),  # NFD keeps ligatures.
    ('H\u2082O and CO2', 'CO2', True),
    ('well... who?', '?', True),
    ('well... who?', '...', True),
    ('well... who?', '....', False),
    ('well', '!', False),
    ('C++ code', 'C++', True),
    ('C code', 'C++', False),
    ('snake_case', 'case', True),
    ('soft\u00adware', 'software', False),  # A soft hyphen is a control.
    ('soft\u00adware', 'soft ware', True),
    ('New\u00a0York\u3000City', 'new york\n city', True),
    ('anything', '', True),  # As published: nothing is in everything.
    ('', '', True),
    ('', 'x', False),
    ('\u039f\u0394\u039f\u03a3.\u0391', '\u03bf\u03b4\u03bf\u03c2', True),
    ('\uc11c\uc6b8\uc740 \ud070', '\uc11c\uc6b8', False),  # Korean has blanks.
]


@pytest.mark.parametrize('text, answer, expected', _DPR_PROBES)
def test_the_rule_of_dpr(text, answer, expected):
  assert answers_lib.has_answer(text, [answer], 'dpr') is expected
  assert answers_lib.has_answer(text, [], 'dpr') is False


@pytest.mark.parametrize(
    'text, answer, expected',
    [
        ('首都は東京都である。', '東京都', True),
        ('首都は東京都である。', '京都府', False),
        ('昭和64年1月7日まで', '1月7日', True),
        ('昭和64年11月7日まで', '1月7日', False),  # The number is longer.
        ('昭和64年まで', '64', True),
        ('ここはカフェABCです', 'abc', True),
        ('ここはカフェABCDです', 'abc', False),
        ('がっこう', 'か', False),  # A letter has all its marks.
        ('データ通信', 'データ', True),
        ('กรุงเทพมหานครเป็นเมืองหลวง', 'กรุงเทพมหานคร', True),
        ('กี่คน', 'ก', False),
        ('ພາສາລາວແມ່ນພາສາ', 'ພາສາລາວ', True),
        ('ភ្នំពេញជារាជធានី', 'ភ្នំពេញ', True),
        ('ရန်ကုန်မြို့သည်', 'ရန်ကုန်', True),
        ('長江，全長6300公里', '6300公里', True),
    ],
)
@pytest.mark.parametrize('rule', ['dpr', 'squad'])
def test_answers_in_scripts_without_blanks(rule, text, answer, expected):
  assert answers_lib.has_answer(text, [answer], rule) is expected


def test_the_rule_is_named_if_it_is_unknown():
  with pytest.raises(ValueError, match="'squad', 'dpr', 'regex'.*not 'fuzzy'"):
    answers_lib.has_answer('x', ['x'], 'fuzzy')
  with pytest.raises(ValueError, match="not 'dpr'"):
    answers_lib.exact_match('x', ['x'], 'dpr')
  assert answers_lib.has_answer('the 3-1', ['31'], 'squad')
  assert not answers_lib.has_answer('the 3-1', ['31'], 'dpr')
