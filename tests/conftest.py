"""Set-up of all tests: eight CPU devices, a compilation cache, absl flags.

The environment variables are inherited by the processes that tests start;
those see one device unless they ask for more.
"""

import os
import pathlib

_ROOT = pathlib.Path(__file__).resolve().parent.parent

# Before jax is imported. Results must not depend on an accelerator that
# happens to be there.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

from absl import flags  # noqa: E402
import jax  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

# Grain reads a flag of its own even where no command line was parsed.
flags.FLAGS.mark_as_parsed()
