"""A record's text with its wordpieces and sentences."""

import bisect
from collections.abc import Callable
import itertools
from typing import NamedTuple

import numpy as np

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import languages
from realm_jax.prepare import salient_spans

BeginsWord = Callable[[np.ndarray], np.ndarray]  # `Tokenizer.starts_word`.


class Range(NamedTuple):
  """Half-open ranges of the same part of a text."""

  start: int  # Wordpieces.
  limit: int
  byte_start: int
  byte_limit: int


class Text:
  """A record's text with its wordpieces and sentences.

  Attributes:
    language: of the text, see `languages.detect`.
    other_script: whether it is mostly in another script than Latin.
    ids: uint32 wordpieces.
    starts_list, limits_list: their ranges of UTF-8 bytes.
    sentences: their ranges, without gaps between wordpieces.
    passages: for each passage, last wordpiece + 1, number in the chunk, and
      offset from wordpieces of the text to those of the chunk.
  """

  def __init__(
      self,
      text: str,
      ids: np.ndarray,
      starts: np.ndarray,
      limits: np.ndarray,
      language: str,
  ):
    self._data = text.encode('utf-8')
    self.language = language
    self.other_script = languages.is_other_script(
        text, len(self._data)
    )
    self.ids = ids
    self.starts_list, self.limits_list = starts.tolist(), limits.tolist()
    self.passages: list[tuple[int, int, int]] = []
    to_byte = tokenizer_lib.byte_positions(text)
    characters = languages.split_sentences(
        text, language, self.other_script
    )
    found = to_byte[np.array(characters or [(0, len(text))])]
    # A sentence extends to the start of the next one.
    cuts = np.searchsorted(starts, found[1:, 0], 'left')
    self.sentences = [
        Range(a, b, byte_start, byte_limit)
        for a, b, (byte_start, byte_limit) in zip(
            [0, *cuts.tolist()],
            [*cuts.tolist(), len(ids)],
            found.tolist(),
            strict=True,
        )
        if a < b
    ]

  def slice(self, start: int, limit: int) -> str:
    """Returns the text between two bytes, without surrounding spaces."""
    return self._data[start:limit].decode('utf-8', 'ignore').strip()

  def encode_again(
      self,
      ranges: list[Range],
      encode: Callable[[list[str]], list[tokenizer_lib.Encoded]],
  ) -> list[Range]:
    """Replaces the wordpieces by those of parts as texts of their own.

    A tokenizer other than WordPiece may give the first word of a text other
    pieces than within a text.

    Args:
      ranges: of the parts, which are the whole text.
      encode: a `CachedTokenizer`.

    Returns:
      The ranges, in the new wordpieces.
    """
    texts = [self.slice(r.byte_start, r.byte_limit) for r in ranges]
    firsts = [
        self._data.index(text.encode('utf-8'), r.byte_start)
        for text, r in zip(texts, ranges, strict=True)
    ]
    parts = encode(texts)
    self.ids = np.concatenate([ids for ids, _, _ in parts])
    sizes = [len(ids) for ids, _, _ in parts]
    shift = np.repeat(np.array(firsts, np.int64), sizes)
    starts = np.concatenate([starts for _, starts, _ in parts]) + shift
    limits = np.concatenate([limits for _, _, limits in parts]) + shift
    self.starts_list, self.limits_list = starts.tolist(), limits.tolist()
    cuts = np.cumsum([0, *sizes]).tolist()
    found = [s.byte_start for s in self.sentences[1:]]
    ends = [0, *np.searchsorted(starts, found).tolist(), len(self.ids)]
    self.sentences = [
        s._replace(start=a, limit=b)
        for s, (a, b) in zip(
            self.sentences, itertools.pairwise(ends), strict=True
        )
        if a < b
    ]
    return [
        r._replace(start=a, limit=b)
        for r, (a, b) in zip(ranges, itertools.pairwise(cuts), strict=True)
        if a < b  # Others have nothing but blanks.
    ]

  def without_last_blanks(self, sentence: Range) -> Range:
    """Returns a sentence without pieces of blanks behind its text."""
    inside = sentence.start, sentence.limit
    end = bisect.bisect_left(self.starts_list, sentence.byte_limit, *inside)
    return sentence._replace(limit=end)

  def pieces_of(
      self, a: int, b: int, sentence: Range, whole: bool
  ) -> tuple[int, int]:
    """Returns the range of the wordpieces of a sentence in the bytes a to b.

    Args:
      a, b: the first byte and the one behind the last.
      sentence: of the text.
      whole: whether all of a wordpiece must be inside, or one byte.
    """
    starts, limits = self.starts_list, self.limits_list
    inside = sentence.start, sentence.limit
    if whole:
      return (
          bisect.bisect_left(starts, a, *inside),
          bisect.bisect_right(limits, b, *inside),
      )
    return (
        bisect.bisect_right(limits, a, *inside),
        bisect.bisect_left(starts, b, *inside),
    )

  def random_spans(
      self, name: str, sentence: Range, begins_word: BeginsWord
  ) -> list[tuple[int, int]]:
    """Returns random spans of a sentence, in its bytes.

    Args:
      name: of the record.
      sentence: of the text.
      begins_word: `Tokenizer.starts_word`.
    """
    start, limit, base, _ = sentence
    ends = self.starts_list[start:limit], self.limits_list[start:limit]
    spans = salient_spans.random_spans(
        [self.slice(*two) for two in zip(*ends, strict=True)],
        begins_word(self.ids[start:limit]).tolist(),
        f'{name} {start}',  # The same for any division into tasks.
    )
    return [
        (ends[0][first] - base, ends[1][last - 1] - base)
        for first, last in spans
    ]

  def shorten(
      self, longest: int, begins_word: BeginsWord, ends_clause: np.ndarray
  ) -> int:
    """Cuts sentences of more wordpieces, and returns how many were cut.

    Some scripts have few marks for the end of a sentence, or none.
    """
    pieces = [
        self.cut(sentence, longest, begins_word, ends_clause)
        for sentence in self.sentences
    ]
    self.sentences = [piece for parts in pieces for piece in parts]
    return sum(len(parts) > 1 for parts in pieces)

  def cut(
      self,
      sentence: Range,
      longest: int,
      begins_word: BeginsWord,
      ends_clause: np.ndarray | None = None,
  ) -> list[Range]:
    """Cuts a sentence between words; inside a word if it exceeds a piece.

    Args:
      sentence: of the text.
      longest: wordpieces of a piece.
      begins_word: `Tokenizer.starts_word`.
      ends_clause: bool [vocab_size]; if one of these is in the second half of a
        piece, the cut is behind it.
    """
    start, limit, byte_start, byte_limit = sentence
    pieces = []
    while limit - start > longest:
      ids = self.ids[start : start + longest + 1]
      cuts = np.flatnonzero(begins_word(ids)[1:]) + 1
      if ends_clause is not None:
        clauses = np.flatnonzero(ends_clause[ids[:-1]]) + 1
        clauses = clauses[2 * clauses > longest]
        cuts = clauses if len(clauses) else cuts
      cut = start + (int(cuts[-1]) if len(cuts) else longest)
      pieces.append(Range(start, cut, byte_start, self.starts_list[cut]))
      start, byte_start = cut, self.starts_list[cut]
    return [*pieces, Range(start, limit, byte_start, byte_limit)]
