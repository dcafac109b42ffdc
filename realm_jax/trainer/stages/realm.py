"""REALM pre-training (Guu et al. 2020, section 3), objective `realm`.

A salient span of a sentence x is masked. Documents z are retrieved by maximum
inner product search, and the reader fills the span given each:

  log p(y|x) = log sum_z p(y|z,x) p(z|x)

Documents come from the index in use, which may be old; their scores f(x,z) are
computed with the current parameters, and gradients flow to both networks.
"""

from collections.abc import Iterator
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import exclusion
from realm_jax.corpus import inputs
from realm_jax.corpus import ngrams
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import flops
from realm_jax.models import objectives
from realm_jax.models import reader as reader_lib
from realm_jax.trainer import examples
from realm_jax.trainer import stages

# Score of a null document that is no candidate: exp of it is 0, and unlike with
# -inf, 0 times it is no nan.
_NEVER = -1e9
# The null document of a stage without a corpus, whose step is only traced.
_ANY_NULL = inputs.Null((2, 3, 3), (0, 0, 1))


class Queries(NamedTuple):
  """Masked sentences and what must not be retrieved for them, in numpy."""

  query_ids_BQ: np.ndarray  # `[CLS] x [SEP]`.
  query_lengths_B: np.ndarray
  positions_BM: np.ndarray
  targets_BM: np.ndarray
  mask_BM: np.ndarray
  exclude_BR2: np.ndarray  # Half-open ranges of passage rows.


@stages.batch
class Batch:
  """Masked sentences with K candidates; candidate 0 is the null document.

  Documents are `[CLS] title [SEP] body [SEP]`, of the J = K - 1 retrieved ones;
  joint inputs are `[CLS] x [SEP] body [SEP]`, of all candidates.
  """

  query_ids_BQ: jax.Array
  doc_ids_BJS: jax.Array
  doc_types_BJS: jax.Array
  joint_ids_BKT: jax.Array
  joint_types_BKT: jax.Array
  positions_BM: jax.Array
  targets_BM: jax.Array
  mask_BM: jax.Array


class MaskedQueries(examples.MaskedSentences):
  """Masked sentences with enough candidates that do not hold their text."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    self._exclusion = exclusion.Exclusion(corpus, split, config.trivial)
    needed = config.num_candidates - 1
    left = corpus.num_live - self._exclusion.sizes[self.rows]
    most = min(left.max(), len(corpus.passages) - self._exclusion.largest)
    if most < needed:
      raise ValueError(
          f'The corpus {corpus.directory} leaves too few candidates to the'
          f' {len(self.rows)} sentences of the split {split!r}:'
          f' config.num_candidates={config.num_candidates} (null document'
          f' included) needs {needed} passages that do not hold the sentence'
          f' (config.trivial={config.trivial!r}), {max(most, 0)} at most are'
          ' left. Use a larger corpus or fewer candidates.'
      )
    self.rows = self.rows[left >= needed]
    self._exclusion.use(self.rows)

  def assemble(self, masked: examples.Masked) -> examples.Examples:
    query_ids_BQ, query_lengths_B, targets_BM = self.queries(masked)
    queries = Queries(
        query_ids_BQ,
        query_lengths_B,
        masked.positions_BM.astype(np.int32),
        targets_BM,
        masked.mask_BM,
        self._exclusion.ranges(masked.row_B),
    )
    return examples.Examples(masked.row_B, queries)


class Realm(stages.Stage):
  """Retrieve, then predict."""

  components = ('embedder', 'reader')
  searches = True
  headline = 'null_share'

  def __init__(
      self, config: config_lib.Config, corpus: corpus_lib.Corpus | None = None
  ):
    super().__init__(config, corpus)
    self._null = _ANY_NULL
    if corpus is not None:
      self._null = self.template.null
      split = examples.sentences_of(corpus, config)
      self._source = MaskedQueries(corpus, config, split)

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    return {'masked': (self._source, 1.0)}

  def assemble(self, samples: examples.Masked) -> examples.Examples:
    return self._source.assemble(samples)

  def retrieve(self, queries: Queries, retriever: stages.Retriever) -> Batch:
    k = self.config.num_candidates - 1
    rows_BJ, _ = retriever.search(queries.query_ids_BQ, k, queries.exclude_BR2)
    return with_candidates(queries, rows_BJ, self.corpus, self.template)

  def figures(self, batch: Batch) -> dict[str, np.ndarray]:
    """Returns whether a retrieved body holds the masked wordpieces in a row."""
    places_BM, sizes_B = np.asarray(batch.positions_BM), batch.mask_BM.sum(1)
    if (places_BM.max(axis=1) - places_BM[:, 0] >= sizes_B).any():
      return {}  # A mask of scattered wordpieces.
    body_BKT = np.where(batch.joint_types_BKT == 1, batch.joint_ids_BKT, -1)
    held_BK = ngrams.held(body_BKT, batch.targets_BM, sizes_B)
    return {'answer_in_candidates': held_BK.any(axis=1).astype(float)}

  def probe_queries(self, count: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Takes masked sentences, of `validation` if it has any with a span."""
    config = dataclasses.replace(self.config, batch_size=count)

    def batch_of(split: str) -> examples.Examples:
      return next(evaluation_batches(self.corpus, config, split, count))

    try:
      queries = batch_of('validation').inputs
    except ValueError:  # No such split, or no span in it.
      queries = batch_of(self._source.split).inputs
    k = self.config.num_candidates - 1
    return queries.query_ids_BQ, queries.exclude_BR2, k

  def outputs(
      self,
      models: components_lib.Models,
      batch: Batch,
      noise: dropout.Noise | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns score_BK, f(x, z), and token_logp_BKM, log p(y_j | z, x)."""
    null = self._null if self.config.null_document else None
    noises = (None, None) if noise is None else (noise.fold(0), noise.fold(1))
    return (
        candidate_scores(models.embedder, batch, null, noises[0]),
        read_targets(models.reader, batch, noises[1]),
    )

  def loss(
      self,
      outputs: tuple[jax.Array, jax.Array],
      batch: Batch,
      axis: str | None = None,
  ) -> tuple[jax.Array, stages.Metrics]:
    del axis  # A row's loss is its own.
    score_BK, token_logp_BKM = outputs
    loss, aux = objectives.marginal_mlm(
        score_BK, token_logp_BKM, batch.mask_BM, self.config.granularity
    )
    return loss, objectives.retrieval_metrics(aux, batch.mask_BM.any(-1))

  def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    rows = batch.mask_BM.any(-1).sum()
    if self.config.granularity == 'span':
      return rows, rows
    return batch.mask_BM.sum(), rows

  def passes(self) -> list[flops.Pass]:
    c = self.config
    rows = c.batch_size * (c.num_candidates - 1)
    return [
        flops.embed(c, c.batch_size, c.lengths.query, dropout=True),
        flops.embed(c, rows, c.lengths.document),
        flops.embed(c, 1, len(self._null.ids)),
        flops.fill(c, c.batch_size * c.num_candidates),
    ]

  def abstract_batch(self) -> Batch:
    c, lengths = self.config, self.config.lengths
    b, k = c.batch_size, c.num_candidates

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
      return jax.ShapeDtypeStruct(shape, dtype)

    query, masks = array(b, lengths.query), array(b, lengths.masks)
    documents = (array(b, k - 1, lengths.document),) * 2
    joint = (array(b, k, lengths.joint),) * 2
    used = array(b, lengths.masks, dtype=jnp.bool_)
    return Batch(query, *documents, *joint, masks, masks, used)


def evaluation_batches(
    corpus: corpus_lib.Corpus,
    config: config_lib.Config,
    split: str = 'validation',
    limit: int | None = None,
) -> Iterator[examples.Examples]:
  """Returns one pass over a split in a fixed order, with fixed masks.

  The last batch is smaller; `limit` is a number of sentences. The inputs of a
  batch are `Queries`.

  Raises:
    ValueError: the split has nothing to mask.
  """
  source = MaskedQueries(corpus, config, split)
  return examples.one_pass(source, source.assemble, config.batch_size, limit)


def with_candidates(
    queries: Queries,
    retrieved_BJ: np.ndarray,
    corpus: corpus_lib.Corpus,
    template: inputs.Template,
) -> Batch:
  """Returns the batch of masked sentences with the documents retrieved."""
  null_B1 = np.full((len(retrieved_BJ), 1), inputs.NULL_DOCUMENT, np.int64)
  doc_ids_BJS, doc_types_BJS = template.documents(corpus.passages, retrieved_BJ)
  joint_ids_BKT, joint_types_BKT = inputs.assemble_joint(
      corpus.passages,
      np.concatenate([null_B1, retrieved_BJ], axis=1),
      queries.query_ids_BQ,
      queries.query_lengths_B,
      template.query_length + template.document_length,
      corpus.tokenizer,
  )
  arrays: Any = (
      template.queries(queries.query_ids_BQ),
      doc_ids_BJS,
      doc_types_BJS,
      joint_ids_BKT,
      joint_types_BKT,
      queries.positions_BM,
      queries.targets_BM,
      queries.mask_BM,
  )
  return Batch(*arrays)


def candidate_scores(
    embedder: embedder_lib.Embedder,
    batch: Batch,
    null: inputs.Null | None,
    noise: dropout.Noise | None = None,
) -> jax.Array:
  """Scores the null document and the retrieved ones.

  Args:
    embedder: with its parameters.
    batch: queries and documents.
    null: the null document, `[CLS] [SEP] [SEP]`. It is the same for all queries
      and is embedded once. None: it keeps its place, with a score that makes
      its probability 0.
    noise: for dropout in the query tower; documents are embedded without.

  Returns:
    score_BK, float32; candidate 0 is the null document.
  """
  b, j, s = batch.doc_ids_BJS.shape
  query_emb_BE = embedder.embed_query(batch.query_ids_BQ, noise)
  doc_emb = embedder.embed_document(  # (B*J) E
      batch.doc_ids_BJS.reshape(b * j, s), batch.doc_types_BJS.reshape(b * j, s)
  )
  real_BJ = embedder_lib.score(query_emb_BE, doc_emb.reshape(b, j, -1))
  if null is None:
    return jnp.pad(real_BJ, ((0, 0), (1, 0)), constant_values=_NEVER)
  null_emb_1E = embedder.embed_document(
      *(jnp.asarray(np.array([part], np.int32)) for part in null)
  )
  null_B1 = jnp.einsum('BE,XE->BX', query_emb_BE, null_emb_1E)
  return jnp.concatenate([null_B1, real_BJ], axis=1)


def read_targets(
    reader: reader_lib.Reader, batch: Batch, noise: dropout.Noise | None = None
) -> jax.Array:
  """Returns log p(y_j | z_k, x) of the masked wordpieces, token_logp_BKM."""
  b, k, t = batch.joint_ids_BKT.shape
  token_logp = reader.token_logp(
      batch.joint_ids_BKT.reshape(b * k, t),
      batch.joint_types_BKT.reshape(b * k, t),
      # The sentence comes first, so its masks are at the same positions in
      # front of every candidate.
      jnp.repeat(batch.positions_BM, k, axis=0),
      jnp.repeat(batch.targets_BM, k, axis=0),
      None if noise is None else noise.repeat(k),
  )
  return token_logp.reshape(b, k, -1)
