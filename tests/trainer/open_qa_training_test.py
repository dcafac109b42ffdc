"""Fine-tuning on questions: labels, what is frozen, resuming, answering."""

import dataclasses
import functools
import json

import helpers
import initial_test
import numpy as np
import pytest
import training_test

import realm_jax
from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import runs
from realm_jax.models import components as components_lib
from realm_jax.prepare import prepare
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_sets
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import checkpoint
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import loop
from realm_jax.trainer.stages import ict


def make_config(world, **values):
  values = {
      'open_qa__questions': str(world / 'questions.jsonl'),
      'open_qa__retrieved': 12,
      'open_qa__read': 3,
      'refresh__policy': 'none',
      **values,
  }
  return training_test.make_config(world, 'open_qa', **values)


@pytest.fixture(scope='module')
def realm(world, tmp_path_factory):
  """A workdir to begin with."""
  workdir = tmp_path_factory.mktemp('realm')
  initial_test.make_source(workdir, world, 0, 'embedder', 'reader')
  corpus_lib.Corpus.open(world).tokenizer.save(workdir, settings=True)
  return workdir


@pytest.fixture(scope='module')
def trained(world, realm, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('open_qa')
  config = make_config(world, init_from=str(realm))
  return training_test.run(config, workdir), workdir


def test_the_reader_begins_with_that_of_masks(world, realm, tmp_path):
  ours, _ = initial_test.begin(tmp_path / 'job', world, 'open_qa', [realm])
  model = config_of(tmp_path / 'job').model
  theirs, _ = checkpoint.load_params(
      realm, {'reader': components_lib.make('reader', model).abstract}
  )
  name = 'bert.layers.0.query.kernel'
  np.testing.assert_array_equal(
      ours['span_reader'][name], theirs['reader'][name]
  )
  assert 'output.kernel' in ours['span_reader']


def config_of(workdir):
  return config_lib.read(workdir)


def test_frozen_documents_keep_the_index_they_were_trained_with(trained):
  summary, workdir = trained
  assert summary['step'] == training_test._STEPS
  assert summary['index_generation'] == 0
  assert checkpoint.steps_in(workdir / 'index') == [0]
  # The question tower has moved on all the same.
  about = checkpoint.saved_about(workdir, summary['step'])
  manifest = json.loads((workdir / 'index/0/manifest.json').read_text())
  params, _ = checkpoint.load_params(
      workdir,
      {
          'embedder': components_lib.make(
              'embedder', config_of(workdir).model
          ).abstract
      },
  )
  assert about['index_generation'] == 0
  assert (
      checkpoint.params_digest(params['embedder'])
      != manifest['params_digest']
  )
  # The public search uses it, with the questions of now.
  hits = realm_jax.Retriever.load(workdir).search(['Who?'], k=3)
  assert hits.rows.shape == (1, 3)


def test_killed_and_resumed_is_the_same_bit_for_bit(
    world, realm, trained, tmp_path, monkeypatch
):
  summary, _ = trained
  config = make_config(world, init_from=str(realm))
  original = loop._Loop._refresh

  def refresh(self, step):
    original(self, step)
    if step == 7:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', refresh)
    with pytest.raises(KeyboardInterrupt):
      training_test.run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints')[-1] == 5
  again = training_test.run(config, tmp_path)
  assert again['params_sha256'] == summary['params_sha256']


def test_documents_that_learn_are_refreshed(world, realm, tmp_path):
  config = make_config(
      world,
      init_from=str(realm),
      open_qa__documents='trained',
      open_qa__rerank=6,
      open_qa__title=True,
      open_qa__normalization='passage',
      refresh__policy='sync',
  )
  summary = training_test.run(config, tmp_path)
  assert summary['index_generation'] == 8
  assert summary['compilations'] == 1


def test_held_out_questions_are_not_trained_on(world, caplog):
  corpus = corpus_lib.Corpus.open(world)
  table = question_table_lib.QuestionTable.read(
      str(world / 'questions.jsonl'), 24, corpus.tokenizer
  )
  everything = question_sets.read(world / 'questions.jsonl')
  assert 0 < len(table) < len(everything)
  assert not any(question.held_out for question in table.questions)


def test_questions_without_answers_are_left_out_and_said_so(
    world, tmp_path, caplog
):
  tokenizer = corpus_lib.Corpus.open(world).tokenizer
  path = tmp_path / 'q.jsonl'
  path.write_text(
      '{"question": "who", "answers": ["x"]}\n{"question": "why"}\n'
  )
  read = functools.partial(
      question_table_lib.QuestionTable.read, str(path), 24, tokenizer
  )
  assert [q.question for q in read(answered=True).questions] == ['who']
  assert '1 of the 2 questions have no answer and are not trained on' in (
      caplog.text
  )
  assert len(read()) == 2
  path.write_text('{"question": "why"}\n')
  with pytest.raises(ValueError, match='has an answer to train on'):
    read(answered=True)


def test_long_questions_are_cut_and_said_so(world, caplog):
  tokenizer = corpus_lib.Corpus.open(world).tokenizer
  table = question_table_lib.QuestionTable.of(
      [
          questions_lib.Question('what ' * 9, ('x',)),
          questions_lib.Question('who', ('x',)),
      ],
      8,
      tokenizer,
  )
  assert table.query_lengths_N.tolist()[0] == 8
  assert table.query_ids_NQ[0, -1] == tokenizer.sep_id
  assert '1 of 2 questions is longer than the 8' in caplog.text


def test_an_answer_is_a_part_of_its_passage(trained, world):
  _, workdir = trained
  loaded = realm_jax.OpenQA.load(workdir)
  question = question_sets.read(world / 'questions.jsonl')[0].question
  answer = loaded.answer(question, k=2)
  assert answer.question == question
  assert len(answer.passages) == 2
  for passage in answer.passages:
    part = passage.text.encode()[passage.start : passage.limit].decode()
    assert part == passage.answer
  assert answer.text == answer.passages[answer.best].answer
  assert sum(p.probability for p in answer.passages) == pytest.approx(1)
  assert [a.text for a in loaded.answer([question] * 3, k=2)] == [
      answer.text
  ] * 3
  assert loaded.index_generation == 0
  with pytest.raises(ValueError, match='k=0: must be between 1'):
    loaded.answer(question, k=0)
  with pytest.raises(ValueError, match='none that is empty'):
    loaded.answer(' ')


def test_evaluation_of_answers(trained, world, tmp_path):
  _, workdir = trained
  (result,) = evaluate.evaluate(
      workdir, limit=40, run_file=tmp_path / 'run.txt', beir=tmp_path / 'beir'
  )
  figures = result['questions']['all']['open_qa']
  assert 0 <= figures['exact_match'] <= figures['reader_oracle'] <= 1
  low, high = figures['exact_match_interval']
  assert low <= figures['exact_match'] <= high
  shares = [
      figures[name]
      for name in ('exact_match', 'not_retrieved', 'not_read', 'misread')
  ]
  assert sum(shares) == pytest.approx(1)
  path = workdir / 'evaluation' / f'{result["step"]}.questions.jsonl'
  records = runs.read_questions(path)
  assert np.mean([r['exact_match'] for r in records]) == pytest.approx(
      figures['exact_match']
  )
  assert runs.compare(path, path)['exact_match']['p_value'] == 1
  lines = (tmp_path / 'run.txt').read_text().splitlines()
  assert len(lines) == 40 * min(100, result['passages'])
  scores = [float(line.split()[4]) for line in lines[:20]]
  assert scores == sorted(scores, reverse=True)


def test_all_steps_can_be_evaluated(trained):
  """Step 0 has a snapshot only."""
  _, workdir = trained
  results = evaluate.evaluate(workdir, limit=4, steps='all')
  assert [r['step'] for r in results] == [0, 5, 10, training_test._STEPS]
  assert {r['index_generation'] for r in results} == {0}


def test_what_is_wrong_is_said_before_any_work(world, realm, tmp_path):
  with pytest.raises(ValueError, match='open_qa.questions.*give the file'):
    training_test.run(make_config(world, open_qa__questions=''), tmp_path)
  with pytest.raises(ValueError, match="refresh.policy='sync'.*'frozen'"):
    training_test.run(make_config(world, refresh__policy='sync'), tmp_path)
  with pytest.raises(ValueError, match='open_qa.read=13.*retrieved \\(12\\)'):
    training_test.run(make_config(world, open_qa__read=13), tmp_path)
  with pytest.raises(ValueError, match='cannot answer questions'):
    realm_jax.OpenQA.load(realm)


def test_questions_with_their_passages_warm_the_retriever_up(world, tmp_path):
  config = training_test.make_config(
      world, 'ict', ict__questions=str(world / 'questions.jsonl')
  )
  corpus = corpus_lib.Corpus.open(world)
  table = question_table_lib.QuestionTable.read(
      config.ict.questions, config.lengths.query, corpus.tokenizer
  )
  batch = next(helpers.batches(corpus, config_lib.resolve(config)))
  rows = corpus.passage_rows_by_id(
      [table.questions[row].passage_id for row in batch.row_B]
  )
  template = inputs.Template.of(config.model, config.lengths, corpus.tokenizer)
  ids, _ = template.documents(corpus.passages, rows)
  np.testing.assert_array_equal(batch.inputs.doc_ids_BS, ids)
  assert training_test.run(config, tmp_path)['step'] == training_test._STEPS
  foreign = dataclasses.replace(
      table,
      questions=[
          dataclasses.replace(question, passage_id='nowhere')
          for question in table.questions
      ],
  )
  with pytest.raises(ValueError, match='None of the .* questions'):
    ict.QuestionPairs(corpus, config, foreign)


def test_questions_without_a_known_passage_are_said_to_be_left_out(
    world, caplog
):
  corpus = corpus_lib.Corpus.open(world)
  there = corpus.passage_text(3)['id']
  table = question_table_lib.QuestionTable.of(
      [
          questions_lib.Question('who', (), passage_id=gold)
          for gold in (None, 'lost', (there, 'gone'))
      ],
      24,
      corpus.tokenizer,
  )
  pairs = ict.QuestionPairs(corpus, config_lib.Config(), table)
  assert [pairs[i] for i in range(len(pairs))] == [2]
  assert pairs.sample(2, np.random.default_rng(0)).passage_B == 3
  assert "'lost', 'gone'. They are not trained on." in caplog.text
  assert '1 of the 3 questions of config.ict.questions have no' in caplog.text


@pytest.fixture(scope='module')
def divided(tmp_path_factory):
  """Long records whose first part answers nothing; and questions of each."""
  tmp_path = tmp_path_factory.mktemp('divided')
  filler = 'In 1912 nobody lived here. ' * 6
  records, questions = [], []
  for i in range(8):
    name, answer = f'record {i}', f'Ann {i} Brown'
    # In two of the parts; the question `nowhere` is answered by none.
    text = f'{filler}Here sang {answer}. {filler}Here died {answer}. {filler}'
    records.append({'id': name, 'text': text})
    for asked, answers_ in (('sang', [answer]), ('nowhere', ['Zeppelin'])):
      questions.append(
          {
              'question': f'Who {asked} in {i}?',
              'answers': answers_,
              'passage_id': name,
          }
      )
  for name, rows in (('in', records), ('questions', questions)):
    lines = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path / f'{name}.jsonl').write_text(lines)
  prepare.prepare(
      [str(tmp_path / 'in.jsonl')], tmp_path / 'corpus', vocab_size=200,
      max_wordpieces=36, workers=1, progress=False,
  )
  return tmp_path


def test_a_question_is_paired_with_the_parts_that_answer_it(
    divided, tmp_path
):
  config = training_test.make_config(
      divided / 'corpus', 'ict',
      ict__questions=str(divided / 'questions.jsonl'),
  )
  job = job_lib.open_job(config, tmp_path)
  corpus, table = job.corpus, job.stage._questions
  records = corpus.record_rows([q.passage_id for q in table.questions])
  assert min(map(len, records)) >= 4
  bodies = {
      corpus.passages.title_and_body(row)[1].tobytes(): row
      for row in range(len(corpus.passages))
  }
  texts = [
      corpus.passage_text(row)['text'] for row in range(len(corpus.passages))
  ]

  def pairs(count, **arguments):
    """Question and passage, the latter by its wordpieces."""
    stream = examples_lib.training_batches(job.stage, **arguments)
    for _ in range(count):
      batch = next(stream)
      for question, ids, types in zip(
          batch.row_B, batch.inputs.doc_ids_BS, batch.inputs.doc_types_BS,
          strict=True,
      ):
        body = ids[types == 1][:-1].astype(corpus.passages.tokens.dtype)
        yield int(question), texts[bodies[body.tobytes()]]

  drawn = list(pairs(100))
  for number, question in enumerate(table.questions):
    seen = {text for asked, text in drawn if asked == number}
    own = [texts[row] for row in records[number]]
    holding = {
        text for text in own if answers_lib.has_answer(text, question.answers)
    }
    # Each part that answers is drawn; where none does, each part.
    assert seen == (holding or set(own))
    assert len(holding) == (2 if 'sang' in question.question else 0)
  # The same draws from a later batch on, and for some rows of each batch.
  assert list(pairs(2, start=3)) == drawn[24:40]
  assert list(pairs(3, rows=np.array([1, 6]))) == [
      drawn[8 * batch + row] for batch in range(3) for row in (1, 6)
  ]
