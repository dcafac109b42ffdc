"""The rules by which a prediction or a passage holds an answer.

A data set says how its answers are compared with a prediction: `string` is the
official normalisation of SQuAD and open-domain QA; `regex` is for CuratedTREC,
whose answers are regular expressions.

`has_answer` has three rules for passages. `squad` (its other name is `string`)
searches by the normalisation of SQuAD and makes the labels of training. `dpr`
is the rule by which DPR (Karpukhin et al. 2020, section 4) counts retrieved
passages, and the default of `evaluate`. `regex` searches a pattern.
"""

import collections
from collections.abc import Sequence
import functools
import itertools
import re
import string
from typing import Any, Literal
import unicodedata
import warnings

# Unlike `re`, it has time limits, which patterns from data need.
import regex

Match = Literal['string', 'regex']
# When a passage holds an answer.
Rule = Literal['squad', 'string', 'dpr', 'regex']
RULES = ('squad', 'dpr', 'regex')

_REGEX_SECONDS = 1.0
_DELETE_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')
# The official normalisation keeps the combining marks of NFD, as part of words.
_LETTER = r'[\p{L}\p{N}\p{M}]'
_TOKEN = regex.compile(rf'{_LETTER}+|\S')  # Words and single marks.
# Letters of the scripts that put no blank between words. Each of them is a word
# of its own, with its marks. Korean has blanks.
_NO_BLANKS = ''.join(
    rf'\p{{scx={script}}}'
    for script in 'Han Hira Kana Bopo Thai Laoo Khmr Mymr'.split()
)
_ALONE = rf'[[{_NO_BLANKS}]&&\p{{L}}]'
_WORD_PART = rf'[[\p{{L}}\p{{N}}\p{{M}}]--[[{_NO_BLANKS}]--\p{{N}}]]'
_IS_ALONE = regex.compile(_ALONE, regex.VERSION1)
# Other single characters are those that are neither separators nor controls.
_DPR_TOKEN = regex.compile(
    rf'{_ALONE}\p{{M}}*|{_WORD_PART}+|[^\p{{Z}}\p{{C}}]', regex.VERSION1
)
_ASCII_DPR_TOKEN = re.compile(r'[0-9A-Za-z]+|[!-/:-@\[-`{-~]')
_PUNCTUATION = r'!-/:-@\[-`{-~'  # Ranges of ASCII punctuation.
_SPACE = r'\s\x1c-\x1f'  # The separators of `str.split`.


def has_words(text: str) -> bool:
  """Returns whether a text has several words, in any script."""
  return len(text.split()) > 1 or len(_IS_ALONE.findall(text)) > 1


def normalize_answer(text: str) -> str:
  """Normalises as the official evaluation of open-domain QA does.

  Unicode NFD (marks stay), lower case, without ASCII punctuation, the words a,
  an, the replaced by a space, white space collapsed.
  """
  text = unicodedata.normalize('NFD', text).lower()
  text = text.translate(_DELETE_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact_match(
    prediction: str, answers: Sequence[str], match: Match = 'string'
) -> bool:
  """Returns whether the prediction equals one of the answers.

  Args:
    prediction: the answer of a reader.
    answers: the references; none of them means False.
    match: `string` compares after `normalize_answer`. `regex` follows the
      official rule: one of the patterns matches the raw prediction from its
      start, not necessarily to its end, ignoring case. A pattern that is
      invalid or takes longer than a second never matches and gives a warning.

  Raises:
    ValueError: `answers` is one string, or `match` is unknown.
  """
  _check(answers, match)
  if match == 'regex':
    return any(_regex_matches('match', a, prediction) for a in answers)
  normalized = normalize_answer(prediction)
  return any(normalize_answer(answer) == normalized for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
  """Returns SQuAD's F1: overlap of words with the best answer, in [0, 1].

  Raises:
    ValueError: `answers` is one string.
  """
  _check(answers, 'string')
  words = normalize_answer(prediction).split()
  return max(
      (_word_f1(words, normalize_answer(answer).split()) for answer in answers),
      default=0.0,
  )


def has_answer(
    text: str, answers: Sequence[str], match: Rule = 'string'
) -> bool:
  """Returns whether a passage contains one of the answers.

  `squad` or `string`: a sequence of whole words of the text is an
  `exact_match`. Punctuation may stand inside a word: `US` is in `the U.S.
  Army`, `31` is in `3-1`, but `art` is not in `Bart`.

  `dpr`: the tokens of the answer follow each other in the text. After Unicode
  NFD a token is a longest run of letters, numbers and marks, or any other
  single character that is no separator and no control; case does not count.
  `Paris` is in `Paris's`, but `US` is not in `the U.S. Army`, nor `31` in
  `3-1`. An answer without tokens is in every text, as in the published code.

  In both rules a letter of a script without blanks between words (Chinese,
  Japanese, Thai, Lao, Khmer, Burmese) is a word of its own, with its marks.
  The published code of DPR takes a whole clause for one token; whatever it
  finds, this finds too.

  `regex`: a pattern is found anywhere in the text, otherwise with the rules of
  `exact_match`.

  Raises:
    ValueError: `answers` is one string, or `match` is unknown.
  """
  _check(answers, match, (*RULES, 'string'))
  if match == 'regex':
    return any(_regex_matches('search', a, text) for a in answers)
  if match == 'dpr':
    tokens = _dpr_tokens(text)
    return any(_dpr_tokens(answer) in tokens for answer in answers)
  return any(_contains(text, answer) for answer in answers)


@functools.lru_cache(maxsize=2**14)
def _dpr_tokens(text: str) -> str:
  """Returns the tokens of DPR's rule, with a blank before and after each."""
  if text.isascii():
    tokens = _ASCII_DPR_TOKEN.findall(text)
  else:
    tokens = _DPR_TOKEN.findall(unicodedata.normalize('NFD', text))
  # Blanks, which are in no token, keep the lower case of each independent of
  # its neighbours. No token gives no blank either, which is in every text.
  return f' {" ".join(tokens)} '.lower() if tokens else ''


def _check(
    answers: Sequence[str],
    match: str,
    known: Sequence[str] = ('string', 'squad', 'regex'),
) -> None:
  if isinstance(answers, str):
    raise ValueError(
        f'answers must be a list of strings, not the string {answers!r}.'
    )
  if match not in known:
    names = ', '.join(map(repr, known))
    raise ValueError(f'match must be one of {names}, not {match!r}.')


def _word_f1(words: list[str], answer: list[str]) -> float:
  if not words or not answer:
    return float(words == answer)
  common = collections.Counter(words) & collections.Counter(answer)
  return 2 * common.total() / (len(words) + len(answer))


# An evaluation meets the same passages and answers many times.
_normalized = functools.lru_cache(maxsize=2**14)(normalize_answer)


@functools.lru_cache(maxsize=2**14)
def _without_punctuation(text: str) -> str:
  return lower_with_origins(text)[0].translate(_DELETE_PUNCTUATION)


def answer_spans(
    text: str, answers: Sequence[str], match: Match = 'string'
) -> list[tuple[int, int]]:
  """Finds the answers in a passage, by the rules of `has_answer`.

  Returns:
    Distinct half-open ranges of UTF-8 bytes of the text, in order. Those of one
    answer do not overlap.

  Raises:
    ValueError: `answers` is one string, or `match` is unknown.
  """
  _check(answers, match)
  if match == 'regex':
    found = {
        hit.span()
        for answer in answers
        for hit in _regex_matches('finditer', answer, text)
        if hit.group()
    }
    origins: Sequence[int] = range(len(text) + 1)
  else:
    lowered, origins = lower_with_origins(text)
    found = set()
    for answer in answers:
      span = find_answer(lowered, answer)
      while span is not None:
        found.add(span)
        span = find_answer(lowered, answer, span[1])
  characters = sorted((origins[start], origins[end]) for start, end in found)
  if text.isascii():
    return characters
  lengths = (len(c.encode('utf-8', 'surrogatepass')) for c in text)
  sizes = [*itertools.accumulate(lengths, initial=0)]
  return [(sizes[start], sizes[limit]) for start, limit in characters]


def _contains(text: str, answer: str) -> bool:
  wanted = _normalized(answer)
  if wanted and f' {wanted} ' in f' {_normalized(text)} ':
    return True
  # Every word must occur, perhaps with punctuation inside. This test avoids
  # most patterns, which take milliseconds to compile.
  if not all(word in _without_punctuation(text) for word in wanted.split()):
    return False
  return find_answer(lower_with_origins(text)[0], answer) is not None


def find_answer(
    lowered: str, answer: str, start: int = 0
) -> tuple[int, int] | None:
  """Returns the first range of an answer in a text of `lower_with_origins`.

  The rule is `string`. None: no occurrence from `start` on.
  """
  if not _tokens(answer):
    return None
  wanted = _normalized(answer)
  for found in _answer_pattern(answer).finditer(lowered, start):
    # The pattern allows too much; the official normalisation decides.
    if not wanted or normalize_answer(found.group()) == wanted:
      return found.span()
  return None


def lower_with_origins(text: str) -> tuple[str, Sequence[int]]:
  """Returns NFD in lower case, and the original index of each character."""
  if text.isascii():
    return text.lower(), range(len(text) + 1)
  parts, origins = [], []
  for i, character in enumerate(text):
    part = unicodedata.normalize('NFD', character).lower()
    parts.append(part)
    origins += [i] * len(part)
  return ''.join(parts), [*origins, len(text)]


@functools.lru_cache(maxsize=4096)
def _answer_pattern(answer: str) -> Any:
  """Compiles a pattern for whole words that may normalise to the answer."""
  words = _normalized(answer).split()
  if words:
    inside = f'[{_PUNCTUATION}]*'
    article = '|'.join(map(inside.join, ('a', 'an', 'the')))
    article = rf'(?<!{_LETTER})(?:{article})(?!{_LETTER})'
    between = rf'(?:[{_PUNCTUATION}{_SPACE}]|{article})+'
    pattern = between.join(
        inside.join(map(regex.escape, word)) for word in words
    )
  else:
    # Normalisation leaves nothing of `The The` or `?`: search them verbatim.
    words = _tokens(answer)
    pattern = rf'[{_SPACE}]*'.join(map(regex.escape, words))
  return regex.compile(
      f'{_bound(words[0][0], before=True)}(?:{pattern})'
      f'{_bound(words[-1][-1], before=False)}',
      regex.VERSION1,
  )


def _bound(character: str, before: bool) -> str:
  """Returns a pattern for the end of a word at its first or last character."""
  if _IS_ALONE.match(character):
    return '' if before else r'(?!\p{M})'  # It is whole with all its marks.
  if not regex.match(_LETTER, character):
    return ''
  return f'(?<!{_WORD_PART})' if before else f'(?!{_WORD_PART})'


def _tokens(text: str) -> list[str]:
  return _TOKEN.findall(unicodedata.normalize('NFD', text).lower())


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
  """Compiles a pattern; None, with a warning, for an invalid one."""
  flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
  try:
    re.compile(pattern)  # `re` decides what is valid, as in the official rule.
    return regex.compile(pattern, flags)
  except (re.error, regex.error, OverflowError, RecursionError) as error:
    warnings.warn(
        f'The answer {pattern!r} is no regular expression ({error});'
        ' it never matches.',
        stacklevel=2,
    )
    return None


def _regex_matches(
    how: Literal['match', 'search', 'finditer'], pattern: str, text: str
) -> list[Any]:
  """Returns the matches of a pattern; none if it takes too long."""
  compiled = _compiled(pattern)
  if compiled is None:
    return []
  try:
    found = getattr(compiled, how)(text, timeout=_REGEX_SECONDS)
    return [*found] if how == 'finditer' else [found] if found else []
  except TimeoutError:
    warnings.warn(
        f'The answer pattern {pattern!r} took longer than {_REGEX_SECONDS} s on'
        f' a text of {len(text)} characters and does not match it.',
        stacklevel=3,
    )
    return []
