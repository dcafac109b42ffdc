"""Checkpoints from elsewhere: a local folder, or an id of the Hugging Face hub.

Public: `Source`, `open_source`, `looks_foreign`. Nothing is read of the weights
but their names and shapes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
from typing import Any

from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import convert
from realm_jax.interop import huggingface_names
from realm_jax.interop import weights

BLOCK_RECORDS = 'block_records.npy'
_TOKENIZER_FILES = ('vocab.txt', 'tokenizer_config.json', 'tokenizer.json')
_HUB_ID = re.compile(r'[\w-][\w.-]*(/[\w-][\w.-]*)?')

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that is there, with its config and its weights' names.

  name: as the user gave it.
  folder: where its files are.
  config: the contents of config.json.
  tensors: by name, still in their files.
  vocab: where the tokenizer is read from.
  """

  name: str
  folder: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, weights.FileTensor]
  vocab: str

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """Its tokenizer, if that has a wordpiece for each row of the embedding.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged or of another size than the embedding.
    """
    tokenizer = tokenizer_lib.Tokenizer.from_source(self.vocab)
    rows = convert.model_config(self.config).vocab_size
    if tokenizer.vocab_size != rows:
      raise ValueError(
          f'The vocabulary of {self.vocab} has {tokenizer.vocab_size}'
          f' wordpieces, but {self.name} was made for {rows} (vocab_size in its'
          ' config.json). Give its own with --vocab.'
      )
    return tokenizer

  @property
  def blocks(self) -> pathlib.Path | None:
    """The documents of an open-QA checkpoint, where they are beside it."""
    path = self.folder / BLOCK_RECORDS
    return path if path.is_file() else None


def looks_foreign(name: Path) -> bool:
  """Whether this is no workdir of ours: a checkpoint's folder, or a hub id."""
  path = pathlib.Path(name)
  if not path.exists():
    return bool(_HUB_ID.fullmatch(str(name)))
  return path.is_dir() and any(
      (path / file).is_file() for file in weights.WEIGHT_FILES
  )


def open_source(
    name: Path, vocab: str | None = None, blocks: bool = True
) -> Source:
  """Opens a checkpoint's folder, or fetches it from the hub.

  Args:
    name: a folder with config.json and weights, or a hub id such as
      'google/realm-cc-news-pretrained-embedder'.
    vocab: where to take the tokenizer from; None: the checkpoint.
    blocks: whether to fetch the documents of an open-QA checkpoint too.

  Raises:
    FileNotFoundError: if it is neither, or lacks config.json or weights.
    ValueError: if a file is truncated, damaged or refused.
  """
  folder = pathlib.Path(name)
  if not folder.exists():
    folder = _download(str(name), blocks)
  if not folder.is_dir():
    raise FileNotFoundError(
        f'{folder} is a file; give the folder that holds config.json too.'
    )
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
        f'{folder} has no config.json: it is no checkpoint of transformers.'
    )
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from None
  if not isinstance(config, dict):
    raise ValueError(f'{path} is not a JSON object.')
  try:
    convert.model_config(config)  # Another architecture is refused first.
  except ValueError as error:
    raise ValueError(f'{folder}: {error}') from None
  return Source(
      str(name),
      folder,
      config,
      weights.open_folder(folder),
      vocab or str(folder),
  )


def _download(name: str, blocks: bool) -> pathlib.Path:
  """Fetches what is needed, or finds it in the hub's cache."""
  if not _HUB_ID.fullmatch(name):
    raise FileNotFoundError(f'There is no folder {name}.')
  # Imported late: slow, and not needed for a folder.
  import huggingface_hub
  from huggingface_hub import errors

  def get(file: str) -> pathlib.Path | None:
    try:
      return pathlib.Path(huggingface_hub.hf_hub_download(name, file))
    except errors.EntryNotFoundError:
      return None  # Not in the repository; or offline and not in the cache.
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise FileNotFoundError(
          f'{name!r} is no folder, and as an id of the Hugging Face hub it'
          f' could not be fetched: {reason}'
      ) from error

  config = get('config.json')
  if config is None:
    raise FileNotFoundError(
        f'{name!r} is no folder, and as an id of the Hugging Face hub it could'
        ' not be fetched: it is not there, or the hub cannot be reached and it'
        ' is not in the cache. Give a folder with the downloaded files.'
    )
  for file in _TOKENIZER_FILES:
    get(file)
  for file in weights.WEIGHT_FILES:
    found = get(file)
    if found is None:
      continue
    if file.endswith('.json'):
      files = json.loads(found.read_bytes())['weight_map']
      for shard in sorted(set(files.values())):
        get(shard)
    break
  architecture = json.loads(config.read_bytes()).get('architectures') or []
  if blocks and huggingface_names.KINDS['openqa'] in architecture:
    get(BLOCK_RECORDS)
  return config.parent
