"""`realm-jax doctor`: what is wrong with a run, in words.

It reads the config, the metrics and the state of the index, and computes
nothing. It may run while the trainer does.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import pathlib
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import status
from realm_jax.evaluation import report
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer import diagnosis as diagnosis_lib

# Figures that are averaged over the last lines of the log.
_NOISY = (
    'train/loss', 'train/accuracy', 'train/null_share',
    'train/retrieval_utility', 'train/answer_in_candidates',
    'train/view_fallback',
)
_LINES = 10
# Least share of the probe's results that a refresh leaves the same.
_OVERLAP = 0.5
_MISLED = -0.1  # Utility of the candidates, in nats, from which it is no noise.
_RETRIEVER_OBJECTIVES = ('realm', 'open_qa')


@dataclasses.dataclass(frozen=True)
class Finding:
  """Something that is wrong.

  diagnosis: two or three words.
  text: the figure, its bound, the meaning, and what to do.
  """

  diagnosis: str
  text: str


@dataclasses.dataclass(frozen=True)
class Report:
  """The state of a run.

  step: of the last metrics.
  figures: what was looked at; the last values, or means of the last lines.
  findings: empty for a healthy run.
  """

  workdir: str
  objective: str
  step: int
  steps: int
  figures: dict[str, float]
  findings: list[Finding]

  def as_text(self) -> str:
    step = f'step {self.step:,} of {self.steps:,}'
    lines = [f'{self.workdir}: {self.objective}, {step}']
    width = max(map(len, self.figures), default=0)
    lines += [f'  {n:{width}}  {x:.4g}' for n, x in self.figures.items()]
    for finding in self.findings:
      lines += ['', f'{finding.diagnosis}: {finding.text}']
    found = f'{len(self.findings)} finding(s)' if self.findings else 'Healthy'
    return '\n'.join([*lines, '', f'{found}. docs/learning.md explains them.'])


def examine(workdir: pathlib.Path | str) -> Report:
  """Reads a workdir and returns what is wrong.

  Raises:
    FileNotFoundError: it is no workdir.
    ValueError: it has no metrics yet, or its config is damaged.
  """
  config = config_lib.resolve(config_lib.read(workdir))
  lines = metrics_lib.read_metrics(workdir)
  if not lines:
    raise ValueError(
        f'{workdir} has no metrics: no step has been logged yet, every'
        f' config.log_interval={config.log_interval} steps.'
    )
  figures = _figures(lines)
  step = int(lines[-1]['step'])
  findings = [
      *_diverged(lines),
      *_gates(lines, figures, config),
      *_retriever(figures, config),
      *_index(workdir, figures, config),
  ]
  return Report(
      str(workdir), config.objective, step, config.steps, figures, findings
  )


def _figures(lines: list[dict[str, Any]]) -> dict[str, float]:
  """Returns the figures of a run that are looked at."""

  def values(name: str) -> list[float]:
    return [value for _, value in report.points(lines, name)]

  figures = {}
  for name in _NOISY:
    if found := values(name):
      figures[name] = float(np.mean(found[-_LINES:]))
  names = {name for line in lines for name in line if name.startswith('gates/')}
  for name in (*sorted(names), 'refresh/probe_overlap'):
    if found := values(name):
      figures[name] = found[-1]
  # The index begins with age 0, so the later half tells.
  if ages := values('refresh/age_steps'):
    figures['refresh/age_steps'] = max(ages[len(ages) // 2 :])
  # The trainer counts from its own start.
  if failures := values('refresh/builder_failures'):
    figures['refresh/builder_failures'] = max(failures)
  return figures


def _diverged(lines: list[dict[str, Any]]) -> Iterator[Finding]:
  loss = lines[-1].get('train/loss')
  if isinstance(loss, str):
    yield Finding(
        'diverged',
        f'the loss (train/loss) of step {lines[-1]["step"]} is {loss}, not'
        ' finite. Lower config.optimizer.learning_rate, or lengthen'
        ' config.optimizer.warmup_steps, and begin again.',
    )


def _gates(
    lines: list[dict[str, Any]],
    figures: Mapping[str, float],
    config: config_lib.Config,
) -> Iterator[Finding]:
  values = {
      name.removeprefix('gates/'): value
      for name, value in figures.items()
      if name.startswith('gates/')
  }
  if 'train/null_share' in figures:  # Many more sentences than a gate's.
    values['null_share'] = figures['train/null_share']
  first = diagnosis_lib.first_values(lines)
  found = diagnosis_lib.problems(values, config, first)
  for diagnosis, text in found.values():
    yield Finding(diagnosis, text)
  utility = figures.get('train/retrieval_utility', 0.0)
  if utility < _MISLED and 'cold reader' not in dict(found.values()):
    yield Finding(
        'cold reader',
        'the mean of log p(y|z,x) - log p(y|null,x) for the candidates'
        f' (train/retrieval_utility) is {utility:.3g}, below {_MISLED}.'
        ' Passages mislead the reader, so the retriever learns to avoid them:'
        f' {diagnosis_lib.misled_reader(config)}',
    )
  allows = config.objective == 'realm' and config.trivial == 'none'
  if allows and 'trivial_share' not in found:
    share = values.get('trivial_share')
    number = 'not measured' if share is None else f'{share:.3g}'
    yield Finding(
        'trivial candidates',
        'config.trivial=none lets passages with the text of the sentence be'
        f' retrieved (gates/trivial_share is {number}). Set'
        ' config.trivial=passage, unless it is the ablation.',
    )


def _retriever(
    figures: Mapping[str, float], config: config_lib.Config
) -> Iterator[Finding]:
  accuracy, bound = figures.get('train/accuracy'), config.gates.recall_at_20
  if config.objective == 'ict' and accuracy is not None and accuracy < bound:
    yield Finding(
        'cold retriever',
        'the share of sentences whose own passage is the best of the batch'
        f' (train/accuracy) is {accuracy:.3g}, below'
        f' config.gates.recall_at_20={bound:g}. Recall among all passages is'
        ' lower. Train for longer.',
    )


def _index(
    workdir: pathlib.Path | str,
    figures: Mapping[str, float],
    config: config_lib.Config,
) -> Iterator[Finding]:
  refresh = config.refresh
  fixed = config_lib.documents_are_frozen(config)
  age, bound = figures.get('refresh/age_steps'), refresh.interval + refresh.lag
  if config.objective not in _RETRIEVER_OBJECTIVES and age is None:
    return
  if not fixed and refresh.policy != 'adaptive' and (age or 0) > bound:
    yield Finding(
        'stale index',
        f'the index (refresh/age_steps) is up to {age:g} steps old, more than'
        f' config.refresh.interval + lag={bound}. The candidates are those of'
        ' an earlier retriever. See whether the builder runs (`realm-jax index'
        f' info --workdir={workdir}`), and that config.refresh.policy='
        f'{refresh.policy} is meant.',
    )
  overlap = figures.get('refresh/probe_overlap')
  if not fixed and overlap is not None and overlap < _OVERLAP:
    yield Finding(
        'stale index',
        'the share of results that the last refresh left the same'
        f' (refresh/probe_overlap) is {overlap:.3g}, below {_OVERLAP}. Most'
        ' candidates before it were wrong. Lower config.refresh.interval and'
        ' lag, or config.optimizer.retriever_learning_rate.',
    )
  failures = figures.get('refresh/builder_failures', 0)
  if failures:
    yield Finding(
        'stale index',
        f'the index builder has failed {failures:g} time(s)'
        ' (refresh/builder_failures), more than 0. Its log names the cause.',
    )
  info = status.info(workdir)
  for record in info['generations']:
    if 'problem' in record:
      yield Finding(
          'damaged index',
          f'{record["problem"]} Run `realm-jax index verify'
          f' --workdir={workdir}`.',
      )
  built = max([record['step'] for record in info['generations']], default=0)
  behind = max(info['snapshots'], default=0) - built
  if refresh.policy not in ('none', 'adaptive') and behind > bound:
    yield Finding(
        'stale index',
        f'the newest generation is that of step {built}, {behind} steps before'
        f' the newest snapshot, more than config.refresh.interval + lag='
        f'{bound}. The builder is slow or does not run. Give it a device of'
        ' its own, or raise config.refresh.interval.',
    )
