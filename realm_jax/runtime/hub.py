"""Files and datasets that are named: of the Hugging Face hub, of ir_datasets.

The libraries are imported late: the imports are slow, and few users need them.
"""

import pathlib
from typing import Any

from realm_jax.runtime import extension
from realm_jax.runtime import lines


def file(name: str, path: str) -> pathlib.Path | None:
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
  with extension.needed_by(f'{name}: reading it', 'hf'):
    import datasets
  parts = name.removeprefix('hf:').split(':')
  if not parts[0] or len(parts) > 3:
    raise ValueError(f'{name!r} is not of the form hf:NAME[:CONFIG[:SPLIT]].')
  path, config, split = [*parts, '', ''][:3]
  try:
    if (pathlib.Path(path) / 'state.json').is_file():  # From save_to_disk.
      return datasets.load_from_disk(path)
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
  with extension.needed_by(f'{name}: reading it', 'ir'):
    import ir_datasets
  try:
    return ir_datasets.load(name.removeprefix('ir:'))
  except KeyError:
    raise FileNotFoundError(
        f'{name}: ir_datasets knows no such dataset; `ir_datasets list` shows'
        ' all names.'
    ) from None
