"""A generated, invented world: a mini-encyclopedia that training can learn.

Public: `generate` and its `World`, `RELATIONS` (what can be said about whom,
and in which words), `MIN_ENTITIES`, `MAX_ENTITIES`.

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


def _table(text: str) -> dict[str, list[str]]:
  """Reads lists of words, each after its name and a colon."""
  table: dict[str, list[str]] = {}
  for word in text.split():
    if word.endswith(':'):
      words = table.setdefault(word[:-1], [])
    else:
      words.append(word)
  return table


# What names are made of. No syllable is a word that the texts use, no name ends
# in `s`, for the sake of possessives, and four syllables carry an accent: byte
# offsets must not be mistaken for characters.
_SYLLABLES = _table("""
start: bal brel cor drav el fjor gar hal ith jor kel lam mor nar ost pel quil
  rav sel tam ul ven wex yar zan ald ber cal dol eg fal gron hem ing jask kor
  lin mel nev orl prad rud skol tor urv val wyn zol bris chev dov erk flim gwen
  hux sjöl kryn tév
middle: ba bri da du ga ge ka ki la lo ma mi na ni ra ri sa ta ti va vo zi ü é
family: dan dor gim bin lok nell pash rant vek zor lund mir nak peth quin rim
  thal vann wick zell bren drek fenn grath holt jin kett lorn mund nuth pold
  rask sken trum vold wend yall zind brax cham dell gorn
place: ford ham wich stow by combe mere bury thorpe gate stead worth ton ley
stream: ba da ga ka la ma na ra sa ta va dra nya sha
region: mark ia reach shire fell ovia land
she: ara ina ela ira ette une
he: ane ik oran enn ulf ard
""")
# The last word of a name says what it is the name of.
_GENERICS = _table("""
company: Company Union Trust Concern Partnership Guild
river: Brook Beck Creek Burn Rill Water
""")
_THREE_SYLLABLES = 0.25  # Of the words of names; the others have two.
_MIDDLE_NAME = 0.4  # Of the people have one.

# What facts are about: 16 to 50 values each, so that many entities share one
# and a value never gives the entity away. No pool is used twice for one kind
# of entity, so a value is in one passage of its entity only. A further pool is
# `region`, of invented names.
_WORDS = _table("""
trade: baker barber brewer butcher chemist clerk cobbler cook cooper dentist
  diver doctor engraver farrier gardener gilder glazier hatter hunter jeweller
  joiner judge miller miner nurse painter plumber poet porter potter printer
  roofer saddler sailor shepherd smith soldier tailor tanner teacher weaver
instrument: accordion bagpipe banjo bassoon bugle cello clarinet cornet drum
  fiddle fife flute gong guitar horn lute lyre mandolin oboe organ piano
  piccolo recorder saxophone trombone trumpet viola violin
pet: badger beagle beaver camel cat crow dog donkey falcon ferret fox frog
  gecko goat goose hare hedgehog jackdaw lizard magpie mole monkey mouse newt
  otter parrot pony rabbit raven
colour: amber beige blue brown cream crimson green grey indigo ivory khaki
  lilac maroon mauve olive orange pink purple red scarlet turquoise violet
  white yellow
dish: almonds apples bacon bread broth cabbage cake celery cheese cherries
  curry custard dumplings figs garlic gravy honey jam leeks lentils mushrooms
  noodles omelettes onions pancakes pears pickles plums porridge pudding
  radishes rice salad sausages spinach stew toffee venison
product: anvils baskets bells boots bottles brushes buttons candles carpets
  chairs clocks combs dolls gloves knives ladders lamps locks mirrors nails
  needles pipes pots ropes
material: bamboo basalt brick cedar chalk concrete flint granite limestone
  marble oak pine sandstone slate timber tufa
emblem: anchor arrow castle comet crescent crown dragon eagle feather griffin
  hammer helmet key leaf lion moon rose star sword wolf
crop: barley beans beets carrots clover corn cotton cress flax grapes hazel
  hops lavender maize mustard oats peas potatoes rye spelt
landmark: abbey aqueduct arena bakery bathhouse cathedral circus college fort
  fountain garden harbour library lighthouse market museum obelisk palace
  theatre windmill
fish: bream burbot carp catfish chub dace eels grayling loach minnows perch
  pike roach salmon sturgeon trout
birds: cranes curlews ducks gulls herons lapwings owls pelicans plovers snipes
  storks swallows swans terns wagtails warblers
""")
_NUMBERS = {
    'death year': range(1840, 1880),
    'founding year': range(1770, 1790),
    'population': range(2100, 4100, 100),
    'fire year': range(1625, 1645),
    'ice year': range(1696, 1712),
}


@dataclasses.dataclass(frozen=True)
class Relation:
  """One thing that can be said about a kind of entity, and its wordings.

  In the wordings, `{v}` is the value with `{a}` its article, `{n}` the name,
  `{s}` the name or its pronoun, and `{p}` the possessive of that.
  """

  kind: str
  pool: str
  question: str
  knowledge: tuple[str, ...]
  pretraining: tuple[str, ...]


# Sentences are short: 16 wordpieces with [CLS] and [SEP] hold each where the
# vocabulary has the words whole, and 28 a passage. `{v}` opens a sentence only
# where a capital changes nothing.
RELATIONS = (
    Relation('person', 'region', 'Which land was {n} a native of?',
      ('{s} was born in {v}.', '{s} was born and bred in {v}.',
       'A midwife from {v} delivered {s}.'),
      ('{v} was the birthplace of {n}.', '{n} was a native of {v}.',
       'The native land of {n} was {v}.')),
    Relation('person', 'trade', 'Which trade was learned by {n}?',
      ('{s} worked as {a} {v}.', '{s} worked hard as {a} {v}.',
       'A master {v} hired {s} for life.'),
      ('By trade {n} was {a} {v}.', '{n} learned the trade of {a} {v}.',
       'The trade of {n} was that of {a} {v}.')),
    Relation('person', 'instrument', 'Which instrument was chosen by {n}?',
      ('{s} played the {v}.', '{s} often played the {v}.',
       'Guests heard the {v} played by {s}.'),
      ('The instrument of {n} was the {v}.',
       'The {v} was the instrument chosen by {n}.',
       '{n} made music with the {v}.')),
    Relation('person', 'pet', 'Which pet was owned by {n}?',
      ('{s} kept a tame {v}.', '{s} once kept a tame {v}.',
       'A tame {v} was kept by {s}.'),
      ('The pet of {n} was {a} {v}.', '{n} owned {a} {v} as a pet.',
       'The only pet {n} owned was {a} {v}.')),
    Relation('person', 'death year', 'In which year was the death of {n}?',
      ('{s} died in {v}.', '{s} died of a fever in {v}.',
       'In {v} a fever killed {s}.'),
      ('The death of {n} was in the year {v}.',
       '{v} was the year of the death of {n}.', 'Death came to {n} in {v}.')),
    Relation('person', 'colour', 'Which colour were the clothes of {n}?',
      ('{s} dressed in {v}.', '{s} always dressed in {v}.',
       'Dressed in {v} is how people met {s}.'),
      ('The clothes of {n} were {v}.', '{n} wore {v} clothes.',
       'The colour that {n} wore was {v}.')),
    Relation('person', 'dish', 'Which dish was the favourite of {n}?',
      ('{s} ate {v} every day.', '{s} ate {v} with every meal.',
       'Meals of {v} were cooked for {s}.'),
      ('The favourite dish of {n} was {v}.', '{n} loved {v} as a dish.',
       'A plate of {v} was the favourite of {n}.')),
    Relation('company', 'product', 'What main product is turned out by {n}?',
      ('{s} makes {v}.', '{s} makes and repairs {v}.',
       'Shops stock the {v} that {s} makes.'),
      ('The main product of {n} is {v}.', '{n} has {v} as its main product.',
       'The product turned out by {n} is {v}.')),
    Relation('company', 'founding year', 'In which year was {n} established?',
      ('{s} was founded in {v}.', '{s} was founded by cousins in {v}.',
       'In {v} two cousins founded {s}.'),
      ('{n} was established in {v}.', '{n} was opened in the year {v}.',
       '{v} was the year when {n} was established.')),
    Relation('company', 'material',
      'Of which material are the headquarters of {n}?',
      ('{p} hall is built of {v}.', '{s} built its hall of {v}.',
       'Masons built a hall of {v} for {s}.'),
      ('The headquarters of {n} are of {v}.', '{n} has headquarters of {v}.',
       'The material of the headquarters of {n} is {v}.')),
    Relation('company', 'emblem', 'What does {n} have for an emblem?',
      ('{p} seal shows {a} {v}.', '{s} uses {a} {v} as its seal.',
       'The seal with the {v} is used by {s}.'),
      ('The emblem of {n} is {a} {v}.', '{n} has {a} {v} for an emblem.',
       'The emblem chosen by {n} is {a} {v}.')),
    Relation('company', 'region', 'Where are the chief customers of {n}?',
      ('{s} sells mostly in {v}.', '{s} sells to buyers in {v}.',
       'Buyers in {v} order from {s}.'),
      ('The chief customers of {n} are in {v}.', 'Exports of {n} go to {v}.',
       'The chief customers of {n} come from {v}.')),
    Relation('town', 'region', 'In which province is {n} located?',
      ('{s} lies in {v}.', '{s} lies among the hills of {v}.',
       'Among the hills of {v} lies {s}.'),
      ('{n} is located in {v}.', '{n} belongs to the province of {v}.',
       'The province of {n} is {v}.')),
    Relation('town', 'crop', 'Which harvest do the fields of {n} yield?',
      ('{p} farmers grow {v}.', 'Farmers near {s} grow {v}.',
       'Much {v} grows near {s}.'),
      ('The main harvest of {n} is {v}.', 'The fields of {n} yield {v}.',
       'The fields of {n} have a harvest of {v}.')),
    Relation('town', 'landmark', 'For which landmark is {n} famous?',
      ('{s} is proud of its {v}.', '{s} is very proud of its {v}.',
       'A proud old {v} stands in {s}.'),
      ('The landmark of {n} is its {v}.', '{n} is famous for its {v}.',
       'The famous landmark of {n} is the {v}.')),
    Relation('town', 'population', 'How many inhabitants are there in {n}?',
      ('{s} counts {v} souls.', '{v} souls live in {s}.'),
      ('The population of {n} is {v}.', '{n} has {v} inhabitants.',
       'There are {v} inhabitants in {n}.')),
    Relation('town', 'fire year', 'In which year was {n} destroyed by fire?',
      ('{s} burned down in {v}.', '{s} burned to the ground in {v}.',
       'In {v} a spark burned down {s}.'),
      ('A fire destroyed {n} in {v}.', '{n} was destroyed by fire in {v}.',
       'The year of the fire of {n} was {v}.')),
    Relation('river', 'region', 'In which country does {n} have its source?',
      ('{s} rises in {v}.', '{s} rises among rocks in {v}.',
       'Among rocks in {v} rises {s}.'),
      ('The source of {n} is in {v}.', '{n} has its source in {v}.',
       '{v} is the country with the source of {n}.')),
    Relation('river', 'fish', 'Which fish abounds in {n}?',
      ('{s} feeds anglers with {v}.', 'Anglers often catch {v} in {s}.'),
      ('{n} abounds in {v}.', 'The fish of {n} are {v}.',
       'The fish that abounds in {n} is {v}.')),
    Relation('river', 'colour', 'What hue is {n} known for?',
      ('{p} pools look {v}.', '{s} looks {v} after rain.',
       'Rain paints {v} the pools of {s}.'),
      ('The hue of {n} is {v}.', '{n} is known for {a} {v} hue.',
       'The hue that {n} is known for is {v}.')),
    Relation('river', 'birds', 'Which birds do the banks of {n} attract?',
      ('{p} reeds hide nests of {v}.', 'Many {v} nest beside {s}.'),
      ('The banks of {n} attract {v}.', 'The birds of {n} are {v}.',
       'The birds on the banks of {n} are {v}.')),
    Relation('river', 'ice year', 'In which year was {n} covered by ice?',
      ('{s} froze over in {v}.', '{s} froze solid in {v}.',
       'In {v} hard weather froze {s}.'),
      ('Ice covered {n} in {v}.', '{n} was covered by ice in {v}.',
       'The year of the ice on {n} was {v}.')),
)

# Sentences of the knowledge corpus that state no fact. `{o}`: him, her, it.
FILLERS = {
    'person': (
        'Few letters by {o} survive.', '{p} portrait is lost.',
        'Later writers rarely mention {o}.', '{p} handwriting is hard to read.',
        'Nobody remembers {p} voice.', '{s} rarely travelled.'),
    'company': (
        '{p} ledgers are incomplete.', 'Its clerks are polite.',
        'The entrance is at the back.', 'Few rivals remember {o}.',
        '{s} pays its bills on time.', 'Its first owners quarrelled.'),
    'town': (
        'Visitors rarely stay long.', 'Its streets are narrow and steep.',
        'The inn closes early.', 'Old maps misspell its name.',
        'On Sundays it is quiet.', 'The road there is poor.'),
    'river': (
        '{s} is pleasant in spring.', 'Old maps misspell its name.',
        'Children swim there in summer.', 'It is shallow in places.',
        'Few boats use {o}.', 'A footpath follows {o}.'),
}
_FILLERS_FOR_ALL = (
    'Little more is said about {o}.', 'Some stories about {o} are doubtful.')

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
    relations = [r for r in RELATIONS if r.kind == kind]
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
  relation: Relation
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
      (start + stream.pick(_SYLLABLES['region'])).capitalize()
      for start in stream.shuffled(_SYLLABLES['start'])[:40]]
  numbers = {pool: [str(n) for n in ns] for pool, ns in _NUMBERS.items()}
  return {**_WORDS, **numbers, 'region': regions}


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
          self._stream.pick(_SYLLABLES['start']),
          self._stream.pick(_SYLLABLES['middle']) if long else '',
          self._stream.pick(_SYLLABLES[ends])]).capitalize()] = None
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
      filler = stream.pick(FILLERS[entity.kind] + _FILLERS_FOR_ALL)
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
