"""Tokenizers of other programs: ids and offsets are those of transformers."""

import json
import pathlib
import pickle
import random

import numpy as np
import pytest
import transformers

from realm_jax.corpus import tokenizer as tokenizer_lib

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
