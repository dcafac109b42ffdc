"""WordPiece: byte offsets, vocabularies, training."""

import json
import os
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import transformers

from realm_jax.corpus import tokenizer as tokenizer_lib

_PIECES = (
    '[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat un ##aff ##able emile zola na '
    "##ive 日 本 , . - ' s ( ) [ ] x ##y 7 ## ᄒ ##ᅡ ##ᆫ sep straße ß i ı"
).split()


def _tokenizer(lowercase=True):
  return tokenizer_lib.Tokenizer(_PIECES, lowercase)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('The cat', [('the', 'The'), ('cat', 'cat')]),
        ('unaffable', [('un', 'un'), ('##aff', 'aff'), ('##able', 'able')]),
        # Accents take two bytes or a character of their own, and are dropped.
        ('Émile Zola', [('emile', 'Émile'), ('zola', 'Zola')]),
        ('E\u0301mile', [('emile', 'E\u0301mile')]),
        ('naïve', [('na', 'na'), ('##ive', 'ïve')]),
        # [UNK] stands for the whole word.
        ('cat 😀😀 sat', [('cat', 'cat'), ('[UNK]', '😀😀'), ('sat', 'sat')]),
        ('über-cat', [('[UNK]', 'über'), ('-', '-'), ('cat', 'cat')]),
        # Chinese characters are words of their own.
        ('日本x', [('日', '日'), ('本', '本'), ('x', 'x')]),
        # Control characters and unusual spaces disappear.
        ('c\u0000a\u200bt\u00a0sat', [('cat', 'c\0a\u200bt'), ('sat', 'sat')]),
        ('cat\u3000\r\n\tsat', [('cat', 'cat'), ('sat', 'sat')]),
        # A syllable of three letters: three wordpieces of the same bytes.
        ('한', [('ᄒ', '한'), ('##ᅡ', '한'), ('##ᆫ', '한')]),
        ("Zola's.", [('zola', 'Zola'), ("'", "'"), ('s', 's'), ('.', '.')]),
        # Special tokens are never made from text.
        ('[SEP]', [('[', '['), ('sep', 'SEP'), (']', ']')]),
        ('', []),
        (' \n', []),
    ],
)
def test_offsets_are_bytes_of_the_text(text, expected):
  tokenizer = _tokenizer()
  ((ids, starts, limits),) = tokenizer.encode_arrays([text])
  ids = ids.tolist()
  data = text.encode('utf-8')
  found = [
      (tokenizer.vocab[i], data[start:limit].decode('utf-8'))
      for i, start, limit in zip(ids, starts, limits, strict=True)
  ]
  assert found == expected
  assert tokenizer.encode(text) == ids
  assert tokenizer.encode_batch(['cat', text]) == [tokenizer.encode('cat'), ids]


def test_wordpieces_are_those_of_transformers(tmp_path):
  _tokenizer().save(tmp_path)
  theirs = transformers.BertTokenizer(str(tmp_path / 'vocab.txt'))
  for text in (
      'The unaffable Émile ZOLA, sat (naïve) 日本-x!',
      'xyyy straße STRASSE İx ı\u0307 \u00adcat a' + 'b' * 101,
      'cat\u2028sat\x85the\x1fcat ’ “x”…',
  ):
    expected = theirs(text, add_special_tokens=False)['input_ids']
    assert _tokenizer().encode(text) == expected


def test_case_is_kept_on_request():
  assert _tokenizer(lowercase=False).encode('The cat') == [1, 6]


def test_masks_are_special_only_on_request():
  tokenizer = _tokenizer()
  mask = tokenizer.mask_id
  assert tokenizer.encode('the [MASK] sat', masks=True) == [5, mask, 7]
  assert tokenizer.encode('[MASK][MASK]', masks=True) == [mask, mask]
  assert mask not in tokenizer.encode('the [MASK] sat')


def test_byte_positions():
  np.testing.assert_array_equal(
      tokenizer_lib.byte_positions('aé日😀'), [0, 1, 3, 6, 10]
  )
  np.testing.assert_array_equal(tokenizer_lib.byte_positions('ab'), [0, 1, 2])


def test_decode_joins_wordpieces():
  tokenizer = _tokenizer()
  ids = [2, *tokenizer.encode('the unaffable cat, 7.'), 3, 0, 0]
  assert tokenizer.decode(ids) == 'the unaffable cat, 7.'


def test_save_and_read_again(tmp_path):
  path = _tokenizer().save(tmp_path)
  assert b'\r' not in path.read_bytes()
  again = tokenizer_lib.Tokenizer.from_vocab(path)
  assert again.vocab == _PIECES
  assert again.digest == _tokenizer().digest
  assert again.digest != _tokenizer(lowercase=False).digest
  assert again.digest != tokenizer_lib.Tokenizer([*_PIECES, 'dog']).digest
  path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
  assert tokenizer_lib.Tokenizer.from_vocab(path).digest == again.digest


@pytest.mark.parametrize(
    ('lines', 'message'),
    [
        (b'[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n', r'vocab.txt: .*lacks \[MASK\]'),
        (b'a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n', r'\[PAD\] at id 1'),
        (b'[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n', "'a' twice.* 5 and 6"),
        (b'[PAD]\n[UNK]\n\n[CLS]\n[SEP]\n[MASK]\n', 'empty wordpiece at id 2'),
        (b'', 'lacks'),
        (b'[PAD]\n[UNK]\n\xff\n', r'vocab.txt:3: not UTF-8'),
    ],
)
def test_unusable_vocabulary_is_refused(tmp_path, lines, message):
  path = tmp_path / 'vocab.txt'
  path.write_bytes(lines)
  with pytest.raises(ValueError, match=message):
    tokenizer_lib.Tokenizer.from_vocab(path)


def test_source_may_be_a_folder(tmp_path):
  _tokenizer().save(tmp_path)
  found = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert found.digest == _tokenizer().digest
  (tmp_path / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
  found = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert found.digest == _tokenizer(lowercase=False).digest


def test_source_may_be_a_fast_tokenizer(tmp_path):
  _tokenizer().save(tmp_path)
  fast = transformers.BertTokenizer(
      str(tmp_path / 'vocab.txt'), do_lower_case=False
  )
  folder = tmp_path / 'fast'
  fast.save_pretrained(folder)
  assert not (folder / 'vocab.txt').exists()
  found = tokenizer_lib.Tokenizer.from_source(str(folder))
  assert found.vocab == _PIECES
  assert not found.lowercase


def test_source_of_another_kind_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='neither vocab.txt nor'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  model = {'model': {'type': 'WordLevel', 'vocab': {'a': 0}}}
  (tmp_path / 'tokenizer.json').write_text(json.dumps(model))
  with pytest.raises(ValueError, match='WordLevel tokenizer; supported are'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  with pytest.raises(FileNotFoundError, match='There is no vocabulary file'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path / 'missing' / 'deep'))


def test_unreachable_hub_is_explained(monkeypatch):
  error = huggingface_hub.errors.LocalEntryNotFoundError('offline')

  def fail(name, file):
    raise error

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', fail)
  with pytest.raises(FileNotFoundError, match='some/model.*not in the cache'):
    tokenizer_lib.Tokenizer.from_source('some/model')
  error = OSError('disk is full')
  with pytest.raises(FileNotFoundError, match='some/model.*disk is full'):
    tokenizer_lib.Tokenizer.from_source('some/model')


def test_source_may_be_on_the_hub(tmp_path, monkeypatch):
  _tokenizer().save(tmp_path)

  def download(name, file):
    assert name == 'some/model'
    if not (tmp_path / file).is_file():
      raise huggingface_hub.errors.LocalEntryNotFoundError(f'no {file}')
    return str(tmp_path / file)

  monkeypatch.setattr(huggingface_hub, 'hf_hub_download', download)
  found = tokenizer_lib.Tokenizer.from_source('some/model')
  assert found.digest == _tokenizer().digest


_TRAIN = """
from realm_jax.corpus import tokenizer
texts = [f'Ümlaut {i % 7} walked-{i * 37 % 101}, $x§ «y»' for i in range(400)]
print(tokenizer.Tokenizer.train(texts, 300).digest)
"""


def test_training_gives_the_same_vocabulary_in_every_process():
  digests = set()
  for seed in '123':
    done = subprocess.run(
        [sys.executable, '-c', _TRAIN],
        env={**os.environ, 'PYTHONHASHSEED': seed},
        capture_output=True,
        text=True,
        check=True,
    )
    digests.add(done.stdout)
  assert len(digests) == 1


def test_trained_vocabulary_covers_its_texts():
  texts = ['the cat sat on the mat', 'the naïve 日本 cat-food', 'the']
  tokenizer = tokenizer_lib.Tokenizer.train(texts, 100)
  assert tokenizer.vocab[:5] == '[PAD] [UNK] [CLS] [SEP] [MASK]'.split()
  assert tokenizer.encode('the') == [tokenizer.vocab.index('the')]
  for text in texts:
    assert tokenizer.unk_id not in tokenizer.encode(text)
  with pytest.raises(ValueError, match='no text'):
    tokenizer_lib.Tokenizer.train([], 100)
