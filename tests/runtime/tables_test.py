"""Tables by their content, and fields by their usual names."""

import pathlib

import pytest

from realm_jax.runtime import fields
from realm_jax.runtime import lines
from realm_jax.runtime import tables


def _table(tmp_path, name, data, **options) -> tables.Table:
  path = tmp_path / name
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return tables.open_table(path, **options)


def _read(table):
  """Returns (place, record or message) without the folder."""
  return [
      (pathlib.PurePath(place).name, str(r) if isinstance(r, ValueError) else r)
      for place, r in table
  ]


@pytest.mark.parametrize(
    ('name', 'data', 'format'),
    [
        ('a.json', '{"a": 1}\n{"a": 2}\n', 'jsonl'),
        ('a.jsonl', '[{"a": 1},\n {"a": 2}]', 'json'),
        ('a.jsonl', '{\n"a": 1\n}\n{"a": 2}', 'json'),
        ('a.jsonl', '{"a": 1\n{"a": 2}\n', 'jsonl'),
        ('a.jsonl', '{"a": "' + 'x' * 100_000 + '"}\n{"a": 2}', 'jsonl'),
        ('a.json', '{"a":\n"' + 'x' * 100_000 + '"}\n{"a": 2}', 'jsonl'),
        ('a.json', '{\n"a": "' + 'x' * 100_000 + '"}\n{"a": 2}', 'json'),
        ('a.data', '\ufeff{"a": 1}', 'jsonl'),
        ('a.txt', '[{"a": 1}]', 'json'),
        ('a.md', '[1] a reference, {x}', ''),
        ('a.txt', '{{template}}', ''),
        ('a.csv', '[1],x', 'csv'),
        ('a.json', '', 'jsonl'),
    ],
)
def test_a_format_is_recognised_by_content(tmp_path, name, data, format):
  path = tmp_path / name
  path.write_text(data, encoding='utf-8')
  assert tables.recognise(path) == format


def test_places_are_those_of_the_lines(tmp_path):
  array = _table(tmp_path, 'a.json', '[\n{"a":\n1}, 3,\n\n{"a": "é\\n"}\n]\n')
  assert _read(array) == [
      ('a.json:2', {'a': 1}),
      ('a.json:3', 'a JSON int; each record must be an object'),
      ('a.json:5', {'a': 'é\n'}),
  ]
  rows = _table(tmp_path, 'a.csv', 'id,text\n1,"x\ny"\n\n2,z\n3\n,\n')
  assert (rows.format, rows.header) == ('csv', True)
  assert _read(rows) == [
      ('a.csv:2', {'id': '1', 'text': 'x\ny'}),
      ('a.csv:5', {'id': '2', 'text': 'z'}),
      (
          'a.csv:6',
          "1 columns; expected are 2, divided by ',', which is no part of a"
          ' value without quotes',
      ),
  ]


def test_a_long_array_is_read_in_parts(tmp_path, monkeypatch):
  monkeypatch.setattr(lines, '_JSON_PART', 10)
  items = [{'a': i, 'b': ['é', {'c': 'x' * i}]} for i in range(200)]
  text = str(items).replace("'", '"').replace('}, {"a"', '},\n {"a"')
  found = _read(_table(tmp_path, 'a.json', text))
  assert [record for _, record in found] == items
  assert [place for place, _ in found] == [
      f'a.json:{i}' for i in range(1, 201)
  ]


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ('[{"a": 1},\n{"a" 2}]', "a.json:2: malformed JSON: Expecting ':'"),
        ('[{"a": 1}] x', 'a.json:1: .* text after the end'),
        ('[' * 100_000, 'nested too deeply'),
        ('[{"a": ' + '9' * 5000 + '}]', 'a.json:1: malformed JSON'),
        (b'[{"a": 1},\n{"a": "\xff"}]', 'a.json:2: not UTF-8'),
    ],
)
def test_malformed_json_ends_the_reading(tmp_path, data, message):
  with pytest.raises(ValueError, match=message):
    list(_table(tmp_path, 'a.json', data))


@pytest.mark.parametrize(
    ('name', 'data', 'texts', 'quoted'),
    [
        # As DPR writes: quotes are doubled within quotes.
        ('a.tsv', 'id\ttext\n1\t"a ""b"""\n2\tc', ['a "b"', 'c'], True),
        # As MS MARCO writes: quotes are characters.
        ('a.tsv', 'id\ttext\n1\t"a" b\n2\t"c', ['"a" b', '"c'], False),
        ('a.csv', 'id;text\n1;"a;b"\n2;c,d', ['a;b', 'c,d'], True),
        ('a.csv', 'id\ttext\n1\ta,b\n2\tc', ['a,b', 'c'], True),
        ('a.tsv', 'id\ttext\r\n1\ta\r\n2\tb\r\n', ['a', 'b'], True),
        ('a.csv', '\ufeff"id","text"\n1,a\n2,b\n', ['a', 'b'], True),
    ],
)
def test_delimiter_and_quotes_are_those_of_the_rows(
    tmp_path, name, data, texts, quoted
):
  table = _table(tmp_path, name, data)
  assert [record['text'] for _, record in table] == texts
  assert table.quoted == quoted and table.header


def test_a_table_longer_than_its_sample(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, '_SAMPLE', 5_000)
  rows = ''.join(f'{i},"a ""{i}""\nb"\n' for i in range(1000))
  table = _table(tmp_path, 'a.csv', 'id,text\n' + rows)
  assert [r['text'] for _, r in table] == [f'a "{i}"\nb' for i in range(1000)]


def test_columns_without_names(tmp_path):
  data = '7\tsome words\n8\tmore\n'
  table = _table(tmp_path, 'a.tsv', data)
  assert (table.columns, table.header) == (('1', '2'), False)
  shapes = tables.CORPUS_SHAPES
  assert _table(tmp_path, 'a.tsv', data, shapes=shapes).columns == (
      'id', 'text'
  )
  # A header of unknown names is no record, unless one of them is given.
  data = 'nr\tlead\n' + data
  assert _table(tmp_path, 'a.tsv', data, shapes=shapes).columns == ('1', '2')
  table = _table(tmp_path, 'a.tsv', data, fields={'text': 'lead'})
  assert (table.columns, table.header) == (('nr', 'lead'), True)


def test_a_line_that_is_not_utf8_is_one_bad_record(tmp_path):
  table = _table(tmp_path, 'a.tsv', b'id\ttext\n1\tx\xff\n2\ty\n')
  (_, bad), (_, good) = _read(table)
  assert 'not UTF-8: byte 3' in bad
  assert good == {'id': '2', 'text': 'y'}


@pytest.mark.parametrize(
    ('names', 'taken', 'ignored'),
    [
        ('Doc-ID Title BODY url', {'id': 'Doc-ID', 'text': 'BODY'}, ['url']),
        ('docid pid passage', {'id': 'pid', 'text': 'passage'}, ['docid']),
        ('page_id abstract text', {'id': 'page_id', 'text': 'text'},
         ['abstract']),
        ('key abstract', {'id': 'key', 'text': 'abstract'}, []),
        ('lead', {}, ['lead']),
    ],
)
def test_fields_have_usual_names(names, taken, ignored):
  record = dict.fromkeys(names.split(), 'x')
  if 'docid' in record:
    record['docid'] = 'another'
  found = fields.choose(['id', 'text', 'title'], [record])
  expected = {**taken, 'title': 'Title'} if 'Title' in record else taken
  assert dict(found.taken) == expected
  assert [*found.ignored] == ignored


def test_equal_values_are_not_ambiguous():
  same = {'_id': '7', 'id': 7, 'text': 'b', 'contents': 'a\nb'}
  found = fields.choose(['id', 'text'], [same, {**same, '_id': None}])
  assert dict(found.taken) == {'id': 'id', 'text': 'text'}
  with pytest.raises(ValueError, match='x: .*`id` and `_id`.*--fields=id:id'):
    fields.choose(['id'], [same, {'id': 8, '_id': 7}], where='x')
  # An object is no id.
  found = fields.choose(['id'], [{'_id': {'$oid': 'x'}, 'docid': 'd'}])
  assert dict(found.taken) == {'id': 'docid'}
