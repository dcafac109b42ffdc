"""From the corpus to batches of examples, in numpy and Grain.

Every random choice is a function of (seed, position in the stream) alone: the
batches do not depend on the number of workers or processes, and a job resumes
by the number of its step.
"""

from collections.abc import Callable, Iterator
import sys
from typing import Any, NamedTuple, Protocol
import zlib

import grain
import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import masking
from realm_jax.runtime import extension


class Source(Protocol):
  """Examples from which an epoch is drawn, by index.

  `sample` makes the random choices of one visit; it returns a tuple of arrays
  or numbers, which are stacked to a batch.
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
  batches = grain.MapDataset.source(_Batches(stage, rows))[start:]
  # Python runs one thread at a time: with a second one, batches take longer.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
  return iter(batches.to_iter_dataset(options))


class _Batches:
  """The batches of a stage, by number."""

  def __init__(self, stage: Stage, rows: np.ndarray | None):
    sources, config = stage.sources(), stage.config
    self._assemble, self._size = stage.assemble, config.batch_size
    self._rows = np.arange(self._size) if rows is None else rows
    self._shares = [share for _, share in sources.values()]
    self._visits = [
        _Visits(source, zlib.crc32(f'{name} {config.seed}'.encode()))
        for name, (source, _) in sources.items()
    ]

  def __len__(self) -> int:
    return sys.maxsize // self._size

  def __getitem__(self, number: int) -> Examples:
    position_B = number * self._size + self._rows
    samples: list[Any] = [None] * len(position_B)
    parts = _divide(position_B, self._shares)
    for visits, (place_N, visit_N) in zip(self._visits, parts, strict=True):
      for place, sample in zip(place_N, visits.samples(visit_N), strict=True):
        samples[place] = sample
    return self._assemble(jax.tree.map(lambda *x: np.asarray(x), *samples))


class _Visits:
  """The endless visits of the examples of a source.

  The order of each epoch and the random choices are those of `shuffle` and
  `random_map` of Grain, whose datasets take longer for each example than all
  else that it needs.
  """

  def __init__(self, source: Source, seed: int):
    self._source = source
    self._order, self._choices = (
        int(np.random.SeedSequence([seed, depth]).generate_state(1)[0])
        for depth in (1, 3)  # Places of the two in the dataset of Grain.
    )

  def samples(self, visit_N: np.ndarray) -> Iterator[Any]:
    """Yields the samples of some visits, which are numbered from 0."""
    rng = np.random.Generator(np.random.Philox(self._choices))
    state: Any = rng.bit_generator.state
    size = len(self._source)
    for visit in visit_N.tolist():
      epoch, place = divmod(visit, size)
      index = grain.experimental.index_shuffle(
          place,
          max_index=size - 1,
          seed=(self._order + epoch) % 2**32,
          rounds=4,
      )
      state['state']['counter'][3] = visit
      rng.bit_generator.state = state
      yield self._source.sample(self._source[index], rng)


def _divide(
    position_N: np.ndarray, shares: list[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields the places of each source among positions, and its visits there.

  The sources alternate as in `mix` of Grain.
  """
  weights = [int(share * (100 / min(shares))) for share in shares]
  left = sum(weights)
  # How many of the positions before each one, and up to it, are not divided.
  before_N, after_N = position_N, position_N + 1
  for weight in weights:
    rest = left - weight
    others_N, others_after_N = before_N * rest // left, after_N * rest // left
    visit_N = before_N - others_N
    place_N = np.flatnonzero(after_N - others_after_N > visit_N)
    yield place_N, visit_N[place_N]
    left, before_N, after_N = rest, others_N, others_after_N


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

  row_B: Any
  positions_BM: np.ndarray
  mask_BM: np.ndarray
  shown_BM: np.ndarray


class MaskedSentences(Sentences):
  """Sentences with salient spans, and the mask that `config.masking` names."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    self._mask = extension.load('config.masking', config.masking, masking.MASKS)
    if corpus.tokenizer.mask_id < 0:
      raise ValueError(
          f'The tokenizer of {corpus.directory} has no mask token, as'
          f' {config.objective} needs; the corpus serves `ict` and `open_qa`.'
      )
    # A span is used only if every wordpiece of it can be predicted: nothing is
    # masked without being a target.
    spans = np.asarray(self.table.spans)
    masks = config.lengths.masks
    fits = spans[:, 1] - spans[:, 0] <= masks
    fits &= spans[:, 1] <= self.template.text_length - 2
    before = np.concatenate([[0], np.cumsum(fits)])
    self._spans = spans[fits]
    self._column_M = np.arange(masks)
    self._hidden_M = np.full(masks, corpus.tokenizer.mask_id, np.int64)
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
    first, limit = self._span_offsets[row : row + 2].tolist()
    span = self._spans[first + rng.integers(limit - first)].tolist()
    if self._mask is masking.salient:
      used_M = self._column_M < span[1] - span[0]
      positions_M = np.where(used_M, self._column_M + (span[0] + 1), 0)
      return Masked(row, positions_M, used_M, self._hidden_M)
    return self._masked(row, self._spans[first:limit], span, rng)

  def _masked(
      self,
      row: int,
      spans_S2: np.ndarray,
      span: tuple[int, int],
      rng: np.random.Generator,
  ) -> Masked:
    """Hides what a mask other than `salient` chooses in one sentence."""
    table, config = self.table, self.config
    length = min(int(table.lengths[row]), self.template.text_length - 2)
    first = int(table.starts[row])
    sentence = masking.Sentence(
        ids=table.tokens[first : first + length],
        spans_S2=spans_S2,
        span=span,
        max_masks=config.lengths.masks,
        options=config.options,
        tokenizer=self.corpus.tokenizer,
    )
    chosen = self._mask(sentence, rng)
    masking.check(chosen, sentence, config.masking)
    shown_M = self._hidden_M.copy()
    if isinstance(chosen, masking.Replaced):
      shown_M[: len(chosen.ids)] = chosen.ids
      chosen = chosen.positions
    positions_M = np.zeros_like(shown_M)
    positions_M[: len(chosen)] = chosen + 1  # After [CLS].
    return Masked(row, positions_M, self._column_M < len(chosen), shown_M)

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
