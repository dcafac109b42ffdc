"""Is an answer right? The one matcher of labels, training and evaluation.

Public: `normalize_answer`, `exact_match`, `f1`, `has_answer`. A data set
states how its answers are to be compared: `string` is the official
normalisation of SQuAD and open-domain QA, `regex` that of CuratedTREC, whose
answers are regular expressions.
"""

import collections
from collections.abc import Iterator, Sequence
import functools
import re
import string
from typing import Any, Literal
import unicodedata
import warnings

# Like `re`, but a search can be given a time limit: patterns come from data.
import regex

Match = Literal['string', 'regex']

_REGEX_SECONDS = 1.0
_DELETE_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')
# Words and single marks. The official normalisation leaves the combining
# marks of NFD in place; they belong to the word.
_TOKEN = regex.compile(r'[\p{L}\p{N}\p{M}]+|\S')


def normalize_answer(text: str) -> str:
  """Normalises as the official evaluation of open-domain QA does.

  Unicode NFD (the marks stay), lower case, ASCII punctuation deleted, the
  words a, an, the replaced by a space, white space collapsed.
  """
  text = unicodedata.normalize('NFD', text).lower()
  text = text.translate(_DELETE_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', text).split())


def exact_match(
    prediction: str, answers: Sequence[str], match: Match = 'string'
) -> bool:
  """Whether the prediction equals one of the answers.

  Args:
    prediction: what a reader answered.
    answers: the references; any of them will do. None: never right.
    match: `string` compares after `normalize_answer`. `regex` wants one of the
      patterns to match the raw prediction from its start, not to its end, case
      ignored (the official rule); a pattern that is invalid, or that takes
      longer than a second, matches nothing and gives a warning.

  Raises:
    ValueError: `answers` is one string, or `match` is unknown.
  """
  _check(answers, match)
  if match == 'regex':
    return any(_regex_matches('match', a, prediction) for a in answers)
  normalized = normalize_answer(prediction)
  return any(normalize_answer(answer) == normalized for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
  """Overlap of the normalised words with the best answer, in [0, 1] (SQuAD).

  Raises:
    ValueError: `answers` is one string.
  """
  _check(answers, 'string')
  ours = normalize_answer(prediction).split()
  return max(
      (_word_f1(ours, normalize_answer(answer).split()) for answer in answers),
      default=0.0,
  )


def has_answer(
    text: str, answers: Sequence[str], match: Match = 'string'
) -> bool:
  """Whether a passage contains one of the answers.

  `string`: a run of whole words of the text is an `exact_match`. What ends a
  word is white space or a mark, as in DPR: `Paris` is in `Paris's`, `US` in
  `the U.S. Army`, but `art` is not in `Bart`. `regex`: a pattern is found
  anywhere in the text, with the rules of `exact_match` otherwise.

  Raises:
    ValueError: `answers` is one string, or `match` is unknown.
  """
  _check(answers, match)
  if match == 'regex':
    return any(_regex_matches('search', a, text) for a in answers)
  return any(_contains(text, answer) for answer in answers)


def _check(answers: Sequence[str], match: str) -> None:
  if isinstance(answers, str):
    raise ValueError(
        f'answers must be a list of strings, not the string {answers!r}.'
    )
  if match not in ('string', 'regex'):
    raise ValueError(f"match must be 'string' or 'regex', not {match!r}.")


def _word_f1(ours: list[str], theirs: list[str]) -> float:
  if not ours or not theirs:
    return float(ours == theirs)
  common = collections.Counter(ours) & collections.Counter(theirs)
  return 2 * common.total() / (len(ours) + len(theirs))


# An evaluation asks about the same passages and answers many times.
_normalized = functools.lru_cache(maxsize=2**14)(normalize_answer)


def _contains(text: str, answer: str) -> bool:
  normalized, wanted = _normalized(text), _normalized(answer)
  if not wanted:
    # Nothing is left of `The The` or `?`: compare what was written.
    raw = _tokens(answer)
    return bool(raw) and any(
        words == raw for words in _windows(_tokens(text), len(raw))
    )
  if f' {wanted} ' in f' {normalized} ':
    return True
  squeezed = wanted.replace(' ', '')
  if squeezed not in normalized.replace(' ', ''):
    return False  # The usual case; what follows is slow.
  return _some_span_is(text, wanted, squeezed)


def _some_span_is(text: str, wanted: str, squeezed: str) -> bool:
  """Whether a run of tokens of the text normalises to `wanted`."""
  text = unicodedata.normalize('NFD', text).lower()
  tokens = [(t.start(), t.end(), t.group()) for t in _TOKEN.finditer(text)]
  for first, (begin, _, word) in enumerate(tokens):
    # A span need not begin or end with what is deleted from it anyway.
    if word in string.punctuation or not squeezed.startswith(word):
      continue
    seen = 0
    for _, end, word in tokens[first:]:
      if word in string.punctuation:
        continue
      if word not in ('a', 'an', 'the'):
        seen += len(word)
      if seen > len(squeezed):
        break
      if normalize_answer(text[begin:end]) == wanted:
        return True
  return False


def _tokens(text: str) -> list[str]:
  return _TOKEN.findall(unicodedata.normalize('NFD', text).lower())


def _windows(words: list[str], size: int) -> Iterator[list[str]]:
  for begin in range(len(words) - size + 1):
    yield words[begin : begin + size]


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Any:
  """The pattern, or None with a warning where it is not one."""
  flags = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE
  try:
    re.compile(pattern)  # `re` decides what is valid, as officially.
    return regex.compile(pattern, flags)
  except (re.error, regex.error, OverflowError, RecursionError) as error:
    warnings.warn(
        f'The answer {pattern!r} is no regular expression ({error}); it '
        'counts as never matched.',
        stacklevel=2,
    )
    return None


def _regex_matches(
    how: Literal['match', 'search'], pattern: str, text: str
) -> bool:
  compiled = _compiled(pattern)
  if compiled is None:
    return False
  try:
    return bool(getattr(compiled, how)(text, timeout=_REGEX_SECONDS))
  except TimeoutError:
    warnings.warn(
        f'The answer pattern {pattern!r} took longer than {_REGEX_SECONDS} s '
        f'on a text of {len(text)} characters; it counts as not matched.',
        stacklevel=2,
    )
    return False
