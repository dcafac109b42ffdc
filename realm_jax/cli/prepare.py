"""Commands of the corpus: `prepare`, `tag`.

Public: `COMMANDS`.
"""

from collections.abc import Sequence
import json
import logging
import pathlib
import shlex

from absl import flags

from realm_jax.cli import flags as flags_lib

log = logging.getLogger(__name__)
FLAGS = flags.FLAGS


def _prepare_flags() -> None:
  flags.DEFINE_string(
      'source',
      None,
      'Articles or passages, comma-separated: files (JSON Lines, text, '
      'WikiExtractor, dumps of MediaWiki; .gz, .xz, .bz2, .zst too), folders,'
      ' globs, tfds:NAME, hf:NAME; or world:SEED[:ENTITIES].',
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
  flags.DEFINE_list(
      'exclude',
      [],
      'Kinds of articles to leave out, of lists, indices, outlines, '
      'disambiguation; or `all`.',
  )
  flags.DEFINE_float(
      'near_duplicates',
      None,
      'Leave out what is that similar to an earlier record, such as 0.8.',
  )
  flags.DEFINE_integer(
      'workers', None, 'Processes; default: one for each core.'
  )
  flags.DEFINE_boolean(
      'skip_bad_records', False, 'Count and list malformed lines, do not stop.'
  )
  flags.DEFINE_string(
      'beam',
      None,
      "Options of an Apache Beam pipeline to do the work, in one string: '' or"
      " '--runner=FlinkRunner --flink_master=host:8081'.",
  )
  flags.DEFINE_boolean(
      'stats',
      False,
      'Describe the corpus: figures in stats.json, a plot in stats.png; without'
      ' --source, the corpus that is at --output already.',
  )
  flags.DEFINE_boolean('overwrite', False, 'Replace the output folder.')


def _prepare(argv: Sequence[str]) -> None:
  del argv
  if FLAGS.source:
    _make_corpus()
  elif not FLAGS.stats:
    raise ValueError(
        'Give --source, the texts to prepare; without it, --stats describes the'
        ' corpus that is there.'
    )
  if FLAGS.stats:
    _describe(pathlib.Path(FLAGS.output))


def _describe(directory: pathlib.Path) -> None:
  from realm_jax.corpus import corpus as corpus_lib
  from realm_jax.evaluation import corpus_stats
  from realm_jax.runtime import checkpoint

  figures = corpus_stats.measure(corpus_lib.Corpus.open(directory))
  checkpoint.write_json(directory / 'stats.json', figures)
  print(json.dumps(figures, indent=2, ensure_ascii=False))
  try:
    corpus_stats.plot(figures, directory / 'stats.png')
  except ImportError as error:  # The figures are there all the same.
    log.warning('%s', error)


def _make_corpus() -> None:
  from realm_jax.prepare import filters
  from realm_jax.prepare import prepare

  manifest = prepare.prepare(
      flags_lib.split_list(FLAGS.source),
      FLAGS.output,
      pretraining_sources=flags_lib.split_list(FLAGS.pretraining_source),
      vocab=FLAGS.vocab,
      vocab_size=FLAGS.vocab_size,
      max_wordpieces=FLAGS.max_wordpieces,
      validation_fraction=FLAGS.validation_fraction,
      exclude=filters.KINDS if FLAGS.exclude == ['all'] else FLAGS.exclude,
      near_duplicates=FLAGS.near_duplicates,
      workers=FLAGS.workers,
      beam=None if FLAGS.beam is None else shlex.split(FLAGS.beam),
      skip_bad_records=FLAGS.skip_bad_records,
      overwrite=FLAGS.overwrite,
  )
  if not FLAGS.stats:
    print(json.dumps(manifest['counts'], indent=2))


def _tag_flags() -> None:
  flags.DEFINE_string(
      'corpus', None, 'Folder that `prepare` wrote.', required=True
  )
  flags.DEFINE_string(
      'tagger', None, 'Workdir of the objective `tagger`.', required=True
  )
  flags.DEFINE_string('output', None, 'Folder to write.', required=True)
  flags.DEFINE_boolean(
      'dates_and_numbers', True, 'Keep those that the rules found.'
  )
  flags.DEFINE_boolean('overwrite', False, 'Replace the output folder.')


def _tag(argv: Sequence[str]) -> None:
  del argv
  flags_lib.quiet_jax()
  from realm_jax.corpus import corpus
  from realm_jax.inference import tagging

  manifest = tagging.tag_corpus(
      corpus.Corpus.open(FLAGS.corpus),
      FLAGS.tagger,
      FLAGS.output,
      dates_and_numbers=FLAGS.dates_and_numbers,
      overwrite=FLAGS.overwrite,
  )
  print(json.dumps(manifest['splits'], indent=2))


COMMANDS = {
    'prepare': flags_lib.Command(
        'Turns text into a corpus: passages, sentences, salient spans.',
        'realm-jax prepare --source=articles/*.jsonl --output=corpus',
        _prepare_flags,
        _prepare,
    ),
    'tag': flags_lib.Command(
        'Marks the names that a tagger finds to be masked, in a new corpus.',
        'realm-jax tag --corpus=corpus --tagger=runs/tagger --output=tagged',
        _tag_flags,
        _tag,
    ),
}
