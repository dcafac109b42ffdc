"""A retriever's results in the formats of other tools, and side by side.

Public: `Run`, `write_trec`, `write_beir`, `write_questions`, `read_questions`,
`compare`, `as_text`. A TREC run file is what trec_eval, ir-measures and
pyserini score; a BEIR folder is a collection that any retriever can be run on.
"""

from collections.abc import Iterator, Sequence
import contextlib
import csv
import dataclasses
import json
import os
import pathlib
from typing import IO, Any

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import statistics
from realm_jax.inference import answering
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import lines as lines_lib

Path = str | os.PathLike[str]
# Figures of a question that two runs are compared in.
_FIGURES = ('reciprocal_rank', 'recall_at_1', 'recall_at_5', 'recall_at_20')


@dataclasses.dataclass(frozen=True)
class Run:
  """What was retrieved for each question, best first."""

  questions: Sequence[questions_lib.Question]
  doc_ids_BK: np.ndarray  # Passage rows.
  score_BK: np.ndarray  # Inner products.
  gold_rank_B: np.ndarray  # From 1; 0: not retrieved, or not known.
  answer_rank_B: np.ndarray
  # The cluster of each question, see `statistics`; None: each is one.
  cluster_B: np.ndarray | None = None
  # Of a reader, if there was one: see `answer_metrics.measure`.
  figures: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  answers: Sequence[answering.Answer] = ()

  def __len__(self) -> int:
    return len(self.questions)


def write_trec(
    path: Path, run: Run, corpus: corpus_lib.Corpus, name: str = 'realm_jax'
) -> None:
  """Writes `query Q0 passage rank score name` lines.

  Queries are named by their number in the question file, from 1. Equal scores
  are kept in order by their ranks.
  """
  names = _passage_names(corpus, run.doc_ids_BK)
  with _replacing(path) as file:
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
    folder: is made.
    questions: only those with a gold passage have lines in qrels.
    gold_rows: the rows of each question's gold passages.
    corpus: its passages, but for those that were removed.
  """
  folder = pathlib.Path(folder)
  (folder / 'qrels').mkdir(parents=True, exist_ok=True)
  with _replacing(folder / 'corpus.jsonl') as file:
    every = np.arange(len(corpus.passages))
    for row in np.setdiff1d(every, corpus.removed).tolist():
      passage = corpus.passage_text(row)
      _line(
          file, _id=_word(passage['id']), title=passage['title'],
          text=passage['text'],
      )
  with _replacing(folder / 'queries.jsonl') as file:
    for number, question in enumerate(questions, 1):
      _line(file, _id=str(number), text=question.question)
  with _replacing(folder / 'qrels' / 'test.tsv') as file:
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
  with _replacing(path) as file:
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
  """Reads what `write_questions` wrote.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line is not of such a file; names it.
  """
  records = []
  for number, line in enumerate(lines_lib.lines(pathlib.Path(path)), start=1):
    try:
      record = lines_lib.json_object(line)
      record['question'], record['answer_rank'], record['gold_rank']
    except (ValueError, KeyError, TypeError) as error:
      why = f'no field {error}' if isinstance(error, KeyError) else error
      raise ValueError(
          f'{path}:{number}: not a line of evaluation/STEP.questions.jsonl, as'
          f' `realm-jax evaluate` writes it: {why}'
      ) from error
    records.append(record)
  if not records:
    raise ValueError(f'{path} holds no question.')
  return records


def compare(ours: Path, theirs: Path) -> dict[str, dict[str, float]]:
  """Compares two files of `write_questions` question by question.

  The test resamples the clusters that `ours` names: questions about one
  article. A file without them, of an older version, is resampled by the gold
  passage.

  Args:
    ours: of the run that is hoped to be better.
    theirs: of the run that it is compared with.

  Returns:
    For each figure, by answer, what `statistics.paired_test` says, and the two
    means as `ours` and `theirs`.

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
  cluster_B = statistics.clusters(
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
        **statistics.paired_test(ours_B, theirs_B, cluster_B),
    }
  return figures


def as_text(figures: dict[str, dict[str, float]]) -> str:
  """Returns `compare`'s figures as a table in Markdown."""
  lines = [
      '| | ours | theirs | difference (95 % interval) | p | better | worse |',
      '|---|---|---|---|---|---|---|',
  ]
  for name, figure in figures.items():
    interval = f'{figure["low"]:+.3f} to {figure["high"]:+.3f}'
    lines.append(
        f'| {name.replace("_", " ")} | {figure["ours"]:.3f} |'
        f' {figure["theirs"]:.3f} | {figure["difference"]:+.3f} ({interval}) |'
        f' {figure["p_value"]:.4f} | {figure["better"]:.0f} |'
        f' {figure["worse"]:.0f} |'
    )
  counts = next(iter(figures.values()))
  lines.append(
      f'\n{counts["questions"]:.0f} questions in {counts["clusters"]:.0f}'
      f' clusters. Interval and p: resampled by {statistics.UNIT}.'
  )
  return '\n'.join(lines)


def _read(run: Run, i: int) -> dict[str, Any]:
  """What the reader made of question i."""
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
  """A run file is divided at blanks, so a name must not have any."""
  return '_'.join(name.split())


def _line(file: IO[str], **values: Any) -> None:
  file.write(json.dumps(values, ensure_ascii=False) + '\n')


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[str]]:
  """A text file that takes its name only when it is whole."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.tmp-{path.name}')
  with temporary.open('w', encoding='utf-8') as file:
    yield file
  os.replace(temporary, path)
