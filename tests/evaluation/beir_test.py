"""`evaluate --beir` and `--bm25`: figures, runs and refusals."""

import json
import shutil
import sys

import helpers
import numpy as np
import pytest
import retrieval_test

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import beir
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import report
from realm_jax.evaluation import runs
from realm_jax.index import bm25

ir_measures = pytest.importorskip('ir_measures')
pytest.importorskip('bm25s')

_LONG = ' '.join(f'Sentence {i} tells of the river Ems.' for i in range(6))
_DOCUMENTS = [
    {'_id': 'long', 'title': 'River', 'text': _LONG},
    {'_id': 'empty', 'title': 'Only a title', 'text': ''},
    {'_id': 'q2', 'title': 'Mill', 'text': 'The old mill burnt in 1901.'},
    {'_id': 'd#3', 'title': '', 'text': 'A dog\nslept in the mill.'},
    {'_id': '4', 'title': 'Ems', 'text': 'The Ems flows through Rheine.'},
]
_QUERIES = [
    {'_id': 'q1', 'text': 'Which river flows through Rheine?'},
    {'_id': 'q2', 'text': 'What burnt in 1901?'},
    {'_id': 'q 3', 'text': 'Where did the dog sleep?'},
    {'_id': 'q4', 'text': 'Nothing is relevant for this one?'},
    {'_id': 'q5', 'text': 'Not judged?'},
]
_QRELS = {
    'q1': {'long': 1, '4': 3, 'd#3': 0},
    'q2': {'q2': 1, 'd#3': 2},
    'q 3': {'d#3': 1, 'empty': 1},
    'q4': {'4': 0},
}


def _write(folder, qrels='test'):
  for name, records in (('corpus', _DOCUMENTS), ('queries', _QUERIES)):
    helpers.write_records(folder / f'{name}.jsonl', records)
  (folder / 'qrels').mkdir()
  lines = ['query-id\tcorpus-id\tscore']
  lines += [
      f'{query}\t{document}\t{grade}'
      for query, grades in _QRELS.items()
      for document, grade in grades.items()
  ]
  (folder / 'qrels' / f'{qrels}.tsv').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('beir')
  _write(path)
  return path


@pytest.fixture(scope='module')
def corpus(tmp_path_factory, folder):
  return helpers.prepare_corpus(
      str(folder / 'corpus.jsonl'),
      tmp_path_factory.mktemp('prepared') / 'corpus',
      max_wordpieces=24, spans='none',
  )


def _by_hand(ranked, grades):
  """nDCG@10, recall@100 and average precision of a list of documents."""
  gains = [max(grades.get(name, 0), 0) for name in ranked[:10]]
  ideal = sorted(grades.values(), reverse=True)[:10]
  dcg, best = (
      sum(gain / np.log2(i + 2) for i, gain in enumerate(some))
      for some in (gains, ideal)
  )
  relevant = {name for name, grade in grades.items() if grade > 0}
  hits, precisions = 0, []
  for i, name in enumerate(ranked, 1):
    if name in relevant:
      hits += 1
      precisions.append(hits / i)
  count = len(relevant) or 1
  found = len(relevant & {*ranked[:100]})
  return (dcg / best if best else 0, found / count, sum(precisions) / count)


def test_figures_are_those_by_hand(folder, corpus, tmp_path):
  opened = beir.Folder.open(folder, corpus, 24)
  assert [question.id for question in opened.questions] == ['q1', 'q2', 'q 3']
  assert opened.judged == _QRELS
  assert opened.documents == ['long', 'q2', 'd#3', '4']
  assert opened.without_passage == 1
  parts = np.flatnonzero(opened.document_N == 0)
  assert len(parts) >= 3 and opened.depth == len(corpus.passages)
  mill, dog, ems = (
      int(np.flatnonzero(opened.document_N == n)[0]) for n in (1, 2, 3)
  )
  retriever = np.array([
      # The best passage of the long document is the first, not the last.
      [parts[1], dog, parts[0], ems, parts[2]],
      [mill, ems, dog, parts[0], parts[1]],
      [ems, parts[0], mill, parts[2], -1],
  ])
  by_words = np.array([[ems, -1], [mill, dog], [-1, -1]])
  found = opened.measure(
      {
          'retriever': (retriever, 9.5 - np.arange(5) * np.ones((3, 1))),
          'bm25': (by_words, np.array([[7.0, 0], [2.0, 1.0], [0.0, 0.0]])),
      },
      np.array([0, 0, 1]),
      tmp_path / '9.beir',
  )
  ranked = {
      # The query q2 is a document, too, which is left out.
      'retriever': [
          ['long', 'd#3', '4'], ['4', 'd#3', 'long'], ['4', 'long', 'q2'], [],
      ],
      'bm25': [['4'], ['d#3'], [], []],
      # 4 is 3rd and 1st: 1/63 + 1/61, more than 1/61; d#3 2nd and 1st.
      'hybrid': [
          ['4', 'long', 'd#3'], ['d#3', '4', 'long'], ['4', 'long', 'q2'], [],
      ],
  }
  for name, lists in ranked.items():
    by_query = [
        _by_hand(documents, grades)
        for documents, grades in zip(lists, _QRELS.values(), strict=True)
    ]
    means = np.mean(by_query, axis=0)
    for figure, mean in zip(beir.FIGURES, means, strict=True):
      assert found['figures'][name][figure] == pytest.approx(mean), name
      assert len(found['figures'][name][f'{figure}_interval']) == 2
    path = tmp_path / found['runs'][name]
    lines = [line.split() for line in path.read_text().splitlines()]
    assert [line[2] for line in lines if line[0] == 'q1'] == lists[0]
    assert {line[0] for line in lines} <= {'q1', 'q2', 'q%203'}
  test = found['paired']['retriever_bm25']['recall_at_100']
  assert (test['questions'], test['clusters']) == (4, 3)
  assert test['difference'] == pytest.approx((1 - 0.5) / 4)
  assert (found['queries'], found['without_relevant']) == (4, 1)
  assert (found['documents'], found['without_passage']) == (4, 1)
  json.dumps(found)


def test_with_a_limit_the_first_queries_are_measured(folder, corpus):
  opened = beir.Folder.open(folder, corpus, 24, limit=2)
  assert [*opened.judged] == ['q1', 'q2'] and len(opened.questions) == 2


def test_a_corpus_of_something_else_is_refused(folder, corpus, tmp_path):
  shutil.copytree(folder, tmp_path / 'other')
  path = tmp_path / 'other' / 'corpus.jsonl'
  command = (
      rf'realm-jax prepare --source={path} --vocab={corpus.directory}'
      r' --max_wordpieces=24 --spans=none --output=CORPUS`, and give'
      r' --corpus=CORPUS'
  )

  def refused(documents, why):
    helpers.write_records(path, documents)
    with pytest.raises(ValueError, match=f'{why}.*{command}'):
      beir.Folder.open(tmp_path / 'other', corpus, 24)

  more = {'_id': 'new', 'title': '', 'text': 'Not in the corpus.'}
  refused([*_DOCUMENTS, more], "lacks 1 of the 5 documents of .* such as 'new'")
  refused(_DOCUMENTS[:-1], "1 passages that are of no document of .* as '4'")
  changed = [{**_DOCUMENTS[-1], 'text': 'Numbers are ids of many texts.'}]
  refused([*_DOCUMENTS[:-1], *changed], "passage '4' .* has another text")


def test_what_a_folder_lacks_is_named(folder, corpus, tmp_path, monkeypatch):
  shutil.copytree(folder, tmp_path / 'other')
  shutil.rmtree(tmp_path / 'other' / 'qrels')
  assert beir.is_folder(tmp_path / 'other')
  assert not beir.is_folder(corpus.directory)
  with pytest.raises(ValueError, match='has no qrels/SPLIT.tsv'):
    beir.Folder.open(tmp_path / 'other', corpus, 24)
  given = folder / 'qrels' / 'test.tsv'
  opened = beir.Folder.open(tmp_path / 'other', corpus, 24, given)
  assert opened.judged == _QRELS
  queries = tmp_path / 'other' / 'queries.jsonl'
  helpers.write_records(queries, [*_QUERIES, {**_QUERIES[1], 'text': 'Why?'}])
  with pytest.raises(ValueError, match="2 and 6 both have the id 'q2'"):
    beir.Folder.open(tmp_path / 'other', corpus, 24, given)
  monkeypatch.setitem(sys.modules, 'ir_measures', None)
  with pytest.raises(
      ImportError, match=r"\(ir_measures\): pip install 'realm_jax\[beir\]'"
  ):
    beir.Folder.open(folder, corpus, 24)


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory, world):
  """A workdir of a copy of the world, after `evaluate`, and the result."""
  path = tmp_path_factory.mktemp('evaluated')
  corpus = corpus_lib.Corpus.open(shutil.copytree(world, path / 'corpus'))
  config = retrieval_test._config(corpus, 'ict')
  workdir = retrieval_test._make_workdir(
      path / 'job', corpus, config, {3: retrieval_test._params(config)}
  )
  (result,) = evaluate.evaluate(
      workdir, limit=40, bm25=True, beir=path / 'written'
  )
  return workdir, corpus, result


def test_the_command(tmp_path, folder, corpus):
  """From a workdir of this corpus to the files and the report."""
  config = retrieval_test._config(corpus, 'ict')
  config.lengths.document = 24
  params = {0: retrieval_test._params(config)}
  workdir = retrieval_test._make_workdir(
      tmp_path / 'job', corpus, config, params
  )
  (result,) = evaluate.evaluate(workdir, beir=folder)
  found = result['beir']
  files = workdir / 'evaluation'
  qrels = [*ir_measures.read_trec_qrels('\n'.join(
      f'{query.replace(" ", "%20")} 0 {document} {grade}'
      for query, grades in _QRELS.items()
      for document, grade in grades.items()
  ))]
  for name, figures in found['figures'].items():
    run = [*ir_measures.read_trec_run(str(files / found['runs'][name]))]
    again = ir_measures.calc_aggregate(
        [ir_measures.parse_measure(m) for m in beir.FIGURES.values()],
        qrels, run,
    )
    for figure, measure in beir.FIGURES.items():
      assert figures[figure] == pytest.approx(
          again[ir_measures.parse_measure(measure)]
      ), name
  # All documents are in the run, each by its best passage.
  lines = (files / '0.beir.retriever.run').read_text().splitlines()
  assert len(lines) == 4 + 3 + 4
  # Gold passages are the parts of the documents.
  group = result['baselines']['bm25']['questions']['all']
  assert group['gold']['recall_at_5'] == 1
  assert result['unknown_gold']['first'] == ['empty']
  text = report.table([result])
  figures = found['figures']['bm25']
  low, high = (100 * bound for bound in figures['map_interval'])
  assert f'{100 * figures["map"]:.1f} ({low:.1f} to {high:.1f}) |' in text
  assert '| 0 | hybrid | retriever | map, BEIR |' in text
  assert 'BEIR has 4 documents and 1 without text' in text
  assert '1 of the 4 queries of test.tsv have no relevant document' in text


def test_bm25_and_hybrid_are_measured_like_the_retriever(evaluated):
  workdir, corpus, result = evaluated
  files = workdir / 'evaluation'
  records = {
      name: runs.read_questions(files / f'3{kind}.questions.jsonl')
      for name, kind in (
          ('retriever', ''), ('bm25', '.bm25'), ('hybrid', '.hybrid')
      )
  }
  index = bm25.Bm25.open(corpus)
  for i, one in enumerate(records['bm25'][:5]):
    rows, scores = (x[0] for x in index.search([one['question']], 20))
    assert [hit['id'] for hit in one['retrieved']] == [
        corpus.passage_text(row)['id'] for row in rows.tolist() if row >= 0
    ]
    assert one['retrieved'][0]['score'] == pytest.approx(scores[0], abs=1e-6)
    best = records['hybrid'][i]['retrieved'][0]
    ranks = [
        [hit['id'] for hit in records[name][i]['retrieved']].index(best['id'])
        if best['id'] in [h['id'] for h in records[name][i]['retrieved']]
        else None
        for name in ('retriever', 'bm25')
    ]
    if None not in ranks:
      assert best['score'] == pytest.approx(
          sum(1 / (61 + rank) for rank in ranks), abs=1e-6
      )
  found = result['baselines']
  for name in ('bm25', 'hybrid'):
    ranks = np.array([one['gold_rank'] for one in records[name]])
    for depth in (1, 5, 20):
      share = ((ranks > 0) & (ranks <= depth)).mean()
      gold = found[name]['questions']['all']['gold']
      assert gold[f'recall_at_{depth}'] == pytest.approx(share)
  for pair, tests in found['paired'].items():
    ours, theirs = pair.split('_')
    of = {
        name: np.mean([0 < r['answer_rank'] <= 5 for r in records[name]])
        for name in (ours, theirs)
    }
    test = tests['recall_at_5']
    assert test['difference'] == pytest.approx(of[ours] - of[theirs])
    assert test['clusters'] == result['questions']['all']['clusters']
    low, high = test['ours_interval']
    assert low <= test['ours'] <= high
  assert found['paired'].keys() == {f'{a}_{b}' for a, b in runs.PAIRS}
  # The files are what `compare` takes.
  again = runs.compare(
      files / '3.hybrid.questions.jsonl', files / '3.bm25.questions.jsonl'
  )
  assert again == found['paired']['hybrid_bm25']
  text = report.table([result])
  assert '| 3 | all, BM25 | 40 |' in text and '| 3 | all, hybrid |' in text
  assert '| 3 | retriever | BM25 | recall at 5 |' in text


def test_a_folder_that_exists_is_read_and_a_new_one_is_written(
    evaluated, tmp_path
):
  workdir, _, written = evaluated
  folder = workdir.parent / 'written'
  assert 'beir' not in written and beir.is_folder(folder)
  (read,) = evaluate.evaluate(workdir, beir=folder)
  gold, figures = written['questions']['all']['gold'], read['beir']['figures']
  assert read['questions']['all']['gold'] == gold
  # Two implementations of nDCG; with one gold passage MAP is MRR.
  retriever = figures['retriever']
  assert retriever['ndcg_at_10'] == pytest.approx(gold['ndcg_at_10'])
  assert retriever['recall_at_100'] == pytest.approx(gold['recall_at_100'])
  assert retriever['map'] == pytest.approx(gold['mrr'], abs=0.002)
  by_words = written['baselines']['bm25']['questions']['all']['gold']
  # trec_eval orders equal scores of BM25 by id, not by row.
  assert figures['bm25']['ndcg_at_10'] == pytest.approx(
      by_words['ndcg_at_10'], abs=0.03
  )
  with pytest.raises(ValueError, match='nowhere is no folder of BEIR'):
    evaluate.evaluate(workdir, [], beir=tmp_path / 'nowhere')
  with pytest.raises(ValueError, match='no questions, or no retriever'):
    evaluate.evaluate(workdir, [], bm25=True)
