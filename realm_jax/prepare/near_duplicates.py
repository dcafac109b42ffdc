"""Records that say almost what an earlier one says.

Public: `near_duplicates`, `check_installed`. MinHash with LSH, by the library
rensa: signatures are made in the worker processes, and compared in the order of
the records, so that the first of several stays, for any number of workers.
"""

from collections.abc import Iterator
import concurrent.futures
import multiprocessing
import re
from typing import Any

from realm_jax.prepare import mediawiki
from realm_jax.prepare import records as records_lib

_NUM_HASHES = 128
_SEED = 0
_SHINGLE = 5  # Words.
_BATCH_CHARACTERS = 1 << 20
_WORD = re.compile(r'\w+')


def check_installed() -> None:
  """Raises ImportError if the library is missing."""
  try:
    import rensa  # noqa: F401
  except ImportError as error:
    raise ImportError(
        '--near_duplicates needs the package rensa; run `pip install '
        "'realm_jax[dedup]'`."
    ) from error


def near_duplicates(
    source: records_lib.Records, threshold: float, workers: int
) -> set[int]:
  """Returns which of the good records to leave out, by their numbers.

  Args:
    source: already checked.
    threshold: Jaccard similarity of the sets of five words in a row, as MinHash
      estimates it (standard error at most 0.045), from which on two texts are
      the same.
    workers: processes.
  """
  import rensa

  seen = rensa.RMinHashDeduplicator(
      threshold, _NUM_HASHES, True, _num_bands(threshold), _SEED
  )
  found: set[int] = set()
  number = 0
  for signatures in _signatures(_batches(source), workers):
    for signature in signatures:
      if signature is not None and not seen.add(str(number), signature):
        found.add(number)
      number += 1
  return found


def _num_bands(threshold: float) -> int:
  """Returns the fewest bands with which few pairs over the threshold escape."""
  for bands in (4, 8, 16, 32, 64):
    if (1 / bands) ** (bands / _NUM_HASHES) <= 0.9 * threshold:
      return bands
  return _NUM_HASHES


_Batch = list[tuple[str, bool]]


def _batches(source: records_lib.Records) -> Iterator[_Batch]:
  batch: _Batch = []
  size = 0
  for record in source:
    batch.append((record.text, record.wikitext))
    size += len(record.text)
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _signatures(
    batches: Iterator[_Batch], workers: int
) -> Iterator[list[Any]]:
  if workers == 1:
    yield from map(_sign, batches)
    return
  pool = concurrent.futures.ProcessPoolExecutor(
      workers, multiprocessing.get_context('spawn')
  )
  with pool:
    pending: list[concurrent.futures.Future[list[Any]]] = []
    for batch in batches:
      pending.append(pool.submit(_sign, batch))
      if len(pending) > 2 * workers:
        yield pending.pop(0).result()
    for future in pending:
      yield future.result()


def _sign(batch: _Batch) -> list[Any]:
  """Returns a signature for each text, or None where there is no word."""
  import rensa

  signatures = []
  for text, wikitext in batch:
    plain = mediawiki.plain_text(text) if wikitext else text
    words = _WORD.findall(plain.lower())
    signature = None
    if words:
      signature = rensa.RMinHash(num_perm=_NUM_HASHES, seed=_SEED)
      last = max(1, len(words) - _SHINGLE + 1)
      signature.update(
          [' '.join(words[i : i + _SHINGLE]) for i in range(last)]
      )
    signatures.append(signature)
  return signatures
