"""The corpus artifact that `prepare` writes, for reading.

Public: `Corpus`, `PassageTable`, `SentenceTable`, `Ranges`, `FORMAT_VERSION`,
`id_hash`, `find_hashes`. Tables are memory-mapped numpy arrays, so that a
corpus of any size opens at once and no training step ever tokenises a passage.
A passage's number is its row.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import concatenated
from realm_jax.corpus import tokenizer as tokenizer_lib

# Version of the files and of their meaning. Version 1 had no table of trivial
# candidates, and its articles were runs of records.
FORMAT_VERSION = 2
_READABLE = (1, 2)  # A reader refuses any other.
NUM_SPECIALS = 3  # [CLS] title [SEP] body [SEP].
_IDS_AT_ONCE = 2**20  # Hashes of ids that are looked through.

# Wordpieces: of one file, or of a corpus and of what was added to it.
Tokens = np.ndarray | concatenated.Chained


@dataclasses.dataclass(frozen=True)
class PassageTable:
  """Wordpieces of all passages.

  tokens: uint16 or uint32, flat: of each passage the title's, then the body's.
  offsets: int64 [N + 1]: where passage i begins and ends in `tokens`.
  title_lengths: int32 [N]: how many of its wordpieces are the title's.
  articles: int32 [N]: number of its article.
  """

  tokens: Tokens
  offsets: np.ndarray
  title_lengths: np.ndarray
  articles: np.ndarray

  def __len__(self) -> int:
    return len(self.title_lengths)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int32 [N]: wordpieces with title, body, [CLS] and two [SEP]."""
    return (np.diff(self.offsets) + NUM_SPECIALS).astype(np.int32)

  def title_and_body(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the wordpieces of the title and of the body."""
    start, limit = self.offsets[row], self.offsets[row + 1]
    middle = start + self.title_lengths[row]
    return self.tokens[start:middle], self.tokens[middle:limit]

  def article_rows(self, passages: np.ndarray) -> np.ndarray:
    """Returns which rows the articles of some passages cover.

    Args:
      passages: rows, any shape; -1 for a sentence that is from no passage.

    Returns:
      int64 [..., R, 2]: half-open ranges of rows, as many as the article has
      that is in the most places, filled up with [0, 0); for -1 only those.
    """
    passages = np.asarray(passages, np.int64)
    first, starts, limits = self.article_runs
    articles = self.articles[np.maximum(passages, 0)]
    begin, end = first[articles, None], first[articles + 1, None]
    at = begin + np.arange(np.diff(first).max())
    known = (at < end) & (passages[..., None] >= 0)
    at = np.where(known, at, 0)
    rows = np.stack([starts[at], limits[at]], axis=-1)
    return np.where(known[..., None], rows, 0)

  @functools.cached_property
  def article_runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of an article that stand together, in order of the articles.

    int64: which of the runs is the first of each article, and of one more; the
    rows where each begins; and where it ends.
    """
    articles = np.asarray(self.articles)
    starts = np.flatnonzero(np.diff(articles, prepend=-1))
    limits = np.append(starts[1:], len(articles))
    order = np.argsort(articles[starts], kind='stable')
    counts = np.bincount(articles[starts])
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return first, starts[order], limits[order]

  @property
  def num_articles(self) -> int:
    """One more than the highest number of an article."""
    return int(self.articles.max()) + 1


@dataclasses.dataclass(frozen=True)
class SentenceTable:
  """Sentences with their salient spans.

  tokens: uint16 or uint32, flat; of the passages when the sentences are theirs.
  starts: int64 [n]: where sentence i begins in `tokens`.
  lengths: int32 [n]: its wordpieces.
  passages: int64 [n]: row of its passage, -1 if from none.
  span_offsets: int64 [n + 1]: where its spans begin and end in `spans`.
  spans: int32 [total, 2]: half-open ranges of wordpieces of the sentence.
  """

  tokens: Tokens
  starts: np.ndarray
  lengths: np.ndarray
  passages: np.ndarray
  span_offsets: np.ndarray
  spans: np.ndarray

  def __len__(self) -> int:
    return len(self.lengths)

  def ids(self, row: int) -> np.ndarray:
    """Returns the wordpieces of a sentence."""
    start = self.starts[row]
    return self.tokens[start : start + self.lengths[row]]

  def spans_of(self, row: int) -> np.ndarray:
    """Returns int32 [spans, 2], relative to the sentence's wordpieces."""
    return self.spans[self.span_offsets[row] : self.span_offsets[row + 1]]


@dataclasses.dataclass(frozen=True)
class Ranges:
  """Ranges of passages for each sentence, in order and disjoint.

  offsets: int64 [n + 1]: where those of sentence i begin and end in `rows`.
  rows: int32 [total, 2]: half-open ranges of rows.
  """

  offsets: np.ndarray
  rows: np.ndarray


class Corpus:
  """An open corpus; `Corpus.open(directory)` makes one."""

  # Rows, in order, that no search may return: see `overlay.Overlay`.
  removed: np.ndarray = np.zeros(0, np.int64)

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
    self.directory = directory
    self.manifest = manifest
    self.fingerprint: str = manifest['fingerprint']
    dtype = np.dtype(manifest['token_dtype'])
    load = self._load
    tokens = {
        name: self._map_tokens(name, dtype)
        for name in ['passage_tokens.bin'] + [
            split['tokens'] for split in manifest['splits'].values()
        ]
    }
    self.passages = PassageTable(
        tokens['passage_tokens.bin'],
        load('passage_offsets.npy'),
        load('title_lengths.npy'),
        load('articles.npy'),
    )
    # Only the splits that have sentences.
    self.sentences = {
        name: SentenceTable(
            tokens[split['tokens']],
            load(f'{name}.starts.npy'),
            load(f'{name}.lengths.npy'),
            load(f'{name}.passages.npy'),
            load(f'{name}.span_offsets.npy'),
            load(f'{name}.spans.npy'),
        )
        for name, split in manifest['splits'].items()
    }

  @classmethod
  def open(cls, directory: str | os.PathLike[str]) -> 'Corpus':
    """Opens the folder that `prepare` wrote.

    Raises:
      FileNotFoundError: if there is none, it was not finished, or lacks a file.
      ValueError: if it is of another format version, or a file is damaged.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
      raise FileNotFoundError(
          f'There is no corpus {directory}; write one with `realm-jax prepare '
          f'--output={directory}`.'
      )
    path = directory / 'manifest.json'
    if not path.is_file():
      raise FileNotFoundError(
          f'{directory} has no manifest.json: it is not a corpus, or `realm-jax'
          ' prepare` did not finish it.'
      )
    try:
      manifest = json.loads(path.read_bytes())
      version = manifest['version']
    except (ValueError, KeyError, TypeError):
      raise ValueError(f'{path} is damaged: no readable manifest.') from None
    if version not in _READABLE:
      raise ValueError(
          f'{directory} has corpus format {version!r}; this realm_jax reads '
          f'the formats {_READABLE}. Prepare the corpus again.'
      )
    for name, facts in manifest['files'].items():
      file = directory / name
      if not file.is_file():
        raise FileNotFoundError(
            f'The corpus {directory} lacks the file {name}.'
        )
      size = file.stat().st_size
      if size != facts['bytes']:
        raise ValueError(
            f'The corpus {directory} is damaged: {name} has {size} bytes, its '
            f'manifest says {facts["bytes"]}.'
        )
    return cls(directory, manifest)

  def verify(self) -> None:
    """Reads all files; raises ValueError if one is not as written."""
    for name, facts in self.manifest['files'].items():
      with open(self.directory / name, 'rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
      if found != facts['sha256']:
        raise ValueError(
            f'The corpus {self.directory} is damaged: {name} has the SHA-256 '
            f'{found}, its manifest says {facts["sha256"]}.'
        )

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer that the tables were made with."""
    made_with = self.manifest['tokenizer']
    found = tokenizer_lib.Tokenizer.from_vocab(
        self.directory / 'vocab.txt', made_with['lowercase']
    )
    if found.digest != made_with['digest']:
      raise ValueError(
          f'{self.directory}/vocab.txt is not what the corpus was made with: '
          f'digest {found.digest}, manifest {made_with["digest"]}.'
      )
    return found

  def passage_text(self, row: int) -> dict[str, str]:
    """Returns {id, title, text} of a passage, by random access.

    Raises:
      IndexError: if there is no such row.
    """
    if not 0 <= row < len(self.passages):
      raise IndexError(
          f'There is no passage {row}; the corpus has {len(self.passages)}.'
      )
    record = self._passage_records[int(row)]
    return {
        name: record[name].decode('utf-8') for name in ('id', 'title', 'text')
    }

  def trivial(self, split: str) -> Ranges | None:
    """Returns which other passages hold each sentence of a split (`trivial`).

    None: not known, as `prepare` found none before format version 2.
    """
    if self.manifest['version'] < 2:
      return None
    return Ranges(
        self._load(f'{split}.trivial_offsets.npy'),
        self._load(f'{split}.trivial.npy'),
    )

  @property
  def num_live(self) -> int:
    """How many passages can be found."""
    return len(self.passages) - len(self.removed)

  def passage_rows_by_id(self, ids: Iterable[str]) -> np.ndarray:
    """Returns the rows of passages by their ids, int64; -1 where unknown.

    The id of a record that was too long for one passage gives its first.
    """
    found = self.record_rows(list(ids))
    return np.array([rows[0] if len(rows) else -1 for rows in found], np.int64)

  def record_rows(self, ids: Sequence[str]) -> list[np.ndarray]:
    """Returns for each id the rows of all its passages, int64; none: unknown.

    It is that of a passage, or of a record that was too long for one passage:
    then its passages have the ids ID#0, ID#1 and so on, in a row. All ids are
    looked up together, in one reading of the hashes, 8 bytes for each passage.
    """
    names = [name for one in ids for name in (one, f'{one}#0')]
    hashes = self._load('passage_ids.npy')
    candidates = find_hashes(hashes, [id_hash(name) for name in names])
    found = []
    for one in ids:
      rows = np.zeros(0, np.int64)
      for name in (one, f'{one}#0'):
        for row in candidates.get(id_hash(name), ()):
          if not len(rows) and self.passage_text(row)['id'] == name:
            limit = row + 1
            if name != one:
              while limit < len(hashes) and hashes[limit] == id_hash(
                  f'{one}#{limit - row}'
              ):
                limit += 1
            rows = np.arange(row, limit)
      found.append(rows)
    return found

  @functools.cached_property
  def _passage_records(self) -> Any:
    # Imported late: it takes seconds, and training never needs the texts.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(self.directory / 'passages'))
    return builder.as_data_source(split='train')

  def _load(self, name: str) -> np.ndarray:
    return np.load(
        self.directory / 'tables' / name, mmap_mode='r', allow_pickle=False
    )

  def _map_tokens(self, name: str, dtype: np.dtype) -> np.ndarray:
    return np.memmap(self.directory / 'tables' / name, dtype, mode='r')


def find_hashes(
    hashes: np.ndarray, wanted: Sequence[int]
) -> dict[int, list[int]]:
  """Returns the rows where hashes occur; far cheaper than to sort them all."""
  targets = np.unique(np.array(wanted, np.uint64))
  found: dict[int, list[int]] = {}
  if not len(targets):
    return found
  for start in range(0, len(hashes), _IDS_AT_ONCE):
    part = hashes[start : start + _IDS_AT_ONCE]
    at = np.minimum(np.searchsorted(targets, part), len(targets) - 1)
    for row in np.flatnonzero(targets[at] == part):
      found.setdefault(int(part[row]), []).append(start + int(row))
  return found


def id_hash(name: str) -> int:
  """Returns the 64-bit hash by which `tables/passage_ids.npy` knows an id."""
  digest = hashlib.blake2b(name.encode('utf-8'), digest_size=8).digest()
  return int.from_bytes(digest, 'little')
