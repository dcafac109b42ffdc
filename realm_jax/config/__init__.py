"""The configuration of every job: one typed tree, its presets and its checks.

`experiments/*.py` build a `Config` and assign only what differs from the
defaults in `schema`; `--config.section.field=value` overrides both. `checks`
says what is wrong with one, `files` reads and compares them.
"""

from realm_jax.config.identity import differences as differences
from realm_jax.config.identity import digest as digest
from realm_jax.config.identity import fields as fields
from realm_jax.config.identity import from_dict as from_dict
from realm_jax.config.identity import identity as identity
from realm_jax.config.identity import read as read
from realm_jax.config.identity import to_dict as to_dict
from realm_jax.config.schema import BACKENDS as BACKENDS
from realm_jax.config.schema import PRESETS as PRESETS
from realm_jax.config.schema import CheckpointConfig as CheckpointConfig
from realm_jax.config.schema import Config as Config
from realm_jax.config.schema import IctConfig as IctConfig
from realm_jax.config.schema import LengthsConfig as LengthsConfig
from realm_jax.config.schema import MeshConfig as MeshConfig
from realm_jax.config.schema import MipsConfig as MipsConfig
from realm_jax.config.schema import MlmConfig as MlmConfig
from realm_jax.config.schema import ModelConfig as ModelConfig
from realm_jax.config.schema import OpenQaConfig as OpenQaConfig
from realm_jax.config.schema import OptimizerConfig as OptimizerConfig
from realm_jax.config.schema import RefreshConfig as RefreshConfig
from realm_jax.config.schema import attention_rate as attention_rate
from realm_jax.config.schema import resolve as resolve
from realm_jax.config.validation import validate as validate
