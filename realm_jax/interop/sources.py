"""Opened checkpoints, and their records in the workdir of an import."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
from typing import Any

from realm_jax import config as config_lib
from realm_jax.corpus import pretrained_tokenizer
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import block_records
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.interop import sentence_transformers as st
from realm_jax.interop import weights
from realm_jax.runtime import extension
from realm_jax.runtime import files
from realm_jax.runtime import lines

DIRECTORY = 'imported'  # In a workdir; holds one folder for each source.
_UNUSED = 'unused.safetensors'
_HUB_ID = re.compile(r'[\w-][\w.-]*(/[\w-][\w.-]*)?')
_MAX_SHOWN = 6  # Names in a line of the log.

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened checkpoint of transformers; the weights are not yet read.

  name: as the user gave it.
  folder: of its files.
  config: the contents of config.json.
  tensors: by name, still in their files.
  vocab: where the tokenizer is read from.
  body: prefix of the tensors to take; None: there is one BERT, or a REALM.
  head: of a retriever that is not REALM's.
  given: fields of ModelConfig of the command line.
  tower: 'query' or 'document' of a retriever with two sources; '': neither.
  """

  name: str
  folder: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, weights.FileTensor]
  vocab: str
  body: str | None = None
  head: st.Head | None = None
  given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  tower: str = ''

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer; see `Tokenizer.from_source` for errors."""
    return tokenizer_lib.Tokenizer.from_source(self.vocab)

  @functools.cached_property
  def components(self) -> list[str]:
    """Names of the components that the checkpoint has."""
    with located(self.name):
      return convert.components_in(
          self.tensors, self.config, self.body, self.head
      )

  def load(
      self, wanted: Sequence[str] | None = None, seed: int = 0
  ) -> convert.Loaded:
    """Converts the checkpoint; the log says what is dropped.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: see `convert.load`.
    """
    size = self.tokenizer.vocab_size
    with located(self.name):
      loaded = convert.load(
          *(self.tensors, self.config, wanted, seed), vocab_size=size,
          body=self.body, head=self.head,
      )
      huggingface_config.set_pad_id(loaded.config, self.tokenizer.pad_id)
    for field, value in self.given.items():
      setattr(loaded.config, field, value)
    if loaded.rows_cut:
      log.info(
          '%s: the last %d of %d rows of the word embeddings are padding, and'
          ' are dropped; the vocabulary has %d wordpieces.',
          *(self.name, loaded.rows_cut, size + loaded.rows_cut, size),
      )
    for reason, names in by_reason(loaded.dropped).items():
      shown = lines.listed(names, _MAX_SHOWN)
      log.info('%s: dropped: %s (%s).', self.name, shown, reason)
    return loaded

  def set_lengths(self, lengths: config_lib.LengthsConfig) -> None:
    """Sets the lengths of a retriever whose head is not REALM's."""
    if self.head is None:
      return
    most = huggingface_config.model_config(self.config).max_positions
    most = min(most, self.head.max_length or most)
    prefix = self.head.fields.get('query_prefix', '')
    usual = lengths.query + len(self.tokenizer.encode(prefix))
    if self.tower in ('', 'query'):
      lengths.query = min(usual, most)
    if self.tower in ('', 'document'):
      lengths.document = most

  def as_tower(self, tower: str, prefix: str | None = None) -> 'Source':
    """Returns one encoder of two; of DPR, if its tensors have a prefix."""
    if prefix is None:
      known = st.QUESTION if tower == 'query' else st.CONTEXT
      found = st.dpr_prefixes(self.tensors, known)
      if self.head is not None or not found:
        return dataclasses.replace(self, tower=tower)
      prefix = found[0]
    tensors = {n: t for n, t in self.tensors.items() if n.startswith(prefix)}
    with located(self.name):
      head = st.dpr_head(tensors, prefix, self.given)
    return dataclasses.replace(self, tower=tower, tensors=tensors, head=head)

  @property
  def blocks(self) -> pathlib.Path | None:
    """The documents of an open-QA checkpoint, if its folder has them."""
    path = self.folder / block_records.FILE
    return path if path.is_file() else None


@contextlib.contextmanager
def located(name: str) -> Iterator[None]:
  """Raises a ValueError with the name of the checkpoint."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None


def by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
  """Returns the tensors that were dropped for each reason."""
  found: dict[str, list[str]] = {}
  for name, reason in dropped.items():
    found.setdefault(reason, []).append(name)
  return found


def looks_foreign(name: Path) -> bool:
  """Whether a name is a checkpoint's folder or a hub id, and no workdir."""
  path = pathlib.Path(name)
  if not path.exists():
    return bool(_HUB_ID.fullmatch(str(name)))
  return path.is_dir() and any(
      (path / file).is_file() for file in (*weights.WEIGHT_FILES, st.MODULES)
  )


def open_source(
    name: Path,
    vocab: str | None = None,
    blocks: bool = True,
    body: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> Source:
  """Opens a checkpoint's folder, or downloads it from the hub.

  Args:
    name: a folder with config.json and weights, of sentence-transformers or
      not; a file of weights in such a folder; or a hub id such as
      'google/realm-cc-news-pretrained-embedder'.
    vocab: source of the tokenizer; None: the checkpoint.
    blocks: whether to download the documents of an open-QA checkpoint too.
    body: prefix of the tensors to take, for a file with several BERTs.
    given: fields of ModelConfig that describe the retriever.

  Raises:
    FileNotFoundError: it is neither, or lacks config.json or weights.
    ValueError: a file is truncated, damaged or refused, or has a module that is
      not known.
  """
  place, given = pathlib.Path(name), given or {}
  if not place.exists():
    place = _download(str(name), blocks)
  folder = place if place.is_dir() else place.parent
  head: st.Head | None = None
  more: dict[str, weights.FileTensor] = {}
  if (folder / st.MODULES).is_file() and place.is_dir():
    folder, head, more = st.read(folder, given)
    place = folder
  path = folder / 'config.json'
  if not path.is_file():
    raise FileNotFoundError(
        f'{folder} has no config.json: it is no checkpoint of transformers.'
    )
  config = files.read_object(path)
  with located(str(folder)):
    # Another architecture is refused first.
    huggingface_config.model_config(config)
    head = head or st.named_head(config, given)
  tensors = weights.open_folder(place) | more
  vocab = vocab or str(folder)
  source = Source(str(name), folder, config, tensors, vocab, body, head, given)
  dpr = st.dpr_prefixes(tensors, st.QUESTION + st.CONTEXT)
  if body is None and head is not None and len(dpr) == 1:
    return source.as_tower('', dpr[0])
  return source


def _download(name: str, blocks: bool) -> pathlib.Path:
  """Downloads the necessary files, or finds them in the hub's cache."""
  if not _HUB_ID.fullmatch(name):
    raise FileNotFoundError(f'There is no folder {name}.')
  get = functools.partial(extension.hub_file, name)
  config = get('config.json')
  if config is None:
    raise FileNotFoundError(
        f'{name!r} is no folder, and as an id of the Hugging Face hub it could'
        ' not be fetched: it is not there, or the hub cannot be reached and it'
        ' is not in the cache. Give a folder with the downloaded files.'
    )
  for file in (*pretrained_tokenizer.FILES, *st.FILES):
    get(file)
  for module in st.folders(config.parent):
    for file in ('config.json', *weights.WEIGHT_FILES):
      get(f'{module}/{file}')
  for file in weights.WEIGHT_FILES:
    found = get(file)
    if found is None:
      continue
    if file.endswith('.json'):
      with weights.located(found):
        shards = sorted(set(files.read_json(found)['weight_map'].values()))
      for shard in shards:
        get(shard)
    break
  with weights.located(config):
    architecture = files.read_json(config).get('architectures') or []
  if blocks and huggingface_config.KINDS['openqa'] in architecture:
    get(block_records.FILE)
  return config.parent


@dataclasses.dataclass(frozen=True)
class Imported:
  """The record of an imported checkpoint in its workdir, for an exact export.

  kind: one of `huggingface_config.KINDS`, or RETRIEVER.
  name: of the source.
  config: its config.json.
  tensors: names in the checkpoint to 'component/name' of the parameters.
  copies: names in the checkpoint to the tensor that each is a copy of.
  dtypes: of the tensors that were not float32.
  blanks: rows of the blocks that had no text.
  unused: tensors that no model computes with, still in their file.
  """

  kind: str
  name: str
  config: dict[str, Any]
  tensors: dict[str, str]
  copies: dict[str, str]
  dtypes: dict[str, str]
  blanks: list[int]
  unused: dict[str, weights.FileTensor]


def read_imported(workdir: str | os.PathLike[str]) -> list[Imported]:
  """Returns the records of a workdir's sources; none if it was trained."""
  found = []
  for path in sorted(pathlib.Path(workdir).glob(f'{DIRECTORY}/*/source.json')):
    unused = path.parent / _UNUSED
    tensors = weights.open_file(unused) if unused.is_file() else {}
    found.append(Imported(**files.read_json(path), unused=tensors))
  return found


def write_imported(
    workdir: pathlib.Path,
    source: Source,
    loaded: convert.Loaded,
    blanks: list[int],
) -> None:
  """Writes the record of a source; see `Imported`."""
  folder = workdir / DIRECTORY / loaded.kind
  while folder.exists():  # Two sources of one kind give different components.
    folder = folder.with_name(folder.name + '_')
  folder.mkdir(parents=True)
  if loaded.unused:
    weights.write_safetensors(folder / _UNUSED, loaded.unused)
  values = {
      'kind': loaded.kind,
      'name': source.name,
      'config': source.config,
      'tensors': loaded.sources,
      'copies': loaded.copies,
      'dtypes': loaded.dtypes,
      'blanks': blanks if loaded.block_emb is not None else [],
  }
  files.write_json(folder / 'source.json', values)
