"""NaturalQuestions, WebQuestions and CuratedTREC after SQuAD, against BM25.

  python benchmarks/question_sets.py --corpus=corpus \
      --init_from=runs/squad_open/open_qa --output=results.json \
      nq=nq.jsonl webquestions=webquestions.jsonl curatedtrec=curatedtrec.jsonl

The models of benchmarks/squad_open.py continue with the questions of each
set, the passages' side frozen as published. The re-split of ORQA (`realm-jax
questions --split`) sets a tenth of each file aside for evaluation. The share of
those with an answer in the corpus is an upper bound. A finished training is not
run again.
"""

import argparse
import json
import pathlib

import harness
import squad_open

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import report
from realm_jax.qa import answers
from realm_jax.qa import question_sets
from realm_jax.runtime import files


def run(arguments: argparse.Namespace) -> harness.Figures:
  realm_jax = harness.Commands()
  figures: harness.Figures = {}
  for given in arguments.sets:
    name, _, source = given.partition('=')
    folder = arguments.workdir / name
    job, dev = folder / 'open_qa', str(folder / 'dev.jsonl')
    train = str(folder / 'train.jsonl')
    realm_jax(
        'questions', f'--source={source}', f'--output={folder}', '--split'
    )
    realm_jax.train(
        'squad_open.py:cpu',
        job,
        {
            'corpus': arguments.corpus,
            'init_from': arguments.init_from,
            'open_qa.questions': train,
            'open_qa.documents': 'frozen',
            'refresh.policy': 'none',
            'steps': arguments.steps,
            'checkpoint.interval': arguments.steps,
        },
        '--with_index_builder',
    )
    realm_jax('evaluate', f'--workdir={job}', f'--questions={dev}')
    bm25 = squad_open.bm25(arguments.corpus, dev)
    result = report.load_all(job)[-1]['questions']['all']
    figures[name] = {
        'trained_on': len(question_sets.read(train)),
        'seconds': files.read_json(job / 'summary.json')['seconds'],
        **_in_corpus(arguments.corpus, dev),
        **{k: x for k, x in bm25.items() if k.startswith('bm25_answer')},
        **{
            f'answer_recall_at_{k}': result['answer'][f'recall_at_{k}']
            for k in (1, 5, 20, 100)
        },
        **{
            key: result['open_qa'][key]
            for key in (
                'exact_match', 'exact_match_interval', 'f1', 'reader_oracle'
            )
            if key in result['open_qa']  # A pattern has no F1.
        },
    }
    print(json.dumps(figures[name], indent=2), flush=True)
  return figures | harness.about('jax') | {'commands': realm_jax.done}


def _in_corpus(directory: pathlib.Path, dev: str) -> harness.Figures:
  """The share of the questions that any passage could answer."""
  corpus = corpus_lib.Corpus.open(directory)
  text = '\n'.join(
      corpus.passage_text(row)['text'] for row in range(len(corpus.passages))
  )
  whole = f' {answers.normalize_answer(text)} '
  questions = question_sets.read(dev)
  found = [
      any(f' {answers.normalize_answer(a)} ' in whole for a in q.answers)
      for q in questions
      if q.match == 'string'
  ]
  figures: harness.Figures = {'questions': len(questions)}
  if found:
    figures['answer_anywhere'] = round(sum(found) / len(found), 4)
  return figures


def main() -> None:
  parser = harness.parser(__doc__, 'corpus', workdir='runs/question_sets')
  parser.add_argument('sets', nargs='+', help='NAME=FILE')
  parser.add_argument('--init_from', required=True)
  parser.add_argument('--steps', type=int, default=300)
  arguments = parser.parse_args()
  harness.write(arguments.output, run(arguments))


if __name__ == '__main__':
  main()
