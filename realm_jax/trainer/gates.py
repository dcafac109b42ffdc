"""Measures what `realm` needs, on sentences held out; `diagnosis` judges it."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import exclusion
from realm_jax.corpus import inputs
from realm_jax.corpus import ngrams
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import distributed
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.trainer import diagnosis as diagnosis_lib
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import refresh as refresh_lib
from realm_jax.trainer.stages import realm

log = logging.getLogger(__name__)

_READ = 32  # Sentences read at once; bounds the logits.
_LEAST_PAIRS = 8  # With fewer, the reader is measured on other passages.
_DEPTH = 20  # Passages searched.
_AROUND = 3  # Wordpieces on each side of an answer that repeat the sentence.


class Gates:
  """Measures the figures of `diagnosis.GATES`, without changing anything.

  The sentences are of the split `validation`. Where its sentences have no
  passage, those of `knowledge` take their place for the figures that need one.
  The reader is measured on other passages of the article or, if none holds an
  answer, on the sentence's own passage. `distractor_utility` is that of other
  passages of the article, without the answer.
  """

  def __init__(self, job: job_lib.Job):
    """Chooses the sentences.

    Raises:
      ValueError: there are none.
    """
    self._config, self._corpus, self._mesh = job.config, job.corpus, job.mesh
    self._searches = job.stage.searches
    config = dataclasses.replace(
        job.config,
        masking='salient',
        batch_size=job.config.gates.sentences,
        num_candidates=job.config.num_candidates if self._searches else 2,
    )
    tables = job.corpus.sentences
    home = 'knowledge'
    if 'validation' in tables and (tables['validation'].passages >= 0).all():
      home = 'validation'

    def examples(split: str) -> tuple[np.ndarray, realm.Queries]:
      found = next(realm.evaluation_batches(job.corpus, config, split))
      return found.row_B, found.inputs

    self._row_B, self._at_home = examples(home)
    self._masked = self._at_home
    if home != 'validation' and self._searches:
      other = examples_lib.sentences_of(job.corpus, config)
      split = 'validation' if 'validation' in tables else other
      self._masked = examples(split)[1]
    self._own_B = np.asarray(tables[home].passages[self._row_B])
    articles = exclusion.ArticlePassages(job.corpus, home)
    self._pairs, place = self._in_article(articles, holding=True), 'article'
    self._distractors = self._in_article(articles, holding=False)
    # Where the masked sentences have no article, retrieval tells.
    self._findable: float | None = None
    if examples_lib.sentences_of(job.corpus, config) == 'knowledge':
      self._findable = len(self._pairs) / len(self._row_B)
    if len(self._pairs) < _LEAST_PAIRS:
      self._pairs, place = self._with_own_passages(), 'sentence itself'
    self._read = embedding.row_by_row(
        _right_and_logp(job.components['reader']),
        self._mesh, (mesh_lib.DATA,), mesh_lib.replicated(self._mesh),
    )
    if self._searches:
      self._embedder = embedding.Embedder(
          job.components['embedder'], self._mesh
      )
      self._template = job.stage.template
    self._warned: set[str] = set()
    # A resumed job compares with its first measurement, not with this start.
    lines = metrics_lib.read_metrics(job.workdir)
    self._first = diagnosis_lib.first_values(lines)
    log.info(
        'Gates: %d masked sentences of the split %r. The reader is measured on'
        ' %d of them, whose answer stands in a passage of the %s.',
        len(self._row_B), home, len(self._pairs), place,
    )

  @classmethod
  def of(cls, job: job_lib.Job) -> 'Gates | None':
    """Returns the gates of a job; None if they do not apply to it."""
    config = job.config
    if (
        not config.gates.interval
        or 'reader' not in job.components
        or config_lib.is_null_reader(config)
    ):
      return None
    try:
      return cls(job)
    except ValueError as error:
      log.info('There are no gates: %s', error)
      return None

  def due(self, step: int) -> bool:
    """Returns whether to measure after a step."""
    return not step % self._config.gates.interval or step == self._config.steps

  def measure(
      self,
      params: dict[str, components_lib.Params],
      step: int,
      refresher: refresh_lib.Refresher | None = None,
  ) -> dict[str, float]:
    """Returns `gates/*`; warns once of each gate that is missed.

    `mlm` warns at its end only.

    Args:
      params: current parameters.
      step: number of updates.
      refresher: has the index in use, if there is one.
    """
    jax.block_until_ready(params)
    values: dict[str, float] = {}
    if self._pairs:
      right, utility = self._reading(params['reader'], self._pairs)
      values |= {'reader_accuracy': right, 'reader_utility': utility}
    if self._distractors:
      _, utility = self._reading(params['reader'], self._distractors)
      values['distractor_utility'] = utility
    if self._findable is not None:
      values['findable'] = self._findable
    if refresher is not None:
      values |= self._retrieval(params['embedder'], refresher)
    self._warn(values, step)
    return {'gates/step': step} | {f'gates/{n}': x for n, x in values.items()}

  def _warn(self, values: dict[str, float], step: int) -> None:
    if not distributed.is_main():
      return
    last = step == self._config.steps
    if step == 0 or last:
      figures = ', '.join(f'{name} {x:.3f}' for name, x in values.items())
      log.info('Gates at step %d: %s.', step, figures)
    if not (self._searches or last):
      return  # A reader that is still cold is no surprise.
    found = diagnosis_lib.problems(values, self._config, self._first)
    self._first = values | self._first
    for name, (diagnosis, text) in found.items():
      if name not in self._warned:
        self._warned.add(name)
        log.warning('Step %d, %s: %s', step, diagnosis, text)

  def _in_article(
      self, articles: exclusion.ArticlePassages, holding: bool
  ) -> list[tuple[int, int]]:
    """Returns sentences, and a passage of the article that holds the answer.

    Or, without `holding`, one that does not.
    """
    queries, pairs = self._at_home, []
    for i, row in enumerate(self._row_B.tolist()):
      answer = queries.targets_BM[i][queries.mask_BM[i]]
      room = self._config.lengths.joint - 1 - int(queries.query_lengths_B[i])
      found = articles.find(row, answer, room, holding)
      if found:
        pairs.append((i, found[row % len(found)]))
    return pairs

  def _with_own_passages(self) -> list[tuple[int, int]]:
    """Returns sentences, and their passages, if these show the answer."""
    queries = self._at_home
    held_B1 = ngrams.held(
        self._bodies(queries, self._own_B[:, None]),
        queries.targets_BM,
        queries.mask_BM.sum(axis=1),
    )
    shown = np.flatnonzero(held_B1[:, 0]).tolist()
    return [(i, int(self._own_B[i])) for i in shown]

  def _reading(
      self, params: components_lib.Params, pairs: list[tuple[int, int]]
  ) -> tuple[float, float]:
    """Returns the share that is right, and log p(y|z,x) - log p(y|null,x)."""
    right, utility = [], []
    for start in range(0, len(pairs), _READ):
      at, passages = np.array(pairs[start : start + _READ]).T
      some = jax.tree.map(lambda x, at=at: x[at], self._at_home)
      ids_BKT, types_BKT = self._joint(
          some, np.stack([np.full_like(passages, -1), passages], axis=1)
      )
      same_shape = [
          np.pad(x, [(0, _READ - len(at)), *[(0, 0)] * (x.ndim - 1)])
          for x in (
              ids_BKT,
              types_BKT,
              some.positions_BM,
              some.targets_BM,
              some.mask_BM,
          )
      ]
      arrays = mesh_lib.put_whole(self._mesh, *same_shape)
      found_BK2 = distributed.fetch(self._read(params, *arrays))[: len(at)]
      right.append(found_BK2[:, 1, 0])
      utility.append(found_BK2[:, 1, 1] - found_BK2[:, 0, 1])
    return (
        float(np.concatenate(right).mean()),
        float(np.concatenate(utility).mean()),
    )

  def _retrieval(
      self, params: components_lib.Params, refresher: refresh_lib.Refresher
  ) -> dict[str, float]:
    search, k = refresher.search, self._config.num_candidates - 1
    live = self._corpus.num_live
    own_BK = search.search(
        self._embed(params, self._at_home), min(_DEPTH, live)
    )
    values = {
        'recall_at_20': float(
            (own_BK == self._own_B[:, None]).any(axis=1).mean()
        )
    }
    masked = self._masked
    left_out = np.diff(masked.exclude_BR2, axis=-1).sum(axis=(1, 2)).max()
    depth = max(k, min(_DEPTH, live - int(left_out)))
    query_emb_BE = self._embed(params, masked)
    rows_BN = search.search(query_emb_BE, depth, masked.exclude_BR2)
    bodies_BNT = self._bodies(masked, rows_BN)
    held_BN = ngrams.held(
        bodies_BNT, masked.targets_BM, masked.mask_BM.sum(axis=1)
    )
    if self._findable is None:
      values['answer_in_20'] = float(held_BN.any(axis=1).mean())
    values['answer_in_candidates'] = float(held_BN[:, :k].any(axis=1).mean())
    text_BK = ngrams.held(bodies_BNT[:, :k], *self._text_around(masked))
    values['trivial_share'] = float(text_BK.any(axis=1).mean())
    if self._config.null_document:
      doc_emb_BKE = search_lib.gather(refresher.embeddings, rows_BN[:, :k])
      score_BK = np.einsum('BE,BKE->BK', query_emb_BE, doc_emb_BKE)
      null_B = query_emb_BE @ self._null(params)
      null_share_B = 1 / (1 + np.exp(score_BK - null_B[:, None]).sum(axis=1))
      values['null_share'] = float(null_share_B.mean())
    return values

  def _embed(
      self, params: components_lib.Params, queries: realm.Queries
  ) -> np.ndarray:
    ids = mesh_lib.put_whole(
        self._mesh, self._template.queries(queries.query_ids_BQ)
    )
    emb_BE = distributed.fetch(self._embedder.queries(params, *ids))
    return emb_BE[: len(queries.query_ids_BQ)]

  def _null(self, params: components_lib.Params) -> np.ndarray:
    """Returns the embedding of the null document, [E]."""
    parts = [np.array([[x]], np.int32) for x in self._template.null]
    arrays = mesh_lib.put_whole(self._mesh, *parts)
    return distributed.fetch(self._embedder.documents(params, *arrays))[0, 0]

  def _joint(
      self, queries: realm.Queries, rows_BK: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    return inputs.assemble_joint(
        self._corpus.passages,
        rows_BK,
        queries.query_ids_BQ,
        queries.query_lengths_B,
        self._config.lengths.joint,
        self._corpus.tokenizer,
    )

  def _bodies(self, queries: realm.Queries, rows_BK: np.ndarray) -> np.ndarray:
    """Returns what is read of the bodies, -1 elsewhere, [B, K, T]."""
    ids_BKT, types_BKT = self._joint(queries, rows_BK)
    return np.where(types_BKT == 1, ids_BKT, -1)

  @staticmethod
  def _text_around(queries: realm.Queries) -> tuple[np.ndarray, np.ndarray]:
    """Returns each answer with the text around it, padded, and the lengths."""
    sizes_B = queries.mask_BM.sum(axis=1)
    text_BQ = queries.query_ids_BQ.copy()
    np.put_along_axis(
        text_BQ,
        queries.positions_BM,
        np.where(
            queries.mask_BM,
            queries.targets_BM,
            np.take_along_axis(text_BQ, queries.positions_BM, axis=1),
        ),
        axis=1,
    )
    # Near an end of the sentence, more of the other side.
    lengths_B = queries.query_lengths_B - 2
    wanted_B = np.minimum(sizes_B + 2 * _AROUND, lengths_B)
    first_B = np.clip(
        queries.positions_BM[:, 0] - _AROUND, 1, 1 + lengths_B - wanted_B
    )
    at_BN = first_B[:, None] + np.arange(wanted_B.max())
    at_BN = np.minimum(at_BN, text_BQ.shape[1] - 1)
    return np.take_along_axis(text_BQ, at_BN, axis=1), wanted_B


def _right_and_logp(component: components_lib.Component) -> Any:
  """Returns a function: whether each span is right, and its log-probability."""

  def read(
      params: components_lib.Params,
      ids_BKT: jax.Array,
      types_BKT: jax.Array,
      positions_BM: jax.Array,
      targets_BM: jax.Array,
      mask_BM: jax.Array,
  ) -> jax.Array:
    b, k, t = ids_BKT.shape
    logits = component.module(params).mlm_logits(
        ids_BKT.reshape(b * k, t),
        types_BKT.reshape(b * k, t),
        jnp.repeat(positions_BM, k, axis=0),
    )
    logits_BKMV = logits.reshape(b, k, *logits.shape[1:])
    targets_BKM = jnp.broadcast_to(
        targets_BM[:, None], logits_BKMV.shape[:3]
    )
    used_BKM = mask_BM[:, None]
    right_BKM = (logits_BKMV.argmax(axis=-1) == targets_BKM) | ~used_BKM
    logp_BKM = jnp.take_along_axis(
        jax.nn.log_softmax(logits_BKMV), targets_BKM[..., None], axis=-1
    )[..., 0]
    logp_BK = jnp.where(used_BKM, logp_BKM, 0.0).sum(axis=-1)
    right_BK = right_BKM.all(axis=-1).astype(jnp.float32)
    return jnp.stack([right_BK, logp_BK], axis=-1)

  return read
