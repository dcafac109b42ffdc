"""Checkpoints: damage is refused in one line, threads do not disturb."""

import concurrent.futures
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
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


def test_snapshots_and_checkpoints_are_saved_at_the_same_time(tmp_path):
  """Orbax shares a counter between threads, by which arrays were lost."""
  arrays = {f'w{i}': np.full((50, 50), i, np.float32) for i in range(4)}
  abstract = jax.eval_shape(lambda: arrays)
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  done = threading.Event()

  def save_checkpoints():
    for step in itertools.count():
      if done.is_set():
        return
      checkpoints.save(step, {'reader': arrays}, {'seed': 0}, {})
      checkpoints.wait()
      loaded, _ = checkpoint.load_params(tmp_path, {'reader': abstract}, step)
      np.testing.assert_array_equal(loaded['reader']['w3'], arrays['w3'])

  with concurrent.futures.ThreadPoolExecutor(1) as threads:
    saving = threads.submit(save_checkpoints)
    try:
      for step in range(25):
        checkpoint.save_snapshot(tmp_path, step, arrays)
        checkpoint.load_snapshot(tmp_path, step, abstract)
    finally:
      done.set()
    saving.result()
  checkpoints.close()
