"""Bad input to `prepare`: a clear error, and nothing half-written."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import signal
import subprocess
import sys
import time

from backports import zstd
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import prepare
from realm_jax.prepare import records
from realm_jax.prepare import sources

_GOOD = b'{"id": "a", "text": "In 1990 somebody came to Rome."}\n'


def _prepare(source, output, **arguments):
  arguments = {'workers': 1, 'progress': False, 'vocab_size': 400, **arguments}
  return prepare.prepare([str(source)], output, **arguments)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (b'{"text": "a"', 'malformed JSON'),
        (b'[1]\n', 'a JSON list; each line must be an object'),
        (b'"text"\n', 'a JSON str'),
        (b'[' * 100_000 + b'\n', 'nested too deeply'),
        (b'{"text": ' + b'9' * 5000 + b'}', 'malformed JSON'),
        (b'{"id": "b", "lead": "x"}\n', 'no field `text`.*id, lead.*--fields'),
        (b'{}\n', 'no field `text`; the fields are none'),
        (b'{"text": 3}\n', '`text` is of type int; it must be a string'),
        (b'{"text": "x", "title": []}\n', '`title` is of type list'),
        (b'{"text": "x", "id": true}\n', '`id` is of type bool'),
        (b'{"text": "x", "id": ""}\n', '`id` is empty'),
        (b'{"text": "x", "article": {}}\n', '`article` is of type dict'),
        (b'{"text": "x", "split": "test"}\n', "`split` is 'test'"),
        (b'{"text": "x", "spans": 3}\n', '`spans` is not a list'),
        (b'{"text": "xyz", "spans": [[0, 4]]}\n', r'`spans` has \[0, 4\]'),
        (b'{"text": "xyz", "spans": [[2, 2]]}\n', r'`spans` has \[2, 2\]'),
        (b'{"text": "xyz", "spans": [[0.0, 1]]}\n', '`spans` has'),
        (b'{"text": "x\xff"}\n', 'not UTF-8: byte 11 of the line is 0xff'),
        (b'{"text": "x \\ud800 y"}\n', 'half of a surrogate pair'),
        (b'{"id": "a", "text": "x"}\n', "'a' is already that of .*in.jsonl:1;"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, message):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD + _GOOD.replace(b'"a"', b'"c"') + line)
  output = tmp_path / 'out'
  with pytest.raises(ValueError, match=f'in.jsonl:3: .*{message}'):
    _prepare(source, output)
  assert os.listdir(tmp_path) == ['in.jsonl']
  # Or it is left out, and said so.
  manifest = _prepare(source, output, skip_bad_records=True)
  assert manifest['counts']['passages'] == 2
  assert manifest['skipped_records']['count'] == 1
  assert 'in.jsonl:3: ' in manifest['skipped_records']['first'][0]


def test_many_bad_lines_are_counted_and_the_first_are_listed(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD + b'{"text": 1}\n' * 30 + _GOOD * 30)
  manifest = _prepare(source, tmp_path / 'out', skip_bad_records=True)
  assert manifest['skipped_records']['count'] == 60
  assert len(manifest['skipped_records']['first']) == 20


def test_ids_are_unique_across_files(tmp_path, monkeypatch):
  monkeypatch.setattr(records, '_RECENT', 4)
  for name in 'xyz':
    (tmp_path / f'{name}.jsonl').write_text(
        ''.join(
            json.dumps({'id': f'{name}{i}', 'text': 'Rome is old in 1990.'})
            + '\n'
            for i in range(10)
        )
    )
  _prepare(tmp_path / '*.jsonl', tmp_path / 'out')
  with (tmp_path / 'z.jsonl').open('a') as file:
    file.write('{"id": "y2", "text": "Again."}')
  with pytest.raises(ValueError, match=r'z.jsonl:11: .*y2.*y.jsonl:3; ids'):
    _prepare(tmp_path / '*.jsonl', tmp_path / 'again')


def test_two_ids_with_one_hash_are_no_duplicates(tmp_path, monkeypatch):
  monkeypatch.setattr(records.corpus, 'id_hash', len)
  path = tmp_path / 'in.jsonl'
  path.write_bytes(_GOOD + _GOOD.replace(b'"a"', b'"b"'))
  found = records.Records(sources.find([str(path)]))
  assert [record.id for record in found.check()] == ['a', 'b']


def test_ids_made_by_packing_must_be_unique(tmp_path):
  source = tmp_path / 'in.jsonl'
  text = 'In 1990 somebody came to Rome. ' * 20
  source.write_text(
      json.dumps({'id': 'a', 'text': text})
      + '\n'
      + json.dumps({'id': 'a#1', 'text': 'Rome.'})
  )
  with pytest.raises(ValueError, match='Two passages have the same id'):
    _prepare(source, tmp_path / 'out', max_wordpieces=40)
  assert os.listdir(tmp_path) == ['in.jsonl']


def test_sources_must_exist(tmp_path):
  for name, message in (
      ('missing.jsonl', 'There is no file or folder'),
      ('*.jsonl', 'No file matches the pattern'),
      ('', 'holds no file to read'),
  ):
    with pytest.raises(FileNotFoundError, match=message):
      _prepare(tmp_path / name, tmp_path / 'out')
  with pytest.raises(FileNotFoundError, match='No source'):
    prepare.prepare([], tmp_path / 'out')
  path = tmp_path / 'in.jsonl'
  path.write_bytes(_GOOD)
  with pytest.raises(ValueError, match='in.jsonl twice'):
    prepare.prepare([str(path), str(tmp_path)], tmp_path / 'out')
  with pytest.raises(ValueError, match='list of strings'):
    prepare.prepare(str(path), tmp_path / 'out')


@pytest.mark.parametrize('data', [b'', _GOOD[:-3]])
def test_an_empty_corpus_is_refused(tmp_path, data):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(data)
  with pytest.raises(ValueError, match='no usable record in .*in.jsonl'):
    _prepare(source, tmp_path / 'out', skip_bad_records=True)
  assert os.listdir(tmp_path) == ['in.jsonl']


def test_a_corpus_without_salient_spans_is_refused(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_text('{"text": "it rained all day and nobody came at all."}')
  with pytest.raises(ValueError, match='no sentence with a salient span'):
    _prepare(source, tmp_path / 'out')
  assert os.listdir(tmp_path) == ['in.jsonl']


def test_a_corpus_of_one_article_keeps_sentences_to_learn_from(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  manifest = _prepare(source, tmp_path / 'out', validation_fraction=0.999)
  assert manifest['splits']['knowledge']['sentences'] == 1


@pytest.mark.parametrize(
    ('name', 'pack'),
    [
        ('in.jsonl.gz', gzip.compress),
        ('in.jsonl.xz', lzma.compress),
        ('in.jsonl.bz2', bz2.compress),
        ('in.jsonl.zst', zstd.compress),
    ],
)
def test_a_damaged_compressed_file_is_named(tmp_path, name, pack):
  source = tmp_path / name
  source.write_bytes(pack(_GOOD * 1000)[:-20])
  with pytest.raises(ValueError, match=f'{name}: .* damaged or cut off'):
    _prepare(source, tmp_path / 'out', skip_bad_records=True)
  source.write_bytes(b'\x01' + pack(_GOOD))
  with pytest.raises(ValueError, match='damaged or cut off after line 0'):
    _prepare(source, tmp_path / 'out')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'max_wordpieces': 7}, 'max_wordpieces is 7'),
        ({'min_sentence': 9, 'max_sentence': 8}, 'min_sentence is 9'),
        ({'validation_fraction': 1.0}, 'validation_fraction is 1.0'),
        ({'vocab_size': -1}, 'vocab_size is -1'),
        ({'workers': -1}, 'workers is -1'),
        ({'vocab_size': 6}, 'vocab_size is 6, but the characters'),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  with pytest.raises(ValueError, match=message):
    _prepare(source, tmp_path / 'out', **arguments)


def test_vocabulary_problems_come_before_any_work(tmp_path, monkeypatch):
  monkeypatch.setattr(records.Records, 'check', lambda self: 1 / 0)
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  (tmp_path / 'vocab.txt').write_text('a\nb\n')
  with pytest.raises(ValueError, match='vocab.txt: .*lacks'):
    _prepare(source, tmp_path / 'out', vocab=str(tmp_path / 'vocab.txt'))
  with pytest.raises(FileNotFoundError, match='no vocabulary file'):
    _prepare(source, tmp_path / 'out', vocab=str(tmp_path / 'none' / 'v.txt'))


@pytest.mark.parametrize('name', ['world:', 'world:x', 'world:1:2:3', 'world'])
def test_a_malformed_world_is_explained(tmp_path, name):
  with pytest.raises(ValueError, match=r'world:SEED\[:ENTITIES\]'):
    prepare.prepare([name], tmp_path / 'out')


def test_a_world_must_be_alone(tmp_path):
  with pytest.raises(ValueError, match='must be the only source'):
    prepare.prepare(['world:1', 'world:2'], tmp_path / 'out')


def test_an_existing_output_is_replaced_only_on_request(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  output = tmp_path / 'out'
  first = _prepare(source, output)
  with pytest.raises(FileExistsError, match='out exists; give --overwrite'):
    _prepare(source, output, vocab_size=300)
  assert corpus_lib.Corpus.open(output).fingerprint == first['fingerprint']
  source.write_bytes(_GOOD.replace(b'Rome', b'Pisa'))
  second = _prepare(source, output, overwrite=True)
  assert corpus_lib.Corpus.open(output).fingerprint == second['fingerprint']
  assert first['fingerprint'] != second['fingerprint']
  assert sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out']
  # A failure leaves the old one.
  source.write_bytes(b'{"text": "nothing salient here at all."}')
  with pytest.raises(ValueError, match='salient'):
    _prepare(source, output, overwrite=True)
  assert corpus_lib.Corpus.open(output).fingerprint == second['fingerprint']


def test_a_folder_that_is_no_corpus_is_never_replaced(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  home = tmp_path / 'home'
  home.mkdir()
  (home / 'manifest.json').write_text('{"thesis": 1}')
  with pytest.raises(FileExistsError, match='not a corpus'):
    _prepare(source, home, overwrite=True)
  with pytest.raises(FileExistsError, match='not a corpus'):
    _prepare(source, source, overwrite=True)
  assert os.listdir(home) == ['manifest.json']


_LIMITED = """
import resource, sys
from realm_jax.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
  prepare.prepare(sys.argv[1:2], sys.argv[2], workers=1, progress=False)
except OSError as error:
  print(error)
"""


@pytest.mark.parametrize('limit', [300, 40_000])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
  # The small limit strikes a table, the other one a dataset.
  source = tmp_path / 'in.jsonl'
  with source.open('w') as file:
    for i in range(1000):
      text = f'In {i + 1000} somebody{i * 7919} came to Rome{i * 104729}.'
      file.write(json.dumps({'text': text}) + '\n')
  done = subprocess.run(
      [sys.executable, '-c', _LIMITED, source, tmp_path / 'out', str(limit)],
      check=True,
      capture_output=True,
      text=True,
  )
  assert f'Writing {tmp_path}/out failed' in done.stdout
  assert 'File too large' in done.stdout
  assert os.listdir(tmp_path) == ['in.jsonl']


_KILLED = """
import sys
from realm_jax.prepare import prepare
if __name__ == '__main__':
  prepare._CHUNK_BYTES = 1000
  prepare.prepare(
      sys.argv[1:2],
      sys.argv[2],
      vocab=sys.argv[3],
      workers=2,
      progress=False,
  )
"""


def _wait(condition) -> None:
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _children(pid: int) -> list[int]:
  path = pathlib.Path(f'/proc/{pid}/task/{pid}/children')
  return [int(child) for child in path.read_text().split()]


def _alive(pid: int) -> bool:
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rsplit(') ')[1][0]
  except FileNotFoundError:
    return False
  return state != 'Z'


@pytest.mark.skipif(
    not pathlib.Path('/proc/self/task').exists(), reason='needs /proc'
)
def test_a_killed_run_leaves_nothing_at_the_output(tmp_path):
  source = tmp_path / 'in.jsonl'
  line = json.dumps({'text': 'In 1990 somebody came to Rome. ' * 400})
  source.write_text((line + '\n') * 2000)
  small = tmp_path / 'small.jsonl'
  small.write_bytes(_GOOD)
  _prepare(small, tmp_path / 'small')
  vocab = tmp_path / 'small' / 'vocab.txt'
  (tmp_path / 'run.py').write_text(_KILLED)
  output = tmp_path / 'out'
  process = subprocess.Popen(
      [sys.executable, tmp_path / 'run.py', source, output, vocab]
  )
  try:
    _wait(lambda: list(tmp_path.glob('.out.tmp-*/tables/*.bin')))
    with pytest.raises(FileExistsError, match='Another process is writing'):
      _prepare(source, output)
    children = _children(process.pid)
    assert len(children) >= 2
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  assert not output.exists()
  assert list(tmp_path.glob('.out.tmp-*'))
  # Its workers do not stay behind, and its files go at the next start.
  _wait(lambda: not any(map(_alive, children)))
  source.write_bytes(_GOOD)
  _prepare(source, output)
  assert not list(tmp_path.glob('.out.*'))
  corpus_lib.Corpus.open(output).verify()


def test_a_corpus_moved_aside_is_put_back(tmp_path):
  source = tmp_path / 'in.jsonl'
  source.write_bytes(_GOOD)
  output = tmp_path / 'out'
  _prepare(source, output)
  output.rename(tmp_path / '.out.old')  # Killed between two renames.
  with pytest.raises(FileExistsError, match='out exists'):
    _prepare(source, output)
  corpus_lib.Corpus.open(output).verify()
