"""Datasets of the Hugging Face hub."""

import pathlib
from typing import Any


def dataset(name: str) -> Any:
  """Opens `hf:NAME[:CONFIG[:SPLIT]]`, by default the split `train`.

  NAME is a dataset of the Hugging Face hub, which is downloaded if it is not in
  the cache, or a folder.

  Raises:
    FileNotFoundError: the dataset does not exist.
    ImportError: the package `datasets` is not installed.
    ValueError: it has no such configuration or split.
  """
  try:
    import datasets
  except ImportError as error:
    raise ImportError(
        f'{name}: reading it needs the package datasets; run `pip install '
        "'realm_jax[hf]'`."
    ) from error
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
        f'({_first_line(error)}).'
    ) from None
  except ValueError as error:  # Unknown configuration or split.
    raise ValueError(f'{name}: {_first_line(error)}') from None


def _first_line(error: BaseException) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
