"""Commands of other libraries' checkpoints, in and out: `import`, `export`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import json

from absl import flags

from realm_jax.cli import flags as flags_lib

FLAGS = flags.FLAGS


def _import_flags() -> None:
  flags.DEFINE_string(
      'source',
      None,
      'Checkpoints of BERT or REALM: folders or Hugging Face hub ids,'
      ' comma-separated, which together make one job.',
      required=True,
  )
  flags_lib.workdir_flag()
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
  flags_lib.quiet_jax()
  from realm_jax.interop import importing

  summary = importing.run(
      flags_lib.split_list(FLAGS.source),
      FLAGS.workdir,
      components=flags_lib.split_list(FLAGS.components) or None,
      corpus=FLAGS.corpus,
      vocab=FLAGS.vocab,
      blocks=FLAGS.blocks,
      workers=FLAGS.workers,
      seed=FLAGS.seed,
  )
  print(json.dumps(summary, indent=2))


def _export_flags() -> None:
  flags_lib.workdir_flag()
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
      ' tagger, comma-separated; default: what the workdir has.',
  )
  flags.DEFINE_enum(
      'dtype', 'float32', ['float32', 'float16'], 'Of the embeddings of index.'
  )


def _export(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.interop import exporting

  folders = exporting.run(
      FLAGS.workdir,
      FLAGS.format,
      FLAGS.output,
      step=FLAGS.step,
      classes=flags_lib.split_list(FLAGS.classes) or None,
      dtype=FLAGS.dtype,
  )
  print('\n'.join(map(str, folders)))


COMMANDS = {
    'import': flags_lib.Command(
        'Makes a workdir of published checkpoints of BERT or REALM.',
        'realm-jax import --source=bert-base-uncased --workdir=runs/bert',
        _import_flags,
        _import,
    ),
    'export': flags_lib.Command(
        'Writes what transformers, sentence-transformers or FAISS read.',
        'realm-jax export --workdir=runs/realm --format=huggingface'
        ' --output=model',
        _export_flags,
        _export,
    ),
}
