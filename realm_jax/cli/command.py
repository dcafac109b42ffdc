"""What a command of `realm-jax` is made of.

Public: `Command`, `workdir_flag`, `split_list`, `quiet_jax`, the exit codes.
A module beside this one has a group of commands in a table `COMMANDS`, by the
words after `realm-jax`; `main.py` puts the tables together.
"""

from collections.abc import Callable, Sequence
import dataclasses
import logging

from absl import flags

# Exit codes beside 0 and 1: of a wrong command line, of Ctrl-C, and of a job
# that SIGTERM stopped after it saved a checkpoint (128 + 2 and 128 + 15, as a
# shell reports signals).
USAGE, INTERRUPTED, TERMINATED = 2, 130, 143


@dataclasses.dataclass(frozen=True)
class Command:
  """One word after `realm-jax`, or two: `index verify`."""

  summary: str
  example: str
  define_flags: Callable[[], None]
  run: Callable[[Sequence[str]], None]
  positional: str = ''  # What it takes besides flags.


def workdir_flag() -> None:
  """Defines --workdir."""
  flags.DEFINE_string(
      'workdir',
      None,
      'Folder of the job: config, checkpoints, index, metrics.',
      required=True,
  )


def split_list(text: str | None) -> list[str]:
  """Returns the parts of a comma-separated flag; none of an absent one."""
  return [part.strip() for part in (text or '').split(',') if part.strip()]


def quiet_jax() -> None:
  """Keeps the libraries' running commentary out of the user's log."""
  for name in ('orbax', 'absl', 'jax'):
    logging.getLogger(name).setLevel(logging.WARNING)
