"""Statistics over questions, and results in other tools' formats."""

import csv
import dataclasses
import json
import urllib.parse

import numpy as np
import pytest

from realm_jax.evaluation import metrics
from realm_jax.evaluation import runs
from realm_jax.qa import question_sets
from realm_jax.qa import question_table
from realm_jax.qa import questions


def test_the_interval_is_that_of_theory():
  rng = np.random.default_rng(1)
  values = (rng.random(400) < 0.3).astype(float)
  low, high = metrics.interval(values)
  mean = values.mean()
  width = 1.96 * np.sqrt(mean * (1 - mean) / 400)
  assert low == pytest.approx(mean - width, abs=0.006)
  assert high == pytest.approx(mean + width, abs=0.006)
  assert metrics.interval(values) == (low, high)
  assert metrics.interval(np.ones(3)) == (1, 1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
  rng = np.random.default_rng(2)
  covered = 0
  for _ in range(100):
    low, high = metrics.interval(rng.normal(size=60))
    covered += low <= 0 <= high
  assert 88 <= covered <= 99


def test_the_interval_resamples_clusters():
  rng = np.random.default_rng(1)
  outcomes = (rng.random(100) < 0.3).astype(float)
  four_times = np.repeat(outcomes, 4)
  low, high = metrics.interval(four_times, np.repeat(np.arange(100), 4))
  # Four questions with one outcome say no more than one of them.
  assert (low, high) == pytest.approx(metrics.interval(outcomes))
  narrow_low, narrow_high = metrics.interval(four_times)
  assert 1.9 < (high - low) / (narrow_high - narrow_low) < 2.1
  # Names and order of the clusters do not count, and one for each is none.
  each = rng.permutation(400)
  assert metrics.interval(four_times, each) == pytest.approx(
      (narrow_low, narrow_high), abs=0.006
  )
  assert np.isnan(metrics.interval(four_times, np.zeros(400))).all()


def test_large_clusters_count_as_often_as_they_have_questions():
  rng = np.random.default_rng(3)
  cluster_B = np.repeat(np.arange(80), rng.integers(1, 9, 80))
  values_B = rng.random(80)[cluster_B] + rng.normal(size=len(cluster_B))
  # The same draws, but with the questions themselves put together.
  drawn = np.random.default_rng(0).integers(80, size=(2000, 80))
  members = [values_B[cluster_B == cluster] for cluster in range(80)]
  means = [np.concatenate([members[c] for c in row]).mean() for row in drawn]
  assert metrics.interval(values_B, cluster_B) == pytest.approx(
      tuple(np.quantile(means, (0.025, 0.975)))
  )


def test_equal_keys_are_one_cluster_and_none_is_its_own():
  keys = [7, None, 'a', 7, None, 'a', '7']
  assert metrics.clusters(keys).tolist() == [0, 1, 2, 0, 3, 2, 4]


@pytest.mark.parametrize(('size', 'p'), [(1, 2 / 2**8), (2, 2 / 2**4), (8, 1)])
def test_a_paired_test_tosses_for_clusters(size, p):
  """Eight questions better, in clusters of one, two or eight."""
  theirs = np.zeros(200)
  ours = theirs.copy()
  ours[:8] = 1
  found = metrics.paired_test(ours, theirs, np.arange(200) // size)
  assert found['p_value'] == pytest.approx(p, abs=0.01)
  assert (found['better'], found['clusters']) == (8, 200 // size)


def test_a_paired_test_sees_what_differs_only():
  theirs = np.array([0, 1] * 100)
  same = metrics.paired_test(theirs, theirs)
  assert same['p_value'] == 1 and same['difference'] == 0
  ours = theirs.copy()
  ours[:20:2] = 1  # Ten questions better, none worse: p = 2 / 2**10.
  better = metrics.paired_test(ours, theirs)
  assert better['better'] == 10 and better['worse'] == 0
  assert better['difference'] == pytest.approx(0.05)
  assert better['low'] > 0
  assert better['p_value'] == pytest.approx(2 / 2**10, abs=0.001)
  assert metrics.paired_test(theirs, ours)['p_value'] == better['p_value']


class _Corpus:
  """Three passages, one with a blank in its name."""

  passages, removed = range(4), np.array([3])

  def passage_text(self, row):
    name = ['A', 'B 1', 'C', 'A'][row]
    return {'id': name, 'title': 'T', 'text': f'text {row}'}


_RUN = runs.Run(
    questions=[
        questions.Question('one', ('x',), passage_id='B 1'),
        questions.Question('two', ('y',)),
    ],
    doc_ids_BK=np.array([[1, 0], [2, 1]]),
    score_BK=np.array([[2.5, 0.25], [1.0, 1.0]]),
    gold_rank_B=np.array([1, 0]),
    answer_rank_B=np.array([1, 2]),
)


def test_a_trec_run_has_six_columns(tmp_path):
  runs.write_trec(tmp_path / 'run.txt', _RUN, _Corpus())
  assert (tmp_path / 'run.txt').read_text().splitlines() == [
      '1 Q0 B%201 1 2.500000 realm_jax',
      '1 Q0 A 2 0.250000 realm_jax',
      '2 Q0 C 1 1.000000 realm_jax',
      '2 Q0 B%201 2 1.000000 realm_jax',
  ]


def test_a_beir_folder_goes_with_the_run(tmp_path):
  # A gold passage that was divided may have several parts.
  gold = question_table.Gold(
      [np.array([1, 2]), np.array([], int)],
      [np.array([1, 2]), np.array([], int)],
      [{}, {'lost': 1}],
  )
  runs.write_beir(tmp_path, _RUN.questions, gold, _Corpus())
  corpus = (tmp_path / 'corpus.jsonl').read_text().splitlines()
  assert [json.loads(line)['_id'] for line in corpus] == ['A', 'B 1', 'C']
  queries = (tmp_path / 'queries.jsonl').read_text().splitlines()
  assert json.loads(queries[1]) == {
      '_id': '2', 'text': 'two',
      'metadata': {'answers': ['y'], 'match': 'string'},
  }
  assert (tmp_path / 'qrels' / 'test.tsv').read_text() == (
      'query-id\tcorpus-id\tscore\n1\tB 1\t1\n1\tC\t2\n2\tlost\t1\n'
  )


def test_two_runs_are_compared_question_by_question(tmp_path):
  ours, theirs = tmp_path / 'ours.jsonl', tmp_path / 'theirs.jsonl'
  runs.write_questions(ours, _RUN, _Corpus())
  worse = dataclasses.replace(_RUN, answer_rank_B=np.array([0, 2]))
  runs.write_questions(theirs, worse, _Corpus())
  figures = runs.compare(ours, theirs)
  assert figures['recall_at_1']['ours'] == 0.5
  assert figures['recall_at_1']['theirs'] == 0
  assert figures['recall_at_5']['better'] == 1
  assert figures['reciprocal_rank']['difference'] == pytest.approx(0.5)
  assert figures['recall_at_1']['clusters'] == 2
  # Two questions of one article are tossed up together.
  one = dataclasses.replace(_RUN, cluster_B=np.array([5, 5]))
  runs.write_questions(ours, one, _Corpus())
  figures = runs.compare(ours, theirs)
  assert figures['recall_at_1']['clusters'] == 1
  assert '2 questions in 1 clusters' in runs.as_text(figures)
  # A single cluster has no interval, and JSON no nan.
  assert '| recall at 1 | 0.500 | 0.000 | +0.500 | 1.0000 |' in (
      runs.as_text(figures)
  )
  json.dumps(figures, allow_nan=False)
  # An older file has no clusters, but the gold passages.
  records = runs.read_questions(ours)
  for record in records:
    del record['cluster']
  ours.write_text(''.join(json.dumps(r) + '\n' for r in records))
  assert runs.compare(ours, theirs)['recall_at_1']['clusters'] == 2
  record = runs.read_questions(ours)[0]
  assert record['retrieved'][0] == {'id': 'B 1', 'score': 2.5}

  short = dataclasses.replace(
      _RUN, questions=_RUN.questions[:1], doc_ids_BK=_RUN.doc_ids_BK[:1]
  )
  runs.write_questions(theirs, short, _Corpus())
  with pytest.raises(ValueError, match='has 2 questions, .* 1: only runs'):
    runs.compare(ours, theirs)
  theirs.write_text('{"question": "one"}\n')
  with pytest.raises(ValueError, match='theirs.jsonl:1: not a line .*no field'):
    runs.compare(ours, theirs)


_IDS = [
    'a b', 'a_b', 'a  b', 'a%20b', 'a%2520b', '50%', '% 20', '%%41', 'tab\tx',
    'line\nend', 'quote"d', '"q"', "d'oc", 'no\u00a0break', '\u3000',
    'Zo\u00eb',
    'a,b', '#0', 'a/b?c=d&e', '\u200bzero', 'back\\slash', '100%ab', '%zz',
]


class _Names:
  """A corpus with a passage for each of the ids."""

  passages, removed = range(len(_IDS)), np.array([], int)

  def passage_text(self, row):
    return {'id': _IDS[row], 'title': '', 'text': f'text {row}'}


def _named_run():
  count = len(_IDS)
  return runs.Run(
      questions=[
          questions.Question(
              f'q {i}?', ('x', f'y{i}'), id=_IDS[i],
              passage_id=(_IDS[i - 1], _IDS[i]), grades=(1, 2),
          )
          for i in range(count)
      ],
      doc_ids_BK=np.stack([np.roll(np.arange(count), i) for i in range(count)]),
      score_BK=np.ones((count, count)),
      gold_rank_B=np.ones(count, int),
      answer_rank_B=np.ones(count, int),
  )


def test_ids_come_back_from_a_run_file(tmp_path):
  run = _named_run()
  runs.write_trec(tmp_path / 'run.txt', run, _Names())
  lines = [
      line.split()
      for line in (tmp_path / 'run.txt').read_text('utf-8').splitlines()
  ]
  assert {len(columns) for columns in lines} == {6}
  pairs = [tuple(map(urllib.parse.unquote, row[:3:2])) for row in lines]
  assert pairs == [
      (question.id, _IDS[row])
      for question, rows in zip(run.questions, run.doc_ids_BK, strict=True)
      for row in rows
  ]
  assert len({row[2] for row in lines}) == len(_IDS)
  # An id without blanks is as it was.
  assert [runs.escaped(name) for name in ('50%', '100%zz', 'a_b')] == [
      '50%', '100%zz', 'a_b'
  ]


def test_ids_gold_passages_and_answers_come_back_from_beir(tmp_path):
  run = _named_run()
  gold = question_table.Gold(
      [np.array([i - 1 if i else len(_IDS) - 1, i]) for i in range(len(_IDS))],
      [np.array([1, 2])] * len(_IDS),
      [{}] * len(_IDS),
  )
  runs.write_beir(tmp_path, run.questions, gold, _Names())
  lines = (tmp_path / 'corpus.jsonl').read_text('utf-8').split('\n')[:-1]
  assert [json.loads(line)['_id'] for line in lines] == _IDS
  # As the loader of BEIR reads it.
  with open(tmp_path / 'qrels' / 'test.tsv', encoding='utf-8') as file:
    rows = list(csv.reader(file, delimiter='\t', quoting=csv.QUOTE_MINIMAL))
  assert {(row[0], row[1]): int(row[2]) for row in rows[1:]} == {
      (question.id, name): grade
      for question in run.questions
      for name, grade in question.gold.items()
  }
  assert question_sets.read(tmp_path) == run.questions


def test_two_questions_of_one_name_are_refused():
  asked = [questions.Question('a', (), id='2'), questions.Question('b', ())]
  with pytest.raises(ValueError, match="1 and 2 both have the id '2'"):
    runs.query_names(asked)
  assert runs.query_names(asked[:1]) == ['2']


def test_runs_without_answers_are_compared_by_gold_passages(tmp_path, caplog):
  asked = [questions.Question(q, (), passage_id='A') for q in ('one', 'two')]
  run = dataclasses.replace(
      _RUN, questions=asked, gold_rank_B=np.array([1, 2]), rules=['dpr', 'dpr']
  )
  worse = dataclasses.replace(
      run, gold_rank_B=np.array([0, 2]), rules=['squad', 'squad']
  )
  for name, one in (('a', run), ('b', worse)):
    runs.write_questions(tmp_path / name, one, _Corpus())
  figures = runs.compare(tmp_path / 'a', tmp_path / 'b')
  assert figures['gold_recall_at_1']['ours'] == 0.5
  assert figures['gold_recall_at_1']['theirs'] == 0
  assert 'by the rule dpr in' in caplog.text and 'squad' in caplog.text
