"""Reads the corpus artifact that `prepare` writes.

Tables are memory-mapped numpy arrays, so a corpus of any size opens at once and
training never tokenises a passage. A passage's number is its row.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any, Protocol

import numpy as np

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.runtime import files

# Version 1 has no tables of trivial candidates, and only adjacent records form
# an article.
FORMAT_VERSION = 2
FORMAT = 'realm_jax corpus'
_READABLE = (1, 2)
NUM_SPECIALS = 3  # [CLS] title [SEP] body [SEP]; RoBERTa has two [SEP].
_HASH_BLOCK = 2**20  # Hashes of ids that are searched at a time.


class Rows(Protocol):
  """Rows that are read by slice or by number, as of a numpy array."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> Any: ...

  def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class Chained:
  """Arrays joined along their first axis, read on demand and never copied.

  There is at least one part. Parts may be memory-mapped and together larger
  than the memory. ValueError if dtypes or widths differ.
  """

  def __init__(self, parts: Sequence[Rows]):
    kinds = {(str(part.dtype), part.shape[1:]) for part in parts}
    if len(kinds) != 1:
      raise ValueError(f'Parts of one table are of several kinds: {kinds}.')
    self._parts = list(parts)
    self._starts = np.cumsum([0, *(part.shape[0] for part in parts)])
    self.shape = (int(self._starts[-1]), *parts[0].shape[1:])
    self.dtype = parts[0].dtype

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Returns a slice of step 1, or the rows of an array of row numbers."""
    if isinstance(rows, slice):
      start, limit, step = rows.indices(len(self))
      if step != 1:
        raise ValueError(f'{rows}: a table gives ranges of step 1 only.')
      found = [
          part[max(start - first, 0) : limit - first]
          for first, part in zip(self._starts, self._parts, strict=False)
          if first < limit and first + part.shape[0] > start
      ]
      if len(found) == 1:
        return found[0]
      nothing = np.empty((0, *self.shape[1:]), self.dtype)
      return np.concatenate([*found, nothing])
    rows = np.asarray(rows)
    taken = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
    owners = np.searchsorted(self._starts[1:], rows, side='right')
    for owner in np.unique(owners):
      mine = owners == owner
      taken[mine] = self._parts[owner][rows[mine] - self._starts[owner]]
    return taken


# Wordpieces of one file, or of a corpus and the documents added to it.
Tokens = np.ndarray | Chained


@dataclasses.dataclass(frozen=True)
class PassageTable:
  """Wordpieces of all passages.

  tokens: uint16 or uint32, flat: title and body of each passage.
  offsets: int64 [N + 1]: start and end of each passage in `tokens`.
  title_lengths: int32 [N]: number of wordpieces of the title.
  articles: int32 [N]: number of the article.
  num_specials: special wordpieces of a passage.
  """

  tokens: Tokens
  offsets: np.ndarray
  title_lengths: np.ndarray
  articles: np.ndarray
  num_specials: int = NUM_SPECIALS

  def __len__(self) -> int:
    return len(self.title_lengths)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int32 [N]: wordpieces of title and body, with [CLS] and two [SEP]."""
    return (np.diff(self.offsets) + self.num_specials).astype(np.int32)

  def title_and_body(self, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the wordpieces of the title and of the body."""
    start, limit = self.offsets[row], self.offsets[row + 1]
    middle = start + self.title_lengths[row]
    return self.tokens[start:middle], self.tokens[middle:limit]

  def article_rows(self, passages: np.ndarray) -> np.ndarray:
    """Returns the rows that the articles of passages cover; -1: no passage.

    Returns:
      int64 [..., R, 2]: half-open ranges of rows, padded with [0, 0). R is the
      largest number of ranges of an article of the corpus.
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
    """Ranges of adjacent rows of one article, sorted by article.

    int64 [articles + 1]: number of the first range of each article; int64
    [ranges]: first row of each range; and its last row + 1.
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
    """Highest number of an article, plus one."""
    return int(self.articles.max()) + 1


def encode_passages(
    passages: Sequence[tuple[str, str]], tokenizer: tokenizer_lib.Tokenizer
) -> PassageTable:
  """Returns the table of pairs of title and body."""
  titles = tokenizer.encode_batch([title for title, _ in passages])
  bodies = tokenizer.encode_batch([body for _, body in passages])
  pieces = [t + b for t, b in zip(titles, bodies, strict=True)]
  return PassageTable(
      tokens=np.array([piece for row in pieces for piece in row], np.uint32),
      offsets=np.cumsum([0, *map(len, pieces)]),
      title_lengths=np.array([len(title) for title in titles], np.int32),
      articles=np.arange(len(pieces), dtype=np.int32),
      num_specials=tokenizer.num_specials,
  )


@dataclasses.dataclass(frozen=True)
class SentenceTable:
  """Sentences with their salient spans.

  tokens: uint16 or uint32, flat; that of the passages if they have the
    sentences.
  starts: int64 [n]: start of each sentence in `tokens`.
  lengths: int32 [n]: number of wordpieces.
  passages: int64 [n]: row of the passage, -1 for none.
  span_offsets: int64 [n + 1]: start and end of the spans in `spans`.
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
  """Disjoint ranges of passages for each sentence, in order.

  offsets: int64 [n + 1]: start and end of the ranges in `rows`.
  rows: int32 [total, 2]: half-open ranges of rows.
  """

  offsets: np.ndarray
  rows: np.ndarray


class Corpus:
  """An open corpus; see `Corpus.open`."""

  # Sorted rows that no search may return; see `overlay.Overlay`.
  removed: np.ndarray = np.zeros(0, np.int64)

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
    self.directory = directory
    self.manifest = manifest
    self.fingerprint: str = manifest['fingerprint']
    dtype = np.dtype(manifest['token_dtype'])
    self.passages, self.sentences = open_tables(
        directory / 'tables',
        manifest['splits'],
        lambda path: np.asarray(np.memmap(path, dtype, mode='r')),
        manifest['tokenizer'].get('num_specials', NUM_SPECIALS),
    )

  @classmethod
  def open(cls, directory: str | os.PathLike[str], flag: str = '') -> 'Corpus':
    """Opens the folder that `prepare` wrote; messages name its `flag`.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: the format version is unknown, or a file is damaged.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
      moved = f'if it has moved, give {flag}=FOLDER, or ' if flag else ''
      raise FileNotFoundError(
          f'There is no corpus {directory}; {moved}write one with `realm-jax'
          f' prepare --output={directory}`.'
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
    except (ValueError, KeyError, TypeError, RecursionError):
      raise ValueError(f'{path} is damaged: no readable manifest.') from None
    if version not in _READABLE:
      raise ValueError(
          f'{directory} has corpus format {version!r}; this realm_jax reads '
          f'the formats {_READABLE}. Prepare the corpus again.'
      )
    for name, file in manifest['files'].items():
      if not (directory / name).is_file():
        raise FileNotFoundError(
            f'The corpus {directory} lacks the file {name}.'
        )
      size = (directory / name).stat().st_size
      if size != file['bytes']:
        raise ValueError(
            f'The corpus {directory} is damaged: {name} has {size} bytes, its '
            f'manifest says {file["bytes"]}.'
        )
    return cls(directory, manifest)

  def verify(self) -> None:
    """Reads all files; raises ValueError if a checksum is wrong."""
    for name, file in self.manifest['files'].items():
      found = files.sha256(self.directory / name)
      if found != file['sha256']:
        raise ValueError(
            f'The corpus {self.directory} is damaged: {name} has the SHA-256 '
            f'{found}, its manifest says {file["sha256"]}.'
        )

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the tables."""
    made_with = self.manifest['tokenizer']
    found = tokenizer_lib.Tokenizer.from_saved(
        self.directory, made_with['lowercase']
    )
    if found.digest != made_with['digest']:
      raise ValueError(
          f'The tokenizer of {self.directory} is not what the corpus was made'
          f' with: digest {found.digest}, manifest {made_with["digest"]}.'
      )
    return found

  def passage_text(self, row: int) -> dict[str, str]:
    """Returns {id, title, text} of a passage.

    Raises:
      IndexError: the row does not exist.
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
    """Returns the other passages that contain each sentence of a split.

    None: unknown, as in format version 1. See the module `trivial`.
    """
    if self.manifest['version'] < 2:
      return None
    tables = self.directory / 'tables'
    return Ranges(
        _load(tables, f'{split}.trivial_offsets'),
        _load(tables, f'{split}.trivial'),
    )

  @property
  def num_live(self) -> int:
    """Number of passages that a search can return."""
    return len(self.passages) - len(self.removed)

  @functools.cached_property
  def live_rows(self) -> np.ndarray:
    """Rows of the passages that a search can return, int64, ascending."""
    return np.setdiff1d(np.arange(len(self.passages)), self.removed)

  def passage_rows_by_id(self, ids: Iterable[str]) -> np.ndarray:
    """Returns the rows of passages by id, int64; -1 for an unknown id.

    The id of a record of several passages gives the first of them.
    """
    found = self.record_rows(list(ids))
    return np.array([rows[0] if len(rows) else -1 for rows in found], np.int64)

  def record_rows(self, ids: Sequence[str]) -> list[np.ndarray]:
    """Returns the rows of all passages of each id, int64; empty if unknown.

    An id is that of a passage, or of a record that is longer than one passage.
    Its passages are adjacent and have the ids ID#0, ID#1 and so on. All ids are
    looked up in one reading of the hashes, 8 bytes for each passage.
    """
    names = [name for one in ids for name in (one, f'{one}#0')]
    hashes = _load(self.directory / 'tables', 'passage_ids')
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
    # Imported late: the import takes seconds, and training needs no texts.
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(self.directory / 'passages'))
    return builder.as_data_source(split='train')


def open_tables(
    tables: pathlib.Path,
    splits: Mapping[str, Mapping[str, Any]],
    open_tokens: Callable[[pathlib.Path], Tokens],
    num_specials: int = NUM_SPECIALS,
) -> tuple[PassageTable, dict[str, SentenceTable]]:
  """Opens the tables of passages, and of the sentences of each split.

  `splits` are those of the manifest; `tokens` names their file of wordpieces.
  """
  open_once = functools.cache(open_tokens)
  load = functools.partial(_load, tables)
  passages = PassageTable(
      open_once(tables / 'passage_tokens.bin'),
      load('passage_offsets'),
      load('title_lengths'),
      load('articles'),
      num_specials,
  )
  sentences = {
      name: SentenceTable(
          open_once(tables / split['tokens']),
          load(f'{name}.starts'),
          load(f'{name}.lengths'),
          load(f'{name}.passages'),
          load(f'{name}.span_offsets'),
          load(f'{name}.spans'),
      )
      for name, split in splits.items()
  }
  return passages, sentences


def _load(tables: pathlib.Path, name: str) -> np.ndarray:
  path = tables / f'{name}.npy'
  # A plain array over the mapped file: elements of a memmap are slow.
  return np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))


def find_hashes(
    hashes: np.ndarray, wanted: Sequence[int]
) -> dict[int, list[int]]:
  """Returns the rows of each wanted hash; far cheaper than sorting them all."""
  targets = np.unique(np.array(wanted, np.uint64))
  found: dict[int, list[int]] = {}
  if not len(targets):
    return found
  for start in range(0, len(hashes), _HASH_BLOCK):
    block = hashes[start : start + _HASH_BLOCK]
    at = np.minimum(np.searchsorted(targets, block), len(targets) - 1)
    for row in np.flatnonzero(targets[at] == block):
      found.setdefault(int(block[row]), []).append(start + int(row))
  return found


def id_hash(name: str) -> int:
  """Returns the 64-bit hash of an id, as in `tables/passage_ids.npy`."""
  digest = hashlib.blake2b(name.encode('utf-8'), digest_size=8).digest()
  return int.from_bytes(digest, 'little')
