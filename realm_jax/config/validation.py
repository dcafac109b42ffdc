"""Checks of a configuration, before any work."""

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import functools
import typing
from typing import Any, Literal

from realm_jax.config import schema

# May be 0, for none of it, for a default, or for no limit.
_NOT_NEGATIVE = (
    'model.num_layers model.width model.num_heads model.mlp_width'
    ' model.vocab_size model.layer_norm_eps model.init_stddev'
    ' model.span_norm_eps optimizer.learning_rate optimizer.retriever_delay'
    ' optimizer.final_fraction optimizer.eps optimizer.weight_decay'
    ' refresh.timeout refresh.keep refresh.max_builder_failures checkpoint.keep'
    ' mips.num_leaves mips.leaves_to_search mips.reorder peak_tflops'
).split()
_AT_LEAST_ONE = (
    'steps batch_size accumulate log_interval checkpoint.interval'
    ' refresh.interval model.embedding_width model.span_width'
    ' model.max_span_width lengths.masks open_qa.retrieved open_qa.read'
).split()
_SHARES = (
    'mlm.own_passage_rate mlm.null_rate ict.remove_rate model.dropout'
    ' refresh.overlap_bound optimizer.b1 optimizer.b2 mips.recall_target'
).split()


def validate(
    config: schema.Config,
    more: Callable[[], Iterable[tuple[str, str]]] = lambda: (),
) -> None:
  """Raises ValueError naming every field that is wrong, and what is right.

  `more` returns further pairs of a field and what is wrong with it; it is
  called once the types are right and numbers positive.
  """
  if not isinstance(config, schema.Config):
    raise ValueError(
        'An experiment file returns a realm_jax.config.Config; this one returns'
        f' {type(config).__name__}: {str(config)[:80]}'
    )
  problems = _type_problems(config)
  if problems:  # The checks below assume the types.
    raise ValueError(_message(problems))

  def require(ok: bool, field: str, what: str) -> None:
    if not ok:
      problems.append(f'config.{field}={_at(config, field)!r}: {what}')

  c = config
  require(bool(c.corpus), 'corpus', 'give the folder that `prepare` wrote')
  for field in _NOT_NEGATIVE:
    require(_at(c, field) >= 0, field, 'must not be negative')
  for field in _AT_LEAST_ONE:
    require(_at(c, field) >= 1, field, 'must be at least 1')
  require(
      c.num_candidates >= 2,
      'num_candidates',
      'counts the null document, so it must be at least 2',
  )
  require(0 <= c.seed < 2**31, 'seed', 'must be between 0 and 2**31 - 1')
  require(c.lengths.query >= 4, 'lengths.query', 'must be at least 4')
  require(c.lengths.document >= 8, 'lengths.document', 'must be at least 8')
  require(
      c.lengths.masks <= c.lengths.query - 2,
      'lengths.masks',
      f'is more than a query of {c.lengths.query} wordpieces can have, with'
      ' [CLS] and [SEP]',
  )
  if problems:  # What follows divides and multiplies.
    raise ValueError(_message(problems))
  model = schema.resolve(config).model
  require(
      model.width % model.num_heads == 0,
      'model.num_heads',
      f'must divide the width, {model.width}',
  )
  for field in _SHARES:
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
      c.mips.backend in schema.BACKENDS or ':' in c.mips.backend,
      'mips.backend',
      f'must be one of {tuple(schema.BACKENDS)} or have the form'
      ' package.module:Name',
  )
  require(
      c.accumulate < 1 or c.batch_size % c.accumulate == 0,
      'accumulate',
      f'must divide the batch size, {c.batch_size}',
  )
  require(
      c.optimizer.clip_norm > 0, 'optimizer.clip_norm', 'must be more than 0'
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
  for field, what in more():
    require(False, field, what)
  if problems:
    raise ValueError(_message(problems))


def _message(problems: list[str]) -> str:
  return 'The config is wrong:\n  ' + '\n  '.join(problems)


def _at(config: schema.Config, field: str) -> Any:
  return functools.reduce(getattr, field.split('.'), config)


def _type_problems(config: Any, path: str = 'config') -> list[str]:
  problems = []
  types = typing.get_type_hints(type(config))
  # Of a dataclass any attribute can be set, also a misspelt one.
  for unknown in sorted(vars(config).keys() - types.keys()):
    close = difflib.get_close_matches(unknown, types, 1)
    hint = f'; did you mean {path}.{close[0]}?' if close else ''
    problems.append(f'{path}.{unknown}: there is no such field{hint}')
  for field in dataclasses.fields(config):
    value, kind = getattr(config, field.name), types[field.name]
    name = f'{path}.{field.name}'
    if dataclasses.is_dataclass(kind):
      if type(value) is kind:
        problems += _type_problems(value, name)
      else:
        words = types[field.name].__name__
        problems.append(f'{name}={value!r}: must be of type {words}')
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
    elif typing.get_origin(kind) is dict:
      if not isinstance(value, dict):
        problems.append(f'{name}={value!r}: must be a dictionary')
    elif kind is float:
      if isinstance(value, bool) or not isinstance(value, (int, float)):
        problems.append(f'{name}={value!r}: must be a number')
    elif isinstance(value, bool) != (kind is bool) or not isinstance(
        value, kind
    ):
      problems.append(f'{name}={value!r}: must be of type {kind.__name__}')
  return problems
