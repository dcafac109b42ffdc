"""Objects, files and data sets that are named, and optional packages.

Built-in names of objects stand for a path, too, so both kinds are loaded alike.
Libraries are imported late: the imports are slow, and few users need them. No
JAX.
"""

from collections.abc import Iterator, Mapping
import contextlib
import importlib
import os
import pathlib
from typing import Any

from realm_jax.runtime import lines


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
  """Returns the object that a setting, such as `config.objective`, names.

  The name is a key of `builtin`, whose values are paths, or a path itself,
  `package.module:Name`, of an importable module.

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


def hub_file(name: str, path: str) -> pathlib.Path | None:
  """Downloads a file of a repository of the Hugging Face hub, or its cache.

  None: the repository lacks the file, or the hub cannot be reached and the
  cache lacks it.

  Raises:
    FileNotFoundError: the repository cannot be read, with the reason.
  """
  import huggingface_hub
  from huggingface_hub import errors

  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(name, path))
  except errors.EntryNotFoundError:
    return None
  except (errors.HfHubHTTPError, OSError, ValueError) as error:
    raise FileNotFoundError(
        f'{name!r} is no file or folder, and as an id of the Hugging Face hub'
        f' it could not be fetched: {lines.first_line(error)}'
    ) from error


def dataset(name: str) -> Any:
  """Opens `hf:NAME[:CONFIG[:SPLIT]]`, by default the split `train`.

  NAME is a dataset of the Hugging Face hub, which is downloaded if it is not in
  the cache, or a folder.

  Raises:
    FileNotFoundError: the dataset does not exist.
    ImportError: the package `datasets` is not installed.
    ValueError: it has no such configuration or split.
  """
  with needed_by(f'{name}: reading it', 'hf'):
    import datasets
  parts = name.removeprefix('hf:').split(':')
  if not parts[0] or len(parts) > 3:
    raise ValueError(f'{name!r} is not of the form hf:NAME[:CONFIG[:SPLIT]].')
  path, config, split = [*parts, '', ''][:3]
  try:
    folder = pathlib.Path(path)
    if (folder / 'dataset_dict.json').is_file():
      folder /= split or config or 'train'
      if not folder.is_dir():
        raise ValueError(f'no split {folder.name!r}')
    if (folder / 'state.json').is_file():  # From save_to_disk.
      return datasets.load_from_disk(os.fspath(folder))
    return datasets.load_dataset(path, config or None, split=split or 'train')
  except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
    raise FileNotFoundError(
        f'{name}: neither a folder nor a dataset of the hub '
        f'({lines.first_line(error)}).'
    ) from None
  except ValueError as error:  # Unknown configuration or split.
    raise ValueError(f'{name}: {lines.first_line(error)}') from None


def ir_dataset(name: str) -> Any:
  """Opens `ir:NAME`; ir_datasets downloads it if it is not there.

  Raises:
    FileNotFoundError: the dataset does not exist.
    ImportError: the package ir_datasets is not installed.
  """
  with needed_by(f'{name}: reading it', 'ir'):
    import ir_datasets
  try:
    return ir_datasets.load(name.removeprefix('ir:'))
  except KeyError:
    raise FileNotFoundError(
        f'{name}: ir_datasets knows no such dataset; `ir_datasets list` shows'
        ' all names.'
    ) from None
