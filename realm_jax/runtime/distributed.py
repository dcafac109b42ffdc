"""Several processes, one for each host, that work as one job.

Public: `job`, `initialize`, `is_main`, `any`, `LateAny`, `barrier`,
`broadcast`, `gather`, `same`, `fetch`. With one process all of them are free.

What the hosts tell each other goes through JAX's coordination service and not
through the devices: it waits for no step that is being computed, and a wait of
hours sees a signal that comes. All processes must make the same calls in the
same order, hence from one thread.
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

TIMEOUT_SECONDS = 300.0  # Until all processes have found each other.
_SLICE_SECONDS = 0.5  # Of a wait: signals are seen in between.
_SAY_SECONDS = 60.0
_WATCH_SECONDS = 1.0
_FAILED, _END = 'realm/failed', 'realm/end'

_has_joined, _has_failed = threading.Event(), threading.Event()
_calls = itertools.count()  # Numbers the exchanges, equally in all processes.


@contextlib.contextmanager
def job(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Iterator[None]:
  """As `initialize`; then what fails in one process ends all of them.

  Without that, they would wait for each other: in a collective on their
  devices, or in the end. Left without an error, it waits for the others.
  """
  try:
    initialize(coordinator, num_processes, process_id, timeout)
    if _client() is not None:
      threading.Thread(target=_watch, daemon=True).start()
    yield
    if _client() is not None:
      _client().key_value_set(f'{_END}/{jax.process_index()}', '')
      _wait_for_all(_client(), f'{_END}/')
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
    coordinator: HOST:PORT, of process 0 and a free port there. None: it and
      the two numbers are found out from SLURM, Kubernetes, Open MPI or the TPU
      slice.
    num_processes: of the job.
    process_id: of this one, 0 to num_processes - 1.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: if the arguments do not fit together, or there is no cluster.
    TimeoutError: if the others did not come; names the coordinator.
  """
  explicit = (coordinator, num_processes, process_id)
  if coordinator is None:
    if explicit != (None, None, None):
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
  # How CPUs exchange arrays; of no use to other devices.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # Its handler of SIGTERM would take the place of ours.
  jax.config.update('jax_enable_preemption_service', False)
  failed: list[BaseException] = []

  def connect() -> None:
    try:
      jax.distributed.initialize(
          coordinator,
          num_processes,
          process_id,
          # JAX would end the process, with no word of the address.
          initialization_timeout=int(timeout) + 60,
          # None would mean one device for each process under SLURM.
          local_device_ids=[],
          cluster_detection_method='deactivate' if coordinator else None,
      )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
      failed.append(error)

  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(timeout)
  where = coordinator or jax_distributed.global_state.coordinator_address
  if thread.is_alive():
    raise TimeoutError(
        f'Not all {num_processes or "the"} processes of this job came to the'
        f' coordinator {where} within {timeout:.0f} seconds. Is each of them'
        ' started, with the same --coordinator and --num_processes and a'
        ' --process_id of its own?'
    )
  if failed:
    if coordinator is None and where is None:
      raise ValueError(
          '--distributed: there is no SLURM, Kubernetes, Open MPI or TPU slice'
          ' to find the other processes by; give --coordinator=HOST:PORT'
          f' --num_processes=N --process_id=I. ({failed[0]})'
      ) from failed[0]
    raise RuntimeError(
        f'The coordinator {where} refused this process: {failed[0]}'
    ) from failed[0]
  state = jax_distributed.global_state
  _has_joined.set()
  _check_count(state.client, state.process_id, state.num_processes)
  log.info(
      'Process %d of %d, on %s; coordinator %s.',
      state.process_id,
      state.num_processes,
      socket.gethostname(),
      where,
  )


def is_main() -> bool:
  """Whether this process writes what is written once: it is process 0."""
  return _client() is None or jax.process_index() == 0


def gather(value: Any, what: str = 'gather') -> list[Any]:
  """Returns the (small, JSON) values of all processes, by their number.

  Raises:
    RuntimeError: if another process is about something else: a bug.
  """
  client = _client()
  if client is None:
    return [value]
  number = next(_calls)
  this = jax.process_index()
  client.key_value_set(f'realm/{number}/{this}', json.dumps([what, value]))
  found = _wait_for_all(client, f'realm/{number}/')
  if number:
    # All have gone on to this call, so nobody reads the one before.
    client.key_value_delete(f'realm/{number - 1}/{this}')
  names, values = zip(*map(json.loads, found), strict=True)
  if set(names) != {what}:
    raise RuntimeError(f'The processes are not at one place: {names}.')
  return list(values)


def any(flag: bool) -> bool:
  """Whether the flag is set in any process."""
  return True in gather(bool(flag), 'any')


class LateAny:
  """As `any`, but free, for each step of a loop: the answer comes one late.

  It goes over the devices, behind the step that they are at, and is asked for
  when they are done with it anyway.
  """

  def __init__(self, mesh: jax.sharding.Mesh):
    self._several = jax.process_count() > 1
    self._over_devices = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    everywhere = jax.NamedSharding(mesh, jax.P())
    self._reduce = jax.jit(lambda flags: flags.any(), out_shardings=everywhere)
    self._answer: jax.Array | None = None

  def __call__(self, flag: bool) -> bool:
    """Takes this call's flag, returns whether any was set in the last call.

    With one process, the flag itself.
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
  """Returns the (small, JSON) value that process 0 has."""
  return gather(value if is_main() else None, 'broadcast')[0]


def barrier(name: str) -> None:
  """Returns when all processes are here; `name` says where."""
  gather(None, name)


def same(name: str, value: Any) -> None:
  """Refuses to go on if the (JSON) value is not the same in all processes.

  Raises:
    ValueError: in all of them; names the hosts and both values. Of
      dictionaries, only the entries that differ.
  """
  found = gather([socket.gethostname(), value], name)
  host, expected = found[0]
  problems = []
  for process, (other, theirs) in enumerate(found):
    for ours_part, theirs_part, what in _differing(expected, theirs, name):
      problems.append(
          f'{what} is {theirs_part!r} in process {process} on {other},'
          f' {ours_part!r} in process 0 on {host}.'
      )
  if problems:
    shown = '\n  '.join(problems[:8])
    raise ValueError(
        'The processes of a job must be started alike, but they differ:\n  '
        + shown
    )


def fetch(array: jax.Array) -> np.ndarray:
  """Returns the whole of an array, however it lies on the processes' devices.

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
  """Tells the others; then this process ends, without waiting for them."""
  _has_failed.set()
  state = jax_distributed.global_state
  if _has_joined.is_set():
    state.client.key_value_set(
        _FAILED,
        f'process {state.process_id} on {socket.gethostname()}:'
        f' {str(error) or type(error).__name__}',
        allow_overwrite=True,
    )

  def end() -> None:  # In place of JAX' own, which waits for minutes.
    sys.stdout.flush()
    sys.stderr.flush()
    if state.process_id == 0:
      time.sleep(2 * _WATCH_SECONDS)  # The others ask here what happened.
    os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)

  atexit.register(end)


def _watch() -> None:
  """Ends this process when another one has failed."""
  while not _has_failed.wait(_WATCH_SECONDS):
    client = _client()
    if client is None:
      return
    try:
      who = client.key_value_try_get(_FAILED)
    except jax.errors.JaxRuntimeError:
      continue  # Nobody has.
    print(f'Another process of this job failed: {who}', file=sys.stderr)
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
  """JAX does not notice that processes were told different numbers."""
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
  """Returns when somebody listens there: JAX does not say who is missing."""
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
  """Returns what each process has put under its number in the folder.

  Raises:
    RuntimeError: if one will not, as it has left.
  """
  said = time.monotonic()
  while True:
    # In this order: who has left by now has put its value there before.
    gone = set(_in_folder(client, f'{_END}/'))
    found = _in_folder(client, folder)
    missing = sorted(set(range(jax.process_count())) - set(found))
    if not missing:
      return [found[process] for process in sorted(found)]
    left = sorted(gone & set(missing))
    if left:
      raise RuntimeError(f'The processes {left} of this job have left it.')
    try:
      client.blocking_key_value_get(
          f'{folder}{missing[0]}', int(1000 * _SLICE_SECONDS)
      )
    except jax.errors.JaxRuntimeError as error:
      if 'DEADLINE_EXCEEDED' not in str(error):
        raise
    if time.monotonic() - said > _SAY_SECONDS:
      said = time.monotonic()
      log.info('Waiting for the processes %s of this job.', missing)


def _in_folder(client: Any, folder: str) -> dict[int, str]:
  return {
      int(key.rpartition('/')[2]): value
      for key, value in client.key_value_dir_get(folder)
  }


def _differing(
    ours: Any, theirs: Any, name: str
) -> Iterable[tuple[Any, Any, str]]:
  if isinstance(ours, dict) and isinstance(theirs, dict):
    for key in ours.keys() | theirs.keys():
      if ours.get(key) != theirs.get(key):
        yield ours.get(key), theirs.get(key), f'{name}.{key}'
  elif ours != theirs:
    yield ours, theirs, name
