"""What `prepare` can read: files of many kinds, dumps, datasets by name."""

import bz2
import gzip
import json
import lzma
import pathlib
import shutil

from backports import zstd
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import datasets as datasets_lib
from realm_jax.prepare import prepare
from realm_jax.prepare import records
from realm_jax.prepare import sources

_TEXT = 'In 1990 somebody came to Rome with his old friend Paul.'


def _read(*names) -> list[records.Record]:
  source = records.Records(sources.find([str(name) for name in names]))
  checked = list(source.check())
  assert list(source) == checked  # It can be read again.
  return checked


def _prepare(source, output, **arguments) -> corpus_lib.Corpus:
  arguments = {'workers': 1, 'progress': False, 'vocab_size': 400, **arguments}
  prepare.prepare([str(source)], output, **arguments)
  return corpus_lib.Corpus.open(output)


@pytest.mark.parametrize(
    ('ending', 'pack'),
    [
        ('', bytes),
        ('.gz', gzip.compress),
        ('.xz', lzma.compress),
        ('.bz2', bz2.compress),
        ('.zst', zstd.compress),
    ],
)
def test_files_may_be_compressed(tmp_path, ending, pack):
  lines = [json.dumps({'text': f'Über {i}'}).encode() + b'\n' for i in range(3)]
  path = tmp_path / f'in.jsonl{ending}'
  # Compressed files may be concatenated; some readers stop after the first.
  path.write_bytes(pack(lines[0]) + pack(lines[1] + lines[2]))
  assert [r.text for r in _read(path)] == ['Über 0', 'Über 1', 'Über 2']


def test_a_carriage_return_ends_no_line(tmp_path):
  path = tmp_path / 'collection.tsv'
  path.write_text(''.join(f'{i}\tA \rt\rown.\n' for i in range(3)), newline='')
  assert [(r.id, r.text) for r in _read(path)] == [
      (str(i), 'A \rt\rown.') for i in range(3)
  ]


def test_a_folder_of_texts_is_an_article_a_file(tmp_path):
  for name, text in (
      ('b/Old_Rome.txt', '\ufeffOld Rome\nA town.\n'),
      ('a/Paris.txt.gz', 'Paris is a town.\nIt is old.'),
      ('.hidden.txt', 'nothing'),
  ):
    path = tmp_path / 'in' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  paris, rome = _read(tmp_path / 'in')
  assert (paris.id, paris.title) == ('a/Paris.txt.gz', 'Paris')
  assert paris.text == 'Paris is a town.\nIt is old.'
  # The first line is left out where it says the title again.
  assert (rome.id, rome.title) == ('b/Old_Rome.txt', 'Old Rome')
  assert rome.text == 'A town.\n'
  # Next to files of other kinds, a text is not an article.
  (tmp_path / 'in' / 'z.jsonl').write_text('{"text": "alone"}')
  for source in ('in', 'in/*', 'in/**/*'):
    assert [r.text for r in _read(tmp_path / source)] == ['alone'], source


def test_a_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
  (tmp_path / 'x.txt').write_bytes('one\ntwo\nthrée'.encode('latin-1'))
  with pytest.raises(ValueError, match=r'x.txt:1: not UTF-8: .*line 3.* 0xe9'):
    _read(tmp_path)


_BLOCKS = """\
<doc id="12" url="https://en.wikipedia.org/wiki?curid=12" title="A &amp; B">
A & B

A &lt;i&gt; came to Rome.
</doc>

<doc id="13" url="x" title="Say "Hi"">
Nothing much.
</doc>
"""


def test_what_wikiextractor_writes(tmp_path):
  (tmp_path / 'AA').mkdir()
  path = tmp_path / 'AA' / 'wiki_00'
  path.write_text(_BLOCKS)
  first, second = _read(tmp_path)
  assert (first.id, first.title) == ('12', 'A & B')
  assert first.text == '\nA <i> came to Rome.\n'
  assert (second.id, second.title) == ('13', 'Say "Hi"')
  path.unlink()
  path.with_suffix('.bz2').write_bytes(
      bz2.compress(b'{"id": "7", "url": "", "title": "T", "text": "x"}\n')
  )
  (only,) = _read(tmp_path)
  assert (only.id, only.title, only.text) == ('7', 'T', 'x')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (_BLOCKS + '<doc id="1" title="x">\ntext', 'wiki_00:10: .* cut off'),
        (_BLOCKS + 'stray\n', 'wiki_00:10: neither a JSON object nor <doc'),
    ],
)
def test_malformed_output_of_wikiextractor_is_named(tmp_path, text, message):
  (tmp_path / 'wiki_00').write_text(text)
  with pytest.raises(ValueError, match=message):
    _read(tmp_path)


_PAGE = """<page><title>{title}</title><ns>{ns}</ns><id>{id}</id>{redirect}
<revision><id>1</id><model>wikitext</model><format>text/x-wiki</format>
<text xml:space="preserve">{text}</text></revision></page>
"""


def _dump(*pages: dict) -> bytes:
  body = ''.join(
      _PAGE.format(**{'ns': 0, 'redirect': '', 'id': 7 + i, **page})
      for i, page in enumerate(pages)
  )
  return (
      '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" '
      'version="0.11" xml:lang="en"><siteinfo><sitename>W</sitename>'
      '<dbname>enwiki</dbname><namespaces><namespace key="0" case="first-'
      'letter" /><namespace key="1" case="first-letter">Talk</namespace>'
      f'</namespaces></siteinfo>{body}</mediawiki>'
  ).encode()


_MARKUP = """{{Infobox town|name=Rome}}
'''Rome''' ({{lang|it|Roma}}) is the [[Italy|Italian]] capital.
&lt;ref name="a"&gt;A [[book]].&lt;/ref&gt; It is ''old''.
[[File:Rome.jpg|thumb|A [[view]] of Rome]]
== History ==
* Paul came in 1990 &amp;amp; stayed.
{| class="wikitable"
| cell
|}
[[Category:Towns]]"""


def test_a_dump_of_mediawiki(tmp_path):
  pytest.importorskip('mwxml')
  pytest.importorskip('mwparserfromhell')
  path = tmp_path / 'pages.xml.bz2'
  path.write_bytes(
      bz2.compress(
          _dump(
              {'title': 'Rome', 'text': _MARKUP},
              {
                  'title': 'Roma',
                  'text': 'x',
                  'redirect': '<redirect title="Rome"/>',
              },
              {'title': 'Talk:Rome', 'ns': 1, 'text': 'Yes.'},
              {'title': 'Mercury', 'text': 'Many.\n{{Disambiguation}}'},
              {'title': 'Empty', 'text': '{{stub}}'},
          )
      )
  )
  assert [r.title for r in _read(path)] == ['Rome', 'Mercury', 'Empty']
  made = _prepare(path, tmp_path / 'out', exclude=['disambiguation'])
  counts = made.manifest['counts']
  assert counts['excluded_disambiguation'] == 1
  assert counts['records_without_wordpieces'] == 1
  assert made.passage_text(0) == {
      'id': '7',
      'title': 'Rome',
      'text': 'Rome is the Italian capital.\nIt is old.\nHistory\n'
      'Paul came in 1990 & stayed.',
  }
  assert len(made.passages) == 1
  path.write_bytes(bz2.compress(_dump({'title': 'Rome', 'text': 'x'})[:-30]))
  with pytest.raises(ValueError, match="pages.xml.bz2: damaged.*'Rome'"):
    _read(path)


def test_markup_that_is_unbalanced_is_no_error():
  pytest.importorskip('mwparserfromhell')
  for text in ('[[File:x|[[y]]', '{{a|{{b}}', '<ref>x', '{| x', "'''''", ''):
    assert isinstance(datasets_lib.plain_text(text), str)


def test_the_time_of_a_long_run_of_marks_is_linear():
  """By the square of its length, it would be minutes."""
  pytest.importorskip('mwparserfromhell')
  marks, blanks = '=' * 10**6, ' ' * 10**6
  text = f'== Life ==\n{marks}x{blanks}y\n=== A = b ===\n = c =\n'
  expected = f'Life\n{marks}x{blanks}y\nA = b\n= c ='
  assert datasets_lib.plain_text(text) == expected


def test_a_dataset_of_tfds_by_name(tmp_path, monkeypatch):
  source = tmp_path / 'in.jsonl'
  source.write_text(json.dumps({'id': 'a', 'title': 'T', 'text': _TEXT}))
  made = _prepare(source, tmp_path / 'made')
  # The passages of a corpus are a dataset of TFDS themselves.
  folder = tmp_path / 'tfds'
  shutil.copytree(made.directory / 'passages', folder / 'passages' / '1.0.0')
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  from tensorflow_datasets.core.utils import file_utils

  monkeypatch.setattr(
      file_utils, 'list_data_dirs', lambda *args, **kwargs: [folder]
  )
  for name in ('tfds:passages', 'tfds:passages:1.0.0:train'):
    (found,) = _read(name)
    assert (found.id, found.title, found.text) == ('a', 'T', _TEXT)
  again = _prepare('tfds:passages', tmp_path / 'again')
  assert again.fingerprint == made.fingerprint
  with pytest.raises(ValueError, match="no split 'test'; the splits are train"):
    _read('tfds:passages:test')
  with pytest.raises(FileNotFoundError, match='tfds build wikipedia/x.en'):
    _read('tfds:wikipedia/x.en')
  with pytest.raises(ValueError, match='not of the form tfds:NAME'):
    _read('tfds:')
  info = folder / 'passages' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record"', 'tfrecord"'))
  with pytest.raises(ValueError, match='not of array_record'):
    _read('tfds:passages')


def test_a_dataset_of_hugging_face_by_name(tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  datasets = pytest.importorskip('datasets')
  datasets.disable_progress_bars()
  monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  rows = [{'id': i, 'url': 'u', 'title': f'T{i}', 'text': 'é'} for i in (5, 3)]
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  saved = tmp_path / 'saved'
  made = datasets.Dataset.from_list(rows)
  made.save_to_disk(saved)
  splits = tmp_path / 'splits'
  datasets.DatasetDict(train=made, dev=made).save_to_disk(splits)
  with pytest.raises(ValueError, match=f'give it as hf:{splits}'):
    _read(splits)
  with pytest.raises(ValueError, match="no split 'test'"):
    _read(f'hf:{splits}::test')
  for name in (
      f'hf:{folder}', f'hf:{saved}', f'hf:{folder}:default:train',
      f'hf:{splits}', f'hf:{splits}::dev',
  ):
    assert [(r.id, r.title, r.text) for r in _read(name)] == [
        ('5', 'T5', 'é'),
        ('3', 'T3', 'é'),
    ]
  with pytest.raises(ValueError, match='Unknown split "test"'):
    _read(f'hf:{folder}::test')
  with pytest.raises(FileNotFoundError, match='hf:no/such: neither a folder'):
    _read('hf:no/such')
  with pytest.raises(ValueError, match='not of the form hf:NAME'):
    _read('hf:a:b:c:d')
  datasets.Dataset.from_list([{'lead': 'x'}]).save_to_disk(tmp_path / 'lead')
  with pytest.raises(ValueError, match='no field `text`; its fields are lead'):
    _read(f'hf:{tmp_path / "lead"}')


@pytest.mark.parametrize(
    ('module', 'name', 'extra'),
    [
        ('datasets', 'hf:somebody/something', 'hf'),
        ('mwxml', 'pages.xml', 'wiki'),
        ('rensa', '', 'dedup'),
        ('apache_beam', '', 'beam'),
    ],
)
def test_a_missing_package_is_named_with_the_command(
    tmp_path, monkeypatch, module, name, extra
):
  monkeypatch.setitem(__import__('sys').modules, module, None)
  (tmp_path / 'pages.xml').write_bytes(_dump())
  (tmp_path / 'in.jsonl').write_text('{"text": "x"}')
  options = {'rensa': {'near_duplicates': 0.8}, 'apache_beam': {'beam': []}}
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ImportError, match=rf'pip install .*\[{extra}\]'):
    _prepare(name or 'in.jsonl', tmp_path / 'out', **options.get(module, {}))


def test_an_unknown_format_says_what_is_understood(tmp_path):
  (tmp_path / 'in.rst').write_text('Rome is a town.')
  with pytest.raises(ValueError, match=r'in.rst: neither.*--format=jsonl'):
    _read(tmp_path / 'in.rst')
  with pytest.raises(FileNotFoundError, match='to read; the formats are jsonl'):
    _read(tmp_path)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'markup': 'html'}, "`markup` is 'html'; it can be 'wikitext'"),
        ({'markup': 'wikitext', 'spans': [[0, 1]]}, '`spans` are of plain'),
    ],
)
def test_wrong_markup_is_named(tmp_path, fields, message):
  path = tmp_path / 'in.jsonl'
  path.write_text(json.dumps({'text': 'x', **fields}))
  with pytest.raises(ValueError, match=message):
    _read(path)


def test_passages_and_sentences_may_come_from_different_kinds(tmp_path):
  (tmp_path / 'wiki_00').write_text(
      f'<doc id="1" title="Rome">\nRome\n{_TEXT}\n</doc>'
  )
  (tmp_path / 'news').mkdir()
  (tmp_path / 'news' / 'Paul.txt').write_text('Paul left Rome in May 1991.')
  made = _prepare(
      tmp_path / 'wiki_00',
      tmp_path / 'out',
      pretraining_sources=[str(tmp_path / 'news')],
  )
  assert len(made.passages) == 1
  assert made.passage_text(0)['text'] == _TEXT
  assert set(made.sentences) >= {'pretraining'}
  ids = made.sentences['pretraining'].ids(0)
  assert made.tokenizer.decode(ids) == 'paul left rome in may 1991.'


def _records(count: int) -> list[dict]:
  return [
      {'id': f'a{i}', 'text': f'In {1900 + i} Ann{i} came. ' * 40}
      for i in range(count)
  ]


def test_beam_gives_the_same_bytes(tmp_path, monkeypatch):
  pytest.importorskip('apache_beam', reason='needs the extra [beam]')
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 4000)
  source = tmp_path / 'in.jsonl'
  source.write_text('\n'.join(map(json.dumps, _records(30))))
  made = _prepare(source, tmp_path / 'made')
  beamed = _prepare(source, tmp_path / 'beamed', beam=['--runner=DirectRunner'])
  assert beamed.manifest == made.manifest
  assert not list(tmp_path.glob('.*'))


_ARTICLES = """
import json

class Articles:

  def __init__(self, path=None):
    self.path = path

  def __iter__(self):
    with open(self.path) as file:
      yield from map(json.loads, file)

def two():
  yield {'id': 7, 'title': 'T', 'text': 'In 1990 Paul came to Rome by train.'}
  yield {'text': 'Anna met Bert.', 'split': 'validation', 'extra': object()}

def bad():
  yield {'text': 'x'}
  yield {'title': 'y'}

def no_dicts():
  return ['x']

calls = []

def growing():
  calls.append(1)
  return [{'text': 'In 1990 somebody came to Rome with Paul.'}] * len(calls)

def number():
  return 3

def needs_two(a, b):
  return []

constant = 3
"""


@pytest.fixture(name='articles')
def _fixture_articles(tmp_path, monkeypatch):
  """A name for a module with sources of the user."""
  name = f'articles_{tmp_path.name}'
  (tmp_path / 'lib').mkdir()
  (tmp_path / 'lib' / f'{name}.py').write_text(_ARTICLES)
  monkeypatch.syspath_prepend(tmp_path / 'lib')
  return name


def test_a_python_object_gives_records(articles):
  first, second = _read(f'{articles}:two')
  assert (first.id, first.title) == ('7', 'T')
  assert first.text == 'In 1990 Paul came to Rome by train.'
  assert (second.id, second.text) == ('1', 'Anna met Bert.')
  assert second.validation


def test_a_python_object_gives_the_corpus_of_its_records(
    tmp_path, articles, monkeypatch
):
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 4000)
  source = tmp_path / 'in.jsonl'
  source.write_text('\n'.join(map(json.dumps, _records(30))))
  expected = _prepare(source, tmp_path / 'expected')
  for workers in (1, 2):
    made = _prepare(
        f'{articles}:Articles:{source}',
        tmp_path / f'made{workers}',
        workers=workers,
    )
    assert made.manifest == expected.manifest


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('no_such_module_here:Name', 'no_such_module_here.*cannot be imported'),
        ('{}:Missing', "has no 'Missing'"),
        ('{}:constant', 'constant cannot be called with .*not a callable'),
        ('{}:needs_two', 'needs_two cannot be called with .*missing'),
        ('{}:two:text', "two cannot be called with .*'text'"),
        ('{}:number', 'number gives a int; .* an iterable of records'),
        ('{}:bad', '{}:bad, record 2: no field `text`; the fields are title'),
        ('{}:no_dicts', 'no_dicts, record 1: a str; each record must'),
    ],
)
def test_a_wrong_python_object_is_named(articles, name, message):
  with pytest.raises(ValueError, match=message.format(articles)):
    _read(name.format(articles))


def test_a_python_object_must_repeat_its_records(tmp_path, articles):
  with pytest.raises(ValueError, match='1 records when checked and 2 when'):
    _prepare(f'{articles}:growing', tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_the_path_of_a_source_is_its_name(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "a"}\n{"text": 1}\n')
  (source,) = sources.find([str(path)])
  assert source.name == str(pathlib.Path(path))
  with pytest.raises(ValueError, match=f'^{path}:2: '):
    _read(path)
