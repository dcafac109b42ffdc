"""Checkpoints: damaged ones are refused in one line."""

import jax
import jax.numpy as jnp
import pytest

from realm_jax.runtime import checkpoint


def test_a_checkpoint_without_parameters_is_named(tmp_path):
  params = {'embedder': {'x': jnp.arange(3.0)}}
  checkpoint.save_params(tmp_path, 2, params, {})
  abstract = jax.eval_shape(lambda: params)
  loaded, step = checkpoint.load_params(tmp_path, abstract)
  assert step == 2
  assert loaded['embedder']['x'].tolist() == [0.0, 1.0, 2.0]
  (tmp_path / 'checkpoints' / '3').mkdir()  # As a copy that was cut off.
  for read in (
      lambda: checkpoint.load_params(tmp_path, abstract),
      lambda: checkpoint.abstract_in(tmp_path),
      lambda: checkpoint.saved_about(tmp_path, 3),
  ):
    with pytest.raises(ValueError, match='checkpoints/3 is damaged'):
      read()
  assert list(checkpoint.abstract_in(tmp_path, 2)) == ['embedder']
