"""The whole of REALM in ten minutes on two CPU cores, on an invented world.

Guu et al. 2020, sections 3.3 and 3.4, at preset `tiny` and from scratch.

  make quickstart                               # all of it
  python experiments/quickstart.py --seed=1     # with a world of another seed
  realm-jax train --config=experiments/quickstart.py:ict --workdir=runs/my_ict \
      --config.corpus=runs/quickstart/corpus    # one stage

Hardware: 2 CPU cores. Stages, in the order that matters (docs/learning.md):
`mlm` warms the reader up, `ict` the retriever, `realm` trains both, `open_qa`
teaches them to answer questions. `null_reader` is the baseline without
retrieval: the reader of `mlm`, trained on the sentences of `realm` for as many
steps, with the null document only.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import tensorflow_datasets as tfds

from realm_jax import config as config_lib
from realm_jax import main as main_lib
from realm_jax import recipes
from realm_jax.evaluation import report as report_lib
from realm_jax.runtime import metrics as metrics_lib

STAGES = ('mlm', 'ict', 'realm', 'null_reader', 'open_qa')

# Modules of the commands; their imports take seconds.
_IMPORTED = (
    'realm_jax.prepare.prepare',
    'realm_jax.trainer.supervise',
    'realm_jax.evaluation.evaluate',
    'realm_jax.serving.report_page',
)


def get_config(stage: str = 'realm') -> config_lib.Config:
  """Returns the config of a stage, one of `STAGES`."""
  if stage not in STAGES:
    raise ValueError(f'No stage {stage!r}; there are {", ".join(STAGES)}.')
  if stage == 'null_reader':
    config = recipes.invented_world('realm')  # Its steps, batches and rates.
    config.objective = 'mlm'
    config.mlm.own_passage_rate, config.mlm.null_rate = 0.0, 1.0
    config.lengths.document = 8  # The null document has 3 wordpieces.
    return config
  config = recipes.invented_world(stage)
  if stage == 'realm':
    config.refresh.keep = 0  # All, for the curve of recall over training.
  return config


class Commands:
  """Runs commands of `realm-jax`, each in a process of its own.

  The processes are forks of one that has imported all that they need, and share
  what XLA compiles.
  """

  def __init__(self, compiled: pathlib.Path):
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(compiled.resolve()))
    # macOS does not support a fork without exec.
    method = 'forkserver' if sys.platform == 'linux' else 'spawn'
    self._context: Any = multiprocessing.get_context(method)
    self._context.set_forkserver_preload(list(_IMPORTED))

  def __call__(self, *arguments: str) -> None:
    """Runs a command; raises subprocess.CalledProcessError if it fails."""
    shown = ' '.join(
        f"'{word}'" if ' ' in word else word for word in arguments
    )
    print(f'\n$ realm-jax {shown}', flush=True)
    process = self._context.Process(target=_command, args=(arguments,))
    process.start()
    process.join()
    if process.exitcode:
      raise subprocess.CalledProcessError(process.exitcode, shown)


def _command(arguments: tuple[str, ...]) -> None:
  sys.argv = ['realm-jax', *arguments]
  main_lib.run()


def run(workdir: pathlib.Path, seed: int, entities: int) -> dict[str, Any]:
  """Runs all stages as a user would, by the command line, and reports."""
  start = time.perf_counter()
  corpus = workdir / 'corpus'
  jobs = {stage: workdir / stage for stage in STAGES}
  realm_jax = Commands(workdir / 'compiled')

  def train(stage: str, *more: str) -> None:
    realm_jax(
        'train',
        f'--config={pathlib.Path(__file__)}:{stage}',
        f'--workdir={jobs[stage]}',
        f'--config.corpus={corpus}',
        f'--config.seed={seed}',
        *more,
    )

  realm_jax(
      'prepare',
      f'--source=world:{seed}:{entities}',
      f'--output={corpus}',
      '--overwrite',
  )
  train('mlm')
  train('ict')
  train(
      'realm',
      f'--config.init_from={jobs["mlm"]},{jobs["ict"]}',
      '--with_index_builder',
  )
  train('null_reader', f'--config.init_from={jobs["mlm"]}')
  train(
      'open_qa',
      f'--config.init_from={jobs["realm"]}',
      f'--config.open_qa.questions={corpus / "questions.jsonl"}',
      '--with_index_builder',
  )
  realm_jax('evaluate', f'--workdir={jobs["ict"]}')
  realm_jax('evaluate', f'--workdir={jobs["realm"]}', '--steps=all')
  realm_jax('evaluate', f'--workdir={jobs["null_reader"]}')
  sentence = _example(corpus)
  realm_jax(
      'inspect',
      f'--workdir={jobs["realm"]}',
      f'--html={workdir / "inspect.html"}',
      sentence,
  )
  realm_jax('evaluate', f'--workdir={jobs["open_qa"]}', '--limit=1500')
  realm_jax('ask', f'--workdir={jobs["open_qa"]}', _question(corpus))
  realm_jax(
      'report',
      f'--workdir={",".join(map(str, jobs.values()))}',
      f'--output={workdir / "report.html"}',
      f'--inspect={sentence}',
  )
  report = _report(jobs, time.perf_counter() - start)
  (workdir / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
  return report


def _example(corpus: pathlib.Path) -> str:
  """A sentence about a held-out fact, its value masked."""
  builder = tfds.builder_from_directory(str(corpus / 'sentences'))
  record = builder.as_data_source(split='validation')[0]
  text = record['text']
  start, limit = record['span_starts'][0], record['span_limits'][0]
  return (text[:start] + b'[MASK]' + text[limit:]).decode()


def _question(corpus: pathlib.Path) -> str:
  """A question about a held-out fact."""
  with open(corpus / 'questions.jsonl', encoding='utf-8') as file:
    records = map(json.loads, file)
    return next(r['question'] for r in records if r['held_out'])


def _report(
    jobs: dict[str, pathlib.Path], seconds: float
) -> dict[str, Any]:
  results = {
      stage: report_lib.load_all(jobs[stage])[-1] for stage in ('ict', 'realm')
  }
  null_reader = report_lib.load_all(jobs['null_reader'])[-1]['masked']
  answered = report_lib.load_all(jobs['open_qa'])[-1]['questions']
  answered = answered['held_out']['open_qa']
  lines = metrics_lib.read_metrics(jobs['realm'])

  def recall(k: int, facts: str) -> dict[str, float]:
    return {
        stage: result['questions'][facts]['gold'][f'recall_at_{k}']
        for stage, result in results.items()
    }

  masked = results['realm']['masked']
  return {
      'seconds': round(seconds, 1),
      'passages': results['realm']['passages'],
      # The first generation is where training starts, not a refresh.
      'refreshes': int(max(line['refresh/adopted'] for line in lines)) - 1,
      'max_staleness_steps': int(
          max(line['refresh/age_steps'] for line in lines)
      ),
      'recall_at_1': recall(1, 'held_out'),
      'recall_at_5': recall(5, 'held_out'),
      'recall_at_5_seen': recall(5, 'seen'),
      'masked_accuracy': {
          'with_retrieval': masked['accuracy_with_retrieval'],
          # The same reader, and one trained on the null document alone.
          'without_retrieval': masked['accuracy_without_retrieval'],
          'null_reader': null_reader['accuracy_without_retrieval'],
      },
      'exact_match': {
          'with_retrieval': answered['exact_match'],
          'random_passages': answered['exact_match_random_passages'],
      },
  }


def _table(report: dict[str, Any]) -> str:
  """The report for people: Markdown, and readable as it is."""

  def row(name: str, values: dict[str, float]) -> str:
    cells = [name, *(f'{value:.3f}' for value in values.values())]
    return f'| {" | ".join(cells)} |'

  return '\n'.join([
      '| questions, gold passage found | ICT | REALM |',
      '|---|---|---|',
      row('recall@1, held-out facts', report['recall_at_1']),
      row('recall@5, held-out facts', report['recall_at_5']),
      row('recall@5, other facts', report['recall_at_5_seen']),
      '',
      '| masked spans filled in | with retrieval | the same reader, null'
      ' document | a reader trained on the null document alone |',
      '|---|---|---|---|',
      row('held-out facts', report['masked_accuracy']),
      '',
      '| questions answered, exact match | with retrieval | random passages |',
      '|---|---|---|',
      row('held-out facts', report['exact_match']),
      '',
      'Held-out facts: those that no sentence of the pretraining corpus states.'
      ' The passages that state them are in the knowledge corpus, which the'
      ' warm-up and ICT read.',
      '',
      f'{report["passages"]} passages, {report["refreshes"]} index refreshes'
      ' adopted while training, the index at most'
      f' {report["max_staleness_steps"]} steps old,'
      f' {report["seconds"]:.0f} seconds in all.',
  ])


def _serve_command(workdir: pathlib.Path) -> str:
  """The command that serves the page, with this Python's `realm-jax`."""
  command = pathlib.Path(sys.executable).parent / 'realm-jax'
  if command.is_relative_to(pathlib.Path.cwd()):
    command = command.relative_to(pathlib.Path.cwd())
  return f'{command} serve --workdir={workdir / "open_qa"}'


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--seed', type=int, default=0, help='of world and jobs')
  parser.add_argument('--entities', type=int, default=1000)
  parser.add_argument(
      '--workdir', type=pathlib.Path, default=pathlib.Path('runs/quickstart')
  )
  arguments = parser.parse_args()
  if arguments.workdir.exists():
    # A quickstart is made to be run again; its jobs are not to be resumed.
    shutil.rmtree(arguments.workdir)
  arguments.workdir.mkdir(parents=True)
  try:
    report = run(arguments.workdir, arguments.seed, arguments.entities)
  except subprocess.CalledProcessError as error:
    sys.exit(f'The command above failed with exit code {error.returncode}.')
  print(f'\n{_table(report)}\n\nWritten: {arguments.workdir}/report.json')
  print(
      f'All runs side by side, to open in a browser: {arguments.workdir}'
      '/report.html\nTo ask questions on a page of this machine:\n\n  '
      + _serve_command(arguments.workdir)
  )


if __name__ == '__main__':
  main()
