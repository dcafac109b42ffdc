"""`realm-jax import`: published checkpoints become a workdir.

`train` (through config.init_from), `index`, `evaluate` and `export` start from
the workdir. Tensors that no model computes with are stored too, so that an
export returns every tensor.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import re
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import pretrained_tokenizer
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import block_records
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.interop import huggingface_names
from realm_jax.interop import weights
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import hub
from realm_jax.runtime import snapshots as snapshots_lib
from realm_jax.trainer import stages

DIRECTORY = 'imported'  # In a workdir; holds one folder for each source.
CORPUS = 'corpus'
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
  """

  name: str
  folder: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, weights.FileTensor]
  vocab: str
  body: str | None = None

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer; see `Tokenizer.from_source` for errors."""
    return tokenizer_lib.Tokenizer.from_source(self.vocab)

  @functools.cached_property
  def components(self) -> list[str]:
    """Names of the components that the checkpoint has."""
    with _located(self.name):
      return convert.components_in(self.tensors, self.config, self.body)

  def load(
      self, wanted: Sequence[str] | None = None, seed: int = 0
  ) -> convert.Loaded:
    """Converts the checkpoint; the log says what is dropped.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: see `convert.load`.
    """
    size = self.tokenizer.vocab_size
    with _located(self.name):
      loaded = convert.load(
          *(self.tensors, self.config, wanted, seed),
          vocab_size=size,
          body=self.body,
      )
      huggingface_config.set_pad_id(loaded.config, self.tokenizer.pad_id)
    if loaded.rows_cut:
      log.info(
          '%s: the last %d of %d rows of the word embeddings are padding, and'
          ' are dropped; the vocabulary has %d wordpieces.',
          *(self.name, loaded.rows_cut, size + loaded.rows_cut, size),
      )
    for reason, names in _by_reason(loaded.dropped).items():
      shown = ', '.join(names[:_MAX_SHOWN])
      more = f' and {len(names) - _MAX_SHOWN} more'
      shown += more if len(names) > _MAX_SHOWN else ''
      log.info('%s: dropped: %s (%s).', self.name, shown, reason)
    return loaded

  @property
  def blocks(self) -> pathlib.Path | None:
    """The documents of an open-QA checkpoint, if its folder has them."""
    path = self.folder / block_records.FILE
    return path if path.is_file() else None


@contextlib.contextmanager
def _located(name: str) -> Iterator[None]:
  """Raises a ValueError with the name of the checkpoint."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from None


def _by_reason(dropped: Mapping[str, str]) -> dict[str, list[str]]:
  found: dict[str, list[str]] = {}
  for name, reason in dropped.items():
    found.setdefault(reason, []).append(name)
  return found


@dataclasses.dataclass(frozen=True)
class Imported:
  """The record of an imported checkpoint, for an exact export.

  kind: one of `huggingface_names.KINDS`.
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


def read_imported(workdir: Path) -> list[Imported]:
  """Returns the records of a workdir's sources; none if it was trained."""
  found = []
  for path in sorted(pathlib.Path(workdir).glob(f'{DIRECTORY}/*/source.json')):
    unused = path.parent / _UNUSED
    tensors = weights.open_file(unused) if unused.is_file() else {}
    found.append(Imported(**files.read_json(path), unused=tensors))
  return found


def looks_foreign(name: Path) -> bool:
  """Whether a name is a checkpoint's folder or a hub id, and no workdir."""
  path = pathlib.Path(name)
  if not path.exists():
    return bool(_HUB_ID.fullmatch(str(name)))
  return path.is_dir() and any(
      (path / file).is_file() for file in weights.WEIGHT_FILES
  )


def open_source(
    name: Path,
    vocab: str | None = None,
    blocks: bool = True,
    body: str | None = None,
) -> Source:
  """Opens a checkpoint's folder, or downloads it from the hub.

  Args:
    name: a folder with config.json and weights, or a hub id such as
      'google/realm-cc-news-pretrained-embedder'.
    vocab: source of the tokenizer; None: the checkpoint.
    blocks: whether to download the documents of an open-QA checkpoint too.
    body: prefix of the tensors to take, for a file with several BERTs.

  Raises:
    FileNotFoundError: it is neither, or lacks config.json or weights.
    ValueError: a file is truncated, damaged or refused.
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
  config = files.read_json(path)
  if not isinstance(config, dict):
    raise ValueError(f'{path} is not a JSON object.')
  with _located(str(folder)):
    # Another architecture is refused first.
    huggingface_config.model_config(config)
  tensors = weights.open_folder(folder)
  return Source(str(name), folder, config, tensors, vocab or str(folder), body)


def _download(name: str, blocks: bool) -> pathlib.Path:
  """Downloads the necessary files, or finds them in the hub's cache."""
  if not _HUB_ID.fullmatch(name):
    raise FileNotFoundError(f'There is no folder {name}.')
  get = functools.partial(hub.file, name)
  config = get('config.json')
  if config is None:
    raise FileNotFoundError(
        f'{name!r} is no folder, and as an id of the Hugging Face hub it could'
        ' not be fetched: it is not there, or the hub cannot be reached and it'
        ' is not in the cache. Give a folder with the downloaded files.'
    )
  for file in pretrained_tokenizer.FILES:
    get(file)
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
  if blocks and huggingface_names.KINDS['openqa'] in architecture:
    get(block_records.FILE)
  return config.parent


def run(
    names: Sequence[str],
    workdir: Path,
    *,
    components: Sequence[str] | None = None,
    corpus: str | None = None,
    vocab: str | None = None,
    blocks: str | None = None,
    workers: int | None = None,
    seed: int = 0,
    body: str | None = None,
) -> dict[str, Any]:
  """Writes a workdir with the parameters of one or more checkpoints.

  Args:
    names: folders or hub ids; together they give each component once, such as
      an embedder's and an encoder's.
    workdir: output; it appears, complete, at the very end.
    components: 'embedder', 'reader', 'span_reader', 'tagger'; None: all but a
      tagger.
    corpus: a corpus prepared with the checkpoint's vocabulary, for `index` and
      `evaluate`. An open-QA checkpoint brings its own.
    vocab: vocabulary to use instead of the checkpoint's.
    blocks: block_records.npy of an open-QA checkpoint whose folder has none.
    workers: processes that make the corpus of an open-QA checkpoint.
    seed: for parameters that a checkpoint does not have.
    body: prefix of the tensors to take, for a file with several BERTs.

  Returns:
    A summary: the source of each component, the names of the parameters at
    their random initial values, and the tensors that were dropped.

  Raises:
    FileExistsError: `workdir` exists and is not empty.
    FileNotFoundError: a source, or a part of it, does not exist.
    ValueError: a checkpoint is damaged, of another architecture, or does not
      fit its config.json, its vocabulary or the other sources.
  """
  workdir = pathlib.Path(workdir).absolute()
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise FileExistsError(
        f'{workdir} exists and is not empty; give another --workdir.'
    )
  sources = [open_source(name, vocab, blocks is None, body) for name in names]
  if not sources:
    raise ValueError('Give a --source: a folder or a hub id.')
  chosen = _choose(sources, components)
  tokenizer = _one_tokenizer(sources)
  with files.atomic_folder(workdir, overwrite=True) as temporary:
    loaded = [
        source.load(wanted, seed)
        for source, wanted in zip(sources, chosen, strict=True)
    ]
    _check_same_model(sources, loaded)
    params = {k: v for one in loaded for k, v in one.params.items()}
    config = _config(sources, loaded, list(params))
    tokenizer.save(temporary, settings=True)
    opened, table = None, None
    blanks: list[int] | None = None
    for source, one in zip(sources, loaded, strict=True):
      path = pathlib.Path(blocks) if blocks else source.blocks
      if one.block_emb is not None and 'embedder' in one.params:
        blanks = block_records.prepare_corpus(
            path, one.block_emb, source.name, temporary, workers
        )
        if blanks is not None:
          table = one.block_emb
        break
    if table is not None:
      config.corpus = str(workdir / CORPUS)
      opened = corpus_lib.Corpus.open(temporary / CORPUS)
    elif corpus is not None:
      config.corpus = str(pathlib.Path(corpus).absolute())
      opened = corpus_lib.Corpus.open(corpus)
      if opened.tokenizer.digest != tokenizer.digest:
        raise ValueError(
            f'The corpus {corpus} was prepared with another vocabulary:'
            f' {opened.tokenizer.digest[:16]}, {tokenizer.digest[:16]} in the'
            ' checkpoint. Prepare it with the --vocab of the checkpoint.'
        )
    index_step = None if table is None else 0
    about = {
        'step': 0,
        'config_digest': config_lib.digest(config),
        'tokenizer_digest': tokenizer.digest,
        'corpus_fingerprint': opened.fingerprint if opened else '',
        'index_generation': index_step,
        # `train` does not take these for parameters of the checkpoint.
        'at_random': [name for one in loaded for name in one.fresh],
    }
    checkpoint.save_params(temporary, 0, params, about)
    digest = None
    if 'embedder' in params:
      with checkpoint.uncompressed_context():
        digest = snapshots_lib.save(temporary, 0, params['embedder'])
    if table is not None and opened is not None:
      block_records.publish(temporary, config, table, opened, digest)
    for source, one in zip(sources, loaded, strict=True):
      _write_record(temporary, source, one, blanks or [])
    files.write_json(temporary / 'config.json', config_lib.to_dict(config))
  return {
      'workdir': str(workdir),
      'sources': {
          source.name: {
              'kind': one.kind,
              'components': sorted(one.params),
              'at_random': one.fresh,
              'dropped': _by_reason(one.dropped),
              'rows_cut': one.rows_cut,
          }
          for source, one in zip(sources, loaded, strict=True)
      },
      'parameters': int(
          sum(np.size(x) for part in params.values() for x in part.values())
      ),
      'corpus': config.corpus or None,
      'index': index_step,
  }


def _choose(
    sources: Sequence[Source], components: Sequence[str] | None
) -> list[list[str]]:
  """Returns the components to take from each source."""
  chosen: list[list[str]] = []
  owners: dict[str, str] = {}
  for source in sources:
    known, wanted = source.components, components
    if wanted is None:
      wanted = [name for name in known if name != 'tagger']
    taken = [name for name in known if name in wanted]
    if not taken:
      raise ValueError(
          f'{source.name} has the components {known}, of which'
          f' {list(components or [])} are wanted.'
      )
    for name in taken:
      if name in owners:
        raise ValueError(
            f'Both {owners[name]} and {source.name} have the component {name};'
            ' import one of them, or choose with --components.'
        )
      owners[name] = source.name
    chosen.append(taken)
  missing = set(components or []) - set(owners)
  if missing:
    raise ValueError(
        f'No source has the component {", ".join(sorted(missing))}; they have '
        + ', '.join(sorted(owners))
    )
  return chosen


def _one_tokenizer(sources: Sequence[Source]) -> tokenizer_lib.Tokenizer:
  first = sources[0]
  for other in sources[1:]:
    if other.tokenizer.digest != first.tokenizer.digest:
      raise ValueError(
          f'{first.name} and {other.name} have different vocabularies; one job'
          ' has one.'
      )
  return first.tokenizer


def _check_same_model(
    sources: Sequence[Source], loaded: Sequence[convert.Loaded]
) -> None:
  first = dataclasses.asdict(loaded[0].config)
  for source, one in zip(sources[1:], loaded[1:], strict=True):
    problems = [
        f'{name}: {first[name]!r} and {value!r}'
        for name, value in dataclasses.asdict(one.config).items()
        if name != 'towers' and value != first[name]
    ]
    if problems:
      raise ValueError(
          f'{sources[0].name} and {source.name} are of different sizes; one job'
          ' has one model:\n  ' + '\n  '.join(problems)
      )


def _config(
    sources: Sequence[Source],
    loaded: Sequence[convert.Loaded],
    components: Sequence[str],
) -> config_lib.Config:
  model = loaded[0].config
  for one in loaded:
    if 'embedder' in one.params:
      model.towers = one.config.towers
  for name, sizes in config_lib.PRESETS.items():
    if sizes == (model.num_layers, model.width, model.num_heads):
      model.preset = name  # type: ignore[assignment]
  config = config_lib.Config(model=model)
  # The last objective that trains imported components only.
  for objective in stages.STAGES:
    stage = stages.load(dataclasses.replace(config, objective=objective))
    if set(stage.components) <= set(components):
      config.objective = objective
  candidates = sources[0].config.get('num_candidates')
  if isinstance(candidates, int) and candidates >= 2:
    config.num_candidates = candidates
  lengths = config.lengths
  if lengths.joint > model.max_positions:
    lengths.query = max(4, min(lengths.query, model.max_positions // 4))
    lengths.document = model.max_positions - lengths.query
  return config_lib.resolve(config)


def _write_record(
    workdir: pathlib.Path,
    source: Source,
    loaded: convert.Loaded,
    blanks: list[int],
) -> None:
  folder = workdir / DIRECTORY / loaded.kind
  while folder.exists():  # Two sources of one kind give different components.
    folder = folder.with_name(folder.name + '_')
  folder.mkdir(parents=True)
  if loaded.unused:
    weights.write_safetensors(folder / _UNUSED, loaded.unused)
  files.write_json(
      folder / 'source.json',
      {
          'kind': loaded.kind,
          'name': source.name,
          'config': source.config,
          'tensors': loaded.sources,
          'copies': loaded.copies,
          'dtypes': loaded.dtypes,
          'blanks': blanks if loaded.block_emb is not None else [],
      },
  )
