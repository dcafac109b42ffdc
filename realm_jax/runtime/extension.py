"""Objects that a setting names, and packages that only some users install.

Built-in names stand for a path, too, so both kinds are loaded alike. No JAX.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib
from typing import Any


@contextlib.contextmanager
def needed_by(what: str, extra: str) -> Iterator[None]:
  """Around the import of an optional package: an error names the command.

  Raises:
    ImportError: the package of this extra of realm_jax is not installed.
  """
  try:
    yield
  except ImportError as error:
    raise ImportError(
        f'{what} needs a package that is not installed ({error.name}): '
        f"pip install 'realm_jax[{extra}]'"
    ) from error


def is_path(name: str) -> bool:
  """Returns whether `name` has the form `package.module:Name`."""
  module, colon, attribute = name.partition(':')
  parts = [*module.split('.'), attribute]
  return bool(colon) and all(part.isidentifier() for part in parts)


def load(setting: str, name: str, builtin: Mapping[str, str]) -> Any:
  """Returns the object that a setting names.

  Args:
    setting: name of the setting, for messages, such as `config.objective`.
    name: a key of `builtin`, or `package.module:Name`. The module must be
      importable, for example from a folder of PYTHONPATH.
    builtin: the path of each built-in object.

  Raises:
    ValueError: the name is neither, or nothing can be imported under it.
  """
  path = builtin.get(name, name)
  if not is_path(path):
    raise ValueError(
        f'{setting}={name!r}: must be one of {", ".join(map(repr, builtin))},'
        ' or have the form package.module:Name.'
    )
  module_name, _, attribute = path.partition(':')
  try:
    module = importlib.import_module(module_name)
  except ImportError as error:
    raise ValueError(
        f'{setting}={name!r}: the module {module_name!r} cannot be imported'
        f' ({error}). Its folder must be on PYTHONPATH.'
    ) from error
  if not hasattr(module, attribute):
    raise ValueError(
        f'{setting}={name!r}: {module.__file__} has no {attribute!r}.'
    )
  return getattr(module, attribute)
