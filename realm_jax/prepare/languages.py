"""Languages and scripts: which one a text is in, its sentences and words.

English is what the rules for spans and nupunkt are made for. A text is assigned
to a language by its script and, in Latin letters, by its function words: a
check, not an identification of every language. Sentence ends of other scripts
are those of Unicode (UAX #29, the property Sentence_Terminal).
"""

import collections
from collections.abc import Iterator
import functools
import logging
import re
import unicodedata

# Punkt in a maintained pure-Python package that contains its model. NLTK's
# model is a download; pysbd is 20 times slower and unmaintained.
import nupunkt
import regex

log = logging.getLogger(__name__)

UNKNOWN = 'unknown'
MIXED = 'mixed'  # A corpus in which each record has its own language.

# A line of the source is a paragraph, a heading or a list item, so its end is
# the end of a sentence, whatever the punctuation.
_LINE = re.compile(r'[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+')

SPANS = ('auto', 'rules', 'random', 'none')
_WITHOUT_RULES = {
    'rules': 'They are applied, as no other language is recognised',
    'english': 'They are applied to the records in English alone',
    'records': 'Only the records with `spans` have spans',
    'none': 'No span is marked, so there is nothing to mask in training',
}

_EXAMINED = 500  # The first records, which are examined for their language.
_EXAMINED_EACH = 100  # The other records: each hundredth is.
_MINORITY = 0.05  # A language with less of a corpus makes it not `MIXED`.
_SAMPLE = 2000  # Characters of a text that decide on its language.
_POOL = 100_000  # Characters of short texts that are examined together.
_MIN_SHARE = 0.04  # Function words among the words of a text, at least.
# Frequent words of languages in Latin letters. Some belong to several; the
# language with the most of them in a text wins, and English wins a tie.
_FUNCTION_WORDS = {
    'en': 'the of and to in is was that with for by from as are on it he at a'
          ' an i s be this his her not or but were has have had which its you',
    'af': "die van en het is in nie 'n wat te om word",
    'ca': 'el la els les i de del que una amb per és va',
    'cs': 'a v se na je že s z do byl jako ve pro',
    'cy': 'y yn a i ac ar o wedi oedd yr mae',
    'da': 'og i at det er en til på af som med den blev',
    'de': 'der die und das ist nicht mit von den dem ein eine wurde im am auf'
          ' des sich sie zu',
    'eo': 'la kaj de estas en al ne li por kun',
    'es': 'el la los las y del de una un que es en por con se fue',
    'et': 'ja on ei oli see et ka ta mis',
    'eu': 'eta da ez bat dira zen du izan',
    'fi': 'ja on oli ei että se hän myös ovat joka',
    'fr': 'le la les des et est une un dans du de qui pour sur en au',
    'ga': 'an na agus ar is a i bhí tá',
    'gl': 'o a os as e do da unha un que é en por con foi',
    'hr': 'je i u se na da su od za bio kao',
    'hu': 'a az és egy hogy nem volt is meg',
    'id': 'yang dan di dengan untuk dari pada adalah ini itu',
    'is': 'og í að er á sem til var ekki hann',
    'it': 'il la di che è della un una per del gli nel con e fu',
    'la': 'et in est ad non cum ut quod ex sunt',
    'lt': 'ir yra kad su iš į buvo apie kaip',
    'lv': 'un ir no par kas ar uz bija gada',
    'nl': 'de het een van en is niet met op zijn voor dat werd in',
    'no': 'og i det er en til på av som med den ble ikke',
    'pl': 'w i na się jest z nie do że to był przez',
    'pt': 'o a os as um uma do da dos e não que em no na com foi',
    'ro': 'și în este cu la din pe care o a de un fost',
    'sk': 'a v sa na je že s z do bol ako vo pre',
    'sl': 'je in v na se za so da z bil',
    'sq': 'dhe në është të një me për i e nga',
    'sv': 'och att det som en är på av för med den var i',
    'sw': 'ya wa na kwa ni katika la za cha',
    'tl': 'ang ng sa mga ay na at si',
    'tr': 've bir bu için ile olarak olan da de',
    'vi': 'và của là có được trong một các những cho',
}
_LANGUAGES_OF: dict[str, list[str]] = collections.defaultdict(list)
for _language, _words in _FUNCTION_WORDS.items():
  for _word in _words.split():
    _LANGUAGES_OF[_word].append(_language)

_EAST_ASIAN = {
    'CJK': 'Han',
    'IDEOGRAPHIC': 'Han',
    'HIRAGANA': 'Kana',
    'KATAKANA': 'Kana',
    'KATAKANA-HIRAGANA': 'Kana',
}

# Scripts without capitals whose letters have parts that lower-casing as in BERT
# removes, as accents.
_NEED_MARKS = frozenset(
    'Bengali Devanagari Gujarati Gurmukhi Hangul Kana Kannada Khmer Lao'
    ' Malayalam Myanmar Oriya Sinhala Tamil Telugu Thai Tibetan'.split()
)

# Languages that write the 3rd of May as '3. May'.
_ORDINAL_PERIOD = frozenset(
    'cs da de et fi hr hu is lv no pl sk sl'.split()
)
_ORDINAL = regex.compile(r'(?<!\w)\d{1,2}\.\s*\Z')

# Scripts that do not write blanks between words.
_NO_BLANKS = (
    r'\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}'
    r'\p{Tibetan}'
)
_WORD = regex.compile(
    rf'[{_NO_BLANKS}]\p{{M}}*|[\w--[{_NO_BLANKS}]]+', regex.V1
)
_WITHOUT_BLANKS = regex.compile(rf'[{_NO_BLANKS}]')

_CJK = r'[\p{Han}\p{Hiragana}\p{Katakana}]'
# A closing bracket or quotation mark belongs to the sentence before it.
_END = regex.compile(
    # All terminators but those of ASCII, and the comma of Burmese, which
    # Unicode lists; the shad of Tibetan, which it does not list.
    r'(?:[[\p{SB=STerm}\u0f0d\u0f0e\ufe52]--[!?\u104a]]'
    r'|(?<!\d)\uff0e(?!\d)'  # A full-width period, but not a decimal point.
    # No blank needs to follow in these scripts. 'Yahoo!' ends nothing.
    r'|(?<=[\p{Lo}\p{M}\p{Pe}\p{Pf}!?])[!?]'
    rf'|(?<={_CJK})\.(?={_CJK})'
    r'|(?<=\p{Armenian}):(?!\S)'
    r')+[\p{Pe}\p{Pf}]*',
    regex.V1,
)
# Thai and Lao have no mark for the end of a sentence: a blank ends a clause.
_CLAUSE_END = regex.compile(r'(?<=[\p{Thai}\p{Lao}])\s+(?=[\p{Thai}\p{Lao}])')
_MIN_CLAUSES = 40  # Characters; shorter clauses join the next one.
# Where a sentence that is too long is best cut, in these scripts.
CLAUSE_MARKS = '，、；：､,;:،؛፣፤၊'


def detect(text: str) -> str:
  """Returns the language of a text in Latin letters, or the script of another.

  Args:
    text: of which at most 2,000 characters in the middle are examined.

  Returns:
    A code such as 'en', the name of a script such as 'Thai', or `UNKNOWN`: too
    short, or a language without a list of words here.
  """
  if len(text) > _SAMPLE:
    start = (len(text) - _SAMPLE) // 2
    text = text[start : start + _SAMPLE]
  scripts = _letters_by_script(text)
  if not scripts.total():
    return UNKNOWN
  if scripts['Kana'] > 0.05 * scripts['Han']:  # Japanese has both.
    scripts['Kana'] += scripts.pop('Han', 0)
  script = max(scripts, key=lambda name: (scripts[name], name))
  if script != 'Latin':
    return script
  words = collections.Counter(regex.findall(r"[\w']+", text.lower()))
  found: collections.Counter[str] = collections.Counter()
  for word, count in words.items():
    for language in _LANGUAGES_OF.get(word, ()):
      found[language] += count
  best = max(_FUNCTION_WORDS, key=lambda language: found[language])
  if found[best] < max(2, _MIN_SHARE * words.total()):
    return UNKNOWN
  return best


def _letters_by_script(text: str) -> collections.Counter[str]:
  """Counts the letters of each script, such as 'Latin' or 'Han'."""
  counts: collections.Counter[str] = collections.Counter()
  for character, count in collections.Counter(text).items():
    if character.isalpha():
      counts[_script(character)] += count
  for script in ('Han', 'Kana'):  # A character says as much as 3 letters.
    counts[script] *= 3
  return counts


@functools.cache
def _script(character: str) -> str:
  """Returns the script of a letter, which is the first word of its name."""
  name = unicodedata.name(character, UNKNOWN)
  word = regex.sub('^(?:FULL|HALF)WIDTH ', '', name).split()[0]
  return _EAST_ASIAN.get(word, word.capitalize())


class Census:
  """The languages of a corpus, from its first records and each hundredth."""

  def __init__(self) -> None:
    self._count = self._with_spans = 0
    self._characters: collections.Counter[str] = collections.Counter()
    self._pool: list[str] = []  # Texts too short to be assigned one by one.
    self._pool_size = 0

  def add(self, text: str, has_spans: bool) -> None:
    """Adds a record."""
    self._count += 1
    self._with_spans += has_spans
    if self._count > _EXAMINED and self._count % _EXAMINED_EACH:
      return
    size = min(len(text), _SAMPLE)
    language = detect(text)
    if language == UNKNOWN and self._pool_size < _POOL:
      self._pool.append(text[:_SAMPLE])
      self._pool_size += size
    else:
      self._characters[language] += size

  def shares(self) -> dict[str, float]:
    """Returns the share of each language, the largest first."""
    counts = self._characters.copy()
    if self._pool:
      counts[detect(' '.join(self._pool))] += self._pool_size
    total = max(1, counts.total())
    return {name: count / total for name, count in counts.most_common()}

  def needs_marks(self) -> bool:
    """Returns whether half of the text is in scripts of `_NEED_MARKS`."""
    shares = self.shares()
    return sum(shares.get(script, 0.0) for script in _NEED_MARKS) >= 0.5

  def spans_and_language(
      self, spans: str, language: str | None
  ) -> tuple[str, str]:
    """Decides how spans are found, and logs it.

    Args:
      spans: of `SPANS`.
      language: of the corpus; None: the most frequent one of the records.

    Returns:
      `spans` and `language` of `passages.Settings`.
    """
    found, shares = f'--language={language}', self.shares()
    if language is None:
      found = 'the texts are ' + ', '.join(
          f'{name} ({share:.0%})' for name, share in shares.items()
      )
      unknown = shares.pop(UNKNOWN, 0.0)
      common = [n for n in shares if shares[n] >= _MINORITY * (1 - unknown)]
      language = common[0] if len(common) == 1 else MIXED
      if unknown > 0.5:
        language = UNKNOWN
    auto = spans == 'auto'
    if auto:
      if language.startswith('en') or language == UNKNOWN:
        spans = 'rules'
      elif language == MIXED and 'en' in shares:
        spans = 'english'
      else:
        spans = 'records' if self._with_spans else 'none'
    log.info(
        'Salient spans: %s; %d of %d records have their own; %s.',
        spans, self._with_spans, self._count, found,
    )
    if (
        auto
        and self._with_spans < self._count
        and not (spans == 'rules' and language.startswith('en'))
    ):
      log.warning(
          'The rules for salient spans are for English, and %s. %s.'
          ' --spans=random draws random words; --spans=rules applies the rules'
          ' in any language; --spans=none needs no spans (search, ICT,'
          ' `realm-jax tag`); records may have `spans`. --language says what'
          ' the texts are.',
          found, _WITHOUT_RULES[spans],
      )
    return spans, language


def is_other_script(text: str, num_bytes: int) -> bool:
  """Returns whether half of the letters, or more, are not Latin.

  Args:
    text: any text.
    num_bytes: its size in UTF-8, which tells most texts without counting.
  """
  if num_bytes < 1.2 * len(text):
    return False
  counts = _letters_by_script(text)
  return 2 * counts['Latin'] <= counts.total() > 0


def split_sentences(
    text: str, language: str = 'en', other_script: bool = False
) -> list[tuple[int, int]]:
  """Finds the sentences of a text.

  Args:
    text: any text.
    language: code of its language, which matters for dates such as '3. Mai'.
    other_script: whether it has the sentence ends of other scripts than Latin
      (`is_other_script`). A Chinese quotation in English is a part of its
      sentence.

  Returns:
    Half-open ranges of characters, without surrounding spaces.
  """
  sentences = []
  for line in _LINE.finditer(text):
    base, content = line.start(), line.group()
    ranges = _join_ordinals(content, nupunkt.sent_spans(content), language)
    if other_script:
      ranges = [*_cut_at_ends(content, ranges)]
    for start, limit in ranges:
      sentence = content[start:limit]
      start += len(sentence) - len(sentence.lstrip())
      limit -= len(sentence) - len(sentence.rstrip())
      if start < limit:
        sentences.append((base + start, base + limit))
  return sentences


def _join_ordinals(
    text: str, ranges: list[tuple[int, int]], language: str
) -> list[tuple[int, int]]:
  """Joins sentences that were cut after the ordinal number of a date."""
  if language not in _ORDINAL_PERIOD:
    return ranges
  joined: list[tuple[int, int]] = []
  for start, limit in ranges:
    if joined and _ORDINAL.search(text, *joined[-1]):
      start, _ = joined.pop()
    joined.append((start, limit))
  return joined


def _cut_at_ends(
    text: str, ranges: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
  """Cuts ranges of characters at the sentence ends of scripts but Latin."""
  joined: list[tuple[int, int]] = []
  for start, limit in ranges:
    # Without a blank, '?' and a quotation mark belong together.
    if joined and not text[start - 1].isspace():
      start, _ = joined.pop()
    joined.append((start, limit))
  for start, limit in joined:
    for match in _END.finditer(text, start, limit):
      end = match.end()
      # A straight quotation mark closes what one before it opened.
      if text[end:limit].startswith('"') and text.count('"', start, end) % 2:
        end += 1
      yield from _cut_at_clauses(text, start, end)
      start = end
    yield from _cut_at_clauses(text, start, limit)


def _cut_at_clauses(
    text: str, start: int, limit: int
) -> Iterator[tuple[int, int]]:
  for match in _CLAUSE_END.finditer(text, start, limit):
    if match.start() - start >= _MIN_CLAUSES:
      yield start, match.start()
      start = match.end()
  yield start, limit


def words(text: str) -> list[str]:
  """Returns the words; of scripts without blanks, the characters."""
  return _WORD.findall(text)


def is_without_blanks(text: str) -> bool:
  """Returns whether a text begins in a script without blanks."""
  return _WITHOUT_BLANKS.match(text) is not None
