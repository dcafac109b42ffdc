"""Set-up of all tests: eight CPU devices, absl flags; a small world to use.

Compiled programs are kept in .cache, for the next test and the next run.

The environment variables are inherited by the processes that tests start;
those see one device unless they ask for more.
"""

import os
import pathlib

# Before jax is imported. Results must not depend on an accelerator that
# happens to be there.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR',
    str(pathlib.Path(__file__).resolve().parent.parent / '.cache' / 'jax'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
# Most of the time of these tests is the compiler's. Without optimizations, with
# XLA's older emitter of loops and few pieces of code, it needs an eighth; these
# models are too small to run slower.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault(
    'XLA_FLAGS',
    '--xla_cpu_use_fusion_emitters=false'
    ' --xla_cpu_parallel_codegen_split_count=2',
)
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# Threads of XLA's pool. With fewer than there are devices, collectives that
# overlap can each hold threads that the other waits for.
os.environ.setdefault('NPROC', '16')

from absl import flags
import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)

# Grain reads a flag of its own even where no command line was parsed.
flags.FLAGS.mark_as_parsed()


_TESTS = pathlib.Path(__file__).resolve().parent
# Processes that tests start may import helpers and jobs of the tests.
os.environ['PYTHONPATH'] = os.pathsep.join(
    [str(_TESTS), str(_TESTS / 'trainer')]
    + [path for path in [os.environ.get('PYTHONPATH')] if path]
)


@pytest.fixture(scope='session')
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A prepared corpus of 20 entities with its questions; not to be changed."""
  from realm_jax.prepare import prepare

  directory = tmp_path_factory.mktemp('world') / 'corpus'
  prepare.prepare(['world:3:20'], str(directory), workers=1, progress=False)
  return directory


@pytest.fixture(scope='module')
def optimized():
  """Compiles as a user's process does, for bits that two programs share."""
  jax.clear_caches()
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
  jax.clear_caches()


# The files that take longest, longest first, so that no worker is left with one
# of them at the end.
_LONGEST = (
    'trainer/training_test.py',
    'trainer/open_qa_training_test.py',
    'runtime/sharding_test.py',
    'runtime/distributed_test.py',
    'cli/main_test.py',
    'project/launch_test.py',
    'project/chaos_test.py',
    'project/extending_test.py',
    'trainer/starting_test.py',
    'trainer/refresh_test.py',
    'builder/documents_commands_test.py',
    'builder/builder_test.py',
    'interop/retrievers_test.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  order = {_TESTS / name: rank for rank, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: order.get(item.path, len(order)))
