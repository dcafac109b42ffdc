"""Corpora with byte-level BPE and Unigram tokenizers."""

import json
import pathlib
import shutil

import helpers
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import masking
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import replace_spans
from realm_jax.qa import question_table
from realm_jax.qa import questions as questions_lib
from realm_jax.trainer import examples

_FOLDER = pathlib.Path(__file__).parents[1] / 'fixtures' / 'encoders'
_NAMES = ('roberta', 'xlm-roberta', 'modernbert')
_MARKS = '(),.\u201c\u201d '
_ARTICLE = (
    'Anna Gold was born in Vienna in 1901. She moved to (Paris) in May 1920,'
    '  where she met Zo\u00eb M\u00fcller.\n\nHer \u201cred book\u201d sold'
    ' 12,000 copies. \u65e5\u672c\u8a9e is a language of Japan </s>. In 1950'
    ' she died in Berlin.\tIt rained in Berlin on 3 May 1950.'
)


@pytest.fixture(scope='module', params=_NAMES)
def made(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp('corpora')
  records = [
      {'id': str(i), 'title': f'Anna {i}', 'text': _ARTICLE.replace('Gold', n)}
      for i, n in enumerate(('Gold', 'Silver', 'Bronze'))
  ]
  return helpers.prepare_corpus(
      helpers.write_records(folder / 'source.jsonl', records),
      folder / 'corpus',
      vocab=str(_FOLDER / request.param),
      vocab_size=None,
      max_wordpieces=90,
      validation_fraction=0,
  )


def test_passages_have_the_pieces_of_their_text(made):
  assert len(made.passages) > 3
  texts = [made.passage_text(row) for row in range(len(made.passages))]
  for row, record in enumerate(texts):
    title, body = made.passages.title_and_body(row)
    assert body.tolist() == made.tokenizer.encode(record['text'])
    assert title.tolist() == made.tokenizer.encode(record['title'])
  assert made.passages.lengths.max() <= 90
  special = {made.tokenizer.cls_id, made.tokenizer.sep_id}
  assert not special & set(np.asarray(made.passages.tokens).tolist())


def test_answers_are_those_of_the_text(made):
  finder = question_table.PassageAnswers(made)
  question = questions_lib.Question('?', ('zo\u00eb m\u00fcller', 'Paris'))
  shown = set()
  for row in range(len(made.passages)):
    _, body = made.passages.title_and_body(row)
    data = made.passage_text(row)['text'].encode()
    offsets = finder.wordpieces(row, data.decode())
    assert len(offsets) == len(body)
    for first, last in finder.spans(question, row):
      part = data[offsets[first, 0] : offsets[last, 1]].decode()
      shown.add(part.strip(_MARKS))
  assert shown == {'Zo\u00eb M\u00fcller', 'Paris'}


def test_spans_are_those_of_the_text_and_can_be_replaced(made, tmp_path):
  seen = []

  def find(sentences):
    seen.extend(sentences)
    return [s.spans for s in sentences]

  replace_spans.replace_spans(
      made, tmp_path / 'again', find, {}, progress=False
  )
  found = set()
  for sentence in seen:
    assert not sentence.differs
    data = sentence.text.encode()
    for start, limit, byte_start, byte_limit in sentence.spans:
      found.add(data[byte_start:byte_limit].decode().strip(_MARKS))
      assert sentence.starts[start] <= byte_start
      assert sentence.limits[limit - 1] >= byte_limit
      assert start == 0 or sentence.limits[start - 1] <= byte_start
  assert {'Anna Gold', 'Vienna', '1901', 'May 1920', 'Zo\u00eb M\u00fcller',
          '3 May 1950'} <= found
  again = corpus_lib.Corpus.open(tmp_path / 'again')
  for name in ('starts', 'lengths', 'spans'):
    np.testing.assert_array_equal(
        getattr(again.sentences['knowledge'], name),
        getattr(made.sentences['knowledge'], name),
    )


@pytest.mark.parametrize('name', ['roberta', 'modernbert'])
def test_whole_words_are_masked(name):
  tokenizer = tokenizer_lib.Tokenizer.from_source(str(_FOLDER / name))
  text = 'Anna met (Zo\u00eb) in Paris, did she?'
  ids = np.array(tokenizer.encode(text))
  begins = tokenizer.starts_word(ids)
  begins[0] = True
  words = [
      tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(begins))
  ]
  assert [word for word in words if word] == [
      'Anna', 'met', '(', 'Zo\u00eb', ')', 'in', 'Paris', ',', 'did',
      'she', '?',
  ]
  sentence = masking.Sentence(
      ids, np.array([[0, 1]]), (0, 1), 30, {}, tokenizer
  )
  drawn = [
      masking.bert_whole_words(sentence, np.random.default_rng(i)).ids
      for i in range(20)
  ]
  assert tokenizer.mask_id in np.concatenate(drawn)
  assert tokenizer.pad_id not in np.concatenate(drawn)


def test_a_tokenizer_without_a_mask(tmp_path, caplog):
  folder = shutil.copytree(_FOLDER / 'modernbert', tmp_path / 'tokenizer')
  rules = json.loads((folder / 'tokenizer.json').read_text())
  rules['added_tokens'] = [
      one for one in rules['added_tokens'] if one['content'] != '[MASK]'
  ]
  (folder / 'tokenizer.json').write_text(json.dumps(rules))
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text())
  del settings['mask_token']
  path.write_text(json.dumps(settings))
  made = helpers.prepare_corpus(
      helpers.write_records(tmp_path / 'a.jsonl', [{'text': _ARTICLE}]),
      tmp_path / 'corpus',
      vocab=str(folder),
      vocab_size=None,
  )
  assert 'has no mask token' in caplog.text
  assert made.tokenizer.mask_id == -1
  config = config_lib.Config(objective='mlm')
  with pytest.raises(ValueError, match='has no mask token, as mlm needs'):
    examples.MaskedSentences(made, config, 'knowledge')
  with pytest.raises(ValueError, match='has no mask token'):
    tokenizer_lib.Tokenizer.from_saved(made.directory).encode('[MASK]', True)


def test_the_two_files_of_an_older_roberta(tmp_path, caplog):
  whole = tokenizer_lib.Tokenizer.from_source(str(_FOLDER / 'roberta'))
  rules = json.loads((_FOLDER / 'roberta' / 'tokenizer.json').read_text())
  model = rules['model']
  merges = [' '.join(m) if isinstance(m, list) else m for m in model['merges']]
  (tmp_path / 'vocab.json').write_text(json.dumps(model['vocab']))
  with pytest.raises(FileNotFoundError, match='nor vocab.json and merges.txt'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]))
  caplog.clear()
  made = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert not caplog.messages  # It is cased.
  assert made.encode(_ARTICLE) == whole.encode(_ARTICLE)
  assert (made.pad_id, made.mask_id) == (whole.pad_id, whole.mask_id)


def test_a_vocab_that_is_not_read_is_no_vocab(tmp_path, caplog):
  pieces = '[PAD] [UNK] [CLS] [SEP] [MASK] a b'.split()
  path = tmp_path / 'vocab.txt'
  path.write_text('\n'.join(pieces))
  (tmp_path / 'config.json').write_text('{"model_type": "roberta"}')
  with pytest.raises(ValueError, match='does not read vocab.txt for a model'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  settings = tmp_path / 'tokenizer_config.json'
  settings.write_text('{"tokenizer_class": "BertTokenizer"}')
  made = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert made.encode('A b') == [5, 6]
  settings.unlink()
  shutil.copy(_FOLDER / 'roberta' / 'tokenizer.json', tmp_path)
  tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert 'lines of vocab.txt are no wordpieces: transformers reads' in (
      caplog.text
  )
