"""Masks by hand, and what is refused of masks of one's own."""

import helpers
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import masking
from realm_jax.runtime import extension
from realm_jax.trainer import stages

_SENTENCE = masking.Sentence(
    ids=np.arange(10, 22),
    spans_S2=np.array([[2, 5], [7, 8]]),
    span=(2, 5),
    max_masks=4,
    options={},
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
    stages.validate(config)


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
