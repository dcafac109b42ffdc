"""The configuration of every job: one typed tree, its presets and its checks.

Public: `Config` and its sections, `PRESETS`, `COMPONENTS`, `resolve`,
`validate`, `to_dict`, `from_dict`, `read`, `identity`, `digest`, `differences`.
`experiments/*.py` build a `Config` and assign only what
differs from the defaults here; `--config.section.field=value` overrides both.
The defaults are the paper's (Guu et al. 2020, section 4 and appendix A).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import typing
from typing import Any, Literal

# Sizes of the published small BERTs (Turc et al. 2019) and of BERT-base:
# layers, width, heads. The MLP is four times as wide as the encoder.
PRESETS = {
    'tiny': (2, 128, 2),
    'mini': (4, 256, 4),
    'small': (4, 512, 8),
    'base': (12, 768, 12),
}

# Which parameters an objective trains; also the names of the sub-trees of a
# checkpoint's `params`.
COMPONENTS = {
    'mlm': ('reader',),
    'ict': ('embedder',),
    'realm': ('embedder', 'reader'),
    'open_qa': ('embedder', 'span_reader'),
}
# Objectives that search an index while they train.
SEARCHING = ('realm', 'open_qa')


@dataclasses.dataclass
class ModelConfig:
  """Architecture of the embedder and of the reader (two separate BERTs)."""

  preset: Literal['tiny', 'mini', 'small', 'base'] = 'base'
  num_layers: int = 0  # 0: the preset's.
  width: int = 0  # 0: the preset's.
  num_heads: int = 0  # 0: the preset's.
  mlp_width: int = 0  # 0: four times the width.
  vocab_size: int = 0  # 0: that of the corpus' tokenizer.
  max_positions: int = 512
  activation: Literal['gelu', 'gelu_new'] = 'gelu_new'  # erf or tanh form.
  layer_norm_eps: float = 1e-12
  dropout: float = 0.1
  # Of the attention weights; <0: as `dropout`. Fused kernels have none.
  attention_dropout: float = -1.0
  # xla: matmuls and softmax. cudnn, flash: fused kernels of NVIDIA GPUs and of
  # TPUs. auto: the fused one wherever it can run and nothing is dropped.
  attention: Literal['auto', 'xla', 'cudnn', 'flash'] = 'auto'
  # What the backward pass recomputes of each layer: nothing, all but the
  # matmuls with weights, or everything.
  remat: Literal['none', 'dots', 'full'] = 'none'
  init_stddev: float = 0.02
  embedding_width: int = 128  # E, of the retrieval embedding.
  # `shared`: one tower for queries and documents (as released). `shared_bert`:
  # one BERT, a projection each (as the paper writes it). `separate`: two.
  towers: Literal['shared', 'shared_bert', 'separate'] = 'shared'
  # Initial scale of the embedding's LayerNorm. At 1 (as released) the inner
  # product of two embeddings is up to E; E**-0.25 starts it at up to sqrt(E),
  # which learning from scratch needs: a softmax over +-128 has no gradient.
  embedding_scale_init: float = 1.0
  # The reader of open-domain questions (models/span_reader.py).
  span_width: int = 256  # Of the MLP that scores an answer span.
  max_span_width: int = 10  # Wordpieces of an answer, at most.
  span_norm_eps: float = 1e-3
  compute_dtype: Literal['float32', 'bfloat16'] = 'float32'


@dataclasses.dataclass
class LengthsConfig:
  """Static shapes, in wordpieces with [CLS] and [SEP]."""

  query: int = 96  # Q: [CLS] sentence [SEP].
  document: int = 288  # S: [CLS] title [SEP] body [SEP].
  masks: int = 10  # M: masked wordpieces per example, at most.

  @property
  def joint(self) -> int:
    """T: [CLS] sentence [SEP] body [SEP]."""
    return self.query + self.document


@dataclasses.dataclass
class MlmConfig:
  """Reader warm-up: stands in for a pretrained BERT where there is none."""

  # Share of the batches in which a sentence of the knowledge corpus sees its
  # own passage: the reader learns to look there. The other batches are of the
  # sentences that REALM will mask, with a passage at random or the null
  # document: it learns to read, and that most passages are of no use.
  own_passage_rate: float = 0.8


@dataclasses.dataclass
class IctConfig:
  """The inverse cloze task (Lee et al. 2019, section 4)."""

  remove_rate: float = 0.9  # How often the sentence is cut from its passage.
  # Questions with the passage that answers them, in the place of sentences:
  # files, comma-separated (Karpukhin et al. 2020, in-batch negatives).
  questions: str = ''


@dataclasses.dataclass
class OpenQaConfig:
  """Fine-tuning on questions (Lee et al. 2019, section 5.2)."""

  # Files of questions, comma-separated; see `realm-jax questions --help`.
  questions: str = ''
  retrieved: int = 5000  # Passages that the retriever's loss is taken over.
  read: int = 5  # The best of them, which the reader reads.
  title: bool = False  # Whether the reader sees a passage's title.
  # Over all spans of all passages read (as released), or p(z|x) p(y|z,x).
  normalization: Literal['global', 'passage'] = 'global'
  # frozen: the index is that of the initial retriever, and the question is
  # what learns (as published). trained: the passages that are read are embedded
  # anew and learn too; the index may be refreshed.
  documents: Literal['frozen', 'trained'] = 'frozen'
  # So many of the best are put in order anew by the current retriever before
  # the reader gets its share; 0: the order of the index.
  rerank: int = 0
  # Whether a batch of which no question has an answer is a step all the same,
  # of weight decay and of old momentum.
  update_unanswered: bool = False


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW with a linear warm-up and a linear decay."""

  learning_rate: float = 3e-5  # Peak.
  retriever_learning_rate: float = -1.0  # Of the embedder; <0: the same.
  retriever_delay: int = 0  # Steps in which the retriever does not learn yet.
  frozen: tuple[str, ...] = ()  # Components that never change: 'embedder', ...
  warmup_steps: int = -1  # <0: a tenth of the steps, at most 10,000.
  final_fraction: float = 0.0  # Learning rate at the end, of the peak.
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.01  # Not on biases and LayerNorms.
  clip_norm: float = 1.0  # Of the global gradient norm.


@dataclasses.dataclass
class RefreshConfig:
  """How the trainer and the index builder keep the index fresh."""

  # none: the index of step 0 for ever. sync: wait for each generation.
  # scheduled: adopt the generation of snapshot s exactly at step s + lag, and
  # wait only if the builder is late. eager: adopt as soon as it is ready.
  # adaptive: as scheduled, but take a snapshot only if the index is too stale.
  policy: Literal['none', 'sync', 'scheduled', 'eager', 'adaptive'] = (
      'scheduled'
  )
  interval: int = 500  # Steps between two snapshots of the retriever.
  lag: int = 500  # Steps from snapshot to adoption: `scheduled`, `adaptive`.
  # `adaptive`: a snapshot is taken when the share of the probe queries' top k
  # that is still right falls below.
  overlap_bound: float = 0.8
  # A builder that ended so often in a row, with nothing published in between,
  # ends the training that supervises it; 0: it is started again for ever.
  max_builder_failures: int = 3
  timeout: float = 3600.0  # Seconds to wait for a generation before giving up.
  keep: int = 3  # Newest snapshots and generations kept; 0: all of them.


@dataclasses.dataclass
class MipsConfig:
  """Maximum inner product search over the document embeddings."""

  backend: Literal['exact', 'approx', 'scann'] = 'exact'
  dtype: Literal['float32', 'bfloat16'] = 'float32'  # Of the embedding table.
  recall_target: float = 0.95  # Of `approx`.
  # ScaNN; 0: chosen from the number of rows (see index/mips.py).
  num_leaves: int = 0
  leaves_to_search: int = 0
  reorder: int = 0


@dataclasses.dataclass
class MeshConfig:
  """Devices; one of the two sizes may be -1: all that remain."""

  data: int = -1  # The batch is divided over it.
  model: int = 1  # Heads, MLP and vocabulary are.
  zero: bool = False  # Parameters and optimizer state divided over data, too.


@dataclasses.dataclass
class CheckpointConfig:
  interval: int = 1000  # Steps; the last step is always saved.
  keep: int = 3  # Newest checkpoints kept; 0: all of them.


@dataclasses.dataclass
class Config:
  """One training job. Index building and evaluation read it back."""

  objective: Literal['mlm', 'ict', 'realm', 'open_qa'] = 'realm'
  corpus: str = ''  # Folder written by `realm-jax prepare`.
  # Workdirs to start from, comma-separated; each gives the components it has
  # (`mlm` a reader, `ict` an embedder, `realm` both), later ones win.
  init_from: str = ''
  seed: int = 0
  steps: int = 200_000
  batch_size: int = 512  # Of all devices together.
  # In how many parts, one after the other, a step computes its batch: memory
  # for time. `ict` then embeds twice, as each example needs all the others.
  accumulate: int = 1
  num_candidates: int = 8  # K; counts the null document.
  # Which sentences to mask: `pretraining` (the corpus X of the paper),
  # `knowledge` (the sentences of the passages), `auto` (X if there is one).
  sentences: Literal['auto', 'pretraining', 'knowledge'] = 'auto'
  masking: Literal['salient', 'random_span', 'random_token'] = 'salient'
  # Candidates that give the answer away: the passage that the sentence is
  # from, its whole article, or none removed (an ablation).
  trivial: Literal['passage', 'article', 'none'] = 'passage'
  # span: sum_z p(z|x) prod_j p(y_j|z,x), the paper. token: per masked
  # wordpiece, the released code.
  granularity: Literal['span', 'token'] = 'span'
  log_interval: int = 10  # Steps between two lines of metrics.jsonl.
  tensorboard: bool = False  # Needs the extra [tensorboard].
  # TFLOP/s of one device at best, for the metric time/mfu; 0: unknown.
  peak_tflops: float = 0.0
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  lengths: LengthsConfig = dataclasses.field(default_factory=LengthsConfig)
  mlm: MlmConfig = dataclasses.field(default_factory=MlmConfig)
  ict: IctConfig = dataclasses.field(default_factory=IctConfig)
  open_qa: OpenQaConfig = dataclasses.field(default_factory=OpenQaConfig)
  optimizer: OptimizerConfig = dataclasses.field(
      default_factory=OptimizerConfig
  )
  refresh: RefreshConfig = dataclasses.field(default_factory=RefreshConfig)
  mips: MipsConfig = dataclasses.field(default_factory=MipsConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  checkpoint: CheckpointConfig = dataclasses.field(
      default_factory=CheckpointConfig
  )


def resolve(config: Config) -> Config:
  """Returns a copy in which every 'the preset's' and 'default' is filled in."""
  config = from_dict(to_dict(config))
  model = config.model
  if model.preset in PRESETS:
    layers, width, heads = PRESETS[model.preset]
    model.num_layers = model.num_layers or layers
    model.width = model.width or width
    model.num_heads = model.num_heads or heads
    model.mlp_width = model.mlp_width or 4 * model.width
  if config.optimizer.retriever_learning_rate < 0:
    config.optimizer.retriever_learning_rate = config.optimizer.learning_rate
  if config.optimizer.warmup_steps < 0:
    config.optimizer.warmup_steps = min(10_000, config.steps // 10)
  return config


def attention_rate(model: ModelConfig) -> float:
  """The rate at which attention weights are dropped."""
  rate = model.attention_dropout
  return model.dropout if rate < 0 else rate


def validate(config: Config) -> None:
  """Raises ValueError naming every field that is wrong, and what is right."""
  problems = _type_problems(config)
  if problems:  # The checks below assume the types.
    raise ValueError('The config is wrong:\n  ' + '\n  '.join(problems))

  def require(ok: bool, field: str, what: str) -> None:
    if not ok:
      problems.append(f'config.{field}={_at(config, field)!r}: {what}')

  c = config
  require(bool(c.corpus), 'corpus', 'give the folder that `prepare` wrote')
  for field in (
      'steps batch_size accumulate log_interval checkpoint.interval'
      ' refresh.interval model.embedding_width lengths.masks'
      ' open_qa.retrieved open_qa.read'
  ).split():
    require(_at(c, field) >= 1, field, 'must be at least 1')
  require(
      c.num_candidates >= 2,
      'num_candidates',
      'counts the null document, so it must be at least 2',
  )
  require(0 <= c.seed < 2**31, 'seed', 'must be between 0 and 2**31 - 1')
  require(c.lengths.query >= 4, 'lengths.query', 'must be at least 4')
  require(c.lengths.document >= 8, 'lengths.document', 'must be at least 8')
  model = resolve(config).model
  if c.objective == 'ict':
    longest = max(c.lengths.query, c.lengths.document)
  else:
    longest = c.lengths.joint
  require(
      longest <= c.model.max_positions,
      'model.max_positions',
      f'is less than the longest input, {longest} wordpieces',
  )
  require(
      model.width % model.num_heads == 0,
      'model.num_heads',
      f'must divide the width, {model.width}',
  )
  require(
      c.refresh.max_builder_failures >= 0,
      'refresh.max_builder_failures',
      'must not be negative; 0 is without a limit',
  )
  for field in (
      'mlm.own_passage_rate ict.remove_rate model.dropout refresh.overlap_bound'
  ).split():
    require(0 <= _at(c, field) <= 1, field, 'must be between 0 and 1')
  require(
      c.model.attention_dropout <= 1,
      'model.attention_dropout',
      'must be at most 1; below 0 stands for that of `dropout`',
  )
  require(
      c.model.attention in ('auto', 'xla') or not attention_rate(model),
      'model.attention',
      'a fused kernel drops no attention weights; set'
      f' config.model.attention_dropout=0, not {attention_rate(model)}',
  )
  require(
      c.accumulate < 1 or c.batch_size % c.accumulate == 0,
      'accumulate',
      f'must divide the batch size, {c.batch_size}',
  )
  require(
      c.optimizer.learning_rate >= 0,
      'optimizer.learning_rate',
      'must not be negative',
  )
  if c.objective == 'open_qa':
    require(
        bool(c.open_qa.questions),
        'open_qa.questions',
        'give the file of the questions to train on',
    )
    for field in ('open_qa.read', 'open_qa.rerank'):
      require(
          0 <= _at(c, field) <= c.open_qa.retrieved,
          field,
          f'must be between 0 and open_qa.retrieved ({c.open_qa.retrieved})',
      )
    require(
        c.open_qa.documents == 'trained' or c.refresh.policy == 'none',
        'refresh.policy',
        "must be 'none' where open_qa.documents is 'frozen'",
    )
  for name in c.optimizer.frozen:
    require(
        name in COMPONENTS[c.objective],
        'optimizer.frozen',
        f'the objective {c.objective!r} has the components '
        f'{COMPONENTS[c.objective]}',
    )
  require(
      1 <= c.refresh.lag <= c.refresh.interval
      or c.refresh.policy not in ('scheduled', 'adaptive'),
      'refresh.lag',
      'must be between 1 and refresh.interval'
      f' ({c.refresh.interval}), so that one generation is built at a time',
  )
  require(
      sum(size == -1 for size in (c.mesh.data, c.mesh.model)) <= 1
      and all(s == -1 or s >= 1 for s in (c.mesh.data, c.mesh.model)),
      'mesh',
      'sizes are positive; at most one may be -1',
  )
  if problems:
    raise ValueError('The config is wrong:\n  ' + '\n  '.join(problems))


def to_dict(config: Any) -> dict[str, Any]:
  """Returns the config tree as plain dictionaries, for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
  """Inverse of `to_dict`; raises ValueError on an unknown field."""
  return _from_dict(Config, values, 'config')


def read(workdir: pathlib.Path | str) -> Config:
  """Reads the resolved config of a workdir.

  Raises:
    FileNotFoundError: if the folder is no workdir.
    ValueError: if its config.json is damaged or of another version.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise FileNotFoundError(
        f'{workdir} is not a workdir: it has no config.json. `realm-jax train'
        f' --workdir={workdir}` makes one.'
    )
  try:
    return from_dict(json.loads(path.read_text(encoding='utf-8')))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def identity(config: Config) -> dict[str, Any]:
  """What determines the result of a run, as {'section.field': value}.

  Left out is what may differ between two runs of one result: where corpus and
  questions lie (their digests are checked instead), how often to log and to
  save, how long to wait, over how many devices and in how many parts to do the
  work, and by which kernels: that changes no more than the rounding. `steps` is
  part of it, since the learning rate depends on it.
  """
  values = to_dict(resolve(config))
  for name in (
      'corpus init_from log_interval tensorboard peak_tflops mesh accumulate'
      ' checkpoint'
  ).split():
    del values[name]
  for name in ('attention', 'remat'):
    del values['model'][name]
  values['model']['attention_dropout'] = attention_rate(config.model)
  for name in ('timeout', 'keep', 'max_builder_failures'):
    del values['refresh'][name]
  for section in ('ict', 'open_qa'):
    # Not which they are, but whether there are any.
    values[section]['questions'] = bool(values[section]['questions'])
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat.update({f'{name}.{field}': v for field, v in value.items()})
    else:
      flat[name] = value
  return flat


def digest(config: Config) -> str:
  """SHA-256 of the config's identity."""
  text = json.dumps(identity(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def differences(ours: Config, theirs: Config) -> list[str]:
  """Lists the fields in which the identities differ, with both values."""
  now, then = identity(ours), identity(theirs)
  return [
      f'config.{name}: {then[name]!r} there, {now[name]!r} here'
      for name in now
      if now[name] != then[name]
  ]


def _from_dict(cls: type, values: Any, path: str) -> Any:
  if not isinstance(values, dict):
    raise ValueError(f'{path} must be an object of fields, not {values!r}.')
  fields = {field.name: field for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - set(fields))
  if unknown:
    raise ValueError(
        f'{path} has no field {", ".join(unknown)}; it has '
        f'{", ".join(sorted(fields))}.'
    )
  types = typing.get_type_hints(cls)
  made = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(types[name]):
      value = _from_dict(types[name], value, f'{path}.{name}')
    elif typing.get_origin(types[name]) is tuple and isinstance(value, list):
      value = tuple(value)  # JSON knows no tuples.
    made[name] = value
  return cls(**made)


def _at(config: Config, field: str) -> Any:
  return functools.reduce(getattr, field.split('.'), config)


def _type_problems(config: Any, path: str = 'config') -> list[str]:
  problems = []
  types = typing.get_type_hints(type(config))
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), types[field.name]
    name = f'{path}.{field.name}'
    if dataclasses.is_dataclass(kind):
      problems += _type_problems(value, name)
    elif typing.get_origin(kind) is Literal:
      if value not in typing.get_args(kind):
        problems.append(
            f'{name}={value!r}: must be one of {typing.get_args(kind)}'
        )
    elif typing.get_origin(kind) is tuple:
      if not isinstance(value, tuple) or not all(
          isinstance(v, str) for v in value
      ):
        problems.append(f'{name}={value!r}: must be a tuple of strings')
    elif kind is float:
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.append(f'{name}={value!r}: must be a number')
    elif isinstance(value, bool) != (kind is bool) or not isinstance(
        value, kind
    ):
      problems.append(f'{name}={value!r}: must be of type {kind.__name__}')
  return problems
