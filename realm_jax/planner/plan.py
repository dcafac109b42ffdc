"""Estimates of what a job needs and how long it takes, before it starts.

A plan is JSON: {section: {name: figure}}. The formulas of FLOP are in
models/flops.py.
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
from realm_jax.corpus import inputs
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.models import flops
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import stages
from realm_jax.trainer import step as step_lib

Figures = dict[str, Any]
Plan = dict[str, Figures]

# Bytes of a corpus per wordpiece of its passages, if it has no pretraining text
# of its own: token table 2, passages 4, sentences and their tables 9 (19,705
# passages of English Wikipedia: 14.9). Training maps the token table.
_CORPUS_BYTES, _TOKEN_BYTES = 15.0, 2.0
_BUILDER_TOKENS = 2**16  # Batch of a device; see index/embedding.py.


@dataclasses.dataclass(frozen=True)
class Chip:
  """The vendor's peak figures; TFLOP/s of dense bfloat16 matrix products."""

  tflops: float
  memory_gb: float
  memory_gb_per_second: float


# NVIDIA: data sheets of the SXM module (if one exists), without sparsity.
# Google: cloud.google.com/tpu/docs, 'System architecture', per chip.
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
  """The corpus, hardware and assumptions of a plan."""

  passages: int
  mean_wordpieces: float  # Mean of a passage, with title and specials.
  chip: Chip
  corpus_bytes: float | None = None  # Size of its folder; None: estimated.
  trainer_devices: int = 1
  builder_devices: int = 1  # 0: the trainer stops while its devices embed.
  utilization: float = 0.4  # Share of the peak that a training step reaches.
  builder_utilization: float = 0.5  # Share of the peak that embedding reaches.
  price: float = 0.0  # Price of a chip-hour; 0: the plan has no cost.
  # Whether the device has a fused attention kernel (GPU and TPU in bfloat16),
  # which is used if no attention weights are dropped.
  fused: bool = True


def of_corpus(
    config: config_lib.Config,
    passages: int | None = None,
    mean_wordpieces: float | None = None,
) -> tuple[config_lib.Config, int, float, float | None]:
  """Fills in arguments that are None from the config's corpus, if it has one.

  Returns:
    The resolved config with the vocabulary's size, the number of passages,
    their mean wordpieces, and the bytes of the corpus' folder (None: unknown).

  Raises:
    ValueError: no corpus and no number of passages.
    FileNotFoundError: no corpus at config.corpus.
  """
  config = config_lib.resolve(config)
  model, size = config.model, None
  if config.corpus:
    corpus = corpus_lib.Corpus.open(config.corpus)
    model.vocab_size = 0
    corpus.tokenizer.complete(model)
    template = inputs.Template.of(model, config.lengths, corpus.tokenizer)
    lengths = template.lengths(corpus.passages)
    lengths = np.minimum(lengths, config.lengths.document)
    if passages is None:  # Otherwise it stands for a larger, similar corpus.
      passages = len(lengths)
      found = corpus.directory.rglob('*')
      size = sum(path.stat().st_size for path in found if path.is_file())
    if mean_wordpieces is None:
      mean_wordpieces = float(lengths.mean())
  if passages is None:
    raise ValueError(
        'The size of the corpus is unknown: give --config.corpus=FOLDER, or'
        ' --passages=N.'
    )
  if mean_wordpieces is None:
    mean_wordpieces = float(config.lengths.document)
  return config, passages, mean_wordpieces, size


def plan(config: config_lib.Config, setting: Setting) -> Plan:
  """Estimates a job of a config with a known vocabulary size.

  Returns:
    Sections `parameters`, `work`, `time`, `device_memory`, `builder_memory`,
    `host_memory`, `disk` and `advice`: what does not fit, and the cure.

  Raises:
    ValueError: devices that do not fit the mesh or the batch, or an unknown
      vocabulary size.
  """
  config = config_lib.resolve(config)
  if config.model.vocab_size < 1:
    raise ValueError(
        'config.model.vocab_size=0 takes it from the corpus, and none is given;'
        ' set it, for example --config.model.vocab_size=30522.'
    )
  stage = stages.load(config)(config)
  components = stages.components_of(config)
  sizes = {name: component.size for name, component in components.items()}
  parameters = {name: one.abstract for name, one in components.items()}
  _, frozen = components_lib.partition(config, parameters)
  count = sum(math.prod(array.shape) for array in jax.tree.leaves(frozen))
  return _Estimate(stage, setting, sizes, count).plan()


def as_text(result: Plan) -> str:
  """Formats a plan for reading."""
  lines = []
  for section, figures in result.items():
    lines += ['', section.replace('_', ' ')]
    for name, value in figures.items():
      if isinstance(value, str):
        lines.append(f'  - {value}')
        continue
      label = name.removesuffix('_gb').replace('_', ' ')
      if label != name.replace('_', ' '):
        figure = f'{value:,.2f} GB'
      elif isinstance(value, int):
        figure = f'{value:,}'
      else:
        figure = f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'
      lines.append(f'  {label:36}{figure}')
  return '\n'.join(lines).lstrip()


def trace_step(
    config: config_lib.Config,
    mesh: jax.sharding.Mesh,
    device: jax.Device | None = None,
) -> jax.stages.Traced:
  """Traces the training step of a job from abstract arrays.

  The kind of `device`, by default that of the mesh, decides the attention
  kernel.
  """
  config = config_lib.resolve(config)
  stage = stages.load(config)(config)
  components = stages.components_of(config, device or mesh.devices.flat[0])
  tx = optimizer.make_optimizer(config, tuple(components))
  step = step_lib.make_train_step(stage, components, tx, mesh)
  state = step_lib.abstract_state(components, tx)
  rates = optimizer.learning_rates(config, components, 0)
  return step.trace(state, stage.abstract_batch(), rates)


def compiled(config: config_lib.Config) -> Figures:
  """Returns XLA's figures of the step, compiled for the local devices."""
  mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
  step = trace_step(config, mesh).lower().compile()
  memory = step.memory_analysis()
  return {
      'devices': mesh.size,
      'step_tflop_of_a_device': step.cost_analysis()['flops'] / 1e12,
      **_gigabytes({
          'arguments': memory.argument_size_in_bytes,
          'temporary': memory.temp_size_in_bytes,
      }),
  }


@dataclasses.dataclass(frozen=True)
class _Estimate:
  """The estimates of one plan; memory and disk in GB."""

  stage: stages.Stage
  setting: Setting
  sizes: dict[str, int]  # Number of parameters of each component.
  frozen: int  # Number of parameters that never change.

  @property
  def config(self) -> config_lib.Config:
    return self.stage.config

  @property
  def row_bytes(self) -> search_lib.RowBytes:
    mips, width = self.config.mips, self.config.model.embedding_width
    return search_lib.backend(mips).row_bytes(mips, width)

  @property
  def axis_sizes(self) -> tuple[int, int]:
    """Returns the mesh's sizes; raises ValueError if the devices do not fit."""
    return mesh_lib.axis_sizes(
        self.config.mesh, self.setting.trainer_devices, self.config.batch_size
    )

  def plan(self) -> Plan:
    work, memory = self.work(), self.device_memory()
    time = self.time(work)
    result: Plan = {
        'parameters': {**self.sizes, 'total': sum(self.sizes.values())},
        'work': work,
        'time': time,
        'device_memory': memory,
        'host_memory': self.host_memory(),
        'disk': self.disk(),
    }
    if self.stage.searches:
      result['builder_memory'] = self.builder_memory()
    advice = enumerate(self.advice(memory, time), start=1)
    return result | {'advice': {str(i): line for i, line in advice}}

  def work(self) -> Figures:
    config, passes = self.config, self.stage.passes()
    recomputed = flops.hardware_flop(config, passes, self.stage.in_batch)
    flop = {
        'step_tflop': flops.model_flop(config, passes),
        'step_tflop_with_recomputation': recomputed,
    }
    if self.stage.searches:
      passages, length = self.setting.passages, self.setting.mean_wordpieces
      flop['search_tflop'] = flops.search_flop(config, passages)
      flop['refresh_tflop'] = flops.embed_flop(config.model, passages, length)
    if config.objective == 'open_qa' and config.open_qa.rerank:
      rows = config.batch_size * config.open_qa.rerank
      flop['rerank_tflop'] = flops.embed_flop(
          config.model, rows, config.lengths.document
      )
    return {name: value / 1e12 for name, value in flop.items()}

  def time(self, work: Figures) -> Figures:
    chip, devices = self.setting.chip, self.setting.trainer_devices
    builders, refresh_config = self.setting.builder_devices, self.config.refresh
    training = chip.tflops * self.setting.utilization * devices  # TFLOP/s.
    embedding = chip.tflops * self.setting.builder_utilization  # One device.
    step = work['step_tflop_with_recomputation'] / training
    # The trainer embeds like the builder, without gradients.
    step += work.get('rerank_tflop', 0.0) / (embedding * devices)
    figures: Figures = {}
    first = 0.0
    if not self.stage.searches:
      builders = 0
    else:
      table = self.row_bytes.devices * self.setting.passages
      if table:
        # Either reading the table once or the products take longer.
        read = table / devices
        figures['search_seconds'] = max(
            read / (chip.memory_gb_per_second * 1e9),
            work['search_tflop'] / training,
        )
        step += figures['search_seconds']
      tflop = work['refresh_tflop']
      refresh = tflop / (embedding * max(builders, 1))
      figures['refresh_seconds'] = refresh
      if refresh_config.policy == 'none':
        builders, first = 0, refresh  # Training waits for the only index.
      else:
        seconds = refresh_config.interval * step
        figures |= {
            'refresh_interval_seconds': seconds,
            'lag_steps': refresh / step,
            'refresh_interval_steps': refresh_config.interval,
            'builder_devices_needed': math.ceil(tflop / embedding / seconds),
            'trainer_devices_per_builder_device':
                devices * seconds * embedding / tflop,
        }
        if not builders:  # Training stops during a refresh.
          step += refresh / refresh_config.interval
    seconds = step * self.config.steps + first
    figures = {
        'step_seconds': step,
        'examples_per_second': self.config.batch_size / step,
        **figures,
        'days': seconds / 86400,
        'chip_hours': seconds / 3600 * (devices + builders),
    }
    if self.setting.price:
      figures['cost'] = figures['chip_hours'] * self.setting.price
    return figures

  def device_memory(self) -> Figures:
    data, model = self.axis_sizes
    rate = config_lib.attention_rate(self.config.model)
    fused = self.setting.fused and not rate
    used = flops.step_memory(
        self.config, self.sizes, self.frozen, self.stage.passes(), data, model,
        fused,
    )
    table = self.row_bytes.devices * self.setting.passages / (data * model)
    if self.stage.searches and table:
      # The one in use, and the next one during its loading.
      used['two_index_tables'] = 2 * table
    return _gigabytes(used) | {'chip_gb': self.setting.chip.memory_gb}

  def builder_memory(self) -> Figures:
    length = self.config.lengths.document
    activations = flops.forward_memory(
        self.config.model, _BUILDER_TOKENS // length, length, self.setting.fused
    )
    weights = 4 * self.sizes['embedder']
    return _gigabytes({'weights': weights, 'activations': activations})

  def host_memory(self) -> Figures:
    wordpieces = self.setting.passages * self.setting.mean_wordpieces
    parameters = sum(self.sizes.values())
    used = {
        'checkpoint_being_saved': flops.STATE_BYTES * parameters,
        'mapped_wordpieces': _TOKEN_BYTES * wordpieces,
    }
    if self.stage.searches:
      used['snapshot'] = 4 * self.sizes['embedder']
      index = self.row_bytes.host * self.setting.passages
      if index:
        name = self.config.mips.backend.rpartition(':')[2].lower()
        used[f'two_{name}_indexes'] = 2 * index
    return _gigabytes(used)

  def disk(self) -> Figures:
    config, corpus = self.config, self.setting.corpus_bytes
    if corpus is None:
      wordpieces = self.setting.passages * self.setting.mean_wordpieces
      corpus = _CORPUS_BYTES * wordpieces
    saved = config.steps // config.checkpoint.interval + 1
    checkpoint = flops.STATE_BYTES * sum(self.sizes.values())
    used = {
        'corpus': corpus,
        'checkpoint': checkpoint,
        'checkpoints': checkpoint * min(saved, config.checkpoint.keep or saved),
    }
    if self.stage.searches:
      width = jnp.dtype(config.mips.dtype).itemsize
      row = config.model.embedding_width * width + self.row_bytes.saved
      generation = row * self.setting.passages
      built = 1
      if config.refresh.policy != 'none':
        built += config.steps // config.refresh.interval
      # Those kept, and the one under construction.
      kept = min(built, (config.refresh.keep or built) + 1)
      used['generation'] = generation
      used['generations'] = kept * generation
      used['snapshots'] = kept * 4 * self.sizes['embedder']
    return _gigabytes(used, not_in_total=('checkpoint', 'generation'))

  def advice(self, memory: Figures, time: Figures) -> Iterable[str]:
    if not _fits(memory):
      yield (
          f'{memory["total_gb"]:.1f} GB do not fit a device of'
          f' {memory["chip_gb"]:g} GB, of which a tenth is for the compiler.'
          f' {self.remedy()}'
      )
    needed = time.get('builder_devices_needed', 0)
    if 0 < self.setting.builder_devices < needed:
      yield (
          f'A refresh takes {time["lag_steps"]:.0f} steps, more than'
          f' refresh.interval={self.config.refresh.interval}: take {needed}'
          ' builder devices, or a longer interval.'
      )
    if self.config.model.compute_dtype == 'float32':
      yield (
          'config.model.compute_dtype is float32, the peak of the chip is of'
          ' bfloat16.'
      )

  def remedy(self) -> str:
    """Returns the fewest parts, and the remat, with which a step fits."""
    rows = self.config.batch_size // self.axis_sizes[0]
    for parts in (n for n in range(1, rows + 1) if rows % n == 0):
      for remat in ('none', 'full'):
        model = dataclasses.replace(self.config.model, remat=remat)
        config = dataclasses.replace(self.config, accumulate=parts, model=model)
        stage = type(self.stage)(config)
        memory = dataclasses.replace(self, stage=stage).device_memory()
        if _fits(memory):
          return (
              f'With config.accumulate={parts} and config.model.remat={remat}'
              f' it would be {memory["total_gb"]:.1f} GB.'
          )
    return 'Use more devices, or a smaller model.'


def _gigabytes(
    used: dict[str, float], not_in_total: tuple[str, ...] = ()
) -> Figures:
  """Returns figures in GB with their total, from bytes."""
  figures = {f'{name}_gb': value / 1e9 for name, value in used.items()}
  figures['total_gb'] = sum(
      figures[f'{name}_gb'] for name in used if name not in not_in_total
  )
  return figures


def _fits(memory: Figures) -> bool:
  return memory['total_gb'] <= 0.9 * memory['chip_gb']
