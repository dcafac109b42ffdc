"""`realm-jax import`: published checkpoints become a workdir.

`train` (through config.init_from), `index`, `evaluate` and `export` start from
the workdir. Tensors that no model computes with are stored too, so that an
export returns every tensor.
"""

from collections.abc import Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.interop import block_records
from realm_jax.interop import convert
from realm_jax.interop import sentence_transformers as st
from realm_jax.interop import sources as sources_lib
from realm_jax.interop.sources import open_source as open_source
from realm_jax.models import embedder
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files
from realm_jax.trainer import stages

CORPUS = 'corpus'
Path = str | os.PathLike[str]


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
    query_source: str | None = None,
    **head: Any,
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
    query_source: the query tower of a retriever; its document tower is in
      `names`. The two encoders of DPR in `names` are recognised.
    **head: fields of ModelConfig that describe the retriever, such as
      pooling='mean'; None: as the checkpoint says.

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
  if not names:
    raise ValueError('Give a --source: a folder or a hub id.')
  given = {k: v for k, v in head.items() if v is not None}
  opened_sources = [
      sources_lib.open_source(name, vocab, blocks is None, body, given)
      for name in (*names, *([query_source] if query_source else []))
  ]
  sources = _towers(opened_sources, query_source is not None, body)
  chosen = _choose(sources, components)
  tokenizer = _one_tokenizer(sources)
  with files.atomic_folder(workdir, overwrite=True) as temporary:
    pairs = zip(sources, chosen, strict=True)
    loaded = [source.load(wanted, seed) for source, wanted in pairs]
    _check_same_model(sources, loaded)
    loaded = _join_towers(sources, loaded)
    params = {k: v for one in loaded for k, v in one.params.items()}
    config = _config(sources, loaded, list(params))
    # A prefix that leaves no room for a text is refused.
    inputs.Template.of(config.model, config.lengths, tokenizer)
    tokenizer.save(temporary, settings=True)
    opened, table = None, None
    blanks: list[int] | None = None
    for source, one in zip(sources, loaded, strict=True):
      if one.block_emb is not None and 'embedder' in one.params:
        path = pathlib.Path(blocks) if blocks else source.blocks
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
      digest = checkpoint.save_snapshot(
          temporary, 0, params['embedder'], compress=False
      )
    if table is not None and opened is not None:
      block_records.publish(temporary, config, table, opened, digest)
    for source, one in zip(sources, loaded, strict=True):
      sources_lib.write_imported(temporary, source, one, blanks or [])
    files.write_json(temporary / 'config.json', config_lib.to_dict(config))
  sizes = [np.size(x) for part in params.values() for x in part.values()]
  return {
      'workdir': str(workdir),
      'sources': {
          source.name: {
              'kind': one.kind,
              'components': sorted(one.params),
              'at_random': one.fresh,
              'dropped': sources_lib.by_reason(one.dropped),
              'rows_cut': one.rows_cut,
          }
          for source, one in zip(sources, loaded, strict=True)
      },
      'parameters': int(sum(sizes)),
      'corpus': config.corpus or None,
      'index': index_step,
  }


def _choose(
    sources: Sequence[sources_lib.Source], components: Sequence[str] | None
) -> list[list[str]]:
  """Returns the components to take from each source."""
  chosen: list[list[str]] = []
  owners: dict[str, str] = {}
  for source in sources:
    known, wanted = source.components, components
    if source.tower == 'query':
      chosen.append(['embedder'])
      continue
    if wanted is None:
      wanted = ('embedder',) if source.head else tuple({*known} - {'tagger'})
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


def _towers(
    sources: list[sources_lib.Source], has_query: bool, body: str | None
) -> list[sources_lib.Source]:
  """Marks the towers of a retriever whose encoders are two.

  `has_query`: whether the last source is the query tower.

  Raises:
    ValueError: it is not clear which source has the document tower.
  """
  if has_query:
    *others, query = sources
    makers = [one for one in others if 'embedder' in one.components]
    if len(makers) != 1 or 'embedder' not in query.components:
      raise ValueError(
          f'--query_source={query.name} is the query tower of a retriever, and'
          ' one --source has its document tower; those with an encoder for it'
          f' are {[one.name for one in makers]}.'
      )
    document = makers[0].as_tower('document')
    rest = [one for one in others if one is not makers[0]]
    return [document, query.as_tower('query'), *rest]
  found = {
      tower: [
          (one, prefix)
          for one in sources
          for prefix in st.dpr_prefixes(one.tensors, known)
      ]
      for tower, known in (('document', st.CONTEXT), ('query', st.QUESTION))
  }
  if body is not None or any(len(pairs) != 1 for pairs in found.values()):
    return sources
  towers = [
      one.as_tower(tower, prefix)
      for tower, pairs in found.items()
      for one, prefix in pairs
  ]
  taken = [one for pairs in found.values() for one, _ in pairs]
  return towers + [s for s in sources if not any(s is one for one in taken)]


def _join_towers(
    sources: Sequence[sources_lib.Source], loaded: list[convert.Loaded]
) -> list[convert.Loaded]:
  """Joins the document and the query tower to one embedder.

  Raises:
    ValueError: they make their embeddings in different ways.
  """
  place = {source.tower: i for i, source in enumerate(sources)}
  if 'query' not in place:
    return loaded
  at, other = place['document'], place['query']
  document, query = loaded[at], loaded[other]
  if 'embedder' not in document.params:
    raise ValueError('Two towers make an embedder: --components must have it.')
  of_each = {'query_prefix', 'document_prefix', 'titles', 'title_separator'}
  names = {'embedding_width', *config_lib.HEAD_FIELDS} - of_each
  if problems := _differences(document.config, query.config, names):
    raise ValueError(
        f'{sources[at].name} and {sources[other].name} are the document and the'
        f' query tower of one retriever, but differ:{problems}'
    )

  def renamed(name: str) -> str:
    component, slash, rest = name.rpartition('/')
    return f'{component}{slash}{embedder.QUERY_PREFIX}{rest}'

  towers = dict(document.params['embedder'])
  towers |= {renamed(n): x for n, x in query.params['embedder'].items()}
  config = dataclasses.replace(
      document.config, towers='separate', query_prefix=query.config.query_prefix
  )
  joined = list(loaded)
  joined[at] = dataclasses.replace(
      document, config=config, params=document.params | {'embedder': towers}
  )
  joined[other] = dataclasses.replace(
      query,
      config=config,
      params={'embedder': towers},
      sources={n: renamed(ours) for n, ours in query.sources.items()},
      fresh=[renamed(name) for name in query.fresh],
  )
  return joined


def _one_tokenizer(
    sources: Sequence[sources_lib.Source],
) -> tokenizer_lib.Tokenizer:
  first = sources[0]
  for other in sources[1:]:
    if other.tokenizer.digest != first.tokenizer.digest:
      raise ValueError(
          f'{first.name} and {other.name} have different vocabularies; one job'
          ' has one.'
      )
  return first.tokenizer


def _check_same_model(
    sources: Sequence[sources_lib.Source], loaded: Sequence[convert.Loaded]
) -> None:
  names = {field.name for field in dataclasses.fields(loaded[0].config)}
  names.remove('towers')
  # The head is that of the retriever, wherever the other components come from.
  if any(source.head for source in sources):
    names -= {'embedding_width', *config_lib.HEAD_FIELDS}
  for source, one in zip(sources[1:], loaded[1:], strict=True):
    if problems := _differences(loaded[0].config, one.config, names):
      raise ValueError(
          f'{sources[0].name} and {source.name} are of different sizes; one job'
          f' has one model:{problems}'
      )


def _differences(
    one: config_lib.ModelConfig, other: config_lib.ModelConfig, names: set[str]
) -> str:
  """Returns the fields in which two models differ, a line for each."""
  values = [(name, getattr(one, name), getattr(other, name)) for name in names]
  return ''.join(
      f'\n  config.model.{name}: {a!r} and {b!r}'
      for name, a, b in sorted(values, key=lambda value: value[0])
      if a != b
  )


def _config(
    sources: Sequence[sources_lib.Source],
    loaded: Sequence[convert.Loaded],
    components: Sequence[str],
) -> config_lib.Config:
  model = loaded[0].config
  for one in loaded:
    if 'embedder' in one.params:
      for name in ('towers', 'embedding_width', *config_lib.HEAD_FIELDS):
        setattr(model, name, getattr(one.config, name))
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
  for source in sources:
    source.set_lengths(lengths)
  heads = any(source.head is not None for source in sources)
  if heads and list(components) == ['embedder']:
    lengths.query = min(lengths.query, model.max_positions)
    lengths.document = min(lengths.document, model.max_positions)
  elif lengths.joint > model.max_positions:
    lengths.query = max(4, min(lengths.query, model.max_positions // 4))
    lengths.document = model.max_positions - lengths.query
  return config_lib.resolve(config)
