"""`realm-jax plan`: what a job needs, and how long it takes.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import dataclasses
import json

from absl import app
from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _plan_flags() -> None:
  flags_lib.config_flag(required=False)  # Not for a list of the chips.
  flags.DEFINE_integer(
      'passages', None, "Of the corpus; default: config.corpus'."
  )
  flags.DEFINE_float(
      'mean_wordpieces',
      None,
      "Of a passage, with title and specials; default: config.corpus', or else"
      ' config.lengths.document, the most there can be.',
  )
  flags.DEFINE_string('chip', 'h100', 'Of all devices; `--chip=list`: which.')
  flags.DEFINE_integer('trainer_devices', 1, 'Chips that train.')
  flags.DEFINE_integer(
      'builder_devices',
      1,
      'Chips that embed the corpus; 0: those that train do it, in turns.',
  )
  flags.DEFINE_float('peak_tflops', None, "Of a chip, instead of its vendor's.")
  flags.DEFINE_float('memory_gb', None, "Of a chip, instead of its vendor's.")
  flags.DEFINE_float(
      'utilization', 0.4, 'Share of the peak that a training step reaches.'
  )
  flags.DEFINE_float(
      'builder_utilization', 0.5, 'The same of the embedding of passages.'
  )
  flags.DEFINE_float('price', 0.0, 'Of a chip for an hour, for the cost.')
  flags.DEFINE_boolean(
      'compile', False, 'Compile the step here, and show what XLA says of it.'
  )
  flags.DEFINE_boolean('json', False, 'Print JSON.')


def _plan(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax import config as config_lib
  from realm_jax.planner import plan

  if FLAGS.chip == 'list':
    for name, chip in plan.CHIPS.items():
      print(
          f'{name:12}{chip.tflops:6g} TFLOP/s {chip.memory_gb:5g} GB'
          f' {chip.memory_gb_per_second:6g} GB/s'
      )
    return
  config = FLAGS.config
  if config is None:
    raise app.UsageError('--config is missing.')
  if FLAGS.chip not in plan.CHIPS:
    raise ValueError(
        f'--chip={FLAGS.chip}: there are {", ".join(plan.CHIPS)}; for another,'
        ' take one like it with --peak_tflops and --memory_gb.'
    )
  chip = plan.CHIPS[FLAGS.chip]
  if FLAGS.peak_tflops is not None:
    chip = dataclasses.replace(chip, tflops=FLAGS.peak_tflops)
  if FLAGS.memory_gb is not None:
    chip = dataclasses.replace(chip, memory_gb=FLAGS.memory_gb)
  corpus = config.corpus or '(none)'  # Not everything needs one.
  config_lib.validate(dataclasses.replace(config, corpus=corpus))
  config, passages, wordpieces, size = plan.of_corpus(
      config, FLAGS.passages, FLAGS.mean_wordpieces
  )
  result = plan.plan(
      config,
      plan.Setting(
          passages=passages,
          mean_wordpieces=wordpieces,
          corpus_bytes=size,
          chip=chip,
          trainer_devices=FLAGS.trainer_devices,
          builder_devices=FLAGS.builder_devices,
          utilization=FLAGS.utilization,
          builder_utilization=FLAGS.builder_utilization,
          price=FLAGS.price,
      ),
  )
  if FLAGS.compile:
    result['compiled_here'] = plan.compiled(config)
  print(json.dumps(result, indent=2) if FLAGS.json else plan.as_text(result))


COMMANDS = {
    'plan': flags_lib.Command(
        'Estimates memory, disk, FLOP, time and devices of a job.',
        'realm-jax plan --config=experiments/realm_base.py:realm'
        ' --passages=13353718 --config.model.vocab_size=30522 --chip=h100'
        ' --trainer_devices=64 --builder_devices=16',
        _plan_flags,
        _plan,
    ),
}
