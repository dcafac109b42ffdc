"""Checkpoints of BERT as people have them: wrappers, heads, padding, DPR."""

import json
import logging
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.interop import weights

_LAYERS, _WIDTH, _MLP, _POSITIONS = 2, 8, 12, 16
_VOCAB = '[PAD] [UNK] [CLS] [SEP] [MASK] a b c ##d e f'.split()
_ROWS = len(_VOCAB)
_CONFIG = {
    'model_type': 'bert',
    'hidden_size': _WIDTH,
    'num_hidden_layers': _LAYERS,
    'num_attention_heads': 2,
    'intermediate_size': _MLP,
    'vocab_size': _ROWS,
    'max_position_embeddings': _POSITIONS,
}
_RNG = np.random.default_rng(0)


def draw(*shape):
  return _RNG.normal(size=shape).astype(np.float32)


def linear(name, rows, columns):
  return {f'{name}.weight': draw(rows, columns), f'{name}.bias': draw(rows)}


def norm(name):
  return {f'{name}.weight': draw(_WIDTH), f'{name}.bias': draw(_WIDTH)}


def body(rows=_ROWS, pooler=True):
  found = {
      'embeddings.word_embeddings.weight': draw(rows, _WIDTH),
      'embeddings.position_embeddings.weight': draw(_POSITIONS, _WIDTH),
      'embeddings.token_type_embeddings.weight': draw(2, _WIDTH),
      **norm('embeddings.LayerNorm'),
  }
  for i in range(_LAYERS):
    layer = f'encoder.layer.{i}'
    for part in ('query', 'key', 'value'):
      found |= linear(f'{layer}.attention.self.{part}', _WIDTH, _WIDTH)
    found |= linear(f'{layer}.attention.output.dense', _WIDTH, _WIDTH)
    found |= norm(f'{layer}.attention.output.LayerNorm')
    found |= linear(f'{layer}.intermediate.dense', _MLP, _WIDTH)
    found |= linear(f'{layer}.output.dense', _WIDTH, _MLP)
    found |= norm(f'{layer}.output.LayerNorm')
  return found | (linear('pooler.dense', _WIDTH, _WIDTH) if pooler else {})


def mlm_head(rows=_ROWS):
  return {
      'cls.predictions.bias': draw(rows),
      **linear('cls.predictions.transform.dense', _WIDTH, _WIDTH),
      **norm('cls.predictions.transform.LayerNorm'),
  }


def prefixed(prefix, tensors):
  return {prefix + name: value for name, value in tensors.items()}


def save(folder, tensors, **changes):
  folder.mkdir(exist_ok=True)
  values = {k: v for k, v in (_CONFIG | changes).items() if v is not None}
  (folder / 'config.json').write_text(json.dumps(values))
  (folder / 'vocab.txt').write_text('\n'.join(_VOCAB) + '\n')
  weights.write_safetensors(folder / 'model.safetensors', tensors)
  return importing.open_source(folder)


# Our names of BERT's tensors, written out by hand.
_OURS = {
    r'embeddings\.word_embeddings\.weight': 'word_embed.embedding',
    r'embeddings\.position_embeddings\.weight': 'position_embed.embedding',
    r'embeddings\.token_type_embeddings\.weight': 'type_embed.embedding',
    r'embeddings\.LayerNorm': 'embed_norm',
    r'encoder\.layer\.(\d+)\.attention\.self\.(\w+)': r'layers.\1.\2',
    r'encoder\.layer\.(\d+)\.attention\.output\.dense': (
        r'layers.\1.attention_output'
    ),
    r'encoder\.layer\.(\d+)\.attention\.output\.LayerNorm': (
        r'layers.\1.attention_norm'
    ),
    r'encoder\.layer\.(\d+)\.intermediate\.dense': r'layers.\1.mlp_in',
    r'encoder\.layer\.(\d+)\.output\.dense': r'layers.\1.mlp_out',
    r'encoder\.layer\.(\d+)\.output\.LayerNorm': r'layers.\1.mlp_norm',
}


def assert_body(params, tensors, rows=_ROWS):
  """`params` of a component are exactly the body's tensors."""
  count = 0
  for name, value in tensors.items():
    if name.startswith('pooler'):
      continue
    ours = name
    for pattern, replacement in _OURS.items():
      ours = re.sub(f'^{pattern}', replacement, ours)
    if ours.endswith('.weight'):
      is_norm = 'norm' in ours
      ours = ours.removesuffix('weight') + ('scale' if is_norm else 'kernel')
      value = value if is_norm else value.T
    if 'word_embed' in ours:
      value = value[:rows]
    np.testing.assert_array_equal(params[f'bert.{ours}'], value, name)
    count += 1
  assert count == len([n for n in params if n.startswith('bert.')])


def dropped_by(loaded):
  return {name: reason.split(',')[0] for name, reason in loaded.dropped.items()}


_QA = linear('qa_outputs', 2, _WIDTH)
_NSP = linear('cls.seq_relationship', 2, _WIDTH)
_CLASSIFIER = linear('classifier', 3, _WIDTH)


@pytest.mark.parametrize(
    'prefix, heads, changes',
    [
        ('', {}, {}),
        ('bert.', _CLASSIFIER, {'architectures': ['X']}),
        ('bert.', _QA, {'architectures': None}),
        ('bert.', {**mlm_head(), **_NSP}, {}),
        ('module.bert.', prefixed('module.', mlm_head()), {}),
        ('_orig_mod.module.', {}, {}),
        ('bert._orig_mod.', mlm_head(), {}),
        ('model.', {}, {}),
        ('model.bert.', prefixed('model.', mlm_head()), {}),
        ('model.bert.', {**prefixed('model.', mlm_head()), **_CLASSIFIER}, {}),
        ('encoder.', {'linear.weight': draw(4, _WIDTH)}, {}),
        ('0.auto_model.', {}, {}),
        ('question_encoder.bert_model.', {}, {'model_type': 'dpr'}),
        (
            'ctx_encoder.bert_model.',
            linear('ctx_encoder.encode_proj', 4, _WIDTH),
            {'model_type': 'dpr', 'projection_dim': 4},
        ),
        (
            'span_predictor.encoder.bert_model.',
            prefixed('span_predictor.', _QA),
            {'model_type': 'dpr'},
        ),
    ],
)
def test_a_body_by_any_name_with_any_head(tmp_path, prefix, heads, changes):
  given = body()
  source = save(tmp_path / 'a', prefixed(prefix, given) | heads, **changes)
  loaded = source.load()
  assert_body(loaded.params['reader'], given)
  embedder = loaded.params['embedder']
  assert_body({k.removeprefix('encoder.'): v for k, v in embedder.items()},
              given)
  np.testing.assert_array_equal(
      embedder['encoder.pooler.kernel'], given['pooler.dense.weight'].T
  )
  heads = {name.split('.', 1)[-1] if name.startswith(('module.', 'model.'))
           else name: value for name, value in heads.items()}
  has_mlm = 'cls.predictions.bias' in heads
  assert ('reader/output_bias' in loaded.fresh) != has_mlm
  if has_mlm:
    np.testing.assert_array_equal(
        loaded.params['reader']['output_bias'], heads['cls.predictions.bias']
    )
    np.testing.assert_array_equal(
        loaded.params['reader']['transform.kernel'],
        heads['cls.predictions.transform.dense.weight'].T,
    )
  rest = {n for n in heads if not n.startswith('cls.predictions')}
  assert {name.removeprefix('model.') for name in loaded.dropped} == rest
  # Every tensor of the file is taken, or dropped with a reason.
  named = {*loaded.sources, *loaded.copies, *loaded.dropped}
  assert named == set(source.tensors)


def test_what_is_dropped_is_said_and_exported_again(tmp_path, caplog):
  tensors = prefixed('module.bert.', body()) | prefixed('module.', _CLASSIFIER)
  tensors['module.bert.embeddings.position_ids'] = np.arange(_POSITIONS)[None]
  save(tmp_path / 'a', tensors)
  with caplog.at_level(logging.INFO):
    summary = importing.run([str(tmp_path / 'a')], tmp_path / 'workdir')
  assert 'dropped: module.classifier.' in caplog.text
  assert '(a classifier).' in caplog.text
  (about,) = summary['sources'].values()
  assert {k: sorted(v) for k, v in about['dropped'].items()} == {
      'a classifier': ['module.classifier.bias', 'module.classifier.weight'],
      'a buffer of positions, computed here': [
          'module.bert.embeddings.position_ids'
      ],
  }
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  back = weights.open_folder(tmp_path / 'out')
  del tensors['module.bert.embeddings.position_ids']
  assert set(back) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(back[name].read(), value)


@pytest.mark.parametrize('prefix', ['', 'bert.'])
def test_parts_of_a_bert_may_be_absent(tmp_path, prefix):
  given = body(pooler=False)
  loaded = save(tmp_path / 'a', prefixed(prefix, given)).load(['embedder'])
  assert {name.split('.')[1] for name in loaded.fresh} == {'pooler', 'dense',
                                                           'norm'}
  half = {'pooler.dense.weight': draw(_WIDTH, _WIDTH)}
  loaded = save(tmp_path / 'b', prefixed(prefix, given | half)).load()
  assert dropped_by(loaded) == {
      f'{prefix}pooler.dense.weight': 'a pooler of another form than that of'
      ' BERT'
  }


def test_old_names_of_layer_norms(tmp_path):
  given = body()
  old = {
      name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
          'LayerNorm.bias', 'LayerNorm.beta'
      ): value
      for name, value in given.items()
  }
  assert sum('gamma' in name for name in old) == 5
  assert_body(save(tmp_path / 'a', old).load().params['reader'], given)


# ------------------------------------------------------------------- padding


@pytest.mark.parametrize('in_config', [16, _ROWS])
def test_padded_embeddings_are_cut(tmp_path, caplog, in_config):
  given, head = body(rows=16), mlm_head(rows=16)
  head['cls.predictions.decoder.weight'] = given[
      'embeddings.word_embeddings.weight'
  ]
  tensors = prefixed('bert.', given) | head
  source = save(tmp_path / 'a', tensors, vocab_size=in_config)
  with caplog.at_level(logging.INFO):
    loaded = source.load()
  assert 'the last 5 of 16 rows' in caplog.text
  assert loaded.rows_cut == 5 and loaded.config.vocab_size == _ROWS
  assert_body(loaded.params['reader'], given)
  np.testing.assert_array_equal(
      loaded.params['reader']['output_bias'],
      head['cls.predictions.bias'][: _ROWS],
  )
  importing.run([str(tmp_path / 'a')], tmp_path / 'workdir')
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  back = importing.open_source(tmp_path / 'out')
  assert back.config['vocab_size'] == _ROWS
  assert_body(back.load().params['reader'], given)


@pytest.mark.parametrize('rows', [_ROWS - 1, _ROWS + 512])
def test_another_vocabulary_is_refused(tmp_path, rows):
  source = save(tmp_path / 'a', body(rows), vocab_size=rows)
  with pytest.raises(ValueError, match=f'a: .* 11 .* made for {rows} .*--v'):
    source.load()


def test_a_size_that_is_neither_is_refused(tmp_path):
  source = save(tmp_path / 'a', body(16), vocab_size=14)
  with pytest.raises(ValueError, match=r'\(16, 8\), expected \(14, 8\)'):
    source.load()


@pytest.mark.parametrize('rows', [_ROWS, 16])
def test_an_untied_decoder_is_dropped(tmp_path, rows):
  given = body(rows)
  embed = given['embeddings.word_embeddings.weight']
  other = embed.copy()
  other[3, 2] += 0.5
  tensors = prefixed('bert.', given) | mlm_head(rows)
  tensors |= {
      'cls.predictions.decoder.weight': other,
      'cls.predictions.decoder.bias': tensors['cls.predictions.bias'],
  }
  loaded = save(tmp_path / 'a', tensors, vocab_size=rows).load()
  ((name, reason),) = loaded.dropped.items()
  assert name == 'cls.predictions.decoder.weight'
  assert (
      'differs from bert.embeddings.word_embeddings.weight by up to 0.5;'
      in reason
  )
  assert_body(loaded.params['reader'], given)
  importing.run([str(tmp_path / 'a')], tmp_path / 'workdir')
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  back = weights.open_folder(tmp_path / 'out')
  np.testing.assert_array_equal(back[name].read(), other[: _ROWS])


def test_an_embedding_by_the_name_of_the_decoder(tmp_path):
  given = body()
  tensors = prefixed('bert.', given) | mlm_head()
  tensors['cls.predictions.decoder.weight'] = tensors.pop(
      'bert.embeddings.word_embeddings.weight'
  )
  loaded = save(tmp_path / 'a', tensors).load()
  assert_body(loaded.params['reader'], given)
  assert not loaded.dropped


def test_a_bias_by_its_second_name(tmp_path):
  head = mlm_head()
  bias = head['cls.predictions.decoder.bias'] = head.pop('cls.predictions.bias')
  loaded = save(tmp_path / 'a', prefixed('bert.', body()) | head).load()
  np.testing.assert_array_equal(loaded.params['reader']['output_bias'], bias)
  assert not loaded.dropped


# ------------------------------------------------------------- several bodies


def test_one_of_several_bodies_is_named(tmp_path):
  question, passage = body(), body()
  tensors = prefixed('question_model.', question)
  tensors |= prefixed('ctx_model.', passage)
  source = save(tmp_path / 'a', tensors)
  with pytest.raises(ValueError, match=r"'ctx_model\.', .*--body=ctx_model"):
    source.load()
  loaded = importing.open_source(tmp_path / 'a', body='question_model').load()
  assert_body(loaded.params['reader'], question)
  assert set(loaded.dropped) == set(prefixed('ctx_model.', passage))
  with pytest.raises(ValueError, match="No BERT is at the prefix 'bert'"):
    importing.open_source(tmp_path / 'a', body='bert').load()


def test_another_architecture_by_its_prefix(tmp_path):
  source = save(tmp_path / 'a', prefixed('roberta.', body()), model_type=None)
  with pytest.raises(ValueError, match='neither BERT nor REALM'):
    source.load()


def test_two_tensors_of_one_name(tmp_path):
  tensors = body() | prefixed('module.', body())
  with pytest.raises(ValueError, match='twice, as .* and as module'):
    save(tmp_path / 'a', tensors).load()


# ------------------------------------------------------------ missing or extra


@pytest.mark.parametrize(
    'layers, message',
    [
        (1, r'num_hidden_layers=1, the weights have 2 layers; correct(?s:.)*'
            r'unexpected: bert\.encoder\.layer\.1'),
        (3, r'num_hidden_layers=3, the weights have 2 layers; correct(?s:.)*'
            r'missing: bert\.encoder\.layer\.2'),
    ],
)
def test_another_number_of_layers(tmp_path, layers, message):
  source = save(
      tmp_path / 'a', prefixed('bert.', body()), num_hidden_layers=layers
  )
  with pytest.raises(ValueError, match=message):
    source.load()


def test_an_adapter_is_not_taken_for_a_head(tmp_path):
  tensors = prefixed('base_model.model.bert.', body())
  query = 'base_model.model.bert.encoder.layer.0.attention.self.query'
  tensors[f'{query}.lora_A.weight'] = draw(2, _WIDTH)
  with pytest.raises(ValueError, match='(?s)lora_A.*merge_and_unload'):
    save(tmp_path / 'a', tensors).load()


# ------------------------------------------------------------ types and files


@pytest.mark.parametrize('dtype', ['float16', ml_dtypes.bfloat16])
def test_half_precision(tmp_path, dtype):
  given = {n: v.astype(dtype) for n, v in body().items()}
  loaded = save(tmp_path / 'a', given).load()
  params = loaded.params['reader']
  assert {v.dtype for v in params.values()} == {np.dtype(np.float32)}
  assert_body(params, {n: v.astype(np.float32) for n, v in given.items()})


def test_integers_are_no_weights(tmp_path):
  given = body()
  name = 'encoder.layer.0.output.dense.weight'
  given[name] = np.ones(given[name].shape, np.int8)
  with pytest.raises(ValueError, match=f'int8, expected floats: {name}'):
    save(tmp_path / 'a', given).load()


def test_several_files_with_an_index(tmp_path):
  given = prefixed('bert.', body()) | _CLASSIFIER
  save(tmp_path / 'a', given)
  (tmp_path / 'a/model.safetensors').unlink()
  index = {}
  for number, part in enumerate((list(given)[::2], list(given)[1::2]), 1):
    file = f'model-{number:05}-of-00002.safetensors'
    index |= dict.fromkeys(part, file)
    weights.write_safetensors(
        tmp_path / 'a' / file, {name: given[name] for name in part}
    )
  path = tmp_path / 'a/model.safetensors.index.json'
  path.write_text(json.dumps({'metadata': {}, 'weight_map': index}))
  loaded = importing.open_source(tmp_path / 'a').load()
  assert set(loaded.dropped) == set(_CLASSIFIER)
  assert len(loaded.sources) == len(given) - 2


def test_weights_of_another_framework(tmp_path):
  save(tmp_path / 'a', body())
  (tmp_path / 'a/model.safetensors').rename(tmp_path / 'a/tf_model.h5')
  with pytest.raises(FileNotFoundError, match=r'not tf_model\.h5\. Write'):
    importing.open_source(tmp_path / 'a')


# --------------------------------------------------------------------- taggers


def test_a_tagger_is_imported_if_asked(tmp_path):
  tags = ['B-LOC', 'O', 'I-PER', 'B-PER', 'I-LOC']
  head = linear('classifier', 5, _WIDTH)
  given = body(pooler=False)
  source = save(
      tmp_path / 'a',
      prefixed('bert.', given) | head,
      id2label={str(i): tag for i, tag in enumerate(tags)},
  )
  loaded = source.load()
  assert 'tagger' not in loaded.params
  assert '--components=tagger' in loaded.dropped['classifier.weight']
  importing.run(
      [str(tmp_path / 'a')], tmp_path / 'workdir', components=['tagger']
  )
  loaded = source.load(['tagger'])
  assert loaded.config.entity_types == ('LOC', 'PER')
  assert not loaded.config.capitals and not loaded.dropped
  assert_body(loaded.params['tagger'], given)
  # O, B-LOC, I-LOC, B-PER, I-PER.
  order = [1, 0, 4, 3, 2]
  np.testing.assert_array_equal(
      loaded.params['tagger']['output.kernel'],
      head['classifier.weight'][order].T,
  )
  np.testing.assert_array_equal(
      loaded.params['tagger']['output.bias'], head['classifier.bias'][order]
  )
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  back = importing.open_source(tmp_path / 'out')
  assert list(back.config['id2label'].values()) == [tags[i] for i in order]
  np.testing.assert_array_equal(
      back.tensors['classifier.bias'].read(), head['classifier.bias'][order]
  )


@pytest.mark.parametrize(
    'labels', [None, {'0': 'O', '1': 'I-PER'}, {'0': 'LABEL_0'}, {'0': 'O'}]
)
def test_a_classifier_of_other_labels_is_no_tagger(tmp_path, labels):
  tensors = prefixed('bert.', body()) | _CLASSIFIER
  source = save(tmp_path / 'a', tensors, id2label=labels)
  assert source.components == ['embedder', 'reader']


def test_folders_are_named(tmp_path):
  folder = pathlib.Path(tmp_path / 'a')
  save(folder, body())
  (folder / 'config.json').write_text('[]')
  with pytest.raises(ValueError, match=r'a/config\.json is not a JSON object'):
    importing.open_source(folder)
  (folder / 'config.json').write_text('{"model_type": "deberta"}')
  with pytest.raises(ValueError, match="a: config.json has .*'deberta'"):
    importing.open_source(folder)


def test_a_pointer_of_git_lfs_is_no_checkpoint(tmp_path):
  save(tmp_path, body())
  pointer = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'
  (tmp_path / 'model.safetensors').write_bytes(pointer)
  with pytest.raises(ValueError, match='model.safetensors .*`git lfs pull`'):
    importing.open_source(tmp_path)
