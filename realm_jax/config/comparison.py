"""The fields of a config as one flat dictionary, and which of them matter.

Two configs of the same identity give the same result.
"""

import hashlib
import json
from typing import Any

from realm_jax import config as config_lib

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


def flat(config: config_lib.Config) -> dict[str, Any]:
  """Returns {'steps': value, 'model.width': value, ...}."""
  return _flat(config_lib.to_dict(config))


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
  values = config_lib.to_dict(config_lib.resolve(config))
  for name in (
      'corpus init_from log_interval log_to tensorboard peak_tflops mesh'
      ' accumulate checkpoint gates deterministic'
  ).split():
    del values[name]
  for name in ('attention', 'remat', 'scan_layers'):
    del values['model'][name]
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
