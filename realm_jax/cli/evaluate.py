"""Commands of what a job has learned: `evaluate`, `inspect`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import pathlib

from absl import app
from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _evaluate_flags() -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_string(
      'questions',
      None,
      'JSON Lines of {question, answers, match, passage_id}, or a question set'
      ' as published (see `realm-jax questions --help`); default: the'
      " corpus' questions.jsonl if it has one.",
  )
  flags.DEFINE_string(
      'tagged',
      None,
      'Of a tagger: files of tagged sentences, comma-separated; CoNLL, or JSON'
      ' Lines of {tokens, tags}.',
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
      ' there), or numbers, comma-separated.',
  )
  flags.DEFINE_integer(
      'limit', None, 'Evaluate the first questions and sentences only.'
  )
  flags.DEFINE_integer(
      'read',
      None,
      'Passages that are read for a question; default: as many as in training.',
  )
  flags.DEFINE_string(
      'run_file',
      None,
      'Also write what was retrieved to this file, for trec_eval, ir-measures'
      ' or pyserini.',
  )
  flags.DEFINE_string(
      'beir', None, 'Also write corpus and questions to this folder, as BEIR.'
  )


def _evaluate(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.evaluation import report

  if FLAGS.tagged:
    from realm_jax.evaluation import tagger

    result = tagger.evaluate(FLAGS.workdir, FLAGS.tagged)
    print(report.write(FLAGS.workdir, [result]))
    return
  from realm_jax.evaluation import evaluate

  results = evaluate.evaluate(
      FLAGS.workdir,
      FLAGS.questions,
      steps=FLAGS.steps,
      corpus=FLAGS.corpus,
      limit=FLAGS.limit,
      read=FLAGS.read,
      run_file=FLAGS.run_file,
      beir=FLAGS.beir,
  )
  print(report.write(FLAGS.workdir, results))


def _compare(argv: Sequence[str]) -> None:
  if len(argv) != 3:
    raise app.UsageError(
        'Give two files evaluation/STEP.questions.jsonl, that of the run hoped'
        f' to be better first; got {len(argv) - 1} arguments.'
    )
  from realm_jax.evaluation import runs

  print(runs.as_text(runs.compare(argv[1], argv[2])))


def _inspect_flags() -> None:
  flags_lib.workdir_flag()
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
  flags_lib.quiet_jax()
  from realm_jax.evaluation import inspect

  found = inspect.inspect(FLAGS.workdir, argv[1], FLAGS.k)
  print(inspect.as_text(found))
  if FLAGS.html:
    pathlib.Path(FLAGS.html).write_text(inspect.as_html(found), 'utf-8')
    print(f'Written to {FLAGS.html}.')


COMMANDS = {
    'evaluate': flags_lib.Command(
        'Measures retrieval and reading: JSON, a table and a plot.',
        'realm-jax evaluate --workdir=runs/realm --questions=dev.jsonl',
        _evaluate_flags,
        _evaluate,
    ),
    'compare': flags_lib.Command(
        'Compares two evaluations question by question, with a paired test.',
        'realm-jax compare runs/a/evaluation/600.questions.jsonl'
        ' runs/b/evaluation/600.questions.jsonl',
        lambda: None,
        _compare,
        positional='OURS THEIRS',
    ),
    'inspect': flags_lib.Command(
        'Shows what is retrieved for one sentence, and what it changes.',
        'realm-jax inspect --workdir=runs/realm "The capital is [MASK]."',
        _inspect_flags,
        _inspect,
        positional='SENTENCE',
    ),
}
