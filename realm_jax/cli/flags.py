"""What a command of `realm-jax` is made of.

Public: `Command`, `config_flag`, `workdir_flag`, `process_flags`, `processes`,
`split_list`, `quiet_jax`, the exit codes.
A module beside this one has a group of commands in a table `COMMANDS`, by the
words after `realm-jax`; `main.py` puts the tables together.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import logging
from typing import Literal

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


def config_flag(required: bool = True) -> None:
  """Defines --config, and --config.FIELD for each of its fields."""
  from ml_collections import config_flags

  # A choice among strings, which config.validate checks.
  config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
  config_flags.DEFINE_config_file(
      'config',
      None,
      'Experiment file, FILE.py or FILE.py:ARGUMENT; override its fields with'
      ' --config.FIELD=VALUE.',
      lock_config=True,
  )
  if required:
    flags.mark_flag_as_required('config')


def workdir_flag() -> None:
  """Defines --workdir."""
  flags.DEFINE_string(
      'workdir',
      None,
      'Folder of the job: config, checkpoints, index, metrics.',
      required=True,
  )


def process_flags() -> None:
  """Defines how the processes of a job find each other."""
  flags.DEFINE_string(
      'coordinator',
      None,
      'HOST:PORT of process 0, where a job has several, one on each host.',
  )
  flags.DEFINE_integer('num_processes', None, 'How many the job has.')
  flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0 on.')
  flags.DEFINE_boolean(
      'distributed',
      False,
      'Find out these three from SLURM, Kubernetes, Open MPI or the TPU slice.',
  )
  flags.DEFINE_float(
      'coordinator_timeout', 300.0, 'Seconds to wait for the other processes.'
  )


def processes() -> contextlib.AbstractContextManager[None]:
  """Joins the other processes of the job that the flags speak of, if any.

  Raises:
    ValueError: if the flags do not fit together.
    TimeoutError: if the others did not come; see `distributed.job`.
  """
  values = flags.FLAGS
  given = (values.coordinator, values.num_processes, values.process_id)
  if not values.distributed and given == (None, None, None):
    return contextlib.nullcontext()
  if values.distributed and given != (None, None, None):
    raise ValueError(
        '--distributed finds out by itself what --coordinator, --num_processes'
        ' and --process_id say: give it alone, or these three.'
    )
  from realm_jax.runtime import distributed

  return distributed.job(*given, timeout=values.coordinator_timeout)


def split_list(text: str | None) -> list[str]:
  """Returns the parts of a comma-separated flag; none of an absent one."""
  return [part.strip() for part in (text or '').split(',') if part.strip()]


def quiet_jax() -> None:
  """Keeps the libraries' running commentary out of the user's log."""
  for name in ('orbax', 'absl', 'jax'):
    logging.getLogger(name).setLevel(logging.WARNING)
