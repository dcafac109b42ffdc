"""`evaluate --beir`: a retriever, BM25 and their hybrid on a folder of BEIR.

The figures are those of trec_eval, through ir-measures. A document that
`prepare` divided into passages counts with its best passage.
"""

from collections.abc import Mapping
import dataclasses
import importlib
import logging
import pathlib
from typing import Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics
from realm_jax.evaluation import runs
from realm_jax.index import bm25
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources
from realm_jax.qa import qrels as qrels_lib
from realm_jax.qa import question_sets
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import extension

log = logging.getLogger(__name__)

# Name of each figure, and the measure of ir-measures.
FIGURES = {'ndcg_at_10': 'nDCG@10', 'recall_at_100': 'R@100', 'map': 'AP'}
_DEPTH = 1000  # Documents in a run, as BEIR evaluates.
_RECALL = 100  # Documents that every run has, if the corpus does.
_COMPARED = 64  # Documents whose text is compared with the corpus.

Ranking = tuple[np.ndarray, np.ndarray]  # Rows or documents, and scores; [B,K].


def is_folder(path: pathlib.Path | str) -> bool:
  """Returns whether a folder has the corpus and the queries of BEIR."""
  names = ('corpus', 'queries')
  return all(any(pathlib.Path(path).glob(f'{name}.*')) for name in names)


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder of BEIR, and the passages of its documents in a corpus.

  questions: the queries with a relevant document.
  judged: grades by document of each query that is measured; those without a
    relevant document count as 0, as in trec_eval.
  qrels: name of their file.
  documents: ids of those with text.
  document_N: int64 [N]: number of the document of each passage row; -1: none.
  without_passage: number of documents that are not in the corpus, as they have
    no text.
  """

  questions: list[questions_lib.Question]
  judged: qrels_lib.Qrels
  qrels: str
  documents: list[str]
  document_N: np.ndarray
  without_passage: int

  @classmethod
  def open(
      cls,
      path: pathlib.Path | str,
      corpus: corpus_lib.Corpus,
      max_wordpieces: int,
      qrels: pathlib.Path | str | None = None,
      limit: int | None = None,
      format: str = 'auto',
      fields: str | None = None,
  ) -> 'Folder':
    """Reads a folder and finds its documents in the corpus.

    Args:
      path: has corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv.
      corpus: prepared from its corpus.jsonl.
      max_wordpieces: of a passage; for the command in an error.
      qrels: another file of judgements; None: see `qrels.beir`.
      limit: maximum number of queries.
      format, fields: of the queries, see `question_sets.read`.

    Raises:
      ImportError: a package is missing; names the command to install it.
      ValueError: the corpus is not that of the folder, with the command that
        prepares it; or a file of the folder is wrong.
    """
    with extension.needed_by('--beir', 'beir'):
      for package in ('bm25s', 'ir_measures'):
        importlib.import_module(package)
    path = pathlib.Path(path)
    queries, found = qrels_lib.beir(path, qrels is None)
    found = found if qrels is None else pathlib.Path(qrels)
    if found is None:
      raise ValueError(
          f'{path} has no qrels/SPLIT.tsv, which says which documents are'
          ' relevant; name the file: --qrels=FILE.'
      )
    every = question_sets.read(queries, format, fields=fields)
    runs.query_names(every)  # Two queries of one id are refused.
    judged = qrels_lib.read(found)
    questions, about = qrels_lib.join(every, judged, str(path))
    log.info('%s%s', path, about)
    questions = questions[:limit]
    asked = every if limit is None else questions
    measured = {question.id for question in asked}
    return cls(
        questions,
        {name: grades for name, grades in judged.items() if name in measured},
        found.name,
        *_documents(path, corpus, max_wordpieces),
    )

  @property
  def depth(self) -> int:
    """Number of passages that hold the first 100 documents in any case."""
    parts = np.bincount(self.document_N[self.document_N >= 0])
    most = (_RECALL + 1) * int(parts.max())  # One may be the query itself.
    return min(int(parts.sum()), max(_DEPTH, most))

  def measure(
      self,
      rankings: Mapping[str, Ranking],
      cluster_B: np.ndarray,
      prefix: pathlib.Path,
  ) -> dict[str, Any]:
    """Returns the figures of all runs, and writes the runs.

    Args:
      rankings: passages of `retriever` and `bm25` for the questions, at least
        `depth` of them, or all that were found.
      cluster_B: of the questions, see `metrics.interval`.
      prefix: PREFIX.NAME.run are the files, in TREC's format.

    Returns:
      Plain JSON: `figures` by run, with 95 % intervals; `paired` tests; `runs`,
      the names of the files; and what they depend on.
    """
    import ir_measures

    wanted = {
        ir_measures.parse_measure(name): figure
        for figure, name in FIGURES.items()
    }
    evaluator = ir_measures.evaluator([*wanted], self.judged)
    asked = [question.id or '' for question in self.questions]
    cluster_of = dict(zip(asked, cluster_B.tolist(), strict=True))
    # A query without a relevant document is a cluster of its own.
    cluster_B = metrics.clusters(cluster_of.get(name) for name in self.judged)
    found = {
        name: self._ranked_documents(asked, rankings[name])
        for name in ('retriever', 'bm25')
    }
    both = [documents_BK for documents_BK, _ in found.values()]
    found['hybrid'] = bm25.fuse(*both, k=both[0].shape[1])
    values: dict[str, dict[str, np.ndarray]] = {}
    files = {}
    for name, ranking in found.items():
      run = self._run(asked, ranking)
      by_query = {
          (metric.query_id, wanted[metric.measure]): metric.value
          for metric in evaluator.iter_calc(run)
      }
      values[name] = {
          figure: np.array([by_query[query, figure] for query in self.judged])
          for figure in FIGURES
      }
      file = prefix.with_name(f'{prefix.name}.{name}.run')
      runs.write_ranking(file, run, f'realm_jax-{name}', '.9g')
      files[name] = file.name
    return {
        'qrels': self.qrels,
        'queries': len(self.judged),
        'without_relevant': sum(
            not any(grade > 0 for grade in grades.values())
            for grades in self.judged.values()
        ),
        'documents': len(self.documents),
        'without_passage': self.without_passage,
        'figures': {
            name: metrics.means(of_run, cluster_B, [*FIGURES])
            for name, of_run in values.items()
        },
        'paired': {
            f'{ours}_{theirs}': {
                figure: runs.paired(
                    values[ours][figure], values[theirs][figure], cluster_B
                )
                for figure in FIGURES
            }
            for ours, theirs in runs.PAIRS
        },
        'runs': files,
    }

  def _ranked_documents(self, asked: list[str], ranking: Ranking) -> Ranking:
    """Returns documents in the place of passages, each once; -1 pads.

    As in BEIR, a document with the id of the query is left out: in some sets
    the queries are documents.
    """
    rows_BK, score_BK = ranking
    number_of = {name: number for number, name in enumerate(self.documents)}
    document_BK = np.where(rows_BK < 0, -1, self.document_N[rows_BK])
    found_BK = np.full(rows_BK.shape, -1, np.int64)
    best_BK = np.zeros(rows_BK.shape)
    for i, name in enumerate(asked):
      # Passages come best first, so the first of a document is its best.
      document_K = document_BK[i]
      _, first = np.unique(document_K, return_index=True)
      first.sort()
      own = number_of.get(name, -1)
      first = first[(document_K[first] >= 0) & (document_K[first] != own)]
      found_BK[i, : len(first)] = document_K[first]
      best_BK[i, : len(first)] = score_BK[i, first]
    return found_BK, best_BK

  def _run(
      self, asked: list[str], ranking: Ranking
  ) -> dict[str, dict[str, float]]:
    rows = zip(asked, *(array_BK.tolist() for array_BK in ranking), strict=True)
    return {
        name: {
            self.documents[document]: score
            for document, score in zip(documents, scores, strict=True)
            if document >= 0
        }
        for name, documents, scores in rows
        if name in self.judged
    }


def _documents(
    path: pathlib.Path, corpus: corpus_lib.Corpus, max_wordpieces: int
) -> tuple[list[str], np.ndarray, int]:
  """Returns the last three fields of `Folder`; raises as `Folder.open`."""
  (file,) = sorted(path.glob('corpus.*'))[:1]
  command = (
      f' Prepare it: `realm-jax prepare --source={file}'
      f' --vocab={corpus.directory} --max_wordpieces={max_wordpieces}'
      ' --spans=none --output=CORPUS`, and give --corpus=CORPUS.'
  )
  records = records_lib.Records(sources.find([str(file)], None, None))
  names: list[str] = []
  texts: list[str] = []
  for record in records.check():
    names.append(record.id)
    if len(texts) < _COMPARED:
      texts.append(record.text)
  rows = corpus.record_rows(names)
  lacking = [n for n, found in zip(names, rows, strict=True) if not len(found)]
  # `prepare` passes over records without text, and without any wordpiece.
  dropped = corpus.manifest['counts'].get('records_without_wordpieces', 0)
  if len(lacking) > dropped:
    raise ValueError(
        f'The corpus {corpus.directory} lacks {len(lacking)} of the'
        f' {len(names)} documents of {file}, such as {lacking[0]!r}.{command}'
    )
  document_N = np.full(len(corpus.passages), -1, np.int64)
  for number, found in enumerate(rows):
    document_N[found] = number
  others = np.setdiff1d(np.flatnonzero(document_N < 0), corpus.removed)
  if len(others):
    name = corpus.passage_text(int(others[0]))['id']
    raise ValueError(
        f'The corpus {corpus.directory} has {len(others)} passages that are of'
        f' no document of {file}, such as {name!r}.{command}'
    )
  for name, text, found in zip(names, texts, rows, strict=False):
    if len(found) and corpus.passage_text(int(found[0]))['text'] not in text:
      raise ValueError(
          f'The passage {name!r} of {corpus.directory} has another text than'
          f' the document of {file}.{command}'
      )
  return names, document_N, records.empty + len(lacking)
