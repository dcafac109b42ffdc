"""Preparing a corpus and reading it: contents, determinism, TFDS."""

import gzip
import json
import lzma
import pathlib
import random
import shutil
import subprocess
import sys

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import languages
from realm_jax.prepare import prepare
from realm_jax.prepare import records as records_lib
from realm_jax.prepare import tf_example
from realm_jax.prepare import tfds_files
from realm_jax.prepare import writer

_write, _prepare = helpers.write_records, helpers.prepare_corpus

_SPLITS = ('knowledge', 'validation')


def _articles(count: int, seed: int = 0) -> list[dict]:
  """Invented articles of very different lengths, with unusual characters."""
  rng = random.Random(seed)
  places = ['Übersee', 'Nordhaven', 'Kéla', 'Old Marrow', 'Santa Ilva']
  people = ['Jon Örn', 'Mira van Delt', 'A. B. Cole', 'Ruth O’Dell']
  articles = []
  for i in range(count):
    sentences = []
    for _ in range(rng.randrange(1, 60)):
      person, place = rng.choice(people), rng.choice(places)
      year = rng.randrange(1000, 2020)
      sentences.append(
          rng.choice([
              f'{person} went to {place} in {year}.',
              f'In {place} there are {year} houses — all of them small.',
              'It rained “a lot”, and nothing was ever written about it.',
              f'The {place} market closed on {year % 28 + 1} May {year}.',
              '日本 😀!',
          ])
      )
    articles.append({
        'id': f'a{i}',
        'title': f'{rng.choice(places)} {i}',
        'text': ''.join(
            sentence + rng.choice([' ', ' ', '\n']) for sentence in sentences
        ),
    })
  return articles


@pytest.fixture(scope='module', name='articles')
def _fixture_articles():
  return _articles(80)


@pytest.fixture(scope='module', name='made')
def _fixture_made(tmp_path_factory, articles):
  folder = tmp_path_factory.mktemp('corpus')
  source = _write(folder / 'articles.jsonl', articles)
  return _prepare(source, folder / 'made', validation_fraction=0.2)


def test_passages_hold_all_wordpieces_of_the_articles(made, articles):
  passages, tokenizer = made.passages, made.tokenizer
  assert len(passages) > 1.5 * len(articles)
  for number, article in enumerate(articles):
    rows = np.flatnonzero(passages.articles == number)
    bodies = []
    for row in rows:
      title, body = passages.title_and_body(row)
      assert title.tolist() == tokenizer.encode(article['title'])
      bodies += body.tolist()
    assert bodies == tokenizer.encode(article['text'])


def test_passages_are_whole_sentences_packed_greedily(made, articles):
  encode = made.tokenizer.encode
  expected = []
  for article in articles:
    room = 288 - 3 - len(encode(article['title']))
    passage: list[int] = []
    for start, limit in languages.split_sentences(article['text']):
      sentence = encode(article['text'][start:limit])
      if len(passage) + len(sentence) > room:
        expected.append(passage)
        passage = []
      passage = passage + sentence
    expected.append(passage)
  assert [
      made.passages.title_and_body(row)[1].tolist()
      for row in range(len(made.passages))
  ] == expected
  lengths = made.passages.lengths
  assert 270 < lengths.max() <= 288
  np.testing.assert_array_equal(lengths, 3 + np.diff(made.passages.offsets))


def test_passage_texts_give_the_wordpieces_of_the_table(made, articles):
  ids = []
  for row in range(len(made.passages)):
    passage = made.passage_text(row)
    _, body = made.passages.title_and_body(row)
    assert made.tokenizer.encode(passage['text']) == body.tolist()
    ids.append(passage['id'])
  assert len(set(ids)) == len(ids)
  whole = {article['id'] for article in articles}
  for name in ids:
    assert name in whole or name.rsplit('#', 1)[0] in whole
  assert ids == sorted(
      ids,
      key=lambda n: (
          int(n[1:].split('#')[0]),
          int(n.split('#')[1]) if '#' in n else 0,
      ),
  )
  rows = made.passage_rows_by_id([*reversed(ids), 'nothing'])
  np.testing.assert_array_equal(rows, [*reversed(range(len(ids))), -1])


def test_id_of_a_long_record_is_that_of_its_first_passage(made):
  second = made.passage_text(1)['id']
  assert second == 'a0#1'
  np.testing.assert_array_equal(made.passage_rows_by_id(['a0', second]), [0, 1])
  with pytest.raises(IndexError, match='no passage 100000'):
    made.passage_text(100_000)


def test_tfds_reads_the_passages_without_this_package(made):
  builder = tfds.builder_from_directory(made.directory / 'passages')
  source = builder.as_data_source(split='train')
  assert len(source) == len(made.passages)
  record = source[3]
  assert set(record) == {'id', 'article', 'title', 'text'}
  assert record['text'].decode() == made.passage_text(3)['text']
  assert record['article'] == made.passages.articles[3]


def test_sentences_and_spans_agree_in_bytes_and_wordpieces(made):
  tokenizer = made.tokenizer
  builder = tfds.builder_from_directory(made.directory / 'sentences')
  assert set(made.sentences) == set(_SPLITS)
  for split in _SPLITS:
    table = made.sentences[split]
    source = builder.as_data_source(split=split)
    assert len(source) == len(table) > 30
    for row in range(len(table)):
      record = source[row]
      ids = table.ids(row).tolist()
      assert ids == tokenizer.encode(record['text'].decode())
      assert record['passage'] == table.passages[row]
      # The sentence lies inside its passage.
      start, passage = table.starts[row], table.passages[row]
      first = made.passages.offsets[passage]
      assert first + made.passages.title_lengths[passage] <= start
      assert start + len(ids) <= made.passages.offsets[passage + 1]
      spans = table.spans_of(row)
      assert len(spans) == len(record['span_starts']) > 0
      for (a, b), start, limit in zip(
          spans, record['span_starts'], record['span_limits'], strict=True
      ):
        assert 0 <= a < b <= len(ids)
        assert len(ids) - (b - a) >= 3
        text = record['text'][start:limit].decode()
        assert tokenizer.encode(text) == ids[a:b]


def test_sentences_set_aside_are_of_other_articles(made):
  articles = {
      split: set(made.passages.articles[made.sentences[split].passages])
      for split in _SPLITS
  }
  assert not articles['knowledge'] & articles['validation']
  assert 5 <= len(articles['validation']) <= 30


def test_sentences_set_aside_are_limited(tmp_path, articles, monkeypatch):
  monkeypatch.setattr(writer, '_MAX_VALIDATION', 7)
  source = _write(tmp_path / 'a.jsonl', articles)
  made = _prepare(source, tmp_path / 'made', validation_fraction=0.5)
  counts = np.bincount(
      made.passages.articles[made.sentences['validation'].passages]
  )
  counts = counts[counts > 0]
  # The article that reaches the limit is finished, and no other is started.
  assert counts[:-1].sum() < 7 <= counts.sum()
  made = _prepare(source, tmp_path / 'none', validation_fraction=0.0)
  assert set(made.sentences) == {'knowledge'}


def _contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
      path.relative_to(folder).as_posix(): path.read_bytes()
      for path in sorted(folder.rglob('*'))
      if path.is_file()
  }


def test_same_bytes_for_any_number_of_workers(tmp_path, articles, monkeypatch):
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 4000)
  monkeypatch.setattr(tfds_files, '_RECORDS_PER_SHARD', 100)
  source = _write(tmp_path / 'articles.jsonl', articles)
  made = {}
  for workers in (1, 2, 4):
    corpus = _prepare(source, tmp_path / str(workers), workers=workers)
    made[workers] = _contents(corpus.directory)
  assert len([name for name in made[1] if 'array_record' in name]) > 5
  assert made[1] == made[2]
  assert made[1] == made[4]
  text = b''.join(
      data for name, data in made[1].items() if name.endswith('.json')
  ).decode()
  assert str(tmp_path) not in text


def test_same_fingerprint_for_any_size_of_chunks(
    tmp_path, made, articles, monkeypatch
):
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 100)
  source = _write(tmp_path / 'articles.jsonl', articles)
  again = _prepare(source, tmp_path / 'made', validation_fraction=0.2)
  assert again.fingerprint == made.fingerprint
  articles = [*articles[:-1], {**articles[-1], 'title': 'Other'}]
  source = _write(tmp_path / 'articles.jsonl', articles)
  other = _prepare(source, tmp_path / 'other', validation_fraction=0.2)
  assert other.fingerprint != made.fingerprint


def test_inputs_may_be_compressed_and_spread(tmp_path, made, articles):
  folder = tmp_path / 'in'
  (folder / 'deep').mkdir(parents=True)
  lines = [json.dumps(a, ensure_ascii=False).encode() for a in articles]
  (folder / '0.jsonl.gz').write_bytes(gzip.compress(b'\n'.join(lines[:10])))
  (folder / '1.jsonl.xz').write_bytes(
      lzma.compress(b'\xef\xbb\xbf' + b'\r\n'.join(lines[10:20]) + b'\n')
  )
  (folder / '2.jsonl').write_bytes(b'\n'.join(lines[20:30]))
  (folder / 'deep' / 'x.json').write_bytes(b'\n'.join(lines[30:]))
  (folder / 'readme.txt').write_text('not a record')
  again = _prepare(str(folder), tmp_path / 'made', validation_fraction=0.2)
  assert again.fingerprint == made.fingerprint
  again = _prepare(
      [str(folder / '[0-9].jsonl*'), str(folder / 'deep' / 'x.json')],
      tmp_path / 'glob',
      validation_fraction=0.2,
  )
  assert again.fingerprint == made.fingerprint


def test_articles_are_records_of_one_key(tmp_path):
  text = 'In 1990 somebody came to Rome by train.'
  fields = [
      {'title': 'A'},
      {'title': 'A'},
      {'title': 'B'},
      {},
      {},
      {'title': 'C', 'article': 'x'},
      {'title': 'D', 'article': 'x'},
      {'title': 'A'},
  ]
  source = _write(tmp_path / 'a.jsonl', [{**f, 'text': text} for f in fields])
  made = _prepare(source, tmp_path / 'made')
  np.testing.assert_array_equal(
      made.passages.articles, [0, 0, 1, 2, 3, 4, 4, 0]
  )
  rows = made.passages.article_rows(np.array([[0, 1], [6, -1]]))
  both, none = [[0, 2], [7, 8]], [0, 0]
  np.testing.assert_array_equal(
      rows, [[both, both], [[[5, 7], none], [none, none]]]
  )
  assert rows.dtype == np.int64


@pytest.mark.parametrize('limit', [5000, 9])
def test_no_article_is_in_training_and_validation(
    tmp_path, monkeypatch, limit
):
  """Also if its records are far apart, and for more hashes than are recent."""
  monkeypatch.setattr(writer, '_MAX_VALIDATION', limit)
  monkeypatch.setattr(records_lib, '_RECENT', 3)
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 300)
  items = [
      {
          'id': f'{town} {i}',
          'title': f'Town {town}',
          'text': f'Town {town} was founded in {1800 + i} by John Smith.',
      }
      for town in range(20)
      for i in range(4)
  ]
  set_aside = []
  for seed in (0, 1):
    random.Random(seed).shuffle(items)
    source = _write(tmp_path / f'{seed}.jsonl', items)
    made = _prepare(
        source, tmp_path / str(seed), validation_fraction=0.3, vocab_size=100
    )
    np.testing.assert_array_equal(
        np.bincount(made.passages.articles), [4] * 20
    )
    titles = {
        split: {
            made.passage_text(int(row))['title']
            for row in made.sentences[split].passages
        }
        for split in _SPLITS
    }
    assert not titles['knowledge'] & titles['validation']
    assert len(titles['knowledge'] | titles['validation']) == 20
    first = made.passage_text(0)['title']  # Never set aside.
    set_aside.append(titles['validation'] - {first})
    size = len(made.sentences['validation'])
    assert size == 4 * len(titles['validation'])
    if limit == 9:
      assert 9 <= size < 36
  if limit == 5000:  # The article decides, whatever the order.
    assert len(set_aside[0] ^ set_aside[1]) <= 2
    assert len(set_aside[0]) >= 3


def test_marked_records_are_set_aside(tmp_path, articles):
  marked = [
      {**a, 'split': 'validation'} if i % 10 == 3 else a
      for i, a in enumerate(articles)
  ]
  source = _write(tmp_path / 'a.jsonl', marked)
  made = _prepare(source, tmp_path / 'made')
  table = made.sentences['validation']
  assert set(made.passages.articles[table.passages]) <= {
      3,
      13,
      23,
      33,
      43,
      53,
      63,
      73,
  }
  assert len(table) > 20


def test_pretraining_texts_give_sentences_only(tmp_path, articles):
  knowledge = _write(tmp_path / 'k.jsonl', articles[:10])
  more = _articles(40, seed=1)
  pretraining = _write(tmp_path / 'p.jsonl', more)
  made = _prepare(
      knowledge,
      tmp_path / 'made',
      pretraining_sources=[pretraining],
      validation_fraction=0.2,
  )
  only = _prepare(knowledge, tmp_path / 'only', validation_fraction=0.0)
  assert len(made.passages) == len(only.passages)
  assert set(made.sentences) == {'knowledge', 'pretraining', 'validation'}
  assert len(made.sentences['knowledge']) == len(only.sentences['knowledge'])
  builder = tfds.builder_from_directory(made.directory / 'sentences')
  texts = ''.join(article['text'] for article in more)
  for split in ('pretraining', 'validation'):
    table = made.sentences[split]
    assert len(table) > 30
    assert set(table.passages) == {-1}
    source = builder.as_data_source(split=split)
    for row in range(len(table)):
      text = source[row]['text'].decode()
      assert text in texts
      assert source[row]['passage'] == -1
      assert table.ids(row).tolist() == made.tokenizer.encode(text)


def test_a_world_brings_everything(tmp_path):
  made = _prepare('world:5:60', tmp_path / 'made', vocab_size=None)
  assert set(made.sentences) == {'knowledge', 'pretraining', 'validation'}
  assert 100 < made.tokenizer.vocab_size <= 3000
  questions = [
      json.loads(line)
      for line in (tmp_path / 'made' / 'questions.jsonl').open(encoding='utf-8')
  ]
  rows = made.passage_rows_by_id(q['passage_id'] for q in questions)
  assert len(rows) > 30
  assert rows.min() >= 0
  for question, row in zip(questions, rows, strict=True):
    passage = made.passage_text(int(row))['text']
    assert any(answer in passage for answer in question['answers'])
  other = _prepare('world:6:60', tmp_path / 'other', vocab_size=None)
  assert other.fingerprint != made.fingerprint


def test_nothing_imports_tensorflow(tmp_path):
  script = f"""
import sys
from realm_jax.corpus import corpus
from realm_jax.prepare import prepare
out = {str(tmp_path / 'made')!r}
prepare.prepare(['world:1:40'], out, workers=1, progress=False)
corpus.Corpus.open(out).passage_text(0)
assert 'tensorflow' not in sys.modules
assert 'jax' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', script], check=True)


def test_training_starts_without_tfds():
  """Importing it takes seconds; only what reads texts needs it."""
  script = """
import sys
from realm_jax.trainer import loop
assert 'tensorflow_datasets' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', script], check=True)


def test_records_are_encoded_as_tfds_does():
  for spans in ([], [0, 127, 128, 300, 70_000]):
    values = {
        'passage': -1 if spans else 5_000_000_000,
        'span_limits': spans,
        'span_starts': spans,
        'text': 'é' * 200,
        'title': '',
    }
    features = tfds.features.FeaturesDict(writer._SENTENCE_FEATURES)
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    expected = serializer.get_tf_example(
        features.encode_example(values)
    ).SerializeToString(deterministic=True)
    found = tf_example.example(
        tf_example.number_field('passage', [values['passage']])
        + tf_example.number_field('span_limits', values['span_limits'])
        + tf_example.number_field('span_starts', values['span_starts'])
        + tf_example.text_field('text', values['text'])
        + tf_example.text_field('title', values['title'])
    )
    assert found == expected


def _copy(made, tmp_path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(made.directory, tmp_path / 'copy'))


def test_open_refuses_what_is_not_whole(made, tmp_path):
  with pytest.raises(FileNotFoundError, match='There is no corpus'):
    corpus_lib.Corpus.open(tmp_path / 'missing')
  folder = _copy(made, tmp_path)
  table = folder / 'tables' / 'knowledge.spans.npy'
  data = table.read_bytes()
  table.write_bytes(data[:-8])
  with pytest.raises(ValueError, match=r'knowledge.spans.npy has \d+ bytes'):
    corpus_lib.Corpus.open(folder)
  table.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(ValueError, match='SHA-256'):
    corpus_lib.Corpus.open(folder).verify()
  table.unlink()
  with pytest.raises(FileNotFoundError, match='lacks the file tables/know'):
    corpus_lib.Corpus.open(folder)
  manifest = folder / 'manifest.json'
  values = json.loads(manifest.read_text())
  manifest.write_text(json.dumps({**values, 'version': 99}))
  with pytest.raises(ValueError, match='format 99; this realm_jax reads'):
    corpus_lib.Corpus.open(folder)
  manifest.write_text('{"version": 1')
  with pytest.raises(ValueError, match='damaged'):
    corpus_lib.Corpus.open(folder)
  manifest.unlink()
  with pytest.raises(FileNotFoundError, match='did not finish'):
    corpus_lib.Corpus.open(folder)


def test_open_refuses_another_vocabulary(made, tmp_path):
  folder = _copy(made, tmp_path)
  data = (folder / 'vocab.txt').read_bytes().split(b'\n')
  data[-2], data[-3] = data[-3], data[-2]
  (folder / 'vocab.txt').write_bytes(b'\n'.join(data))
  with pytest.raises(ValueError, match='not what the corpus was made with'):
    _ = corpus_lib.Corpus.open(folder).tokenizer
