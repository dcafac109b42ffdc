"""The command line: `realm-jax COMMAND --flag=value ...`.

Public: `run`, `COMMANDS`. Each command defines its own flags, so a flag that
it does not know is an error, and imports what it needs, so that none waits for
the others. The commands themselves are in `realm_jax/cli/`.
"""

from collections.abc import Sequence
import difflib
import logging
import os
import re
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

from realm_jax.cli import ask
from realm_jax.cli import convert
from realm_jax.cli import documents
from realm_jax.cli import evaluate
from realm_jax.cli import flags as flags_lib
from realm_jax.cli import index
from realm_jax.cli import plan
from realm_jax.cli import prepare
from realm_jax.cli import questions
from realm_jax.cli import train

FLAGS = flags.FLAGS
_REQUIRED = 'must have a value other than None'  # As absl says it.

# By name, in the order of the help. A name of two words, `index verify`, has
# flags of its own, apart from those of its first word.
COMMANDS = {
    **prepare.COMMANDS,
    **plan.COMMANDS,
    **train.COMMANDS,
    **index.COMMANDS,
    **documents.COMMANDS,
    **evaluate.COMMANDS,
    **convert.COMMANDS,
    **questions.COMMANDS,
    **ask.COMMANDS,
}


def run() -> None:
  """Entry point of `realm-jax` and `python -m realm_jax`."""
  name, arguments = _name(sys.argv[1:])
  if name in ('', '-h', '--help', '--helpfull', 'help'):
    print(_usage())
    sys.exit(0 if name else flags_lib.USAGE)
  if name == '--version':
    import realm_jax

    print(f'realm-jax {realm_jax.__version__}')
    sys.exit(0)
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f' Did you mean `{close[0]}`?' if close else ''
    print(f'No command {name!r}.{hint}\n\n{_usage()}', file=sys.stderr)
    sys.exit(flags_lib.USAGE)
  command = COMMANDS[name]
  if {'-h', '--help', '--helpshort', '--helpfull'} & set(arguments):
    print(_help(name, command))
    sys.exit(0)
  command.define_flags()

  def main(argv: Sequence[str]) -> None:
    logging.getLogger().setLevel(logging.INFO)
    absl_logging.use_absl_handler()
    try:
      if len(argv) > 1 and not command.positional:
        hint = ''
        if f'{name} {argv[1]}' in COMMANDS:
          hint = f' Put it first: `realm-jax {name} {argv[1]} --flag=...`.'
        raise app.UsageError(f'It takes flags only; what is {argv[1]!r}?{hint}')
      command.run(argv)
    except app.UsageError as error:
      print(f'realm-jax {name}: {error}\n{_line(name)}', file=sys.stderr)
      sys.exit(flags_lib.USAGE)
    except (
        ValueError, OSError, ImportError, FloatingPointError, RuntimeError
    ) as error:
      # What the user can act on; anything else is our bug and shows its trace,
      # and so do the many kinds of RuntimeError that are JAX's.
      theirs = (
          isinstance(error, RuntimeError) and type(error) is not RuntimeError
      )
      if theirs or os.environ.get('REALM_JAX_TRACEBACK'):
        raise
      print(f'realm-jax {name}: {error}', file=sys.stderr)
      sys.exit(1)
    except KeyboardInterrupt:
      print(f'realm-jax {name}: interrupted.', file=sys.stderr)
      sys.exit(flags_lib.INTERRUPTED)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, ValueError) as error:
      # A config file that fails comes with its traceback; the last line of it
      # says what is wrong.
      text = str(error.args[0] if error.args else error).strip()
      reason = _explained(text.splitlines()[-1], arguments)
      print(f'realm-jax {name}: {reason}', file=sys.stderr)
      sys.exit(flags_lib.USAGE)

  app.run(
      main, argv=[f'realm-jax {name}', *arguments], flags_parser=parse
  )


def _name(words: Sequence[str]) -> tuple[str, list[str]]:
  """Returns the command's name, of one word or two, and what follows it."""
  name = words[0] if words else ''
  second = words[1] if len(words) > 1 else '-'
  # Any second word is taken for the rest of the name where there are such
  # names, so that a misspelt one is said to be.
  if not second.startswith('-') and _parts(name):
    return f'{name} {second}', [*words[2:]]
  return name, [*words[1:]]


def _parts(name: str) -> list[str]:
  """The commands of two words that begin with this one."""
  return [other for other in COMMANDS if other.startswith(f'{name} ')]


def _usage() -> str:
  width = max(map(len, COMMANDS)) + 2
  lines = ['usage: realm-jax COMMAND [--flag=value ...]', '']
  lines += [f'  {name:{width}}{c.summary}' for name, c in COMMANDS.items()]
  lines += ['', '`realm-jax COMMAND --help` lists the flags of a command.']
  return '\n'.join(lines)


def _line(name: str) -> str:
  positional = COMMANDS[name].positional
  return f'usage: realm-jax {name} [--flag=value ...] {positional}'.rstrip()


def _explained(reason: str, arguments: Sequence[str]) -> str:
  """What the libraries say of a wrong flag, in terms of the command line."""
  if match := re.match(rf'flag --(\S+)=None: .*{_REQUIRED}', reason):
    return f'--{match[1]} is missing.'
  if match := re.match(r'Field (\S+) not found on dataclass', reason):
    given = [word.partition('=')[0] for word in arguments]
    words = [w for w in given if match[1] in w.removeprefix('--').split('.')]
    if words:
      from realm_jax import config as config_lib

      known = config_lib.fields()
      field = words[0].removeprefix('--config.')
      close = difflib.get_close_matches(field, known, 1)
      hint = f' Did you mean --config.{close[0]}?' if close else ''
      return f'{words[0]}: there is no such field.{hint}'
  return reason


def _help(name: str, command: flags_lib.Command) -> str:
  before = set(FLAGS)
  command.define_flags()
  lines = [
      _line(name),
      '',
      command.summary,
      f'For example: {command.example}',
      '',
  ]
  for flag in sorted(set(FLAGS) - before):
    info: Any = FLAGS[flag]
    default = '' if info.default is None else f' (default {info.default})'
    if any(_REQUIRED in validator.message for validator in info.validators):
      default = ' (required)'
    lines.append(f'  --{flag}: {info.help}{default}')
  if _parts(name):
    lines += ['', 'And, each with --help of its own:']
    lines += [f'  {other}: {COMMANDS[other].summary}' for other in _parts(name)]
  return '\n'.join(lines)
