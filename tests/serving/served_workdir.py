"""A small corpus, and a workdir with every component, which the tests serve."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np

from realm_jax import config as config_lib
from realm_jax.corpus import inputs
from realm_jax.index import generation as generation_lib
from realm_jax.models import components as components_lib
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files

# Markup and letters of several bytes, and of two UTF-16 units.
RECORDS = [
    {
        'id': f'town-{i}',
        'title': f'<b>{name}</b>',
        'text': f'The caf\u00e9 \U0001f600 of {name} sells {ware} & tea.'
        f' <img src=x onerror="window.harmed=1"> It opened in {1900 + i}.',
    }
    for i, (name, ware) in enumerate(
        (a + b, ware)
        for a, ware in zip(
            ('Dun', 'Kel', 'Mor', 'Tam', 'Vel'),
            ('figs', 'soup', 'bread', 'plums', 'rice'),
            strict=True,
        )
        for b in ('bar', 'dor', 'gat', 'lin', 'sor')
    )
]
COMPONENTS = {
    'realm': ('embedder', 'reader', 'span_reader'),
    'ict': ('embedder',),
    'mlm': ('reader',),
}


def make_config(corpus, objective='realm'):
  config = config_lib.Config(objective=objective, corpus=str(corpus.directory))
  config.num_candidates, config.open_qa.read = 4, 3
  config.model.preset, config.model.num_layers = 'tiny', 1
  config.model.width, config.model.num_heads = 32, 2
  config.model.embedding_width = 16
  config.model.vocab_size = corpus.tokenizer.vocab_size
  config.lengths.query, config.lengths.document = 24, 64
  config.lengths.masks = 3
  return config_lib.resolve(config)


def make_params(config, seed=0, names=COMPONENTS['realm']):
  """Fresh parameters, with embeddings that tell passages apart."""
  return {
      name: {
          key: np.asarray(value) * (4 if key.endswith('kernel') else 1)
          for key, value in component.init(seed).items()
      }
      for name, component in components_lib.make_all(
          names, config.model
      ).items()
  }


def save(workdir, corpus, config, step, params, generation=None):
  """Writes config and checkpoint as `train` does."""
  files.write_json(workdir / 'config.json', config_lib.to_dict(config))
  about = {
      'config_digest': config_lib.digest(config),
      'corpus_fingerprint': corpus.fingerprint,
      'tokenizer_digest': corpus.tokenizer.digest,
      'index_generation': generation,
  }
  params = jax.tree.map(jnp.asarray, params)
  checkpoint.save_params(workdir, step, params, about)


def publish(workdir, corpus, config, step, params):
  """Writes snapshot and generation of a step; returns the embeddings."""
  embedder = params['embedder']
  component = components_lib.make('embedder', config.model)
  template = inputs.Template.of(config.model, config.lengths, corpus.tokenizer)
  arrays = template.documents(corpus.passages, np.arange(len(corpus.passages)))
  run = jax.jit(lambda p, *xs: component.module(p).embed_document(*xs))
  embeddings = np.asarray(run(embedder, *arrays))
  lineage = generation_lib.Lineage(
      step=step,
      params_digest=checkpoint.save_snapshot(workdir, step, embedder),
      tokenizer_digest=corpus.tokenizer.digest,
      corpus_fingerprint=corpus.fingerprint,
      num_rows=len(corpus.passages),
      width=config.model.embedding_width,
  )
  helpers.publish(workdir / 'index', lineage, embeddings, config.mips)
  return embeddings
