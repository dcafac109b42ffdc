"""Reader warm-up by masked language modelling, objective `mlm`.

It stands in for a pretrained BERT: the reader learns to read a passage, and
that most passages are of no use.
"""

import bisect
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import exclusion
from realm_jax.corpus import inputs
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import flops
from realm_jax.trainer import examples
from realm_jax.trainer import stages


@stages.batch
class Batch:
  """Sentences with a passage each: `[CLS] x [SEP] body [SEP]`."""

  joint_ids_BT: jax.Array
  joint_types_BT: jax.Array
  positions_BM: jax.Array
  targets_BM: jax.Array
  mask_BM: jax.Array


# The views of a sentence in `config.mlm.views`.
VIEWS = ('own', 'answer', 'article', 'random', 'null')


class _Sample(NamedTuple):
  masked: examples.Masked
  passage_B: Any  # The passage that is shown.
  own_B: Any  # Whether it is that of the sentence.
  fallback_B: Any  # Whether it stands in for one that does not exist.


class OwnPassage(examples.MaskedSentences):
  """Masked sentences that see their own passage, which shows the answer."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    self.rows = self.rows[self.ends()[self.rows] <= self.room(self.rows)]
    self.require_rows(', in a sentence that its passage shows')

  def room(self, rows: Any) -> Any:
    """Returns how many wordpieces of a body each sentence leaves room for."""
    query = np.minimum(self.table.lengths[rows] + 2, self.template.text_length)
    return self.config.lengths.joint - 1 - query

  def sample(self, row: int, rng: np.random.Generator) -> _Sample:
    masked = super().sample(row, rng)
    return _Sample(masked, int(self.table.passages[row]), True, False)


class OtherPassage(examples.MaskedSentences):
  """Masked sentences that see a random passage or the null document.

  Without these, the reader would trust any passage, and the null document
  would beat all passages that are not gold.
  """

  def sample(self, row: int, rng: np.random.Generator) -> _Sample:
    masked = super().sample(row, rng)
    passage = inputs.NULL_DOCUMENT
    if rng.random() >= self.config.mlm.null_rate:
      passage = int(rng.integers(len(self.corpus.passages)))
    return _Sample(masked, passage, False, False)


class Views(OwnPassage):
  """Masked sentences that see one of the views of `config.mlm.views`.

  REALM's candidates never show the sentence itself. So a reader must learn to
  use another passage with the answer, to do without one in a passage about the
  same subject, and what it knows without a passage.
  """

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    self._names = tuple(config.mlm.views)
    self._limits = np.cumsum(list(config.mlm.views.values())).tolist()
    self._articles = exclusion.ArticlePassages(corpus, split)

  def sample(self, row: int, rng: np.random.Generator) -> _Sample:
    sample = super().sample(row, rng)
    at = bisect.bisect_right(self._limits, rng.random())
    view = self._names[min(at, len(self._names) - 1)]
    if view == 'own':
      return sample
    if view in ('null', 'random'):
      passage = inputs.NULL_DOCUMENT
      if view == 'random':
        passage = int(rng.integers(len(self.corpus.passages)))
      return sample._replace(passage_B=passage)
    answer = _answer(self.table, sample.masked)
    found = self._articles.find(
        row, answer, int(self.room(row)), holding=view == 'answer'
    )
    if not found:
      return sample._replace(fallback_B=True)
    passage = found[rng.integers(len(found))]
    return sample._replace(passage_B=passage)


def _answer(
    table: corpus_lib.SentenceTable, masked: examples.Masked
) -> np.ndarray:
  """Returns the masked wordpieces of one sample; none if not in a row."""
  places, size = masked.positions_BM.tolist(), int(masked.mask_BM.sum())
  if places[size - 1] - places[0] >= size:
    return masked.positions_BM[:0]
  first = int(table.starts[int(masked.row_B)]) + places[0] - 1
  return np.asarray(table.tokens[first : first + size])


class Mlm(stages.Stage):
  """Examples of one or two kinds; see `config.mlm`."""

  components = ('reader',)

  @classmethod
  def problems(cls, config: config_lib.Config) -> stages.Problems:
    views: dict[str, Any] = config.mlm.views
    shares = views.values()
    if set(views) - set(VIEWS):
      yield 'mlm.views', f'the views are {", ".join(VIEWS)}'
    elif not all(isinstance(x, (int, float)) and x >= 0 for x in shares):
      yield 'mlm.views', 'each share must be a number that is not negative'
    elif views and abs(sum(shares) - 1) > 1e-6:
      yield 'mlm.views', f'the sum of the shares must be 1, not {sum(shares):g}'

  @functools.cached_property
  def _kinds(self) -> dict[str, examples.MaskedSentences]:
    corpus, config = self.corpus, self.config
    kinds: dict[str, examples.MaskedSentences] = {}
    if config.mlm.views:
      return {'views': Views(corpus, config, 'knowledge')}
    if config.mlm.own_passage_rate > 0:
      kinds['own'] = OwnPassage(corpus, config, 'knowledge')
    if config.mlm.own_passage_rate < 1:
      split = examples.sentences_of(corpus, config)
      kinds['alone'] = OtherPassage(corpus, config, split)
    return kinds

  def sources(self) -> dict[str, tuple[examples.Source, float]]:
    share = self.config.mlm.own_passage_rate
    shares = {'own': share, 'alone': 1 - share, 'views': 1.0}
    return {name: (kind, shares[name]) for name, kind in self._kinds.items()}

  def assemble(self, samples: _Sample) -> examples.Examples:
    if 'views' in self._kinds:
      batch = self._assemble(self._kinds['views'], samples)
      figures = {'view_fallback': samples.fallback_B.astype(np.float32)}
      return examples.Examples(samples.masked.row_B, batch, figures)
    # Rows of the two kinds may be of two sentence tables.
    rows, parts = [], []
    for name, kind in self._kinds.items():
      rows.append(np.flatnonzero(samples.own_B == (name == 'own')))
      part = jax.tree.map(lambda x, at=rows[-1]: x[at], samples)
      parts.append(self._assemble(kind, part))
    order = np.argsort(np.concatenate(rows))
    batch = jax.tree.map(lambda *x: np.concatenate(x)[order], *parts)
    return examples.Examples(samples.masked.row_B, batch)

  def _assemble(
      self, kind: examples.MaskedSentences, samples: _Sample
  ) -> Batch:
    query_ids_BQ, query_lengths_B, targets_BM = kind.queries(samples.masked)
    ids_B1T, types_B1T = inputs.assemble_joint(
        self.corpus.passages,
        samples.passage_B[:, None],
        query_ids_BQ,
        query_lengths_B,
        self.config.lengths.joint,
        self.corpus.tokenizer,
    )
    return Batch(
        joint_ids_BT=ids_B1T[:, 0],
        joint_types_BT=types_B1T[:, 0],
        positions_BM=samples.masked.positions_BM.astype(np.int32),
        targets_BM=targets_BM,
        mask_BM=samples.masked.mask_BM,
    )

  def outputs(
      self,
      models: components_lib.Models,
      batch: Batch,
      noise: dropout.Noise | None,
  ) -> jax.Array:
    """Returns log p(y_j | x, z) of the masked wordpieces, token_logp_BM."""
    return models.reader.token_logp(
        batch.joint_ids_BT,
        batch.joint_types_BT,
        batch.positions_BM,
        batch.targets_BM,
        noise,
    )

  def loss(
      self, outputs: jax.Array, batch: Batch, axis: str | None = None
  ) -> tuple[jax.Array, stages.Metrics]:
    """Returns the mean negative log-likelihood of the masked wordpieces."""
    del axis  # A row's loss is its own.
    total = jnp.where(batch.mask_BM, outputs, 0.0).sum()
    return -total / jnp.maximum(batch.mask_BM.sum(), 1), {}

  def counts(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return batch.mask_BM.sum(), batch.mask_BM.any(-1).sum()

  def passes(self) -> list[flops.Pass]:
    c = self.config
    return [flops.fill(c, c.batch_size)]

  def abstract_batch(self) -> Batch:
    b, lengths = self.config.batch_size, self.config.lengths
    joint: Any = jax.ShapeDtypeStruct((b, lengths.joint), jnp.int32)
    masks: Any = jax.ShapeDtypeStruct((b, lengths.masks), jnp.int32)
    used: Any = jax.ShapeDtypeStruct((b, lengths.masks), jnp.bool_)
    return Batch(joint, joint, masks, masks, used)
