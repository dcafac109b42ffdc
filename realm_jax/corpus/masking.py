"""Masks: which wordpieces of a sentence are hidden and predicted.

A mask is a function of a sentence and a random generator. `config.masking`
names one of `MASKS` or a function of one's own, as `package.module:name`.
"""

from typing import Any, NamedTuple

import numpy as np

MASKS = {
    'salient': 'realm_jax.corpus.masking:salient',
    'random_span': 'realm_jax.corpus.masking:random_span',
    'random_token': 'realm_jax.corpus.masking:random_token',
}


class Sentence(NamedTuple):
  """A sentence to mask.

  Attributes:
    ids: its wordpieces without [CLS] and [SEP], as far as a query shows them.
    spans_S2: all its salient spans that can be masked, half-open ranges of
      `ids`.
    span: one of them, drawn uniformly.
    max_masks: how many wordpieces a mask may hide, `config.lengths.masks`.
    options: `config.options`, for masks of one's own.
  """

  ids: np.ndarray
  spans_S2: np.ndarray
  span: tuple[int, int]
  max_masks: int
  options: dict[str, Any]


def salient(sentence: Sentence, rng: np.random.Generator) -> np.ndarray:
  """One salient span (Guu et al. 2020, section 3.4)."""
  del rng
  return np.arange(*sentence.span)


def random_span(sentence: Sentence, rng: np.random.Generator) -> np.ndarray:
  """A span as long as a salient one of the sentence, anywhere in it."""
  size = sentence.span[1] - sentence.span[0]
  start = rng.integers(0, len(sentence.ids) - size, endpoint=True)
  return np.arange(start, start + size)


def random_token(sentence: Sentence, rng: np.random.Generator) -> np.ndarray:
  """15 % of the wordpieces, as BERT masks them."""
  length = len(sentence.ids)
  count = min(max(round(0.15 * length), 1), sentence.max_masks)
  return np.sort(rng.choice(length, count, replace=False))


def check(positions: Any, sentence: Sentence, setting: str) -> None:
  """Raises ValueError if a mask returned positions that cannot be masked."""
  limit = min(len(sentence.ids), sentence.max_masks)
  ok = (
      isinstance(positions, np.ndarray)
      and positions.ndim == 1
      and np.issubdtype(positions.dtype, np.integer)
      and 1 <= len(positions) <= limit
      and positions[0] >= 0
      and positions[-1] < len(sentence.ids)
      and (np.diff(positions) > 0).all()
  )
  if not ok:
    raise ValueError(
        f'config.masking={setting!r} returned {positions!r} for a sentence of'
        f' {len(sentence.ids)} wordpieces; a mask returns 1 to {limit}'
        ' positions of wordpieces, ascending, as an array of integers.'
    )
