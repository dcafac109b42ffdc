"""A generated, invented world: a mini-encyclopedia that training can learn.

Public: `generate` and its `World`, `MIN_ENTITIES`, `MAX_ENTITIES`. What can be
said about whom, and in which words, is in world_text.py.

The embedded default corpus, free of third-party text. It is built so that each
stage of training has something of its own to learn: the knowledge corpus and
the pretraining corpus share entity names and values but no relation words, so
ICT alone finds the entity but not the passage that states the fact. Questions
use the relation words of the pretraining corpus, in another order.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import operator
from typing import Any, NamedTuple, TypeVar
import zlib

import numpy as np

from realm_jax.prepare import world_text

_T = TypeVar('_T')

MIN_ENTITIES, MAX_ENTITIES = 20, 100_000  # What pools and names are made for.
# Kind of entity -> its share of the world; people take what is left.
_SHARES = {'person': 0.5, 'company': 0.18, 'town': 0.18, 'river': 0.14}
_HELD_OUT = 0.1  # Of the facts.
_PASSAGES_PER_FACT = 0.75  # 6 facts in 4.5 passages, one or two in each.
_FILLER = 0.5  # Of the passages have a sentence that states no fact.
# A pronoun for the name in the first and in the second sentence of a passage:
# 0.4 of all sentences, as 3 in 4 sentences are the first of their passage.
_PRONOUN = (0.25, 0.85)
_THREE_SYLLABLES = 0.25  # Of the words of names; the others have two.
_MIDDLE_NAME = 0.4  # Of the people have one.

_PRONOUNS = {  # Subject, possessive, object.
    'he': ('He', 'His', 'him'),
    'she': ('She', 'Her', 'her'),
    'it': ('It', 'Its', 'it'),
}


@dataclasses.dataclass(frozen=True)
class World:
  """The three texts about one world; the records are ready for JSON.

  `knowledge`: passages {id, title, article, text, spans}, an entity's in a
    row. `spans` are the values, as UTF-8 byte offsets [start, limit) in text.
  `pretraining`: sentences {id, title, text, spans}, those of held-out facts
    also with `split: 'validation'`. The title is empty.
  `questions`: one for each fact {question, answers, match, passage_id,
    held_out}; `passage_id` is the one passage that states the fact.
  """

  knowledge: list[dict[str, Any]]
  pretraining: list[dict[str, Any]]
  questions: list[dict[str, Any]]


def generate(seed: int, entities: int = 1000) -> World:
  """Makes the world of a seed.

  A seed and a size mean the same world with any version of Python and numpy:
  only uniform doubles are drawn, in a stream for each purpose.

  Args:
    seed: not negative.
    entities: people, companies, towns and rivers together, with six facts and
      4.5 passages each on average; from `MIN_ENTITIES` to `MAX_ENTITIES`.

  Raises:
    ValueError: for a seed or a size outside these bounds.
  """
  seed, entities = operator.index(seed), operator.index(entities)
  if seed < 0:
    raise ValueError(f'world seed is {seed}; it must be 0 or more')
  if not MIN_ENTITIES <= entities <= MAX_ENTITIES:
    raise ValueError(
        f'a world of {entities} entities is out of bounds; it must have '
        f'{MIN_ENTITIES} to {MAX_ENTITIES} of them')
  all_pools = _pools(_Stream(seed, 'regions'))
  counts = {kind: int(entities * share) for kind, share in _SHARES.items()}
  counts['person'] += entities - sum(counts.values())

  world = World([], [], [])
  names = _Names(_Stream(seed, 'names'), entities)
  for kind, count in counts.items():
    relations = [r for r in world_text.RELATIONS if r.kind == kind]
    stream = _Stream(seed, kind)
    values = _Stream(seed, f'{kind} values')
    numbered = range(count * len(relations))  # The facts.
    held_out = set(_Stream(seed, f'{kind} held out').shuffled(numbered)[
        :round(_HELD_OUT * len(numbered))])
    width = max(4, len(str(count - 1)))
    for number in range(count):
      name, pronoun = names.draw(kind)
      entity = _Entity(f'{kind}-{number:0{width}d}', kind, name, pronoun)
      facts = [
          _Fact(relation, values.pick(all_pools[relation.pool]), i in held_out)
          for i, relation in enumerate(relations, number * len(relations))]
      passages, gold = _passages(entity, facts, stream)
      world.knowledge.extend(passages)
      world.pretraining.extend(_sentences(entity, facts, stream))
      world.questions.extend(
          {'question': fact.relation.question.format(n=name),
           'answers': [fact.value], 'match': 'string',
           'passage_id': passage_id, 'held_out': fact.held_out}
          for fact, passage_id in zip(facts, gold, strict=True))
  return world


class _Entity(NamedTuple):
  id: str
  kind: str
  name: str
  pronoun: str


class _Fact(NamedTuple):
  relation: world_text.Relation
  value: str
  held_out: bool


class _Stream:
  """Draws of one purpose; uniform doubles are stable across numpy versions."""

  def __init__(self, seed: int, purpose: str):
    # Not hash(): it differs from one process to the next.
    self._rng = np.random.default_rng([seed, zlib.crc32(purpose.encode())])
    self._drawn: Iterator[float] = iter(())

  def uniform(self) -> float:
    value = next(self._drawn, None)
    if value is None:  # Drawn in blocks: a single draw costs ten times more.
      self._drawn = iter(self._rng.random(1024).tolist())
      value = next(self._drawn)
    return value

  def pick(self, items: Sequence[_T]) -> _T:
    return items[int(self.uniform() * len(items))]

  def shuffled(self, items: Sequence[_T]) -> list[_T]:
    keyed = [(self.uniform(), i) for i in range(len(items))]
    return [items[i] for _, i in sorted(keyed)]


def _pools(stream: _Stream) -> dict[str, list[str]]:
  """The values of every pool, by its name."""
  regions = [
      (start + stream.pick(world_text.SYLLABLES['region'])).capitalize()
      for start in stream.shuffled(world_text.SYLLABLES['start'])[:40]]
  numbers = {
      pool: [str(number) for number in numbers]
      for pool, numbers in world_text.NUMBERS.items()
  }
  return {**world_text.WORDS, **numbers, 'region': regions}


class _Names:
  """Unique names, made of words that several entities share.

  A name of one word would end up as one wordpiece where the vocabulary is
  large for the world, and retrieval would learn each by heart.
  """

  def __init__(self, stream: _Stream, entities: int):
    self._stream = stream
    self._taken: set[str] = set()
    # Two words tell at least five times the entities apart, and in a world of
    # 1,000 about nine names share each word.
    size = math.isqrt(10 * entities)
    self._families = self._words('family', max(100, size))
    self._places = self._words('place', max(40, size // 2))
    self._streams = self._words('stream', max(40, size // 2))
    self._given = [
        (word, pronoun) for pronoun in ('she', 'he')
        for word in self._words(pronoun, max(40, size // 4))]

  def _words(self, ends: str, size: int) -> list[str]:
    """So many different words."""
    words: dict[str, None] = {}
    while len(words) < size:
      # The ends of given names start with a vowel, middles end in one.
      long = ends not in _PRONOUNS and (
          self._stream.uniform() < _THREE_SYLLABLES)
      words[''.join([
          self._stream.pick(world_text.SYLLABLES['start']),
          self._stream.pick(world_text.SYLLABLES['middle']) if long else '',
          self._stream.pick(world_text.SYLLABLES[ends])]).capitalize()] = None
    return list(words)

  def draw(self, kind: str) -> tuple[str, str]:
    """A name that was not drawn before, and its pronoun."""
    pick = self._stream.pick
    while True:
      pronoun, family = 'it', pick(self._families)
      match kind:
        case 'person':
          given, pronoun = pick(self._given)
          middle = self._stream.uniform() < _MIDDLE_NAME
          words = [given, *([pick(self._families)] if middle else []), family]
        case 'company':
          words = [
              family,
              pick(self._families),
              pick(world_text.GENERICS[kind]),
          ]
        case 'town':
          words = [pick(self._places), family]
        case _:
          words = [pick(self._streams), family, pick(world_text.GENERICS[kind])]
      name = ' '.join(words)
      if name not in self._taken and len(set(words)) == len(words):
        self._taken.add(name)
        return name, pronoun


def _passages(
    entity: _Entity, facts: list[_Fact], stream: _Stream
) -> tuple[list[dict[str, Any]], list[str]]:
  """The passages of an entity, and for each fact the id of its passage."""
  # Rounded at random, so that the mean holds for any number of facts.
  count = int(len(facts) * _PASSAGES_PER_FACT + stream.uniform())
  order = stream.shuffled(range(len(facts)))
  # One or two facts a passage, the passages with two at no fixed place.
  stated = stream.shuffled([order[start::count] for start in range(count)])
  records, gold = [], [''] * len(facts)
  for number, indices in enumerate(stated):
    passage_id = f'{entity.id}#{number}'
    parts: list[tuple[str, list[int]]] = []
    for place, i in enumerate(indices):
      gold[i] = passage_id
      parts.append(_sentence(
          stream.pick(facts[i].relation.knowledge), entity, facts[i].value,
          by_pronoun=stream.uniform() < _PRONOUN[place]))
    if stream.uniform() < _FILLER:
      filler = stream.pick(
          world_text.FILLERS[entity.kind] + world_text.FILLERS_FOR_ALL
      )
      text, _ = _sentence(filler, entity, '', by_pronoun=True)
      # Never first: a pronoun there had nothing but the title to refer to.
      parts.insert(stream.pick(range(1, len(parts) + 1)), (text, []))
    text, spans = '', []
    for sentence, span in parts:
      text += ' ' if text else ''
      if span:
        spans.append([len(text.encode()) + offset for offset in span])
      text += sentence
    records.append({
        'id': passage_id, 'title': entity.name, 'article': entity.id,
        'text': text, 'spans': spans})
  return records, gold


def _sentences(
    entity: _Entity, facts: list[_Fact], stream: _Stream
) -> Iterator[dict[str, Any]]:
  """Yields two or three pretraining sentences for each fact."""
  number = 0
  for fact in facts:
    wordings = stream.shuffled(fact.relation.pretraining)
    for wording in wordings[:2 + (stream.uniform() < 0.5)]:
      text, span = _sentence(wording, entity, fact.value, by_pronoun=False)
      record = {
          'id': f'{entity.id}/{number}', 'title': '', 'text': text,
          'spans': [span]}
      if fact.held_out:
        record['split'] = 'validation'
      number += 1
      yield record


def _sentence(
    wording: str, entity: _Entity, value: str, by_pronoun: bool
) -> tuple[str, list[int]]:
  """A sentence and the UTF-8 byte offsets of the value in it."""
  subject, possessive, object_ = _PRONOUNS[entity.pronoun]
  if not wording.startswith(('{s}', '{p}')):  # It is not the first word.
    subject, possessive = object_, possessive.lower()
  if not by_pronoun:
    subject, possessive = entity.name, f"{entity.name}'s"
  slots = {
      'n': entity.name, 's': subject, 'p': possessive, 'o': object_,
      'a': 'an' if value[:1] in tuple('aeiou') else 'a'}
  before, _, after = wording.partition('{v}')
  before = before.format(**slots)
  start = len(before.encode())
  text = before + value + after.format(**slots)
  return text, [start, start + len(value.encode())]
