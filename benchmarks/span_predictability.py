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

import dataclasses
import pathlib

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


def measure(workdir: pathlib.Path, count: int) -> harness.Figures:
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
    for rows, queries, _ in realm.evaluation_batches(
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
          spans_S2 = trained.corpus.sentences['validation'].spans_of(row)
          first = positions_BM[i, 0] - 1  # Without [CLS].
          number = np.flatnonzero(spans_S2[:, 0] == first)[0]
          record = source[row]
          start = record['span_starts'][number]
          limit = record['span_limits'][number]
          text = record['text'][start:limit].decode()
          kind = salient_spans_lib.kind(text)
        correct = correct_BM[i][mask_BM[i]]
        pieces.setdefault(kind, []).extend((x, row) for x in correct.tolist())
        if masking != 'random_token':  # There each is a mask of its own.
          right.setdefault(kind, []).append((bool(correct.all()), row))
  for found in (right, pieces):
    found['salient'] = [
        x for kind in ('name', 'date', 'number') for x in found.get(kind, [])
    ]
  figures: harness.Figures = {'steps': step}
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


def main() -> None:
  parser = harness.parser(__doc__, 'corpus', 'workdir')
  parser.add_argument('--steps', type=int, default=4000)
  parser.add_argument('--sentences', type=int, default=5000)
  arguments = parser.parse_args()
  if arguments.small:
    arguments.steps, arguments.sentences = 20, 200
  realm_jax = harness.Commands()
  realm_jax.train(
      'small_corpus.py:mlm',
      arguments.workdir,
      {
          'corpus': arguments.corpus,
          'masking': 'random_token',
          'steps': arguments.steps,
          'batch_size': 64,
          # Sentences alone, without documents.
          'mlm.own_passage_rate': 0,
          'lengths.document': 8,
      },
  )
  figures = measure(arguments.workdir, arguments.sentences) | {
      'loss': metrics_lib.read_metrics(arguments.workdir)[-1]['train/loss'],
      'commands': realm_jax.done,
  }
  harness.write(arguments.output, figures, 'jax')


if __name__ == '__main__':
  main()
