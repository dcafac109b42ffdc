"""Tokenizers of other programs: ids and offsets are those of transformers."""

import json
import pathlib
import pickle
import random
import re
import subprocess
import sys

import helpers
import numpy as np
import pytest
import transformers

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.prepare import prepare

_SPECIALS = '[PAD] [UNK] [CLS] [SEP] [MASK]'.split()
_RENAMED = '<pad> <unk> <cls> <sep> <mask>'.split()
_ROLES = [f'{name}_token' for name in ('pad', 'unk', 'cls', 'sep', 'mask')]
_LETTERS = [*"abcdeABCDE0123.,-<>_'[]äöüéßÄÉçñıİ日本語中ไทยعбшΣσς한ᄒ"]
_WORDS = (
    'schön schon für fur Für ab abc Abc Äb éa ÉA ##ab ##c ##bC ##日 日本 12 ##é'
    ' e\u0301 ##\u0301 num <num> unused'
).split()
_PIECES = [*_LETTERS, *(f'##{c}' for c in _LETTERS), *_WORDS]
_VOCAB = [*_SPECIALS, *dict.fromkeys(_PIECES)]
_BERT = {'tokenizer_class': 'BertTokenizer'}
_FAST = {'tokenizer_class': 'PreTrainedTokenizerFast'}


def _added(content, i, special=False, **flags):
  usual = dict.fromkeys(('single_word', 'lstrip', 'rstrip'), False)
  usual['normalized'] = not special
  return {'id': i, 'content': content, 'special': special} | usual | flags


def _normalizer(**changes):
  usual = {'clean_text': True, 'handle_chinese_chars': True}
  usual |= {'strip_accents': None, 'lowercase': True}
  return {'type': 'BertNormalizer'} | usual | changes


def _rules(normalizer, *added, vocab=tuple(_VOCAB), **model):
  model = {
      'type': 'WordPiece',
      'unk_token': vocab[1],
      'continuing_subword_prefix': '##',
      'max_input_chars_per_word': 100,
      'vocab': {piece: i for i, piece in enumerate(vocab)},
  } | model
  special = [_added(p, i, True) for i, p in enumerate(vocab[:5])]
  return {
      'version': '1.0',
      'truncation': None,
      'padding': None,
      'added_tokens': [*special, *added],
      'normalizer': normalizer,
      'pre_tokenizer': {'type': 'BertPreTokenizer'},
      'post_processor': None,
      'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
      'model': {k: v for k, v in model.items() if v is not None},
  }


def _sequence(*kinds):
  return {
      'type': 'Sequence',
      'normalizers': [k if isinstance(k, dict) else {'type': k} for k in kinds],
  }


def _bert(vocab=tuple(_VOCAB), **settings):
  return {'vocab.txt': vocab, 'tokenizer_config': _BERT | settings}


def _fast(rules, **settings):
  return {'tokenizer': rules, 'tokenizer_config': _FAST | settings}


_N = len(_VOCAB)
_STRIP = {'type': 'Strip', 'strip_left': True, 'strip_right': True}
_MARKS = [
    _added('<num>', _N, lstrip=True),
    _added('<Città>', _N + 1, rstrip=True, normalized=False),
    _added('abc', _N + 2, single_word=True),
    _added('[ENT]', _N + 3, special=True),
]
_DECODER = {
    str(token['id']): {k: v for k, v in token.items() if k != 'id'}
    for token in _MARKS
}
_NAMES = dict(zip(_ROLES, _RENAMED, strict=True))
_OTHER = [*_RENAMED, *_VOCAB[5:]]

# By name: the files of a folder; those without a dot are JSON.
_CONFIGURATIONS = {
    'uncased': _bert(do_lower_case=True),
    'cased': _bert(do_lower_case=False),
    'no settings': {'vocab.txt': _VOCAB, 'config': {'model_type': 'bert'}},
    'cased of version 4': _bert(
        do_lower_case=False,
        tokenizer_class='BertTokenizerFast',
        strip_accents=None,
        model_max_length=512,
        added_tokens_decoder={
            str(i): {k: v for k, v in _added(p, i, True).items() if k != 'id'}
            for i, p in enumerate(_SPECIALS)
        },
        **dict(zip(_ROLES, _SPECIALS, strict=True)),
    ),
    'accents kept': _bert(do_lower_case=True, strip_accents=False),
    'accents removed': _bert(do_lower_case=False, strip_accents=True),
    'accents null': _bert(do_lower_case=True, strip_accents=None),
    'Chinese words': _bert(tokenize_chinese_chars=False),
    'Chinese words, cased': _bert(
        tokenize_chinese_chars=False, do_lower_case=False
    ),
    'electra': _bert(tokenizer_class='ElectraTokenizer'),
    'dpr': _bert(tokenizer_class='DPRQuestionEncoderTokenizer'),
    'class null': {
        'vocab.txt': _VOCAB,
        'tokenizer_config': {'tokenizer_class': None, 'do_lower_case': False},
        'config': {'model_type': 'bert', 'tokenizer_class': None},
    },
    'added tokens': _bert() | {'added_tokens': {'<num>': _N, '[e]': _N + 1}},
    'added, cased': _bert(do_lower_case=False)
    | {'added_tokens': {'<Num>': _N, 'Schön': _N + 1}},
    'added decoder': _bert(added_tokens_decoder=_DECODER),
    'renamed': _bert(_OTHER, **_NAMES),
    'renamed map': _bert(_OTHER) | {'special_tokens_map': _NAMES},
    'renamed objects': _bert(_OTHER)
    | {
        'special_tokens_map': _NAMES
        | {'mask_token': _added('<mask>', 0, True, lstrip=True)}
    },
    'padded': _bert([*_VOCAB, *(f'[unused{i}]' for i in range(9))]),
    'vocabulary alone': {'vocab.txt': _VOCAB},
    'a line twice': _bert([*_VOCAB, 'ab', 'last']),
    'fast': _fast(_rules(_normalizer())),
    'fast, cased': _fast(_rules(_normalizer(lowercase=False))),
    'fast, accents': _fast(_rules(_normalizer(strip_accents=False))),
    'fast, unclean': _fast(_rules(_normalizer(clean_text=False))),
    'fast of version 5': _fast(
        _rules(_normalizer(lowercase=False)),
        tokenizer_class='TokenizersBackend',
    ),
    'fast of BERT': _fast(
        _rules(_normalizer(lowercase=False)),
        tokenizer_class='BertTokenizer',
        do_lower_case=False,
    ),
    'file alone': {'tokenizer': _rules(_normalizer(strip_accents=False))},
    'no normalizer': {'tokenizer': _rules(None)},
    'sequence': _fast(_rules(_sequence('NFD', 'Lowercase', 'StripAccents'))),
    'sequence of BERT': _fast(_rules(_sequence('NFKC', _normalizer()))),
    'nested': _fast(_rules(_sequence(_sequence('NFC', 'Lowercase'), _STRIP))),
    'fast, added': _fast(_rules(_normalizer(), *_MARKS)),
    'fast, added, cased': _fast(_rules(_normalizer(lowercase=False), *_MARKS)),
    'fast, renamed': _fast(_rules(_normalizer(), vocab=_OTHER), **_NAMES),
    'short words': _fast(_rules(_normalizer(), max_input_chars_per_word=4)),
    'no type': _fast(_rules(_normalizer(), type=None)),
    'truncation': _fast(
        _rules(_normalizer())
        | {
            'truncation': {
                'direction': 'Right', 'max_length': 4,
                'strategy': 'LongestFirst', 'stride': 0,
            }  # fmt: skip
        }
    ),
    'blanks': _fast(
        _rules(_sequence('Lowercase'))
        | {'pre_tokenizer': {'type': 'WhitespaceSplit'}}
    ),
}


def _write(folder: pathlib.Path, contents) -> pathlib.Path:
  folder.mkdir(parents=True, exist_ok=True)
  for name, value in contents.items():
    if name == 'vocab.txt':
      text = ''.join(f'{piece}\n' for piece in value)
      (folder / name).write_bytes(text.encode())
    else:
      (folder / f'{name}.json').write_text(json.dumps(value))
  return folder


def _texts(number: int) -> list[str]:
  """Random text of letters, marks, blanks, wordpieces and added tokens."""
  rng = random.Random(number)
  pools = [
      _LETTERS,
      [piece.removeprefix('##') for piece in _WORDS],
      ['<num>', ' <num> ', '<NUM>', '<Num>', '<Città>', '<città>  ', '[ENT]',
       ' [e]', '[E]', 'abc', 'xabc', 'ABC_', 'Schön', 'SCHÖN', '[MASK', 'SEP]'],
      [*' \t\n\r\u00a0\u2028\u3000\u200b\u200d\u00ad\ufeff\0\x1c\x85'],
      [*'\u0301\u0308\u0338\u0345\u0300\u3099\ufffd$^`~…’“《。，、'],
  ]  # fmt: skip
  texts = ['', ' ', 'a' * 101, 'É' * 101]
  while len(texts) < 60:
    parts = []
    for _ in range(rng.randrange(1, 40)):
      if rng.random() < 0.15:
        code = rng.choice([rng.randrange(0x3000), rng.randrange(0x11_0000)])
        parts.append('' if 0xD800 <= code < 0xE000 else chr(code))
      parts.append(rng.choice(rng.choice(pools)))
      if rng.random() < 0.3:
        parts.append(' ')
    text = ''.join(parts)
    if not any(piece in text for piece in (*_SPECIALS, *_RENAMED)):
      texts.append(text)
  return texts


@pytest.mark.parametrize('name', _CONFIGURATIONS)
def test_ids_and_offsets_are_those_of_transformers(tmp_path, name):
  folder = _write(tmp_path / 'in', _CONFIGURATIONS[name])
  if [path.name for path in folder.iterdir()] == ['vocab.txt']:
    # AutoTokenizer does not know the class of a vocab.txt.
    theirs = transformers.BertTokenizer.from_pretrained(folder)
  else:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ours = tokenizer_lib.Tokenizer.from_source(str(folder))
  saved = tmp_path / 'saved'
  saved.mkdir()
  ours.save(saved, settings=True)
  others = [
      tokenizer_lib.Tokenizer.from_saved(saved),
      pickle.loads(pickle.dumps(ours)),
      tokenizer_lib.Tokenizer.from_source(str(saved)),
  ]
  texts = _texts(len(name))
  expected = theirs(
      texts, add_special_tokens=False, return_offsets_mapping=True
  )
  cached = tokenizer_lib.CachedTokenizer(ours)(texts)
  for text, ids, offsets, (found, ranges), (again, starts, limits) in zip(
      texts,
      expected['input_ids'],
      expected['offset_mapping'],
      ours.encode_characters(texts),
      cached,
      strict=True,
  ):
    assert found.tolist() == ids, repr(text)
    assert ranges.tolist() == [list(pair) for pair in offsets], repr(text)
    assert again.tolist() == ids, repr(text)
    to_byte = tokenizer_lib.byte_positions(text)
    np.testing.assert_array_equal(starts, to_byte[ranges[:, 0]])
    np.testing.assert_array_equal(limits, to_byte[ranges[:, 1]])
    assert all(other.encode(text) == ids for other in others)
  assert {other.digest for other in others} == {ours.digest}
  assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
  for piece, i in theirs.get_vocab().items():
    assert ours.vocab[i] == piece
  assert [ours.pad_id, ours.unk_id, ours.cls_id, ours.sep_id, ours.mask_id] == [
      *range(5)
  ]
  # transformers reads what was saved, too.
  again = transformers.AutoTokenizer.from_pretrained(saved)
  assert again(texts, add_special_tokens=False)['input_ids'] == [
      *expected['input_ids']
  ]
  assert again(texts[5])['input_ids'] == [2, *expected['input_ids'][5], 3]


def _read(folder, contents, cased=None, file=''):
  path = _write(folder, contents) / file
  return tokenizer_lib.Tokenizer.from_source(str(path), cased)


def test_rules_of_bert_have_the_digest_of_a_plain_vocabulary(tmp_path):
  plain = {True: tokenizer_lib.Tokenizer(_VOCAB, True).digest,
           False: tokenizer_lib.Tokenizer(_VOCAB, False).digest}
  found = {
      name: _read(tmp_path / name, contents).digest
      for name, contents in _CONFIGURATIONS.items()
  }
  for name in ('uncased', 'no settings', 'accents null', 'fast', 'no type'):
    assert found[name] == plain[True], name
  for name in ('cased', 'cased of version 4', 'fast, cased', 'fast of BERT'):
    assert found[name] == plain[False], name
  others = ('accents kept', 'accents removed', 'Chinese words', 'renamed',
            'added tokens', 'sequence', 'short words', 'fast, unclean')
  assert len({*plain.values(), *(found[name] for name in others)}) == 10


@pytest.mark.parametrize(
    ('settings', 'cased', 'lowercase', 'line'),
    [
        (None, None, True, 'No file says .* 23 wordpieces have capitals'),
        (None, True, False, 'cased; accents kept'),
        (None, False, True, 'lower case; accents removed'),
        ({'do_lower_case': False}, None, False, 'cased; accents kept'),
        ({'do_lower_case': False}, True, False, r'vocab\.txt, tokenizer_con'),
        (_BERT | {'strip_accents': False}, None, True, 'accents kept'),
        ({'tokenizer_class': 'RealmTokenizer'}, None, True, 'as BertTokenizer'),
        ({'tokenizer_class': 'RealmTokenizer'}, True, False, 'cased; accents'),
    ],
)  # fmt: skip
@pytest.mark.parametrize('file', ['', 'vocab.txt'])
def test_case_of_a_vocabulary_file(
    tmp_path, caplog, settings, cased, lowercase, line, file
):
  caplog.set_level('INFO')
  contents = {'vocab.txt': _VOCAB}
  if settings is not None:
    contents['tokenizer_config'] = settings
  found = _read(tmp_path, contents, cased, file)
  assert found.lowercase == lowercase
  assert re.search(line, caplog.text)
  assert ('No file says' in caplog.text) == (
      cased is None and 'do_lower_case' not in (settings or {})
  )


def test_another_vocabulary_beside_a_file(tmp_path):
  contents = {'tokenizer': _rules(_normalizer(lowercase=False))}
  assert not _read(
      tmp_path, contents | {'vocab.txt': _VOCAB}, file='vocab.txt'
  ).lowercase
  _write(tmp_path, {'vocab.txt': [*_VOCAB, 'more']})
  with pytest.raises(ValueError, match=r'not the vocabulary of the tokenizer'):
    tokenizer_lib.Tokenizer.from_source(str(tmp_path / 'vocab.txt'))
  # A file of another name is no part of the folder's tokenizer.
  (tmp_path / 'vocab.txt').rename(tmp_path / 'words')
  found = tokenizer_lib.Tokenizer.from_source(str(tmp_path / 'words'))
  assert found.vocab[-1] == 'more'


def test_tokenizer_json_is_read_as_it_is_if_it_is_named(tmp_path, caplog):
  contents = {
      'tokenizer': _rules(_normalizer(lowercase=False)),
      'tokenizer_config': _BERT | {'do_lower_case': True},
  }
  assert _read(tmp_path, contents).lowercase
  assert 'BertTokenizer takes it from tokenizer_config.json' in caplog.text
  caplog.clear()
  assert not _read(tmp_path, contents, file='tokenizer.json').lowercase
  assert 'takes it' not in caplog.text


def test_a_byte_order_mark_is_no_letter(tmp_path):
  text = '\ufeff' + '\r\n'.join(_VOCAB)
  (tmp_path / 'vocab.txt').write_bytes(text.encode())
  found = tokenizer_lib.Tokenizer.from_source(str(tmp_path))
  assert found.vocab == _VOCAB


def test_a_renamed_mask(tmp_path):
  found = _read(tmp_path, _CONFIGURATIONS['renamed'])
  ab = found.encode('ab')
  assert found.encode('ab <mask>[MASK] ab', masks=True) == [*ab, 4, 4, *ab]
  assert 4 not in found.encode('<mask>')


def test_added_tokens_that_get_another_id(tmp_path, caplog):
  found = _read(tmp_path, _bert() | {'added_tokens': {'<num>': _N + 9}})
  assert found.vocab_size == _N  # <num> is a wordpiece already.
  assert f"'<num>' the id {_N + 9}. As in transformers" in caplog.text


_NULL = _rules(_normalizer()) | {'added_tokens': None}
_WORDS_ONLY = {'model': {'type': 'WordLevel', 'vocab': {'a': 0}}}


@pytest.mark.parametrize(
    ('contents', 'cased', 'message'),
    [
        ({'tokenizer': _NULL}, None,
         r'tokenizer\.json: added_tokens is null; it must be a list, \[\] for'),
        (_bert(do_lower_case=None), None,
         r'config\.json: do_lower_case is null; it must be true or false'),
        (_bert(do_lower_case='no'), None, 'do_lower_case is "no"'),
        ({'tokenizer': _rules(None) | {'model': []}}, None,
         r'model is \[\]; it must be an object'),
        ({'tokenizer': {'vocab': {}}}, None, 'no tokenizer.json: it has no'),
        ({'tokenizer': _rules(_sequence('Strip'))}, None,
         'cannot read this tokenizer .tokenizer.json.: missing field `strip'),
        ({'tokenizer': _WORDS_ONLY}, None,
         'a WordLevel tokenizer; supported are WordPiece, BPE, Unigram'),
        ({'tokenizer_config': []}, None, 'neither vocab.txt nor'),
        (_bert() | {'tokenizer_config': []}, None, 'is not a JSON object'),
        (_bert(_VOCAB[:3]), None, r'lacks \[SEP\] \(sep_token\).*"pad_t'),
        (_bert(_OTHER), None, r'lacks \[PAD\] \(pad_token\), '),
        (_bert(mask_token='[SEP]'), None, 'special wordpieces are the same'),
        ({'tokenizer': {'model': {'vocab': {'a': 1 << 30}}}}, None,
         'the largest that can be used'),
        (_bert(do_lower_case=True), True, 'json says that text is lower-cased'),
        (_bert(do_lower_case=False), False, 'nocased was given, but .* cased'),
        ({'tokenizer': _rules(_normalizer())}, True, 'lower-cased: leave the'),
    ],
)  # fmt: skip
def test_what_is_refused_in_one_line(tmp_path, contents, cased, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
    _read(tmp_path, contents, cased)
  assert '\n' not in str(raised.value)
  assert str(tmp_path) in str(raised.value)


def test_damaged_files_are_read_or_refused(tmp_path):
  rng = random.Random(0)
  for name in ('cased of version 4', 'fast, added', 'added tokens') * 15:
    folder = _write(tmp_path, _CONFIGURATIONS[name])
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    if rng.random() < 0.4:
      del data[rng.randrange(len(data)) :]
    else:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
      found = tokenizer_lib.Tokenizer.from_source(str(folder))
      assert found.encode('ab')
    except ValueError as error:
      assert '\n' not in str(error)
      assert str(folder) in str(error)


_LAZY = """
import sys
from realm_jax.cli import commands
from realm_jax.corpus import corpus
from realm_jax.corpus import tokenizer
from realm_jax.trainer import loop
assert corpus.Corpus.open(sys.argv[1]).tokenizer.vocab_size == int(sys.argv[2])
tokenizer.Tokenizer.from_source(sys.argv[3])  # A vocab.txt alone.
assert 'transformers' not in sys.modules, 'transformers is imported.'
"""


def test_a_corpus_keeps_its_tokenizer(tmp_path, caplog):
  source = helpers.write_records(
      tmp_path / 'in.jsonl',
      [{'id': 'a', 'text': 'Schön ab <num>, 12 Äb. Für <NUM> in 1912 abc.'}],
  )
  contents = _CONFIGURATIONS['accents kept'] | {'added_tokens': {'[e]': _N}}
  made_by = _read(tmp_path / 'tokenizer', contents)
  for corpus, vocab in (('first', 'tokenizer'), ('second', 'first')):
    prepare.prepare(
        [source],
        tmp_path / corpus,
        vocab=str(tmp_path / vocab),
        validation_fraction=0,
        progress=False,
    )
    opened = corpus_lib.Corpus.open(tmp_path / corpus)
    assert opened.tokenizer == made_by
    assert opened.tokenizer.vocab[-1] == '[e]'
    _, body = opened.passages.title_and_body(0)
    assert body.tolist() == made_by.encode(opened.passage_text(0)['text'])
  # Neither the trainer nor the commands pay for the import.
  alone = _write(tmp_path / 'alone', {'vocab.txt': _VOCAB}) / 'vocab.txt'
  arguments = map(str, (tmp_path / 'first', _N + 1, alone))
  subprocess.run([sys.executable, '-c', _LAZY, *arguments], check=True)
  (tmp_path / 'first' / 'tokenizer.json').write_text('{"model": 3}')
  with pytest.raises(ValueError, match=r'tokenizer\.json is damaged'):
    _ = tokenizer_lib.Tokenizer.from_saved(tmp_path / 'first')


def test_a_learned_vocabulary_may_be_cased(tmp_path):
  source = helpers.write_records(
      tmp_path / 'in.jsonl', [{'text': 'Anna and ANNA met Anna in 1912.'}]
  )
  for cased in (True, False, None):
    manifest = prepare.prepare(
        [source],
        tmp_path / str(cased),
        cased=cased,
        validation_fraction=0,
        progress=False,
    )
    assert manifest['tokenizer']['lowercase'] == (not cased)
    corpus = corpus_lib.Corpus.open(tmp_path / str(cased))
    assert ('A' in corpus.tokenizer.vocab) == bool(cased)
