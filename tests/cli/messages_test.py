"""Every command shows the log messages of its modules."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import training_test

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'

# `realm-jax` with a chunk file next to each corpus that it starts to write, as
# after a killed run.
_AFTER_A_KILLED_RUN = """
import json
from realm_jax import main
from realm_jax.prepare import workers

chunk_files = workers.chunk_files

def after_a_killed_run(output, settings):
  directory = output.parent / f'.{output.name}.parts'
  directory.mkdir(parents=True)
  record = json.dumps(settings, indent=2, sort_keys=True)
  (directory / 'made_with.json').write_text(record)
  (directory / 'f00d.part').touch()
  return chunk_files(output, settings)

workers.chunk_files = after_a_killed_run
main.run()
"""


def _tag(world, tmp_path):
  sentences = tmp_path / 'sentences.jsonl'
  sentences.write_text(
      json.dumps({'tokens': ['Ann', 'sings'], 'tags': ['B-PER', 'O']}) + '\n'
  )
  config = training_test.make_config(
      world, 'tagger', steps=1, batch_size=1, tagger__files=str(sentences),
      tagger__length=8,
  )
  training_test.run(config, tmp_path / 'tagger')
  return (
      'tag', f'--corpus={world}', f'--tagger={tmp_path}/tagger',
      f'--output={tmp_path}/tagged',
  )


def _index_add(world, tmp_path):
  config = training_test.make_config(world, 'realm', steps=1)
  training_test.run(config, tmp_path / 'realm')
  document = tmp_path / 'document.jsonl'
  document.write_text(json.dumps({'id': 'new', 'text': 'Ann sings.'}) + '\n')
  return (
      'index', 'add', f'--workdir={tmp_path}/realm', f'--input={document}',
  )


def _import(world, tmp_path):
  del world
  return (
      'import', f'--source={_FIXTURES}/open_qa',
      f'--workdir={tmp_path}/open_qa', '--workers=1',
  )


@pytest.mark.parametrize('command', [_tag, _index_add, _import])
def test_an_interrupted_run_is_said_under_every_command(
    world, tmp_path, command
):
  done = subprocess.run(
      [
          sys.executable, '-c', _AFTER_A_KILLED_RUN, *command(world, tmp_path)
      ],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
      timeout=300,
  )
  assert 'An interrupted run left 1 chunk files in ' in done.stderr, done.stderr
  assert done.returncode == 0, done.stderr
