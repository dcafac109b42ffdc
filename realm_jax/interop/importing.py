"""`realm-jax import`: a published checkpoint becomes a workdir.

Public: `run`, `Imported`, `read_imported`. `train` (through
config.init_from), `index`, `evaluate` and `export` start from it. What a
checkpoint holds and no model computes with is kept beside, so that an export
gives back every tensor.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from typing import Any
import uuid

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import generation
from realm_jax.interop import block_records
from realm_jax.interop import checkpoint_sources
from realm_jax.interop import convert
from realm_jax.interop import weights
from realm_jax.prepare import prepare
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.runtime import snapshots as snapshots_lib

log = logging.getLogger(__name__)

DIRECTORY = 'imported'  # In a workdir; one folder for each source's kind.
CORPUS = 'corpus'
_UNUSED = 'unused.safetensors'
# As long as a table can hold: a block of theirs is one passage of ours.
_MAX_BLOCK = 65_535
_BLANK = '[UNK]'  # In the place of a block without text.


@dataclasses.dataclass(frozen=True)
class Imported:
  """What is remembered of a checkpoint that was imported.

  kind: one of `huggingface_names.KINDS`.
  name: of the source.
  config: its config.json.
  tensors: their names to 'component/name' of ours.
  copies: their names to the tensor of theirs that each is a copy of.
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


def read_imported(workdir: checkpoint_sources.Path) -> list[Imported]:
  """Returns what a workdir was imported from; nothing if it was trained."""
  found = []
  for path in sorted(pathlib.Path(workdir).glob(f'{DIRECTORY}/*/source.json')):
    unused = path.parent / _UNUSED
    found.append(
        Imported(
            **files.read_json(path),
            unused=(
                weights.open_file(unused) if unused.is_file() else {}
            ),
        )
    )
  return found


def run(
    names: Sequence[str],
    workdir: checkpoint_sources.Path,
    *,
    components: Sequence[str] | None = None,
    corpus: str | None = None,
    vocab: str | None = None,
    blocks: str | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
  """Writes a workdir with the parameters of one or more checkpoints.

  Args:
    names: folders or hub ids; together they give each component once, such as
      an embedder's and an encoder's.
    workdir: to write; it appears, complete, at the very end.
    components: 'embedder', 'reader', 'span_reader'; None: all there are.
    corpus: a corpus prepared with the checkpoint's vocabulary, for `index` and
      `evaluate`. An open-QA checkpoint brings its own.
    vocab: vocabulary to take instead of the checkpoint's.
    blocks: block_records.npy of an open-QA checkpoint that has none beside it.
    workers: processes that make the corpus of an open-QA checkpoint.
    seed: for parameters that a checkpoint does not have.

  Returns:
    A summary: what came from where, and what is at its random initial value.

  Raises:
    FileExistsError: if `workdir` exists and is not empty.
    FileNotFoundError: if a source, or a part of it, is not there.
    ValueError: if a checkpoint is damaged, of another architecture, or does not
      fit its config.json, its vocabulary or the other sources.
  """
  workdir = pathlib.Path(workdir).absolute()
  if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
    raise FileExistsError(
        f'{workdir} exists and is not empty; give another --workdir.'
    )
  opened = [
      checkpoint_sources.open_source(name, vocab, blocks is None)
      for name in names
  ]
  if not opened:
    raise ValueError('Give a --source: a folder or a hub id.')
  chosen = _choose(opened, components)
  tokenizer = _one_tokenizer(opened)
  temporary = workdir.with_name(f'.{workdir.name}-{uuid.uuid4().hex[:8]}')
  temporary.mkdir(parents=True)
  try:
    loaded = [
        convert.load(source.tensors, source.config, wanted, seed)
        for source, wanted in zip(opened, chosen, strict=True)
    ]
    _check_same_model(opened, loaded)
    params = {k: v for one in loaded for k, v in one.params.items()}
    config = _config(opened, loaded, list(params))
    tokenizer.save(temporary)
    files.write_json(
        temporary / 'tokenizer_config.json',
        {'do_lower_case': tokenizer.lowercase},
    )
    blanks = _open_qa_corpus(
        opened, loaded, blocks, temporary, tokenizer, workers
    )
    if blanks is not None:
      config.corpus = str(workdir / CORPUS)
      made = corpus_lib.Corpus.open(temporary / CORPUS)
    elif corpus is not None:
      config.corpus = str(pathlib.Path(corpus).absolute())
      made = corpus_lib.Corpus.open(corpus)
      if made.tokenizer.digest != tokenizer.digest:
        raise ValueError(
            f'The corpus {corpus} was prepared with another vocabulary:'
            f' {made.tokenizer.digest[:16]}, {tokenizer.digest[:16]} in the'
            ' checkpoint. Prepare it with the --vocab of the checkpoint.'
        )
    else:
      made = None
    about = {
        'step': 0,
        'config_digest': config_lib.digest(config),
        'tokenizer_digest': tokenizer.digest,
        'corpus_fingerprint': made.fingerprint if made else '',
        'index_generation': 0 if blanks is not None else None,
        # `train` does not take these for parameters of the checkpoint.
        'at_random': [name for one in loaded for name in one.fresh],
    }
    checkpoint.save_params(temporary, 0, params, about)
    digest = None
    if 'embedder' in params:
      with checkpoint.uncompressed_context():
        digest = snapshots_lib.save(temporary, 0, params['embedder'])
    if blanks is not None and made is not None:
      _publish(temporary, config, loaded, made, digest)
    for source, one in zip(opened, loaded, strict=True):
      _remember(temporary, source, one, blanks or [])
    files.write_json(
        temporary / 'config.json', config_lib.to_dict(config)
    )
    os.replace(temporary, workdir)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return {
      'workdir': str(workdir),
      'sources': {
          source.name: {
              'kind': one.kind,
              'components': sorted(one.params),
              'at_random': one.fresh,
          }
          for source, one in zip(opened, loaded, strict=True)
      },
      'parameters': int(
          sum(np.size(x) for part in params.values() for x in part.values())
      ),
      'corpus': config.corpus or None,
      'index': 0 if blanks is not None else None,
  }


def _choose(
    opened: Sequence[checkpoint_sources.Source],
    components: Sequence[str] | None,
) -> list[list[str]]:
  """Which components come from which source."""
  chosen: list[list[str]] = []
  owners: dict[str, str] = {}
  for source in opened:
    mine = [
        name
        for name in convert.components_in(source.tensors)
        if components is None or name in components
    ]
    if not mine:
      raise ValueError(
          f'{source.name} has the components'
          f' {convert.components_in(source.tensors)}, of which'
          f' {list(components or [])} are wanted.'
      )
    for name in mine:
      if name in owners:
        raise ValueError(
            f'Both {owners[name]} and {source.name} have the component {name};'
            ' import one of them, or choose with --components.'
        )
      owners[name] = source.name
    chosen.append(mine)
  missing = set(components or []) - set(owners)
  if missing:
    raise ValueError(
        f'No source has the component {", ".join(sorted(missing))}; they have '
        + ', '.join(sorted(owners))
    )
  return chosen


def _one_tokenizer(
    opened: Sequence[checkpoint_sources.Source],
) -> tokenizer_lib.Tokenizer:
  first = opened[0]
  for other in opened[1:]:
    if other.tokenizer.digest != first.tokenizer.digest:
      raise ValueError(
          f'{first.name} and {other.name} have different vocabularies; one job'
          ' has one.'
      )
  return first.tokenizer


def _check_same_model(
    opened: Sequence[checkpoint_sources.Source],
    loaded: Sequence[convert.Loaded],
) -> None:
  first = dataclasses.asdict(loaded[0].config)
  for source, one in zip(opened[1:], loaded[1:], strict=True):
    problems = [
        f'{name}: {first[name]!r} and {value!r}'
        for name, value in dataclasses.asdict(one.config).items()
        if name != 'towers' and value != first[name]
    ]
    if problems:
      raise ValueError(
          f'{opened[0].name} and {source.name} are of different sizes; one job'
          ' has one model:\n  ' + '\n  '.join(problems)
      )


def _config(
    opened: Sequence[checkpoint_sources.Source],
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
  # What trains as much as possible of what is here.
  for objective, names in config_lib.COMPONENTS.items():
    if set(names) <= set(components):
      config.objective = objective  # type: ignore[assignment]
  candidates = opened[0].config.get('num_candidates')
  if isinstance(candidates, int) and candidates >= 2:
    config.num_candidates = candidates
  lengths = config.lengths
  if lengths.joint > model.max_positions:
    lengths.query = max(4, min(lengths.query, model.max_positions // 4))
    lengths.document = model.max_positions - lengths.query
  return config_lib.resolve(config)


def _remember(
    workdir: pathlib.Path,
    source: checkpoint_sources.Source,
    loaded: convert.Loaded,
    blanks: list[int],
) -> None:
  folder = workdir / DIRECTORY / loaded.kind
  while folder.exists():  # Two of a kind, with a component each.
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
          'dtypes': {
              name: str(source.tensors[name].dtype)
              for name in loaded.sources
              if source.tensors[name].dtype != np.float32
          },
          'blanks': blanks if loaded.block_emb is not None else [],
      },
  )


# Open-QA checkpoints: documents and their embeddings.


def _open_qa_corpus(
    opened: Sequence[checkpoint_sources.Source],
    loaded: Sequence[convert.Loaded],
    blocks: str | None,
    workdir: pathlib.Path,
    tokenizer: tokenizer_lib.Tokenizer,
    workers: int | None,
) -> list[int] | None:
  """Makes the corpus of an open-QA checkpoint, row by row.

  Returns:
    The rows without text; None if there is no such checkpoint, or it came
    without its documents.
  """
  for source, one in zip(opened, loaded, strict=True):
    if one.block_emb is None or 'embedder' not in one.params:
      continue
    path = pathlib.Path(blocks) if blocks else source.blocks
    if path is None:
      log.warning(
          '%s has embeddings of %d documents, but no %s: it is imported'
          ' without an index. Give the file with --blocks.',
          source.name, one.block_emb.shape[0], checkpoint_sources.BLOCK_RECORDS,
      )
      return None
    number, records = block_records.byte_records(path)
    if number != one.block_emb.shape[0]:
      raise ValueError(
          f'{path} has {number} documents, {source.name} has embeddings of '
          f'{one.block_emb.shape[0]}.'
      )
    lines = workdir / 'blocks.jsonl'
    blanks = _write_lines(lines, records, path)
    prepare.prepare(
        [str(lines)],
        workdir / CORPUS,
        vocab=str(workdir),
        max_wordpieces=_MAX_BLOCK,
        workers=workers,
    )
    lines.unlink()
    rows = len(corpus_lib.Corpus.open(workdir / CORPUS).passages)
    if rows != number:
      raise ValueError(
          f'{path} has {number} documents, which became {rows} passages: some'
          ' have no wordpiece, or more than a passage can hold.'
      )
    return blanks
  return None


def _write_lines(
    lines: pathlib.Path, records: Iterable[bytes], path: pathlib.Path
) -> list[int]:
  blanks = []

  def texts() -> Iterator[str]:
    for row, record in enumerate(records):
      try:
        text = record.decode('utf-8')
      except UnicodeDecodeError as error:
        raise ValueError(
            f'{path}: document {row} is not UTF-8 ({error.reason}).'
        ) from None
      if not text.strip():
        blanks.append(row)
        text = _BLANK
      yield text

  with open(lines, 'w', encoding='utf-8') as file:
    for text in texts():
      file.write(json.dumps({'text': text}) + '\n')
  return blanks


def _publish(
    workdir: pathlib.Path,
    config: config_lib.Config,
    loaded: Sequence[convert.Loaded],
    corpus: corpus_lib.Corpus,
    digest: str | None,
) -> None:
  """The embeddings of the documents, as the index generation of step 0.

  They were made by the embedder before fine-tuning, which trains the query's
  side only; for the job they belong to the parameters that they came with.
  """
  table = next(
      one.block_emb for one in loaded if one.block_emb is not None
  )
  lineage = generation.Lineage(
      step=0,
      params_digest=digest,
      tokenizer_digest=corpus.tokenizer.digest,
      corpus_fingerprint=corpus.fingerprint,
      num_rows=table.shape[0],
      width=table.shape[1],
  )
  row_bytes = table.shape[1] * table.dtype.itemsize
  directory = workdir / generation.DIRECTORY
  with generation.Writer(directory, lineage, config.mips.dtype) as writer:
    for rows_NE in table.chunks(generation.ROWS_PER_SHARD * row_bytes):
      writer.add(rows_NE)
    writer.add_backend(config.mips)
    writer.publish()
