"""Answer matching: tricky strings, and properties that hold for any string."""

import time
import unicodedata
import warnings

from hypothesis import given
from hypothesis import strategies as st
import pytest

from realm_jax.qa import answers as answers_lib

# Hard to normalise: marks, punctuation, articles, odd spaces.
_TEXTS = st.text(
    alphabet='aAnthe .,-\'"$_5\t\n\u00e9\u0301\u2019\u00a0\u0130\u6771',
    max_size=24,
)


@pytest.mark.parametrize(
    'text, expected',
    [
        ('The Beatles!', 'beatles'),
        ('a  an\tthe\n', ''),
        ('U.S.', 'us'),
        ('theatre another', 'theatre another'),
        # Punctuation goes first: this `a` was no word of its own.
        ('a.m.', 'am'),
        ('the-end', 'theend'),
        ("rock 'n' roll", 'rock n roll'),
        ('Caf\u00e9', 'cafe\u0301'),
        # Officially so: to \b, a combining mark is no part of the word.
        ('\u00c1 b', '\u0301 b'),
        ('$1,000.50', '100050'),
        ('snake_case', 'snakecase'),
        # Only ASCII punctuation counts.
        ('\u201cyes\u201d', '\u201cyes\u201d'),
        ('a\u2013b', '\u2013b'),
        ('\u00a0x\u3000y ', 'x y'),
        ('', ''),
    ],
)
def test_normalize_answer(text, expected):
  assert answers_lib.normalize_answer(text) == expected


@given(_TEXTS)
def test_normalisation_ignores_case_form_and_space(text):
  plain = answers_lib.normalize_answer(text)
  composed = unicodedata.normalize('NFC', text)
  assert answers_lib.normalize_answer(composed) == plain
  assert answers_lib.normalize_answer(f'  {text}\n') == plain
  assert plain == ' '.join(plain.split())
  assert not set(plain) & set('.,-\'"$_!')


@pytest.mark.parametrize(
    'prediction, answers, expected',
    [
        ('the Eiffel Tower.', ['Eiffel tower'], True),
        ('Eiffel', ['Eiffel tower'], False),
        ('2', ['one', 'Two', '2'], True),
        ('anything', [], False),
        ('', ['The'], True),  # Officially: nothing equals nothing.
        ('', ['x'], False),
        ('cafe', ['caf\u00e9'], False),
    ],
)
def test_exact_match(prediction, answers, expected):
  assert answers_lib.exact_match(prediction, answers) is expected


@given(_TEXTS, st.lists(_TEXTS, max_size=3))
def test_exact_match_implies_f1_and_containment(prediction, answers):
  if answers_lib.exact_match(prediction, answers):
    assert answers_lib.f1(prediction, answers) == 1.0
    if answers_lib.normalize_answer(prediction):
      assert answers_lib.has_answer(prediction, answers)
  score = answers_lib.f1(prediction, answers)
  assert 0.0 <= score <= 1.0
  assert answers_lib.f1(prediction, answers[::-1]) == score


@pytest.mark.parametrize(
    'prediction, answers, expected',
    [
        ('the cat sat', ['cat sat down'], 2 * (2 / 2) * (2 / 3) / (5 / 3)),
        ('x x y', ['x y y'], 2 / 3),  # Words are counted, not just seen.
        ('cat', ['dog', 'a cat'], 1.0),
        ('cat', ['dog'], 0.0),
        ('', ['a'], 1.0),
        ('', ['dog'], 0.0),
        ('dog', ['the'], 0.0),
        ('dog', [], 0.0),
    ],
)
def test_f1(prediction, answers, expected):
  assert answers_lib.f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    'prediction, pattern, expected',
    [
        ('september 5', 'Sept?(ember)?', True),
        ('in September', 'Sept?(ember)?', False),  # From its start.
        ('Septembers', 'Sept?(ember)?', True),  # Not to its end.
        ('line\nSept', '^Sept', False),
        ('The 1960s', '1960', False),  # The prediction is not normalised.
        ('\u0130x', '\\w', True),
    ],
)
def test_exact_match_by_regex(prediction, pattern, expected):
  assert answers_lib.exact_match(prediction, [pattern], 'regex') is expected


def test_regex_is_searched_for_in_a_text():
  text = 'It was signed\nin the Fall of 1789.'
  assert answers_lib.has_answer(text, ['zz', 'fall.of \\d{4}'], 'regex')
  assert answers_lib.has_answer(text, ['^in'], 'regex')  # Lines count.
  assert not answers_lib.has_answer(text, ['^the'], 'regex')


@pytest.mark.parametrize('pattern', ['(', 'a{2,1}', '[', '*', '(?P<1>x)'])
def test_an_invalid_regex_never_matches_and_warns(pattern):
  answers_lib._compiled.cache_clear()
  with pytest.warns(UserWarning, match='no regular expression'):
    assert not answers_lib.exact_match('(', [pattern], 'regex')
  assert answers_lib.exact_match('x', [pattern, 'x'], 'regex')


@pytest.mark.parametrize('pattern', ['(a|aa)+$', '(a+)+$', '(a|b|ab)*c'])
def test_a_catastrophic_regex_is_given_up(pattern, monkeypatch):
  monkeypatch.setattr(answers_lib, '_REGEX_SECONDS', 0.1)
  start = time.monotonic()
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    assert not answers_lib.has_answer('ab' * 3000 + '!', [pattern], 'regex')
    assert not answers_lib.exact_match('a' * 6000 + '!', [pattern], 'regex')
  assert time.monotonic() - start < 5


def test_giving_up_warns(monkeypatch):
  monkeypatch.setattr(answers_lib, '_REGEX_SECONDS', 0.05)
  with pytest.warns(UserWarning, match='took longer'):
    answers_lib.has_answer('a' * 6000 + '!', ['(a|aa)+$'], 'regex')


@pytest.mark.parametrize(
    'text, answer, expected',
    [
        ("Paris's mayor", 'Paris', True),
        ('in the U.S. Army', 'US Army', True),
        ('Bart and Marty', 'art', False),
        ('a well-known man', 'known man', True),
        ('a well-known man', 'well known', False),  # It says `wellknown`.
        ('the cat on the mat', 'cat on mat', True),
        ('the cat on their mat', 'cat on mat', False),
        ('the-end of it', 'end of', True),
        ('cost $5.', '5', True),
        ('in 1950', '19', False),
        ('about 3.5 miles', '3.5 miles', True),
        ('about 35 miles', '3.5 miles', True),  # Both normalise to 35.
        ('caf\u00e9 bar', 'cafe\u0301', True),
        ('caf\u00e9 bar', 'cafe', False),
        ('said \u201cnever\u201d twice', 'never', True),
        ('\u6771\u4eac is', '\u6771\u4eac', True),
        # Answers of which normalisation leaves nothing.
        ('The The sang', 'The The', True),
        ('the sang', 'The The', False),
        ('what ? no', '?', True),
        ('x', ' ', False),
        ('', 'x', False),
        ('', '', False),
    ],
)
def test_has_answer(text, answer, expected):
  assert answers_lib.has_answer(text, [answer]) is expected
  assert answers_lib.has_answer(text, ['zzzz', answer]) is expected


@given(
    st.lists(st.sampled_from('Ann of X-1 U.S. \u00c5sa'.split()), max_size=4),
    st.sampled_from(['Green Gables', 'U.K. law', 'O\u2019Hara', '\u00e9t']),
    st.lists(st.sampled_from('near it. (so)'.split()), max_size=4),
)
def test_a_quoted_answer_is_found(before, answer, after):
  text = ' '.join([*before, f'"{answer}",', *after])
  assert answers_lib.has_answer(text, [answer])
  assert answers_lib.has_answer(text, [answer.upper()])


@pytest.mark.parametrize(
    'text, answers, match, expected',
    [
        ('Zo\u00eb Saldana, the actress', ['zo\u00eb saldana'], 'string',
         ['Zo\u00eb Saldana']),
        ('In Bart the art of The Art', ['art'], 'string', ['art', 'Art']),
        ('the U.S. Army', ['US Army', 'us'], 'string', ['U.S', 'U.S. Army']),
        ('The King of the Hill', ['king of hill'], 'string',
         ['King of the Hill']),
        ('rock-n-roll', ['rock', 'rocknroll', 'rock n roll'], 'string',
         ['rock', 'rock-n-roll']),
        ('New\nYork, new  york', ['New York'], 'string',
         ['New\nYork', 'new  york']),
        ('caf\u00e9 2 \u20ac', ['2 \u20ac'], 'string', ['2 \u20ac']),
        ('\u00e9t\u00e9 in Sept, September', ['Sept(ember)?'], 'regex',
         ['Sept', 'September']),
        ('anything', ['', '?', 'the'], 'string', []),
        ('anything', ['x*'], 'regex', []),
    ],
)
def test_answer_spans(text, answers, match, expected):
  data = text.encode()
  spans = answers_lib.answer_spans(text, answers, match)
  assert [data[start:limit].decode() for start, limit in spans] == expected


# Without marks: officially, the `a` after a mark is an article.
_UNMARKED = st.text(
    alphabet='aAnthe .,-\'"$_5\t\n\u2019\u00a0\u6771', max_size=24
)


@given(_UNMARKED, _UNMARKED)
def test_spans_are_found_just_where_there_is_an_answer(text, answer):
  spans = answers_lib.answer_spans(text, [answer])
  assert bool(spans) == answers_lib.has_answer(text, [answer])
  for start, limit in spans:
    found = text.encode()[start:limit].decode()
    if answers_lib.normalize_answer(answer):
      assert answers_lib.exact_match(found, [answer])


def test_one_string_is_not_a_list_of_answers():
  for function in (
      answers_lib.exact_match, answers_lib.f1, answers_lib.has_answer
  ):
    with pytest.raises(ValueError, match='list of strings'):
      function('x', 'xyz')
  with pytest.raises(ValueError, match="'string', 'squad', 'regex'"):
    answers_lib.exact_match('x', ['x'], 'fuzzy')
