"""The words of the invented world: syllables, values, wordings, fillers.

Public: `RELATIONS` and `Relation` (what can be said about whom, and how),
`FILLERS`, `FILLERS_FOR_ALL`, and what names and values are made of:
`SYLLABLES`, `GENERICS`, `WORDS`, `NUMBERS`.
"""

import dataclasses


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
SYLLABLES = _table("""
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
GENERICS = _table("""
company: Company Union Trust Concern Partnership Guild
river: Brook Beck Creek Burn Rill Water
""")

# What facts are about: 16 to 50 values each, so that many entities share one
# and a value never gives the entity away. No pool is used twice for one kind
# of entity, so a value is in one passage of its entity only. A further pool is
# `region`, of invented names.
WORDS = _table("""
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
NUMBERS = {
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
FILLERS_FOR_ALL = (
    'Little more is said about {o}.', 'Some stories about {o} are doubtful.')
