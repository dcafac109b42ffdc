"""The lock of a workdir."""

import contextlib
import errno
import threading
import time

from realm_jax.runtime import files
from realm_jax.runtime import process as process_lib


def test_storage_without_locks_is_logged(tmp_path, monkeypatch, caplog):
  def flock(file, how):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(files.fcntl, 'flock', flock)
  with process_lib.lock(tmp_path, 'index builder'):
    pass
  assert 'make sure that no second index builder runs on' in caplog.text


def test_the_lock_is_waited_for_if_asked(tmp_path):
  first = contextlib.ExitStack()
  first.enter_context(process_lib.lock(tmp_path, 'index builder'))
  timer = threading.Timer(0.3, first.close)
  timer.start()
  start = time.monotonic()
  with process_lib.lock(tmp_path, 'index builder', timeout=30):
    assert 0.2 < time.monotonic() - start < 20
  timer.join()
