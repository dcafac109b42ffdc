"""Reports, errors and faults of the commands that change documents."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import Any

import documents_workdir as job
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.api import retriever
from realm_jax.builder import document_store
from realm_jax.builder import documents
from realm_jax.builder import status
from realm_jax.cli import actions
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import inspect
from realm_jax.index import generation
from realm_jax.interop import export
from realm_jax.prepare import prepare
from realm_jax.prepare import writer
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import process

pytest_plugins = ['documents_workdir']


def _add(workdir, *records, command=documents.add, **options):
  source = job.write(workdir.parent / 'input.jsonl', records)
  return command(workdir, [source], progress=False, **options)


def _names(workdir):
  """Returns the names in the folder of the documents."""
  return sorted(os.listdir(workdir / 'documents'))


_A = {'id': 'a', 'title': 'A', 'text': 'Ada Brown lit the lamp of Bremen.'}
_B = {'id': 'b', 'title': 'B', 'text': job.LONG}


def test_what_commands_report_and_leave(workdir, tmp_path, corpus):
  rows = len(corpus.passages)
  done = _add(workdir, _A, _B)
  longer = done.added - 1
  assert longer > 2
  assert (done.version, done.step, done.removed) == (1, 10, 0)
  assert (done.embedded, done.live) == (done.added, rows + done.added)
  again = _add(workdir, {**_B, 'text': 'Short now.'}, command=documents.update)
  assert (again.version, again.added, again.removed) == (2, 1, longer)
  assert again.embedded == 1  # Only what is new.
  ids = tmp_path / 'ids.txt'
  ids.write_text('a\n\nzz\nb\n')
  with pytest.raises(ValueError, match="The document 'zz' is not there"):
    documents.delete(workdir, ids)
  last = documents.delete(workdir, ids, ignore_missing=True)
  assert (last.version, last.added, last.removed) == (3, 0, 2)
  assert (last.embedded, last.missing, last.live) == (0, 1, rows)
  assert _names(workdir) == [
      '.documents.lock', 'corpus-1', 'corpus-2', 'index-1', 'index-2',
      # The one before is for who is just opening it, until the next command.
      'manifest.json', 'removed-2.npy', 'removed-3.npy',
  ]
  # A document that was removed can come back, in any format of a corpus;
  # --ignore_missing adds.
  table = tmp_path / 'more.csv'
  table.write_text(f'ref,lead\na,{_A["text"]}\n')
  names = 'id:ref,text:lead'
  documents.add(workdir, [str(table)], fields=names, progress=False)
  assert _add(
      workdir, _B, command=documents.update, ignore_missing=True
  ).missing == 1
  found = job.open_documents(workdir).corpus.record_rows(['a', 'b'])
  assert found[1].shape == (longer,)
  # The corpus and the index of the job are what they were.
  corpus.verify()
  assert os.listdir(workdir / 'index/10')


def test_errors_name_what_is_wrong(workdir, tmp_path, corpus):
  first = corpus.passage_text(0)['id']
  _add(workdir, _A, _B)
  before = _names(workdir)
  for records, error in (
      ([_A], "The document 'a' is there already; `realm-jax index update`"),
      (
          [{'id': first, 'text': 'x'}, _A, _B],
          f"The documents {first!r}, 'a', 'b' are there already",
      ),
      ([{'id': 'b#1', 'text': 'x'}], "'b#1' is there already"),
      ([{'text': 'x'}], r'input.jsonl:1: no field `id`'),
      ([{'id': 'x', 'text': 'x'}, {'id': 'y'}], r'input.jsonl:2: no field `te'),
      ([{'id': 'x', 'text': 'x'}] * 2, r'input.jsonl:2: the id .x. is already'),
      ([{'id': 'x', 'text': '\u200b'}], 'no wordpiece'),
  ):
    with pytest.raises(ValueError, match=error):
      _add(workdir, *records)
  # A part of a long document cannot take the id of another one.
  _add(workdir, {'id': 'c#1', 'title': '', 'text': 'Short.'})
  with pytest.raises(ValueError, match=r"already has the id 'c#1'"):
    _add(workdir, {**_B, 'id': 'c'})
  missing = [{'id': f'm{i}', 'text': 'x'} for i in range(7)]
  with pytest.raises(
      ValueError, match=r"'m0', 'm1', 'm2', 'm3', 'm4' and 2 more are not there"
  ):
    _add(workdir, *missing, command=documents.update)
  ids = tmp_path / 'ids.jsonl'
  for text, error in (
      ('{"id": 3}\n{"name": 3}\n', r'ids.jsonl:2: no field `id`'),
      ('{"id": [3]}', r'ids.jsonl:1: the field `id` is of type list'),
      ('3', r'ids.jsonl:1: a JSON int'),
      ('', 'names no id'),
  ):
    ids.write_text(text)
    with pytest.raises(ValueError, match=error):
      documents.delete(workdir, ids)
  everything = [
      {'id': corpus.passage_text(r)['id']} for r in range(len(corpus.passages))
  ]
  job.write(ids, [*everything, {'id': 'a'}, {'id': 'b'}, {'id': 'c#1'}])
  with pytest.raises(ValueError, match='Nothing would remain'):
    documents.delete(workdir, ids)
  with pytest.raises(FileNotFoundError, match='no file or folder'):
    documents.add(workdir, [str(tmp_path / 'nothing.jsonl')])
  with pytest.raises(FileNotFoundError, match='There is no file'):
    documents.delete(workdir, tmp_path / 'nothing.txt')
  with pytest.raises(FileNotFoundError, match='config'):
    documents.add(tmp_path / 'nowhere', [str(ids)])
  assert not (tmp_path / 'nowhere').exists()
  with (
      process.lock(workdir / 'documents', 'command that changes documents'),
      pytest.raises(RuntimeError, match='Another command that changes docu'),
  ):
    documents.delete(workdir, ids)
  # None of that left anything.
  assert _names(workdir) == [
      *before[:2], 'corpus-2', 'index-1', 'index-2', 'manifest.json'
  ]
  shutil.rmtree(workdir / 'index')
  with pytest.raises(FileNotFoundError, match='has no index yet; build one'):
    _add(workdir, {'id': 'x', 'text': 'x'})


@pytest.mark.parametrize('where', ['prepare', 'embed', 'publish', 'write'])
def test_a_full_disk_changes_nothing(workdir, monkeypatch, where):
  _add(workdir, _A)
  before = _names(workdir), document_store.read_manifest(workdir / 'documents')

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  module, name = {
      'prepare': (writer.CorpusWriter, 'add'),
      'embed': (document_store.Documents, 'embedder'),
      'publish': (generation.Writer, 'publish'),
      'write': (documents, '_write'),
  }[where]
  monkeypatch.setattr(module, name, fail)
  with pytest.raises(OSError, match='No space left on device'):
    _add(workdir, {**_A, 'text': 'New.'}, command=documents.update)
  assert _names(workdir) == before[0]
  assert document_store.read_manifest(workdir / 'documents') == before[1]


def test_a_full_disk_leaves_nothing_of_a_compaction(
    workdir, tmp_path, monkeypatch
):
  _add(workdir, _A)

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(generation.Writer, 'publish', fail)
    with pytest.raises(OSError, match='No space left on device'):
      documents.compact(workdir, tmp_path / 'plain', progress=False)
  assert not (tmp_path / 'plain').exists()
  documents.compact(workdir, tmp_path / 'plain', progress=False)
  assert (tmp_path / 'plain').exists()


_KILLED = """
import os, signal, sys
from realm_jax import main
from realm_jax.runtime import files

def kill(*args):
  os.kill(os.getpid(), signal.SIGKILL)

files.write_json = kill
main.run()
"""


def test_a_killed_command_changes_nothing(workdir, queries):
  _add(workdir, _A)
  ids, _ = job.find(workdir, queries[:2])
  source = job.write(workdir.parent / 'input.jsonl', [_B])
  done = subprocess.run(
      [
          sys.executable, '-c', _KILLED, 'index', 'add',
          f'--workdir={workdir}', f'--input={source}',
      ],
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert {'corpus-2', 'index-2'} <= {*_names(workdir)}
  assert job.open_documents(workdir).version == 1
  assert job.find(workdir, queries[:2])[0] == ids
  # The next command removes what is left of it, and does it.
  assert documents.add(workdir, [source], progress=False).version == 2
  found = {name for row in job.find(workdir, queries[:1])[0] for name in row}
  assert {'a', 'b#0', 'b#1'} <= found
  assert not any('tmp' in name for name in _names(workdir))


def test_damage_and_foreign_corpora_are_refused(workdir, tmp_path, corpus):
  _add(workdir, _A)
  ids = tmp_path / 'ids.txt'
  ids.write_text('a')
  documents.delete(workdir, ids)
  _add(workdir, _A, _B)
  folder = workdir / 'documents'
  assert [f.problems for f in status.verify(workdir)] == [[], []]

  def refused(path, change, error, only_verified=False):
    good = path.read_bytes()
    path.write_bytes(change(good))
    _, found = status.verify(workdir)
    assert found.path == folder and re.search(error, *found.problems)
    if not only_verified:
      with pytest.raises(ValueError, match=error):
        retriever.Retriever.load(workdir).search(['x'], 1)
    path.write_bytes(good)

  def flip(data, at=-5):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

  refused(
      folder / 'manifest.json',
      lambda data: data.replace(b'"version": 3', b'"version": 4'),
      'manifest.json is damaged: its SHA-256 is',
  )
  refused(
      folder / 'manifest.json',
      lambda data: data.replace(b'_version": 1', b'_version": 9'),
      'has format 9, from a newer realm_jax; this one reads format 1',
  )
  refused(folder / 'manifest.json', lambda data: data[:40], 'not readable')
  refused(folder / 'removed-3.npy', flip, 'removed-3.npy is damaged')
  tokens = folder / 'corpus-3/tables/passage_tokens.bin'
  refused(tokens, lambda data: data[:-2], 'passage_tokens.bin has')
  refused(tokens, flip, 'passage_tokens.bin has the SHA-256', True)
  shard = folder / 'index-3/10/shard-00000.npy'
  refused(shard, flip, 'shard-00000.npy', True)
  # Damaged embeddings are computed again.
  ids, scores = job.find(workdir, ['x'])
  shard.write_bytes(flip(shard.read_bytes()))
  assert job.find(workdir, ['x'])[0] == ids
  # The corpus of the job was prepared again with other texts.
  other = job.write(tmp_path / 'other.jsonl', [_A, _B])
  prepare.prepare(
      [other], tmp_path / 'other', vocab=str(corpus.directory), workers=1,
      progress=False,
  )
  config = job.make_config(corpus)
  config.corpus = str(tmp_path / 'other')
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  made = corpus_lib.Corpus.open(tmp_path / 'other').fingerprint[:16]
  with pytest.raises(
      ValueError, match=rf'{made}, {corpus.fingerprint[:16]} in manifest.json'
  ):
    job.find(workdir, ['x'])


def test_embeddings_of_different_parameters_never_meet(
    workdir, params, corpus, queries, caplog
):
  caplog.set_level(logging.INFO)
  _add(workdir, _A, _B)
  job.train(workdir, corpus, params[1], 20)
  # The new index has none of what was added; a search makes them itself.
  ids, scores = job.find(workdir, queries)
  assert 'were embedded by the parameters of step 20' in caplog.text
  assert not (workdir / 'documents/index-1/20').exists()
  # The next command keeps them.
  done = _add(workdir, {'id': 'c', 'text': 'Eva Green.'})
  assert done.embedded > 2
  caplog.clear()
  missing = workdir.parent / 'ids.txt'
  missing.write_text('c')
  documents.delete(workdir, missing)
  again_ids, again_scores = job.find(workdir, queries)
  assert 'were embedded by' not in caplog.text
  assert again_ids == ids
  np.testing.assert_allclose(again_scores, scores, rtol=2e-6, atol=1e-6)
  # An index whose parameters are gone can be searched, but not joined.
  shutil.rmtree(workdir / 'retriever')
  shutil.rmtree(workdir / 'checkpoints/20')
  shutil.rmtree(workdir / 'documents/index-1/20')
  with pytest.raises(ValueError, match='no longer in') as caught:
    _add(workdir, {'id': 'd', 'text': 'Ben Green.'})
  for seed in (0, 1):  # Both sides.
    digest = checkpoint.params_digest(params[seed]['embedder'])
    assert digest[:16] in str(caught.value)


def test_compaction_takes_up_what_training_made_since(
    workdir, tmp_path, params, corpus, queries
):
  assert documents.compact(workdir, progress=False) is None
  _add(workdir, _A, _B)
  job.train(workdir, corpus, params[1], 20)
  ids, scores = job.find(workdir, queries)
  output = tmp_path / 'compacted'
  done = documents.compact(workdir, output, progress=False)
  assert (done.step, done.output) == (20, output)
  assert job.find(workdir, queries)[0] == ids
  assert job.open_documents(workdir).is_compacted
  # Superseded files stay for their readers until the next command.
  assert 'corpus-1' in _names(workdir)
  assert documents.compact(workdir, progress=False) is None
  assert 'corpus-1' not in _names(workdir)
  # After more training, the compacted corpus needs a new index.
  job.train(workdir, corpus, params[0], 30)
  with pytest.raises(FileNotFoundError, match='realm-jax index compact'):
    job.find(workdir, queries)
  done = documents.compact(workdir, progress=False)
  assert done.step == 30
  assert done.embedded == len(ids[0])
  assert sorted(job.find(workdir, queries)[0][0]) == sorted(ids[0])
  with pytest.raises(FileExistsError, match='compacted'):
    _add(workdir, {'id': 'c', 'text': 'Eva Green.'})
    documents.compact(workdir, output, progress=False)


def test_evaluate_inspect_and_export_see_the_documents(
    workdir, tmp_path, corpus
):
  gone = corpus.passage_text(3)['id']
  ids = tmp_path / 'ids.txt'
  ids.write_text(gone)
  documents.delete(workdir, ids)
  _add(workdir, _A, _B)
  questions = [
      questions_lib.Question(
          'Who lit the lamp of Bremen?', ['Ada Brown'], passage_id=name
      )
      for name in ('a', 'b', gone)
  ]
  (counted,) = evaluate.evaluate(workdir, questions, limit=8)
  assert counted['unknown_gold']['first'] == [gone]
  assert counted['questions']['all']['with_gold_passage'] == 3

  def evaluated() -> dict[str, Any]:
    (result,) = evaluate.evaluate(
        workdir, questions, limit=8, unknown_gold='skip'
    )
    return result

  result = evaluated()
  live = job.open_documents(workdir).corpus.num_live
  assert result['passages'] == live
  assert result['index_generation'] == 10
  assert result['documents']['version'] == 2
  assert result['questions']['all']['with_gold_passage'] == 2
  assert result['questions']['all']['gold']['recall_at_100'] == 1.0
  # Without the index it is embedded, and the same is found.
  os.rename(workdir / 'index', tmp_path / 'index')
  again = evaluated()
  assert again['index_generation'] is None
  assert again['questions'] == result['questions']
  os.rename(tmp_path / 'index', workdir / 'index')
  # Where the training corpus is now does not hide later documents.
  (plain,) = evaluate.evaluate(
      workdir, questions, limit=8, corpus=corpus.directory
  )
  assert plain['passages'] == live  # The training corpus, wherever it is.

  found = inspect.inspect(workdir, 'Ada Brown lit the [MASK].', live + 1)
  shown = {document.id for document in found.documents}
  assert {'a', 'b#0'} <= shown and gone not in shown

  export.run(workdir, 'index', tmp_path / 'out')
  lines = (tmp_path / 'out/ids.jsonl').read_text().splitlines()
  names = [json.loads(line) for line in lines]
  assert len(names) == live and {*names} == shown
  table = np.load(tmp_path / 'out/embeddings.npy')
  loaded = retriever.Retriever.load(workdir)
  emb = loaded.embed_passages([('A', _A['text'])])
  np.testing.assert_allclose(table[names.index('a')], emb[0], atol=2e-5)
  about = json.loads((tmp_path / 'out/index.json').read_text())
  assert about['rows'] == live and about['documents']['removed'] == 1


def test_the_commands_print_what_they_did(workdir, tmp_path, capsys):
  source = job.write(tmp_path / 'in.jsonl', [_A])
  for command in ('add', 'update', 'delete'):
    act = getattr(actions, command)
    act(workdir=str(workdir), input=source)
  printed = capsys.readouterr().out
  assert 'Passages added: 1, removed: 0; now' in printed
  assert 'Passages added: 1, removed: 1; now' in printed
  assert 'Passages added: 0, removed: 1; now' in printed
  assert 'Passages embedded: 1 by the parameters of step 10' in printed
  actions.compact(workdir=str(workdir), output=None, corpus=None)
  assert 'corpus-4: ' in capsys.readouterr().out
  actions.compact(workdir=str(workdir), output=None, corpus=None)
  assert capsys.readouterr().out == 'There is nothing to compact.\n'
