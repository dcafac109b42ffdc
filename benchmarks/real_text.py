"""ICT, REALM and their controls on real text, within a time.

  python benchmarks/real_text.py --texts=TEXTS --seconds=10800 \
      --output=benchmarks/results/real_text.json

TEXTS holds passages.jsonl.xz, the 18,896 paragraphs of SQuAD 1.1 train with ids
such as `Alaska#0`, and questions-dev.jsonl.xz, the questions of every 22nd
article; and vocab.txt, if none is to be learned. No stage sees a question.

The articles of the questions, and as many others as --articles asks for, give
the sentences that REALM masks. The retriever is warmed up by ICT on all
articles, the reader on the other ones: a reader that knows the sentences by
heart teaches a retriever nothing. REALM retrieves from the passages of its own
articles (X = Z), or with --all_passages from those of all articles. With
--articles=0 there is one corpus of all.

The stages are those of experiments/real_text.py, each with a share of the time
that is left; in less than 20 minutes, the last two are left out. The share of a
stage counts from its first line of metrics, after compilation. A stage at the
end of its share saves a checkpoint, and the run continues with the next.
`ict_longer` is as long as `realm`. The record is written after each stage, and
the same command continues an interrupted run.
--flag=STAGE:FLAG, repeated, changes a stage: --flag=mlm:--config.batch_size=32,
--flag=all:--config.seed=1. On a GPU, all sizes are larger.

  realm-jax import --source=sentence-transformers/all-MiniLM-L6-v2 \
      --components=reader --workdir=runs/bert
  python benchmarks/real_text.py --texts=TEXTS --start=runs/bert --articles=20 \
      --workdir=runs/from_bert --output=from_bert.json

starts `mlm` and `ict` from a published BERT of that size. ICT, too, then sees
the other articles only.

Recorded: recall of the gold passage by stage with 95 % intervals by article,
the curve of `realm`, paired tests of `realm` with `ict` and `ict_longer`, BM25
(package bm25s), masked accuracy, and examples/s.
"""

import argparse
import importlib.util
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time

import harness

from realm_jax.evaluation import report
from realm_jax.evaluation import runs
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import lines
from realm_jax.runtime import metrics as metrics_lib

_EXPERIMENT = harness.EXPERIMENTS / 'real_text.py'
# Weight in the time of training, and the stages that give the first parameters.
_STAGES: dict[str, tuple[int, tuple[str, ...]]] = {
    'ict': (20, ()),
    'mlm': (33, ()),
    'realm': (20, ('mlm', 'ict')),
    'ict_longer': (20, ('ict',)),
    'frozen': (5, ('mlm', 'ict')),
    'null_reader': (4, ('mlm',)),
}
# They are not evaluated. The retriever of `ict` is that of `realm` at step 0.
_WARM_UP = ('ict', 'mlm')
_FEW, _SHORT = 4, 1200  # Stages of a run of less than so much time.
# Seconds for the corpora, compilation and the evaluations, or part of the time.
_OVERHEAD, _OVERHEAD_PART = 240, 1 / 8
_EVALUATION = 30  # Seconds of one of them.
_DEPTHS = (1, 5, 20, 100)
# Sizes for a GPU, by stage and for all: small BERTs in bfloat16.
_GPU = {
    'all': (
        'model.preset=small', 'model.compute_dtype=bfloat16',
        'model.init_stddev=0.02', 'lengths.query=48', 'lengths.document=128',
        'mips.dtype=bfloat16',
    ),
    'mlm': ('batch_size=512', 'optimizer.warmup_steps=150'),
    'ict': ('batch_size=1024', 'optimizer.learning_rate=5e-4'),
    'ict_longer': ('batch_size=1024', 'optimizer.learning_rate=1.5e-4'),
    'realm': (
        # As row K of results/real_text.md.
        'batch_size=256', 'steps=3000', 'null_document=False',
    ),
    'frozen': ('batch_size=256', 'null_document=False'),
    'null_reader': ('batch_size=512', 'lengths.document=8'),
}
# Sizes for a published BERT of 6 layers on two CPU cores, with --start.
_FROM_BERT = {
    'all': ('sentences=knowledge', 'lengths.document=64'),
    'mlm': (
        'batch_size=32', 'steps=2900', 'optimizer.learning_rate=3e-4',
        'checkpoint.interval=100',
    ),
    'ict': (
        'batch_size=64', 'steps=250', 'optimizer.learning_rate=1e-4',
        'optimizer.warmup_steps=30', 'checkpoint.interval=50',
    ),
    'ict_longer': (
        'batch_size=64', 'optimizer.learning_rate=1e-5',
        'checkpoint.interval=50', 'checkpoint.keep=0',
    ),
    'realm': (
        'null_document=False', 'optimizer.learning_rate=1e-5',
        'optimizer.warmup_steps=20', 'checkpoint.interval=25',
    ),
    'frozen': ('null_document=False', 'checkpoint.interval=25'),
    'null_reader': (
        'batch_size=32', 'lengths.document=8', 'optimizer.learning_rate=1e-4'
    ),
}
_SMALL = {
    'all': (
        'steps=20', 'batch_size=4', 'log_interval=5', 'lengths.query=24',
        'lengths.document=40',
    ),
    'realm': ('num_candidates=3', 'refresh.interval=10', 'refresh.lag=5'),
    'frozen': ('num_candidates=3',),
}


def run(arguments: argparse.Namespace) -> harness.Figures:
  """Trains and evaluates all stages, and returns the figures."""
  deadline = time.time() + arguments.seconds - _EVALUATION
  commands = harness.Commands()
  _prepare(arguments, commands)
  stages = [*_STAGES]
  if arguments.seconds < _SHORT:
    stages = stages[:_FEW]
  overhead = max(_OVERHEAD, arguments.seconds * _OVERHEAD_PART)
  left = max(arguments.seconds - overhead, arguments.seconds / 3)
  spent: dict[str, float] = {}
  figures: harness.Figures = {}
  for i, stage in enumerate(stages, start=1):
    weight, parents = _STAGES[stage]
    budget = left * weight / sum(_STAGES[x][0] for x in stages[i - 1 :])
    if stage == 'ict_longer':
      budget = spent['realm']  # The control is as long.
    spent[stage] = _train(
        arguments, commands, stage, budget, deadline, parents
    )
    left -= spent[stage]
    if not checkpoint.steps_in(
        arguments.workdir / stage / checkpoint.CHECKPOINTS
    ):
      print(f'The time ended before {stage} had a checkpoint.', flush=True)
      break
    if stage not in _WARM_UP:
      _evaluate(arguments.workdir, commands, stage)
    figures = _all_figures(arguments.workdir, commands, stages[:i])
    files.write_json(arguments.output, harness.rounded(figures))
  return figures


def _all_figures(
    workdir: pathlib.Path, commands: harness.Commands, stages: list[str]
) -> harness.Figures:
  """Returns the figures of the stages that are done."""
  ours, others = workdir / 'realm', {}
  if 'realm' in stages:
    others['ict'] = _questions_of(ours, 0)
  if 'ict_longer' in stages:
    others['ict_longer'] = _questions_of(workdir / 'ict_longer')
  return {
      **harness.about('jax', 'flax'),
      'commands': commands.done,
      'corpora': {
          name: files.read_json(workdir / name / 'manifest.json')['counts']
          for name in ('all', 'corpus', 'warm_up')
          if (workdir / name).is_dir()
      },
      'stages': {stage: _figures(workdir / stage) for stage in stages},
      'curve': _curve(ours) if 'realm' in stages else {},
      'paired_by_article': {
          f'realm_{name}': runs.compare(_questions_of(ours), questions)
          for name, questions in others.items()
      },
      'bm25': _bm25(workdir, stages),
  }


def _prepare(arguments: argparse.Namespace, commands: harness.Commands) -> None:
  """Divides the texts by article and makes the corpora."""
  workdir, texts = arguments.workdir, arguments.texts
  questions, passages = (
      [record for _, record in lines.json_objects(texts / f'{name}.jsonl.xz')]
      for name in ('questions-dev', 'passages')
  )
  asked = {_article(question['passage_id']) for question in questions}
  articles = list(dict.fromkeys(_article(x['id']) for x in passages))
  others = [article for article in articles if article not in asked]
  if arguments.small:
    asked, others = set(sorted(asked)[:2]), others[:6]
  if arguments.articles:
    more = max(arguments.articles - len(asked), 0)
    chosen = asked | set(others[:: max(len(others) // max(more, 1), 1)][:more])
  else:
    chosen = asked | set(others)
  harness.write_lines(
      workdir / 'questions.jsonl',
      (x for x in questions if _article(x['passage_id']) in asked),
  )
  if arguments.start:
    vocab = f'--vocab={arguments.start}'
  elif (texts / 'vocab.txt').is_file() and not arguments.vocab_size:
    vocab = f'--vocab={texts / "vocab.txt"}'
  else:
    vocab = f'--vocab_size={arguments.vocab_size or 8000}'
  corpora = {
      'all': chosen | set(others),
      'corpus': chosen,
      'warm_up': set(others) - chosen,
  }
  for name, kept in corpora.items():
    if not kept or (workdir / name).is_dir():
      continue
    source = harness.write_lines(
        workdir / f'{name}.jsonl',
        (x for x in passages if _article(x['id']) in kept),
    )
    sources = [f'--source={source}']
    if name == 'corpus' and arguments.all_passages:
      sources = [
          f'--source={workdir / "all.jsonl"}', f'--pretraining_source={source}'
      ]
    commands(
        'prepare', *sources,
        vocab if name == 'all' else f'--vocab={workdir / "all"}',
        f'--max_wordpieces={arguments.max_wordpieces}',
        f'--output={workdir / name}',
        # The articles whose sentences measure the reader.
        f'--validation_fraction={0.2 if name == "corpus" else 0.01}',
    )


def _train(
    arguments: argparse.Namespace,
    commands: harness.Commands,
    stage: str,
    budget: float,
    deadline: float,
    parents: tuple[str, ...],
) -> float:
  """Trains a stage until it ends or its time is over; returns its seconds.

  Args:
    budget: seconds of training, in all runs of the command.
    deadline: the time at which all training stops.
  """
  folder = arguments.workdir / stage
  spent = folder / 'spent.json'
  known = files.read_json(spent) if spent.exists() else {'seconds': 0.0}
  if known['seconds'] >= budget or (folder / 'summary.json').exists():
    return known['seconds']
  warm_up = {'ict': 'warm_up' if arguments.start else 'all', 'mlm': 'warm_up'}
  corpus = warm_up.get(stage, 'corpus')
  if not (arguments.workdir / corpus).is_dir():  # With --articles=0.
    corpus = 'all'
  words = [
      'train', f'--config={os.path.relpath(_EXPERIMENT)}:{stage}',
      f'--workdir={folder}',
      f'--config.corpus={arguments.workdir / corpus}',
  ]
  starts = [str(arguments.workdir / parent) for parent in parents]
  if arguments.start and not parents:
    starts = [str(arguments.start)]
  if starts:
    words.append(f'--config.init_from={",".join(starts)}')
  if stage in ('realm', 'frozen'):
    words.append('--with_index_builder')
  for asked, sizes in (
      (arguments.start, _FROM_BERT),
      (arguments.gpu and not arguments.start, _GPU),
      (arguments.small, _SMALL),
  ):
    for of in ('all', stage) if asked else ():
      words += [f'--config.{flag}' for flag in sizes.get(of, ())]
  changes = [flag.partition(':') for flag in arguments.flag]
  words += [flag for of, _, flag in changes if of in (stage, 'all')]
  commands.done.append(' '.join(['realm-jax', *words]))
  before, logged = known['seconds'], _logged(folder)
  process = subprocess.Popen(harness.command(*words))
  start = None
  stopped = False
  while process.poll() is None:
    time.sleep(1)
    size = _logged(folder)  # A resumed job first removes lines.
    if start is None and size > logged:
      start = time.time()
    logged = size
    if start is not None:
      known['seconds'] = round(before + time.time() - start, 1)
    if folder.is_dir():
      files.write_json(spent, known)
    if not stopped and (known['seconds'] >= budget or time.time() > deadline):
      stopped = True
      process.send_signal(signal.SIGTERM)
  if process.returncode and not stopped:
    raise SystemExit(f'{stage} failed with exit code {process.returncode}.')
  return known['seconds']


def _logged(folder: pathlib.Path) -> int:
  """Returns the size of the metrics, in bytes."""
  path = folder / 'metrics.jsonl'
  return path.stat().st_size if path.exists() else 0


def _evaluate(
    workdir: pathlib.Path, commands: harness.Commands, stage: str
) -> None:
  folder = workdir / stage
  last = checkpoint.newest_step(folder)
  if (folder / report.FOLDER / f'{last}.json').exists():
    return
  words = ['evaluate', f'--workdir={folder}']
  if stage != 'null_reader':
    words.append(f'--questions={workdir / "questions.jsonl"}')
    if importlib.util.find_spec('bm25s'):
      words.append('--bm25')
  commands(*words, '--steps=all' if stage == 'realm' else '--steps=latest')


def _figures(folder: pathlib.Path) -> harness.Figures:
  """Returns time, speed, loss and the last evaluation of a stage."""
  figures: harness.Figures = {
      **files.read_json(folder / 'spent.json'),
      'steps': checkpoint.newest_step(folder),
  }
  if found := metrics_lib.read_metrics(folder):
    rates = [x['time/examples_per_second'] for x in found]
    figures['examples_per_second'] = statistics.median(rates)
    figures['loss'] = statistics.mean(x['train/loss'] for x in found[-5:])
    figures |= {n: x for line in found for n, x in line.items() if 'gates' in n}
  if folder.name in _WARM_UP:
    return figures
  result = report.load_all(folder)[-1]
  if 'questions' in result:
    figures |= result['questions']['all']['gold']
  return figures | result.get('masked', {})


def _curve(folder: pathlib.Path) -> dict[str, list[float]]:
  results = [r for r in report.load_all(folder) if 'questions' in r]
  curve = {'step': [r['step'] for r in results]}
  for depth in _DEPTHS:
    name = f'recall_at_{depth}'
    curve[name] = [r['questions']['all']['gold'][name] for r in results]
  return curve


def _questions_of(
    folder: pathlib.Path, step: int | None = None
) -> pathlib.Path:
  if step is None:
    step = checkpoint.newest_step(folder)
  return folder / report.FOLDER / f'{step}{report.QUESTIONS}'


def _bm25(workdir: pathlib.Path, stages: list[str]) -> dict[str, float]:
  """Returns recall of the gold passage by BM25, {} without bm25s."""
  for stage in stages:
    for result in report.load_all(workdir / stage):
      if 'baselines' in result:
        return result['baselines']['bm25']['questions']['all']['gold']
  return {}


def _has_gpu() -> bool:
  # In another process: JAX would keep a part of the memory.
  found = subprocess.run(
      [sys.executable, '-c', 'import jax; print(jax.default_backend())'],
      check=True, capture_output=True, text=True,
  )
  return found.stdout.split()[-1] == 'gpu'


def _article(passage_id: str) -> str:
  return passage_id.rpartition('#')[0]


def main() -> None:
  parser = harness.parser(__doc__, 'texts', workdir='runs/real_text')
  parser.add_argument(
      '--seconds', type=float, default=10_800, help='for everything'
  )
  parser.add_argument(
      '--gpu', action=argparse.BooleanOptionalAction,
      help='sizes for a GPU; default: if JAX finds one',
  )
  parser.add_argument(
      '--articles', type=int, help='default: 40, on a GPU half of all, 221'
  )
  parser.add_argument(
      '--all_passages', action=argparse.BooleanOptionalAction,
      help='default: on a GPU',
  )
  parser.add_argument(
      '--start', type=pathlib.Path,
      help='the reader of `realm-jax import`, on CPU; default: from scratch',
  )
  parser.add_argument('--max_wordpieces', type=int)
  parser.add_argument(
      '--vocab_size', type=int, default=0, help='0: vocab.txt, else 8,000'
  )
  parser.add_argument(
      '--flag', action='append', default=[], help='STAGE:FLAG of `train`'
  )
  arguments = parser.parse_args()
  if arguments.start and arguments.vocab_size:
    parser.error('--start has a vocabulary; leave --vocab_size out')
  if arguments.gpu is None:
    arguments.gpu = _has_gpu()
  if arguments.articles is None:
    arguments.articles = 221 if arguments.gpu else 40
  if arguments.all_passages is None:
    arguments.all_passages = arguments.gpu
  if arguments.max_wordpieces is None:
    arguments.max_wordpieces = (
        64 if arguments.start else 128 if arguments.gpu else 80
    )
  # Trainer and index builder share the memory of a GPU.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  arguments.workdir.mkdir(parents=True, exist_ok=True)
  figures = run(arguments)
  harness.write(arguments.output, figures)
  curves = arguments.workdir / 'realm' / report.FOLDER / 'recall.png'
  if curves.exists():
    shutil.copy(curves, arguments.output.with_suffix('.png'))


if __name__ == '__main__':
  main()
