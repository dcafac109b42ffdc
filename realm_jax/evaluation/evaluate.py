"""`realm-jax evaluate`: measures retriever and reader of a workdir.

Questions measure the retriever alone ("zero-shot retrieval recall", Guu et al.
2020, table 2). Masked sentences of the split `validation`, which is not trained
on, measure retriever and reader together.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import jax
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.evaluation import metrics as metrics_lib
from realm_jax.evaluation import report
from realm_jax.evaluation import runs
from realm_jax.index import search as search_lib
from realm_jax.inference import answering
from realm_jax.inference import trained as trained_lib
from realm_jax.qa import passage_answers
from realm_jax.qa import question_sets
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib
from realm_jax.trainer.stages import realm

log = logging.getLogger(__name__)

_MAX_SENTENCES = 2000  # Masked sentences, without a limit of the user.
_SEARCH_BATCH = 1024  # Questions in one search.
_QUESTIONS = 'questions.jsonl'  # In the folder of a generated corpus.


def evaluate(
    workdir: pathlib.Path | str,
    questions: pathlib.Path
    | str
    | Sequence[questions_lib.Question]
    | None = None,
    steps: str | int = 'latest',
    *,
    corpus: pathlib.Path | str | None = None,
    limit: int | None = None,
    read: int | None = None,
    run_file: pathlib.Path | str | None = None,
    beir: pathlib.Path | str | None = None,
) -> list[report.Result]:
  """Measures a workdir and writes evaluation/<step>.json for each step.

  Questions: recall@{1,5,20,50,100} and MRR by gold passage and by answer
  string, for all questions and, if they are marked, separately for `held_out`
  and `seen` facts.

  Masked `validation` sentences, for a workdir with a reader: the share of
  sentences with every masked wordpiece right, with retrieval (marginal over the
  candidates) and without (the same reader with the null document alone), and
  the metrics of training (`objectives.retrieval_metrics`). Trivial candidates
  are excluded as in training, but at least the sentence's own passage. The
  search is exact: the backend does not influence the figures.

  Args:
    workdir: of `train`.
    questions: a file of questions, or a sequence; None: the questions in the
      folder of the corpus, if any. Empty: only masked sentences are measured.
    steps: 'latest' checkpoint; 'all' checkpoints and retriever snapshots (which
      have no reader); or numbers of steps, separated by commas.
    corpus: where the training corpus is now, or another one with the same
      tokenizer, which is searched instead of the workdir's documents.
    limit: maximum number of questions and of masked sentences; None: all
      questions, and 2,000 sentences.
    read: passages to read for a question; None: as many as in training.
    run_file: TREC run file to write, of the last step.
    beir: BEIR folder to write, with corpus and questions.

  Returns:
    The results, plain JSON, by step.

  Raises:
    FileNotFoundError: there is no such workdir, step or corpus.
    ValueError: nothing can be measured, or the corpus does not fit.
  """
  trained = trained_lib.Trained.open(workdir, corpus, another=True)
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit}: must be at least 1.')
  if read is not None and not 1 <= read <= _depth(trained):
    raise ValueError(
        f'read={read}: must be between 1 and {_depth(trained)}, the passages'
        ' that are retrieved.'
    )
  if 'embedder' not in trained.components and questions:
    raise ValueError(
        f'{workdir} has no retriever for the questions: its components are'
        f' {sorted(trained.components)}.'
    )
  questions = _questions(trained.corpus, questions)[:limit]
  max_sentences = _MAX_SENTENCES if limit is None else limit
  can_ask = bool(questions) and 'embedder' in trained.components
  can_mask = (
      'reader' in trained.components
      and 'validation' in trained.corpus.sentences
  )
  if not (can_ask or can_mask):
    raise ValueError(
        f'Nothing can be measured in {workdir}: its components are'
        f' {sorted(trained.components)}, {len(questions)} questions were given,'
        f' and the splits of {trained.corpus.directory} are'
        f' {sorted(trained.corpus.sentences)}. A retriever needs questions, a'
        ' reader the split `validation`.'
    )
  inputs.warn_of_cut_passages(trained.corpus, trained.config.lengths.document)
  wanted = _steps(trained, steps, snapshots_too=can_ask)
  asked = _Asked.of(trained, questions) if can_ask else None
  if (run_file or beir) and asked is None:
    raise ValueError('There are no questions to write a run of.')
  if beir is not None and asked is not None:
    runs.write_beir(beir, questions, asked.gold_rows, trained.corpus)
  results = []
  for step in wanted:
    result, run = _evaluate_step(
        trained, step, asked, max_sentences if can_mask else 0, read
    )
    if run is not None:
      folder = pathlib.Path(workdir) / report.FOLDER
      runs.write_questions(
          folder / f'{step}{report.QUESTIONS}', run, trained.corpus
      )
      if run_file is not None:
        runs.write_trec(run_file, run, trained.corpus)
    report.save(workdir, result)
    log.info('Evaluated %s, step %d.', workdir, step)
    results.append(result)
  return results


def _questions(
    corpus: corpus_lib.Corpus,
    questions: pathlib.Path | str | Sequence[questions_lib.Question] | None,
) -> Sequence[questions_lib.Question]:
  if questions is None:
    path = corpus.directory / _QUESTIONS
    return questions_lib.read_questions(path) if path.is_file() else []
  if isinstance(questions, (str, pathlib.Path)):
    return question_sets.read(questions)
  return questions


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The questions in the form that all steps use.

  gold_rows: of each question; empty if the gold passage is unknown.
  cluster_B: see `metrics.interval`.
  text_of: returns the body of a passage row, cached.
  """

  table: question_table_lib.QuestionTable
  gold_rows: list[list[int]]
  cluster_B: np.ndarray
  text_of: Callable[[int], str]

  @classmethod
  def of(
      cls,
      trained: trained_lib.Trained,
      questions: Sequence[questions_lib.Question],
  ) -> '_Asked':
    table = question_table_lib.QuestionTable.of(
        list(questions), trained.config.lengths.query, trained.corpus.tokenizer
    )
    gold_rows = [
        rows.tolist()
        for rows in passage_answers.gold_rows(trained.corpus, questions)
    ]
    # Questions can share the id of a gold passage that the corpus lacks.
    cluster_B = metrics_lib.clusters(
        int(trained.corpus.passages.articles[rows[0]])
        if rows
        else question.passage_id
        for question, rows in zip(questions, gold_rows, strict=True)
    )
    text_of = functools.cache(
        lambda row: trained.corpus.passage_text(row)['text']
    )
    return cls(table, gold_rows, cluster_B, text_of)


def _steps(
    trained: trained_lib.Trained, steps: str | int, snapshots_too: bool
) -> list[int]:
  checkpoints, snapshots = trained_lib.steps_available(trained.workdir)
  if not snapshots_too:
    snapshots = []
  if steps == 'latest':
    return checkpoints[-1:]
  if steps == 'all':
    return sorted({*checkpoints, *snapshots})
  words = str(steps).split(',')
  if not all(word.isdigit() for word in words):
    raise ValueError(
        f"steps={steps!r}: must be 'latest', 'all', or numbers of steps,"
        ' separated by commas.'
    )
  wanted = sorted({int(word) for word in words})
  trained_lib.check_steps(trained.workdir, wanted, snapshots_too)
  return wanted


def _evaluate_step(
    trained: trained_lib.Trained,
    step: int,
    asked: _Asked | None,
    max_sentences: int,
    read: int | None,
) -> tuple[report.Result, runs.Run | None]:
  start = time.perf_counter()
  params = trained.load(step)
  result: report.Result = {
      'step': step,
      'objective': trained.config.objective,
      'passages': trained.corpus.num_live,
      'corpus_fingerprint': trained.corpus.fingerprint,
  }
  if (changes := trained.documents.about()) is not None:
    result['documents'] = changes
  index, run = None, None
  if 'embedder' in params:
    index = trained.index(params, step)
    result['index_generation'] = index.generation
  if asked is not None and index is not None:
    run = _retrieve(trained, params, index, asked)
    if 'span_reader' in params:
      model = answering.OpenQA(trained, step, params, index)
      figures, answers = metrics_lib.answer_figures(
          model, asked.table, run.doc_ids_BK, read
      )
      run = dataclasses.replace(run, figures=figures, answers=answers)
    result['questions'] = _question_metrics(trained, run, asked)
  if max_sentences and 'reader' in params:
    search = None if index is None else index.search
    result['masked'] = _masked_metrics(trained, params, search, max_sentences)
  result['seconds'] = round(time.perf_counter() - start, 3)
  return result, run


def _depth(trained: trained_lib.Trained) -> int:
  """Returns the number of passages retrieved for a question."""
  return min(metrics_lib.CUTOFFS[-1], trained.corpus.num_live)


def _retrieve(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    index: trained_lib.Index,
    asked: _Asked,
) -> runs.Run:
  query_emb_BE = trained.embed_queries(params, asked.table.query_ids_NQ)
  doc_ids, scores = [], []
  for start in range(0, len(query_emb_BE), _SEARCH_BATCH):
    some_BE = query_emb_BE[start : start + _SEARCH_BATCH]
    rows_BK = index.search.search(some_BE, _depth(trained))
    doc_ids.append(rows_BK)
    scores.append(search_lib.score(index.table, some_BE, rows_BK))
  doc_ids_BK = np.concatenate(doc_ids)
  questions = asked.table.questions
  return runs.Run(
      questions,
      doc_ids_BK,
      np.concatenate(scores),
      metrics_lib.gold_ranks(doc_ids_BK, asked.gold_rows),
      metrics_lib.answer_ranks(
          doc_ids_BK,
          [question.answers for question in questions],
          [question.match for question in questions],
          asked.text_of,
      ),
      asked.cluster_B,
  )


def _question_metrics(
    trained: trained_lib.Trained, run: runs.Run, asked: _Asked
) -> dict[str, Any]:
  num_live, depth = trained.corpus.num_live, run.doc_ids_BK.shape[1]
  has_gold = np.array([bool(rows) for rows in asked.gold_rows])
  held_out = np.array([
      -1 if question.held_out is None else int(question.held_out)
      for question in run.questions
  ])
  groups = {'all': np.ones(len(held_out), bool)}
  groups |= {'held_out': held_out == 1, 'seen': held_out == 0}
  metrics: dict[str, Any] = {}
  for name, members in groups.items():
    if not members.any():
      continue
    metrics[name] = {
        'questions': int(members.sum()),
        'clusters': len(np.unique(asked.cluster_B[members])),
        'with_gold_passage': int((members & has_gold).sum()),
        'answer': metrics_lib.ranking(
            run.answer_rank_B[members], depth, num_live
        ),
    }
    if (members & has_gold).any():
      metrics[name]['gold'] = metrics_lib.ranking(
          run.gold_rank_B[members & has_gold], depth, num_live
      )
    if run.figures:
      found, wrong = run.answer_rank_B > 0, run.figures['exact_match'] == 0
      could_read = run.figures['reader_oracle'] == 1
      figures = {
          **run.figures,
          'not_retrieved': wrong & ~found,
          'not_read': wrong & found & ~could_read,
          'misread': wrong & found & could_read,
      }
      metrics[name]['open_qa'] = metrics_lib.means(
          {what: values[members] for what, values in figures.items()},
          asked.cluster_B[members],
      )
  return metrics


def _masked_metrics(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    search: search_lib.Search | None,
    max_sentences: int,
) -> dict[str, Any]:
  """Measures the filling of masked `validation` sentences.

  Without a search, as after reader warm-up, the null document is the only
  candidate. Trivial candidates are excluded even if training allowed them, so
  that the rows of an ablation are comparable.
  """
  trivial = trained.config.trivial
  size = trained.config.num_candidates if search is not None else 1
  config = dataclasses.replace(
      trained.config,
      objective='realm',
      masking='salient',
      trivial='passage' if trivial == 'none' else trivial,
      batch_size=trained.reading_batch_size(
          size, trained.config.lengths.masks
      ),
  )
  totals: dict[str, list[np.ndarray]] = {}
  rows = []
  for batch in realm.evaluation_batches(
      trained.corpus, config, 'validation', max_sentences
  ):
    rows.append(batch.row_B)
    for name, values in _read_batch(
        trained, params, search, size, config.batch_size, batch.inputs
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
  for name, parts in totals.items():
    values_B = np.concatenate(parts)
    metrics[name] = float(values_B.mean())
    if name.startswith('accuracy'):
      metrics |= metrics_lib.named_interval(name, values_B, cluster_B)
  return metrics


def sentence_clusters(
    corpus: corpus_lib.Corpus, sentence_B: np.ndarray
) -> np.ndarray:
  """Returns the clusters of `validation` sentences for intervals.

  Args:
    corpus: with the split `validation`.
    sentence_B: rows of the sentences.

  Returns:
    int64 [B]: the sentence's article; for a sentence from no passage, a unique
    negative number.
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
) -> dict[str, np.ndarray]:
  """Returns each metric for each sentence of the batch."""
  count = len(queries.mask_BM)
  queries = jax.tree.map(
      lambda x: trained_lib.pad_rows(x, batch_size), queries
  )
  retrieved_BJ = np.zeros((batch_size, 0), np.int64)
  if search is not None:
    retrieved_BJ = search.search(
        trained.embed_queries(params, queries.query_ids_BQ),
        num_candidates - 1,
        queries.exclude_BR2,
    )
  batch = realm.with_candidates(
      queries, retrieved_BJ, trained.corpus, trained.config.lengths
  )
  read = trained.read(params, batch)
  mask_BM, targets_BM = queries.mask_BM, queries.targets_BM

  def right(best_BM: np.ndarray) -> np.ndarray:
    return ((best_BM == targets_BM) | ~mask_BM).all(axis=1).astype(float)

  metrics = {'accuracy_without_retrieval': right(read['best_BKM'][:, 0])}
  if search is not None:
    p_BK = np.exp(read['logp_BK'])
    logp_BK = np.where(mask_BM[:, None], read['target_logp_BKM'], 0).sum(-1)
    utility_BJ = logp_BK[:, 1:] - logp_BK[:, :1]
    real_B = np.maximum(p_BK[:, 1:].sum(1), 1e-9)
    metrics |= {
        'accuracy_with_retrieval': right(read['marginal_best_BM']),
        'retrieval_utility': (p_BK[:, 1:] * utility_BJ).sum(1) / real_B,
        'null_share': p_BK[:, 0],
    }
  return {name: values[:count] for name, values in metrics.items()}
