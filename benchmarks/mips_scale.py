"""Search at full size: `scann` against FAISS, and `exact` from disk.

  python benchmarks/mips_scale.py --output=benchmarks/results/mips_scale.json \
      [--rows=N] [--folder=DIR] [--small]

Needs faiss-cpu and matplotlib. The vectors are random: 20,000 topics; articles,
two passages each on average, around them (0.8 of a topic's spread); passages
around articles (0.6), neighbours in the table; all three normal with a spectrum
that falls as i^-0.8 in one rotated basis (an exponent chosen by the recall of
ScaNN); a topic's share grows with its number's rank (u^1.5); then normalised as
by the embedder's LayerNorm. A query is a passage before its normalisation with
0.6 of noise.

Each part is a process of its own; its memory is the high-water mark of its
resident set, mapped pages included:

  write  shards, index, recall, manifest: a generation, as the builder does it
  exact  the best 8 of 1,000 queries, from the memory-mapped table
  faiss  IVF of as many lists, on a sample of as many rows, and PQ64 of 4 bits
         (FastScan) with residuals: 32 bytes a row, as ours
  serve  both loaded, in two processes that take turns. Settings are searched:
         for each number of candidates the fewest lists that reach the recall;
         the fastest of these counts. The same code ranks the candidates of
         both exactly, from the same memory-mapped table.
  growth milliseconds of a search over the number of rows and of queries

Measure on an idle machine. `--small` takes about two minutes. With --folder,
the parts that are finished are not run again.
"""

from collections.abc import Callable
from concurrent import futures
import contextlib
import functools
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any
from unittest import mock

import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.index import generation
from realm_jax.index import scann
from realm_jax.index import search as search_lib
from realm_jax.runtime import files

ROWS = 13_353_718
WIDTH = 128
K = 8
_TOPICS = 20_000
_QUERIES, _BATCH = 1000, 512
_RECALLS = (0.90, 0.95, 0.98)
_CANDIDATES = (50, 100, 200, 400, 800, 1600, 3200, 4800)
_KIND = 'PQ64x4fsr'

Figures = harness.Figures
_SPAWN = multiprocessing.get_context('spawn')


class Vectors:
  """The random rows; shard i depends on the seed and i alone."""

  def __init__(self, seed: int):
    self._seed = seed
    rng = np.random.default_rng([seed, 0])
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    spectrum = np.arange(1, WIDTH + 1) ** -0.8
    spectrum /= np.sqrt(np.square(spectrum).mean())
    self._basis = (rotation * spectrum).astype(np.float32)
    self._topics = self._normal(rng, _TOPICS)

  def _normal(self, rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal((count, WIDTH), np.float32) @ self._basis.T

  def _raw(self, shard: int) -> np.ndarray:
    rng = np.random.default_rng([self._seed, 1, shard])
    count = generation.ROWS_PER_SHARD
    articles = count // 2
    topic = (_TOPICS * rng.random(articles) ** 1.5).astype(np.int64)
    article = self._topics[topic] + 0.8 * self._normal(rng, articles)
    own = np.sort(rng.integers(0, articles, count))
    return article[own] + 0.6 * self._normal(rng, count)

  def shard(self, number: int, count: int) -> np.ndarray:
    """The first `count` rows of a shard."""
    return _normalised(self._raw(number)[:count])

  def table(self, rows: int) -> np.ndarray:
    size = generation.ROWS_PER_SHARD
    shards = [self.shard(number, size) for number in range(-(-rows // size))]
    return np.concatenate(shards)[:rows]

  def queries(self, rows: int) -> np.ndarray:
    """Returns queries for a table of this many rows."""
    rng = np.random.default_rng([self._seed, 2])
    parts = []
    for _ in range(8):
      shard = int(rng.integers(0, max(rows // generation.ROWS_PER_SHARD, 1)))
      size = min(rows, generation.ROWS_PER_SHARD)
      some = self._raw(shard)[rng.integers(0, size, _QUERIES // 8)]
      parts.append(some + 0.6 * self._normal(rng, len(some)))
    return _normalised(np.concatenate(parts))


def _normalised(rows_NE: np.ndarray) -> np.ndarray:
  rows_NE = rows_NE - rows_NE.mean(axis=1, keepdims=True)
  return rows_NE / np.sqrt(np.square(rows_NE).mean(axis=1, keepdims=True))


def _peak_gib() -> float:
  return harness.resident_mib(kind='VmHWM') / 1024


_CONFIG = config_lib.MipsConfig(backend='scann')


def _lineage(rows: int) -> generation.Lineage:
  return generation.Lineage(1, 'params', 'tokenizer', 'corpus', rows, WIDTH)


def _write(folder: pathlib.Path, rows: int, seed: int) -> Figures:
  vectors = Vectors(seed)
  spent: list[float] = []
  make = search_lib.make_search

  def timed_make(*args: Any, **kwargs: Any) -> search_lib.Search:
    seconds, search = harness.timed(functools.partial(make, **kwargs), *args)
    spent.append(seconds)
    return search

  start = time.perf_counter()
  with generation.Writer(folder / 'index', _lineage(rows)) as writer:
    size = generation.ROWS_PER_SHARD
    for number, first in enumerate(range(0, rows, size)):
      writer.add(vectors.shard(number, min(size, rows - first)))
    shards = time.perf_counter() - start
    with mock.patch.object(search_lib, 'make_search', timed_make):
      built, _ = harness.timed(writer.add_backend, _CONFIG)
    published, path = harness.timed(writer.publish)
  np.save(folder / 'queries.npy', vectors.queries(rows))
  leaves, to_search, reorder = scann.settings(_CONFIG, rows)
  return {
      'write_shards_seconds': shards,
      'build_seconds': spent[-1],
      'add_backend_seconds': built,
      'publish_seconds': published,
      'build_peak_gib': _peak_gib(),
      'num_leaves': leaves,
      'leaves_to_search': to_search,
      'reorder': reorder,
      'recall_in_manifest': writer.recall,
      'index_bytes_per_row': sum(
          file.stat().st_size for file in (path / 'scann').iterdir()
      ) / rows,
  }


def _open(folder: pathlib.Path, rows: int) -> generation.Generation:
  return generation.load(folder / 'index' / '1', _lineage(rows))


def _exact(folder: pathlib.Path, rows: int) -> Figures:
  queries = np.load(folder / 'queries.npy')
  search = search_lib.StreamedSearch(_open(folder, rows).embeddings).search
  first, found = harness.timed(search, queries, K)  # Compiles it.
  np.save(folder / 'exact.npy', found)
  return {
      'exact_streamed_seconds_1000_queries': min(
          first, harness.timed(search, queries, K)[0]
      ),
      'exact_streamed_seconds_512_queries': harness.timed(
          search, queries[:_BATCH], K
      )[0],
      'exact_streamed_peak_gib': _peak_gib(),
  }


def _faiss_build(folder: pathlib.Path, rows: int) -> Figures:
  import faiss

  faiss.omp_set_num_threads(os.cpu_count() or 1)
  table = _open(folder, rows).embeddings
  leaves, _, _ = scann.settings(_CONFIG, rows)
  lists = leaves or round(2 * rows**0.5)
  sample = table[np.arange(0, rows, max(rows // (40 * lists), 1))[: 40 * lists]]
  index = faiss.index_factory(
      WIDTH, f'IVF{lists},{_KIND}', faiss.METRIC_INNER_PRODUCT
  )

  def add() -> None:
    size = generation.ROWS_PER_SHARD
    for first in range(0, rows, size):
      index.add(np.ascontiguousarray(table[first : first + size]))
    faiss.write_index(index, str(folder / 'index.faiss'))

  return {
      'faiss_train_seconds': harness.timed(index.train, sample)[0],
      'faiss_add_seconds': harness.timed(add)[0],
      'faiss_build_peak_gib': _peak_gib(),
  }


class _Ours:
  """Our side."""

  def __init__(self, folder: pathlib.Path, rows: int):
    start = time.perf_counter()
    opened = _open(folder, rows)
    checked = time.perf_counter()
    self._search = opened.make_search(_CONFIG, None)
    self.about = {
        'load_check_seconds': checked - start,
        'load_seconds': time.perf_counter() - start,
    }
    self.most = self._search._leaves or 1

  def search(
      self, lists: int, candidates: int, queries: np.ndarray
  ) -> np.ndarray:
    self._search._leaves_to_search = lists
    self._search._reorder = candidates
    return self._search.search(queries, K)


class _Faiss:
  """FAISS's candidates, ranked by the code that ranks ours."""

  def __init__(self, folder: pathlib.Path, rows: int):
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    self._table, self._rows = _open(folder, rows).embeddings, rows
    seconds, self._index = harness.timed(
        faiss.read_index, str(folder / 'index.faiss')
    )
    self.about = {'load_seconds': seconds}
    self.most = self._index.nlist

  def search(
      self, lists: int, candidates: int, queries: np.ndarray
  ) -> np.ndarray:
    self._index.nprobe = lists
    _, found = self._index.search(queries, candidates)
    found = np.where(found < 0, self._rows, found)
    return search_lib.rank(self._table, queries, found, found < self._rows, K)


_served: Any = None  # Searcher, queries and exact results of a process.


def _serve(kind: str, folder: pathlib.Path, rows: int) -> None:
  global _served
  side = {'scann': _Ours, 'faiss': _Faiss}[kind](folder, rows)
  queries, exact = (
      np.load(folder / name) for name in ('queries.npy', 'exact.npy')
  )
  _served = side, queries, exact


def _about() -> tuple[Figures, int, float]:
  return _served[0].about, _served[0].most, _peak_gib()


def _recall(setting: tuple[int, int]) -> tuple[float, float]:
  side, queries, exact = _served
  found = side.search(*setting, queries)
  return search_lib.overlap(found, exact), _peak_gib()


def _ms(setting: tuple[int, int]) -> tuple[float, float]:
  side, queries, _ = _served
  seconds, _ = harness.timed(side.search, *setting, queries[:_BATCH])
  return 1e3 * seconds, _peak_gib()


def _growth(sizes: list[int], seed: int) -> Figures:
  vectors = Vectors(seed)
  table = vectors.table(max(sizes))
  queries = vectors.queries(min(sizes))
  searches = {n: search_lib.make_search(_CONFIG, table[:n]) for n in sizes}
  figures = {
      f'growth_recall_{n}': search_lib.overlap(
          search.search(queries, K),
          search_lib.StreamedSearch(table[:n]).search(queries, K),
      )
      for n, search in searches.items()
  }
  for batch in (32, 128, 512):
    times: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(15):
      for n, search in searches.items():
        seconds, _ = harness.timed(search.search, queries[:batch], K)
        times[n].append(1e3 * seconds)
    for n, values in times.items():
      median = statistics.median(values)
      figures[f'growth_ms_{n}_rows_{batch}_queries'] = median
  return figures


class _Side:
  """A serving process."""

  def __init__(self, label: str, folder: pathlib.Path, rows: int):
    self.label = label
    self._pool = futures.ProcessPoolExecutor(
        1, _SPAWN, initializer=_serve, initargs=(label, folder, rows)
    )
    self.close = self._pool.shutdown
    self._recall: dict[tuple[int, int], float] = {}
    self.about, self.most, self.peak = self._ask(_about)

  def _ask(self, function: Callable[..., Any], *setting: Any) -> Any:
    return self._pool.submit(function, *setting).result()

  def ms(self, setting: tuple[int, int]) -> float:
    found, self.peak = self._ask(_ms, setting)
    return found

  def recall(self, setting: tuple[int, int]) -> float:
    if setting not in self._recall:
      self._recall[setting], self.peak = self._ask(_recall, setting)
    return self._recall[setting]

  def fewest(self, candidates: int, target: float) -> int | None:
    """How many lists reach the recall, by bisection; None: none do."""
    # More lists would hardly help: the codes are what limits it.
    low, high = 0, min(max(self.most // 4, 64), self.most)
    if self.recall((high, candidates)) < target:
      return None
    while high - low > max(high // 32, 1):
      middle = (low + high) // 2
      if self.recall((middle, candidates)) < target:
        low = middle
      else:
        high = middle
    return high

  def best(self, target: float) -> tuple[int, int] | None:
    """The fastest lists and candidates that reach the recall."""
    timed = []
    for count in _CANDIDATES:
      lists = self.fewest(count, target)
      if lists is not None:
        setting = (lists, count)
        timed.append((min(self.ms(setting) for _ in range(3)), setting))
    return min(timed)[1] if timed else None


def _compare(
    folder: pathlib.Path, rows: int, written: Figures, times: int
) -> Figures:
  ours, theirs = (_Side(label, folder, rows) for label in ('scann', 'faiss'))
  figures: Figures = {f'scann_{k}': v for k, v in ours.about.items()}
  figures |= {f'faiss_{k}': v for k, v in theirs.about.items()}
  figures['scann_load_peak_gib'] = ours.peak
  default = (written['leaves_to_search'], written['reorder'])
  figures['scann_recall'] = ours.recall(default)
  # As good as our own settings, and the recalls of the plot.
  targets = {f'{target:.2f}': target for target in _RECALLS}
  targets['own'] = figures['scann_recall']
  for name, target in targets.items():
    settings = {
        ours: default if name == 'own' else ours.best(target),
        theirs: theirs.best(target),
    }
    found = [(side, setting) for side, setting in settings.items() if setting]
    turns = [
        [side.ms(setting) for side, setting in found] for _ in range(times)
    ]
    for i, (side, setting) in enumerate(found):
      ms = statistics.median(turn[i] for turn in turns)
      figures |= {
          f'{side.label}_lists_and_candidates_at_{name}': setting,
          f'{side.label}_recall_at_{name}': side.recall(setting),
          f'{side.label}_ms_at_{name}': ms,
      }
      print(f'recall {name}: {side.label} {ms:.0f} ms', flush=True)
  figures['scann_serve_peak_gib'] = ours.peak
  figures['faiss_serve_peak_gib'] = theirs.peak
  ours.close()
  theirs.close()
  return figures


def _plot(figures: Figures, path: pathlib.Path) -> None:
  figure, (axes,) = harness.panels(1)
  names = {'scann': 'realm_jax, scann', 'faiss': 'FAISS, IVF-PQ'}
  for label, name in names.items():
    points = sorted(
        (figures[f'{label}_recall_at_{target}'], figures[key])
        for target in (*(f'{r:.2f}' for r in _RECALLS), 'own')
        if (key := f'{label}_ms_at_{target}') in figures
    )
    axes.plot(*zip(*points, strict=True), marker='o', label=name)
  axes.set(
      xlabel='recall of the best 8 of 1,000 queries',
      ylabel=f'ms for {_BATCH} queries',
      ylim=(0, None),
      title=f'{figures["rows"]:,} rows of width {WIDTH}',
  )
  harness.save(figure, path)


def main() -> None:
  parser = harness.parser(__doc__, output=False)
  parser.add_argument('--rows', type=int, default=ROWS)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument(
      '--folder', type=pathlib.Path, help='kept, 12 GB; default: temporary'
  )
  arguments = parser.parse_args()
  small, seed = arguments.small, arguments.seed
  rows = 300_000 if small else arguments.rows
  sizes = [10_000, 30_000, 100_000] + [300_000, 1_000_000] * (not small)
  with contextlib.ExitStack() as stack:
    folder = arguments.folder or pathlib.Path(
        stack.enter_context(tempfile.TemporaryDirectory())
    )
    folder.mkdir(parents=True, exist_ok=True)

    def part(run: Callable[..., Figures], *args: Any) -> Figures:
      """Figures of a part, which is run in a process unless they are kept."""
      name = run.__name__.strip('_')
      kept = folder / f'{name}.json'
      if not kept.exists():
        print(f'-- {name}', flush=True)
        with futures.ProcessPoolExecutor(1, _SPAWN) as pool:
          files.write_json(kept, pool.submit(run, *args).result())
      return files.read_json(kept)

    written = part(_write, folder, rows, seed)
    figures: Figures = {'rows': rows, 'width': WIDTH, **written}
    figures |= part(_exact, folder, rows)
    figures |= part(_faiss_build, folder, rows)
    figures |= _compare(folder, rows, written, 3 if small else 9)
    figures |= part(_growth, sizes, seed)
  harness.write(
      arguments.output, figures, 'jax', 'numpy', 'faiss-cpu', 'scann'
  )
  if arguments.output:
    _plot(figures, arguments.output)


if __name__ == '__main__':
  main()
