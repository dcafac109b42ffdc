"""Salient spans by rules, and spans at random.

Salient span masking (Guu et al. 2020, section 3.4) masks names and dates, which
need world knowledge. The paper's tagger was never released; these rules for
English replace it. Records with `spans` of their own skip the rules.
"""

from collections.abc import Collection, Sequence
import itertools
import random
import re

from realm_jax.prepare import languages

# Random spans as in SpanBERT (Joshi et al. 2020): lengths in words are drawn
# from a geometric distribution, and the spans of a text cover 15 % of it.
_RANDOM_SHARE = 0.15
_RANDOM_END = 0.2
_RANDOM_LONGEST = 10
_RANDOM_TRIES = 20


def _character_class(wanted: list[int]) -> str:
  """Returns a [...] of a regular expression with ranges of code points."""
  ranges: list[list[int]] = []
  for code in wanted:
    if ranges and ranges[-1][1] == code - 1:
      ranges[-1][1] = code
    else:
      ranges.append([code, code])
  return '[' + ''.join(f'\\U{a:08x}-\\U{b:08x}' for a, b in ranges) + ']'


# `re` has no \p{Lu}. All letters in use are in the Basic Multilingual Plane.
_CAPITALS = [c for c in range(0xFFFF) if chr(c).isupper()]
# The class of all capitals is large, and slow to compile at each of its places
# in a pattern. So one of them replaces those that are not ASCII.
_OTHER_CAPITAL = re.compile(
    _character_class([c for c in _CAPITALS if c > 127 and chr(c).isalnum()])
)
_CAPITAL = 'À'
_UPPER = f'[A-Z{_CAPITAL}Ⓐ-Ⓩ]'  # No \w matches a circled letter.

# Words that are capitalised only because they begin a sentence or a quotation.
# They are removed from the front of a name: 'The Beatles' -> 'Beatles'.
_FUNCTION_WORDS = frozenset("""
    a about above according accordingly across actually additionally after
    afterwards again against albeit all almost along already also although
    altogether always am amid among amongst an and another any anyone anything
    apart are around as aside at away because before behind being below beneath
    beside besides between beyond both briefly but by can certain clearly
    collectively consequently conversely could currently de depending despite
    did do does due during each earlier early either elsewhere especially even
    eventually every everyone everything except few finally first firstly
    following for former formerly fortunately four from further furthermore
    generally given had half has have having he hence her here hers herself him
    himself his historically how however i i'm i've if immediately important in
    indeed initially inside instead into is it its itself just last lastly late
    later latter less let like likewise many may me meanwhile might more
    moreover most mostly much must my myself near nearly neither never
    nevertheless next no nobody none nonetheless nor not notable notably nothing
    notwithstanding now numerous of off often on once one ones only onto or
    originally other others otherwise our out outside over overall own part
    particularly per perhaps possibly presumably previously prior probably
    provided quite rather recent recently regarding respectively secondly
    seven several shall she should similar similarly simply since six so some
    somebody someone something sometimes soon specifically still subsequently
    such than that the their theirs them then there thereafter thereby therefore
    these they third this those though three through throughout thus to today
    together too toward towards traditionally two typically ultimately under
    unfortunately unlike until up upon us usually various very via was we were
    what whatever when whenever where whereas wherever whether which while who
    whoever whole whom whose why will with within without would yes yet you your
    """.split())

_MONTH = (
    r'(?:January|February|March|April|May|June|July|August|September|October'
    r'|November|December|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept|Sep|Oct|Nov|Dec)'
    r'\b\.?)'
)
_DAY = r'(?:[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?'
_DAYS = rf'{_DAY}(?:\s?[-–—/]\s?{_DAY})?'
_YEAR = r'(?:1\d{3}|20\d{2})'
_YEARS = rf'{_YEAR}(?:s|\s?[-–—/]\s?(?:{_YEAR}|\d{{2}}))?'
_ERA = r'(?:BCE|CE|BC|AD|B\.C\.E\.|B\.C\.|A\.D\.)'
_DATE = '|'.join([
    rf'{_DAYS} (?:of )?{_MONTH}(?:,? {_YEAR})?',  # 12 May 1990, 3rd of June
    rf'{_MONTH} {_DAYS},? {_YEAR}',  # May 12, 1990
    rf'{_MONTH},? {_YEAR}',  # May 1990
    rf'{_MONTH} {_DAYS}(?![\d,.]*\d)',  # May 12
    rf'\d{{1,2}}(?:st|nd|rd|th)[ -]century(?: {_ERA})?',  # 5th century BC
    r'(?:AD|A\.D\.) \d{1,4}',  # AD 79
    rf'\d{{1,4}}(?:\s?[-–—]\s?\d{{1,4}})? {_ERA}(?!\w)',  # 44 BC
    rf'{_YEARS}(?![\d,.%°]*[\d%°])(?!\w)',  # 1990, the 1990s, 1914-18
])

_NUMBER = r'(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?'
_SCALE = r'(?:hundred|thousand|million|billion|trillion)'
_UNIT = (
    r'(?:%|‰|°[CF]?|percent|per cent|percentage points?|degrees?'
    r'|(?:kilo|centi|milli|nano|micro)?(?:metres?|meters?|grams?|watts?|hertz)'
    r'|[kcmnμ]?m[²³2]?|km/h|mph|[kM]?g|lbs?|ft|feet|foot|inch(?:es)?|yards?'
    r'|miles?|square (?:miles?|kilometres?|kilometers?|metres?|meters?|feet)'
    r'|acres?|hectares?|ha|tons?|tonnes?|pounds?|litres?|liters?|gallons?'
    r'|[kMGT]?(?:W|Hz|B|eV)|volts?|years?|months?|weeks?|days?|hours?|minutes?'
    r'|seconds?|dollars?|euros?|people|inhabitants|copies|votes|seats)'
)
_QUANTITY = '|'.join([
    # $5, US$1.2 million
    rf'(?:US|A|C|NZ|HK)?[$€£¥]\s?{_NUMBER}(?:[ -]{_SCALE})?',
    # 12 km, 3.5 million people, 20%
    rf'{_NUMBER}(?:[ -]{_SCALE})?[ -]?{_UNIT}(?!\w)',
    rf'{_NUMBER}[ -]{_SCALE}(?!\w)',  # 3.5 million
    r'(?:\d{1,3}(?:,\d{3})+|\d+)(?:st|nd|rd|th)(?!\w)',  # 21st, 1,000th
    # Bare numbers from two digits on; shorter ones say little.
    r'(?:\d{1,3}(?:,\d{3})+|\d{2,})(?:\.\d+)?(?!\w|\.\d)',
    r'\d\.\d+(?!\w|\.\d)',
])

_TITLE = (
    r'(?:Mr|Mrs|Ms|Dr|Prof|St|Sts|Ste|Gen|Col|Lt|Sgt|Capt|Cmdr|Adm|Rev|Hon|Gov'
    r'|Sen|Rep|Pres|Fr|Mt|Ft|Maj)\.'
)
_CORE = rf"{_UPPER}\w*(?:['’](?!s\b)\w+)*(?:&{_UPPER}\w*)*"
_WORD = (
    rf'{_CORE}(?:[-–](?:(?:upon|on|under|sur|de|la|le|les|en|al|el|du|des)-)?'
    rf'{_CORE})*'
)
# 'J. R. R. Tolkien', 'U.S.', 'St. Louis', 'Jean-Paul', 'AT&T', "O'Brien".
_INITIALS = rf'{_UPPER}(?:\.{_UPPER})+\.?|{_UPPER}\.(?=\s?{_UPPER})'
_PART = rf'(?:{_TITLE}|{_INITIALS}|{_WORD})'
_LINK = (
    r'(?:of the|of|the|de la|de las|de los|de|del|della|di|da|das|dos|do|du|des'
    r'|der|van der|van den|van de|van|von der|von|zu|bin|ibn|y|upon|&)'
)
_NAME = rf'{_PART}(?: ?(?<=\.){_PART}| (?:{_LINK} )?{_PART})*'
_ANY = (
    rf'(?<![\w.])(?:(?P<date>{_DATE})|(?P<number>(?<![-‐‑–−])(?:{_QUANTITY}))'
    rf'|(?P<name>{_NAME}))'
)
# Characters that can begin a span. Searching for a set of characters is several
# times as fast as for a pattern that begins with a lookbehind or alternatives.
_FIRST = rf'[\d$€£¥{_UPPER[1:]}'


_SPAN, _START = re.compile(_ANY), re.compile(_FIRST)
_SINGLE_WORD = re.compile(_CORE)
_LEADING_WORD = re.compile(rf'(?:{_CORE})(?: {_LINK}(?= ))? ')
_FIRST_LETTER = re.compile(r'\w')
_MID_SENTENCE = re.compile(
    rf' (?<=[\w,;] )({_character_class(_CAPITALS)}\w*)'
)
_RUN = re.compile(r'\w+')


def document_names(text: str) -> frozenset[str]:
  """Returns the single words that a document uses as names.

  They have a capital letter inside a sentence and never occur in lower case.
  `find_spans` uses them to tell 'Historians say' from 'Paris is'.
  """
  words = set(_MID_SENTENCE.findall(text))
  written = set(_RUN.findall(text))
  return frozenset(word for word in words if word.lower() not in written)


def find_spans(
    sentence: str, names: Collection[str] | None = None
) -> list[tuple[int, int]]:
  """Finds names, dates, years, and numbers with their units.

  Args:
    sentence: one sentence of English.
    names: single words known to be names (`document_names`). A single word at
      the start of the sentence must be one of them to be a span. None: it must
      only not be a common function word.

  Returns:
    Half-open ranges of UTF-8 bytes, in order, not overlapping.
  """
  first = _FIRST_LETTER.search(sentence)
  text = _with_one_capital(sentence)
  spans = []
  position = 0
  while begin := _START.search(text, position):
    start = begin.start()
    match = _SPAN.match(text, start)
    if match is None:
      position = start + 1
      continue
    position = match.end()
    if match.lastgroup == 'name':
      rest = _skip_function_word(text, start, position)
      if rest > start:  # 'In May 1990': search again after the 'In'.
        position = rest
        continue
      if position - start < 2:  # An initial.
        continue
      if (
          names is not None
          and first is not None
          and start == first.start()
          and not _is_name(sentence[start:position], names)
      ):
        continue
    spans.append((start, position))
  if sentence.isascii():
    return spans
  return [
      (len(sentence[:start].encode()), len(sentence[:limit].encode()))
      for start, limit in spans
  ]


def random_spans(
    pieces: Sequence[str], begins: Sequence[bool], seed: str
) -> list[tuple[int, int]]:
  """Draws spans of whole words, in place of salient ones.

  In scripts without blanks, each wordpiece counts as a word.

  Args:
    pieces: text of each wordpiece of a sentence.
    begins: whether it begins a word.
    seed: equal seeds give equal spans.

  Returns:
    Half-open ranges of wordpieces, in order, not overlapping, and without
    punctuation; empty if the sentence has no word.
  """
  firsts = [
      i
      for i, piece in enumerate(pieces)
      if begins[i] or not i or languages.is_without_blanks(piece)
  ]
  words = list(itertools.pairwise([*firsts, len(pieces)]))
  free = [any(c.isalnum() for c in pieces[first]) for first in firsts]
  rng = random.Random(seed)
  wanted, spans = max(1, round(_RANDOM_SHARE * sum(free))), []
  for _ in range(_RANDOM_TRIES * wanted * any(free)):
    length = 1
    while length < _RANDOM_LONGEST and rng.random() >= _RANDOM_END:
      length += 1
    length = min(length, wanted)
    first = rng.randrange(len(words) - length + 1)
    if all(free[first : first + length]):
      free[first : first + length] = [False] * length
      spans.append((words[first][0], words[first + length - 1][1]))
      wanted -= length
      if not wanted:
        break
  return sorted(spans)


def kind(span: str) -> str:
  """Returns the kind of a span's text: 'date', 'number' or 'name'."""
  match = _SPAN.match(_with_one_capital(span))
  return (match and match.lastgroup) or 'name'


def _with_one_capital(text: str) -> str:
  """Replaces capitals that are not ASCII by `_CAPITAL`; keeps the length."""
  return text if text.isascii() else _OTHER_CAPITAL.sub(_CAPITAL, text)


def _skip_function_word(sentence: str, start: int, limit: int) -> int:
  """Returns the position after a function word at the start of a name."""
  first = _SINGLE_WORD.match(sentence, start, limit)
  if first is None or first.group().lower() not in _FUNCTION_WORDS:
    return start
  # 'Of the British': a linking word belongs to the word before it.
  lead = _LEADING_WORD.match(sentence, start, limit)
  return limit if lead is None else lead.end()


def _is_name(text: str, names: Collection[str]) -> bool:
  """Returns whether the start of a sentence is a name, not just a word."""
  word = _SINGLE_WORD.fullmatch(_with_one_capital(text))
  return word is None or text in names or not text[1:].islower()
