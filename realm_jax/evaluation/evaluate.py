"""How good are retriever and reader? The driver of `realm-jax evaluate`.

Public: `evaluate`, `sentence_clusters`. Questions measure the retriever alone
(zero-shot, as in Guu et al. 2020, table 2, "zero-shot retrieval recall").
Masked sentences of the split `validation`, on which nothing is trained,
measure retriever and reader together.
"""

from collections.abc import Sequence
import dataclasses
import logging
import pathlib
import time
from typing import Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.evaluation import answer_metrics
from realm_jax.evaluation import ranking
from realm_jax.evaluation import report
from realm_jax.evaluation import runs
from realm_jax.evaluation import statistics
from realm_jax.index import search as search_lib
from realm_jax.inference import answering
from realm_jax.inference import trained as trained_lib
from realm_jax.qa import passage_answers
from realm_jax.qa import question_sets
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib
from realm_jax.trainer import batches

log = logging.getLogger(__name__)

_MAX_SENTENCES = 2000  # Masked; more would take long and say little more.
_SEARCH_BATCH = 1024  # Questions searched for at once.
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

  For questions: recall@{1,5,20,50,100} and MRR by gold passage and by answer
  string, for all of them and, where they say so, apart for `held_out` and
  `seen` facts. For a workdir with a reader: the share of masked spans of the
  corpus' `validation` sentences that are filled in with every wordpiece right,
  with retrieval (marginal over the candidates) and without (the same reader,
  the null document alone), and what training also logs
  (`objectives.retrieval_metrics`). Trivial candidates are excluded as in
  training, but at least the sentence's own passage. The search is exact, so
  that the retriever is measured and not the backend.

  Args:
    workdir: of `train`.
    questions: a file of them, or themselves; None: those that came with the
      corpus, if any did. Empty: only masked sentences are measured.
    steps: 'latest' checkpoint, 'all' that can be loaded, checkpoints and
      retriever snapshots (of which only the retrieval can be measured), or the
      numbers of some, with commas in between.
    corpus: searched instead of the one trained on; same tokenizer.
    limit: use the first so many questions and masked sentences; None: all
      questions, and 2,000 sentences.
    read: passages that a reader of answers reads for a question; None: as many
      as in training.
    run_file: also write what was retrieved, in the format of TREC; of the last
      step, if there are several.
    beir: also write corpus and questions to this folder, in that of BEIR.

  Returns:
    The results, plain JSON, by step.

  Raises:
    FileNotFoundError: no such workdir, step or corpus.
    ValueError: nothing to measure, or the corpus does not fit.
  """
  trained = trained_lib.Trained.open(workdir, corpus)
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit}: must be at least 1.')
  if read is not None and not 1 <= read <= _depth(trained):
    raise ValueError(
        f'read={read}: must be between 1 and {_depth(trained)}, the passages'
        ' that are retrieved.'
    )
  if 'embedder' not in trained.components and questions:
    raise ValueError(
        f'{workdir} has no retriever to ask questions of: its components are'
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
        f'There is nothing to measure {workdir} with: its components are'
        f' {sorted(trained.components)}, {len(questions)} questions were given,'
        f' and the splits of {trained.corpus.directory} are'
        f' {sorted(trained.corpus.sentences)}. A retriever needs questions, a'
        ' reader the split `validation`.'
    )
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
  """Questions, made ready for all steps."""

  table: question_table_lib.QuestionTable
  gold_rows: list[list[int]]  # Empty where the gold passage is not known.
  cluster_B: np.ndarray  # For the intervals: the questions about one article.
  texts: '_Texts'

  @classmethod
  def of(
      cls,
      trained: trained_lib.Trained,
      questions: Sequence[questions_lib.Question],
  ) -> '_Asked':
    texts = _Texts(trained.corpus)
    table = question_table_lib.QuestionTable.of(
        list(questions), trained.config.lengths.query, trained.corpus.tokenizer
    )
    gold_rows = [
        rows.tolist()
        for rows in passage_answers.gold_rows(trained.corpus, questions)
    ]
    # The id of a gold passage that the corpus lacks still says which questions
    # share it.
    cluster_B = statistics.clusters(
        int(trained.corpus.passages.articles[rows[0]])
        if rows
        else question.passage_id
        for question, rows in zip(questions, gold_rows, strict=True)
    )
    return cls(table, gold_rows, cluster_B, texts)


class _Texts:
  """Bodies of passages by row; each is read once."""

  def __init__(self, corpus: corpus_lib.Corpus):
    self._corpus = corpus
    self._texts: dict[int, str] = {}

  def __call__(self, row: int) -> str:
    if row not in self._texts:
      self._texts[row] = self._corpus.passage_text(row)['text']
    return self._texts[row]


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
        f"steps={steps!r}: must be 'latest', 'all', or numbers of steps with"
        ' commas in between.'
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
  changes = trained.documents.about()
  if changes is not None:
    result['documents'] = changes
  index, run = None, None
  if 'embedder' in params:
    index = trained.index(params, step)
    result['index_generation'] = index.generation
  if asked is not None and index is not None:
    run = _retrieve(trained, params, index, asked)
    if 'span_reader' in params:
      answerer = answering.OpenQA(trained, step, params, index)
      figures, answers = answer_metrics.measure(
          answerer, asked.table, run.doc_ids_BK, read
      )
      run = dataclasses.replace(run, figures=figures, answers=answers)
    result['questions'] = _question_metrics(trained, run, asked)
  if max_sentences and 'reader' in params:
    search = None if index is None else index.search
    result['masked'] = _masked_metrics(trained, params, search, max_sentences)
  result['seconds'] = round(time.perf_counter() - start, 3)
  return result, run


def _depth(trained: trained_lib.Trained) -> int:
  """How many passages are retrieved for a question."""
  return min(ranking.CUTOFFS[-1], trained.corpus.num_live)


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
    doc_emb = index.table[rows_BK.reshape(-1)].astype(np.float32)
    doc_ids.append(rows_BK)
    scores.append(
        np.einsum(
            'BE,BKE->BK', some_BE, doc_emb.reshape(*rows_BK.shape, -1)
        )
    )
  doc_ids_BK = np.concatenate(doc_ids)
  questions = asked.table.questions
  return runs.Run(
      questions,
      doc_ids_BK,
      np.concatenate(scores),
      ranking.gold_ranks(doc_ids_BK, asked.gold_rows),
      ranking.answer_ranks(
          doc_ids_BK,
          [question.answers for question in questions],
          [question.match for question in questions],
          asked.texts,
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
        'answer': ranking.summarize(
            run.answer_rank_B[members], depth, num_live
        ),
    }
    if (members & has_gold).any():
      metrics[name]['gold'] = ranking.summarize(
          run.gold_rank_B[members & has_gold], depth, num_live
      )
    if run.figures:
      found = run.answer_rank_B > 0
      figures = {
          **run.figures,
          'not_retrieved': (~found & (run.figures['exact_match'] == 0)),
          'not_read': found & (run.figures['reader_oracle'] == 0)
          & (run.figures['exact_match'] == 0),
          'misread': found & (run.figures['reader_oracle'] == 1)
          & (run.figures['exact_match'] == 0),
      }
      metrics[name]['open_qa'] = answer_metrics.summarize(
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
  """Masked `validation` sentences filled in.

  Without a search, as after reader warm-up, the null document is all. A passage
  that gives the answer away is never a candidate here, whatever training
  allowed: else rows of an ablation could not be compared.
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
  for batch in batches.evaluation_batches(
      trained.corpus, config, 'validation', max_sentences
  ):
    rows.append(batch['sentence_B'])
    for name, values in _read_batch(
        trained, params, search, size, config.batch_size, batch
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
      metrics |= statistics.named_interval(name, values_B, cluster_B)
  return metrics


def sentence_clusters(
    corpus: corpus_lib.Corpus, sentence_B: np.ndarray
) -> np.ndarray:
  """Clusters that intervals over masked `validation` sentences resample.

  Args:
    corpus: the opened corpus.
    sentence_B: rows of the sentences.

  Returns:
    int64 [B]: the sentence's article; a negative number of its own for each
    sentence that is from no passage.
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
    batch: inputs.Batch,
) -> dict[str, np.ndarray]:
  """Returns each metric for each sentence of the batch."""
  count = len(batch['mask_BM'])
  batch = {
      name: trained_lib.pad_rows(value, batch_size)
      for name, value in batch.items()
  }
  retrieved_BJ = np.zeros((batch_size, 0), np.int64)
  if search is not None:
    retrieved_BJ = search.search(
        trained.embed_queries(params, batch['query_ids_BQ']),
        num_candidates - 1,
        batch['exclude_BR2'],
    )
  batch = inputs.with_candidates(
      batch, retrieved_BJ, trained.corpus, trained.config.lengths
  )
  read = trained.read(params, batch)
  mask_BM, targets_BM = batch['mask_BM'], batch['targets_BM']

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
