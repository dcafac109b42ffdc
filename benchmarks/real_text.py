"""ICT and REALM on real text: cost, and improvement of retrieval.

  python benchmarks/real_text.py --corpus=CORPUS --questions=DEV.jsonl.xz \
      --workdir=runs/real_text --output=benchmarks/results/real_text.json

CORPUS is made by `realm-jax prepare`; the recorded run has the 18,896
paragraphs of SQuAD 1.1 train as passages, the sentences of 26,651 articles of
the English Wikipedia to learn from, and the questions of every 22nd article,
none of which training sees. The stages are those of
experiments/small_corpus.py; `--small` shortens them to a check of the script,
and `--flag=STAGE:FLAG`, repeated, changes a stage:
--flag=mlm:--config.steps=8000. A finished stage is not run again.
"""

import argparse
import pathlib
import shutil
import statistics
from typing import Any

import harness

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import report
from realm_jax.index import generation
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import metrics as metrics_lib

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_EXPERIMENT = _ROOT / 'experiments' / 'small_corpus.py'
STAGES = ('mlm', 'ict', 'realm')


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Trains the three stages, evaluates them, and returns flat figures."""
  realm_jax = harness.Commands()
  figures: dict[str, Any] = {}

  for stage in STAGES:
    more = ['--config.steps=20', '--config.refresh.interval=10',
            '--config.refresh.lag=10'] if arguments.small else []
    if stage == 'realm':
      earlier = ','.join(str(arguments.workdir / s) for s in ('mlm', 'ict'))
      more += [f'--config.init_from={earlier}', '--with_index_builder']
    more += [
        flag
        for of_stage, _, flag in (f.partition(':') for f in arguments.flag)
        if of_stage == stage
    ]
    spent = arguments.workdir / stage / 'spent.json'
    if not spent.exists():
      cpu = harness.cpu_seconds()
      seconds, _ = harness.timed(
          realm_jax,
          'train',
          f'--config={_EXPERIMENT.relative_to(_ROOT)}:{stage}',
          f'--workdir={arguments.workdir / stage}',
          f'--config.corpus={arguments.corpus}',
          *more,
      )
      minutes = (harness.cpu_seconds() - cpu) / 60
      files.write_json(spent, {'seconds': seconds, 'cpu_minutes': minutes})
    for name, value in files.read_json(spent).items():
      figures[f'{stage}_{name}'] = value
  for stage, steps in (('ict', 'latest'), ('realm', 'all')):
    realm_jax(
        'evaluate',
        f'--workdir={arguments.workdir / stage}',
        f'--questions={arguments.questions}',
        f'--steps={steps}',
    )
  return {
      **harness.about('jax', 'flax'),
      'commands': realm_jax.done,
      **_corpus_figures(arguments.corpus),
      **figures,
      **_training_figures(arguments.workdir),
      **_retrieval_figures(arguments.workdir),
  }


def _corpus_figures(directory: pathlib.Path) -> dict[str, Any]:
  corpus = corpus_lib.Corpus.open(directory)
  return {
      'passages': len(corpus.passages),
      'passage_wordpieces': int(corpus.passages.lengths.sum()),
      **{
          f'{name}_sentences': len(table)
          for name, table in corpus.sentences.items()
      },
  }


def _training_figures(workdir: pathlib.Path) -> dict[str, Any]:
  figures: dict[str, Any] = {}
  for stage in STAGES:
    config = files.read_json(workdir / stage / 'config.json')
    lengths, k = config['lengths'], config['num_candidates']
    query, document = lengths['query'], lengths['document']
    # The static shapes of one example, padding included.
    wordpieces = {
        'mlm': query + document,
        'ict': query + document,
        'realm': query + (k - 1) * document + k * (query + document),
    }[stage]
    lines = metrics_lib.read_metrics(workdir / stage)
    rate = statistics.median(x['time/examples_per_second'] for x in lines)
    figures |= {
        f'{stage}_steps': lines[-1]['step'],
        f'{stage}_examples_per_second': rate,
        f'{stage}_wordpieces_per_second': round(rate * wordpieces),
        f'{stage}_first_loss': _mean_loss(lines[:5]),
        f'{stage}_last_loss': _mean_loss(lines[-5:]),
    }
  lines = metrics_lib.read_metrics(workdir / 'realm')
  manifests = [
      generation.read_manifest(workdir / 'realm' / 'index' / str(step))
      for step in checkpoint.steps_in(workdir / 'realm' / 'index')
  ]
  rates = [m['num_rows'] / m['seconds'] for m in manifests]
  return figures | {
      'refreshes': int(lines[-1]['refresh/adopted']) - 1,
      'max_staleness_steps': int(max(x['refresh/age_steps'] for x in lines)),
      'max_staleness_seconds': max(x['refresh/age_seconds'] for x in lines),
      'builder_passages_per_second': statistics.median(rates),
      'trainer_waited_seconds': lines[-1]['refresh/wait_seconds'],
  }


def _mean_loss(lines: list[dict[str, Any]]) -> float:
  return statistics.mean(line['train/loss'] for line in lines)


def _retrieval_figures(workdir: pathlib.Path) -> dict[str, Any]:
  before, *curve = report.load_all(workdir / 'realm')
  figures: dict[str, Any] = {
      'curve_steps': [r['step'] for r in (before, *curve)],
      'questions': before['questions']['all']['questions'],
  }
  for name in ('recall_at_1', 'recall_at_5', 'recall_at_20', 'recall_at_100'):
    values = [r['questions']['all']['gold'][name] for r in (before, *curve)]
    figures |= {
        f'{name}_ict': values[0],
        f'{name}_realm': values[-1],
        f'{name}_curve': values,
    }
  masked = curve[-1]['masked']
  for name in ('accuracy_with_retrieval', 'accuracy_without_retrieval',
               'retrieval_utility', 'null_share'):
    figures[f'masked_{name}'] = masked[name]
  return figures


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--corpus', type=pathlib.Path, required=True)
  parser.add_argument('--questions', type=pathlib.Path, required=True)
  parser.add_argument(
      '--workdir', type=pathlib.Path, default=pathlib.Path('runs/real_text')
  )
  parser.add_argument(
      '--flag', action='append', default=[], help='STAGE:FLAG of `train`'
  )
  arguments = parser.parse_args()
  figures = run(arguments)
  harness.write(arguments.output, figures)
  shutil.copy(
      arguments.workdir / 'realm' / report.FOLDER / 'recall.png',
      arguments.output.with_suffix('.png'),
  )


if __name__ == '__main__':
  main()
