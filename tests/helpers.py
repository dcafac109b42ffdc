"""Functions that several test modules share."""

import json

import numpy as np

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.index import generation
from realm_jax.models import components as components_lib
from realm_jax.models import dropout
from realm_jax.models import span_reader
from realm_jax.prepare import prepare
from realm_jax.trainer import examples
from realm_jax.trainer import stages


def publish(directory, lineage, embeddings_NE, config):
  """Writes a generation of embeddings that are in memory; returns its path."""
  size = generation.ROWS_PER_SHARD
  with generation.Writer(directory, lineage, config.dtype) as writer:
    for start in range(0, len(embeddings_NE), size):
      writer.add(embeddings_NE[start : start + size])
    writer.add_backend(config)
    return writer.publish()


def batches(corpus, config, **options):
  """Returns the training batches of a config's stage."""
  stage = stages.load(config)(config, corpus)
  return examples.training_batches(stage, **options)


def loss_function(stage, components):
  """Returns loss(params, batch, key) -> (loss, metrics), on one device.

  The key is for dropout; None for none.
  """

  def loss(params, batch, key):
    rows = len(batch.query_ids_BQ)
    noise = None if key is None else dropout.noise(key, rows)
    models = components_lib.bind(components, params)
    return stage.loss(stage.outputs(models, batch, noise), batch)

  return loss


def correct_spans(gold_starts_KA, gold_ends_KA, length, max_width):
  """Marks the spans that are one of A answers, bool KP; -1 for no answer."""
  starts_P, ends_P = span_reader.spans(length, max_width)
  same_KAP = (np.asarray(gold_starts_KA)[..., None] == starts_P) & (
      np.asarray(gold_ends_KA)[..., None] == ends_P
  )
  return same_KAP.any(axis=-2)


def best_span(logits_KP, score_K, length, max_width):
  """Returns passage, first and last wordpiece of the best span, as ints."""
  total_KP = span_reader.joint_scores(logits_KP[None], score_K[None])[0]
  passage, span = np.unravel_index(np.argmax(total_KP), total_KP.shape)
  starts_P, ends_P = span_reader.spans(length, max_width)
  return int(passage), int(starts_P[span]), int(ends_P[span])


def write_records(path, items):
  """Writes JSON Lines and returns the path as a string."""
  text = ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in items)
  path.write_text(text, encoding='utf-8')
  return str(path)


class Specials:
  """Ids of the special wordpieces of `toy_passages`."""

  cls_id, sep_id, mask_id, pad_id = 1, 2, 3, 0
  between, num_specials = [2], 3


def toy_passages(num_specials=Specials.num_specials):
  """Two passages: title [10 11] body [20 21 22], and body [30] alone."""
  return corpus_lib.PassageTable(
      tokens=np.array([10, 11, 20, 21, 22, 30], np.uint16),
      offsets=np.array([0, 5, 6]),
      title_lengths=np.array([2, 0], np.int32),
      articles=np.array([0, 1], np.int32),
      num_specials=num_specials,
  )


_NAMES = (
    'Anna Karlin', 'Boris Petrov', 'Clara Wieck', 'David Hume', 'Edith Stein',
    'Franz Kafka', 'Greta Garbo', 'Henry Ford',
)


def lives(folder, **arguments):
  """Prepares eight articles of four passages, and opens the corpus.

  Passage 0 has the birth: the year stands in passage 2, too, and the name in
  passage 1. The date of passage 3 stands nowhere else.
  """
  items = []
  for i, name in enumerate(_NAMES):
    text = (
        f'In {1800 + i} {name} was born near the old mill. The house was large'
        f' and very cold in the winter. Later {name} moved to the city with a'
        ' small bag. Nobody knew why the bag was green. A letter of'
        f' {1800 + i} speaks of a long journey to the sea. It was found under'
        ' the floor of a shop. The shop had sold bread and little else for'
        f' years. On 3 May {1850 + i} all of it was sold.'
    )
    items.append({'id': f'life{i}', 'title': name, 'text': text})
  arguments = {
      'max_wordpieces': 32, 'validation_fraction': 0.0, **arguments
  }
  source = write_records(folder / 'lives.jsonl', items)
  return prepare_corpus(source, folder / 'corpus', **arguments)


def prepare_corpus(source, output, **arguments):
  """Prepares a small corpus of one source or several, and opens it."""
  arguments = {'workers': 1, 'progress': False, 'vocab_size': 400, **arguments}
  sources = source if isinstance(source, list) else [source]
  prepare.prepare(sources, output, **arguments)
  return corpus_lib.Corpus.open(output)
