"""The part `embedding` of benchmarks/refresh.py."""

import argparse
from collections.abc import Callable
import contextlib
import functools
import pathlib
import statistics
import tempfile
from typing import Any

import harness
import numpy as np
import training

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import inputs
from realm_jax.index import embedding
from realm_jax.interop import convert
from realm_jax.interop import huggingface_config
from realm_jax.models import components
from realm_jax.runtime import mesh as mesh_lib

_LONGEST = 288  # Wordpieces of a passage, as in the paper.
# Wordpieces of a padded batch: the embedder's own, and a large one.
_PADDED_TOKENS = (2**12, 2**15)
_TORCH_TOKENS = (2**12, 2**14)

Figures = harness.Figures


def job(corpus: corpus_lib.Corpus) -> config_lib.Config:
  """The tiny preset with the paper's lengths."""
  config = config_lib.Config(corpus=str(corpus.directory.absolute()))
  config.model.preset = 'tiny'
  config.model.vocab_size = corpus.tokenizer.vocab_size
  config.lengths.document = _LONGEST
  return config_lib.resolve(config)


def _padded(
    component: components.Component,
    params: components.Params,
    corpus: corpus_lib.Corpus,
    tokens: int,
) -> Callable[[np.ndarray], np.ndarray]:
  """The embedder's model and pipeline, every batch of the longest width."""
  template = inputs.Template(corpus.tokenizer, _LONGEST, _LONGEST)
  encoder = embedding.RowEncoder(
      functools.partial(training.embed_documents, component),
      np.full(len(corpus.passages), _LONGEST),
      _LONGEST,
      mesh_lib.one_device(),
      tokens,
  )
  assemble = functools.partial(template.documents, corpus.passages)

  def run(rows: np.ndarray) -> np.ndarray:
    found = np.zeros((len(rows), component.config.embedding_width), np.float32)
    for members, part in encoder(params, rows, assemble):
      found[members] = part
    return found

  return run


def _open_torch(
    python: str,
    config: config_lib.Config,
    params: components.Params,
    corpus: corpus_lib.Corpus,
    rounds: list[np.ndarray],
    folder: pathlib.Path,
) -> harness.Child:
  """Starts `realm_torch.Embedding` with the same weights and passages."""
  np.savez(
      folder / 'weights.npz',
      **convert.tensors_of('embedder', config.model, {'embedder': params}),
  )
  passages = {}
  template = inputs.Template(corpus.tokenizer, _LONGEST, _LONGEST)
  for number, rows in enumerate(rounds):
    ids_BS, types_BS = template.documents(corpus.passages, rows)
    passages |= {f'{number}/ids': ids_BS, f'{number}/types': types_BS}
  np.savez(folder / 'passages.npz', **passages)
  child = harness.Child(python, 'realm_torch.py', 'Embedding')
  child.ask(
      'open',
      config=huggingface_config.config_json('embedder', config.model),
      folder=str(folder),
  )
  return child


def measure(
    arguments: argparse.Namespace, corpus: corpus_lib.Corpus
) -> Figures:
  """Passages per second of each way, in turns on the same passages."""
  config = job(corpus)
  component = components.make('embedder', config.model)
  params = component.init(0)
  ours = embedding.PassageEmbedder(
      component,
      corpus.passages,
      corpus.tokenizer,
      _LONGEST,
      mesh_lib.one_device(),
  )
  size, count = (256, 3) if arguments.small else (2048, 9)
  size = min(size, len(corpus.passages))
  rng = np.random.default_rng(0)
  starts = rng.integers(0, len(corpus.passages) - size, count, endpoint=True)
  # Round 0 compiles, and chooses the best variants.
  rounds = [np.arange(start, start + size) for start in starts]
  rounds[0] = rounds[0][:256]
  runs = {'bucketed': functools.partial(ours, params)}
  for tokens in _PADDED_TOKENS:
    runs[f'padded {tokens}'] = _padded(component, params, corpus, tokens)
  # Name -> seconds and embeddings of a round.
  ways: dict[str, Callable[[int], tuple[float, np.ndarray]]] = {
      name: lambda number, run=run: harness.timed(run, rounds[number])
      for name, run in runs.items()
  }
  figures: Figures = {}
  seconds: dict[str, list[float]] = {}
  with contextlib.ExitStack() as stack:
    folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if arguments.torch_python:
      torch = _open_torch(
          arguments.torch_python, config, params, corpus, rounds, folder
      )
      stack.callback(torch.close)
      figures['versions_of_torch_side'] = torch.versions(
          'torch', 'transformers'
      )

      def by_torch(variant: str, number: int) -> tuple[float, np.ndarray]:
        path = str(folder / 'found.npy')
        taken = torch.ask('embed', number=number, variant=variant, save=path)
        return taken, np.load(path)

      for how in ('bucketed', 'padded'):
        for attention in ('sdpa', 'eager'):
          for tokens in _TORCH_TOKENS:
            variant = f'{how} {attention} {tokens}'
            ways[f'torch {variant}'] = functools.partial(by_torch, variant)
    first = {}
    for name, way in ways.items():
      way(0)
      first[name], found = way(0)
      if name == 'bucketed':
        reference = found
        continue
      largest = float(np.abs(found - reference).max())
      figures[f'largest_difference {name}'] = largest
    for how in ('bucketed', 'padded'):  # The faster of each kind takes part.
      kind = [name for name in ways if name.startswith(f'torch {how}')]
      for name in sorted(kind, key=first.get)[1:]:
        del ways[name]
    for number in range(1, count):
      order = list(ways)
      shift = number % len(order)
      for name in order[shift:] + order[:shift]:
        seconds.setdefault(name, []).append(ways[name](number)[0])
  figures['embedding_sample_passages'] = size * (count - 1)
  figures['embedding_mean_wordpieces'] = float(corpus.passages.lengths.mean())
  for name, values in seconds.items():
    key = name.replace(' ', '_')
    figures[f'passages_per_second_{key}'] = size / statistics.median(values)
    if name != 'bucketed':
      # Within a round: the machine may be slower in some of them.
      figures[f'times_as_fast_as_{key}'] = float(
          np.median(np.divide(values, seconds['bucketed']))
      )
  figures['padded_ok'] = min(
      value
      for name, value in figures.items()
      if name.startswith('times_as_fast_as_padded')
  ) >= 1.5
  return figures


def plot(axes: Any, figures: Figures) -> None:
  prefix = 'passages_per_second_'
  bars = {
      key.removeprefix(prefix).replace('_', ' '): value
      for key, value in figures.items()
      if key.startswith(prefix)
  }
  axes.barh(list(bars), list(bars.values()))
  axes.set(xlabel='passages/s', title='Embedding')
