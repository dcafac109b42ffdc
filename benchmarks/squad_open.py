"""SQuAD as open-domain questions, from scratch on a CPU, against BM25.

  python benchmarks/squad_open.py --corpus=corpus --train=train.jsonl \
      --dev=dev.jsonl --output=benchmarks/results/squad_open.json

Four stages (experiments/squad_open.py): warm-up of reader and retriever on the
corpus, of the retriever on questions with their paragraphs, then fine-tuning of
both, with a curve of recall and exact match. A finished stage is not run again;
its processor time is kept in its workdir. BM25 (k1 0.9, b 0.4, title and text,
English stop words, no stemming) is `realm_jax.index.bm25`, over the same
passages.
"""

import argparse
import functools
import os
import pathlib
from typing import Any

import harness

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics
from realm_jax.evaluation import report
from realm_jax.index import bm25 as bm25_lib
from realm_jax.qa import question_sets
from realm_jax.runtime import files

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_BM25_DEPTH = 100


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Trains unfinished stages, evaluates, and returns flat figures."""
  jobs = {
      name: arguments.workdir / name
      for name in ('mlm', 'ict', 'retriever', 'open_qa')
  }
  realm_jax = harness.Commands()
  figures: dict[str, Any] = {}

  def train(name: str, experiment: str, *more: str) -> None:
    small = []
    if arguments.small:
      small = ['--config.steps=20', '--config.checkpoint.interval=10']
    spent = jobs[name] / 'cpu_minutes.json'
    if not (jobs[name] / 'summary.json').exists():
      before = harness.cpu_seconds()
      realm_jax(
          'train',
          f'--config=experiments/{experiment}',
          f'--workdir={jobs[name]}',
          f'--config.corpus={arguments.corpus}',
          *more,
          *small,
      )
      files.write_json(spent, round((harness.cpu_seconds() - before) / 60, 2))
    figures[f'{name}_cpu_minutes'] = files.read_json(spent)
    summary = files.read_json(jobs[name] / 'summary.json')
    figures[f'{name}_steps'] = summary['step']
    figures[f'{name}_seconds'] = summary['seconds']

  train('mlm', 'small_corpus.py:mlm')
  train('ict', 'small_corpus.py:ict')
  train(
      'retriever',
      'squad_open.py:cpu_retriever',
      f'--config.init_from={jobs["ict"]}',
      f'--config.ict.questions={arguments.train}',
  )
  train(
      'open_qa',
      'squad_open.py:cpu',
      f'--config.init_from={jobs["mlm"]},{jobs["retriever"]}',
      f'--config.open_qa.questions={arguments.train}',
      '--with_index_builder',
      *(['--config.refresh.interval=10', '--config.refresh.lag=10']
        if arguments.small else []),
  )
  for name, steps in (('ict', 'latest'), ('retriever', 'latest'),
                      ('open_qa', 'all')):
    realm_jax(
        'evaluate', f'--workdir={jobs[name]}', f'--questions={arguments.dev}',
        f'--steps={steps}', '--limit=200' if arguments.small else '--read=5',
    )
  return {
      **harness.about('jax', 'bm25s'),
      'commands': realm_jax.done,
      **figures,
      **bm25(arguments.corpus, arguments.dev),
      **_curve(jobs),
  }


def bm25(directory: pathlib.Path, dev: str) -> dict[str, Any]:
  corpus = corpus_lib.Corpus.open(directory)
  questions = question_sets.read(dev)
  index = bm25_lib.Bm25.open(corpus)
  depth = min(_BM25_DEPTH, len(index))
  rows_BK, _ = index.search([q.question for q in questions], depth)
  names = [q.passage_id or '' for q in questions]
  gold = [[row] for row in corpus.passage_rows_by_id(names).tolist()]
  by_gold = metrics.gold_ranks(rows_BK, gold)
  by_answer = metrics.answer_ranks(
      rows_BK,
      [q.answers for q in questions],
      [q.match for q in questions],
      functools.cache(lambda row: corpus.passage_text(row)['text']),
  )
  figures: dict[str, Any] = {'passages': len(index), 'questions': len(names)}
  for kind, ranks in (('gold', by_gold), ('answer', by_answer)):
    summary = metrics.ranking(ranks, depth, len(index))
    for name, value in summary.items():
      figures[f'bm25_{kind}_{name}'] = value
  return figures


def _curve(jobs: dict[str, pathlib.Path]) -> dict[str, Any]:
  figures: dict[str, Any] = {}
  for name in ('ict', 'retriever'):
    found = report.load_all(jobs[name])[-1]['questions']['all']
    for kind in ('gold', 'answer'):
      for figure, value in found[kind].items():
        figures[f'{name}_{kind}_{figure}'] = value
  curve = [
      result for result in report.load_all(jobs['open_qa'])
      if 'open_qa' in result['questions']['all']
  ]
  last = curve[-1]['questions']['all']
  for kind in ('gold', 'answer', 'open_qa'):
    for figure, value in last[kind].items():
      figures[f'open_qa_{kind}_{figure}'] = value
  figures['curve_steps'] = [result['step'] for result in curve]
  for figure, kind, name in (
      ('curve_recall_at_20', 'gold', 'recall_at_20'),
      ('curve_recall_at_5', 'gold', 'recall_at_5'),
      ('curve_exact_match', 'open_qa', 'exact_match'),
  ):
    figures[figure] = [
        result['questions']['all'][kind][name] for result in curve
    ]
  return figures


def _plot(figures: dict[str, Any], path: pathlib.Path) -> None:
  figure, (recall, match) = harness.panels(2)
  depths = (1, 5, 20, 50, 100)
  for name, label in (
      ('bm25', 'BM25'),
      ('ict', 'ICT'),
      ('retriever', 'questions with their passages'),
      ('open_qa', 'fine-tuned'),
  ):
    known = [k for k in depths if f'{name}_gold_recall_at_{k}' in figures]
    recall.plot(
        known,
        [figures[f'{name}_gold_recall_at_{k}'] for k in known],
        marker='o',
        label=label,
    )
  recall.set(
      xlabel='k',
      title='gold passage among the first k',
      xscale='log',
      ylim=(0, 1),
  )
  for name, label in (
      ('curve_recall_at_20', 'recall@20'),
      ('curve_recall_at_5', 'recall@5'),
      ('curve_exact_match', 'exact match'),
  ):
    match.plot(figures['curve_steps'], figures[name], marker='o', label=label)
  match.set(xlabel='step of fine-tuning', title='over training', ylim=(0, None))
  for axis in (recall, match):
    axis.grid(alpha=0.3)
  harness.save(figure, path)


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--corpus', type=pathlib.Path, required=True)
  parser.add_argument('--train', required=True)
  parser.add_argument('--dev', required=True)
  parser.add_argument(
      '--workdir', type=pathlib.Path, default=pathlib.Path('runs/squad_open')
  )
  arguments = parser.parse_args()
  os.chdir(_ROOT)
  figures = run(arguments)
  harness.write(arguments.output, figures)
  _plot(figures, arguments.output)


if __name__ == '__main__':
  main()
