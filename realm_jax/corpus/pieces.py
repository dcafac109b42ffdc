"""The pieces of tokenizers other than WordPiece: their text, where words begin.

WordPiece marks the pieces inside a word. Byte-level BPE and Unigram mark those
after a blank, so that a word after punctuation or at the beginning of a text is
known from its neighbour only.
"""

from collections.abc import Sequence
import re
import unicodedata

import numpy as np
from tokenizers import decoders

# Scripts without blanks between words: Thai to Myanmar, Khmer, kana, Chinese.
_WITHOUT_BLANKS = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf'
    '\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]'
)
_PROBE = 'a'  # A piece of any vocabulary: decoders drop the first blank.
_LAST_SPACE = 0x3000  # The largest code of a blank.
_IS_SPACE = np.array([chr(code).isspace() for code in range(_LAST_SPACE + 2)])


def texts(decoder: decoders.Decoder, vocab: Sequence[str]) -> list[str]:
  """Returns the text of each piece inside a text, with its blanks."""
  start = len(decoder.decode([_PROBE]))
  return [decoder.decode([_PROBE, piece])[start:] for piece in vocab]


class WordStarts:
  """Tells which pieces of a text begin a word.

  A word begins after a blank, and as in BERT at each mark and behind it. A
  piece of a script without blanks is a word.
  """

  def __init__(self, piece_texts: Sequence[str]):
    self._begins = np.array([_begins(text) for text in piece_texts], bool)
    # A blank belongs to the word behind it, as a piece of its own, too.
    self._ends = np.array(
        [_is_mark(t[-1:]) and not t[-1:].isspace() for t in piece_texts], bool
    )

  def __call__(self, ids: np.ndarray) -> np.ndarray:
    """Returns bool [L] for the pieces of a part of a text."""
    found = self._begins[ids]
    found[1:] |= self._ends[ids[:-1]]
    return found


def _begins(text: str) -> bool:
  first = text[:1]
  return (
      first.isspace()
      or _is_mark(first)
      or bool(_WITHOUT_BLANKS.match(first))
  )


def _is_mark(character: str) -> bool:
  """Whether it is no part of a word; an incomplete UTF-8 character is one."""
  if not character or character == '\ufffd':
    return False
  return unicodedata.category(character)[0] not in 'LMN'


def without_blanks(text: str, ranges_L2: np.ndarray) -> np.ndarray:
  """Returns ranges of characters without the blanks at their beginning.

  A piece of blanks alone keeps its range.
  """
  codes = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  space = _IS_SPACE[np.minimum(codes, _LAST_SPACE + 1)]
  if not space.any():
    return ranges_L2
  size = len(codes)
  place = np.append(np.where(space, size, np.arange(size)), size)
  following = np.minimum.accumulate(place[::-1])[::-1]
  start, limit = ranges_L2.T
  found = following[start]
  return np.stack([np.where(found < limit, found, start), limit], axis=1)


def byte_positions(text: str) -> np.ndarray:
  """Returns the position in UTF-8 bytes of each character and of the end."""
  if text.isascii():
    return np.arange(len(text) + 1)
  code_points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  sizes = 1 + sum(
      (code_points >= limit).astype(np.int64)
      for limit in (0x80, 0x800, 0x10000)
  )
  return np.concatenate([[0], np.cumsum(sizes)])
