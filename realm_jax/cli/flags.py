"""Flags of the command line, and the messages of their errors."""

from collections.abc import Sequence
import dataclasses
import difflib
import glob
import json
import os
import re
import traceback
from typing import Any, Literal

from absl import flags

_DEFINE: dict[type, Any] = {
    bool: flags.DEFINE_boolean,
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
    list: flags.DEFINE_list,
    str: flags.DEFINE_string,
}
REQUIRED: Any = object()  # Default of a flag that must be given.


@dataclasses.dataclass(frozen=True)
class Flag:
  """One flag of a command.

  name: `--name` on the command line, and the keyword of the action.
  type: `bool`, `float`, `int`, `str`, `list` (names separated by commas), or
    a tuple of the allowed strings.
  help: one sentence.
  default: the value without the flag, or `REQUIRED`.
  """

  name: str
  type: type | tuple[str, ...]
  help: str
  default: Any = None

  def define(self) -> None:
    """Defines the flag in `absl.flags.FLAGS`."""
    required = self.default is REQUIRED
    default = None if required else self.default
    if isinstance(self.type, tuple):
      define, values = flags.DEFINE_enum, [self.type]
    else:
      define, values = _DEFINE[self.type], []
    define(self.name, default, *values, self.help, required=required)

  def __str__(self) -> str:
    """Returns the line of the flag in the help of its command."""
    text = f'  --{self.name}: '
    if isinstance(self.type, tuple):
      text += f'<{"|".join(self.type)}>: '
    text += self.help
    if self.default is REQUIRED:
      return f'{text} (required)'
    return text if self.default is None else f'{text} (default {self.default})'


class _Json(flags.ArgumentParser):
  """A dictionary, as in --config.mips.options='{"lists": 100}'."""

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):
      return argument
    try:
      return json.loads(argument)
    except ValueError as error:
      raise ValueError(
          f'this is no JSON ({error}); an example is \'{{"own": 0.5}}\'.'
      ) from error


class ConfigFlag(Flag):
  """A file that returns a `Config`, with a flag for each of its fields."""

  def define(self) -> None:
    from ml_collections import config_flags

    # A field of type Literal is parsed as a string; config.validate checks it.
    config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
    config_flags.register_flag_parser_for_type(dict, _Json())
    config_flags.DEFINE_config_file(
        self.name, None, self.help, lock_config=True
    )
    if self.default is REQUIRED:
      flags.mark_flag_as_required(self.name)


def overridden(name: str) -> frozenset[str]:
  """Returns the fields of a config flag that the command line sets."""
  if name not in flags.FLAGS:
    return frozenset()  # The command was called as a function.
  from ml_collections import config_flags

  return frozenset(config_flags.get_override_values(flags.FLAGS[name]))


def explain(error: Exception, arguments: Sequence[str]) -> str:
  """Returns the message for an error of the flag libraries.

  `arguments` are the command line after the name of the command.
  """
  path = _given('config', arguments).partition(':')[0]
  if path and (cause := _of_experiment(error, path)):
    return cause
  # The last line of an error in a config file, with traceback, is the cause.
  text = str(error.args[0] if error.args else error).strip()
  reason = text.splitlines()[-1]
  if match := re.match(r'flag --(\S+)=None: .*must have a value other', reason):
    return f'--{match[1]} is missing.'
  from realm_jax import config as config_lib

  known = config_lib.fields()
  if match := re.match(r'flag --config\.([\w.]+)=.*: Unable to parse', reason):
    inside = [name for name in known if name.startswith(f'{match[1]}.')]
    return (
        f'--config.{match[1]} is a section; set its fields,'
        f' {", ".join(f"--config.{name}" for name in inside)}.'
    )
  if match := re.match(r'Field (\S+) not found on dataclass', reason):
    fields = [word.partition('=')[0] for word in arguments]
    words = [w for w in fields if match[1] in w.removeprefix('--').split('.')]
    if words:
      field = words[0].removeprefix('--config.')
      close = difflib.get_close_matches(field, known, 1)
      hint = f' Did you mean --config.{close[0]}?' if close else ''
      return f'{words[0]}: there is no such field.{hint}'
  return reason


def _given(name: str, arguments: Sequence[str]) -> str:
  """Returns the value of `--name=value` or `--name value`, or ''."""
  for word, following in zip(arguments, [*arguments[1:], ''], strict=False):
    flag, equals, value = word.partition('=')
    if flag in (f'--{name}', f'-{name}'):
      return value if equals else following
  return ''


def _of_experiment(error: Exception, path: str) -> str:
  """Returns why an experiment file cannot be used; '' for another cause."""
  if not os.path.isfile(path):
    folder, name = os.path.split(path)
    names = glob.glob('*.py', root_dir=folder or '.')
    close = difflib.get_close_matches(name, names, 1)
    hint = f' Did you mean {os.path.join(folder, close[0])}?' if close else ''
    return f'--config: there is no file {path}.{hint}'
  if "has no attribute 'get_config'" in str(error):
    return f'{path} has no function get_config, which returns the config.'
  if 'Failed loading config file' in str(error):  # A file that it opens.
    return f'{path}: {str(error).splitlines()[-1].strip()}'
  cause: BaseException | None = error
  found = ''
  while cause is not None:
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(cause.__traceback__)
        if frame.filename == path
    ]
    text = str(cause)
    if isinstance(cause, SyntaxError) and cause.filename == path:
      lines, text = [cause.lineno], cause.msg
    if lines:
      found = f'{path}, line {lines[-1]}: {type(cause).__name__}: {text}'
    cause = cause.__cause__ or cause.__context__
  return found
