"""Outputs of the stages: what they depend on."""

import dataclasses

import helpers
import jax
import numpy as np
from training_test import make_config

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.models import components as components_lib
from realm_jax.trainer import stages
from realm_jax.trainer.stages import realm


def test_scores_come_from_current_parameters_not_from_the_index(world):
  """The same stale candidates, other parameters: other scores."""
  corpus = corpus_lib.Corpus.open(world)
  config = config_lib.resolve(make_config(world, 'realm'))
  config.model.vocab_size = corpus.tokenizer.vocab_size
  components = stages.components_of(config)
  stage = stages.load(config)(config, corpus)
  batch = realm.with_candidates(
      next(helpers.batches(corpus, config)).inputs,
      np.arange(16).reshape(8, 2), corpus, stage.template,
  )
  loss = jax.jit(helpers.loss_function(stage, components))
  reader = components['reader'].init(0)
  shares = [
      loss({'embedder': components['embedder'].init(seed), 'reader': reader},
           batch, jax.random.key(0))[1]['null_share']
      for seed in (0, 1)
  ]
  assert abs(shares[0] - shares[1]) > 1e-4


def test_documents_are_embedded_without_dropout(world):
  corpus = corpus_lib.Corpus.open(world)
  config = config_lib.resolve(make_config(world, 'ict', model__dropout=0.5))
  config.model.vocab_size = corpus.tokenizer.vocab_size
  components = stages.components_of(config)
  batch = next(helpers.batches(corpus, config)).inputs
  stage = stages.load(config)(config, corpus)
  loss = jax.jit(helpers.loss_function(stage, components))
  params = {'embedder': components['embedder'].init(0)}
  first, second = (
      loss(params, batch, jax.random.key(seed))[0] for seed in (0, 1)
  )
  assert first != second  # The query has dropout.
  same = dataclasses.replace(config.model, dropout=0.0)
  still = components_lib.make('embedder', same)
  documents = [
      component.module(params['embedder']).embed_document(
          batch.doc_ids_BS, batch.doc_types_BS
      )
      for component in (components['embedder'], still)
  ]
  np.testing.assert_array_equal(*documents)
