"""The training step of each objective lowers for GPU and TPU, without one.

The steps are traced from abstract arrays: nothing is computed or allocated.
"""

import collections
import re
import types

import jax
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.planner import plan
from realm_jax.runtime import mesh as mesh_lib

_EVEN = {'query': 16, 'document': 24}
_ODD = {'query': 15, 'document': 25}
_ODD_JOINT = {'query': 16, 'document': 25}  # T is the sum of the two.
# A call of cuDNN, forward or backward, and its first operand, query_BLHC.
_CUDNN_CALL = re.compile(
    r'@__cudnn\$fmhaSoftmax(Backward)?\(.*: \(tensor<(\d+)x(\d+)x\d+x\d+xbf16>'
)


def _config(objective, lengths, layers=2, **model):
  config = config_lib.Config(
      objective=objective, corpus='none', batch_size=2, num_candidates=3
  )
  config.lengths.masks = 2
  config.lengths.query = config.tagger.length = lengths['query']
  config.lengths.document = lengths['document']
  config.open_qa.read, config.open_qa.retrieved = 2, 3
  values = {
      'num_layers': layers, 'width': 32, 'num_heads': 2, 'mlp_width': 32,
      'vocab_size': 101, 'embedding_width': 8, 'entity_types': ('LOC',),
      'compute_dtype': 'bfloat16', 'attention_dropout': 0.0,
  }  # fmt: skip
  for name, value in (values | model).items():
    setattr(config.model, name, value)
  return config


def _trace(config, platform):
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(devices, (mesh_lib.DATA, mesh_lib.MODEL))
  return plan.trace_step(config, mesh, types.SimpleNamespace(platform=platform))


@pytest.fixture(autouse=True)
def _cudnn_is_installed(monkeypatch):
  # JAX checks for cuDNN at tracing time.
  asked = pytest.importorskip('jax._src.cudnn.fused_attention_stablehlo')
  monkeypatch.setattr(asked, 'check_cudnn_version', lambda: 90300)


def _cudnn_calls(config):
  """Counts the calls by (rows, length); all are forward and backward."""
  text = _trace(config, 'gpu').lower(lowering_platforms=('cuda',)).as_text()
  found = _CUDNN_CALL.findall(text)
  assert len(found) == text.count('@__cudnn$')
  forward, backward = (
      collections.Counter(
          (int(rows), int(length))
          for which, rows, length in found
          if which == direction
      )
      for direction in ('', 'Backward')
  )
  assert forward == backward
  return forward


@pytest.mark.parametrize(
    ('objective', 'lengths', 'layers', 'calls'),
    [
        # Except in tagger and span reader, `xla` computes the last layer, at
        # some positions.
        ('mlm', _EVEN, 2, {(2, 40): 1}),
        ('mlm', _ODD_JOINT, 2, {(2, 42): 1}),
        ('ict', _ODD, 2, {(2, 16): 1, (2, 26): 1}),
        # The null document has 3 wordpieces.
        ('realm', _EVEN, 2, {(2, 16): 1, (4, 24): 1, (1, 4): 1, (6, 40): 1}),
        ('realm', _ODD_JOINT, 12,
         {(2, 16): 11, (4, 26): 11, (1, 4): 11, (6, 42): 11}),
        ('open_qa', _ODD_JOINT, 2, {(2, 16): 1, (4, 42): 2}),
        ('tagger', _EVEN, 2, {(2, 16): 2}),
        ('tagger', _ODD, 2, {(2, 16): 2}),
    ],
)  # fmt: skip
def test_by_cudnn_at_even_lengths_only(objective, lengths, layers, calls):
  assert _cudnn_calls(_config(objective, lengths, layers)) == calls


def test_only_documents_by_cudnn_where_weights_are_dropped():
  config = _config('ict', _ODD, attention_dropout=0.1)
  assert _cudnn_calls(config) == {(2, 26): 1}


@pytest.mark.parametrize(
    ('objective', 'lengths', 'layers', 'dtype'),
    [
        ('mlm', _ODD_JOINT, 12, 'bfloat16'),
        ('ict', _ODD, 2, 'bfloat16'),
        ('realm', _ODD, 2, 'bfloat16'),
        ('realm', _EVEN, 2, 'float32'),
        ('open_qa', _ODD, 2, 'bfloat16'),
        ('tagger', _ODD, 2, 'bfloat16'),
    ],
)
def test_by_flash(objective, lengths, layers, dtype):
  config = _config(objective, lengths, layers, compute_dtype=dtype)
  lowered = _trace(config, 'tpu').lower(lowering_platforms=('tpu',))
  # Calls of one shape are one function: the forward pass, and the backward
  # pass for queries and for keys and values.
  assert lowered.as_text().count('custom_call @tpu_custom_call') >= 3


@pytest.mark.parametrize(
    ('objective', 'lengths', 'dtype'),
    [
        ('mlm', _ODD_JOINT, 'float32'),
        ('ict', _ODD, 'float32'),
        ('realm', _ODD, 'float32'),
        ('realm', _EVEN, 'bfloat16'),
        ('open_qa', _ODD_JOINT, 'float32'),
        ('tagger', _EVEN, 'float32'),
    ],
)
def test_by_xla(objective, lengths, dtype):
  config = _config(objective, lengths, compute_dtype=dtype, attention='xla')
  lowered = _trace(config, 'gpu').lower(lowering_platforms=('cuda', 'tpu'))
  text = lowered.as_text()
  assert '__cudnn$' not in text
  assert 'tpu_custom_call' not in text
