"""Our models against transformers 4.40.2, on random weights.

  python benchmarks/huggingface_parity.py --torch_python=hf/bin/python \
      [--output=FILE.json] [--small] [--seed=N] [--width=N] [--layers=N]

`hf/bin/python` has PyTorch and transformers 4.40.2, which conflict with the
requirements of realm_jax; tests/interop/make_huggingface_fixtures.py says how
to make it. For all five REALM classes and BERT, with both activations: the
largest difference forward, in the losses, in the gradients of the pretraining
loss, each over the largest value; then import and export, and whether
transformers loads the result.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.interop import convert
from realm_jax.interop import export
from realm_jax.interop import importing
from realm_jax.interop import weights
from realm_jax.models import components
from realm_jax.models import embedder as embedder_lib
from realm_jax.models import objectives
from realm_jax.models import span_reader
from realm_jax.trainer.stages import realm

_SCRIPT = (
    pathlib.Path(__file__).resolve().parents[1]
    / 'tests/interop/make_huggingface_fixtures.py'
)
_NAMES = ('embedder', 'scorer', 'encoder', 'reader', 'open_qa', 'bert')
# The bounds that the tests hold the fixtures to.
_BOUNDS = {'forward': 2e-5, 'loss': 1e-5, 'gradient': 1e-4}
_Arrays = dict[str, np.ndarray]


def _part(arrays: _Arrays, prefix: str) -> _Arrays:
  prefix += '/'
  return {
      name.removeprefix(prefix): value
      for name, value in arrays.items()
      if name.startswith(prefix)
  }


def _difference(ours: Any, theirs: np.ndarray) -> float:
  return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def _load(folder: pathlib.Path, activation: str) -> convert.Loaded:
  values = json.loads((folder / 'config.json').read_bytes())
  return convert.load(
      weights.open_folder(folder), values | {'hidden_act': activation}
  )


def _int32(array: np.ndarray) -> jax.Array:
  return jnp.asarray(array, jnp.int32)


def _pretraining(
    folder: pathlib.Path, want: _Arrays, activation: str
) -> dict[str, float]:
  retriever = _load(folder / 'embedder', activation)
  reader = _load(folder / 'encoder', activation)
  embeds = components.make('embedder', retriever.config)
  reads = components.make('reader', reader.config)

  def loss_of(embedder_params, reader_params):
    embedder = embeds.module(embedder_params)
    query_emb = embedder.embed_query(_int32(want['query_ids']))
    doc_emb = embedder.embed_document(
        _int32(want['doc_ids']), _int32(want['doc_types'])
    ).reshape(want['doc_emb'].shape)
    scores = embedder_lib.score(query_emb, doc_emb)
    joint = (*scores.shape, -1)
    batch = realm.Batch(
        *[None] * 3,
        _int32(want['joint_ids']).reshape(joint),
        _int32(want['joint_types']).reshape(joint),
        _int32(want['positions']),
        _int32(want['targets']),
        None,
    )
    token_logp = realm.read_targets(reads.module(reader_params), batch)
    loss, _ = objectives.marginal_mlm(
        scores, token_logp, jnp.asarray(want['counts']), 'token'
    )
    return loss, (query_emb, doc_emb, scores)

  (loss, found), gradients = jax.jit(
      jax.value_and_grad(loss_of, (0, 1), has_aux=True)
  )(retriever.params['embedder'], reader.params['reader'])
  rows, length = want['joint_ids'].shape
  logits = jax.jit(
      lambda params: reads.module(params).mlm_logits(
          _int32(want['joint_ids']),
          _int32(want['joint_types']),
          jnp.tile(jnp.arange(length), (rows, 1)),
      )
  )(reader.params['reader'])
  names = ('query_emb', 'doc_emb', 'scores')
  forward = max(
      _difference(value, want[name])
      for name, value in zip(names, found, strict=True)
  )
  gradient = 0.0
  for kind, component, values, theirs in (
      ('embedder', 'embedder', gradients[0], 'gradient/scorer/embedder.'),
      ('encoder', 'reader', gradients[1], 'gradient/encoder/'),
  ):
    config = retriever.config if kind == 'embedder' else reader.config
    for name, ours in convert.tensors_of(
        kind, config, {component: values}
    ).items():
      target = want.get(theirs + name)
      # Softmax is invariant to the bias of the keys: its gradient is rounding.
      if target is None or name.endswith('self.key.bias'):
        continue
      if name.endswith('word_embeddings.weight'):
        # Row 1 is RealmConfig's padding_idx, which PyTorch does not train.
        ours, target = np.delete(ours, 1, 0), np.delete(target, 1, 0)
      gradient = max(gradient, _difference(ours, target))
  return {
      f'forward_scorer_{activation}': forward,
      f'forward_encoder_{activation}': _difference(logits, want['logits']),
      f'loss_pretraining_{activation}': _difference(loss, want['loss']),
      f'gradient_pretraining_{activation}': gradient,
  }


def _spans(
    folder: pathlib.Path, want: _Arrays, activation: str
) -> dict[str, float]:
  loaded = _load(folder / 'reader', activation)
  reader = components.make('span_reader', loaded.config)
  rows, length = want['ids'].shape
  starts_P, ends_P = span_reader.spans(length, loaded.config.max_span_width)
  run = jax.jit(
      lambda params, mask: reader.module(params).span_logits(
          _int32(want['ids']),
          _int32(want['types']),
          mask,
      )
  )
  params = loaded.params['span_reader']
  logits = np.asarray(run(params, want['block_mask']))
  usable = want['logits'] > -1e30
  loss = wrong = 0.0
  for case in ('found', 'none', 'cut'):
    for blocks in ('some', 'empty'):
      theirs = _part(want, f'{case}/{blocks}')
      logits_KP = run(params, want['block_mask'] & (blocks == 'some'))
      correct_KP = (
          (theirs['starts'][:rows, :, None] == starts_P)
          & (theirs['ends'][:rows, :, None] == ends_P)
      ).any(axis=1)
      total, _ = span_reader.span_losses(
          logits_KP[None],
          want['relevance'][None],
          correct_KP[None],
          theirs['has_answer'][None],
      )
      target = theirs['loss']
      if np.isnan(target):  # inf * 0, where nothing is allowed or correct.
        target = theirs['retriever_loss']
      error = float(abs(total - target) / max(1e-3, abs(target)))
      loss = max(loss, error)
      total_KP = span_reader.joint_scores(
          logits_KP[None], want['relevance'][None, :rows]
      )[0]
      k, p = np.unravel_index(np.argmax(total_KP), total_KP.shape)
      best = [k, starts_P[p], ends_P[p]]
      wrong += best != theirs['prediction'].tolist()
  return {
      f'forward_reader_{activation}': _difference(
          logits[usable], want['logits'][usable]
      ),
      f'loss_reader_{activation}': loss,
      f'wrong_predictions_reader_{activation}': wrong,
  }


def _towers(
    folder: pathlib.Path, want: _Arrays, activation: str
) -> dict[str, float]:
  loaded = _load(folder / 'scorer', activation)
  embeds = components.make('embedder', loaded.config)

  @jax.jit
  def run(params, ids, types):
    query_emb = embeds.module(params).embed_query(ids[:2])
    doc_emb = embeds.module(params).embed_document(ids, types)
    return embedder_lib.score(query_emb, doc_emb.reshape(2, 2, -1))

  scores = run(
      loaded.params['embedder'], _int32(want['ids']), _int32(want['types'])
  )
  return {
      f'forward_two_towers_{activation}': _difference(scores, want['scores'])
  }


def _bert(folder: pathlib.Path, want: _Arrays) -> dict[str, float]:
  loaded = _load(folder / 'bert', 'gelu')
  embeds = components.make('embedder', loaded.config)
  hidden = jax.jit(
      lambda params, *inputs: embeds.module(params).encoder.bert(*inputs)
  )(loaded.params['embedder'], _int32(want['ids']), _int32(want['types']))
  mask = want['ids'] != 0
  return {
      'forward_bert': _difference(
          np.asarray(hidden)[mask], want['hidden'][mask]
      )
  }


def _fixtures(python: str, folder: pathlib.Path, *flags: str) -> str:
  """Runs the script of the fixtures in transformers; returns its output."""
  return subprocess.run(
      [python, str(_SCRIPT), f'--output={folder}', *flags],
      check=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
  ).stdout


def _round_trip(
    python: str, sizes: list[str], folder: pathlib.Path
) -> dict[str, Any]:
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
    with np.load(folder / 'expected.npz') as file:
      expected = {key: file[key] for key in file.files}
    figures: dict[str, Any] = {}
    for activation in ('gelu_new', 'gelu'):
      for measure, part in (
          (_pretraining, 'pretraining'),
          (_spans, 'span'),
          (_towers, 'scorer'),
      ):
        want = _part(expected, f'{part}/{activation}')
        figures |= measure(folder, want, activation)
    figures |= _bert(folder, _part(expected, 'bert'))
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
