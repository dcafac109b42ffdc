"""Text to wordpieces with their offsets in UTF-8 bytes, and back.

The `tokenizers` library does the work. This module adds checks of the
vocabulary, a digest, reproducible training, byte offsets, and a cache of words.
`pretrained_tokenizer` reads the tokenizers of other programs, WordPiece, BPE or
Unigram; "wordpieces" are the pieces of any.
"""

from collections.abc import Callable, Iterable, Sequence
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import string
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers

from realm_jax import config as config_lib
from realm_jax.corpus import pretrained_tokenizer
from realm_jax.corpus import tokenizer_rules
from realm_jax.corpus import vocabulary
from realm_jax.corpus.tokenizer_rules import byte_positions as byte_positions
from realm_jax.runtime import files

_MAX_WORD_CHARACTERS = 100  # As in BERT, a longer word is [UNK].

# Wordpieces never cross these characters.
_SPACES = ' \t\n\r'
_MARKS = string.punctuation  # As in BERT, with '$' and '^'.
_WORD = re.compile(rf'[^{_SPACES}{re.escape(_MARKS)}]+|[{re.escape(_MARKS)}]')
_SPACE_CLASS, _WORD_CLASS, _MARK_CLASS = range(3)
# Bound for the cache. The English Wikipedia has about a million distinct words,
# most of which occur once; this holds a quarter of them.
_MAX_CACHED_CHARACTERS = 1 << 21

# uint32 ids, and int64 starts and limits in bytes.
Encoded = tuple[np.ndarray, np.ndarray, np.ndarray]


class Tokenizer:
  """A vocabulary and the rules that cut text into its wordpieces.

  The rules are BERT's if `rules` is None. Text never gives special tokens: a
  literal '[SEP]' in a corpus is three wordpieces.

  Attributes:
    pad_id, cls_id, sep_id: of the special wordpieces.
    unk_id, mask_id: -1 if there is none.
    between: the special wordpieces between two texts.
    is_wordpiece: whether a part of a text that is cut between words has the
      wordpieces that it has within the text.
  """

  def __init__(self, vocab: Sequence[str], lowercase: bool = True):
    """Makes a tokenizer with BERT's rules from a vocabulary.

    Args:
      vocab: wordpieces in the order of their ids; those inside a word start
        with '##'.
      lowercase: whether to lower-case text and remove accents.

    Raises:
      ValueError: a wordpiece is empty or occurs twice, or one of [PAD] (at id
        0), [UNK], [CLS], [SEP], [MASK] is missing.
    """
    vocab = list(vocab)
    ids: dict[str, int] = {}
    for i, piece in enumerate(vocab):
      if not piece:
        raise ValueError(f'The vocabulary has an empty wordpiece at id {i}.')
      if piece in ids:
        raise ValueError(
            f'The vocabulary has the wordpiece {piece!r} twice, at ids '
            f'{ids[piece]} and {i}.'
        )
      ids[piece] = i
    specials = vocabulary.SPECIALS
    missing = [piece for piece in specials if piece not in ids]
    if missing:
      raise ValueError(
          f'The vocabulary of {len(vocab)} wordpieces lacks '
          f'{", ".join(missing)}; it must have {", ".join(specials)}.'
      )
    if ids['[PAD]'] != 0:
      raise ValueError(
          f'The vocabulary has [PAD] at id {ids["[PAD]"]}; it must be at 0,'
          ' the first line, as in BERT.'
      )
    backend = _of_bert(vocab, lowercase)
    self._set(vocab, lowercase, backend, tokenizer_rules.SPECIALS)

  def _set(
      self,
      vocab: list[str],
      lowercase: bool,
      backend: tokenizers.Tokenizer,
      specials: dict[str, str],
      rules: tokenizer_rules.Rules | None = None,
  ) -> None:
    """Sets all attributes; the only place that knows the kind of model."""
    self.vocab, self.lowercase = vocab, lowercase
    self.vocab_size = len(vocab)
    self._tokenizer, self._specials, self.rules = backend, specials, rules
    ids = {piece: i for i, piece in enumerate(vocab)}
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
        ids[specials[role]] if role in specials else -1
        for role in tokenizer_rules.SPECIALS
    )
    self.between = [self.sep_id] * (1 if rules is None else rules.separators)
    self.is_wordpiece = rules is None or rules.is_wordpiece
    self._prefix: str | None = None
    self._decoder: decoders.Decoder
    if self.is_wordpiece:
      self._prefix = backend.model.continuing_subword_prefix
      self._decoder = decoders.WordPiece(self._prefix)
    elif rules is not None:
      self._decoder = rules.text_decoder()
    self.divides_at_spaces = rules is None or rules.divide_at_spaces

  @property
  def num_specials(self) -> int:
    """Number of special wordpieces in `[CLS] title [SEP] body [SEP]`."""
    return 2 + len(self.between)

  @classmethod
  def from_rules(cls, rules: tokenizer_rules.Rules) -> 'Tokenizer':
    """Makes a tokenizer with any rules that give wordpieces."""
    made = cls.__new__(cls)
    made._set(
        rules.vocab(), rules.lowercase, rules.backend(), rules.specials, rules
    )
    return made

  @classmethod
  def from_vocab(
      cls, path: str | os.PathLike[str], lowercase: bool = True
  ) -> 'Tokenizer':
    """Reads a vocab.txt: a wordpiece on each line, UTF-8, LF or CRLF.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: it is not UTF-8 or not a valid vocabulary.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f'There is no vocabulary file {path}.')
    lines = files.read_lines(path)
    try:
      return cls(lines, lowercase)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None

  @classmethod
  def from_source(cls, name: str, cased: bool | None = None) -> 'Tokenizer':
    """Reads a tokenizer as transformers does, and says in the log how.

    Args:
      name: a folder, vocab.txt, tokenizer.json, corpus, or model of the hub.
      cased: whether to keep the case of a text, where no file says it; None:
        lower-cased then.

    Raises:
      FileNotFoundError: nothing has that name, here or on the hub.
      ValueError: it cannot be used, or contradicts `cased`.
    """
    path = pathlib.Path(name)
    if not path.exists():
      path = pretrained_tokenizer.download(name)
    saved = tokenizer_rules.saved_lowercase(path)
    if saved is not None:
      found = cls.from_saved(path, saved)
      pretrained_tokenizer.check_saved(cased, found.lowercase, name)
      return found
    rules = pretrained_tokenizer.read(path, cased, name, _of_bert)
    found = cls.from_rules(rules)
    with contextlib.suppress(ValueError):
      plain = cls(found.vocab, found.lowercase)
      usual = tokenizer_rules.Rules.of(plain._tokenizer, plain._specials)
      if usual == rules and not any({*'\r\n'} & {*p} for p in plain.vocab):
        return plain
    return found

  @classmethod
  def from_saved(
      cls, directory: str | os.PathLike[str], lowercase: bool | None = None
  ) -> 'Tokenizer':
    """Reads what `save` wrote, without transformers.

    `lowercase` is for a vocab.txt alone; None: as its tokenizer_config.json
    says.

    Raises:
      FileNotFoundError, ValueError: a file is missing, or damaged.
    """
    directory = pathlib.Path(directory)
    path = directory / tokenizer_rules.RULES
    if not path.is_file():
      if lowercase is None:
        lowercase = tokenizer_rules.do_lower_case(directory)
      return cls.from_vocab(directory / tokenizer_rules.VOCAB, lowercase)
    try:
      return cls.from_rules(tokenizer_rules.Rules.saved(directory))
    except OSError:
      raise
    except Exception as error:  # The library raises nothing more special.
      raise ValueError(f'{path} is damaged: {error!r}.') from error

  @classmethod
  def train(
      cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True
  ) -> 'Tokenizer':
    """Trains a vocabulary; see `vocabulary.learn`."""
    return cls(vocabulary.learn(texts, vocab_size, lowercase), lowercase)

  def complete(self, model: config_lib.ModelConfig) -> None:
    """Sets what the tokenizer decides."""
    model.vocab_size = model.vocab_size or self.vocab_size
    model.pad_id = self.pad_id

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of the wordpieces in order, of `lowercase`, and of other rules.

    Rules that are BERT's are not a part of it.
    """
    lines = [f'lowercase={self.lowercase}', *self.vocab]
    if self.rules is not None:
      lines.append(self.rules.summary())
    return hashlib.sha256('\n'.join(lines).encode('utf-8')).hexdigest()

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self.digest == other.digest

  def __hash__(self) -> int:
    return hash(self.digest)

  def __reduce__(self) -> tuple[Any, ...]:
    if self.rules is None:
      return Tokenizer, (self.vocab, self.lowercase)
    return Tokenizer.from_rules, (self.rules,)

  def encode(self, text: str, masks: bool = False) -> list[int]:
    """Returns the wordpieces of a text, without [CLS] and [SEP].

    With `masks`, a literal '[MASK]' is the special token, as is its name in the
    vocabulary.
    """
    if not masks:
      return self._tokenizer.encode(text).ids
    if self.mask_id < 0:
      raise ValueError('The tokenizer has no mask token.')
    text = text.replace(self._specials['mask'], '[MASK]')
    parts = text.split('[MASK]')
    if not self.is_wordpiece:  # The blank before a mask is part of it.
      parts = [*(part.rstrip() for part in parts[:-1]), parts[-1]]
    ids = self.encode_batch(parts)
    for part in ids[1:]:
      part.insert(0, self.mask_id)
    return [i for part in ids for i in part]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the wordpieces of each text; runs on several threads."""
    encodings = self._tokenizer.encode_batch_fast(list(texts))
    return [encoding.ids for encoding in encodings]

  def encode_arrays(self, texts: Sequence[str]) -> list[Encoded]:
    """Returns ids and half-open ranges of UTF-8 bytes of each text.

    The ranges are right for [UNK], accents and characters that BERT drops.
    """
    arrays = []
    for text, (ids, ranges) in zip(
        texts, self.encode_characters(texts), strict=True
    ):
      if not text.isascii():
        ranges = byte_positions(text)[ranges]
      arrays.append((ids, ranges[:, 0], ranges[:, 1]))
    return arrays

  def encode_characters(
      self, texts: Sequence[str]
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (uint32 ids, int64 [n, 2] ranges of characters) of each text."""
    found = []
    encodings = self._tokenizer.encode_batch(
        list(texts), add_special_tokens=False
    )
    for text, encoding in zip(texts, encodings, strict=True):
      ranges = np.array(encoding.offsets, np.int64).reshape(-1, 2)
      if not self.is_wordpiece:
        ranges = tokenizer_rules.without_blanks(text, ranges)
      found.append((np.array(encoding.ids, np.uint32), ranges))
    return found

  @functools.cached_property
  def piece_texts(self) -> list[str]:
    """The text of each wordpiece; of WordPiece, as the vocabulary has it."""
    if self.is_wordpiece:
      return self.vocab
    special = {*self._specials.values()}
    return tokenizer_rules.texts(
        self._decoder, ['' if p in special else p for p in self.vocab]
    )

  @functools.cached_property
  def starts_word(self) -> Callable[[np.ndarray], np.ndarray]:
    """Tells which wordpieces of a text begin a word: ids [L] to bool [L]."""
    if not self.is_wordpiece:
      return tokenizer_rules.WordStarts(self.piece_texts)
    prefix = self._prefix
    begins = np.array(
        [not (prefix and piece.startswith(prefix)) for piece in self.vocab]
    )
    return lambda ids: begins[ids]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns readable text, without [PAD], [CLS] and [SEP]."""
    dropped = {self.pad_id, self.cls_id, self.sep_id}
    pieces = [self.vocab[i] for i in ids if i not in dropped]
    text = self._decoder.decode(pieces)
    return text if self.is_wordpiece else text.strip()

  def save(
      self, directory: str | os.PathLike[str], settings: bool = False
  ) -> pathlib.Path:
    """Writes DIRECTORY/vocab.txt (LF), and what else `from_saved` needs.

    transformers reads the folder, too. With `settings`, a tokenizer_config.json
    is written even if vocab.txt and `lowercase` say all.
    """
    directory = pathlib.Path(directory)
    path = directory / tokenizer_rules.VOCAB
    text = ''.join(f'{piece}\n' for piece in self.vocab)
    path.write_bytes(text.encode('utf-8'))
    if self.rules is not None:
      self.rules.save(directory)
    elif settings:
      tokenizer_rules.write_settings(directory, self.lowercase)
    return path


class CachedTokenizer:
  """`CachedTokenizer(t)(texts)` equals `t.encode_arrays(texts)`, but faster.

  Not thread-safe. Cutting words is most of the time of `prepare`. BERT's rules
  never look beyond a space or ASCII punctuation, so a word between two of these
  always has the same wordpieces: the library cuts it once, a table answers from
  then on. A tokenizer with other rules is called as it is.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._clear()
    classes = np.full(256, _WORD_CLASS, np.uint8)
    classes[[ord(c) for c in _SPACES]] = _SPACE_CLASS
    classes[[ord(c) for c in _MARKS]] = _MARK_CLASS
    self._classes = classes

  def __call__(self, texts: Sequence[str]) -> list[Encoded]:
    """Returns ids and byte ranges of each text."""
    if not self._tokenizer.divides_at_spaces:
      return self._tokenizer.encode_arrays(texts)
    if self._numbers.characters > _MAX_CACHED_CHARACTERS:
      self._clear()
    numbers = []
    for text in texts:
      words = _WORD.findall(text)
      numbers.append(
          np.fromiter(
              map(self._numbers.__getitem__, words), np.int64, len(words)
          )
      )
    self._encode_new_words()
    return [
        self._encode(text, words)
        for text, words in zip(texts, numbers, strict=True)
    ]

  def _clear(self) -> None:
    self._numbers = _WordNumbers()
    # Word i has the wordpieces [firsts[i], firsts[i + 1]): their ids and their
    # ranges of characters in the word.
    self._firsts = np.zeros(1, np.int64)
    self._ids = np.zeros(0, np.uint32)
    self._ranges = np.zeros((0, 2), np.int64)

  def _encode_new_words(self) -> None:
    new, self._numbers.new = self._numbers.new, []
    if not new:
      return
    encoded = self._tokenizer.encode_characters(new)
    sizes = np.array([len(ids) for ids, _ in encoded], np.int64)
    self._firsts = np.concatenate(
        [self._firsts, self._firsts[-1] + np.cumsum(sizes)]
    )
    self._ids = np.concatenate([self._ids, *(ids for ids, _ in encoded)])
    self._ranges = np.concatenate([self._ranges, *(r for _, r in encoded)])

  def _encode(self, text: str, words: np.ndarray) -> Encoded:
    first = self._firsts[words]
    sizes = self._firsts[words + 1] - first
    before = np.cumsum(sizes) - sizes
    pieces = np.arange(sizes.sum()) + np.repeat(first - before, sizes)
    at = np.repeat(self._starts(text), sizes)
    starts, limits = at + self._ranges[pieces].T
    if not text.isascii():
      to_byte = byte_positions(text)
      starts, limits = to_byte[starts], to_byte[limits]
    return self._ids[pieces], starts, limits

  def _starts(self, text: str) -> np.ndarray:
    """Returns the first character of each word, faster than from matches."""
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


class _WordNumbers(dict[str, int]):
  """Numbers words in the order of their first look-up."""

  def __init__(self) -> None:
    self.characters = 0
    self.new: list[str] = []

  def __missing__(self, word: str) -> int:
    number = self[word] = len(self)
    self.characters += len(word)
    self.new.append(word)
    return number


def _of_bert(vocab: Iterable[str], lowercase: bool) -> tokenizers.Tokenizer:
  """Makes the Rust tokenizer of a vocab.txt, with BERT's rules."""
  backend = tokenizers.Tokenizer(
      models.WordPiece(
          vocab={piece: i for i, piece in enumerate(vocab)},
          unk_token='[UNK]',
          max_input_chars_per_word=_MAX_WORD_CHARACTERS,
      )
  )
  backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  return backend
