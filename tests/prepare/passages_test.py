"""Passages and sentences of records: long ones, unusual ones, given spans."""


import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from realm_jax.corpus import tokenizer as tokenizer_lib

_write, _prepare = helpers.write_records, helpers.prepare_corpus


def test_a_record_that_fits_is_one_passage_with_its_id(tmp_path):
  source = _write(
      tmp_path / 'a.jsonl',
      [
          {'id': 'x', 'title': 'T', 'text': ' Anna met Bert. He left Rome. '},
          {'text': 'In 1990 nobody came to Rome at all.'},
          {'id': 7, 'text': 'In 1991 nobody came to Rome at all.'},
      ],
  )
  made = _prepare(source, tmp_path / 'made')
  texts = [made.passage_text(row) for row in range(3)]
  assert [t['id'] for t in texts] == ['x', '1', '7']
  assert texts[0]['text'] == 'Anna met Bert. He left Rome.'
  assert [t['title'] for t in texts] == ['T', '', '']


def test_a_long_sentence_is_split_between_words(tmp_path):
  words = [f'word{i} Überall-x{i}' for i in range(60)]
  text = 'In 1990 came one. ' + ' '.join(words) + ' end. Last one.'
  source = _write(tmp_path / 'a.jsonl', [{'id': 'x', 'text': text}])
  made = _prepare(source, tmp_path / 'made', max_wordpieces=60)
  assert made.manifest['counts']['split_sentences'] == 1
  assert made.passages.lengths.max() <= 60
  np.testing.assert_array_equal(
      made.passages.tokens, made.tokenizer.encode(text)
  )
  for row in range(len(made.passages)):
    _, body = made.passages.title_and_body(row)
    assert made.tokenizer.starts_word(body[:1])[0]
    assert made.tokenizer.encode(made.passage_text(row)['text']) == list(body)
  # Pieces of it are nothing to learn from.
  lengths = [len(table) for table in made.sentences.values()]
  assert lengths == [1]


@pytest.mark.parametrize(
    'end', ['\n', '\x0b', '\x0c', '\x1d', '\x85', '\u2028']
)
def test_the_end_of_a_line_ends_a_word(tmp_path, end):
  # To BERT some are control characters, which it drops: 'throneWhen'.
  lines = ['Mira of Kéla left the throne', 'When Jon came to Paris it rained.']
  source = _write(tmp_path / 'in.jsonl', [{'text': end.join(lines)}])
  made = _prepare(source, tmp_path / 'made', validation_fraction=0)
  (name,) = made.sentences
  records = tfds.builder_from_directory(
      str(made.directory / 'sentences')
  ).as_data_source(split=name)
  assert [record['text'].decode() for record in records] == lines
  for row, line in enumerate(lines):
    assert made.sentences[name].ids(row).tolist() == made.tokenizer.encode(line)


def test_a_word_longer_than_a_passage_is_cut(tmp_path):
  tokenizer_lib.Tokenizer(
      '[PAD] [UNK] [CLS] [SEP] [MASK] a ##a 1990 in rome it was .'.split()
  ).save(tmp_path)
  text = 'In 1990 it was in Rome. ' + 'a' * 90
  source = _write(tmp_path / 'a.jsonl', [{'text': text}])
  made = _prepare(
      source,
      tmp_path / 'made',
      vocab=str(tmp_path / 'vocab.txt'),
      max_wordpieces=20,
  )
  assert made.passages.lengths.max() <= 20
  np.testing.assert_array_equal(
      made.passages.tokens, made.tokenizer.encode(text)
  )


def test_a_long_title_is_shortened_and_counted(tmp_path):
  title = ' '.join(f'Very{i}' for i in range(100))
  text = 'In 1990 somebody came to Rome. ' * 10
  source = _write(tmp_path / 'a.jsonl', [{'title': title, 'text': text}])
  made = _prepare(source, tmp_path / 'made', max_wordpieces=43)
  assert made.manifest['counts']['shortened_titles'] == 1
  assert set(made.passages.title_lengths) == {20}
  assert made.passages.lengths.max() <= 43
  assert made.passage_text(0)['title'] == title


def test_given_spans_replace_the_rules(tmp_path):
  text = 'Öl oil came to Rome in summer. Then nothing came to the town.'
  data = text.encode()
  spans = [
      [data.index(b'oil'), data.index(b'oil') + 3],
      [data.index(b'om'), data.index(b'om') + 1],  # Part of a wordpiece.
      [data.index(b'summer'), data.index(b'Then') + 4],  # In two sentences.
      [data.index(b'nothing'), data.index(b'nothing') + 12],
  ]
  tokenizer_lib.Tokenizer(
      '[PAD] [UNK] [CLS] [SEP] [MASK] ol oil came to rome in summer . then'
      ' nothing the town'.split()
  ).save(tmp_path)
  source = _write(tmp_path / 'a.jsonl', [{'text': text, 'spans': spans}])
  made = _prepare(source, tmp_path / 'made', vocab=str(tmp_path))
  table = made.sentences['knowledge']
  found = [
      [made.tokenizer.decode(table.ids(i)[a:b]) for a, b in table.spans_of(i)]
      for i in range(len(table))
  ]
  assert found == [['oil'], ['nothing came']]
  assert made.manifest['counts']['spans_outside_sentences'] == 1
  assert made.manifest['counts']['spans_without_wordpieces'] == 1
