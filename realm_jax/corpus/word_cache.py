"""Wordpieces of long texts, remembering those of every word met before.

Public: `WordMemo`. The `tokenizers` library takes as long for the thousandth
'the' as for the first, and that is most of the time of `prepare`. BERT's rules
look at nothing beyond a space or a punctuation mark of ASCII, so what lies
between two of these has the same wordpieces wherever it stands: the library
cuts it once, and a table answers from then on.
"""

from collections.abc import Sequence
import re

import numpy as np

from realm_jax.corpus import tokenizer as tokenizer_lib

_SPACES = ' \t\n\r'
_MARKS = ''.join(
    chr(c) for c in range(33, 127) if not chr(c).isalnum()
)  # ASCII punctuation as BERT has it, '$' and '^' included.
_MARK = f'[{re.escape(_MARKS)}]'
_WORD = re.compile(rf'[^{_SPACES}{re.escape(_MARKS)}]+|{_MARK}')
_SPACE_CLASS, _WORD_CLASS, _MARK_CLASS = range(3)
# Of the words that are remembered. English has about a million words in
# Wikipedia, most of which occur once; these are a quarter of them.
_MAX_CHARACTERS = 1 << 21


class WordMemo:
  """`memo(texts)` is `tokenizer.encode_arrays(texts)`; not thread-safe."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._clear()
    classes = np.full(256, _WORD_CLASS, np.uint8)
    classes[[ord(c) for c in _SPACES]] = _SPACE_CLASS
    classes[[ord(c) for c in _MARKS]] = _MARK_CLASS
    self._classes = classes

  def __call__(
      self, texts: Sequence[str]
  ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns (uint32 ids, int64 starts, limits in bytes) of each text."""
    if self._numbers.characters > _MAX_CHARACTERS:
      self._clear()
    found = []
    for text in texts:
      words = _WORD.findall(text)
      found.append(
          np.fromiter(
              map(self._numbers.__getitem__, words), np.int64, len(words)
          )
      )
    self._learn()
    return [
        self._encode(text, words)
        for text, words in zip(texts, found, strict=True)
    ]

  def _clear(self) -> None:
    self._numbers = _Numbers()
    # Of word i: wordpieces [firsts[i], firsts[i + 1]), by their ids and where
    # they begin and end, in characters of the word.
    self._firsts = np.zeros(1, np.int64)
    self._ids = np.zeros(0, np.uint32)
    self._ranges = np.zeros((0, 2), np.int64)

  def _learn(self) -> None:
    """Has the library cut the words that are new."""
    new = self._numbers.take_new()
    if not new:
      return
    encoded = self._tokenizer.encode_characters(new)
    sizes = np.array([len(ids) for ids, _ in encoded], np.int64)
    self._firsts = np.concatenate(
        [self._firsts, self._firsts[-1] + np.cumsum(sizes)]
    )
    self._ids = np.concatenate([self._ids, *(ids for ids, _ in encoded)])
    self._ranges = np.concatenate([self._ranges, *(r for _, r in encoded)])

  def _encode(
      self, text: str, words: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first = self._firsts[words]
    sizes = self._firsts[words + 1] - first
    before = np.cumsum(sizes) - sizes
    pieces = np.arange(sizes.sum()) + np.repeat(first - before, sizes)
    at = np.repeat(self._starts(text), sizes)
    starts, limits = (at + self._ranges[pieces].T)
    if not text.isascii():
      to_byte = tokenizer_lib.byte_positions(text)
      starts, limits = to_byte[starts], to_byte[limits]
    return self._ids[pieces], starts, limits

  def _starts(self, text: str) -> np.ndarray:
    """Returns where the words begin; far quicker than asking the matches."""
    if text.isascii():
      codes = np.frombuffer(text.encode('ascii'), np.uint8)
    else:
      wide = np.frombuffer(text.encode('utf-32-le'), np.uint32)
      codes = np.minimum(wide, 255).astype(np.uint8)
    classes = self._classes[codes]
    starts = classes == _MARK_CLASS
    word = classes == _WORD_CLASS
    starts |= word
    starts[1:] &= ~(word[1:] & word[:-1])
    return np.flatnonzero(starts)


class _Numbers(dict[str, int]):
  """Numbers words as they come."""

  def __init__(self) -> None:
    self.characters = 0
    self._new: list[str] = []

  def __missing__(self, word: str) -> int:
    number = self[word] = len(self)
    self.characters += len(word)
    self._new.append(word)
    return number

  def take_new(self) -> list[str]:
    """Returns the words since the last time, in the order of their numbers."""
    new, self._new = self._new, []
    return new
