"""The retriever's inputs: prefixes, and titles in their three forms."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.evaluation import inspect
from realm_jax.trainer import examples as examples_lib
from realm_jax.trainer import stages
from realm_jax.trainer.stages import realm

_PREFIX = 'query of a test '
_ENCODERS = pathlib.Path(__file__).parents[1] / 'fixtures' / 'encoders'


class _Special:
  cls_id, sep_id, mask_id, pad_id = 1, 2, 3, 0
  between, num_specials = [2], 3


class _Roberta:
  cls_id, sep_id, mask_id, pad_id = 0, 2, 3, 1
  between, num_specials = [2, 2], 4


def _toy(num_specials=3):
  """Two passages: title [10 11] body [20 21 22], and body [30] alone."""
  return corpus_lib.PassageTable(
      tokens=np.array([10, 11, 20, 21, 22, 30], np.uint16),
      offsets=np.array([0, 5, 6]),
      title_lengths=np.array([2, 0], np.int32),
      articles=np.array([0, 1], np.int32),
      num_specials=num_specials,
  )


@pytest.mark.parametrize('titles, expected, segments', [
    ('segments', [[1, 8, 9, 10, 11, 2, 20, 21, 22, 2],
                  [1, 8, 9, 2, 30, 2], [1, 8, 9, 2, 2]], [6, 4, 4]),
    ('pair', [[1, 8, 9, 10, 11, 2, 20, 21, 22, 2],
              [1, 8, 9, 2, 30, 2], [1, 8, 9, 2, 2]], None),
    ('text', [[1, 8, 9, 10, 11, 7, 20, 21, 22, 2],
              [1, 8, 9, 30, 2], [1, 8, 9, 2]], None),
])  # fmt: skip
def test_documents_with_a_prefix_by_hand(titles, expected, segments):
  template = inputs.Template(_Special, 9, 12, (4,), (8, 9), titles, (7,))
  ids, types = template.documents(_toy(), np.array([0, 1, -1]))
  want = np.zeros((3, 12), int)
  want_types = np.zeros((3, 12), int)
  for row, pieces in enumerate(expected):
    want[row, : len(pieces)] = pieces
    if segments:
      want_types[row, segments[row] : len(pieces)] = 1
  np.testing.assert_array_equal(ids, want)
  np.testing.assert_array_equal(types, want_types)
  null = len(expected[2])
  assert template.null.ids == tuple(ids[2, :null])
  assert template.null.types == tuple(types[2, :null])
  sizes = [len(pieces) for pieces in expected[:2]]
  assert template.lengths(_toy()).tolist() == sizes
  title = _toy().title_lengths
  np.testing.assert_array_equal(
      template.overhead(title) + title + [3, 1], sizes
  )


@pytest.mark.parametrize('titles, expected, segments', [
    ('segments', [[0, 8, 10, 11, 2, 2, 20, 21, 22, 2],
                  [0, 8, 2, 2, 30, 2], [0, 8, 2, 2, 2]], [6, 4, 4]),
    ('text', [[0, 8, 10, 11, 7, 20, 21, 22, 2],
              [0, 8, 30, 2], [0, 8, 2]], None),
])  # fmt: skip
def test_documents_have_the_separators_and_padding_of_the_tokenizer(
    titles, expected, segments
):
  template = inputs.Template(_Roberta, 9, 12, (4,), (8,), titles, (7,))
  toy = _toy(_Roberta.num_specials)
  ids, types = template.documents(toy, np.array([0, 1, -1]))
  want = np.full((3, 12), _Roberta.pad_id)
  want_types = np.zeros((3, 12), int)
  for row, pieces in enumerate(expected):
    want[row, : len(pieces)] = pieces
    if segments:
      want_types[row, segments[row] : len(pieces)] = 1
  np.testing.assert_array_equal(ids, want)
  np.testing.assert_array_equal(types, want_types)
  assert template.null.ids == tuple(expected[2])
  assert template.null.types == tuple(types[2, : len(expected[2])])
  assert template.lengths(toy).tolist() == [len(x) for x in expected[:2]]


def test_the_title_and_the_prefix_have_priority_over_the_body():
  template = inputs.Template(_Special, 9, 6, (), (8, 9), 'text', (7,))
  ids, _ = template.documents(_toy(), np.array([0, 1]))
  assert ids.tolist() == [[1, 8, 9, 10, 11, 2], [1, 8, 9, 30, 2, 0]]


def test_a_query_gets_its_prefix_behind_cls():
  template = inputs.Template(_Special, 6, 9, (4, 5))
  assert template.text_length == 4
  ids = np.array([[1, 30, 2, 0], [1, 31, 32, 2]], np.int32)
  found = template.queries(ids)
  assert found.tolist() == [[1, 4, 5, 30, 2, 0], [1, 4, 5, 31, 32, 2]]
  assert found.dtype == np.int32
  assert inputs.Template(_Special, 6, 9).queries(ids) is ids


@pytest.fixture(scope='module')
def corpus(world):
  return corpus_lib.Corpus.open(world)


def _config(corpus, objective='realm', **model):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.batch_size, config.num_candidates = 4, 3
  config.lengths = config_lib.LengthsConfig(query=40, document=48, masks=4)
  config.model = config_lib.ModelConfig(preset='tiny', **model)
  return config_lib.resolve(config)


def test_a_prefix_that_leaves_no_room_is_refused(corpus):
  count = len(corpus.tokenizer.encode(_PREFIX))
  lengths = config_lib.LengthsConfig(query=count + 3, document=48)
  model = config_lib.ModelConfig(query_prefix=_PREFIX)
  with pytest.raises(
      ValueError,
      match=f'has {count} wordpieces, and config.lengths.query={count + 3}',
  ):
    inputs.Template.of(model, lengths, corpus.tokenizer)
  lengths.query += 1
  assert inputs.Template.of(
      model, lengths, corpus.tokenizer
  ).query_prefix == tuple(corpus.tokenizer.encode(_PREFIX))
  model.query_prefix = 'joined'
  lengths.query = 40
  with pytest.raises(ValueError, match='end it with a space'):
    inputs.Template.of(model, lengths, corpus.tokenizer)


@pytest.mark.parametrize('encoder, good, bad, mend', [
    ('roberta', 'query:', 'query: ', 'leave out a space'),
    ('xlm-roberta', 'query: ', 'query:', 'end it with a space'),
])  # fmt: skip
def test_a_prefix_ends_where_a_word_of_the_tokenizer_ends(
    tmp_path, encoder, good, bad, mend
):
  for name in ('config.json', 'tokenizer_config.json'):
    shutil.copy(_ENCODERS / encoder / name, tmp_path)
  rules = json.loads((_ENCODERS / encoder / 'tokenizer.json').read_text())
  if encoder == 'roberta':  # As all published ones have.
    rules['model']['vocab']['\u0120a'] = len(rules['model']['vocab'])
    rules['model']['merges'].append(['\u0120', 'a'])
  (tmp_path / 'tokenizer.json').write_text(json.dumps(rules))
  tokenizer = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  lengths = config_lib.LengthsConfig(query=30, document=30)
  model = config_lib.ModelConfig(query_prefix=good)
  template = inputs.Template.of(model, lengths, tokenizer)
  assert [*template.query_prefix, *tokenizer.encode('a')] == (
      tokenizer.encode(f'{good}a')
  )
  model.query_prefix = bad
  with pytest.raises(ValueError, match=mend):
    inputs.Template.of(model, lengths, tokenizer)


def test_the_retriever_sees_the_prefix_and_the_reader_does_not(corpus):
  with_prefix = _config(
      corpus, query_prefix=_PREFIX, document_prefix='passage ', titles='text'
  )
  plain = _config(corpus)
  prefix = corpus.tokenizer.encode(_PREFIX)
  plain.lengths = dataclasses.replace(
      plain.lengths, query=plain.lengths.query - len(prefix)
  )
  batches = []
  for config in (plain, with_prefix):
    source = realm.MaskedQueries(corpus, config, 'knowledge')
    queries = examples_lib.one_pass(
        source, source.assemble, config.batch_size, config.batch_size
    )
    queries = next(queries).inputs
    rows = np.array([[0, 1]] * 4)
    batches.append(
        realm.with_candidates(queries, rows, corpus, source.template)
    )
  ours, theirs = batches[1], batches[0]
  np.testing.assert_array_equal(ours.positions_BM, theirs.positions_BM)
  size = ours.query_ids_BQ.shape[1]
  assert size == with_prefix.lengths.query
  np.testing.assert_array_equal(
      ours.query_ids_BQ[:, 1 : len(prefix) + 1], [prefix] * 4
  )
  np.testing.assert_array_equal(
      np.delete(ours.query_ids_BQ, np.s_[1 : len(prefix) + 1], 1),
      theirs.query_ids_BQ,
  )
  width = theirs.joint_ids_BKT.shape[-1]
  np.testing.assert_array_equal(
      ours.joint_ids_BKT[..., :width], theirs.joint_ids_BKT
  )
  passage = corpus.tokenizer.encode('passage ')
  at = slice(1, 1 + len(passage))
  assert ours.doc_ids_BJS[0, 0, at].tolist() == passage


def test_ict_reads_both_prefixes_and_cuts_the_sentence(corpus):
  config = _config(
      corpus, 'ict', query_prefix=_PREFIX, document_prefix='a passage '
  )
  config.ict.remove_rate = 1.0
  stage = stages.load(config)(config, corpus)
  ((source, _),) = stage.sources().values()
  rng = np.random.default_rng(0)
  rows = source.rows[:4]
  samples = [source.sample(row, rng) for row in rows]
  samples = type(samples[0])(*(np.stack(x) for x in zip(*samples, strict=True)))
  batch = stage.assemble(samples).inputs
  decode = corpus.tokenizer.decode
  for row, query, document in zip(
      rows, batch.query_ids_BQ, batch.doc_ids_BS, strict=True
  ):
    sentence = decode(source.table.ids(row).tolist())
    query, document = (decode(x[x > 5].tolist()) for x in (query, document))
    assert query.startswith(decode(corpus.tokenizer.encode(_PREFIX)))
    assert sentence in query and sentence not in document
    assert document.startswith(decode(corpus.tokenizer.encode('a passage ')))


def test_a_sentence_to_inspect_leaves_room_for_the_prefix(corpus):
  config = _config(corpus, query_prefix=_PREFIX)

  class Trained:
    template = inputs.Template.of(
        config.model, config.lengths, corpus.tokenizer
    )

  Trained.corpus, Trained.config = corpus, config
  room = Trained.template.text_length
  inspector = inspect.Inspector(Trained, 0, {}, None)
  text = ' '.join(['[MASK]'] * (room - 2))
  queries, _ = inspector._queries([text])
  assert queries.query_ids_BQ.shape == (1, room)
  with pytest.raises(ValueError, match=f'at most {room} fit'):
    inspector.query(f'{text} a')
