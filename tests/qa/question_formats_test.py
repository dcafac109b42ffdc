"""Question sets as data sets publish them: recognised, refused, logged."""

import bz2
import gzip
import json
import logging
import lzma
import pathlib
import re
import sys
import types

from backports import zstd
import pytest

from realm_jax.qa import answers
from realm_jax.qa import qrels
from realm_jax.qa import question_sets
from realm_jax.qa import questions

Q = questions.Question


def _write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text.encode())
  return path


def _read(folder, name, text, *arguments, **options):
  return question_sets.read(_write(folder / name, text), *arguments, **options)


# The name of a file, its content, and the questions in it. docs/
# question_answering.md has a line for each format.
_DPR = {
    'dataset': 'nq',
    'question': 'who founded it',
    'answers': ['Ada', 'Ada L.'],
    'positive_ctxs': [
        {'title': 'T', 'text': 'x', 'passage_id': '17'},
        {'title': 'T', 'text': 'y', 'psg_id': 18},
        {'title': 'T', 'text': 'z'},
    ],
    'hard_negative_ctxs': [{'passage_id': '3'}],
}
_TEVATRON = {
    'query_id': 9,
    'query': 'who founded it',
    'positive_passages': [{'docid': '5#1', 'title': '', 'text': 'x'}],
    'negative_passages': [{'docid': '6#1', 'title': '', 'text': 'x'}],
}
_KILT = {
    'id': 'k1',
    'input': 'who founded it',
    'output': [
        {'answer': 'Ada', 'provenance': [{'wikipedia_id': '12'}]},
        {'answer': 'Lovelace'},
        {'provenance': [{'wikipedia_id': '13', 'title': 'T'}]},
    ],
}
_HF_SQUAD = {
    'id': 'h', 'title': 'T', 'context': 'x', 'question': 'who',
    'answers': {'text': ['Ada', 'Ada'], 'answer_start': [1, 5]},
}
_POPQA = (
    'id\tsubj\tquestion\tpossible_answers\n'
    '4\tX\tWhat is "X"?\t["a", "b \\"c\\""]\n5\tY\tWhat is Y?\t["d"]\n'
)
_FORMATS = {
    'nq-dev.json': (
        json.dumps([_DPR], indent=1),
        [Q('who founded it', ('Ada', 'Ada L.'), passage_id=('17', '18'))],
    ),
    'nq.qa.csv': (
        "who is x, y\t['a, b', \"it's\"]\nand z\t['c', 'd']\n",
        [Q('who is x, y', ('a, b', "it's")), Q('and z', ('c', 'd'))],
    ),
    'quoted.qa.csv': (
        'who is x\t"[\'a ""b""\']"\nand z\t[\'c\']\n',
        [Q('who is x', ('a "b"',)), Q('and z', ('c',))],
    ),
    'tevatron.jsonl': (
        json.dumps(_TEVATRON),
        [Q('who founded it', (), passage_id='5#1', id='9')],
    ),
    'with-answers.jsonl': (
        json.dumps({**_TEVATRON, 'answers': ['Ada']}),
        [Q('who founded it', ('Ada',), passage_id='5#1', id='9')],
    ),
    'kilt.jsonl': (
        json.dumps(_KILT),
        [
            Q(
                'who founded it', ('Ada', 'Lovelace'),
                passage_id=('12', '13'), id='k1', title='T',
            )
        ],
    ),
    'popqa.tsv': (
        _POPQA,
        [
            Q('What is "X"?', ('a', 'b "c"'), id='4'),
            Q('What is Y?', ('d',), id='5'),
        ],
    ),
    'squad.jsonl': (
        json.dumps(_HF_SQUAD), [Q('who', ('Ada',), id='h', title='T')],
    ),
    'hf.json': (
        json.dumps({'data': [{'question': 'who', 'answer': ['Ada']}]}),
        [Q('who', ('Ada',))],
    ),
    'queries.dev.tsv': (
        '1048585\twhat is paula deen\'s brother\n2\t"androgen" receptor\n',
        [
            Q("what is paula deen's brother", (), id='1048585'),
            Q('"androgen" receptor', (), id='2'),
        ],
    ),
    'beir.jsonl': (
        '{"_id": "q1", "text": "who", "metadata": {}}\n'
        '{"_id": "q2", "text": "x", "metadata": {"answers": ["a"]}}\n',
        [Q('who', (), id='q1'), Q('x', ('a',), id='q2')],
    ),
    'mine.csv': (
        'qid,question,answers,passage_id,held_out\n'
        '1,"who, then?",Ada,7,true\n2,why,"[""a"", ""b""]",,\n',
        [
            Q('who, then?', ('Ada',), passage_id='7', held_out=True, id='1'),
            Q('why', ('a', 'b'), id='2'),
        ],
    ),
    'text.tsv': (
        'who founded it\tAda Lovelace\nwhen was it\t1843\n',
        [Q('who founded it', ('Ada Lovelace',)), Q('when was it', ('1843',))],
    ),
    'ids.tsv': (
        'a-1\twho founded it\tAda\na-2\twhen was it\t1843\n',
        [
            Q('who founded it', ('Ada',), id='a-1'),
            Q('when was it', ('1843',), id='a-2'),
        ],
    ),
    'mine-with-capitals.csv': (  # Not TriviaQA, whose answers are objects.
        'Question,Answer\nwho,Value\nwhy,b\n',
        [Q('who', ('Value',)), Q('why', ('b',))],
    ),
    'pandas.csv': (  # Columns of SQuAD, and of ids with gaps.
        'qid,question,answers,passage_id\n'
        '1,who,"{\'text\': [\'Ada\', \'A\'], \'answer_start\': [1, 2]}",\n'
        '2,why,"[1843, \'x\']","[\'7\', \'8\']"\n3,when,b,[C]\n',
        [
            Q('who', ('Ada', 'A'), id='1'),
            Q('why', ('1843', 'x'), passage_id=('7', '8'), id='2'),
            Q('when', ('b',), passage_id='[C]', id='3'),
        ],
    ),
    'gaps.jsonl': (
        '{"id": 1.0, "question": "who", "answers": NaN, "title": NaN}\n'
        '{"id": 2.0, "question": "why", "answers": ["", 2.5], "title": 84}\n',
        [Q('who', (), id='1'), Q('why', ('2.5',), id='2', title='84')],
    ),
    'hops.jsonl': (  # MuSiQue has paragraphs, too, and others `output`.
        '{"question": "who", "answer": "Ada", "paragraphs": [{"idx": 0}]}\n',
        [Q('who', ('Ada',))],
    ),
    'instructions.jsonl': (
        '{"input": "who", "output": "Ada"}\n', [Q('who', ())],
    ),
    'squad-test.json': (
        '{"data": [{"title": "T", "paragraphs": [{"qas": [{"id": 1,'
        ' "question": "who"}, {"id": 2, "question": "x", "answers": []}]}]}]}',
        [Q('who', (), passage_id='T#0', id='1', title='T')],
    ),
    'topics.tsv': (
        'q1\t白塔是谁建的？\nq2\tどこですか\n',
        [Q('白塔是谁建的？', (), id='q1'), Q('どこですか', (), id='q2')],
    ),
    'late.jsonl': (  # A field that only later records have.
        '{"question": "q"}\n' * 150 + '{"question": "q", "passage_id": 3}\n',
        [Q('q', ())] * 150 + [Q('q', (), passage_id='3')],
    ),
}


@pytest.mark.parametrize('name', _FORMATS)
def test_formats_are_recognised(tmp_path, name):
  text, expected = _FORMATS[name]
  assert _read(tmp_path, name, text) == expected


@pytest.mark.parametrize(
    'ending, compress',
    [
        ('.gz', gzip.compress),
        ('.bz2', bz2.compress),
        ('.xz', lzma.compress),
        ('.zst', zstd.compress),
    ],
)
def test_compressed_sets(tmp_path, ending, compress):
  text, expected = _FORMATS['popqa.tsv']
  path = tmp_path / f'popqa.tsv{ending}'
  path.write_bytes(compress(text.encode()))
  assert question_sets.read(path) == expected


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = [{
      'question_id': 7, 'question': 'who',
      'answer': {'value': 'Ada', 'aliases': ['Lovelace']},
  }]
  path = tmp_path / 'train-00000.parquet'
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  assert question_sets.read(path) == [Q('who', ('Ada', 'Lovelace'), id='7')]


def test_what_is_recognised_is_logged(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    _read(tmp_path, 'popqa.tsv', _POPQA)
    _read(tmp_path, 'mini.qa.csv', "who is x\t['a']\n")
    _read(tmp_path, 'trec.tsv', 'trec1\tWhen is it?\tMay|June\n')
  assert [text.partition(': ')[2] for text in caplog.messages] == [
      'PopQA, TSV; fields taken: `question`, answers from `possible_answers`,'
      ' `id`; ignored: subj. 2 questions: 2 with answers (text), 0 with gold'
      ' passages.',
      'TSV without a header, a question and a list of answers; fields taken:'
      ' question from `1`, answers from `2`. 1 questions: 1 with answers'
      ' (text), 0 with gold passages.',
      'TSV without a header, CuratedTREC; fields taken: id from `1`, question'
      ' from `2`, answers from `3`. 1 questions: 1 with answers (1 regular'
      ' expressions), 0 with gold passages.',
  ]


_PATTERNS = 'a1\tWhen is it?\tSept(ember)?\na2\tWho is it?\tAda\n'


def test_what_is_ambiguous_is_refused_and_can_be_said(tmp_path):
  with pytest.raises(ValueError, match=r"'Sept\(ember\)\?' of .*:1 ") as error:
    _read(tmp_path, 'x.tsv', _PATTERNS)
  assert '--format=curated_trec' in str(error.value)
  assert '--fields=question:2,answers:3' in str(error.value)
  first, _ = _read(tmp_path, 'x.tsv', _PATTERNS, 'curated_trec')
  assert first == Q('When is it?', ('Sept(ember)?',), 'regex', id='a1')
  first, _ = _read(
      tmp_path, 'x.tsv', _PATTERNS, fields='question:2,answers:3'
  )
  assert first == Q('When is it?', ('Sept(ember)?',))
  with pytest.raises(ValueError, match='not clear'):
    _read(tmp_path, 'y.tsv', 'one\ttwo\nthree\tfour\n')
  with pytest.raises(ValueError, match=':2: the last column is no list'):
    _read(tmp_path, 'z.tsv', "who is\t['a']\nwho was\tb\n")
  both = '{"question": "a b", "query": "c d", "answers": ["x"]}'
  with pytest.raises(ValueError, match='--fields=question:question'):
    _read(tmp_path, 'both.jsonl', both)
  (found,) = _read(tmp_path, 'both.jsonl', both, fields='question:query')
  assert found == Q('c d', ('x',))
  with pytest.raises(ValueError, match=r"no field 'nix'.*question, query"):
    _read(tmp_path, 'both.jsonl', both, fields='question:nix')
  with pytest.raises(ValueError, match='--fields=question:NAME'):
    _read(tmp_path, 'no.jsonl', '{"q": "a"}')


def test_lists_are_never_patterns(tmp_path):
  text = 'x1\twho is\t["zoo", "a|b"]\n'
  assert _read(tmp_path, 'x.tsv', text) == [
      Q('who is', ('zoo', 'a|b'), id='x1')
  ]
  # DPR has the patterns of CuratedTREC in lists.
  (found,) = _read(
      tmp_path, 'curated.csv', "when is it\t['May|June']\n", 'curated_trec'
  )
  assert found == Q('when is it', ('May|June',), 'regex')


_QUERIES = '1\twho is it\n2\twhat is it\n3\twhy is it\n'
_QRELS = {
    'trec.qrels': '1 0 d-5 2\n1 0 d6 1\n2 0 d7 0\n9 0 d8 1\n',
    'marco.tsv': '1\t0\td-5\t2\n1\t0\td6\t1\n2\t0\td7\t0\n9\t0\td8\t1\n',
    'beir.tsv': (
        'query-id\tcorpus-id\tscore\n1\td-5\t2\n1\td6\t1\n2\td7\t0\n9\td8\t1\n'
    ),
    'order.tsv': (
        'score\tcorpus-id\tquery-id\tsplit\n2\td-5\t1\ta\n1\td6\t1\ta\n'
        '0\td7\t2\ta\n1\td8\t9\ta\n'
    ),
    'pytrec_eval.json': (
        '{"1": {"d-5": 2, "d6": 1}, "2": {"d7": 0}, "9": {"d8": 1}}'
    ),
    'three.tsv': '1\td-5\t2\n1\td6\t1\n2\td7\t0\n9\td8\t1\n',
    'hf.jsonl': (
        '{"query-id": 1.0, "corpus-id": "d-5", "score": 2}\n'
        '{"query-id": 1, "corpus-id": "d6", "score": 1.0}\n'
        '{"query-id": 2, "corpus-id": "d7", "score": 0}\n'
        '{"query-id": 9, "corpus-id": "d8", "score": 1}\n'
    ),
}


@pytest.mark.parametrize('name', _QRELS)
def test_qrels_beside_queries(tmp_path, name, caplog):
  judged = _write(tmp_path / name, _QRELS[name])
  with caplog.at_level(logging.INFO):
    found = _read(tmp_path, 'queries.tsv', _QUERIES, qrels=judged)
  # Grade 0 is no gold passage; a question without any measures nothing.
  assert found == [
      Q('who is it', (), passage_id=('d-5', 'd6'), id='1', grades=(2, 1))
  ]
  assert 'qrels of 3 queries, 1 of them not among the questions; 2 ques' in (
      caplog.text
  )


def test_qrels_of_two_columns(tmp_path):
  path = _write(tmp_path / 'q', '1\td 5\n1\td6\n')
  assert qrels.read(path) == {'1': {'d 5': 1, 'd6': 1}}


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'holds no judgement'),
        ('1 0 d5 1\n1 d6 1\n', r'q:2: 3 columns; expected are 4'),
        ('1\n', r'q:1: 1 column\(s\); expected are QUERY PASSAGE'),
        ('1 0 d5 yes\n', "q:1: the grade 'yes' is no whole number"),
        ('1 0 d5 0.5\n', "q:1: the grade '0.5' is no whole"),
        ('1 0 d5 1\n1 0 d5 2\n', "q:2: .*'d5' have the grade 1 in an earlier"),
        ('1 0 d5 0\n', 'no question has answers or a passage with a grade'),
        ('7 0 d5 1\n', "such as '1', of qrels '7'"),
    ],
)
def test_wrong_qrels_are_named(tmp_path, text, message):
  path = _write(tmp_path / 'q', text)
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, 'queries.tsv', _QUERIES, qrels=path)
  with pytest.raises(ValueError, match='the questions have no ids'):
    _read(
        tmp_path, 'x.jsonl', '{"question": "a"}',
        qrels=_write(tmp_path / 'r', '1 0 d5 1\n'),
    )


def test_a_folder_of_beir(tmp_path):
  _write(tmp_path / 'corpus.jsonl', '{"_id": "d1", "text": "x"}')
  queries = '{"_id": "q1", "text": "a b"}\n{"_id": "q2", "text": "c d"}\n'
  _write(tmp_path / 'queries.jsonl', queries)
  header = 'query-id\tcorpus-id\tscore\n'
  dev = _write(tmp_path / 'qrels' / 'dev.tsv', f'{header}q2\td1\t1\n')
  expected = Q('c d', (), passage_id='d1', id='q2')
  assert question_sets.read(tmp_path) == [expected]
  train = _write(tmp_path / 'qrels' / 'train.tsv', f'{header}q1\td1\t3\n')
  with pytest.raises(ValueError, match=f'qrels of dev, train.*--qrels={dev}'):
    question_sets.read(tmp_path)
  assert question_sets.read(tmp_path, qrels=train) == [
      Q('a b', (), passage_id='d1', id='q1', grades=(3,))
  ]
  _write(tmp_path / 'qrels' / 'test.tsv', f'{header}q2\td1\t1\n')
  assert question_sets.read(tmp_path) == [expected]
  (tmp_path / 'qrels' / 'test.tsv').rename(tmp_path / 'qrels' / '._test.tsv')
  with pytest.raises(ValueError, match=f'qrels of dev, train.*--qrels={dev}'):
    question_sets.read(tmp_path)  # A hidden file is no data.
  with pytest.raises(ValueError, match='a folder without queries.jsonl'):
    question_sets.read(tmp_path / 'qrels')
  _write(tmp_path / 'queries.dev.tsv', '1\ta b\n')
  with pytest.raises(ValueError, match='files of queries, queries.dev.tsv, qu'):
    question_sets.read(tmp_path)


def test_what_cannot_be_meant_is_said(tmp_path, caplog):
  _read(tmp_path, 'a.jsonl', '{"id": 1, "question": "a"}\n' * 2)
  assert "1 ids belong to several questions, the first is '1'" in caplog.text
  for record, message in (
      ('{"question": "", "answers": ["x"]}', '"question" is ""'),
      ('{"question": "a", "passage_id": 0.5}', '"passage_id" is .0.5.'),
      ('{"question": "a", "answers": "{\'text\': array(1)}"}', 'no list of'),
  ):
    with pytest.raises(ValueError, match=message):
      _read(tmp_path, 'a.jsonl', record)


def test_sets_of_ir_datasets(monkeypatch):
  class Data:
    def has_queries(self):
      return True

    has_qrels = has_queries

    def queries_iter(self):
      yield types.SimpleNamespace(query_id='q1', text='who is it')
      yield types.SimpleNamespace(query_id='q2', default_text=lambda: 'x y')

    def qrels_iter(self):
      yield types.SimpleNamespace(query_id='q2', doc_id='d', relevance=2)

  fake = types.SimpleNamespace(load={'beir/nano/test': Data()}.__getitem__)
  monkeypatch.setitem(sys.modules, 'ir_datasets', fake)
  assert question_sets.read('ir:beir/nano/test') == [
      Q('x y', (), passage_id='d', id='q2', grades=(2,))
  ]
  with pytest.raises(FileNotFoundError, match='beir/other: ir_datasets knows'):
    question_sets.read('ir:beir/other')
  monkeypatch.setitem(sys.modules, 'ir_datasets', None)
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[ir\]'"):
    question_sets.read('ir:beir/nano/test')


def test_a_converted_set_is_the_same(tmp_path):
  for number, (name, (text, expected)) in enumerate(_FORMATS.items()):
    source = _write(tmp_path / name, text)
    folder = tmp_path / f'out{number}'
    question_sets.convert(source, folder)
    assert question_sets.read(folder / 'questions.jsonl') == expected


_DOCS = pathlib.Path(__file__).resolve().parents[2] / 'docs'


def _rows_of_docs(columns):
  text = (_DOCS / 'question_answering.md').read_text('utf-8')
  for line in text.split('## Question sets')[1].split('\n## ')[0].splitlines():
    row = [cell.strip() for cell in line.strip('|').split(' | ')]
    is_row = line.startswith('| ') and len(row) == columns
    if is_row and any('`' in cell for cell in row[1:]):
      yield row


def _unescaped(cell):
  code = re.search('`(.+?)`', cell)[1]
  return code.replace('\\t', '\t').replace('\\n', '\n')


def test_the_table_of_formats(tmp_path):
  rows = list(_rows_of_docs(5))
  assert len(rows) == 21
  for number, (name, _, file, example, read) in enumerate(rows):
    data = _unescaped(example).encode()
    path = tmp_path / str(number) / file.strip('`')
    path.parent.mkdir()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    for format in ('auto', name.strip('`')):
      (found,) = question_sets.read(path, format)
      assert found.question == 'who founded it?', name
      assert bool(found.id) == ('id' in read), name
      assert bool(found.gold) == ('gold' in read), name
      assert 'gold' not in read or list(found.gold)[0] in ('7', '7#0')
      assert ('answers' in read) == answers.exact_match(
          'Marten', found.answers, found.match
      ), name


def test_the_table_of_qrels(tmp_path):
  rows = list(_rows_of_docs(2))
  assert len(rows) == 7
  for number, (_, example) in enumerate(rows):
    path = _write(tmp_path / str(number), _unescaped(example) + '\n')
    assert qrels.read(path) == {'q1': {'7': 1}}


def test_the_table_of_rules():
  text = (_DOCS / 'question_answering.md').read_text('utf-8')
  head, *rows = [
      line.strip('| ').split(' | ')
      for line in text.split('## When a passage')[1].splitlines()
      if line.startswith(('| rule', '| `dpr`', '| `squad`'))
  ]
  for row in rows:
    rule = row[0].split()[0].strip('`')
    for cell, verdict in zip(head[2:], row[2:], strict=True):
      answer, passage = re.findall('`(.+?)`', cell)
      assert answers.has_answer(passage, [answer], rule) == (verdict == 'yes')
