"""Retrievers of other projects: parity with PyTorch, round trips, errors."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.api import retriever as retriever_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import export
from realm_jax.interop import export_huggingface
from realm_jax.interop import importing
from realm_jax.interop import sources as sources_lib
from realm_jax.interop import weights
from realm_jax.models import components
from realm_jax.prepare import prepare
from realm_jax.trainer import initial
from realm_jax.trainer import stages

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures' / 'retrievers'
_NAMES = (
    'mean_normalize_prompts',
    'cls',
    'lasttoken_dense',
    'mean_dense_normalize',
    'cls_tanh_dense_layernorm',
)
# As in make_retriever_fixtures.py.
_TEXTS = ['who is the cat of bo', '', 'the red cat ' * 20, 'a of c']
_TITLES = ['cat', 'red of', '', 'a']


@pytest.fixture(scope='module')
def expected():
  with np.load(_FIXTURES / 'expected.npz') as file:
    return {name: file[name] for name in file.files}


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('retrievers')
  for name in _NAMES:
    importing.run([str(_FIXTURES / name)], folder / name)
  for size in (0, 12):
    # In either order.
    parts = [str(_FIXTURES / f'dpr{size}_{x}') for x in ('question', 'context')]
    importing.run(parts[:: -1 if size else 1], folder / f'dpr{size}')
  return folder


def _close(found, want):
  np.testing.assert_allclose(
      found, want, rtol=0, atol=2e-5 * np.abs(want).max()
  )


@pytest.mark.parametrize('name', [*_NAMES, 'dpr0', 'dpr12'])
def test_embeddings_are_those_of_pytorch(workdirs, expected, name):
  model = export_huggingface.Model.open(workdirs / name, None)
  template = model.trained.template
  component = model.trained.components['embedder']
  pairs = list(zip(_TITLES, _TEXTS, strict=True))
  table = corpus_lib.encode_passages(pairs, model.trained.tokenizer)
  documents = template.documents(table, np.arange(len(pairs)))

  @jax.jit
  def embed(params, ids, ids_and_types):
    module = component.module(params)
    return module.embed_query(ids), module.embed_document(*ids_and_types)

  query, document = embed(
      model.params['embedder'],
      template.queries(template.encode(_TEXTS)),
      documents,
  )
  _close(query, expected[f'{name}/query'])
  _close(document, expected[f'{name}/document'])


def test_a_folder_is_a_retriever_without_an_import(expected):
  name = 'mean_normalize_prompts'
  model = retriever_lib.Retriever.load(_FIXTURES / name)
  _close(model.embed_queries(_TEXTS), expected[f'{name}/query'])
  assert model.lengths.document == 32


@pytest.mark.parametrize('name', _NAMES)
def test_gradients_are_those_of_pytorch(workdirs, expected, name):
  source = sources_lib.open_source(_FIXTURES / name)
  loaded = source.load(['embedder'])
  model = export_huggingface.Model.open(workdirs / name, None)
  component = model.trained.components['embedder']
  tokens = [source.tokenizer.encode(text)[:30] for text in _TEXTS]
  ids = np.zeros((4, 32), np.int32)
  for row, pieces in zip(ids, tokens, strict=True):
    pieces = [source.tokenizer.cls_id, *pieces, source.tokenizer.sep_id]
    row[: len(pieces)] = pieces
  want = expected[f'{name}/plain']
  noise = _torch_noise(expected, name)

  def loss(params):
    emb = component.module(params).embed_query(ids)
    return (emb * noise).sum(), emb

  gradients, found = jax.jit(jax.grad(loss, has_aux=True))(
      loaded.params['embedder']
  )
  _close(found, want)
  prefix, checked = f'{name}/gradient/', 0
  # sentence-transformers numbers the modules.
  modules = ['0.model.', *(f'{i}.' for i in range(1, 5))]
  for theirs, ours in loaded.sources.items():
    folder, slash, inner = theirs.rpartition('/')
    key = modules[int(folder[0])] + inner if slash else f'0.model.{theirs}'
    gradient = np.asarray(gradients[ours.removeprefix('embedder/')])
    if ours.endswith('.kernel'):
      gradient = gradient.T
    if '.key.bias' in ours or '.key.bias' in theirs:
      continue  # Rounding error: softmax does not depend on it.
    there = expected.get(prefix + key)
    if there is None:
      assert np.abs(gradient).max() == 0, theirs
      continue
    checked += 1
    np.testing.assert_allclose(
        gradient, there, rtol=0, atol=1e-4 * np.abs(there).max(), err_msg=theirs
    )
  assert checked > 30


def _torch_noise(expected, name):
  return expected[f'noise/{expected[f"{name}/plain"].shape[1]}']


def _tensors(folder):
  found = {}
  for path in sorted(folder.rglob('model.safetensors')):
    for key, tensor in weights.open_file(path).items():
      found[f'{path.parent.relative_to(folder)}/{key}'] = tensor.read()
  return found


@pytest.mark.parametrize('name', _NAMES)
def test_a_round_trip_is_exact(workdirs, tmp_path, name):
  export.run(workdirs / name, 'sentence-transformers', tmp_path / 'out')
  theirs, ours = _tensors(_FIXTURES / name), _tensors(tmp_path / 'out')
  assert ours.keys() == theirs.keys()
  for key, tensor in theirs.items():
    assert tensor.tobytes() == ours[key].tobytes(), key
  if name == 'mean_normalize_prompts':
    importing.run([str(tmp_path / 'out')], tmp_path / 'again')
    again = config_lib.read(tmp_path / 'again')
    assert config_lib.read(workdirs / name) == again
  one, two = (
      sources_lib.open_source(x).load().params['embedder']
      for x in (_FIXTURES / name, tmp_path / 'out')
  )
  assert one.keys() == two.keys()
  assert all(np.array_equal(one[key], two[key]) for key in one)
  modules = json.loads((tmp_path / 'out/modules.json').read_text())
  kinds = [m['type'].rpartition('.')[2] for m in modules]
  original = json.loads((_FIXTURES / name / 'modules.json').read_text())
  assert kinds == [m['type'].rpartition('.')[2] for m in original]


def test_two_towers_are_exported_and_joined_again(workdirs, tmp_path):
  folders = export.run(
      workdirs / 'dpr12', 'sentence-transformers', tmp_path / 'out'
  )
  assert [f.name for f in folders] == ['query', 'document']
  assert '[SEP]' in (folders[1] / 'README.md').read_text()
  importing.run(
      [str(folders[1])],
      tmp_path / 'again',
      query_source=str(folders[0]),
      titles='pair',
  )
  first, again = (
      export_huggingface.Model.open(x, None).params['embedder']
      for x in (workdirs / 'dpr12', tmp_path / 'again')
  )
  assert first.keys() == again.keys()
  assert all(np.array_equal(first[key], again[key]) for key in first)
  config = config_lib.read(tmp_path / 'again').model
  assert (config.towers, config.embedding_width) == ('separate', 12)


def test_every_tensor_of_dpr_is_accounted_for(tmp_path):
  """In one file with both encoders, by the names of the original."""
  tensors = {}
  parts = {'question': 'question_model', 'context': 'ctx_model'}
  for part, prefix in parts.items():
    opened = weights.open_folder(_FIXTURES / f'dpr12_{part}')
    for name, tensor in opened.items():
      rest = name.partition('.')[2].removeprefix('bert_model.')
      tensors[f'{prefix}.{rest}'] = tensor.read()
  folder = tmp_path / 'both'
  shutil.copytree(_FIXTURES / 'dpr12_context', folder)
  weights.write_safetensors(folder / 'model.safetensors', tensors)
  summary = importing.run([str(folder)], tmp_path / 'workdir')
  (about,) = summary['sources'].values()
  assert about['at_random'] == [] and about['dropped'] == {}
  model = export_huggingface.Model.open(tmp_path / 'workdir', None)
  read = [name for one in model.imported for name in one.tensors]
  assert sorted(read) == sorted(tensors)
  got = model.params['embedder']['query_projection.dense.kernel']
  np.testing.assert_array_equal(
      np.asarray(got).T, tensors['question_model.encode_proj.weight']
  )


def test_a_bert_is_a_retriever_if_its_pooling_is_given(tmp_path, caplog):
  source = _FIXTURES / 'cls'
  folder = tmp_path / 'bert'
  folder.mkdir()
  for name in ('config.json', 'model.safetensors', 'vocab.txt'):
    shutil.copy(source / name, folder)
  with caplog.at_level(logging.INFO):
    importing.run(
        [str(folder / 'model.safetensors')],  # A file, not its folder.
        tmp_path / 'workdir',
        pooling='mean',
        normalize=True,
        query_prefix='who : ',
        components=['embedder', 'reader'],
    )
  assert 'pooler' in caplog.text
  config = config_lib.read(tmp_path / 'workdir')
  model = config.model
  assert (model.pooling, model.projection, model.normalize) == (
      'mean', 'none', True
  )
  assert (model.query_prefix, model.titles) == ('who : ', 'text')
  assert model.embedding_width == model.width == 16
  assert config.objective == 'realm'  # It has a reader.
  values = json.loads((folder / 'config.json').read_text())
  values['architectures'] = ['Contriever']
  (folder / 'config.json').write_text(json.dumps(values))
  opened = sources_lib.open_source(folder)
  assert opened.head.fields['pooling'] == 'mean'
  with pytest.raises(ValueError, match="--pooling=cls contradicts.*'mean'"):
    sources_lib.open_source(folder, given={'pooling': 'cls'})


def test_a_job_takes_the_head_of_its_checkpoint(workdirs, caplog):
  config = config_lib.Config(objective='ict', corpus='x')
  config.init_from = str(workdirs / 'mean_normalize_prompts')
  config.model.score_scale = 20.0
  tokenizer = tokenizer_lib.Tokenizer.from_source(config.init_from)
  with caplog.at_level(logging.INFO):
    followed = initial.follow(
        config, stages.load(config), tokenizer, {'model.document_prefix'}
    )
  model = followed.model
  assert (model.pooling, model.normalize) == ('mean', True)
  assert (model.query_prefix, model.document_prefix) == ('who is : ', '')
  assert model.score_scale == 20
  assert "config.model.pooling='mean' (not 'cls_tanh')" in caplog.text
  with pytest.raises(ValueError, match="pooling: 'cls_tanh' on the command"):
    initial.follow(config, stages.load(config), tokenizer, {'model.pooling'})


def test_a_head_of_ones_own_starts_from_a_bert(tmp_path):
  importing.run([str(_FIXTURES.parent / 'bert')], tmp_path / 'bert')
  config = config_lib.Config(objective='ict', corpus='x')
  config.init_from = str(tmp_path / 'bert')
  config.model.pooling, config.model.projection = 'mean', 'none'
  config.model.learn_score_scale = True
  tokenizer = tokenizer_lib.Tokenizer.from_source(config.init_from)
  followed = config_lib.resolve(
      initial.follow(config, stages.load(config), tokenizer)
  )
  assert (followed.model.pooling, followed.model.projection) == ('mean', 'none')
  embedder = components.make('embedder', followed.model)
  params = initial.load(followed, {'embedder': embedder}, False)['embedder']
  assert embedder.abstract.keys() - params.keys() == {'log_score_scale'}
  assert not params.keys() - embedder.abstract.keys()


# --------------------------------------------------------------- bad input


def _changed(tmp_path, name, file, **values):
  folder = tmp_path / name
  shutil.copytree(_FIXTURES / name, folder)
  path = folder / file
  read = json.loads(path.read_text())
  if isinstance(read, list):
    read[values['at']]['type'] = values['type']
  else:
    read |= values
  path.write_text(json.dumps(read))
  return folder


@pytest.mark.parametrize('name, file, values, message', [
    ('cls', 'modules.json',
     {'at': 1, 'type': 'sentence_transformers.models.WeightedLayerPooling'},
     "has the module 'sentence_transformers.models.WeightedLayerPooling'"),
    ('cls', 'modules.json', {'at': 1, 'type': 'mine.Pooling'},
     "module 'mine.Pooling', which is not known"),
    ('mean_dense_normalize', 'modules.json',
     {'at': 2, 'type': 'sentence_transformers.models.LayerNorm'},
     "LayerNorm .'2_Dense'. follows Pooling; .* only after Projection"),
    ('cls', '1_Pooling/config.json', {'pooling_mode': ['cls', 'max']},
     r'the pooling cls\+max; one of cls, mean, lasttoken'),
    ('cls', '1_Pooling/config.json', {'include_prompt': False},
     'include_prompt=false'),
    ('lasttoken_dense', '2_Dense/config.json',
     {'activation_function': 'torch.nn.modules.activation.ReLU'},
     "activation 'torch.nn.modules.activation.ReLU'"),
    ('lasttoken_dense', '2_Dense/config.json', {'use_residual': True},
     'use_residual=True'),
    ('lasttoken_dense', '2_Dense/config.json',
     {'activation_function': 'torch.nn.modules.activation.Tanh'},
     "tanh follows the pooling 'last'"),
    ('lasttoken_dense', '2_Dense/config.json', {'out_features': 13},
     r'\(12, 16\), expected \(13, 16\): 2_Dense/linear.weight'),
    ('cls', 'config.json', {'num_hidden_layers': 3},
     'num_hidden_layers=3, the weights have 2'),
    ('cls', 'sentence_bert_config.json', {'max_seq_length': 'long'},
     "max_seq_length='long'"),
])  # fmt: skip
def test_folders_that_are_refused(tmp_path, name, file, values, message):
  folder = _changed(tmp_path, name, file, **values)
  with pytest.raises(ValueError, match=message):
    importing.run([str(folder)], tmp_path / 'workdir')
  assert not (tmp_path / 'workdir').exists()


def test_modules_without_their_files(tmp_path):
  for file, message in (
      ('2_Dense/model.safetensors', 'has no weights'),
      ('1_Pooling/config.json', 'There is no file'),
  ):
    folder = tmp_path / file[0]
    shutil.copytree(_FIXTURES / 'lasttoken_dense', folder)
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=message):
      importing.run([str(folder)], tmp_path / 'workdir')


def test_towers_that_contradict_each_other(tmp_path):
  with pytest.raises(ValueError, match=r"pooling: 'mean' and 'cls'"):
    importing.run(
        [str(_FIXTURES / 'mean_normalize_prompts')],
        tmp_path / 'a',
        query_source=str(_FIXTURES / 'cls'),
    )
  with pytest.raises(ValueError, match='contradicts the checkpoint'):
    importing.run([str(_FIXTURES / 'cls')], tmp_path / 'a', pooling='mean')
  with pytest.raises(ValueError, match='one --source has its document tower'):
    importing.run(
        [str(_FIXTURES / 'cls'), str(_FIXTURES / 'lasttoken_dense')],
        tmp_path / 'a',
        query_source=str(_FIXTURES / 'cls'),
    )


def test_a_prefix_longer_than_a_query(tmp_path):
  with pytest.raises(ValueError, match='80 wordpieces, .*lengths.query=32'):
    importing.run(
        [str(_FIXTURES / 'cls')], tmp_path / 'a', query_prefix='who is ' * 40
    )
  assert not (tmp_path / 'a').exists()


def test_a_corpus_of_another_vocabulary(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "The cat is red. Who is Bo?"}\n')
  prepare.prepare(
      [str(tmp_path / 'a.jsonl')], tmp_path / 'corpus', vocab_size=60, workers=1
  )
  with pytest.raises(ValueError, match='prepared with another vocabulary'):
    importing.run(
        [str(_FIXTURES / 'cls')],
        tmp_path / 'a',
        corpus=str(tmp_path / 'corpus'),
    )


def test_the_classes_of_transformers_cannot_hold_it(workdirs, tmp_path):
  with pytest.raises(ValueError, match=r"pooling='cls'.*sentence-transformers"):
    export.run(workdirs / 'cls', 'huggingface', tmp_path / 'out')
