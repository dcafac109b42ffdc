"""`realm-jax questions`: published question sets as JSON Lines."""

from collections.abc import Sequence
import json

from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _questions_flags() -> None:
  flags.DEFINE_string(
      'source',
      None,
      'A question set as it was published, or tfds:NAME[/CONFIG][:SPLIT].',
      required=True,
  )
  flags.DEFINE_string('output', None, 'Folder to write.', required=True)
  flags.DEFINE_string(
      'format',
      'auto',
      'auto, jsonl, natural_questions, web_questions, trivia_qa, squad,'
      ' entity_questions or curated_trec.',
  )
  flags.DEFINE_boolean(
      'split',
      False,
      'Divide a published training set into train and dev as ORQA and REALM'
      ' did.',
  )


def _questions(argv: Sequence[str]) -> None:
  del argv
  from realm_jax.qa import question_sets

  counts = question_sets.convert(
      FLAGS.source, FLAGS.output, format=FLAGS.format, split=FLAGS.split
  )
  print(json.dumps(counts, indent=2))


COMMANDS = {
    'questions': flags_lib.Command(
        'Converts a published question set, and splits it as ORQA did.',
        'realm-jax questions --source=trainmodel.json --output=webquestions'
        ' --split',
        _questions_flags,
        _questions,
    ),
}
