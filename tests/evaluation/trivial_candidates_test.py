"""`evaluate` never reads a passage that gives the answer away."""

import json

import numpy as np
import retrieval_test

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import evaluate
from realm_jax.trainer.stages import realm


def test_trivial_candidates_are_excluded_whatever_training_allowed(
    tmp_path, monkeypatch
):
  """Passages of which validation sentences are sentences themselves."""
  from realm_jax.prepare import prepare

  places = ('Paris', 'London', 'Berlin', 'Vienna', 'Lisbon')
  with (tmp_path / 'texts.jsonl').open('w') as file:
    for i in range(30):
      text = ' '.join(
          f'The number {i} sent {10 * i + j} letters to {place}.'
          for j, place in enumerate(places)
      )
      file.write(json.dumps({'id': f'a{i}', 'text': text}) + '\n')
  prepare.prepare(
      [str(tmp_path / 'texts.jsonl')],
      str(tmp_path / 'corpus'),
      vocab_size=200,
      validation_fraction=0.5,
      workers=1,
      progress=False,
  )
  corpus = corpus_lib.Corpus.open(tmp_path / 'corpus')
  rows, seen = [], []
  batches, with_candidates = realm.evaluation_batches, realm.with_candidates

  def noted(*arguments):
    for batch in batches(*arguments):
      rows.append(batch.row_B)
      yield batch

  def recorded(queries, retrieved_BJ, *others):
    seen.append((rows[-1], retrieved_BJ[: len(rows[-1])]))
    return with_candidates(queries, retrieved_BJ, *others)

  monkeypatch.setattr(realm, 'evaluation_batches', noted)
  monkeypatch.setattr(realm, 'with_candidates', recorded)
  masked = {}
  for trivial in ('none', 'passage'):
    config = retrieval_test._config(corpus)
    config.trivial = trivial
    workdir = retrieval_test._make_workdir(
        tmp_path / trivial, corpus, config, {0: retrieval_test._params(config)}
    )
    masked[trivial] = evaluate.evaluate(workdir)[0]['masked']
  passages = corpus.sentences['validation'].passages
  assert len(seen) > 2
  for rows_B, retrieved_BJ in seen:
    own_B = passages[rows_B]
    assert (own_B >= 0).all()
    assert not (retrieved_BJ == own_B[:, None]).any()
  # So that rows with and without can be compared; and it says so.
  assert masked['none'].pop('trivial_in_training') == 'none'
  assert masked['passage'].pop('trivial_in_training') == 'passage'
  assert masked['none'] == masked['passage']
  assert masked['none']['trivial'] == 'passage'
  # Sentences of one article are one cluster.
  assert masked['none']['sentences'] > masked['none']['clusters']
  assert masked['none']['clusters'] == len(
      np.unique(corpus.passages.articles[passages])
  )
