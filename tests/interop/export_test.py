"""Import and export of the checkpoints in tests/fixtures."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.api import retriever as retriever_lib
from realm_jax.builder import builder
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import embedding
from realm_jax.interop import convert
from realm_jax.interop import export
from realm_jax.interop import export_huggingface
from realm_jax.interop import importing
from realm_jax.interop import weights
from realm_jax.models import components as components_lib
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_NAMES = ('bert', 'embedder', 'scorer', 'encoder', 'reader', 'open_qa')


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  """Each fixture, imported; and an embedder and a reader in one workdir."""
  folder = tmp_path_factory.mktemp('workdirs')
  for name in _NAMES:
    importing.run([str(_FIXTURES / name)], folder / name, workers=1)
  importing.run(
      [str(_FIXTURES / 'embedder'), str(_FIXTURES / 'encoder')], folder / 'both'
  )
  return folder


def _assert_same_tensors(ours, theirs):
  there, here = weights.open_folder(theirs), weights.open_folder(ours)
  for name, tensor in there.items():
    if not name.endswith('position_ids'):
      assert here[name].dtype == tensor.dtype, name
      assert here[name].read().tobytes() == tensor.read().tobytes(), name
  return set(here) - set(there)


@pytest.mark.parametrize('name', _NAMES)
def test_a_round_trip_is_exact(workdirs, tmp_path, name):
  folders = export.run(workdirs / name, 'huggingface', tmp_path / 'out')
  assert folders == [tmp_path / 'out']
  more = _assert_same_tensors(tmp_path / 'out', _FIXTURES / name)
  # Copies of other tensors, which transformers leaves out.
  assert all('decoder' in extra for extra in more)
  theirs = json.loads((_FIXTURES / name / 'config.json').read_bytes())
  ours = json.loads((tmp_path / 'out/config.json').read_bytes())
  left_out = {'transformers_version', 'architectures'}
  for key in set(theirs) - left_out:
    assert ours[key] == theirs[key], key
  assert theirs.get('architectures') in (None, ours['architectures'])
  vocab = (tmp_path / 'out/vocab.txt').read_bytes()
  original = (_FIXTURES / name / 'vocab.txt').read_bytes()
  assert vocab == original.replace(b'\r\n', b'\n')
  if name == 'open_qa':
    blocks = 'block_records.npy'
    np.testing.assert_array_equal(
        np.load(tmp_path / 'out' / blocks, allow_pickle=True),
        np.load(_FIXTURES / name / blocks, allow_pickle=True),
    )


def test_two_sources_make_one_job(workdirs, tmp_path):
  workdir = export_huggingface.Model.open(workdirs / 'both', None)
  assert set(workdir.params) == {'embedder', 'reader'}
  assert workdir.trained.config.objective == 'realm'
  folders = export.run(workdirs / 'both', 'huggingface', tmp_path / 'out')
  assert folders == [tmp_path / 'out', tmp_path / 'out/encoder']
  _assert_same_tensors(folders[0], _FIXTURES / 'embedder')
  _assert_same_tensors(folders[1], _FIXTURES / 'encoder')
  card = (tmp_path / 'out/encoder/README.md').read_text()
  assert "subfolder='encoder'" in card


def test_what_was_trained_is_exported_whole(workdirs, tmp_path):
  """Every name of each class, also where nothing was imported."""
  workdir = tmp_path / 'trained'
  shutil.copytree(workdirs / 'both', workdir)
  params = export_huggingface.Model.open(workdir, None).params
  changed = jax.tree.map(lambda x: np.asarray(x) + 1, params)
  about = checkpoint.saved_about(workdir, 0) | {'corpus_fingerprint': 'f00d'}
  checkpoint.save_params(workdir, 7, changed, about)
  files.write_json(
      workdir / 'evaluation/7.json', {'step': 7, 'gold': {'mrr': 0.25}}
  )
  export.run(
      workdir,
      'huggingface',
      tmp_path / 'out',
      classes=['embedder', 'encoder', 'scorer', 'bert'],
  )
  for kind, fixture in (
      ('', 'embedder'), ('encoder', 'encoder'), ('scorer', 'scorer')
  ):
    names = set(weights.open_folder(_FIXTURES / fixture))
    found = set(weights.open_folder(tmp_path / 'out' / kind))
    assert {n for n in names if 'position_ids' not in n} <= found
  again = importing.open_source(tmp_path / 'out/encoder')
  reader = convert.load(again.tensors, again.config).params['reader']
  for name, value in changed['reader'].items():
    np.testing.assert_array_equal(reader[name], value)
  bert = weights.open_folder(tmp_path / 'out/bert')
  assert 'bert.embeddings.word_embeddings.weight' in bert
  np.testing.assert_array_equal(
      bert['cls.predictions.bias'].read(), changed['reader']['output_bias']
  )
  card = (tmp_path / 'out/README.md').read_text()
  for fact in ('| training step | 7 |', 'f00d', '| gold mrr | 0.25 |'):
    assert fact in card
  # A tensor that no model uses has no value of its own.
  unused = weights.open_folder(tmp_path / 'out')
  assert not unused['cls.predictions.decoder.weight'].read().any()
  # Step 0 is still what it was.
  export.run(workdir, 'huggingface', tmp_path / 'first', step=0)
  _assert_same_tensors(tmp_path / 'first', _FIXTURES / 'embedder')


def test_a_part_of_an_open_qa_checkpoint(tmp_path):
  importing.run(
      [str(_FIXTURES / 'open_qa')],
      tmp_path / 'workdir',
      components=['embedder'],
      workers=1,
  )
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  config = json.loads((tmp_path / 'out/config.json').read_bytes())
  assert config['architectures'] == ['RealmEmbedder']
  there = weights.open_folder(_FIXTURES / 'open_qa')
  for name, tensor in weights.open_folder(tmp_path / 'out').items():
    if 'cls.predictions' not in name:
      want = there[f'embedder.{name}']
      assert tensor.read().tobytes() == want.read().tobytes()


def test_half_precision_comes_back_in_half_precision(tmp_path):
  folder = tmp_path / 'half'
  shutil.copytree(_FIXTURES / 'encoder', folder)
  tensors = weights.open_folder(folder)
  weights.write_safetensors(
      folder / 'model.safetensors',
      {name: t.read().astype(np.float16) for name, t in tensors.items()},
  )
  importing.run([str(folder)], tmp_path / 'workdir')
  export.run(tmp_path / 'workdir', 'huggingface', tmp_path / 'out')
  extra = _assert_same_tensors(tmp_path / 'out', folder)
  assert extra == {
      'cls.predictions.decoder.weight', 'cls.predictions.decoder.bias'
  }


def test_an_import_is_a_workdir(workdirs):
  config = config_lib.read(workdirs / 'open_qa')
  assert config.model.activation == 'gelu_new'
  assert (config.model.num_layers, config.model.width) == (2, 24)
  assert config.num_candidates == 3
  corpus = corpus_lib.Corpus.open(config.corpus)
  assert len(corpus.passages) == 7
  assert corpus.passage_text(1)['text'].startswith('who is the cat of Bo')
  tokenizer = tokenizer_lib.Tokenizer.from_source(str(workdirs / 'open_qa'))
  assert tokenizer.digest == corpus.tokenizer.digest
  assert config_lib.read(workdirs / 'bert').model.activation == 'gelu'
  # The parameters that training would start from.
  found, step = checkpoint.load_params(
      workdirs / 'bert', {'reader': _abstract(workdirs / 'bert', 'reader')}
  )
  assert step == 0
  source = importing.open_source(_FIXTURES / 'bert')
  loaded = convert.load(source.tensors, source.config)
  for name, value in loaded.params['reader'].items():
    np.testing.assert_array_equal(found['reader'][name], value)


def _abstract(workdir, name):
  config = config_lib.resolve(config_lib.read(workdir))
  return components_lib.make(name, config.model).abstract


def test_an_imported_retriever_is_indexed_like_any_other(tmp_path, workdirs):
  """`import --corpus`, `index`, search: by the tools of trained workdirs."""
  lines = tmp_path / 'a.jsonl'
  lines.write_text(
      json.dumps({'title': 'Red', 'text': 'The cat of Bo is red.'})
      + '\n'
      + json.dumps({'title': 'Cat', 'text': 'Who is the cat of Al?'})
  )
  prepare.prepare(
      [str(lines)], tmp_path / 'corpus', vocab=str(workdirs / 'embedder')
  )
  workdir = tmp_path / 'workdir'
  importing.run(
      [str(_FIXTURES / 'embedder')], workdir, corpus=str(tmp_path / 'corpus')
  )
  builder.build(workdir)
  retriever = retriever_lib.Retriever.load(workdir)
  hits = retriever.search(['the cat'], 2)
  assert sorted(hits.rows[0].tolist()) == [0, 1]
  passages = [retriever.passage(row) for row in (0, 1)]
  doc_emb = retriever.embed_passages(
      [(p['title'], p['text']) for p in passages]
  )
  query_emb = retriever.embed_queries(['the cat'])
  scores = (query_emb @ doc_emb.T)[0][hits.rows[0]]
  np.testing.assert_allclose(hits.scores[0], scores, rtol=1e-5)
  with pytest.raises(ValueError, match='another vocabulary'):
    importing.run(
        [str(_FIXTURES / 'bert')],
        tmp_path / 'other',
        corpus=str(_other_corpus(tmp_path)),
    )


def _other_corpus(tmp_path):
  lines = tmp_path / 'b.jsonl'
  lines.write_text(json.dumps({'text': 'The cat of Bo is red. ' * 9}))
  prepare.prepare([str(lines)], tmp_path / 'corpus2')
  return tmp_path / 'corpus2'


def _st_embed(folder, ids, types):
  """Computes the modules of sentence-transformers in numpy and JAX."""
  values = json.loads((folder / 'config.json').read_bytes())
  modules = json.loads((folder / 'modules.json').read_bytes())
  kinds = [m['type'].rpartition('.')[2] for m in modules]
  assert kinds == ['Transformer', 'Pooling', 'Dense', 'Dense', 'LayerNorm']
  pooling = json.loads((folder / '1_Pooling/config.json').read_bytes())
  assert [k for k, on in pooling.items() if on is True] == [
      'pooling_mode_cls_token'
  ]
  loaded = convert.load(
      weights.open_folder(folder), values, ['embedder']
  )
  component = components_lib.make('embedder', loaded.config)
  module = component.module(loaded.params['embedder'])
  x = np.asarray(module.encoder.bert(ids, types))[:, 0]
  for path in ('2_Dense', '3_Dense'):
    dense = json.loads((folder / path / 'config.json').read_bytes())
    t = weights.open_folder(folder / path)
    x = x @ t['linear.weight'].read().T + t['linear.bias'].read()
    if dense['activation_function'].endswith('Tanh'):
      x = np.tanh(x)
    else:
      assert dense['activation_function'].endswith('Identity')
  norm = weights.open_folder(folder / '4_LayerNorm')
  x = x - x.mean(1, keepdims=True)
  x = x / np.sqrt(x.var(1, keepdims=True) + 1e-5)  # PyTorch's default.
  return x * norm['norm.weight'].read() + norm['norm.bias'].read()


@pytest.mark.parametrize('name', ['embedder', 'scorer'])
def test_sentence_transformers(workdirs, tmp_path, name):
  folders = export.run(
      workdirs / name, 'sentence-transformers', tmp_path / 'out'
  )
  names = ['query', 'document'] if name == 'scorer' else ['']
  assert folders == [tmp_path / 'out' / tower for tower in names]
  workdir = export_huggingface.Model.open(workdirs / name, None)
  embedder = workdir.trained.components['embedder']
  params = workdir.params['embedder']
  ids = np.array([[3, 9, 8, 4, 7, 4], [3, 10, 4, 0, 0, 0]], np.int32)
  types = np.array([[0, 0, 0, 0, 1, 1], [0] * 6], np.int32)
  for tower, folder in zip(names, folders, strict=True):
    if tower == 'query':
      types = np.zeros_like(types)
      want = embedder.module(params).embed_query(ids)
    else:
      want = embedder.module(params).embed_document(ids, types)
    # An epsilon of 1e-5 would differ by more.
    np.testing.assert_allclose(
        _st_embed(folder, ids, types), want, rtol=1e-5, atol=5e-6
    )
    assert (folder / 'vocab.txt').is_file()
    assert 'sentence_transformers' in (folder / 'README.md').read_text()


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_index(workdirs, tmp_path, dtype):
  export.run(
      workdirs / 'open_qa', 'index', tmp_path / 'out', dtype=dtype
  )
  table = weights.open_folder(_FIXTURES / 'open_qa')['block_emb'].read()
  found = np.load(tmp_path / 'out/embeddings.npy')
  np.testing.assert_array_equal(found, table.astype(dtype))
  ids = (tmp_path / 'out/ids.jsonl').read_text().splitlines()
  assert [json.loads(line) for line in ids] == list('0123456')
  about = json.loads((tmp_path / 'out/index.json').read_text())
  assert (about['rows'], about['width']) == (7, 16)
  if importlib.util.find_spec('faiss') is not None:
    import faiss

    index = faiss.read_index(str(tmp_path / 'out/index.faiss'))
    _, rows = index.search(table[:2], 1)
    want = (table[:2] @ table.T).argmax(axis=1)
    np.testing.assert_array_equal(rows[:, 0], want)


def test_an_embedding_too_large_for_half_precision(tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(_FIXTURES / 'open_qa', folder)
  tensors = {
      name: tensor.read()
      for name, tensor in weights.open_folder(folder).items()
  }
  tensors['block_emb'][3, 4] = 1e5
  weights.write_safetensors(folder / 'model.safetensors', tensors)
  importing.run([str(folder)], tmp_path / 'workdir', workers=1)
  with pytest.raises(ValueError, match='float16'):
    export.run(
        tmp_path / 'workdir', 'index', tmp_path / 'out', dtype='float16'
    )
  assert not (tmp_path / 'out').exists()


def test_command_line(tmp_path):
  def realm_jax(*arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'realm_jax', *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=_FIXTURES.parent.parent,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr

  code, said, _ = realm_jax(
      'import',
      f'--source={_FIXTURES / "bert"}',
      '--components=reader',
      f'--workdir={tmp_path / "workdir"}',
  )
  assert code == 0
  assert json.loads(said)['parameters'] > 10_000
  code, said, _ = realm_jax(
      'export',
      f'--workdir={tmp_path / "workdir"}',
      '--format=huggingface',
      '--classes=encoder,bert',
      f'--output={tmp_path / "out"}',
  )
  assert code == 0
  assert said.split() == [str(tmp_path / 'out'), str(tmp_path / 'out/bert')]
  code, said, error = realm_jax(
      'import', '--source=/no/where', f'--workdir={tmp_path / "new"}'
  )
  assert (code, said) == (1, '')
  assert error.endswith('realm-jax import: There is no folder /no/where.\n')


def test_what_cannot_be_exported(workdirs, tmp_path):
  def run(name, format, **options):
    export.run(workdirs / name, format, tmp_path / 'out', **options)

  with pytest.raises(ValueError, match='--format=onnx'):
    run('embedder', 'onnx')
  with pytest.raises(ValueError, match='no reader'):
    run('embedder', 'huggingface', classes=['encoder'])
  with pytest.raises(ValueError, match="'roberta' is no class"):
    run('embedder', 'huggingface', classes=['roberta'])
  with pytest.raises(ValueError, match='no retriever'):
    run('encoder', 'sentence-transformers')
  with pytest.raises(ValueError, match='no retriever over a corpus'):
    run('embedder', 'index')
  with pytest.raises(ValueError, match='no span_reader'):
    run('both', 'huggingface', classes=['openqa'])
  with pytest.raises(FileNotFoundError):
    run('nowhere', 'huggingface')
  assert not (tmp_path / 'out').exists()
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/file').touch()
  with pytest.raises(FileExistsError, match='--output'):
    run('embedder', 'huggingface')


def test_a_built_index_is_of_the_embeddings(workdirs, tmp_path):
  """The builder's embeddings of the blocks are those of the checkpoint."""
  workdir = export_huggingface.Model.open(workdirs / 'open_qa', None)
  embedder = embedding.PassageEmbedder(
      workdir.trained.components['embedder'],
      workdir.trained.corpus.passages,
      workdir.trained.tokenizer,
      40,
      mesh_lib.make_mesh(config_lib.MeshConfig()),
  )
  built = embedder(workdir.params['embedder'])
  table = weights.open_folder(_FIXTURES / 'open_qa')['block_emb'].read()
  rows = [0, 1, 3, 4, 5, 6]  # 2 has no text; its passage is [UNK].
  np.testing.assert_allclose(
      built[rows], table[rows], atol=2e-5 * np.abs(table).max()
  )
