"""From text to the corpus artifact: `realm-jax prepare`.

The input is read twice. The first reading checks every record, so a bad line is
found before any expensive work. The second cuts the records into tasks, which
become chunks in a pool of processes or an Apache Beam pipeline (`pipeline`), in
order. The bytes written are the same for any number of processes and after any
number of interruptions. Only `writer` writes a corpus.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import TYPE_CHECKING, Any

import nupunkt
import tqdm

import realm_jax
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import filters
from realm_jax.prepare import languages
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import pipeline as pipeline_lib
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources as sources_lib
from realm_jax.prepare import workers as workers_lib
from realm_jax.prepare import world
from realm_jax.runtime import files

if TYPE_CHECKING:
  from realm_jax.prepare import writer as writer_lib

_CHUNK_BYTES = 1 << 19  # Characters of text per task.
_WORLD_VOCAB_SIZE = 3000
_DEFAULT_VOCAB_SIZE = 30_522  # BERT's.


def _num_cores() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # Not on every system.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Options:
  """Options of `prepare`.

  pretraining_sources: texts that give sentences but no passages.
  vocab: vocabulary file, folder of a tokenizer, or model id of the Hugging Face
    hub; None: learned from the texts.
  vocab_size: upper bound for a learned vocabulary.
  cased: whether the case of the texts is kept, for a learned vocabulary, or one
    that does not say it. None: as the vocabulary says, or else lower-cased.
  max_wordpieces: longest passage, with its title and 3 special tokens.
  min_sentence, max_sentence: bounds for the wordpieces of a training sentence.
  min_context: fewest wordpieces of a sentence outside a span.
  validation_fraction: share of the articles whose sentences are set aside if no
    record is marked with `split: 'validation'`. After 5,000 sentences, no
    further article is started.
  exclude: kinds of records to leave out, from `filters.KINDS`.
  near_duplicates: similarity in (0, 1] from which on a record is left out if an
    earlier one of the same sources is that similar; None: all stay.
  spans: where the spans of records without `spans` come from. 'auto': rules if
    they are in English. 'rules': in any language. 'random': random words.
    'none': no record has spans, and all sentences are kept.
  language: code such as 'en' or 'zh'; None: examined.
  workers: number of processes; None: one for each CPU core.
  beam: options of an Apache Beam pipeline that replaces the pool of processes;
    its workers must see the folder that contains the output. None: no pipeline.
  skip_bad_records: leave bad records out and list the first of them, instead of
    an error.
  format, fields: of the sources, see `sources.find`; None: recognised.
  """

  pretraining_sources: Sequence[str] = ()
  vocab: str | None = None
  vocab_size: int | None = None
  cased: bool | None = None
  max_wordpieces: int = 288
  min_sentence: int = 4
  max_sentence: int = 200
  min_context: int = 3
  validation_fraction: float = 0.01
  exclude: Sequence[str] = ()
  near_duplicates: float | None = None
  spans: str = 'auto'
  language: str | None = None
  workers: int | None = None
  beam: Sequence[str] | None = None
  skip_bad_records: bool = False
  format: str | None = None
  fields: str | Mapping[str, str] | None = None

  def __post_init__(self) -> None:
    longest, shortest = self.max_sentence, self.min_sentence
    fraction, size = self.validation_fraction, self.vocab_size
    similarity, kinds = self.near_duplicates, filters.KINDS
    sources = languages.SPANS
    for name, ok, expected in (
        ('max_wordpieces', 8 <= self.max_wordpieces <= 65_535, '8 to 65,535'),
        (
            'min_sentence',
            1 <= shortest <= longest,
            f'1 to max_sentence, which is {longest}',
        ),
        ('validation_fraction', 0 <= fraction < 1, 'at least 0 and below 1'),
        ('vocab_size', size is None or size > 0, 'positive'),
        ('workers', self.num_workers >= 1, 'at least 1'),
        ('spans', self.spans in sources, f'one of {", ".join(sources)}'),
        (
            'language',
            re.fullmatch('[a-z]{2,3}(-.+)?', self.language or 'en'),
            'a code such as en, de or zh',
        ),
        ('exclude', {*self.exclude} <= {*kinds}, f'some of {", ".join(kinds)}'),
        (
            'near_duplicates',
            similarity is None or 0 < similarity <= 1,
            'above 0 and at most 1',
        ),
    ):
      if not ok:
        raise ValueError(
            f'{name} is {getattr(self, name)}; it must be {expected}.'
        )
    if similarity is not None:
      filters.check_rensa_installed()
    if self.beam is not None:
      pipeline_lib.check_beam_installed()

  @property
  def num_workers(self) -> int:
    return self.workers or _num_cores()

  @property
  def settings(self) -> passages_lib.Settings:
    """The options that decide what is in a chunk, without the language."""
    return passages_lib.Settings(
        self.max_wordpieces,
        self.min_sentence,
        self.max_sentence,
        self.min_context,
        tuple(kind for kind in filters.KINDS if kind in self.exclude),
    )


@dataclasses.dataclass
class _Input:
  """Records that give passages and sentences, or sentences alone."""

  records: records_lib.Records
  passages: bool
  validation_fraction: float = 0.0
  # Numbers of the records to leave out; None: not searched for.
  near_duplicates: set[int] | None = None


def prepare(
    sources: Sequence[str],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
  """Writes a corpus artifact and returns its manifest.

  Args:
    sources: files, folders, glob patterns, datasets and Python objects with the
      texts of the passages (see `sources.find`); or the one source
      'world:SEED[:ENTITIES]', a generated world, which has its own pretraining
      texts and questions.
    output: folder to write. It appears, complete, at the very end.
    overwrite: whether to replace a corpus at `output`.
    progress: whether to show a progress bar.
    **options: the fields of `Options`.

  Raises:
    FileNotFoundError: a source or the vocabulary is missing.
    FileExistsError: `output` exists, or another process is writing it.
    ImportError: a source or an option needs a package that is not installed.
    ValueError: an argument or a record is wrong, or the texts have no record or
      no salient span.
    OSError: the disk is full. After any error, nothing remains on disk.
  """
  output = pathlib.Path(output).absolute()
  chosen = Options(**options)
  _check_output(output, overwrite)
  inputs, questions = _open_inputs(sources, chosen)
  tokenizer = None
  if chosen.vocab is not None:
    tokenizer = tokenizer_lib.Tokenizer.from_source(chosen.vocab, chosen.cased)
  with workers_lib.Pool(chosen.num_workers) as pool:
    census = languages.Census()
    for one in inputs:
      # Beam leaves nothing for a pool to do.
      packers = pool if chosen.beam is None else None
      _check(one.records, progress, census, packers)
    if chosen.near_duplicates is not None:
      for one in inputs:
        one.near_duplicates = filters.near_duplicates(
            one.records, chosen.near_duplicates, pool
        )
    if tokenizer is None:
      default = _DEFAULT_VOCAB_SIZE if questions is None else _WORLD_VOCAB_SIZE
      cased = census.needs_marks() if chosen.cased is None else chosen.cased
      tokenizer = tokenizer_lib.Tokenizer.train(
          records_lib.Texts([one.records for one in inputs]),
          chosen.vocab_size or default,
          lowercase=not cased,
      )
    # Only sentences of the last input are trained on, so only these are split.
    if not any(one.records.marked for one in inputs):
      inputs[-1].validation_fraction = chosen.validation_fraction
    fraction = inputs[-1].validation_fraction
    spans, language = census.spans_and_language(chosen.spans, chosen.language)
    packing = dataclasses.replace(
        chosen.settings, spans=spans, language=language
    )
    settings = _manifest_settings(packing, fraction)
    if chosen.near_duplicates is not None:
      settings['near_duplicates'] = chosen.near_duplicates
    return _write(
        output,
        inputs,
        tokenizer,
        pool,
        packing,
        settings,
        need_sentences=spans != 'none',
        beam=chosen.beam,
        questions=questions,
        overwrite=overwrite,
        progress=progress,
    )


def prepare_more(
    base: corpus_lib.Corpus,
    source: records_lib.Records,
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes further documents as a corpus with the settings of another one.

  Args:
    base: the corpus whose vocabulary and settings are taken.
    source: the documents, already checked.
    output: folder to write. It appears, complete, at the very end. Unlike a
      corpus to train on, it need not have a salient span.
    workers, progress: as in `prepare`.

  Returns:
    The manifest.

  Raises:
    ValueError: no record has a wordpiece.
    OSError: the disk is full. After any error, nothing remains on disk.
  """
  before = base.manifest['settings']
  names = {field.name for field in dataclasses.fields(passages_lib.Settings)}
  packing = passages_lib.Settings(
      **{name: before[name] for name in names & {*before}}
  )
  fraction = 0.0 if source.marked else before['validation_fraction']
  with workers_lib.Pool(Options(workers=workers).num_workers) as pool:
    return _write(
        pathlib.Path(output).absolute(),
        [_Input(source, True, fraction)],
        base.tokenizer,
        pool,
        packing,
        _manifest_settings(packing, fraction),
        progress=progress,
        need_sentences=False,
    )


def _write(
    output: pathlib.Path,
    inputs: Sequence[_Input],
    tokenizer: tokenizer_lib.Tokenizer,
    pool: workers_lib.Pool,
    packing: passages_lib.Settings,
    settings: dict[str, Any],
    *,
    questions: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    progress: bool = True,
    need_sentences: bool = True,
    beam: Sequence[str] | None = None,
) -> dict[str, Any]:
  """Packs all inputs and writes the corpus; returns the manifest."""
  # Imports TFDS, which takes as long as the workers take to start.
  from realm_jax.prepare import writer as writer_lib

  made_with = {  # Everything that a chunk depends on besides its records.
      **_manifest_settings(packing, 0.0),
      'program': f'realm_jax {realm_jax.__version__}',
      'format': corpus_lib.FORMAT_VERSION,
      'tokenizer': tokenizer.digest,
  }
  with (
      files.atomic_folder(output, overwrite) as directory,
      workers_lib.chunk_files(output, made_with) as chunk_path,
  ):
    tokenizer.save(directory)
    writer = writer_lib.CorpusWriter(
        directory, tokenizer, len(inputs) > 1, pool.workers
    )
    pipeline = pipeline_lib.Pipeline(
        tokenizer,
        directory,
        packing,
        chunk_path,
        pool if beam is None else workers_lib.Pool(1),
    )
    for one in inputs:
      if beam is not None:
        pipeline.run_beam(_tasks(one), beam)
      _add(writer, one, pipeline, progress)
    pool.stop()
    if questions is not None:
      (directory / 'questions.jsonl').write_text(
          ''.join(json.dumps(q, ensure_ascii=False) + '\n' for q in questions),
          encoding='utf-8',
      )
    skipped = {
        'count': sum(one.records.skipped for one in inputs),
        'first': [p for one in inputs for p in one.records.skipped_list][:20],
    }
    manifest = writer.close(settings, skipped, need_sentences)
  writer_lib.warn(manifest['counts'])
  return manifest


def _add(
    writer: 'writer_lib.CorpusWriter',
    one: _Input,
    pipeline: pipeline_lib.Pipeline,
    progress: bool,
) -> None:
  """Packs and writes all records of an input."""
  with tqdm.tqdm(
      total=one.records.count,
      desc='passages' if one.passages else 'pretraining',
      unit=' records',
      disable=not progress,
  ) as bar:
    for chunk in pipeline.run(_tasks(one)):
      writer.add(chunk, one.passages, limited=one.validation_fraction > 0)
      # Shown by `update`; a refresh here would double the lines of a log.
      bar.set_postfix(passages=writer.num_passages, refresh=False)
      bar.update(chunk.num_records)
  prefix = '' if one.passages else 'pretraining_'
  if one.records.empty:
    writer.counts[f'{prefix}empty_records'] = one.records.empty
  if one.near_duplicates is not None:
    writer.counts[f'{prefix}near_duplicates'] = len(one.near_duplicates)


def _manifest_settings(
    settings: passages_lib.Settings, fraction: float
) -> dict[str, Any]:
  """Returns how the corpus was made, for the manifest."""
  return {
      **dataclasses.asdict(settings),
      'validation_fraction': fraction,
      'sentence_splitter': f'nupunkt {nupunkt.__version__}',
  }


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
  """Refuses an output that is being written or must not be replaced."""
  for leftover in files.leftovers(output):
    with files.folder_lock(leftover, output):
      pass
  if not output.exists():
    return
  if not overwrite:
    raise FileExistsError(
        f'The output {output} exists; give --overwrite to replace it.'
    )
  manifest = output / 'manifest.json'
  is_corpus = manifest.is_file() and (
      corpus_lib.FORMAT in manifest.read_text('utf-8', errors='replace')
  )
  if not output.is_dir() or (any(output.iterdir()) and not is_corpus):
    raise FileExistsError(
        f'The output {output} exists and is not a corpus, so --overwrite does'
        ' not replace it; remove it yourself.'
    )


def _open_inputs(
    sources: Sequence[str], options: Options
) -> tuple[list[_Input], list[dict[str, Any]] | None]:
  """Returns the inputs, and the questions of a world."""
  others = options.pretraining_sources
  worlds = [
      s for s in (*sources, *others) if s.startswith('world:') or s == 'world'
  ]
  if not worlds:
    found = [
        sources_lib.find(names, options.format, options.fields)
        for names in (sources, others)
        if names or names is sources
    ]
    questions = None
  else:
    name = worlds[0]
    if len(sources) != 1 or others:
      raise ValueError(
          f'A world has all its texts, so {name!r} must be the only source;'
          f' the sources are {[*sources, *others]}.'
      )
    made = world.from_name(name)
    found = [
        [sources_lib.Items(items, name)]
        for items in (made.knowledge, made.pretraining)
    ]
    questions = made.questions
  inputs = [
      _Input(records_lib.Records(one, options.skip_bad_records), i == 0)
      for i, one in enumerate(found)
  ]
  return inputs, questions


def _check(
    source: records_lib.Records,
    progress: bool,
    census: languages.Census,
    pool: workers_lib.Pool | None,
) -> None:
  size = 0
  for record in tqdm.tqdm(
      source.check(), desc='checking', unit=' records', disable=not progress
  ):
    census.add(record.text, record.spans is not None)
    size += len(record.text)
    if pool is not None:
      pool.start(1 + size // _CHUNK_BYTES)  # For as many tasks.
  source.report()


def _tasks(one: _Input) -> Iterator[passages_lib.Task]:
  """Numbers the articles, sets some aside, and groups records into tasks."""
  task = passages_lib.Task([], [], [], one.passages)
  article, num_articles, key, aside, size = -1, 0, None, False, 0
  known = records_lib.HashNumbers()
  for number, record in enumerate(one.records):
    if one.near_duplicates and number in one.near_duplicates:
      continue
    if record.article is None or record.article != key:
      article, key = num_articles, record.article
      if key is not None:  # Records of an article need not be adjacent.
        article = known.setdefault(corpus_lib.id_hash(key), article)
      num_articles = max(num_articles, article + 1)
      # The first article is never set aside, so that something is left.
      aside = article > 0 and records_lib.is_validation(
          key or record.id, one.validation_fraction
      )
    task.records.append(record)
    task.articles.append(article)
    task.validation.append(aside or record.validation)
    size += len(record.text)
    if size >= _CHUNK_BYTES:
      yield task
      task, size = passages_lib.Task([], [], [], one.passages), 0
  if task.records:
    yield task
