"""`index verify` and `index info`: what is there, and all that is wrong."""

import json
import shutil

import pytest

from realm_jax import config as config_lib
from realm_jax.builder import builder
from realm_jax.builder import status
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.models import components
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files


@pytest.fixture(scope='module')
def built(tmp_path_factory, world):
  """A workdir with the generations 0 and 10; checkpoint 12 refers to 10."""
  workdir = tmp_path_factory.mktemp('built') / 'workdir'
  corpus = corpus_lib.Corpus.open(world)
  config = config_lib.resolve(
      config_lib.Config(
          corpus=str(world),
          model=config_lib.ModelConfig(
              preset='tiny', num_layers=1, width=32, embedding_width=16,
              vocab_size=corpus.tokenizer.vocab_size,
          ),
          lengths=config_lib.LengthsConfig(query=16, document=40),
      )
  )
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  component = components.make('embedder', config.model)
  for step in (0, 10):
    checkpoint.save_snapshot(workdir, step, component.init(seed=step))
    builder.build(workdir)
  _refer(workdir, 12, 10, corpus.fingerprint)
  generation.mark_in_use(workdir / 'index', [10])
  return workdir


def _refer(workdir, saved, step, fingerprint):
  files.write_json(
      workdir / 'checkpoints' / str(saved) / '_CHECKPOINT_METADATA',
      {
          'custom_metadata': {
              'index_generation': step, 'corpus_fingerprint': fingerprint
          }
      },
  )


@pytest.fixture
def workdir(built, tmp_path):
  return shutil.copytree(built, tmp_path / 'workdir')


def _problems(workdir, step=None):
  return {
      str(found.path.relative_to(workdir)): found.problems
      for found in status.verify(workdir, step)
  }


def test_a_sound_index(workdir):
  assert _problems(workdir) == {'index/0': [], 'index/10': []}
  assert _problems(workdir, 10) == {'index/10': []}
  about = next(status.verify(workdir)).about
  assert about.endswith(' x 16 float32, exact, 1 file(s)')
  shutil.rmtree(workdir / 'retriever' / '0')  # Nothing to compare with.
  assert _problems(workdir, 0) == {'index/0': []}
  with pytest.raises(FileNotFoundError, match=r'\[0, 10\], not of 5'):
    _problems(workdir, 5)
  with pytest.raises(FileNotFoundError, match='is not a workdir'):
    _problems(workdir / 'index')


def test_all_that_is_wrong_is_said_and_not_only_the_first(workdir, world):
  index = workdir / 'index'
  # The snapshot of 0 is another one now; a bit of its shard is flipped.
  shutil.rmtree(workdir / 'retriever' / '0')
  shutil.copytree(workdir / 'retriever' / '10', workdir / 'retriever' / '0')
  shard = index / '0' / 'shard-00000.npy'
  data = bytearray(shard.read_bytes())
  data[200] ^= 1
  shard.write_bytes(data)
  # Checkpoints of another corpus, and of a generation that is gone.
  _refer(workdir, 14, 10, 'e' * 64)
  _refer(workdir, 16, 15, 'e' * 64)
  (index / '20').mkdir()
  found = _problems(workdir)
  assert [*found] == ['index/0', 'index/10', 'index/20', '.']
  flipped, lineage = found['index/0']
  assert flipped.startswith('shard-00000.npy has sha256 ')
  assert lineage.startswith('params_digest: ') and 'expected' in lineage
  (other,) = found['index/10']
  fingerprint = corpus_lib.Corpus.open(world).fingerprint
  assert repr(fingerprint) in other and repr('e' * 64) in other
  assert 'in checkpoints/14, which refers to it' in other
  assert 'There is no index generation' in found['index/20'][0]
  (gone,) = found['.']
  assert gone.startswith('checkpoints/16 refers to the generation 15')


def test_another_corpus_and_none(workdir, tmp_path):
  config = config_lib.read(workdir)
  config.corpus = str(tmp_path / 'nowhere')
  config.model.embedding_width = 24
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  found = _problems(workdir, 10)
  assert found['index/10'] == ['width: 16 in the index, 24 expected']
  assert 'There is no corpus' in found['.'][0]


def test_info(workdir):
  index = workdir / 'index'
  (index / '0' / 'manifest.json').write_text('{')
  files.write_json(
      index / '.building-20' / 'records' / 'begun.json',
      {
          'started': 0.0,
          'made_from': {
              'step': 20, 'num_rows': 5000, 'shard_rows': 2048,
              'dtype': 'float32',
          },
      },
  )
  for number in (0, 2):
    files.write_json(
        index / '.building-20' / 'records' / f'{number:05d}.json',
        {'name': '', 'bytes': 1, 'sha256': ''},
    )
  found = status.info(workdir)
  assert json.loads(json.dumps(found)) == found
  damaged, good = found['generations']
  assert 'is damaged' in damaged['problem']
  assert good['step'] == 10 and good['in_use'] and good['checkpoints'] == [12]
  assert good['mips']['backend'] == 'exact' and good['recall'] is None
  assert good['bytes'] > good['rows'] * 16 * 4
  assert found['snapshots'] == [0, 10]
  assert found['partial'][0]['done'] == 4096
  text = status.as_text(found)
  assert 'checkpoint 12, trainer' in text
  assert 'Partial build of step 20: 4,096 of 5,000 passages' in text
  assert 'gone' in text and damaged['problem'] in text
  heartbeat = {
      'time': 0, 'age_seconds': 99.0, 'pid': 7, 'host': 'h', 'step': 20,
      'state': 'embedding', 'done': 10, 'total': 5000, 'rate': 12.3,
  }
  text = status.as_text({**found, 'builder': heartbeat})
  assert (
      'process 7 on h: embedding, step 20, 10 of 5,000 passages, 12/s, 0:01:39'
      ' ago. It is dead, stopped'
  ) in text
