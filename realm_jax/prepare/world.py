"""A generated, invented world: a small encyclopedia for training.

The world is free of third-party text, and each stage of training has something
of its own to learn: the knowledge and the pretraining corpus share entity names
and values but no relation words, so ICT alone finds the entity but not the
passage that states the fact. Questions use the relation words of the
pretraining corpus in another order.

world.json has the words. No syllable is a word of the texts, no name ends in
`s`, because of possessives, and four syllables have an accent, because byte
offsets must differ from characters. A pool has 16 to 50 values; as many
entities share a value and it never identifies one; no pool is used twice for a
kind of entity, so a value occurs in one passage of its entity. With a
vocabulary of whole words, every sentence has at most 16 wordpieces with [CLS]
and [SEP], and every passage 28.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from importlib import resources
import json
import math
import operator
from typing import Any, NamedTuple, TypeVar
import zlib

import numpy as np

_T = TypeVar('_T')

MIN_ENTITIES, MAX_ENTITIES = 20, 100_000  # Bounds for the pools and names.
# Share of each kind of entity; people take the remainder.
_SHARES = {'person': 0.5, 'company': 0.18, 'town': 0.18, 'river': 0.14}
_HELD_OUT = 0.1  # Share of the facts.
_PASSAGES_PER_FACT = 0.75  # 6 facts in 4.5 passages, one or two in each.
_FILLER = 0.5  # Share of the passages with a sentence that states no fact.
# Probability of a pronoun in the first and the second sentence of a passage.
# 3 in 4 sentences are the first of their passage, so 0.4 of all have one.
_PRONOUN = (0.25, 0.85)
_THREE_SYLLABLES = 0.25  # Share of the words of names; the others have two.
_MIDDLE_NAME = 0.4  # Share of the people.

_PRONOUNS = {  # Subject, possessive, object.
    'he': ('He', 'His', 'him'),
    'she': ('She', 'Her', 'her'),
    'it': ('It', 'Its', 'it'),
}


@dataclasses.dataclass(frozen=True)
class Relation:
  """A relation of a kind of entity to a pool of values, and its wordings.

  In the wordings, `{v}` is the value with `{a}` its article, `{n}` the name,
  `{s}` the name or its pronoun, `{p}` the possessive of that, `{o}` him, her or
  it.
  """

  kind: str
  pool: str
  question: str
  knowledge: list[str]
  pretraining: list[str]


_FILE = resources.files('realm_jax.prepare') / 'world.json'
_TEXT = json.loads(_FILE.read_text('utf-8'))
RELATIONS = [Relation(**relation) for relation in _TEXT['relations']]
_SYLLABLES, _GENERICS, _VALUES = (
    {name: words.split() for name, words in _TEXT[table].items()}
    for table in ('syllables', 'generics', 'words')
)
_FILLERS = {  # Sentences of the knowledge corpus that state no fact.
    kind: fillers + _TEXT['fillers_for_all']
    for kind, fillers in _TEXT['fillers'].items()
}


@dataclasses.dataclass(frozen=True)
class World:
  """The texts of a world; the records can be written as JSON.

  knowledge: passages {id, title, article, text, spans}; those of an entity are
    adjacent. `spans` are the values, as UTF-8 byte offsets [start, limit).
  pretraining: sentences {id, title, text, spans} without title, and with
    `split: 'validation'` if they state a held-out fact.
  questions: {question, answers, match, passage_id, held_out} for each fact;
    `passage_id` is the only passage that states the fact.
  """

  knowledge: list[dict[str, Any]]
  pretraining: list[dict[str, Any]]
  questions: list[dict[str, Any]]


def from_name(name: str) -> World:
  """Generates the world of a source such as 'world:7:500'.

  Raises:
    ValueError: the name is wrong, or see `generate`.
  """
  numbers = name.split(':')[1:]
  if not 1 <= len(numbers) <= 2 or not all(
      number.isascii() and number.isdigit() for number in numbers
  ):
    raise ValueError(
        f'The source {name!r} is not of the form world:SEED[:ENTITIES] with'
        ' two whole numbers, such as world:0 or world:7:500.'
    )
  return generate(*map(int, numbers))


def generate(seed: int, entities: int = 1000) -> World:
  """Generates the world of a seed.

  The world is the same with any version of Python and numpy, as it is made from
  uniform doubles only, with a random stream for each purpose.

  Args:
    seed: not negative.
    entities: number of people, companies, towns and rivers, from `MIN_ENTITIES`
      to `MAX_ENTITIES`. They have six facts and 4.5 passages on average.

  Raises:
    ValueError: the seed or the size is out of bounds.
  """
  seed, entities = operator.index(seed), operator.index(entities)
  if seed < 0:
    raise ValueError(f'world seed is {seed}; it must be 0 or more')
  if not MIN_ENTITIES <= entities <= MAX_ENTITIES:
    raise ValueError(
        f'a world of {entities} entities is out of bounds; it must have '
        f'{MIN_ENTITIES} to {MAX_ENTITIES} of them'
    )
  all_pools = _pools(_Stream(seed, 'regions'))
  counts = {kind: int(entities * share) for kind, share in _SHARES.items()}
  counts['person'] += entities - sum(counts.values())

  world = World([], [], [])
  names = _Names(_Stream(seed, 'names'), entities)
  for kind, count in counts.items():
    relations = [r for r in RELATIONS if r.kind == kind]
    stream = _Stream(seed, kind)
    values = _Stream(seed, f'{kind} values')
    numbered = range(count * len(relations))  # The facts.
    order = _Stream(seed, f'{kind} held out').shuffled(numbered)
    held_out = set(order[: round(_HELD_OUT * len(numbered))])
    width = max(4, len(str(count - 1)))
    for number in range(count):
      name, pronoun = names.draw(kind)
      entity = _Entity(f'{kind}-{number:0{width}d}', kind, name, pronoun)
      facts = [
          _Fact(relation, values.pick(all_pools[relation.pool]), i in held_out)
          for i, relation in enumerate(relations, number * len(relations))
      ]
      passages, gold = _passages(entity, facts, stream)
      world.knowledge.extend(passages)
      world.pretraining.extend(_sentences(entity, facts, stream))
      world.questions.extend(
          {
              'question': fact.relation.question.format(n=name),
              'answers': [fact.value],
              'match': 'string',
              'passage_id': passage_id,
              'held_out': fact.held_out,
          }
          for fact, passage_id in zip(facts, gold, strict=True)
      )
  return world


class _Entity(NamedTuple):
  id: str
  kind: str
  name: str
  pronoun: str


class _Fact(NamedTuple):
  relation: Relation
  value: str
  held_out: bool


class _Stream:
  """Random draws for one purpose, from uniform doubles."""

  def __init__(self, seed: int, purpose: str):
    # Not hash(), which differs between processes.
    self._rng = np.random.default_rng([seed, zlib.crc32(purpose.encode())])
    self._drawn: Iterator[float] = iter(())

  def uniform(self) -> float:
    value = next(self._drawn, None)
    if value is None:  # In blocks: a single draw takes ten times as long.
      self._drawn = iter(self._rng.random(1024).tolist())
      value = next(self._drawn)
    return value

  def pick(self, items: Sequence[_T]) -> _T:
    return items[int(self.uniform() * len(items))]

  def shuffled(self, items: Sequence[_T]) -> list[_T]:
    keyed = [(self.uniform(), i) for i in range(len(items))]
    return [items[i] for _, i in sorted(keyed)]


def _pools(stream: _Stream) -> dict[str, list[str]]:
  """Returns the values of every pool."""
  regions = [
      (start + stream.pick(_SYLLABLES['region'])).capitalize()
      for start in stream.shuffled(_SYLLABLES['start'])[:40]
  ]
  numbers = {
      pool: [str(number) for number in range(*bounds)]
      for pool, bounds in _TEXT['numbers'].items()
  }
  return {**_VALUES, **numbers, 'region': regions}


class _Names:
  """Unique names of words that several entities share.

  With a large vocabulary, a name of one word would become one wordpiece, and
  retrieval would memorise it.
  """

  def __init__(self, stream: _Stream, entities: int):
    self._stream = stream
    self._taken: set[str] = set()
    # Two words distinguish at least five times as many entities as required. In
    # a world of 1,000, about nine names share each word.
    size = math.isqrt(10 * entities)
    self._families = self._words('family', max(100, size))
    self._places = self._words('place', max(40, size // 2))
    self._streams = self._words('stream', max(40, size // 2))
    self._given = [
        (word, pronoun) for pronoun in ('she', 'he')
        for word in self._words(pronoun, max(40, size // 4))
    ]

  def _words(self, ends: str, size: int) -> list[str]:
    """Returns `size` different words with endings of a kind."""
    words: dict[str, None] = {}
    while len(words) < size:
      # The endings of given names start with a vowel, and middles end in one.
      long = ends not in _PRONOUNS and self._stream.uniform() < _THREE_SYLLABLES
      word = self._stream.pick(_SYLLABLES['start'])
      if long:
        word += self._stream.pick(_SYLLABLES['middle'])
      word += self._stream.pick(_SYLLABLES[ends])
      words[word.capitalize()] = None
    return list(words)

  def draw(self, kind: str) -> tuple[str, str]:
    """Returns a new name and its pronoun."""
    pick = self._stream.pick
    while True:
      pronoun, family = 'it', pick(self._families)
      match kind:
        case 'person':
          given, pronoun = pick(self._given)
          middle = self._stream.uniform() < _MIDDLE_NAME
          words = [given, *([pick(self._families)] if middle else []), family]
        case 'company':
          words = [family, pick(self._families), pick(_GENERICS[kind])]
        case 'town':
          words = [pick(self._places), family]
        case _:
          words = [pick(self._streams), family, pick(_GENERICS[kind])]
      name = ' '.join(words)
      if name not in self._taken and len(set(words)) == len(words):
        self._taken.add(name)
        return name, pronoun


def _passages(
    entity: _Entity, facts: list[_Fact], stream: _Stream
) -> tuple[list[dict[str, Any]], list[str]]:
  """Returns the passages of an entity, and for each fact its passage's id."""
  # Random rounding keeps the mean for any number of facts.
  count = int(len(facts) * _PASSAGES_PER_FACT + stream.uniform())
  order = stream.shuffled(range(len(facts)))
  # Passages have one or two facts, in random order.
  stated = stream.shuffled([order[start::count] for start in range(count)])
  records, gold = [], [''] * len(facts)
  for number, indices in enumerate(stated):
    passage_id = f'{entity.id}#{number}'
    parts: list[tuple[str, list[int]]] = []
    for place, i in enumerate(indices):
      gold[i] = passage_id
      wording = stream.pick(facts[i].relation.knowledge)
      by_pronoun = stream.uniform() < _PRONOUN[place]
      parts.append(_sentence(wording, entity, facts[i].value, by_pronoun))
    if stream.uniform() < _FILLER:
      filler = stream.pick(_FILLERS[entity.kind])
      text, _ = _sentence(filler, entity, '', by_pronoun=True)
      # Never first, where its pronoun would refer to the title only.
      parts.insert(stream.pick(range(1, len(parts) + 1)), (text, []))
    text, spans = '', []
    for sentence, span in parts:
      text += ' ' if text else ''
      if span:
        spans.append([len(text.encode()) + offset for offset in span])
      text += sentence
    records.append({
        'id': passage_id,
        'title': entity.name,
        'article': entity.id,
        'text': text,
        'spans': spans,
    })
  return records, gold


def _sentences(
    entity: _Entity, facts: list[_Fact], stream: _Stream
) -> Iterator[dict[str, Any]]:
  """Yields two or three pretraining sentences for each fact."""
  number = 0
  for fact in facts:
    wordings = stream.shuffled(fact.relation.pretraining)
    for wording in wordings[: 2 + (stream.uniform() < 0.5)]:
      text, span = _sentence(wording, entity, fact.value, by_pronoun=False)
      record = {
          'id': f'{entity.id}/{number}',
          'title': '',
          'text': text,
          'spans': [span],
      }
      if fact.held_out:
        record['split'] = 'validation'
      number += 1
      yield record


def _sentence(
    wording: str, entity: _Entity, value: str, by_pronoun: bool
) -> tuple[str, list[int]]:
  """Returns a sentence and the UTF-8 byte offsets of its value."""
  subject, possessive, object_ = _PRONOUNS[entity.pronoun]
  if not wording.startswith(('{s}', '{p}')):  # It is not the first word.
    subject, possessive = object_, possessive.lower()
  if not by_pronoun:
    subject, possessive = entity.name, f"{entity.name}'s"
  slots = {
      'n': entity.name,
      's': subject,
      'p': possessive,
      'o': object_,
      'a': 'an' if value[:1] in tuple('aeiou') else 'a',
  }
  before, _, after = wording.partition('{v}')
  before = before.format(**slots)
  start = len(before.encode())
  text = before + value + after.format(**slots)
  return text, [start, start + len(value.encode())]
