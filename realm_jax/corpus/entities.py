"""Sentences with named entities: wordpieces with labels.

Tags are IOB2: `B-PER` begins an entity and `I-PER` continues it. Labels are
numbers: 0 for O, then B and I of each type. `tagged_columns` reads files.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import itertools

import numpy as np

from realm_jax.corpus import tagged_columns
from realm_jax.corpus import tokenizer as tokenizer_lib

NO_LABEL = -1  # For [CLS], [SEP], padding, and wordpieces inside a word.

Entity = tuple[str, int, int]  # Type, first word, last word + 1.


TaggedSentence = tagged_columns.TaggedSentence
read = tagged_columns.read
types_of = tagged_columns.types_of


def labels(types: Sequence[str]) -> list[str]:
  """Returns the tag of each label."""
  return ['O', *(f'{prefix}-{kind}' for kind in types for prefix in 'BI')]


@dataclasses.dataclass(frozen=True)
class TaggedTable:
  """Sentences as wordpieces; a long sentence takes several rows.

  Every wordpiece that begins a word of BERT has a label; the token 'U.S.' is
  four words. The tag of a token continues over all of its words, so the tagger
  can be used on text without tokens. A token without wordpieces, such as a
  control character, is not represented.

  ids_NL: int32, `[CLS] words [SEP]`, padded.
  types_NL: int32, segment 1 where the word has a capital letter.
  begins_NL: bool, whether a wordpiece begins a word.
  labels_NL: int32 where `begins_NL`; NO_LABEL elsewhere and without tags.
  sentences_N: the sentence of each row.
  words_NL: int32, the token's number at its first wordpiece, else -1.
  digest: SHA-256 of the sentences and of the labels' meaning.
  """

  ids_NL: np.ndarray
  types_NL: np.ndarray
  begins_NL: np.ndarray
  labels_NL: np.ndarray
  sentences_N: np.ndarray
  words_NL: np.ndarray
  digest: str

  def __len__(self) -> int:
    return len(self.ids_NL)

  @classmethod
  def of(
      cls,
      sentences: Sequence[TaggedSentence],
      types: Sequence[str] | None,
      length: int,
      tokenizer: tokenizer_lib.Tokenizer,
  ) -> 'TaggedTable':
    """Encodes sentences.

    Args:
      sentences: at least one.
      types: entity types, which are all that may occur. None: the tags are
        ignored.
      length: L. A longer sentence continues in the next row; a longer token is
        cut.
      tokenizer: of the corpus.

    Raises:
      ValueError: an entity has another type.
    """
    number = None
    if types is not None:
      number = {tag: i for i, tag in enumerate(labels(types))}
    words = _EncodedWords(tokenizer)
    digest = hashlib.sha256(repr((types, length)).encode())
    for sentence in sentences:
      digest.update(repr((sentence.tokens, sentence.tags)).encode())
    return cls.of_wordpieces(
        [_wordpieces(sentence, number, words) for sentence in sentences],
        length,
        tokenizer,
        digest.hexdigest(),
    )

  @classmethod
  def of_wordpieces(
      cls,
      sentences: Sequence['Wordpieces'],
      length: int,
      tokenizer: tokenizer_lib.Tokenizer,
      digest: str = '',
  ) -> 'TaggedTable':
    """Arranges sentences that are already wordpieces in rows."""
    of_row, starts, limits = [], [], []
    for i, sentence in enumerate(sentences):
      for start, limit in _rows(sentence.words, length - 2):
        of_row.append(i)
        starts.append(start)
        limits.append(limit)
    sentences_N = np.array(of_row, np.int64)
    sizes_N = np.array(limits, np.int64) - np.array(starts, np.int64)
    # The row of each wordpiece, and its position there and in all sentences.
    first = np.cumsum([0, *(len(s.ids) for s in sentences)])
    row = np.repeat(np.arange(len(of_row)), sizes_N)
    before_N = np.cumsum(sizes_N) - sizes_N
    place = np.arange(len(row)) - before_N[row]
    source = first[sentences_N[row]] + np.array(starts, np.int64)[row] + place

    def table(name: str, padding: int, dtype: type) -> np.ndarray:
      array_NL: np.ndarray = np.full((len(of_row), length), padding, dtype)
      if sentences:
        values = np.concatenate([getattr(s, name) for s in sentences])
        array_NL[row, place + 1] = values[source]
      return array_NL

    ids_NL = table('ids', tokenizer.pad_id, np.int32)
    ids_NL[:, 0] = tokenizer.cls_id
    ids_NL[np.arange(len(ids_NL)), sizes_N + 1] = tokenizer.sep_id
    return cls(
        ids_NL,
        table('capitals', 0, np.int32),
        table('begins', False, bool),
        table('labels', NO_LABEL, np.int32),
        sentences_N,
        table('words', -1, np.int32),
        digest,
    )


@dataclasses.dataclass(frozen=True)
class Wordpieces:
  """The wordpieces of a sentence, and for each of them:

  capitals: whether its word begins with a capital letter.
  begins: whether it begins a word.
  words: the number of the token that begins with it, or -1.
  labels: its label, or NO_LABEL.
  """

  ids: np.ndarray
  capitals: np.ndarray
  begins: np.ndarray
  words: np.ndarray
  labels: np.ndarray

  @classmethod
  def of_text(
      cls, text: str, ids: np.ndarray, starts: np.ndarray, begins: np.ndarray
  ) -> 'Wordpieces':
    """Makes unlabelled wordpieces of plain text, whose words are tokens."""
    return cls(
        ids,
        capitals(text, starts, begins),
        begins,
        np.where(begins, np.cumsum(begins) - 1, -1),
        np.full(len(ids), NO_LABEL),
    )


def entities_of_words(
    table: TaggedTable, labels_NL: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the entities of labels, of any type.

  `labels_NL` are those of `models.tagger.decode`: an I- continues the word
  before.

  Returns:
    For each entity, in order: its sentence, first word, and last word + 1.
  """
  begins_NL = table.words_NL >= 0
  words, found = table.words_NL[begins_NL], labels_NL[begins_NL]
  of_word = np.repeat(table.sentences_N, begins_NL.sum(axis=1))
  inside = (found > 0) & (found % 2 == 0)
  first = np.flatnonzero(found % 2 == 1)
  outside = np.append(np.flatnonzero(~inside), len(found))
  behind = outside[np.searchsorted(outside, first, 'right')]
  return of_word[first], words[first], words[behind - 1] + 1


def tags_of_words(
    table: TaggedTable,
    labels_NL: np.ndarray,
    types: Sequence[str],
    counts: Sequence[int],
) -> list[list[str]]:
  """Returns the tags (IOB2) of the tokens of each sentence.

  A token has the label of its first wordpiece, or O without one. `counts` are
  the numbers of tokens.
  """
  tag = labels(types)
  found = [['O'] * count for count in counts]
  for row, place in zip(*np.nonzero(table.words_NL >= 0), strict=True):
    sentence, word = table.sentences_N[row], table.words_NL[row, place]
    found[sentence][word] = tag[labels_NL[row, place]]
  return [tagged_columns.iob2(tags) for tags in found]


class _EncodedWords(dict):
  """Wordpieces, capitals and word beginnings of each token, cached."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    super().__init__()
    self._tokenizer = tokenizer

  def __missing__(self, text: str) -> tuple[np.ndarray, ...]:
    # As within a text, where most words follow a blank, and marks do not.
    wordpiece = self._tokenizer.is_wordpiece
    blank = '' if wordpiece or not text[:1].isalnum() else ' '
    ((ids, starts, _),) = self._tokenizer.encode_arrays([blank + text])
    starts = np.maximum(starts - len(blank), 0)
    begins = self._tokenizer.starts_word(ids)
    begins[:1] = True
    self[text] = ids, capitals(text, starts, begins), begins
    return self[text]


def _wordpieces(
    sentence: TaggedSentence,
    number: dict[str, int] | None,
    words: _EncodedWords,
) -> Wordpieces:
  """Returns the wordpieces of a sentence; `number` maps tags to labels."""
  parts: list[tuple[np.ndarray, ...]] = [
      (np.zeros(0, np.int64),) * len(dataclasses.fields(Wordpieces))
  ]
  for word, (text, tag) in enumerate(
      zip(sentence.tokens, sentence.tags, strict=True)
  ):
    if number is not None and tag not in number:
      raise ValueError(
          f'The tag {tag!r} of the token {text!r} is of an unknown type; the'
          f' types are {sorted({tag[2:] for tag in number} - {""})}.'
      )
    ids, upper, begins = words[text]
    if not len(ids):
      continue
    place = np.full(len(ids), -1)
    place[0] = word
    labelled = np.full(len(ids), NO_LABEL)
    if number is not None:
      inside = number[tag] + 1 if tag.startswith('B-') else number[tag]
      labelled[begins] = inside
      labelled[0] = number[tag]
    parts.append((ids, upper, begins, place, labelled))
  return Wordpieces(*map(np.concatenate, zip(*parts, strict=True)))


def _rows(words: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
  """Yields the ranges of a sentence for each row of `room` wordpieces.

  A sentence is cut before tokens; a token longer than a row loses its end.
  """
  if len(words) <= room:  # The usual case.
    if len(words):
      yield 0, len(words)
    return
  cuts = [*np.flatnonzero(words >= 0).tolist(), len(words)]
  start = 0
  for cut, following in itertools.pairwise(cuts):
    if following - start <= room:
      continue
    if cut > start:
      yield start, cut
      start = cut
    if following - start > room:
      yield start, start + room
      start = following
  if start < len(words):
    yield start, len(words)


def capitals(text: str, starts: np.ndarray, begins: np.ndarray) -> np.ndarray:
  """Returns bool: whether the word of each wordpiece begins with a capital.

  A wordpiece begins at the UTF-8 byte in `starts`, and a word if in `begins`.
  """
  characters = starts
  if not text.isascii():
    bytes_before = tokenizer_lib.byte_positions(text)
    characters = np.searchsorted(bytes_before, starts)
  upper = np.array([text[i : i + 1].isupper() for i in characters], bool)
  first = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
  return upper[first]


def entities(tags: Sequence[str]) -> list[Entity]:
  """Returns the entities of IOB2 tags, in order."""
  found: list[Entity] = []
  for i, tag in enumerate(tags):
    if tag.startswith('B-'):
      found.append((tag[2:], i, i + 1))
    elif tag.startswith('I-'):
      kind, start, _ = found[-1]
      found[-1] = (kind, start, i + 1)
  return found
