"""Accuracy on masks without retrieval: the reason to mask salient spans.

  python benchmarks/span_predictability.py --corpus=corpus \
      --workdir=runs/span_predictability \
      --output=benchmarks/results/span_predictability.json [--steps=4000]

A small masked language model is trained on the corpus' sentences with BERT's
random-token masks, then fills in masks of sentences that were set aside: random
wordpieces, random spans (as long as the salient ones), and salient spans by
their kind. Masks that need no passage teach a retriever nothing (Guu et al.
2020, section 3.4). Intervals are resampled by article, if the sentence is from
a passage, else by sentence.
"""

import argparse
import dataclasses
import pathlib
from typing import Any

import harness
import jax
import numpy as np
import tensorflow_datasets as tfds

from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.evaluation import metrics
from realm_jax.inference import trained as trained_lib
from realm_jax.prepare import salient_spans as salient_spans_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer.stages import realm

_MASKS = ('random_token', 'random_span', 'salient')


def train(arguments: argparse.Namespace) -> list[str]:
  """Trains the model, unless it is trained, and returns the commands."""
  realm_jax = harness.Commands()
  if not (arguments.workdir / 'summary.json').exists():
    realm_jax(
        'train',
        '--config=experiments/small_corpus.py:mlm',
        f'--workdir={arguments.workdir}',
        f'--config.corpus={arguments.corpus}',
        '--config.masking=random_token',
        f'--config.steps={arguments.steps}',
        '--config.batch_size=64',
        # Sentences alone, without documents.
        '--config.mlm.own_passage_rate=0',
        '--config.lengths.document=8',
    )
  return realm_jax.done


def measure(workdir: pathlib.Path, count: int) -> dict[str, Any]:
  """Returns flat figures: for each kind of mask, the share filled in."""
  trained = trained_lib.Trained.open(workdir)
  step = trained_lib.steps_available(workdir)[0][-1]
  params = trained.load(step)
  source = tfds.builder_from_directory(
      str(trained.corpus.directory / 'sentences')
  ).as_data_source(split='validation')
  # By kind: whether a span is right, and the row of its sentence.
  right: dict[str, list[tuple[bool, int]]] = {}
  pieces: dict[str, list[tuple[bool, int]]] = {}
  for masking in _MASKS:
    config = dataclasses.replace(
        trained.config,
        objective='realm',
        masking=masking,
        batch_size=trained.reading_batch_size(1, trained.config.lengths.masks),
    )
    for rows, queries in realm.evaluation_batches(
        trained.corpus, config, 'validation', count
    ):
      mask_BM, positions_BM = queries.mask_BM, queries.positions_BM
      batch = realm.with_candidates(
          jax.tree.map(
              lambda x, size=config.batch_size: trained_lib.pad_rows(x, size),
              queries,
          ),
          np.zeros((config.batch_size, 0), np.int64),
          trained.corpus,
          trained.template,
      )
      best_BM = trained.read(params, batch)['best_BKM'][: len(rows), 0]
      correct_BM = best_BM == queries.targets_BM
      for i, row in enumerate(rows.tolist()):
        kind = masking
        if masking == 'salient':
          first = int(positions_BM[i, 0]) - 1  # Without [CLS].
          kind = _kind(trained, source, row, first)
        correct = correct_BM[i][mask_BM[i]]
        pieces.setdefault(kind, []).extend((x, row) for x in correct.tolist())
        if masking != 'random_token':  # There each is a mask of its own.
          right.setdefault(kind, []).append((bool(correct.all()), row))
  for found in (right, pieces):
    found['salient'] = [
        x for kind in ('name', 'date', 'number') for x in found.get(kind, [])
    ]
  figures: dict[str, Any] = {'steps': step}
  for what, found in (('filled_in', right), ('wordpieces', pieces)):
    for kind, results in found.items():
      values, rows = np.array(results, np.int64).reshape(-1, 2).T
      low, high = metrics.interval(
          values, inspect_lib.sentence_clusters(trained.corpus, rows)
      )
      figures |= {
          f'{kind}_{what}': round(float(np.mean(values)), 4),
          f'{kind}_{what}_interval': [low, high],
          f'{kind}_{what}_count': len(values),
      }
  return figures


def _kind(
    trained: trained_lib.Trained, source: Any, row: int, first: int
) -> str:
  """The kind of the salient span that begins at a wordpiece of a sentence."""
  spans_S2 = trained.corpus.sentences['validation'].spans_of(row)
  number = int(np.flatnonzero(spans_S2[:, 0] == first)[0])
  record = source[row]
  start, limit = record['span_starts'][number], record['span_limits'][number]
  return salient_spans_lib.kind(record['text'][start:limit].decode())


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--corpus', type=pathlib.Path, required=True)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--steps', type=int, default=4000)
  parser.add_argument('--sentences', type=int, default=5000)
  arguments = parser.parse_args()
  if arguments.small:
    arguments.steps, arguments.sentences = 20, 200
  done = train(arguments)
  figures = measure(arguments.workdir, arguments.sentences) | {
      'loss': metrics_lib.read_metrics(arguments.workdir)[-1]['train/loss'],
      'commands': done,
  }
  harness.write(arguments.output, figures, 'jax')


if __name__ == '__main__':
  main()
