"""A corpus and workdirs of an older version are read, resumed and changed."""

import json
import pathlib
import tarfile

import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import evaluate
from realm_jax.interop import export
from realm_jax.qa import question_sets
from realm_jax.trainer import loop

pytestmark = pytest.mark.usefixtures('optimized')

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_ARCHIVE = _FIXTURES / 'old' / 'workdir.tar.xz'


@pytest.fixture
def old(tmp_path):
  with tarfile.open(_ARCHIVE) as archive:
    # Python 3.11 before 3.11.4 has no filters, and ignores the attribute.
    archive.extraction_filter = getattr(tarfile, 'data_filter', None)
    archive.extractall(tmp_path)
  for path in tmp_path.glob('*/config.json'):
    config = json.loads(path.read_text())
    config['corpus'] = str(tmp_path / 'corpus')
    path.write_text(json.dumps(config))
  return tmp_path


def test_the_archive_is_small():
  assert _ARCHIVE.stat().st_size < 2**20


def test_the_corpus_opens(old):
  corpus = corpus_lib.Corpus.open(old / 'corpus')
  corpus.verify()
  assert len(corpus.passages) == 91
  assert corpus.trivial('knowledge') is None


def test_training_resumes(old):
  config = config_lib.read(old / 'realm')
  assert config.steps == 6
  config.mesh = config_lib.MeshConfig(data=4, model=2)  # 8 devices, 4 rows.
  summary = loop.train(config, old / 'realm')
  assert summary['step'] == 6
  assert summary['index_generation'] == 2


def test_changed_documents_are_evaluated_as_before(old):
  expected = json.loads((old / 'expected.json').read_text())['questions']
  questions = old / 'corpus' / 'questions.jsonl'
  asked = question_sets.read(questions)
  # Then, a gold passage that was deleted did not count.
  (found,) = evaluate.evaluate(old / 'documents', asked, unknown_gold='skip')
  assert found['passages'] == 91
  for group, wanted in expected.items():
    for kind in ('gold', 'answer'):
      figures = found['questions'][group][kind]
      for name, value in wanted[kind].items():
        # Rounding swaps passages of almost equal scores, such as those of ranks
        # 67 and 68, which changes the mean reciprocal rank by 2e-6.
        near = pytest.approx(value, abs=1e-5 if name == 'mrr' else None)
        assert figures[name] == near, (group, kind, name)


def test_documents_are_added_and_deleted(old):
  from realm_jax.builder import documents

  (old / 'in.jsonl').write_text('{"id": "b", "text": "Wilma met a lion."}\n')
  change = documents.add(old / 'documents', [str(old / 'in.jsonl')])
  assert (change.added, change.live) == (1, 92)
  (old / 'ids.txt').write_text('new1\n')
  change = documents.delete(old / 'documents', str(old / 'ids.txt'))
  assert (change.removed, change.live) == (1, 91)


def test_the_retriever_is_exported(old):
  export.run(old / 'documents', 'huggingface', old / 'out')
  assert (old / 'out' / 'config.json').is_file()
