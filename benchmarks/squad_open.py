"""SQuAD as open-domain questions, from scratch on a CPU, against BM25.

  python benchmarks/squad_open.py --corpus=corpus --train=train.jsonl \
      --dev=dev.jsonl --output=benchmarks/results/squad_open.json [--small]

Four stages (experiments/squad_open.py): warm-up of reader and retriever on the
corpus, of the retriever on questions with their paragraphs, then fine-tuning of
both, with a curve of recall and exact match. A finished stage is not run again;
its processor time is kept in its workdir. BM25 (k1 0.9, b 0.4, title and text,
English stop words, no stemming) is `realm_jax.index.bm25`, over the same
passages.
"""

import argparse
import functools
import pathlib

import harness

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics
from realm_jax.evaluation import report
from realm_jax.index import bm25 as bm25_lib
from realm_jax.qa import question_sets
from realm_jax.runtime import files

_BM25_DEPTH = 100
_CURVES = {  # Figure -> label, and its place in an evaluation.
    'curve_recall_at_20': ('recall@20', 'gold', 'recall_at_20'),
    'curve_recall_at_5': ('recall@5', 'gold', 'recall_at_5'),
    'curve_exact_match': ('exact match', 'open_qa', 'exact_match'),
}


def run(arguments: argparse.Namespace) -> harness.Figures:
  """Trains unfinished stages, evaluates, and returns flat figures."""
  names = ('mlm', 'ict', 'retriever', 'open_qa')
  mlm, ict, retriever, open_qa = (arguments.workdir / name for name in names)
  realm_jax = harness.Commands()
  figures: harness.Figures = {}
  small = arguments.small
  every = {'corpus': arguments.corpus}
  if small:
    every |= {'steps': 20, 'checkpoint.interval': 10}
  for job, experiment, settings, more in (
      (mlm, 'small_corpus.py:mlm', {}, ()),
      (ict, 'small_corpus.py:ict', {}, ()),
      (
          retriever,
          'squad_open.py:cpu_retriever',
          {'init_from': ict, 'ict.questions': arguments.train},
          (),
      ),
      (
          open_qa,
          'squad_open.py:cpu',
          {
              'init_from': f'{mlm},{retriever}',
              'open_qa.questions': arguments.train,
              **({'refresh.interval': 10, 'refresh.lag': 10} if small else {}),
          },
          ('--with_index_builder',),
      ),
  ):
    before, spent = harness.cpu_seconds(), job / 'cpu_minutes.json'
    realm_jax.train(experiment, job, every | settings, *more)
    if not spent.exists():
      files.write_json(spent, round((harness.cpu_seconds() - before) / 60, 2))
    summary = files.read_json(job / 'summary.json')
    figures |= {
        f'{job.name}_cpu_minutes': files.read_json(spent),
        f'{job.name}_steps': summary['step'],
        f'{job.name}_seconds': summary['seconds'],
    }
  for job, steps in ((ict, 'latest'), (retriever, 'latest'), (open_qa, 'all')):
    realm_jax(
        'evaluate', f'--workdir={job}', f'--questions={arguments.dev}',
        f'--steps={steps}', '--limit=200' if small else '--read=5',
    )
  figures |= bm25(arguments.corpus, arguments.dev)
  curve = [
      (result['step'], result['questions']['all'])
      for result in report.load_all(open_qa)
      if 'open_qa' in result['questions']['all']
  ]
  for job, found in (
      (ict, report.load_all(ict)[-1]['questions']['all']),
      (retriever, report.load_all(retriever)[-1]['questions']['all']),
      (open_qa, curve[-1][1]),
  ):
    for kind in ('gold', 'answer', 'open_qa'):
      if kind == 'open_qa' and job != open_qa:
        continue
      for figure, value in found[kind].items():
        figures[f'{job.name}_{kind}_{figure}'] = value
  figures['curve_steps'] = [step for step, _ in curve]
  for name, (_, kind, figure) in _CURVES.items():
    figures[name] = [found[kind][figure] for _, found in curve]
  return harness.about('jax', 'bm25s') | {'commands': realm_jax.done} | figures


def bm25(directory: pathlib.Path, dev: str) -> harness.Figures:
  """Returns flat figures of BM25, by gold passage and by answer."""
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
  figures: harness.Figures = {
      'passages': len(index), 'questions': len(names)
  }
  for kind, ranks in (('gold', by_gold), ('answer', by_answer)):
    for name, value in metrics.ranking(ranks, depth, len(index)).items():
      figures[f'bm25_{kind}_{name}'] = value
  return figures


def _plot(figures: harness.Figures, path: pathlib.Path) -> None:
  figure, (recall, match) = harness.panels(2)
  for name, label in (
      ('bm25', 'BM25'),
      ('ict', 'ICT'),
      ('retriever', 'questions with their passages'),
      ('open_qa', 'fine-tuned'),
  ):
    known = [
        (k, figures[f'{name}_gold_recall_at_{k}'])
        for k in (1, 5, 20, 50, 100)
        if f'{name}_gold_recall_at_{k}' in figures
    ]
    recall.plot(*zip(*known, strict=True), 'o-', label=label)
  recall.set(
      xlabel='k', title='gold passage among the first k', xscale='log',
      ylim=(0, 1),
  )
  for name, (label, *_) in _CURVES.items():
    match.plot(figures['curve_steps'], figures[name], 'o-', label=label)
  match.set(xlabel='step of fine-tuning', title='over training', ylim=(0, None))
  harness.save(figure, path)


def main() -> None:
  parser = harness.parser(__doc__, 'corpus', workdir='runs/squad_open')
  parser.add_argument('--train', required=True)
  parser.add_argument('--dev', required=True)
  arguments = parser.parse_args()
  figures = run(arguments)
  harness.write(arguments.output, figures)
  _plot(figures, arguments.output)


if __name__ == '__main__':
  main()
