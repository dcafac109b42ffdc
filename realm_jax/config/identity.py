"""Configurations as JSON, and what makes two of them the same."""

import dataclasses
import hashlib
import json
import pathlib
import typing
from typing import Any

from realm_jax.config import schema

# Fields that name files to learn from.
_INPUTS = (('ict', 'questions'), ('open_qa', 'questions'), ('tagger', 'files'))


def to_dict(config: Any) -> dict[str, Any]:
  """Returns the config tree as plain dictionaries, for JSON."""
  return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> schema.Config:
  """Inverse of `to_dict`; raises ValueError on an unknown field."""
  return _from_dict(schema.Config, values, 'config')


def read(workdir: pathlib.Path | str) -> schema.Config:
  """Reads the resolved config of a workdir.

  Raises:
    FileNotFoundError: if the folder is no workdir.
    ValueError: if its config.json is damaged or of another version.
  """
  path = pathlib.Path(workdir) / 'config.json'
  if not path.exists():
    raise FileNotFoundError(
        f'{workdir} is not a workdir: it has no config.json. `realm-jax train'
        f' --config=FILE.py --workdir={workdir}` makes one.'
    )
  try:
    return from_dict(json.loads(path.read_text(encoding='utf-8')))
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def fields() -> list[str]:
  """Returns all fields that can be set: `steps`, `model.width`, ..."""
  names = []
  for name, value in to_dict(schema.Config()).items():
    if isinstance(value, dict):
      names += [f'{name}.{field}' for field in value]
    else:
      names.append(name)
  return names


def identity(config: schema.Config) -> dict[str, Any]:
  """What determines the result of a run, as {'section.field': value}.

  Left out is what may differ between two runs of one result: where corpus and
  questions lie (their digests are checked instead), how often to log and to
  save, how long to wait, over how many devices and in how many parts to do the
  work, and by which kernels: that changes no more than the rounding. `steps` is
  part of it, since the learning rate depends on it.
  """
  values = to_dict(schema.resolve(config))
  for name in (
      'corpus init_from log_interval tensorboard peak_tflops mesh accumulate'
      ' checkpoint'
  ).split():
    del values[name]
  for name in ('attention', 'remat'):
    del values['model'][name]
  if not values['options']:  # Configs of older versions do not have it.
    del values['options']
  values['model']['attention_dropout'] = schema.attention_rate(config.model)
  for name in ('timeout', 'keep', 'max_builder_failures'):
    del values['refresh'][name]
  if not values['mips']['options']:  # Absent from older configurations.
    del values['mips']['options']
  for section, field in _INPUTS:
    # Not which they are, but whether there are any.
    values[section][field] = bool(values[section][field])
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat.update({f'{name}.{field}': v for field, v in value.items()})
    else:
      flat[name] = value
  return flat


def digest(config: schema.Config) -> str:
  """SHA-256 of the config's identity."""
  text = json.dumps(identity(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def differences(ours: schema.Config, theirs: schema.Config) -> list[str]:
  """Lists the fields in which the identities differ, with both values."""
  now, then = identity(ours), identity(theirs)
  return [
      f'config.{name}: {then.get(name)!r} there, {now.get(name)!r} here'
      for name in now | then
      if now.get(name) != then.get(name)
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
