"""Formats of corpora: recognised by content, or refused in one line."""

import collections
import gzip
import logging
import pathlib
import re
import types

import helpers
import pytest

from realm_jax.cli import commands
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import datasets
from realm_jax.prepare import prepare
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import sources

_PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'corpora.md'
_ROW = re.compile(r'^\| [^|]+ \| `([^`|]+)` \| (.*) \|$', re.MULTILINE)


def _records(*names, skip_bad=False, **options):
  opened = sources.find([*map(str, names)], **options)
  found = records_lib.Records(opened, skip_bad)
  checked = list(found.check())
  found.report()
  assert list(found) == checked
  return checked


def _ids(*names, **options):
  return [record.id for record in _records(*names, **options)]


def _write(path, *items):
  """Writes JSON Lines, or one text as it is."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if items and isinstance(items[0], str):
    path.write_text(items[0], encoding='utf-8')
  else:
    helpers.write_records(path, items)
  return path


_EXAMPLES = dict(_ROW.findall(_PAGE.read_text(encoding='utf-8')))


def test_the_page_has_an_example_of_each_format():
  assert len(_EXAMPLES) >= 18


@pytest.mark.parametrize('name', _EXAMPLES)
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_the_examples_of_the_page_are_read(tmp_path, name, pack):
  path, content = tmp_path / name, _EXAMPLES[name]
  if name.endswith('.xml'):
    pytest.importorskip('mwparserfromhell')
    pytest.importorskip('mwxml')
  if name.endswith('.parquet'):
    pyarrow = pytest.importorskip('pyarrow')
    parquet = pytest.importorskip('pyarrow.parquet')
    names = re.findall('`(.*?)`', content)
    values = [[4], ['Rome'], ['A town.']]
    parquet.write_table(pyarrow.table(values, names=names), path)
    data = path.read_bytes()
  else:
    content = content.strip('`')
    if not content.startswith('{'):
      content = content.replace('\\t', '\t').replace('\\n', '\n')
    data = content.encode()
  # The file may be compressed without an ending that says so.
  path.write_bytes(pack(data))
  (record,) = _records(path)
  text = record.text
  if record.markup:
    text = datasets.plain_text(text, record.markup)
  assert text.strip() == 'A town.'
  untitled = name in ('collection.tsv', 'msmarco_passage_00')
  assert record.title == ('' if untitled else 'Rome')
  other = {'Rome.txt': 'Rome.txt', 'docs-0.jsonl': '4#0'}
  assert record.id == other.get(name, '4')


_WIKI = {
    'url': 'https://xx.wikipedia.org/wiki?curid=1',
    'title': 'Pins &amp; Needles',
    'text': 'if 3 &lt; 4 &amp;amp; so on',
}


def test_json_of_wikiextractor_is_known_by_its_urls(tmp_path):
  path = _write(tmp_path / 'all.jsonl', {'id': '1', **_WIKI})
  (record,) = _records(path)
  assert record.title == 'Pins & Needles'
  assert record.text == 'if 3 < 4 &amp; so on'
  # Other JSON has its text as it is.
  other = {**_WIKI, 'url': 'https://xx.wikipedia.org/wiki/Pins'}
  (record,) = _records(_write(tmp_path / 'own.jsonl', {'id': '1', **other}))
  assert record.text == _WIKI['text']


@pytest.mark.parametrize(
    ('name', 'data', 'fields'),
    [
        ('pandas.csv', ',id,title,text\n0,4,Rome,A town.\n', None),
        ('pipes.csv', 'id|title|text\n4|Rome|A town.\n', None),
        ('a.jsonl', '{"id": 4.0, "title": "Rome", "text": "A town."}', None),
        ('a.csv', 'ref,title,a.b\n4,Rome,A town.\n', 'id:ref,text:a.b'),
        (
            'a.jsonl',
            '{"m": {"id": 4, "name": "Rome"}, "parts": [{"text": "A town."}]}',
            'id:m.id,title:m.name,text:parts.text',
        ),
        (
            'joined.jsonl', '{"text": NaN, "id": 0}\n'
            '\ufeff{"id": 4, "title": "Rome", "text": "A town."}', None,
        ),
    ],
)
@pytest.mark.parametrize(
    ('ending', 'pack'), [('', bytes), ('.gz', bytes), ('.zst', gzip.compress)]
)
def test_files_as_tools_and_browsers_leave_them(
    tmp_path, name, data, fields, ending, pack
):
  path = tmp_path / f'{name}{ending}'
  path.write_bytes(pack(data.encode()))
  (record,) = _records(path, fields=fields)
  assert (record.id, record.title, record.text) == ('4', 'Rome', 'A town.')


def test_parts_of_columns(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  path = tmp_path / 'a.parquet'
  rows = [
      {'id': i, 'a.b': 7, 'doc': {'title': 1984, 'text': {'body': ['x', 'y']}}}
      for i in (3.0, float('nan'))
  ]
  parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), path)
  fields = 'title:doc.title,text:doc.text.body'
  (record,) = _records(path, fields=fields)
  assert (record.id, record.title, record.text) == ('3', '1984', 'x\ny')
  assert _ids(path, fields=f'id:a.b,{fields}') == ['7']
  # One without an id among others is not numbered: its number may be an id.
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)
  with pytest.raises(ValueError, match='record 2: .*`id` is empty; --fields'):
    _records(path, fields=fields)
  assert _ids(path, fields=f'id:,{fields}') == ['0', '1']


def test_what_is_recognised_is_logged(tmp_path, caplog):
  caplog.set_level(logging.INFO)
  for name in 'ab':
    _write(
        tmp_path / 'in' / f'{name}.jsonl',
        {'_id': name, 'contents': f'Of {name}', 'url': 'u'},
    )
  _records(tmp_path / 'in')
  (line,) = caplog.messages
  assert line == (
      f'{tmp_path}/in/a.jsonl and 1 more: JSON Lines; fields taken: id from'
      ' `_id`, text from `contents`; ignored: url; 2 records.'
  )


@pytest.mark.parametrize(
    ('record', 'message', 'mend'),
    [
        ({'id': 1, '_id': 'b', 'text': 'x'}, 'the id is amb', 'id:_id'),
        ({'docid': 1, 'id': 'b', 'text': 'x'}, 'id` and `docid', 'id:docid'),
        ({'text': 'x y', 'body': 'z'}, 'the text is ambig', 'text:body'),
        ({'lead': 'x y'}, 'no field `text`; .*lead.*--fields', 'text:lead'),
        ({'text': 'x', 'split': 'test'}, 'split: ignores', 'split:'),
    ],
)
def test_ambiguous_fields_are_stated(tmp_path, record, message, mend):
  path = _write(tmp_path / 'in.jsonl', record)
  with pytest.raises(ValueError, match=message):
    _records(path)
  (found,) = _records(path, fields=mend)
  field, _, name = mend.partition(':')
  if name:
    assert getattr(found, field) == str(record[name])


def test_fields_that_cannot_be_are_refused(tmp_path):
  path = _write(tmp_path / 'in.jsonl', {'id': 1, 'text': 'x'})
  for fields, message in (
      ('text:lead', "in.jsonl: no field 'lead'.*fields are id, text"),
      ('body:lead', "no field 'body'; the fields are id, title"),
      ('text', "'text' is not of the form FIELD:NAME"),
      ('text:id,text:text', 'names a field twice'),
  ):
    with pytest.raises(ValueError, match=message):
      _records(path, fields=fields)
  page = _write(tmp_path / 'Rome.txt', 'A town.')
  with pytest.raises(ValueError, match='which has no fields'):
    _records(page, fields='text:lead')
  with pytest.raises(ValueError, match='--format=xls: must be one of jsonl'):
    _records(page, format='xls')


def test_records_from_python_have_usual_names_too(tmp_path, monkeypatch):
  name = f'records_{tmp_path.name}'
  (tmp_path / f'{name}.py').write_text(
      "def two():\n  yield {'_id': 'a', 'lead': 'x', 'body': 'y'}\n"
      "  yield {'_id': 'b', 'lead': 'z', 'body': 'w'}\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  assert [(r.id, r.text) for r in _records(f'{name}:two')] == [
      ('a', 'y'), ('b', 'w')
  ]
  found = _records(f'{name}:two', fields='text:lead')
  assert [record.text for record in found] == ['x', 'z']


def test_fields_may_come_late_and_have_no_title(tmp_path):
  items = [{'text': f'x {i}'} for i in range(150)]
  late = {'text': 'y', 'id': 'z', 'title': 'T', 'split': 'validation'}
  *_, last = _records(_write(tmp_path / 'in.jsonl', *items, late))
  assert (last.id, last.title, last.validation) == ('z', 'T', True)
  *_, last = _records(tmp_path / 'in.jsonl', fields='title:')
  assert (last.id, last.title) == ('z', '')


def test_contents_have_a_title_only_where_all_have_a_first_line(tmp_path):
  titled = {'id': 'a', 'contents': 'Rome\nA town.'}
  path = _write(tmp_path / 'in.jsonl', titled, {'id': 'b', 'contents': 'Up\n'})
  (record,) = _records(path)  # The other one is only a title.
  assert (record.title, record.text) == ('Rome', 'A town.')
  _write(path, titled, {'id': 'b', 'contents': 'A river.'})
  assert [record.title for record in _records(path)] == ['', '']
  _write(path, titled)
  (record,) = _records(path, fields='title:')
  assert (record.title, record.text) == ('', titled['contents'])


def test_paragraphs_of_kilt(tmp_path):
  text = ['Rome\n', 'A town.\n', 'Section::::Past.:Kings.\n', 'BULLET::::- Ann']
  path = _write(tmp_path / 'in.json', {'wikipedia_title': 'Rome', 'text': text})
  (record,) = _records(path)
  assert record.text == 'A town.\nKings\nAnn'
  _write(path, {'text': ['a', 3]})
  with pytest.raises(ValueError, match='in.json:1: the field `text` is'):
    _records(path)


def test_records_without_text_are_counted_and_passed_over(tmp_path, caplog):
  path = _write(
      tmp_path / 'in.jsonl',
      {'id': 'a', 'text': 'x'}, {'id': 'b', 'title': 'B', 'text': ' '},
      {'id': 'c', 'text': None}, {'id': 'd', 'text': 'y'},
  )
  assert _ids(path) == ['a', 'd']
  assert '2 records have no text' in caplog.text
  assert 'in.jsonl:2.' in caplog.text
  with pytest.raises(ValueError, match='no usable record.*: 1 have no text'):
    _records(_write(path, {'text': ''}))


def test_a_document_twice_is_a_warning(tmp_path, caplog):
  same = {'title': 'T', 'text': 'x'}
  path = _write(
      tmp_path / 'in.jsonl',
      {'id': 1, **same}, {'id': 2, 'text': 'x'}, {'id': 3, **same},
      {'id': 4, **same},
  )
  assert len(_ids(path)) == 4
  (line,) = caplog.messages
  assert line.startswith('2 records have title and text of an earlier one')
  assert 'in.jsonl:3, those of record 1' in line


def test_empty_lines_are_no_records(tmp_path):
  path = _write(tmp_path / 'in.jsonl', '\n{"text": "a"}\n \n\n{"text": 1}\n\n')
  with pytest.raises(ValueError, match='in.jsonl:5: '):
    _records(path)
  assert _ids(path, skip_bad=True) == ['0']


def test_files_that_are_not_read_are_named(tmp_path, caplog):
  folder = tmp_path / 'in'
  _write(folder / 'Rome.TXT', 'A town.')
  _write(folder / 'b' / 'Lille.md', '# Lille\nA city.')
  _write(folder / 'Notice.txt', 'A sheet.')
  _write(folder / 'readme.md', 'About these.')
  _write(folder / 'License.txt', 'You may.')
  _write(folder / 'look.ipynb', '{"cells": []}')
  _write(folder / 'plot.py', 'print()')
  (folder / 'b' / 'x.zip').write_bytes(b'PK\x03\x04')
  for hidden in ('.git/a.txt', '.a.txt', 'b/.ipynb_checkpoints/Lille.md'):
    _write(folder / hidden, 'Hidden.')
  found = {r.id: (r.title, r.text) for r in _records(folder)}
  assert found == {
      'Notice.txt': ('Notice', 'A sheet.'),
      'Rome.TXT': ('Rome', 'A town.'),
      'b/Lille.md': ('Lille', 'A city.'),
  }
  assert f'{folder}: 3 files are not read (notes): License.t' in caplog.text
  assert '2 files are not read (unknown format): b/x.zip, plot' in caplog.text
  assert 'Hidden' not in caplog.text and '.git' not in caplog.text
  # Next to records, texts are passed over, and named.
  caplog.clear()
  _write(folder / 'part-0', {'id': 'r', 'text': 'x'})
  assert _ids(folder) == ['r']
  assert 'text next to files of records): Notice.txt, Rome.TXT' in caplog.text


@pytest.mark.parametrize('corpus', ['corpus.jsonl', 'corpus/part-0.jsonl'])
@pytest.mark.parametrize('pattern', ['', '**/*.jsonl'])
def test_only_the_corpus_of_a_data_set_is_read(
    tmp_path, caplog, corpus, pattern
):
  for name in ('one', 'two'):
    folder = tmp_path / 'sets' / name
    _write(folder / corpus, {'_id': name, 'title': '', 'text': f'In {name}.'})
    _write(folder / 'queries.jsonl', {'_id': 'q', 'text': 'where?'})
    _write(folder / 'qrels' / 'test.tsv', 'query-id\tcorpus-id\tscore\n')
  assert _ids(tmp_path / 'sets' / pattern) == ['one', 'two']
  assert 'one/queries.jsonl' in caplog.text
  # Queries alone are no corpus; a file that is named is read.
  (tmp_path / 'sets' / 'one' / corpus).unlink()
  if '/' in corpus:
    (tmp_path / 'sets' / 'one' / 'corpus').rmdir()
  with pytest.raises(FileNotFoundError, match='no file to read'):
    _records(tmp_path / 'sets' / 'one')
  assert _ids(tmp_path / 'sets' / 'one' / 'queries.jsonl') == ['q']


@pytest.mark.parametrize(
    ('name', 'data', 'message'),
    [
        ('a.txt', 'a\tb\nc\td\n', 'a table of 2 columns.*--format=tsv'),
        ('a.txt', 'id,text\n1,a\n', 'a table of 2 columns.*--format=csv'),
        ('a.txt', 'a\x00b', 'not a text'),
        ('a.tsv', 'u\tv\nw\tx y\n1\t2\n3\t4', None),
        ('a.tsv', '1\tx\tT\n2\ty\tU', r"row is \['1', 'x', 'T'\].*--fields"),
        ('a.csv', 'ref,lead\n1,x', "'ref'.*id:1,text:2, .*id:ref,text:lead"),
        ('a.csv', 'id,text\n1,"x\n2,y', 'a.csv:2: misplaced quotes'),
        ('a.csv', 'id,text\n1,x,y\n', 'a.csv:2: 3 columns; expected are 2'),
        ('a.csv', 'id,text\r1,x\r', 'a carriage return alone'),
        ('a.csv', 'id,text,text\n1,x,y\n', "csv:1: two columns are 'text'"),
        ('a.json', '{"a": {"text": "x"}, "b": {}}', 'json:1: .*to_entries'),
        ('a.json', '{"text": {"body": "x"}}', 'of it, such as text.body'),
        ('a.json', '{"text": "x", "id": 0.5}', '`id` is of type float'),
        ('a.lz4', '\x04"M\x18', 'compressed by lz4'),
        ('a.xml', '<?xml version="1.0"?><rss/>', 'XML, but no dump of MediaW'),
        ('a.json', '{"data": [{"text": "x"}]}', r"json:1: .*'.data\[\]' FILE"),
        ('a.json', '[{"text": "x"}\n{"text": "y"}]', 'a.json:2: .* comma'),
        ('a.json', '[\n{"text": "x"', 'a.json:2: malformed JSON'),
        ('a.json', '[3]', 'a.json:1: a JSON int'),
        ('a.jsonl', 'version https://git-lfs.github.com/spec/v1', 'Git LFS'),
        ('a.jsonl', '<!DOCTYPE html><html>', 'a web page'),
        ('a.parquet', 'PAR1', 'a damaged Parquet file'),
        ('a.parquet', 'id', 'not a Parquet file'),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(
    tmp_path, name, data, message
):
  path = _write(tmp_path / name, data)
  if message is None:  # Two columns without known names are id and text.
    assert _ids(path) == ['u', 'w', '1', '3']
    return
  with pytest.raises(ValueError, match=message) as error:
    _records(path)
  assert '\n' not in str(error.value)


def test_a_format_may_be_stated(tmp_path):
  path = _write(tmp_path / 'a.txt', 'a\tb c\nd\te "f\n')
  assert _ids(path, format='tsv') == ['a', 'd']
  (record,) = _records(path, format='text')
  assert record.text == 'a\tb c\nd\te "f\n'
  quoted = _write(tmp_path / 'a.tsv', 'id\ttext\n1\t"a"\n2\t"b"\n')
  assert [r.text for r in _records(quoted)] == ['a', 'b']
  plain = _records(quoted, format='tsv-plain')
  assert [r.text for r in plain] == ['"a"', '"b"']


def _link_free(text, *names):
  pytest.importorskip('mwparserfromhell')
  return datasets.plain_text(text, f'wikitext:{"|".join(names)}')


@pytest.mark.parametrize(
    'link',
    [
        '[[Fichier:Pont.jpg|vignette|Un [[pont]] de {{nb|3}}]]',
        '[[fichier : Pont.jpg]]',
        '[[Image:Pont]]',
        '[[Catégorie:Pont]]',
        '[[Category:Pont| ]]',
        '[[Bild:Pont neuf.PNG|mini|hochkant|Une vue]]',  # Not declared.
        '{{Infobox|image=[[Fichier:Pont.jpg]]}}',
        '<gallery>\nFichier:Pont.jpg|Une vue\n</gallery>',
        '<imagemap>\nFichier:Pont.jpg|thumb\nrect 0 0 [[a]]\n</imagemap>',
        '[[de:Brücke]][[simple:Bridge]][[be-x-old:Мост]]',
    ],
)
def test_links_to_files_and_categories_are_no_text(link):
  text = _link_free(f'Le pont{link}.', 'Fichier', 'Catégorie')
  assert text == 'Le pont.'


def test_other_links_are_text():
  text = 'Le [[Pont|pont]] de [[:Catégorie:Rome]], [[Film: un essai]].'
  assert _link_free(text, 'Catégorie') == (
      'Le pont de Catégorie:Rome, Film: un essai.'
  )


_DUMP = """<!-- x --><mediawiki xml:lang="fr"><siteinfo><dbname>frwiki</dbname>
<namespaces><namespace key="-2">Média</namespace><namespace key="0" />
<namespace key="6">Fichier</namespace><namespace key="14">Catégorie</namespace>
</namespaces></siteinfo><page><title>Pont</title><ns>0</ns><id>3</id><revision>
<id>1</id><text>Un pont. [[Fichier:P|vignette|Un]][[Catégorie:P]]</text>
</revision></page><page><title>Passerelle</title><ns>0</ns><id>4</id><revision>
<id>2</id><text>#REDIRECTION [[Pont]]</text></revision></page></mediawiki>"""


@pytest.mark.parametrize(
    ('text', 'plain'),
    [
        ('住在-{zh-hans:意大利; zh-hant:義大利}-。', '住在意大利。'),
        ('住在-{意大利}--{H|zh-cn:x;zh-tw:y}-。', '住在意大利。'),
        ('Un<br />[http://x a<br>b]<p>et</p>c.', 'Un\na\nb\net\nc.'),
        ('__NOTOC__Un __init__.__TOC_NON__', 'Un __init__.'),
    ],
)
def test_marks_for_readers_of_the_wiki_are_no_text(text, plain):
  assert _link_free(text) == plain


def test_a_dump_declares_its_namespaces(tmp_path, caplog):
  pytest.importorskip('mwxml')
  caplog.set_level(logging.INFO)
  path = _write(tmp_path / 'frwiki.xml-p1p2', _DUMP)  # Known by its content.
  (record,) = _records(path)
  assert _link_free(record.text, record.markup.partition(':')[2]) == 'Un pont.'
  assert 'links to média, fichier, catégorie; 1 records' in caplog.text


def test_documents_of_ir_datasets(monkeypatch):
  document = collections.namedtuple('Doc', 'doc_id url title body')
  dataset = types.SimpleNamespace(
      has_docs=lambda: True,
      docs_cls=lambda: document,
      docs_iter=lambda: iter([document('D7', 'u', 'Rome', 'A town.')]),
  )
  queries = types.SimpleNamespace(has_docs=lambda: False)
  library = types.ModuleType('ir_datasets')
  library.load = {'some/set': dataset, 'some/queries': queries}.__getitem__
  monkeypatch.setitem(__import__('sys').modules, 'ir_datasets', library)
  (record,) = _records('ir:some/set')
  assert (record.id, record.title, record.text) == ('D7', 'Rome', 'A town.')
  with pytest.raises(FileNotFoundError, match='ir:no: ir_datasets knows no'):
    _records('ir:no')
  with pytest.raises(ValueError, match='ir:some/queries: .* no documents'):
    _records('ir:some/queries')
  monkeypatch.setitem(__import__('sys').modules, 'ir_datasets', None)
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[ir\]'"):
    _records('ir:some/set')


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('ids.txt', 'a\n\nb c\n7'),
        ('ids.json', '[{"_id": "a"}, {"_id": "b c"},\n{"_id": 7}]'),
        ('ids.jsonl', '{"docid": "a"}\n{"docid": "b c"}\n{"docid": 7}\n'),
        ('ids.csv', 'pid\na\nb c\n7\n'),
        ('ids.tsv', 'a\nb c\n7\n'),
    ],
)
def test_ids_to_delete(tmp_path, name, content):
  path = _write(tmp_path / name, content)
  assert records_lib.read_ids(path) == ['a', 'b c', '7']


def test_prepare_takes_format_and_fields(tmp_path):
  path = _write(
      tmp_path / 'in.txt',
      'nr\tlead\n' + ''.join(
          f'{i}\tIn {1900 + i} Ann{i} came to Rome with Paul.\n'
          for i in range(40, 50)
      ),
  )
  options = {'format': 'tsv', 'fields': 'id:nr,text:lead', 'vocab_size': 300}
  prepare.prepare(
      [str(path)], tmp_path / 'c', workers=1, progress=False, **options
  )
  made = corpus_lib.Corpus.open(tmp_path / 'c')
  assert [made.passage_text(row)['id'] for row in (0, 9)] == ['40', '49']
  for command in ('prepare', 'index add', 'index update'):
    flags = {flag.name for flag in commands.COMMANDS[command].flags}
    assert flags >= {'format', 'fields'}
