"""Relevance judgements (qrels): which passages answer a query, and how well."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import logging
import os
import pathlib
from typing import Any

from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import lines as lines_lib
from realm_jax.runtime import tables

log = logging.getLogger(__name__)

# Grades of passages, by query and passage.
Qrels = dict[str, dict[str, int]]

_NAMES = {
    'query': ('queryid qid topic topicid query',),
    'passage': ('corpusid docid docno passageid pid',),
    'grade': ('score rel relevance grade label',),
}
_SUFFIXES = ('.jsonl', '.json', '.tsv', '.csv', '.parquet', '.txt')


def read(path: str | os.PathLike[str]) -> Qrels:
  """Reads qrels.

  Lines are `query 0 passage grade` (TREC, MS MARCO, MIRACL), `query passage
  grade` (BEIR), or `query passage`, separated by tabs or, without any tab, by
  blanks. A first line may name the columns. JSON Lines, JSON and Parquet have
  fields such as `query-id`, `corpus-id` and `score`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a line has another form; names the file and the line.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'no file of qrels at {path}')
  found: Qrels = {}
  rows = _records if tables.recognise(path) in _JSON else _lines
  for place, query, passage, grade in rows(path):
    try:
      number = float(grade)
      if not number.is_integer():
        raise ValueError
    except (TypeError, ValueError, OverflowError):
      raise ValueError(
          f'{place}: the grade {grade!r} is no whole number. A line holds QUERY'
          ' PASSAGE GRADE, or QUERY 0 PASSAGE GRADE.'
      ) from None
    first = found.setdefault(query, {}).setdefault(passage, int(number))
    if first != number:
      raise ValueError(
          f'{place}: query {query!r} and passage {passage!r} have the grade'
          f' {first} in an earlier line. Which is right?'
      )
  if not found:
    raise ValueError(f'{path} holds no judgement.')
  return found


_JSON = ('jsonl', 'json', 'parquet')
# Columns of query, passage and grade by the number of columns; -1: none.
_ORDERS = {2: (0, 1, -1), 3: (0, 1, 2), 4: (0, 2, 3)}


def _records(path: pathlib.Path) -> Iterator[tuple[str, str, str, Any]]:
  table = tables.open_table(path)
  if all(isinstance(x, dict) for row in table.sample for x in row.values()):
    for place, record in table.records():  # As pytrec_eval takes them.
      for query, grades in record.items():
        for passage, grade in grades.items():
          yield f'{place}, query {query!r}', query, passage, grade
    return
  names = _names(path, table.sample)
  for place, record in table.records():
    ids = [record.get(names[field]) for field in ('query', 'passage')]
    query, passage = map(questions_lib.number_as_text, ids)
    if not all(isinstance(one, str) and one for one in (query, passage)):
      raise ValueError(f'{place}: {ids} are no ids.')
    grade = record.get(names['grade']) if 'grade' in names else 1
    yield place, query, passage, grade


def _names(
    path: pathlib.Path, sample: Sequence[Mapping[str, Any]]
) -> Mapping[str, str]:
  """Returns the names of the fields of query, passage and, if any, grade."""
  names = fields_lib.choose(
      _NAMES, sample, where=str(path), usual=_NAMES
  ).taken
  for field in ('query', 'passage'):
    if field not in names:
      raise ValueError(
          f'{path}: no field for the id of the {field}; the fields are'
          f' {fields_lib.listed([*(sample or ({},))[0]])}.'
      )
  return names


def _lines(path: pathlib.Path) -> Iterator[tuple[str, str, str, Any]]:
  rows = _rows(path)
  place, row = next(rows, ('', []))
  if not row:
    return
  start = [(place, row)]
  if _is_header(row):
    names, start = _names(path, [dict.fromkeys(row)]), []
    query, passage = row.index(names['query']), row.index(names['passage'])
    grade = row.index(names['grade']) if 'grade' in names else -1
  elif len(row) in _ORDERS:
    query, passage, grade = _ORDERS[len(row)]
  else:
    raise ValueError(
        f'{place}: {len(row)} column(s); expected are QUERY PASSAGE GRADE,'
        ' QUERY 0 PASSAGE GRADE, or QUERY PASSAGE.'
    )
  for place, other in itertools.chain(start, rows):
    if len(other) != len(row):
      raise ValueError(
          f'{place}: {len(other)} columns; expected are {len(row)}.'
      )
    yield place, other[query], other[passage], 1 if grade < 0 else other[grade]


def _is_header(row: Sequence[str]) -> bool:
  usual = {name for rows in _NAMES.values() for name in rows[0].split()}
  return any(fields_lib.normal(name) in usual for name in row)


def _rows(path: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """Yields the place and the columns of each line that is not blank."""
  first = next((line for line in lines_lib.lines(path) if line.strip()), b'')
  if b'\t' in first or tables.suffix(path) == '.csv':
    kind = 'tsv' if b'\t' in first else 'csv'
    table = tables.open_table(path, kind)
    if table.header:
      yield f'{path}:1', [*(table.columns or ())]
    for place, record in table.records():
      yield place, [*record.values()]
    return
  for number, line in enumerate(lines_lib.lines(path), 1):
    place = f'{path}:{number}'
    try:
      words = lines_lib.decoded(line).split()
    except ValueError as error:
      raise ValueError(f'{place}: {error}') from None
    if words:
      yield place, words


def beir(
    folder: pathlib.Path, with_qrels: bool = True
) -> tuple[pathlib.Path, pathlib.Path | None]:
  """Returns the files of queries and of qrels in a folder of BEIR.

  The folder has queries.jsonl, and qrels/SPLIT.tsv for each split.

  Raises:
    ValueError: there are no queries, or it is not clear which qrels are meant.
  """
  queries = _tables(folder, 'queries')
  if not queries:
    raise ValueError(
        f'{folder} is a folder without queries.jsonl; give a file of questions,'
        ' or a folder as BEIR has it.'
    )
  if len(queries) > 1:
    names = [path.name for path in queries]
    raise ValueError(
        f'{folder} has several files of queries, {", ".join(names)}; give one.'
    )
  splits = _tables(folder / 'qrels', '*') if with_qrels else []
  names = [lines_lib.plain_name(path).partition('.')[0] for path in splits]
  if len(splits) < 2:
    return queries[0], splits[0] if splits else None
  if 'test' not in names:
    raise ValueError(
        f'{folder} has qrels of {", ".join(names)}. Choose one:'
        f' --qrels={splits[0]}.'
    )
  chosen = splits[names.index('test')]
  log.info(
      '%s has qrels of %s; those of test are read. Others: --qrels=FILE.',
      folder, ', '.join(names),
  )
  return queries[0], chosen


def _tables(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
  return [
      path
      for path in sorted(folder.glob(f'{name}.*'))
      if path.is_file()
      and tables.suffix(path) in _SUFFIXES
      and not path.name.startswith('.')
  ]


def join(
    questions: Sequence[questions_lib.Question],
    judged: Mapping[str, Mapping[str, int]],
    source: str,
) -> tuple[list[questions_lib.Question], str]:
  """Gives questions the gold passages that qrels name; says what was done.

  Passages of grade 0 or less were judged irrelevant and are not gold. Questions
  without answers and without a judgement are left out.

  Raises:
    ValueError: the questions have no ids, or the qrels name none of them, or
      no question is left.
  """
  named = {question.id for question in questions} - {None}
  if not named:
    raise ValueError(
        f'{source}: the questions have no ids, by which qrels name them. Name'
        ' the field: --fields=id:NAME.'
    )
  if not named & judged.keys():
    raise ValueError(
        f'{source}: the qrels name none of the questions. Ids of questions are'
        f' such as {sorted(map(str, named))[0]!r}, of qrels'
        f' {next(iter(judged))!r}.'
    )
  joined = []
  for question in questions:
    gold = {
        passage: grade
        for passage, grade in judged.get(question.id or '', {}).items()
        if grade > 0
    }
    if gold:
      ids, grades = tuple(gold), tuple(gold.values())
      question = dataclasses.replace(
          question,
          passage_id=ids if len(ids) > 1 else ids[0],
          grades=() if {*grades} == {1} else grades,
      )
    if question.gold or question.answers:
      joined.append(question)
  if not joined:
    raise ValueError(
        f'{source}: no question has answers or a passage with a grade above 0.'
    )
  unknown = judged.keys() - named
  about = f'; qrels of {len(judged)} queries'
  if unknown:
    about += f', {len(unknown)} of them not among the questions'
  if len(joined) < len(questions):
    left = len(questions) - len(joined)
    about += f'; {left} questions without qrels left out'
  return joined, about
