"""The inverse cloze task (Lee et al. 2019, section 4), objective `ict`.

A sentence is cut out of its passage, and the retriever learns to find the
passage among those of the batch. With `ict.questions`, questions and passages
that answer them take the place of the sentences (Karpukhin et al. 2020).
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import flops
from realm_jax.models import objectives
from realm_jax.qa import question_table as question_table_lib
from realm_jax.trainer import examples
from realm_jax.trainer import stages

log = logging.getLogger(__name__)


@stages.batch
class Batch:
  """Queries with a passage each; the passages of other rows are negatives.

  `passage_B` is the passage's row in the corpus: two queries may have the same.
  """

  query_ids_BQ: jax.Array
  doc_ids_BS: jax.Array
  doc_types_BS: jax.Array
  passage_B: jax.Array


class _Cloze(NamedTuple):
  row_B: Any
  removed_B: Any  # Whether the sentence is cut out of its passage.


class ClozeSentences(examples.Sentences):
  """Sentences with their passages."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    # Something of the passage has to remain: other sentences, or a title. And
    # the sentence must lie in what is read of the passage, title first.
    table, passages = corpus.passages, np.asarray(self.table.passages)
    whole = table.offsets[passages + 1] - table.offsets[passages]
    titles = table.title_lengths[passages]
    room = config.lengths.document - self.template.overhead(titles) - titles
    self.rows = np.flatnonzero(
        (self.table.lengths < whole) & (self.ends() <= room)
    )
    if not len(self.rows):
      raise ValueError(
          f'The corpus {corpus.directory} has no passage with a title or a'
          ' second sentence, which ICT needs: it finds a passage from a'
          ' sentence cut out of it. The sentence must lie within the first'
          f' lengths.document = {config.lengths.document} wordpieces.'
      )

  def sample(self, row: int, rng: np.random.Generator) -> _Cloze:
    return _Cloze(row, rng.random() < self.config.ict.remove_rate)

  def assemble(self, samples: _Cloze) -> examples.Examples:
    rows_B, table, passages = samples.row_B, self.table, self.corpus.passages
    passage_B = np.asarray(table.passages[rows_B])
    query_ids_BQ, _ = inputs.assemble_queries(
        table, rows_B, self.template.text_length, self.corpus.tokenizer
    )
    body_B = passages.offsets[passage_B] + passages.title_lengths[passage_B]
    start_B = table.starts[rows_B] - body_B
    limit_B = start_B + np.where(samples.removed_B, table.lengths[rows_B], 0)
    ids_BS, types_BS = self.template.documents(
        passages, passage_B, cut=(start_B, limit_B)
    )
    batch: Any = Batch(
        self.template.queries(query_ids_BQ),
        ids_BS,
        types_BS,
        passage_B.astype(np.int32),
    )
    return examples.Examples(rows_B, batch)


class _Pair(NamedTuple):
  row_B: np.ndarray
  passage_B: np.ndarray


class QuestionPairs:
  """Questions with a passage that answers them; each visit draws one."""

  def __init__(
      self,
      corpus: corpus_lib.Corpus,
      template: inputs.Template,
      questions: question_table_lib.QuestionTable,
  ):
    self._corpus, self._template, self._table = corpus, template, questions
    gold = question_table_lib.find_gold(corpus, questions.questions)
    self._gold_rows = gold.rows
    self._rows = np.flatnonzero([len(rows) > 0 for rows in self._gold_rows])
    if not len(self._rows):
      raise ValueError(
          f'None of the {len(questions)} questions of config.ict.questions has'
          f' a passage_id that is in the corpus {corpus.directory}.'
      )
    gold.warn(corpus, 'They are not trained on.')
    nameless = sum(not question.gold for question in questions.questions)
    if nameless:
      log.warning(
          '%d of the %d questions of config.ict.questions have no passage_id'
          ' and are not trained on.',
          nameless, len(questions),
      )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> int:
    return int(self._rows[index])

  def sample(self, row: int, rng: np.random.Generator) -> _Pair:
    return _Pair(np.asarray(row), np.asarray(rng.choice(self._gold_rows[row])))

  def assemble(self, samples: _Pair) -> examples.Examples:
    ids_BS, types_BS = self._template.documents(
        self._corpus.passages, samples.passage_B
    )
    batch: Any = Batch(
        self._template.queries(self._table.query_ids_NQ[samples.row_B]),
        ids_BS,
        types_BS,
        samples.passage_B.astype(np.int32),
    )
    return examples.Examples(samples.row_B, batch)


class Ict(stages.Stage):
  """In-batch softmax over inner products of sentences and passages."""

  components = ('embedder',)
  in_batch = True

  def __init__(
      self, config: config_lib.Config, corpus: corpus_lib.Corpus | None = None
  ):
    super().__init__(config, corpus)
    self._questions: question_table_lib.QuestionTable | None = None
    if corpus is not None and config.ict.questions:
      self._questions = question_table_lib.QuestionTable.read(
          config.ict.questions, self.template.text_length, corpus.tokenizer
      )
      self.lineage['questions_digest'] = self._questions.digest

  @functools.cached_property
  def _source(self) -> ClozeSentences | QuestionPairs:
    if self._questions is None:
      return ClozeSentences(self.corpus, self.config, 'knowledge')
    return QuestionPairs(self.corpus, self.template, self._questions)

  @classmethod
  def longest_input(cls, config: config_lib.Config) -> int:
    return max(config.lengths.query, config.lengths.document)

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    return {'cloze': (self._source, 1.0)}

  def assemble(self, samples: Any) -> examples.Examples:
    return self._source.assemble(samples)

  def outputs(
      self,
      models: components_lib.Models,
      batch: Batch,
      noise: dropout.Noise | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Returns query_emb_BE and doc_emb_BE."""
    query_emb_BE = models.embedder.embed_query(batch.query_ids_BQ, noise)
    doc_emb_BE = models.embedder.embed_document(
        batch.doc_ids_BS, batch.doc_types_BS
    )
    return query_emb_BE, doc_emb_BE

  def loss(
      self,
      outputs: tuple[jax.Array, jax.Array],
      batch: Batch,
      axis: str | None = None,
  ) -> tuple[jax.Array, stages.Metrics]:
    query_emb_BE, doc_emb_CE = outputs
    passage_B = passage_C = batch.passage_B
    first: Any = 0  # Where the rows of this device begin among C.
    if axis is not None:
      first = jax.lax.axis_index(axis) * len(query_emb_BE)
      doc_emb_CE, passage_C = jax.lax.all_gather(
          (doc_emb_CE, passage_C), axis, tiled=True
      )
    same_BC = passage_B[:, None] == passage_C
    return objectives.in_batch_softmax(query_emb_BE, doc_emb_CE, first, same_BC)

  def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return (jnp.float32(len(batch.query_ids_BQ)),) * 2

  def passes(self) -> list[flops.Pass]:
    c = self.config
    # Each query with each document.
    products = 2.0 * c.batch_size**2 * c.model.embedding_width
    return [
        flops.embed(c, c.batch_size, c.lengths.query, dropout=True),
        flops.embed(c, c.batch_size, c.lengths.document, products),
    ]

  def abstract_batch(self) -> Batch:
    b, lengths = self.config.batch_size, self.config.lengths
    query: Any = jax.ShapeDtypeStruct((b, lengths.query), jnp.int32)
    document: Any = jax.ShapeDtypeStruct((b, lengths.document), jnp.int32)
    passage: Any = jax.ShapeDtypeStruct((b,), jnp.int32)
    return Batch(query, document, document, passage)
