"""Texts from the datasets of others, by name: TFDS and Hugging Face.

Public: `TfdsSource`, `HuggingFaceSource`. A dataset must have a field `text`,
and may have `title` and `id`, as the Wikipedias of both do.
"""

from collections.abc import Iterator
import pathlib
import re
from typing import Any

# A version begins with a digit, a split with a letter.
_TFDS_NAME = re.compile(
    r'tfds:(?P<dataset>[\w/.]+(?::[\d*.]+)?)(?::(?P<split>[A-Za-z]\w*))?'
)


class TfdsSource:
  """`tfds:NAME[:VERSION][:SPLIT]`: of the folder of TFDS.

  TFDS reads files of array_record without TensorFlow, and no others; to
  download and build a dataset it needs TensorFlow, so that this is left to the
  command `tfds build`.
  """

  def __init__(self, name: str):
    """Opens the dataset.

    Raises:
      FileNotFoundError: if it is not there.
      ValueError: if it cannot be read, has no such split, or no field `text`.
    """
    # Imported late: it takes seconds.
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import file_utils

    self.name = name
    found = _TFDS_NAME.fullmatch(name)
    if found is None:
      raise ValueError(
          f'The source {name!r} is not of the form tfds:NAME[:VERSION][:SPLIT].'
      )
    dataset, split = found['dataset'], found['split'] or 'train'
    try:
      builder = read_only_builder.builder_from_files(dataset)
    except tfds.core.registered.DatasetNotFoundError:
      raise FileNotFoundError(
          f'{name}: there is no such dataset in the folders of TFDS, '
          f'{", ".join(map(str, file_utils.list_data_dirs()))}. Make '
          f'it with `tfds build {dataset} --file_format=array_record`, or set '
          'TFDS_DATA_DIR to the folder where it is.'
      ) from None
    except ValueError as error:
      raise ValueError(f'{name}: {_first_line(error)}') from None
    if split not in builder.info.splits:
      raise ValueError(
          f'{name}: there is no split {split!r}; there are '
          f'{", ".join(sorted(builder.info.splits))}.'
      )
    _check_fields(name, builder.info.features or {})
    try:
      self._source = builder.as_data_source(split=split)
    except NotImplementedError:
      raise ValueError(
          f'{name}: the files in {builder.data_dir} are not of array_record, '
          f'the only format that can be read without TensorFlow. `tfds build '
          f'{dataset} --file_format=array_record` makes such.'
      ) from None

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i in range(len(self._source)):
      yield f'{self.name}:{i}', _fields(self._source[i])


class HuggingFaceSource:
  """`hf:NAME[:CONFIG[:SPLIT]]`: of the hub, its cache, or a folder."""

  def __init__(self, name: str):
    """Opens the dataset, after downloading it if it is not in the cache.

    Raises:
      FileNotFoundError: if it is not there.
      ImportError: if the package `datasets` is not installed.
      ValueError: if it has no such configuration or split, or no field `text`.
    """
    try:
      import datasets
    except ImportError as error:
      raise ImportError(
          f'{name}: reading it needs the package datasets; run `pip install '
          "'realm_jax[hf]'`."
      ) from error

    self.name = name
    parts = name.removeprefix('hf:').split(':')
    if not parts[0] or len(parts) > 3:
      raise ValueError(
          f'The source {name!r} is not of the form hf:NAME[:CONFIG[:SPLIT]].'
      )
    path, config, split = [*parts, '', ''][:3]
    try:
      if (pathlib.Path(path) / 'state.json').is_file():  # Of save_to_disk.
        self._rows = datasets.load_from_disk(path)
      else:
        self._rows = datasets.load_dataset(
            path, config or None, split=split or 'train'
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
      raise FileNotFoundError(
          f'{name}: there is no such folder, and on the hub it was not found '
          f'({_first_line(error)}).'
      ) from None
    except ValueError as error:  # Unknown configuration or split.
      raise ValueError(f'{name}: {_first_line(error)}') from None
    _check_fields(name, self._rows.features)

  def __iter__(self) -> Iterator[tuple[str, Any]]:
    for i, row in enumerate(self._rows):
      yield f'{self.name}:{i}', _fields(row)


# Other fields of such datasets (urls, times) are none of ours.
_KNOWN = ('id', 'title', 'text')


def _fields(row: dict[str, Any]) -> dict[str, Any]:
  return {name: row[name] for name in _KNOWN if name in row}


def _check_fields(name: str, fields: Any) -> None:
  if 'text' not in fields:
    raise ValueError(
        f'{name}: the dataset has no field `text`; its fields are '
        f'{", ".join(sorted(fields))}.'
    )


def _first_line(error: BaseException) -> str:
  lines = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).strip().splitlines()
  return lines[0] if lines else type(error).__name__
