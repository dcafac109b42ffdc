"""`realm_jax.Retriever`: from texts to numpy vectors and passages."""

from collections.abc import Callable, Sequence
import functools
import os
from typing import Any, NamedTuple

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import cuts
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import bm25
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import sources
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib

_WIDTH_STEP = 32  # Bucket widths are multiples of it.
_BATCH_TOKENS = 2**13  # Maximum wordpieces of a batch.

Path = str | os.PathLike[str]


class Hits(NamedTuple):
  """Results of a search, best first.

  rows: int64 [B, k], passage numbers.
  scores: float32 [B, k], inner products; of a hybrid search, those of
    `bm25.fuse`.
  """

  rows: np.ndarray
  scores: np.ndarray


class Retriever:
  """Embeds and searches; `Retriever.load` makes one."""

  def __init__(
      self,
      component: components_lib.Component,
      params: components_lib.Params,
      tokenizer: tokenizer_lib.Tokenizer,
      lengths: config_lib.LengthsConfig,
      open_index: Callable[[], trained_lib.Index] | None = None,
      open_corpus: Callable[[], corpus_lib.Corpus] | None = None,
  ):
    """Calls `open_index` at the first search."""
    self.tokenizer = tokenizer
    self.lengths = lengths
    self.width = component.config.embedding_width
    self._params = jax.device_put(params)
    self._open_index = open_index
    self._open_corpus = open_corpus
    self._template = inputs.Template.of(component.config, lengths, tokenizer)
    self._embedder = embedding.Embedder(component, mesh_lib.one_device())
    self._reported: set[str] = set()  # Kinds of texts reported as cut.

  @classmethod
  def load(
      cls,
      path: Path,
      step: int | None = None,
      query_length: int | None = None,
      passage_length: int | None = None,
      corpus: Path | None = None,
  ) -> 'Retriever':
    """Loads a retriever from a workdir or a checkpoint.

    Args:
      path: a workdir; a folder that `realm-jax export --format=huggingface`
        wrote; a REALM checkpoint (embedder, scorer, open-QA), as a folder or a
        hub id; a folder of sentence-transformers.
      step: of a workdir's checkpoint or snapshot; None: the newest checkpoint.
      query_length, passage_length: maximum wordpieces of a text, specials
        included; None: those of the workdir, or the paper's.
      corpus: where the corpus of a workdir is now; None: where it was in
        training. Only passages and documents added since need it.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: it has no retriever, or is damaged.
    """
    if sources.looks_foreign(path):
      if step is not None:
        raise ValueError(f'{path} is a checkpoint, it has no steps.')
      return cls._from_checkpoint(path, query_length, passage_length)
    trained = trained_lib.Trained.open_parameters(path, corpus)
    if step is None:
      step = checkpoint.newest_step(trained.workdir)
    params = trained.load(step)
    if 'embedder' not in params:
      raise ValueError(f'{path} has no retriever, only {", ".join(params)}.')

    def open_index() -> trained_lib.Index:
      index = trained.published(params, step)
      search = index.make_search(trained.config.mips)
      return trained_lib.Index(search, index.table, step)

    return cls(
        trained.components['embedder'],
        params['embedder'],
        trained.tokenizer,
        _lengths(trained.config, query_length, passage_length),
        open_index,
        (lambda: trained.corpus) if trained.config.corpus or corpus else None,
    )

  @classmethod
  def _from_checkpoint(
      cls, path: Path, query_length: int | None, passage_length: int | None
  ) -> 'Retriever':
    source = sources.open_source(path, blocks=False)
    if 'embedder' not in source.components:
      raise ValueError(f'{path} has no retriever.')
    loaded = source.load(['embedder'])
    if loaded.fresh:
      raise ValueError(
          f'{path} is a BERT without a retriever: it lacks'
          f' {", ".join(loaded.fresh)}. Train it: `realm-jax import`, then'
          ' `realm-jax train` with the objective `ict`.'
      )
    table = loaded.block_emb

    def open_index() -> trained_lib.Index:
      assert table is not None
      rows = table.mapped()
      return trained_lib.Index(search_lib.ExactSearch(rows), rows, None)

    config = config_lib.resolve(config_lib.Config(model=loaded.config))
    source.set_lengths(config.lengths)
    return cls(
        components_lib.make('embedder', config.model),
        loaded.params['embedder'],
        source.tokenizer,
        _lengths(config, query_length, passage_length),
        open_index if table is not None else None,
    )

  @property
  def corpus(self) -> corpus_lib.Corpus:
    """The corpus that the rows refer to.

    Raises:
      ValueError: there is none.
    """
    if self._open_corpus is None:
      raise ValueError(
          'This retriever was loaded without a corpus. A workdir has one if'
          ' `config.corpus` names it; a checkpoint has one after `realm-jax'
          ' import`.'
      )
    return self._open_corpus()

  def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
    """Embeds `[CLS] text [SEP]`: float32 [B, E]."""
    ids_BQ = self._template.encode(_checked(texts))
    if 'queries' not in self._reported and cuts.warn_of_queries(
        texts, ids_BQ, self.tokenizer, 'queries', 'query_length'
    ):
      self._reported.add('queries')
    return self._embed(
        lambda ids_BQ: self._embedder.queries(self._params, ids_BQ),
        self._template.queries(ids_BQ),
    )

  def embed_passages(self, passages: Sequence[tuple[str, str]]) -> np.ndarray:
    """Embeds `[CLS] title [SEP] body [SEP]`: float32 [B, E].

    Args:
      passages: pairs of title and body; a title may be empty.
    """
    given: Sequence[Any] = passages
    if any(isinstance(p, str) or len(p) != 2 for p in given):
      raise ValueError('Each passage must be a pair (title, body).')
    for texts in zip(*given, strict=True):
      _checked(texts)
    table = inputs.passage_table(passages, self.tokenizer)
    if 'passages' not in self._reported and cuts.warn(
        'passages',
        self._template.lengths(table),
        self.lengths.document,
        'passage_length',
    ):
      self._reported.add('passages')
    arrays = self._template.documents(table, np.arange(len(table)))

    def embed(ids_BS: np.ndarray, types_BS: np.ndarray) -> jax.Array:
      return self._embedder.documents(
          self._params, ids_BS[:, None], types_BS[:, None]
      )[:, 0]

    return self._embed(embed, *arrays)

  def search(self, texts: Sequence[str], k: int, hybrid: bool = False) -> Hits:
    """Finds the k passages of the highest inner product with each text.

    Args:
      texts: the queries.
      k: number of passages.
      hybrid: joins the 100 best passages, or k if that is more, with as many of
        BM25, by reciprocal rank fusion. The first such search opens or builds
        the index of BM25, which is kept with the corpus.

    Raises:
      FileNotFoundError: the workdir has no index of these parameters.
      ImportError: `hybrid` needs the extra `[bm25]`.
      ValueError: there is no index, or fewer than k passages; or no corpus for
        `hybrid`.
    """
    if self._open_index is None:
      raise ValueError(
          'This retriever was loaded without an index. Load a workdir in which'
          ' `realm-jax index` built one, or an open-QA checkpoint.'
      )
    depth = k
    if hybrid:  # Loaded first: it fails at once where the extra is missing.
      depth = max(k, min(bm25.DEPTH, len(self._bm25)))
    index = self._index
    query_emb_BE = self.embed_queries(texts)
    if not len(query_emb_BE):
      return Hits(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
    rows_BK, score_BK = index.ranked(query_emb_BE, depth)
    if hybrid:
      by_words_BK, _ = self._bm25.search(list(texts), depth)
      rows_BK, score_BK = bm25.fuse(rows_BK, by_words_BK, k=k)
    return Hits(rows_BK.astype(np.int64), score_BK.astype(np.float32))

  @functools.cached_property
  def _index(self) -> trained_lib.Index:
    assert self._open_index is not None
    return self._open_index()

  @functools.cached_property
  def _bm25(self) -> bm25.Bm25:
    return bm25.Bm25.open(self.corpus)

  def passage(self, row: int) -> dict[str, str]:
    """Returns {id, title, text} of a row that `search` found."""
    return self.corpus.passage_text(int(row))

  def _embed(
      self, embed: Callable[..., jax.Array], *arrays_BL: np.ndarray
  ) -> np.ndarray:
    """Embeds padded rows, ids first, in few widths and batch sizes."""
    ids_BL = arrays_BL[0]
    emb_BE = np.zeros((len(ids_BL), self.width), np.float32)
    sizes = (ids_BL != self.tokenizer.pad_id).sum(axis=1)
    widths = np.minimum(-(-sizes // _WIDTH_STEP) * _WIDTH_STEP, ids_BL.shape[1])
    for width in np.unique(widths).tolist():
      members = np.flatnonzero(widths == width)
      most = max(1, _BATCH_TOKENS // width)
      for start in range(0, len(members), most):
        rows = members[start : start + most]
        # Powers of two limit the number of compiled shapes.
        size = min(most, 1 << (len(rows) - 1).bit_length())
        padding = ((0, size - len(rows)), (0, 0))
        batch = [np.pad(x_BL[rows, :width], padding) for x_BL in arrays_BL]
        emb_BE[rows] = np.asarray(embed(*batch))[: len(rows)]
    return emb_BE


def _lengths(
    config: config_lib.Config, query: int | None, passage: int | None
) -> config_lib.LengthsConfig:
  """Returns the lengths of the user or of the config, as the model allows."""
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
