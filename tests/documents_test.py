"""Documents added, replaced and removed: as if all were prepared anew."""

import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.api import retriever
from realm_jax.builder import builder
from realm_jax.builder import compaction
from realm_jax.builder import documents as documents_lib
from realm_jax.builder import editing
from realm_jax.builder import edition
from realm_jax.builder import merged_search
from realm_jax.builder import status
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.evaluation import evaluate
from realm_jax.evaluation import inspect
from realm_jax.index import generation
from realm_jax.index import scann
from realm_jax.index import search as search_lib
from realm_jax.interop import export
from realm_jax.prepare import compaction as data_compaction
from realm_jax.prepare import prepare
from realm_jax.qa import questions as questions_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import process
from realm_jax.runtime import snapshots as snapshots_lib
from realm_jax.trainer import stages

_LONG = ' '.join(
    f'In {1900 + i} the lamp of Bremen number {i} was lit by Ada Brown.'
    for i in range(40)
)


def _config(corpus, objective='realm'):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.num_candidates = 4
  config.model.preset, config.model.num_layers = 'tiny', 1
  config.model.width, config.model.num_heads = 32, 2
  config.model.embedding_width = 16
  config.model.max_positions = 160
  config.lengths.query, config.lengths.document = 24, 64
  config.lengths.masks = 4
  config = config_lib.resolve(config)
  config.model.vocab_size = corpus.tokenizer.vocab_size
  return config


def _params(config, seed):
  """Fresh parameters, with embeddings that tell passages apart."""
  return {
      name: {
          key: np.asarray(value) * (4 if key.endswith('kernel') else 1)
          for key, value in component.init(seed).items()
      }
      for name, component in stages.components_of(config).items()
  }


def _make_workdir(path, corpus, params, step=10, **changes):
  """A trained workdir, with an index of its newest snapshot."""
  config = _config(corpus)
  for name, value in changes.items():
    setattr(config.mips, name, value)
  files.write_json(path / 'config.json', config_lib.to_dict(config))
  _train(path, corpus, params, step)
  return path


def _train(path, corpus, params, step):
  """As if training had gone on to a step and the builder, too."""
  about = {
      'config_digest': '',
      'corpus_fingerprint': corpus.fingerprint,
      'tokenizer_digest': corpus.tokenizer.digest,
      'index_generation': step,
  }
  checkpoint.save_params(path, step, jax.device_put(params), about)
  snapshots_lib.save(path, step, params['embedder'])
  builder.build(path)


def _write(path, records):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return str(path)


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


@pytest.fixture(scope='module')
def params(corpus):
  config = _config(corpus)
  return [_params(config, seed) for seed in (0, 1)]


@pytest.fixture(scope='module')
def _original(tmp_path_factory, corpus, params):
  path = tmp_path_factory.mktemp('original') / 'job'
  return _make_workdir(path, corpus, params[0])


@pytest.fixture
def workdir(tmp_path, _original):
  return shutil.copytree(_original, tmp_path / 'job')


@pytest.fixture(scope='module')
def queries(world):
  questions = questions_lib.read_questions(world / 'questions.jsonl')
  return [q.question for q in questions[:20]] + ['who lit the lamp', 'zeppelin']


def _find(workdir, queries, k=None):
  """Ids and scores of what a search finds, by default of all documents."""
  loaded = retriever.Retriever.load(workdir)
  hits = loaded.search(queries, k or loaded.corpus.num_live)
  ids = [[loaded.passage(row)['id'] for row in rows] for rows in hits.rows]
  return ids, hits.scores


def _open(workdir):
  config = config_lib.resolve(config_lib.read(workdir))
  return documents_lib.Documents.open(workdir, config)


class _Model:
  """What the documents should be: records in order of their last writing."""

  def __init__(self, corpus, seed):
    self.rng = np.random.default_rng(seed)
    self.records = {}
    for row in range(len(corpus.passages)):
      text = corpus.passage_text(row)
      self.records[text['id']] = text
    self.made = 0
    self.commands = self.rng.permutation(['add', 'update', 'delete'] * 3)

  def text(self):
    years = self.rng.integers(1000, 2000, 2)
    names = self.rng.choice('Ada Ben Cleo Dan Eva Finn'.split(), 2)
    short = f'{names[0]} Brown was born in {years[0]}. He met {names[1]} in'
    long = _LONG[: self.rng.integers(1, len(_LONG))]
    return f'{short} {years[1]}. {long if self.rng.random() < 0.3 else ""}'

  def new(self, count):
    self.made += count
    ids = [f'new {i}' for i in range(self.made - count, self.made)]
    return [{'id': i, 'title': i.title(), 'text': self.text()} for i in ids]

  def some(self, count):
    return self.rng.choice(list(self.records), count, replace=False).tolist()

  def act(self, workdir, file):
    """Does the next command, here and there."""
    command, *self.commands = self.commands
    match command:
      case 'add':
        records = self.new(int(self.rng.integers(1, 6)))
        editing.add(workdir, [_write(file, records)], progress=False)
      case 'update':
        names = self.some(3)
        records = [{'id': n, 'title': '', 'text': self.text()} for n in names]
        editing.update(workdir, [_write(file, records)], progress=False)
        for name in names:
          del self.records[name]
      case 'delete':
        names, records = self.some(int(self.rng.integers(1, 6))), []
        editing.delete(workdir, _write(file, [{'id': n} for n in names]))
        for name in names:
          del self.records[name]
    self.records |= {record['id']: record for record in records}

  def rebuild(self, directory, corpus, params):
    """Prepares, and embeds, the documents from the beginning."""
    prepare.prepare(
        [_write(directory / 'all.jsonl', self.records.values())],
        directory / 'corpus',
        vocab=str(corpus.directory),
        workers=1,
        progress=False,
    )
    made = corpus_lib.Corpus.open(directory / 'corpus')
    return _make_workdir(directory / 'job', made, params)


@pytest.mark.parametrize('seed', [0, 1])
def test_random_changes_equal_a_rebuild(
    workdir, tmp_path, corpus, params, queries, seed
):
  model = _Model(corpus, seed)
  for i in range(3):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  # Training goes on, and with it the index; then so do the changes.
  _train(workdir, corpus, params[1], 20)
  for i in range(3, 7):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  rebuilt = model.rebuild(_folder(tmp_path / 'anew'), corpus, params[1])
  ids, scores = _find(workdir, queries)
  expected_ids, expected_scores = _find(rebuilt, queries)
  assert ids == expected_ids
  np.testing.assert_allclose(scores, expected_scores, rtol=2e-6, atol=1e-6)
  added = {name for row in ids for name in row if name.startswith('new')}
  assert added and any('#' in name for name in added)

  # A compaction changes nothing but the row numbers.
  done = compaction.compact(workdir, progress=False)
  assert done.embedded == 0
  again_ids, again_scores = _find(workdir, queries)
  assert again_ids == ids
  np.testing.assert_array_equal(again_scores, scores)
  made, wanted = _open(workdir).corpus, _open(rebuilt).corpus
  made.verify()
  _assert_same_corpus(made, wanted)
  # And things go on from there.
  for i in range(7, 9):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  rebuilt = model.rebuild(_folder(tmp_path / 'later'), corpus, params[1])
  ids, scores = _find(workdir, queries)
  expected_ids, expected_scores = _find(rebuilt, queries)
  assert ids == expected_ids
  np.testing.assert_allclose(scores, expected_scores, rtol=2e-6, atol=1e-6)


def _folder(path):
  path.mkdir()
  return path


def _assert_same_corpus(made, wanted):
  """All but numbers of articles and the order of sentences."""
  assert len(made.passages) == len(wanted.passages)
  np.testing.assert_array_equal(made.passages.tokens, wanted.passages.tokens)
  np.testing.assert_array_equal(made.passages.offsets, wanted.passages.offsets)
  np.testing.assert_array_equal(
      made.passages.title_lengths, wanted.passages.title_lengths
  )
  for row in range(len(made.passages)):
    assert made.passage_text(row) == wanted.passage_text(row)
  assert np.all(np.diff(made.passages.articles) >= 0)


def test_what_reads_a_corpus_reads_an_overlay(tmp_path, corpus):
  more = [
      {'id': 'a', 'title': 'A', 'text': 'The river Ada is in Bremen.'},
      {'id': 'b', 'title': 'B', 'text': _LONG},
  ]
  source = prepare.records_lib.Records(
      [prepare.sources_lib.Items(more, 'more')]
  )
  list(source.check())
  prepare.prepare_more(corpus, source, tmp_path / 'more', progress=False)
  added = corpus_lib.Corpus.open(tmp_path / 'more')
  assert len(added.passages) > 3
  base_rows, rows = len(corpus.passages), len(added.passages)
  removed = np.array([2, base_rows + 2])
  both = overlay_lib.Overlay([corpus, added], removed)
  assert both.num_live == base_rows + rows - 2
  assert both.fingerprint == corpus.fingerprint
  # Texts and wordpieces, alone and many at once, over the border.
  wanted = np.array([[0, base_rows + 1], [base_rows - 1, base_rows + rows - 1]])
  for row in wanted.reshape(-1).tolist():
    part, at = (corpus, row) if row < base_rows else (added, row - base_rows)
    assert both.passage_text(row) == part.passage_text(at)
    for mine, theirs in zip(
        both.passages.title_and_body(row),
        part.passages.title_and_body(at),
        strict=True,
    ):
      np.testing.assert_array_equal(mine, theirs)
  starts = both.passages.offsets[wanted]
  np.testing.assert_array_equal(
      both.passages.tokens[starts],
      [[both.passages.tokens[s : s + 1][0] for s in line] for line in starts],
  )
  with pytest.raises(IndexError, match='those that were added'):
    both.passage_text(base_rows + rows)
  # Articles go on behind those of the first corpus.
  np.testing.assert_array_equal(
      both.passages.article_rows(np.array([base_rows, base_rows + 3, 0])),
      [
          [[base_rows, base_rows + 1]],
          [[base_rows + 1, base_rows + rows]],
          corpus.passages.article_rows(np.array(0)),
      ],
  )
  # By id: all passages of a long record, and none that was removed.
  gone = corpus.passage_text(2)['id']
  kept = corpus.passage_text(5)['id']
  found = both.record_rows(['b', gone, kept, 'a', 'b#1', 'zz'])
  b_rows = [base_rows + r for r in range(1, rows) if r != 2]
  assert [list(f) for f in found] == [b_rows, [], [5], [base_rows], [], []]
  np.testing.assert_array_equal(
      both.passage_rows_by_id(['b', gone, 'a']), [b_rows[0], -1, base_rows]
  )
  # Sentences of an article of which something was removed are left out.
  ((first, limit),) = corpus.passages.article_rows(np.array(2))
  for split, table in corpus.sentences.items():
    passages = np.asarray(table.passages)
    left = (passages < first) | (passages >= limit)
    assert left.sum() == len(both.sentences[split])
    for mine, theirs in enumerate(np.flatnonzero(left)):
      np.testing.assert_array_equal(
          both.sentences[split].ids(mine), table.ids(theirs)
      )
      np.testing.assert_array_equal(
          both.sentences[split].spans_of(mine), table.spans_of(theirs)
      )
  with pytest.raises(ValueError, match='were removed from'):
    overlay_lib.Overlay([corpus], np.array([base_rows]))


def test_a_corpus_with_sentences_of_its_own_is_compacted(tmp_path, corpus):
  """With texts of their own for pretraining, and marks for validation."""

  def records(name, split):
    return [
        {
            'id': f'{name} {i}',
            'title': name,
            'article': str(i // 3),
            'text': f'In {1500 + i} {name} Brown met Eva Green. It was cold.',
            **({'split': 'validation'} if i % 4 == 0 and split else {}),
        }
        for i in range(12)
    ]

  prepare.prepare(
      [_write(tmp_path / 'k.jsonl', records('Ada', True))],
      tmp_path / 'corpus',
      pretraining_sources=[_write(tmp_path / 'p.jsonl', records('Ben', True))],
      vocab=str(corpus.directory),
      workers=1,
      progress=False,
  )
  made = corpus_lib.Corpus.open(tmp_path / 'corpus')
  assert set(made.sentences) == {'knowledge', 'pretraining', 'validation'}
  source = prepare.records_lib.Records(
      [prepare.sources_lib.Items(records('Cleo', False), 'c')]
  )
  list(source.check())
  prepare.prepare_more(made, source, tmp_path / 'more', progress=False)
  added = corpus_lib.Corpus.open(tmp_path / 'more')
  both = overlay_lib.Overlay([made, added], np.array([4, 5, 13]))
  data_compaction.compact(both, tmp_path / 'compacted', progress=False)
  found = corpus_lib.Corpus.open(tmp_path / 'compacted')
  found.verify()
  live = np.setdiff1d(np.arange(24), both.removed)
  for row, old in enumerate(live.tolist()):
    assert found.passage_text(row) == both.passage_text(old)

  def sentences(opened, removed=()):
    """What every sentence says, by split."""
    said = []
    for split, table in opened.sentences.items():
      for i in range(len(table)):
        passage = int(table.passages[i])
        name = opened.passage_text(passage)['id'] if passage >= 0 else None
        if passage not in removed:
          spans = table.spans_of(i).tolist()
          said.append((split, table.ids(i).tolist(), name, spans))
    return sorted(said, key=str)

  expected = sentences(made, [4, 5]) + sentences(added, [1])
  assert sentences(found) == sorted(expected, key=str)
  # The records say the same as the tables.
  import tensorflow_datasets as tfds

  stored = tfds.builder_from_directory(found.directory / 'sentences')
  for split, table in found.sentences.items():
    rows = [r['passage'] for r in stored.as_data_source(split=split)]
    np.testing.assert_array_equal(rows, table.passages)
  stored = tfds.builder_from_directory(found.directory / 'passages')
  articles = [r['article'] for r in stored.as_data_source(split='train')]
  np.testing.assert_array_equal(articles, found.passages.articles)


@pytest.fixture(scope='module')
def table():
  """Clustered rows: 3,000 of a generation, 40 added."""
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(30, 16))
  points = centres[rng.integers(0, 30, 3040)] + rng.normal(size=(3040, 16)) / 3
  return points.astype(np.float32)


@pytest.fixture(scope='module')
def scann_config():
  return config_lib.MipsConfig(
      backend='scann', num_leaves=40, leaves_to_search=20
  )


@pytest.fixture(scope='module')
def published(tmp_path_factory, table, scann_config):
  folder = tmp_path_factory.mktemp('generation')
  lineage = generation.Lineage(1, 'p', 't', 'c', 3000, 16)
  return generation.load(
      generation.publish(folder, lineage, table[:3000], scann_config)
  )


def test_scann_is_kept_and_what_was_added_is_searched_beside_it(
    published, table, scann_config, monkeypatch
):
  built = []
  original = scann.ScannSearch.__init__

  def record(self, embeddings, config, directory=None, *args):
    built.append(directory)
    original(self, embeddings, config, directory, *args)

  monkeypatch.setattr(scann.ScannSearch, '__init__', record)
  rng = np.random.default_rng(1)
  removed = np.sort(rng.choice(3040, 200, replace=False)).astype(np.int64)
  index = documents_lib.Index(
      published, (published.embeddings, table[3000:3010], table[3010:]), removed
  )
  search = index.make_search(scann_config)
  assert isinstance(search, merged_search.Beside)
  assert built == [published.path / 'scann']
  exact = search_lib.ExactSearch(table, removed=removed)
  queries = table[rng.choice(3040, 200)] + rng.normal(size=(200, 16)) / 5
  queries = queries.astype(np.float32)
  exclude = np.zeros((200, 2, 2), np.int64)
  exclude[:, 0] = [2990, 3005]
  exclude[:100, 1] = [3000, 3020]
  for ranges in (None, exclude):
    found = search.search(queries, 8, ranges)
    wanted = exact.search(queries, 8, ranges)
    assert not np.isin(found, removed).any()
    assert search_lib.overlap(found, wanted) > 0.95
    assert (np.diff(np.sort(found, axis=1), axis=1) > 0).all()
    # What was added is searched exactly.
    for mine, theirs in zip(found, wanted, strict=True):
      assert {r for r in theirs if r >= 3000} <= {*mine.tolist()}
  assert (wanted >= 3000).any()
  np.testing.assert_array_equal(
      index.live_rows, np.setdiff1d(np.arange(3040), removed)
  )


def test_two_searches_side_by_side_equal_one(table):
  """Also where one side has hardly any row left, or none."""
  rng = np.random.default_rng(2)
  queries = rng.normal(size=(6, 16)).astype(np.float32)
  for removed in ([], [0, 1, 2, 3, 4], [3, 20, 21, 22], list(range(20, 25))):
    removed = np.array(removed, np.int64)
    split = np.searchsorted(removed, 20)
    search = merged_search.Beside(
        (
            search_lib.ExactSearch(table[:20], removed=removed[:split]),
            search_lib.ExactSearch(table[20:25], removed=removed[split:] - 20),
        ),
        table[:25],
        removed,
    )
    whole = search_lib.ExactSearch(table[:25], removed=removed)
    exclude = np.zeros((6, 3, 2), np.int64)
    exclude[1:, 0] = [0, 12]
    exclude[2:, 1] = [5, 18]
    exclude[3:, 2] = [19, 23]
    for k, ranges in ((7, None), (20, None), (1, exclude)):
      np.testing.assert_array_equal(
          search.search(queries, k, ranges), whole.search(queries, k, ranges)
      )
    with pytest.raises(ValueError, match='may have only'):
      search.search(queries, 26 - len(removed))


def _add(workdir, *records, command=editing.add, **options):
  source = _write(workdir.parent / 'input.jsonl', records)
  return command(workdir, [source], progress=False, **options)


def _names(workdir):
  """What is in the folder of the documents."""
  return sorted(os.listdir(workdir / 'documents'))


_A = {'id': 'a', 'title': 'A', 'text': 'Ada Brown lit the lamp of Bremen.'}
_B = {'id': 'b', 'title': 'B', 'text': _LONG}


def test_what_commands_report_and_leave(workdir, tmp_path, corpus):
  rows = len(corpus.passages)
  done = _add(workdir, _A, _B)
  longer = done.added - 1
  assert longer > 2
  assert (done.version, done.step, done.removed) == (1, 10, 0)
  assert (done.embedded, done.live) == (done.added, rows + done.added)
  again = _add(workdir, {**_B, 'text': 'Short now.'}, command=editing.update)
  assert (again.version, again.added, again.removed) == (2, 1, longer)
  assert again.embedded == 1  # Only what is new.
  ids = tmp_path / 'ids.txt'
  ids.write_text('a\n\nzz\nb\n')
  with pytest.raises(ValueError, match="The document 'zz' is not there"):
    editing.delete(workdir, ids)
  last = editing.delete(workdir, ids, ignore_missing=True)
  assert (last.version, last.added, last.removed) == (3, 0, 2)
  assert (last.embedded, last.missing, last.live) == (0, 1, rows)
  assert _names(workdir) == [
      '.documents.lock', 'corpus-1', 'corpus-2', 'index-1', 'index-2',
      # The one before is for who is just opening it, until the next command.
      'manifest.json', 'removed-2.npy', 'removed-3.npy',
  ]
  # A document that was removed can come back; --ignore_missing adds.
  _add(workdir, _A)
  assert _add(
      workdir, _B, command=editing.update, ignore_missing=True
  ).missing == 1
  assert _open(workdir).corpus.record_rows(['a', 'b'])[1].shape == (longer,)
  # The corpus and the index of the job are what they were.
  corpus.verify()
  assert os.listdir(workdir / 'index/10')


def test_errors_name_what_is_wrong(workdir, tmp_path, corpus):
  first = corpus.passage_text(0)['id']
  _add(workdir, _A, _B)
  before = _names(workdir)
  for records, error in (
      ([_A], "The document 'a' is there already; `realm-jax index update`"),
      (
          [{'id': first, 'text': 'x'}, _A, _B],
          f"The documents {first!r}, 'a', 'b' are there already",
      ),
      ([{'id': 'b#1', 'text': 'x'}], "'b#1' is there already"),
      ([{'text': 'x'}], r'input.jsonl:1: no field `id`'),
      ([{'id': 'x', 'text': 'x'}, {'id': 'y'}], r'input.jsonl:2: no field `te'),
      ([{'id': 'x', 'text': 'x'}] * 2, r'input.jsonl:2: the id .x. is already'),
      ([{'id': 'x', 'text': '\u200b'}], 'no wordpiece'),
  ):
    with pytest.raises(ValueError, match=error):
      _add(workdir, *records)
  # A part of a long document cannot take the id of another one.
  _add(workdir, {'id': 'c#1', 'title': '', 'text': 'Short.'})
  with pytest.raises(ValueError, match=r"already has the id 'c#1'"):
    _add(workdir, {**_B, 'id': 'c'})
  missing = [{'id': f'm{i}', 'text': 'x'} for i in range(7)]
  with pytest.raises(
      ValueError, match=r"'m0', 'm1', 'm2', 'm3', 'm4' and 2 more are not there"
  ):
    _add(workdir, *missing, command=editing.update)
  ids = tmp_path / 'ids.jsonl'
  for text, error in (
      ('{"id": 3}\n{"name": 3}\n', r'ids.jsonl:2: no field `id`'),
      ('{"id": [3]}', r'ids.jsonl:1: the field `id` is of type list'),
      ('3', r'ids.jsonl:1: a JSON int'),
      ('', 'names no id'),
  ):
    ids.write_text(text)
    with pytest.raises(ValueError, match=error):
      editing.delete(workdir, ids)
  everything = [
      {'id': corpus.passage_text(r)['id']} for r in range(len(corpus.passages))
  ]
  _write(ids, [*everything, {'id': 'a'}, {'id': 'b'}, {'id': 'c#1'}])
  with pytest.raises(ValueError, match='Nothing would remain'):
    editing.delete(workdir, ids)
  with pytest.raises(FileNotFoundError, match='no file or folder'):
    editing.add(workdir, [str(tmp_path / 'nothing.jsonl')])
  with pytest.raises(FileNotFoundError, match='There is no file'):
    editing.delete(workdir, tmp_path / 'nothing.txt')
  with pytest.raises(FileNotFoundError, match='config'):
    editing.add(tmp_path / 'nowhere', [str(ids)])
  assert not (tmp_path / 'nowhere').exists()
  with (
      process.lock(workdir / 'documents', 'command that changes documents'),
      pytest.raises(RuntimeError, match='Another command that changes docu'),
  ):
    editing.delete(workdir, ids)
  # None of that left anything.
  assert _names(workdir) == [
      *before[:2], 'corpus-2', 'index-1', 'index-2', 'manifest.json'
  ]
  shutil.rmtree(workdir / 'index')
  with pytest.raises(FileNotFoundError, match='has no index yet; build one'):
    _add(workdir, {'id': 'x', 'text': 'x'})


@pytest.mark.parametrize('where', ['prepare', 'embed', 'publish', 'write'])
def test_a_full_disk_changes_nothing(workdir, monkeypatch, where):
  _add(workdir, _A)
  before = _names(workdir), edition.read(workdir / 'documents')

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  module, name = {
      'prepare': (prepare, '_write'),
      'embed': (documents_lib.Documents, 'embed'),
      'publish': (generation.Writer, 'publish'),
      'write': (checkpoint, 'write_json'),
  }[where]
  monkeypatch.setattr(module, name, fail)
  with pytest.raises(OSError, match='No space left on device'):
    _add(workdir, {**_A, 'text': 'New.'}, command=editing.update)
  assert _names(workdir) == before[0]
  assert edition.read(workdir / 'documents').digest == before[1].digest


def test_a_full_disk_leaves_nothing_of_a_compaction(
    workdir, tmp_path, monkeypatch
):
  _add(workdir, _A)

  def fail(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(generation.Writer, 'publish', fail)
    with pytest.raises(OSError, match='No space left on device'):
      compaction.compact(workdir, tmp_path / 'plain', progress=False)
  assert not (tmp_path / 'plain').exists()
  compaction.compact(workdir, tmp_path / 'plain', progress=False)
  assert (tmp_path / 'plain').exists()


_KILLED = """
import os, signal, sys
from realm_jax import main
from realm_jax.builder import edition

def kill(*args):
  os.kill(os.getpid(), signal.SIGKILL)

edition.files.write_json = kill
main.run()
"""


def test_a_killed_command_changes_nothing(workdir, queries):
  _add(workdir, _A)
  ids, _ = _find(workdir, queries[:2])
  source = _write(workdir.parent / 'input.jsonl', [_B])
  done = subprocess.run(
      [
          sys.executable, '-c', _KILLED, 'index', 'add',
          f'--workdir={workdir}', f'--input={source}',
      ],
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert {'corpus-2', 'index-2'} <= {*_names(workdir)}
  assert _open(workdir).edition.version == 1
  assert _find(workdir, queries[:2])[0] == ids
  # The next command removes what is left of it, and does it.
  assert editing.add(workdir, [source], progress=False).version == 2
  found = {name for row in _find(workdir, queries[:1])[0] for name in row}
  assert {'a', 'b#0', 'b#1'} <= found
  assert not any('tmp' in name for name in _names(workdir))


def test_damage_and_foreign_corpora_are_refused(workdir, tmp_path, corpus):
  _add(workdir, _A)
  ids = tmp_path / 'ids.txt'
  ids.write_text('a')
  editing.delete(workdir, ids)
  _add(workdir, _A, _B)
  folder = workdir / 'documents'
  assert [f.problems for f in status.verify(workdir)] == [[], []]

  def refused(path, change, error, only_verified=False):
    good = path.read_bytes()
    path.write_bytes(change(good))
    _, found = status.verify(workdir)
    assert found.path == folder and re.search(error, *found.problems)
    if not only_verified:
      with pytest.raises(ValueError, match=error):
        retriever.Retriever.load(workdir).search(['x'], 1)
    path.write_bytes(good)

  def flip(data, at=-5):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

  refused(
      folder / 'manifest.json',
      lambda data: data.replace(b'"version": 3', b'"version": 4'),
      'manifest.json is damaged: its SHA-256 is',
  )
  refused(
      folder / 'manifest.json',
      lambda data: data.replace(b'_version": 1', b'_version": 9'),
      'has format 9, from a newer realm_jax; this one reads format 1',
  )
  refused(folder / 'manifest.json', lambda data: data[:40], 'not readable')
  refused(folder / 'removed-3.npy', flip, 'removed-3.npy is damaged')
  tokens = folder / 'corpus-3/tables/passage_tokens.bin'
  refused(tokens, lambda data: data[:-2], 'passage_tokens.bin has')
  refused(tokens, flip, 'passage_tokens.bin has the SHA-256', True)
  shard = folder / 'index-3/10/shard-00000.npy'
  refused(shard, flip, 'shard-00000.npy', True)
  # Embeddings can be made again, and are.
  ids, scores = _find(workdir, ['x'])
  shard.write_bytes(flip(shard.read_bytes()))
  assert _find(workdir, ['x'])[0] == ids
  # The corpus of the job was prepared anew, with other texts.
  other = _write(tmp_path / 'other.jsonl', [_A, _B])
  prepare.prepare(
      [other], tmp_path / 'other', vocab=str(corpus.directory), workers=1,
      progress=False,
  )
  config = config_lib.to_dict(
      dataclasses.replace(_config(corpus), corpus=str(tmp_path / 'other'))
  )
  files.write_json(workdir / 'config.json', config)
  made = corpus_lib.Corpus.open(tmp_path / 'other').fingerprint[:16]
  with pytest.raises(
      ValueError, match=rf'{made}, {corpus.fingerprint[:16]} in manifest.json'
  ):
    _find(workdir, ['x'])


def test_embeddings_of_different_parameters_never_meet(
    workdir, params, corpus, queries, caplog
):
  caplog.set_level(logging.INFO)
  _add(workdir, _A, _B)
  _train(workdir, corpus, params[1], 20)
  # The new index has none of what was added; a search makes them itself.
  ids, scores = _find(workdir, queries)
  assert 'embedded anew by the parameters of step 20' in caplog.text
  assert not (workdir / 'documents/index-1/20').exists()
  # The next command keeps them.
  done = _add(workdir, {'id': 'c', 'text': 'Eva Green.'})
  assert done.embedded > 2
  caplog.clear()
  missing = workdir.parent / 'ids.txt'
  missing.write_text('c')
  editing.delete(workdir, missing)
  again_ids, again_scores = _find(workdir, queries)
  assert 'embedded anew' not in caplog.text
  assert again_ids == ids
  np.testing.assert_allclose(again_scores, scores, rtol=2e-6, atol=1e-6)
  # An index whose parameters are gone can be searched, but not joined.
  shutil.rmtree(workdir / 'retriever')
  shutil.rmtree(workdir / 'checkpoints/20')
  shutil.rmtree(workdir / 'documents/index-1/20')
  with pytest.raises(ValueError, match='no longer in') as caught:
    _add(workdir, {'id': 'd', 'text': 'Ben Green.'})
  for seed in (0, 1):  # Both sides.
    digest = checkpoint.params_digest(params[seed]['embedder'])
    assert digest[:16] in str(caught.value)


def test_compaction_takes_up_what_training_made_since(
    workdir, tmp_path, params, corpus, queries
):
  assert compaction.compact(workdir, progress=False) is None
  _add(workdir, _A, _B)
  _train(workdir, corpus, params[1], 20)
  ids, scores = _find(workdir, queries)
  output = tmp_path / 'compacted'
  done = compaction.compact(workdir, output, progress=False)
  assert (done.step, done.output) == (20, output)
  assert _find(workdir, queries)[0] == ids
  assert _open(workdir).is_compacted
  # What was superseded is there for who still reads it, until a command comes.
  assert 'corpus-1' in _names(workdir)
  assert compaction.compact(workdir, progress=False) is None
  assert 'corpus-1' not in _names(workdir)
  # After more training, the compacted corpus needs an index anew.
  _train(workdir, corpus, params[0], 30)
  with pytest.raises(FileNotFoundError, match='realm-jax index compact'):
    _find(workdir, queries)
  done = compaction.compact(workdir, progress=False)
  assert done.step == 30
  assert done.embedded == len(ids[0])
  assert sorted(_find(workdir, queries)[0][0]) == sorted(ids[0])
  with pytest.raises(FileExistsError, match='compacted'):
    _add(workdir, {'id': 'c', 'text': 'Eva Green.'})
    compaction.compact(workdir, output, progress=False)


def test_evaluate_inspect_and_export_see_the_documents(
    workdir, tmp_path, corpus
):
  gone = corpus.passage_text(3)['id']
  ids = tmp_path / 'ids.txt'
  ids.write_text(gone)
  editing.delete(workdir, ids)
  _add(workdir, _A, _B)
  questions = [
      questions_lib.Question(
          'Who lit the lamp of Bremen?', ['Ada Brown'], passage_id=name
      )
      for name in ('a', 'b', gone)
  ]
  (result,) = evaluate.evaluate(workdir, questions, limit=8)
  live = _open(workdir).corpus.num_live
  assert result['passages'] == live
  assert result['index_generation'] == 10
  assert result['documents']['version'] == 2
  assert result['questions']['all']['with_gold_passage'] == 2
  assert result['questions']['all']['gold']['recall_at_100'] == 1.0
  # Without the index it is embedded, and the same is found.
  os.rename(workdir / 'index', tmp_path / 'index')
  (again,) = evaluate.evaluate(workdir, questions, limit=8)
  assert again['index_generation'] is None
  assert again['questions'] == result['questions']
  os.rename(tmp_path / 'index', workdir / 'index')
  # The corpus alone, if that is asked for.
  (plain,) = evaluate.evaluate(
      workdir, questions, limit=8, corpus=corpus.directory
  )
  assert plain['passages'] == len(corpus.passages)
  assert 'documents' not in plain

  found = inspect.inspect(workdir, 'Ada Brown lit the [MASK].', live + 1)
  shown = {document.id for document in found.documents}
  assert {'a', 'b#0'} <= shown and gone not in shown

  export.run(workdir, 'index', tmp_path / 'out')
  lines = (tmp_path / 'out/ids.jsonl').read_text().splitlines()
  names = [json.loads(line) for line in lines]
  assert len(names) == live and {*names} == shown
  table = np.load(tmp_path / 'out/embeddings.npy')
  loaded = retriever.Retriever.load(workdir)
  emb = loaded.embed_passages([('A', _A['text'])])
  np.testing.assert_allclose(table[names.index('a')], emb[0], atol=2e-5)
  about = json.loads((tmp_path / 'out/index.json').read_text())
  assert about['rows'] == live and about['documents']['removed'] == 1
