"""Commands of what a job has learned: `evaluate`, `inspect`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags

from realm_jax.cli import command

FLAGS = flags.FLAGS


def _evaluate_flags() -> None:
  command.workdir_flag()
  flags.DEFINE_string(
      'questions',
      None,
      'JSON Lines of {question, answers, match, passage_id}, or a question set'
      ' as published (see `realm-jax questions --help`); default: the'
      " corpus' questions.jsonl if it has one.",
  )
  flags.DEFINE_string(
      'corpus',
      None,
      'Search this corpus instead of the one trained on; same tokenizer.',
  )
  flags.DEFINE_string(
      'steps',
      'latest',
      'Which steps: `latest`, `all` (every snapshot and checkpoint still'
      ' there), or one number.',
  )
  flags.DEFINE_integer(
      'limit', None, 'Evaluate the first questions and sentences only.'
  )


def _evaluate(argv: Sequence[str]) -> None:
  del argv
  command.quiet_jax()
  from realm_jax.evaluation import report
  from realm_jax.evaluation import retrieval

  results = retrieval.evaluate(
      FLAGS.workdir,
      FLAGS.questions,
      steps=FLAGS.steps,
      corpus=FLAGS.corpus,
      limit=FLAGS.limit,
  )
  print(report.write(FLAGS.workdir, results))


def _inspect_flags() -> None:
  command.workdir_flag()
  flags.DEFINE_integer(
      'k', None, "Candidates, null document included; default: the config's."
  )
  flags.DEFINE_string('html', None, 'Also write a page to this file.')


def _inspect(argv: Sequence[str]) -> None:
  if len(argv) != 2:
    raise app.UsageError(
        'Give one sentence with a [MASK] in it, in quotes; got'
        f' {len(argv) - 1} arguments.'
    )
  command.quiet_jax()
  from realm_jax.evaluation import inspect

  found = inspect.inspect(FLAGS.workdir, argv[1], FLAGS.k)
  print(inspect.as_text(found))
  if FLAGS.html:
    pathlib.Path(FLAGS.html).write_text(inspect.as_html(found), 'utf-8')
    print(f'Written to {FLAGS.html}.')


COMMANDS = {
    'evaluate': command.Command(
        'Measures retrieval and reading: JSON, a table and a plot.',
        'realm-jax evaluate --workdir=runs/realm --questions=dev.jsonl',
        _evaluate_flags,
        _evaluate,
    ),
    'inspect': command.Command(
        'Shows what is retrieved for one sentence, and what it changes.',
        'realm-jax inspect --workdir=runs/realm "The capital is [MASK]."',
        _inspect_flags,
        _inspect,
        positional='SENTENCE',
    ),
}
