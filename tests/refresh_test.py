"""Which generation is searched at which step, whatever the builder does."""

import dataclasses
import gc
import json
import logging
import shutil
import threading
import time
import types
import weakref

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.index import generation
from realm_jax.index import search
from realm_jax.index import topk
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import heartbeat as heartbeat_lib
from realm_jax.runtime import snapshots as snapshots_lib
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
  return snapshots_lib.save(
      workdir, step, {'w': np.full(3, value, np.float32)}
  )


def _publish(workdir, step, **lineage):
  """What the index builder does."""
  made_from = generation.Lineage(
      step=step,
      params_digest=lineage.pop('params_digest', None)
      or snapshots_lib.digest_of(workdir, step),
      tokenizer_digest='t' * 64,
      corpus_fingerprint='f' * 64,
      num_rows=_ROWS,
      width=_WIDTH,
  )
  made_from = dataclasses.replace(made_from, **lineage)
  return generation.publish(
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
    # What is searched is that generation indeed.
    number = refresher.generation_step
    found = refresher.search.search(_embeddings(number)[:5] * 100, 3)
    expected = search.ExactSearch(_embeddings(number)).search(
        _embeddings(number)[:5] * 100, 3
    )
    np.testing.assert_array_equal(found, expected)
    used.append(number)
  refresher.close()
  return used, about


# What the probe says at the steps at which `adaptive` asks; the bound is 0.8.
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


def test_what_was_built_of_steps_run_again_is_dropped(tmp_path):
  for step in (0, 4, 8):
    _snapshot(tmp_path, step)
    _publish(tmp_path, step)
  # The killed run had a generation 4 of other parameters.
  _publish(tmp_path, 4, params_digest='other')
  refresh.drop_future(tmp_path, 5)
  assert snapshots_lib.steps_of(tmp_path) == [0, 4]
  assert checkpoint.steps_in(tmp_path / 'index') == [0]
  refresh.drop_future(tmp_path / 'new', 0)  # Nothing there is no error.
  assert not (tmp_path / 'new').exists()


def test_who_was_stopped_while_waiting_waits_for_the_same_again(tmp_path):
  """A snapshot of the step itself would keep the builder from that."""
  for step in (0, 4, 8):
    _snapshot(tmp_path, step)
  _publish(tmp_path, 0)
  _refresher(tmp_path, 'scheduled', step=8, generation=0).close()
  assert snapshots_lib.steps_of(tmp_path) == [0, 4]
  _publish(tmp_path, 4)
  _snapshot(tmp_path, 8)
  _refresher(tmp_path, 'scheduled', step=8, generation=4).close()
  assert snapshots_lib.steps_of(tmp_path) == [0, 4, 8]


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


def test_eager_goes_on_with_the_last_good_one(tmp_path, monkeypatch, caplog):
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


def _flip(path):
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(bytes(data))


def test_a_damaged_generation_is_built_anew_once(tmp_path):
  refresher = _refresher(tmp_path)
  _snapshot(tmp_path, 0)
  path = _publish(tmp_path, 0)
  _flip(path / 'shard-00000.npy')

  def rebuild(damage):
    while path.exists():
      time.sleep(0.01)
    _publish(tmp_path, 0)
    if damage:
      _flip(path / 'shard-00000.npy')

  thread = threading.Thread(target=rebuild, args=(False,))
  thread.start()
  assert _step(refresher, 0)
  thread.join()
  # Damaged each time it is built: the disk is at fault, and that is said.
  refresher = _refresher(tmp_path)
  _flip(path / 'shard-00000.npy')
  thread = threading.Thread(target=_rebuild_damaged, args=(tmp_path, path))
  thread.start()
  with pytest.raises(generation.Damaged, match='its manifest says'):
    _step(refresher, 0)
  thread.join()


def _rebuild_damaged(workdir, path):
  """Publishes a generation that is damaged from the first moment."""
  while path.exists():
    time.sleep(0.01)
  aside = workdir / 'aside'
  shutil.copytree(workdir / 'retriever', aside / 'retriever')
  _flip(_publish(aside, 0) / 'shard-00000.npy')
  (aside / 'index' / '0').rename(path)


def test_one_of_other_parameters_is_waited_out(tmp_path, caplog):
  """Published by a builder that had not noticed that the trainer resumed."""
  refresher = _refresher(tmp_path)
  digest = _snapshot(tmp_path, 0)
  _publish(tmp_path, 0, params_digest='0123456789abcdef' * 4)
  timer = threading.Timer(0.5, _publish, (tmp_path, 0))
  timer.start()
  with caplog.at_level(logging.WARNING):
    assert _step(refresher, 0)
  timer.join()
  assert refresher._current.digest == digest
  assert refresher.waited_seconds > 0.3
  assert caplog.text.count('0123456789abcdef') == 1
  assert digest[:16] in caplog.text


@pytest.mark.parametrize('field', ['corpus_fingerprint', 'tokenizer_digest'])
def test_one_of_another_job_is_refused(tmp_path, field):
  refresher = _refresher(tmp_path)
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0, **{field: 'theirs'})
  with pytest.raises(ValueError, match='does not belong to this job') as error:
    _step(refresher, 0)
  assert f"{field}: 'theirs' in the index" in str(error.value)


def test_one_copied_under_another_number_is_refused(tmp_path):
  refresher = _refresher(tmp_path)
  digest = _snapshot(tmp_path, 0)
  _snapshot(tmp_path, 4)
  _publish(tmp_path, 4).rename(tmp_path / 'index' / '0')
  _rewrite(tmp_path / 'index' / '0', params_digest=digest)
  with pytest.raises(ValueError, match='step: 4 in the index, 0 expected'):
    _step(refresher, 0)


def _rewrite(path, **values):
  manifest = json.loads((path / 'manifest.json').read_text())
  manifest.update(values)
  manifest['manifest_sha256'] = files.manifest_digest(manifest)
  (path / 'manifest.json').write_text(json.dumps(manifest))


def test_a_newer_format_is_refused(tmp_path):
  refresher = _refresher(tmp_path)
  _snapshot(tmp_path, 0)
  _rewrite(_publish(tmp_path, 0), format_version=99)
  with pytest.raises(ValueError, match='format 99, from a newer realm_jax'):
    _step(refresher, 0)


def test_waiting_ends(tmp_path, monkeypatch):
  config = _config('sync')
  config.refresh.timeout = 0.2
  refresher = refresh.Refresher(
      tmp_path, config, corpus=_CORPUS, probe=_Probe()
  )
  _snapshot(tmp_path, 0)
  with heartbeat_lib.Heartbeat(tmp_path / 'index') as heartbeat:
    heartbeat.beat('embedding', done=7, total=60, at_once=True)
    with pytest.raises(TimeoutError, match=r'index/0.*embedding 7 of 60'):
      _step(refresher, 0)
  monkeypatch.setattr(loader, '_SNAPSHOT_SECONDS', 0.1)
  config.refresh.timeout = 20.0
  shutil.rmtree(tmp_path / 'retriever')
  with pytest.raises(FileNotFoundError, match='its snapshot.*is gone'):
    _step(refresher, 0)


def test_the_builders_health_is_looked_at(tmp_path):
  calls = []

  def health():
    calls.append(0)
    if len(calls) == 5:
      raise RuntimeError('it died three times')

  refresher = _refresher(tmp_path, health=health)
  _snapshot(tmp_path, 0)
  with pytest.raises(RuntimeError, match='three times'):
    _step(refresher, 0)
  # Also by a trainer that does not wait.
  calls.clear()
  _publish(tmp_path, 0)
  _step(refresher, 0)
  before = len(calls)
  _step(refresher, 1)
  assert len(calls) == before + 1
  refresher.close()


def test_says_how_to_start_a_builder(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(loader, '_STALE_SECONDS', 0.1)
  monkeypatch.setattr(loader, '_LOG_SECONDS', 0.3)
  refresher = _refresher(tmp_path)
  _snapshot(tmp_path, 0)
  timer = threading.Timer(1.5, _publish, (tmp_path, 0))
  timer.start()
  with caplog.at_level(logging.WARNING):
    _step(refresher, 0)
  timer.join()
  said = f'start `realm-jax index --workdir={tmp_path} --follow`'
  assert 2 <= caplog.text.count(said) <= 6
  # A builder that is seen to be alive is given its time in silence.
  caplog.clear()
  _snapshot(tmp_path, 4)
  done = threading.Event()

  def beat():
    with heartbeat_lib.Heartbeat(tmp_path / 'index') as heartbeat:
      while not done.wait(0.02):
        heartbeat.beat('embedding', at_once=True)

  thread = threading.Thread(target=beat)
  thread.start()
  timer = threading.Timer(1.0, _publish, (tmp_path, 4))
  timer.start()
  monkeypatch.setattr(loader, '_STALE_SECONDS', 0.7)
  with caplog.at_level(logging.WARNING):
    _step(refresher, 4)
  done.set()
  thread.join()
  timer.join()
  assert said not in caplog.text
  refresher.close()


def test_resuming_without_its_generation_names_the_command(tmp_path):
  _snapshot(tmp_path, 4)
  with pytest.raises(FileNotFoundError) as error:
    _refresher(tmp_path, step=6, generation=4)
  assert f'realm-jax index --workdir={tmp_path} --step=4' in str(error.value)
  _publish(tmp_path, 4)
  assert _refresher(tmp_path, step=6, generation=4).generation_step == 4
  # Its snapshot may be gone by then.
  shutil.rmtree(tmp_path / 'retriever')
  refresher = _refresher(tmp_path, step=6, generation=4)
  assert refresher.generation_step == 4
  assert refresher.num_adopted == 0
  assert not _step(refresher, 6)


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


def test_the_old_generation_is_freed(tmp_path, monkeypatch):
  """Neither its search nor its table outlives the swap and its probe."""
  monkeypatch.setattr(loader, '_SAMPLE_ROWS', 7)
  refresher = _refresher(tmp_path, 'scheduled', lag=4)
  searches, counts = [], []
  # The shape of the padded table on the device; no other array has it.
  shape = (topk.ALIGN, _WIDTH)
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


def test_a_failing_builder_is_spoken_of_with_the_age_of_the_index(
    tmp_path, monkeypatch, caplog
):
  failures = [0]
  refresher = _eager(tmp_path, monkeypatch, health=lambda: failures[0])
  with caplog.at_level(logging.WARNING):
    for step in range(1, 12):
      if step in (5, 7):
        failures[0] += 1
      assert not _step(refresher, step)  # It goes on, and does not wait.
  said = [record.message for record in caplog.records]
  assert len(said) == 2
  assert 'failed 1 times' in said[0] and 'of step 0, 5 steps and' in said[0]
  assert 'failed 2 times' in said[1] and 'of step 0, 7 steps and' in said[1]
  assert refresher.metrics(11)['refresh/builder_failures'] == 2
  assert refresher.waited_seconds < 10

  def give_up():
    raise RuntimeError('too often')

  refresher._health = give_up
  with pytest.raises(RuntimeError, match='too often'):
    _step(refresher, 12)
  refresher.close()


def test_scheduled_waits_for_a_failing_builder_at_the_due_step_only(tmp_path):
  failures = [0]
  refresher = _refresher(
      tmp_path, 'scheduled', lag=3, health=lambda: failures[0]
  )
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  _step(refresher, 0)
  waited = refresher.waited_seconds
  for step in range(1, 7):
    failures[0] = step
    assert not _step(refresher, step)
    if step == 4:
      _snapshot(tmp_path, 4)
  assert refresher.waited_seconds == waited
  timer = threading.Timer(0.3, _publish, (tmp_path, 4))
  timer.start()
  assert _step(refresher, 7)
  timer.join()
  assert refresher.waited_seconds - waited > 0.2
  refresher.close()


def test_without_refresh_nobody_looks_after_the_builder(tmp_path):
  def give_up():
    raise RuntimeError('too often')

  refresher = _refresher(tmp_path, 'none')
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  _step(refresher, 0)
  refresher._health = give_up
  assert not _step(refresher, 1)
  refresher.close()


class _Processes:
  """Threads in the place of processes: what `runtime.distributed` offers."""

  def __init__(self, count):
    self._rank = threading.local()
    self._barrier = threading.Barrier(count, timeout=20)
    self._values = [None] * count

  def join_in(self, rank):
    self._rank.value = rank

  def is_main(self):
    return getattr(self._rank, 'value', 0) == 0

  def gather(self, value):
    self._barrier.wait()
    self._values[self._rank.value] = value
    self._barrier.wait()
    return list(self._values)

  def any(self, flag):
    return True in self.gather(bool(flag))

  def barrier(self, name):
    assert set(self.gather(name)) == {name}

  def broadcast(self, value):
    return self.gather(value if self.is_main() else None)[0]


@pytest.mark.parametrize('slow', [0, 1])
def test_all_processes_adopt_the_same_at_the_same_step(
    tmp_path, monkeypatch, slow
):
  """Under `eager`, however long one of them takes to load."""
  processes = _Processes(2)
  monkeypatch.setattr(refresh, 'distributed', processes)
  monkeypatch.setattr(refresh, 'jax', types.SimpleNamespace(
      process_count=lambda: 2, block_until_ready=lambda params: params
  ))
  monkeypatch.setattr(refresh, '_POLL_SECONDS', 0.0)
  monkeypatch.setattr(refresh, '_POLL_STEPS', 2)
  _snapshot(tmp_path, 0)
  _publish(tmp_path, 0)
  used = [[], []]
  damaged = threading.Event()

  def run(rank):
    processes.join_in(rank)

    def make_search(made):
      if rank == slow:
        time.sleep(0.2)
        if made.lineage.step == 12 and not damaged.is_set():
          damaged.set()
          raise generation.Damaged('it was seen so by one process')
      return made.make_search(config_lib.MipsConfig(), None)

    refresher = _refresher(tmp_path, 'eager', make_search=make_search)
    for step in range(36):
      if rank == 0 and step in (4, 12, 20):
        _snapshot(tmp_path, step)
        _publish(tmp_path, step)
      _step(refresher, step)
      used[rank].append(refresher.generation_step)
      time.sleep(0.05)
    refresher.close()

  threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(used[0]) == len(used[1]) == 36
  assert used[0] == used[1]
  assert set(used[0]) == {0, 4, 20}  # 12 was refused by both.
