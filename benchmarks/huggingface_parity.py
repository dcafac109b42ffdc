"""Our models against transformers 4.40.2, on random weights.

  python benchmarks/huggingface_parity.py --torch_python=hf/bin/python \
      [--output=FILE.json] [--small] [--seed=N] [--width=N] [--layers=N]

`hf/bin/python` has PyTorch and transformers 4.40.2, which conflict with the
requirements of realm_jax; tests/interop/make_huggingface_fixtures.py says how
to make it. It makes models of the given sizes, on which the comparisons of
tests/interop/pretrained_test.py are run: for all five REALM classes and BERT,
with both activations, the largest difference forward, in the losses, in the
gradients of the pretraining loss, each over the largest value. Then import and
export, and whether transformers loads the result.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness
import numpy as np

from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.interop import weights

_INTEROP = harness.ROOT / 'tests' / 'interop'
sys.path[:0] = [str(_INTEROP), str(_INTEROP.parent)]
import pretrained_test  # noqa: E402

_NAMES = ('embedder', 'scorer', 'encoder', 'reader', 'open_qa', 'bert')
_BOUNDS = {  # By the first word of a figure, as in the tests.
    'forward': pretrained_test._FORWARD,
    'loss': pretrained_test._LOSS,
    'gradient': pretrained_test._GRADIENT,
}


def _compare(folder: pathlib.Path) -> harness.Figures:
  """Runs the comparisons of the tests; returns the largest differences."""
  figures: harness.Figures = {}
  case = ''

  def record(ours: Any, theirs: Any, tolerance: float, what: str = '') -> None:
    (kind,) = (kind for kind, bound in _BOUNDS.items() if bound == tolerance)
    part = case
    if kind == 'forward' and part.startswith('pretraining'):
      model = 'encoder' if what == 'logits' else 'scorer'
      part = part.replace('pretraining', model)
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    difference = np.abs(ours - theirs).max()
    if difference:
      difference /= np.abs(theirs).max()
    name = f'{kind}_{part}'
    figures[name] = max(figures.get(name, 0.0), float(difference))

  pretrained_test._FIXTURES = folder
  pretrained_test._assert_close = record
  with np.load(folder / 'expected.npz') as file:
    expected = {key: file[key] for key in file.files}
  for activation in pretrained_test._ACTIVATIONS:
    case = f'pretraining_{activation}'
    pretrained_test.test_pretraining_forward_loss_and_gradients(
        expected, activation
    )
    case, wrong = f'reader_{activation}', 0
    for answers in ('found', 'none', 'cut'):
      for blocks in ('some', 'empty'):
        try:
          pretrained_test.test_span_reader(
              expected, activation, blocks, answers
          )
        except AssertionError:
          wrong += 1
    figures[f'wrong_predictions_{case}'] = wrong
    case = f'two_towers_{activation}'
    pretrained_test.test_scorer_of_two_towers(expected, activation)
  case = 'bert'
  pretrained_test.test_bert_of_2019(expected)
  return figures


def _fixtures(python: str, folder: pathlib.Path, *flags: str) -> str:
  """Runs the script of the fixtures in transformers; returns its output."""
  script = _INTEROP / 'make_huggingface_fixtures.py'
  return subprocess.run(
      [python, str(script), f'--output={folder}', *flags],
      check=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
  ).stdout


def _round_trip(
    python: str, sizes: list[str], folder: pathlib.Path
) -> harness.Figures:
  """Import, export, compare bit by bit, and load in transformers."""
  differing = 0
  for name in _NAMES:
    importing.run([str(folder / name)], folder / 'workdirs' / name, workers=1)
    export.run(
        folder / 'workdirs' / name, 'huggingface', folder / 'exported' / name
    )
    back = weights.open_folder(folder / 'exported' / name)
    for key, tensor in weights.open_folder(folder / name).items():
      if not key.endswith('position_ids'):
        differing += back[key].read().tobytes() != tensor.read().tobytes()
  said = _fixtures(python, folder, f'--check={folder / "exported"}', *sizes)
  wrong = json.loads(said.splitlines()[-1])
  return {
      'round_trip_tensors_that_differ': differing,
      'round_trip_wrong_in_transformers': sum(map(bool, wrong.values())),
      'round_trip_said': {k: v for k, v in wrong.items() if v},
  }


def main() -> int:
  parser = harness.parser(
      __doc__, output=False, torch='PyTorch and transformers 4.40.2'
  )
  parser.add_argument('--seed', type=int, default=1)
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--layers', type=int, default=4)
  parser.add_argument('--vocab_size', type=int, default=1000)
  arguments = parser.parse_args()
  sizes = [f'--seed={arguments.seed}']
  if not arguments.small:
    sizes += [
        f'--hidden_size={arguments.width}',
        f'--num_hidden_layers={arguments.layers}',
        f'--num_attention_heads={max(1, arguments.width // 64)}',
        f'--intermediate_size={4 * arguments.width}',
        f'--vocab_size={arguments.vocab_size}',
        '--retriever_proj_size=128',
        '--span_hidden_size=256',
    ]
  started = time.time()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    _fixtures(arguments.torch_python, folder, *sizes)
    figures = _compare(folder)
    figures |= _round_trip(arguments.torch_python, sizes, folder)
  ok = True
  for name, value in figures.items():
    bound = _BOUNDS.get(name.partition('_')[0], 0)
    if not isinstance(value, dict) and not value <= bound:
      print(f'{name}: {value:.3g} is more than {bound:g}', file=sys.stderr)
      ok = False
  versions = harness.about('jax', 'numpy')['versions']
  figures |= {
      'seconds': time.time() - started,
      'sizes': ' '.join(sizes),
      'versions': versions | {'transformers': '4.40.2'},
  }
  harness.write(arguments.output, figures)
  return 0 if ok else 1


if __name__ == '__main__':
  sys.exit(main())
