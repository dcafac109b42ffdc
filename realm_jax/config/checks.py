"""What a configuration must be, found out before any work.

Public: `validate`.
"""

import dataclasses
import functools
import typing
from typing import Any, Literal

from realm_jax.config import schema


def validate(config: schema.Config) -> None:
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
  model = schema.resolve(config).model
  if c.objective == 'tagger':
    longest = c.tagger.length
  elif c.objective == 'ict':
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
      c.model.attention in ('auto', 'xla') or not schema.attention_rate(model),
      'model.attention',
      'a fused kernel drops no attention weights; set'
      f' config.model.attention_dropout=0, not {schema.attention_rate(model)}',
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
  if c.objective == 'tagger':
    require(
        bool(c.tagger.files),
        'tagger.files',
        'give the files of tagged sentences to train on',
    )
    require(c.tagger.length >= 4, 'tagger.length', 'must be at least 4')
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
        name in schema.COMPONENTS[c.objective],
        'optimizer.frozen',
        f'the objective {c.objective!r} has the components '
        f'{schema.COMPONENTS[c.objective]}',
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


def _at(config: schema.Config, field: str) -> Any:
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
