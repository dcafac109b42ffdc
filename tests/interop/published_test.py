"""The published checkpoints give the values that transformers pinned.

Opt-in, since they are large: REALM_JAX_HUB=1 fetches what is below 600 MB from
the Hugging Face hub, REALM_JAX_HUB=all also the open-QA model of 20 GB. The
values are those of transformers 4.40.2, tests/models/realm. The answer
to the question there is tried here on the fixture.
"""

import os
import pathlib

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax.interop import block_records
from realm_jax.interop import convert
from realm_jax.interop import importing
from realm_jax.models import components
from realm_jax.models import embedder as embedder_lib

_FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
_HUB = os.environ.get('REALM_JAX_HUB', '')
_TOLERANCE = 1e-4  # Theirs.

_if_hub = pytest.mark.skipif(
    not _HUB, reason='fetches checkpoints: set REALM_JAX_HUB=1'
)
_if_all = pytest.mark.skipif(
    _HUB != 'all', reason='fetches 20 GB: set REALM_JAX_HUB=all'
)


def _load(name, component, **changes):
  source = importing.open_source(name, blocks=False)
  loaded = convert.load(
      source.tensors, source.config | changes, [component]
  )
  params = loaded.params[component]
  # Their tests take ids from 0 on and mask nothing; here 0 is padding. So the
  # embedding of 0 gets a second place, at the end of the vocabulary.
  for key in [k for k in params if k.endswith('word_embed.embedding')]:
    table = params[key].copy()
    table[-1] = table[0]
    params[key] = table
  return components.make(component, loaded.config), params, len(table) - 1


def _ids(start, limit, instead_of_zero):
  ids = np.arange(start, limit, dtype=np.int32)
  return np.where(ids == 0, instead_of_zero, ids)[None]


@_if_hub
def test_embedder():
  embedder, params, zero = _load(
      'google/realm-cc-news-pretrained-embedder', 'embedder'
  )
  found = embedder.module(params).embed_query(_ids(0, 6, zero))
  assert found.shape == (1, 128)
  np.testing.assert_allclose(
      found[0, :3], [-0.0714, -0.0837, -0.1314], atol=_TOLERANCE
  )


@_if_hub
def test_encoder():
  reader, params, _ = _load(
      'google/realm-cc-news-pretrained-encoder', 'reader'
  )
  ids = _ids(6, 12, 0)
  logits = reader.module(params).mlm_logits(
      ids, np.zeros_like(ids), np.arange(2)[None]
  )
  np.testing.assert_allclose(
      logits[0, :, :2],
      [[-11.0888, -11.2544], [-10.2170, -10.3874]],
      atol=_TOLERANCE,
  )


@_if_hub
def test_scorer():
  embedder, params, zero = _load(
      'google/realm-cc-news-pretrained-scorer', 'embedder'
  )
  ids = np.concatenate([_ids(0, 6, zero), _ids(6, 12, zero)])
  scores = embedder_lib.score(
      embedder.module(params).embed_query(ids[:1]),
      embedder.module(params).embed_document(ids, np.zeros_like(ids))[None],
  )
  np.testing.assert_allclose(scores, [[0.7410, 0.7170]], atol=_TOLERANCE)


@_if_hub
def test_reader():
  reader, params, zero = _load(
      'google/realm-orqa-nq-reader', 'span_reader', max_span_width=3
  )
  ids = np.concatenate([_ids(0, 5, zero), _ids(5, 10, zero)])
  logits = reader.module(params).span_logits(
      ids,
      np.array([[0, 0, 1, 1, 1]] * 2, np.int32),
      np.array([[0, 0, 1, 1, 0]] * 2, bool),
  )
  best = helpers.best_span(logits, jnp.array([0.3, 0.7]), ids.shape[1], 3)
  assert best == (1, 3, 3)


@_if_all
def test_open_qa():
  answer, _ = _answer(
      'google/realm-orqa-nq-openqa',
      'Who is the pioneer in modern computer science?',
  )
  assert answer == 'alan mathison turing'


def test_open_qa_of_the_fixture():
  answer, row = _answer(str(_FIXTURES / 'open_qa'), 'who is the cat of')
  tokenizer = importing.open_source(_FIXTURES / 'open_qa').tokenizer
  with np.load(_FIXTURES / 'expected.npz') as file:
    assert answer == tokenizer.decode(file['open_qa/answer_ids'])
    # The block that the reader chose, by its words.
    reader_ids = file['open_qa/reader_ids'][file['open_qa/block_idx']]
  path = _FIXTURES / 'open_qa/block_records.npy'
  _, records = block_records.byte_records(path)
  block = tokenizer.encode([*records][row].decode())
  assert set(block) <= set(reader_ids.tolist())


def _answer(name, question):
  """Asks an open-QA checkpoint as transformers does: text and row."""
  source = importing.open_source(name)
  loaded = convert.load(source.tensors, source.config)
  config, tokenizer = loaded.config, source.tokenizer
  beam = source.config['reader_beam_size']
  length = source.config['reader_seq_len']
  query = [tokenizer.cls_id, *tokenizer.encode(question), tokenizer.sep_id]
  embedder = components.make('embedder', config)
  query_emb = embedder.module(loaded.params['embedder']).embed_query(
      np.array([query], np.int32)
  )
  query_emb = np.asarray(query_emb)[0]
  scores = np.concatenate(
      [part @ query_emb for part in loaded.block_emb.chunks()]
  )
  rows = np.argsort(-scores, kind='stable')[:beam]
  wanted, texts = set(rows.tolist()), {}
  for row, record in enumerate(block_records.byte_records(source.blocks)[1]):
    if row in wanted:
      texts[row] = record.decode()
  ids = np.zeros((beam, length), np.int32)
  types, mask = np.zeros_like(ids), np.zeros(ids.shape, bool)
  for k, row in enumerate(rows):
    body = tokenizer.encode(texts[row])[: length - len(query) - 1]
    joint = [*query, *body, tokenizer.sep_id]
    ids[k, : len(joint)] = joint
    types[k, len(query) : len(joint)] = 1
    mask[k, len(query) : len(joint) - 1] = True
  reader = components.make('span_reader', config)
  logits = reader.module(loaded.params['span_reader']).span_logits(
      ids, types, mask
  )
  k, start, end = helpers.best_span(
      logits, scores[rows], length, config.max_span_width
  )
  return tokenizer.decode(ids[k, start : end + 1]), int(rows[k])


def test_the_stand_in_for_id_zero():
  """The pins rest on it: two ids with one embedding are one."""
  embedder, params, zero = _load(str(_FIXTURES / 'embedder'), 'embedder')
  assert zero == 63
  ids = np.array([[3, 63, 7]], np.int32)
  swapped = dict(params)
  for key in [k for k in params if k.endswith('word_embed.embedding')]:
    table = params[key].copy()
    table[9] = table[0]
    swapped[key] = table
  np.testing.assert_array_equal(
      embedder.module(params).embed_query(ids),
      embedder.module(swapped).embed_query(np.where(ids == 63, 9, ids)),
  )
