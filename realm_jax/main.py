"""The command line: `realm-jax COMMAND --flag=value ...`.

Only the flags of the command are defined; any other flag is an error.
"""

from collections.abc import Sequence
import difflib
import functools
import logging
import os
import sys

from absl import app
from absl import flags
from absl import logging as absl_logging

from realm_jax.cli import flags as flags_lib
from realm_jax.cli.commands import COMMANDS

# Exit codes of a wrong command line and of Ctrl-C (128 + SIGINT).
_USAGE, _INTERRUPTED = 2, 130


def run() -> None:
  """Entry point of `realm-jax` and `python -m realm_jax`."""
  name, arguments = _name(sys.argv[1:])
  if name in ('', '-h', '--help', '--helpfull', 'help'):
    print(_usage())
    sys.exit(0 if name else _USAGE)
  if name == '--version':
    import realm_jax

    print(f'realm-jax {realm_jax.__version__}')
    sys.exit(0)
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f' Did you mean `{close[0]}`?' if close else ''
    print(f'No command {name!r}.{hint}\n\n{_usage()}', file=sys.stderr)
    sys.exit(_USAGE)
  if {'-h', '--help', '--helpshort', '--helpfull'} & set(arguments):
    print(_help(name))
    sys.exit(0)
  for flag in COMMANDS[name].flags:
    flag.define()
  app.run(
      functools.partial(_call, name),
      argv=[f'realm-jax {name}', *arguments],
      flags_parser=functools.partial(_parse, name),
  )


def _name(words: Sequence[str]) -> tuple[str, list[str]]:
  """Returns the command's name, of one word or two, and what follows it."""
  name = words[0] if words else ''
  second = words[1] if len(words) > 1 else '-'
  # If commands of two words exist, a second word belongs to the name, and the
  # error for a misspelt one shows both words.
  if not second.startswith('-') and _subcommands(name):
    return f'{name} {second}', [*words[2:]]
  return name, [*words[1:]]


def _subcommands(name: str) -> list[str]:
  """Returns the commands of two words with this first word."""
  return [other for other in COMMANDS if other.startswith(f'{name} ')]


def _parse(name: str, argv: Sequence[str]) -> list[str]:
  try:
    words = flags.FLAGS(argv)
    for flag in COMMANDS[name].flags:  # A config that was not read raises.
      hasattr(flags.FLAGS[flag.name].value, 'steps')
    return words
  except Exception as error:  # An experiment file may raise any.
    if os.environ.get('REALM_JAX_TRACEBACK'):
      raise
    reason = flags_lib.explain(error, argv[1:])
    print(f'realm-jax {name}: {reason}', file=sys.stderr)
    sys.exit(_USAGE)


def _call(name: str, argv: Sequence[str]) -> None:
  """Calls the action of a command with its flags; reports its errors."""
  logging.getLogger().setLevel(logging.INFO)
  absl_logging.use_absl_handler()
  for library in ('orbax', 'absl', 'jax'):
    logging.getLogger(library).setLevel(logging.WARNING)
  command, words = COMMANDS[name], argv[1:]
  try:
    if words and not command.positional:
      hint = ''
      if f'{name} {words[0]}' in COMMANDS:
        hint = f' Put it first: `realm-jax {name} {words[0]} --flag=...`.'
      raise app.UsageError(f'It takes flags only, not {words[0]!r}.{hint}')
    values = {flag.name: flags.FLAGS[flag.name].value for flag in command.flags}
    command.action(*words, **values)
  except app.UsageError as error:
    print(f'realm-jax {name}: {error}\n{_line(name)}', file=sys.stderr)
    sys.exit(_USAGE)
  except (
      ValueError, OSError, ImportError, FloatingPointError, RuntimeError
  ) as error:
    # The user can act on these errors. All others are bugs and show a trace;
    # so do the subclasses of RuntimeError, which are JAX's.
    is_bug = isinstance(error, RuntimeError) and type(error) is not RuntimeError
    if is_bug or os.environ.get('REALM_JAX_TRACEBACK'):
      raise
    print(f'realm-jax {name}: {error}', file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print(f'realm-jax {name}: interrupted.', file=sys.stderr)
    sys.exit(_INTERRUPTED)


def _usage() -> str:
  width = max(map(len, COMMANDS)) + 2
  lines = ['usage: realm-jax COMMAND [--flag=value ...]', '']
  lines += [f'  {name:{width}}{c.summary}' for name, c in COMMANDS.items()]
  lines += ['', '`realm-jax COMMAND --help` lists the flags of a command.']
  return '\n'.join(lines)


def _line(name: str) -> str:
  positional = COMMANDS[name].positional
  return f'usage: realm-jax {name} [--flag=value ...] {positional}'.rstrip()


def _help(name: str) -> str:
  command = COMMANDS[name]
  lines = [
      _line(name),
      '',
      command.summary,
      f'For example: realm-jax {name} {command.example}',
      '',
      *sorted(map(str, command.flags)),
  ]
  if _subcommands(name):
    lines += ['', 'And, each with --help of its own:']
    lines += [
        f'  {other}: {COMMANDS[other].summary}' for other in _subcommands(name)
    ]
  return '\n'.join(lines)
