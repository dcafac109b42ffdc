"""The retriever for users: texts in, numpy vectors and passages out.

Public: `Retriever`, `Hits`.
"""

from collections.abc import Callable, Sequence
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import search as search_lib
from realm_jax.interop import checkpoint_sources
from realm_jax.interop import convert
from realm_jax.interop import exported
from realm_jax.models import components as components_lib

_WIDTH_STEP = 32  # Wordpieces between two bucket widths.
_BATCH_TOKENS = 2**13  # Of one batch, at most.

Path = str | os.PathLike[str]


class Hits(NamedTuple):
  """What a search found, best first.

  rows: int64 [B, k], passage numbers.
  scores: float32 [B, k], inner products.
  """

  rows: np.ndarray
  scores: np.ndarray


class Retriever:
  """Embeds queries and passages, and searches; `Retriever.load` makes one."""

  def __init__(
      self,
      component: components_lib.Component,
      params: components_lib.Params,
      tokenizer: tokenizer_lib.Tokenizer,
      lengths: config_lib.LengthsConfig,
      open_search: Callable[[], tuple[search_lib.Search, search_lib.Rows]]
      | None = None,
      corpus: corpus_lib.Corpus | None = None,
  ):
    """Takes the parts; `open_search` is called at the first search."""
    self.tokenizer = tokenizer
    self.lengths = lengths
    self.width = component.config.embedding_width
    self._params = jax.device_put(params)
    self._open_search = open_search
    self._searched: tuple[search_lib.Search, search_lib.Rows] | None = None
    self._corpus = corpus
    self._embed_query = jax.jit(
        lambda params, ids_BQ, types_BQ: component.apply(
            params, 'embed_query', ids_BQ
        )
    )
    self._embed_document = jax.jit(
        lambda params, ids_BS, types_BS: component.apply(
            params, 'embed_document', ids_BS, types_BS
        )
    )

  @classmethod
  def load(
      cls,
      path: Path,
      step: int | None = None,
      query_length: int | None = None,
      passage_length: int | None = None,
  ) -> 'Retriever':
    """Loads a retriever from wherever there is one.

    Args:
      path: a workdir; a folder that `realm-jax export --format=huggingface`
        wrote; a REALM checkpoint (embedder, scorer, open-QA), as a folder or a
        hub id.
      step: of a workdir's checkpoint or snapshot; None: the newest checkpoint.
      query_length, passage_length: wordpieces, specials included, at which
        texts are cut; None: those of the workdir, or the paper's.

    Raises:
      FileNotFoundError: if there is nothing of that name.
      ValueError: if it has no retriever, or is damaged.
    """
    if checkpoint_sources.looks_foreign(path):
      if step is not None:
        raise ValueError(f'{path} is a checkpoint, it has no steps.')
      return cls._from_checkpoint(path, query_length, passage_length)
    workdir = exported.open_workdir(path, step)
    if 'embedder' not in workdir.params:
      raise ValueError(
          f'{path} has no retriever, only {", ".join(workdir.params)}.'
      )

    def open_search() -> tuple[search_lib.Search, search_lib.Rows]:
      index = workdir.index()
      return index.make_search(workdir.config.mips), index.table

    return cls(
        workdir.components['embedder'],
        workdir.params['embedder'],
        workdir.tokenizer,
        _lengths(workdir.config, query_length, passage_length),
        open_search,
        workdir.corpus,
    )

  @classmethod
  def _from_checkpoint(
      cls, path: Path, query_length: int | None, passage_length: int | None
  ) -> 'Retriever':
    if (pathlib.Path(path) / 'modules.json').is_file():
      raise ValueError(
          f'{path} is a folder of sentence-transformers; give the workdir, or'
          ' an export with --format=huggingface.'
      )
    source = checkpoint_sources.open_source(path, blocks=False)
    if 'embedder' not in convert.components_in(source.tensors):
      raise ValueError(f'{path} has no retriever.')
    loaded = convert.load(source.tensors, source.config, ['embedder'])
    if loaded.fresh:
      raise ValueError(
          f'{path} is a BERT without a retriever: it lacks'
          f' {", ".join(loaded.fresh)}. Train it: `realm-jax import`, then'
          ' `realm-jax train` with the objective `ict`.'
      )
    table = loaded.block_emb

    def open_search() -> tuple[search_lib.Search, search_lib.Rows]:
      assert table is not None
      rows = table.mapped()
      return search_lib.ExactSearch(rows), rows

    config = config_lib.resolve(config_lib.Config(model=loaded.config))
    return cls(
        components_lib.make('embedder', config.model),
        loaded.params['embedder'],
        source.tokenizer,
        _lengths(config, query_length, passage_length),
        open_search if table is not None else None,
    )

  @property
  def corpus(self) -> corpus_lib.Corpus:
    """The corpus that rows are of.

    Raises:
      ValueError: if there is none.
    """
    if self._corpus is None:
      raise ValueError(
          'This retriever was loaded without a corpus. A workdir has one if'
          ' `config.corpus` names it; a checkpoint has one after `realm-jax'
          ' import`.'
      )
    return self._corpus

  def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds `[CLS] text [SEP]`: float32 [B, E]."""
    length = self.lengths.query
    pairs: list[tuple[list[int], list[int]]] = [
        (inputs.query(ids, length, self.tokenizer), [])
        for ids in self.tokenizer.encode_batch(_checked(texts))
    ]
    return self._embed(self._embed_query, pairs, length)

  def embed_passages(
      self, passages: Sequence[tuple[str, str]]
  ) -> np.ndarray:
    """Embeds `[CLS] title [SEP] body [SEP]`: float32 [B, E].

    Args:
      passages: pairs of title and body; a title may be empty.
    """
    given: Sequence[Any] = passages
    if any(isinstance(p, str) or len(p) != 2 for p in given):
      raise ValueError('Each passage must be a pair (title, body).')
    t = self.tokenizer
    titles = t.encode_batch(_checked([title for title, _ in passages]))
    bodies = t.encode_batch(_checked([body for _, body in passages]))
    length = self.lengths.document
    pairs = [
        inputs.document(title, body, length, t)
        for title, body in zip(titles, bodies, strict=True)
    ]
    return self._embed(self._embed_document, pairs, length)

  def search(self, texts: Sequence[str], k: int) -> Hits:
    """Finds the k passages of the highest inner product with each text.

    Raises:
      FileNotFoundError: if the workdir has no index of these parameters.
      ValueError: if there is no index at all, or fewer than k passages.
    """
    if self._open_search is None:
      raise ValueError(
          'This retriever was loaded without an index. Load a workdir in which'
          ' `realm-jax index` built one, or an open-QA checkpoint.'
      )
    if self._searched is None:
      self._searched = self._open_search()
    search, table = self._searched
    query_emb_BE = self.embed_queries(texts)
    if not len(query_emb_BE):
      return Hits(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
    rows_BK = np.asarray(search.search(query_emb_BE, k)).astype(np.int64)
    doc_emb_BKE = table[rows_BK.reshape(-1)].reshape(*rows_BK.shape, -1)
    scores_BK = np.einsum(
        'BE,BKE->BK', query_emb_BE, doc_emb_BKE.astype(np.float32)
    )
    return Hits(rows_BK, scores_BK)

  def passage(self, row: int) -> dict[str, str]:
    """Returns {id, title, text} of a row that `search` found."""
    return self.corpus.passage_text(int(row))

  def _embed(
      self,
      embed: Callable[..., jax.Array],
      pairs: list[tuple[list[int], list[int]]],
      longest: int,
  ) -> np.ndarray:
    """Embeds two-segment inputs, sorted into few widths and batch sizes."""
    emb_BE = np.zeros((len(pairs), self.width), np.float32)
    sizes = np.array([len(a) + len(b) for a, b in pairs], np.int64)
    widths = np.minimum(-(-sizes // _WIDTH_STEP) * _WIDTH_STEP, longest)
    for width in np.unique(widths):
      members = np.flatnonzero(widths == width)
      most = max(1, _BATCH_TOKENS // int(width))
      for start in range(0, len(members), most):
        mine = members[start : start + most]
        # Powers of two, so that few shapes are compiled.
        rows = min(most, 1 << (len(mine) - 1).bit_length())
        ids = np.zeros((rows, width), np.int32)
        types = np.zeros((rows, width), np.int32)
        for row, member in enumerate(mine):
          first, second = pairs[member]
          limit = len(first) + len(second)
          ids[row, :limit] = first + second
          types[row, len(first) : limit] = 1
        found = embed(self._params, jnp.asarray(ids), jnp.asarray(types))
        emb_BE[mine] = np.asarray(found)[: len(mine)]
    return emb_BE


def _lengths(
    config: config_lib.Config, query: int | None, passage: int | None
) -> config_lib.LengthsConfig:
  """The lengths of a config or of the user, within what the model knows."""
  positions = config.model.max_positions
  for name, value in (('query', query), ('passage', passage)):
    if value is not None and not 4 <= value <= positions:
      raise ValueError(
          f'{name}_length={value}: the model takes 4 to {positions}.'
      )
  return config_lib.LengthsConfig(
      query=query or min(config.lengths.query, positions),
      document=passage or min(config.lengths.document, positions),
  )


def _checked(texts: Sequence[str]) -> list[str]:
  if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
    raise ValueError('Give a list of strings.')
  return list(texts)
