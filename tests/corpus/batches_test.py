"""From tables to batches: layouts, masks, order, and what must not leak."""

import dataclasses
import pathlib
import zlib

import grain
import helpers
import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import stages
from realm_jax.trainer.stages import ict
from realm_jax.trainer.stages import mlm
from realm_jax.trainer.stages import realm

_toy, _Special = helpers.toy_passages, helpers.Specials


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


def _config(corpus, objective, **values):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.batch_size = 16
  config.lengths = config_lib.LengthsConfig(query=24, document=40, masks=4)
  return dataclasses.replace(config_lib.resolve(config), **values)


def _take(corpus, config, count, **parts):
  stream = helpers.batches(corpus, config, **parts)
  return [next(stream) for _ in range(count)]


def _documents(length, rows, cut=None):
  template = inputs.Template(_Special, length, length)
  return template.documents(_toy(), np.array(rows), cut=cut)


def test_documents_by_hand():
  ids, types = _documents(10, [[0, 1, -1]])
  np.testing.assert_array_equal(
      ids,
      [[
          [1, 10, 11, 2, 20, 21, 22, 2, 0, 0],
          [1, 2, 30, 2, 0, 0, 0, 0, 0, 0],
          [1, 2, 2, 0, 0, 0, 0, 0, 0, 0],
      ]],
  )
  np.testing.assert_array_equal(
      types,
      [[
          [0, 0, 0, 0, 1, 1, 1, 1, 0, 0],
          [0, 0, 1, 1, 0, 0, 0, 0, 0, 0],
          [0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
      ]],
  )


def test_a_document_too_long_loses_body_and_keeps_its_end():
  ids, _ = _documents(7, [0])
  np.testing.assert_array_equal(ids, [[1, 10, 11, 2, 20, 21, 2]])
  ids, _ = _documents(4, [0])
  np.testing.assert_array_equal(ids, [[1, 10, 2, 2]])


def test_a_cut_leaves_out_a_piece_of_the_body():
  ids, _ = _documents(8, [0, 0], (np.array([1, 0]), np.array([2, 0])))
  np.testing.assert_array_equal(
      ids, [[1, 10, 11, 2, 20, 22, 2, 0], [1, 10, 11, 2, 20, 21, 22, 2]]
  )


def test_joint_by_hand():
  query = np.array([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0]])
  ids, types = inputs.assemble_joint(
      _toy(), np.array([[-1, 0], [1, 0]]), query, np.array([4, 3]), 8, _Special
  )
  np.testing.assert_array_equal(
      ids,
      [
          [[1, 7, 8, 2, 2, 0, 0, 0], [1, 7, 8, 2, 20, 21, 22, 2]],
          [[1, 9, 2, 30, 2, 0, 0, 0], [1, 9, 2, 20, 21, 22, 2, 0]],
      ],
  )
  np.testing.assert_array_equal(
      types,
      [
          [[0, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]],
          [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]],
      ],
  )


@pytest.mark.parametrize('masking', ['salient', 'random_span', 'random_token'])
def test_what_is_masked_is_what_is_asked_for(corpus, masking):
  config = _config(corpus, 'realm', masking=masking)
  table = corpus.sentences['pretraining']
  mask_id = corpus.tokenizer.mask_id
  salient = 0
  for batch in _take(corpus, config, 6):
    for i, row in enumerate(batch.row_B):
      used = batch.inputs.mask_BM[i]
      positions = batch.inputs.positions_BM[i][used]
      query = batch.inputs.query_ids_BQ[i].copy()
      # No orphan: a mask is a target, a target is a mask.
      assert sorted(positions) == np.flatnonzero(query == mask_id).tolist()
      query[positions] = batch.inputs.targets_BM[i][used]
      length = batch.inputs.query_lengths_B[i]
      np.testing.assert_array_equal(query[1 : length - 1], table.ids(row))
      assert not query[length:].any()
      spans = [list(range(a + 1, b + 1)) for a, b in table.spans_of(row)]
      salient += sorted(positions) in spans
  if masking == 'salient':
    assert salient == 6 * 16
  else:
    assert salient < 6 * 16


@pytest.mark.parametrize('objective', ['mlm', 'ict', 'realm'])
def test_streams_repeat_however_they_are_divided(corpus, objective):
  config = _config(corpus, objective)
  whole = _take(corpus, config, 4)
  again = _take(corpus, config, 4)
  for a, b in zip(whole, again, strict=True):
    jax.tree.map(np.testing.assert_array_equal, a, b)
  for rows in (np.arange(8), np.arange(8, 16), np.array([0, 1, 8, 9])):
    parts = _take(corpus, config, 4, rows=rows)
    for batch, part in zip(whole, parts, strict=True):
      wanted = jax.tree.map(lambda x, rows=rows: x[rows], batch)
      jax.tree.map(np.testing.assert_array_equal, part, wanted)


class _Numbers:
  """Samples that show a row and the next draws of its generator."""

  def __init__(self, first, size):
    self._first, self._size = first, size

  def __len__(self):
    return self._size

  def __getitem__(self, index):
    return self._first + index

  def sample(self, row, rng):
    return row, rng.integers(7), rng.random(), rng.integers(7)


@pytest.mark.parametrize('rows', [None, np.array([1, 4, 5])])
def test_samples_are_those_of_grain(rows):
  sources = {'a': (_Numbers(0, 9), 0.7), 'b': (_Numbers(100, 5), 0.3)}

  class Stage:
    config = config_lib.Config(seed=3, batch_size=6)

    def sources(self):
      return sources

    def assemble(self, samples):
      return samples

  parts = [
      grain.MapDataset.source(source)
      .seed(zlib.crc32(f'{name} 3'.encode()))
      .shuffle()
      .repeat()
      .random_map(source.sample)
      for name, (source, _) in sources.items()
  ]
  mixed = grain.MapDataset.mix(parts, [0.7, 0.3]).batch(6)
  batches = examples_lib.training_batches(Stage(), 2, rows)
  for number in range(2, 6):
    got, wanted = next(batches), mixed[number]
    for a, b in zip(got, wanted, strict=True):
      np.testing.assert_array_equal(a, b if rows is None else b[rows])


@pytest.mark.parametrize('objective', ['mlm', 'ict', 'realm'])
@pytest.mark.parametrize('rows', [None, np.arange(4, 8)])
def test_a_stream_resumes_where_it_was(corpus, objective, rows):
  config = _config(corpus, objective)
  expected = _take(corpus, config, 6, rows=rows)[3:]
  resumed = _take(corpus, config, 3, rows=rows, start=3)
  for batch, again in zip(expected, resumed, strict=True):
    jax.tree.map(np.testing.assert_array_equal, again, batch)


def test_each_epoch_has_its_own_order_and_its_own_choices(corpus):
  config = _config(corpus, 'ict', batch_size=1)
  size = len(ict.ClozeSentences(corpus, config, 'knowledge'))
  seen = _take(corpus, config, 2 * size)
  orders = [
      [int(batch.row_B[0]) for batch in seen[start : start + size]]
      for start in (0, size)
  ]
  assert sorted(orders[0]) == sorted(orders[1])  # Each sentence once.
  assert orders[0] != orders[1]
  documents = [
      {int(b.row_B[0]): b.inputs.doc_ids_BS.tobytes() for b in half}
      for half in (seen[:size], seen[size:])
  ]
  differing = sum(
      documents[0][row] != documents[1][row] for row in documents[0]
  )
  # Cut in one epoch and whole in the other: 2 * 0.9 * 0.1 of them.
  assert 0.05 * size < differing < 0.4 * size


def test_ict_cuts_the_sentence_nine_times_in_ten(corpus):
  config = _config(corpus, 'ict')
  table = corpus.sentences['knowledge']
  kept = total = 0
  for batch in _take(corpus, config, 40):
    np.testing.assert_array_equal(
        batch.inputs.passage_B, table.passages[batch.row_B]
    )
    for i, row in enumerate(batch.row_B):
      sentence = table.ids(row).tolist()
      document = batch.inputs.doc_ids_BS[i].tolist()
      runs = [
          document[j : j + len(sentence)]
          for j in range(len(document) - len(sentence) + 1)
      ]
      kept += sentence in runs
      total += 1
      query = batch.inputs.query_ids_BQ[i]
      assert query[1 : len(sentence) + 1].tolist() == sentence
      assert document.count(corpus.tokenizer.sep_id) == 2
  assert 0.05 < kept / total < 0.16


def test_every_batch_of_the_warm_up_mixes_its_two_kinds(corpus):
  """Three quarters of each batch see their own passage, the rest another."""
  config = _config(corpus, 'mlm', mlm=config_lib.MlmConfig(0.75))
  knowledge = corpus.sentences['knowledge']
  bodies = {
      corpus.passages.title_and_body(row)[1].tobytes()
      for row in range(len(corpus.passages))
  }
  null = 0
  for batch in _take(corpus, config, 40):
    own = 0
    for row, ids, types in zip(
        batch.row_B,
        batch.inputs.joint_ids_BT,
        batch.inputs.joint_types_BT,
        strict=True,
    ):
      seen = ids[types == 1][:-1].astype(np.uint16)
      passage = knowledge.passages[row % len(knowledge)]
      body = corpus.passages.title_and_body(passage)[1]
      own += np.array_equal(seen, body)
      null += len(seen) == 0
      assert len(seen) == 0 or seen.tobytes() in bodies
    # A sentence may draw its own passage at random.
    assert 12 <= own <= 13
  assert 50 < null < 110  # Half of the 160 others.


@pytest.mark.parametrize(('null_rate', 'alone'), [(0.0, 0), (1.0, 1)])
def test_a_warm_up_without_own_passages_sees_null_as_often_as_asked(
    corpus, null_rate, alone
):
  """With the null document only, it trains the baseline without retrieval."""
  config = _config(corpus, 'mlm', mlm=config_lib.MlmConfig(0.0, null_rate))
  trained_on = corpus.sentences['pretraining']
  for batch in _take(corpus, config, 10):
    # Segment 1 is [SEP] alone, or a body and [SEP].
    assert ((batch.inputs.joint_types_BT.sum(axis=1) == 1) == alone).all()
    for i, row in enumerate(batch.row_B):
      ids = batch.inputs.joint_ids_BT[i]
      sentence, read = trained_on.ids(row), ids[1 : trained_on.lengths[row] + 1]
      masked = read == corpus.tokenizer.mask_id
      np.testing.assert_array_equal(read[~masked], sentence[~masked])


@pytest.mark.parametrize('objective', ['ict', 'mlm'])
def test_what_is_not_read_is_no_example(corpus, objective):
  config = _config(corpus, objective, mlm=config_lib.MlmConfig(1.0))
  table = corpus.sentences['knowledge']

  def usable():
    if objective == 'ict':
      examples = ict.ClozeSentences(corpus, config, 'knowledge')
    else:
      examples = mlm.OwnPassage(corpus, config, 'knowledge')
    return {examples[i] for i in range(len(examples))}

  everything = usable()
  # Room for 13 wordpieces of title and body, or for 23 of sentence and body.
  some, none = {'ict': (16, 4), 'mlm': (2, -16)}[objective]
  config.lengths.document = some
  expected = set()
  for row in everything:
    title, body = corpus.passages.title_and_body(table.passages[row])
    room = 13 - len(title)
    if objective == 'mlm':
      room = 25 - min(len(table.ids(row)) + 2, 24)
    ids, seen = table.ids(row).tolist(), body[: max(room, 0)].tolist()
    if any(
        seen[i : i + len(ids)] == ids for i in range(len(seen) - len(ids) + 1)
    ):
      expected.add(row)
  assert usable() == expected
  assert 0.1 * len(everything) < len(expected) < 0.95 * len(everything)
  # The sentences that are left can be seen, unless ICT cut them out.
  shown = total = 0
  for batch in _take(corpus, config, 10):
    for i, row in enumerate(batch.row_B):
      name = 'doc_ids_BS' if objective == 'ict' else 'joint_ids_BT'
      read = getattr(batch.inputs, name)[i].tolist()
      ids = table.ids(row).tolist()
      shown += any(
          read[j : j + len(ids)] == ids for j in range(len(read) - len(ids) + 1)
      )
      total += 1
  assert shown == total if objective == 'mlm' else 0 < shown < 0.2 * total
  config.lengths.document = none
  with pytest.raises(ValueError, match='which ICT|its passage shows'):
    usable()


def test_exclusions_follow_the_config(corpus):
  table = corpus.sentences['knowledge']
  for trivial in ('passage', 'article', 'none'):
    config = _config(
        corpus, 'realm', sentences='knowledge', trivial=trivial
    )
    batch = _take(corpus, config, 1)[0]
    own = table.passages[batch.row_B]
    lo, hi = batch.inputs.exclude_BR2[:, 0].T
    if trivial == 'none':
      assert not lo.any() and not hi.any()
      continue
    assert ((lo <= own) & (own < hi)).all()
    for a, b in zip(lo, hi, strict=True):
      articles = set(corpus.passages.articles[a:b].tolist())
      assert len(articles) == 1
      if trivial == 'passage':
        assert b - a == 1
      else:
        whole = corpus.passages.articles == articles.pop()
        assert whole.sum() == b - a
  config = _config(corpus, 'realm', sentences='pretraining')
  assert not _take(corpus, config, 1)[0].inputs.exclude_BR2.any()


def test_held_out_sentences_are_never_trained_on(corpus):
  config = _config(corpus, 'realm')
  trained = {
      ids.tobytes()
      for ids in map(
          corpus.sentences['pretraining'].ids,
          range(len(corpus.sentences['pretraining'])),
      )
  }
  held_out = corpus.sentences['validation']
  assert len(held_out)
  for row in range(len(held_out)):
    assert held_out.ids(row).tobytes() not in trained
  assert examples_lib.sentences_of(corpus, config) == 'pretraining'


def test_evaluation_is_one_pass_in_a_fixed_order(corpus):
  config = _config(corpus, 'realm')
  first = list(realm.evaluation_batches(corpus, config))
  second = list(realm.evaluation_batches(corpus, config))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  rows = np.concatenate([batch.row_B for batch in first])
  assert len(set(rows.tolist())) == len(rows)
  limited = list(realm.evaluation_batches(corpus, config, limit=5))
  np.testing.assert_array_equal(limited[0].row_B, rows[:5])


def test_queries_are_cut_to_length(corpus):
  tokenizer = corpus.tokenizer
  ids = inputs.encode_queries(['The pet of', 'The pet'], 4, tokenizer)
  pieces = tokenizer.encode('The pet')
  assert ids[0].tolist() == [tokenizer.cls_id, *pieces[:2], tokenizer.sep_id]
  assert ids.shape == (2, 4)


def test_nothing_to_mask_is_said_with_the_limits(corpus):
  config = _config(corpus, 'realm')
  config.lengths = dataclasses.replace(config.lengths, query=2)
  with pytest.raises(ValueError, match=r'no salient span.*query - 2 = 0'):
    helpers.batches(corpus, config)
  with pytest.raises(ValueError, match="split 'news'.*'knowledge'"):
    list(realm.evaluation_batches(corpus, _config(corpus, 'realm'), 'news'))


def test_training_never_tokenises(corpus, monkeypatch):
  """The tables hold wordpieces; no step may go back to the text."""

  def fail(*args, **kwargs):
    raise AssertionError('a training step tokenised something')

  for name in ('encode', 'encode_batch', 'encode_arrays'):
    monkeypatch.setattr(type(corpus.tokenizer), name, fail)
  monkeypatch.setattr(corpus_lib.Corpus, 'passage_text', fail)
  for objective in ('mlm', 'ict', 'realm'):
    config = _config(corpus, objective)
    batch = _take(corpus, config, 1)[0]
    if objective == 'realm':
      template = stages.load(config)(config, corpus).template
      realm.with_candidates(
          batch.inputs, np.zeros((16, 3), int), corpus, template
      )
  assert pathlib.Path(corpus.directory).exists()
