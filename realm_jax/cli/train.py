"""Commands of training: `train`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import json
import sys

from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _train_flags() -> None:
  flags_lib.config_flag()
  flags_lib.workdir_flag()
  flags_lib.process_flags()
  flags.DEFINE_string(
      'profile',
      None,
      'Steps to trace, for example 10-15, to WORKDIR/profile.',
  )
  flags.DEFINE_boolean(
      'with_index_builder',
      False,
      'Start and supervise the index builder, for one machine. Else run'
      ' `realm-jax index --follow` beside this job.',
  )


def _train(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax import config as config_lib
  from realm_jax.runtime import distributed
  from realm_jax.runtime import profile as profile_lib
  from realm_jax.trainer import loop

  config = FLAGS.config
  profile = profile_lib.parse_steps(FLAGS.profile) if FLAGS.profile else None
  with flags_lib.processes():
    try:
      supervise = (
          FLAGS.with_index_builder
          and config.objective in config_lib.SEARCHING
      )
      if supervise and distributed.is_main():
        from realm_jax.trainer import supervise as supervise_lib

        with supervise_lib.IndexBuilderProcess(
            FLAGS.workdir, max_failures=config.refresh.max_builder_failures
        ) as builder:
          summary = loop.train(
              config, FLAGS.workdir, health=builder.health, profile=profile
          )
      else:
        summary = loop.train(config, FLAGS.workdir, profile=profile)
    except loop.Interrupted as error:  # In all processes.
      print(error, file=sys.stderr)
      summary = None
    main = distributed.is_main()
  if summary is None:
    sys.exit(flags_lib.TERMINATED)
  if main:
    print(json.dumps(summary, indent=2))


COMMANDS = {
    'train': flags_lib.Command(
        'Trains one objective: mlm, ict, realm, open_qa or tagger.',
        'realm-jax train --config=experiments/quickstart.py:ict'
        ' --workdir=runs/ict --config.corpus=corpus',
        _train_flags,
        _train,
    ),
}
