"""The figures, table and plots of the ablations, from their runs."""

import math
import pathlib
import statistics
from typing import Any

import harness
from scipy import stats

from realm_jax.evaluation import report
from realm_jax.runtime import metrics as metrics_lib

# Row -> its description in the table.
ROWS = {
    'realm': 'REALM, refreshed every 10 steps',
    'ict': 'ICT alone',
    'frozen': 'REALM, retriever frozen',
    'random_token': 'random-token masks',
    'random_span': 'random-span masks',
    'no_null': 'no null document',
    'own_corpus': 'pretraining corpus = knowledge corpus',
    'trivial': 'the same, trivial candidates allowed',
    'fresh': 'refreshed every 5 steps',
    'stale_10x': 'refreshed 10 times more rarely',
    'stale_30x': 'refreshed 30 times more rarely',
    'never': 'never refreshed',
    'sync': 'waits for each refresh (sync)',
    'eager': 'adopts a refresh when it is ready (eager)',
    'pieces': 'a small vocabulary, which divides names',
    'token': 'the same, marginalised for each token',
    'k2': '2 candidates (of which one is null)',
    'k4': '4 candidates',
    'k8': '8 candidates',
    'k16': '16 candidates',
    'shared_bert': 'a projection for each tower',
    'separate': 'separate towers',
    'scann': 'ScaNN in the place of exact search',
}
# Figure -> its place in an evaluation, and its heading.
FIGURES = {
    'recall_at_1': ('questions.held_out.gold.recall_at_1', 'recall@1'),
    'recall_at_5': ('questions.held_out.gold.recall_at_5', 'recall@5'),
    'accuracy': ('masked.accuracy_with_retrieval', 'masked accuracy'),
    'accuracy_null': ('masked.accuracy_without_retrieval', 'without passages'),
    'null_share': ('masked.null_share', 'p(null)'),
}
# Claims of the paper: a row, and the row that it should beat.
CLAIMS = (
    ('realm', 'ict'),
    ('realm', 'frozen'),
    ('realm', 'stale_30x'),
    ('realm', 'random_token'),
    ('realm', 'random_span'),
    ('own_corpus', 'trivial'),
)
# Rows that should be equal, within the noise.
_SAME = (
    ('realm', 'sync'), ('realm', 'eager'), ('fresh', 'sync'),
    ('pieces', 'token'), ('realm', 'scann'),
)
_CLAIMED = ('recall_at_1', 'recall_at_5', 'accuracy')  # In these figures.


def collect(
    workdir: pathlib.Path, recorded: dict[str, Any] | None = None
) -> dict[str, Any]:
  """Reads all finished runs below a folder, as flat figures.

  Args:
    workdir: of the runs.
    recorded: earlier figures; a row that the workdir lacks is taken from there.
  """
  figures: dict[str, Any] = {}
  for row in ROWS:
    done = [
        folder / row
        for folder in sorted(workdir.glob('seed*'))
        if (folder / row / 'summary.json').exists()
        and report.load_all(folder / row)
    ]
    if done:
      figures |= _of_row(row, done)
    else:
      figures |= {
          name: value
          for name, value in (recorded or {}).items()
          if name.startswith((f'{row}_', f'curve_{row}_'))
          and '_below_' not in name
      }
  return figures | _compare(figures)


def _of_row(row: str, done: list[pathlib.Path]) -> dict[str, Any]:
  """The figures of a row, from its workdirs, one for each seed."""
  figures: dict[str, Any] = {
      f'{row}_seeds': [int(d.parent.name[4:]) for d in done]
  }
  results = [report.load_all(d) for d in done]
  figures[f'{row}_passages'] = results[0][-1]['passages']
  for name, (path, _) in FIGURES.items():
    last = [_at(of_seed[-1], path) for of_seed in results]
    if None in last:
      continue  # ICT has no reader.
    figures[f'{row}_{name}'] = last
    figures |= _summary(last, f'{row}_{name}')
    if len(results[0]) > 1:
      figures[f'curve_{row}_steps'] = [r['step'] for r in results[0]]
      figures[f'curve_{row}_{name}'] = [
          [_at(result, path) for result in of_seed] for of_seed in results
      ]
  lines = [metrics_lib.read_metrics(d) for d in done]
  if 'train/null_share' in lines[0][-1]:
    figures[f'curve_{row}_train_steps'] = [x['step'] for x in lines[0]]
    figures[f'curve_{row}_train_null_share'] = [
        [x['train/null_share'] for x in of_seed] for of_seed in lines
    ]
    figures[f'{row}_max_age_steps'] = [
        max(x['refresh/age_steps'] for x in of_seed) for of_seed in lines
    ]
  return figures


def _compare(figures: dict[str, Any]) -> dict[str, Any]:
  """Differences from `realm` seed by seed, and the claims of the paper."""
  found: dict[str, Any] = {}

  def by_seed(row: str, name: str) -> dict[int, float]:
    values = figures.get(f'{row}_{name}')
    if values is None:
      return {}
    return dict(zip(figures[f'{row}_seeds'], values, strict=True))

  pairs = [('realm', row) for row in list(ROWS)[1:]]
  for ours, theirs in dict.fromkeys((*pairs, *CLAIMS, *_SAME)):
    for name in FIGURES:
      a, b = by_seed(ours, name), by_seed(theirs, name)
      if differences := [a[s] - b[s] for s in sorted(set(a) & set(b))]:
        found |= _summary(differences, f'{theirs}_{name}_below_{ours}')
  for name in _CLAIMED:
    for ours, theirs in CLAIMS:
      low = figures.get(f'{ours}_{name}_low')
      high = figures.get(f'{theirs}_{name}_high')
      if low is not None and high is not None:
        found[f'claim_{name}_{ours}_above_{theirs}'] = low > high
    for ours, theirs in _SAME:
      difference = f'{theirs}_{name}_below_{ours}'
      low = found.get(f'{difference}_low')
      if low is not None:
        same = low <= 0 <= found[f'{difference}_high']
        found[f'claim_{name}_{ours}_like_{theirs}'] = same
  return found


def _at(result: Any, path: str) -> Any:
  for name in path.split('.'):
    result = (result or {}).get(name)
  return result


def _summary(values: list[float], name: str) -> dict[str, float | None]:
  """Mean over seeds and its 95 % interval, which one seed does not have."""
  mean, low, high = statistics.mean(values), None, None
  if len(values) > 1:
    error = statistics.stdev(values) / math.sqrt(len(values))
    width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    low, high = mean - width, mean + width
  return {f'{name}_mean': mean, f'{name}_low': low, f'{name}_high': high}


def markdown(figures: dict[str, Any]) -> str:
  """The table: means, and the half width of their intervals."""

  def cell(name: str) -> str:
    if f'{name}_mean' not in figures:
      return ''
    mean, high = figures[f'{name}_mean'], figures[f'{name}_high']
    return f'{mean:.3f}' + ('' if high is None else f' ±{high - mean:.3f}')

  heads = [head for _, head in FIGURES.values()]
  rows = [
      [
          words,
          *(cell(f'{row}_{name}') for name in FIGURES),
          cell(f'{row}_recall_at_1_below_realm'),
          len(figures[f'{row}_seeds']),
      ]
      for row, words in ROWS.items()
      if f'{row}_seeds' in figures
  ]
  found = report.markdown(['', *heads, 'recall@1 below REALM', 'seeds'], *rows)
  compared = []
  for pairs, relation, words in (
      (CLAIMS, 'above', ('meet', '**apart**')),
      (_SAME, 'like', ('differ', '**same**')),
  ):
    for ours, theirs in pairs:
      cells = []
      for name in _CLAIMED:
        holds = figures.get(f'claim_{name}_{ours}_{relation}_{theirs}')
        difference = cell(f'{theirs}_{name}_below_{ours}')
        cells.append(
            '' if holds is None else f'{difference}, {words[bool(holds)]}'
        )
      if any(cells):
        compared.append([f'{ours} {relation} {theirs}', *cells])
  if not compared:  # One seed has no intervals.
    return f'{found}\n'
  heads = ['difference, seed by seed', *(FIGURES[name][1] for name in _CLAIMED)]
  return (
      f'{found}\n\n{report.markdown(heads, *compared)}\n\n'
      'apart: the intervals of the two means do not meet. same: that of the'
      ' difference holds 0.\n'
  )


def plot(figures: dict[str, Any], path: pathlib.Path) -> None:
  """Draws curves over training, the staleness curve, and p(null)."""
  figure, axes = harness.panels(2, 3.7, 3)

  def curves(axis: Any, rows: list[str], steps: str, name: str) -> None:
    for row in rows:
      if f'curve_{row}_{name}' not in figures:
        continue
      x = figures[f'curve_{row}_{steps}']
      seeds = zip(*figures[f'curve_{row}_{name}'], strict=True)
      means, lows, highs = zip(
          *(_summary(list(values), '').values() for values in seeds),
          strict=True,
      )
      (line,) = axis.plot(x, means, label=ROWS[row])
      if None not in lows:
        axis.fill_between(x, lows, highs, color=line.get_color(), alpha=0.15)
    axis.set_xlabel('training step')

  def bars(axis: Any, title: str, **labels: str) -> None:
    rows = [row for row in labels if f'{row}_seeds' in figures]
    for name in _CLAIMED:
      means = [figures[f'{row}_{name}_mean'] for row in rows]
      highs = [figures[f'{row}_{name}_high'] for row in rows]
      errors = [(y or x) - x for x, y in zip(means, highs, strict=True)]
      axis.errorbar(
          [labels[row] for row in rows], means, errors, marker='o', capsize=3,
          label=FIGURES[name][1],
      )
    axis.set_title(title)

  masks = ['realm', 'frozen', 'random_token', 'random_span', 'never']
  for axis, name in zip(axes, _CLAIMED, strict=False):
    curves(axis, masks, 'steps', name)
    if f'ict_{name}_mean' in figures:  # All rows start there.
      start = figures[f'ict_{name}_mean']
      axis.axhline(start, color='0.4', linestyle='--', label=ROWS['ict'])
    axis.set_title(f'{FIGURES[name][1]}, held-out facts')
  null = ['realm', 'random_token', 'own_corpus', 'trivial', 'never', 'k16']
  curves(axes[3], null, 'train_steps', 'train_null_share')
  axes[3].set_title('p(null | x) in training')
  bars(
      axes[4],
      'steps between two refreshes',
      fresh='5', realm='10', stale_10x='100', stale_30x='300', never='never',
  )
  bars(
      axes[5],
      'candidates, the null document included',
      k2='2', k4='4', realm='5', k8='8', k16='16',
  )
  for axis in axes:
    axis.set_ylim(0, 1)
  harness.save(figure, path)
