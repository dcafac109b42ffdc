"""Which generation is searched at which step, whatever the builder does."""

import dataclasses
import gc
import logging
import threading
import time
import types
import weakref

import helpers
import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import generation
from realm_jax.index import search
from realm_jax.index import topk
from realm_jax.runtime import checkpoint
from realm_jax.trainer import loader
from realm_jax.trainer import refresh

_ROWS, _WIDTH, _INTERVAL = 60, 4, 4
_CORPUS = types.SimpleNamespace(
    tokenizer=types.SimpleNamespace(digest='t' * 64),
    fingerprint='f' * 64,
    passages=range(_ROWS),
)


def _config(policy, **kwargs):
  config = config_lib.Config(corpus='x', refresh=config_lib.RefreshConfig(
      policy=policy, interval=_INTERVAL, timeout=20.0, **kwargs
  ))
  config.model.embedding_width = _WIDTH
  return config


def _embeddings(step):
  rng = np.random.default_rng(step)
  return rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32)


def _snapshot(workdir, step, value=None):
  value = step if value is None else value
  return checkpoint.save_snapshot(
      workdir, step, {'w': np.full(3, value, np.float32)}
  )


def _publish(workdir, step, **lineage):
  """Publishes a generation, in the place of the index builder."""
  made_from = generation.Lineage(
      step=step,
      params_digest=lineage.pop('params_digest', None)
      or checkpoint.snapshot_digest(workdir, step),
      tokenizer_digest='t' * 64,
      corpus_fingerprint='f' * 64,
      num_rows=_ROWS,
      width=_WIDTH,
  )
  made_from = dataclasses.replace(made_from, **lineage)
  return helpers.publish(
      workdir / 'index', made_from, _embeddings(step), config_lib.MipsConfig()
  )


class _Probe:
  """Fixed queries; `overlap` is what they say of a stale index."""

  k = 5

  def __init__(self):
    self.asked = 0
    self.overlap = 0.0
    self.query_emb_BE = _embeddings(100)[:20]

  def embed(self, params):
    return self.query_emb_BE

  def overlap_with_current(self, params, search):
    self.asked += 1
    return self.overlap


def _refresher(workdir, policy='sync', *, lag=4, **kwargs):
  return refresh.Refresher(
      workdir, _config(policy, lag=lag), corpus=_CORPUS,
      **{'probe': _Probe(), **kwargs},
  )


def _step(refresher, step, take_snapshot=lambda step: None):
  """Begins a step; by default the snapshots exist already."""
  return refresher.before_step(
      step, None, lambda step, wait: take_snapshot(step)
  )


def _run(workdir, policy, steps, publish, start=0, saved=None, lag=4):
  """Returns the generation of each step, and what a checkpoint would hold."""
  used, about = [], {}
  probe = _Probe()
  refresher = _refresher(
      workdir, policy, lag=lag, probe=probe, step=start, **(saved or {})
  )

  def take_snapshot(step):
    _snapshot(workdir, step)
    publish(step)

  for step in range(start, steps):
    probe.overlap = _OVERLAP.get(step, 1.0)
    _step(refresher, step, take_snapshot)
    about[step] = {
        'generation': refresher.generation_step, 'pending': refresher.pending
    }
    # The search is over that generation.
    number = refresher.generation_step
    found = refresher.search.search(_embeddings(number)[:5] * 100, 3)
    expected = search.ExactSearch(_embeddings(number)).search(
        _embeddings(number)[:5] * 100, 3
    )
    np.testing.assert_array_equal(found, expected)
    used.append(number)
  refresher.close()
  return used, about


# Overlaps at the steps at which `adaptive` decides; the bound is 0.8.
_OVERLAP = {4: 0.9, 8: 0.79, 12: 0.5}
_EXPECTED = {
    ('none', 4): [0] * 14,
    ('adaptive', 4): [0] * 12 + [8] * 2,
    ('adaptive', 2): [0] * 10 + [8] * 4,
    ('adaptive', 1): [0] * 9 + [8] * 4 + [12],
    ('sync', 4): [0] * 4 + [4] * 4 + [8] * 4 + [12] * 2,
    ('scheduled', 4): [0] * 8 + [4] * 4 + [8] * 2,
    ('scheduled', 2): [0] * 6 + [4] * 4 + [8] * 4,
    ('scheduled', 1): [0] * 5 + [4] * 4 + [8] * 4 + [12],
}


@pytest.mark.parametrize('speed', ['at once', 'late'])
@pytest.mark.parametrize('policy, lag', _EXPECTED)
def test_the_generation_is_a_function_of_the_step(tmp_path, policy, lag, speed):
  threads = []

  def publish(step):
    delay = 0.0 if speed == 'at once' else 0.15
    threads.append(threading.Timer(delay, _publish, (tmp_path, step)))
    threads[-1].start()
    if speed == 'at once':
      threads[-1].join()

  used, _ = _run(tmp_path, policy, 14, publish, lag=lag)
  assert used == _EXPECTED[policy, lag]
  for thread in threads:
    thread.join()


@pytest.mark.parametrize('policy, lag', _EXPECTED)
def test_resumed_anywhere_the_sequence_is_the_same(tmp_path, policy, lag):
  expected = _EXPECTED[policy, lag]
  for killed in (0, 1, 4, 5, 8, 11):
    workdir = tmp_path / str(killed)

    def publish(step, workdir=workdir):
      # As the builder, which does not build a generation again. The resumed
      # job may be loading it.
      if not (workdir / 'index' / str(step)).exists():
        _publish(workdir, step)

    # It ran on for a while after its last checkpoint.
    _, about = _run(workdir, policy, min(killed + 3, 14), publish, lag=lag)
    saved = about[killed] if killed else None  # There is no checkpoint yet.
    used, _ = _run(workdir, policy, 14, publish, killed, saved, lag)
    assert used == expected[killed:], killed


def test_files_of_steps_that_run_again_are_removed(tmp_path):
  for step in (0, 4, 8):
    _snapshot(tmp_path, step)
    _publish(tmp_path, step)
  # The killed run had a generation 4 of other parameters.
  _publish(tmp_path, 4, params_digest='other')
  refresh.drop_future(tmp_path, 5)
  assert checkpoint.snapshot_steps(tmp_path) == [0, 4]
  assert checkpoint.steps_in(tmp_path / 'index') == [0]
  refresh.drop_future(tmp_path / 'new', 0)  # Nothing there is no error.
  assert not (tmp_path / 'new').exists()


def test_a_stopped_wait_resumes_for_the_same_generation(tmp_path):
  """A snapshot of the step itself would keep the builder from that."""
  for step in (0, 4, 8):
    _snapshot(tmp_path, step)
  _publish(tmp_path, 0)
  _refresher(tmp_path, 'scheduled', step=8, generation=0).close()
  assert checkpoint.snapshot_steps(tmp_path) == [0, 4]
  _publish(tmp_path, 4)
  _snapshot(tmp_path, 8)
  _refresher(tmp_path, 'scheduled', step=8, generation=4).close()
  assert checkpoint.snapshot_steps(tmp_path) == [0, 4, 8]


def test_scheduled_is_loaded_before_it_is_due(tmp_path, monkeypatch):
  monkeypatch.setattr(refresh, '_POLL_SECONDS', 0.0)
  loaded = threading.Event()

  def make_search(made):
    if made.lineage.step == 4:
      assert threading.current_thread() is not threading.main_thread()
      loaded.set()
    return made.make_search(config_lib.MipsConfig(), None)

  refresher = _refresher(
      tmp_path, 'scheduled', lag=3, make_search=make_search
  )

  def take_snapshot(step):
    _snapshot(tmp_path, step)
    _publish(tmp_path, step)

  for step in range(6):
    _step(refresher, step, take_snapshot)
  assert loaded.wait(20)
  assert refresher.generation_step == 0  # Loaded, but not due.
  assert generation.in_use(tmp_path / 'index') == {0, 4}
  assert not _step(refresher, 6)
  assert _step(refresher, 7)
  assert refresher.generation_step == 4
  _until(lambda: generation.in_use(tmp_path / 'index') == {4})
  refresher.close()


def _until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline, 'it did not come about'
    time.sleep(0.01)


def _eager(workdir, monkeypatch, **kwargs):
  monkeypatch.setattr(refresh, '_POLL_SECONDS', 0.0)
  refresher = _refresher(workdir, 'eager', **kwargs)
  _snapshot(workdir, 0)
  _publish(workdir, 0)
  assert _step(refresher, 0)
  return refresher


def _adopt_until(refresher, step, number):
  deadline = time.monotonic() + 20
  while refresher.generation_step != number:
    _step(refresher, step)
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_eager_never_waits_and_takes_the_newest(tmp_path, monkeypatch):
  go = threading.Event()

  def make_search(made):
    if made.lineage.step:
      assert go.wait(20)
    return made.make_search(config_lib.MipsConfig(), None)

  refresher = _eager(tmp_path, monkeypatch, make_search=make_search)
  for step in range(1, 12):
    if step % _INTERVAL == 0:
      _snapshot(tmp_path, step)
    assert not _step(refresher, step)  # Nothing new: on with the old.
  _publish(tmp_path, 4)
  _publish(tmp_path, 8)
  for _ in range(20):
    assert not _step(refresher, 12)  # It is still being loaded.
  go.set()
  _adopt_until(refresher, 12, 8)  # 4 is skipped.
  assert refresher.num_adopted == 2
  # One of the future (of a killed run, on a slow file system) is not taken.
  _snapshot(tmp_path, 16)
  _publish(tmp_path, 16)
  for _ in range(5):
    assert not _step(refresher, 13)
    time.sleep(0.02)
  _adopt_until(refresher, 16, 16)
  refresher.close()


def _flip(path):
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(bytes(data))


def test_eager_keeps_the_last_good_generation(tmp_path, monkeypatch, caplog):
  refresher = _eager(tmp_path, monkeypatch)
  _snapshot(tmp_path, 4)
  path = _publish(tmp_path, 4)
  _flip(path / 'shard-00000.npy')
  _snapshot(tmp_path, 8)
  with caplog.at_level(logging.ERROR):
    for step in range(5, 40):
      assert not _step(refresher, step)
      time.sleep(0.01)
  assert caplog.text.count('continues with the index of step 0') == 1
  assert 'shard-00000.npy has sha256' in caplog.text
  _publish(tmp_path, 8)
  _adopt_until(refresher, 40, 8)
  refresher.close()


def test_staleness_is_measured(tmp_path):
  refresher = _refresher(tmp_path)
  with pytest.raises(RuntimeError, match='before the first step'):
    refresher.search  # noqa: B018
  assert refresher.metrics(0) == {}
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  _step(refresher, 0)
  values = refresher.metrics(3)
  assert 'refresh/probe_overlap' not in values  # Nothing to compare with.
  assert values['refresh/age_steps'] == 3
  assert values['refresh/generation'] == 0
  assert 0 < values['refresh/age_seconds'] < 60
  assert 'refresh/drift_cosine' not in values
  _snapshot(tmp_path, 4)
  _publish(tmp_path, 4)
  assert _step(refresher, 4)
  old, new, queries = _embeddings(0), _embeddings(4), _embeddings(100)[:20]
  expected = search.overlap(
      search.ExactSearch(old).search(queries, 5),
      search.ExactSearch(new).search(queries, 5),
  )
  values = refresher.metrics(5)
  assert values['refresh/probe_overlap'] == expected
  cosines = [
      a @ b / np.linalg.norm(a) / np.linalg.norm(b)
      for a, b in zip(old, new, strict=True)
  ]
  np.testing.assert_allclose(
      values['refresh/drift_cosine'], np.mean(cosines), atol=1e-6
  )
  assert values['refresh/adopted'] == 2
  assert values['refresh/wait_seconds'] == refresher.waited_seconds > 0
  assert all(isinstance(value, float) for value in values.values())
  refresher.close()


def test_the_time_training_stands_still_is_counted(tmp_path):
  refresher = _refresher(tmp_path)

  def take_snapshot(step):
    time.sleep(0.1)
    _snapshot(tmp_path, step)
    _publish(tmp_path, step)

  for step in range(0, 9):
    _step(refresher, step, take_snapshot)
    values = refresher.metrics(step)
    assert values['refresh/stall_seconds'] >= 0.1 * (step // _INTERVAL + 1)
  # The last refresh: all steps since the one before.
  last = values['refresh/last_stall_seconds']
  assert 0.1 <= last < values['refresh/stall_seconds'] - 0.2
  assert 0 < values['refresh/swap_seconds'] < last
  assert 0 < values['refresh/load_seconds'] < last
  refresher.close()


class _Busy:
  """Parameters that the device is still computing."""

  def block_until_ready(self):
    time.sleep(1.0)
    return self


def test_the_end_of_the_last_step_is_no_stall(tmp_path):
  refresher = _refresher(tmp_path)
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  start = time.monotonic()
  refresher.before_step(0, _Busy(), lambda step, wait: None)
  assert time.monotonic() - start > 2.0  # Before the stall, and inside.
  values = refresher.metrics(0)
  assert 0 < values['refresh/last_stall_seconds'] < 0.9
  assert values['refresh/stall_seconds'] == values['refresh/last_stall_seconds']
  refresher.close()


def test_adaptive_records_its_decision(tmp_path):
  probe, taken = _Probe(), []
  refresher = _refresher(tmp_path, 'adaptive', lag=2, probe=probe)
  probe.overlap = 0.6
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  for step in range(4):
    _step(refresher, step, taken.append)
  assert taken == [0] and not probe.asked
  assert 'refresh/fresh_overlap' not in refresher.metrics(3)
  _step(refresher, 4, taken.append)
  assert refresher.pending == 4
  _step(refresher, 4, taken.append)  # The decision is not made again.
  assert taken == [0, 4, 4] and probe.asked == 1
  values = refresher.metrics(4)
  assert values['refresh/fresh_overlap'] == 0.6
  assert values['refresh/snapshot_due'] == 1.0
  assert values['refresh/probe_seconds'] > 0
  refresher.close()


def _live(shape):
  return sum(x.shape == shape for x in jax.live_arrays())


def test_the_old_generation_is_freed(tmp_path, monkeypatch, request):
  """Neither its search nor its table outlives the swap and its probe."""
  monkeypatch.setattr(loader, '_SAMPLE_ROWS', 7)
  refresher = _refresher(tmp_path, 'scheduled', lag=4)
  searches, counts = [], []
  # The shape of the padded table on the device; no other array has it.
  shape = (topk.ALIGN, _WIDTH)
  gc.collect()  # Arrays of earlier tests.
  gc.freeze()  # The collections below then skip the objects that exist now.
  request.addfinalizer(gc.unfreeze)
  before = _live(shape)
  probe = refresher._probe
  probe.embed = lambda _: (
      counts.append(_live(shape) - before) or probe.query_emb_BE
  )

  def take_snapshot(step):
    _snapshot(tmp_path, step)
    _publish(tmp_path, step)

  for step in range(24):
    if _step(refresher, step, take_snapshot):
      searches.append(weakref.ref(refresher.search))
    gc.collect()
    alive = [ref for ref in searches if ref() is not None]
    assert alive == searches[-1:], step
  assert len(searches) == 5
  assert counts == [1, 2, 2, 2, 2]  # Old and new, during the swap.
  refresher.close()
