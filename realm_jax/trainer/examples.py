"""From the corpus to batches of examples, in numpy and Grain.

Every random choice is a function of (seed, position in the stream) alone: the
batches do not depend on the number of workers or processes, and a job resumes
by the number of its step.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
import zlib

import grain
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import masking
from realm_jax.runtime import extension


class Source(Protocol):
  """A random access source of Grain, from which an epoch is drawn.

  `sample` makes the random choices of one visit; it returns a tuple of arrays
  or numbers, which Grain stacks to a batch.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> int: ...

  def sample(self, row: int, rng: np.random.Generator) -> Any: ...


class Examples(NamedTuple):
  """A batch on the host.

  Attributes:
    row_B: rows of the sentence table, or of the questions.
    inputs: the arrays; those of a stage that searches lack the documents.
    figures: metrics that are known of each row, float [B].
  """

  row_B: np.ndarray
  inputs: Any
  figures: dict[str, np.ndarray] = {}


class Stage(Protocol):
  """The part of a stage that makes examples; see trainer/stages."""

  config: config_lib.Config

  def sources(self) -> dict[str, tuple[Source, float]]: ...

  def assemble(self, samples: Any) -> Examples: ...


def training_batches(
    stage: Stage, start: int = 0, rows: np.ndarray | None = None
) -> Iterator[Examples]:
  """Returns the endless stream of batches of a stage.

  Each epoch has an order of its own, and each visit of an example makes its
  random choices again.

  Args:
    stage: of the job.
    start: number of the first batch: the step that a job resumes at.
    rows: the wanted rows of each batch, ascending; None: all of them.

  Raises:
    ValueError: the corpus has nothing to learn from.
  """
  config = stage.config

  def stream(name: str, source: Source) -> grain.MapDataset:
    return (
        grain.MapDataset.source(source)
        .seed(zlib.crc32(f'{name} {config.seed}'.encode()))
        .shuffle()
        .repeat()
        .random_map(source.sample)
    )

  sources = stage.sources()
  sampled = grain.MapDataset.mix(
      [stream(name, source) for name, (source, _) in sources.items()],
      [weight for _, weight in sources.values()],
  )
  size = config.batch_size
  if rows is not None:
    sampled = grain.MapDataset.source(_Rows(sampled, size, rows))
    size = len(rows)
  batches = sampled.batch(size, drop_remainder=True).map(stage.assemble)
  return iter(
      batches[start:].to_iter_dataset(
          grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
      )
  )


def one_pass(
    source: Source,
    assemble: Callable[[Any], Examples],
    batch_size: int,
    limit: int | None = None,
) -> Iterator[Examples]:
  """Yields each example once, in a fixed order with fixed random choices.

  The last batch is smaller; `limit` is a number of examples.
  """
  order = grain.MapDataset.source(source).seed(0).shuffle()
  if limit is not None:
    order = order[: min(limit, len(order))]
  yield from (
      order.random_map(source.sample)
      .batch(batch_size, drop_remainder=False)
      .map(assemble)
  )


def sentences_of(corpus: corpus_lib.Corpus, config: config_lib.Config) -> str:
  """Returns the split whose sentences are masked; `auto` prefers X.

  Sentences that are paired with their passage, in ICT and in most of the
  warm-up, are of the split `knowledge` in any case.
  """
  if config.sentences != 'auto':
    return config.sentences
  return 'pretraining' if 'pretraining' in corpus.sentences else 'knowledge'


class Sentences:
  """The sentences of a split; `rows` are those that an objective can use."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    if split not in corpus.sentences:
      raise ValueError(
          f'The corpus {corpus.directory} has no sentences of the split'
          f' {split!r}; it has {sorted(corpus.sentences)}.'
      )
    self.corpus, self.config, self.split = corpus, config, split
    self.template = inputs.Template.of(
        config.model, config.lengths, corpus.tokenizer
    )
    self.table = corpus.sentences[split]
    self.rows = np.arange(len(self.table))

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> int:
    return int(self.rows[index])

  def __repr__(self) -> str:
    return f'sentences({self.split}, {len(self)})'

  def ends(self) -> np.ndarray:
    """Returns where each sentence ends in the body of its passage, int64."""
    passages = np.asarray(self.table.passages)
    table = self.corpus.passages
    body = table.offsets[passages] + table.title_lengths[passages]
    return self.table.starts - body + self.table.lengths


class Masked(NamedTuple):
  """Sentences with some wordpieces masked; a batch of them has the letter B.

  Attributes:
    row_B: rows of the sentence table.
    positions_BM: positions of the masks in `[CLS] x [SEP]`.
    mask_BM: which of the M are used.
    shown_BM: ids that are read in their places, mostly [MASK].
  """

  row_B: np.ndarray
  positions_BM: np.ndarray
  mask_BM: np.ndarray
  shown_BM: np.ndarray


class MaskedSentences(Sentences):
  """Sentences with salient spans, and the mask that `config.masking` names."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    self._mask = extension.load(
        'config.masking', config.masking, masking.MASKS
    )
    if corpus.tokenizer.mask_id < 0:
      raise ValueError(
          f'The tokenizer of {corpus.directory} has no mask token, as'
          f' {config.objective} needs; the corpus serves `ict` and `open_qa`.'
      )
    # A span is used only if every wordpiece of it can be predicted: nothing is
    # masked without being a target.
    spans = np.asarray(self.table.spans)
    fits = (spans[:, 1] - spans[:, 0] <= config.lengths.masks) & (
        spans[:, 1] <= self.template.text_length - 2
    )
    before = np.concatenate([[0], np.cumsum(fits)])
    self._spans = spans[fits]
    self._span_offsets = before[np.asarray(self.table.span_offsets)]
    self.rows = np.flatnonzero(np.diff(self._span_offsets))
    self.require_rows('')

  def require_rows(self, condition: str) -> None:
    """Raises ValueError if no sentence is left; `condition` ends it."""
    if len(self.rows):
      return
    lengths = self.config.lengths
    if not len(self.table.spans):
      raise ValueError(
          f'The corpus {self.corpus.directory} has no salient spans, and'
          f' {self.config.objective} masks them. Prepare it with'
          ' --spans=random, give the records `spans`, or mark names with a'
          f' tagger: `realm-jax tag --corpus={self.corpus.directory}`.'
      )
    prefix = len(self.template.query_prefix)
    less = f' - {prefix} (the prefix)' if prefix else ''
    raise ValueError(
        f'The corpus {self.corpus.directory} has no salient span to mask in its'
        f' {len(self.table)} sentences of the split {self.split!r}: none lies'
        f' within the first lengths.query - 2{less} ='
        f' {self.template.text_length - 2} wordpieces and has at most'
        f' lengths.masks = {lengths.masks}{condition}.'
    )

  def sample(self, row: int, rng: np.random.Generator) -> Any:
    table, config = self.table, self.config
    spans = self._spans[self._span_offsets[row] : self._span_offsets[row + 1]]
    start, limit = rng.choice(spans)
    length = min(int(table.lengths[row]), self.template.text_length - 2)
    first = int(table.starts[row])
    sentence = masking.Sentence(
        ids=table.tokens[first : first + length],
        spans_S2=spans,
        span=(start, limit),
        max_masks=config.lengths.masks,
        options=config.options,
        tokenizer=self.corpus.tokenizer,
    )
    chosen = self._mask(sentence, rng)
    masking.check(chosen, sentence, config.masking)
    positions_M = np.zeros(config.lengths.masks, np.int64)
    shown_M = np.full(len(positions_M), self.corpus.tokenizer.mask_id, np.int64)
    if isinstance(chosen, masking.Replaced):
      shown_M[: len(chosen.ids)] = chosen.ids
      chosen = chosen.positions
    positions_M[: len(chosen)] = chosen + 1  # After [CLS].
    mask_M = np.arange(len(positions_M)) < len(chosen)
    return Masked(np.asarray(row), positions_M, mask_M, shown_M)

  def queries(
      self, masked: Masked
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns `[CLS] x [SEP]` with masks, its lengths, and what they hide.

    The retriever's prefix is not in it.

    Args:
      masked: a batch of samples.

    Returns:
      query_ids_BQ, query_lengths_B and targets_BM, int32; unused targets are 0.
    """
    tokenizer = self.corpus.tokenizer
    ids_BQ, lengths_B = inputs.assemble_queries(
        self.table, masked.row_B, self.template.text_length, tokenizer
    )
    hidden_BM = np.take_along_axis(ids_BQ, masked.positions_BM, axis=1)
    shown_BM = np.where(masked.mask_BM, masked.shown_BM, hidden_BM)
    np.put_along_axis(ids_BQ, masked.positions_BM, shown_BM, axis=1)
    targets_BM = np.where(masked.mask_BM, hidden_BM, 0).astype(np.int32)
    return ids_BQ, lengths_B, targets_BM


class _Rows:
  """Some rows of each batch of a stream that is cut into batches."""

  def __init__(
      self, examples: grain.MapDataset, batch_size: int, rows: np.ndarray
  ):
    self._examples, self._batch_size, self._rows = examples, batch_size, rows

  def __len__(self) -> int:
    return len(self._examples) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Any:
    batch, place = divmod(index, len(self._rows))
    return self._examples[batch * self._batch_size + int(self._rows[place])]

  def __repr__(self) -> str:
    return f'rows({len(self._rows)} of {self._batch_size})'
