"""`realm_jax.Retriever` and `realm_jax.OpenQA` on imported checkpoints."""

import pathlib

import export_test
import numpy as np
import pytest

import realm_jax
from realm_jax import config as config_lib
from realm_jax.api import retriever as retriever_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import bm25
from realm_jax.interop import export
from realm_jax.interop import export_huggingface
from realm_jax.interop import weights

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
workdirs = export_test.workdirs


@pytest.fixture(scope='module')
def retriever(workdirs):
  return retriever_lib.Retriever.load(workdirs / 'open_qa')


def test_the_retriever_of_an_open_qa_checkpoint(workdirs, retriever):
  with np.load(_FIXTURES / 'expected.npz') as file:
    query_emb = file['open_qa/query_emb']
    relevance = file['open_qa/relevance']
  question = 'who is the cat of'
  found = retriever.embed_queries([question])
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, query_emb, atol=2e-5 * query_emb.max())
  hits = retriever.search([question, 'red'], 3)
  assert hits.rows.shape == hits.scores.shape == (2, 3)
  assert hits.scores.dtype == np.float32
  np.testing.assert_allclose(hits.scores[0], relevance, rtol=2e-5)
  # The table that came with the checkpoint is what its embedder gives.
  blocks = [
      ('', retriever.passage(row)['text'] if row != 2 else '')
      for row in range(7)
  ]
  table = weights.open_folder(_FIXTURES / 'open_qa')['block_emb'].read()
  np.testing.assert_allclose(
      retriever.embed_passages(blocks), table, atol=2e-5 * np.abs(table).max()
  )


def test_a_hybrid_search_joins_the_rankings_of_both(workdirs, retriever):
  pytest.importorskip('bm25s')
  questions = ['who is the cat of', 'qqq']
  size = len(retriever.corpus.passages)
  assert size < bm25.DEPTH  # So all passages are joined.
  rows_BK = retriever.search(questions, size).rows
  by_words_BK, _ = bm25.Bm25.open(retriever.corpus).search(questions, size)
  hits = retriever.search(questions, 3, hybrid=True)
  assert hits.scores.dtype == np.float32 and hits.scores.shape == (2, 3)
  for i, rows in enumerate(hits.rows.tolist()):
    rankings = [x[i].tolist() for x in (rows_BK, by_words_BK)]
    scores = {
        row: sum(1 / (61 + r.index(row)) for r in rankings if row in r)
        for row in range(size)
    }
    best = sorted(scores.values(), reverse=True)[:3]
    np.testing.assert_allclose(hits.scores[i], best, rtol=1e-6)
    np.testing.assert_allclose([scores[row] for row in rows], best)
  # No word of it is known, so the retriever decides.
  assert hits.rows[1].tolist() == rows_BK[1, :3].tolist()
  other = retriever_lib.Retriever.load(_FIXTURES / 'open_qa')
  with pytest.raises(ValueError, match='without a corpus'):
    other.search(questions, 3, hybrid=True)


def test_an_open_qa_checkpoint_answers_at_once(workdirs, retriever):
  assert config_lib.read(workdirs / 'open_qa').objective == 'open_qa'
  model = realm_jax.OpenQA.load(workdirs / 'open_qa')
  question = 'who is the cat of'
  answer = model.answer(question, k=3)
  hits = retriever.search([question], 3)
  assert [p.row for p in answer.passages] == hits.rows[0].tolist()
  best = answer.passages[answer.best]
  assert answer.text and answer.text == best.text[best.start : best.limit]


def test_a_retriever_is_the_same_from_anywhere(workdirs, retriever, tmp_path):
  export.run(workdirs / 'open_qa', 'huggingface', tmp_path / 'out')
  question = ['who is the cat']
  for place in (_FIXTURES / 'open_qa', tmp_path / 'out'):
    other = retriever_lib.Retriever.load(place)
    # Not bit by bit: the workdir's queries are shorter, and padded less.
    np.testing.assert_allclose(
        other.embed_queries(question),
        retriever.embed_queries(question),
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        other.search(question, 3).rows, retriever.search(question, 3).rows
    )
    with pytest.raises(ValueError, match='without a corpus'):
      other.passage(0)


def test_the_retriever_embeds_as_training_does(workdirs):
  """Long, short and empty texts; bucketed and batched, in the given order."""
  tokenizer = tokenizer_lib.Tokenizer.from_source(str(workdirs / 'embedder'))
  found = retriever_lib.Retriever.load(
      workdirs / 'embedder', query_length=8, passage_length=12
  )
  texts = ['the cat', '', 'red ' * 30, 'who']
  ids = inputs.encode_queries(texts, 8, tokenizer)
  workdir = export_huggingface.Model.open(workdirs / 'embedder', None)
  component = workdir.trained.components['embedder']
  params = workdir.params['embedder']
  want = component.module(params).embed_query(ids)
  np.testing.assert_allclose(
      found.embed_queries(texts), want, rtol=1e-4, atol=1e-5
  )
  pairs = [('cat', 'red'), ('', ''), ('the ' * 30, 'x'), ('a', 'of ' * 30)]
  tokens, offsets, titles = [], [0], []
  for title, body in pairs:
    title, body = tokenizer.encode(title), tokenizer.encode(body)
    tokens += title + body
    titles.append(len(title))
    offsets.append(len(tokens))
  table = corpus_lib.PassageTable(
      np.array(tokens, np.uint16),
      np.array(offsets),
      np.array(titles, np.int32),
      np.arange(4, dtype=np.int32),
  )
  template = inputs.Template(tokenizer, 8, 12)
  ids, types = template.documents(table, np.arange(4))
  want = component.module(params).embed_document(ids, types)
  np.testing.assert_allclose(
      found.embed_passages(pairs), want, rtol=1e-4, atol=1e-5
  )
  assert found.embed_queries([]).shape == (0, 16)
  one_by_one = [found.embed_queries([text])[0] for text in texts]
  np.testing.assert_allclose(
      found.embed_queries(texts), one_by_one, rtol=1e-4, atol=1e-5
  )


def test_what_a_retriever_refuses(workdirs, retriever, tmp_path):
  load = retriever_lib.Retriever.load
  with pytest.raises(ValueError, match='list of strings'):
    retriever.embed_queries('one text')
  with pytest.raises(ValueError, match='pair'):
    retriever.embed_passages(['one text'])
  with pytest.raises(ValueError, match='only span_reader'):
    load(workdirs / 'reader')
  with pytest.raises(ValueError, match='has no retriever'):
    load(_FIXTURES / 'encoder')
  with pytest.raises(ValueError, match='BERT without a retriever'):
    load(_FIXTURES / 'bert')
  with pytest.raises(ValueError, match='without an index'):
    load(_FIXTURES / 'embedder').search(['a'], 1)
  with pytest.raises(FileNotFoundError, match='realm-jax index'):
    load(workdirs / 'embedder').search(['a'], 1)
  with pytest.raises(ValueError, match='passage_length=41'):
    load(workdirs / 'embedder', passage_length=41)
  with pytest.raises(FileNotFoundError, match='checkpoints'):
    load(workdirs / 'embedder', step=5)
  with pytest.raises(ValueError, match='no steps'):
    load(_FIXTURES / 'embedder', step=5)
