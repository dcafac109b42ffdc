"""Learns a WordPiece vocabulary, reproducibly."""

import collections
from collections.abc import Iterable
import logging

import numpy as np
import tokenizers
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import trainers

from realm_jax.corpus import tokenizer_rules

log = logging.getLogger(__name__)

# A learned vocabulary has these ids 0 to 4, in this order. [PAD] must be 0 in
# every vocabulary, as id 0 means padding everywhere.
SPECIALS = tuple(tokenizer_rules.SPECIALS.values())
# A learned vocabulary has as many characters as BERT's, and more where these
# are a smaller share of the texts, as in Chinese.
_MIN_ALPHABET = 1000
_COVERED = 0.9999


def learn(texts: Iterable[str], vocab_size: int, lowercase: bool) -> list[str]:
  """Returns the wordpieces; the same texts always give the same ones.

  Args:
    texts: the corpus, which is iterated over twice.
    vocab_size: upper bound, special tokens included; a small corpus gives
      fewer wordpieces.
    lowercase: whether to lower-case text and remove accents.

  Raises:
    ValueError: there is no text, or its characters alone exceed the size.
  """
  log.info(
      'Learning a vocabulary of at most %d wordpieces, %s.',
      vocab_size,
      'without capitals and accents (--cased keeps them)'
      if lowercase
      else 'as written',
  )
  normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  counts: collections.Counter[str] = collections.Counter()
  for text in texts:
    counts.update(normalizer.normalize_str(text))
  if not counts:
    raise ValueError('There is no text to learn a vocabulary from.')
  letters = _alphabet(counts, vocab_size // 2)
  # The library numbers characters inside words in the order of a hash map,
  # which differs between runs, and breaks ties between merges by number. As
  # special tokens they are numbered in the given order.
  cut = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
  inside = [
      f'##{c}'
      for c in sorted(letters)
      if len(cut(normalizer.normalize_str(f'a{c}a'))) == 1
  ]
  learner = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  learner.normalizer = normalizer
  learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  learner.train_from_iterator(
      texts,
      trainers.WordPieceTrainer(
          vocab_size=vocab_size,
          min_frequency=2,
          special_tokens=[*SPECIALS, *inside],
          initial_alphabet=sorted(letters),
          limit_alphabet=len(letters),
          show_progress=False,
      ),
  )
  ids = learner.get_vocab()
  if len(ids) > vocab_size:
    raise ValueError(
        f'vocab_size is {vocab_size}, but the characters of the texts alone'
        f' take {len(ids)} wordpieces.'
    )
  return sorted(ids, key=ids.__getitem__)


def _alphabet(counts: collections.Counter[str], most: int) -> list[str]:
  """Returns the characters of a vocabulary, the most frequent first."""
  letters = sorted(
      (c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c)
  )
  covered = np.cumsum([counts[c] for c in letters])
  enough = np.searchsorted(covered, _COVERED * covered[-1:].sum()) + 1
  size = max(_MIN_ALPHABET, min(int(enough), most))
  if size < len(letters):
    log.log(
        logging.WARNING if size < enough else logging.INFO,
        '%d of %d different characters, %.3f %% of the text, are not in the'
        ' vocabulary; a word with one of them is [UNK].',
        len(letters) - size,
        len(letters),
        100 * (1 - covered[size - 1] / covered[-1]),
    )
  return letters[:size]
