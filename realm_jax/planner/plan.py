"""What a job needs and how long it takes, before it is started: estimates.

Public: `Setting`, `Chip`, `CHIPS`, `of_corpus`, `plan`, `as_text`,
`trace_step`, `compile_step`, `compiled`. The formulas are in flops.py. A plan
is JSON: {section: {what: figure}}.
"""

from collections.abc import Iterable
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import search as search_lib
from realm_jax.models import flops
from realm_jax.planner import memory as memory_lib
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib

Plan = dict[str, dict[str, Any]]

_GB = 1e9
# Of a corpus without text of its own for the sentences, for each wordpiece of
# the passages: token table 2, passages 4, sentences and their tables 9 (19,705
# passages of English Wikipedia: 14.9).
_CORPUS_BYTES = 15.0
_TABLE_BYTES = 2.0  # Of it, what training maps into memory.
_BUILDER_TOKENS = 2**16  # Of one batch on one device; see index/embedding.py.


@dataclasses.dataclass(frozen=True)
class Chip:
  """The best that the vendor states, dense, of bfloat16 matrix products."""

  tflops: float
  memory_gb: float
  memory_gb_per_second: float


# NVIDIA: the data sheets of the SXM modules (where there is one), without
# sparsity. Google: cloud.google.com/tpu/docs, 'System architecture', per chip.
CHIPS = {
    'a100': Chip(312, 80, 2039),
    'a100-40gb': Chip(312, 40, 1555),
    'h100': Chip(989, 80, 3350),
    'h200': Chip(989, 141, 4800),
    'b200': Chip(2250, 180, 8000),
    'l4': Chip(121, 24, 300),
    'l40s': Chip(362, 48, 864),
    'rtx4090': Chip(165, 24, 1008),
    'v3': Chip(123, 32, 900),
    'v4': Chip(275, 32, 1228),
    'v5e': Chip(197, 16, 819),
    'v5p': Chip(459, 95, 2765),
    'v6e': Chip(918, 32, 1640),
}


@dataclasses.dataclass(frozen=True)
class Setting:
  """What a plan is made for, besides the config.

  passages: rows of the corpus.
  mean_wordpieces: of a passage, with title and specials.
  corpus_bytes: of its folder; None: estimated.
  chip: of which all devices are.
  trainer_devices, builder_devices: how many; a builder of 0 devices shares
    those of the trainer, which stands still meanwhile.
  utilization: of the chip's peak by a training step.
  builder_utilization: by the embedding of passages.
  price: of a chip for an hour, in any currency; 0: not asked for.
  fused: whether attention has a fused kernel there, as on GPU and TPU in
    bfloat16; it is used if no attention weights are dropped.
  """

  passages: int
  mean_wordpieces: float
  chip: Chip
  corpus_bytes: float | None = None
  trainer_devices: int = 1
  builder_devices: int = 1
  utilization: float = 0.4
  builder_utilization: float = 0.5
  price: float = 0.0
  fused: bool = True


def of_corpus(
    config: config_lib.Config,
    passages: int | None = None,
    mean_wordpieces: float | None = None,
) -> tuple[config_lib.Config, int, float, float | None]:
  """Takes from the config's corpus, if it names one, what was not given.

  Returns:
    The resolved config with the size of the vocabulary, the number of
    passages, their mean wordpieces, and the bytes of the corpus' folder.

  Raises:
    ValueError: if there is no corpus and not enough was given.
    FileNotFoundError: if there is no corpus where the config says.
  """
  config = config_lib.resolve(config)
  size = None
  if config.corpus:
    corpus = corpus_lib.Corpus.open(config.corpus)
    config.model.vocab_size = corpus.tokenizer.vocab_size
    lengths = np.minimum(corpus.passages.lengths, config.lengths.document)
    if passages is None:  # Else it stands for a larger one like it.
      passages = len(lengths)
      size = sum(
          path.stat().st_size
          for path in corpus.directory.rglob('*')
          if path.is_file()
      )
    if mean_wordpieces is None:
      mean_wordpieces = float(lengths.mean())
  if passages is None:
    raise ValueError(
        'How large is the corpus? Give --config.corpus=FOLDER, or --passages=N.'
    )
  if mean_wordpieces is None:
    mean_wordpieces = float(config.lengths.document)
  return config, passages, mean_wordpieces, size


def plan(config: config_lib.Config, setting: Setting) -> Plan:
  """Estimates a job of a config whose vocabulary is known.

  Returns:
    Sections `parameters`, `work`, `time`, `device_memory`, `builder_memory`,
    `host_memory`, `disk` and `advice`: what does not fit, and what would.

  Raises:
    ValueError: if the devices do not fit the mesh or the batch, or the size of
      the vocabulary is not known.
  """
  config = config_lib.resolve(config)
  if config.model.vocab_size < 1:
    raise ValueError(
        'config.model.vocab_size=0 takes it from the corpus, and there is none'
        ' here; say it, for example --config.model.vocab_size=30522.'
    )
  # Raises if they do not fit together.
  mesh_lib.axis_sizes(config.mesh, setting.trainer_devices, config.batch_size)
  stage = stages.load(config)(config)
  components = stages.components_of(config)
  parameters = {name: c.size for name, c in components.items()}
  work = _work(stage, setting)
  result: Plan = {
      'parameters': {**parameters, 'total': sum(parameters.values())},
      'work': work,
      'time': _time(config, setting, work),
      'device_memory': _device_memory(stage, setting, parameters),
      'host_memory': _host_memory(stage, setting, parameters),
      'disk': _disk(stage, setting, parameters),
  }
  if stage.searches:
    result['builder_memory'] = _builder_memory(
        config, setting, parameters
    )
  advice = _advice(stage, setting, result)
  result['advice'] = {str(i): line for i, line in enumerate(advice, start=1)}
  return result


def as_text(result: Plan) -> str:
  """A plan for people."""
  lines = []
  for section, figures in result.items():
    lines += ['', section.replace('_', ' ')]
    for name, value in figures.items():
      if isinstance(value, str):
        lines.append(f'  - {value}')
      else:
        label = name.removesuffix('_gb').replace('_', ' ')
        lines.append(f'  {label:36}{_figure(name, value)}')
  return '\n'.join(lines).lstrip()


def trace_step(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    device: jax.Device | None = None,
) -> jax.stages.Traced:
  """Traces the training step without any data or parameters in memory.

  Args:
    config: of the job.
    mesh: of the job.
    device: a device of the kind that the step will be lowered for, which
      decides the kernel of the attention; None for those of the mesh.
  """
  config = config_lib.resolve(config)
  stage = stages.load(config)(config)
  components = stages.components_of(config, device or mesh.devices.flat[0])
  tx = optimizer.make_optimizer(config, tuple(components))
  step = step_lib.make_train_step(stage, components, tx, mesh)
  state = step_lib.abstract_state(components, tx)
  return step.trace(state, stage.abstract_batch())


def compile_step(
    config: config_lib.Config, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
  """Compiles what `trace_step` traces, for the devices of the mesh."""
  return trace_step(config, mesh).lower().compile()


def compiled(config: config_lib.Config) -> dict[str, float]:
  """What XLA says of the step on the devices that are here."""
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  step = compile_step(config, mesh)
  memory = step.memory_analysis()
  return {
      'devices': mesh.size,
      'step_tflop_of_a_device': step.cost_analysis()['flops'] / 1e12,
      'arguments_gb': memory.argument_size_in_bytes / _GB,
      'temporary_gb': memory.temp_size_in_bytes / _GB,
      'total_gb': (memory.argument_size_in_bytes + memory.temp_size_in_bytes)
      / _GB,
  }


def _work(stage: stages.Stage, setting: Setting) -> dict[str, float]:
  config, passes = stage.config, stage.passes()
  hardware = flops.hardware_flop(config, passes, stage.in_batch)
  work = {
      'step_tflop': flops.model_flop(config, passes) / 1e12,
      'step_tflop_with_recomputation': hardware / 1e12,
  }
  if stage.searches:
    work['search_tflop'] = flops.search_flop(config, setting.passages) / 1e12
    work['refresh_tflop'] = (
        flops.embed_flop(
            config.model, setting.passages, setting.mean_wordpieces
        )
        / 1e12
    )
  if config.objective == 'open_qa' and config.open_qa.rerank:
    rows = config.batch_size * config.open_qa.rerank
    work['rerank_tflop'] = (
        flops.embed_flop(config.model, rows, config.lengths.document) / 1e12
    )
  return work


def _time(
    config: config_lib.Config, setting: Setting, work: dict[str, float]
) -> dict[str, float]:
  chip, devices = setting.chip, setting.trainer_devices
  trained = chip.tflops * setting.utilization
  step = work['step_tflop_with_recomputation'] / (trained * devices)
  figures: dict[str, float] = {}
  builders, first = 0, 0.0
  embedding = chip.tflops * setting.builder_utilization
  # The trainer embeds as the builder does, without gradients.
  step += work.get('rerank_tflop', 0.0) / (embedding * devices)
  if 'refresh_tflop' in work:
    if _row_bytes(config).devices:
      # Every row is read once; the products are few.
      read = _row_bytes(config).devices * setting.passages / devices
      search = max(
          read / (chip.memory_gb_per_second * 1e9),
          work['search_tflop'] / (trained * devices),
      )
      figures['search_seconds'] = search
      step += search
    refresh = work['refresh_tflop'] / (
        embedding * max(setting.builder_devices, 1)
    )
    figures['refresh_seconds'] = refresh
    if config.refresh.policy == 'none':
      first = refresh  # And the only one: training waits for it.
    else:
      builders = setting.builder_devices
      interval = config.refresh.interval * step
      figures |= {
          'refresh_interval_seconds': interval,
          'lag_steps': refresh / step,
          'refresh_interval_steps': config.refresh.interval,
          'builder_devices_needed': math.ceil(
              work['refresh_tflop'] / embedding / interval
          ),
          'trainer_devices_per_builder_device': devices
          * interval
          * embedding
          / work['refresh_tflop'],
      }
      if not builders:  # They share; the training stands still meanwhile.
        step += refresh / config.refresh.interval
  seconds = step * config.steps + first
  figures = {
      'step_seconds': step,
      'examples_per_second': config.batch_size / step,
      **figures,
      'days': seconds / 86400,
      'chip_hours': seconds / 3600 * (devices + builders),
  }
  if setting.price:
    figures['cost'] = figures['chip_hours'] * setting.price
  return figures


def _device_memory(
    stage: stages.Stage, setting: Setting, parameters: dict[str, int]
) -> dict[str, float]:
  config = stage.config
  data, model = mesh_lib.axis_sizes(config.mesh, setting.trainer_devices)
  fused = setting.fused and not config_lib.attention_rate(config.model)
  figures = {
      f'{name}_gb': value / _GB
      for name, value in memory_lib.step_memory(
          config, parameters, stage.passes(), data, model, fused
      ).items()
  }
  table = _row_bytes(config).devices * setting.passages / (data * model)
  if stage.searches and table:
    # That in use, and the next one while it is loaded.
    figures['two_index_tables_gb'] = 2 * table / _GB
  figures['total_gb'] = sum(figures.values())
  figures['chip_gb'] = setting.chip.memory_gb
  return figures


def _builder_memory(
    config: config_lib.Config, setting: Setting, parameters: dict[str, int]
) -> dict[str, float]:
  rows = _BUILDER_TOKENS // config.lengths.document
  figures = {
      'weights_gb': 4 * parameters['embedder'] / _GB,
      'activations_gb': memory_lib.forward_memory(
          config.model, rows, config.lengths.document, setting.fused
      )
      / _GB,
  }
  figures['total_gb'] = sum(figures.values())
  return figures


def _host_memory(
    stage: stages.Stage, setting: Setting, parameters: dict[str, int]
) -> dict[str, float]:
  config = stage.config
  wordpieces = setting.passages * setting.mean_wordpieces
  total = sum(parameters.values())
  figures = {
      'checkpoint_being_saved_gb': memory_lib.STATE_BYTES * total / _GB,
      'mapped_wordpieces_gb': _TABLE_BYTES * wordpieces / _GB,
  }
  if stage.searches:
    figures['snapshot_gb'] = 4 * parameters['embedder'] / _GB
    index = _row_bytes(config).host * setting.passages
    if index:
      name = config.mips.backend.rpartition(':')[2].lower()
      figures[f'two_{name}_indexes_gb'] = 2 * index / _GB
  figures['total_gb'] = sum(figures.values())
  return figures


def _disk(
    stage: stages.Stage, setting: Setting, parameters: dict[str, int]
) -> dict[str, float]:
  config = stage.config
  corpus = setting.corpus_bytes
  if corpus is None:
    corpus = _CORPUS_BYTES * setting.passages * setting.mean_wordpieces
  saved = config.steps // config.checkpoint.interval + 1
  checkpoint = memory_lib.STATE_BYTES * sum(parameters.values()) / _GB
  figures = {
      'corpus_gb': corpus / _GB,
      'checkpoint_gb': checkpoint,
      'checkpoints_gb': checkpoint
      * min(saved, config.checkpoint.keep or saved),
  }
  if stage.searches:
    width = jnp.dtype(config.mips.dtype).itemsize
    row = config.model.embedding_width * width + _row_bytes(config).saved
    generation = row * setting.passages
    made = 1
    if config.refresh.policy != 'none':
      made += config.steps // config.refresh.interval
    # Those kept, and the one that is being built.
    kept = min(made, (config.refresh.keep or made) + 1)
    figures['generation_gb'] = generation / _GB
    figures['generations_gb'] = kept * generation / _GB
    figures['snapshots_gb'] = kept * 4 * parameters['embedder'] / _GB
  figures['total_gb'] = sum(
      value
      for name, value in figures.items()
      if name not in ('checkpoint_gb', 'generation_gb')
  )
  return figures


def _row_bytes(config: config_lib.Config) -> search_lib.RowBytes:
  backend = search_lib.backend(config.mips)
  return backend.row_bytes(config.mips, config.model.embedding_width)


def _advice(
    stage: stages.Stage, setting: Setting, result: Plan
) -> Iterable[str]:
  config = stage.config
  memory = result['device_memory']
  if memory['total_gb'] > 0.9 * memory['chip_gb']:
    yield (
        f'{memory["total_gb"]:.1f} GB do not fit a device of'
        f' {memory["chip_gb"]:g} GB, of which a tenth is for the compiler.'
        f'{_remedy(stage, setting, result["parameters"])}'
    )
  time = result['time']
  if 'lag_steps' in time:
    needed = time['builder_devices_needed']
    if 0 < setting.builder_devices < needed:
      yield (
          f'A refresh takes {time["lag_steps"]:.0f} steps, more than'
          f' refresh.interval={config.refresh.interval}: take {needed} builder'
          ' devices, or a longer interval.'
      )
  if config.model.compute_dtype == 'float32':
    yield (
        'config.model.compute_dtype is float32, the peak of the chip is of'
        ' bfloat16.'
    )


def _remedy(
    stage: stages.Stage, setting: Setting, parameters: dict[str, int]
) -> str:
  """Says with what remat and in how many parts a step would fit."""
  config = stage.config
  data, _ = mesh_lib.axis_sizes(config.mesh, setting.trainer_devices)
  rows = config.batch_size // data
  for parts in (n for n in range(1, rows + 1) if rows % n == 0):
    for remat in ('none', 'full'):
      other = dataclasses.replace(
          config,
          accumulate=parts,
          model=dataclasses.replace(config.model, remat=remat),
      )
      memory = _device_memory(type(stage)(other), setting, parameters)
      if memory['total_gb'] <= 0.9 * memory['chip_gb']:
        return (
            f' With config.accumulate={parts} and config.model.remat={remat} it'
            f' would be {memory["total_gb"]:.1f} GB.'
        )
  return ' Use more devices, or a smaller model.'


def _figure(name: str, value: float) -> str:
  if name.endswith('_gb'):
    return f'{value:,.2f} GB'
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'
