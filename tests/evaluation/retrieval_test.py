"""`evaluate` on workdirs of untrained models."""

import dataclasses
import itertools
import json
import re
import shutil

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.evaluation import runs
from realm_jax.index import generation
from realm_jax.inference import trained as trained_lib
from realm_jax.models import objectives
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.trainer import stages
from realm_jax.trainer.stages import realm


def _config(corpus, objective='realm'):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.batch_size, config.num_candidates = 16, 4
  config.model.preset, config.model.num_layers = 'tiny', 1
  config.model.width, config.model.num_heads = 32, 2
  config.model.embedding_width = 16
  config.model.max_positions = 96
  config.model.vocab_size = corpus.tokenizer.vocab_size
  config.lengths.query, config.lengths.document = 24, 48
  config.lengths.masks = 4
  return config_lib.resolve(config)


def _params(config, seed=0, sharpen=4.0):
  """Fresh parameters, with embeddings that tell passages apart."""
  params = {}
  for name, component in stages.components_of(config).items():
    params[name] = {
        key: np.asarray(value) * (sharpen if key.endswith('kernel') else 1)
        for key, value in component.init(seed).items()
    }
  return params


def _make_workdir(path, corpus, config, saved):
  """A workdir as `train` leaves it, with {step: params}."""
  files.write_json(path / 'config.json', config_lib.to_dict(config))
  checkpoints = checkpoint.Checkpoints(path, keep=0)
  for step, params in saved.items():
    checkpoints.save(
        step,
        jax.tree.map(jnp.asarray, params),
        {'step': jnp.int32(step)},
        {
            'config_digest': config_lib.digest(config),
            'corpus_fingerprint': corpus.fingerprint,
            'tokenizer_digest': corpus.tokenizer.digest,
            'index_generation': None,
        },
    )
  checkpoints.wait()
  checkpoints.close()
  return path


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


@pytest.fixture(scope='module')
def config(corpus):
  return _config(corpus)


@pytest.fixture(scope='module')
def saved(config):
  return {0: _params(config, 0), 30: _params(config, 1)}


@pytest.fixture(scope='module')
def questions(world):
  return question_sets.read(world / 'questions.jsonl')


@pytest.fixture(scope='module')
def original(tmp_path_factory, corpus, config, saved):
  path = tmp_path_factory.mktemp('original') / 'job'
  return _make_workdir(path, corpus, config, saved)


@pytest.fixture
def workdir(tmp_path, original):
  return shutil.copytree(original, tmp_path / 'job')


def apply(component, params, method, *inputs):
  """Calls a method of a component, compiled: eagerly it takes seconds."""
  run = jax.jit(
      lambda params, *inputs: getattr(component.module(params), method)(*inputs)
  )
  return np.asarray(run(params[component.name], *inputs))


def all_embeddings(config, params, corpus):
  """Without buckets, batches or the code under test."""
  component = stages.components_of(config)['embedder']
  rows = np.arange(len(corpus.passages))
  template = inputs.Template.of(config.model, config.lengths, corpus.tokenizer)
  ids, types = template.documents(corpus.passages, rows)
  return apply(component, params, 'embed_document', ids, types)


def publish(workdir, config, corpus, params, step, embeddings=None):
  if embeddings is None:
    embeddings = all_embeddings(config, params, corpus)
  lineage = generation.Lineage(
      step=step,
      params_digest=checkpoint.params_digest(params['embedder']),
      tokenizer_digest=corpus.tokenizer.digest,
      corpus_fingerprint=corpus.fingerprint,
      num_rows=len(corpus.passages),
      width=config.model.embedding_width,
  )
  helpers.publish(workdir / 'index', lineage, embeddings, config.mips)


def test_question_metrics_equal_those_by_hand(
    workdir, config, corpus, saved, questions
):
  (result,) = evaluate.evaluate(workdir, questions)
  assert result['step'] == 30
  assert result['passages'] == len(corpus.passages)
  assert result['index_generation'] is None
  params = saved[30]
  component = stages.components_of(config)['embedder']
  query_emb = apply(
      component,
      params,
      'embed_query',
      inputs.encode_queries(
          [q.question for q in questions],
          config.lengths.query,
          corpus.tokenizer,
      ),
  )
  scores = query_emb @ all_embeddings(config, params, corpus).T
  texts = [corpus.passage_text(i) for i in range(len(corpus.passages))]
  # The best and the worst rank: what is as good but for rounding, which is not
  # the same for batches of another shape, may come before or after.
  rounding = 3e-7 * np.abs(scores).max()
  ranks = {'gold': [], 'answer': []}
  for question, score_N in zip(questions, scores, strict=True):
    answer = re.compile(rf"\b({'|'.join(question.answers)})\b")
    for kind, right in (
        ('gold', [text['id'] == question.passage_id for text in texts]),
        ('answer', [bool(answer.search(text['text'])) for text in texts]),
    ):
      right_N = np.array(right)
      best, others = score_N[right_N].max(), score_N[~right_N]
      ranks[kind].append([
          1 + (others > best + rounding).sum(),
          1 + (others > best - rounding).sum(),
      ])
  ranks = {kind: np.array(values) for kind, values in ranks.items()}
  assert np.mean(ranks['gold'][:, 0] == ranks['gold'][:, 1]) > 0.98
  held_out = np.array([q.held_out for q in questions])
  assert 0 < held_out.sum() < len(questions)
  for name, members in (
      ('all', slice(None)), ('held_out', held_out), ('seen', ~held_out)
  ):
    group = result['questions'][name]
    for kind in ('gold', 'answer'):
      first, last = ranks[kind][members].T
      assert group['questions'] == len(first)

      def within(value, least, most):
        return least - 1e-7 <= value <= most + 1e-7

      for k in (1, 5, 20):
        assert within(
            group[kind][f'recall_at_{k}'],
            np.mean(last <= k),
            np.mean(first <= k),
        )
      depth = min(100, len(texts))
      assert within(
          group[kind]['mrr'],
          np.mean(np.where(last <= depth, 1 / last, 0)),
          np.mean(np.where(first <= depth, 1 / first, 0)),
      )


def test_masked_metrics_equal_those_by_hand(
    workdir, config, corpus, saved, monkeypatch
):
  monkeypatch.setattr(
      inspect_lib,
      '_random_rows',
      lambda live, exclude, k, rng: np.tile(live[:k], (len(exclude), 1)),
  )
  (result,) = evaluate.evaluate(workdir, [], limit=20)
  assert 'questions' not in result
  masked = result['masked']
  assert masked['sentences'] == 20
  params, parts = saved[30], stages.components_of(config)
  emb_NE = all_embeddings(config, params, corpus)
  template = inputs.Template.of(config.model, config.lengths, corpus.tokenizer)
  null_emb = apply(
      parts['embedder'],
      params,
      'embed_document',
      *template.documents(corpus.passages, np.array([-1])),
  )

  def read(batch, query_emb, rows):
    score_BK = np.concatenate(
        [
            query_emb @ null_emb.T,
            np.take_along_axis(query_emb @ emb_NE.T, rows, 1),
        ],
        1,
    )
    full = realm.with_candidates(batch.inputs, rows, corpus, template)
    b, k, t = full.joint_ids_BKT.shape
    logits = apply(
        parts['reader'],
        params,
        'mlm_logits',
        full.joint_ids_BKT.reshape(b * k, t),
        full.joint_types_BKT.reshape(b * k, t),
        np.repeat(batch.inputs.positions_BM, k, axis=0),
    )
    p_BKMV = np.asarray(jax.nn.softmax(logits)).reshape(b, k, *logits.shape[1:])
    return score_BK, np.asarray(jax.nn.softmax(score_BK)), p_BKMV

  sums: dict[str, float] = {}
  odd = dataclasses.replace(config, batch_size=5)  # Other batches.
  for batch in realm.evaluation_batches(corpus, odd, 'validation', 20):
    targets_BM, mask_BM = batch.inputs.targets_BM, batch.inputs.mask_BM
    query_emb = apply(
        parts['embedder'], params, 'embed_query', batch.inputs.query_ids_BQ
    )
    order = np.argsort(-(query_emb @ emb_NE.T), axis=1, kind='stable')
    score_BK, p_BK, p_BKMV = read(batch, query_emb, order[:, :3])
    null_BK = np.eye(1, 4).repeat(len(order), 0)
    _, *random = read(batch, query_emb, np.tile(np.arange(3), (len(order), 1)))

    def right(p_BK, p_BKMV, targets_BM=targets_BM, mask_BM=mask_BM):
      p_BMV = np.einsum('BK,BKMV->BMV', p_BK, p_BKMV)
      return ((p_BMV.argmax(-1) == targets_BM) | ~mask_BM).all(1).sum()

    p_BKM1 = np.take_along_axis(p_BKMV, targets_BM[:, None, :, None], 3)
    _, aux = objectives.marginal_mlm(score_BK, np.log(p_BKM1[..., 0]), mask_BM)
    logged = objectives.retrieval_metrics(aux, mask_BM.any(-1))
    for name, value in (
        ('accuracy_with_retrieval', right(p_BK, p_BKMV)),
        ('accuracy_with_random_passages', right(*random)),
        ('accuracy_without_retrieval', right(null_BK, p_BKMV)),
        ('retrieval_utility', len(order) * logged['retrieval_utility']),
        ('null_share', len(order) * logged['null_share']),
    ):
      sums[name] = sums.get(name, 0.0) + float(value)
  for name, value in sums.items():
    assert masked[name] == pytest.approx(value / 20, rel=1e-3, abs=1e-5), name


def test_intervals_resample_articles(workdir, corpus, questions):
  (result,) = evaluate.evaluate(workdir, questions, limit=60)
  # In the world an article is an entity, KIND-NUMBER, and passages of it are
  # KIND-NUMBER#0, ...; several questions are about each.
  entities = {q.passage_id.partition('#')[0] for q in questions[:60]}
  assert result['questions']['all']['clusters'] == len(entities) < 60
  records = runs.read_questions(workdir / 'evaluation' / '30.questions.jsonl')
  for one, other in itertools.combinations(records, 2):
    names = [r['passage_id'].partition('#')[0] for r in (one, other)]
    assert (one['cluster'] == other['cluster']) == (names[0] == names[1])
  # Its validation sentences are of no passage: each is a cluster.
  masked = result['masked']
  assert masked['clusters'] == masked['sentences'] > 20
  low, high = masked['accuracy_with_retrieval_interval']
  assert low <= masked['accuracy_with_retrieval'] <= high


def test_a_question_without_a_gold_passage_is_its_own_cluster(workdir, corpus):
  there = corpus.passage_text(0)['id']
  (result,) = evaluate.evaluate(
      workdir,
      [
          questions_lib.Question('Who?', ('x',), passage_id=name)
          for name in (there, there, 'not there', 'not there', None, None)
      ],
      limit=6,
  )
  assert result['questions']['all']['clusters'] == 4


def test_a_span_counts_only_if_every_wordpiece_is_right(
    tmp_path, config, corpus, saved
):
  """A reader that always says one word is right where that is the answer."""
  sentences = [
      tuple(batch.inputs.targets_BM[i][batch.inputs.mask_BM[i]].tolist())
      for batch in realm.evaluation_batches(corpus, config)
      for i in range(len(batch.inputs.mask_BM))
  ]
  alone = [s[0] for s in sentences if len(s) == 1]
  word = max(alone, key=alone.count)
  params = {name: dict(tree) for name, tree in saved[0].items()}
  bias = np.array(params['reader']['output_bias'])
  bias[word] = 1e4
  params['reader']['output_bias'] = bias
  workdir = _make_workdir(tmp_path / 'job', corpus, config, {0: params})
  masked = evaluate.evaluate(workdir, [])[0]['masked']
  expected = sum(set(s) == {word} for s in sentences) / len(sentences)
  assert masked['sentences'] == len(sentences)
  assert 0 < expected < 1
  assert masked['accuracy_with_retrieval'] == pytest.approx(expected)
  assert masked['accuracy_without_retrieval'] == pytest.approx(expected)


def test_a_fresh_generation_is_used_and_a_stale_one_is_not(
    workdir, config, corpus, saved, questions
):
  (before,) = evaluate.evaluate(workdir, questions, limit=40)
  publish(workdir, config, corpus, saved[30], 25)
  (same,) = evaluate.evaluate(workdir, questions, limit=40)
  assert (before['index_generation'], same['index_generation']) == (None, 25)
  assert same['questions'] == before['questions']
  old, new = evaluate.evaluate(workdir, questions, steps='30,0', limit=40)
  assert (old['step'], new) == (0, {**same, 'seconds': new['seconds']})
  assert old['index_generation'] is None  # That of step 25 has other params.
  # It is read, not just found: nonsense in it is seen.
  nonsense = np.random.default_rng(0).normal(
      size=(len(corpus.passages), config.model.embedding_width)
  )
  publish(workdir, config, corpus, saved[30], 25, nonsense.astype(np.float32))
  (other,) = evaluate.evaluate(workdir, questions, limit=40)
  assert other['questions'] != before['questions']


def test_all_steps_are_checkpoints_and_snapshots(workdir, saved, questions):
  checkpoint.save_snapshot(workdir, 10, saved[30]['embedder'])
  results = evaluate.evaluate(workdir, questions, 'all', limit=20)
  assert [r['step'] for r in results] == [0, 10, 30]
  assert ['masked' in r for r in results] == [True, False, True]
  assert results[1]['questions'] == results[2]['questions']
  assert results[0]['questions'] != results[2]['questions']
  for result in results:
    path = workdir / 'evaluation' / f'{result["step"]}.json'
    assert json.loads(path.read_text()) == result


def test_questions_come_with_the_corpus_or_from_a_file(
    workdir, world, tmp_path
):
  (own,) = evaluate.evaluate(workdir, limit=10)
  (given,) = evaluate.evaluate(workdir, world / 'questions.jsonl', limit=10)
  assert own['questions'] == given['questions']
  assert own['questions']['all']['questions'] == 10
  bare = tmp_path / 'bare.jsonl'
  bare.write_text('{"question": "Who?", "answers": ["Nobody at all"]}\n')
  (result,) = evaluate.evaluate(workdir, bare, limit=5)
  assert set(result['questions']) == {'all'}
  group = result['questions']['all']
  assert group['with_gold_passage'] == 0 and 'gold' not in group
  assert group['answer']['recall_at_100'] == 0.0


def test_unknown_gold_passages_count_as_misses_unless_they_are_skipped(
    workdir, corpus, caplog
):
  names = [corpus.passage_text(row)['id'] for row in range(3)]
  asked = [
      questions_lib.Question('Who?', (), passage_id=gold)
      for gold in (names[0], (names[1], 'lost'), 'gone', None)
  ]
  (missed,) = evaluate.evaluate(workdir, asked, limit=9)
  assert "'lost', 'gone'. They count as not retrieved." in caplog.text
  (skipped,) = evaluate.evaluate(workdir, asked, limit=9, unknown_gold='skip')
  groups = [r['questions']['all'] for r in (missed, skipped)]
  assert [group['with_gold_passage'] for group in groups] == [3, 2]
  both = list(zip(groups, (3, 2), strict=True))
  for name in ('recall_at_100', 'mrr'):
    hits = [group['gold'][name] * n for group, n in both]
    assert hits[0] == pytest.approx(hits[1]), name
  assert missed['unknown_gold'] == {
      'ids': 2, 'questions': 2, 'first': ['lost', 'gone'],
      'counted': 'they count as not retrieved',
  }
  # Without answers there is no figure by answer, and no rule.
  assert 'answer' not in groups[0] and 'answer_match' not in missed
  asked = [questions_lib.Question('Who?', ())]
  with pytest.raises(ValueError, match='has an answer or a gold passage'):
    evaluate.evaluate(workdir, asked)


def test_the_rule_for_answers_is_in_the_report(workdir, corpus):
  text = corpus.passage_text(0)['text']
  word = next(w for w in text.split() if w.isalpha() and len(w) > 3)
  asked = [
      questions_lib.Question('Who?', (f'{word[:2]}-{word[2:]}',)),
      questions_lib.Question('Who?', (f'{word[:3]}.*',), 'regex'),
  ]
  found = {}
  for rule in (None, 'dpr', 'squad'):
    (result,) = evaluate.evaluate(workdir, asked, limit=9, answer_match=rule)
    found[rule] = result['questions']['all']['answer']['recall_at_100']
    assert result['answer_match'] == {rule or 'dpr': 1, 'regex': 1}
  assert found == {None: 0.5, 'dpr': 0.5, 'squad': 1.0}
  lines = runs.read_questions(workdir / 'evaluation' / '30.questions.jsonl')
  assert [line['answer_match'] for line in lines] == ['squad', 'regex']
  with pytest.raises(ValueError, match='answer_match=fuzzy: must be one of'):
    evaluate.evaluate(workdir, asked, answer_match='fuzzy')


@pytest.mark.parametrize(
    'objective, parts', [('ict', 'questions'), ('mlm', 'masked')]
)
def test_a_workdir_with_one_component_is_measured_by_it(
    tmp_path, corpus, questions, objective, parts
):
  config = _config(corpus, objective)
  workdir = _make_workdir(
      tmp_path / 'job', corpus, config, {7: _params(config)}
  )
  asked = None if objective == 'mlm' else questions
  (result,) = evaluate.evaluate(workdir, asked, limit=12)
  assert [n for n in ('questions', 'masked') if n in result] == [parts]
  if objective == 'mlm':
    with pytest.raises(ValueError, match='has no retriever for the questions'):
      evaluate.evaluate(workdir, questions)
    assert set(result['masked']) == {
        'sentences', 'clusters', 'num_candidates', 'accuracy_without_retrieval',
        'accuracy_without_retrieval_interval',
    }
  else:
    with pytest.raises(ValueError, match='Nothing can be measured'):
      evaluate.evaluate(workdir, [])


def test_clear_errors(workdir, questions, tmp_path, corpus, config):
  with pytest.raises(FileNotFoundError, match=r'step 7.*\[0, 30\]'):
    evaluate.evaluate(workdir, questions, steps=7)
  with pytest.raises(FileNotFoundError, match=r'step 7.*\[0, 30\]'):
    evaluate.evaluate(workdir, questions, steps='0,7')
  for wrong in ('newest', '0,', '-1'):
    with pytest.raises(ValueError, match="'latest', 'all', or numbers"):
      evaluate.evaluate(workdir, questions, steps=wrong)
  with pytest.raises(ValueError, match='limit=0'):
    evaluate.evaluate(workdir, questions, limit=0)
  for wrong in (0, 101):
    with pytest.raises(ValueError, match=f'read={wrong}: must be between 1'):
      evaluate.evaluate(workdir, questions, read=wrong)
  with pytest.raises(FileNotFoundError):
    evaluate.evaluate(tmp_path / 'nowhere', questions)
  empty = tmp_path / 'empty'
  files.write_json(empty / 'config.json', config_lib.to_dict(config))
  with pytest.raises(FileNotFoundError, match='no checkpoint'):
    evaluate.evaluate(empty, questions)


def test_a_corpus_of_another_tokenizer_is_refused(workdir, tmp_path, corpus):
  from realm_jax.prepare import prepare

  other = tmp_path / 'other'
  prepare.prepare(['world:5:20'], str(other), workers=1, progress=False)
  with pytest.raises(ValueError, match='tokenizer_digest'):
    evaluate.evaluate(workdir, corpus=other)
  shared = tmp_path / 'shared'
  prepare.prepare(
      ['world:5:20'],
      str(shared),
      vocab=str(corpus.directory / 'vocab.txt'),
      workers=1,
      progress=False,
  )
  (result,) = evaluate.evaluate(workdir, corpus=shared, limit=5)
  assert result['corpus_fingerprint'] != corpus.fingerprint
  # Not by mistake, though.
  edited = config_lib.to_dict(trained_lib.Trained.open(workdir).config)
  files.write_json(
      workdir / 'config.json', {**edited, 'corpus': str(shared)}
  )
  with pytest.raises(ValueError, match='corpus_fingerprint'):
    evaluate.evaluate(workdir, limit=5)
