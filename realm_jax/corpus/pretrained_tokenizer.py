"""Tokenizers as transformers reads them: folders, vocab.txt, tokenizer.json.

transformers decides what the files mean. This module takes over the Rust
tokenizer that it makes of them, says in the log what was recognised, and
refuses in one line what cannot be used here.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import tempfile
from typing import Any

import tokenizers

from realm_jax.corpus import tokenizer_rules
from realm_jax.corpus.tokenizer_rules import RULES
from realm_jax.corpus.tokenizer_rules import SETTINGS
from realm_jax.corpus.tokenizer_rules import SPECIALS
from realm_jax.corpus.tokenizer_rules import VOCAB
from realm_jax.runtime import extension
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_ADDED, _MODEL = 'added_tokens.json', 'config.json'
_BPE = ('vocab.json', 'merges.txt')  # Older folders of RoBERTa have these two.
# Files of a tokenizer. config.json can name the class of a vocab.txt.
FILES = (VOCAB, RULES, SETTINGS, _ADDED, tokenizer_rules.SPECIALS_MAP, *_BPE)
_KINDS = ('WordPiece', 'BPE', 'Unigram')
_MAX_IDS = 1 << 24  # A larger id leaves a gap that no vocabulary has.

# Fields of the wrong type, which transformers reports without their names.
_BOOL = ((bool,), 'true or false')
_OBJECT = ((dict, type(None)), 'an object, or null')
_TYPES: dict[str, dict[str, tuple[tuple[type, ...], str]]] = {
    SETTINGS: {
        'do_lower_case': _BOOL,
        'tokenize_chinese_chars': _BOOL,
        'strip_accents': ((bool, type(None)), 'true, false or null'),
        'tokenizer_class': ((str, type(None)), 'a name, or null'),
        'added_tokens_decoder': ((dict,), 'an object, {} for none'),
        **{
            f'{name}_token': ((str, dict, type(None)), 'a string, or null')
            for name in SPECIALS
        },
    },
    RULES: {
        'added_tokens': ((list,), 'a list, [] for none'),
        'model': ((dict,), 'an object'),
        **dict.fromkeys(
            ('normalizer', 'pre_tokenizer', 'post_processor', 'decoder'),
            _OBJECT,
        ),
    },
}


def read(
    path: pathlib.Path,
    cased: bool | None,
    name: str,
    of_bert: Callable[[list[str], bool], tokenizers.Tokenizer],
) -> tokenizer_rules.Rules:
  """Reads a tokenizer as transformers does.

  Args:
    path: a folder; a vocab.txt, which is read with the settings in its folder;
      or a tokenizer.json, which is read as it is.
    cased: whether the case is kept, where the files do not say it.
    name: of the source, for messages.
    of_bert: makes the tokenizer of a vocab.txt without any settings, from its
      lines and whether to lower-case. It spares the import of transformers,
      which takes seconds and 25 MiB.

  Raises:
    FileNotFoundError: there is no tokenizer.
    ValueError: it cannot be used; says why, and the mend.
  """
  source = _Source.open(path, name)
  if source.is_plain:
    backend, kind = of_bert(source.lines, not cased), 'BERT'
    names: dict[str, str | None] = {}
  else:
    backend, names, kind = source.load(cased)
  rules = tokenizer_rules.Rules.of(backend, source.specials(backend, names))
  source.check(rules)
  stated = source.stated_case()
  _check_case(cased, rules.lowercase, str(stated or name))
  log.info(
      'Tokenizer %s (%s, read as %s): %s.',
      name, source.names, kind, _description(rules),
  )  # fmt: skip
  source.warn(rules, kind)
  if stated is None and cased is None:
    capitals = sum(
        piece != piece.lower() and not piece.startswith('[')
        for piece in rules.ids
    )
    log.log(
        logging.WARNING if capitals else logging.INFO,
        'No file says whether %s is cased, so text is lower-cased, as for BERT'
        ' uncased%s; --cased keeps capitals and accents.',
        name,
        f', though {capitals} wordpieces have capitals' if capitals else '',
    )
  return rules


def check_saved(cased: bool | None, lowercase: bool, name: str) -> None:
  """Says in the log how a saved tokenizer is; as `_check_case`."""
  _check_case(cased, lowercase, name)
  case = 'lower case' if lowercase else 'cased'
  log.info('Tokenizer %s, as realm_jax saved it: %s.', name, case)


def _check_case(cased: bool | None, lowercase: bool, where: str) -> None:
  """Raises a ValueError if a tokenizer contradicts `cased`."""
  if cased is not None and cased == lowercase:
    raise ValueError(
        f'--{"" if cased else "no"}cased was given, but {where} says that text'
        f' is {"lower-cased" if lowercase else "cased"}: leave the flag out, or'
        ' give another --vocab.'
    )


@dataclasses.dataclass(frozen=True)
class _Source:
  """The files of a tokenizer.

  name: as the user gave it.
  path: of a folder or file.
  files: by the names that transformers expects.
  values: the contents of the JSON files.
  lines: of vocab.txt.
  """

  name: str
  path: pathlib.Path
  files: dict[str, pathlib.Path]
  values: dict[str, dict[str, Any]]
  lines: list[str]

  @classmethod
  def open(cls, path: pathlib.Path, name: str) -> '_Source':
    folder = path if path.is_dir() else path.parent
    found = {
        file: folder / file
        for file in (*FILES, _MODEL)
        if (folder / file).is_file()
    }
    if path.is_file() and _is_rules(path):
      found.pop(VOCAB, None)
      # Another model's config would change what tokenizer.json says.
      found.pop(_MODEL, None)
      found[RULES] = path
    elif path.is_file():
      if path.name != VOCAB:
        found.pop(RULES, None)
      found[VOCAB] = path
    if VOCAB in found or RULES in found:
      found = {file: found[file] for file in found if file not in _BPE}
    elif not {*_BPE} <= {*found}:
      raise FileNotFoundError(
          f'{name} has neither vocab.txt nor tokenizer.json, nor vocab.json and'
          ' merges.txt. save_pretrained of transformers makes a tokenizer.json'
          ' of other files, such as sentencepiece.bpe.model.'
      )
    values = {
        file: files.read_object(place)
        for file, place in found.items()
        if place.suffix == '.json'
    }
    model = values.get(RULES, {}).get('model')
    if isinstance(model, dict):
      _check_model(str(found[RULES]), model)
    lines = files.read_lines(found[VOCAB]) if VOCAB in found else []
    return cls(name, path, found, values, lines)

  @property
  def names(self) -> str:
    """The names of the files."""
    return ', '.join(file.name for file in self.files.values())

  @property
  def is_plain(self) -> bool:
    """Whether it is a vocab.txt alone, in which no line is there twice."""
    return [*self.files] == [VOCAB] and len({*self.lines}) == len(self.lines)

  def get(self, file: str, field: str, default: Any = None) -> Any:
    """Returns a field of a JSON file; the default if there is no file."""
    return self.values.get(file, {}).get(field, default)

  @contextlib.contextmanager
  def staged(self) -> Iterator[pathlib.Path]:
    """Gives a folder with these files alone, under the expected names."""
    with tempfile.TemporaryDirectory() as name:
      folder = pathlib.Path(name)
      for file, path in self.files.items():
        if file == VOCAB:  # Without a byte order mark, which would be a letter.
          text = ''.join(f'{line}\n' for line in self.lines)
          (folder / file).write_bytes(text.encode('utf-8'))
        else:
          (folder / file).symlink_to(path.resolve())
      yield folder

  def load(
      self, cased: bool | None
  ) -> tuple[tokenizers.Tokenizer, dict[str, str | None], str]:
    """Returns the tokenizer that transformers makes of the files.

    Also the special wordpieces that it names, by role, and its class.
    """
    # Without this it advises to install torch.
    os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
    import transformers

    arguments: dict[str, Any] = {'trust_remote_code': False}
    if cased is not None and self.get(SETTINGS, 'do_lower_case') is None:
      arguments['do_lower_case'] = not cased
    logs = transformers.utils.logging
    verbosity = logs.get_verbosity()
    logs.set_verbosity_error()
    with self.staged() as folder:
      try:
        reader = transformers.AutoTokenizer
        if self.path.is_file() and VOCAB not in self.files:
          reader = transformers.PreTrainedTokenizerFast
        elif RULES not in self.files and not self._is_known(folder):
          arguments['tokenizer_type'] = 'bert' if self.lines else 'roberta'
        loaded = reader.from_pretrained(str(folder), **arguments)
      except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
      except BaseException as error:  # A panic of Rust is no Exception.
        reason = str(error).replace(f'{folder}/', '').strip().splitlines()
        first = (reason or [type(error).__name__])[0][:300].rstrip(' .')
        raise ValueError(
            self._wrong_field()
            or f'{self.name}: transformers {transformers.__version__} cannot'
            f' read this tokenizer ({self.names}): {first}. Save it again with'
            ' save_pretrained of its library, or give the path of a vocab.txt'
            ' alone in a folder.'
        ) from error
      finally:
        logs.set_verbosity(verbosity)
    backend: Any = getattr(loaded, 'backend_tokenizer', None)
    kind = type(loaded).__name__
    if backend is None:
      _check_kind(self.name, kind)
    _check_kind(self.name, type(backend.model).__name__)
    names = {role: getattr(loaded, f'{role}_token', None) for role in SPECIALS}
    return backend, names, kind

  def _is_known(self, folder: pathlib.Path) -> bool:
    """Whether transformers has a class for a vocab.txt.

    It needs a name in tokenizer_config.json or config.json. Newer versions lack
    REALM's, and the folders of Google's checkpoints name none: BERT's is meant.
    """
    import transformers

    name = self.get(SETTINGS, 'tokenizer_class') or self.get(
        _MODEL, 'tokenizer_class'
    )
    if name:
      generic = ('PreTrainedTokenizer', 'TokenizersBackend', 'PythonBackend')
      return hasattr(transformers, name) and not name.startswith(generic)
    if not self.get(_MODEL, 'model_type'):
      return False
    try:
      config = transformers.AutoConfig.from_pretrained(str(folder))
    except ValueError:  # An unknown model.
      return False
    return type(config) in transformers.TOKENIZER_MAPPING

  def _wrong_field(self) -> str | None:
    """Says which field has the wrong type."""
    if RULES in self.values and 'model' not in self.values[RULES]:
      return f'{self.files[RULES]} is no tokenizer.json: it has no field model.'
    for file, fields in _TYPES.items():
      for name, (types, expected) in fields.items():
        value = self.get(file, name, ...)
        if value is not ... and not isinstance(value, types):
          return (
              f'{self.files[file]}: {name} is {json.dumps(value)[:60]}; it must'
              f' be {expected}.'
          )
    return None

  def specials(
      self, backend: tokenizers.Tokenizer, names: dict[str, str | None]
  ) -> dict[str, str]:
    """Returns the special wordpieces, each of which the files must have.

    transformers appends those that the files lack, with ids for which no model
    has an embedding.
    """
    model = json.loads(backend.to_str())['model']
    vocab = tokenizer_rules.model_ids(model)
    known = {*vocab, *self.values.get(_ADDED, ())}
    for token in (
        *self.get(RULES, 'added_tokens', ()),
        *self.get(SETTINGS, 'added_tokens_decoder', {}).values(),
    ):
      known.add(token.get('content'))
    specials = {
        role: str(names.get(role) or usual) for role, usual in SPECIALS.items()
    }
    is_wordpiece = model['type'] == 'WordPiece'
    if is_wordpiece:  # The model itself gives [UNK].
      specials['unk'] = model['unk_token']
    for role in ('mask',) if is_wordpiece else ('mask', 'unk'):
      if specials[role] not in known:
        del specials[role]
    if 'mask' not in specials:
      log.warning(
          'Tokenizer %s has no mask token (%s): a corpus for search, `ict` and'
          ' `open_qa`; the objectives `mlm` and `realm` need one. If it has one'
          ' under another name, name it in a %s next to it, as in'
          ' {"mask_token": "<mask>"}.',
          self.name, names.get('mask') or SPECIALS['mask'], SETTINGS,
      )  # fmt: skip
    missing = [
        f'{token} ({role}_token)'
        for role, token in specials.items()
        if token not in (vocab if is_wordpiece and role == 'unk' else known)
    ]
    if missing:
      raise ValueError(
          f'{self.name}: the vocabulary of {len(known)} wordpieces lacks'
          f' {", ".join(missing)}. If it has them under other names, name these'
          f' in a {SETTINGS} next to it, as in {{"pad_token": "<pad>"}}.'
      )
    if len({*specials.values()}) < len(specials):
      raise ValueError(
          f'{self.name}: two of the special wordpieces are the same:'
          f' {specials}.'
      )
    return specials

  def check(self, rules: tokenizer_rules.Rules) -> None:
    """Raises a ValueError if the ids cannot be used here."""
    ids = rules.ids
    if len({*ids.values()}) < len(ids):
      raise ValueError(
          f'{self.name}: {len(ids)} wordpieces have {len({*ids.values()})} ids;'
          ' each must have its own.'
      )
    unread = len({*self.lines} - ids.keys())
    if unread and self.path.is_file():
      raise ValueError(
          f'{self.path} is not the vocabulary of the {RULES} next to it. Give'
          ' the path of that file, or move one of them to another folder.'
      )
    if unread and RULES in self.files:
      log.warning(
          '%s: %d lines of %s are no wordpieces: transformers reads %s.',
          self.name, unread, VOCAB, RULES,
      )  # fmt: skip
    elif unread:
      raise ValueError(
          f'{self.name}: transformers does not read {VOCAB} for a model of type'
          f' {self.get(_MODEL, "model_type")}. Name its class in a {SETTINGS},'
          ' such as {"tokenizer_class": "BertTokenizer"}.'
      )

  def stated_case(self) -> pathlib.Path | None:
    """Returns the file that says whether text is lower-cased, if one does."""
    if self.get(SETTINGS, 'do_lower_case') is not None:
      return self.files[SETTINGS]
    return self.files.get(RULES) or self.files.get(_BPE[0])

  def warn(self, rules: tokenizer_rules.Rules, kind: str) -> None:
    """Logs what files say otherwise than transformers reads them."""
    last = {piece: i for i, piece in enumerate(self.lines)}
    for i, piece in enumerate(self.lines):
      if last[piece] != i:
        log.warning(
            '%s:%d: the wordpiece %r is in line %d again. As in transformers,'
            ' it has the id of that line, and the id %d has none.',
            self.files[VOCAB], i + 1, piece, last[piece] + 1, i,
        )  # fmt: skip
    for token in rules.fields['added_tokens']:
      asked = self.get(_ADDED, token['content'], token['id'])
      if asked != token['id']:
        log.warning(
            '%s gives %r the id %s. As in transformers, which numbers added'
            ' tokens from the end of the vocabulary on, it has the id %d.',
            self.files[_ADDED], token['content'], asked, token['id'],
        )  # fmt: skip
    ours = rules.fields['normalizer']
    theirs = self.get(RULES, 'normalizer', ...)
    if theirs is not ... and _full(theirs) != _full(ours):
      log.warning(
          '%s has the normalizer %s. As in transformers, the class %s takes it'
          ' from tokenizer_config.json instead: %s. To use that of the file,'
          ' give the path of the file.',
          self.files[RULES], json.dumps(theirs), kind, json.dumps(ours),
      )  # fmt: skip


def _is_rules(path: pathlib.Path) -> bool:
  """Whether a file is a tokenizer.json, by its content."""
  with path.open('rb') as file:
    start = file.read(64).removeprefix(b'\xef\xbb\xbf').lstrip()
  return path.suffix == '.json' or bool(re.match(rb'\{\s*("|$)', start))


def _check_model(where: str, model: dict[str, Any]) -> None:
  """Refuses what would take the library minutes, or is of another kind."""
  _check_kind(where, model.get('type', 'WordPiece'))
  vocab = model.get('vocab')
  for piece, i in vocab.items() if isinstance(vocab, dict) else ():
    if isinstance(i, int) and i >= _MAX_IDS:
      raise ValueError(
          f'{where}: the id of {piece!r} is {i}; the largest that can be used'
          f' is {_MAX_IDS - 1}.'
      )


def _check_kind(where: str, kind: Any) -> None:
  if kind not in _KINDS:
    raise ValueError(
        f'{where} is a {kind} tokenizer; supported are {", ".join(_KINDS)}.'
    )


def _description(rules: tokenizer_rules.Rules) -> str:
  """Returns what is recognised, for the log."""
  added = len(rules.fields['added_tokens'])
  found = [f'{len(rules.ids)} wordpieces, {added} of them added tokens']
  found.append('lower case' if rules.lowercase else 'cased')
  kinds = [one.get('type') for one in rules.normalizers]
  if kinds == ['BertNormalizer']:
    one = _full(rules.normalizers[0])
    found.append(f'accents {"removed" if one["strip_accents"] else "kept"}')
    if not one['handle_chinese_chars']:
      found.append('Chinese characters are not divided')
  else:
    found.append(f'normalizers {", ".join(map(str, kinds)) or "none"}')
  return '; '.join(found)


def _full(normalizer: Any) -> Any:
  """Returns a normalizer with BERT's defaults, to compare."""
  if not isinstance(normalizer, dict) or 'lowercase' not in normalizer:
    return normalizer
  usual = {'clean_text': True, 'handle_chinese_chars': True}
  strip = normalizer.get('strip_accents')
  strip = normalizer['lowercase'] if strip is None else strip
  return {**usual, **normalizer, 'strip_accents': strip}


def download(name: str) -> pathlib.Path:
  """Downloads a tokenizer from the hub and returns its folder."""
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
    raise FileNotFoundError(
        f'There is no vocabulary file or tokenizer folder {name!r}.'
    )
  found = [path for file in FILES if (path := extension.hub_file(name, file))]
  if not found:
    raise FileNotFoundError(
        f'{name!r} is neither a vocabulary file nor a tokenizer folder, and as'
        ' an id of the Hugging Face hub it has no tokenizer, or the hub cannot'
        ' be reached and the tokenizer is not in the cache. Without network,'
        ' give the path of a vocab.txt.'
    )
  extension.hub_file(name, _MODEL)
  return found[0].parent
