"""A workdir opened for use: parameters by step, search and reading.

Evaluation, inference, export and the public API open workdirs here. Nothing in
a workdir is changed.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.index import embedding
from realm_jax.index import generation as generation_lib
from realm_jax.index import search as search_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer.stages import realm

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]
Params = dict[str, components_lib.Params]

_SEARCH_BATCH = 1024  # Queries in one search.
_QUERY_BATCHES = (1, 4, 16, 64, 256)  # Batch sizes that are compiled.
# Size of a batch of logits, [B, K, M, V]: 256 MiB of float32.
_MAX_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class Index:
  """Embeddings of all documents.

  search: exact, without the removed documents.
  table: of all rows.
  generation: step of the generation; None: the corpus was embedded here.
  """

  search: search_lib.Search
  table: search_lib.Rows
  generation: int | None

  def ranked(
      self, query_emb_BE: np.ndarray, k: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best rows of each query, and their scores; [B, k].

    Raises:
      ValueError: there are fewer than k documents.
    """
    rows, scores = [], []
    for start in range(0, len(query_emb_BE), _SEARCH_BATCH):
      some_BE = query_emb_BE[start : start + _SEARCH_BATCH]
      rows.append(np.asarray(self.search.search(some_BE, k)))
      scores.append(search_lib.score(self.table, some_BE, rows[-1]))
    return np.concatenate(rows), np.concatenate(scores)


@dataclasses.dataclass(frozen=True)
class Trained:
  """An opened workdir; parameters are loaded by step.

  config: resolved, with the size of the vocabulary.
  components: of the checkpoints, without parameters.
  moved: where the corpus is now; None: where the config says.
  another: whether `moved` may be another corpus.
  """

  workdir: pathlib.Path
  config: config_lib.Config
  components: dict[str, components_lib.Component]
  moved: pathlib.Path | None = None
  another: bool = False

  @classmethod
  def open(
      cls, workdir: Path, corpus: Path | None = None, another: bool = False
  ) -> 'Trained':
    """Opens a workdir with its documents, or with another corpus.

    The documents are the training corpus with all later additions and removals.
    `corpus` is where the training corpus is now; None: where it was. With
    `another`, it may be another one, which then replaces all documents.

    Raises:
      FileNotFoundError: there is no such workdir, checkpoint or corpus.
      ValueError: the corpus has another tokenizer than the checkpoint, or the
        documents are not those of training.
    """
    trained = cls.open_parameters(workdir, corpus, another)
    opened = trained.corpus
    saved = checkpoint.saved_about(
        trained.workdir, checkpoint.newest_step(trained.workdir)
    )
    found = {'tokenizer_digest': opened.tokenizer.digest}
    if not another:
      found['corpus_fingerprint'] = trained.documents.manifest['origin']
    for name, digest in found.items():
      if saved[name] != digest:
        raise ValueError(
            f'The corpus {opened.directory} is not what the model was trained'
            f' on: {name} {digest[:16]}, {saved[name][:16]} in the checkpoint.'
        )
    return trained

  def reopened(self) -> 'Trained':
    """Opens the present documents; what was compiled stays in use.

    Raises: see `open`.
    """
    fresh = Trained.open(self.workdir, self.moved, self.another)
    for name in ('_embedder', '_read'):
      if name in self.__dict__:
        fresh.__dict__[name] = self.__dict__[name]
    return fresh

  @classmethod
  def open_parameters(
      cls, workdir: Path, corpus: Path | None = None, another: bool = False
  ) -> 'Trained':
    """Opens a workdir for its parameters; its documents are not opened.

    Raises:
      FileNotFoundError: there is no such workdir or checkpoint.
      ValueError: the workdir is damaged.
    """
    workdir = pathlib.Path(workdir)
    config = config_lib.resolve(config_lib.read(workdir))
    names = sorted(checkpoint.abstract_in(workdir))
    moved = None if corpus is None else pathlib.Path(corpus)
    trained = cls(workdir, config, {}, moved, another)
    if not config.model.vocab_size:
      trained.tokenizer.complete(config.model)
    trained.components.update(components_lib.make_all(names, config.model))
    return trained

  @functools.cached_property
  def documents(self) -> document_store.Documents:
    """All documents; a ValueError says that the config names no corpus."""
    return document_store.Documents.open(
        self.workdir, self.config, self.moved, self.another
    )

  @property
  def corpus(self) -> corpus_lib.Corpus:
    """All documents as one corpus."""
    return self.documents.corpus

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer of the workdir; one of an older version has its corpus'.

    Raises:
      FileNotFoundError: there is neither.
      ValueError: it is not what the checkpoint was trained with.
    """
    if not (self.workdir / 'vocab.txt').is_file():
      return self.corpus.tokenizer
    found = tokenizer_lib.Tokenizer.from_saved(self.workdir)
    step = checkpoint.newest_step(self.workdir)
    saved = checkpoint.saved_about(self.workdir, step)['tokenizer_digest']
    if found.digest != saved:
      raise ValueError(
          f'{self.workdir}/vocab.txt is not what the model was trained with:'
          f' tokenizer_digest {found.digest[:16]}, {saved[:16]} in the'
          ' checkpoint.'
      )
    return found

  def load(self, step: int) -> Params:
    """Loads the parameters of a checkpoint, or of a snapshot (embedder only).

    Raises:
      FileNotFoundError: there is neither; lists the available steps.
    """
    check_steps(self.workdir, [step])
    if step in steps_available(self.workdir)[0]:
      wanted = {name: c.abstract for name, c in self.components.items()}
      return checkpoint.load_params(self.workdir, wanted, step)[0]
    params, _ = checkpoint.load_snapshot(
        self.workdir, step, self.components['embedder'].abstract
    )
    return {'embedder': params}

  def published(self, params: Params, step: int) -> document_store.Index:
    """Returns the published embeddings of all documents by these parameters.

    The message of an error names the step.

    Raises:
      FileNotFoundError: there is no generation of these parameters.
      ValueError: it is damaged, or of another corpus.
    """
    build, condition = 'index', ', with a corpus in its config.'
    if self.config.corpus or self.moved:
      digest, given = self._embedded_by(params, step)
      try:
        found = self.documents.find(digest)
      except FileNotFoundError as error:
        return self._without_corpus(digest, error)
      if found is not None:
        return self.documents.index(found, given)
      condition = '.'
      if self.documents.is_compacted:
        build, condition = 'index compact', ', after `realm-jax index`.'
    raise FileNotFoundError(
        f'{self.workdir} has no index of the retriever of step {step}. Build'
        f' it: `realm-jax {build} --workdir={self.workdir}`{condition}'
    )

  def _without_corpus(
      self, params_digest: str, error: FileNotFoundError
  ) -> document_store.Index:
    """Returns the index of a corpus that is gone and was never changed."""
    folder = self.workdir / generation_lib.DIRECTORY
    saved = checkpoint.saved_about(
        self.workdir, checkpoint.newest_step(self.workdir)
    )
    corpus = saved['corpus_fingerprint']
    lineage = generation_lib.Lineage(
        params_digest=params_digest,
        tokenizer_digest=saved['tokenizer_digest'],
        corpus_fingerprint=corpus,
        width=self.config.model.embedding_width,
    )
    found = document_store.find(folder, corpus, params_digest)
    documents = self.workdir / document_store.DIRECTORY
    changed = document_store.read_manifest(documents)['version']
    if found is None or changed or self.moved:
      raise error
    log.warning('%s The index is searched; passages have no text.', error)
    loaded = generation_lib.load(folder / str(found['step']), lineage)
    removed = np.zeros(0, np.int64)
    return document_store.Index(loaded, loaded.embeddings, removed)

  def index(self, params: Params, step: int | None = None) -> Index:
    """Returns an exact search of the documents by these parameters.

    Frozen documents keep the embeddings of the training. The step is that of
    the parameters' checkpoint or snapshot, if any.

    Raises:
      FileNotFoundError: the index of the training does not exist any more.
      ValueError: it is damaged.
    """
    found = self.saved_index(params, step)
    if found is not None:
      return _exact(found)
    with tqdm.tqdm(
        total=len(self.corpus.passages), desc='embedding the corpus',
        unit='passage', disable=None,
    ) as bar:
      embedder = params['embedder']
      embeddings_NE = self._embed_passages(embedder, progress=bar.update)
    search = search_lib.ExactSearch(embeddings_NE, removed=self.corpus.removed)
    return Index(search, embeddings_NE, None)

  def saved_index(
      self, params: Params, step: int | None = None
  ) -> document_store.Index | None:
    """Opens the generation that `index` searches; None: there is none.

    Args and Raises: see `index`.
    """
    digest, given = self._embedded_by(params, step)
    generation = self.documents.find(digest)
    if generation is None:
      return None
    return self.documents.index(generation, given)

  def _embedded_by(
      self, params: Params, step: int | None
  ) -> tuple[str, Callable[[], components_lib.Params] | None]:
    """Returns the digest of the parameters that embed the documents.

    And the parameters, if they are those given: frozen documents keep the
    embeddings of the generation that the checkpoint was trained with.
    """
    frozen = config_lib.documents_are_frozen(self.config)
    if frozen and step in steps_available(self.workdir)[0]:
      about = checkpoint.saved_about(self.workdir, step)
      generation = about.get('index_generation')
      if generation is not None:  # None: no index was used.
        path = self.workdir / generation_lib.DIRECTORY / str(generation)
        return generation_lib.read_manifest(path)['params_digest'], None
    embedder = params['embedder']
    return checkpoint.params_digest(embedder), lambda: embedder

  def newest_index(self) -> Index:
    """Returns an exact search of the newest generation.

    Raises:
      FileNotFoundError: there is no generation.
      ValueError: it is damaged, or of another corpus.
    """
    return _exact(self.documents.index(self.documents.newest()['step']))

  def embed_queries(
      self, params: Params, query_ids_BQ: np.ndarray
  ) -> np.ndarray:
    """Embeds any number of `[CLS] x [SEP]`: float32 numpy, [B, E].

    The retriever's prefix is put in front of x.
    """
    embed = functools.partial(self._embedder.queries, params['embedder'])
    return _in_batches(embed, self.template.queries(query_ids_BQ))

  def embed_passages(
      self, params: Params, passages: Sequence[tuple[str, str]]
  ) -> np.ndarray:
    """Embeds pairs of title and body: float32 numpy, [B, E]."""
    table = corpus_lib.encode_passages(passages, self.tokenizer)
    arrays = self.template.documents(table, np.arange(len(table)))
    return self.embed_documents(params, *arrays)

  def embed_documents(
      self, params: Params, doc_ids_BS: np.ndarray, doc_types_BS: np.ndarray
  ) -> np.ndarray:
    """Embeds inputs of `Template.documents`: float32 numpy, [B, E]."""
    embed = functools.partial(self._embedder.documents, params['embedder'])
    return _in_batches(embed, doc_ids_BS[:, None], doc_types_BS[:, None])[:, 0]

  def reading_batch_size(self, num_candidates: int, num_masks: int) -> int:
    """Returns the largest batch of sentences within bounded memory."""
    each = num_candidates * num_masks * self.config.model.vocab_size
    return max(1, min(self.config.batch_size, _MAX_LOGITS // each))

  def read(self, params: Params, batch: realm.Batch) -> dict[str, np.ndarray]:
    """Scores and reads the candidates of a batch of `with_candidates`.

    Returns, as numpy arrays:
      score_BK, logp_BK: inner products, and log p(z|x); candidate 0 is null.
      target_logp_BKM: log p(y_j|z,x) of batch.targets_BM.
      best_BKM, best_logp_BKM: the likeliest wordpiece with each candidate.
      marginal_best_BM, marginal_logp_BM: the likeliest wordpiece by
        sum_z p(y_j|z,x) p(z|x).
    """
    found = self._read(params, batch)
    return {name: np.asarray(value) for name, value in found.items()}

  @functools.cached_property
  def template(self) -> inputs.Template:
    """The form of the retriever's queries and documents."""
    return inputs.Template.of(
        self.config.model, self.config.lengths, self.tokenizer
    )

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
  def _embedder(self) -> embedding.Embedder:
    component = self.components['embedder']
    return embedding.Embedder(component, mesh_lib.one_device())

  @functools.cached_property
  def _read(self) -> Any:
    searches = 'embedder' in self.components
    null = self.template.null

    def read(params: Params, batch: realm.Batch) -> dict[str, Any]:
      models = components_lib.bind(self.components, params)
      if searches:
        known = null if self.config.null_document else None
        score_BK = realm.candidate_scores(models.embedder, batch, known)
      else:  # The null document is the only candidate.
        score_BK = jnp.zeros(batch.joint_ids_BKT.shape[:2])
      b, k, t = batch.joint_ids_BKT.shape
      logits = models.reader.mlm_logits(
          batch.joint_ids_BKT.reshape(b * k, t),
          batch.joint_types_BKT.reshape(b * k, t),
          jnp.repeat(batch.positions_BM, k, axis=0),
      )
      logits_BKMV = logits.reshape(b, k, *logits.shape[1:])
      logp_BK = jax.nn.log_softmax(score_BK)
      logp_BKMV = jax.nn.log_softmax(logits_BKMV)
      targets_BKM1 = jnp.broadcast_to(
          batch.targets_BM[:, None, :, None], (*logp_BKMV.shape[:3], 1)
      )
      joint_BKMV = logp_BK[..., None, None] + logp_BKMV
      marginal_BMV = jax.nn.logsumexp(joint_BKMV, axis=1)
      target_BKM1 = jnp.take_along_axis(logp_BKMV, targets_BKM1, axis=-1)
      return {
          'score_BK': score_BK,
          'logp_BK': logp_BK,
          'target_logp_BKM': target_BKM1[..., 0],
          'best_BKM': logp_BKMV.argmax(-1),
          'best_logp_BKM': logp_BKMV.max(-1),
          'marginal_best_BM': marginal_BMV.argmax(-1),
          'marginal_logp_BM': marginal_BMV.max(-1),
      }

    return jax.jit(read)


def _exact(found: document_store.Index) -> Index:
  search = search_lib.ExactSearch(found.table, removed=found.removed)
  return Index(search, found.table, found.generation.lineage.step)


def _in_batches(
    embed: Callable[..., jax.Array], *arrays: np.ndarray
) -> np.ndarray:
  """Embeds rows in batches of few sizes, each of which is compiled once."""
  parts, largest = [], _QUERY_BATCHES[-1]
  for start in range(0, len(arrays[0]), largest):
    some = [array[start : start + largest] for array in arrays]
    count = len(some[0])
    size = next(size for size in _QUERY_BATCHES if size >= count)
    embedded = embed(*(pad_rows(array, size) for array in some))
    parts.append(np.asarray(embedded)[:count])
  return np.concatenate(parts)


def steps_available(workdir: Path) -> tuple[list[int], list[int]]:
  """Returns the steps of checkpoints and of retriever snapshots."""
  workdir = pathlib.Path(workdir)
  return (
      checkpoint.steps_in(workdir / checkpoint.CHECKPOINTS),
      checkpoint.snapshot_steps(workdir),
  )


def check_steps(
    workdir: Path, steps: Iterable[int], with_snapshots: bool = True
) -> None:
  """Raises a FileNotFoundError if a step cannot be loaded."""
  checkpoints, snapshots = steps_available(workdir)
  snapshots = snapshots if with_snapshots else []
  for step in steps:
    if step not in (*checkpoints, *snapshots):
      raise FileNotFoundError(
          f'{workdir} has nothing of step {step}: checkpoints {checkpoints},'
          f' retriever snapshots {snapshots}.'
      )


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
  """Repeats the last row, so that all batches have one compiled shape."""
  widths = [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)]
  return np.pad(array, widths, mode='edge')
