"""`realm-jax inspect`: retrieval and predictions for one masked sentence."""

from collections.abc import Sequence
import dataclasses
import io
import math
import pathlib

import numpy as np
import rich.console
import rich.table
import rich.text

from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.inference import trained as trained_lib
from realm_jax.runtime import checkpoint
from realm_jax.trainer.stages import realm

MASK = '[MASK]'


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The most probable wordpieces for the masks."""

  fillings: tuple[str, ...]  # A text for each run of masks.
  probability: float  # Product over the masked wordpieces.


@dataclasses.dataclass(frozen=True)
class Document:
  """A retrieved passage, or the null document (row -1, without texts)."""

  row: int
  id: str
  title: str
  text: str
  probability: float  # p(z|x), among the candidates.
  score: float  # Inner product.
  prediction: Prediction  # With this document alone.


@dataclasses.dataclass(frozen=True)
class Inspection:
  """Candidates and predictions for one sentence."""

  text: str
  workdir: str
  step: int  # Step of the checkpoint.
  index_step: int | None  # Step of the snapshot of the index.
  documents: tuple[Document, ...]  # Best first, without the null document.
  null: Document
  marginal: Prediction  # sum_z p(y_j|z,x) p(z|x)


def inspect(
    workdir: pathlib.Path | str,
    text: str,
    k: int | None = None,
    corpus: pathlib.Path | str | None = None,
) -> Inspection:
  """Fills the masks of a sentence with the newest checkpoint and index.

  Args:
    workdir: of a job with the objective `realm`.
    text: a sentence; each `[MASK]` stands for one wordpiece.
    k: candidates, counting the null document; None: as in training.
    corpus: where the corpus is now; None: where it was in training.

  Raises:
    FileNotFoundError: there is no such workdir, or no index yet.
    ValueError: there is no `[MASK]` or no reader, the sentence is too long, or
      k does not fit the corpus.
  """
  trained = trained_lib.Trained.open(workdir, corpus)
  missing = {'embedder', 'reader'} - set(trained.components)
  if missing:
    raise ValueError(
        f'{workdir} has no {" and no ".join(sorted(missing))}: its objective is'
        f' {trained.config.objective!r}. Inspect a workdir of `realm`.'
    )
  step = checkpoint.newest_step(trained.workdir)
  params = trained.load(step)
  index = trained.newest_index()
  cuts.warn_of_passages(trained.corpus, trained.config)
  (found,) = Inspector(trained, step, params, index)([text], k)
  return found


@dataclasses.dataclass(frozen=True)
class Inspector:
  """Fills the masks of sentences with the parameters of one step.

  trained: with an embedder and a reader.
  step, params: of a checkpoint.
  index: of a generation, which may be older.
  """

  trained: trained_lib.Trained
  step: int
  params: trained_lib.Params
  index: trained_lib.Index

  def query(self, text: str) -> tuple[list[int], np.ndarray]:
    """Returns the wordpieces of a sentence and the positions of its masks.

    The positions count [CLS].

    Raises:
      ValueError: there is no `[MASK]`, or the sentence is too long.
    """
    if MASK not in text:
      raise ValueError(
          f'{text!r} has no {MASK}: put one in place of each missing wordpiece.'
      )
    tokenizer = self.trained.corpus.tokenizer
    length = self.trained.template.text_length
    pieces = tokenizer.encode(text, masks=True)
    if len(pieces) + 2 > length:
      raise ValueError(
          f'The sentence has {len(pieces)} wordpieces; with [CLS] and [SEP] at'
          f' most {length} fit (config.lengths.query).'
      )
    return pieces, np.flatnonzero(np.array(pieces) == tokenizer.mask_id) + 1

  def __call__(
      self, texts: Sequence[str], k: int | None = None
  ) -> list[Inspection]:
    """Inspects a batch of sentences; `k` as of `inspect`.

    Raises:
      ValueError: k does not fit the corpus; see also `query`.
    """
    trained = self.trained
    size = trained.config.num_candidates if k is None else k
    if size < 2:
      raise ValueError(
          f'k={size}: must be at least 2; the null document counts.'
      )
    query, positions = self._queries(texts)
    retrieved_BJ = self.index.search.search(
        trained.embed_queries(self.params, query.query_ids_BQ), size - 1
    )
    read = trained.read(
        self.params,
        realm.with_candidates(
            query, retrieved_BJ, trained.corpus, trained.template
        ),
    )
    return [
        self._inspection(
            text,
            positions[b],
            retrieved_BJ[b].tolist(),
            {name: array[b] for name, array in read.items()},
        )
        for b, text in enumerate(texts)
    ]

  def _queries(
      self, texts: Sequence[str]
  ) -> tuple[realm.Queries, list[np.ndarray]]:
    """Returns the sentences as a batch, and the positions of their masks."""
    tokenizer = self.trained.corpus.tokenizer
    lengths = self.trained.config.lengths
    length = self.trained.template.text_length
    sentences = [self.query(text) for text in texts]
    positions = [found for _, found in sentences]
    # A multiple of the masks of training limits the number of compiled shapes.
    most = max(map(len, positions))
    width = -(-most // lengths.masks) * lengths.masks
    size = len(texts)
    ids_BQ = np.full((size, length), tokenizer.pad_id, np.int32)
    positions_BM = np.zeros((size, width), np.int32)
    for b, (pieces, found) in enumerate(sentences):
      ids_BQ[b, : len(pieces) + 2] = inputs.query(pieces, length, tokenizer)
      positions_BM[b, : len(found)] = found
    counts_B1 = np.array([[len(found)] for found in positions])
    queries = realm.Queries(
        query_ids_BQ=ids_BQ,
        query_lengths_B=np.array(
            [len(pieces) + 2 for pieces, _ in sentences], np.int32
        ),
        positions_BM=positions_BM,
        targets_BM=np.zeros((size, width), np.int32),
        mask_BM=np.arange(width) < counts_B1,
        exclude_BR2=np.zeros((size, 1, 2), np.int64),
    )
    return queries, positions

  def _inspection(
      self,
      text: str,
      positions: np.ndarray,
      rows: list[int],
      read: dict[str, np.ndarray],
  ) -> Inspection:
    """`read`: a row of each array of `trained.read`."""
    corpus, masks = self.trained.corpus, len(positions)
    runs = _runs(positions)

    def prediction(best_M: np.ndarray, logp_M: np.ndarray) -> Prediction:
      return Prediction(
          tuple(corpus.tokenizer.decode(best_M[run].tolist()) for run in runs),
          math.exp(float(logp_M[:masks].sum())),
      )

    documents = []
    for i, row in enumerate([inputs.NULL_DOCUMENT, *rows]):
      record = {'id': '', 'title': '', 'text': ''}
      if row != inputs.NULL_DOCUMENT:
        record = corpus.passage_text(row)
      documents.append(
          Document(
              row=row,
              **record,
              probability=math.exp(float(read['logp_BK'][i])),
              score=float(read['score_BK'][i]),
              prediction=prediction(
                  read['best_BKM'][i], read['best_logp_BKM'][i]
              ),
          )
      )
    null, *rest = documents
    return Inspection(
        text=text,
        workdir=str(self.trained.workdir),
        step=self.step,
        index_step=self.index.generation,
        # The index may be older than the parameters, and its order differ.
        documents=tuple(sorted(rest, key=lambda d: -d.score)),
        null=null,
        marginal=prediction(read['marginal_best_BM'], read['marginal_logp_BM']),
    )


def as_text(found: Inspection) -> str:
  """Returns an inspection as a table of 100 columns."""
  table = rich.table.Table(show_lines=True, expand=True)
  table.add_column('p(z|x)', justify='right', no_wrap=True)
  table.add_column('passage', ratio=1)
  table.add_column('prediction', overflow='fold')
  table.add_column('p(y|z,x)', justify='right', no_wrap=True)
  for line in lines(found):
    # Text prevents that a passage is read as markup.
    table.add_row(*map(rich.text.Text, [*line.values()][:4]))
  console = rich.console.Console(
      width=100, file=io.StringIO(), record=True, color_system=None
  )
  console.print(rich.text.Text(found.text))
  console.print(rich.text.Text(about(found)))
  console.print(table)
  return console.export_text()


def lines(found: Inspection) -> list[dict[str, str]]:
  """Returns the cells of each line of the text or HTML table."""
  null = dataclasses.replace(found.null, title='No passage (the null document)')
  lines = [
      {
          'probability': f'{document.probability:.3f}',
          'passage': '\n'.join(filter(None, (document.title, document.text))),
          'prediction': ' | '.join(document.prediction.fillings),
          'likelihood': f'{document.prediction.probability:.3f}',
          'id': document.id,
      }
      for document in (*found.documents, null)
  ]
  marginal = {
      'probability': '',
      'passage': 'Marginalised over all of the above',
      'prediction': ' | '.join(found.marginal.fillings),
      'likelihood': f'{found.marginal.probability:.3f}',
      'id': '',
  }
  return [*lines, marginal]


def about(found: Inspection) -> str:
  """Returns the files that an inspection used."""
  return (
      f'{found.workdir}: checkpoint of step {found.step}, index of step'
      f' {found.index_step}'
  )


def _runs(positions_M: np.ndarray) -> list[np.ndarray]:
  """Returns the indices of adjacent masks, for each run of masks."""
  breaks = np.flatnonzero(np.diff(positions_M) > 1) + 1
  return np.split(np.arange(len(positions_M)), breaks)
