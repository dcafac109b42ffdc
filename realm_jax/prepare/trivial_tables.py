"""The tables of trivial candidates, as `prepare` writes them.

Public: `write`. Not in `trivial`, which training imports: what writes arrays
also imports TFDS, which takes seconds.
"""

import pathlib

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import trivial
from realm_jax.prepare import appending


def write(
    tables: pathlib.Path,
    passages: corpus_lib.PassageTable,
    sentences: dict[str, corpus_lib.SentenceTable],
) -> dict[str, int]:
  """Writes `SPLIT.trivial_offsets.npy` and `SPLIT.trivial.npy` for each split.

  Args:
    tables: the folder.
    passages: all passages of the corpus.
    sentences: the splits.

  Returns:
    For each split two counts: `SPLIT_sentences_in_other_passages`, and of those
    `SPLIT_sentences_in_too_many`, for which nothing may be retrieved.
  """
  files, counts = {}, {}
  totals = dict.fromkeys(sentences, 0)
  for split in sentences:
    offsets = appending.ArrayWriter(
        tables / f'{split}.trivial_offsets.npy', np.int64
    )
    offsets.append(np.zeros(1, np.int64))
    files[split] = offsets, appending.ArrayWriter(
        tables / f'{split}.trivial.npy', np.int32, (2,)
    )
    counts[f'{split}_sentences_in_other_passages'] = 0
    counts[f'{split}_sentences_in_too_many'] = 0
  names = list(sentences)
  for number, found in trivial.find_in_blocks(
      passages, list(sentences.values())
  ):
    split = names[number]
    files[split][0].append(totals[split] + found.offsets[1:])
    files[split][1].append(found.rows)
    totals[split] += len(found.rows)
    counts[f'{split}_sentences_in_other_passages'] += int(
        np.count_nonzero(np.diff(found.offsets))
    )
    counts[f'{split}_sentences_in_too_many'] += int(
        (found.rows == [0, len(passages)]).all(axis=1).sum()
    )
  for pair in files.values():
    for file in pair:
      file.close()
  return counts
