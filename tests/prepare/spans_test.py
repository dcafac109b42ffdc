"""The rules for sentences and salient spans, as tables of forms."""

import pytest

from realm_jax.prepare import languages
from realm_jax.prepare import salient_spans


@pytest.mark.parametrize(
    'marked',
    [
        # Names: one word, several, initials, titles, apostrophes, hyphens.
        'It lies near <London>.',
        'He moved to <New York City> with <Anna Lee>.',
        'The books of <J. R. R. Tolkien> and <C.S. Lewis> sold well.',
        'He met <Dr. Smith> in <St. Louis>.',
        "The work of <O'Brien> in <Stratford-upon-Avon> ended.",
        'In <Guinea-Bissau> it rains.',
        'The <U.S.> and the <UK> agreed with <AT&T>.',
        # Joined by small words; not by `and`, not over a comma.
        'The <Bank of England> is old.',
        'A <University of the Arts> and a <House of Lords>.',
        'A poem by <Luís de Camões> and <Ludwig van Beethoven>.',
        'They say <Alexander the Great> was short.',
        'It is between <France> and <Germany>.',
        'He was born in <Paris>, <Texas>.',
        # Possessives and the rest of a compound stay outside.
        "It was <France>'s and <Jones>’s idea.",
        'A <German>-speaking village.',
        # Function words at the start of a sentence or quotation are no names,
        # and are cut from names.
        'However, it rained.',
        'The <Beatles> split.',
        'Of the <British> ships none sank.',
        'He said: "The <Queen> is late."',
        'During the <Second World War> it burned.',
        '<Paris> is big.',
        '"<Paris> is big."',
        # Accents, other alphabets.
        '<Émile Zola> met <Åsa Öberg> in <Москва>.',
        'A <Łódź> street.',
        # Single letters are initials, variables, notes.
        'Let A be a set.',
        # Ordinals in digits; as words they name nothing.
        'It was the <21st> of its kind and the <1,000th> ship.',
        'He came <3rd>, the third time.',
        # Dates.
        'He came on <12 May 1990>.',
        'He came on <May 12, 1990>, late.',
        'He came in <May 1990>.',
        'In <May 1990> he came.',
        'He came on the <3rd of June>.',
        'He came on <June 3>.',
        'It ran <12–15 August 1914>.',
        'On <Monday> he left.',
        'He may march in time.',
        # Years, periods, centuries.
        'It was <1990>.',
        'In the <1960s> it grew.',
        'It lasted <1914–18> and <1939-1945>.',
        'He died in <323 BC> or <AD 79>.',
        'It is from the <5th century BC> or the <19th century>.',
        # Numbers with what they count.
        'It is <12 km> long and <3.5 million people> strong.',
        'It rose by <20%> or <7 percent>.',
        'It cost <$5>, <US$1.2 million> or <€ 300>.',
        'It has <1,234 inhabitants>.',
        'It is <25 °C> at <1,500 m>.',
        'He waited <7 years>.',
        # Bare numbers from two digits on, or with a decimal point.
        'It has <42> rooms, 7 doors and <2.5> floors.',
        'There were <1,234,567> of them.',
        'A K-12 school and version 1.2.3 of x86.',
        # Nothing.
        'it rained all day.',
        '',
        '...',
    ],
)
def test_find_spans(marked):
  sentence = marked.replace('<', '').replace('>', '')
  data = sentence.encode()
  found = salient_spans.find_spans(sentence)
  assert found == sorted(found)
  shown = b''
  position = 0
  for start, limit in found:
    assert position <= start < limit
    shown += data[position:start] + b'<' + data[start:limit] + b'>'
    position = limit
  assert (shown + data[position:]).decode() == marked
  # ASCII has patterns of its own, which must find the same.
  assert salient_spans.find_spans(sentence + ' ñ') == found


def test_document_tells_names_from_first_words():
  text = (
      'Historians like Paris. Paris is big. Workers came; most workers left. '
      'So did historians.'
  )
  names = salient_spans.document_names(text)
  assert 'Paris' in names
  assert not names & {'Historians', 'Workers', 'So'}
  assert salient_spans.find_spans('Paris is big.', names) == [(0, 5)]
  assert salient_spans.find_spans('Workers came.', names) == []
  # Two words with capital letters are a name in any case; so are acronyms.
  assert salient_spans.find_spans('Anna Lee came.', names) == [(0, 8)]
  assert salient_spans.find_spans('NATO came.', names) == [(0, 4)]


@pytest.mark.parametrize(
    'sentences',
    [
        ['One day he left.', 'She stayed!', 'Did he?', 'Yes.'],
        [
            'Mr. Smith met J. R. Lee in the U.S. Army.',
            'He left at 5 p.m. today.',
        ],
        ['It costs 3.50 dollars, e.g. in St. Louis.', 'It is No. 5.'],
        ['He said "No." and left.', 'She wept.'],
    ],
)
def test_split_sentences(sentences):
  text = ' '.join(sentences)
  found = languages.split_sentences(text)
  assert [text[a:b] for a, b in found] == sentences


@pytest.mark.parametrize(
    'end', ['\n', '\r\n', '\n\n', ' \n ', '\u2028', '\x0b']
)
def test_a_line_ends_a_sentence(end):
  text = f'  History{end}It began in a shed.{end}'
  found = [text[a:b] for a, b in languages.split_sentences(text)]
  assert found == ['History', 'It began in a shed.']


def test_no_sentence_in_space():
  assert languages.split_sentences(' \n\t\n') == []


@pytest.mark.parametrize(
    'span, kind',
    [
        ('12 May 1990', 'date'),
        ('1990s', 'date'),
        ('3.5 million', 'number'),
        ('12 km', 'number'),
        ('May Day Parade', 'name'),
        ('New York', 'name'),
        ('iron', 'name'),  # As records may mark it.
    ],
)
def test_kinds(span, kind):
  assert salient_spans.kind(span) == kind
