"""`realm-jax evaluate`: measures retriever and reader of a workdir.

Questions measure the retriever alone ("zero-shot retrieval recall", Guu et al.
2020, table 2). Sentences of the split `validation`, which is not trained on,
measure it without questions and, masked, together with the reader.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any, Literal

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.evaluation import beir as beir_lib
from realm_jax.evaluation import cloze as cloze_lib
from realm_jax.evaluation import inspect as inspect_lib
from realm_jax.evaluation import metrics as metrics_lib
from realm_jax.evaluation import report
from realm_jax.evaluation import runs
from realm_jax.index import bm25 as bm25_lib
from realm_jax.inference import answering
from realm_jax.inference import trained as trained_lib
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_sets
from realm_jax.qa import question_table as question_table_lib
from realm_jax.qa import questions as questions_lib
from realm_jax.trainer.stages import ict

log = logging.getLogger(__name__)

_MAX_SENTENCES = 2000  # Without a limit of the user.
_COUNTED = {'miss': 'they count as not retrieved', 'skip': 'they are left out'}
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
    answer_match: answers_lib.Rule | None = None,
    unknown_gold: Literal['miss', 'skip'] = 'miss',
    format: str = 'auto',
    fields: str | None = None,
    qrels: pathlib.Path | str | None = None,
    bm25: bool = False,
) -> list[report.Result]:
  """Measures a workdir and writes evaluation/<step>.json for each step.

  Questions: recall@{1,5,20,50,100} and MRR by gold passage and by answer
  string, for all questions and, if they are marked, separately for `held_out`
  and `seen` facts; nDCG@10 by gold passage. Figures by gold passage are over
  the questions that name one, figures by answer over those with answers.

  Sentences of the split `validation`, where these are of the passages: recall
  and MRR of their own passages, see `cloze.measure`.

  Masked `validation` sentences, for a workdir with a reader: the share of
  sentences with every masked wordpiece right, with retrieval (marginal over the
  candidates) and without (the same reader with the null document alone), and
  the metrics of training (`objectives.retrieval_metrics`). Trivial candidates
  are excluded as in training, but at least the sentence's own passage. The
  search is exact: the backend does not influence the figures.

  Args:
    workdir: of `train`.
    questions: a source of `question_sets.read`, or a sequence of questions;
      None: the questions in the folder of the corpus, if any. Empty: only
      sentences are measured.
    steps: 'latest' checkpoint; 'all' checkpoints and retriever snapshots (which
      have no reader); or numbers of steps, separated by commas.
    corpus: where the training corpus is now, or another one with the same
      tokenizer, which is searched instead of the workdir's documents.
    limit: maximum number of questions and of sentences; None: all questions,
      and 2,000 sentences.
    read: passages to read for a question or a masked sentence; None: as many
      as in training.
    run_file: TREC run file to write, of the last step.
    beir: a BEIR folder. One that exists, without `questions`, is read: its
      queries are the questions, and retriever, BM25 and hybrid are measured on
      its documents (`beir.Folder`). Else corpus and questions are written.
    answer_match: when a passage holds an answer, a rule of
      `answers.has_answer`; None: `dpr`. Answers that are regular expressions
      have the rule `regex` in any case.
    unknown_gold: whether a gold passage that the corpus lacks counts as one
      that was not retrieved, or is left out.
    format, fields, qrels: of the questions, see `question_sets.read`.
    bm25: whether BM25, and its hybrid with the retriever, are measured, too.

  Returns:
    The results, plain JSON, by step.

  Raises:
    FileNotFoundError: there is no such workdir, step or corpus.
    ImportError: `bm25` or `beir` needs a package that is not installed.
    ValueError: nothing can be measured, or the corpus does not fit.
  """
  trained = trained_lib.Trained.open(
      workdir, corpus, another=corpus is not None
  )
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
  if answer_match not in (None, *answers_lib.RULES):
    raise ValueError(
        f'answer_match={answer_match}: must be one of'
        f' {", ".join(answers_lib.RULES)}.'
    )
  if unknown_gold not in ('miss', 'skip'):
    raise ValueError(f'unknown_gold={unknown_gold}: must be miss or skip.')
  folder = None
  if beir is not None and questions is None and beir_lib.is_folder(beir):
    length = trained.config.lengths.document
    folder = beir_lib.Folder.open(
        beir, trained.corpus, length, qrels, limit, format, fields
    )
    questions, beir = folder.questions, None
  questions = _questions(
      trained.corpus, questions, format=format, fields=fields, qrels=qrels
  )[:limit]
  max_sentences = _MAX_SENTENCES if limit is None else limit
  can_ask = bool(questions) and 'embedder' in trained.components
  splits = trained.corpus.sentences
  can_mask = 'reader' in trained.components and 'validation' in splits
  if (run_file or beir or bm25 or folder) and not can_ask:
    raise ValueError(
        'There are no questions, or no retriever, to write or measure a run of.'
        + (f' {beir} is no folder of BEIR that could be read.' * bool(beir))
    )
  cloze = None
  if 'embedder' in trained.components:
    cloze = cloze_lib.sentences_of(trained)
  if not (can_ask or can_mask) and cloze is None:
    raise ValueError(
        f'Nothing can be measured in {workdir}: its components are'
        f' {sorted(trained.components)}, {len(questions)} questions were given,'
        f' and the splits of {trained.corpus.directory} are {sorted(splits)}. A'
        ' retriever needs questions, or sentences of the passages in the split'
        ' `validation`; a reader needs that split.'
    )
  cuts.warn_of_passages(trained.corpus, trained.config)
  wanted = _steps(trained, steps, can_ask or cloze is not None)
  if run_file or beir:
    runs.query_names(questions)  # Checked before the work.
  elif can_ask and not any(q.answers or q.gold for q in questions):
    raise ValueError(
        f'None of the {len(questions)} questions has an answer or a gold'
        ' passage to measure by. Give --qrels=FILE, or --run_file=FILE to'
        ' write what is retrieved.'
    )
  asked = None
  if can_ask:
    asked = _Asked.of(trained, questions, answer_match, unknown_gold)
    if bm25 or folder is not None:
      asked = asked.with_bm25(trained, folder)
    if beir is not None:
      runs.write_beir(beir, questions, asked.gold, trained.corpus)
  results = []
  for step in wanted:
    output = pathlib.Path(workdir) / report.FOLDER
    result, found = _evaluate_step(
        trained, step, asked, cloze, max_sentences, read, output
    )
    paired = runs.write_step(output, step, found, trained.corpus)
    if 'baselines' in result:
      result['baselines']['paired'] = paired
    if found and run_file is not None:
      runs.write_trec(run_file, found['retriever'], trained.corpus)
    report.save(workdir, result)
    log.info('Evaluated %s, step %d.', workdir, step)
    results.append(result)
  return results


def _questions(
    corpus: corpus_lib.Corpus,
    questions: pathlib.Path | str | Sequence[questions_lib.Question] | None,
    **options: Any,
) -> Sequence[questions_lib.Question]:
  if questions is None:
    path = corpus.directory / _QUESTIONS
    questions = path if path.is_file() else []
  if isinstance(questions, (str, pathlib.Path)):
    return question_sets.read(questions, **options) if questions else []
  return questions


@dataclasses.dataclass(frozen=True)
class _Asked:
  """The questions in the form that all steps use.

  gold: gold passages of each question.
  has_gold_B: whether the question counts in the figures by gold passage.
  rules: when a passage holds an answer of each question.
  unknown_gold: the gold passages that the corpus lacks, for the report.
  cluster_B: see `metrics.interval`.
  text_of: returns the body of a passage row, cached.
  bm25: the index, and what it finds; None: not measured.
  folder: of BEIR; None: not measured.
  """

  table: question_table_lib.QuestionTable
  gold: question_table_lib.Gold
  has_gold_B: np.ndarray
  rules: list[answers_lib.Rule]
  unknown_gold: dict[str, Any] | None
  cluster_B: np.ndarray
  text_of: Callable[[int], str]
  bm25: tuple[bm25_lib.Bm25, beir_lib.Ranking] | None = None
  folder: beir_lib.Folder | None = None

  @classmethod
  def of(
      cls,
      trained: trained_lib.Trained,
      questions: Sequence[questions_lib.Question],
      answer_match: answers_lib.Rule | None,
      unknown_gold: str,
  ) -> '_Asked':
    table = question_table_lib.QuestionTable.of(
        list(questions), trained.template.text_length, trained.corpus.tokenizer
    )
    gold = question_table_lib.find_gold(trained.corpus, questions)
    gold.warn(trained.corpus, f'{_COUNTED[unknown_gold].capitalize()}.')
    has_gold = [
        len(rows) > 0 or (bool(unknown) and unknown_gold == 'miss')
        for rows, unknown in zip(gold.rows, gold.unknown, strict=True)
    ]
    rules: list[answers_lib.Rule] = [
        'regex' if question.match == 'regex' else answer_match or 'dpr'
        for question in questions
    ]
    # Questions can share the id of a gold passage that the corpus lacks.
    cluster_B = metrics_lib.clusters(
        int(trained.corpus.passages.articles[rows[0]])
        if len(rows)
        else question.passage_id
        for question, rows in zip(questions, gold.rows, strict=True)
    )
    text_of = functools.cache(
        lambda row: trained.corpus.passage_text(row)['text']
    )
    if (about := gold.about_unknown()) is not None:
      about['counted'] = _COUNTED[unknown_gold]
    if unknown_gold == 'skip':
      gold = dataclasses.replace(gold, unknown=[{} for _ in gold.unknown])
    return cls(
        table, gold, np.array(has_gold), rules, about, cluster_B, text_of
    )

  def with_bm25(
      self, trained: trained_lib.Trained, folder: beir_lib.Folder | None
  ) -> '_Asked':
    """Searches by BM25, which is the same for all steps."""
    asked = dataclasses.replace(self, folder=folder)
    index = bm25_lib.Bm25.open(trained.corpus)
    texts = [question.question for question in self.table.questions]
    found = index.search(texts, asked.depth(trained))
    return dataclasses.replace(asked, bm25=(index, found))

  def depth(self, trained: trained_lib.Trained) -> int:
    """Returns the number of passages to retrieve."""
    return max(_depth(trained), self.folder.depth if self.folder else 0)


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
    cloze: ict.ClozeSentences | None,
    max_sentences: int,
    read: int | None,
    output: pathlib.Path,
) -> tuple[report.Result, dict[str, runs.Run]]:
  """Returns the figures of a step, and its runs, named as in `report.RUNS`."""
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
  index, found = None, dict[str, runs.Run]()
  if 'embedder' in params:
    index = trained.index(params, step)
    result['index_generation'] = index.generation
  if asked is not None and index is not None:
    rankings = _rankings(trained, params, index, asked)
    depth = _depth(trained)
    found = {name: _ranked(r, asked, depth) for name, r in rankings.items()}
    if 'span_reader' in params:
      run = found['retriever']
      model = answering.OpenQA(trained, step, params, index)
      figures, answers = metrics_lib.answer_figures(
          model, asked.table, run.doc_ids_BK, read
      )
      run = dataclasses.replace(run, figures=figures, answers=answers)
      found['retriever'] = run
    measured: dict[str, dict[str, Any]] = {
        name: {'questions': _question_metrics(trained, run, asked)}
        for name, run in found.items()
    }
    result |= measured.pop('retriever')
    if asked.bm25 is not None:
      without_result = int((rankings['bm25'][0][:, 0] < 0).sum())
      about = {'without_result': without_result, 'joined': depth}
      measured['bm25'] |= asked.bm25[0].about() | about
      result['baselines'] = measured
    if asked.folder is not None:
      result['beir'] = asked.folder.measure(
          rankings, asked.cluster_B, output / f'{step}.beir'
      )
    pairs = zip(asked.rules, asked.table.questions, strict=True)
    if counts := collections.Counter(rule for rule, q in pairs if q.answers):
      result['answer_match'] = dict(counts)
    if asked.unknown_gold is not None:
      result['unknown_gold'] = asked.unknown_gold
  if cloze is not None and index is not None:
    result['held_out_sentences'] = cloze_lib.measure(
        trained, params, index, cloze, max_sentences
    )
  if 'reader' in params and 'validation' in trained.corpus.sentences:
    search = None if index is None else index.search
    result['masked'] = inspect_lib.measure(
        trained, params, search, max_sentences, read
    )
  result['seconds'] = round(time.perf_counter() - start, 3)
  return result, found


def _depth(trained: trained_lib.Trained) -> int:
  """Returns the number of passages of a run."""
  return min(metrics_lib.CUTOFFS[-1], trained.corpus.num_live)


def _rankings(
    trained: trained_lib.Trained,
    params: trained_lib.Params,
    index: trained_lib.Index,
    asked: _Asked,
) -> dict[str, beir_lib.Ranking]:
  """Searches by the retriever; adds BM25 and the hybrid of both, if asked."""
  query_emb_BE = trained.embed_queries(params, asked.table.query_ids_NQ)
  found = {'retriever': index.ranked(query_emb_BE, asked.depth(trained))}
  if asked.bm25 is not None:
    depth = _depth(trained)
    found['bm25'] = asked.bm25[1]
    both = [rows_BK[:, :depth] for rows_BK, _ in found.values()]
    found['hybrid'] = bm25_lib.fuse(*both, k=depth)
  return found


def _ranked(ranking: beir_lib.Ranking, asked: _Asked, depth: int) -> runs.Run:
  """Returns the ranks of gold passages and answers among the first `depth`."""
  doc_ids_BK, score_BK = (array_BK[:, :depth] for array_BK in ranking)
  questions, rules = asked.table.questions, asked.rules
  answers = [question.answers for question in questions]
  return runs.Run(
      questions,
      doc_ids_BK,
      score_BK,
      metrics_lib.gold_ranks(doc_ids_BK, asked.gold.rows),
      metrics_lib.answer_ranks(doc_ids_BK, answers, rules, asked.text_of),
      asked.cluster_B,
      rules=rules,
  )


def _question_metrics(
    trained: trained_lib.Trained, run: runs.Run, asked: _Asked
) -> dict[str, Any]:
  num_live, depth = trained.corpus.num_live, run.doc_ids_BK.shape[1]
  has_gold = asked.has_gold_B
  has_answers = np.array([bool(q.answers) for q in run.questions])
  ndcg_B = metrics_lib.ndcg(
      run.doc_ids_BK, asked.gold.rows, asked.gold.grades,
      [one.values() for one in asked.gold.unknown],
  )
  held_out = np.array([question.held_out for question in run.questions])
  groups = {
      'all': np.ones(len(held_out), bool),
      'held_out': np.equal(held_out, True),
      'seen': np.equal(held_out, False),
  }
  metrics: dict[str, Any] = {}
  for name, members in groups.items():
    if not members.any():
      continue
    metrics[name] = {
        'questions': int(members.sum()),
        'clusters': len(np.unique(asked.cluster_B[members])),
        'with_gold_passage': int((members & has_gold).sum()),
        'with_answers': int((members & has_answers).sum()),
    }
    with_gold, members = members & has_gold, members & has_answers
    if members.any():
      ranks_B = run.answer_rank_B[members]
      metrics[name]['answer'] = metrics_lib.ranking(ranks_B, depth, num_live)
    if with_gold.any():
      ranks_B = run.gold_rank_B[with_gold]
      metrics[name]['gold'] = metrics_lib.ranking(ranks_B, depth, num_live)
      if depth >= min(metrics_lib.NDCG_CUTOFF, num_live):
        metrics[name]['gold']['ndcg_at_10'] = float(ndcg_B[with_gold].mean())
    if run.figures and members.any():
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
          ('exact_match', 'f1'),
      )
  return metrics
