"""Sentences with named entities: files, wordpieces with labels, and the F1.

Public: `TaggedSentence`, `read`, `types_of`, `labels`, `TaggedTable`,
`Wordpieces`, `tags_of_words`, `entities_of_words`, `capitals`, `entities`,
`Score`, `score`. Tags are IOB2 inside:
`B-PER` begins an entity, `I-PER` goes on with it. Labels are numbers: 0 for O,
then B and I of each type.

Files are JSON Lines of {"tokens", "tags"} or CoNLL: a token a line, its tag in
the last column, a blank line after a sentence; .gz, .xz, .bz2 and .zst, too.
IO, IOB1, IOB2 and BIOES are understood.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import json
import pathlib

import numpy as np

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.runtime import lines as lines_lib

NO_LABEL = -1  # Of [CLS], [SEP], padding, and wordpieces inside a word.
_DOCUMENT_START = '-DOCSTART-'  # A line of CoNLL 2003 that is no token.

Entity = tuple[str, int, int]  # Type, first word, and the word behind it.


@dataclasses.dataclass(frozen=True)
class TaggedSentence:
  """Words and, as many, their tags (IOB2)."""

  tokens: list[str]
  tags: list[str]


def read(sources: str) -> list[TaggedSentence]:
  """Reads files of tagged sentences, comma-separated.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: naming file and line, what is wrong and what was expected.
  """
  sentences = []
  for source in sources.split(','):
    path = pathlib.Path(source.strip())
    if not path.is_file():
      raise FileNotFoundError(f'There is no file of tagged sentences {path}.')
    json_lines = lines_lib.plain_name(path).endswith(('.jsonl', '.json'))
    found = list(_read_json_lines(path) if json_lines else _read_conll(path))
    if not found:
      raise ValueError(
          f'{path} has no sentence. Expected are JSON Lines of {{"tokens",'
          ' "tags"}, or CoNLL: a token and its tag on each line.'
      )
    sentences += found
  return sentences


def _read_json_lines(path: pathlib.Path) -> Iterator[TaggedSentence]:
  for number, line in enumerate(lines_lib.lines(path), start=1):
    if not line.strip():
      continue
    where = f'{path}:{number}'
    try:
      record = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
      raise ValueError(f'{where}: not JSON ({error}).') from None
    if not isinstance(record, dict):
      raise ValueError(f'{where}: not an object of "tokens" and "tags".')
    columns = []
    for field in ('tokens', 'tags'):
      column = record.get(field)
      if not isinstance(column, list) or not all(
          isinstance(word, str) for word in column
      ):
        raise ValueError(f'{where}: "{field}" must be a list of strings.')
      columns.append(column)
    tokens, tags = columns
    if len(tokens) != len(tags):
      raise ValueError(
          f'{where}: there are {len(tokens)} tokens and {len(tags)} tags.'
      )
    if tokens:
      yield TaggedSentence(tokens, _iob2(tags, [where] * len(tags)))


def _read_conll(path: pathlib.Path) -> Iterator[TaggedSentence]:
  tokens: list[str] = []
  tags: list[str] = []
  places: list[str] = []
  for number, line in enumerate((*lines_lib.lines(path), b''), start=1):
    where = f'{path}:{number}'
    try:
      columns = line.decode('utf-8').split()
    except UnicodeDecodeError as error:
      raise ValueError(f'{where}: not UTF-8 ({error.reason}).') from None
    if not columns:
      if tokens:
        yield TaggedSentence(tokens, _iob2(tags, places))
      tokens, tags, places = [], [], []
    elif columns[0] == _DOCUMENT_START:
      continue
    elif len(columns) < 2:
      raise ValueError(
          f'{where}: one column, {columns[0]!r}; expected are a token and, in'
          ' the last column, its tag.'
      )
    else:
      tokens.append(columns[0])
      tags.append(columns[-1])
      places.append(where)


def _iob2(tags: Sequence[str], places: Sequence[str]) -> list[str]:
  """Rewrites IO, IOB1, IOB2 and BIOES, by the rules of seqeval."""
  written = []
  before, open_type = 'O', ''  # Prefix of the last tag, and its type.
  for tag, where in zip(tags, places, strict=True):
    prefix, _, kind = tag.partition('-')
    if tag != 'O' and (prefix not in 'BIESLU' or len(prefix) != 1 or not kind):
      raise ValueError(
          f'{where}: the tag {tag!r} is neither O nor one of B-, I-, E-, S-'
          ' and a type, such as B-PER.'
      )
    if tag == 'O':
      written.append('O')
      before, open_type = 'O', ''
      continue
    begins = (
        prefix in 'BSU' or before in 'OESLU' or open_type != kind
    )
    written.append(f'B-{kind}' if begins else f'I-{kind}')
    before, open_type = prefix, kind
  return written


def types_of(sentences: Iterable[TaggedSentence]) -> tuple[str, ...]:
  """Returns the types of entities that occur, in alphabetical order."""
  found = {
      tag[2:] for sentence in sentences for tag in sentence.tags if tag != 'O'
  }
  return tuple(sorted(found))


def labels(types: Sequence[str]) -> list[str]:
  """Returns the tag that each label stands for."""
  return ['O', *(f'{prefix}-{kind}' for kind in types for prefix in 'BI')]


@dataclasses.dataclass(frozen=True)
class TaggedTable:
  """Sentences as wordpieces; a long one takes several rows.

  Every wordpiece that begins a word has a label, where BERT's words are meant:
  the token 'U.S.' is four of them. The tags of a token go on over all of its
  words, so that no tokens are needed where the tagger is used. A token without
  wordpieces, such as a control character, has no place here.

  ids_NL: int32, `[CLS] words [SEP]`, padded.
  types_NL: int32, segment 1 where the word has a capital letter.
  begins_NL: bool, the wordpieces that begin a word.
  labels_NL: int32, of these; NO_LABEL elsewhere, or where tags are not given.
  sentences_N: the sentence of each row.
  words_NL: int32, the token of that sentence at its first wordpiece, else -1.
  digest: SHA-256 over the sentences, and how they are labelled.
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
      types: of entities; an entity of another type is an error. None: the tags
        are not looked at.
      length: L. A longer sentence is continued in the next row; a token longer
        than that is cut.
      tokenizer: of the corpus.

    Raises:
      ValueError: for an entity of another type.
    """
    number = None
    if types is not None:
      number = {tag: i for i, tag in enumerate(labels(types))}
    words = _Words(tokenizer)
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
    """Puts sentences that are wordpieces already into rows."""
    of_row, starts, limits = [], [], []
    for i, sentence in enumerate(sentences):
      for start, limit in _rows(sentence.words, length - 2):
        of_row.append(i)
        starts.append(start)
        limits.append(limit)
    sentences_N = np.array(of_row, np.int64)
    sizes_N = np.array(limits, np.int64) - np.array(starts, np.int64)
    # Of each wordpiece: its row, its place there, and that in all sentences.
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
    ids_NL[np.arange(len(of_row)), sizes_N + 1] = tokenizer.sep_id
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
  """The wordpieces of a sentence, and of each:

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
      cls,
      text: str,
      ids: np.ndarray,
      starts: np.ndarray,
      begins: np.ndarray,
  ) -> 'Wordpieces':
    """Of running text, where every word is a token; without labels."""
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
  """Returns the entities that labels are of, of whatever type.

  Args:
    table: of the sentences.
    labels_NL: of its wordpieces, as `models.tagger.decode` has them: an I- goes
      on with what comes before it.

  Returns:
    Of each entity, in order: its sentence, its first word, and the word behind
    it.
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

  Args:
    table: of the sentences.
    labels_NL: of its wordpieces; that of a token's first is the token's.
    types: that the labels are of.
    counts: tokens of each sentence. One without a wordpiece is O.
  """
  tag = labels(types)
  found = [['O'] * count for count in counts]
  for row, place in zip(*np.nonzero(table.words_NL >= 0), strict=True):
    sentence, word = table.sentences_N[row], table.words_NL[row, place]
    found[sentence][word] = tag[labels_NL[row, place]]
  return [_iob2(tags, [''] * len(tags)) for tags in found]


class _Words(dict):
  """Of each token: its wordpieces, capitals and beginnings of words."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer):
    super().__init__()
    self._tokenizer = tokenizer

  def __missing__(self, text: str) -> tuple[np.ndarray, ...]:
    ((ids, starts, _),) = self._tokenizer.encode_arrays([text])
    begins = self._tokenizer.starts_word[ids]
    begins[:1] = True
    self[text] = ids, capitals(text, starts, begins), begins
    return self[text]


def _wordpieces(
    sentence: TaggedSentence, number: dict[str, int] | None, words: _Words
) -> Wordpieces:
  """Returns the wordpieces of all tokens that have one."""
  parts: list[tuple[np.ndarray, ...]] = [
      (np.zeros(0, np.int64),) * len(dataclasses.fields(Wordpieces))
  ]
  for word, (text, tag) in enumerate(
      zip(sentence.tokens, sentence.tags, strict=True)
  ):
    if number is not None and tag not in number:
      raise ValueError(
          f'The tag {tag!r} of the token {text!r} is of no type that is known:'
          f' these are {sorted({tag[2:] for tag in number} - {""})}.'
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
  """Yields where a sentence is cut: before tokens; a longer one loses its end.

  Args:
    words: see `Wordpieces`.
    room: wordpieces of a row.
  """
  if len(words) <= room:  # Nearly all are.
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


def capitals(
    text: str, starts: np.ndarray, begins: np.ndarray
) -> np.ndarray:
  """Tells of each wordpiece whether its word begins with a capital letter.

  Args:
    text: that was encoded.
    starts: the UTF-8 byte at which each wordpiece begins.
    begins: whether it begins a word.

  Returns:
    bool, as many.
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


@dataclasses.dataclass(frozen=True)
class Score:
  """Precision, recall and F1 over entities; `count` is that of the gold."""

  precision: float
  recall: float
  f1: float
  count: int


def score(
    gold: Sequence[Sequence[Entity]], predicted: Sequence[Sequence[Entity]]
) -> dict[str, Score]:
  """Compares the entities of sentences, as seqeval does (Nakayama 2018).

  An entity is right if type, first and last word are.

  Args:
    gold: of each sentence.
    predicted: of the same sentences.

  Returns:
    By type; as `micro`, all types together; as `any`, of whatever type, so
    that only first and last word count. Where nothing is there to be found or
    was found, the share is 0.
  """
  true = {(i, e) for i, of_one in enumerate(gold) for e in of_one}
  found = {(i, e) for i, of_one in enumerate(predicted) for e in of_one}
  scores = {'micro': _score(true, found)}
  scores['any'] = _score(
      {(i, e[1:]) for i, e in true}, {(i, e[1:]) for i, e in found}
  )
  for kind in sorted({e[0] for _, e in true | found}):
    scores[kind] = _score(
        {x for x in true if x[1][0] == kind},
        {x for x in found if x[1][0] == kind},
    )
  return scores


def _score(true: set, found: set) -> Score:
  right = len(true & found)
  precision = right / len(found) if found else 0.0
  recall = right / len(true) if true else 0.0
  f1 = 2 * right / (len(true) + len(found)) if true or found else 0.0
  return Score(precision, recall, f1, len(true))
