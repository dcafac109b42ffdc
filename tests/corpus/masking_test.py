"""Masks by hand, and what is refused of masks of one's own."""

import helpers
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import masking
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.runtime import extension
from realm_jax.trainer import job

_SENTENCE = masking.Sentence(
    ids=np.arange(10, 22),
    spans_S2=np.array([[2, 5], [7, 8]]),
    span=(2, 5),
    max_masks=4,
    options={},
    tokenizer=tokenizer_lib.Tokenizer(
        ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'abcde']
        # Ids 10 to 21: words of one, three, two and six wordpieces.
        + ['f', 'g', '##h', '##i', 'j', '##k', 'l']
        + ['##m', '##n', '##o', '##p', '##q']
    ),
)


def test_masks_by_hand():
  rng = np.random.default_rng(0)
  assert masking.salient(_SENTENCE, rng).tolist() == [2, 3, 4]
  starts = set()
  for _ in range(200):
    span = masking.random_span(_SENTENCE, rng)
    assert len(span) == 3 and (np.diff(span) == 1).all()
    starts.add(int(span[0]))
  assert starts == set(range(10))  # The last span ends with the sentence.
  tokens = [masking.random_token(_SENTENCE, rng) for _ in range(200)]
  assert {len(t) for t in tokens} == {2}  # 15 % of 12.
  assert set(np.concatenate(tokens)) == set(range(12))
  for name in masking.MASKS:
    mask = extension.load('config.masking', name, masking.MASKS)
    masking.check(mask(_SENTENCE, rng), _SENTENCE, name)


def test_bert_reads_masks_random_wordpieces_and_the_same():
  rng = np.random.default_rng(0)
  size = _SENTENCE.tokenizer.vocab_size
  drawn = [masking.bert(_SENTENCE, rng) for _ in range(3000)]
  positions = np.concatenate([one.positions for one in drawn])
  assert len(positions) == 2 * len(drawn)
  assert np.bincount(positions, minlength=12).min() > 400
  ids = np.concatenate([one.ids for one in drawn])
  same = ids == _SENTENCE.ids[positions]
  masked = ids == _SENTENCE.tokenizer.mask_id
  # A random wordpiece is the same one, or [MASK], once in 21 draws each.
  np.testing.assert_allclose(masked.mean(), 0.8 + 0.1 / 21, atol=0.02)
  np.testing.assert_allclose(same.mean(), 0.1 + 0.1 / 21, atol=0.015)
  assert set(ids[~masked & ~same]) == set(range(1, size)) - {4}


def test_whole_words_are_hidden_whole():
  rng = np.random.default_rng(0)
  found = {
      tuple(masking.bert_whole_words(_SENTENCE, rng).positions.tolist())
      for _ in range(200)
  }
  # Two wordpieces: the word of two, or the word of one and no other.
  assert found == {(0,), (4, 5)}
  long_word = _SENTENCE._replace(ids=np.arange(16, 22), max_masks=2)
  assert masking.bert_whole_words(long_word, rng).positions.tolist() == [0]
  inside = _SENTENCE._replace(ids=np.arange(12, 16), max_masks=2)
  found = {
      tuple(masking.bert_whole_words(inside, rng).positions.tolist())
      for _ in range(50)
  }
  assert found == {(0,), (2,)}  # One of four, of either word.


@pytest.mark.parametrize('ids', [[4], [4.0, 4.0], [4, 22], [-1, 4], [[4, 4]]])
def test_other_replacements_are_refused(ids):
  replaced = masking.Replaced(np.array([2, 3]), np.array(ids))
  with pytest.raises(ValueError, match='gives as many ids of the vocabulary'):
    masking.check(replaced, _SENTENCE, 'm:f')


@pytest.mark.parametrize(
    'positions',
    [[1, 2], np.array([]), np.array([1.0]), np.array([[1]]), np.array([2, 1]),
     np.array([1, 1]), np.array([-1]), np.array([12]), np.arange(5)],
)
def test_other_positions_are_refused(positions):
  with pytest.raises(ValueError, match=r"'m:f' returned .*returns 1 to 4 posi"):
    masking.check(positions, _SENTENCE, 'm:f')


@pytest.mark.parametrize(
    ('field', 'name', 'message'),
    [
        ('masking', 'saliant', r"masking='saliant': must be one of 'salient'"),
        ('masking', 'nowhere:f', r"'nowhere' cannot be imported .*PYTHONPATH"),
        ('masking', 'json:nothing', r"json.* has no 'nothing'"),
        ('objective', 'relam', r"objective='relam': must be one of 'mlm'"),
        ('objective', 'json:dumps', r'which is not a subclass of .*Stage'),
    ],
)
def test_wrong_names_are_found_before_any_work(world, field, name, message):
  config = config_lib.Config(corpus=str(world), **{field: name})
  with pytest.raises(ValueError, match=message):
    job.validate(config)


def test_a_wrong_mask_is_named_in_training(world, tmp_path, monkeypatch):
  (tmp_path / 'wrong_mask.py').write_text(
      'import numpy as np\n\n\ndef f(sentence, rng):\n  return np.array([-1])\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  config = config_lib.Config(
      corpus=str(world), objective='mlm', masking='wrong_mask:f', batch_size=2
  )
  config = config_lib.resolve(config)
  with pytest.raises(ValueError, match="config.masking='wrong_mask:f'"):
    next(helpers.batches(corpus_lib.Corpus.open(world), config))
