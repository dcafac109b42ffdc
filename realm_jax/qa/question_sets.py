"""Question sets in the formats in which they were published.

Every set becomes a list of `questions.Question`; `match`, how a prediction is
compared with an answer, is a property of the set. Files are recognised by their
content: JSON Lines, JSON, CSV, TSV and Parquet by `tables`, the fields of their
records and columns without names by `question_formats`. A line of the log says
what was recognised. An ambiguous file is an error.
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
import json
import logging
import os
import pathlib
from typing import Any

import farmhash

from realm_jax.qa import qrels as qrels_lib
from realm_jax.qa import question_formats as formats
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import extension
from realm_jax.runtime import fields as fields_lib
from realm_jax.runtime import files
from realm_jax.runtime import tables

log = logging.getLogger(__name__)

# In ORQA's re-splits (Lee et al. 2019, section 6.1), a tenth of the published
# training set is `dev`.
_BUCKETS, _DEV_EVERY = 100_000, 10

_SAMPLE = 100  # Records that tell the fields of a dataset.
# Fields that hold the records of a document.
_LISTS = ('data', 'questions')

Path = str | os.PathLike[str]
Record = dict[str, Any]
Rows = Iterable[tuple[str, Record]]

def read(
    source: Path,
    format: str = 'auto',
    *,
    fields: str | Mapping[str, str] | None = None,
    qrels: Path | None = None,
) -> list[questions_lib.Question]:
  """Reads a question set.

  Args:
    source: a file, plain or compressed; a folder of BEIR;
      `tfds:NAME[/CONFIG][:SPLIT]`; `hf:NAME[:CONFIG[:SPLIT]]`; or `ir:NAME`
      of ir_datasets.
    format: a key of `question_formats.FORMATS` or `tables.FORMATS`; `auto`:
      recognised.
    fields: names in the source, such as 'question:query,id:qid'.
    qrels: file of the relevance of passages; see `qrels.read`.

  Raises:
    FileNotFoundError: the file does not exist.
    ValueError: the format is unknown or ambiguous, or a record is wrong; the
      message names the file, the line or record, and the expected content.
  """
  name = os.fspath(source)
  given = fields_lib.parse(fields, formats.NAMES)
  if format not in ('auto', *formats.FORMATS, *tables.FORMATS):
    known = ', '.join([*formats.FORMATS, *tables.FORMATS])
    raise ValueError(f'format {format!r}: must be auto or one of {known}.')
  path = pathlib.Path(name)
  judged: qrels_lib.Qrels | None = None
  about: object
  rows: Rows
  if name.startswith('tfds:'):
    about, rows = 'TFDS', _from_tfds(name)
  elif name.startswith('hf:'):
    about, rows = _from_hf(name, format, given)
  elif name.startswith('ir:'):
    about, rows, judged = _from_ir(name, qrels is None)
  else:
    if path.is_dir():
      path, found = qrels_lib.beir(path, qrels is None)
      qrels = found or qrels
    elif not path.is_file():
      raise FileNotFoundError(f'no question file or folder at {name}')
    about, rows = _open(path, format, given)
  questions, judging = _checked(rows, name, about), ''
  ids = collections.Counter(q.id for q in questions if q.id is not None)
  if twice := [name for name, count in ids.items() if count > 1]:
    log.warning(
        '%s: %d ids belong to several questions, the first is %r; run files and'
        ' qrels tell questions apart by their ids.',
        name, len(twice), twice[0],
    )
  if qrels is not None:
    judged = qrels_lib.read(qrels)
  if judged is not None:
    questions, judging = qrels_lib.join(questions, judged, name)
  answered = [question for question in questions if question.answers]
  patterns = sum(question.match == 'regex' for question in answered)
  form = f'{patterns} regular expressions' if patterns else 'text'
  log.info(
      'Questions of %s: %s%s. %d questions: %d with answers%s, %d with gold'
      ' passages.',
      name, about, judging, len(questions), len(answered),
      f' ({form})' if answered else '',
      sum(bool(question.gold) for question in questions),
  )
  return questions


def resplit(
    questions: Iterable[questions_lib.Question],
) -> tuple[list[questions_lib.Question], list[questions_lib.Question]]:
  """Splits a published training set into train and dev as ORQA did.

  The FarmHash of a question alone decides. NQ-open gives 79,168 and 8,757
  questions, WebQuestions 3,417 and 361, CuratedTREC 1,353 and 133 (Lee et al.
  2019, table 3).
  """
  train: list[questions_lib.Question] = []
  dev: list[questions_lib.Question] = []
  for question in questions:
    bucket = farmhash.fingerprint64(question.question) % _BUCKETS
    (train if bucket % _DEV_EVERY else dev).append(question)
  return train, dev


def convert(
    source: Path,
    output: Path,
    *,
    format: str = 'auto',
    split: bool = False,
    fields: str | Mapping[str, str] | None = None,
    qrels: Path | None = None,
) -> dict[str, int]:
  """Writes a question set in JSON Lines, which every command reads.

  The arguments are those of `read`. The files in the folder `output` are
  questions.jsonl, or with `split` (see `resplit`) train.jsonl and dev.jsonl.
  Returns the number of questions of each.
  """
  questions = read(source, format, fields=fields, qrels=qrels)
  parts = {'questions': questions}
  if split:
    parts = dict(zip(('train', 'dev'), resplit(questions), strict=True))
  for name, part in parts.items():
    with files.atomic_file(pathlib.Path(output) / f'{name}.jsonl') as file:
      for question in part:
        values = {
            field: value
            for field, value in dataclasses.asdict(question).items()
            if value is not None and value != ()
        }
        file.write(json.dumps(values, ensure_ascii=False) + '\n')
  return {name: len(part) for name, part in parts.items()}


def _checked(
    rows: Rows, source: str, about: object
) -> list[questions_lib.Question]:
  """Makes questions from pairs of a place, for errors, and a record."""
  questions = []
  place = f'{source}, its first record'
  try:
    for where, record in rows:
      try:
        questions.append(questions_lib.parse(record))
      except ValueError as error:
        raise ValueError(f'{where}: {error}') from error
      place = f'the record after {where}'
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    why = f'no field {error}' if isinstance(error, KeyError) else error
    raise ValueError(f'{place}: not as in {about}: {why}.') from error
  if not questions:
    raise ValueError(f'{source} ({about}) holds no question with an answer.')
  return questions


def _open(
    path: pathlib.Path, format: str, given: Mapping[str, str]
) -> tuple[object, Rows]:
  """Returns what a file holds, for the log after reading, and its records."""
  table = _table(path, format if format in tables.FORMATS else None, given)
  kind = tables.FORMATS[table.format]
  if table.columns is not None and not table.header and table.delimiter:
    records = [
        (place, {column: value.strip() for column, value in record.items()})
        for place, record in table.records()
    ]
    names, what, match = formats.columns(str(path), format, records, given)
    chosen = fields_lib.Fields(
        names, tuple(c for c in table.columns if c not in names.values())
    )
    about = f'{kind} without a header, {what}; {chosen}'
    if match == 'regex' and 'id' in names:
      # ORQA removes these, which have another source; 1,486 and 694 are left.
      column = names['id']
      records = [r for r in records if not r[1][column].startswith('lfb')]
    return about, formats.with_fields(records, names, match)
  return _recognised(table.records(), table.sample, kind, path, format, given)


def _recognised(
    rows: Iterator[tuple[str, Record]],
    sample: Sequence[Record],
    kind: str,
    path: pathlib.Path | str,
    format: str,
    given: Mapping[str, str],
) -> tuple[object, Rows]:
  """Finds the format of records with names of fields, as `_open`."""
  first = next(rows, None)
  if first is None:
    raise ValueError(f'{path} holds no question.')
  rows = itertools.chain([first], rows)
  key = next((k for k in first[1] if str(k).lower() in _LISTS), None)
  if key is not None and 'question' not in map(fields_lib.normal, first[1]):
    rows = _nested(rows, key)
    head = list(itertools.islice(rows, 1))
    rows, sample = itertools.chain(head, rows), [r for _, r in head]
  start = sample[0] if sample else {}
  kind_of_set = formats.FORMATS.get(format) or formats.detect(start)
  if missing := kind_of_set.missing(start):
    raise ValueError(
        f'{path}: not {kind_of_set.about}: no field'
        f' {" or ".join(map(repr, missing[0].split("|")))} among'
        f' {fields_lib.listed([*start])}.'
    )
  if (convert := kind_of_set.convert) is not None:
    return f'{kind_of_set.about}, {kind}', (
        (f'{place}{where}', question)
        for place, record in rows
        for where, question in convert(record)
    )
  found = _Records(rows, kind, kind_of_set, given, path)
  found.learn(sample)
  if 'question' not in found.names:
    raise ValueError(
        f'{first[0]}: no field for the question among'
        f' {fields_lib.listed(list(found.seen))}. Name it:'
        ' --fields=question:NAME.'
    )
  return found, found


@dataclasses.dataclass(eq=False)
class _Records:
  """Records of a file, with the names of `questions.parse`.

  names: path of each field; records with new fields add to them.
  seen: all fields of the records.
  """

  rows: Rows
  kind: str
  format: formats.Format
  given: Mapping[str, str]
  path: pathlib.Path | str
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  seen: dict[str, None] = dataclasses.field(default_factory=dict)

  def learn(self, records: Sequence[Record]) -> None:
    """Chooses the fields that are not chosen yet."""
    self.seen |= dict.fromkeys(name for record in records for name in record)
    wanted = [
        field
        for field in formats.NAMES
        if field not in self.names
        and not (field == 'match' and self.format.match)
    ]
    of_format = fields_lib.parse(self.format.fields, formats.NAMES)
    paths = {**of_format, **self.given}
    for field in [field for field in wanted if '.' in paths.get(field, '')]:
      wanted.remove(field)
      path = paths[field]
      names = path.split('.')
      if any(formats.values_at(record, names, True) for record in records):
        self.names[field] = path
    given = {
        field: path
        for field, path in paths.items()
        if field in wanted and (field in self.given or path in self.seen)
    }
    self.names |= fields_lib.choose(
        wanted, records, given, str(self.path), usual=formats.NAMES
    ).taken

  def __iter__(self) -> Iterator[tuple[str, Record]]:
    for place, record in self.rows:
      if not record.keys() <= self.seen.keys():
        self.learn([record])
      yield from formats.with_fields(
          [(place, record)], self.names, self.format.match
      )

  def __str__(self) -> str:
    tops = {
        one
        for name in self.names.values()
        for one in name.split('.')[0].split('|')
    }
    chosen = fields_lib.Fields(
        self.names, tuple(name for name in self.seen if name not in tops)
    )
    return f'{self.format.about}, {self.kind}; {chosen}'


def _table(
    path: pathlib.Path, format: str | None, given: Mapping[str, str]
) -> tables.Table:
  """Opens a file; a header is a row that names a question."""
  if format is None and tables.recognise(path) == 'csv':
    table = tables.open_table(path, 'csv', given)
    tabs = [any('\t' in str(v) for v in row.values()) for row in table.sample]
    # The files .qa.csv of DPR are divided by tabs; there are commas in them.
    if table.delimiter != '\t' and tabs and all(tabs):
      format = 'tsv'
  table = tables.open_table(path, format, given)
  usual = ' '.join(formats.NAMES['question']).split()
  names = [fields_lib.normal(name) for name in table.columns or ()]
  if table.header and not given and not {*names} & {*usual}:
    table = dataclasses.replace(
        table, header=False, columns=tuple(map(str, range(1, len(names) + 1))),
        quoted=table.quoted and table.format == 'csv',
    )
  if tables.suffix(path) == '.csv' and table.delimiter == '\t':
    table = dataclasses.replace(table, quoted=True)
  return table


def _nested(rows: Rows, key: str) -> Iterator[tuple[str, Record]]:
  """Yields the records of a list in a document."""
  for place, document in rows:
    values = document.get(key)
    if not isinstance(values, list):
      raise ValueError(
          f'{place}: "{key}" is {str(values)[:80]!r}; expected is a list of'
          ' records.'
      )
    for number, record in enumerate(values, 1):
      where = f'{place}, {key} {number}'
      if not isinstance(record, dict):
        raise ValueError(f'{where}: {str(record)[:80]!r} is not an object.')
      yield where, record


def _from_hf(
    name: str, format: str, given: Mapping[str, str]
) -> tuple[object, Rows]:
  """Reads a dataset of the Hugging Face hub, or its folder."""
  dataset = extension.dataset(name)
  rows = ((f'{name}, record {i}', row) for i, row in enumerate(dataset, 1))
  sample = [*itertools.islice(dataset, _SAMPLE)]
  return _recognised(rows, sample, 'Hugging Face', name, format, given)


def _from_ir(
    name: str, with_qrels: bool
) -> tuple[str, Rows, qrels_lib.Qrels | None]:
  """Reads the queries and qrels of a data set of ir_datasets."""
  dataset = extension.ir_dataset(name)
  if not dataset.has_queries():
    raise ValueError(
        f'{name} has no queries; those of its parts have, such as {name}/test.'
    )

  def rows() -> Iterator[tuple[str, Record]]:
    for query in dataset.queries_iter():
      text = getattr(query, 'text', None) or query.default_text()
      found = {'id': query.query_id, 'question': text}
      yield f'{name}, query {query.query_id}', found

  judged: qrels_lib.Qrels | None = None
  if with_qrels and dataset.has_qrels():
    judged = {}
    for line in dataset.qrels_iter():
      judged.setdefault(line.query_id, {})[line.doc_id] = line.relevance
  return 'ir_datasets', rows(), judged


def _from_tfds(name: str) -> Iterator[tuple[str, Record]]:
  """Reads a TFDS dataset of {question, answer or answers}, or its folder.

  TriviaQA and SQuAD have answers of a form of their own.
  """
  import tensorflow_datasets as tfds  # Imported late: it takes seconds.

  _, _, rest = name.partition(':')
  dataset, _, split = rest.rpartition(':')
  if not dataset:
    dataset, split = rest, 'train'
  if os.path.isdir(dataset):
    builder = tfds.builder_from_directory(dataset)
  else:
    builder = tfds.builder(dataset, file_format='array_record')
    builder.download_and_prepare()
  if split not in builder.info.splits:
    raise ValueError(
        f'{name}: no split {split!r}; it has {", ".join(builder.info.splits)}.'
    )
  for number, example in enumerate(builder.as_data_source(split=split), 1):
    answers = example.get('answers', example.get('answer'))
    if isinstance(answers, dict) and 'value' in answers:  # TriviaQA.
      answers = [answers['value'], *answers['aliases']]
    elif isinstance(answers, dict):  # SQuAD.
      answers = answers.get('text', ())
    texts = [_text(answer) for answer in (() if answers is None else answers)]
    # Test sets, and unanswerable questions of SQuAD 2.0, have no answers.
    if any(texts):
      yield f'{name}, record {number}', {
          'question': _text(example['question']),
          'answers': list(dict.fromkeys(text for text in texts if text)),
          'title': _text(example.get('title')) or None,
      }


def _text(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode()
  return '' if value is None else str(value)
