"""Weak scaling: what each device sends in a REALM step, from the compiled HLO.

  python benchmarks/collectives.py --output=benchmarks/results/collectives.json

For 1 to 64 simulated devices the three programs of a step are compiled, not
run: embedding the queries, the exact search, and the training step. The paper's
setting: BERT-base, 8 examples to a device (512 on 64), 8 candidates, 13,353,718
passages. The bytes that their collectives move, of one device in a ring, are
compared with those of the design (`_needed`). Compiling BERT-base takes minutes
for each of the twelve cases; `--preset=small` or `tiny` is quicker, and
`--small` stops at 8 devices.
"""

import dataclasses
import sys
import time
from typing import Any

import jax

jax.config.update('jax_num_cpu_devices', 64)

import harness  # noqa: E402
import hlo_collectives  # noqa: E402
import numpy as np  # noqa: E402
import training  # noqa: E402

from realm_jax import config as config_lib  # noqa: E402
from realm_jax.evaluation import report  # noqa: E402
from realm_jax.index import embedding  # noqa: E402
from realm_jax.index import topk  # noqa: E402
from realm_jax.runtime import mesh as mesh_lib  # noqa: E402

_ROWS = 13_353_718
_PER_DEVICE = 8
_VOCAB = 30_522


def _config(preset: str, data: int, model: int, **how: Any) -> Any:
  config = config_lib.Config(corpus='-', batch_size=_PER_DEVICE * data * model)
  config.model.preset = preset
  config.model.vocab_size = _VOCAB
  config.accumulate = how.get('accumulate', 1)
  config.mesh = config_lib.MeshConfig(data, model, how.get('zero', False))
  return config_lib.resolve(config)


def measure(config: config_lib.Config) -> dict[str, Any]:
  """Compiles the programs of a step and returns what they exchange."""
  started = time.time()
  data, model = config.mesh.data, config.mesh.model
  n = data * model
  mesh = jax.sharding.Mesh(
      np.array(jax.devices()[:n]).reshape(data, model),
      (mesh_lib.DATA, mesh_lib.MODEL),
  )
  rows = mesh_lib.over_batch(mesh)

  def array(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  job = training.Training(config, mesh=mesh)
  state = jax.tree.map(array, job.abstract_state, job.shardings)
  batch = jax.tree.map(lambda x: array(x, rows), job.stage.abstract_batch())
  programs = {
      'step': job.lower(state, batch),
      'queries': embedding.Embedder(
          job.components['embedder'], mesh
      ).queries.lower(state.params['embedder'], batch.query_ids_BQ),
      'top_k': topk.top_rows.lower(
          *training.abstract_search(mesh, _ROWS, config.batch_size, config),
          mesh=mesh,
          k=config.num_candidates - 1,
      ),
  }
  found = {
      name: hlo_collectives.read(
          # Only the HLO matters, so the machine code may be slow.
          program.compile({'xla_backend_optimization_level': 0}).as_text(),
          n,
      )
      for name, program in programs.items()
  }
  needed = _needed(config, state.params)
  sent = {
      name: hlo_collectives.bytes_sent(these) for name, these in found.items()
  }
  total, design = sum(sent.values()), sum(needed.values())
  return {
      'data': data,
      'model': model,
      'zero': config.mesh.zero,
      'accumulate': config.accumulate,
      'needed_bytes': design,
      **{f'needed_bytes_{name}': value for name, value in needed.items()},
      'sent_bytes': total,
      **{f'sent_bytes_{name}': value for name, value in sent.items()},
      'excess': total / design - 1 if design else float(total > 0),
      'collectives': sum(c.times for these in found.values() for c in these),
      'largest': [
          dataclasses.asdict(c)
          for these in found.values()
          for c in sorted(these, key=lambda c: -c.bytes_sent)[:3]
      ],
      'compile_seconds': time.time() - started,
  }


def _needed(config: config_lib.Config, params: Any) -> dict[str, float]:
  """Returns the bytes that a device has to send, by the design."""
  c, m, lengths = config, config.model, config.lengths
  data, model, k = c.mesh.data, c.mesh.model, c.num_candidates
  n = data * model

  def ring(size: float, group: int) -> float:
    return size * (group - 1) / group

  def weigh(params: Any, divided: bool) -> float:
    """Bytes that a device computes with, gathered where ZeRO divides them."""
    total = 0.0
    for x in jax.tree.leaves(params):
      zero = mesh_lib.DATA in x.sharding.spec
      if zero or not divided:
        parts = data if zero else 1
        total += 4.0 * parts * np.prod(x.sharding.shard_shape(x.shape))
    return total

  # Hidden states of the rows of one part of the data axis. The last layer is
  # computed at some positions only.
  per_data = c.batch_size // data
  texts = [
      (per_data, lengths.query, 1),
      (per_data * (k - 1), lengths.document, 1),
      (1, 3, 1),
      (per_data * k, lengths.joint, lengths.masks),
  ]
  activations = 0.0
  for texts_here, length, outputs in texts:
    whole, some = texts_here * length * m.width, texts_here * outputs * m.width
    # Forward: attention and MLP of each layer. Backward: their inputs.
    forward = 2 * ((m.num_layers - 1) * whole + some)
    backward = 2 * (m.num_layers - 1) * whole + (whole + some) + some
    activations += 4 * (forward + backward)
    if m.vocab_size % model == 0:  # Looking up word embeddings.
      activations += 4 * whole
  if m.vocab_size % model == 0:  # Backward through the vocabulary's scores.
    activations += 4 * per_data * k * lengths.masks * m.width
  return {
      # An all-reduce of all parameters over the devices with the same part of
      # them; with ZeRO a reduce-scatter and an all-gather, as many bytes.
      'gradients': 2 * ring(weigh(params, False), data),
      # With ZeRO the embedder has to be gathered for this program, too.
      'queries': ring(4 * c.batch_size * m.embedding_width, data)
      + ring(weigh(params['embedder'], True), data),
      # Each device's best rows and their scores.
      'top_k': ring(8 * n * c.batch_size * (k - 1), n),
      'activations': 2 * ring(activations, model),
  }


def _row(run: dict[str, Any]) -> list[str]:
  how = ['ZeRO'] if run['zero'] else []
  if run['accumulate'] > 1:
    how.append(f'{run["accumulate"]} parts')
  return [
      str(run['data'] * run['model']),
      f'{run["data"]} x {run["model"]}',
      ', '.join(how),
      f'{run["needed_bytes"] / 1e6:.3f}',
      f'{run["sent_bytes"] / 1e6:.3f}',
      f'{100 * run["excess"]:+.2f} %',
  ]


def main() -> int:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument(
      '--preset', default='base', help='size of the BERTs (default: base)'
  )
  parser.add_argument(
      '--only', help="a part of the cases, as '8x1,4x2' (data x model)"
  )
  arguments = parser.parse_args()
  cases: list[tuple[int, int, dict[str, Any]]] = [
      (n, 1, {}) for n in (1, 2, 4, 8, 16, 32, 64)
  ]
  cases += [(8, 1, {'zero': True}), (8, 1, {'accumulate': 4})]
  cases += [(4, 2, {}), (2, 4, {}), (32, 2, {'zero': True})]
  if arguments.small:
    arguments.preset = 'tiny'
    cases = [case for case in cases if case[0] * case[1] <= 8]
  if arguments.only:
    wanted = arguments.only.split(',')
    cases = [case for case in cases if f'{case[0]}x{case[1]}' in wanted]
  runs = []
  for data, model, how in cases:
    config = _config(arguments.preset, data, model, **how)
    if config.model.num_heads % model:
      continue
    runs.append(measure(config))
    print(*_row(runs[-1]), flush=True)
  heads = ['devices', 'data x model', '', 'needed MB', 'sent MB', 'excess']
  print(report.markdown(heads, *map(_row, runs)))
  result = {
      'largest_excess_data': max(
          (abs(run['excess']) for run in runs if run['model'] == 1), default=0.0
      ),
      'largest_excess': max(abs(run['excess']) for run in runs),
      'runs': runs,
      'hardware': f'{harness.about()["hardware"]}, 64 simulated devices;'
      ' compiled only',
  }
  harness.write(arguments.output, result, 'jax')
  return 0 if result['largest_excess_data'] <= 0.1 else 1


if __name__ == '__main__':
  sys.exit(main())
