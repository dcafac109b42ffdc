"""The documents of open-QA checkpoints: block_records.npy, streamed.

The file is an array of Python byte strings and larger than memory. It holds a
pickle, whose instructions are parsed and never executed.
"""

import array
from collections.abc import Iterable, Iterator
import json
import logging
import os
import pathlib
import pickletools
import struct
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.interop import weights
from realm_jax.prepare import prepare

log = logging.getLogger(__name__)

FILE = 'block_records.npy'  # In the folder of a checkpoint.
# The longest possible passage: each block becomes one passage.
_MAX_BLOCK = 65_535
_BLANK = '[UNK]'  # Replaces a block without text.

# All words in the pickle of an object array, before its items.
_WORDS = frozenset(
    'numpy.core.multiarray numpy._core.multiarray _reconstruct numpy ndarray'
    ' dtype O8 |'.split()
)
_LIST_OPCODES = ('MARK', 'APPEND', 'APPENDS', 'FRAME')
_MAX_GAP = 1000  # Between the numbers of consecutive memo entries.
_ABSENT = 2**64 - 1
_BATCH = 1000  # Items per APPENDS, as in Python's own pickler.
# The pickle of an array of %b objects, before its items.
_HEAD = (
    b'\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n'
    b'K\x00\x85C\x01b\x87R(K\x01J%b\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8'
    b'\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff'
    b'K?tb\x89]'
)


def byte_records(path: str | os.PathLike[str]) -> tuple[int, Iterator[bytes]]:
  """Opens an .npy file of byte strings: their number, and a stream of them.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: here or while iterating: it is not such a file, is truncated
      or names a global that such a file does not need.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}.')
  with open(path, 'rb') as file, weights.located(path):
    if np.lib.format.read_magic(file) == (1, 0):
      shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
      shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype != np.dtype(object) or len(shape) != 1:
      raise ValueError(
          f'an array of {dtype} and shape {shape}; expected one dimension of'
          ' Python byte strings'
      )
    return shape[0], _records(path, file.tell(), shape[0])


def _records(path: pathlib.Path, start: int, number: int) -> Iterator[bytes]:
  # The memo holds file offsets, since all strings do not fit in memory.
  memo = array.array('Q')
  found, last, in_list = 0, _ABSENT, False
  with open(path, 'rb', buffering=1 << 20) as file, weights.located(path):
    file.seek(start)
    operations: Iterator[Any] = pickletools.genops(file)
    for opcode, argument, place in operations:
      if opcode.name in weights.PUTS:
        key = len(memo) if argument is None else argument
        if key > len(memo) + _MAX_GAP:
          raise ValueError('the memo of the pickle has gaps')
        memo.extend([_ABSENT] * (key + 1 - len(memo)))
        memo[key] = last
        continue
      if opcode.name in weights.GETS:
        place = memo[argument] if argument < len(memo) else _ABSENT
        if place == _ABSENT:
          raise ValueError(f'memo entry {argument} is not set')
        back = file.tell()
        file.seek(place)
        opcode, argument, _ = next(pickletools.genops(file))
        file.seek(back)
      last = place
      if in_list and isinstance(argument, bytes):
        found += 1
        yield argument
      elif in_list and opcode.name == 'TUPLE':
        in_list = False
      elif in_list and opcode.name not in _LIST_OPCODES:
        kind = ' '.join(value.name for value in opcode.stack_after)
        raise ValueError(f'an item is of type {kind}; expected bytes')
      elif isinstance(argument, str) and not {*argument.split()} <= _WORDS:
        raise ValueError(
            f'it names {argument!r}, which is refused: byte strings need only '
            + ', '.join(sorted(_WORDS))
        )
      elif opcode.name == 'EMPTY_LIST':
        in_list = True
    if found != number:
      raise ValueError(f'it holds {found} records, its header says {number}')


def byte_records_writer(
    path: str | os.PathLike[str], number: int, records: Iterable[bytes]
) -> None:
  """Writes a file that `byte_records` reads, one record at a time.

  Raises:
    ValueError: the number of records is not `number`.
  """
  header = {'descr': '|O', 'fortran_order': False, 'shape': (number,)}
  written = 0
  with open(path, 'wb') as file:
    np.lib.format.write_array_header_1_0(file, header)
    file.write(_HEAD % struct.pack('<i', number))
    for record in records:
      if written % _BATCH == 0:
        file.write(b'e(' if written else b'(')
      file.write(b'B' + struct.pack('<I', len(record)) + record)
      written += 1
    file.write(b'etb.' if written else b'tb.')
  if written != number:
    raise ValueError(f'{path}: got {written} records, expected {number}.')


def prepare_corpus(
    path: pathlib.Path | None,
    table: weights.FileTensor,
    name: str,
    workdir: pathlib.Path,
    workers: int | None,
) -> list[int] | None:
  """Makes `workdir`/corpus of the documents of an open-QA checkpoint.

  Row i of the file at `path`, if the checkpoint `name` came with one, becomes
  passage i; `table` has its embedding, [N, E]. `workdir` has the vocabulary.

  Returns:
    The rows without text; None without a file.

  Raises:
    ValueError: file and embeddings do not fit.
  """
  if path is None:
    log.warning(
        '%s has embeddings of %d documents, but no %s: it is imported'
        ' without an index. Give the file with --blocks.',
        name, table.shape[0], FILE,
    )
    return None
  number, records = byte_records(path)
  if number != table.shape[0]:
    raise ValueError(
        f'{path} has {number} documents, {name} has embeddings of'
        f' {table.shape[0]}.'
    )
  lines = workdir / 'blocks.jsonl'
  blanks = []
  with open(lines, 'w', encoding='utf-8') as file:
    for row, record in enumerate(records):
      try:
        text = record.decode('utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(
            f'{path}: document {row} is not UTF-8 ({error.reason}).'
        ) from None
      if not text.strip():
        blanks.append(row)
        text = _BLANK
      file.write(json.dumps({'text': text}) + '\n')
  corpus = workdir / 'corpus'
  prepare.prepare(
      [str(lines)], corpus, vocab=str(workdir), max_wordpieces=_MAX_BLOCK,
      workers=workers,
  )
  lines.unlink()
  rows = len(corpus_lib.Corpus.open(corpus).passages)
  if rows != number:
    raise ValueError(
        f'{path} has {number} documents, which became {rows} passages: some'
        ' have no wordpiece, or more than a passage can hold.'
    )
  return blanks


def publish(
    workdir: pathlib.Path,
    config: config_lib.Config,
    table: weights.FileTensor,
    corpus: corpus_lib.Corpus,
    digest: str | None,
) -> None:
  """Publishes the embeddings of the documents as the generation of step 0.

  The embeddings come from the embedder before fine-tuning, which trains the
  query tower only. The job treats them as made by the imported parameters.
  """
  lineage = generation.Lineage.of(corpus, table.shape[1], 0, digest)
  row_bytes = table.shape[1] * table.dtype.itemsize
  directory = workdir / generation.DIRECTORY
  with generation.Writer(directory, lineage, config.mips.dtype) as writer:
    for rows_NE in table.chunks(generation.ROWS_PER_SHARD * row_bytes):
      writer.add(rows_NE)
    writer.add_backend(config.mips)
    writer.publish()
