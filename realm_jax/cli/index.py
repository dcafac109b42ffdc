"""Commands of the index of a job: `index`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence

from absl import flags

from realm_jax.cli import command

FLAGS = flags.FLAGS


def _index_flags() -> None:
  command.workdir_flag()
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
  command.quiet_jax()
  from realm_jax.index import builder

  if FLAGS.follow:
    builder.follow(
        FLAGS.workdir,
        start_timeout=FLAGS.start_timeout,
        parent_pid=FLAGS.parent_pid or None,
    )
  else:
    print(builder.build(FLAGS.workdir, FLAGS.step))


COMMANDS = {
    'index': command.Command(
        'Builds index generations beside a running trainer.',
        'realm-jax index --workdir=runs/realm --follow',
        _index_flags,
        _index,
    ),
}
