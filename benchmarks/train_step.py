"""Our pretraining step and that of transformers 4.40.2, in turns on a CPU.

  python benchmarks/train_step.py --torch_python=hf/bin/python \
      --output=FILE.json [--small] [--rounds=N] [--threads=2]

Embedder and reader, forward, backward and AdamW in float32; the same
wordpieces, weights and candidates in both. Two processes do one step each in
turn, so that other load of the machine affects both. PyTorch runs as shipped
and in the variants that benchmarks/train_step_torch.py lists. The record keeps
its figures of other sizes. benchmarks/accelerator.py measures a GPU.
"""

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import harness
import numpy as np

_VARIANTS = ('shipped', 'masked_head', 'null_once', 'sdpa')
_ALTERNATING = ('ours', 'shipped', 'masked_head')
_PARTS = ('embed_forward', 'embed', 'read_forward', 'read', 'optimizer')
_SPECIAL = {'cls': 101, 'sep': 102, 'mask': 103}
_NULL = (_SPECIAL['cls'], _SPECIAL['sep'], _SPECIAL['sep'])


@dataclasses.dataclass(frozen=True)
class _Size:
  """Shapes of a step."""

  layers: int
  width: int
  heads: int
  vocab_size: int = 30522
  batch: int = 2
  candidates: int = 4  # The null document is one of them.
  query: int = 96
  document: int = 288
  masks: int = 4


_SIZES = {
    'base': _Size(12, 768, 12),
    'small': _Size(4, 512, 8),
    'toy': _Size(2, 128, 2, vocab_size=8000, query=32, document=96),
}


def _inputs(size: _Size, seed: int = 0) -> dict[str, np.ndarray]:
  """One batch: passages of full length, the null document as candidate 0."""
  rng = np.random.default_rng(seed)
  b, k, m = size.batch, size.candidates, size.masks
  q, s = size.query, size.document
  query = rng.integers(1000, size.vocab_size, (b, q))
  query[:, 0], query[:, -1] = _SPECIAL['cls'], _SPECIAL['sep']
  positions = np.stack(
      [np.sort(rng.choice(np.arange(1, q - 1), m, False)) for _ in range(b)]
  )
  targets = np.take_along_axis(query, positions, 1)
  np.put_along_axis(query, positions, _SPECIAL['mask'], 1)
  docs = rng.integers(1000, size.vocab_size, (b, k, s))
  docs[..., 0], docs[..., 6], docs[..., -1] = _NULL
  docs[:, 0], docs[:, 0, :3] = 0, _NULL
  doc_types = np.zeros_like(docs)
  doc_types[..., 7:] = docs[..., 7:] != 0
  doc_types[:, 0, 2] = 1
  joint = np.zeros((b, k, q + s), query.dtype)
  joint[..., :q] = query[:, None]
  joint[:, 1:, q : q + s - 7] = docs[:, 1:, 7:]
  joint[:, 0, q] = _SPECIAL['sep']
  labels = np.full((b, q + s), -100)
  np.put_along_axis(labels, positions, targets, 1)
  joint_types = np.zeros_like(joint)
  joint_types[..., q:] = joint[..., q:] != 0
  return {
      'query_ids': query,
      'doc_ids': docs,
      'doc_types': doc_types,
      'joint_ids': joint,
      'joint_types': joint_types,
      'positions': positions,
      'targets': targets,
      'labels': labels,
  }


class _Side:
  """Our models, optimizer and one batch, driven like the PyTorch side."""

  def __init__(self, spec: dict[str, Any]):
    # JAX starts after the process has its CPU cores.
    import jax
    import training

    from realm_jax.corpus import inputs
    from realm_jax.models import components as components_lib
    from realm_jax.models import dropout
    from realm_jax.runtime import mesh as mesh_lib
    from realm_jax.trainer.stages import realm

    self._jax = jax
    self.config = config = _config(spec)
    self._job = job = training.Training(config)
    self.state = job.start()
    with np.load(spec['inputs']) as file:
      x = {name: file[name].astype(np.int32) for name in file.files}
    self.batch = mesh_lib.to_devices(
        job.mesh,
        realm.Batch(
            query_ids_BQ=x['query_ids'],
            doc_ids_BJS=x['doc_ids'][:, 1:],
            doc_types_BJS=x['doc_types'][:, 1:],
            joint_ids_BKT=x['joint_ids'],
            joint_types_BKT=x['joint_types'],
            positions_BM=x['positions'],
            targets_BM=x['targets'],
            mask_BM=np.ones_like(x['targets'], bool),
        ),
    )

    def loss(params: Any, batch: Any) -> jax.Array:
      models = components_lib.bind(job.components, params)
      return job.stage.loss(job.stage.outputs(models, batch, None), batch)[0]

    def embed(params: Any, batch: Any) -> jax.Array:
      return realm.candidate_scores(
          components_lib.bind(job.components, params).embedder,
          batch,
          inputs.Null(_NULL, (0, 0, 1)),
          dropout.noise(jax.random.key(0), config.batch_size),
      ).sum()

    def read(params: Any, batch: Any) -> jax.Array:
      return realm.read_targets(
          components_lib.bind(job.components, params).reader,
          batch,
          dropout.noise(jax.random.key(0), config.batch_size),
      ).mean()

    def update(state: Any) -> Any:
      updates, opt_state = job.tx.update(
          state.params, state.opt_state, state.params, step=state.step
      )
      params = {
          name: jax.tree.map(
              lambda x, change, rate=job.rates[name]: x + rate * change,
              state.params[name],
              changes,
          )
          for name, changes in updates.items()
      }
      return dataclasses.replace(state, params=params, opt_state=opt_state)

    self._loss = jax.jit(loss)
    self._parts = {
        'embed_forward': jax.jit(embed),
        'embed': jax.jit(jax.value_and_grad(embed)),
        'read_forward': jax.jit(read),
        'read': jax.jit(jax.value_and_grad(read)),
    }
    self._update = jax.jit(update, donate_argnums=0)

  def save(self, folder: str) -> None:
    """Writes the weights under the names that transformers has for them."""
    from realm_jax.interop import convert

    params = self._jax.device_get(self.state.params)
    for kind, name, component, prefix in (
        ('embedder', 'scorer', 'embedder', 'embedder.'),
        ('encoder', 'encoder', 'reader', ''),
    ):
      tensors = convert.tensors_of(
          kind, self.config.model, {component: params[component]}
      )
      np.savez(
          f'{folder}/{name}.npz',
          **{prefix + key: value for key, value in tensors.items()},
      )

  def loss(self) -> float:
    return float(self._loss(self.state.params, self.batch))

  def time(self, part: str) -> float:
    gc.collect()
    return harness.timed(self._run, part)[0]

  def _run(self, part: str) -> None:
    if part == 'step':
      self.state, result = self._job.step(self.state, self.batch)
    elif part == 'optimizer':
      result = self.state = self._update(self.state)
    else:
      result = self._parts[part](self.state.params, self.batch)
    self._jax.block_until_ready((self.state, result))


def _config(spec: dict[str, Any]) -> Any:
  from realm_jax import config as config_lib

  config = config_lib.Config(objective='realm', corpus='none')
  config.batch_size, config.num_candidates = spec['batch'], spec['candidates']
  config.granularity = 'token'  # As released, and so as in transformers.
  lengths, model = config.lengths, config.model
  lengths.query, lengths.document = spec['query'], spec['document']
  lengths.masks = spec['masks']
  model.num_layers, model.width = spec['layers'], spec['width']
  model.num_heads, model.vocab_size = spec['heads'], spec['vocab_size']
  model.dropout = spec.get('dropout', 0.1)
  model.compute_dtype = 'float32'
  config.optimizer.learning_rate = 1e-5
  return config_lib.resolve(config)


def _worker() -> None:
  """Our side, as a `harness.Child`."""
  side: Any = None

  def answer(do: str, request: dict[str, Any]) -> dict[str, Any]:
    nonlocal side
    match do:
      case 'open':
        cores = sorted(os.sched_getaffinity(0))[: request['threads']]
        os.sched_setaffinity(0, cores)
        side = _Side(request)
        return harness.about('jax')['versions']
      case 'save':
        side.save(request['folder'])
      case 'loss':
        return {'value': side.loss()}
      case 'time':
        return {'seconds': side.time(request['part'])}
    return {}

  harness.serve(answer)


def _child(python: str, script: str, *words: str, threads: int) -> Any:
  return harness.Child(
      python,
      pathlib.Path(__file__).resolve().with_name(script),
      *words,
      JAX_PLATFORMS='cpu',
      NPROC=str(threads),
      OMP_NUM_THREADS=str(threads),
  )


def _processor() -> str:
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text(encoding='utf-8')
  except OSError:
    return platform.machine()
  names = [x for x in text.splitlines() if x.startswith('model name')]
  return names[0].partition(': ')[2] if names else platform.machine()


def _flop(size: _Size, side: str) -> float:
  """FLOP of the matmuls of a step; see realm_jax/models/flops.py."""
  import training

  from realm_jax.models import flops
  from realm_jax.trainer import stages

  config = _config(dataclasses.asdict(size))
  if side == 'ours':
    return flops.model_flop(config, stages.load(config)(config).passes())
  return training.reference_flop(
      config,
      null_once=side not in ('shipped', 'masked_head'),
      everywhere=side == 'shipped',
  )


def _compare(
    name: str, size: _Size, arguments: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, str]]:
  """Alternates the two sides; returns figures and versions."""
  threads = arguments.threads
  with tempfile.TemporaryDirectory() as folder:
    inputs = f'{folder}/inputs.npz'
    np.savez(inputs, **_inputs(size))
    spec = {
        **dataclasses.asdict(size),
        'dropout': arguments.dropout,
        'threads': threads,
        'inputs': inputs,
    }
    ours = _child(sys.executable, 'train_step.py', '--worker', threads=threads)
    theirs = _child(
        arguments.torch_python, 'train_step_torch.py', threads=threads
    )
    versions = ours.ask('open', **spec) | theirs.ask('open', **spec)
    ours.ask('save', folder=folder)
    theirs.ask('load', folder=folder)
    figures: dict[str, Any] = {}
    loss = ours.ask('loss')['value']
    for variant in _VARIANTS:
      theirs.ask('use', variant=variant)
      value = theirs.ask('loss')['value']
      figures[f'{name}_loss_difference_{variant}'] = abs(value / loss - 1)
    seconds: dict[str, list[float]] = {
        side: [] for side in ('ours', *_VARIANTS)
    }
    for turn in range(arguments.rounds + 1):  # The first one warms up.
      # The other variants are timed once.
      for side in seconds if turn < 2 else _ALTERNATING:
        process = ours if side == 'ours' else theirs
        if side != 'ours':
          theirs.ask('use', variant=side)
        time.sleep(0.2)  # Until the threads of the other have gone to sleep.
        taken = process.ask('time', part='step')['seconds']
        if turn:
          seconds[side].append(taken)
          print(f'{name} {side} {taken:.2f} s', file=sys.stderr)
    for side, times in seconds.items():
      median = statistics.median(times)
      flop = _flop(size, side)
      figures[f'{name}_seconds_{side}'] = median
      figures[f'{name}_seconds_{side}_all'] = times
      figures[f'{name}_gflop_{side}'] = flop / 1e9
      figures[f'{name}_gflops_{side}'] = flop / median / 1e9
      if side != 'ours':
        figures[f'{name}_ratio_{side}'] = statistics.median(
            theirs_ / ours_
            for theirs_, ours_ in zip(times, seconds['ours'], strict=False)
        )
    theirs.ask('use', variant='masked_head')
    for part in _PARTS:
      for side, process in (('ours', ours), ('masked_head', theirs)):
        process.ask('time', part=part)  # Compiles it.
        answer = process.ask('time', part=part)
        figures[f'{name}_{part}_seconds_{side}'] = answer['seconds']
    ours.close()
    theirs.close()
  return figures, versions


def main() -> None:
  parser = harness.parser(
      __doc__, output=False, torch='PyTorch and transformers 4.40.2'
  )
  parser.add_argument('--sizes', default='base,small', help='which to run')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--dropout', type=float, default=0.1)
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    _worker()
    return
  figures: dict[str, Any] = {}
  if arguments.output and arguments.output.exists():
    figures = json.loads(arguments.output.read_text())  # Of other sizes.
  about = harness.about()
  names = 'toy' if arguments.small else arguments.sizes
  for name in names.split(','):
    found, versions = _compare(name, _SIZES[name], arguments)
    figures |= {**found, f'{name}_command': about['command']}
  figures |= {
      'hardware': f'{arguments.threads} of {os.cpu_count()} x {_processor()}',
      'versions': about['versions'] | versions,
  }
  harness.write(arguments.output, figures)


if __name__ == '__main__':
  main()
