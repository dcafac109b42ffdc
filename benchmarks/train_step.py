"""Our pretraining step and that of transformers 4.40.2, in turns on a CPU.

  python benchmarks/train_step.py --torch_python=hf/bin/python \
      --output=FILE.json [--sizes=base,small] [--rounds=5] [--small]

Embedder and reader, forward, backward and AdamW in float32; the same
wordpieces, weights and candidates in both. Two processes do one step each in
turn, so that other load of the machine affects both. `Step` in realm_torch.py
lists PyTorch's variants. The record keeps its figures of other sizes.
benchmarks/accelerator.py measures a GPU.
"""

import argparse
import dataclasses
import gc
import statistics
import sys
import tempfile
import time
from typing import Any

import harness
import jax
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import flops
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib

_VARIANTS = ('shipped', 'masked_head', 'null_once', 'sdpa')
_ALTERNATING = ('ours', 'shipped', 'masked_head')
_PARTS = ('embed_forward', 'embed', 'read_forward', 'read', 'optimizer')
_NULL = ((2, 3, 3), (0, 0, 1))  # That of a stage without a corpus.


def _config(preset: str) -> config_lib.Config:
  config = config_lib.Config(objective='realm', corpus='none')
  config.batch_size, config.num_candidates = 2, 4
  config.granularity = 'token'  # As released, and so as in transformers.
  lengths, model = config.lengths, config.model
  lengths.query, lengths.document, lengths.masks = 96, 288, 4
  model.preset, model.vocab_size = preset, 30522
  model.compute_dtype = 'float32'
  config.optimizer.learning_rate = 1e-5
  return config_lib.resolve(config)


class _Ours:
  """Our models, optimizer and one batch, driven like `realm_torch.Step`."""

  def __init__(self, preset: str, folder: str):
    """Writes weights and batch for the other side."""
    config = _config(preset)
    job = self._job = training.Training(config)
    self._state = job.start()
    batch = job.random_batch()
    self._batch = mesh_lib.to_devices(job.mesh, batch)
    np.savez(f'{folder}/batch.npz', **dataclasses.asdict(batch))
    params = jax.device_get(self._state.params)
    for kind, name, component, prefix in (
        ('embedder', 'scorer', 'embedder', 'embedder.'),
        ('encoder', 'encoder', 'reader', ''),
    ):
      tensors = convert.tensors_of(
          kind, config.model, {component: params[component]}
      )
      np.savez(
          f'{folder}/{name}.npz',
          **{prefix + key: value for key, value in tensors.items()},
      )

    def outputs(params: Any, batch: Any, noise: Any) -> Any:
      models = components_lib.bind(job.components, params)
      return job.stage.outputs(models, batch, noise)

    def noise() -> dropout.Noise:
      return dropout.noise(jax.random.key(0), config.batch_size)

    def embed(params: Any, batch: Any) -> jax.Array:
      return outputs(params, batch, noise())[0].sum()

    def read(params: Any, batch: Any) -> jax.Array:
      return outputs(params, batch, noise())[1].mean()

    def loss(params: Any, batch: Any) -> jax.Array:
      return job.stage.loss(outputs(params, batch, None), batch)[0]

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

    self._parts = {
        'loss': jax.jit(loss),
        'embed_forward': jax.jit(embed),
        'embed': jax.jit(jax.value_and_grad(embed)),
        'read_forward': jax.jit(read),
        'read': jax.jit(jax.value_and_grad(read)),
    }
    self._update = jax.jit(update, donate_argnums=0)

  def loss(self) -> float:
    return float(self._run('loss'))

  def time(self, part: str) -> float:
    gc.collect()
    return harness.timed(self._run, part)[0]

  def _run(self, part: str) -> Any:
    if part == 'step':
      self._state, result = self._job.step(self._state, self._batch)
    elif part == 'optimizer':
      result = self._state = self._update(self._state)
    else:
      result = self._parts[part](self._state.params, self._batch)
    return jax.block_until_ready((result, self._state))[0]


def _flop(config: config_lib.Config, side: str) -> float:
  """FLOP of the matmuls of a step; see realm_jax/models/flops.py."""
  if side == 'ours':
    stage = training.Training(config).stage
    return flops.model_flop(config, stage.passes())
  return training.reference_flop(
      config,
      null_once=side not in ('shipped', 'masked_head'),
      everywhere=side == 'shipped',
  )


def _compare(preset: str, arguments: argparse.Namespace) -> harness.Figures:
  """Alternates the two sides."""
  threads, config = arguments.threads, _config(preset)
  with tempfile.TemporaryDirectory() as folder:
    ours = harness.Child(
        sys.executable, 'train_step.py', '--worker', threads=threads
    )
    theirs = harness.Child(
        arguments.torch_python, 'realm_torch.py', 'Step', threads=threads
    )
    ours.ask('open', preset=preset, folder=folder)
    theirs.ask(
        'open',
        config=huggingface_config.config_json('embedder', config.model),
        candidates=config.num_candidates,
        folder=folder,
        null=_NULL,
    )
  versions = ours.versions('jax') | theirs.versions('torch', 'transformers')
  loss = ours.ask('loss')
  figures: harness.Figures = {}
  for variant in _VARIANTS:
    value = theirs.ask('loss', variant=variant)
    figures[f'loss_difference_{variant}'] = abs(value / loss - 1)

  def taken(side: str, part: str) -> float:
    time.sleep(0.2)  # Until the threads of the other have gone to sleep.
    if side == 'ours':
      return ours.ask('time', part=part)
    return theirs.ask('time', part=part, variant=side)

  seconds: dict[str, list[float]] = {side: [] for side in ('ours', *_VARIANTS)}
  for turn in range(arguments.rounds + 1):  # The first one warms up.
    # The other variants are timed once.
    for side in seconds if turn < 2 else _ALTERNATING:
      found = taken(side, 'step')
      if turn:
        seconds[side].append(found)
        print(f'{preset} {side} {found:.2f} s', file=sys.stderr)
  for side, times in seconds.items():
    median, flop = statistics.median(times), _flop(config, side)
    figures |= {
        f'seconds_{side}': median,
        f'seconds_{side}_all': times,
        f'gflop_{side}': flop / 1e9,
        f'gflops_{side}': flop / median / 1e9,
    }
    if side != 'ours':
      figures[f'ratio_{side}'] = statistics.median(
          np.divide(times, seconds['ours'][: len(times)])
      )
  for part in _PARTS:
    for side in ('ours', 'masked_head'):
      taken(side, part)  # Compiles it.
      figures[f'{part}_seconds_{side}'] = taken(side, part)
  ours.close()
  theirs.close()
  figures['command'] = harness.about()['command']
  return {f'{preset}_{name}': x for name, x in figures.items()} | {
      'versions': harness.about()['versions'] | versions
  }


def main() -> None:
  parser = harness.parser(
      __doc__, output=False, torch='PyTorch and transformers 4.40.2'
  )
  parser.add_argument('--sizes', default='base,small', help='presets')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--threads', type=int, default=2)
  parser.add_argument('--worker', action='store_true', help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.worker:
    harness.serve(_Ours)
    return
  figures: harness.Figures = {}
  if arguments.output and arguments.output.exists():
    figures = files.read_json(arguments.output)  # Other sizes stay.
  presets = 'tiny' if arguments.small else arguments.sizes
  for preset in presets.split(','):
    figures |= _compare(preset, arguments)
  figures['hardware'] = (
      f'{arguments.threads} threads, {harness.about()["hardware"]}'
  )
  harness.write(arguments.output, figures)


if __name__ == '__main__':
  main()
