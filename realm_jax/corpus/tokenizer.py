"""WordPiece with the conventions of BERT (uncased), and byte offsets.

Public: `Tokenizer`, `byte_positions`. The work is done by the `tokenizers`
library; what is added here are checks of the vocabulary, a digest, training
that gives the same result every time, and offsets in UTF-8 bytes.
"""

import collections
from collections.abc import Iterable, Sequence
import functools
import hashlib
import json
import os
import pathlib
import re

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

# In this order: a trained vocabulary has them at 0 to 4. [PAD] must be 0
# everywhere, since a wordpiece is padding if and only if its id is 0.
_SPECIALS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
_MAX_WORD_CHARACTERS = 100  # BERT's: a longer word is [UNK].
_MAX_ALPHABET = 1000  # Of a trained vocabulary; BERT's has about as many.
FOLDER_FILES = ('vocab.txt', 'tokenizer.json', 'tokenizer_config.json')


class Tokenizer:
  """A WordPiece vocabulary and the BERT rules that cut text into it.

  Special tokens are never made from text: a literal '[SEP]' in a corpus is
  three wordpieces.
  """

  def __init__(self, vocab: Sequence[str], lowercase: bool = True):
    """Takes the wordpieces in the order of their ids.

    Args:
      vocab: wordpieces; those inside a word start with '##'.
      lowercase: whether text is lower-cased and its accents are removed.

    Raises:
      ValueError: if a wordpiece is empty or occurs twice, or one of [PAD] (at
        id 0), [UNK], [CLS], [SEP], [MASK] is missing.
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
    missing = [piece for piece in _SPECIALS if piece not in ids]
    if missing:
      raise ValueError(
          f'The vocabulary of {len(vocab)} wordpieces lacks '
          f'{", ".join(missing)}; it must have {", ".join(_SPECIALS)}.'
      )
    if ids['[PAD]'] != 0:
      raise ValueError(
          f'The vocabulary has [PAD] at id {ids["[PAD]"]}; it must be at 0 '
          '(the first line), where BERT has it.'
      )
    self.vocab = vocab
    self.lowercase = lowercase
    self.vocab_size = len(vocab)
    self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
        ids[piece] for piece in _SPECIALS
    )
    self._tokenizer = tokenizers.Tokenizer(
        models.WordPiece(
            vocab=ids,
            unk_token='[UNK]',
            max_input_chars_per_word=_MAX_WORD_CHARACTERS,
        )
    )
    self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    self._decoder = decoders.WordPiece()

  @classmethod
  def from_vocab(
      cls, path: str | os.PathLike[str], lowercase: bool = True
  ) -> 'Tokenizer':
    """Reads a vocab.txt: a wordpiece a line, UTF-8, LF or CRLF.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not UTF-8 or not a usable vocabulary.
    """
    path = pathlib.Path(path)
    if not path.is_file():
      raise FileNotFoundError(f'There is no vocabulary file {path}.')
    data = path.read_bytes()
    try:
      text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
      line = data[: error.start].count(b'\n') + 1
      raise ValueError(f'{path}:{line}: not UTF-8 ({error.reason}).') from None
    # Not splitlines(): wordpieces may hold U+2028 and the like.
    lines = text.split('\n')
    if lines[-1] == '':
      lines.pop()
    try:
      return cls([line.removesuffix('\r') for line in lines], lowercase)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None

  @classmethod
  def from_source(cls, name: str) -> 'Tokenizer':
    """Takes a vocab.txt, a tokenizer's folder, or a model id of the hub.

    A folder holds vocab.txt or tokenizer.json (of a WordPiece model). Whether
    to lower-case is read from the folder, and is true where nothing says so.

    Raises:
      FileNotFoundError: if there is nothing of that name here or on the hub.
      ValueError: if what is there is not a WordPiece vocabulary.
    """
    path = pathlib.Path(name)
    if path.is_file() and path.suffix != '.json':
      return cls.from_vocab(path)
    if not path.exists():
      path = _download(name)
    return cls._from_folder(path)

  @classmethod
  def _from_folder(cls, path: pathlib.Path) -> 'Tokenizer':
    folder = path.parent if path.is_file() else path
    lowercase = True
    settings = folder / 'tokenizer_config.json'
    if settings.is_file():
      lowercase = bool(_read_json(settings).get('do_lower_case', True))
    if path.is_dir() and (folder / 'vocab.txt').is_file():
      return cls.from_vocab(folder / 'vocab.txt', lowercase)
    file = folder / 'tokenizer.json' if path.is_dir() else path
    if not file.is_file():
      raise FileNotFoundError(
          f'The folder {folder} has neither vocab.txt nor tokenizer.json.'
      )
    values = _read_json(file)
    model = values.get('model') or {}
    if model.get('type', 'WordPiece') != 'WordPiece' or not isinstance(
        model.get('vocab'), dict
    ):
      raise ValueError(
          f'{file} is a {model.get("type")} tokenizer; only WordPiece, that of '
          'BERT, can be used.'
      )
    lowercase = (values.get('normalizer') or {}).get('lowercase', lowercase)
    vocab = dict(model['vocab'])
    for token in values.get('added_tokens', []):
      vocab.setdefault(token['content'], token['id'])
    if sorted(vocab.values()) != list(range(len(vocab))):
      raise ValueError(f'{file}: the ids are not 0 to {len(vocab) - 1}.')
    try:
      return cls(sorted(vocab, key=vocab.__getitem__), lowercase)
    except ValueError as error:
      raise ValueError(f'{file}: {error}') from None

  @classmethod
  def train(
      cls, texts: Iterable[str], vocab_size: int, lowercase: bool = True
  ) -> 'Tokenizer':
    """Learns a vocabulary; the same texts give the same one every time.

    Args:
      texts: the corpus; gone through twice, so a list or the like.
      vocab_size: wordpieces at most, special tokens included; a small corpus
        gives fewer.
      lowercase: as in the constructor.

    Raises:
      ValueError: if there is nothing to learn from.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
      counts.update(normalizer.normalize_str(text))
    letters = sorted(
        (c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c)
    )[:_MAX_ALPHABET]
    # The library numbers the pieces inside words in the order of a hash map,
    # another one in every run, and ties between merges go by number. Named as
    # special tokens they are numbered in the order given.
    cut = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    inside = [
        f'##{c}'
        for c in sorted(letters)
        if len(cut(normalizer.normalize_str(f'a{c}a'))) == 1
    ]
    learner = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    learner.normalizer = normalizer
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[*_SPECIALS, *inside],
            initial_alphabet=sorted(letters),
            limit_alphabet=_MAX_ALPHABET,
            show_progress=False,
        ),
    )
    ids = learner.get_vocab()
    if not counts:
      raise ValueError('There is no text to learn a vocabulary from.')
    return cls(sorted(ids, key=ids.__getitem__), lowercase)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 over the wordpieces in order and whether text is lower-cased."""
    lines = [f'lowercase={self.lowercase}', *self.vocab]
    return hashlib.sha256('\n'.join(lines).encode('utf-8')).hexdigest()

  def encode(self, text: str, masks: bool = False) -> list[int]:
    """Returns the wordpieces of a text, without [CLS] and [SEP].

    Args:
      text: any text.
      masks: whether a literal '[MASK]' stands for the special token.
    """
    if not masks:
      return self._tokenizer.encode(text).ids
    ids = self.encode_batch(text.split('[MASK]'))
    for part in ids[1:]:
      part.insert(0, self.mask_id)
    return [i for part in ids for i in part]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the wordpieces of each text, computed on several threads."""
    encodings = self._tokenizer.encode_batch_fast(list(texts))
    return [encoding.ids for encoding in encodings]

  def encode_with_offsets(
      self, text: str
  ) -> tuple[list[int], list[tuple[int, int]]]:
    """Returns the wordpieces and the part of the text that each stands for.

    Returns:
      ids, and for each the half-open range of its UTF-8 bytes in `text`. The
      ranges are right for [UNK], accents and characters that BERT drops.
    """
    ((ids, starts, limits),) = self.encode_arrays([text])
    return ids.tolist(), list(
        zip(starts.tolist(), limits.tolist(), strict=True)
    )

  def encode_arrays(
      self, texts: Sequence[str]
  ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns (uint32 ids, int64 starts, limits in bytes) of each text."""
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
    return [
        (
            np.array(encoding.ids, np.uint32),
            np.array(encoding.offsets, np.int64).reshape(-1, 2),
        )
        for encoding in self._tokenizer.encode_batch(list(texts))
    ]

  @functools.cached_property
  def starts_word(self) -> np.ndarray:
    """bool [vocab_size]: False for the wordpieces that go on a word."""
    return np.array([not piece.startswith('##') for piece in self.vocab])

  def decode(self, ids: Iterable[int]) -> str:
    """Returns readable text, without [PAD], [CLS] and [SEP]."""
    dropped = {self.pad_id, self.cls_id, self.sep_id}
    pieces = [self.vocab[i] for i in ids if i not in dropped]
    return self._decoder.decode(pieces)

  def save(self, directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes DIRECTORY/vocab.txt (LF); `lowercase` is the caller's to keep."""
    path = pathlib.Path(directory) / 'vocab.txt'
    text = ''.join(f'{piece}\n' for piece in self.vocab)
    path.write_bytes(text.encode('utf-8'))
    return path


def byte_positions(text: str) -> np.ndarray:
  """Returns for each character, and the end, its position in UTF-8 bytes."""
  if text.isascii():
    return np.arange(len(text) + 1)
  code_points = np.frombuffer(text.encode('utf-32-le'), np.uint32)
  sizes = 1 + sum(
      (code_points >= limit).astype(np.int64)
      for limit in (0x80, 0x800, 0x10000)
  )
  return np.concatenate([[0], np.cumsum(sizes)])


def _read_json(path: pathlib.Path) -> dict:
  try:
    values = json.loads(path.read_text('utf-8'))
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ValueError(f'{path} is not a JSON object.')
  return values


def hub_file(name: str, file: str) -> pathlib.Path | None:
  """Downloads a file from the Hugging Face hub, or finds it in its cache.

  Args:
    name: id of a repository.
    file: name of the file.

  Returns:
    The path; None: the repository lacks the file, or the hub cannot be reached
    and the cache lacks it.

  Raises:
    FileNotFoundError: the repository cannot be read; gives the reason.
  """
  # Imported late: it is slow, and local files do not need it.
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(name, file))
  except errors.EntryNotFoundError:
    return None
  except (errors.HfHubHTTPError, OSError, ValueError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise FileNotFoundError(
        f'{name!r} is no file or folder, and as an id of the Hugging Face hub'
        f' it could not be fetched: {reason}'
    ) from error


def _download(name: str) -> pathlib.Path:
  """Downloads a tokenizer from the hub; returns its folder."""
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
    raise FileNotFoundError(
        f'There is no vocabulary file or tokenizer folder {name!r}.'
    )
  found = [path for file in FOLDER_FILES if (path := hub_file(name, file))]
  if not found:
    raise FileNotFoundError(
        f'{name!r} is neither a vocabulary file nor a tokenizer folder, and as'
        ' an id of the Hugging Face hub it has no tokenizer, or the hub cannot'
        ' be reached and the tokenizer is not in the cache. Without network,'
        ' give the path of a vocab.txt.'
    )
  return found[0].parent
