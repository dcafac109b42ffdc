"""The command line: `realm-jax COMMAND --flag=value ...`.

Public: `run`. Each command defines its own flags, so a flag that it does not
know is an error, and imports what it needs, so that none waits for the others.
"""

from collections.abc import Callable, Sequence
import dataclasses
import difflib
import json
import logging
import os
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

# Exit codes beside 0 and 1: of a wrong command line, of Ctrl-C, and of a job
# that SIGTERM stopped after it saved a checkpoint (128 + 2 and 128 + 15, as a
# shell reports signals).
USAGE, INTERRUPTED, TERMINATED = 2, 130, 143

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Command:
  """One word after `realm-jax`."""

  summary: str
  example: str
  define_flags: Callable[[], None]
  run: Callable[[Sequence[str]], None]
  positional: str = ''  # What it takes besides flags.


def _prepare_flags() -> None:
  flags.DEFINE_string(
      'source',
      None,
      'Articles or passages: JSON Lines files (.gz, .xz too), folders or globs,'
      ' comma-separated; or world:SEED[:ENTITIES] for an invented world.',
      required=True,
  )
  flags.DEFINE_string(
      'pretraining_source',
      None,
      'A separate corpus to take the masked sentences from; default: the source'
      ' itself.',
  )
  flags.DEFINE_string('output', None, 'Folder to write.', required=True)
  flags.DEFINE_string(
      'vocab',
      None,
      'vocab.txt, tokenizer folder or hub id; default: trained on the source.',
  )
  flags.DEFINE_integer(
      'vocab_size', 30522, 'Wordpieces of a vocabulary trained here.'
  )
  flags.DEFINE_integer(
      'max_wordpieces', 288, 'Longest passage, with title and specials.'
  )
  flags.DEFINE_float(
      'validation_fraction',
      0.01,
      'Share of the articles whose sentences are set aside for evaluation.',
  )
  flags.DEFINE_integer(
      'workers', None, 'Processes; default: one for each core.'
  )
  flags.DEFINE_boolean(
      'skip_bad_records', False, 'Count and list malformed lines, do not stop.'
  )
  flags.DEFINE_boolean('overwrite', False, 'Replace the output folder.')


def _prepare(argv: Sequence[str]) -> None:
  del argv
  from realm_jax.data import prepare

  manifest = prepare.prepare(
      _list(FLAGS.source),
      FLAGS.output,
      pretraining_sources=_list(FLAGS.pretraining_source),
      vocab=FLAGS.vocab,
      vocab_size=FLAGS.vocab_size,
      max_wordpieces=FLAGS.max_wordpieces,
      validation_fraction=FLAGS.validation_fraction,
      workers=FLAGS.workers,
      skip_bad_records=FLAGS.skip_bad_records,
      overwrite=FLAGS.overwrite,
  )
  print(json.dumps(manifest['counts'], indent=2))


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
  _workdir_flag()
  flags.DEFINE_boolean(
      'with_index_builder',
      False,
      'Start and supervise the index builder, for one machine. Else run'
      ' `realm-jax index --follow` beside this job.',
  )


def _train(argv: Sequence[str]) -> None:
  del argv
  _quiet_jax()
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
    sys.exit(TERMINATED)
  print(json.dumps(summary, indent=2))


def _index_flags() -> None:
  _workdir_flag()
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
  _quiet_jax()
  from realm_jax.index import builder

  if FLAGS.follow:
    builder.follow(
        FLAGS.workdir,
        start_timeout=FLAGS.start_timeout,
        parent_pid=FLAGS.parent_pid or None,
    )
  else:
    print(builder.build(FLAGS.workdir, FLAGS.step))


def _evaluate_flags() -> None:
  _workdir_flag()
  flags.DEFINE_string(
      'questions',
      None,
      'JSON Lines of {question, answers, match, passage_id}; default: the'
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
  _quiet_jax()
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
  _workdir_flag()
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
  _quiet_jax()
  from realm_jax.evaluation import inspect

  found = inspect.inspect(FLAGS.workdir, argv[1], FLAGS.k)
  print(inspect.as_text(found))
  if FLAGS.html:
    pathlib.Path(FLAGS.html).write_text(inspect.as_html(found), 'utf-8')
    print(f'Written to {FLAGS.html}.')


def _import_flags() -> None:
  flags.DEFINE_string(
      'source',
      None,
      'Checkpoints of BERT or REALM: folders or Hugging Face hub ids,'
      ' comma-separated, which together make one job.',
      required=True,
  )
  _workdir_flag()
  flags.DEFINE_string(
      'components',
      None,
      'Which to take, of embedder, reader, span_reader; default: all of them.',
  )
  flags.DEFINE_string(
      'corpus',
      None,
      'A corpus prepared with the vocabulary of the checkpoint, for `index` and'
      ' `evaluate`. An open-QA checkpoint brings its own.',
  )
  flags.DEFINE_string(
      'vocab', None, "Vocabulary to take instead of the checkpoint's."
  )
  flags.DEFINE_string(
      'blocks',
      None,
      'block_records.npy of an open-QA checkpoint that has none beside it.',
  )
  flags.DEFINE_integer(
      'workers', None, 'Processes for a corpus; default: one for each core.'
  )
  flags.DEFINE_integer(
      'seed', 0, 'For parameters that a checkpoint does not have.'
  )


def _import(argv: Sequence[str]) -> None:
  del argv
  _quiet_jax()
  from realm_jax.export import importing

  summary = importing.run(
      _list(FLAGS.source),
      FLAGS.workdir,
      components=_list(FLAGS.components) or None,
      corpus=FLAGS.corpus,
      vocab=FLAGS.vocab,
      blocks=FLAGS.blocks,
      workers=FLAGS.workers,
      seed=FLAGS.seed,
  )
  print(json.dumps(summary, indent=2))


def _export_flags() -> None:
  _workdir_flag()
  flags.DEFINE_enum(
      'format',
      None,
      ['huggingface', 'sentence-transformers', 'index'],
      'What to write.',
      required=True,
  )
  flags.DEFINE_string('output', None, 'Folder to write.', required=True)
  flags.DEFINE_integer(
      'step',
      None,
      'Of a checkpoint or of a snapshot of the retriever; default: the newest'
      ' checkpoint.',
  )
  flags.DEFINE_string(
      'classes',
      None,
      'Of huggingface: some of embedder, scorer, encoder, reader, openqa, bert,'
      ' comma-separated; default: what the workdir has.',
  )
  flags.DEFINE_enum(
      'dtype', 'float32', ['float32', 'float16'], 'Of the embeddings of index.'
  )


def _export(argv: Sequence[str]) -> None:
  del argv
  _quiet_jax()
  from realm_jax.export import exporting

  folders = exporting.run(
      FLAGS.workdir,
      FLAGS.format,
      FLAGS.output,
      step=FLAGS.step,
      classes=_list(FLAGS.classes) or None,
      dtype=FLAGS.dtype,
  )
  print('\n'.join(map(str, folders)))


COMMANDS = {
    'prepare': Command(
        'Turns text into a corpus: passages, sentences, salient spans.',
        'realm-jax prepare --source=articles/*.jsonl --output=corpus',
        _prepare_flags,
        _prepare,
    ),
    'train': Command(
        'Trains: reader warm-up (mlm), inverse cloze task (ict), or realm.',
        'realm-jax train --config=experiments/quickstart.py:ict'
        ' --workdir=runs/ict --config.corpus=corpus',
        _train_flags,
        _train,
    ),
    'index': Command(
        'Builds index generations beside a running trainer.',
        'realm-jax index --workdir=runs/realm --follow',
        _index_flags,
        _index,
    ),
    'evaluate': Command(
        'Measures retrieval and reading: JSON, a table and a plot.',
        'realm-jax evaluate --workdir=runs/realm --questions=dev.jsonl',
        _evaluate_flags,
        _evaluate,
    ),
    'inspect': Command(
        'Shows what is retrieved for one sentence, and what it changes.',
        'realm-jax inspect --workdir=runs/realm "The capital is [MASK]."',
        _inspect_flags,
        _inspect,
        positional='SENTENCE',
    ),
    'import': Command(
        'Makes a workdir of published checkpoints of BERT or REALM.',
        'realm-jax import --source=bert-base-uncased --workdir=runs/bert',
        _import_flags,
        _import,
    ),
    'export': Command(
        'Writes what transformers, sentence-transformers or FAISS read.',
        'realm-jax export --workdir=runs/realm --format=huggingface'
        ' --output=model',
        _export_flags,
        _export,
    ),
}


def run() -> None:
  """Entry point of `realm-jax` and `python -m realm_jax`."""
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name in ('', '-h', '--help', '--helpfull', 'help'):
    print(_usage())
    sys.exit(0 if name else USAGE)
  if name == '--version':
    import realm_jax

    print(f'realm-jax {realm_jax.__version__}')
    sys.exit(0)
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f' Did you mean `{close[0]}`?' if close else ''
    print(f'No command {name!r}.{hint}\n\n{_usage()}', file=sys.stderr)
    sys.exit(USAGE)
  command = COMMANDS[name]
  if {'-h', '--help', '--helpshort', '--helpfull'} & set(sys.argv[2:]):
    print(_help(name, command))
    sys.exit(0)
  command.define_flags()

  def main(argv: Sequence[str]) -> None:
    logging.getLogger().setLevel(logging.INFO)
    absl_logging.use_absl_handler()
    if len(argv) > 1 and not command.positional:
      raise app.UsageError(
          f'`realm-jax {name}` takes flags only; what is {argv[1]!r}?'
      )
    try:
      command.run(argv)
    except (
        ValueError, OSError, ImportError, FloatingPointError, RuntimeError
    ) as error:
      # What the user can act on; anything else is our bug and shows its trace,
      # and so do the many kinds of RuntimeError that are JAX's.
      theirs = (
          isinstance(error, RuntimeError) and type(error) is not RuntimeError
      )
      if theirs or os.environ.get('REALM_JAX_TRACEBACK'):
        raise
      print(f'realm-jax {name}: {error}', file=sys.stderr)
      sys.exit(1)
    except KeyboardInterrupt:
      print(f'realm-jax {name}: interrupted.', file=sys.stderr)
      sys.exit(INTERRUPTED)

  def parse(argv: Sequence[str]) -> list[str]:
    try:
      return FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, ValueError) as error:
      # A config file that fails comes with its traceback; the last line of it
      # says what is wrong.
      text = str(error.args[0] if error.args else error).strip()
      reason = text.splitlines()[-1]
      print(f'realm-jax {name}: {reason}', file=sys.stderr)
      sys.exit(USAGE)

  app.run(
      main, argv=[f'realm-jax {name}', *sys.argv[2:]], flags_parser=parse
  )


def _usage() -> str:
  lines = ['usage: realm-jax COMMAND [--flag=value ...]', '']
  lines += [f'  {name:10}{c.summary}' for name, c in COMMANDS.items()]
  lines += ['', '`realm-jax COMMAND --help` lists the flags of a command.']
  return '\n'.join(lines)


def _help(name: str, command: Command) -> str:
  before = set(FLAGS)
  command.define_flags()
  lines = [
      f'usage: realm-jax {name} [--flag=value ...] {command.positional}',
      '',
      command.summary,
      f'For example: {command.example}',
      '',
  ]
  for flag in sorted(set(FLAGS) - before):
    info: Any = FLAGS[flag]
    default = '' if info.default is None else f' (default {info.default})'
    lines.append(f'  --{flag}: {info.help}{default}')
  return '\n'.join(lines)


def _workdir_flag() -> None:
  flags.DEFINE_string(
      'workdir',
      None,
      'Folder of the job: config, checkpoints, index, metrics.',
      required=True,
  )


def _list(text: str | None) -> list[str]:
  return [part.strip() for part in (text or '').split(',') if part.strip()]


def _quiet_jax() -> None:
  """Keeps the libraries' running commentary out of the user's log."""
  for name in ('orbax', 'absl', 'jax'):
    logging.getLogger(name).setLevel(logging.WARNING)
