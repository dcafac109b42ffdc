"""Jobs of several processes, one for each host.

With one process, all functions return at once. Values are exchanged through
JAX's coordination service, not through the devices: an exchange does not wait
for the step that is being computed, and a wait of hours can be interrupted by a
signal. All processes must make the same calls in the same order, from one
thread. This is the only module with a private import of JAX (the client of the
coordination service).
"""

import atexit
from collections.abc import Iterable, Iterator
import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils
import numpy as np

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 300.0  # Until all processes have joined.
_SLICE_SECONDS = 0.5  # Signals are handled between two slices of a wait.
_LOG_SECONDS = 60.0
_WATCH_SECONDS = 1.0
_FAILED, _END = 'realm/failed', 'realm/end'

_has_joined, _leaving = threading.Event(), threading.Event()
_calls = itertools.count()  # Numbers the exchanges, equally in all processes.


@contextlib.contextmanager
def job(*arguments: Any, **more: Any) -> Iterator[None]:
  """Joins as `initialize`; an error in one process then ends all of them.

  Otherwise the processes would wait for each other, in a collective or at the
  end. Without an error, the context waits for the other processes to finish.
  """
  watch = threading.Thread(target=_watch, daemon=True)
  try:
    initialize(*arguments, **more)
    if _client() is not None:
      watch.start()
    yield
    if _client() is not None:
      _client().key_value_set(f'{_END}/{jax.process_index()}', '')
      _wait_for_all(_client(), f'{_END}/')
      # Python's end would abort a thread that is inside of JAX.
      _leaving.set()
      watch.join()
  except BaseException as error:
    if _client() is not None:
      _fail(error)
    raise


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> None:
  """Joins the other processes of this job; before any other use of JAX.

  Args:
    coordinator: HOST:PORT of process 0, with a free port. None: JAX finds the
      address and both numbers from SLURM, Kubernetes, Open MPI or a TPU slice.
    num_processes: number of processes of the job.
    process_id: number of this process, 0 to num_processes - 1.
    timeout: seconds to wait for the other processes.

  Raises:
    ValueError: the arguments are inconsistent, or no cluster was found.
    TimeoutError: processes are missing; names the coordinator.
  """
  if coordinator is None:
    if (num_processes, process_id) != (None, None):
      raise ValueError(
          '--num_processes and --process_id need --coordinator=HOST:PORT.'
      )
  elif num_processes is None or process_id is None:
    raise ValueError(
        f'--coordinator={coordinator} needs --num_processes and --process_id.'
    )
  else:
    _check_arguments(coordinator, num_processes, process_id)
    if num_processes == 1:
      return
    if process_id:
      _wait_for_port(coordinator, timeout)
  # How CPUs exchange arrays; other devices ignore it.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # JAX's handler of SIGTERM would replace ours.
  jax.config.update('jax_enable_preemption_service', False)
  failed: list[BaseException] = []

  def connect() -> None:
    try:
      # At its own timeout JAX ends the process without naming the address.
      # Without a list, each process has one device under SLURM.
      jax.distributed.initialize(
          coordinator, num_processes, process_id,
          initialization_timeout=int(timeout) + 60, local_device_ids=[],
          cluster_detection_method='deactivate' if coordinator else None,
      )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
      failed.append(error)

  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(timeout)
  state = jax_distributed.global_state
  address = coordinator or state.coordinator_address
  if thread.is_alive():
    raise TimeoutError(
        f'Not all {num_processes or "the"} processes of this job came to the'
        f' coordinator {address} within {timeout:.0f} seconds. Is each of them'
        ' started, with the same --coordinator and --num_processes and a'
        ' --process_id of its own?'
    )
  if failed and address is None:
    raise ValueError(
        '--distributed: there is no SLURM, Kubernetes, Open MPI or TPU slice'
        ' to find the other processes by; give --coordinator=HOST:PORT'
        f' --num_processes=N --process_id=I. ({failed[0]})'
    ) from failed[0]
  if failed:
    raise RuntimeError(
        f'The coordinator {address} refused this process: {failed[0]}'
    ) from failed[0]
  _has_joined.set()
  _check_count(state.client, state.process_id, state.num_processes)
  log.info(
      'Process %d of %d, on %s; coordinator %s.',
      state.process_id, state.num_processes, socket.gethostname(), address,
  )


def is_main() -> bool:
  """Returns whether this is process 0, which writes the shared files."""
  return _client() is None or jax.process_index() == 0


def gather(value: Any, what: str = 'gather') -> list[Any]:
  """Returns the (small, JSON) values of all processes, by process number.

  Raises:
    RuntimeError: the processes are at different calls (a bug).
  """
  client = _client()
  if client is None:
    return [value]
  number = next(_calls)
  this = jax.process_index()
  client.key_value_set(f'realm/{number}/{this}', json.dumps([what, value]))
  found = _wait_for_all(client, f'realm/{number}/')
  if number:
    # All processes have read the exchange before, since they are at this one.
    client.key_value_delete(f'realm/{number - 1}/{this}')
  names, values = zip(*map(json.loads, found), strict=True)
  if set(names) != {what}:
    raise RuntimeError(f'The processes are not at one place: {names}.')
  return list(values)


def any(flag: bool) -> bool:
  """Returns whether the flag is set in any process."""
  return True in gather(bool(flag), 'any')


class LateAny:
  """As `any` for each step of a loop, without a wait: one call late.

  The flags are reduced on the devices, behind the step that they compute.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._several = jax.process_count() > 1
    self._over_devices = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    everywhere = jax.NamedSharding(mesh, jax.P())
    self._reduce = jax.jit(lambda flags: flags.any(), out_shardings=everywhere)
    self._answer: jax.Array | None = None

  def __call__(self, flag: bool) -> bool:
    """Returns whether any flag was set in the last call.

    With one process, returns the flag itself.
    """
    if not self._several:
      return flag
    answer, devices = self._answer, self._over_devices.mesh.size
    flags = jax.make_array_from_callback(
        (devices,), self._over_devices, lambda _: np.array([flag])
    )
    self._answer = self._reduce(flags)
    return answer is not None and bool(answer)


def broadcast(value: Any) -> Any:
  """Returns the (small, JSON) value of process 0."""
  return gather(value if is_main() else None, 'broadcast')[0]


def barrier(name: str) -> None:
  """Returns when all processes are at the barrier of this name."""
  gather(None, name)


def same(name: str, value: Any) -> None:
  """Checks that a (JSON) value is the same in all processes.

  Raises:
    ValueError: in all processes; names the hosts and both values. For
      dictionaries, it lists only the entries that differ.
  """
  found = gather([socket.gethostname(), value], name)
  host, expected = found[0]
  problems = [
      f'{field} is {there!r} in process {process} on {other},'
      f' {here!r} in process 0 on {host}.'
      for process, (other, value) in enumerate(found)
      for here, there, field in _differing(expected, value, name)
  ]
  if problems:
    raise ValueError(
        'The processes of a job must be started alike, but they differ:\n  '
        + '\n  '.join(problems[:8])
    )


def fetch(array: jax.Array) -> np.ndarray:
  """Returns a whole array, whatever its sharding.

  To be called in all processes, on the main thread.
  """
  if isinstance(array, jax.Array) and not (
      array.is_fully_addressable or array.is_fully_replicated
  ):
    return multihost_utils.process_allgather(array, tiled=True)
  return np.asarray(jax.device_get(array))


def _client() -> Any:
  return jax_distributed.global_state.client


def _fail(error: BaseException) -> None:
  """Tells the other processes; this one then ends without waiting for them."""
  _leaving.set()
  state = jax_distributed.global_state
  if _has_joined.is_set():
    who = f'process {state.process_id} on {socket.gethostname()}'
    text = f'{who}: {str(error) or type(error).__name__}'
    state.client.key_value_set(_FAILED, text, allow_overwrite=True)

  def end() -> None:  # JAX's own exit handler would wait for minutes.
    sys.stdout.flush()
    sys.stderr.flush()
    if state.process_id == 0:
      time.sleep(2 * _WATCH_SECONDS)  # The others read the error from here.
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)

  atexit.register(end)


def _watch() -> None:
  """Ends this process when another one has failed."""
  while not _leaving.wait(_WATCH_SECONDS):
    client = _client()
    if client is None:
      return
    try:
      failure = client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
      continue  # None has failed.
    print(f'Another process of this job failed: {failure}', file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _check_arguments(
    coordinator: str, num_processes: int, process_id: int
) -> None:
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise ValueError(
        f'--coordinator={coordinator}: must be HOST:PORT, such as'
        ' 10.0.0.1:8476.'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
        f'--process_id={process_id}: must be between 0 and --num_processes - 1'
        f' = {num_processes - 1}.'
    )


def _check_count(client: Any, process_id: int, num_processes: int) -> None:
  """Compares --num_processes with process 0, which JAX does not do."""
  key = 'realm/num_processes'
  if process_id == 0:
    client.key_value_set(key, str(num_processes))
  expected = int(client.blocking_key_value_get(key, 60_000))
  if num_processes != expected:
    raise ValueError(
        f'--num_processes={num_processes} in process {process_id} on'
        f' {socket.gethostname()}, but {expected} in process 0.'
    )


def _wait_for_port(coordinator: str, timeout: float) -> None:
  """Waits for process 0, since JAX does not tell which process is missing."""
  host, _, port = coordinator.rpartition(':')
  deadline = time.monotonic() + timeout
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise TimeoutError(
            f'The coordinator {coordinator} could not be reached within'
            f' {timeout:.0f} seconds: {error}. Is process 0 started there, and'
            ' the port open to this host?'
        ) from error
    time.sleep(0.2)


def _wait_for_all(client: Any, folder: str) -> list[str]:
  """Returns the value that each process has written to the folder.

  Raises:
    RuntimeError: a process has left the job without writing its value.
  """

  def values(folder: str) -> dict[int, str]:
    entries = client.key_value_dir_get(folder)
    return {int(key.rpartition('/')[2]): value for key, value in entries}

  logged = time.monotonic()
  while True:
    # In this order: a process writes its value before it leaves.
    gone = values(f'{_END}/')
    found = values(folder)
    missing = sorted(set(range(jax.process_count())) - set(found))
    if not missing:
      return [found[process] for process in sorted(found)]
    left = sorted(set(gone) & set(missing))
    if left:
      raise RuntimeError(f'The processes {left} of this job have left it.')
    try:
      client.blocking_key_value_get(
          f'{folder}{missing[0]}', int(1000 * _SLICE_SECONDS)
      )
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    if time.monotonic() - logged > _LOG_SECONDS:
      logged = time.monotonic()
      log.info('Waiting for the processes %s of this job.', missing)


def _differing(
    ours: Any, theirs: Any, name: str
) -> Iterable[tuple[Any, Any, str]]:
  if isinstance(ours, dict) and isinstance(theirs, dict):
    for key in ours.keys() | theirs.keys():
      if ours.get(key) != theirs.get(key):
        yield ours.get(key), theirs.get(key), f'{name}.{key}'
  elif ours != theirs:
    yield ours, theirs, name
