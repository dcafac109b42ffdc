"""Files of `workdir`/evaluation: results as JSON, report.md and plots."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import logging
import pathlib
from typing import Any

import numpy as np

from realm_jax.runtime import extension
from realm_jax.runtime import files as files_lib
from realm_jax.runtime import metrics as metrics_lib

log = logging.getLogger(__name__)

FOLDER = 'evaluation'
QUESTIONS = '.questions.jsonl'  # After the step: a line for each question.
# Description of the clusters of questions and of masked sentences.
UNIT = 'the article of the gold passage, else that passage, else the question'

Result = dict[str, Any]  # Of `evaluate.evaluate`; plain JSON.

# Columns of the tables: heading, and name of the figure.
_DEPTHS = (1, 5, 20, 50, 100)
_GOLD_COLUMNS = {
    **{f'recall@{k}': f'recall_at_{k}' for k in _DEPTHS},
    'MRR': 'mrr',
    'nDCG@10': 'ndcg_at_10',
}
_OWN_COLUMNS = {k: x for k, x in _GOLD_COLUMNS.items() if k != 'nDCG@10'}
_STRING_COLUMNS = {
    **{f'answer@{k}': f'recall_at_{k}' for k in _DEPTHS},
    'answer MRR': 'mrr',
}
# Whether a sentence is cut out of its passage.
_OWN_PASSAGES = {'cut_out': 'without the sentence', 'whole': 'whole'}
_MASKED_COLUMNS = {
    'sentences': 'sentences',
    'clusters': 'clusters',
    'accuracy with retrieval': 'accuracy_with_retrieval',
    'with random passages': 'accuracy_with_random_passages',
    'same reader, null document alone': 'accuracy_without_retrieval',
    'retrieval utility': 'retrieval_utility',
    'null-document share': 'null_share',
}
_ANSWER_COLUMNS = {
    'exact match': 'exact_match',
    'F1': 'f1',
    'reader oracle': 'reader_oracle',
    'no answer': 'no_answer',
    'exact match from random passages': 'exact_match_random_passages',
    'not retrieved': 'not_retrieved',
    'not read': 'not_read',
    'misread': 'misread',
}
_BEIR_COLUMNS = {
    'nDCG@10': 'ndcg_at_10',
    'recall@100': 'recall_at_100',
    'MAP': 'map',
}
_ENTITY_COLUMNS = {name: name for name in ('precision', 'recall', 'f1')}
# Names of the runs of a step; the retriever alone has no name of its own.
RUNS = {'retriever': 'retriever', 'bm25': 'BM25', 'hybrid': 'hybrid'}
# Of `paired_row`.
PAIRED_COLUMNS = (
    'figure', 'ours (95 % interval)', 'theirs', 'difference', 'p', 'better',
    'worse',
)
# Panels of training.png: heading, and the metric.
_PANELS = (
    ('loss', 'train/loss'),
    ('probability of the null document', 'train/null_share'),
    ('retrieval utility in nats', 'train/retrieval_utility'),
    ('age of the index in steps', 'refresh/age_steps'),
    ('share of the top k that a refresh kept', 'refresh/probe_overlap'),
    ('accuracy in the batch', 'train/accuracy'),
    ('examples per second', 'time/examples_per_second'),
)


def save(workdir: pathlib.Path | str, result: Result) -> pathlib.Path:
  """Writes evaluation/<step>.json."""
  path = pathlib.Path(workdir) / FOLDER / f'{result["step"]}.json'
  files_lib.write_json(path, result)
  return path


def load_all(workdir: pathlib.Path | str) -> list[Result]:
  """Reads all results of a workdir, by step.

  Raises:
    ValueError: a file is damaged; names it.
  """
  paths = (pathlib.Path(workdir) / FOLDER).glob('*.json')
  numbered = [path for path in paths if path.stem.isdigit()]
  results = []
  for path in sorted(numbered, key=lambda path: int(path.stem)):
    results.append(files_lib.read_json(path))
    if not isinstance(results[-1], dict) or 'step' not in results[-1]:
      raise ValueError(
          f'{path} is no result of `realm-jax evaluate`: it has no "step".'
          ' Remove it.'
      )
  return results


def tables(results: list[Result]) -> dict[str, list[Sequence[Any]]]:
  """Returns tables by title: the heads, then the rows; none is without rows."""
  passages: list[Sequence[Any]] = []
  documents: list[Sequence[Any]] = []
  paired: list[Sequence[Any]] = []
  answers: list[Sequence[Any]] = []
  entities: list[Sequence[Any]] = []
  own: list[Sequence[Any]] = []
  masked: list[Sequence[Any]] = []
  for result in results:
    step = result['step']
    for name, group in _question_groups(result).items():
      row = [step, name, group['questions']]
      gold = _cells(group.get('gold', {}), _GOLD_COLUMNS)
      string = _cells(group.get('answer', {}), _STRING_COLUMNS)
      passages.append([*row, *gold, *string])
      if 'open_qa' in group:
        cells = _cells(group['open_qa'], _ANSWER_COLUMNS)
        answers.append([*row, group.get('clusters', ''), *cells])
    if beir := result.get('beir'):
      for run, figures in beir['figures'].items():
        cells = _cells(figures, _BEIR_COLUMNS)
        documents.append([step, RUNS[run], beir['queries'], *cells])
    for kind, of in (('baselines', ''), ('beir', ', BEIR')):
      for pair, tests in result.get(kind, {}).get('paired', {}).items():
        for figure, test in tests.items():
          sides = [RUNS[run] for run in pair.split('_')]
          paired.append([step, *sides, *paired_row(f'{figure}{of}', test)])
    for name, score in result.get('entities', {}).items():
      cells = _cells(score, _ENTITY_COLUMNS)
      entities.append([step, name, score['count'], *cells])
    held_out = result.get('held_out_sentences', {})
    for name, words in _OWN_PASSAGES.items():
      if name in held_out:
        cells = _cells(held_out[name], _OWN_COLUMNS)
        counts = held_out['sentences'], held_out['clusters']
        own.append([step, words, *counts, *cells])
    if result.get('masked'):
      masked.append([step, *_cells(result['masked'], _MASKED_COLUMNS, _number)])
  found: dict[str, list[Sequence[Any]]] = {
      'Passages retrieved for questions, in per cent': [
          ['step', 'facts', 'questions', *_GOLD_COLUMNS, *_STRING_COLUMNS],
          *passages,
      ],
      'Documents of BEIR retrieved for its queries, in per cent (95 %'
      f' interval, resampled by cluster: {UNIT})': [
          ['step', 'by', 'queries', *_BEIR_COLUMNS], *documents
      ],
      'Retriever, BM25 and their hybrid (reciprocal rank fusion), with paired'
      f' tests over the same clusters: {UNIT}': [
          ['step', 'ours is', 'theirs is', *PAIRED_COLUMNS], *paired
      ],
      'Questions answered, in per cent (95 % interval, resampled by cluster:'
      f' {UNIT})': [
          ['step', 'facts', 'questions', 'clusters', *_ANSWER_COLUMNS], *answers
      ],
      'Entities found, in per cent': [
          ['step', 'type', 'entities', *_ENTITY_COLUMNS], *entities
      ],
      'Own passages retrieved for sentences held out, in per cent': [
          ['step', 'own passage', 'sentences', 'articles', *_OWN_COLUMNS], *own
      ],
      'Masked spans filled in (95 % interval, resampled by cluster: the'
      " sentence's article where it is known, else the sentence)": [
          ['step', *_MASKED_COLUMNS], *masked
      ],
  }
  return {title: lines for title, lines in found.items() if len(lines) > 1}


def table(results: list[Result]) -> str:
  """Returns `tables` and `notes` as one Markdown text."""
  found = tables(results).items()
  parts = [f'{title}\n\n{markdown(*lines)}' for title, lines in found]
  text = '\n\n'.join([*parts, *notes(results)])
  return text + '\n' if text else ''


def notes(results: list[Result]) -> list[str]:
  """Returns what the figures depend on, a paragraph each."""
  return [
      f'Step {result["step"]}{note}'
      for result in results
      for note in _notes(result)
  ]


def _question_groups(result: Result) -> dict[str, dict[str, Any]]:
  """Returns the groups of questions by the retriever, then by baselines."""
  groups = dict(result.get('questions', {}))
  for run, found in result.get('baselines', {}).items():
    if run in RUNS:
      of_run = found['questions'].items()
      groups |= {f'{name}, {RUNS[run]}': group for name, group in of_run}
  return groups


def paired_row(name: str, test: dict[str, Any]) -> list[str]:
  """Returns the columns of a result of `runs.paired`."""
  sides = {'ours': 'ours', 'theirs': 'theirs'}
  difference = f'{test["difference"]:+.3f}'
  if 'low' in test:
    difference += f' ({test["low"]:+.3f} to {test["high"]:+.3f})'
  return [
      name.replace('_', ' '), *_cells(test, sides, _number), difference,
      f'{test["p_value"]:.4f}', f'{test["better"]:.0f}', f'{test["worse"]:.0f}',
  ]


def _notes(result: Result) -> Iterator[str]:
  """Yields what the figures of a result depend on, after `Step N`."""
  if rules := result.get('answer_match'):
    names = ', '.join(f'`{rule}` ({n} questions)' for rule, n in rules.items())
    yield (
        f': a passage holds an answer by the rule {names};'
        ' docs/question_answering.md describes the rules.'
    )
  for name, group in result.get('questions', {}).items():
    total = group['questions']
    counts = {
        'gold': ('with_gold_passage', 'gold passage'),
        'answer': ('with_answers', 'answer'),
    }
    known = [
        f'{group[count]} of them by {what}'
        for kind, (count, what) in counts.items()
        if kind in group and group.get(count, total) < total
    ]
    if known:
      yield (
          f', {name}: the figures of the {total} questions are over'
          f' {", ".join(known)}.'
      )
  if by_words := result.get('baselines', {}).get('bm25'):
    yield (
        f': BM25 with k1={by_words["k1"]}, b={by_words["b"]} over'
        f' {by_words["passages"]} passages; no word of'
        f' {by_words["without_result"]} questions is in any passage, and'
        f' {by_words["without_words"]} passages have no word. The hybrid joins'
        f' the best {by_words["joined"]} passages of both.'
    )
  if beir := result.get('beir'):
    yield (
        f': BEIR has {beir["documents"]} documents and'
        f' {beir["without_passage"]} without text, which are never retrieved;'
        f' {beir["without_relevant"]} of the {beir["queries"]} queries of'
        f' {beir["qrels"]} have no relevant document and count as 0.'
    )
  if unknown := result.get('unknown_gold'):
    names = ', '.join(map(repr, unknown['first']))
    more = ', ...' if unknown['ids'] > len(unknown['first']) else ''
    yield (
        f': {unknown["ids"]} gold passages of {unknown["questions"]} questions'
        f' are not in the corpus ({names}{more}); {unknown["counted"]}.'
    )
  masked = result.get('masked') or {}
  trained = masked.get('trivial_in_training')
  if trained != masked.get('trivial'):
    yield (
        f': measured with config.trivial={masked["trivial"]}, trained with'
        f' {trained}.'
    )


def new_figure(width: float, height: float) -> Any:
  """Returns an empty figure of a size in inches.

  pyplot would keep the figure, and choose a window system.

  Raises:
    ImportError: matplotlib is not installed; names the command to install it.
  """
  with extension.needed_by('A plot', 'plot'):
    from matplotlib import figure
  return figure.Figure(figsize=(width, height), layout='constrained')


def plot(workdir: pathlib.Path | str) -> list[pathlib.Path]:
  """Draws recall.png, answers.png and training.png of the available figures.

  Raises:
    ImportError: see `new_figure`.
  """
  folder = pathlib.Path(workdir) / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  drawn = []
  results = load_all(workdir)
  pictures = {
      'recall.png': recall_panels(results),
      'training.png': training_panels(metrics_lib.read_metrics(workdir)),
  }
  for name, panels in pictures.items():
    if not panels:
      continue
    # A panel of single points is drawn only if all panels are such.
    panels = without_single_points(panels) or panels
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = new_figure(6 * columns, 3.6 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, curves) in zip(axes, panels.items(), strict=False):
      for label, points in curves.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=label, marker='.', markersize=4)
      axis.set_title(title, fontsize=10)
      axis.set_xlabel('training step')
      axis.grid(alpha=0.3)
      if any(curves):  # A single curve has no name.
        axis.legend(fontsize=8)
    for axis in axes[len(panels) :]:
      axis.set_axis_off()
    drawn.append(folder / name)
    figure.savefig(drawn[-1], dpi=120)
  answers = folder / f'{results[-1]["step"]}{QUESTIONS}' if results else None
  if answers is not None and answers.is_file():
    records = [json.loads(line) for line in files_lib.read_lines(answers)]
    if all('exact_match' in record for record in records):
      figure = new_figure(12, 3.6)
      _draw_answers(figure, results[-1], records)
      drawn.append(folder / 'answers.png')
      figure.savefig(drawn[-1], dpi=120)
  return drawn


def _draw_answers(
    figure: Any, result: Result, records: list[dict[str, Any]]
) -> None:
  """Draws recall, calibration and failures of the reader."""
  recall, calibration, failures = figure.subplots(1, 3)
  ranks = np.array([record['answer_rank'] for record in records])
  depths = np.arange(1, max(int(ranks.max()), 1) + 1)
  found = (ranks[:, None] > 0) & (ranks[:, None] <= depths)
  recall.plot(depths, found.mean(axis=0))
  recall.set(
      title='an answer among the first k passages', xlabel='k', ylim=(0, 1)
  )
  recall.set_xscale('log')
  p = np.array([record['probability'] for record in records])
  right = np.array([record['exact_match'] for record in records])
  bins = np.minimum((p * 10).astype(int), 9)
  used = [b for b in range(10) if (bins == b).any()]
  calibration.plot([0, 1], [0, 1], color='grey', linewidth=0.8)
  calibration.plot(
      [p[bins == b].mean() for b in used],
      [right[bins == b].mean() for b in used],
      marker='o',
  )
  calibration.set(
      title='calibration', xlabel='probability given to the answer',
      ylabel='exact match', xlim=(0, 1), ylim=(0, 1),
  )
  shares = result['questions']['all']['open_qa']
  names = ('exact_match', 'misread', 'not_read', 'not_retrieved')
  labels = [name.replace('_', ' ') for name in names]
  failures.barh(labels, [shares[name] for name in names])
  failures.invert_yaxis()
  failures.set(title='where it fails: share of the questions', xlim=(0, 1))
  for axis in (recall, calibration, failures):
    axis.grid(alpha=0.3)


def write(workdir: pathlib.Path | str, results: list[Result]) -> str:
  """Writes report.md and the plots of all saved results.

  Without matplotlib, a warning replaces the plots. Returns the table of
  `results` and the names of the files, for printing.
  """
  path = pathlib.Path(workdir) / FOLDER / 'report.md'
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    plots = plot(workdir)
  except ImportError as error:
    log.warning('%s', error)
    plots = []
  pictures = ''.join(f'\n![{p.stem}]({p.name})\n' for p in plots)
  title = f'# Evaluation of {pathlib.Path(workdir).resolve().name}\n\n'
  path.write_text(title + table(load_all(workdir)) + pictures, encoding='utf-8')
  files = '\n'.join(str(p) for p in (path, *plots))
  return f'{table(results)}\nWritten:\n{files}'


Curves = dict[str, list[tuple[int, float]]]
Panels = dict[str, Curves]


def recall_panels(results: list[Result]) -> Panels:
  """Returns a panel for each group of questions and each kind of rank."""
  panels: Panels = {}
  kinds = {'gold': 'gold passage', 'answer': 'answer string'}
  readers = {
      'accuracy_with_retrieval': 'with retrieval',
      'accuracy_without_retrieval': 'without',
  }
  for result in results:
    for group, values in result.get('questions', {}).items():
      for kind, words in kinds.items():
        for name, value in values.get(kind, {}).items():
          curves = panels.setdefault(f'{words}, {group} questions', {})
          curves.setdefault(_label(name), []).append((result['step'], value))
    for kind, words in _OWN_PASSAGES.items():
      figures = result.get('held_out_sentences', {}).get(kind, {})
      for name, value in figures.items():
        curves = panels.setdefault(f'own passage, {words}', {})
        curves.setdefault(_label(name), []).append((result['step'], value))
    masked = result.get('masked') or {}
    for name, label in readers.items():
      if masked.get(name) is not None:
        curves = panels.setdefault('masked spans filled in', {})
        curves.setdefault(label, []).append((result['step'], masked[name]))
  return panels


def _label(figure: str) -> str:
  label = figure.replace('_at_', '@').replace('mrr', 'MRR')
  return label.replace('ndcg', 'nDCG')


def without_single_points(panels: Panels) -> Panels:
  """Returns the panels with a curve of more than one point."""
  return {
      title: curves
      for title, curves in panels.items()
      if any(len(points) > 1 for points in curves.values())
  }


def training_panels(lines: list[dict[str, Any]]) -> Panels:
  """Returns a panel for each metric of `_PANELS` that the lines have."""
  found = {title: points(lines, name) for title, name in _PANELS}
  return {title: {'': curve} for title, curve in found.items() if curve}


def points(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
  """Returns the steps and values of a metric."""
  return [
      (line['step'], line[name])
      for line in lines
      # A loss that is not finite is a string in the file.
      if isinstance(line.get(name), (int, float))
  ]


def markdown(heads: Sequence[str], *rows: Sequence[Any]) -> str:
  """Returns a table."""
  lines = [heads, ['---'] * len(heads), *rows]
  return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def _percent(value: float | None) -> str:
  return '' if value is None else f'{100 * value:.1f}'


def _number(value: float | None) -> str:
  if value is None:
    return ''
  return str(value) if isinstance(value, int) else f'{value:.3f}'


def _cells(
    figures: Mapping[str, Any],
    columns: Mapping[str, str],
    written: Callable[[float | None], str] = _percent,
) -> list[str]:
  """Returns each figure, with its interval if it has one."""
  cells = []
  for name in columns.values():
    cells.append(written(figures.get(name)))
    if bounds := figures.get(f'{name}_interval'):
      cells[-1] += f' ({written(bounds[0])} to {written(bounds[1])})'
  return cells
