"""Reads, checks and compares configurations.

Two configs of the same identity give the same result.
"""

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import functools
import hashlib
import json
import pathlib
import typing
from typing import Any, Literal

from realm_jax import config as config_lib

# The least value of each field; 0 means none, a derived default, or no limit.
_LEAST = {
    0: (
        'model.num_layers model.width model.num_heads model.mlp_width'
        ' model.vocab_size model.pad_id model.init_stddev'
        ' model.projection_norm_eps model.span_norm_eps optimizer.learning_rate'
        ' optimizer.retriever_delay optimizer.final_fraction optimizer.eps'
        ' optimizer.weight_decay refresh.timeout refresh.keep'
        ' refresh.max_builder_failures checkpoint.keep mips.num_leaves'
        ' mips.leaves_to_search mips.reorder peak_tflops gates.interval'
    ),
    1: (
        'steps batch_size accumulate log_interval checkpoint.interval'
        ' refresh.interval model.embedding_width model.span_width'
        ' model.max_span_width lengths.masks open_qa.retrieved open_qa.read'
        ' gates.sentences'
    ),
    4: 'lengths.query',
    8: 'lengths.document',
}
_SHARES = (
    'mlm.own_passage_rate mlm.null_rate ict.remove_rate model.dropout'
    ' refresh.overlap_bound optimizer.b1 optimizer.b2 mips.recall_target'
).split()

LOG_TO = ('jsonl', 'tensorboard', 'wandb', 'mlflow')

# Fields of the config.json of transformers, which a workdir's lacks.
_FOREIGN = {'architectures', 'model_type', 'hidden_size'}
# Fields that name files of training data.
_INPUT_FILES = (
    ('ict', 'questions'), ('open_qa', 'questions'), ('tagger', 'files')
)
# Fields of the retrieval head. Configs of older versions lack them, so the
# identity has only those that differ from the defaults.
HEAD_FIELDS = (
    'pooling projection projection_norm_eps normalize score_scale'
    ' learn_score_scale query_prefix document_prefix titles title_separator'
).split()

Problems = Iterable[tuple[str, str]]  # Fields, and why their values are wrong.


def to_dict(config: Any) -> dict[str, Any]:
  """Returns the config tree as plain dictionaries, for JSON."""
  return dataclasses.asdict(config)


def from_dict(
    values: Any, cls: type = config_lib.Config, path: str = 'config'
) -> Any:
  """Inverse of `to_dict`; raises ValueError on an unknown field."""
  if not isinstance(values, dict):
    raise ValueError(f'{path} must be an object of fields, not {values!r}.')
  types = typing.get_type_hints(cls)
  unknown = sorted(set(values) - set(types))
  if unknown:
    raise ValueError(
        f'{path} has no field {", ".join(unknown)}; it has'
        f' {", ".join(sorted(types))}.'
    )
  made = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(types[name]):
      value = from_dict(value, types[name], f'{path}.{name}')
    elif typing.get_origin(types[name]) is tuple and isinstance(value, list):
      value = tuple(value)  # JSON has no tuples.
    made[name] = value
  return cls(**made)


def read(workdir: pathlib.Path | str) -> config_lib.Config:
  """Reads the resolved config of a workdir.

  Raises:
    FileNotFoundError: the folder is no workdir.
    ValueError: its config.json is damaged, of another version, or that of a
      checkpoint of transformers.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
        f'{workdir} is not a workdir: it has no config.json. `realm-jax train'
        f' --config=FILE.py --workdir={workdir}` makes one, or `realm-jax'
        ' import` from a checkpoint of BERT or REALM.'
    )
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    if isinstance(values, dict) and _FOREIGN & values.keys():
      raise ValueError(
          'a checkpoint of transformers, not a workdir: `realm-jax import'
          f' --source={workdir} --workdir=NEW` it first, and give NEW.'
      )
    config = from_dict(values)
    problems = type_problems(config)
    if problems:
      raise ValueError('; '.join(problems))
    return config
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path}: {error}') from error


def validate(
    config: config_lib.Config, more: Callable[[], Problems] = lambda: ()
) -> None:
  """Raises ValueError that names every wrong field and its valid values.

  `more` returns further problems; it is called once types are right and numbers
  in range.
  """
  if not isinstance(config, config_lib.Config):
    raise ValueError(
        'An experiment file returns a realm_jax.config.Config; this one returns'
        f' {type(config).__name__}: {str(config)[:80]}'
    )

  def lines(problems: Problems) -> list[str]:
    return [f'config.{f}={_at(config, f)!r}: {why}' for f, why in problems]

  # Each check relies on those before it.
  for check in (
      lambda: type_problems(config),
      lambda: lines(_ranges(config)),
      lambda: lines(_relations(config)) + lines(more()),
  ):
    problems = check()
    if problems:
      raise ValueError('The config is wrong:\n  ' + '\n  '.join(problems))


def _ranges(c: config_lib.Config) -> Problems:
  if not c.corpus:
    yield 'corpus', 'give the folder that `prepare` wrote'
  for name in filter(None, map(str.strip, c.log_to.split(','))):
    if name not in LOG_TO:
      yield 'log_to', f'{name!r} is none of {", ".join(LOG_TO)}'
  if c.mips.backend not in config_lib.BACKENDS and ':' not in c.mips.backend:
    yield 'mips.backend', (
        f'must be one of {tuple(config_lib.BACKENDS)} or have the form'
        ' package.module:Name'
    )
  if c.mips.kernel == 'pallas' and c.mips.dtype != 'bfloat16':
    yield 'mips.kernel', (
        f"'pallas' needs mips.dtype=bfloat16, not {c.mips.dtype}"
    )
  for least, fields in _LEAST.items():
    for field in fields.split():
      if not _at(c, field) >= least:
        why = f'must be at least {least}' if least else 'must not be negative'
        yield field, why
  if c.num_candidates < 2:
    yield 'num_candidates', 'counts the null document, so it must be at least 2'
  if not 0 <= c.seed < 2**31:
    yield 'seed', 'must be between 0 and 2**31 - 1'
  if c.lengths.masks > c.lengths.query - 2:
    yield 'lengths.masks', (
        f'is more than a query of {c.lengths.query} wordpieces can have, with'
        ' [CLS] and [SEP]'
    )


def _relations(c: config_lib.Config) -> Problems:
  model = config_lib.resolve(c).model
  if model.width % model.num_heads:
    yield 'model.num_heads', f'must divide the width, {model.width}'
  none, usual = model.projection == 'none', config_lib.ModelConfig()
  widths = (usual.embedding_width, model.width)
  if none and c.model.embedding_width not in widths:
    yield 'model.embedding_width', (
        f'without a projection, it is the width of the encoder, {model.width}'
    )
  if none and model.towers == 'shared_bert':
    yield 'model.towers', (
        "are one BERT with two projections, but model.projection is 'none'"
    )
  if not model.score_scale > 0:
    yield 'model.score_scale', 'must be more than 0'
  for field in _SHARES:
    if not 0 <= _at(c, field) <= 1:
      yield field, 'must be between 0 and 1'
  if not c.model.attention_dropout <= 1:
    yield 'model.attention_dropout', (
        'must be at most 1; below 0 stands for that of `dropout`'
    )
  rate = config_lib.attention_rate(model)
  if c.model.attention not in ('auto', 'xla') and rate:
    yield 'model.attention', (
        'a fused kernel drops no attention weights; set'
        f' config.model.attention_dropout=0, not {rate}'
    )
  if c.batch_size % c.accumulate:
    yield 'accumulate', f'must divide the batch size, {c.batch_size}'
  if not c.optimizer.clip_norm > 0:
    yield 'optimizer.clip_norm', 'must be more than 0'
  lag, interval = c.refresh.lag, c.refresh.interval
  delayed = c.refresh.policy in ('scheduled', 'adaptive')
  if delayed and not 1 <= lag <= interval:
    yield 'refresh.lag', (
        f'must be between 1 and refresh.interval ({interval}), so that one'
        ' generation is built at a time'
    )
  sizes = (c.mesh.data, c.mesh.model)
  if sizes == (-1, -1) or any(s != -1 and s < 1 for s in sizes):
    yield 'mesh', 'sizes are positive; at most one may be -1'


def _at(config: config_lib.Config, field: str) -> Any:
  return functools.reduce(getattr, field.split('.'), config)


def type_problems(config: Any, path: str = 'config') -> list[str]:
  """Returns a line for each field of a wrong type or an unknown name."""
  problems = []
  types = typing.get_type_hints(type(config))
  # A dataclass instance accepts any attribute, also a misspelt one.
  for unknown in sorted(vars(config).keys() - types.keys()):
    close = difflib.get_close_matches(unknown, types, 1)
    hint = f'; did you mean {path}.{close[0]}?' if close else ''
    problems.append(f'{path}.{unknown}: no such field{hint}')
  for field, kind in types.items():
    value = getattr(config, field)
    if dataclasses.is_dataclass(kind) and type(value) is kind:
      problems += type_problems(value, f'{path}.{field}')
      continue
    right, need = _check_type(value, kind)
    if not right:
      problems.append(f'{path}.{field}={value!r}: must be {need}')
  return problems


def _check_type(value: Any, kind: Any) -> tuple[bool, str]:
  """Returns whether a value is of a type, and the type in words."""
  origin, choices = typing.get_origin(kind), typing.get_args(kind)
  if origin is Literal:
    return value in choices, f'one of {choices}'
  if origin is tuple:
    right = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    return right, 'a tuple of strings'
  if origin is dict:
    return isinstance(value, dict), 'a dictionary'
  if kind is float:
    right = isinstance(value, (int, float)) and not isinstance(value, bool)
    return right, 'a number'
  right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
  return right and not dataclasses.is_dataclass(kind), (
      f'of type {kind.__name__}'
  )


def flat(config: config_lib.Config) -> dict[str, Any]:
  """Returns {'steps': value, 'model.width': value, ...}."""
  return _flat(to_dict(config))


def _flat(values: dict[str, Any]) -> dict[str, Any]:
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat.update({f'{name}.{field}': v for field, v in value.items()})
    else:
      flat[name] = value
  return flat


def fields() -> list[str]:
  """Returns the names of all fields that can be set: 'model.width', ..."""
  return list(flat(config_lib.Config()))


def identity(config: config_lib.Config) -> dict[str, Any]:
  """Returns the fields that determine the result of a run, as in `flat`.

  Left out are paths of inputs (their digests are compared instead), intervals,
  timeouts, and the division of the work over devices, parts and kernels, which
  changes the result by rounding only. `steps` counts: the learning rate depends
  on it.
  """
  values = to_dict(config_lib.resolve(config))
  for name in (
      'corpus init_from log_interval log_to tensorboard peak_tflops mesh'
      ' accumulate checkpoint gates deterministic'
  ).split():
    del values[name]
  for name in ('attention', 'remat', 'scan_layers'):
    del values['model'][name]
  del values['mips']['kernel']
  for section, field in (
      (values, 'options'),
      (values['mips'], 'options'),
      (values['model'], 'encoder_options'),
  ):
    if not section[field]:  # Configs of older versions lack them.
      del section[field]
  default = config_lib.ModelConfig()
  for name in HEAD_FIELDS:
    if values['model'][name] == getattr(default, name):
      del values['model'][name]
  values['model']['attention_dropout'] = config_lib.attention_rate(config.model)
  for name in ('tag_column', 'tag_names'):  # How to read an input.
    del values['tagger'][name]
  for name in ('timeout', 'keep', 'max_builder_failures'):
    del values['refresh'][name]
  for section, field in _INPUT_FILES:
    values[section][field] = bool(values[section][field])  # Whether any.
  return _flat(values)


def digest(config: config_lib.Config) -> str:
  """Returns the SHA-256 of the config's identity."""
  text = json.dumps(identity(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def differences(
    ours: config_lib.Config, theirs: config_lib.Config
) -> list[str]:
  """Returns a line for each field in which the identities differ."""
  now, then = identity(ours), identity(theirs)
  here, there = flat(ours), flat(theirs)  # With the defaults.
  return [
      f'config.{name}: {then.get(name, there.get(name))!r} there,'
      f' {now.get(name, here.get(name))!r} here'
      for name in {**now, **then}
      if now.get(name) != then.get(name)
  ]
