"""From text to the corpus artifact: `realm-jax prepare`.

Public: `prepare`. The input is read twice: first all of it is checked, so that
a bad line is found before any expensive work, then chunks of records go through
a pool of processes, or an Apache Beam pipeline, and come back in order. The
bytes written are the same for any number of processes, and after any number of
interruptions. Only `writer` writes a corpus.
"""

from collections.abc import Collection, Iterator, Sequence
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import nupunkt
import tqdm

import realm_jax
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import beam as beam_lib
from realm_jax.prepare import chunk_files as chunk_files_lib
from realm_jax.prepare import filters
from realm_jax.prepare import near_duplicates as near_duplicates_lib
from realm_jax.prepare import passages as passages_lib
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources as sources_lib
from realm_jax.prepare import workers as workers_lib
from realm_jax.prepare import world
from realm_jax.prepare import writer as writer_lib
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 19  # Characters of text per task.
_WORLD_VOCAB_SIZE = 3000
_DEFAULT_VOCAB_SIZE = 30_522  # BERT's.


def prepare(
    sources: Sequence[str],
    output: str | os.PathLike[str],
    *,
    pretraining_sources: Sequence[str] = (),
    vocab: str | None = None,
    vocab_size: int | None = None,
    max_wordpieces: int = 288,
    min_sentence: int = 4,
    max_sentence: int = 200,
    validation_fraction: float = 0.01,
    exclude: Sequence[str] = (),
    near_duplicates: float | None = None,
    workers: int | None = None,
    beam: Sequence[str] | None = None,
    skip_bad_records: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes a corpus artifact and returns its manifest.

  Args:
    sources: files, folders, glob patterns and datasets with the texts of the
      passages (see `sources.UNDERSTOOD`); or the one source
      'world:SEED[:ENTITIES]', a generated world, which brings its own
      pretraining texts and questions.
    output: folder to write. It appears, complete, at the very end.
    pretraining_sources: texts to take sentences from, but no passages.
    vocab: vocabulary file, folder of a tokenizer, or model id of the Hugging
      Face hub; None: learn one from the texts.
    vocab_size: of a learned vocabulary, at most.
    max_wordpieces: of a passage with its title and 3 special tokens.
    min_sentence: wordpieces of a sentence to learn from, at least.
    max_sentence: the same, at most.
    validation_fraction: of the articles, whose sentences are set aside if no
      record is marked with `split: 'validation'`; no further article is begun
      once there are 5,000 sentences.
    exclude: kinds of records to leave out, of `filters.KINDS`.
    near_duplicates: similarity, over 0 to 1, from which on a record is left out
      if an earlier one of the same sources is that similar; None: all stay.
    workers: processes; None: as many as there are CPU cores.
    beam: options of an Apache Beam pipeline that does the work instead; its
      workers must see the folder that `output` is in. None: no pipeline.
    skip_bad_records: leave bad records out, and list the first of them, rather
      than stopping at the first.
    overwrite: whether to replace a corpus at `output`.
    progress: whether to show a progress bar.

  Raises:
    FileNotFoundError: if a source or the vocabulary is missing.
    FileExistsError: if `output` exists, or is being written.
    ImportError: if a source or an option needs a package that is missing.
    ValueError: if an argument or a record is wrong; if there is no record or
      no salient span.
    OSError: if the disk is full. Then, as after any error, nothing is left.
  """
  output = pathlib.Path(output).absolute()
  workers = workers or _num_cores()
  settings = _check_settings(
      max_wordpieces,
      min_sentence,
      max_sentence,
      validation_fraction,
      vocab_size,
      workers,
      exclude,
      near_duplicates,
  )
  if beam is not None:
    beam_lib.check_installed()
  _check_output(output, overwrite)
  knowledge, pretraining, questions = _open_sources(
      sources, pretraining_sources, skip_bad_records
  )
  tokenizer = (
      None if vocab is None else tokenizer_lib.Tokenizer.from_source(vocab)
  )
  inputs = [knowledge] if pretraining is None else [knowledge, pretraining]
  for source in inputs:
    _check(source, progress)
  left_out = [
      set[int]()
      if near_duplicates is None
      else near_duplicates_lib.near_duplicates(source, near_duplicates, workers)
      for source in inputs
  ]
  if tokenizer is None:
    tokenizer = _learn_vocabulary(
        inputs,
        vocab_size
        or (_DEFAULT_VOCAB_SIZE if questions is None else _WORLD_VOCAB_SIZE),
    )
  if any(source.marked for source in inputs):
    validation_fraction = 0.0
  with (
      files.atomic_folder(output, overwrite) as directory,
      chunk_files_lib.kept(output, _made_with(tokenizer, settings)) as parts,
  ):
    tokenizer.save(directory)
    work = workers_lib.Work(tokenizer, settings, parts, workers)
    writer = writer_lib.CorpusWriter(
        directory, tokenizer, pretraining is not None
    )
    for source, numbers in zip(inputs, left_out, strict=True):
      # Only the texts that training learns from are divided.
      fraction = validation_fraction if source is inputs[-1] else 0.0
      passages = source is knowledge
      if beam is not None:
        tasks = _tasks(source, passages, fraction, numbers)
        beam_lib.run(tasks, tokenizer, settings, parts, beam)
        work = dataclasses.replace(work, workers=1)
      tasks = _tasks(source, passages, fraction, numbers)
      _write(writer, source, tasks, passages, fraction, work, progress)
      if near_duplicates is not None:
        prefix = '' if source is knowledge else 'pretraining_'
        writer.counts[f'{prefix}near_duplicates'] = len(numbers)
    if questions is not None:
      (directory / 'questions.jsonl').write_text(
          ''.join(json.dumps(q, ensure_ascii=False) + '\n' for q in questions),
          encoding='utf-8',
      )
    about = {'near_duplicates': near_duplicates} if near_duplicates else {}
    manifest = writer.close(
        {**_about(settings, validation_fraction), **about},
        _skipped(inputs),
    )
  _warn(manifest['counts'])
  return manifest


def prepare_more(
    base: corpus_lib.Corpus,
    source: records_lib.Records,
    output: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes further documents as a corpus of their own, made like another.

  Args:
    base: whose vocabulary and settings are taken.
    source: the documents, already checked.
    output: folder to write. It appears, complete, at the very end. Unlike a
      corpus to train on, it need not have a salient span.
    workers, progress: as of `prepare`.

  Returns:
    The manifest.

  Raises:
    ValueError: if no record has a wordpiece.
    OSError: if the disk is full. Then, as after any error, nothing is left.
  """
  output = pathlib.Path(output).absolute()
  about = base.manifest['settings']
  names = {field.name for field in dataclasses.fields(passages_lib.Settings)}
  settings = passages_lib.Settings(
      **{n: v for n, v in about.items() if n in names}
  )
  settings = dataclasses.replace(settings, exclude=tuple(settings.exclude))
  fraction = 0.0 if source.marked else about['validation_fraction']
  with (
      files.atomic_folder(output, overwrite=False) as directory,
      chunk_files_lib.kept(
          output, _made_with(base.tokenizer, settings)
      ) as parts,
  ):
    base.tokenizer.save(directory)
    work = workers_lib.Work(
        base.tokenizer, settings, parts, workers or _num_cores()
    )
    writer = writer_lib.CorpusWriter(directory, base.tokenizer, False)
    tasks = _tasks(source, True, fraction)
    _write(writer, source, tasks, True, fraction, work, progress)
    manifest = writer.close(
        _about(settings, fraction),
        _skipped([source]),
        need_sentences=False,
    )
  _warn(manifest['counts'])
  return manifest


def _about(settings: passages_lib.Settings, fraction: float) -> dict[str, Any]:
  """Returns what the manifest says of how the corpus was made."""
  return {
      **dataclasses.asdict(settings),
      'validation_fraction': fraction,
      'sentence_splitter': f'nupunkt {nupunkt.__version__}',
  }


def _made_with(
    tokenizer: tokenizer_lib.Tokenizer, settings: passages_lib.Settings
) -> dict[str, Any]:
  """Returns what a chunk depends on, apart from its records."""
  return {
      **_about(settings, 0.0),
      'program': f'realm_jax {realm_jax.__version__}',
      'format': corpus_lib.FORMAT_VERSION,
      'tokenizer': tokenizer.digest,
  }


def _write(
    writer: writer_lib.CorpusWriter,
    source: records_lib.Records,
    tasks: Iterator[passages_lib.Task],
    passages: bool,
    fraction: float,
    work: workers_lib.Work,
    progress: bool,
) -> None:
  """Packs and writes all records of a source."""
  with tqdm.tqdm(
      total=source.count,
      desc='passages' if passages else 'pretraining',
      unit=' records',
      disable=not progress,
  ) as bar:
    for chunk in workers_lib.chunks(tasks, work):
      writer.add(chunk, passages, limited=fraction > 0)
      # Shown with the update: each would be a line of its own in a log.
      bar.set_postfix(passages=writer.num_passages, refresh=False)
      bar.update(chunk.num_records)


def _skipped(inputs: Sequence[records_lib.Records]) -> dict[str, Any]:
  return {
      'count': sum(source.skipped for source in inputs),
      'first': [p for source in inputs for p in source.skipped_list][:20],
  }


def _num_cores() -> int:
  """Returns how many cores this process may use."""
  if hasattr(os, 'sched_getaffinity'):  # Not on every system.
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _check_settings(
    max_wordpieces: int,
    min_sentence: int,
    max_sentence: int,
    validation_fraction: float,
    vocab_size: int | None,
    workers: int,
    exclude: Sequence[str],
    near_duplicates: float | None,
) -> passages_lib.Settings:
  for ok, what in (
      (
          8 <= max_wordpieces <= 65_535,
          f'max_wordpieces is {max_wordpieces}; it can be 8 to 65,535',
      ),
      (
          1 <= min_sentence <= max_sentence,
          (
              f'min_sentence is {min_sentence} and max_sentence {max_sentence};'
              ' it must be 1 <= min_sentence <= max_sentence'
          ),
      ),
      (
          0 <= validation_fraction < 1,
          f'validation_fraction is {validation_fraction}; it can be 0 to 1',
      ),
      (
          vocab_size is None or vocab_size > 0,
          f'vocab_size is {vocab_size}; it must be positive',
      ),
      (workers >= 1, f'workers is {workers}; it must be at least 1'),
      (
          set(exclude) <= set(filters.KINDS),
          f'exclude is {list(exclude)}; it can be {", ".join(filters.KINDS)}',
      ),
      (
          near_duplicates is None or 0 < near_duplicates <= 1,
          f'near_duplicates is {near_duplicates}; it must be over 0, up to 1',
      ),
  ):
    if not ok:
      raise ValueError(f'{what}.')
  if near_duplicates is not None:
    near_duplicates_lib.check_installed()
  return passages_lib.Settings(
      max_wordpieces,
      min_sentence,
      max_sentence,
      exclude=tuple(kind for kind in filters.KINDS if kind in exclude),
  )


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
  """Refuses what must not be replaced; `--overwrite` is for corpora only."""
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
  if not output.is_dir() or (
      any(output.iterdir())
      and not (
          manifest.is_file()
          and writer_lib.FORMAT in manifest.read_text('utf-8', errors='replace')
      )
  ):
    raise FileExistsError(
        f'The output {output} exists and is not a corpus, so that --overwrite '
        'does not replace it; remove it yourself.'
    )


def _open_sources(
    sources: Sequence[str],
    pretraining_sources: Sequence[str],
    skip_bad: bool,
) -> tuple[
    records_lib.Records,
    records_lib.Records | None,
    list[dict[str, Any]] | None,
]:
  """Returns the records for passages and for pretraining, and questions."""
  worlds = [s for s in (*sources, *pretraining_sources) if _is_world(s)]
  if not worlds:
    knowledge = records_lib.Records(sources_lib.find(sources), skip_bad)
    if not pretraining_sources:
      return knowledge, None, None
    others = sources_lib.find(pretraining_sources)
    return knowledge, records_lib.Records(others, skip_bad), None
  if len(sources) != 1 or pretraining_sources:
    raise ValueError(
        f'A world brings all its texts, so {worlds[0]!r} must be the only '
        f'source; there are {[*sources, *pretraining_sources]}.'
    )
  parts = worlds[0].split(':')[1:]
  if not 1 <= len(parts) <= 2 or not all(
      part.isascii() and part.isdigit() for part in parts
  ):
    raise ValueError(
        f'The source {worlds[0]!r} is not of the form world:SEED[:ENTITIES] '
        'with two whole numbers, such as world:0 or world:7:500.'
    )
  made = world.generate(*map(int, parts))
  return (
      records_lib.Records([sources_lib.Items(made.knowledge, worlds[0])]),
      records_lib.Records([sources_lib.Items(made.pretraining, worlds[0])]),
      made.questions,
  )


def _is_world(source: str) -> bool:
  return source.startswith('world:') or source == 'world'


def _check(source: records_lib.Records, progress: bool) -> None:
  for _ in tqdm.tqdm(
      source.check(), desc='checking', unit=' records', disable=not progress
  ):
    pass
  if source.skipped:
    log.warning(
        '%d bad records are left out:\n%s%s',
        source.skipped,
        '\n'.join(source.skipped_list),
        '\n...' if source.skipped > len(source.skipped_list) else '',
    )


class _Texts:
  """The texts of some sources, to be gone through more than once."""

  def __init__(self, inputs: Sequence[records_lib.Records]):
    self._inputs = inputs

  def __iter__(self) -> Iterator[str]:
    for source in self._inputs:
      yield from source.texts()


def _learn_vocabulary(
    inputs: Sequence[records_lib.Records], size: int
) -> tokenizer_lib.Tokenizer:
  log.info('Learning a vocabulary of at most %d wordpieces.', size)
  learned = tokenizer_lib.Tokenizer.train(_Texts(inputs), size)
  if learned.vocab_size > size:
    raise ValueError(
        f'vocab_size is {size}, but the characters of the texts alone take '
        f'{learned.vocab_size} wordpieces.'
    )
  return learned


def _tasks(
    source: records_lib.Records,
    passages: bool,
    fraction: float,
    left_out: Collection[int] = (),
) -> Iterator[passages_lib.Task]:
  """Numbers the articles and cuts the records into tasks.

  Args:
    source: already checked.
    passages: whether passages are wanted, or sentences alone.
    fraction: of the articles, to be set aside.
    left_out: numbers of records.
  """
  task = passages_lib.Task([], [], [], passages)
  article, num_articles, key, aside, size = -1, 0, None, False, 0
  known = records_lib.HashNumbers()
  for number, record in enumerate(source):
    if number in left_out:
      continue
    if record.article is None or record.article != key:
      article, key = num_articles, record.article
      if key is not None:  # Its records need not stand together.
        article = known.setdefault(corpus_lib.id_hash(key), article)
      num_articles = max(num_articles, article + 1)
      # The first article is never set aside, so that something is left.
      aside = article > 0 and records_lib.is_validation(
          key or record.id, fraction
      )
    task.records.append(record)
    task.articles.append(article)
    task.validation.append(aside or record.validation)
    size += len(record.text)
    if size >= _CHUNK_BYTES:
      yield task
      task, size = passages_lib.Task([], [], [], passages), 0
  if task.records:
    yield task


def _warn(counts: dict[str, int]) -> None:
  if counts.get('shortened_titles'):
    log.warning(
        '%d titles longer than half a passage were shortened.',
        counts['shortened_titles'],
    )
  unknown = counts.get('unknown_wordpieces', 0)
  if unknown > 0.05 * counts['wordpieces']:
    log.warning(
        '%.0f%% of the wordpieces are [UNK]: the vocabulary is not one for '
        'these texts.',
        100 * unknown / counts['wordpieces'],
    )
