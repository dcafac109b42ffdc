"""Questions in the place of sentences, as random access sources for Grain.

Public: `QuestionExamples` (objective `open_qa`) and `PairExamples` (`ict` with
`ict.questions`). `sample` makes the random choices of one example, `assemble`
the arrays of a batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.qa import question_table as question_table_lib


class QuestionExamples:
  """Questions in the place of sentences: objective `open_qa`."""

  def __init__(self, questions: question_table_lib.QuestionTable):
    self._questions = questions

  def __len__(self) -> int:
    return len(self._questions)

  def __getitem__(self, index: int) -> int:
    return index

  def __repr__(self) -> str:
    return f'questions({len(self)})'

  def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
    del rng
    return {'question_B': np.int64(row)}

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    rows = batch['question_B']
    batch['query_ids_BQ'] = self._questions.query_ids_NQ[rows]
    batch['query_lengths_B'] = self._questions.query_lengths_N[rows]
    return batch


class PairExamples(QuestionExamples):
  """Questions with a passage that answers them: `ict` without sentences."""

  def __init__(
      self,
      questions: question_table_lib.QuestionTable,
      gold_rows: Sequence[np.ndarray],
      corpus: corpus_lib.Corpus,
      config: config_lib.Config,
  ):
    super().__init__(questions)
    self._gold_rows = gold_rows
    self._rows = np.flatnonzero([len(rows) > 0 for rows in gold_rows])
    if not len(self._rows):
      raise ValueError(
          f'None of the {len(questions)} questions of config.ict.questions has'
          f' a passage_id that is in the corpus {corpus.directory}.'
      )
    self._corpus, self._length = corpus, config.lengths.document

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> int:
    return int(self._rows[index])

  def sample(self, row: int, rng: np.random.Generator) -> dict[str, Any]:
    passage = rng.choice(self._gold_rows[row])
    return {**super().sample(row, rng), 'passage': np.int64(passage)}

  def assemble(self, batch: inputs.Batch) -> inputs.Batch:
    batch = super().assemble(batch)
    passages = batch.pop('passage')
    batch['passage_B'] = passages.astype(np.int32)
    batch['doc_ids_BS'], batch['doc_types_BS'] = inputs.assemble_documents(
        self._corpus.passages,
        passages,
        self._length,
        self._corpus.tokenizer,
    )
    return batch
