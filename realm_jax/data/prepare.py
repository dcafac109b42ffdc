"""From text to the corpus artifact: `realm-jax prepare`.

Public: `prepare`. The input is read twice: first all of it is checked, so that
a bad line is found before any expensive work, then chunks of records go through
a pool of processes and come back in order. The bytes written are the same for
any number of processes. Only `writer` writes a corpus.
"""

import collections
from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import json
import multiprocessing
from multiprocessing import connection
import os
import pathlib
import signal
import threading
from typing import Any

from absl import logging
import nupunkt
import tqdm

from realm_jax.data import atomic
from realm_jax.data import corpus as corpus_lib
from realm_jax.data import packing
from realm_jax.data import records as records_lib
from realm_jax.data import tokenizer as tokenizer_lib
from realm_jax.data import world
from realm_jax.data import writer as writer_lib

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
    workers: int | None = None,
    skip_bad_records: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
  """Writes a corpus artifact and returns its manifest.

  Args:
    sources: JSONL files (.gz, .xz), folders or glob patterns with the texts of
      the passages; or the one source 'world:SEED[:ENTITIES]', a generated
      world, which brings its own pretraining texts and questions.
    output: folder to write. It appears, complete, at the very end.
    pretraining_sources: texts to take sentences from, but no passages.
    vocab: vocabulary file, folder of a tokenizer, or model id of the Hugging
      Face hub; None: learn one from the texts.
    vocab_size: of a learned vocabulary, at most.
    max_wordpieces: of a passage with its title and 3 special tokens.
    min_sentence: wordpieces of a sentence to learn from, at least.
    max_sentence: the same, at most.
    validation_fraction: of the articles, whose sentences are set aside (at
      most 5,000) if no record is marked with `split: 'validation'`.
    workers: processes; None: as many as there are CPU cores.
    skip_bad_records: leave bad records out, and list the first of them, rather
      than stopping at the first.
    overwrite: whether to replace a corpus at `output`.
    progress: whether to show a progress bar.

  Raises:
    FileNotFoundError: if a source or the vocabulary is missing.
    FileExistsError: if `output` exists, or is being written.
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
  )
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
  if tokenizer is None:
    tokenizer = _learn_vocabulary(
        inputs,
        vocab_size
        or (_DEFAULT_VOCAB_SIZE if questions is None else _WORLD_VOCAB_SIZE),
    )
  if any(source.marked for source in inputs):
    validation_fraction = 0.0
  with atomic.atomic_directory(output, overwrite) as directory:
    tokenizer.save(directory)
    writer = writer_lib.CorpusWriter(
        directory, tokenizer, pretraining is not None
    )
    for source in inputs:
      # Only the texts that training learns from are divided.
      fraction = validation_fraction if source is inputs[-1] else 0.0
      _write(
          writer,
          source,
          source is knowledge,
          fraction,
          (tokenizer, settings, directory, workers),
          progress,
      )
    if questions is not None:
      (directory / 'questions.jsonl').write_text(
          ''.join(json.dumps(q, ensure_ascii=False) + '\n' for q in questions),
          encoding='utf-8',
      )
    manifest = writer.close(
        {
            **dataclasses.asdict(settings),
            'validation_fraction': validation_fraction,
            'sentence_splitter': f'nupunkt {nupunkt.__version__}',
        },
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
  fields = dataclasses.fields(packing.Settings)
  settings = packing.Settings(**{f.name: about[f.name] for f in fields})
  fraction = 0.0 if source.marked else about['validation_fraction']
  with atomic.atomic_directory(output, overwrite=False) as directory:
    base.tokenizer.save(directory)
    writer = writer_lib.CorpusWriter(directory, base.tokenizer, False)
    work = (base.tokenizer, settings, directory, workers or _num_cores())
    _write(writer, source, True, fraction, work, progress)
    manifest = writer.close(
        {
            **dataclasses.asdict(settings),
            'validation_fraction': fraction,
            'sentence_splitter': f'nupunkt {nupunkt.__version__}',
        },
        _skipped([source]),
        need_sentences=False,
    )
  _warn(manifest['counts'])
  return manifest


def _write(
    writer: writer_lib.CorpusWriter,
    source: records_lib.Records,
    passages: bool,
    fraction: float,
    work: tuple[tokenizer_lib.Tokenizer, packing.Settings, pathlib.Path, int],
    progress: bool,
) -> None:
  """Packs and writes all records of a source; `work` is that of `_map`."""
  with tqdm.tqdm(
      total=source.count,
      desc='passages' if passages else 'pretraining',
      unit=' records',
      disable=not progress,
  ) as bar:
    for chunk in _map(_tasks(source, passages, fraction), *work):
      writer.add(chunk, passages, limited=fraction > 0)
      bar.update(chunk.num_records)
      bar.set_postfix(passages=writer.num_passages)


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
) -> packing.Settings:
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
  ):
    if not ok:
      raise ValueError(f'{what}.')
  return packing.Settings(max_wordpieces, min_sentence, max_sentence)


def _check_output(output: pathlib.Path, overwrite: bool) -> None:
  """Refuses what must not be replaced; `--overwrite` is for corpora only."""
  for leftover in atomic.leftovers(output):
    with atomic.locked(leftover, output):
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
  if isinstance(sources, str) or isinstance(pretraining_sources, str):
    raise ValueError('The sources must be a list of strings, not a string.')
  worlds = [s for s in (*sources, *pretraining_sources) if _is_world(s)]
  if not worlds:
    knowledge = records_lib.Records(
        records_lib.find_files(sources), skip_bad=skip_bad
    )
    if not pretraining_sources:
      return knowledge, None, None
    files = records_lib.find_files(pretraining_sources)
    return knowledge, records_lib.Records(files, skip_bad=skip_bad), None
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
      records_lib.Records(items=made.knowledge, name=worlds[0]),
      records_lib.Records(items=made.pretraining, name=worlds[0]),
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
    logging.warning(
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
  logging.info('Learning a vocabulary of at most %d wordpieces.', size)
  learned = tokenizer_lib.Tokenizer.train(_Texts(inputs), size)
  if learned.vocab_size > size:
    raise ValueError(
        f'vocab_size is {size}, but the characters of the texts alone take '
        f'{learned.vocab_size} wordpieces.'
    )
  return learned


def _tasks(
    source: records_lib.Records, passages: bool, fraction: float
) -> Iterator[packing.Task]:
  """Numbers the articles and cuts the records into tasks."""
  task = packing.Task([], [], [], passages)
  article, key, aside, size = -1, None, False, 0
  for record in source:
    if record.article is None or record.article != key:
      article, key = article + 1, record.article
      # The first article is never set aside, so that something is left.
      aside = article > 0 and records_lib.is_validation(record.id, fraction)
    task.records.append(record)
    task.articles.append(article)
    task.validation.append(aside or record.validation)
    size += len(record.text)
    if size >= _CHUNK_BYTES:
      yield task
      task, size = packing.Task([], [], [], passages), 0
  if task.records:
    yield task


def _map(
    tasks: Iterator[packing.Task],
    tokenizer: tokenizer_lib.Tokenizer,
    settings: packing.Settings,
    directory: pathlib.Path,
    workers: int,
) -> Iterator[packing.Chunk]:
  """Yields the chunks of tasks in order, with few of them in memory."""
  first, second = next(tasks, None), next(tasks, None)
  ahead = [task for task in (first, second) if task is not None]
  if workers == 1 or len(ahead) < 2:  # Starting processes would take longer.
    packer = packing.Packer(tokenizer, settings)
    for task in ahead:
      yield packer(task)
    for task in tasks:
      yield packer(task)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
      workers,
      # Not fork: the tokenizers library and JAX have threads.
      multiprocessing.get_context('spawn'),
      _start_worker,
      (os.fspath(directory / 'vocab.txt'), tokenizer.lowercase, settings),
  )
  with pool:
    pending: collections.deque[concurrent.futures.Future[packing.Chunk]]
    pending = collections.deque(pool.submit(_work, task) for task in ahead)
    try:
      for task in tasks:
        pending.append(pool.submit(_work, task))
        if len(pending) > 2 * workers:
          yield pending.popleft().result()
      while pending:
        yield pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)


_packer: packing.Packer | None = None  # Of a worker process.


def _start_worker(
    vocab: str, lowercase: bool, settings: packing.Settings
) -> None:
  global _packer
  # One thread each: there is a process for every core.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends the pool.
  parent = multiprocessing.parent_process()
  assert parent is not None
  sentinel = parent.sentinel

  def leave_with_parent() -> None:
    # A killed parent cannot end the pool, and its pipes stay open in the
    # other workers, so that waiting for a task would never end.
    connection.wait([sentinel])
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()
  tokenizer = tokenizer_lib.Tokenizer.from_vocab(vocab, lowercase)
  _packer = packing.Packer(tokenizer, settings)


def _work(task: packing.Task) -> packing.Chunk:
  assert _packer is not None
  return _packer(task)


def _warn(counts: dict[str, int]) -> None:
  if counts.get('shortened_titles'):
    logging.warning(
        '%d titles longer than half a passage were shortened.',
        counts['shortened_titles'],
    )
  unknown = counts.get('unknown_wordpieces', 0)
  if unknown > 0.05 * counts['wordpieces']:
    logging.warning(
        '%.0f%% of the wordpieces are [UNK]: the vocabulary is not one for '
        'these texts.',
        100 * unknown / counts['wordpieces'],
    )
