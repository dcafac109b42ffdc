"""Errors of `realm-jax import`, and checkpoints of the hub."""

import json
import pathlib
import re
import shutil

import export_test
import numpy as np
import pytest
import transformers

from realm_jax.inference import trained as trained_lib
from realm_jax.interop import export
from realm_jax.interop import huggingface_config
from realm_jax.interop import importing
from realm_jax.interop import weights

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
workdirs = export_test.workdirs


def test_what_cannot_be_imported(tmp_path, workdirs):
  def run(*names, **options):
    importing.run([str(n) for n in names], tmp_path / 'out', **options)

  with pytest.raises(FileNotFoundError, match='no folder'):
    run('/nowhere/at/all')
  with pytest.raises(FileNotFoundError, match=r'config\.json'):
    run(tmp_path)
  with pytest.raises(ValueError, match='Both .* have the component reader'):
    run(_FIXTURES / 'bert', _FIXTURES / 'encoder')
  with pytest.raises(ValueError, match="of which .'span_reader'. are wanted"):
    run(_FIXTURES / 'bert', components=['span_reader'])
  with pytest.raises(FileExistsError, match='not empty'):
    importing.run([str(_FIXTURES / 'bert')], workdirs)
  assert not (tmp_path / 'out').exists()


def test_sources_of_different_models(tmp_path):
  folder = tmp_path / 'encoder'
  shutil.copytree(_FIXTURES / 'encoder', folder)
  values = json.loads((folder / 'config.json').read_bytes())
  values['hidden_act'] = 'gelu'
  (folder / 'config.json').write_text(json.dumps(values))
  with pytest.raises(ValueError, match="activation: 'gelu_new' and 'gelu'"):
    importing.run(
        [str(_FIXTURES / 'embedder'), str(folder)], tmp_path / 'out'
    )
  text = (folder / 'vocab.txt').read_text().replace('cat', 'dog')
  (folder / 'vocab.txt').write_text(text)
  with pytest.raises(ValueError, match='different vocabularies'):
    importing.run(
        [str(_FIXTURES / 'embedder'), str(folder)], tmp_path / 'out'
    )


def test_added_tokens_are_imported_and_exported(tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(_FIXTURES / 'bert', folder)
  *pieces, _, _ = (folder / 'vocab.txt').read_text().split()
  (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
  added = {'<num>': len(pieces), '<City>': len(pieces) + 1}
  (folder / 'added_tokens.json').write_text(json.dumps(added))
  importing.run([str(folder)], tmp_path / 'out')
  found = trained_lib.Trained.open_parameters(tmp_path / 'out').tokenizer
  assert found.vocab == [*pieces, *added]
  text = f'{pieces[-1]} <num> {pieces[-1]}<City>'
  assert found.encode(text)[1] == added['<num>']
  export.run(tmp_path / 'out', 'huggingface', tmp_path / 'model')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'model')
  ids = [found.cls_id, *found.encode(text), found.sep_id]
  assert theirs(text)['input_ids'] == ids
  again = importing.open_source(tmp_path / 'model').tokenizer
  assert again == found


def test_a_vocabulary_of_another_size(tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(_FIXTURES / 'embedder', folder)
  with (folder / 'vocab.txt').open('ab') as file:
    file.write(b'more\r\n')
  with pytest.raises(ValueError, match='has 65 wordpieces, .* made for 64'):
    importing.run([str(folder)], tmp_path / 'out')
  importing.run(
      [str(folder)], tmp_path / 'out', vocab=str(_FIXTURES / 'embedder')
  )
  (folder / 'vocab.txt').unlink()
  with pytest.raises(FileNotFoundError, match=r'neither vocab\.txt'):
    importing.run([str(folder)], tmp_path / 'other')


def test_documents_that_do_not_fit_their_embeddings(tmp_path):
  folder = tmp_path / 'source'
  shutil.copytree(_FIXTURES / 'open_qa', folder)
  blocks = folder / 'block_records.npy'
  np.save(blocks, np.array([b'a', b'b'], object), allow_pickle=True)
  with pytest.raises(ValueError, match='2 documents, .* embeddings of 7'):
    importing.run([str(folder)], tmp_path / 'out', workers=1)
  assert not (tmp_path / 'out').exists()
  blocks.unlink()
  # Without documents there is no index, but what there is can be used.
  importing.run([str(folder)], tmp_path / 'out')
  with pytest.raises(FileNotFoundError, match='realm-jax index'):
    export.run(
        tmp_path / 'out', 'huggingface', tmp_path / 'again', classes=['openqa']
    )
  export.run(tmp_path / 'out', 'huggingface', tmp_path / 'again')
  back = weights.open_folder(tmp_path / 'again')
  there = weights.open_folder(_FIXTURES / 'embedder')
  for name in there:
    if 'cls.predictions' not in name and 'position_ids' not in name:
      assert back[name].read().tobytes() == there[name].read().tobytes()
  importing.run(
      [str(folder)],
      tmp_path / 'elsewhere',
      blocks=str(_FIXTURES / 'open_qa/block_records.npy'),
      workers=1,
  )
  assert (tmp_path / 'elsewhere/index/0').is_dir()


def test_a_hub_id(tmp_path, monkeypatch):
  """Only what is needed is fetched; what the hub lacks is no error."""
  import huggingface_hub
  from huggingface_hub import errors

  fetched = []

  def download(name, file):
    assert name == 'someone/scorer'
    path = _FIXTURES / 'scorer' / file
    if not path.is_file():
      raise errors.LocalEntryNotFoundError(f'no {file}')
    fetched.append(file)
    return str(path)

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
  summary = importing.run(['someone/scorer'], tmp_path / 'workdir')
  assert summary['sources']['someone/scorer']['kind'] == 'scorer'
  assert sorted(fetched) == [
      'config.json',
      'model-00001-of-00002.safetensors',
      'model-00002-of-00002.safetensors',
      'model.safetensors.index.json',
      'tokenizer_config.json',
      'vocab.txt',
  ]

  def offline(name, file):
    raise errors.LocalEntryNotFoundError('offline')

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', offline)
  with pytest.raises(FileNotFoundError, match='hub cannot be reached'):
    importing.run(['someone/else'], tmp_path / 'other')
  with pytest.raises(FileNotFoundError, match='There is no folder'):
    importing.run([str(tmp_path / 'nothing')], tmp_path / 'other')


# ----------------------------------------------------------------- config.json


@pytest.mark.parametrize('kind', ['bert', 'dpr'])
def test_missing_fields_have_the_defaults_of_transformers(kind):
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoConfig.for_model(kind).to_dict()
  empty = huggingface_config.model_config({'model_type': kind})
  assert huggingface_config.model_config(theirs) == empty
  assert empty.activation == 'gelu' and empty.num_layers == 12
  assert huggingface_config.model_config({}) == empty


def test_names_of_one_activation():
  found = {
      name: huggingface_config.model_config({'hidden_act': name}).activation
      for name in ('gelu', 'gelu_new', 'gelu_fast', 'gelu_pytorch_tanh')
  }
  assert found.pop('gelu') == 'gelu'
  assert set(found.values()) == {'gelu_new'}


@pytest.mark.parametrize(
    'field, value',
    [
        ('hidden_size', 0),
        ('hidden_size', None),
        ('hidden_size', 1e400),
        ('num_attention_heads', -1),
        ('num_hidden_layers', 10**9),
        ('vocab_size', 30522.5),
        ('layer_norm_eps', '1e-12'),
        ('layer_norm_eps', float('nan')),
        ('hidden_act', ['gelu']),
        ('hidden_act', 'quick_gelu'),
        ('position_embedding_type', 'relative_key_query'),
    ],
)
def test_fields_that_are_refused(field, value):
  with pytest.raises(ValueError, match=re.escape(f'{field}={value!r}')):
    huggingface_config.model_config({field: value})
