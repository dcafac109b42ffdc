"""A retriever measured without questions: sentences find their own passages.

The sentences are those of the split `validation`. With the sentence cut out of
its passage, this is the task of ICT (Lee et al. 2019, section 4) among all
passages; with the whole passage, it shows whether the retriever tells passages
of one subject apart.
"""

import dataclasses
from typing import Any

import numpy as np

from realm_jax.corpus import inputs
from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.evaluation import metrics as metrics_lib
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.trainer import examples
from realm_jax.trainer.stages import ict

_BATCH = 512  # Sentences; bounds the memory.


def sentences_of(trained: trained_lib.Trained) -> ict.ClozeSentences | None:
  """Returns the sentences; None if no passage has sentences held out."""
  table = trained.corpus.sentences.get('validation')
  if table is None or not (table.passages >= 0).all():
    return None
  config = dataclasses.replace(
      trained.config,
      ict=dataclasses.replace(trained.config.ict, remove_rate=1.0),
  )
  try:
    return ict.ClozeSentences(trained.corpus, config, 'validation')
  except ValueError:  # Nothing would remain of a passage.
    return None


def measure(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    index: trained_lib.Index,
    source: ict.ClozeSentences,
    max_sentences: int,
) -> dict[str, Any]:
  """Returns recall and MRR of the sentences' own passages.

  Returns:
    The numbers of `sentences` and `clusters`; and, each with the figures of
    `metrics.ranking`: `cut_out`, where the own passage lacks the sentence and
    all others are whole, and `whole`.
  """
  num_live, last = trained.corpus.num_live, metrics_lib.CUTOFFS[-1]
  rows: list[np.ndarray] = []
  ranks: dict[str, list[np.ndarray]] = {'cut_out': [], 'whole': []}
  for example in examples.one_pass(
      source, source.assemble, _BATCH, max_sentences
  ):
    batch: ict.Batch = example.inputs
    own_B1 = np.asarray(batch.passage_B)[:, None]
    query_ids_BQ, _ = inputs.assemble_queries(
        source.table, example.row_B, source.template.text_length,
        trained.tokenizer,
    )
    query_emb_BE = trained.embed_queries(params, query_ids_BQ)
    cut_emb_BE = trained.embed_documents(
        params, batch.doc_ids_BS, batch.doc_types_BS
    )
    # One more, as the own passage does not compete with itself.
    rows_BK, score_BK = index.ranked(query_emb_BE, min(last + 1, num_live))
    own_score = {
        'cut_out': np.einsum('BE,BE->B', query_emb_BE, cut_emb_BE)[:, None],
        'whole': search_lib.score(index.table, query_emb_BE, own_B1),
    }
    for name, own_score_B1 in own_score.items():
      # Equal scores count against it: a retriever that embeds all passages
      # alike finds none.
      before_BK = (score_BK >= own_score_B1) & (rows_BK != own_B1)
      ranks[name].append(1 + before_BK.sum(axis=1))
    rows.append(example.row_B)
  cluster_B = inspect_lib.sentence_clusters(
      trained.corpus, np.concatenate(rows)
  )
  figures: dict[str, Any] = {
      'sentences': len(cluster_B),
      'clusters': len(np.unique(cluster_B)),
  }
  for name, parts in ranks.items():
    rank_B = np.concatenate(parts)
    found_B = np.where(rank_B <= last, rank_B, 0)
    figures[name] = metrics_lib.ranking(found_B, last, num_live)
  return figures
