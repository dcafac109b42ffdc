"""The masks of BERT, to train a reader without published weights."""

import numpy as np

from realm_jax.corpus import masking

_MASKED, _RANDOM = 0.8, 0.1  # Shares; the rest is read as it is.


def bert(
    sentence: masking.Sentence, rng: np.random.Generator
) -> masking.Replaced:
  """15 % of the wordpieces (Devlin et al. 2019, section 3.1).

  80 % of them are read as [MASK], 10 % as a random wordpiece, 10 % as they are.
  """
  return _replaced(masking.random_token(sentence, rng), sentence, rng)


def bert_whole_words(
    sentence: masking.Sentence, rng: np.random.Generator
) -> masking.Replaced:
  """As `bert`, of whole words: all wordpieces of a word, or none.

  A word of more wordpieces than are left is passed over.
  """
  assert sentence.tokenizer is not None
  begins = sentence.tokenizer.starts_word(sentence.ids).copy()
  begins[0] = True  # The sentence may begin inside a word.
  starts = np.flatnonzero(begins)
  sizes = np.diff(starts, append=len(begins))
  left = len(masking.random_token(sentence, rng))
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
    positions: np.ndarray, sentence: masking.Sentence, rng: np.random.Generator
) -> masking.Replaced:
  assert sentence.tokenizer is not None
  drawn = rng.random(len(positions))
  # Not [PAD], which attention leaves out.
  random = rng.integers(1, sentence.tokenizer.vocab_size, len(positions))
  random = np.where(random <= sentence.tokenizer.pad_id, random - 1, random)
  kept = sentence.ids[positions].astype(np.int64)
  ids = np.where(drawn < _MASKED + _RANDOM, random, kept)
  ids[drawn < _MASKED] = sentence.tokenizer.mask_id
  return masking.Replaced(positions, ids)
