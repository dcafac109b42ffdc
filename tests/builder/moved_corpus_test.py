"""A corpus that has moved or is gone, and texts longer than a model reads."""

import logging
import shutil

import documents_workdir
import numpy as np
import pytest

from realm_jax.api import retriever
from realm_jax.builder import builder
from realm_jax.builder import documents
from realm_jax.builder import status
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import inspect
from realm_jax.interop import export
from realm_jax.prepare import prepare
from realm_jax.qa import question_table
from realm_jax.qa import questions as questions_lib

corpus, params = documents_workdir.corpus, documents_workdir.params

_QUESTIONS = [questions_lib.Question('who lit the lamp ?', ('Ada',))]


@pytest.fixture(scope='module')
def _made(tmp_path_factory, world, params):
  folder = tmp_path_factory.mktemp('moved')
  shutil.copytree(world, folder / 'old')
  opened = corpus_lib.Corpus.open(folder / 'old')
  documents_workdir.make_workdir(folder / 'job', opened, params[0])
  (folder / 'old').rename(folder / 'new')
  return folder


@pytest.fixture
def job(tmp_path, _made):
  return shutil.copytree(_made / 'job', tmp_path / 'job')


def _commands(job, corpus, folder):
  """Calls what opens a workdir with its corpus; corpus=None: where it was."""
  source = documents_workdir.write(
      folder / 'in.jsonl', [{'id': 'b', 'text': 'Wilma met a lion.'}]
  )
  ids = folder / 'ids.txt'
  ids.write_text('b\n')
  return [
      lambda: inspect.inspect(job, 'The lamp of [MASK].', corpus=corpus),
      lambda: export.run(job, 'index', folder / 'out', corpus=corpus),
      lambda: builder.build(job, corpus=corpus),
      lambda: retriever.Retriever.load(job, corpus=corpus).passage(0),
      lambda: evaluate.evaluate(job, _QUESTIONS, limit=1, corpus=corpus),
      lambda: documents.add(job, [source], progress=False, corpus=corpus),
      lambda: documents.delete(job, ids, corpus=corpus),
      lambda: documents.compact(job, progress=False, corpus=corpus),
  ]


def test_every_command_takes_the_new_folder(job, _made, tmp_path):
  for command in _commands(job, None, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=f'no corpus {_made}/old; if it has moved, give --corpus=FOLDER',
    ):
      command()
  (found,) = [f for f in status.verify(job) if f.path == job]
  assert 'give --corpus=FOLDER' in found.problems[0]
  assert not any(f.problems for f in status.verify(job, corpus=_made / 'new'))
  for command in _commands(job, _made / 'new', tmp_path):
    command()
  # Compacted documents do not need it any more.
  assert retriever.Retriever.load(job).passage(0)['text']


def test_documents_added_since_are_kept(job, _made, tmp_path):
  *_, add, _, _ = _commands(job, _made / 'new', tmp_path)
  live = add().live
  (result,) = evaluate.evaluate(
      job, _QUESTIONS, limit=1, corpus=_made / 'new'
  )
  assert result['passages'] == live
  assert result['documents']['added'] == 1


def test_another_corpus_is_refused(job, _made, tmp_path):
  prepare.prepare(
      ['world:4:20'], tmp_path / 'other', workers=1, progress=False,
      vocab=str(_made / 'new'),
  )
  ours = corpus_lib.Corpus.open(tmp_path / 'other').fingerprint[:16]
  theirs = corpus_lib.Corpus.open(_made / 'new').fingerprint[:16]
  commands = _commands(job, tmp_path / 'other', tmp_path)
  evaluated = commands.pop(4)
  for command in commands:
    with pytest.raises(ValueError, match=f'{ours}, that of the .* {theirs}'):
      command()
  (result,) = evaluated()  # It may search another one.
  assert result['corpus_fingerprint'][:16] == ours


def test_a_model_needs_no_corpus(job, _made, tmp_path, caplog):
  new = _made / 'new'
  texts, pairs = ['who lit the lamp'], [('Ada', 'She lit it.')]
  loaded = retriever.Retriever.load(job, corpus=new)
  expected = loaded.embed_queries(texts), loaded.embed_passages(pairs)
  hits = loaded.search(texts, 3)
  # A workdir of an older version has no tokenizer.
  with pytest.raises(FileNotFoundError, match='give --corpus=FOLDER'):
    retriever.Retriever.load(job)
  corpus_lib.Corpus.open(new).tokenizer.save(job, settings=True)
  loaded = retriever.Retriever.load(job)
  np.testing.assert_array_equal(loaded.embed_queries(texts), expected[0])
  np.testing.assert_array_equal(loaded.embed_passages(pairs), expected[1])
  np.testing.assert_array_equal(loaded.search(texts, 3).rows, hits.rows)
  assert 'passages have no text' in caplog.text
  with pytest.raises(FileNotFoundError, match='give --corpus=FOLDER'):
    loaded.passage(0)
  for format in ('huggingface', 'sentence-transformers'):
    export.run(job, format, tmp_path / format)
    assert (tmp_path / format / 'vocab.txt').is_file()
  (job / 'vocab.txt').write_text('[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n')
  with pytest.raises(ValueError, match='vocab.txt is not what the model was'):
    retriever.Retriever.load(job).embed_queries(texts)


# ------------------------------------------------------------------ truncation


def _warnings(caplog):
  return [
      record.message
      for record in caplog.records
      if record.levelno == logging.WARNING and 'not seen' in record.message
  ]


def test_the_message_counts_what_is_longer(caplog):
  assert cuts.warn('passages', np.array([9, 3, 8, 5]), 7, 'a limit')
  assert not cuts.warn('passages', np.array([7, 3]), 7, 'a limit')
  assert _warnings(caplog) == [
      '2 of 4 passages are longer than the 7 wordpieces of a limit; the longest'
      ' has 9; what is beyond is not seen.'
  ]


def test_questions_count_with_their_special_tokens(corpus, caplog):
  texts = ['the ' * n for n in (2, 3, 4, 9)]
  question_table.QuestionTable.of(
      [questions_lib.Question(text, ()) for text in texts], 5, corpus.tokenizer
  )
  assert _warnings(caplog) == [
      '2 of 4 questions are longer than the 5 wordpieces of'
      ' config.lengths.query; the longest has 11; what is beyond is not seen.'
  ]


def test_each_command_says_once_what_is_cut(
    tmp_path, world, params, caplog, monkeypatch
):
  opened = corpus_lib.Corpus.open(world)
  lengths = np.sort(opened.passages.lengths)
  make = documents_workdir.make_config

  def shorter(corpus):
    config = make(corpus)
    config.lengths.document = int(lengths[-1]) - 1
    return config

  monkeypatch.setattr(documents_workdir, 'make_config', shorter)
  longer = int((lengths == lengths[-1]).sum())
  are = 'is' if longer == 1 else 'are'
  expected = (
      f'{longer} of {len(lengths)} passages {are} longer than the'
      f' {lengths[-1] - 1} wordpieces of config.lengths.document; the longest'
      f' has {lengths[-1]}; what is beyond is not seen.'
  )
  job = documents_workdir.make_workdir(tmp_path / 'job', opened, params[0])
  assert _warnings(caplog) == [expected]  # The index builder's.
  inspected, exported, built, looked_up, evaluated, added, *_ = _commands(
      job, None, tmp_path
  )
  for command in (inspected, exported, built, evaluated):
    caplog.clear()
    command()
    assert _warnings(caplog) == [expected]
  caplog.clear()
  looked_up()
  added()  # None of the added ones is longer.
  assert not _warnings(caplog)


def test_the_retriever_says_once_what_is_cut(job, _made, caplog):
  loaded = retriever.Retriever.load(
      job, query_length=8, passage_length=16, corpus=_made / 'new'
  )
  for _ in range(2):
    loaded.embed_passages([('a', 'the ' * 40), ('', 'short')])
    loaded.embed_queries(['the ' * 30, 'the'])
  assert _warnings(caplog) == [
      '1 of 2 passages is longer than the 16 wordpieces of passage_length; the'
      ' longest has 44; what is beyond is not seen.',
      '1 of 2 queries is longer than the 8 wordpieces of query_length; the'
      ' longest has 32; what is beyond is not seen.',
  ]
