"""Commands of training: `train`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import json
import sys

from absl import flags

from realm_jax.cli import command

FLAGS = flags.FLAGS


def _train_flags() -> None:
  from ml_collections import config_flags

  config_flags.DEFINE_config_file(
      'config',
      None,
      'Experiment file, FILE.py or FILE.py:ARGUMENT; override its fields with'
      ' --config.FIELD=VALUE.',
      lock_config=True,
  )
  flags.mark_flag_as_required('config')
  command.workdir_flag()
  flags.DEFINE_boolean(
      'with_index_builder',
      False,
      'Start and supervise the index builder, for one machine. Else run'
      ' `realm-jax index --follow` beside this job.',
  )


def _train(argv: Sequence[str]) -> None:
  del argv
  command.quiet_jax()
  from realm_jax.training import loop

  config = FLAGS.config
  try:
    if FLAGS.with_index_builder and config.objective == 'realm':
      from realm_jax.index import supervisor

      with supervisor.IndexBuilderProcess(FLAGS.workdir) as builder:
        summary = loop.train(config, FLAGS.workdir, health=builder.health)
    else:
      summary = loop.train(config, FLAGS.workdir)
  except loop.Interrupted as error:
    print(error, file=sys.stderr)
    sys.exit(command.TERMINATED)
  print(json.dumps(summary, indent=2))


COMMANDS = {
    'train': command.Command(
        'Trains: reader warm-up (mlm), inverse cloze task (ict), or realm.',
        'realm-jax train --config=experiments/quickstart.py:ict'
        ' --workdir=runs/ict --config.corpus=corpus',
        _train_flags,
        _train,
    ),
}
