"""`prepare` after an interruption, on unusual texts; corpus statistics."""

import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
import numpy as np
import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.evaluation import corpus_stats
from realm_jax.prepare import passages
from realm_jax.prepare import pipeline
from realm_jax.prepare import prepare

_SENTENCE = 'In {} somebody came to Rome with a friend of his. '


def _prepare(source, output, **arguments) -> corpus_lib.Corpus:
  arguments = {'workers': 1, 'progress': False, 'vocab_size': 400, **arguments}
  prepare.prepare([str(source)], output, **arguments)
  return corpus_lib.Corpus.open(output)


def _source(tmp_path, count: int = 60) -> pathlib.Path:
  path = tmp_path / 'in.jsonl'
  path.write_text(
      ''.join(
          json.dumps({'id': f'a{i}', 'text': _SENTENCE.format(1900 + i) * 30})
          + '\n'
          for i in range(count)
      )
  )
  return path


def _same(first: corpus_lib.Corpus, second: corpus_lib.Corpus) -> bool:
  second.verify()
  return first.manifest == second.manifest


_RUN = """
import sys, time
from realm_jax.prepare import passages, prepare
if __name__ == '__main__':
  prepare._CHUNK_BYTES = 5000
  work = passages.Packer.__call__
  def slow(self, task):
    time.sleep(0.05)
    return work(self, task)
  passages.Packer.__call__ = slow
  prepare.prepare(
      [sys.argv[1]], sys.argv[2], vocab=sys.argv[3], workers=1, progress=False
  )
"""


@pytest.fixture(scope='module', name='killed')
def _fixture_killed(tmp_path_factory):
  """A corpus, and the chunk files of the same run when it is killed."""
  tmp_path = tmp_path_factory.mktemp('killed')
  source = _source(tmp_path)
  vocab = tmp_path / 'made' / 'vocab.txt'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(prepare, '_CHUNK_BYTES', 5000)
    _prepare(source, tmp_path / 'made')
  process = subprocess.Popen(
      [sys.executable, '-c', _RUN, source, tmp_path / 'out', vocab]
  )
  parts = tmp_path / '.out.parts'
  deadline = time.monotonic() + 60
  while len(list(parts.glob('*.part'))) < 5:
    assert time.monotonic() < deadline
    assert process.poll() is None
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert not (tmp_path / 'out').exists()
  return tmp_path


@pytest.fixture(name='made')
def _fixture_made(tmp_path, monkeypatch, killed):
  """A copy of the corpus and the chunk files."""
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 5000)
  shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
  made = corpus_lib.Corpus.open(tmp_path / 'made')
  vocab = str(made.directory / 'vocab.txt')
  return made, tmp_path / 'in.jsonl', vocab, tmp_path / '.out.parts'


@pytest.fixture(name='tasks')
def _fixture_tasks(monkeypatch):
  """The tasks that are computed, not read from chunk files."""
  done = []
  work = passages.Packer.__call__

  def counted(self, task):
    done.append(task)
    return work(self, task)

  monkeypatch.setattr(passages.Packer, '__call__', counted)
  return done


def test_a_killed_run_resumes(tmp_path, made, tasks):
  made, source, vocab, parts = made
  kept = sorted(parts.glob('*.part'))
  kept[0].write_bytes(kept[0].read_bytes()[:-9])  # As after a loss of power.
  assert _same(made, _prepare(source, tmp_path / 'out', vocab=vocab))
  whole = -(-made.manifest['counts']['records'] // 4)  # Records of a task.
  assert len(tasks) == whole - len(kept) + 1
  assert not list(tmp_path.glob('.*'))


def test_chunk_files_serve_any_number_of_workers(tmp_path, made):
  made, source, vocab, _ = made
  assert _same(made, _prepare(source, tmp_path / 'out', vocab=vocab, workers=2))


def test_chunk_files_of_other_settings_are_discarded(
    tmp_path, made, tasks, caplog
):
  made, source, vocab, parts = made
  number = len(list(parts.glob('*.part')))
  with caplog.at_level(logging.WARNING):
    short = _prepare(source, tmp_path / 'out', vocab=vocab, max_wordpieces=40)
  assert f'The {number} chunk files of an interrupted run' in caplog.text
  assert 'other settings' in caplog.text
  assert short.passages.lengths.max() <= 40
  assert len(tasks) == 15
  assert not list(tmp_path.glob('.*'))


def test_only_changed_tasks_are_computed_again(
    tmp_path, made, tasks
):
  made, source, vocab, parts = made
  number = len(list(parts.glob('*.part')))
  source.write_text(
      source.read_text() + json.dumps({'id': 'new', 'text': 'Rome in 1999.'})
  )
  more = _prepare(source, tmp_path / 'out', vocab=vocab)
  assert len(tasks) == 16 - number
  assert more.manifest['counts']['records'] == 61
  source.write_text(source.read_text().replace('"a0"', '"b0"'))
  _prepare(source, tmp_path / 'other', vocab=vocab)
  assert len(tasks) == 16 - number + 16


def test_an_interruption_keeps_chunk_files_and_an_error_does_not(
    tmp_path, made, monkeypatch
):
  _, source, vocab, parts = made
  work = passages.Packer.__call__
  for error, kept in ((KeyboardInterrupt, True), (OSError, False)):
    monkeypatch.setattr(
        passages.Packer,
        '__call__',
        lambda self, task, error=error: (
            work(self, task) if task.articles[0] < 40 else _raise(error)
        ),
    )
    with pytest.raises(error):
      _prepare(source, tmp_path / 'out', vocab=vocab)
    assert (len(list(parts.glob('*.part'))) == 10) == kept
    assert parts.exists() == kept
    assert not (tmp_path / 'out').exists()


def _raise(error: type[BaseException]):
  raise error('for the test')


def test_a_chunk_file_has_the_chunk_of_its_task(tmp_path, monkeypatch):
  source = _source(tmp_path, 5)
  made = _prepare(source, tmp_path / 'made')
  packer = passages.Packer(made.tokenizer, passages.Settings())
  found = prepare.records_lib.Records(prepare.sources_lib.find([str(source)]))
  assert len(list(found.check())) == 5
  (task,) = prepare._tasks(prepare._Input(found, True, 0.5))
  assert passages.Task.from_bytes(task.to_bytes()) == task
  chunk = packer(task)
  path = tmp_path / 'x.part'
  pipeline.save(path, chunk)
  again = pipeline.load(path)
  for name, value in vars(chunk).items():
    if isinstance(value, np.ndarray):
      np.testing.assert_array_equal(getattr(again, name), value)
      assert getattr(again, name).dtype == value.dtype
    else:
      assert getattr(again, name) == value
  path.write_bytes(path.read_bytes().replace(b'Rome', b'Roma', 1))
  with pytest.raises(ValueError, match='damaged'):
    pipeline.load(path)


_VOCAB = [
    *('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'rome', 'ro', '##me'),
    *('caf', '##e', 'e', 'i', 's', '##s', '.', ',', '-', '中', '1', '##9', 'ß'),
]


@settings(max_examples=300, deadline=None)
@given(
    strategies.lists(
        strategies.text(
            strategies.one_of(
                strategies.characters(exclude_categories=['Cs']),
                strategies.sampled_from('Rome café, -19.\n\t\r\x00\u0301ßİς中'),
            )
        ),
        max_size=4,
    ),
    strategies.booleans(),
)
def test_cached_words_are_encoded_as_the_library_does(texts, lowercase):
  tokenizer = tokenizer_lib.Tokenizer(_VOCAB, lowercase)
  cached = tokenizer_lib.CachedTokenizer(tokenizer)
  for _ in range(2):  # Then from the table.
    for found, expected in zip(
        cached(texts), tokenizer.encode_arrays(texts), strict=True
    ):
      for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_the_word_cache_is_cleared_when_full(monkeypatch):
  monkeypatch.setattr(tokenizer_lib, '_MAX_CACHED_CHARACTERS', 10)
  tokenizer = tokenizer_lib.Tokenizer(_VOCAB)
  cached = tokenizer_lib.CachedTokenizer(tokenizer)
  for text in ('rome is', 'rome is caf s', 'rome', 'is rome'):
    assert cached([text])[0][0].tolist() == tokenizer.encode(text)
  assert cached._numbers.characters <= 10


@pytest.mark.parametrize('title', ['', '  ', 'x' * 5000])
def test_any_title_will_do(tmp_path, title):
  source = tmp_path / 'in.jsonl'
  source.write_text(
      json.dumps({'title': title, 'text': _SENTENCE.format(1990) * 40})
  )
  made = _prepare(source, tmp_path / 'out')
  assert made.passages.lengths.max() <= 288
  assert made.passage_text(0)['title'] == title.strip()


def test_control_characters_are_kept_and_have_no_wordpieces(tmp_path):
  text = '\x00In 1990\x07 Paul\u200b came\x1b to Rome\ufeff with\x7f a friend.'
  source = tmp_path / 'in.jsonl'
  source.write_text(json.dumps({'id': 'a', 'text': text}))
  made = _prepare(source, tmp_path / 'out')
  assert made.passage_text(0)['text'] == text
  _, body = made.passages.title_and_body(0)
  assert (
      made.tokenizer.decode(body.tolist())
      == 'in 1990 paul came to rome with a friend.'
  )
  # As themselves, and not escaped, JSON does not have them.
  source.write_text('{"text": "a\x00b"}')
  with pytest.raises(ValueError, match='in.jsonl:1: .*control character'):
    _prepare(source, tmp_path / 'no')


def test_articles_without_sentences(tmp_path):
  source = tmp_path / 'in.jsonl'
  texts = ['\u200b', '...', 'towns\n* one\n* two', _SENTENCE.format(1990)]
  source.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
  made = _prepare(source, tmp_path / 'out')
  assert made.manifest['counts']['records_without_wordpieces'] == 1
  assert len(made.passages) == 3  # They can be found, though not learned from.
  assert len(made.sentences['knowledge']) == 1


def test_a_line_of_ten_megabytes(tmp_path):
  long = 'x' * 200_000  # A word of BERT has 100 characters at most.
  sentence = 'in the town there was ' + 'nothing ' * 1_230_000
  source = tmp_path / 'in.jsonl'
  source.write_text(
      json.dumps({'text': f'{_SENTENCE.format(1990)}{long} {sentence}.'})
  )
  vocab = tmp_path / 'vocab.txt'
  vocab.write_text('\n'.join([*_VOCAB, 'nothing', 'in', '1990', 'to']))
  made = _prepare(source, tmp_path / 'out', vocab=str(vocab))
  assert made.manifest['counts']['wordpieces'] > 1_230_000
  assert made.manifest['counts']['split_sentences'] == 1
  assert made.passages.lengths.max() <= 288


def test_a_vocabulary_without_mask_serves_a_search(tmp_path, caplog):
  vocab = tmp_path / 'vocab.txt'
  vocab.write_text('\n'.join(w for w in _VOCAB if w != '[MASK]'))
  _prepare(_source(tmp_path), tmp_path / 'out', vocab=str(vocab))
  assert 'has no mask token' in caplog.text
  assert corpus_lib.Corpus.open(tmp_path / 'out').tokenizer.mask_id < 0


def test_stats_of_a_corpus(tmp_path):
  source = _source(tmp_path, 8)
  with source.open('a') as file:
    for item in (
        {'title': 'List of towns', 'text': 'Rome.'},
        {'text': 'It rained and nobody knew for how long. Paul left Rome.'},
    ):
      file.write(json.dumps(item) + '\n')
  output = tmp_path / 'out'
  done = subprocess.run(
      [sys.executable, '-m', 'realm_jax', 'prepare', f'--output={output}']
      + [f'--source={source}', '--vocab_size=400', '--exclude=all', '--stats'],
      check=True,
      capture_output=True,
      text=True,
  )
  made = corpus_lib.Corpus.open(output)
  made.verify()
  figures = json.loads((output / 'stats.json').read_text())
  assert figures == corpus_stats.measure(made)
  assert json.loads(done.stdout) == figures
  assert figures['passages'] == len(made.passages)
  assert figures['articles'] == 9
  histogram = figures['passage_length']['histogram']
  assert sum(histogram) == len(made.passages)
  assert len(histogram) == -(-made.passages.lengths.max() // 16)
  knowledge = figures['sentences']['knowledge']
  assert sum(knowledge['histogram']) == knowledge['sentences']
  assert knowledge['spans'] == made.manifest['splits']['knowledge']['spans']
  dropped = figures['dropped']
  assert dropped['records'] == {
      'total': 10,
      'counts': {'excluded_lists': 1},
      'shares': {'excluded_lists': 0.1},
  }
  assert dropped['sentences']['counts']['sentences_without_spans'] == 1
  names = figures['most_frequent']['names']
  assert names[0] == {'span': 'rome', 'count': knowledge['sentences']}
  assert figures['most_frequent']['dates_and_numbers'][0]['count'] == 30
  assert (output / 'stats.png').read_bytes().startswith(b'\x89PNG')


def test_without_a_source_stats_need_a_corpus(tmp_path):
  for more, message in (([], 'Give --source'), (['--stats'], 'no corpus')):
    done = subprocess.run(
        [sys.executable, '-m', 'realm_jax', 'prepare']
        + [f'--output={tmp_path / "none"}', *more],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert message in done.stderr
