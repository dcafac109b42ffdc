"""Formats of tagged sentences; which columns are tokens and tags."""

import json
import logging
import pathlib
import re

import pytest

from realm_jax.corpus import entities
from realm_jax.runtime import lines

_DOCS = pathlib.Path(__file__).parents[2] / 'docs/tagging.md'
_ROW = re.compile(r'\| (?P<what>[^|]+) \| `(?P<text>.+)` \| (?P<flags>[^|]*)\|')
_SENTENCE = entities.TaggedSentence(
    'Ann lives in York'.split(), 'B-PER O O B-LOC'.split()
)
_COLUMNS = 'Ann B-PER\nlives O\nin O\nYork B-LOC\n'


def write(folder, text, name='a.txt'):
  path = folder / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return str(path)


def examples():
  section = _DOCS.read_text().split('## Files of tagged sentences')[1]
  found = [m for line in section.split('##')[0].splitlines()
           if (m := _ROW.match(line))]
  assert len(found) == 12
  return found


@pytest.mark.parametrize('row', examples(), ids=lambda row: row['what'])
@pytest.mark.parametrize('name', ['a.conll', 'a.json', 'data'])
def test_the_examples_of_the_docs(tmp_path, row, name):
  text = row['text'].replace('→', '\t')
  text = text.replace(' / / ', '\n\n').replace(' / ', '\n')
  flags = dict(
      flag.split('=') for flag in row['flags'].strip(' `').split('--') if flag
  )
  options = {'tag_column': flags.get('tag_column', '')}
  options['tag_names'] = lines.comma_separated(flags.get('tag_names'))
  assert entities.read(write(tmp_path, text, name), **options) == [_SENTENCE]
  if flags:
    with pytest.raises(ValueError, match=f'--{next(iter(flags))}='):
      entities.read(write(tmp_path, text, name))


def test_what_is_recognised_is_logged(tmp_path, caplog):
  text = '-DOCSTART- -X- -X- O\n\nI NNP I-NP I-PER\nam VB I-VP O\n\n'
  with caplog.at_level(logging.INFO):
    path = write(tmp_path, text * 2)
    entities.read(path)
    entities.read(path, quiet=True)
  assert caplog.messages == [
      f'{path}: columns separated by blanks; tokens from 1, tags from 4 (I-'
      ' converted to IOB2); ignored: 2, 3; 2 sentences with 4 tokens and 2'
      ' entities of 1 types; 2 document starts skipped.'
  ]


@pytest.mark.parametrize('end', ['\n', '\r\n'])
@pytest.mark.parametrize('start', [0, 1, 7])
def test_numbers_of_tokens_are_no_tokens(tmp_path, start, end):
  rows = ['Ann\tB-PER', 'lives\tO', 'in\tO', 'York\tB-LOC']
  text = ''.join(f'{i}\t{row}{end}' for i, row in enumerate(rows, start))
  path = write(tmp_path, '\ufeff' + text + end + text)
  assert entities.read(path) == [_SENTENCE] * 2


def test_a_token_may_begin_with_a_number_sign(tmp_path):
  path = write(tmp_path, '# x\n# B-MISC\n#tag O\n\n# 1 2 3\n# O\nx B-MISC\n')
  assert [s.tokens for s in entities.read(path)] == [['#', '#tag'], ['#', 'x']]


def test_chunks_of_german_are_no_names(tmp_path):
  path = write(tmp_path, 'Ulm Ulm NE I-NC I-LOC\nist sein VV I-VC O\n')
  assert entities.read(path)[0].tags == ['B-LOC', 'O']


def test_a_document_start_ends_a_sentence(tmp_path):
  path = write(tmp_path, 'Ann B-PER\nran O\n-DOCSTART- O\nYork B-LOC\nis O\n')
  assert [s.tokens for s in entities.read(path)] == [
      ['Ann', 'ran'], ['York', 'is']
  ]


def test_numbers_may_be_tokens(tmp_path):
  path = write(tmp_path, '1990 O\n\nAnn B-PER\n\n7 O\n\nIn O\n1991 O\n')
  first = [sentence.tokens[0] for sentence in entities.read(path)]
  assert first == ['1990', 'Ann', '7', 'In']


def test_the_time_of_a_long_token_is_linear(tmp_path):
  """By the square of its length, it would be minutes."""
  path = write(tmp_path, f'Ann B-PER\n{"9" * 10**7}x O\n')
  assert [len(x) for x in entities.read(path)[0].tokens] == [3, 10**7 + 1]


def test_ranges_are_skipped_only_among_numbers(tmp_path):
  path = write(tmp_path, 'a x B-X\n1-10 x O\n5.76 x O\n')
  assert entities.read(path)[0].tokens == ['a', '1-10', '5.76']


def test_a_token_with_blanks_between_tabs(tmp_path):
  path = write(tmp_path, 'New York\tB-LOC\nis\tO\na\u00a0b\tO\n')
  assert entities.read(path)[0].tokens == ['New York', 'is', 'a\u00a0b']


def test_a_column_that_names_the_sentence(tmp_path):
  path = write(
      tmp_path, 's1 Ann B-PER\ns1 runs O\n\ns2 Bo B-PER\ns2 runs O\n'
  )
  assert [s.tokens[0] for s in entities.read(path)] == ['Ann', 'Bo']


def test_tags_may_come_first(tmp_path):
  path = write(tmp_path, 'B-PER\tAnn\nO\tlives\nO\tin\nB-LOC\tYork\n')
  assert entities.read(path) == [_SENTENCE]


@pytest.mark.parametrize('number', ['4', '3'])
def test_nested_tags_of_germeval(tmp_path, number):
  text = '#\thttp://a.de\n1\tBonner\tB-ORG\tB-LOC\n2\tBank\tI-ORG\tO\n'
  path = write(tmp_path, text)
  with pytest.raises(ValueError, match=r'3 \(B-ORG, I-ORG\); 4 \(B-LOC, O\)'):
    entities.read(path)
  (found,) = entities.read(path, tag_column=number)
  assert found.tokens == ['Bonner', 'Bank']
  assert found.tags == [['B-ORG', 'I-ORG'], ['B-LOC', 'O']][number == '4']
  with pytest.raises(ValueError, match="no column '5'; its columns are 1"):
    entities.read(path, tag_column='5')


def test_a_notation_with_m_is_read(tmp_path):
  path = write(tmp_path, 'a B-X\nb M-X\nc E-X\nd S-X\n')
  assert entities.read(path)[0].tags == ['B-X', 'I-X', 'I-X', 'B-X']


# ------------------------------------------------------------------------ JSON


def record(**fields):
  return json.dumps({'tokens': _SENTENCE.tokens, **fields})


def test_fields_that_are_no_tags_are_ignored(tmp_path):
  text = record(
      ner_tags=_SENTENCE.tags,
      chunk_tags=['B-NP', 'B-VP', 'B-PP', 'B-NP'],
      pos_tags=[1, 2, 3, 1],
      langs=['en'] * 4,
      spans=['PER: Ann'],
      id=7,
  )
  assert entities.read(write(tmp_path, text)) == [_SENTENCE]


def test_two_fields_of_tags_are_ambiguous(tmp_path):
  path = write(tmp_path, record(tags=_SENTENCE.tags, fine=['B-a', *'OOO']))
  with pytest.raises(ValueError, match=r'tags \(.*; fine \(.*--tag_column='):
    entities.read(path)
  assert entities.read(path, tag_column='tags') == [_SENTENCE]


@pytest.mark.parametrize('file', ['dataset_info.json', 'dataset_infos.json'])
def test_numbers_have_the_names_of_the_data_set(tmp_path, file):
  label = {'names': ['O', 'B-LOC', 'B-PER'], '_type': 'ClassLabel'}
  info = {
      'features': {
          'tokens': {'feature': {'dtype': 'string'}, '_type': 'Sequence'},
          'ner_tags': {'feature': label, '_type': 'Sequence'},
      },
      'splits': {'train': {'name': 'train'}},
  }
  path = write(tmp_path, record(ner_tags=[2, 0, 0, 1]), 'a.jsonl')
  with pytest.raises(ValueError, match=r'a\.jsonl:1: ner_tags has numbers.*'
                     r'\(2, 0, 1\).*--tag_names=O,B-PER.*dataset_info\.json'):
    entities.read(path)
  info = {'default': info} if 'infos' in file else info
  (tmp_path / file).write_text(json.dumps(info))
  assert entities.read(path) == [_SENTENCE]


def test_a_number_without_a_name(tmp_path):
  path = write(tmp_path, record(ner_tags=[1, 0, 0, 9]))
  with pytest.raises(ValueError, match='a.txt:1: the tag 9 is neither'):
    entities.read(path, tag_names=['O', 'B-PER', 'B-LOC'])


def test_parquet(tmp_path):
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  table = pyarrow.table({
      'tokens': [_SENTENCE.tokens], 'ner_tags': [[1, 0, 0, 2]]
  })
  label = {'names': ['O', 'B-PER', 'B-LOC'], '_type': 'ClassLabel'}
  features = {'ner_tags': {'feature': label, '_type': 'List'}}
  about = json.dumps({'info': {'features': features}})
  parquet.write_table(
      table.replace_schema_metadata({'huggingface': about}), tmp_path / 'x'
  )
  assert entities.read(str(tmp_path / 'x')) == [_SENTENCE]
  (tmp_path / 'x').write_bytes((tmp_path / 'x').read_bytes()[:99])
  with pytest.raises(ValueError, match='x: a damaged Parquet file'):
    entities.read(str(tmp_path / 'x'))


def test_a_missing_file_is_named():
  with pytest.raises(FileNotFoundError, match='nowhere'):
    entities.read('nowhere.conll')


# ---------------------------------------------------------------- plausibility


@pytest.mark.parametrize(
    'text, message',
    [
        ('0\tB-PER\n1\tI-PER\n2\tO\n', r':1: the tokens in column 1 are num'),
        ('3.5 O\n1,000 O\n12:30 B-T\n\n7 O\n', ':1: the tokens in .* 3.5, 1,0'),
        (
            ''.join(f'w{i} {"B-X" if i % 9 else "O"}\n' for i in range(100)),
            'numbers or indices: w0, w1',
        ),
        (_COLUMNS.replace('O', 'NNP'), r":2: the tag 'NNP' is neither"),
        ('a DT x\nb NN B-PER\n', r":1: the tag 'x' is .* are 1 \(a, b\)"),
        (_COLUMNS.replace('B-PER', 'O').replace('B-LOC', 'O'), 'no token has'),
        (
            ''.join(f'a B-{i}\n\n' for i in range(201)),
            r':1: the tags in column 2 have 201 types, .*--tag_column=',
        ),
        ('a x O\nb B-X\n', r':2: 2 columns, but line 1 of the same sentence'),
        ('a\tB-X\nb c\tO\nd\n', r':3: one column'),
        (record(tags=['O'] * 3), r':1: 4 tokens and 3 tags'),
        (record(), r':1: "tags" must be a list'),
        ('{"text": "Ann", "label": 1}', ':1: "tokens" must .*has \'text\','),
        ('[[1]]', r'txt:1: a JSON list; each record must be an object'),
        ('[{"tokens": [', 'malformed JSON'),
        ('[' * 100_000, 'malformed JSON'),
        ('{"tokens": [1], "tags": ["O"]}', ':1: "tokens" must be a list of'),
        (b'a O\nb\xff O\n', r':2: not UTF-8'),
        ('# only\n# comments\n', 'has no sentence'),
        ('{"tokens": [], "tags": []}', 'has no sentence'),
        (record(tags=[['O']] * 4), r":1: the tag \['O'\] is neither"),
        ('word\ttag\n', 'has no sentence'),
    ],
)
def test_what_is_refused(tmp_path, text, message):
  with pytest.raises(ValueError, match=message) as error:
    entities.read(write(tmp_path, text))
  assert str(tmp_path) in str(error.value)
