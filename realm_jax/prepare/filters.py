"""Records that `prepare` leaves out on request, by kind or as near-duplicates.

Kinds are found by title, as in ORQA (Lee et al. 2019,
`preprocess_wiki_extractor`): "List of ...", "Index of ...", "Outline of ...",
"(disambiguation)". Most disambiguation pages have no such title, so their text
is examined too. Near-duplicates are found with MinHash and LSH (rensa).
"""

from collections.abc import Collection, Iterator
import re
from typing import Any

from realm_jax.prepare import datasets
from realm_jax.prepare import languages
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import workers as workers_lib

_TITLES = {
    'lists': re.compile(r'Lists? of .'),
    'indices': re.compile(r'(?:Index|Indices) of .'),
    'outlines': re.compile(r'Outline of .'),
    'disambiguation': re.compile(r'.*\(disambiguation\)'),
}
KINDS = tuple(_TITLES)

# 'Mercury may refer to:', 'Mercury may also refer to the following:'.
_REFERS = re.compile(
    r'[^\n.]{1,150}\b(?:may|can|could|might)(?: also| variously)?'
    r' (?:refer to|mean|stand for|be)(?: the following| any of the following'
    r'| one of the following| several things)?(?: (?:\w+ ){1,3})?:\s*(?:\n|$)'
)
_TEMPLATE = re.compile(
    r'\{\{\s*(?:disambig\w*|dab|hndis|geodis|(?:\w+ )*disambiguation)'
    r'(?: page)?\s*[|}]',
    re.IGNORECASE,
)

_NUM_HASHES = 128
_SEED = 0
_SHINGLE_WORDS = 5
_BATCH_CHARACTERS = 1 << 20

_Batch = list[tuple[str, str]]  # Text and its markup.


def reason(
    title: str, text: str, exclude: Collection[str], wikitext: bool = False
) -> str | None:
  """Returns the kind in `exclude` that a record belongs to, or None."""
  for kind in KINDS:
    if kind in exclude and _TITLES[kind].match(title):
      return kind
  if 'disambiguation' in exclude and (
      _REFERS.match(text.lstrip())
      or (wikitext and _TEMPLATE.search(text) is not None)
  ):
    return 'disambiguation'
  return None


def check_rensa_installed() -> None:
  """Raises ImportError if the library for near-duplicates is missing."""
  try:
    import rensa  # noqa: F401
  except ImportError as error:
    raise ImportError(
        '--near_duplicates needs the package rensa; run `pip install '
        "'realm_jax[dedup]'`."
    ) from error


def near_duplicates(
    source: records_lib.Records, threshold: float, pool: workers_lib.Pool
) -> set[int]:
  """Returns the numbers of good records that nearly repeat an earlier one.

  Signatures are computed by the workers and compared in the order of the
  records, so the first of several similar records stays, for any number of
  workers.

  Args:
    source: records that are already checked.
    threshold: Jaccard similarity of the sets of five consecutive words, as
      estimated by MinHash (standard error at most 0.045).
    pool: the workers.
  """
  import rensa

  seen = rensa.RMinHashDeduplicator(
      threshold, _NUM_HASHES, True, _num_bands(threshold), _SEED
  )
  found: set[int] = set()
  number = 0
  for signatures in pool.map(_signatures, _batches(source)):
    for signature in signatures:
      if signature is not None and not seen.add(str(number), signature):
        found.add(number)
      number += 1
  return found


def _num_bands(threshold: float) -> int:
  """Returns the fewest bands that miss few pairs above the threshold."""
  for bands in (4, 8, 16, 32, 64):
    if (1 / bands) ** (bands / _NUM_HASHES) <= 0.9 * threshold:
      return bands
  return _NUM_HASHES


def _batches(source: records_lib.Records) -> Iterator[_Batch]:
  batch: _Batch = []
  size = 0
  for record in source:
    batch.append((record.text, record.markup))
    size += len(record.text)
    if size >= _BATCH_CHARACTERS:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _signatures(batch: _Batch) -> list[Any]:
  """Returns a MinHash signature for each text; None for one without words."""
  import rensa

  signatures = []
  for text, markup in batch:
    plain = datasets.plain_text(text, markup) if markup else text
    words = languages.words(plain.lower())
    signature = None
    if words:
      signature = rensa.RMinHash(num_perm=_NUM_HASHES, seed=_SEED)
      last = max(1, len(words) - _SHINGLE_WORDS + 1)
      signature.update(
          [' '.join(words[i : i + _SHINGLE_WORDS]) for i in range(last)]
      )
    signatures.append(signature)
  return signatures
