"""A trained workdir opened for use: its parameters, its search, its readings.

Public: `Trained`, `Index`, `steps_available`, `pad_rows`. What is evaluated or
inspected comes through here; nothing in a workdir is changed.
"""

from collections.abc import Callable
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.builder import documents as documents_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.models import realm
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.runtime import snapshots as snapshots_lib

Params = dict[str, components_lib.Params]

_QUERY_BATCHES = (1, 4, 16, 64, 256)  # Sizes that are compiled, as needed.
# Scores of the vocabulary at once, [B, K, M, V]: 256 MiB of float32.
_MAX_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class Index:
  """Embeddings of all documents.

  search: exact, over those that were not removed.
  table: of all of them, by row.
  generation: that served for it; None if the corpus had to be embedded here.
  """

  search: search_lib.Search
  table: search_lib.Rows
  generation: int | None


@dataclasses.dataclass(frozen=True)
class Trained:
  """What is fixed about a trained model; parameters are loaded by step."""

  workdir: pathlib.Path
  config: config_lib.Config  # Resolved.
  documents: documents_lib.Documents
  components: dict[str, components_lib.Component]

  @classmethod
  def open(
      cls,
      workdir: pathlib.Path | str,
      corpus: pathlib.Path | str | None = None,
  ) -> 'Trained':
    """Opens a workdir over its documents, or over another corpus.

    Its documents are the corpus that it was trained on, with what was added to
    it and removed from it since.

    Raises:
      FileNotFoundError: no such workdir, checkpoint or corpus.
      ValueError: the corpus is not the one it was trained on and was not asked
        for, or has another tokenizer.
    """
    workdir = pathlib.Path(workdir)
    config = config_lib.resolve(config_lib.read(workdir))
    documents = documents_lib.Documents.open(workdir, config, corpus)
    opened = documents.corpus
    saved = checkpoint.saved_about(
        workdir, checkpoint.newest_step(workdir)
    )
    _compare('tokenizer_digest', saved, opened.tokenizer.digest, opened)
    if corpus is None:
      origin = documents.edition.origin
      _compare('corpus_fingerprint', saved, origin, opened)
    config = documents.config
    return cls(workdir, config, documents, components_lib.make_all(config))

  @property
  def corpus(self) -> corpus_lib.Corpus:
    """All documents."""
    return self.documents.corpus

  @property
  def null_ids(self) -> tuple[int, int, int]:
    """The null document, `[CLS] [SEP] [SEP]`."""
    return inputs.null_document(self.corpus.tokenizer)

  def load(self, step: int) -> Params:
    """Loads the parameters of a checkpoint, or of a snapshot (embedder only).

    Raises:
      FileNotFoundError: there is neither, naming those there are.
    """
    checkpoints, snapshots = steps_available(self.workdir)
    if step in checkpoints:
      wanted = {name: c.abstract for name, c in self.components.items()}
      return checkpoint.load_params(self.workdir, wanted, step)[0]
    if step in snapshots:
      params, _ = snapshots_lib.load(
          self.workdir, step, self.components['embedder'].abstract
      )
      return {'embedder': params}
    raise FileNotFoundError(
        f'{self.workdir} has nothing of step {step}: checkpoints'
        f' {checkpoints}, retriever snapshots {snapshots}.'
    )

  def index(self, params: Params, step: int | None = None) -> 'Index':
    """The documents' embeddings by these parameters, searched exactly.

    Where documents were frozen while questions were trained on, those that were
    trained with instead.

    Args:
      params: with an embedder.
      step: of the checkpoint or snapshot that they are from, if any.

    Raises:
      FileNotFoundError: the index that was trained with is gone.
      ValueError: it is damaged.
    """
    config, removed = self.config, self.corpus.removed
    given: Callable[[], components_lib.Params] | None = None
    if (
        step in steps_available(self.workdir)[0]
        and config.objective == 'open_qa'
        and config.open_qa.documents == 'frozen'
    ):
      assert step is not None
      about = checkpoint.saved_about(self.workdir, step)
      generation = about['index_generation']
    else:
      given = functools.partial(params.__getitem__, 'embedder')
      generation = self.documents.find(
          checkpoint.params_digest(params['embedder'])
      )
    if generation is not None:
      found = self.documents.index(generation, given)
      search = search_lib.ExactSearch(found.table, removed=found.removed)
      return Index(search, found.table, generation)
    with tqdm.tqdm(
        total=len(self.corpus.passages),
        desc='embedding the corpus',
        unit='passage',
        disable=None,
    ) as bar:
      embeddings_NE = self._embed_passages(
          params['embedder'], progress=bar.update
      )
    search = search_lib.ExactSearch(embeddings_NE, removed=removed)
    return Index(search, embeddings_NE, None)

  def published_search(self) -> tuple[search_lib.Search, int]:
    """An exact search of the newest generation, made from any parameters.

    Returns:
      The search, and the step of the generation.

    Raises:
      FileNotFoundError: there is no generation.
      ValueError: it is damaged, or of another corpus.
    """
    step = documents_lib.newest_generation(self.documents)['step']
    index = self.documents.index(step)
    return search_lib.ExactSearch(index.table, removed=index.removed), step

  def embed_queries(
      self, params: Params, query_ids_BQ: np.ndarray
  ) -> np.ndarray:
    """Embeds `[CLS] x [SEP]`, any number of them: float32 [B, E], in numpy."""
    parts, largest = [], _QUERY_BATCHES[-1]
    for start in range(0, len(query_ids_BQ), largest):
      part = query_ids_BQ[start : start + largest]
      size = next(size for size in _QUERY_BATCHES if size >= len(part))
      padded = pad_rows(part, size)
      emb_BE = self._embed_query(params['embedder'], padded)
      parts.append(np.asarray(emb_BE)[: len(part)])
    return np.concatenate(parts)

  def reading_batch_size(self, num_candidates: int, num_masks: int) -> int:
    """How many sentences can be read at once within bounded memory."""
    each = num_candidates * num_masks * self.config.model.vocab_size
    return max(1, min(self.config.batch_size, _MAX_LOGITS // each))

  def read(self, params: Params, batch: inputs.Batch) -> inputs.Batch:
    """Scores and reads the candidates of a batch of `with_candidates`.

    Returns, as numpy arrays:
      score_BK, logp_BK: inner products, and log p(z|x); candidate 0 is null.
      target_logp_BKM: log p(y_j|z,x) of batch['targets_BM'].
      best_BKM, best_logp_BKM: the likeliest wordpiece with each candidate.
      marginal_best_BM, marginal_logp_BM: that of sum_z p(y_j|z,x) p(z|x).
    """
    names = (
        'query_ids_BQ doc_ids_BJS doc_types_BJS joint_ids_BKT joint_types_BKT'
        ' positions_BM targets_BM'
    ).split()
    found = self._read(params, {name: batch[name] for name in names})
    return {name: np.asarray(value) for name, value in found.items()}

  @functools.cached_property
  def _embed_passages(self) -> embedding.PassageEmbedder:
    return embedding.PassageEmbedder(
        self.components['embedder'],
        self.corpus.passages,
        self.corpus.tokenizer,
        self.config.lengths.document,
        mesh_lib.make_mesh(config_lib.MeshConfig()),
    )

  @functools.cached_property
  def _embed_query(self) -> Any:
    embedder = self.components['embedder']
    return jax.jit(
        lambda params, ids_BQ: embedder.apply(params, 'embed_query', ids_BQ)
    )

  @functools.cached_property
  def _read(self) -> Any:
    embedder = self.components.get('embedder')
    reader = self.components['reader']

    def read(params: Params, batch: dict[str, jax.Array]) -> dict[str, Any]:
      if embedder is None:  # There is just the null document.
        score_BK = jnp.zeros(batch['joint_ids_BKT'].shape[:2])
      else:
        score_BK = realm.candidate_scores(
            embedder,
            params['embedder'],
            batch['query_ids_BQ'],
            batch['doc_ids_BJS'],
            batch['doc_types_BJS'],
            self.null_ids if self.config.null_document else None,
        )
      logits_BKMV = realm.read(
          reader,
          params['reader'],
          batch['joint_ids_BKT'],
          batch['joint_types_BKT'],
          batch['positions_BM'],
      )
      logp_BK = jax.nn.log_softmax(score_BK)
      logp_BKMV = jax.nn.log_softmax(logits_BKMV)
      targets_BKM1 = jnp.broadcast_to(
          batch['targets_BM'][:, None, :, None], (*logp_BKMV.shape[:3], 1)
      )
      marginal_BMV = jax.nn.logsumexp(
          logp_BK[..., None, None] + logp_BKMV, axis=1
      )
      return {
          'score_BK': score_BK,
          'logp_BK': logp_BK,
          'target_logp_BKM': jnp.take_along_axis(
              logp_BKMV, targets_BKM1, axis=-1
          )[..., 0],
          'best_BKM': logp_BKMV.argmax(-1),
          'best_logp_BKM': logp_BKMV.max(-1),
          'marginal_best_BM': marginal_BMV.argmax(-1),
          'marginal_logp_BM': marginal_BMV.max(-1),
      }

    return jax.jit(read)


def steps_available(
    workdir: pathlib.Path | str,
) -> tuple[list[int], list[int]]:
  """Steps of the checkpoints and of the retriever snapshots of a workdir."""
  workdir = pathlib.Path(workdir)
  return (
      checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS),
      snapshots_lib.steps_of(workdir),
  )


def _compare(
    name: str,
    saved: dict[str, Any],
    found: str,
    corpus: corpus_lib.Corpus,
) -> None:
  if saved[name] != found:
    raise ValueError(
        f'The corpus {corpus.directory} is not what the model was trained on:'
        f' {name} {found[:16]}, {saved[name][:16]} in the checkpoint.'
    )


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
  """Repeats the last row, so that batches of one shape compile once."""
  widths = [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)]
  return np.pad(array, widths, mode='edge')
