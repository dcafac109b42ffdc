"""Commands of the documents of a job: `index add|update|delete|compact`.

Public: `COMMANDS`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import flags

from realm_jax.cli import flags as flags_lib

if TYPE_CHECKING:
  from realm_jax.builder import editing

FLAGS = flags.FLAGS


def _input_flags(what: str) -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_string('input', None, what, required=True)


def _record_flags() -> None:
  _input_flags(
      'Records as `prepare` reads them, each with an `id`: JSON Lines files'
      ' (.gz, .xz too), folders or globs, comma-separated.'
  )
  flags.DEFINE_boolean(
      'skip_bad_records', False, 'Count and list malformed lines, do not stop.'
  )
  flags.DEFINE_integer(
      'workers', None, 'Processes; default: one for each core.'
  )


def _missing_flag(what: str) -> None:
  flags.DEFINE_boolean('ignore_missing', False, what)


def _update_flags() -> None:
  _record_flags()
  _missing_flag('Add the documents that are not there.')


def _delete_flags() -> None:
  _input_flags(
      'Which: JSON Lines (.gz, .xz too) of objects with an `id`, or any other'
      ' file, with an id a line.'
  )
  _missing_flag('Pass over the documents that are not there.')


def _compact_flags() -> None:
  flags_lib.workdir_flag()
  flags.DEFINE_string(
      'output',
      None,
      'Folder for the corpus; default: documents/corpus-N in the workdir.',
  )


def _add(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.builder import editing

  _report(
      editing.add(
          FLAGS.workdir,
          flags_lib.split_list(FLAGS.input),
          skip_bad_records=FLAGS.skip_bad_records,
          workers=FLAGS.workers,
      )
  )


def _update(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.builder import editing

  _report(
      editing.update(
          FLAGS.workdir,
          flags_lib.split_list(FLAGS.input),
          ignore_missing=FLAGS.ignore_missing,
          skip_bad_records=FLAGS.skip_bad_records,
          workers=FLAGS.workers,
      )
  )


def _delete(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.builder import editing

  _report(
      editing.delete(
          FLAGS.workdir, FLAGS.input, ignore_missing=FLAGS.ignore_missing
      )
  )


def _compact(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.builder import compaction

  change = compaction.compact(FLAGS.workdir, FLAGS.output)
  if change is None:
    print('There is nothing to compact.')
    return
  print(
      f'Wrote {change.output}: {change.live:,} passages (version'
      f' {change.version}); {change.removed:,} removed ones are left out.'
  )
  _report_embedding(change)


def _report(change: 'editing.Change') -> None:
  print(
      f'Passages added: {change.added:,}, removed: {change.removed:,}; now'
      f' {change.live:,} can be found (version {change.version}).'
  )
  if change.missing:
    print(f'Documents that were not there: {change.missing:,}.')
  _report_embedding(change)
  if change.compact:
    print(
        'So much was added and removed that searches are slower for it: it is'
        f' time for `realm-jax index compact --workdir={FLAGS.workdir}`.'
    )


def _report_embedding(change: 'editing.Change') -> None:
  if change.embedded:
    print(
        f'Passages embedded: {change.embedded:,} by the parameters of step'
        f' {change.step}, in {change.seconds:.1f} s with the start'
        f' ({change.embedded / change.seconds:,.1f}/s).'
    )


def _command(
    word: str,
    summary: str,
    define_flags: Callable[[], None],
    run: Callable[[Sequence[str]], None],
    example: str = '--input=more.jsonl',
) -> flags_lib.Command:
  return flags_lib.Command(
      summary,
      f'realm-jax index {word} --workdir=runs/realm {example}'.strip(),
      define_flags,
      run,
  )


COMMANDS = {
    'index add': _command(
        'add', 'Adds documents to a trained job.', _record_flags, _add
    ),
    'index update': _command(
        'update', 'Replaces documents by their ids.', _update_flags, _update
    ),
    'index delete': _command(
        'delete',
        'Removes documents by their ids.',
        _delete_flags,
        _delete,
        '--input=ids.txt',
    ),
    'index compact': _command(
        'compact',
        'Writes what was added and removed as a plain corpus.',
        _compact_flags,
        _compact,
        '',
    ),
}
