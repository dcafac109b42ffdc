"""Gates: figures against brute force, warnings, and no effect on training."""

import json
import types

import helpers
import jax
import numpy as np
import pytest
import training_test

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import search as search_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer import diagnosis
from realm_jax.trainer import gates as gates_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import loop
from realm_jax.trainer.stages import realm


@pytest.fixture(scope='module')
def lives(tmp_path_factory):
  return helpers.lives(tmp_path_factory.mktemp('lives'))


def _job(corpus, tmp_path, objective='realm', **values):
  config = training_test.make_config(corpus.directory, objective, **values)
  return job_lib.open_job(config, tmp_path / 'job')


def _params(job):
  return {name: c.init(1) for name, c in job.components.items()}


def _text(corpus, row):
  return corpus.passages.title_and_body(row)[1].tolist()


def _holds(body, answer):
  size = len(answer)
  return any(
      body[i : i + size] == answer for i in range(len(body) - size + 1)
  )


def _answers(queries):
  return [
      ids[used].tolist()
      for ids, used in zip(queries.targets_BM, queries.mask_BM, strict=True)
  ]


class _Refresher:
  """An index of random embeddings, or of given results."""

  def __init__(self, corpus, width, results=None):
    rng = np.random.default_rng(0)
    shape = (len(corpus.passages), width)
    self.embeddings = rng.normal(size=shape).astype(np.float32)
    self.search = search_lib.ExactSearch(self.embeddings)
    if results is not None:
      self.search = types.SimpleNamespace(
          search=lambda query, k, exclude=None: results(k, exclude)
      )


@pytest.mark.parametrize('holding', [True, False])
def test_the_reader_is_measured_on_passages_of_the_article(
    lives, tmp_path, holding
):
  job = _job(lives, tmp_path)
  gates, params = gates_lib.Gates(job), _params(job)
  queries, answers = gates._at_home, _answers(gates._at_home)
  # One sentence in four has its answer nowhere else.
  assert len(gates._row_B) == 32 and len(gates._pairs) == 24
  pairs = gates._pairs if holding else gates._distractors
  assert len(pairs) >= 24
  right, utility = [], []
  for i, passage in pairs:
    assert passage != gates._own_B[i]
    own = lives.passages.articles[gates._own_B[i]]
    assert lives.passages.articles[passage] == own
    assert _holds(_text(lives, passage), answers[i]) is holding
    ids_1KT, types_1KT = inputs.assemble_joint(
        lives.passages, np.array([[inputs.NULL_DOCUMENT, passage]]),
        queries.query_ids_BQ[i : i + 1], queries.query_lengths_B[i : i + 1],
        job.config.lengths.joint, lives.tokenizer,
    )
    logits_KMV = np.asarray(
        job.components['reader'].module(params['reader']).mlm_logits(
            ids_1KT[0], types_1KT[0], queries.positions_BM[[i, i]]
        )
    )
    logp_KMV = np.asarray(jax.nn.log_softmax(logits_KMV))
    places = np.arange(len(answers[i]))
    null, shown = logp_KMV[:, places, answers[i]].sum(axis=1)
    utility.append(shown - null)
    best = logp_KMV[1, places].argmax(axis=-1).tolist()
    right.append(best == answers[i])
  found = gates.measure(params, 7)
  assert found['gates/step'] == 7
  assert found['gates/findable'] == 0.75
  if holding:
    assert found['gates/reader_accuracy'] == pytest.approx(np.mean(right))
  name = 'reader_utility' if holding else 'distractor_utility'
  np.testing.assert_allclose(
      found[f'gates/{name}'], np.mean(utility), atol=1e-4
  )


def test_retrieval_is_measured_on_the_index_in_use(
    lives, tmp_path, monkeypatch
):
  monkeypatch.setattr(gates_lib, '_DEPTH', 5)
  job = _job(lives, tmp_path)
  gates, params = gates_lib.Gates(job), _params(job)
  refresher = _Refresher(lives, job.config.model.embedding_width)
  found = gates.measure(params, 0, refresher)
  embedder = job.components['embedder'].module(params['embedder'])
  query_emb_BE = np.asarray(embedder.embed_query(gates._at_home.query_ids_BQ))
  null_E = np.asarray(
      embedder.embed_document(
          *(np.array([part]) for part in job.stage.template.null)
      )
  )[0]
  recall, in_candidates, null_share = [], [], []
  for i, answer in enumerate(_answers(gates._at_home)):
    score_N = refresher.embeddings @ query_emb_BE[i]
    best = np.argsort(-score_N)
    recall.append(gates._own_B[i] in best[:5])
    allowed = [row for row in best if row != gates._own_B[i]][:2]
    in_candidates.append(any(_holds(_text(lives, r), answer) for r in allowed))
    null = np.exp(query_emb_BE[i] @ null_E)
    null_share.append(null / (null + np.exp(score_N[allowed]).sum()))
  assert found['gates/recall_at_20'] == pytest.approx(np.mean(recall))
  assert found['gates/answer_in_candidates'] == pytest.approx(
      np.mean(in_candidates)
  )
  np.testing.assert_allclose(
      found['gates/null_share'], np.mean(null_share), rtol=1e-3
  )
  assert found['gates/trivial_share'] == 0


def test_copies_of_the_sentence_are_counted(lives, tmp_path):
  job = _job(lives, tmp_path, trivial='none')
  gates = gates_lib.Gates(job)

  def own_for_half(k, exclude):
    rows_BK = np.repeat(gates._own_B[:, None], k, axis=1)
    rows_BK[1::2] = (rows_BK[1::2] + 4) % len(lives.passages)
    return rows_BK

  width = job.config.model.embedding_width
  found = gates.measure(
      _params(job), 0, _Refresher(lives, width, own_for_half)
  )
  assert found['gates/trivial_share'] == 0.5
  assert found['gates/recall_at_20'] == 0.5


def test_sentences_of_no_passage_are_found_by_retrieval(world, tmp_path):
  """With a corpus X of its own, findable says nothing about it."""
  corpus = corpus_lib.Corpus.open(world)
  job = _job(corpus, tmp_path)
  gates = gates_lib.Gates(job)
  width = job.config.model.embedding_width
  found = gates.measure(_params(job), 0, _Refresher(corpus, width))
  assert 'gates/findable' not in found
  assert 0 < found['gates/answer_in_20'] <= 1
  # No passage of an article repeats an answer: their own passages show it.
  assert {passage for _, passage in gates._pairs} <= set(gates._own_B.tolist())
  assert len(gates._pairs) > 8


def test_a_missed_gate_is_warned_of_once(lives, tmp_path, caplog):
  job = _job(lives, tmp_path)
  gates, params = gates_lib.Gates(job), _params(job)
  for step in (0, 100):
    gates.measure(params, step)
  warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert len(warned) == 2
  assert warned[0].startswith('Step 0, cold reader: the share of masked spans')
  assert 'below config.gates.reader_accuracy=0.5' in warned[0]
  assert 'Train `mlm` for longer' in warned[0]


@pytest.mark.parametrize('resumed', [False, True])
def test_falling_recall_is_warned_of(lives, tmp_path, caplog, resumed):
  job = _job(lives, tmp_path)
  if resumed:
    job.workdir.mkdir(parents=True)
    (job.workdir / 'metrics.jsonl').write_text(
        '{"step": 10, "train/retrieval_utility": -0.5}\n'
        '{"step": 100, "gates/recall_at_20": 1.0}\n'
    )
  gates, params = gates_lib.Gates(job), _params(job)
  own_B = gates._own_B

  def measure(step, share):
    def results(k, exclude):
      del exclude
      rows = np.full((len(own_B), k), -1)
      known = int(share * len(own_B))
      rows[:known, 0] = own_B[:known]
      return rows

    width = job.config.model.embedding_width
    refresher = _Refresher(lives, width, results)
    return gates.measure(params, step, refresher)['gates/recall_at_20']

  first, low, _ = measure(200, 0.97), measure(300, 0.5), measure(400, 0.4)
  assert 0.9 < first < 1 and 0.4 < low <= 0.5
  warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  (text,) = [text for text in warned if 'falling recall' in text]
  assert text.startswith('Step 300, falling recall: the share of masked')
  before = '1' if resumed else f'{first:.3g}'
  assert f'fell from {before} to {low:.3g}. The retriever unlearns' in text
  assert ('below 0 (-0.5 nats in the first line), passages' in text) == resumed
  assert not any('cold retriever' in text for text in warned)


def test_one_cause_is_one_problem():
  config = config_lib.Config()
  good = {
      'reader_accuracy': 0.5, 'reader_utility': 1.0, 'recall_at_20': 0.3,
      'findable': 0.6, 'answer_in_20': 0.4, 'answer_in_candidates': 0.3,
      'null_share': 0.9, 'trivial_share': 0.05, 'step': 100,
  }
  assert diagnosis.problems(good, config) == {}

  def names(**values):
    return [*diagnosis.problems({**good, **values}, config)]

  assert names(reader_utility=0.9) == ['reader_utility']
  assert names(null_share=0.91) == ['null_share']
  assert names(findable=0.2, answer_in_candidates=0.1) == ['findable']
  assert names(recall_at_20=0.1, answer_in_20=0.1) == ['recall_at_20']
  assert names(answer_in_20=0.1, answer_in_candidates=0.1) == ['answer_in_20']
  config.gates.reader_utility = 0.5
  assert names(reader_utility=0.9) == []


@pytest.mark.parametrize(
    'values',
    [{'mlm__own_passage_rate': 0.0, 'mlm__null_rate': 1.0},
     {'mlm__views': {'null': 1.0}}, {'gates__interval': 0}],
)
def test_a_reader_without_passages_has_no_gates(lives, tmp_path, values):
  job = _job(lives, tmp_path, 'mlm', **values)
  assert gates_lib.Gates.of(job) is None


def test_gates_change_nothing_that_is_trained(lives, tmp_path, caplog):
  digests = {}
  for interval in (0, 2):
    config = training_test.make_config(
        lives.directory, 'mlm', steps=5, gates__interval=interval,
        mlm__views={'own': 0.25, 'answer': 0.4, 'article': 0.2, 'null': 0.15},
    )
    workdir = tmp_path / str(interval)
    digests[interval] = loop.train(config, workdir)['params_sha256']
  assert digests[0] == digests[2]
  lines = metrics_lib.read_metrics(tmp_path / '2')
  # Before the first step, every second step, and after the last one.
  assert [line.get('gates/step') for line in lines] == [0, 2, None, 4, 5]
  assert all(0 <= line['train/view_fallback'] <= 1 for line in lines)
  assert lines[-1]['gates/findable'] == 0.75
  assert 'gates/findable' not in json.dumps(
      metrics_lib.read_metrics(tmp_path / '0')
  )
  warned = [r.getMessage() for r in caplog.records if r.levelname == 'WARNING']
  assert [text[:19] for text in warned] == ['Step 5, cold reader'] * 2


def test_candidates_that_hold_the_answer_are_counted(lives, tmp_path):
  job = _job(lives, tmp_path)
  gates = gates_lib.Gates(job)
  rows_BJ = np.random.default_rng(0).integers(0, 32, (32, 2))
  batch = realm.with_candidates(
      gates._at_home, rows_BJ, lives, job.stage.template
  )
  found = job.stage.figures(batch)['answer_in_candidates']
  expected = [
      any(_holds(_text(lives, row), answer) for row in rows)
      for answer, rows in zip(_answers(gates._at_home), rows_BJ, strict=True)
  ]
  assert found.tolist() == expected
  assert 0 < sum(expected) < 32
  scattered = batch.positions_BM.copy()
  scattered[batch.mask_BM.sum(axis=1) == 2, 1] += 3
  moved = realm.Batch(**{**vars(batch), 'positions_BM': scattered})
  assert job.stage.figures(moved) == {}
