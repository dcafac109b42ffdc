"""`inspect` on a workdir of an untrained model."""

import dataclasses
import math
import re

import numpy as np
import pytest
import retrieval_test

from realm_jax.evaluation import inspect
from realm_jax.trainer import stages

corpus, config = retrieval_test.corpus, retrieval_test.config
saved, workdir = retrieval_test.saved, retrieval_test.workdir
original = retrieval_test.original


_SENTENCE = 'Someone was born in [MASK] [MASK] and lived in [MASK].'


def test_inspect_shows_candidates_with_current_scores(
    workdir, config, corpus, saved
):
  retrieval_test.publish(workdir, config, corpus, saved[0], 20)  # Stale.
  found = inspect.inspect(workdir, _SENTENCE, k=6)
  assert (found.step, found.index_step) == (30, 20)
  assert len(found.documents) == 5
  rows = [document.row for document in found.documents]
  assert len(set(rows)) == 5 and min(rows) >= 0
  scores = [document.score for document in found.documents]
  assert scores == sorted(scores, reverse=True)
  shares = [d.probability for d in (*found.documents, found.null)]
  assert sum(shares) == pytest.approx(1, abs=1e-5)
  assert shares[1] / shares[0] == pytest.approx(
      math.exp(scores[1] - scores[0]), rel=1e-4
  )
  for document in found.documents:
    assert dataclasses.asdict(document)['text'] == (
        corpus.passage_text(document.row)['text']
    )
    assert len(document.prediction.fillings) == 2  # Two blanks, three masks.
    assert 0 < document.prediction.probability <= 1
  # The stale index chose them, the checkpoint scored them.
  embedder = stages.components_of(config)['embedder']
  ids = np.zeros((1, config.lengths.query), np.int32)
  pieces = corpus.tokenizer.encode(_SENTENCE, masks=True)
  special = corpus.tokenizer
  ids[0, : len(pieces) + 2] = [special.cls_id, *pieces, special.sep_id]

  def query(params):
    return retrieval_test.apply(embedder, params, 'embed_query', ids)[0]

  embed = retrieval_test.all_embeddings
  stale = embed(config, saved[0], corpus) @ query(saved[30])
  assert set(rows) == set(np.argsort(-stale)[:5].tolist())
  fresh = embed(config, saved[30], corpus) @ query(saved[30])
  np.testing.assert_allclose(scores, fresh[rows], rtol=1e-3, atol=1e-3)


def test_inspect_renders_what_it_found(workdir, config, corpus, saved):
  retrieval_test.publish(workdir, config, corpus, saved[30], 30)
  found = inspect.inspect(workdir, _SENTENCE)
  hostile = dataclasses.replace(
      found.documents[0],
      title='<b>Bold</b> & "co" [red]',
      text='<script>alert(1)</script> [/nope] \u00e9',
  )
  found = dataclasses.replace(
      found, documents=(hostile, *found.documents[1:])
  )
  text = inspect.as_text(found)
  shown = ' '.join(re.sub('[│┃]', ' ', text).split())
  assert '<b>Bold</b> & "co" [red]' in shown
  assert '<script>alert(1)</script> [/nope] \u00e9' in shown
  assert 'null document' in shown
  assert f'{found.null.probability:.3f}' in shown
  assert found.marginal.fillings[0] in shown
  for document in found.documents[1:]:
    assert document.title in shown
  assert _SENTENCE in text
  assert max(map(len, text.splitlines())) <= 100


def test_inspect_refuses_what_it_cannot_show(
    workdir, tmp_path, config, corpus, saved
):
  with pytest.raises(FileNotFoundError, match='no index yet'):
    inspect.inspect(workdir, _SENTENCE)
  retrieval_test.publish(workdir, config, corpus, saved[30], 30)
  with pytest.raises(ValueError, match=r'has no \[MASK\]'):
    inspect.inspect(workdir, 'Nothing to fill in.')
  with pytest.raises(ValueError, match='at most 24 fit'):
    inspect.inspect(workdir, 'long ' * 40 + '[MASK]')
  with pytest.raises(ValueError, match='k=1'):
    inspect.inspect(workdir, _SENTENCE, k=1)
  with pytest.raises(ValueError, match='k=9999 documents'):
    inspect.inspect(workdir, _SENTENCE, k=10_000)
  ict = retrieval_test._config(corpus, 'ict')
  retriever = retrieval_test._make_workdir(
      tmp_path / 'ict', corpus, ict, {0: retrieval_test._params(ict)}
  )
  with pytest.raises(ValueError, match="no reader: its objective is 'ict'"):
    inspect.inspect(retriever, _SENTENCE)
