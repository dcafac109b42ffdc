"""Commands of the index of a job: `index`, `index verify`, `index info`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import json
import sys

from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _index_flags() -> None:
  flags_lib.workdir_flag()
  flags_lib.process_flags()
  flags.DEFINE_boolean(
      'follow',
      False,
      'Stay until training is done, and build a generation from the newest'
      ' snapshot each time there is one. Else build one and leave.',
  )
  flags.DEFINE_integer(
      'step', None, 'Build that of this snapshot; default: of the newest.'
  )
  flags.DEFINE_float(
      'start_timeout',
      600.0,
      'Seconds to wait for the trainer to write its config and first snapshot.',
  )
  flags.DEFINE_integer(
      'parent_pid', 0, 'Leave when this process is gone; 0: do not look.'
  )


def _index(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.builder import builder
  from realm_jax.runtime import distributed

  with flags_lib.processes():
    if FLAGS.follow:
      builder.follow(
          FLAGS.workdir,
          start_timeout=FLAGS.start_timeout,
          parent_pid=FLAGS.parent_pid or None,
      )
    else:
      path = builder.build(FLAGS.workdir, FLAGS.step)
      if distributed.is_main():
        print(path)


def _verify_flags() -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_integer(
      'step', None, 'Look at this generation alone; default: at all of them.'
  )


def _verify(argv: Sequence[str]) -> None:
  del argv
  from realm_jax.builder import status

  bad = 0
  for found in status.verify(FLAGS.workdir, FLAGS.step):
    bad += bool(found.problems)
    verdict = f'{len(found.problems)} PROBLEM(S)' if found.problems else 'sound'
    print(': '.join(filter(None, [str(found.path), verdict, found.about])))
    for problem in found.problems:
      print('  ' + problem.replace('\n', '\n  '))
  if bad:
    sys.exit(1)


def _info_flags() -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_boolean('json', False, 'As JSON instead of a table.')


def _info(argv: Sequence[str]) -> None:
  del argv
  from realm_jax.builder import status

  found = status.info(FLAGS.workdir)
  print(json.dumps(found, indent=2) if FLAGS.json else status.as_text(found))


COMMANDS = {
    'index': flags_lib.Command(
        'Builds index generations beside a running trainer.',
        'realm-jax index --workdir=runs/realm --follow',
        _index_flags,
        _index,
    ),
    'index verify': flags_lib.Command(
        'Checks every byte of the index, and what it was made from.',
        'realm-jax index verify --workdir=runs/realm',
        _verify_flags,
        _verify,
    ),
    'index info': flags_lib.Command(
        'Lists the generations, who uses them, and what the builder does.',
        'realm-jax index info --workdir=runs/realm --json',
        _info_flags,
        _info,
    ),
}
