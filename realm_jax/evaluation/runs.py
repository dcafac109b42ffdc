"""Results of a retriever as TREC run, BEIR folder and question lines.

Also `realm-jax compare`, which compares two files of question lines.
"""

from collections.abc import Mapping, Sequence
import csv
import dataclasses
import json
import logging
import pathlib
import re
from typing import IO, Any
import unicodedata
import urllib.parse

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics
from realm_jax.evaluation import report
from realm_jax.inference import answering
from realm_jax.qa import answers as answers_lib
from realm_jax.qa import question_table
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import files
from realm_jax.runtime import lines

log = logging.getLogger(__name__)

Path = pathlib.Path | str
_ESCAPE = re.compile('%[0-9A-Fa-f]{2}')
_WRITTEN = 20  # Passages of a question that `write_questions` writes.
# Figures of a question that `compare` tests.
_FIGURES = ('reciprocal_rank', 'recall_at_1', 'recall_at_5', 'recall_at_20')

# Runs of a step that are compared: the first is expected to be better.
PAIRS = (('retriever', 'bm25'), ('hybrid', 'retriever'), ('hybrid', 'bm25'))


@dataclasses.dataclass(frozen=True)
class Run:
  """The passages retrieved for each question, best first.

  doc_ids_BK, score_BK: passage rows and scores; -1: fewer were found.
  gold_rank_B, answer_rank_B: from 1; 0: not retrieved, or unknown.
  rules: when a passage holds an answer, see `answers.has_answer`; empty: not
    known.
  cluster_B: see `metrics.interval`; None: each question is one.
  figures, answers: see `metrics.answer_figures`; empty without a reader.
  """

  questions: Sequence[questions_lib.Question]
  doc_ids_BK: np.ndarray
  score_BK: np.ndarray
  gold_rank_B: np.ndarray
  answer_rank_B: np.ndarray
  cluster_B: np.ndarray | None = None
  figures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  answers: Sequence[answering.Answer] = ()
  rules: Sequence[answers_lib.Rule] = ()


def query_names(questions: Sequence[questions_lib.Question]) -> list[str]:
  """Returns the names of questions in runs: ids, or their numbers from 1.

  Raises:
    ValueError: two questions have the same name.
  """
  names = [
      str(number) if question.id is None else question.id
      for number, question in enumerate(questions, 1)
  ]
  first: dict[str, int] = {}
  for number, name in enumerate(names, 1):
    if first.setdefault(name, number) != number:
      raise ValueError(
          f'Questions {first[name]} and {number} both have the id {name!r} (a'
          ' question without an id has its number): a run file and a BEIR'
          ' folder need distinct ids.'
      )
  return names


def escaped(name: str) -> str:
  """Returns an id as one word of a run file.

  White space, control characters, and a `%` that would read as an escape become
  `%XX`, as in URLs, so that `urllib.parse.unquote` gives the id again.
  """
  return ''.join(
      urllib.parse.quote(character, safe='')
      if character.isspace()
      or unicodedata.category(character)[0] == 'C'
      or (character == '%' and _ESCAPE.match(name, at))
      else character
      for at, character in enumerate(name)
  )


def write_trec(path: Path, run: Run, corpus: corpus_lib.Corpus) -> None:
  """Writes a run with the ids of questions and passages."""
  names = _passage_names(corpus, run.doc_ids_BK)
  queries = query_names(run.questions)
  rows_BK, score_BK = run.doc_ids_BK.tolist(), run.score_BK.tolist()
  ranking = {
      query: {
          names[row]: score
          for row, score in zip(rows, scores, strict=True)
          if row >= 0
      }
      for query, rows, scores in zip(queries, rows_BK, score_BK, strict=True)
  }
  write_ranking(path, ranking, 'realm_jax', '.6f')


def write_ranking(
    path: Path,
    ranking: Mapping[str, Mapping[str, float]],
    name: str,
    digits: str,
) -> None:
  """Writes `query Q0 passage rank score name` lines, as trec_eval reads them.

  Ids are written as one word (`escaped`). Ranks order passages of equal scores.
  `ranking` has scores by query and passage, best first, which `digits` formats.
  """
  with files.atomic_file(path) as file:
    for query, scores in ranking.items():
      for rank, (document, score) in enumerate(scores.items(), 1):
        file.write(
            f'{escaped(query)} Q0 {escaped(document)} {rank} {score:{digits}}'
            f' {name}\n'
        )


def write_beir(
    folder: Path,
    questions: Sequence[questions_lib.Question],
    gold: question_table.Gold,
    corpus: corpus_lib.Corpus,
) -> None:
  """Writes corpus.jsonl, queries.jsonl and qrels/test.tsv.

  Ids are those of the corpus and of the questions. The answers of a question
  are in its `metadata`. Gold passages that the corpus lacks are in the qrels;
  removed passages are left out.
  """
  folder = pathlib.Path(folder)
  with files.atomic_file(folder / 'corpus.jsonl') as file:
    every = np.arange(len(corpus.passages))
    for row in np.setdiff1d(every, corpus.removed).tolist():
      passage = corpus.passage_text(row)
      _line(file, _id=passage.pop('id'), **passage)
  names = query_names(questions)
  with files.atomic_file(folder / 'queries.jsonl') as file:
    for name, question in zip(names, questions, strict=True):
      metadata: dict[str, Any] = {}
      if question.answers:
        metadata = {'answers': list(question.answers), 'match': question.match}
      _line(file, _id=name, text=question.question, metadata=metadata)
  with files.atomic_file(folder / 'qrels' / 'test.tsv') as file:
    table = csv.writer(file, delimiter='\t', lineterminator='\n')
    table.writerow(('query-id', 'corpus-id', 'score'))
    for name, rows, grades, unknown in zip(
        names, gold.rows, gold.grades, gold.unknown, strict=True
    ):
      for row, grade in zip(rows.tolist(), grades.tolist(), strict=True):
        table.writerow((name, corpus.passage_text(row)['id'], grade))
      for passage_id, grade in unknown.items():
        table.writerow((name, passage_id, grade))


def write_questions(path: Path, run: Run, corpus: corpus_lib.Corpus) -> None:
  """Writes one JSON line per question: ranks, and the best passages."""
  names = _passage_names(corpus, run.doc_ids_BK[:, :_WRITTEN])
  with files.atomic_file(path) as file:
    for i, question in enumerate(run.questions):
      rows = run.doc_ids_BK[i, :_WRITTEN].tolist()
      scores = run.score_BK[i, :_WRITTEN].tolist()
      _line(
          file,
          id=question.id,
          question=question.question,
          answers=list(question.answers),
          match=question.match,
          **({'answer_match': run.rules[i]} if run.rules else {}),
          passage_id=question.passage_id,
          gold_rank=int(run.gold_rank_B[i]),
          answer_rank=int(run.answer_rank_B[i]),
          cluster=i if run.cluster_B is None else int(run.cluster_B[i]),
          **_read(run, i),
          retrieved=[
              {'id': names[row], 'score': round(score, 6)}
              for row, score in zip(rows, scores, strict=True)
              if row >= 0
          ],
      )


def write_step(
    folder: pathlib.Path,
    step: int,
    found: Mapping[str, Run],
    corpus: corpus_lib.Corpus,
) -> dict[str, Any]:
  """Writes the questions of the runs of a step, and compares the runs.

  The files are STEP.questions.jsonl for the retriever, and STEP.NAME.questions
  .jsonl for other runs. Returns the results of `compare`, by the names of
  `PAIRS`; empty without BM25, or where the questions have neither answers nor
  gold passages.
  """
  paths = {}
  for name, run in found.items():
    kind = '' if name == 'retriever' else f'.{name}'
    paths[name] = folder / f'{step}{kind}{report.QUESTIONS}'
    write_questions(paths[name], run, corpus)
  asked = [question for run in found.values() for question in run.questions]
  if not any(question.answers or question.gold for question in asked):
    return {}
  return {
      f'{ours}_{theirs}': compare(paths[ours], paths[theirs])
      for ours, theirs in PAIRS
      if {ours, theirs} <= paths.keys()
  }


def read_questions(path: Path) -> list[dict[str, Any]]:
  """Reads a file of `write_questions`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not of such a file; names it.
  """
  records = []
  for where, record in lines.json_objects(pathlib.Path(path)):
    for field in ('question', 'answer_rank', 'gold_rank'):
      if field not in record:
        raise ValueError(
            f'{where}: not a line of evaluation/STEP.questions.jsonl, as'
            f' `realm-jax evaluate` writes it: no field {field!r}'
        )
    records.append(record)
  if not records:
    raise ValueError(f'{path} holds no question.')
  return records


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, Any]]:
  """Compares two files of `write_questions` question by question.

  The test resamples the clusters in `ours`: questions about one article. A file
  of an older version has none; its clusters are the gold passages.

  Returns:
    For each figure what `paired` returns. Figures are by answer, over the
    questions with answers; without any, they are by gold passage, and called
    `gold_NAME`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: they are not of the same questions in the same order.
  """
  a, b = read_questions(ours), read_questions(theirs)
  if len(a) != len(b):
    raise ValueError(
        f'{ours} has {len(a)} questions, {theirs} {len(b)}: only runs over the'
        ' same questions can be compared.'
    )
  for number, (one, other) in enumerate(zip(a, b, strict=True), 1):
    if one['question'] != other['question']:
      raise ValueError(
          f'Line {number} is {one["question"]!r} in {ours} and'
          f' {other["question"]!r} in {theirs}: only runs over the same'
          ' questions, in the same order, can be compared.'
      )
  rules_a, rules_b = (
      '/'.join(sorted({str(record.get('answer_match')) for record in records}))
      for records in (a, b)
  )
  if rules_a != rules_b:
    log.warning(
        'Passages hold an answer by the rule %s in %s, and by %s in %s: the'
        ' difference may be one of the rules. Evaluate both with the same'
        ' --answer_match.',
        rules_a, ours, rules_b, theirs,
    )
  # Figures are by answer; by gold passage, where no question has answers.
  kept = [i for i, record in enumerate(a) if record.get('answers', True)]
  by = 'answer_rank' if kept else 'gold_rank'
  if kept:
    a, b = [a[i] for i in kept], [b[i] for i in kept]
  cluster_B = metrics.clusters(
      record.get('cluster', str(record.get('passage_id') or number))
      for number, record in enumerate(a)
  )
  names: Sequence[str] = _FIGURES
  if kept and all('exact_match' in record for record in (*a, *b)):
    names = ('exact_match', *names)
  return {
      name if kept else f'gold_{name}': paired(
          _figure(name, a, by), _figure(name, b, by), cluster_B
      )
      for name in names
  }


def paired(
    ours_B: np.ndarray, theirs_B: np.ndarray, cluster_B: np.ndarray
) -> dict[str, Any]:
  """Returns `metrics.paired_test` with the two means and their intervals.

  Questions of a single cluster have no intervals: no `low` and `high`, either.
  """
  test = metrics.paired_test(ours_B, theirs_B, cluster_B)
  return {
      'ours': float(ours_B.mean()),
      'theirs': float(theirs_B.mean()),
      **metrics.named_interval('ours', ours_B, cluster_B),
      **metrics.named_interval('theirs', theirs_B, cluster_B),
      **{name: value for name, value in test.items() if not np.isnan(value)},
  }


def as_text(figures: dict[str, dict[str, Any]]) -> str:
  """Returns the figures of `compare` as a Markdown table."""
  rows = [report.paired_row(name, test) for name, test in figures.items()]
  counts = next(iter(figures.values()))
  return (
      f'{report.markdown(report.PAIRED_COLUMNS, *rows)}\n\n'
      f'{counts["questions"]:.0f} questions in {counts["clusters"]:.0f}'
      f' clusters. Interval and p: resampled by {report.UNIT}.'
  )


def _read(run: Run, i: int) -> dict[str, Any]:
  """Returns the fields of the reader for question i."""
  if not run.answers:
    return {}
  answer = run.answers[i]
  return {
      'prediction': answer.text,
      'probability': round(answer.probability, 6),
      'from': None if answer.best is None else answer.passages[answer.best].id,
      'exact_match': int(run.figures['exact_match'][i]),
      'reader_oracle': int(run.figures['reader_oracle'][i]),
  }


def _figure(name: str, records: list[dict[str, Any]], by: str) -> np.ndarray:
  if name == 'exact_match':
    return np.array([record[name] for record in records], float)
  ranks = np.array([record[by] for record in records])
  if name == 'reciprocal_rank':
    return np.where(ranks > 0, 1 / np.maximum(ranks, 1), 0.0)
  cutoff = int(name.rpartition('_')[2])
  return ((ranks > 0) & (ranks <= cutoff)).astype(float)


def _passage_names(
    corpus: corpus_lib.Corpus, doc_ids_BK: np.ndarray
) -> dict[int, str]:
  return {
      row: corpus.passage_text(row)['id']
      for row in np.unique(doc_ids_BK).tolist()
      if row >= 0
  }


def _line(file: IO[str], **values: Any) -> None:
  file.write(json.dumps(values, ensure_ascii=False) + '\n')
