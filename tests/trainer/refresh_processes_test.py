"""Several processes adopt the same generation at the same step."""

import threading
import time
import types

import pytest
import refresh_test

from realm_jax import config as config_lib
from realm_jax.runtime import files
from realm_jax.trainer import refresh


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
  refresh_test._snapshot(tmp_path, 0)
  refresh_test._publish(tmp_path, 0)
  used = [[], []]
  damaged = threading.Event()

  def run(rank):
    processes.join_in(rank)

    def make_search(made):
      if rank == slow:
        time.sleep(0.2)
        if made.lineage.step == 12 and not damaged.is_set():
          damaged.set()
          raise files.Damaged('it was seen so by one process')
      return made.make_search(config_lib.MipsConfig(), None)

    refresher = refresh_test._refresher(
        tmp_path, 'eager', make_search=make_search
    )
    for step in range(36):
      if rank == 0 and step in (4, 12, 20):
        refresh_test._snapshot(tmp_path, step)
        refresh_test._publish(tmp_path, step)
      refresh_test._step(refresher, step)
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
