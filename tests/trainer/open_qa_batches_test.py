"""Batches of questions with passages: labels, lengths, the loss, the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import open_qa_training_test
import optax
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.models import components as components_lib
from realm_jax.models import span_reader
from realm_jax.qa import answers as answers_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib
from realm_jax.trainer.stages import open_qa


def _inputs(world, **values):
  config = open_qa_training_test.make_config(world, **values)
  corpus = corpus_lib.Corpus.open(world)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  stage = open_qa.OpenQa(config_lib.resolve(config), corpus)
  table = stage._questions
  batch = next(examples_lib.training_batches(stage))
  gold = corpus.passage_rows_by_id(
      [table.questions[row].passage_id for row in batch.row_B]
  )
  others = np.arange(11)[None] + np.zeros((len(gold), 1), int)
  rows_BN = np.concatenate([gold[:, None], others], axis=1)
  doc_emb_BNE = np.random.default_rng(0).normal(size=(*rows_BN.shape, 16))
  made = stage.with_passages(batch.inputs, rows_BN, doc_emb_BNE)
  asked = [table.questions[row] for row in batch.row_B]
  return stage, asked, rows_BN, made


@pytest.mark.parametrize('titles', [False, True])
def test_labels_are_spans_that_evaluate_as_right(world, titles):
  stage, asked, rows_BN, batch = _inputs(world, open_qa__title=titles)
  config, corpus = stage.config, stage.corpus
  starts_P, ends_P = span_reader.spans(
      config.lengths.joint, config.model.max_span_width
  )
  assert batch.has_answer_BN[:, 0].all()
  seen = 0
  for b, k, p in np.argwhere(batch.correct_BKP):
    question = asked[b]
    ids = batch.joint_ids_BKT[b, k, starts_P[p] : ends_P[p] + 1]
    text = corpus.tokenizer.decode(ids.tolist())
    # Wordpieces have lost accents and case.
    wanted = [
        corpus.tokenizer.decode(corpus.tokenizer.encode(answer))
        for answer in question.answers
    ]
    assert answers_lib.exact_match(text, wanted), (text, wanted)
    seen += 1
  assert seen >= len(rows_BN)
  # The body alone may be answered from.
  inside_BKT = span_reader.inside(batch.body_BK2, config.lengths.joint)
  for b, k in np.ndindex(batch.body_BK2.shape[:2]):
    _, body = corpus.passages.title_and_body(int(rows_BN[b, k]))
    ids = batch.joint_ids_BKT[b, k][np.asarray(inside_BKT[b, k])]
    np.testing.assert_array_equal(ids, body[: len(ids)])
    assert len(ids) == len(body)


def test_inputs_as_long_as_the_batch_needs_have_the_same_loss(world):
  stage, _, _, full = _inputs(world)
  fitted_stage, _, _, fitted = _inputs(world, open_qa__length_step=4)
  length = fitted.joint_ids_BKT.shape[-1]
  longest = fitted.body_BK2[..., 1].max() + 1
  assert longest <= length < longest + 4
  assert length < full.joint_ids_BKT.shape[-1] == stage.config.lengths.joint
  assert fitted.correct_BKP.sum() == full.correct_BKP.sum() > 0
  losses = []
  for one, batch in ((stage, full), (fitted_stage, fitted)):
    components = stages.components_of(one.config)
    params = {name: c.init(0) for name, c in components.items()}
    models = components_lib.bind(components, params)
    outputs = one.outputs(models, jax.tree.map(jnp.asarray, batch), None)
    losses.append(float(one.loss(outputs, batch)[0]))
  assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_questions_without_a_correct_span_are_not_read(world):
  stage, _, _, batch = _inputs(world, open_qa__skip_unreadable=True)
  components = stages.components_of(stage.config)
  params = {name: c.init(0) for name, c in components.items()}
  # Whatever reads, returns nan.
  params['span_reader'] = jax.tree.map(
      lambda x: x * jnp.nan, params['span_reader']
  )

  @jax.jit
  def gradients(params, batch):
    def loss(params):
      models = components_lib.bind(components, params)
      outputs = stage.outputs(models, batch, None)
      return stage.loss(outputs, batch)[0]

    return jax.value_and_grad(loss)(params)

  loss, _ = gradients(params, batch)
  assert np.isnan(loss)
  nothing_BKP = np.zeros_like(batch.correct_BKP)
  loss, grads = gradients(
      params, dataclasses.replace(batch, correct_BKP=nothing_BKP)
  )
  assert np.isfinite(loss)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_nothing_retrieved_changes_nothing(world):
  stage, _, _, batch = _inputs(world, optimizer__weight_decay=0.5)
  config = stage.config
  batch = dataclasses.replace(
      batch,
      has_answer_BN=np.zeros_like(batch.has_answer_BN),
      correct_BKP=np.zeros_like(batch.correct_BKP),
  )

  def step(config):
    components = stages.components_of(config)
    tx = optimizer.make_optimizer(config, tuple(components))
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:1]).reshape(1, 1),
        (mesh_lib.DATA, mesh_lib.MODEL),
    )
    params = {name: c.init(0) for name, c in components.items()}
    state = step_lib.TrainState(
        step=jnp.int32(5),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(0),
    )
    before = jax.device_get(params)
    train_step = step_lib.make_train_step(
        open_qa.OpenQa(config), components, tx, mesh
    )
    rates = optimizer.learning_rates(config, components, 5)
    state, metrics = train_step(state, batch, rates)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()), before, jax.device_get(state.params)
    )

    def is_schedule(x):
      return isinstance(x, optax.ScaleByScheduleState)

    schedules = [
        int(x.count)
        for x in jax.tree.leaves(state.opt_state, is_leaf=is_schedule)
        if is_schedule(x)
    ]
    assert schedules and set(schedules) == {1}  # The counter of the step.
    return metrics, all(jax.tree.leaves(same))

  metrics, unchanged = step(config_lib.resolve(config))
  assert metrics['loss'] == 0 and metrics['retrieved'] == 0
  assert unchanged
  config.open_qa.update_unanswered = True
  _, unchanged = step(config_lib.resolve(config))
  assert not unchanged  # Weight decay went on.
