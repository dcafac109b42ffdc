"""Tokenizers that are not BERT's: their rules, files, texts, and word starts.

Rules are kept as tokenizer.json has them, so that any normalizer,
pre-tokenizer, model and added tokens of the `tokenizers` library can be used.

WordPiece marks the pieces inside a word. Byte-level BPE and Unigram mark those
after a blank, so that a word after punctuation or at the beginning of a text is
known from its neighbour only.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import re
from typing import Any
import unicodedata

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import processors

from realm_jax.runtime import files

# Names as transformers expects them.
VOCAB, RULES, SETTINGS = 'vocab.txt', 'tokenizer.json', 'tokenizer_config.json'
SPECIALS_MAP = 'special_tokens_map.json'
# The usual wordpiece of each role.
SPECIALS = {
    name: f'[{name.upper()}]' for name in ('pad', 'unk', 'cls', 'sep', 'mask')
}
# The fields of tokenizer.json that decide about the ids of a text.
_FIELDS = ('normalizer', 'pre_tokenizer', 'model', 'added_tokens')
_OWN = {'saved_by': 'realm_jax'}  # In the tokenizer_config.json of `save`.
# Before a special piece that the model itself might find in a text. A character
# that no text has.
_HIDDEN = '\U0010ffff'
# Scripts without blanks between words: Thai to Myanmar, Khmer, kana, Chinese.
_WITHOUT_BLANKS = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf'
    '\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]'
)
_PROBE = 'a'  # A piece of any vocabulary: decoders drop the first blank.
_LAST_SPACE = 0x3000  # The largest code of a blank.
_IS_SPACE = np.array([chr(code).isspace() for code in range(_LAST_SPACE + 2)])


@dataclasses.dataclass(frozen=True)
class Rules:
  """The rules that give a text its ids.

  fields: `_FIELDS` of a tokenizer.json.
  specials: the wordpiece of each role of `SPECIALS`; `unk` and `mask` may be
    missing.
  decoder: of a tokenizer.json; None: WordPiece's.
  separators: number of `sep` between two texts.
  """

  fields: dict[str, Any]
  specials: dict[str, str]
  decoder: dict[str, Any] | None = None
  separators: int = 1

  @classmethod
  def of(
      cls, backend: tokenizers.Tokenizer, specials: dict[str, str]
  ) -> 'Rules':
    """Returns the rules of a Rust tokenizer, in one spelling.

    Text never gives a wordpiece of `specials`. So those that are in the
    vocabulary are no added tokens, and the others alone are marked special.
    """
    whole = json.loads(backend.to_str())
    fields = {name: whole[name] for name in _FIELDS}
    names, vocab = set(specials.values()), set(model_ids(fields['model']))
    fields['added_tokens'] = [
        {**token, 'special': token['content'] in names}
        for token in fields['added_tokens']
        if token['content'] not in names or token['content'] not in vocab
    ]
    is_wordpiece = fields['model']['type'] == 'WordPiece'
    decoder = None if is_wordpiece else whole['decoder']
    rules = cls(fields, specials, decoder, _separators(backend))
    for one in rules.normalizers:
      # Null means: as `lowercase` says.
      if one.get('strip_accents', '') == one.get('lowercase'):
        one['strip_accents'] = None
    return rules

  @property
  def normalizers(self) -> list[dict[str, Any]]:
    """The normalizers in order, those of sequences one by one."""
    found, todo = [], [self.fields['normalizer']]
    while todo:
      one = todo.pop(0)
      if one and one.get('type') == 'Sequence':
        todo = [*one['normalizers'], *todo]
      elif one:
        found.append(one)
    return found

  @property
  def lowercase(self) -> bool:
    """Whether a normalizer lower-cases."""
    return any(
        one.get('type') == 'Lowercase' or bool(one.get('lowercase'))
        for one in self.normalizers
    )

  @property
  def is_wordpiece(self) -> bool:
    return self.fields['model']['type'] == 'WordPiece'

  @property
  def divide_at_spaces(self) -> bool:
    """Whether no rule looks beyond a space or ASCII punctuation, as BERT's."""
    return (
        self.is_wordpiece
        and [one['type'] for one in self.normalizers] == ['BertNormalizer']
        and self.fields['pre_tokenizer'] == {'type': 'BertPreTokenizer'}
        and all(token['special'] for token in self.fields['added_tokens'])
    )

  @property
  def ids(self) -> dict[str, int]:
    """The id of each wordpiece and added token."""
    ids = model_ids(self.fields['model'])
    for token in self.fields['added_tokens']:
      ids.setdefault(token['content'], token['id'])
    return ids

  def vocab(self) -> list[str]:
    """Returns the wordpieces by id; an id without one gets a name of its own.

    Raises:
      ValueError: two wordpieces have the same id.
    """
    pieces: dict[int, str] = {}
    for piece, i in self.ids.items():
      if pieces.setdefault(i, piece) != piece:
        raise ValueError(f'{pieces[i]!r} and {piece!r} have the same id, {i}.')
    return [
        pieces.get(i, f'[no wordpiece {i}]') for i in range(max(pieces) + 1)
    ]

  def backend(self) -> tokenizers.Tokenizer:
    """Makes the Rust tokenizer."""
    whole = self._whole()
    model, hidden = whole['model'], set(self.specials.values())

    def renamed(piece: str) -> str:
      return _HIDDEN + piece if piece in hidden else piece

    if model['type'] == 'Unigram':
      scored = [[renamed(piece), score] for piece, score in model['vocab']]
      whole['model'] = {**model, 'vocab': scored}
    elif model.get('ignore_merges'):
      ids = {renamed(piece): i for piece, i in model['vocab'].items()}
      whole['model'] = {**model, 'vocab': ids}
    backend = tokenizers.Tokenizer.from_str(
        json.dumps(whole, ensure_ascii=False)
    )
    backend.encode_special_tokens = True  # As text.
    return backend

  def text_decoder(self) -> decoders.Decoder:
    """Makes the decoder of a tokenizer that is not WordPiece."""
    whole = {**self._whole(), 'decoder': self.decoder}
    loaded = tokenizers.Tokenizer.from_str(
        json.dumps(whole, ensure_ascii=False)
    )
    return loaded.decoder or decoders.Fuse()

  def _whole(self) -> dict[str, Any]:
    others = 'truncation', 'padding', 'post_processor', 'decoder'
    return {'version': '1.0', **self.fields, **dict.fromkeys(others)}

  def summary(self) -> str:
    """Returns all but the wordpieces, for a digest."""
    model = self.fields['model']
    if isinstance(model['vocab'], dict):  # Otherwise it has scores.
      model = {**model, 'vocab': len(model['vocab'])}
    parts: list[Any] = [{**self.fields, 'model': model}, self.specials]
    if self.separators != 1:
      parts.append(self.separators)
    return json.dumps(parts, sort_keys=True)

  def save(self, directory: pathlib.Path) -> None:
    """Writes the files that `saved` and transformers read, but vocab.txt."""
    whole, ids = self._whole(), self.ids
    cls, sep = self.specials['cls'], self.specials['sep']
    other = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    other.post_processor = processors.TemplateProcessing(
        single=[cls, '$A', sep],
        pair=[cls, '$A', *[sep] * self.separators, '$B:1', f'{sep}:1'],
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    if self.is_wordpiece:
      other.decoder = decoders.WordPiece(
          self.fields['model']['continuing_subword_prefix']
      )
    made = json.loads(other.to_str())
    whole['post_processor'] = made['post_processor']
    whole['decoder'] = self.decoder or made['decoder']
    (directory / RULES).write_text(
        json.dumps(whole, ensure_ascii=False), 'utf-8'
    )
    names = {f'{name}_token': token for name, token in self.specials.items()}
    files.write_json(directory / SPECIALS_MAP, names)
    files.write_json(
        directory / SETTINGS,
        {'tokenizer_class': 'PreTrainedTokenizerFast', **names, **_OWN},
    )

  @classmethod
  def saved(cls, directory: pathlib.Path) -> 'Rules':
    """Reads what `save` wrote; its text decides, so that digests stay."""
    whole = files.read_json(directory / RULES)
    names = files.read_json(directory / SPECIALS_MAP)
    fields = {name: whole[name] for name in _FIELDS}
    is_wordpiece = fields['model']['type'] == 'WordPiece'
    pair = whole['post_processor']['pair']
    return cls(
        fields,
        {
            name: names[f'{name}_token']
            for name in SPECIALS
            if f'{name}_token' in names
        },
        None if is_wordpiece else whole['decoder'],
        sum('SpecialToken' in one for one in pair) - 2,
    )


def model_ids(model: dict[str, Any]) -> dict[str, int]:
  """Returns the ids of a model's pieces; Unigram has a list with scores."""
  vocab = model['vocab']
  if isinstance(vocab, dict):
    return dict(vocab)
  return {piece: i for i, (piece, _) in enumerate(vocab)}


def _separators(backend: tokenizers.Tokenizer) -> int:
  """Returns the number of special pieces between two texts, at least 1."""
  parts = backend.encode('a', 'a').sequence_ids
  if 0 not in parts or 1 not in parts:
    return 1
  return max(1, parts.index(1) - (len(parts) - parts[::-1].index(0)))


def do_lower_case(directory: pathlib.Path) -> bool:
  """Returns what tokenizer_config.json says about a vocab.txt."""
  values = files.read_object(directory / SETTINGS, optional=True)
  return bool(values.get('do_lower_case', True))


def write_settings(directory: pathlib.Path, lowercase: bool) -> None:
  """Writes tokenizer_config.json for a vocab.txt with BERT's rules."""
  settings = {'tokenizer_class': 'BertTokenizer', 'do_lower_case': lowercase}
  files.write_json(directory / SETTINGS, {**settings, **_OWN})


def saved_lowercase(path: pathlib.Path) -> bool | None:
  """Returns `lowercase` of a saved tokenizer; None: it is of others."""
  for file in ('manifest.json', SETTINGS):
    values = files.read_json(path / file) if (path / file).is_file() else None
    if isinstance(values, dict) and _OWN.items() <= values.items():
      return bool(values.get('do_lower_case'))
    values = values.get('tokenizer') if isinstance(values, dict) else None
    if isinstance(values, dict) and 'lowercase' in values:
      return bool(values['lowercase'])
  return None


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
