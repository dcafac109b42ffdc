"""The views of a sentence in the warm-up, and BERT's masks in its inputs."""

import dataclasses

import helpers
import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import exclusion
from realm_jax.corpus import ngrams
from realm_jax.trainer import job


def _config(corpus, objective, **values):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.batch_size = 16
  config.lengths = config_lib.LengthsConfig(query=24, document=40, masks=4)
  return dataclasses.replace(config_lib.resolve(config), **values)


def _take(corpus, config, count, **parts):
  stream = helpers.batches(corpus, config, **parts)
  return [next(stream) for _ in range(count)]


def test_sequences_are_found_as_by_brute_force():
  rng = np.random.default_rng(0)
  ids_NT = rng.integers(0, 3, (200, 12))
  wanted_NM, sizes_N = rng.integers(0, 3, (200, 4)), rng.integers(0, 5, 200)
  held = []
  for ids, wanted, size in zip(ids_NT, wanted_NM, sizes_N, strict=True):
    at = [
        i for i in range(13 - size)
        if ids[i : i + size].tolist() == wanted[:size].tolist()
    ]
    held.append(bool(at) and size > 0)
    if size:
      assert ngrams.find(ids, wanted[:size]).tolist() == at
  found_N1 = ngrams.held(ids_NT[:, None], wanted_NM, sizes_N)
  assert found_N1.tolist() == [[one] for one in held]
  assert 30 < sum(held) < 170
  assert not len(ngrams.find(np.arange(2), np.arange(3)))


@pytest.fixture(scope='module')
def lives(tmp_path_factory):
  return helpers.lives(tmp_path_factory.mktemp('lives'))


def _shown(lives, batch):
  """Yields sentence row, targets, passage row (-1: null), fallback."""
  passages = {
      lives.passages.title_and_body(row)[1].tobytes(): row
      for row in range(len(lives.passages))
  }
  passages[b''] = -1
  for i, row in enumerate(batch.row_B.tolist()):
    ids, types = (
        batch.inputs.joint_ids_BT[i], batch.inputs.joint_types_BT[i]
    )
    body = ids[types == 1][:-1].astype(np.uint16)
    targets = batch.inputs.targets_BM[i][batch.inputs.mask_BM[i]]
    yield row, targets, passages[body.tobytes()], batch.figures[
        'view_fallback'
    ][i]


def test_each_view_shows_what_its_name_says(lives):
  table, articles = lives.sentences['knowledge'], lives.passages.articles
  views = {'own': 0.25, 'answer': 0.4, 'article': 0.2, 'null': 0.15}
  config = _config(lives, 'mlm', mlm=config_lib.MlmConfig(views=views))
  counts = dict.fromkeys(views, 0)
  fallbacks = total = 0
  for batch in _take(lives, config, 60):
    for row, targets, passage, fallback in _shown(lives, batch):
      total += 1
      own = int(table.passages[row])
      if passage < 0:
        counts['null'] += 1
        continue
      assert articles[passage] == articles[own]
      if passage == own:
        counts['own'] += not fallback
        fallbacks += fallback
        # The date of the last passage stands nowhere else.
        assert not fallback or row % 4 == 3
        continue
      assert not fallback
      body = lives.passages.title_and_body(passage)[1].tolist()
      held = any(
          body[j : j + len(targets)] == targets.tolist()
          for j in range(len(body))
      )
      counts['answer' if held else 'article'] += 1
  # A quarter of the sentences has no passage with the answer.
  assert fallbacks / total == pytest.approx(0.1, abs=0.03)
  expected = {'own': 0.25, 'answer': 0.3, 'article': 0.2, 'null': 0.15}
  for name, share in expected.items():
    assert counts[name] / total == pytest.approx(share, abs=0.04), name


def test_copies_of_the_sentence_are_no_other_passage(tmp_path):
  twice = 'In 1802 Anna Karlin was born near the old mill by the river.'
  text = f'{twice} ' * 2 + 'Anna Karlin moved to a very small house there.'
  source = helpers.write_records(
      tmp_path / 'a.jsonl',
      [{'id': 'a', 'title': 'Anna Karlin', 'text': text},
       {'id': 'b', 'title': 'Other', 'text': 'Nothing of 1802 is here.'}],
  )
  lives = helpers.prepare_corpus(
      source, tmp_path / 'corpus', max_wordpieces=22, validation_fraction=0.0
  )
  passages = [
      lives.passage_text(row)['text'] for row in range(len(lives.passages))
  ]
  assert passages[:2] == [twice, twice]
  table = lives.sentences['knowledge']
  articles = exclusion.ArticlePassages(lives, 'knowledge')
  first, limit = table.spans_of(0)[-1]
  name = table.ids(0)[first:limit]
  assert articles.find(0, name, 30, holding=True) == [2]
  assert articles.find(0, name, 1, holding=True) == []  # It is not read.
  others = np.flatnonzero(lives.passages.articles == 0)[2:].tolist()
  assert articles.find(0, name, 1, holding=False) == others
  assert articles.find(0, name[:0], 30, holding=True) == []


@pytest.mark.parametrize(
    'settings',
    [{'mlm': config_lib.MlmConfig(views={'answer': 0.5, 'random': 0.5})},
     {'masking': 'bert_whole_words'}],
)
def test_views_and_bert_masks_repeat_and_resume(lives, settings):
  config = _config(lives, 'mlm', **settings)
  whole = _take(lives, config, 4)
  rows = np.array([0, 1, 8, 9])
  for batch, part in zip(
      whole[2:], _take(lives, config, 2, rows=rows, start=2), strict=True
  ):
    wanted = jax.tree.map(lambda x, rows=rows: x[rows], batch)
    jax.tree.map(np.testing.assert_array_equal, part, wanted)


def test_bert_masks_are_replaced_in_the_input(lives):
  config = _config(lives, 'mlm', masking='bert')
  config.mlm.views = {'null': 1.0}
  table, shown = lives.sentences['knowledge'], []
  for batch in _take(lives, config, 30):
    for i, row in enumerate(batch.row_B):
      used = batch.inputs.mask_BM[i]
      positions = batch.inputs.positions_BM[i][used]
      ids = batch.inputs.joint_ids_BT[i].copy()
      shown += ids[positions].tolist()
      ids[positions] = batch.inputs.targets_BM[i][used]
      sentence = table.ids(row)
      np.testing.assert_array_equal(ids[1 : len(sentence) + 1], sentence)
  masked = np.mean(np.array(shown) == lives.tokenizer.mask_id)
  assert masked == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ('views', 'message'),
    [({'owm': 1.0}, r'own, answer, article, random, null'),
     ({'own': 0.5}, r'must be 1, not 0\.5'),
     ({'own': -1.0, 'null': 2.0}, 'not negative'),
     ({'own': '1'}, 'must be a number')],
)
def test_wrong_views_are_refused(views, message):
  config = config_lib.Config(objective='mlm', corpus='somewhere')
  config.mlm.views = views
  with pytest.raises(ValueError, match=rf'config\.mlm\.views=.*{message}'):
    job.validate(config)
