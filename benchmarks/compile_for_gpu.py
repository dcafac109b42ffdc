"""Compiles the training steps and the exact search for an H100, without one.

  python benchmarks/compile_for_gpu.py \
      --output=benchmarks/results/compile_for_gpu.json

XLA compiles for the description of a GPU, without a GPU and without a driver.
JAX's CUDA plugin and the CUDA libraries have to be installed as wheels, for the
installed version of JAX:

  pip install "jax[cuda13]==$(python -c 'import jax; print(jax.__version__)')"

The programs are the exact search of 512 queries in all 13,353,718 passages, and
the steps of ICT and REALM in bfloat16, at BERT-base and the batch that the
paper gives one of 64 devices (64 pairs, 8 examples of 8 candidates):

  search           bfloat16 rows, k of 7
  search_pallas    the same by config.mips.kernel=pallas
  ict, realm       model.attention=auto without dropout of the attention
                   weights, so by cuDNN
  realm_dropout    the default: attention weights are dropped as all else is, so
                   queries and reader attend by XLA

The figures of each: bytes of state and batch (or table and queries), and of all
other allocations of XLA, by its own count; kernels, those of a loop as often as
it runs (a sort or a call of a library counts once), and cuDNN's among them; CPU
time of all threads. XLA tunes the matmuls on the device; without one it takes
Triton kernels, so a GPU may run others. All layers of a step are alike:
`a_layer` is the difference of the depths of --layers, for one layer.
"""

import collections
import importlib.util
import json
import re
import time
from typing import Any

import harness
import hlo_collectives
import jax
from jax.experimental import topologies
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.index import topk
from realm_jax.models import fused_attention
from realm_jax.planner import plan
from realm_jax.runtime import mesh as mesh_lib

_GB = 1e9
_ROWS = 13_353_718  # Passages of the paper's corpus.
_QUERIES = 512
_PROGRAMS = ('search', 'search_pallas', 'ict', 'realm', 'realm_dropout')
_BATCH = {'ict': 64, 'realm': 8}  # 4,096 and 512 on 64 devices.

# The H100 SXM5, 80 GB: xla.gpu.GpuTargetConfigProto.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# Operations without a kernel.
_FREE = frozenset(
    'bitcast constant get-tuple-element iota parameter tuple'.split()
)


def kernels(hlo: str) -> int:
  """Counts the kernels that the optimised module launches."""
  operations = [
      (op, times)
      for op, _, _, times in hlo_collectives.instructions(hlo)
      if op not in _FREE
  ]
  if unknown := [op for op, times in operations if times < 0]:
    raise ValueError(f'In a loop of unknown length: {unknown}')
  return sum(times for _, times in operations)


def _plugin() -> list[str]:
  """Returns the packages that JAX's CUDA plugin consists of."""
  for cuda in ('cuda13', 'cuda12'):
    if importlib.util.find_spec(f'jax_{cuda}_plugin'):
      return [f'jax-{cuda}-plugin', f'jax-{cuda}-pjrt']
  raise SystemExit(
      "JAX's CUDA plugin is not installed: pip install"
      f" 'jax[cuda13]=={jax.__version__}'"
  )


def _mesh() -> jax.sharding.Mesh:
  """Returns the mesh of one described H100."""
  topology = topologies.get_topology_desc(
      platform='cuda', topology_name='1x1x1', topology='1x1x1',
      target_config=_H100,
  )
  return jax.sharding.Mesh(
      np.array(topology.devices).reshape(1, 1),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )


def _config(program: str, layers: int, small: bool) -> config_lib.Config:
  objective = program.partition('_')[0]
  config = config_lib.Config(objective=objective, corpus='none')
  config.batch_size = _BATCH[objective]
  config.model.compute_dtype = 'bfloat16'
  config.model.vocab_size = 30_522
  if program != 'realm_dropout':
    config.model.attention_dropout = 0.0
  if small:
    config.model.preset, config.model.vocab_size = 'tiny', 2000
    config.lengths.query, config.lengths.document = 24, 40
    config.batch_size, config.num_candidates = 4, 3
  config.model.num_layers = layers
  return config_lib.resolve(config)


def _trace_search(
    mesh: jax.sharding.Mesh, small: bool, fused: bool
) -> jax.stages.Traced:
  queries, rows = (8, 20_000) if small else (_QUERIES, _ROWS)
  config = config_lib.resolve(config_lib.Config())
  return topk.top_rows.trace(
      *training.abstract_search(mesh, rows, queries, config),
      mesh=mesh,
      k=config.num_candidates - 1,
      fused=fused,
  )


def _figures(trace: Any) -> dict[str, Any]:
  start = time.process_time()
  lowered = trace().lower()
  traced = time.process_time()
  compiled = lowered.compile()
  done = time.process_time()
  memory, hlo = compiled.memory_analysis(), compiled.as_text()
  calls = re.findall(r'custom_call_target="(__cudnn\$\w+)"', hlo)
  return {
      'arguments_gb': memory.argument_size_in_bytes / _GB,
      'temporaries_gb': memory.temp_size_in_bytes / _GB,
      'kernels': kernels(hlo),
      'cudnn_calls': dict(collections.Counter(calls)),
      'trace_seconds': traced - start,
      'compile_seconds': done - traced,
  }


def main() -> None:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument('--layers', default='2,4', help='of the steps')
  parser.add_argument('--programs', default=','.join(_PROGRAMS))
  parser.add_argument(
      '--scan_layers', action='store_true', help='config.model.scan_layers'
  )
  arguments = parser.parse_args()
  depths = sorted(map(int, arguments.layers.split(',')))
  # All arrays stay abstract; JAX must not look for a driver.
  jax.config.update('jax_platforms', 'cpu')
  plugin, mesh = _plugin(), _mesh()
  device = mesh.devices.flat[0]
  found: list[harness.Figures] = []

  def record(trace: Any, program: str, **described: Any) -> None:
    found.append({'program': program, **described, **_figures(trace)})
    print(json.dumps(found[-1]), flush=True)

  for program in arguments.programs.split(','):
    if program.startswith('search'):
      fused = program == 'search_pallas'
      record(
          lambda fused=fused: _trace_search(mesh, arguments.small, fused),
          program,
      )
      continue
    for layers in depths:
      config = _config(program, layers, arguments.small)
      config.model.scan_layers = arguments.scan_layers
      record(
          lambda config=config: plan.trace_step(config, mesh),
          program,
          layers=layers,
          batch=config.batch_size,
          attention=fused_attention.choose(config.model, device),
      )
    if len(depths) > 1:
      one, other = found[-len(depths)], found[-1]
      other['a_layer'] = {
          name: (other[name] - one[name]) / (other['layers'] - one['layers'])
          for name in ('arguments_gb', 'temporaries_gb', 'kernels')
      }
  result = {'device': device.device_kind, 'programs': found}
  harness.write(arguments.output, result, 'jax', *plugin)


if __name__ == '__main__':
  main()
