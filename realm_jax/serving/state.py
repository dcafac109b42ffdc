"""One state of a workdir that is served: parameters, index and documents.

A state never changes. A new checkpoint, generation or version of the documents
gives a new state, which shares what was compiled with the state before it.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import textwrap
import time
from typing import Any

import numpy as np

from realm_jax import config as config_lib
from realm_jax.builder import document_store
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.evaluation import inspect
from realm_jax.index import generation as generation_lib
from realm_jax.inference import answering
from realm_jax.inference import trained as trained_lib
from realm_jax.runtime import checkpoint

log = logging.getLogger(__name__)

OPERATIONS = ('ask', 'fill', 'search', 'embed')
MAX_RESULTS = 100  # Passages of a search.
MAX_EMBEDDED = 256  # Texts of a request.
_MAX_BATCH = 16  # Requests in a batch.
_BATCH_WORDPIECES = 2**14  # In a batch that the reader reads.
_EXAMPLES = 3
_MAX_REASON = 200  # Characters of an error of a library.

# How a workdir comes to an operation that it lacks; with its own sizes.
_TRAIN = (
    'Train the objective {0}: `realm-jax train'
    ' --config=experiments/quickstart.py:{0} --workdir=runs/{0} {1}`, and serve'
    ' runs/{0}.'
)

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Identity:
  """The files that a state was opened from; equal states answer alike.

  checkpoint, generation: steps.
  manifest: SHA-256 of the generation's manifest.
  created: time of the generation, in seconds of the epoch.
  documents: version of the documents.
  """

  checkpoint: int | None = None
  generation: int | None = None
  manifest: str | None = None
  created: float | None = None
  documents: int = 0

  def is_older(self, other: 'Identity') -> bool:
    """Whether the checkpoint or the generation is of an earlier step."""
    pairs = (
        (self.checkpoint, other.checkpoint), (self.generation, other.generation)
    )
    return any(
        own is not None and its is not None and own < its for own, its in pairs
    )


@dataclasses.dataclass(frozen=True)
class _Retriever:
  """An index, its manifest, and the parameters that embed queries for it."""

  params: trained_lib.Params
  index: trained_lib.Index
  manifest: dict[str, Any]


class State:
  """The operations of a workdir; `missing` has the reasons for the rest.

  identity: the files it was opened from.
  missing: by operation, what is missing and the command that makes it.
  refused: why an older checkpoint or generation is served than the newest.
  """

  def __init__(
      self, workdir: pathlib.Path, like: 'State | None' = None,
      corpus: str | None = None,
  ):
    """Opens the newest sound checkpoint and generation of a workdir.

    The workdir may still be empty. What `like`, a state of the same workdir,
    compiled is used again. `corpus` is where the corpus is now, if it moved.
    """
    self.workdir = workdir
    self.identity = Identity()
    self.missing: dict[str, str] = {}
    self.refused: str | None = None
    self.num_passages: int | None = None
    self.trained: trained_lib.Trained | None = None
    self._retriever: _Retriever | None = None
    self._open_qa: answering.OpenQA | None = None
    self._inspector: inspect.Inspector | None = None
    try:
      self._open(like, corpus)
    # Orbax and TFDS raise errors of many classes for damaged files.
    except Exception as error:
      reason = one_line(error)
      log.warning('%s cannot be used: %s', workdir, reason)
      self.missing = dict.fromkeys(OPERATIONS, reason)

  def _open(self, like: 'State | None', corpus: str | None) -> None:
    lost, version = '', 0
    try:
      trained = _opened(self.workdir, like, corpus)
      version = trained.documents.version
      self.num_passages = trained.corpus.num_live
    except FileNotFoundError as error:  # The corpus: a text can be embedded.
      trained = trained_lib.Trained.open_parameters(self.workdir, corpus)
      lost = one_line(error)
    self.trained = trained
    step, params, self.refused = _newest_checkpoint(trained)
    self.identity = Identity(step, documents=version)
    if 'embedder' not in params:
      reason = self._lacks('retriever', 'ict')
      self.missing = dict.fromkeys(OPERATIONS, reason)
      return
    self._embedder = params
    if lost:
      self.missing = dict.fromkeys(('ask', 'fill', 'search'), lost)
      return
    retriever: _Retriever | None = None
    try:
      retriever = self._retriever = self._open_retriever(step, params)
    except (FileNotFoundError, ValueError) as error:
      for name in ('ask', 'fill', 'search'):
        self.missing[name] = one_line(error)
    if retriever is not None:
      manifest, self._embedder = retriever.manifest, retriever.params
      self.identity = Identity(
          step, manifest['step'], manifest['manifest_sha256'],
          manifest['created'], version,
      )
    if 'span_reader' not in params:
      self.missing['ask'] = self._lacks('reader of answers', 'open_qa')
    elif retriever is not None:
      before = like._open_qa if like else None
      self._open_qa = answering.OpenQA(
          trained, step, params, retriever.index, before
      )
    if 'reader' not in params:
      self.missing['fill'] = self._lacks('reader', 'realm')
    elif retriever is not None:
      self._inspector = inspect.Inspector(
          trained, step, params, retriever.index
      )

  def _open_retriever(
      self, step: int, params: trained_lib.Params
  ) -> _Retriever:
    trained = self.trained
    assert trained is not None
    fixed = config_lib.documents_are_frozen(trained.config)
    if fixed or trained.config.objective == 'open_qa':
      # The index of the training, or of these very parameters.
      index = trained.saved_index(params, step)
      index = index or trained.published(params, step)
    else:
      index, params, refused = _newest_generation(trained, params)
      self.refused = self.refused or refused
    index = _in_memory(index)
    search = index.make_search(trained.config.mips)
    manifest = index.generation.manifest
    loaded = trained_lib.Index(search, index.table, manifest['step'])
    return _Retriever(params, loaded, manifest)

  def _lacks(self, what: str, objective: str) -> str:
    """Returns why an operation is missing, with the command of its stage."""
    assert self.trained is not None
    config = self.trained.config
    flags = [
        f'--config.corpus={config.corpus or "CORPUS"}',
        f'--config.init_from={self.workdir}',
        f'--config.model.preset={config.model.preset}',
        f'--config.lengths.query={config.lengths.query}',
        f'--config.lengths.document={config.lengths.document}',
    ]
    if objective == 'open_qa':
      flags.append('--config.open_qa.questions=QUESTIONS.jsonl')
    if objective != 'ict':
      flags.append('--with_index_builder')
    return (
        f'{self.workdir} has no {what}: its objective is'
        f' {config.objective!r}. ' + _TRAIN.format(objective, ' '.join(flags))
    )

  @property
  def largest_batch(self) -> int:
    """Requests of the largest batch that is worth its padding."""
    if self.trained is None or self._retriever is None:
      return 1
    config, reads = self.trained.config, self._open_qa is not None
    candidates = config.open_qa.read if reads else config.num_candidates
    each = candidates * config.lengths.joint
    return min(max(_BATCH_WORDPIECES // each, 1), _MAX_BATCH)

  def about(self) -> Json:
    """Returns what is served, as JSON."""
    created = self.identity.created
    found = {
        'workdir': str(self.workdir),
        **self.source(),
        'index_age_seconds': None if created is None else time.time() - created,
        'missing': self.missing,
    }
    if self.trained is not None and 'embed' not in self.missing:
      config = self.trained.config
      found |= {
          'objective': config.objective,
          'passages': self.num_passages,
          'embedding_width': config.model.embedding_width,
          'query_wordpieces': self.trained.template.text_length - 2,
          'masks': config.lengths.masks,
      }
    return found

  def source(self) -> Json:
    """Returns the origin of a result: checkpoint, generation, documents."""
    return {
        'checkpoint': self.identity.checkpoint,
        'index_generation': self.identity.generation,
        'documents_version': self.identity.documents,
    }

  @functools.cached_property
  def examples(self) -> dict[str, list[str]]:
    """Questions of the corpus, and sentences with masks."""
    found: dict[str, list[str]] = {'ask': [], 'fill': []}
    if self.trained is None or self._retriever is None:
      return found
    corpus, config = self.trained.corpus, self.trained.config
    path = corpus.directory / 'questions.jsonl'
    if path.is_file():
      with open(path, encoding='utf-8') as file:
        records = map(json.loads, itertools.islice(file, 10_000))
        new = [r['question'] for r in records if r.get('held_out')]
      found['ask'] = new[:: max(len(new) // _EXAMPLES, 1)][:_EXAMPLES]
    for table in list(corpus.sentences.values())[::-1][:1]:
      for row in range(min(len(table), 100)):
        ids, spans = table.ids(row).tolist(), table.spans_of(row).tolist()
        start, limit = spans[0] if spans else (0, 0)
        fits = len(ids) + 2 <= self.trained.template.text_length
        if fits and 0 < limit - start <= config.lengths.masks:
          decode = corpus.tokenizer.decode
          masks = [inspect.MASK] * (limit - start)
          words = [decode(ids[:start]), *masks, decode(ids[limit:])]
          found['fill'].append(' '.join(filter(None, words)))
    found['fill'] = found['fill'][:_EXAMPLES]
    return found

  def note(self, text: str) -> str | None:
    """Returns a remark on a query that is longer than the model reads."""
    assert self.trained is not None
    limit = self.trained.template.text_length - 2
    count = len(self.trained.tokenizer.encode(text))
    if count <= limit:
      return None
    return (
        f'{count} wordpieces were given; the first {limit} are used'
        ' (config.lengths.query).'
    )

  def check(self, operation: str, text: str) -> None:
    """Raises ValueError if a text is no input of an operation."""
    if operation == 'fill' and self._inspector is not None:
      _, positions = self._inspector.query(text)
      most = self._inspector.trained.config.lengths.masks
      if len(positions) > most:
        raise ValueError(
            f'The sentence has {len(positions)} {inspect.MASK}; at most {most}'
            ' are possible (config.lengths.masks).'
        )

  def run(self, operation: str, texts: Sequence[str], size: int) -> list[Json]:
    """Runs `ask`, `fill` or `search` on texts, padded to `size` of them.

    Raises:
      ValueError: the operation is missing, or a text is wrong; see `check`.
    """
    if operation in self.missing:
      raise ValueError(self.missing[operation])
    run: dict[str, Callable[[list[str]], list[Json]]] = {
        'ask': self._ask, 'fill': self._fill, 'search': self._search,
    }
    # Static shapes: the last text is repeated.
    padded = [*texts, *[texts[-1]] * (size - len(texts))]
    return [
        {**found, 'source': self.source()}
        for found in run[operation](padded)[: len(texts)]
    ]

  def _ask(self, questions: list[str]) -> list[Json]:
    assert self._open_qa is not None
    answered = self._open_qa.answer(questions)
    assert isinstance(answered, list)
    return [answering.for_page(answer) for answer in answered]

  def _fill(self, sentences: list[str]) -> list[Json]:
    assert self._inspector is not None
    return [inspect.as_json(one) for one in self._inspector(sentences)]

  def _search(self, queries: list[str]) -> list[Json]:
    assert self.trained is not None and self._retriever is not None
    trained, retriever = self.trained, self._retriever
    ids_BQ = trained.template.encode(queries)
    query_emb_BE = trained.embed_queries(retriever.params, ids_BQ)
    # One k, so that one shape is compiled; a request takes the first ones.
    k = min(MAX_RESULTS, trained.corpus.num_live)
    rows_BK, score_BK = retriever.index.ranked(query_emb_BE, k)
    found = zip(rows_BK.tolist(), score_BK.tolist(), strict=True)
    return [{'rows': rows, 'scores': scores} for rows, scores in found]

  def embed(
      self, texts: Sequence[str], titles: Sequence[str] | None
  ) -> np.ndarray:
    """Embeds queries, or passages if there are titles: float32 [B, E].

    Raises:
      ValueError: there is no retriever.
    """
    if 'embed' in self.missing:
      raise ValueError(self.missing['embed'])
    assert self.trained is not None
    trained = self.trained
    if titles is not None:
      pairs = list(zip(titles, texts, strict=True))
      return trained.embed_passages(self._embedder, pairs)
    ids_BQ = trained.template.encode(list(texts))
    return trained.embed_queries(self._embedder, ids_BQ)

  def passages(
      self, rows: Sequence[int], scores: Sequence[float]
  ) -> list[Json]:
    """Returns the texts of rows, best first."""
    assert self.trained is not None
    corpus = self.trained.corpus
    return [
        {'rank': rank, **corpus.passage_text(row), 'score': score}
        for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
    ]

  def warm_up(self, size: int) -> None:
    """Compiles every operation for batches of a size; some may get lost."""
    texts = {'ask': 'a', 'fill': inspect.MASK, 'search': 'a'}
    for operation, text in texts.items():
      try:
        if operation not in self.missing:
          self.run(operation, [text], size)
      except ValueError as error:  # Such as more candidates than passages.
        self.missing[operation] = one_line(error)
    if 'embed' not in self.missing and size == 1:
      self.embed(['a'], None)


def one_line(error: BaseException) -> str:
  """Returns the message of an error without line breaks."""
  text = ' '.join(str(error).split())
  if isinstance(error, (ValueError, OSError, ImportError)):
    return text
  return f'{type(error).__name__}: {text}'


def _opened(
    workdir: pathlib.Path, like: State | None, corpus: str | None
) -> trained_lib.Trained:
  if like is None or like.trained is None:
    return trained_lib.Trained.open(workdir, corpus)
  now = document_store.read_manifest(workdir / document_store.DIRECTORY)
  before, key = like.trained.documents.manifest, 'manifest_sha256'
  return like.trained if now[key] == before[key] else like.trained.reopened()


def _newest_checkpoint(
    trained: trained_lib.Trained,
) -> tuple[int, trained_lib.Params, str | None]:
  """Returns the newest sound checkpoint, and why a newer one is not it.

  Raises:
    FileNotFoundError: there is none.
    ValueError: none can be read; the reason of the newest.
  """
  folder = trained.workdir / checkpoint.CHECKPOINTS
  checkpoint.newest_step(trained.workdir)  # Raises, with the command.
  first: str | None = None
  for step in reversed(checkpoint.steps_in(folder)):
    try:
      return step, trained.load(step), first
    # For damaged files, Orbax raises errors of many classes and lengths.
    except Exception as error:
      reason = textwrap.shorten(one_line(error), _MAX_REASON)
      reason = f'The checkpoint {folder / str(step)} cannot be read: {reason}'
      log.warning('%s', reason)
      first = first or reason
  raise ValueError(first)


def _in_memory(index: document_store.Index) -> document_store.Index:
  """Copies the table, so that no change of a file harms what is served."""
  table = np.array(index.table[: index.table.shape[0]])
  base = table[: len(index.generation.embeddings)]
  loaded = dataclasses.replace(
      index.generation, embeddings=corpus_lib.Chained([base])
  )
  chained = corpus_lib.Chained([table])
  return dataclasses.replace(index, generation=loaded, table=chained)


def _newest_generation(
    trained: trained_lib.Trained, params: trained_lib.Params
) -> tuple[document_store.Index, trained_lib.Params, str | None]:
  """Returns the newest sound generation, with the parameters that made it.

  The third result says why a newer one is not returned, if there is one.

  Raises:
    FileNotFoundError, ValueError: there is none; the reason of the newest.
  """
  documents = trained.documents
  base = documents.parts[0]
  first: Exception | None = None
  for step in reversed(checkpoint.steps_in(base.index)):
    try:
      manifest = generation_lib.read_manifest(base.index / str(step))
      index = documents.index(step)
      digest = checkpoint.params_digest(params['embedder'])
      if manifest['params_digest'] != digest:
        params = {'embedder': documents.load_params(manifest)}
      return index, params, None if first is None else one_line(first)
    except (FileNotFoundError, ValueError) as error:
      log.warning('Generation %d is not served: %s', step, one_line(error))
      first = first or error
  if first is not None:
    raise first
  documents.newest()  # Raises, with the command.
  raise AssertionError
