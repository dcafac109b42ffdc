"""Figures of a run that tell whether `realm` learns, and what they mean.

A retriever learns from the reader's use of its candidates. So the reader must
use a passage that holds the answer, and some candidate must hold it. The bounds
are `config.gates`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from realm_jax import config as config_lib

# Fall of gates/recall_at_20 during a run from which it is no noise.
_FALL = 0.1


@dataclasses.dataclass(frozen=True)
class Gate:
  """A figure that `realm` needs to be good enough.

  name: of the metric `gates/NAME`.
  diagnosis: the state of a run that misses it.
  about: the figure in words.
  mend: what to do.
  bound: field of `config.gates`; empty: that of the same name.
  at_most: whether the bound is the largest good value, not the least.
  """

  name: str
  diagnosis: str
  about: str
  mend: str
  bound: str = ''
  at_most: bool = False

  def problem(self, value: float, config: config_lib.Config) -> str | None:
    """Returns what is wrong with a value and how to mend it; None: nothing."""
    name = self.bound or self.name
    bound = getattr(config.gates, name)
    if value <= bound if self.at_most else value >= bound:
      return None
    side = 'above' if self.at_most else 'below'
    return (
        f'{self.about} (gates/{self.name}) is {value:.3g}, {side}'
        f' config.gates.{name}={bound:g}. {self.mend}'
    )


_WARM_READER = (
    'The reader hardly uses what it reads, so the retriever gets no signal from'
    ' it. Train `mlm` for longer, with config.mlm.views.'
)
_WARM_RETRIEVER = (
    'There is little to learn from such candidates. Train `ict` for longer, or'
    ' with larger batches.'
)
_NO_SUBJECT = (
    'For most sentences the null document is the right choice. Mask sentences'
    ' of the passages themselves (config.sentences=knowledge), or search a'
    ' corpus about the same subjects.'
)
GATES = (
    Gate(
        'reader_accuracy', 'cold reader',
        'the share of masked spans that the reader fills in right from a'
        ' passage with the answer', _WARM_READER,
    ),
    Gate(
        'reader_utility', 'cold reader',
        'the mean of log p(y|z,x) - log p(y|null,x) for a passage with the'
        ' answer', _WARM_READER,
    ),
    Gate(
        'recall_at_20', 'cold retriever',
        'the share of masked sentences whose own passage is among the best 20',
        _WARM_RETRIEVER,
    ),
    Gate(
        'findable', 'nothing to find',
        'the share of masked sentences whose answer stands in another passage'
        ' of the article',
        _NO_SUBJECT, bound='answer_in_candidates',
    ),
    Gate(
        'answer_in_20', 'nothing to find',
        'the share of masked sentences, of no passage, whose answer stands in'
        ' one of the best 20',
        _NO_SUBJECT, bound='answer_in_candidates',
    ),
    Gate(
        'answer_in_candidates', 'cold retriever',
        'the share of masked sentences of which a candidate holds the answer',
        _WARM_RETRIEVER,
    ),
    Gate(
        'null_share', 'fled to null', 'the mean of p(null|x)',
        'No passage has an effect, and none is learned. Lower'
        ' config.optimizer.retriever_learning_rate, raise'
        ' config.optimizer.retriever_delay, or train `mlm` for longer.',
        at_most=True,
    ),
    Gate(
        'trivial_share', 'trivial candidates',
        'the share of masked sentences whose text around the answer stands in a'
        ' candidate',
        'The reader copies, and the retriever learns to find copies. Set'
        ' config.trivial=passage; prepare a corpus of an older version again.',
        at_most=True,
    ),
)


# A gate says nothing new if one of these is missed, too.
_CAUSES = {
    'answer_in_20': {'recall_at_20'},
    'answer_in_candidates': {'findable', 'answer_in_20'},
}


def first_values(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """Returns the first values of a run that `problems` compares with.

  Args:
    lines: of metrics.jsonl.
  """
  first: dict[str, float] = {}
  for line in lines:
    for name in ('gates/recall_at_20', 'train/retrieval_utility'):
      value = line.get(name)
      if isinstance(value, (int, float)):  # A string: it is not finite.
        first.setdefault(name.partition('/')[2], value)
  return first


def problems(
    values: Mapping[str, float],
    config: config_lib.Config,
    first: Mapping[str, float] | None = None,
) -> dict[str, tuple[str, str]]:
  """Returns what is wrong: diagnosis and text, by the name of a figure.

  Args:
    values: of `gates.Gates.measure`, without `gates/`; some may be missing.
    config: of the job; has the bounds.
    first: the first values of the run, of `first_values` or of an earlier
      measurement; None: `values` are the first.
  """
  found: dict[str, tuple[str, str]] = {}
  falling = _falling_recall(values, first or {}, config)
  if falling is not None:
    found['falling_recall'] = 'falling recall', falling
  for gate in GATES:
    if gate.name not in values:
      continue
    if _CAUSES.get(gate.name, set()) & found.keys():
      continue
    if falling is not None and gate.diagnosis == 'cold retriever':
      continue  # It was warm.
    text = gate.problem(values[gate.name], config)
    if text is not None:
      found[gate.name] = gate.diagnosis, text
  return found


def _falling_recall(
    values: Mapping[str, float],
    first: Mapping[str, float],
    config: config_lib.Config,
) -> str | None:
  if 'recall_at_20' not in values.keys() & first.keys():
    return None
  before, now = first['recall_at_20'], values['recall_at_20']
  if before - now <= _FALL:
    return None
  utility = first.get('retrieval_utility')
  nats = '' if utility is None else f' ({utility:.3g} nats in the first line)'
  return (
      'the share of masked sentences whose own passage is among the best 20'
      f' (gates/recall_at_20) fell from {before:.3g} to {now:.3g}. The'
      ' retriever unlearns what it had. If train/retrieval_utility begins'
      f' below 0{nats}, passages mislead the reader, and the retriever learns'
      f' to avoid them: {misled_reader(config)} Else lower'
      ' config.optimizer.retriever_learning_rate.'
  )


def misled_reader(config: config_lib.Config) -> str:
  """Returns what to do for a reader that passages mislead."""
  mend = 'train `mlm` with more of `article` and `random` in config.mlm.views'
  if 'reader' in config.optimizer.frozen:
    mend += ', or take `reader` out of config.optimizer.frozen'
  return mend + '.'
