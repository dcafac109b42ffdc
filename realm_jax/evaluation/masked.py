"""Measures how retriever and reader fill in masked `validation` sentences."""

import dataclasses
from typing import Any

import jax
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics as metrics_lib
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.trainer.stages import realm


def measure(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    search: search_lib.Search | None,
    max_sentences: int,
) -> dict[str, Any]:
  """Measures the filling of masked `validation` sentences.

  Without a search, as after reader warm-up, the null document is the only
  candidate. Trivial candidates are excluded even if training allowed them, so
  that the rows of an ablation are comparable.
  """
  trivial = trained.config.trivial
  size = trained.config.num_candidates if search is not None else 1
  config = dataclasses.replace(
      trained.config,
      objective='realm',
      masking='salient',
      trivial='passage' if trivial == 'none' else trivial,
      batch_size=trained.reading_batch_size(size, trained.config.lengths.masks),
  )
  totals: dict[str, list[np.ndarray]] = {}
  rng = np.random.default_rng(0)
  rows = []
  for batch in realm.evaluation_batches(
      trained.corpus, config, 'validation', max_sentences
  ):
    rows.append(batch.row_B)
    for name, values in _read_batch(
        trained, params, search, size, config.batch_size, batch.inputs, rng
    ).items():
      totals.setdefault(name, []).append(values)
  cluster_B = sentence_clusters(trained.corpus, np.concatenate(rows))
  metrics: dict[str, Any] = {
      'sentences': len(cluster_B),
      'clusters': len(np.unique(cluster_B)),
      'num_candidates': size,
  }
  if search is not None:
    metrics |= {'trivial': config.trivial, 'trivial_in_training': trivial}
  figures = {name: np.concatenate(parts) for name, parts in totals.items()}
  accuracies = [name for name in figures if name.startswith('accuracy')]
  return metrics | metrics_lib.means(figures, cluster_B, accuracies)


def sentence_clusters(
    corpus: corpus_lib.Corpus, sentence_B: np.ndarray
) -> np.ndarray:
  """Returns the article of each `validation` sentence, its cluster: int64 [B].

  A sentence from no passage has a negative number of its own.
  """
  passage_B = corpus.sentences['validation'].passages[sentence_B]
  article_B = corpus.passages.articles[np.maximum(passage_B, 0)]
  return np.where(passage_B >= 0, article_B, -1 - sentence_B)


def _read_batch(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    search: search_lib.Search | None,
    num_candidates: int,
    batch_size: int,
    queries: realm.Queries,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Returns each metric for each sentence of the batch."""
  count = len(queries.mask_BM)
  queries = jax.tree.map(lambda x: trained_lib.pad_rows(x, batch_size), queries)
  retrieved_BJ = np.zeros((batch_size, 0), np.int64)
  if search is not None:
    retrieved_BJ = search.search(
        trained.embed_queries(params, queries.query_ids_BQ),
        num_candidates - 1,
        queries.exclude_BR2,
    )
  mask_BM, targets_BM = queries.mask_BM, queries.targets_BM

  def read_with(rows_BJ: np.ndarray) -> dict[str, np.ndarray]:
    batch = realm.with_candidates(
        queries, rows_BJ, trained.corpus, trained.template
    )
    return trained.read(params, batch)

  def right(best_BM: np.ndarray) -> np.ndarray:
    return ((best_BM == targets_BM) | ~mask_BM).all(axis=1).astype(float)

  read = read_with(retrieved_BJ)
  metrics = {'accuracy_without_retrieval': right(read['best_BKM'][:, 0])}
  if search is not None:
    p_BK = np.exp(read['logp_BK'])
    logp_BK = np.where(mask_BM[:, None], read['target_logp_BKM'], 0).sum(-1)
    utility_BJ = logp_BK[:, 1:] - logp_BK[:, :1]
    real_B = np.maximum(p_BK[:, 1:].sum(1), 1e-9)
    # Separates the effect of retrieval from that of any passage, or its length.
    live, exclude_BR2 = trained.corpus.live_rows, queries.exclude_BR2
    random = read_with(_random_rows(live, exclude_BR2, num_candidates - 1, rng))
    metrics |= {
        'accuracy_with_retrieval': right(read['marginal_best_BM']),
        'accuracy_with_random_passages': right(random['marginal_best_BM']),
        'retrieval_utility': (p_BK[:, 1:] * utility_BJ).sum(1) / real_B,
        'null_share': p_BK[:, 0],
    }
  return {name: values[:count] for name, values in metrics.items()}


def _random_rows(
    live: np.ndarray,
    exclude_BR2: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
  """Draws `count` live rows outside the excluded ranges, int64 BJ."""
  rows_BJ = rng.choice(live, (len(exclude_BR2), count))
  while True:
    inside_BJR = (rows_BJ[..., None] >= exclude_BR2[:, None, :, 0]) & (
        rows_BJ[..., None] < exclude_BR2[:, None, :, 1]
    )
    inside_BJ = inside_BJR.any(axis=-1)
    if not inside_BJ.any():
      return rows_BJ
    rows_BJ[inside_BJ] = rng.choice(live, inside_BJ.sum())
