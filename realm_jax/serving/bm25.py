"""BM25 over the passages of a corpus, to compare a retriever with.

Through bm25s (Lù 2024, arXiv:2407.03618): the variant of Lucene, with the
parameters of Pyserini's baselines (k1 = 0.9, b = 0.4).
"""

import threading
import time

import numpy as np

from realm_jax.corpus import corpus as corpus_lib

_K1, _B = 0.9, 0.4
_MAX_PASSAGES = 1_000_000  # Of an index that is built in memory.
INSTALL = (
    'BM25 needs a package that is not installed: '
    "pip install 'realm_jax[bm25]'"
)


class Bm25:
  """An index of the live passages, title and text, built in memory."""

  def __init__(self, corpus: corpus_lib.Corpus):
    """Reads and indexes all passages.

    Raises:
      ImportError: bm25s is not installed; names the command to install it.
      ValueError: the corpus is too large.
    """
    try:
      import bm25s
    except ImportError as error:
      raise ImportError(INSTALL) from error
    if corpus.num_live > _MAX_PASSAGES:
      raise ValueError(
          f'The corpus has {corpus.num_live:,} passages; an index of BM25 is'
          f' built in memory for at most {_MAX_PASSAGES:,}.'
      )
    start = time.perf_counter()
    every = np.arange(len(corpus.passages))
    self._rows = np.setdiff1d(every, corpus.removed)
    self._tokenize = bm25s.tokenize
    records = (corpus.passage_text(row) for row in self._rows.tolist())
    texts = [f'{record["title"]} {record["text"]}' for record in records]
    self._index = bm25s.BM25(k1=_K1, b=_B, method='lucene')
    self._index.index(
        self._tokenize(texts, stopwords=None, show_progress=False),
        show_progress=False,
    )
    self.seconds = time.perf_counter() - start

  def __len__(self) -> int:
    return len(self._rows)

  def search(self, text: str, k: int) -> tuple[list[int], list[float]]:
    """Returns rows and scores, best first: those with a word of the text."""
    tokens = self._tokenize(
        [text], stopwords=None, show_progress=False, return_ids=False
    )
    known = [word for word in tokens[0] if word in self._index.vocab_dict]
    if not known:
      return [], []
    score_N = self._index.get_scores(known)
    best = np.argsort(-score_N, kind='stable')[:k]
    best = best[score_N[best] > 0]
    return self._rows[best].tolist(), score_N[best].tolist()


class Bm25Cache:
  """The index of the documents that are served, built at the first search."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._made: tuple[corpus_lib.Corpus, Bm25] | None = None

  def get(self, corpus: corpus_lib.Corpus) -> Bm25:
    """Returns the index of a corpus; raises as `Bm25`."""
    with self._lock:  # A second search waits for the first one's index.
      if self._made is None or self._made[0] is not corpus:
        self._made = None  # Not both in memory.
        self._made = corpus, Bm25(corpus)
      return self._made[1]
