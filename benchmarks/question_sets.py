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
from typing import Any

import harness
import squad_open

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import report
from realm_jax.qa import answers
from realm_jax.qa import question_sets
from realm_jax.runtime import files

_DEPTHS = (1, 5, 20, 100)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  realm_jax = harness.Commands()
  figures: dict[str, Any] = {}
  for given in arguments.sets:
    name, _, source = given.partition('=')
    folder = arguments.workdir / name
    realm_jax(
        'questions', f'--source={source}', f'--output={folder}', '--split'
    )
    job, dev = folder / 'open_qa', folder / 'dev.jsonl'
    if not (job / 'summary.json').exists():
      realm_jax(
          'train',
          '--config=experiments/squad_open.py:cpu',
          f'--workdir={job}',
          f'--config.corpus={arguments.corpus}',
          f'--config.init_from={arguments.init_from}',
          f'--config.open_qa.questions={folder / "train.jsonl"}',
          '--config.open_qa.documents=frozen',
          '--config.refresh.policy=none',
          f'--config.steps={arguments.steps}',
          f'--config.checkpoint.interval={arguments.steps}',
          '--with_index_builder',
      )
    realm_jax('evaluate', f'--workdir={job}', f'--questions={dev}')
    found = {
        'trained_on': len(question_sets.read(str(folder / 'train.jsonl'))),
        'seconds': files.read_json(job / 'summary.json')['seconds'],
        **_in_corpus(arguments.corpus, str(dev)),
        **{
            key: value
            for key, value in squad_open.bm25(
                arguments.corpus, str(dev)
            ).items()
            if key.startswith('bm25_answer')
        },
    }
    result = report.load_all(job)[-1]['questions']['all']
    for depth in _DEPTHS:
      key = f'recall_at_{depth}'
      found[f'answer_{key}'] = result['answer'][key]
    for key in ('exact_match', 'exact_match_interval', 'f1', 'reader_oracle'):
      if key in result['open_qa']:  # A pattern has no F1.
        found[key] = result['open_qa'][key]
    figures[name] = found
    print(json.dumps(found, indent=2), flush=True)
  return {
      **figures,
      **harness.about('jax'),
      'commands': realm_jax.done,
  }


def _in_corpus(directory: pathlib.Path, dev: str) -> dict[str, Any]:
  """The share of the questions that any passage could answer."""
  corpus = corpus_lib.Corpus.open(directory)
  text = '\n'.join(
      corpus.passage_text(row)['text'] for row in range(len(corpus.passages))
  )
  whole = f' {answers.normalize_answer(text)} '
  questions = question_sets.read(dev)
  strings = [q for q in questions if q.match == 'string']
  figures: dict[str, Any] = {'questions': len(questions)}
  if strings:
    figures['answer_anywhere'] = round(
        sum(
            any(f' {answers.normalize_answer(a)} ' in whole for a in q.answers)
            for q in strings
        ) / len(strings),
        4,
    )
  return figures


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('sets', nargs='+', help='NAME=FILE')
  parser.add_argument('--corpus', type=pathlib.Path, required=True)
  parser.add_argument('--init_from', required=True)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument(
      '--workdir', type=pathlib.Path, default=pathlib.Path('runs/question_sets')
  )
  arguments = parser.parse_args()
  harness.write(arguments.output, run(arguments))


if __name__ == '__main__':
  main()
