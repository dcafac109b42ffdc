"""From the corpus' tables to batches of wordpieces, in numpy and Grain.

Public: `training_batches`, `evaluation_batches`, `sentences_of`. Every random
choice is a function of (seed, position in the stream) alone: the batches do not
depend on the number of workers or of processes, and to resume is to say where.
"""

from collections.abc import Iterator, Sequence
from typing import Any
import zlib

import grain
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.corpus import exclusion
from realm_jax.corpus import inputs
from realm_jax.qa import question_table as question_table_lib
from realm_jax.trainer import question_examples

Example = dict[str, Any]  # One row of a batch.


def training_batches(
    corpus: corpus_lib.Corpus,
    config: config_lib.Config,
    start: int = 0,
    rows: np.ndarray | None = None,
    questions: question_table_lib.QuestionTable | None = None,
    tagged: entities.TaggedTable | None = None,
    gold_rows: Sequence[np.ndarray] | None = None,
) -> grain.DatasetIterator:
  """The endless stream of batches of the config's objective.

  Each epoch has an order of its own, and each visit of a sentence masks anew.

  Args:
    corpus: opened corpus.
    config: resolved config.
    start: the batch to begin with: how many a job has had that goes on.
    rows: which rows of each batch are wanted, ascending; None: all of them.
    questions: in the place of sentences, of `open_qa` and `ict`.
    tagged: sentences of the objective `tagger`.
    gold_rows: of `ict` with questions, the passages that answer each of them;
      none where they are not known. Each visit of a question draws one.

  Returns:
    Iterator over batches of these rows:
      realm: query_ids_BQ, query_lengths_B, positions_BM, targets_BM, mask_BM,
        exclude_BR2 (row ranges a search must not return).
      mlm: joint_ids_BT, joint_types_BT, positions_BM, targets_BM, mask_BM.
      ict: query_ids_BQ, doc_ids_BS, doc_types_BS, passage_B (row of the
        document's passage).
      open_qa: query_ids_BQ, query_lengths_B.
      tagger: ids_BL, types_BL, labels_BL.
    All have sentence_B, rows of the sentence table, or question_B, of the
    questions.

  Raises:
    ValueError: if the corpus has nothing to learn from.
  """
  def stream(name: str, examples: Any) -> grain.MapDataset:
    return (
        grain.MapDataset.source(examples)
        .seed(zlib.crc32(f'{name} {config.seed}'.encode()))
        .shuffle()
        .repeat()
        .random_map(examples.sample)
    )

  if config.objective == 'mlm':
    examples: Any = _WarmUpExamples(corpus, config)
    sampled = grain.MapDataset.mix(
        [stream(name, part) for name, part in examples.parts.items()],
        examples.weights,
    )
  else:
    name, examples = _source(corpus, config, questions, gold_rows, tagged)
    sampled = stream(name, examples)
  size = config.batch_size
  if rows is not None:
    sampled = grain.MapDataset.source(_Rows(sampled, size, rows))
    size = len(rows)
  batches = sampled.batch(size, drop_remainder=True).map(examples.assemble)
  return iter(
      batches[start:].to_iter_dataset(
          grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
      )
  )


def evaluation_batches(
    corpus: corpus_lib.Corpus,
    config: config_lib.Config,
    split: str = 'validation',
    limit: int | None = None,
) -> Iterator[inputs.Batch]:
  """One pass over a split in a fixed order with fixed masks.

  The last batch is smaller; `limit` is a number of sentences.
  """
  examples: _Examples = (
      _ClozeExamples(corpus, config, split)
      if config.objective == 'ict'
      else _MaskedExamples(corpus, config, split)
  )
  order = grain.MapDataset.source(examples).seed(0).shuffle()
  if limit is not None:
    order = order[: min(limit, len(order))]
  yield from (
      order.random_map(examples.sample)
      .batch(config.batch_size, drop_remainder=False)
      .map(examples.assemble)
  )


def sentences_of(corpus: corpus_lib.Corpus, config: config_lib.Config) -> str:
  """Which split of the corpus' sentences are masked; `auto` prefers X.

  Those that are paired with their passage, in ICT and in most of the warm-up,
  are of `knowledge` in any case.
  """
  if config.sentences != 'auto':
    return config.sentences
  return 'pretraining' if 'pretraining' in corpus.sentences else 'knowledge'


def _source(
    corpus: corpus_lib.Corpus,
    config: config_lib.Config,
    questions: question_table_lib.QuestionTable | None,
    gold_rows: Sequence[np.ndarray] | None,
    tagged: entities.TaggedTable | None,
) -> tuple[str, Any]:
  """The examples of an objective, and the name of their random stream."""
  if tagged is not None:
    return 'tagged', _TaggedExamples(tagged)
  if questions is not None and gold_rows is not None:
    pairs = question_examples.PairExamples(
        questions, gold_rows, corpus, config
    )
    return 'cloze', pairs
  if questions is not None:
    return 'asked', question_examples.QuestionExamples(questions)
  if config.objective == 'ict':
    return 'cloze', _ClozeExamples(corpus, config, 'knowledge')
  split = sentences_of(corpus, config)
  return 'masked', _MaskedExamples(corpus, config, split)


class _Rows:
  """Some rows of each batch of a stream that is cut into batches."""

  def __init__(
      self, examples: grain.MapDataset, batch_size: int, rows: np.ndarray
  ):
    self._examples, self._batch_size, self._rows = examples, batch_size, rows

  def __len__(self) -> int:
    return len(self._examples) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Example:
    batch, place = divmod(index, len(self._rows))
    return self._examples[batch * self._batch_size + int(self._rows[place])]

  def __repr__(self) -> str:
    return f'rows({len(self._rows)} of {self._batch_size})'


class _Examples:
  """Sentences that an objective can use: a random access source for Grain.

  `sample` makes the random choices of one example, `assemble` the arrays of a
  batch of them, all at once.
  """

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    if split not in corpus.sentences:
      raise ValueError(
          f'The corpus {corpus.directory} has no sentences of the split'
          f' {split!r}; it has {sorted(corpus.sentences)}.'
      )
    self._corpus, self._config, self._split = corpus, config, split
    self._table = corpus.sentences[split]
    self._rows = np.zeros(0, np.int64)

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> int:
    return int(self._rows[index])

  def __repr__(self) -> str:  # Part of what Grain saves.
    return f'sentences({self._split}, {len(self)})'

  def sample(self, row: int, rng: np.random.Generator) -> Example:
    raise NotImplementedError

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    raise NotImplementedError

  def _ends(self) -> np.ndarray:
    """Where each sentence ends in the body of its passage, int64 [n]."""
    passages = np.asarray(self._table.passages)
    table = self._corpus.passages
    body = table.offsets[passages] + table.title_lengths[passages]
    return self._table.starts - body + self._table.lengths

  def _queries(
      self, rows: np.ndarray, masks: tuple[np.ndarray, np.ndarray] | None
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`[CLS] x [SEP]`: ids [B, Q], lengths [B], and what the masks hide."""
    tokenizer = self._corpus.tokenizer
    ids, sizes = inputs.assemble_queries(
        self._table, rows, self._config.lengths.query, tokenizer
    )
    targets = np.zeros((len(rows), 0), np.int32)
    if masks is not None:
      positions, is_mask = masks
      targets = np.take_along_axis(ids, positions, axis=1)
      masked = np.where(is_mask, tokenizer.mask_id, targets)
      np.put_along_axis(ids, positions, masked, axis=1)
      targets = np.where(is_mask, targets, 0)
    return ids, sizes, targets


class _MaskedExamples(_Examples):
  """A sentence with some wordpieces masked: objectives `mlm` and `realm`.

  In `mlm` it sees its own passage, or one at random or the null document.
  """

  def __init__(
      self,
      corpus: corpus_lib.Corpus,
      config: config_lib.Config,
      split: str,
      own_passage: bool = False,
  ):
    super().__init__(corpus, config, split)
    self._own_passage = own_passage
    # A span is used only if every wordpiece of it can be predicted: nothing is
    # masked without being a target.
    spans = np.asarray(self._table.spans)
    fits = (spans[:, 1] - spans[:, 0] <= config.lengths.masks) & (
        spans[:, 1] <= config.lengths.query - 2
    )
    before = np.concatenate([[0], np.cumsum(fits)])
    self._spans = spans[fits]
    self._span_offsets = before[np.asarray(self._table.span_offsets)]
    self._rows = np.flatnonzero(np.diff(self._span_offsets))
    if own_passage:  # Shown as far as the reader's input goes.
      shown = config.lengths.joint - 1 - np.minimum(
          self._table.lengths[self._rows] + 2, config.lengths.query
      )
      self._rows = self._rows[self._ends()[self._rows] <= shown]
    if not len(self._rows):
      raise ValueError(
          f'The corpus {corpus.directory} has no salient span to mask in its'
          f' {len(self._table)} sentences of the split {split!r}: none lies'
          ' within the first lengths.query - 2 ='
          f' {config.lengths.query - 2} wordpieces and has at most'
          f' lengths.masks = {config.lengths.masks}'
          + (', in a sentence that its passage shows.' if own_passage else '.')
      )
    if config.objective == 'realm':
      self._exclude()

  def _exclude(self) -> None:
    """Finds the trivial candidates, and leaves out what has too few others."""
    self._exclusion = exclusion.Exclusion(
        self._corpus, self._split, self._config.trivial
    )
    needed = self._config.num_candidates - 1
    left = self._corpus.num_live - self._exclusion.sizes[self._rows]
    if not (left >= needed).any():
      raise ValueError(
          f'The corpus {self._corpus.directory} leaves none of the'
          f' {len(self._rows)} sentences of the split {self._split!r}'
          f' num_candidates - 1 = {needed} passages that do not hold its text'
          f' (config.trivial={self._config.trivial!r}), but'
          f' {left.max()} at most.'
      )
    self._rows = self._rows[left >= needed]
    self._exclusion.use(self._rows)

  def sample(self, row: int, rng: np.random.Generator) -> Example:
    start, limit = rng.choice(
        self._spans[self._span_offsets[row] : self._span_offsets[row + 1]]
    )
    room = min(int(self._table.lengths[row]), self._config.lengths.query - 2)
    if self._config.masking == 'salient':
      chosen = np.arange(start, limit)
    elif self._config.masking == 'random_span':
      # As long as a salient span of this sentence, but anywhere.
      size = limit - start
      start = rng.integers(0, room - size, endpoint=True)
      chosen = np.arange(start, start + size)
    else:  # random_token: BERT's 15 %.
      count = min(max(round(0.15 * room), 1), self._config.lengths.masks)
      chosen = np.sort(rng.choice(room, count, replace=False))
    positions = np.zeros(self._config.lengths.masks, np.int64)
    positions[: len(chosen)] = chosen + 1  # After [CLS].
    example: Example = {
        'sentence_B': np.int64(row),
        'positions_BM': positions,
        'mask_BM': np.arange(len(positions)) < len(chosen),
    }
    if self._config.objective == 'mlm':
      example['view'] = np.int64(self._view(row, rng))
      example['own'] = np.bool_(self._own_passage)
    return example

  def _view(self, row: int, rng: np.random.Generator) -> int:
    """The passage that a sentence of the warm-up sees."""
    if self._own_passage:
      return int(self._table.passages[row])
    # A passage that is of no use, or none: else the reader would trust any
    # passage, and the null document would beat all that are not gold.
    if rng.random() < self._config.mlm.null_rate:
      return inputs.NULL_DOCUMENT
    return int(rng.integers(len(self._corpus.passages)))

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    rows, positions = batch['sentence_B'], batch['positions_BM']
    query_ids, query_lengths, targets = self._queries(
        rows, (positions, batch['mask_BM'])
    )
    batch['targets_BM'] = targets.astype(np.int32)
    batch['positions_BM'] = positions.astype(np.int32)
    if self._config.objective == 'mlm':
      del batch['own']
      ids, types = inputs.assemble_joint(
          self._corpus.passages,
          batch.pop('view')[:, None],
          query_ids,
          query_lengths,
          self._config.lengths.joint,
          self._corpus.tokenizer,
      )
      batch['joint_ids_BT'], batch['joint_types_BT'] = ids[:, 0], types[:, 0]
    else:
      batch['query_ids_BQ'] = query_ids
      batch['query_lengths_B'] = query_lengths
      batch['exclude_BR2'] = self._exclusion.ranges(rows)
    return batch


class _WarmUpExamples:
  """Two kinds of masked sentences, mixed in every batch: objective `mlm`.

  parts: the kinds by the names of their random streams. `own` sees its own
    passage, `alone` one at random or the null document.
  weights: the share of each.
  """

  def __init__(self, corpus: corpus_lib.Corpus, config: config_lib.Config):
    share = config.mlm.own_passage_rate
    kinds = {
        'own': ('knowledge', share),
        'alone': (sentences_of(corpus, config), 1 - share),
    }
    kinds = {name: kind for name, kind in kinds.items() if kind[1] > 0}
    self.weights = [weight for _, weight in kinds.values()]
    self.parts = {
        name: _MaskedExamples(corpus, config, split, name == 'own')
        for name, (split, _) in kinds.items()
    }

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    rows = [
        np.flatnonzero(batch['own'] == (name == 'own')) for name in self.parts
    ]
    parts = [
        examples.assemble({name: x[part] for name, x in batch.items()})
        for examples, part in zip(self.parts.values(), rows, strict=True)
    ]
    order = np.argsort(np.concatenate(rows))
    return {
        name: np.concatenate([part[name] for part in parts])[order]
        for name in parts[0]
    }


class _ClozeExamples(_Examples):
  """A sentence and its passage, mostly without it: objective `ict`."""

  def __init__(
      self, corpus: corpus_lib.Corpus, config: config_lib.Config, split: str
  ):
    super().__init__(corpus, config, split)
    # Something of the passage has to remain: other sentences, or a title. And
    # the sentence must lie in what is read of the passage, title first.
    table, passages = corpus.passages, np.asarray(self._table.passages)
    whole = table.offsets[passages + 1] - table.offsets[passages]
    room = config.lengths.document - 3 - table.title_lengths[passages]
    self._rows = np.flatnonzero(
        (self._table.lengths < whole) & (self._ends() <= room)
    )
    if not len(self._rows):
      raise ValueError(
          f'The corpus {corpus.directory} has no passage with a title or a'
          ' second sentence, which ICT needs: it finds a passage from a'
          ' sentence cut out of it. The sentence must lie within the first'
          f' lengths.document = {config.lengths.document} wordpieces.'
      )

  def sample(self, row: int, rng: np.random.Generator) -> Example:
    removed = rng.random() < self._config.ict.remove_rate
    return {'sentence_B': np.int64(row), 'removed': np.bool_(removed)}

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    rows, table = batch['sentence_B'], self._corpus.passages
    passages = np.asarray(self._table.passages[rows])
    batch['query_ids_BQ'], _, _ = self._queries(rows, None)
    batch['passage_B'] = passages.astype(np.int32)
    body = table.offsets[passages] + table.title_lengths[passages]
    start = self._table.starts[rows] - body
    size = np.where(batch.pop('removed'), self._table.lengths[rows], 0)
    batch['doc_ids_BS'], batch['doc_types_BS'] = inputs.assemble_documents(
        table,
        passages,
        self._config.lengths.document,
        self._corpus.tokenizer,
        cut=(start, start + size),
    )
    return batch


class _TaggedExamples:
  """Sentences with the labels of their words: objective `tagger`."""

  def __init__(self, tagged: entities.TaggedTable):
    self._tagged = tagged

  def __len__(self) -> int:
    return len(self._tagged)

  def __getitem__(self, index: int) -> int:
    return index

  def __repr__(self) -> str:
    return f'tagged({len(self)})'

  def sample(self, row: int, rng: np.random.Generator) -> Example:
    del rng
    return {'sentence_B': np.int64(row)}

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    rows = batch['sentence_B']
    batch['ids_BL'] = self._tagged.ids_NL[rows]
    batch['types_BL'] = self._tagged.types_NL[rows]
    batch['labels_BL'] = self._tagged.labels_NL[rows]
    return batch
