"""How retriever and reader fill in masked sentences.

`realm-jax inspect` shows one sentence; `evaluate` measures those of the split
`validation`.
"""

from collections.abc import Sequence
import dataclasses
import io
import math
import pathlib
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
import rich.text

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.evaluation import metrics as metrics_lib
from realm_jax.index import search as search_lib
from realm_jax.inference import answering
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

  Each `[MASK]` of the text stands for one wordpiece; k candidates count the
  null document (None: as in training). `corpus` is where the corpus is now.

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
            text, positions[b], retrieved_BJ[b].tolist(),
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
    lengths_B = [len(pieces) + 2 for pieces, _ in sentences]
    queries = realm.Queries(
        query_ids_BQ=ids_BQ,
        query_lengths_B=np.array(lengths_B, np.int32),
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
      document = Document(
          row=row,
          **record,
          probability=math.exp(float(read['logp_BK'][i])),
          score=float(read['score_BK'][i]),
          prediction=prediction(read['best_BKM'][i], read['best_logp_BKM'][i]),
      )
      documents.append(document)
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


def as_json(found: Inspection) -> dict[str, Any]:
  """Returns the fillings with all passages, each, and none, for JSON."""
  marginal = dataclasses.asdict(found.marginal)
  return {
      'sentence': found.text,
      **marginal,
      'passages': [
          answering.ranked(rank, document)
          for rank, document in enumerate(found.documents, 1)
      ],
      'without_passages': {
          **dataclasses.asdict(found.null.prediction),
          'null_probability': found.null.probability,
      },
      'marginal': marginal,
  }


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


def measure(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    search: search_lib.Search | None,
    max_sentences: int,
    read: int | None = None,
) -> dict[str, Any]:
  """Measures the filling of masked `validation` sentences.

  Each is read with the null document and `read` passages; None: as in training.
  Without a search, as after reader warm-up, the null document is the only
  candidate. Trivial candidates are excluded even if training allowed them, so
  that the rows of an ablation are comparable.
  """
  trivial = trained.config.trivial
  size = 1
  if search is not None:
    size = trained.config.num_candidates if read is None else 1 + read
  config = dataclasses.replace(
      trained.config,
      objective='realm',
      masking='salient',
      trivial='passage' if trivial == 'none' else trivial,
      batch_size=trained.reading_batch_size(size, trained.config.lengths.masks),
  )
  totals: dict[str, list[np.ndarray]] = {}
  rng = np.random.default_rng(0)
  rows = []
  for batch in realm.evaluation_batches(
      trained.corpus, config, 'validation', max_sentences
  ):
    rows.append(batch.row_B)
    for name, values in _read_batch(
        trained, params, search, size, config.batch_size, batch.inputs, rng
    ).items():
      totals.setdefault(name, []).append(values)
  cluster_B = sentence_clusters(trained.corpus, np.concatenate(rows))
  metrics: dict[str, Any] = {
      'sentences': len(cluster_B),
      'clusters': len(np.unique(cluster_B)),
      'num_candidates': size,
  }
  if search is not None:
    metrics |= {'trivial': config.trivial, 'trivial_in_training': trivial}
  figures = {name: np.concatenate(parts) for name, parts in totals.items()}
  accuracies = [name for name in figures if name.startswith('accuracy')]
  return metrics | metrics_lib.means(figures, cluster_B, accuracies)


def sentence_clusters(
    corpus: corpus_lib.Corpus, sentence_B: np.ndarray
) -> np.ndarray:
  """Returns the article of each `validation` sentence, its cluster: int64 [B].

  A sentence from no passage has a negative number of its own.
  """
  passage_B = corpus.sentences['validation'].passages[sentence_B]
  article_B = corpus.passages.articles[np.maximum(passage_B, 0)]
  return np.where(passage_B >= 0, article_B, -1 - sentence_B)


def _read_batch(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    search: search_lib.Search | None,
    num_candidates: int,
    batch_size: int,
    queries: realm.Queries,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
  """Returns each metric for each sentence of the batch."""
  count = len(queries.mask_BM)
  queries = jax.tree.map(lambda x: trained_lib.pad_rows(x, batch_size), queries)
  retrieved_BJ = np.zeros((batch_size, 0), np.int64)
  if search is not None:
    retrieved_BJ = search.search(
        trained.embed_queries(params, queries.query_ids_BQ),
        num_candidates - 1,
        queries.exclude_BR2,
    )
  mask_BM, targets_BM = queries.mask_BM, queries.targets_BM

  def read_with(rows_BJ: np.ndarray) -> dict[str, np.ndarray]:
    batch = realm.with_candidates(
        queries, rows_BJ, trained.corpus, trained.template
    )
    return trained.read(params, batch)

  def right(best_BM: np.ndarray) -> np.ndarray:
    return ((best_BM == targets_BM) | ~mask_BM).all(axis=1).astype(float)

  read = read_with(retrieved_BJ)
  metrics = {'accuracy_without_retrieval': right(read['best_BKM'][:, 0])}
  if search is not None:
    p_BK = np.exp(read['logp_BK'])
    logp_BK = np.where(mask_BM[:, None], read['target_logp_BKM'], 0).sum(-1)
    utility_BJ = logp_BK[:, 1:] - logp_BK[:, :1]
    real_B = np.maximum(p_BK[:, 1:].sum(1), 1e-9)
    # Separates the effect of retrieval from that of any passage, or its length.
    live, exclude_BR2 = trained.corpus.live_rows, queries.exclude_BR2
    random = read_with(_random_rows(live, exclude_BR2, num_candidates - 1, rng))
    metrics |= {
        'accuracy_with_retrieval': right(read['marginal_best_BM']),
        'accuracy_with_random_passages': right(random['marginal_best_BM']),
        'retrieval_utility': (p_BK[:, 1:] * utility_BJ).sum(1) / real_B,
        'null_share': p_BK[:, 0],
    }
  return {name: values[:count] for name, values in metrics.items()}


def _random_rows(
    live: np.ndarray,
    exclude_BR2: np.ndarray,
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
  """Draws `count` live rows outside the excluded ranges, int64 BJ."""
  rows_BJ = rng.choice(live, (len(exclude_BR2), count))
  while True:
    inside_BJR = (rows_BJ[..., None] >= exclude_BR2[:, None, :, 0]) & (
        rows_BJ[..., None] < exclude_BR2[:, None, :, 1]
    )
    inside_BJ = inside_BJR.any(axis=-1)
    if not inside_BJ.any():
      return rows_BJ
    rows_BJ[inside_BJ] = rng.choice(live, inside_BJ.sum())
