"""Learning to find named entities, for salient spans: objective `tagger`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import encoders
from realm_jax.models import flops
from realm_jax.models import tagger
from realm_jax.trainer import examples
from realm_jax.trainer import stages


@stages.batch
class Batch:
  """Sentences with the labels of their wordpieces; -1 has no label."""

  ids_BL: jax.Array
  types_BL: jax.Array
  labels_BL: jax.Array


def _sentences(
    config: config_lib.Config, quiet: bool = False
) -> list[entities.TaggedSentence]:
  c = config.tagger
  return entities.read(c.files, c.tag_column, c.tag_names, quiet)


class _Row(NamedTuple):
  row_B: np.ndarray


class TaggedSentences:
  """The rows of a table of tagged sentences, as a source of Grain."""

  def __init__(self, table: entities.TaggedTable):
    self._table = table

  def __len__(self) -> int:
    return len(self._table)

  def __getitem__(self, index: int) -> int:
    return index

  def sample(self, row: int, rng: np.random.Generator) -> _Row:
    del rng
    return _Row(np.asarray(row))


class Tagger(stages.Stage):
  """Cross-entropy of the label of each word."""

  components = ('tagger',)

  def __init__(
      self, config: config_lib.Config, corpus: corpus_lib.Corpus | None = None
  ):
    super().__init__(config, corpus)
    if corpus is not None:
      self._table = entities.TaggedTable.of(
          _sentences(config),
          config.model.entity_types,
          config.tagger.length,
          corpus.tokenizer,
      )
      self.lineage['tagged_digest'] = self._table.digest

  @classmethod
  def problems(cls, config: config_lib.Config) -> stages.Problems:
    if not config.tagger.files:
      yield 'tagger.files', 'give the files of tagged sentences to train on'
    if config.tagger.length < 4:
      yield 'tagger.length', 'must be at least 4'
    segments = encoders.load(config.model).segments
    if config.model.capitals and not segments:
      yield (
          'model.capitals',
          f'needs two segments; the encoder {config.model.encoder!r} has one,'
          ' so set config.model.capitals=False',
      )

  @classmethod
  def complete(cls, config: config_lib.Config) -> None:
    if not config.model.entity_types:
      config.model.entity_types = entities.types_of(
          _sentences(config, quiet=True)
      )

  @classmethod
  def longest_input(cls, config: config_lib.Config) -> int:
    return config.tagger.length

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    return {'tagged': (TaggedSentences(self._table), 1.0)}

  def assemble(self, samples: _Row) -> examples.Examples:
    rows_B, table = samples.row_B, self._table
    batch: Any = Batch(
        table.ids_NL[rows_B], table.types_NL[rows_B], table.labels_NL[rows_B]
    )
    return examples.Examples(rows_B, batch)

  def outputs(
      self,
      models: components_lib.Models,
      batch: Batch,
      noise: dropout.Noise | None,
  ) -> jax.Array:
    """Returns the logits of each label, logits_BLC."""
    return models.tagger.label_logits(batch.ids_BL, batch.types_BL, noise)

  def loss(
      self, outputs: jax.Array, batch: Batch, axis: str | None = None
  ) -> tuple[jax.Array, stages.Metrics]:
    del axis  # A row's loss is its own.
    loss, accuracy = tagger.tagging_loss(outputs, batch.labels_BL)
    return loss, {'accuracy': accuracy}

  def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return ((batch.labels_BL >= 0).sum(),) * 2

  def passes(self) -> list[flops.Pass]:
    c, length = self.config, self.config.tagger.length
    labels = 1 + 2 * len(c.model.entity_types)
    head = 2.0 * c.batch_size * length * c.model.width * labels
    return [flops.Pass('tagger.bert', c.batch_size, length, length, head)]

  def abstract_batch(self) -> Batch:
    shape = (self.config.batch_size, self.config.tagger.length)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    return Batch(ids, ids, ids)
