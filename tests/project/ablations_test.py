"""The table of ablations: what is run for each row, and its figures."""

import argparse
import importlib.util
import math
import pathlib
import sys

import pytest

from realm_jax.evaluation import report

pytest.importorskip('matplotlib')

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def ablations():
  sys.path.insert(0, str(_ROOT / 'benchmarks'))
  try:
    yield importlib.import_module('ablations')
  finally:
    sys.path.remove(str(_ROOT / 'benchmarks'))


@pytest.fixture
def table(ablations):
  return ablations.ablations_table


@pytest.fixture
def rows_of_experiment():
  path = _ROOT / 'experiments' / 'ablations.py'
  spec = importlib.util.spec_from_file_location('experiment', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _finish(workdir, row, seed, recall, accuracy=0.5):
  """Writes what a finished run leaves, as far as the table reads it."""
  folder = workdir / f'seed{seed}' / row
  folder.mkdir(parents=True)
  (folder / 'summary.json').write_text('{}')
  (folder / 'metrics.jsonl').write_text('{"step": 600}\n')
  result = {
      'step': 600,
      'passages': 1800,
      'questions': {'held_out': {'gold': {
          'recall_at_1': recall, 'recall_at_5': recall,
      }}},
      'masked': {
          'accuracy_with_retrieval': accuracy,
          'accuracy_without_retrieval': 0.1,
          'null_share': 0.0,
      },
  }
  report.save(folder, result)


def test_table_and_experiment_have_the_same_rows(
    ablations, table, rows_of_experiment
):
  stages = set(rows_of_experiment.STAGES)
  assert set(table.ROWS) - {'ict'} == set(rows_of_experiment.ROWS)
  for row in table.ROWS:
    assert set(ablations._start(row)) <= stages


def test_each_row_starts_from_stages_of_its_own_vocabulary(
    ablations, table, tmp_path
):
  commands = []
  arguments = argparse.Namespace(workdir=tmp_path, small=False)
  seed = ablations._Seed(
      arguments, 1, lambda *words, log: commands.append(words)
  )
  corpora = {}
  for row in table.ROWS:
    for name in (*ablations._start(row), row):
      seed.train_and_evaluate(name)
      words = commands[-1]
      assert words[0] == 'train' and '--config.seed=1' in words
      (corpus,) = [w for w in words if w.startswith('--config.corpus=')]
      corpora[name] = pathlib.Path(corpus.partition('=')[2]).name
      if name == row != 'ict':
        earlier = ','.join(
            str(tmp_path / 'seed1' / s) for s in ablations._start(row)
        )
        assert f'--config.init_from={earlier}' in words
  for row in table.ROWS:
    reader, retriever = ablations._start(row)
    assert corpora[reader] == corpora[retriever]
    divided = corpora[row] == 'pieces_corpus'
    assert divided == (corpora[reader] == 'pieces_corpus')


def test_rows_are_measured_on_the_same_passages(
    ablations, tmp_path, monkeypatch
):
  """Also those that are trained where everything that is said is a passage."""
  commands = []
  seed = ablations._Seed(
      argparse.Namespace(workdir=tmp_path, small=False),
      0,
      lambda *words, log: commands.append(words),
  )
  monkeypatch.setattr(ablations.checkpoint, 'steps_in', lambda path: [600])
  for row, corpus in (
      ('realm', 'corpus'), ('trivial', 'corpus'), ('token', 'pieces_corpus')
  ):
    seed.train_and_evaluate(row)
    folder = tmp_path / 'seed0' / corpus
    assert commands[-1][0] == 'evaluate'
    assert f'--corpus={folder}' in commands[-1]
    assert f'--questions={folder / "questions.jsonl"}' in commands[-1]


def test_corpora_are_prepared_once_and_only_if_needed(ablations, tmp_path):
  made = []

  def prepare(*words, log):
    folder = pathlib.Path(words[-1].removeprefix('--output='))
    folder.mkdir(parents=True)
    made.append((folder.name, words))

  arguments = argparse.Namespace(workdir=tmp_path, small=True)
  seed = ablations._Seed(arguments, 2, prepare)
  seed.prepare(['realm', 'ict'])
  assert [name for name, _ in made] == ['corpus']
  assert '--source=world:302:300' in made[0][1]
  seed.prepare(['trivial', 'token', 'pieces', 'own_corpus'])
  assert [name for name, _ in made[1:]] == ['joined_corpus', 'pieces_corpus']
  joined, pieces = (words for _, words in made[1:])
  assert f'--vocab={tmp_path / "seed2" / "corpus"}' in joined
  assert '--vocab_size=1000' in pieces and made[0][1][1] in pieces


def test_intervals_are_those_of_student(table, tmp_path):
  for seed, value in enumerate((0.4, 0.5, 0.6)):
    _finish(tmp_path, 'realm', seed, value)
    _finish(tmp_path, 'ict', seed, value / 10)
  figures = table.collect(tmp_path)
  assert figures['realm_seeds'] == [0, 1, 2]
  assert figures['realm_recall_at_1_mean'] == pytest.approx(0.5)
  # t of 2 degrees of freedom at 0.975 is 4.3027.
  low = 0.5 - 4.3027 * 0.1 / math.sqrt(3)
  assert figures['realm_recall_at_1_low'] == pytest.approx(low, abs=1e-4)
  assert figures['claim_recall_at_1_realm_above_ict'] is True
  difference = figures['ict_recall_at_1_below_realm_mean']
  assert difference == pytest.approx(0.45)
  text = table.markdown(figures)
  assert '| realm above ict | 0.450 ±0.224, **apart**' in text


def test_intervals_that_meet_prove_nothing(table, tmp_path):
  for seed, value in enumerate((0.2, 0.5, 0.8)):
    _finish(tmp_path, 'realm', seed, value)
    _finish(tmp_path, 'sync', seed, value)
    _finish(tmp_path, 'ict', seed, value / 2)
  figures = table.collect(tmp_path)
  assert figures['claim_recall_at_1_realm_above_ict'] is False
  assert figures['claim_recall_at_1_realm_like_sync'] is True


def test_recorded_rows_are_kept_where_there_are_no_runs(table, tmp_path):
  for name, recall in (('then', 0.3), ('now', 0.6)):
    for seed in range(2):
      _finish(tmp_path / name, 'realm', seed, recall)
  for seed in range(2):
    _finish(tmp_path / 'then', 'ict', seed, 0.1)
  then = table.collect(tmp_path / 'then')
  now = table.collect(tmp_path / 'now', then)
  assert now['ict_recall_at_1_mean'] == pytest.approx(0.1)
  assert now['realm_recall_at_1_mean'] == pytest.approx(0.6)
  assert now['ict_recall_at_1_below_realm_mean'] == pytest.approx(0.5)


def test_one_seed_has_no_intervals(table, tmp_path):
  _finish(tmp_path, 'realm', 0, 0.6)
  _finish(tmp_path, 'ict', 0, 0.1)
  figures = table.collect(tmp_path)
  assert figures['realm_recall_at_1_low'] is None
  assert not any(name.startswith('claim_') for name in figures)
  text = table.markdown(figures)
  assert '0.600 |' in text and 'apart' not in text
  table.plot(figures, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 10_000
