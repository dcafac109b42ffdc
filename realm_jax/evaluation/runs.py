"""Results of a retriever as TREC run, BEIR folder and question lines.

Also `realm-jax compare`, which compares two files of question lines.
"""

from collections.abc import Sequence
import csv
import dataclasses
import json
import pathlib
from typing import IO, Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import metrics
from realm_jax.evaluation import report
from realm_jax.inference import answering
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import files
from realm_jax.runtime import lines

Path = pathlib.Path | str
# Figures of a question that `compare` tests.
_FIGURES = ('reciprocal_rank', 'recall_at_1', 'recall_at_5', 'recall_at_20')


@dataclasses.dataclass(frozen=True)
class Run:
  """The passages retrieved for each question, best first.

  doc_ids_BK, score_BK: passage rows and inner products.
  gold_rank_B, answer_rank_B: from 1; 0: not retrieved, or unknown.
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

  def __len__(self) -> int:
    return len(self.questions)


def write_trec(
    path: Path, run: Run, corpus: corpus_lib.Corpus, name: str = 'realm_jax'
) -> None:
  """Writes `query Q0 passage rank score name` lines.

  Queries are named by their number in the question file, from 1. The ranks
  order passages of equal scores.
  """
  names = _passage_names(corpus, run.doc_ids_BK)
  with files.atomic_file(path) as file:
    for number, (rows, scores) in enumerate(
        zip(run.doc_ids_BK.tolist(), run.score_BK.tolist(), strict=True), 1
    ):
      for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
        file.write(f'{number} Q0 {names[row]} {rank} {score:.6f} {name}\n')


def write_beir(
    folder: Path,
    questions: Sequence[questions_lib.Question],
    gold_rows: Sequence[Sequence[int]],
    corpus: corpus_lib.Corpus,
) -> None:
  """Writes corpus.jsonl, queries.jsonl and qrels/test.tsv.

  Args:
    folder: output.
    questions: only those with a gold passage have lines in qrels.
    gold_rows: the rows of each question's gold passages.
    corpus: its removed passages are left out.
  """
  folder = pathlib.Path(folder)
  with files.atomic_file(folder / 'corpus.jsonl') as file:
    every = np.arange(len(corpus.passages))
    for row in np.setdiff1d(every, corpus.removed).tolist():
      passage = corpus.passage_text(row)
      _line(
          file, _id=_word(passage['id']), title=passage['title'],
          text=passage['text'],
      )
  with files.atomic_file(folder / 'queries.jsonl') as file:
    for number, question in enumerate(questions, 1):
      _line(file, _id=str(number), text=question.question)
  with files.atomic_file(folder / 'qrels' / 'test.tsv') as file:
    table = csv.writer(file, delimiter='\t', lineterminator='\n')
    table.writerow(('query-id', 'corpus-id', 'score'))
    for number, rows in enumerate(gold_rows, 1):
      for row in rows:
        table.writerow((number, _word(corpus.passage_text(row)['id']), 1))


def write_questions(
    path: Path, run: Run, corpus: corpus_lib.Corpus, depth: int = 20
) -> None:
  """Writes one JSON line per question: ranks, and the best passages."""
  names = _passage_names(corpus, run.doc_ids_BK[:, :depth])
  with files.atomic_file(path) as file:
    for i, question in enumerate(run.questions):
      rows = run.doc_ids_BK[i, :depth].tolist()
      scores = run.score_BK[i, :depth].tolist()
      _line(
          file,
          question=question.question,
          answers=list(question.answers),
          match=question.match,
          passage_id=question.passage_id,
          gold_rank=int(run.gold_rank_B[i]),
          answer_rank=int(run.answer_rank_B[i]),
          cluster=i if run.cluster_B is None else int(run.cluster_B[i]),
          **_read(run, i),
          retrieved=[
              {'id': names[row], 'score': round(score, 6)}
              for row, score in zip(rows, scores, strict=True)
          ],
      )


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


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, float]]:
  """Compares two files of `write_questions` question by question.

  The test resamples the clusters in `ours`: questions about one article. The
  clusters of a file without them, of an older version, are the gold passages.

  Args:
    ours: the run that is expected to be better.
    theirs: the run to compare with.

  Returns:
    For each figure, by answer, the result of `metrics.paired_test`, and the
    two means as `ours` and `theirs`.

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
  cluster_B = metrics.clusters(
      record.get('cluster', record.get('passage_id')) for record in a
  )
  figures = {}
  names: Sequence[str] = _FIGURES
  if all('exact_match' in record for record in (*a, *b)):
    names = ('exact_match', *names)
  for name in names:
    ours_B, theirs_B = _figure(name, a), _figure(name, b)
    figures[name] = {
        'ours': float(ours_B.mean()),
        'theirs': float(theirs_B.mean()),
        **metrics.paired_test(ours_B, theirs_B, cluster_B),
    }
  return figures


def as_text(figures: dict[str, dict[str, float]]) -> str:
  """Returns the figures of `compare` as a Markdown table."""
  rows = [
      '| | ours | theirs | difference (95 % interval) | p | better | worse |',
      '|---|---|---|---|---|---|---|',
  ]
  for name, figure in figures.items():
    interval = f'{figure["low"]:+.3f} to {figure["high"]:+.3f}'
    rows.append(
        f'| {name.replace("_", " ")} | {figure["ours"]:.3f} |'
        f' {figure["theirs"]:.3f} | {figure["difference"]:+.3f} ({interval}) |'
        f' {figure["p_value"]:.4f} | {figure["better"]:.0f} |'
        f' {figure["worse"]:.0f} |'
    )
  counts = next(iter(figures.values()))
  rows.append(
      f'\n{counts["questions"]:.0f} questions in {counts["clusters"]:.0f}'
      f' clusters. Interval and p: resampled by {report.UNIT}.'
  )
  return '\n'.join(rows)


def _read(run: Run, i: int) -> dict[str, Any]:
  """Returns the fields of the reader for question i."""
  if not run.answers:
    return {}
  answer = run.answers[i]
  return {
      'prediction': answer.text,
      'probability': round(answer.probability, 6),
      'from': None
      if answer.best is None
      else _word(answer.passages[answer.best].id),
      'exact_match': int(run.figures['exact_match'][i]),
      'reader_oracle': int(run.figures['reader_oracle'][i]),
  }


def _figure(name: str, records: list[dict[str, Any]]) -> np.ndarray:
  if name == 'exact_match':
    return np.array([record[name] for record in records], float)
  ranks = np.array([record['answer_rank'] for record in records])
  if name == 'reciprocal_rank':
    return np.where(ranks > 0, 1 / np.maximum(ranks, 1), 0.0)
  cutoff = int(name.rpartition('_')[2])
  return ((ranks > 0) & (ranks <= cutoff)).astype(float)


def _passage_names(
    corpus: corpus_lib.Corpus, doc_ids_BK: np.ndarray
) -> dict[int, str]:
  return {
      row: _word(corpus.passage_text(row)['id'])
      for row in np.unique(doc_ids_BK).tolist()
  }


def _word(name: str) -> str:
  """Replaces blanks, which separate the columns of a run file."""
  return '_'.join(name.split())


def _line(file: IO[str], **values: Any) -> None:
  file.write(json.dumps(values, ensure_ascii=False) + '\n')
