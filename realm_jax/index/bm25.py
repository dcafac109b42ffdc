"""BM25 over the passages of a corpus, to compare a retriever with.

Through bm25s (Lù 2024, arXiv:2407.03618): the variant of Lucene, with the
parameters of Pyserini's baselines (k1 = 0.9, b = 0.4). `Bm25` searches, `fuse`
joins rankings into a hybrid.
"""

import array
import hashlib
import json
import logging
import pathlib
import threading
import time
from typing import Any
import unicodedata

import numpy as np
import regex
import tqdm

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_K1, _B = 0.9, 0.4
INSTALL = (
    'BM25 needs a package that is not installed: '
    "pip install 'realm_jax[bm25]'"
)
DEPTH = 100  # Passages of each ranking that a hybrid search joins.
_RANK = 60  # Constant of Cormack et al. 2009.
_FOLDER = 'bm25-'  # In the folder of a corpus; a digest follows.
_DIGITS = 16  # Hexadecimal digits of the digest in the name.
_ABOUT = 'about.json'
# An index depends on these and on the texts; a change builds it again.
_SETTINGS = {
    'format': 1,
    'method': 'lucene',
    'k1': _K1,
    'b': _B,
    'words': 'NFKC, lower case, two characters, English stop words; bigrams of'
    ' scripts without spaces',
}
# Scripts that do not divide words; their bigrams are words, as in Lucene.
_UNSPACED = ''.join(
    rf'\p{{{script}}}'
    for script in 'Han Hiragana Katakana Thai Lao Khmer Myanmar'.split()
)
_RUN = regex.compile(
    rf'[[\p{{L}}\p{{M}}\p{{N}}_]--[{_UNSPACED}]]{{2,}}|([{_UNSPACED}]+)',
    regex.V1,
)


class Bm25:
  """An index of the live passages, title and text.

  A word is a run of two or more letters and digits, in lower case, without
  Lucene's stop words of English and without stemming. A run of a script without
  spaces gives its bigrams.

  without_words: number of passages without a word, which are never found.
  origin: where the index comes from, for a message.
  """

  def __init__(
      self, index: Any, rows_N: np.ndarray, without_words: int, origin: str
  ):
    """Wraps an index of bm25s of these rows; `open` makes one."""
    self._index, self._rows_N = index, rows_N
    self.without_words, self.origin = without_words, origin
    self._stop_words = frozenset(_library().stopwords.STOPWORDS_EN)

  @classmethod
  def open(cls, corpus: corpus_lib.Corpus, most: int | None = None) -> 'Bm25':
    """Opens the index that is kept with a corpus, or builds it.

    It is kept in the folder of the corpus, as bm25-DIGEST of the fingerprint
    and the settings, and mapped to memory. Documents that were added or removed
    are indexed in memory, as is a corpus whose folder cannot be written.

    Args:
      corpus: the passages.
      most: maximum number of passages to build an index of; None: any.

    Raises:
      ImportError: bm25s is not installed; names the command to install it.
      ValueError: there is no index yet, and the corpus is too large.
    """
    _library()
    about = {**_SETTINGS, 'fingerprint': corpus.fingerprint}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    folder = corpus.directory / f'{_FOLDER}{digest.hexdigest()[:_DIGITS]}'
    changed = isinstance(corpus, overlay_lib.Overlay)
    if changed:
      log.info('Documents were added or removed: BM25 is indexed in memory.')
    elif found := cls._read(folder, about):
      return found
    if most is not None and corpus.num_live > most:
      raise ValueError(
          f'The corpus has {corpus.num_live:,} passages and no index of BM25;'
          f' here one is built of at most {most:,}. `realm-jax evaluate --bm25`'
          ' builds one and keeps it with a corpus without added documents.'
      )
    built, seconds = cls._build(corpus)
    if not changed and built._keep(folder, about, seconds):
      return cls._read(folder, about) or built
    return built

  @classmethod
  def _build(cls, corpus: corpus_lib.Corpus) -> tuple['Bm25', float]:
    start = time.perf_counter()
    rows_N = np.setdiff1d(np.arange(len(corpus.passages)), corpus.removed)
    index = _library().BM25(k1=_K1, b=_B, method=_SETTINGS['method'])
    built = cls(index, rows_N, 0, '')
    vocabulary: dict[str, int] = {}
    documents = []
    for row in tqdm.tqdm(
        rows_N.tolist(), 'indexing for BM25', unit='passage', disable=None
    ):
      passage = corpus.passage_text(row)
      words = built.words(f'{passage["title"]} {passage["text"]}')
      numbers = [vocabulary.setdefault(w, len(vocabulary)) for w in words]
      documents.append(array.array('i', numbers))
    index.index(
        (documents, vocabulary), create_empty_token=False, show_progress=False
    )
    built.without_words = sum(not words for words in documents)
    seconds = time.perf_counter() - start
    built.origin = f'built in memory in {seconds:.1f} s'
    if built.without_words:
      log.warning(
          '%d of the %d passages have no word of two letters or digits; BM25'
          ' never finds them.', built.without_words, len(built),
      )
    return built, seconds

  def _keep(
      self, folder: pathlib.Path, about: dict[str, Any], seconds: float
  ) -> bool:
    """Writes the index in the place of an outdated one, if it can be."""
    counts = {
        'passages': len(self),
        'without_words': self.without_words,
        'seconds': round(seconds, 1),
    }
    try:
      with files.atomic_folder(folder, overwrite=True) as directory:
        self._index.save(directory, show_progress=False)
        files.write_json(directory / _ABOUT, {**about, **counts})
    except OSError as error:
      log.warning('The index of BM25 stays in memory: %s', error)
      return False
    for other in folder.parent.glob(f'{_FOLDER}{"[0-9a-f]" * _DIGITS}'):
      if other != folder:
        files.remove(other)
    log.info('BM25: %d passages in %.1f s: %s', len(self), seconds, folder)
    return True

  @classmethod
  def _read(
      cls, folder: pathlib.Path, about: dict[str, Any]
  ) -> 'Bm25 | None':
    """Maps a kept index; None if there is none or it is damaged."""
    if not folder.is_dir():
      return None
    try:
      found = files.read_json(folder / _ABOUT)
      if found != {**found, **about}:
        raise ValueError(f'{folder / _ABOUT} is of another corpus')
      index = _library().BM25.load(folder, mmap=True, show_progress=False)
      return cls(
          index,
          np.arange(found['passages']),
          found['without_words'],
          f'built in {found["seconds"]:.1f} s and kept as {folder.name}',
      )
    except (OSError, ValueError, KeyError, TypeError) as error:
      log.warning('%s cannot be read and is built again: %s', folder, error)
      return None

  def __len__(self) -> int:
    return len(self._rows_N)

  def about(self) -> dict[str, Any]:
    """Returns what a report says of the index."""
    return {
        'k1': _K1,
        'b': _B,
        'passages': len(self),
        'without_words': self.without_words,
    }

  def words(self, text: str) -> list[str]:
    """Returns the words of a text, in order, with repetitions."""
    found = []
    normal = unicodedata.normalize('NFKC', text).lower()
    for match in _RUN.finditer(normal):
      run = match[0]
      if match[1]:
        found += [run[i : i + 2] for i in range(max(len(run) - 1, 1))]
      elif run not in self._stop_words:
        found.append(run)
    return found

  def search(
      self, texts: list[str], k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k passages of the highest score for each text.

    Returns:
      int64 [B, k]: rows, best first, and in order where scores are equal; and
      float32 [B, k]: scores. They are -1 and 0 where fewer than k passages have
      a word of the text.
    """
    rows_BK = np.full((len(texts), k), -1, np.int64)
    score_BK = np.zeros((len(texts), k), np.float32)
    for i, text in enumerate(texts):
      known = self._index.get_tokens_ids(self.words(text))
      if not known:
        continue
      score_N = self._index.get_scores_from_ids(known)
      found = np.flatnonzero(score_N)
      if len(found) > k:  # Sorting all of them would take longer.
        least = np.partition(score_N[found], -k)[-k]
        found = found[score_N[found] >= least]
      found = found[np.argsort(-score_N[found], kind='stable')][:k]
      rows_BK[i, : len(found)] = self._rows_N[found]
      score_BK[i, : len(found)] = score_N[found]
    return rows_BK, score_BK


class Cache:
  """The index of the documents that are served, opened at the first search."""

  def __init__(self, most: int):
    """Builds an index of at most `most` passages."""
    self._most, self._lock = most, threading.Lock()
    self._opened: tuple[corpus_lib.Corpus, Bm25] | None = None

  def get(self, corpus: corpus_lib.Corpus) -> Bm25:
    """Returns the index of a corpus; raises as `Bm25.open`."""
    with self._lock:  # A second search waits for the first one's index.
      if self._opened is None or self._opened[0] is not corpus:
        self._opened = None  # Not both in memory.
        self._opened = corpus, Bm25.open(corpus, self._most)
      return self._opened[1]


def fuse(
    *rankings: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Joins rankings by reciprocal rank fusion (Cormack et al. 2009).

  The score of a document is the sum of 1 / (60 + rank) over the rankings that
  have it; ranks count from 1.

  Args:
    *rankings: int64 [B, K] each, best first, for the same queries; -1: none.
    k: number of results.

  Returns:
    int64 [B, k] and float64 [B, k], best first, with -1 and 0 where there are
    fewer than k documents. Documents of equal scores are in the order of the
    first ranking that has one of them.
  """
  joined = np.concatenate(rankings, axis=1)
  weight = np.concatenate([
      1 / (_RANK + 1 + np.arange(ranking.shape[1])) for ranking in rankings
  ])
  fused_BK = np.full((len(joined), k), -1, np.int64)
  score_BK = np.zeros((len(joined), k))
  for i, found in enumerate(joined):
    there = found >= 0
    documents, first, number = np.unique(
        found[there], return_index=True, return_inverse=True
    )
    scores = np.bincount(number, weight[there], len(documents))
    # Sums of the same terms in another order may differ in the last bit.
    best = np.lexsort((first, -scores.round(12)))[:k]
    fused_BK[i, : len(best)] = documents[best]
    score_BK[i, : len(best)] = scores[best]
  return fused_BK, score_BK


def _library() -> Any:
  try:
    import bm25s
  except ImportError as error:
    raise ImportError(INSTALL) from error
  # It logs each call at the level DEBUG, which it sets itself.
  logging.getLogger('bm25s').setLevel(logging.WARNING)
  return bm25s
