"""Examples a second that the input pipeline makes, without training.

  realm-jax prepare --source=world:0:2000 --output=corpus
  python benchmarks/input_pipeline.py --corpus=corpus \
      --output=benchmarks/results/input_pipeline.json

For `mlm`, `mlm` with views, `ict` and `realm`, at the default lengths: batches
as the trainer draws them, by a thread of its own. `candidates` is the assembly
of a REALM batch with its passages, which follows each search.
`cpu_microseconds` is the processor time of an example.
"""

import pathlib
import statistics
import time
from typing import Any

import harness
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.trainer import examples
from realm_jax.trainer import stages
from realm_jax.trainer.stages import realm

_VIEWS = {'own': 0.25, 'answer': 0.4, 'article': 0.2, 'null': 0.15}
_ROUNDS = 5


def _rates(run: Any, count: int, seconds: float) -> dict[str, float]:
  """Returns medians of rounds of calls that make `count` examples each."""
  run()
  rates, costs = [], []
  for _ in range(_ROUNDS):
    calls, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds / _ROUNDS:
      run()
      calls += 1
    made = calls * count
    rates.append(made / (time.perf_counter() - start))
    costs.append((time.process_time() - cpu) / made * 1e6)
  return {
      'per_second': statistics.median(rates),
      'cpu_microseconds': statistics.median(costs),
  }


def measure(corpus: corpus_lib.Corpus, seconds: float) -> dict[str, Any]:
  """Returns flat figures of each objective."""
  figures = {}
  for name, batch_size in (
      ('mlm', 256), ('mlm_views', 256), ('ict', 512), ('realm', 64)
  ):
    config = config_lib.Config(objective=name.split('_')[0])
    config.corpus, config.batch_size = str(corpus.directory), batch_size
    config.mlm.views = _VIEWS if name == 'mlm_views' else {}
    config = config_lib.resolve(config)
    stage = stages.load(config)(config, corpus)
    batches = examples.training_batches(stage)
    found = {name: _rates(lambda it=batches: next(it), batch_size, seconds)}
    if name == 'realm':
      queries = next(batches).inputs
      del batches
      rows_BJ = np.random.default_rng(0).integers(
          len(corpus.passages), size=(batch_size, config.num_candidates - 1)
      )
      found['candidates'] = _rates(
          lambda queries=queries, rows_BJ=rows_BJ, stage=stage: (
              realm.with_candidates(queries, rows_BJ, corpus, stage.template)
          ),
          batch_size,
          seconds,
      )
    for part, values in found.items():
      figures |= {f'{part}_{figure}': x for figure, x in values.items()}
  return figures


def main() -> None:
  parser = harness.parser(__doc__)
  parser.add_argument('--corpus', type=pathlib.Path, required=True)
  arguments = parser.parse_args()
  corpus = corpus_lib.Corpus.open(arguments.corpus)
  figures = measure(corpus, 0.5 if arguments.small else 5.0)
  harness.write(arguments.output, figures, 'numpy', 'grain')


if __name__ == '__main__':
  main()
