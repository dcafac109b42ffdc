"""Masks: which wordpieces of a sentence are hidden and predicted.

A mask is a function of a sentence and a random generator. `config.masking`
names one of `MASKS` or a function of one's own, as `package.module:name`. It
returns the positions of the wordpieces, or a `Replaced`.
"""

from typing import Any, NamedTuple

import numpy as np

from realm_jax.corpus import tokenizer as tokenizer_lib

MASKS = {
    'salient': 'realm_jax.corpus.masking:salient',
    'random_span': 'realm_jax.corpus.masking:random_span',
    'random_token': 'realm_jax.corpus.masking:random_token',
    'bert': 'realm_jax.corpus.masking:bert',
    'bert_whole_words': 'realm_jax.corpus.masking:bert_whole_words',
}
# Shares of the positions that BERT's masks choose; the rest is read as it is.
_MASKED, _RANDOM = 0.8, 0.1


class Sentence(NamedTuple):
  """A sentence to mask.

  Attributes:
    ids: its wordpieces without [CLS] and [SEP], as far as a query shows them.
    spans_S2: all its salient spans that can be masked, half-open ranges of
      `ids`.
    span: one of them, drawn uniformly.
    max_masks: how many wordpieces a mask may hide, `config.lengths.masks`.
    options: `config.options`, for masks of one's own.
    tokenizer: of the corpus.
  """

  ids: np.ndarray
  spans_S2: np.ndarray
  span: tuple[int, int]
  max_masks: int
  options: dict[str, Any]
  tokenizer: tokenizer_lib.Tokenizer | None = None


class Replaced(NamedTuple):
  """Wordpieces to predict, and what is read in their places.

  positions: in `Sentence.ids`, ascending.
  ids: the wordpieces that are read there, not always [MASK].
  """

  positions: np.ndarray
  ids: np.ndarray


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


def bert(
    sentence: Sentence, rng: np.random.Generator
) -> Replaced:
  """15 % of the wordpieces (Devlin et al. 2019, section 3.1).

  80 % of them are read as [MASK], 10 % as a random wordpiece, 10 % as they are.
  """
  return _replaced(random_token(sentence, rng), sentence, rng)


def bert_whole_words(
    sentence: Sentence, rng: np.random.Generator
) -> Replaced:
  """As `bert`, of whole words: all wordpieces of a word, or none.

  A word of more wordpieces than are left is passed over.
  """
  assert sentence.tokenizer is not None
  begins = sentence.tokenizer.starts_word(sentence.ids).copy()
  begins[0] = True  # The sentence may begin inside a word.
  starts = np.flatnonzero(begins)
  sizes = np.diff(starts, append=len(begins))
  left = len(random_token(sentence, rng))
  positions: list[int] = []
  order = rng.permutation(len(starts))
  for start, size in zip(
      starts[order].tolist(), sizes[order].tolist(), strict=True
  ):
    if size <= left:
      positions += range(start, start + size)
      left -= size
  if not positions:  # All words are too long: the beginning of one.
    start = int(starts[order[0]])
    positions = [*range(start, start + left)]
  return _replaced(np.sort(positions), sentence, rng)


def _replaced(
    positions: np.ndarray, sentence: Sentence, rng: np.random.Generator
) -> Replaced:
  assert sentence.tokenizer is not None
  drawn = rng.random(len(positions))
  # Not [PAD], which attention leaves out.
  random = rng.integers(1, sentence.tokenizer.vocab_size, len(positions))
  random = np.where(random <= sentence.tokenizer.pad_id, random - 1, random)
  kept = sentence.ids[positions].astype(np.int64)
  ids = np.where(drawn < _MASKED + _RANDOM, random, kept)
  ids[drawn < _MASKED] = sentence.tokenizer.mask_id
  return Replaced(positions, ids)


def check(chosen: Any, sentence: Sentence, setting: str) -> None:
  """Raises ValueError if a mask returned what cannot be masked or read."""
  limit = min(len(sentence.ids), sentence.max_masks)
  positions = chosen.positions if isinstance(chosen, Replaced) else chosen
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
  if not isinstance(chosen, Replaced):
    return
  ids, size = np.asarray(chosen.ids), len(positions)
  known = sentence.tokenizer.vocab_size if sentence.tokenizer else np.inf
  if (
      ids.shape != (size,)
      or not np.issubdtype(ids.dtype, np.integer)
      or ((ids < 0) | (ids >= known)).any()
  ):
    raise ValueError(
        f'config.masking={setting!r} replaced {size} wordpieces by'
        f' {chosen.ids!r}; it gives as many ids of the vocabulary of {known}.'
    )
