"""RoBERTa, XLM-R and ModernBERT against PyTorch's, with equal weights.

make_encoder_fixtures.py made the fixtures; PyTorch is not needed. With
REALM_JAX_ENCODERS=FOLDER, the fixtures are those of another run of it.
"""

import functools
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.interop import importing
from realm_jax.interop import weights
from realm_jax.models import components

_FIXTURES = pathlib.Path(
    os.environ.get('REALM_JAX_ENCODERS')
    or pathlib.Path(__file__).parents[1] / 'fixtures' / 'encoders'
)
_NAMES = [
    name
    for name in ('roberta', 'xlm-roberta', 'modernbert')
    if (_FIXTURES / name).is_dir()
]

# Relative to the largest value.
_FORWARD, _GRADIENT = 2e-5, 1e-4


@pytest.fixture(scope='module')
def expected():
  with np.load(_FIXTURES / 'expected.npz') as file:
    return {name: file[name] for name in file.files}


@functools.cache
def _loaded(name):
  return importing.open_source(_FIXTURES / name).load()


def _close(ours, theirs, tolerance, what):
  largest = np.abs(theirs).max()
  difference = np.abs(np.asarray(ours) - theirs).max()
  print(f'{what}: {difference / largest:.1e} of the largest value')
  assert difference <= tolerance * largest, (what, difference)


@pytest.mark.parametrize('name', _NAMES)
def test_forward_and_gradients(expected, name):
  want = {
      key.removeprefix(f'{name}/'): value
      for key, value in expected.items()
      if key.startswith(f'{name}/')
  }
  loaded = _loaded(name)
  # The head of the retriever is at random.
  assert {key.split('.')[0] for key in loaded.fresh} == {
      'embedder/projection', 'embedder/encoder'
  }
  assert not any('bert.' in key for key in loaded.fresh)
  assert not loaded.dropped, loaded.dropped
  reader = components.make('reader', loaded.config)
  ids, positions = want['ids'], jnp.asarray(want['positions'], jnp.int32)
  types = jnp.ones_like(ids)  # There are no segments.

  def loss_of(params):
    module = reader.module(params)
    logits = module.mlm_logits(ids, types, positions)
    logp = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logp, want['targets'][..., None], 2)
    return -picked.mean(), (logits, module.bert(ids, types))

  (loss, (logits, hidden)), gradients = jax.jit(
      jax.value_and_grad(loss_of, has_aux=True)
  )(loaded.params['reader'])
  mask = (ids != loaded.config.pad_id)[..., None]
  assert mask.sum() < mask.size or len(ids) == 1
  _close(hidden * mask, want['hidden'], _FORWARD, 'hidden')
  _close(logits, want['logits'], _FORWARD, 'logits')
  _close(loss, want['loss'], _FORWARD, 'loss')
  found = convert.tensors_of('bert', loaded.config, {'reader': gradients})
  theirs = {k: v for k, v in want.items() if k.startswith('gradient/')}
  for key, value in theirs.items():
    if key.endswith('key.bias'):  # It cancels in the softmax.
      assert np.abs(found[key.removeprefix('gradient/')]).max() < 1e-6
      continue
    _close(found[key.removeprefix('gradient/')], value, _GRADIENT, key)
  assert len(theirs) == len(gradients)


@pytest.mark.parametrize('name, pooling', [
    ('roberta', 'mean'), ('xlm-roberta', 'lasttoken'), ('modernbert', 'cls'),
])  # fmt: skip
def test_a_folder_of_sentence_transformers(expected, tmp_path, name, pooling):
  folder = tmp_path / name
  shutil.copytree(_FIXTURES / name, folder)
  modules = [('', 'Transformer'), ('1_Pooling', 'Pooling'), ('2', 'Normalize')]
  (folder / 'modules.json').write_text(json.dumps([
      {'path': path, 'type': f'sentence_transformers.models.{kind}'}
      for path, kind in modules
  ]))
  (folder / '1_Pooling').mkdir()
  (folder / '1_Pooling/config.json').write_text(
      json.dumps({'pooling_mode': pooling})
  )
  loaded = importing.open_source(folder).load(['embedder'])
  assert not loaded.fresh
  embedder = components.make('embedder', loaded.config)
  embedder = embedder.module(loaded.params['embedder'])
  ids, hidden = expected[f'{name}/ids'], expected[f'{name}/hidden']
  real = ids != loaded.config.pad_id
  assert not real.all()
  state = {
      'mean': (hidden * real[..., None]).sum(1) / real.sum(1, keepdims=True),
      'lasttoken': hidden[range(len(ids)), real.sum(1) - 1],
      'cls': hidden[:, 0],
  }[pooling]
  state /= np.linalg.norm(state, axis=1, keepdims=True)
  _close(embedder.embed_query(ids), state, _FORWARD, pooling)


@pytest.mark.parametrize('name', _NAMES)
def test_export_has_the_tensors_and_the_config(name):
  loaded = _loaded(name)
  original = weights.open_folder(_FIXTURES / name)
  found = convert.tensors_of('bert', loaded.config, loaded.params)
  for key, tensor in original.items():
    np.testing.assert_array_equal(found[key], tensor.read(), key)
  values = json.loads((_FIXTURES / name / 'config.json').read_text())
  again = huggingface_config.config_json('bert', loaded.config)
  if name == 'xlm-roberta':
    # A trained model exports as RoBERTa, an import as what it was.
    assert again['model_type'] == 'roberta'
    again = huggingface_config.config_json('bert', loaded.config, values)
    again['architectures'] = values['architectures']
  del again['torch_dtype']
  assert again.items() <= (values | {'global_attn_every_n_layers': 3} | {
      'global_rope_theta': 160_000.0, 'local_rope_theta': 10_000.0,
  }).items()
  config = huggingface_config.model_config(again)
  config.pad_id = loaded.config.pad_id
  assert config == loaded.config


@pytest.mark.parametrize('name', _NAMES)
def test_inputs_are_those_of_transformers(expected, name):
  tokenizer = importing.open_source(_FIXTURES / name).tokenizer
  texts = expected[f'{name}/texts'].tolist()
  for i, text in enumerate(texts[:3]):
    table = corpus_lib.encode_passages([(text, text[:20])], tokenizer)
    length = int(table.lengths[0]) + 2
    ids, _ = inputs.Template(tokenizer, length, length).documents(
        table, np.zeros(1, np.int64)
    )
    want = expected[f'{name}/text_{i}'].tolist()
    assert ids[0].tolist() == [*want, tokenizer.pad_id, tokenizer.pad_id]
    query = inputs.encode_queries([text], len(want), tokenizer)
    joint, _ = inputs.assemble_joint(
        corpus_lib.encode_passages([('', text[:20])], tokenizer),
        np.zeros((1, 1), np.int64),
        query,
        (query != tokenizer.pad_id).sum(axis=1),
        len(want),
        tokenizer,
    )
    assert joint[0, 0].tolist() == want


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('roberta', {'type_vocab_size': 2}, 'type_vocab_size=2; only 1'),
        ('roberta', {'pad_token_id': 0}, 'pad_token_id=0, from which'),
        ('roberta', {'num_hidden_layers': 3},
         'missing: roberta.encoder.layer.2.attention'),
        ('modernbert', {'norm_bias': True}, 'norm_bias=True; only False'),
        ('modernbert', {'classifier_activation': 'relu'}, "only 'gelu'"),
        ('modernbert', {'local_attention': 1}, 'window must be a whole number'),
        ('modernbert', {'layer_types': ['full_attention'] * 2
                        + ['sliding_attention'] * 3}, 'at equal distances'),
        ('modernbert', {'intermediate_size': 41},
         r'expected \(82, 24\): model.layers.0.mlp.Wi.weight'),
        ('modernbert', {'rope_scaling': {'type': 'yarn'}}, 'default type'),
    ],
)  # fmt: skip
def test_what_cannot_be_read(tmp_path, name, changes, message):
  shutil.copytree(_FIXTURES / name, tmp_path / name)
  path = tmp_path / name / 'config.json'
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | changes))
  with pytest.raises(ValueError, match=message):
    importing.open_source(tmp_path / name).load()


def test_names_are_spelled_as_they_were_read():
  for name in _NAMES:
    encoder = _loaded(name).config.encoder
    for key in weights.open_folder(_FIXTURES / name):
      assert huggingface_config.from_bert(
          huggingface_config.as_bert(key, encoder), encoder
      ) == key
