"""`realm-jax prepare --stats`: figures and a plot of a corpus.

Spans are counted in blocks, so that memory does not grow with the corpus.
"""

import collections
import logging
import os
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import report
from realm_jax.runtime import files

log = logging.getLogger(__name__)

_BIN = 16  # Bin width of the histogram of lengths, in wordpieces.
_MOST_SPANS = 10  # Last bin of spans per sentence; counts more spans, too.
_LONGEST_NAME = 12  # Wordpieces; longer spans are not counted.
_BLOCK = 1 << 20  # Spans counted at once.
_LISTED = 30  # Most frequent spans of each kind.
_MAX_NAMES = 2_000_000  # Different spans kept while counting.
# The reasons for dropping records and sentences, named as in the manifest.
_DROPPED = {
    'records': (
        'excluded_lists', 'excluded_indices', 'excluded_outlines',
        'excluded_disambiguation', 'near_duplicates',
        'records_without_wordpieces',
    ),
    'sentences': (
        'sentences_without_spans', 'sentences_too_short_or_long',
        'sentences_split',
    ),
}


def describe(directory: pathlib.Path) -> dict[str, Any]:
  """Writes stats.json and stats.png of a corpus, and returns the figures."""
  figures = measure(corpus_lib.Corpus.open(directory))
  files.write_json(directory / 'stats.json', figures)
  try:
    plot(figures, directory / 'stats.png')
  except ImportError as error:  # The figures do not need matplotlib.
    log.warning('%s', error)
  return figures


def measure(corpus: corpus_lib.Corpus) -> dict:
  """Returns the figures of a corpus as plain JSON.

  The counts of the most frequent spans are exact up to two million different
  spans; beyond, single spans are dropped.
  """
  counts = corpus.manifest['counts']
  unknown = counts.get('unknown_wordpieces', 0)
  lengths = np.asarray(corpus.passages.lengths)
  histogram = np.bincount((lengths - 1) // _BIN)
  return {
      'fingerprint': corpus.fingerprint,
      'passages': len(lengths),
      'articles': len(np.unique(corpus.passages.articles)),
      'passage_length': {
          'mean': round(float(lengths.mean()), 1),
          'median': float(np.median(lengths)),
          'longest': int(lengths.max()),
          # Passages of 1 to 16 wordpieces, of 17 to 32, and so on.
          'bin': _BIN,
          'histogram': histogram.tolist(),
      },
      'unknown_wordpieces': {
          'count': unknown,
          'share': round(unknown / max(1, counts.get('wordpieces', 0)), 6),
      },
      'sentences': {
          name: _sentences(table) for name, table in corpus.sentences.items()
      },
      'dropped': _dropped(corpus.manifest),
      'most_frequent': _most_frequent(corpus),
  }


def plot(figures: dict[str, Any], path: str | os.PathLike[str]) -> None:
  """Draws the figures of `measure` as a PNG; see `report.new_figure`."""
  canvas = report.new_figure(11, 8)
  lengths, spans, names, dropped = canvas.subplots(2, 2).flat
  bars = figures['passage_length']['histogram']
  lengths.bar(np.arange(len(bars)) * _BIN, bars, width=_BIN, align='edge')
  lengths.set(
      title=f'{figures["passages"]:,} passages',
      xlabel='wordpieces, with title and special tokens',
      ylabel='passages',
  )
  width = 0.8 / max(1, len(figures['sentences']))
  for i, (split, values) in enumerate(figures['sentences'].items()):
    share = np.array(values['histogram']) / max(1, values['sentences'])
    spans.bar(
        np.arange(1, _MOST_SPANS + 1) + width * i, share, width=width,
        label=f'{split}: {values["sentences"]:,}',
    )
  spans.set(
      title='Sentences with salient spans',
      xlabel=f'spans ({_MOST_SPANS}: or more)',
      ylabel='share of the sentences',
  )
  spans.legend()
  rows = figures['most_frequent']['names'][:15][::-1]
  names.barh([row['span'] for row in rows], [row['count'] for row in rows])
  names.set(title='Most frequent names', xlabel='spans')
  shares = {
      f'{what}: {reason.removeprefix(what + "_").replace("_", " ")}': share
      for what, found in figures['dropped'].items()
      for reason, share in found['shares'].items()
      if share
  }
  dropped.barh([*shares][::-1], [100 * x for x in shares.values()][::-1])
  dropped.set(title='Dropped, and why', xlabel='% of the records or sentences')
  canvas.savefig(path, dpi=110)


def _sentences(table: corpus_lib.SentenceTable) -> dict[str, Any]:
  spans = np.diff(table.span_offsets)
  bins = np.minimum(spans, _MOST_SPANS)
  histogram = np.bincount(bins, minlength=_MOST_SPANS + 1)
  return {
      'sentences': len(table),
      'spans': int(spans.sum()),
      'spans_per_sentence': round(float(spans.mean()), 3),
      'histogram': histogram[1:].tolist(),
      'wordpieces_per_sentence': round(float(table.lengths.mean()), 1),
  }


def _dropped(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns the number and share of dropped items by reason.

  Malformed lines that `--skip_bad_records` skipped do not count as records.
  """
  counts = manifest['counts']
  found: dict[str, Any] = {}
  for prefix in ('', 'pretraining_'):
    for whole, reasons in _DROPPED.items():
      if f'{prefix}{whole}' not in counts:
        continue
      total = counts[f'{prefix}{whole}']
      if whole == 'records':  # The count leaves out near-duplicates.
        total += counts.get(f'{prefix}near_duplicates', 0)
      dropped = {
          reason: counts[prefix + reason]
          for reason in reasons
          if prefix + reason in counts
      }
      shares = {k: round(n / max(1, total), 6) for k, n in dropped.items()}
      found[f'{prefix}{whole}'] = {
          'total': total, 'counts': dropped, 'shares': shares
      }
  malformed = manifest['skipped_records']['count']
  found['malformed'] = {'total': malformed, 'counts': {}, 'shares': {}}
  return found


def _most_frequent(
    corpus: corpus_lib.Corpus,
) -> dict[str, list[dict[str, Any]]]:
  """Returns the most frequent names, and dates and numbers."""
  counter: collections.Counter[bytes] = collections.Counter()
  for table in corpus.sentences.values():
    _count_spans(table, counter)
  found: dict[str, list[dict[str, Any]]] = {
      'names': [], 'dates_and_numbers': []
  }
  # Sorted by count, then by wordpieces, independent of the counting order.
  for key, number in sorted(counter.items(), key=lambda x: (-x[1], x[0])):
    text = corpus.tokenizer.decode(np.frombuffer(key, np.uint32).tolist())
    digits = any(c.isdigit() for c in text)
    listed = found['dates_and_numbers' if digits else 'names']
    if len(listed) < _LISTED:
      listed.append({'span': text, 'count': number})
    if all(len(rows) == _LISTED for rows in found.values()):
      break
  return found


def _count_spans(
    table: corpus_lib.SentenceTable, counter: collections.Counter[bytes]
) -> None:
  offsets = np.asarray(table.span_offsets)
  for block in range(0, int(offsets[-1]), _BLOCK):
    spans = np.asarray(table.spans[block : block + _BLOCK], np.int64)
    numbers = np.arange(block, block + len(spans))
    sentences = np.searchsorted(offsets, numbers, 'right') - 1
    starts = table.starts[sentences] + spans[:, 0]
    sizes = spans[:, 1] - spans[:, 0]
    for size in range(1, _LONGEST_NAME + 1):
      chosen = starts[sizes == size]
      if not len(chosen):
        continue
      rows = table.tokens[chosen[:, None] + np.arange(size)].astype(np.uint32)
      found, times = np.unique(
          np.ascontiguousarray(rows).view(f'V{4 * size}').ravel(),
          return_counts=True,
      )
      for row, number in zip(found, times.tolist(), strict=True):
        counter[row.tobytes()] += number
    if len(counter) > _MAX_NAMES:
      for key in [key for key, number in counter.items() if number == 1]:
        del counter[key]
