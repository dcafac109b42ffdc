"""The examples of docs/extending.md, executed from its text."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.runtime import metrics

_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'extending.md'
_BLOCK = re.compile(r'```(python|shell)\n(.*?)```', re.DOTALL)
# Appended to every training command: the examples are of the usual size.
_SMALL = (
    '--config.steps=2 --config.batch_size=8 --config.log_interval=1'
    ' --config.model.num_layers=1 --config.model.width=16'
    ' --config.model.num_heads=2 --config.lengths.query=24'
    ' --config.lengths.document=40'
).split()


@pytest.fixture(scope='module')
def executed(tmp_path_factory):
  """Writes the modules of the page and runs its commands, in its order."""
  folder = tmp_path_factory.mktemp('extending')
  outputs = {}
  for kind, text in _BLOCK.findall(_PAGE.read_text()):
    if kind == 'python':
      name = re.match(r'# (\w+\.py)\n', text)
      assert name, f'The first line must be the name of a file:\n{text}'
      (folder / name[1]).write_text(text)
      continue
    for command in text.replace('\\\n', '').splitlines():
      words = shlex.split(command)
      assert words[0] == 'realm-jax'
      more = _SMALL if words[1] == 'train' else []
      run = subprocess.run(
          [sys.executable, '-m', 'realm_jax', *words[1:], *more],
          cwd=folder,
          env={**os.environ, 'PYTHONPATH': f'{folder}:{_PAGE.parent.parent}'},
          capture_output=True,
          text=True,
          check=False,
      )
      assert run.returncode == 0, f'{command}\n{run.stderr}'
      outputs[command.split(' --')[0] + str(len(outputs))] = run.stdout
  return folder, outputs


def test_an_objective(executed):
  folder, outputs = executed
  lines = metrics.read_metrics(folder / 'symmetric')
  assert len(lines) == 2
  for line in lines:
    # In-batch softmax of 8 passages, in both directions.
    assert 0 < line['train/reverse_loss'] < 20
    assert line['train/loss'] > 0
  assert (folder / 'symmetric' / 'evaluation' / 'report.md').is_file()
  assert any('step tflop' in text for text in outputs.values())


def test_a_mask(executed):
  folder, _ = executed
  lines = metrics.read_metrics(folder / 'masked')
  assert len(lines) == 2


def test_a_search_backend(executed):
  folder, _ = executed
  lines = metrics.read_metrics(folder / 'realm')
  assert [line['refresh/generation'] for line in lines] == [0.0, 0.0]
  manifest = json.loads((folder / 'realm/index/0/manifest.json').read_text())
  assert 'my_search:Numpy' in json.dumps(manifest)


def test_a_source(executed):
  folder, _ = executed
  corpus = corpus_lib.Corpus.open(folder / 'poems')
  assert len(corpus.passages) == 40
  assert corpus.passage_text(7)['title'] == 'Poem 7'


def test_an_encoder(executed):
  folder, _ = executed
  config = config_lib.read(folder / 'repeated')
  assert config.model.encoder == 'my_encoder:Repeated'
  assert config.model.encoder_options == {'times': 2}
  lines = metrics.read_metrics(folder / 'repeated')
  assert len(lines) == 2
