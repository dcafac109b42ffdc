"""Documents added, replaced and removed equal a newly prepared corpus."""

import documents_workdir as job
import helpers
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.builder import documents
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.index import generation
from realm_jax.index import scann
from realm_jax.index import search as search_lib
from realm_jax.prepare import compaction
from realm_jax.prepare import prepare

pytest_plugins = ['documents_workdir']


class _Model:
  """The expected documents: records in the order of their last writing."""

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
    long = job.LONG[: self.rng.integers(1, len(job.LONG))]
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
        documents.add(workdir, [job.write(file, records)], progress=False)
      case 'update':
        names = self.some(3)
        records = [{'id': n, 'title': '', 'text': self.text()} for n in names]
        documents.update(workdir, [job.write(file, records)], progress=False)
        for name in names:
          del self.records[name]
      case 'delete':
        names, records = self.some(int(self.rng.integers(1, 6))), []
        documents.delete(workdir, job.write(file, [{'id': n} for n in names]))
        for name in names:
          del self.records[name]
    self.records |= {record['id']: record for record in records}

  def rebuild(self, directory, corpus, params):
    """Prepares, and embeds, the documents from the beginning."""
    prepare.prepare(
        [job.write(directory / 'all.jsonl', self.records.values())],
        directory / 'corpus',
        vocab=str(corpus.directory),
        workers=1,
        progress=False,
    )
    made = corpus_lib.Corpus.open(directory / 'corpus')
    return job.make_workdir(directory / 'job', made, params)


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('seed', [0, 1])
def test_random_changes_equal_a_rebuild(
    workdir, tmp_path, corpus, params, queries, seed
):
  model = _Model(corpus, seed)
  for i in range(3):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  # Training and its index advance; the changes then follow.
  job.train(workdir, corpus, params[1], 20)
  for i in range(3, 7):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  rebuilt = model.rebuild(_folder(tmp_path / 'rebuilt'), corpus, params[1])
  ids, scores = _assert_same_hits(workdir, rebuilt, queries)
  added = {name for row in ids for name in row if name.startswith('new')}
  assert added and any('#' in name for name in added)

  # A compaction changes nothing but the row numbers.
  done = documents.compact(workdir, progress=False)
  assert done.embedded == 0
  again_ids, again_scores = job.find(workdir, queries)
  assert again_ids == ids
  np.testing.assert_array_equal(again_scores, scores)
  made = job.open_documents(workdir).corpus
  wanted = job.open_documents(rebuilt).corpus
  made.verify()
  _assert_same_corpus(made, wanted)
  # Further changes work on this state.
  for i in range(7, 9):
    model.act(workdir, tmp_path / f'{i}.jsonl')
  rebuilt = model.rebuild(_folder(tmp_path / 'later'), corpus, params[1])
  _assert_same_hits(workdir, rebuilt, queries)


def _assert_same_hits(workdir, rebuilt, queries):
  """Returns the ids and scores, which are the same up to rounding.

  The last bits of an embedding depend on the padding of its batch, so documents
  may change places only if their scores differ by as little.
  """
  ids, scores = job.find(workdir, queries)
  expected_ids, expected_scores = job.find(rebuilt, queries)
  np.testing.assert_allclose(scores, expected_scores, rtol=2e-6, atol=1e-6)
  for found, wanted, score in zip(ids, expected_ids, scores, strict=True):
    assert sorted(found) == sorted(wanted)
    at = [found.index(name) for name in wanted]
    np.testing.assert_allclose(score[at], score, rtol=2e-6, atol=1e-6)
  return ids, scores


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
      {'id': 'b', 'title': 'B', 'text': job.LONG},
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
  # Articles are numbered after those of the first corpus.
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
      [job.write(tmp_path / 'k.jsonl', records('Ada', True))],
      tmp_path / 'corpus',
      pretraining_sources=[
          job.write(tmp_path / 'p.jsonl', records('Ben', True))
      ],
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
  compaction.compact(both, tmp_path / 'compacted', progress=False)
  found = corpus_lib.Corpus.open(tmp_path / 'compacted')
  found.verify()
  live = np.setdiff1d(np.arange(24), both.removed)
  for row, old in enumerate(live.tolist()):
    assert found.passage_text(row) == both.passage_text(old)

  def sentences(opened, removed=()):
    """Returns the wordpieces of every sentence, by split."""
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
      helpers.publish(folder, lineage, table[:3000], scann_config)
  )


def test_scann_is_kept_and_added_rows_are_searched_exactly(
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
  index = document_store.Index(
      published,
      corpus_lib.Chained(
          [published.embeddings, table[3000:3010], table[3010:]]
      ),
      removed,
  )
  search = index.make_search(scann_config)
  assert isinstance(search, search_lib.MergedSearch)
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
    # Added documents are searched exactly.
    for mine, theirs in zip(found, wanted, strict=True):
      assert {r for r in theirs if r >= 3000} <= {*mine.tolist()}
  assert (wanted >= 3000).any()
  np.testing.assert_array_equal(
      index.live_rows, np.setdiff1d(np.arange(3040), removed)
  )


def test_merged_searches_equal_one(table):
  """Also where one side has hardly any row left, or none."""
  rng = np.random.default_rng(2)
  queries = rng.normal(size=(6, 16)).astype(np.float32)
  for removed in ([], [0, 1, 2, 3, 4], [3, 20, 21, 22], list(range(20, 25))):
    removed = np.array(removed, np.int64)
    split = np.searchsorted(removed, 20)
    search = search_lib.MergedSearch(
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
