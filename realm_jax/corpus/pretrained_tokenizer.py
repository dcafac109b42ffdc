"""Tokenizers as transformers reads them: folders, vocab.txt, tokenizer.json.

transformers decides what the files mean. This module takes over the Rust
tokenizer that it makes of them, says in the log what was recognised, and
refuses in one line what cannot be used here.
"""

from collections.abc import Iterator
import contextlib
import json
import logging
import os
import pathlib
import re
import tempfile
from types import ModuleType
from typing import Any

from realm_jax.corpus import tokenizer_rules
from realm_jax.corpus.tokenizer_rules import RULES
from realm_jax.corpus.tokenizer_rules import SETTINGS
from realm_jax.corpus.tokenizer_rules import SPECIALS
from realm_jax.corpus.tokenizer_rules import VOCAB
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_ADDED, _MODEL = 'added_tokens.json', 'config.json'
# The files that say what a tokenizer does.
FILES = (
    VOCAB, RULES, SETTINGS, _ADDED, tokenizer_rules.SPECIALS_MAP, _MODEL
)  # fmt: skip
# A larger id leaves a gap that no vocabulary has.
_MAX_IDS = 1 << 24

# Fields of the wrong type, which transformers reports without their names.
_TYPES: dict[str, dict[str, tuple[tuple[type, ...], str]]] = {
    SETTINGS: {
        'do_lower_case': ((bool,), 'true or false'),
        'tokenize_chinese_chars': ((bool,), 'true or false'),
        'strip_accents': ((bool, type(None)), 'true, false or null'),
        'tokenizer_class': ((str, type(None)), 'a name, or null'),
        'added_tokens_decoder': ((dict,), 'an object, {} for none'),
        **{
            f'{name}_token': ((str, dict), 'a string')
            for name in SPECIALS
        },
    },
    RULES: {
        'added_tokens': ((list,), 'a list, [] for none'),
        'model': ((dict,), 'an object'),
        'normalizer': ((dict, type(None)), 'an object, or null'),
        'pre_tokenizer': ((dict, type(None)), 'an object, or null'),
        'post_processor': ((dict, type(None)), 'an object, or null'),
        'decoder': ((dict, type(None)), 'an object, or null'),
    },
}


def read(
    path: pathlib.Path, cased: bool | None, shown: str | None = None
) -> tokenizer_rules.Rules:
  """Reads a tokenizer as transformers does.

  Args:
    path: a folder; a vocab.txt, which is read with the settings in its folder;
      or a tokenizer.json, which is read as it is.
    cased: whether the case is kept, where the files do not say it.
    shown: name of the source in messages; None: the path.

  Raises:
    FileNotFoundError: the folder has no tokenizer.
    ValueError: it cannot be used; says why, and the mend.
  """
  shown = shown or str(path)
  found = _files(path)
  if VOCAB not in found and RULES not in found:
    raise FileNotFoundError(
        f'The folder {shown} has neither vocab.txt nor tokenizer.json; a'
        ' WordPiece tokenizer, as of BERT, has one of them.'
    )
  values = {
      name: _object(file) for name, file in found.items() if name != VOCAB
  }
  model = values.get(RULES, {}).get('model')
  kind = model.get('type', 'WordPiece') if isinstance(model, dict) else None
  if isinstance(kind, str) and kind != 'WordPiece':
    raise _not_wordpiece(str(found[RULES]), kind)
  lines = vocab_lines(found[VOCAB]) if VOCAB in found else []
  with _staged(found, lines) as folder:
    loaded, kind = _load(folder, path, shown, found, values, cased)
  backend = loaded.backend_tokenizer
  fields = json.loads(backend.to_str())
  if fields['model'].get('type') != 'WordPiece':
    raise _not_wordpiece(shown, fields['model'].get('type'))
  specials = _specials(shown, loaded, fields, values)
  rules = tokenizer_rules.Rules.of(backend, specials)
  _check(shown, rules)
  _check_lines(path, found, lines, rules)
  stated = _stated_case(found, values)
  if cased is not None and rules.lowercase == cased:
    raise ValueError(
        f'cased is {cased}, but {stated} {"lower-cases" if cased else "keeps"}'
        ' the case of a text: leave the flag out, or change the file.'
    )
  _say(shown, kind, rules, found, values, stated, cased)
  return rules


def vocab_lines(path: pathlib.Path) -> list[str]:
  """Returns the lines of a vocab.txt.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: it is not UTF-8.
  """
  if not path.is_file():
    raise FileNotFoundError(f'There is no vocabulary file {path}.')
  data = path.read_bytes()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b'\n') + 1
    raise ValueError(f'{path}:{line}: not UTF-8 ({error.reason}).') from None
  # Not splitlines(): wordpieces may contain U+2028 and similar characters.
  lines = text.split('\n')
  if lines[-1] == '':
    lines.pop()
  return [line.removesuffix('\r') for line in lines]


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files to read, by the names that transformers expects."""
  folder = path if path.is_dir() else path.parent
  found = {name: folder / name for name in FILES if (folder / name).is_file()}
  if path.is_file():
    if _is_rules(path):
      found.pop(VOCAB, None)
      # Another model's files would change what tokenizer.json says.
      found.pop(_MODEL, None)
      found[RULES] = path
    else:
      if path.name != VOCAB:
        found.pop(RULES, None)
      found[VOCAB] = path
  return found


def _is_rules(path: pathlib.Path) -> bool:
  """Whether a file is a tokenizer.json, by its content."""
  with path.open('rb') as file:
    start = file.read(64).removeprefix(b'\xef\xbb\xbf').lstrip()
  return path.suffix == '.json' or bool(re.match(rb'\{\s*("|$)', start))


def _object(path: pathlib.Path) -> dict[str, Any]:
  values = files.read_json(path)
  if not isinstance(values, dict):
    raise ValueError(f'{path} is not a JSON object.')
  return values


@contextlib.contextmanager
def _staged(
    found: dict[str, pathlib.Path], lines: list[str]
) -> Iterator[pathlib.Path]:
  """Gives a folder with these files alone, under the expected names."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for file, path in found.items():
      if file == VOCAB:  # Without a byte order mark, which would be a letter.
        text = ''.join(f'{line}\n' for line in lines)
        (folder / file).write_bytes(text.encode('utf-8'))
      else:
        (folder / file).symlink_to(path.resolve())
    yield folder


def _transformers() -> ModuleType:
  # Imported late: the import takes seconds. Without torch it prints an advice.
  os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')
  import transformers

  return transformers


def _load(
    folder: pathlib.Path,
    path: pathlib.Path,
    shown: str,
    found: dict[str, pathlib.Path],
    values: dict[str, dict[str, Any]],
    cased: bool | None,
) -> tuple[Any, str]:
  """Returns the tokenizer of transformers, and the name of its class."""
  transformers = _transformers()
  arguments: dict[str, Any] = {}
  reader = transformers.AutoTokenizer
  if path.is_file() and VOCAB not in found:
    reader = transformers.PreTrainedTokenizerFast
  else:
    arguments['trust_remote_code'] = False
    if RULES not in found and not _is_known(transformers, folder, values):
      arguments['tokenizer_type'] = 'bert'
  if cased is not None and 'do_lower_case' not in values.get(SETTINGS, {}):
    arguments['do_lower_case'] = not cased
  logs = transformers.utils.logging
  verbosity = logs.get_verbosity()
  logs.set_verbosity_error()
  try:
    loaded = reader.from_pretrained(str(folder), **arguments)
  except (KeyboardInterrupt, SystemExit, MemoryError):
    raise
  except BaseException as error:  # A panic of Rust is no Exception.
    raise ValueError(_reason(shown, folder, found, values, error)) from error
  finally:
    logs.set_verbosity(verbosity)
  if getattr(loaded, 'backend_tokenizer', None) is None:
    raise _not_wordpiece(shown, type(loaded).__name__)
  return loaded, type(loaded).__name__


def _is_known(
    transformers: ModuleType,
    folder: pathlib.Path,
    values: dict[str, dict[str, Any]],
) -> bool:
  """Whether transformers has a class for the folder of a vocab.txt.

  It needs one from tokenizer_config.json or config.json. Newer versions lack
  REALM's, and the folders of Google's checkpoints name none; these are BERT's.
  """
  name = None
  for file in (SETTINGS, _MODEL):
    name = name or values.get(file, {}).get('tokenizer_class')
  if isinstance(name, str):
    generic = ('PreTrainedTokenizer', 'TokenizersBackend', 'PythonBackend')
    return hasattr(transformers, name) and not name.startswith(generic)
  try:
    config = transformers.AutoConfig.from_pretrained(str(folder))
  except (ValueError, OSError, KeyError, TypeError, AttributeError):
    return False
  return type(config) in transformers.TOKENIZER_MAPPING


def _reason(
    shown: str,
    folder: pathlib.Path,
    found: dict[str, pathlib.Path],
    values: dict[str, dict[str, Any]],
    error: BaseException,
) -> str:
  """Returns one line: the field at fault, or else what the library says."""
  for file, fields in _TYPES.items():
    for name, (types, expected) in fields.items():
      value = values.get(file, {}).get(name, ...)
      if value is not ... and not isinstance(value, types):
        return (
            f'{found[file]}: {name} is {json.dumps(value)[:60]}; it must be'
            f' {expected}.'
        )
  lines = str(error).replace(f'{folder}/', '').strip().splitlines()
  reason = lines[0][:300] if lines else type(error).__name__
  names = ', '.join(file.name for file in found.values())
  return (
      f'{shown}: transformers {_transformers().__version__} cannot read this'
      f' tokenizer ({names}): {reason.removesuffix(".")}. Save it again with'
      " its library's save_pretrained, or give a vocab.txt alone."
  )


def _not_wordpiece(shown: str, kind: Any) -> ValueError:
  return ValueError(
      f'{shown} is a {kind} tokenizer; only WordPiece, as in BERT, is'
      ' supported.'
  )


def _specials(
    shown: str,
    loaded: Any,
    fields: dict[str, Any],
    values: dict[str, dict[str, Any]],
) -> dict[str, str]:
  """Returns the special wordpieces, each of which the files must have.

  transformers appends those that the files lack, with ids for which no model
  has an embedding.
  """
  known = set(fields['model']['vocab'])
  known.update(values.get(_ADDED, {}))
  for tokens in (
      values.get(RULES, {}).get('added_tokens') or [],
      (values.get(SETTINGS, {}).get('added_tokens_decoder') or {}).values(),
  ):
    known.update(token['content'] for token in tokens)
  specials = {
      name: str(getattr(loaded, f'{name}_token', None) or usual)
      for name, usual in SPECIALS.items()
  }
  missing = [f'{t} ({n}_token)' for n, t in specials.items() if t not in known]
  if missing:
    raise ValueError(
        f'{shown}: the vocabulary of {len(known)} wordpieces lacks'
        f' {", ".join(missing)}. If it has them under other names, name these'
        f' in a {SETTINGS} beside it, as in {{"mask_token": "<mask>"}}.'
    )
  if len(set(specials.values())) < len(specials):
    raise ValueError(
        f'{shown}: each special wordpiece must be another one; they are'
        f' {specials}.'
    )
  return specials


def _check(shown: str, rules: tokenizer_rules.Rules) -> None:
  model = rules.fields['model']
  if model['unk_token'] not in model['vocab']:
    raise ValueError(
        f'{shown}: model.unk_token is {model["unk_token"]!r}, which is not in'
        ' the vocabulary.'
    )
  ids = rules.ids
  pad = rules.specials['pad']
  if ids[pad] != 0:
    raise ValueError(
        f'{shown}: the vocabulary has {pad} at id {ids[pad]}; it must be at 0,'
        ' the first line, as in BERT.'
    )
  if max(ids.values()) >= _MAX_IDS:
    raise ValueError(
        f'{shown}: the largest id is {max(ids.values())}, of'
        f' {max(ids, key=ids.__getitem__)!r}; ids are below {_MAX_IDS}.'
    )
  try:
    rules.vocab()
  except ValueError as error:
    raise ValueError(f'{shown}: {error}') from None


def _check_lines(
    path: pathlib.Path,
    found: dict[str, pathlib.Path],
    lines: list[str],
    rules: tokenizer_rules.Rules,
) -> None:
  """Compares a vocab.txt with the ids; names lines that are there twice."""
  last = {piece: i for i, piece in enumerate(lines)}
  ids = rules.fields['model']['vocab']
  if path.is_file() and any(ids.get(piece) != i for piece, i in last.items()):
    raise ValueError(
        f'{path} is not the vocabulary of {found.get(RULES)} beside it. Give'
        ' that file, or move one of them to another folder.'
    )
  for i, piece in enumerate(lines):
    if last[piece] != i:
      log.warning(
          '%s:%d: the wordpiece %r is in line %d again. As in transformers, it'
          ' has the id of that line, and id %d is not used.',
          found[VOCAB], i + 1, piece, last[piece] + 1, i,
      )  # fmt: skip
      break


def _stated_case(
    found: dict[str, pathlib.Path], values: dict[str, dict[str, Any]]
) -> str | None:
  """Returns the file that says whether the case is kept; None: none does."""
  if 'do_lower_case' in values.get(SETTINGS, {}):
    return str(found[SETTINGS])
  return str(found[RULES]) if RULES in found else None


def _say(
    shown: str,
    kind: str,
    rules: tokenizer_rules.Rules,
    found: dict[str, pathlib.Path],
    values: dict[str, dict[str, Any]],
    stated: str | None,
    cased: bool | None,
) -> None:
  """Says in the log what was recognised, and what was not stated."""
  vocab, added = rules.vocab(), rules.fields['added_tokens']
  parts = [f'{len(vocab)} wordpieces, {len(added)} of them added tokens']
  parts.append('lower case' if rules.lowercase else 'cased')
  kinds = [one.get('type') for one in rules.normalizers]
  if kinds == ['BertNormalizer']:
    (one,) = rules.normalizers
    strip = one.get('strip_accents')
    strip = rules.lowercase if strip is None else strip
    parts.append(f'accents {"removed" if strip else "kept"}')
    if not one.get('handle_chinese_chars', True):
      parts.append('Chinese characters not divided')
  else:
    parts.append(f'normalizers {", ".join(map(str, kinds)) or "none"}')
  log.info(
      'Tokenizer %s (%s, read as %s): %s.',
      shown, ', '.join(file.name for file in found.values()), kind,
      '; '.join(parts),
  )  # fmt: skip
  for token in added:
    asked = values.get(_ADDED, {}).get(token['content'], token['id'])
    if asked != token['id']:
      log.warning(
          '%s gives %r the id %s. As in transformers, which numbers added'
          ' tokens from the end of the vocabulary, it has the id %d.',
          found[_ADDED], token['content'], asked, token['id'],
      )  # fmt: skip
  theirs = values.get(RULES, {}).get('normalizer', ...)
  if theirs is not ... and _comparable(theirs) != _comparable(
      rules.fields['normalizer']
  ):
    log.warning(
        '%s has the normalizer %s. As in transformers, the class %s takes its'
        ' settings from tokenizer_config.json instead: %s. To read the file as'
        ' it is, give its path.',
        found[RULES], json.dumps(theirs), kind,
        json.dumps(rules.fields['normalizer']),
    )  # fmt: skip
  if stated is not None or cased is not None:
    return
  capitals = sum(
      piece != piece.lower() and not piece.startswith('[') for piece in vocab
  )
  log.log(
      logging.WARNING if rules.lowercase and capitals else logging.INFO,
      'No file says whether %s is cased, so text is lower-cased, as for BERT'
      ' uncased%s; --cased keeps capitals and accents.',
      shown,
      f', though {capitals} wordpieces have capitals' if capitals else '',
  )


def _comparable(normalizer: Any) -> Any:
  """Returns a normalizer without what is a default."""
  if not isinstance(normalizer, dict):
    return normalizer
  usual = {'clean_text': True, 'handle_chinese_chars': True}
  found = {**usual, **normalizer} if 'lowercase' in normalizer else normalizer
  strip = found.get('strip_accents')
  return {
      **found,
      'strip_accents': found.get('lowercase') if strip is None else strip,
  }


def hub_file(name: str, file: str) -> pathlib.Path | None:
  """Downloads a file of a repository of the Hugging Face hub, or its cache.

  None: the repository lacks the file, or the hub cannot be reached and the
  cache lacks it.

  Raises:
    FileNotFoundError: the repository cannot be read, with the reason.
  """
  # Imported late: the import is slow, and local files do not need it.
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


def download(name: str) -> pathlib.Path:
  """Downloads a tokenizer from the hub and returns its folder."""
  if not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', name):
    raise FileNotFoundError(
        f'There is no vocabulary file or tokenizer folder {name!r}.'
    )
  found = [path for file in FILES if (path := hub_file(name, file))]
  if not found:
    raise FileNotFoundError(
        f'{name!r} is neither a vocabulary file nor a tokenizer folder, and as'
        ' an id of the Hugging Face hub it has no tokenizer, or the hub cannot'
        ' be reached and the tokenizer is not in the cache. Without network,'
        ' give the path of a vocab.txt.'
    )
  return found[0].parent
