"""BM25 against its formula, its index on disk, and fusion of rankings."""

import math
import shutil
import sys
import types

import numpy as np
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay
from realm_jax.index import bm25

pytest.importorskip('bm25s')

_TEXTS = [
    'A cat sat on the mat near another cat',
    'Dogs chase the cat',
    '',
    'The weather of Ulm is mild, and the weather of Bonn is wet',
    'Dogs chase the cat',
    '? ! .',
]

_NAMASTE = '\u0928\u092e\u0938\u094d\u0924\u0947'  # With marks of vowels.


class _Corpus:
  """Passages in memory, which have the title `Notes` but for two."""

  removed = np.zeros(0, np.int64)

  def __init__(self, folder, texts=_TEXTS, fingerprint='f'):
    self.directory, self.fingerprint = folder, fingerprint
    self.passages = texts
    self.num_live = len(texts)

  def passage_text(self, row):
    text = self.passages[row]
    title = 'Notes' if any(c.isalpha() for c in text) else ''
    return {'id': str(row), 'title': title, 'text': text}


def _scores(documents, words):
  """Lucene's BM25, as in Kamphuis et al. 2020, over lists of words."""
  mean = sum(map(len, documents)) / len(documents)
  scores = np.zeros(len(documents))
  for word in words:
    holding = sum(word in document for document in documents)
    idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
    for i, document in enumerate(documents):
      count = document.count(word)
      length = 0.9 * (1 - 0.4 + 0.4 * len(document) / mean)
      scores[i] += idf * count / (count + length)
  return scores


def test_scores_are_those_of_the_formula(tmp_path):
  documents = [
      'notes cat sat mat near another cat'.split(),
      'notes dogs chase cat'.split(),
      [],
      'notes weather ulm mild weather bonn wet'.split(),
      'notes dogs chase cat'.split(),
      [],
  ]
  index = bm25.Bm25.open(_Corpus(tmp_path))
  queries = {
      'The CAT of Ulm': ['cat', 'ulm'],
      'wet wet cat': ['wet', 'wet', 'cat'],
      'is it the': [],
      'unheard of': [],
  }
  rows_BK, score_BK = index.search([*queries], 8)
  for rows, scores, words in zip(
      rows_BK, score_BK, queries.values(), strict=True
  ):
    expected = _scores(documents, words)
    best = [row for row in np.argsort(-expected, kind='stable')
            if expected[row] > 0]
    assert rows.tolist() == best + [-1] * (8 - len(best))
    np.testing.assert_allclose(scores[: len(best)], expected[best], rtol=1e-5)
    assert not scores[len(best) :].any()
  # The lower row wins a tie, also where not all are returned.
  assert index.search(['dogs'], 1)[0].tolist() == [[1]]
  assert (len(index), index.without_words) == (6, 2)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('It is THE Cat, x9 and a C', ['cat', 'x9']),
        ('caf\u00e9 cafe\u0301', ['caf\u00e9', 'caf\u00e9']),
        ('\uff21\uff22 na\u00efve_name', ['ab', 'na\u00efve_name']),
        (
            '\u6771\u4eac\u90fd is \u5e02',
            ['\u6771\u4eac', '\u4eac\u90fd', '\u5e02'],
        ),
        (_NAMASTE, [_NAMASTE]),
        ('', []),
    ],
)
def test_words(tmp_path, text, words):
  assert bm25.Bm25.open(_Corpus(tmp_path)).words(text) == words


def test_the_index_is_kept_with_the_corpus_and_mapped(
    tmp_path, monkeypatch, caplog
):
  caplog.set_level('INFO')
  built = bm25.Bm25.open(_Corpus(tmp_path))
  assert '2 of the 6 passages have no word' in caplog.text
  (folder,) = tmp_path.iterdir()
  assert folder.name in built.origin
  build = bm25.Bm25._build
  monkeypatch.setattr(bm25.Bm25, '_build', None)
  again = bm25.Bm25.open(_Corpus(tmp_path), most=1)
  assert isinstance(again._index.scores['data'], np.memmap)
  assert (len(again), again.about()) == (6, built.about())
  query = ['weather of the cat'], 3
  np.testing.assert_array_equal(again.search(*query), built.search(*query))

  # The same folder with other texts: the index is outdated.
  monkeypatch.setattr(bm25.Bm25, '_build', build)
  other = _Corpus(tmp_path, ['weather', 'cat'], 'g')
  assert len(bm25.Bm25.open(other)) == 2
  (new,) = tmp_path.iterdir()
  assert new != folder
  with pytest.raises(ValueError, match='6 passages and no index .* at most 5'):
    bm25.Bm25.open(_Corpus(tmp_path), most=5)

  # A file was cut short.
  (vocabulary,) = new.glob('vocab*')
  vocabulary.write_text(vocabulary.read_text()[:-2])
  found = bm25.Bm25.open(other)
  assert 'cannot be read and is built again' in caplog.text
  assert found.search(['cat'], 1)[0].tolist() == [[1]]
  assert bm25.Bm25.open(other).search(['cat'], 1)[0].tolist() == [[1]]


def test_a_folder_that_cannot_be_written_leaves_the_index_in_memory(
    tmp_path, monkeypatch, caplog
):
  def refuse(path, overwrite):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.setattr(bm25.files, 'atomic_folder', refuse)
  index = bm25.Bm25.open(_Corpus(tmp_path, _TEXTS[:2]))
  (record,) = caplog.records
  assert 'stays in memory: [Errno 13] Permission denied' in record.message
  assert index.search(['cat'], 2)[0].tolist() == [[0, 1]]
  assert 'in memory' in index.origin and not [*tmp_path.iterdir()]


def test_documents_added_and_removed_are_indexed_in_memory(tmp_path, world):
  shutil.copytree(world, tmp_path / 'corpus')
  base = corpus_lib.Corpus.open(tmp_path / 'corpus')
  size = len(base.passages)
  kept = bm25.Bm25.open(base)
  text = base.passage_text(5)['text']
  rows_BK, _ = kept.search([text], 3)
  assert rows_BK[0, 0] == 5
  files = sorted(base.directory.iterdir())
  changed = overlay.Overlay([base, base], np.array([5, size + 7]))
  index = bm25.Bm25.open(changed)
  assert len(index) == changed.num_live == 2 * size - 2
  rows_BK, _ = index.search([text, base.passage_text(7)['text']], 2 * size)
  assert rows_BK[:, 0].tolist() == [size + 5, 7]
  assert not np.isin(rows_BK, changed.removed).any()
  assert sorted(base.directory.iterdir()) == files


def test_a_corpus_without_words(tmp_path):
  index = bm25.Bm25.open(_Corpus(tmp_path, ['?', '', '!']))
  assert index.without_words == 3
  assert index.search(['a cat'], 2)[0].tolist() == [[-1, -1]]
  assert len(bm25.Bm25.open(_Corpus(tmp_path, ['?', '', '!']))) == 3


def test_the_extra_that_is_missing_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'bm25s', None)
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[bm25\]'"):
    bm25.Bm25.open(types.SimpleNamespace())


def test_reciprocal_rank_fusion_by_hand():
  first = np.array([[7, 3, 9], [1, 2, -1]])
  second = np.array([[3, 8, 7], [2, 1, -1]])
  rows_BK, score_BK = bm25.fuse(first, second, k=5)
  # 7 and 3 change places, 8 stands before 9, which comes third.
  assert rows_BK.tolist() == [[3, 7, 8, 9, -1], [1, 2, -1, -1, -1]]
  np.testing.assert_allclose(
      score_BK[0],
      [1 / 61 + 1 / 62, 1 / 61 + 1 / 63, 1 / 62, 1 / 63, 0],
  )
  # A tie: the one that the first ranking prefers.
  assert score_BK[1, 0] == pytest.approx(score_BK[1, 1])
  assert bm25.fuse(second, first, k=1)[0].tolist() == [[3], [2]]


def test_fusion_of_random_rankings():
  rng = np.random.default_rng(4)
  rankings = [
      np.stack([rng.permutation(30)[:12] for _ in range(5)]) for _ in range(3)
  ]
  rows_BK, score_BK = bm25.fuse(*rankings, k=40)
  for i in range(5):
    sums = {}
    for ranking in rankings:
      for rank, row in enumerate(ranking[i].tolist(), 1):
        sums[row] = sums.get(row, 0) + 1 / (60 + rank)
    assert {*rows_BK[i].tolist()} == {*sums, -1}
    np.testing.assert_allclose(
        score_BK[i, : len(sums)], sorted(sums.values(), reverse=True)
    )
    for row, score in zip(rows_BK[i], score_BK[i], strict=True):
      assert row < 0 or score == pytest.approx(sums[int(row)])
