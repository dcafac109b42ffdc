"""A generation that is damaged, late or of another job; a failing builder."""

import json
import logging
import shutil
import threading
import time

import pytest
import refresh_test

from realm_jax.runtime import files
from realm_jax.runtime import process
from realm_jax.trainer import loader
from realm_jax.trainer import refresh


def test_a_damaged_generation_is_built_again_once(tmp_path):
  refresher = refresh_test._refresher(tmp_path)
  refresh_test._snapshot(tmp_path, 0)
  path = refresh_test._publish(tmp_path, 0)
  refresh_test._flip(path / 'shard-00000.npy')

  def rebuild(damage):
    while path.exists():
      time.sleep(0.01)
    refresh_test._publish(tmp_path, 0)
    if damage:
      refresh_test._flip(path / 'shard-00000.npy')

  thread = threading.Thread(target=rebuild, args=(False,))
  thread.start()
  assert refresh_test._step(refresher, 0)
  thread.join()
  # Damaged at every build: the disk is at fault; the error says so.
  refresher = refresh_test._refresher(tmp_path)
  refresh_test._flip(path / 'shard-00000.npy')
  thread = threading.Thread(target=_rebuild_damaged, args=(tmp_path, path))
  thread.start()
  with pytest.raises(files.Damaged, match='its manifest says'):
    refresh_test._step(refresher, 0)
  thread.join()


def _rebuild_damaged(workdir, path):
  """Publishes a generation that is damaged from the first moment."""
  while path.exists():
    time.sleep(0.01)
  aside = workdir / 'aside'
  shutil.copytree(workdir / 'retriever', aside / 'retriever')
  refresh_test._flip(refresh_test._publish(aside, 0) / 'shard-00000.npy')
  (aside / 'index' / '0').rename(path)


def test_one_of_other_parameters_is_waited_out(tmp_path, caplog):
  """Published by a builder that had not noticed that the trainer resumed."""
  refresher = refresh_test._refresher(tmp_path)
  digest = refresh_test._snapshot(tmp_path, 0)
  refresh_test._publish(tmp_path, 0, params_digest='0123456789abcdef' * 4)
  timer = threading.Timer(0.5, refresh_test._publish, (tmp_path, 0))
  timer.start()
  with caplog.at_level(logging.WARNING):
    assert refresh_test._step(refresher, 0)
  timer.join()
  assert refresher._current.digest == digest
  assert refresher.waited_seconds > 0.3
  assert caplog.text.count('0123456789abcdef') == 1
  assert digest[:16] in caplog.text


@pytest.mark.parametrize('field', ['corpus_fingerprint', 'tokenizer_digest'])
def test_one_of_another_job_is_refused(tmp_path, field):
  refresher = refresh_test._refresher(tmp_path)
  refresh_test._snapshot(tmp_path, 0)
  refresh_test._publish(tmp_path, 0, **{field: 'theirs'})
  with pytest.raises(ValueError, match='does not belong to this job') as error:
    refresh_test._step(refresher, 0)
  assert f"{field}: 'theirs' in the index" in str(error.value)


def test_one_copied_under_another_number_is_refused(tmp_path):
  refresher = refresh_test._refresher(tmp_path)
  digest = refresh_test._snapshot(tmp_path, 0)
  refresh_test._snapshot(tmp_path, 4)
  refresh_test._publish(tmp_path, 4).rename(tmp_path / 'index' / '0')
  _rewrite(tmp_path / 'index' / '0', params_digest=digest)
  with pytest.raises(ValueError, match='step: 4 in the index, 0 expected'):
    refresh_test._step(refresher, 0)


def _rewrite(path, **values):
  manifest = json.loads((path / 'manifest.json').read_text())
  manifest.update(values)
  manifest['manifest_sha256'] = files.manifest_digest(manifest)
  (path / 'manifest.json').write_text(json.dumps(manifest))


def test_a_newer_format_is_refused(tmp_path):
  refresher = refresh_test._refresher(tmp_path)
  refresh_test._snapshot(tmp_path, 0)
  _rewrite(refresh_test._publish(tmp_path, 0), format_version=99)
  with pytest.raises(ValueError, match='format 99, from a newer realm_jax'):
    refresh_test._step(refresher, 0)


def test_waiting_ends(tmp_path, monkeypatch):
  config = refresh_test._config('sync')
  config.refresh.timeout = 0.2
  refresher = refresh.Refresher(
      tmp_path, config, corpus=refresh_test._CORPUS, probe=refresh_test._Probe()
  )
  refresh_test._snapshot(tmp_path, 0)
  with process.Heartbeat(tmp_path / 'index') as heartbeat:
    heartbeat.beat('embedding', done=7, total=60, at_once=True)
    with pytest.raises(TimeoutError, match=r'index/0.*embedding 7 of 60'):
      refresh_test._step(refresher, 0)
  monkeypatch.setattr(loader, '_SNAPSHOT_SECONDS', 0.1)
  config.refresh.timeout = 20.0
  shutil.rmtree(tmp_path / 'retriever')
  with pytest.raises(FileNotFoundError, match='its snapshot.*is gone'):
    refresh_test._step(refresher, 0)


def test_health_is_checked_at_every_step(tmp_path):
  calls = []

  def health():
    calls.append(0)
    if len(calls) == 5:
      raise RuntimeError('it died three times')

  refresher = refresh_test._refresher(tmp_path, health=health)
  refresh_test._snapshot(tmp_path, 0)
  with pytest.raises(RuntimeError, match='three times'):
    refresh_test._step(refresher, 0)
  # Also by a trainer that does not wait.
  calls.clear()
  refresh_test._publish(tmp_path, 0)
  refresh_test._step(refresher, 0)
  before = len(calls)
  refresh_test._step(refresher, 1)
  assert len(calls) == before + 1
  refresher.close()


def test_a_wait_logs_how_to_start_a_builder(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(loader, '_STALE_SECONDS', 0.1)
  monkeypatch.setattr(loader, '_LOG_SECONDS', 0.3)
  refresher = refresh_test._refresher(tmp_path)
  refresh_test._snapshot(tmp_path, 0)
  timer = threading.Timer(1.5, refresh_test._publish, (tmp_path, 0))
  timer.start()
  with caplog.at_level(logging.WARNING):
    refresh_test._step(refresher, 0)
  timer.join()
  said = f'start `realm-jax index --workdir={tmp_path} --follow`'
  assert 2 <= caplog.text.count(said) <= 6
  # A builder that is seen to be alive is given its time in silence.
  caplog.clear()
  refresh_test._snapshot(tmp_path, 4)
  done = threading.Event()

  def beat():
    with process.Heartbeat(tmp_path / 'index') as heartbeat:
      while not done.wait(0.02):
        heartbeat.beat('embedding', at_once=True)

  thread = threading.Thread(target=beat)
  thread.start()
  timer = threading.Timer(1.0, refresh_test._publish, (tmp_path, 4))
  timer.start()
  monkeypatch.setattr(loader, '_STALE_SECONDS', 0.7)
  with caplog.at_level(logging.WARNING):
    refresh_test._step(refresher, 4)
  done.set()
  thread.join()
  timer.join()
  assert said not in caplog.text
  refresher.close()


def test_resuming_without_its_generation_names_the_command(tmp_path):
  refresh_test._snapshot(tmp_path, 4)
  with pytest.raises(FileNotFoundError) as error:
    refresh_test._refresher(tmp_path, step=6, generation=4)
  assert f'realm-jax index --workdir={tmp_path} --step=4' in str(error.value)
  refresh_test._publish(tmp_path, 4)
  refresher = refresh_test._refresher(tmp_path, step=6, generation=4)
  assert refresher.generation_step == 4
  # Its snapshot may be gone by then.
  shutil.rmtree(tmp_path / 'retriever')
  refresher = refresh_test._refresher(tmp_path, step=6, generation=4)
  assert refresher.generation_step == 4
  assert refresher.num_adopted == 0
  assert not refresh_test._step(refresher, 6)


def test_failures_of_the_builder_are_logged_with_the_age(
    tmp_path, monkeypatch, caplog
):
  failures = [0]
  refresher = refresh_test._eager(
      tmp_path, monkeypatch, health=lambda: failures[0]
  )
  with caplog.at_level(logging.WARNING):
    for step in range(1, 12):
      if step in (5, 7):
        failures[0] += 1
      assert not refresh_test._step(refresher, step)  # It does not wait.
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
    refresh_test._step(refresher, 12)
  refresher.close()


def test_scheduled_waits_for_a_failing_builder_at_the_due_step_only(tmp_path):
  failures = [0]
  refresher = refresh_test._refresher(
      tmp_path, 'scheduled', lag=3, health=lambda: failures[0]
  )
  refresh_test._snapshot(tmp_path, 0)
  refresh_test._publish(tmp_path, 0)
  refresh_test._step(refresher, 0)
  waited = refresher.waited_seconds
  for step in range(1, 7):
    failures[0] = step
    assert not refresh_test._step(refresher, step)
    if step == 4:
      refresh_test._snapshot(tmp_path, 4)
  assert refresher.waited_seconds == waited
  timer = threading.Timer(0.3, refresh_test._publish, (tmp_path, 4))
  timer.start()
  assert refresh_test._step(refresher, 7)
  timer.join()
  assert refresher.waited_seconds - waited > 0.2
  refresher.close()


def test_without_refresh_the_builder_is_not_checked(tmp_path):
  def give_up():
    raise RuntimeError('too often')

  refresher = refresh_test._refresher(tmp_path, 'none')
  refresh_test._snapshot(tmp_path, 0)
  refresh_test._publish(tmp_path, 0)
  refresh_test._step(refresher, 0)
  refresher._health = give_up
  assert not refresh_test._step(refresher, 1)
  refresher.close()
