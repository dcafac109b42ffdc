"""Named entities found by rules and by trained taggers: F1 of their spans.

  python benchmarks/span_f1.py --corpus=CORPUS --ner=FOLDER \
      --workdir=runs/span_f1 --output=benchmarks/results/span_f1.json \
      [--init_from=bert:runs/imported_bert] [--flag=scratch:--config.steps=600]

FOLDER has gmb.jsonl.xz and wnut17-train.jsonl for training, wikigold.jsonl and
uner-ewt-dev.jsonl for evaluation alone. The last tenth of GMB is held out.
WNUT's types become the nearest of GMB. A tagger is trained from scratch, and
one from each workdir that --init_from names, such as an imported BERT or a
`mlm` job. A finished training is not run again. The vocabulary is that of the
corpus. On the two foreign sets only first and last word count, not the type;
neither has dates or numbers, so these are left out: of the rules by their kind,
of the tagger its type `tim`.
"""

import argparse
import dataclasses
import pathlib
import time
from typing import Any

import harness

from realm_jax.corpus import entities
from realm_jax.inference import tagging
from realm_jax.prepare import salient_spans as salient_spans_lib
from realm_jax.runtime import files

_FOREIGN = ('wikigold', 'uner-ewt-dev')
_NEAREST = {  # WNUT's type -> GMB's.
    'location': 'geo',
    'person': 'per',
    'corporation': 'org',
    'group': 'org',
    'product': 'art',
    'creative-work': 'art',
}
_DATES = 'tim'  # GMB's type of dates.

Sentences = list[entities.TaggedSentence]
Entities = list[list[entities.Entity]]


def divide(arguments: argparse.Namespace) -> list[pathlib.Path]:
  """Writes what is trained on, and the tenth that is not."""
  gmb = entities.read(str(arguments.ner / 'gmb.jsonl.xz'))
  wnut = entities.read(str(arguments.ner / 'wnut17-train.jsonl'))
  limit = len(gmb) * 9 // 10
  renamed = [
      dataclasses.replace(
          sentence,
          tags=[
              tag if tag == 'O' else tag[:2] + _NEAREST[tag[2:]]
              for tag in sentence.tags
          ],
      )
      for sentence in wnut
  ]
  paths = [arguments.workdir / name for name in ('train.jsonl', 'test.jsonl')]
  for path, sentences in zip(
      paths, ([*gmb[:limit], *renamed], gmb[limit:]), strict=True
  ):
    harness.write_lines(path, map(dataclasses.asdict, sentences))
  return paths


def by_rules(sentences: Sentences, names_only: bool) -> Entities:
  """Returns the spans of `find_spans` in tokens joined by spaces.

  It was made for running text; here it knows of no document, and whether a
  word that begins a sentence is a name it cannot look up elsewhere.
  """
  found: Entities = []
  for sentence in sentences:
    text = ' '.join(sentence.tokens)
    starts, limits, position = {}, {}, 0
    for word, token in enumerate(sentence.tokens):
      size = len(token.encode())
      starts[position], limits[position + size] = word, word + 1
      position += size + 1
    encoded = text.encode()
    of_one: list[entities.Entity] = []
    for start, limit in salient_spans_lib.find_spans(text):
      kind = salient_spans_lib.kind(encoded[start:limit].decode())
      if names_only and kind != 'name':
        continue
      if start in starts and limit in limits:
        of_one.append((kind, starts[start], limits[limit]))
    found.append(of_one)
  return found


def by_tagger(tagger: tagging.SentenceTagger, sentences: Sentences) -> Any:
  """The entities that a tagger finds, and wordpieces a second."""
  table = entities.TaggedTable.of(
      sentences, None, tagger.config.tagger.length, tagger.tokenizer
  )
  start = time.perf_counter()
  labels_NL = tagger(table)
  seconds = time.perf_counter() - start
  tags = entities.tags_of_words(
      table, labels_NL, tagger.types, [len(s.tokens) for s in sentences]
  )
  wordpieces = int((table.ids_NL != tagger.tokenizer.pad_id).sum())
  return [entities.entities(t) for t in tags], wordpieces / seconds


def measure(
    arguments: argparse.Namespace, held_out: pathlib.Path
) -> harness.Figures:
  """Returns flat figures of the rules and of all taggers that are trained."""
  figures: harness.Figures = {}
  sets = {
      name.replace('-', '_'): entities.read(
          str(arguments.ner / f'{name}.jsonl')
      )
      for name in _FOREIGN
  }
  sets['gmb'] = entities.read(str(held_out))

  def record(method: str, name: str, found: Entities, gold: Entities) -> None:
    score = tagging.score(gold, found)['any']
    for what in ('precision', 'recall', 'f1'):
      figures[f'{method}_{name}_{what}'] = getattr(score, what)

  gold = {
      name: [entities.entities(s.tags) for s in sentences]
      for name, sentences in sets.items()
  }
  for name, sentences in sets.items():
    everything = name == 'gmb'
    record('rules', name, by_rules(sentences, not everything), gold[name])
    if not everything:
      record('rules_all', name, by_rules(sentences, False), gold[name])
  for method in arguments.init_from:
    workdir = arguments.workdir / method
    summary = files.read_json(workdir / 'summary.json')
    figures[f'{method}_steps'] = summary['step']
    figures[f'{method}_seconds'] = summary['seconds']
    tagger = tagging.SentenceTagger(workdir)
    for name, sentences in sets.items():
      found, rate = by_tagger(tagger, sentences)
      if name == 'gmb':
        for kind, score in tagging.score(gold[name], found).items():
          figures[f'{method}_{name}_{kind}_f1'] = score.f1
        # It comes last, when all is compiled.
        figures[f'{method}_wordpieces_per_second'] = round(rate)
      else:
        names = [[e for e in es if e[0] != _DATES] for es in found]
        record(method, name, names, gold[name])
  return figures


def main() -> None:
  parser = harness.parser(__doc__, 'corpus', 'ner', 'workdir')
  parser.add_argument(
      '--init_from', action='append', default=[], help='NAME:WORKDIR'
  )
  parser.add_argument(
      '--flag', action='append', default=[], help='METHOD:FLAG of `train`'
  )
  arguments = parser.parse_args()
  given = dict(pair.split(':', 1) for pair in arguments.init_from)
  arguments.init_from = {'scratch': None} | given
  arguments.workdir.mkdir(parents=True, exist_ok=True)
  train, held_out = divide(arguments)
  realm_jax = harness.Commands()
  for method, earlier in arguments.init_from.items():
    settings = {'corpus': arguments.corpus, 'tagger.files': train}
    if earlier:
      settings['init_from'] = earlier
    if arguments.small:
      settings['steps'] = 20
    flags = [flag.partition(':') for flag in arguments.flag]
    realm_jax.train(
        f'tagger.py:{"pretrained" if earlier else "scratch"}',
        arguments.workdir / method,
        settings,
        *(flag for of_method, _, flag in flags if of_method == method),
    )
  figures = measure(arguments, held_out)
  figures['commands'] = realm_jax.done
  harness.write(arguments.output, figures, 'jax')


if __name__ == '__main__':
  main()
