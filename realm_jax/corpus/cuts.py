"""Warnings of inputs that are longer than the model reads."""

from collections.abc import Sequence
import logging

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib

log = logging.getLogger(__name__)


def warn(what: str, lengths_N: np.ndarray, length: int, field: str) -> bool:
  """Logs how many inputs are longer than the model reads; returns if any are.

  Args:
    what: the inputs in words, such as 'passages'.
    lengths_N: wordpieces of each, special ones included.
    length: wordpieces that the model reads.
    field: where that number comes from.
  """
  lengths_N = np.asarray(lengths_N)
  longer = int((lengths_N > length).sum())
  if longer:
    log.warning(
        '%d of %d %s %s longer than the %d wordpieces of %s; the longest has'
        ' %d; what is beyond is not seen.',
        longer, len(lengths_N), what, 'is' if longer == 1 else 'are', length,
        field, lengths_N.max(),
    )
  return bool(longer)


def warn_of_passages(
    corpus: corpus_lib.Corpus, config: config_lib.Config
) -> None:
  """Logs how many passages are longer than the job of `config` reads.

  Raises:
    ValueError: a prefix of the retriever leaves no room for a text.
  """
  if config_lib.is_null_reader(config):
    return
  template = inputs.Template.of(config.model, config.lengths, corpus.tokenizer)
  lengths_N = template.lengths(corpus.passages)
  if len(corpus.removed):
    lengths_N = np.delete(lengths_N, corpus.removed)
  warn(
      'passages', lengths_N, config.lengths.document, 'config.lengths.document'
  )


def warn_of_queries(
    texts: Sequence[str],
    ids_NQ: np.ndarray,
    tokenizer: tokenizer_lib.Tokenizer,
    what: str,
    field: str,
) -> bool:
  """As `warn`, for texts and their `inputs.encode_queries`."""
  lengths_N = (ids_NQ != tokenizer.pad_id).sum(axis=1)
  # Only texts that fill their row may be longer.
  full = np.flatnonzero(lengths_N == ids_NQ.shape[1])
  pieces = tokenizer.encode_batch([texts[row] for row in full.tolist()])
  lengths_N[full] = [len(ids) + 2 for ids in pieces]
  return warn(what, lengths_N, ids_NQ.shape[1], field)
