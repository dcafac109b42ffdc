"""`realm-jax report`: one page of a run, or of several side by side.

The page holds all that it shows; it has no script and no address of elsewhere.
It is made from the files of the workdirs. A model is loaded only to fill in a
sentence.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import html
import importlib.resources
import os
import pathlib
import statistics
import string
from typing import Any

import realm_jax
from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import doctor
from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.evaluation import report
from realm_jax.evaluation import runs as runs_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.serving import elements

element = elements.element
Html = elements.Html

_EXAMPLES = 6  # Questions.
_LETTERS = 300  # Characters shown of an example's passage.
# Metrics of the index: heading, the metric, and how its values become one.
_STALENESS: tuple[tuple[str, str, Callable[[Any], float]], ...] = (
    ('age of the index in steps, mean', 'refresh/age_steps', statistics.mean),
    ('age of the index in steps, largest', 'refresh/age_steps', max),
    ('generations adopted', 'refresh/adopted', max),
    ('seconds the trainer waited for the builder', 'refresh/wait_seconds', max),
    ('seconds the trainer stood still', 'refresh/stall_seconds', max),
    ('failures of the builder', 'refresh/builder_failures', max),
)


@dataclasses.dataclass(frozen=True)
class _Run:
  """A workdir, and what its files say.

  name: of its folder, or its path where two have one name.
  lines: of metrics.jsonl.
  results: of all evaluations, by step.
  """

  name: str
  workdir: pathlib.Path
  config: config_lib.Config
  lines: list[dict[str, Any]]
  results: list[report.Result]

  def values(self, metric: str) -> list[float]:
    return [value for _, value in report.points(self.lines, metric)]


def write(
    workdirs: Sequence[str],
    output: pathlib.Path | str,
    sentence: str | None = None,
    corpus: str | None = None,
) -> pathlib.Path:
  """Writes the page of one or more workdirs, and returns its path.

  Each run that can fills in the sentence, which has a [MASK]. `corpus` is where
  the corpus of all of them is now; None: where it was.

  Raises:
    FileNotFoundError: a folder is no workdir.
    ValueError: no workdir, a damaged file, a sentence without [MASK].
  """
  output = pathlib.Path(output)
  if output.is_dir():
    raise ValueError(f'--output={output} is a folder; give the name of a file.')
  if sentence is not None and inspect_lib.MASK not in sentence:
    raise ValueError(f'--inspect={sentence!r} has no {inspect_lib.MASK}.')
  runs = _open(workdirs)
  facts = {run.name: _about(run) for run in runs}
  sections = {
      'Runs': [elements.side_by_side('Runs', facts)],
      'Diagnosis': [part for run in runs for part in _diagnosis(run)],
      'Configuration': _configuration(runs),
      'Curves': _curves(runs),
      'Evaluation': _evaluation(runs),
      'Staleness of the index': [_staleness(runs)],
      'Where the time went': [_time(runs)],
      'Questions': _questions(runs, corpus),
  }
  if sentence is not None:
    sections['A sentence filled in'] = [
        element('p', element('strong', sentence)),
        *(part for run in runs for part in _inspected(run, sentence, corpus)),
    ]
  title = 'Report of ' + ', '.join(run.name for run in runs)
  with files.atomic_file(output) as file:
    file.write(_page(title, sections))
  return output


def of_inspection(found: inspect_lib.Inspection) -> str:
  """Returns the page of `realm-jax inspect --html`."""
  filled_in = element('strong', ' | '.join(found.marginal.fillings))
  parts = [
      element('p', filled_in),
      element('p', inspect_lib.about(found), class_='quiet'),
      _candidates(found, found.text),
  ]
  return _page(found.text, {'Filled in': parts})


def _page(title: str, sections: Mapping[str, Sequence[Html]]) -> str:
  static = importlib.resources.files('realm_jax.serving') / 'static'
  now = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M')
  links, parts = [], []
  for number, (name, children) in enumerate(sections.items()):
    links.append(element('a', name, href=f'#part{number}'))
    head = element('h2', name)
    parts.append(element('section', head, *children, id=f'part{number}'))
  page = string.Template((static / 'report.html').read_text('utf-8'))
  return page.substitute(
      title=html.escape(title),
      style=(static / 'page.css').read_text('utf-8'),
      links='\n'.join(links),
      body='\n'.join(parts),
      foot=html.escape(f'realm_jax {realm_jax.__version__}, {now} UTC'),
  )


def _open(workdirs: Sequence[str]) -> list[_Run]:
  paths = list(dict.fromkeys(os.path.normpath(path) for path in workdirs))
  if not paths:
    raise ValueError('--workdir names no workdir.')
  names = [pathlib.Path(path).resolve().name for path in paths]
  return [
      _Run(
          path if names.count(name) > 1 else name, pathlib.Path(path),
          config_lib.read(path), metrics_lib.read_metrics(path),
          report.load_all(path),
      )
      for path, name in zip(paths, names, strict=True)
  ]


def _about(run: _Run) -> dict[str, Any]:
  """Returns the facts of a run, by name."""
  config = run.config
  steps = checkpoint.steps_in(run.workdir / checkpoint.CHECKPOINTS)
  saved = checkpoint.saved_about(run.workdir, steps[-1]) if steps else {}
  logged = run.lines[-1]['step'] if run.lines else 0
  rates = run.values('time/examples_per_second')
  seconds = sum(_parts_of_time(run).values())
  return {
      'workdir': run.workdir,
      'objective': config.objective,
      'steps done': f'{max([logged, *steps]):,} of {config.steps:,}',
      'started from': config.init_from.replace(',', ', ') or 'random',
      'corpus': config.corpus,
      'corpus fingerprint': saved.get('corpus_fingerprint', '')[:16],
      'batch size': config.batch_size,
      'minutes': f'{seconds / 60:,.1f}' if seconds else None,
      'examples per second':
          elements.short(statistics.median(rates)) if rates else None,
      'index generation': saved.get('index_generation'),
      'evaluated steps': len(run.results),
  }


def _diagnosis(run: _Run) -> list[Html]:
  try:
    found = doctor.examine(run.workdir).findings
  except ValueError as error:
    return [elements.note(str(error))]
  if not found:
    return [element('p', element('strong', run.name), ': healthy.')]
  return [elements.note(f'{run.name}: {x.diagnosis}: {x.text}') for x in found]


def _configuration(runs: list[_Run]) -> list[Html]:
  """Fields in which the runs differ, and those unlike the defaults."""
  columns = {
      run.name: config_lib.flat(config_lib.resolve(run.config)) for run in runs
  }
  defaults = config_lib.flat(config_lib.resolve(config_lib.Config()))
  first, *others = columns.values()
  differing = [
      name
      for name in dict.fromkeys(name for c in columns.values() for name in c)
      if any(other.get(name) != first.get(name) for other in others)
  ]
  unlike = [
      name
      for name, value in first.items()
      if name not in differing and value != defaults.get(name)
  ]
  common = elements.side_by_side(
      'Fields unlike the default', {'value': first, 'default': defaults}, unlike
  )
  if not others:
    return [element('p', 'Fields that differ from the defaults.'), common]
  parts = [element('p', 'The configs are the same.')]
  if differing:
    parts = [elements.side_by_side('Fields that differ', columns, differing)]
  about = 'Fields that the runs share and that differ from the defaults'
  return [*parts, element('details', element('summary', about), common)]


def _curves(runs: list[_Run]) -> list[Html]:
  panels: report.Panels = {}
  for run in runs:
    recall = report.recall_panels(run.results)
    if any(title.startswith('gold') for title in recall):
      recall = {k: v for k, v in recall.items() if not k.startswith('answer')}
    for title, curves in recall.items():
      if len(runs) == 1:
        panels[title] = curves
        continue
      # One curve of a run: the others are in the tables.
      label = 'recall@5' if 'recall@5' in curves else next(iter(curves))
      panels.setdefault(f'{title}: {label}', {})[run.name] = curves[label]
  panels = report.without_single_points(panels)  # The tables have them.
  for run in runs:
    for title, curves in report.training_panels(run.lines).items():
      name = run.name if len(runs) > 1 else ''
      panels.setdefault(title, {})[name] = curves['']
  order = [run.name for run in runs] if len(runs) > 1 else []
  drawn = [
      elements.panel(title, curves, order=order)
      for title, curves in panels.items()
  ]
  what = 'no metrics: `realm-jax train` writes metrics.jsonl'
  return [
      *(elements.note(f'{run.name}: {what}.') for run in runs if not run.lines),
      element('div', *drawn, class_='panels'),
  ]


def _evaluation(runs: list[_Run]) -> list[Html]:
  """The newest results of all runs, then all results of each."""
  found: dict[str, list[Sequence[Any]]] = {}
  parts, details = [], []
  for run in runs:
    if not run.results:
      what = 'no evaluation: `realm-jax evaluate` makes one'
      parts.append(elements.note(f'{run.name}: {what}.'))
    for title, (heads, *rows) in report.tables(run.results[-1:]).items():
      table = found.setdefault(title, [['run', *heads]])
      table += [[run.name, *row] for row in rows]
    if len(run.results) > 1:
      for title, lines in report.tables(run.results).items():
        short = title.partition(' (')[0]
        about = element('summary', f'{run.name}, all evaluated steps: {short}')
        details.append(element('details', about, elements.table(title, *lines)))
  for title, (heads, *rows) in found.items():
    parts += [element('h3', title), elements.table(title, heads, *rows)]
  for run in runs:
    for note in report.notes(run.results[-1:]):
      parts.append(elements.note(f'{run.name}: {note}', 'quiet'))
  return [*parts, *details]


def _staleness(runs: list[_Run]) -> Html:
  columns: dict[str, dict[str, Any]] = {}
  for run in runs:
    if run.values('refresh/age_steps'):
      refresh = run.config.refresh
      columns[run.name] = {
          'policy': refresh.policy,
          'interval, lag': f'{refresh.interval}, {refresh.lag}',
      }
      for heading, metric, measure in _STALENESS:
        if values := run.values(metric):
          columns[run.name][heading] = elements.short(measure(values))
  if not columns:
    return element('p', 'No run has used an index.')
  return elements.side_by_side('Staleness', columns)


def _parts_of_time(run: _Run) -> dict[str, float]:
  """Returns the seconds of each part of the loop, longest first."""
  seconds = {
      name[5:-8]: sum(run.values(name))
      for name in sorted({name for line in run.lines for name in line})
      if name.startswith('time/') and name.endswith('_seconds')
  }
  return dict(sorted(seconds.items(), key=lambda part: -part[1]))


def _time(runs: list[_Run]) -> Html:
  columns: dict[str, dict[str, Any]] = {}
  for run in runs:
    parts, columns[run.name] = _parts_of_time(run), {}
    for name, seconds in parts.items():
      share = seconds / (sum(parts.values()) or 1.0)
      text = f'{seconds:,.1f} s, {share:.0%}'
      columns[run.name][name] = elements.with_bar(text, share)
  if not any(columns.values()):
    return element('p', 'No run has logged its time.')
  return elements.side_by_side('Time', columns)


def _questions(runs: list[_Run], corpus: str | None) -> list[Html]:
  """Some questions, which the first run gets right or not, in every run."""
  found, texts = {}, {}
  for run in runs:
    step = run.results[-1]['step'] if run.results else None
    path = run.workdir / report.FOLDER / f'{step}{report.QUESTIONS}'
    if path.is_file():
      records = runs_lib.read_questions(path)
      found[run.name] = {record['question']: record for record in records}
      texts[run.name] = _passages(corpus or run.config.corpus)
  if not found:
    what = 'No run has answered questions: `realm-jax evaluate --questions=...`'
    return [elements.note(what + ' keeps what was retrieved.')]
  name, first = next(iter(found.items()))
  common = set(first).intersection(*found.values()) or first
  asked = [record for question, record in first.items() if question in common]
  right = [record for record in asked if _is_right(record)]
  wrong = [record for record in asked if not _is_right(record)]
  chosen = _spread(right, max(_EXAMPLES // 2, _EXAMPLES - len(wrong)))
  chosen += _spread(wrong, _EXAMPLES - len(chosen))
  what = f'{len(chosen)} of {len(asked):,} questions, first those that {name}'
  parts = [element('p', f'{what} gets right.')]
  heads = ['run', 'rank of the gold passage', 'rank of an answer', 'answer']
  for record in chosen:
    question = record['question']
    answers = ' | '.join(map(str, record['answers']))
    rows = [
        _result(name, records[question], texts[name])
        for name, records in found.items()
        if question in records
    ]
    about = element('p', f'Answers: {answers}', class_='quiet')
    table = elements.table(question, [*heads, 'best passage'], *rows)
    head = element('h3', question)
    parts.append(element('article', head, about, table, class_='card'))
  return parts


def _is_right(record: Mapping[str, Any]) -> bool:
  rank = record['gold_rank'] or record['answer_rank']
  return bool(record.get('exact_match', rank == 1))


def _spread(records: list[Any], count: int) -> list[Any]:
  return records[:: max(len(records) // max(count, 1), 1)][:count]


def _passages(corpus: str) -> Callable[[str], str]:
  """Returns a function from the id of a passage to its title and text."""
  try:
    opened = corpus_lib.Corpus.open(corpus)
  except (OSError, ValueError):  # It has moved: the ids are left.
    return lambda name: name

  def text(name: str) -> str:
    (row,) = opened.passage_rows_by_id([name]).tolist()
    if row < 0:
      return name
    record = opened.passage_text(row)
    whole = ': '.join(filter(None, (record['title'], record['text'])))
    return whole if len(whole) <= _LETTERS else whole[:_LETTERS] + ' ...'

  return text


def _result(
    name: str, record: Mapping[str, Any], text: Callable[[str], str]
) -> list[Any]:
  answer = best = ''
  if 'prediction' in record:
    answer = f'{record["prediction"]} (p={record["probability"]:.2f})'
  if record['retrieved']:
    best = text(record['retrieved'][0]['id'])
  ranks = [record['gold_rank'] or '', record['answer_rank'] or '']
  return [name, *ranks, answer, best]


def _inspected(run: _Run, sentence: str, corpus: str | None) -> list[Html]:
  """The output of `realm-jax inspect`, if the run has a reader and an index."""
  try:
    found = inspect_lib.inspect(run.workdir, sentence, corpus=corpus)
  except (OSError, ValueError) as error:
    return [elements.note(f'{run.name}: {error}', 'quiet')]
  table = _candidates(found, f'{sentence} by {run.name}')
  return [element('article', element('h3', run.name), table, class_='card')]


def _candidates(found: inspect_lib.Inspection, title: str) -> Html:
  """Returns a table of the candidates and what each predicts."""
  rows = []
  for line in inspect_lib.lines(found):
    share, passage, *rest = line.values()
    bar = elements.with_bar(share, float(share)) if share else 'all'
    rows.append([bar, passage.replace('\n', ': ', 1), *rest])
  heads = ['p(z|x)', 'passage', 'prediction', 'p(y|z,x)', 'id']
  return elements.table(title, heads, *rows)
