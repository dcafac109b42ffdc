"""A fine-tuning step on questions beside RealmForOpenQA of transformers.

  python benchmarks/open_qa_step.py --corpus=corpus \
      --questions=train.jsonl --torch_python=/path/to/python \
      --output=benchmarks/results/open_qa_step.json

Both train BERT-base on the same questions over the same first 100,000 passages,
5,000 retrieved, 5 read in 320 wordpieces, two threads each, one step of ours
and one of theirs in turn; the median of each. Theirs is transformers 4.40.2 in
training mode with AdamW, one question a step, as it can do no more. The part
that differs by design is timed apart: from a question's embedding to the arrays
that are read, where theirs tokenises 5,000 blocks and ours looks them up.
"""

import argparse
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import search
from realm_jax.models import components as components_lib
from realm_jax.qa import question_table as question_table_lib
from realm_jax.runtime import files
from realm_jax.runtime import mesh as mesh_lib
from realm_jax.trainer import batches
from realm_jax.trainer import job as job_lib
from realm_jax.trainer import optimizer
from realm_jax.trainer import retrieve
from realm_jax.trainer import step as step_lib

_QUERY, _DOCUMENT = 32, 288  # Together 320, as published.


class _Index:
  """Embeddings in the place of a published index."""

  def __init__(self, embeddings_NE: np.ndarray):
    self.search = search.ExactSearch(embeddings_NE)
    self.embeddings = embeddings_NE


class _Ours:
  """Our step, over a batch of questions."""

  def __init__(self, arguments: argparse.Namespace):
    config = config_lib.Config(objective='open_qa', corpus=arguments.corpus)
    config.model.preset = 'tiny' if arguments.small else 'base'
    config.batch_size = arguments.batch_size
    config.model.compute_dtype = arguments.compute_dtype
    config.steps = 1000
    config.lengths.query, config.lengths.document = _QUERY, _DOCUMENT
    config.open_qa.questions = arguments.questions
    config.open_qa.retrieved = arguments.retrieved
    config.refresh.policy = 'none'
    config = config_lib.resolve(config)
    corpus = corpus_lib.Corpus.open(arguments.corpus)
    config.model.vocab_size = corpus.tokenizer.vocab_size
    table = question_table_lib.QuestionTable.read(
        arguments.questions, _QUERY, corpus.tokenizer
    )
    mesh = mesh_lib.make_mesh(config.mesh, config.batch_size)
    components = components_lib.make_all(config)
    job = job_lib.Job(
        pathlib.Path(), config, corpus, mesh, components, {}, table
    )
    rows = min(arguments.passages, len(corpus.passages))
    rng = np.random.default_rng(0)
    embeddings_NE = rng.normal(size=(rows, 128)).astype(np.float32)
    self.corpus, self.table = corpus, table
    self._config, self._size = config, config.batch_size
    index: Any = _Index(embeddings_NE)
    self._retrieval = retrieve.Retrieval(job, index, np.arange(self._size))
    self._batches = batches.training_batches(corpus, config, questions=table)
    tx = optimizer.make_optimizer(config, tuple(components))
    params = {name: c.init(0) for name, c in components.items()}
    self._state = step_lib.TrainState(
        step=jax.numpy.int32(0),
        params=params,
        opt_state=tx.init(params),
        rng=jax.random.key(0),
    )
    null_ids = inputs.null_document(corpus.tokenizer)
    self._step = step_lib.make_train_step(
        config, components, tx, null_ids, mesh
    )
    self._mesh = mesh

  def __call__(self) -> dict[str, float]:
    start = time.perf_counter()
    batch = next(self._batches)
    batch = self._retrieval(batch, self._state.params['embedder'])
    retrieved = time.perf_counter()
    names = step_lib.input_names(self._config)
    arrays = mesh_lib.to_devices(
        self._mesh, {name: batch[name] for name in names}
    )
    self._state, metrics = self._step(self._state, arrays)
    jax.block_until_ready((self._state, metrics))
    end = time.perf_counter()
    return {
        'retrieve': (retrieved - start) / self._size,
        'step': (end - start) / self._size,
    }


class _Theirs:
  """A process of benchmarks/open_qa_step_torch.py, one step at a time."""

  def __init__(self, arguments: argparse.Namespace, ours: _Ours, folder: str):
    path = pathlib.Path(folder)
    rows = min(arguments.passages, len(ours.corpus.passages))
    with open(path / 'blocks.jsonl', 'w', encoding='utf-8') as file:
      for row in range(rows):
        file.write(json.dumps(ours.corpus.passage_text(row)['text']) + '\n')
    with open(path / 'questions.jsonl', 'w', encoding='utf-8') as file:
      for question in ours.table.questions[:200]:
        file.write(
            json.dumps([question.question, list(question.answers)]) + '\n'
        )
    ours.corpus.tokenizer.save(path)
    self._process = subprocess.Popen(
        [
            arguments.torch_python,
            str(pathlib.Path(__file__).with_name('open_qa_step_torch.py')),
            folder,
            str(arguments.retrieved),
            'tiny' if arguments.small else 'base',
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    self.versions = self._read()

  def _read(self) -> dict[str, Any]:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'The PyTorch side ended with {self._process.wait()}.')
    return json.loads(line)

  def __call__(self) -> dict[str, float]:
    assert self._process.stdin is not None
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    assert self._process.stdin is not None
    self._process.stdin.close()
    self._process.wait()


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
  parser.add_argument('--corpus', required=True)
  parser.add_argument('--questions', required=True)
  parser.add_argument('--torch_python', required=True)
  parser.add_argument('--passages', type=int, default=100_000)
  parser.add_argument('--retrieved', type=int, default=5_000)
  parser.add_argument('--batch_size', type=int, default=4)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument(
      '--compute_dtype', default='float32', help='of ours; or bfloat16'
  )
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--small', action='store_true')
  arguments = parser.parse_args()
  if arguments.small:
    arguments.passages, arguments.retrieved = 2_000, 500
  ours = _Ours(arguments)
  with tempfile.TemporaryDirectory() as folder:
    theirs = _Theirs(arguments, ours, folder)
    ours(), theirs()  # Compile, and warm up.
    measured = [(ours(), theirs()) for _ in range(arguments.rounds)]
    theirs.close()
  figures: dict[str, Any] = {}
  for part in ('retrieve', 'step'):
    medians = [
        statistics.median(pair[side][part] for pair in measured)
        for side in (0, 1)
    ]
    figures[f'{part}_seconds_per_question_ours'] = round(medians[0], 4)
    figures[f'{part}_seconds_per_question_theirs'] = round(medians[1], 4)
    ratios = [pair[1][part] / pair[0][part] for pair in measured]
    figures[f'{part}_times_faster'] = round(statistics.median(ratios), 2)
  values = {
      'command': shlex.join(['python', *sys.argv]),
      'hardware': f'{os.cpu_count()} CPU cores, {platform.machine()}',
      'versions': {'jax': jax.__version__, **theirs.versions},
      'passages': arguments.passages,
      'retrieved': arguments.retrieved,
      'questions_a_step_ours': arguments.batch_size,
      'rounds': arguments.rounds,
      **figures,
  }
  files.write_json(arguments.output, values)
  print(json.dumps(values, indent=2))


if __name__ == '__main__':
  main()
