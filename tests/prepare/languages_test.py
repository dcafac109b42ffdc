"""Sentences in many scripts, languages, and the spans of texts not English."""

import json
import logging
import pathlib
import re
import shlex
import textwrap

import helpers
import numpy as np
import pytest
import tensorflow_datasets as tfds

from realm_jax import config as config_lib
from realm_jax.cli import commands
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.evaluation import corpus_stats
from realm_jax.prepare import filters
from realm_jax.prepare import languages
from realm_jax.prepare import prepare
from realm_jax.prepare import records
from realm_jax.prepare import salient_spans
from realm_jax.prepare import sources
from realm_jax.prepare import workers
from realm_jax.trainer import examples
from realm_jax.trainer.stages import ict

_write, _prepare = helpers.write_records, helpers.prepare_corpus


def _split(text, language='en'):
  other = languages.is_other_script(text, len(text.encode()))
  found = languages.split_sentences(text, language, other)
  return [text[a:b] for a, b in found]


@pytest.mark.parametrize(
    'marked',
    [
        '河边有一座塔。|它建于1204年！|谁建的？|没有人知道',
        '他问：「谁来？」|她说：“我来。”|（他没有来。）|完。',
        '老师问:"你来吗?"|学生答:"来。"|大家都笑了!|真的',
        '人口是３．５万．|面积很大．',
        '雅虎（Yahoo!奇摩）在2001年开始.|后来关闭了',
        '川のほとりに塔がある。|「古い。」|と彼は言った｡|本当？',
        '강가에 탑이 있다. |누가 지었나? |아무도 모른다.',
        'على النهر برج قديم. |من بناه؟|لا أحد يعرف! |نعم',
        'دریا پر ایک مینار ہے۔|کس نے بنایا؟|کوئی نہیں جانتا۔',
        'नदी पर एक मीनार है।|किसने बनाई?|कोई नहीं जानता॥|हाँ',
        'নদীর ধারে একটি মিনার।|কে বানাল?|কেউ জানে না।',
        'នៅមាត់ទន្លេមានប្រាសាទ។|អ្នកណាសាងសង់៕',
        'မြစ်နားမှာ၊ မျှော်စင်ရှိတယ်။|ဘယ်သူဆောက်လဲ။',
        'ཆུ་འགྲམ་ལ་མཁར་ཡོད།|སུས་བཟོས།',
        'በወንዙ አጠገብ ግንብ አለ።|ማን ሠራው፧|ማንም አያውቅም።',
        'Գետի մոտ աշտարակ կա։|Ոչ ոք չգիտի: |Այո։',
        'У реки стоит башня. |Кто её построил? |Никто не знает!',
        'Στο ποτάμι υπάρχει πύργος. |Κανείς δεν ξέρει.',
    ],
)
def test_sentence_ends_of_scripts(marked):
  parts = marked.split('|')
  assert _split(''.join(parts)) == [part.strip() for part in parts]


def test_blanks_end_clauses_in_thai():
  clauses = [
      'ริมแม่น้ำมีหอคอยเก่าแก่ที่สร้างขึ้นเมื่อแปดร้อยปีก่อน',
      'ไม่มีใครรู้ ว่าผู้ใดเป็นคนสร้างหอคอยแห่งนี้ขึ้นมา',
      'ใน ปี 1204 เกิดไฟไหม้',
  ]
  assert min(map(len, clauses[:2])) >= 40
  assert _split(' '.join(clauses)) == clauses


@pytest.mark.parametrize(
    'text',
    [
        'He said 「我来了。他走了。」 in 1912 and left for good.',
        'The motto (सत्यमेव जयते।) and the cry 来！ are on the wall of it.',
        'Wow!Really?Yes.',
    ],
)
def test_a_quotation_does_not_divide_a_sentence_in_latin_letters(text):
  assert _split(text) == [text]


def test_ordinal_numbers_end_no_sentence_in_german():
  parts = [
      'Der Turm wurde am 3. Mai 1204 von Dr. Vogel gebaut.',
      'Am 21. März brannte er.',
      'Er hatte 12 Türme.',
  ]
  assert _split(' '.join(parts), 'de') == parts
  assert _split('He came 3. May left. It rained.', 'en') == [
      'He came 3.', 'May left.', 'It rained.',
  ]


@pytest.mark.parametrize(
    'text, language',
    [
        ('The tower was built by a man of the town.', 'en'),
        ('Der Turm wurde von einem Mann aus der Stadt gebaut.', 'de'),
        ('La tour est dans le nord et la ville est sur une île.', 'fr'),
        ('La torre es de los reyes y el pueblo está en el norte.', 'es'),
        ('Tårnet er på en ø og det blev bygget af en konge.', 'da'),
        ('Torni on vanha ja se oli ennen kuninkaan talo.', 'fi'),
        ('河边有一座塔，叫做 Tower of London。', 'Han'),
        ('川のほとりに古い塔がある。', 'Kana'),
        ('강가에 탑이 있다.', 'Hangul'),
        ('У реки стоит башня.', 'Cyrillic'),
        ('The poem 河边有塔 is in the book of songs.', 'en'),
        ('Anna Lee. Bert 1990.', 'unknown'),
        ('1990 – 12 %', 'unknown'),
    ],
)
def test_detection(text, language):
  assert languages.detect(text) == language
  assert languages.detect(text * 300) in (language, 'Han', 'en')


def _chinese(count):
  rng = np.random.default_rng(3)
  characters = [chr(0x4E00 + 7 * i) for i in range(1500)]
  return [
      {'id': f'p{i}', 'title': '塔', 'text': ''.join(
          ''.join(rng.choice(characters, rng.integers(6, 20))) + '。'
          for _ in range(8)
      )}
      for i in range(count)
  ]


def _sentences(made, split='knowledge'):
  source = tfds.builder_from_directory(
      str(made.directory / 'sentences')
  ).as_data_source(split=split)
  return [source[i] for i in range(len(source))]


def _bodies(made):
  return [
      made.passage_text(row)['text'] for row in range(len(made.passages))
  ]


def test_chinese_without_spans_is_said_and_can_be_searched(tmp_path, caplog):
  items = _chinese(20)
  source = _write(tmp_path / 'zh.jsonl', items)
  with caplog.at_level(logging.INFO):
    made = _prepare(source, tmp_path / 'made', max_wordpieces=60,
                    vocab_size=4000, validation_fraction=0)
  (warning,) = [r for r in caplog.records if r.levelname == 'WARNING']
  for word in ('Han (100%)', '--spans=random', '`spans`', 'realm-jax tag'):
    assert word in warning.getMessage()
  # Whole sentences in each passage, and each sentence without spans.
  assert all(text.endswith('。') for text in _bodies(made))
  assert ''.join(_bodies(made)) == ''.join(item['text'] for item in items)
  found = _sentences(made)
  assert len(found) == 160
  assert not any(len(record['span_starts']) for record in found)
  assert made.manifest['settings']['spans'] == 'none'
  assert made.manifest['counts']['unknown_wordpieces'] == 0
  figures = corpus_stats.measure(made)['sentences']['knowledge']
  assert (figures['sentences'], figures['spans']) == (160, 0)
  # ICT needs no span.
  assert len(ict.ClozeSentences(made, config_lib.Config(), 'knowledge')) == 160


def test_training_that_masks_names_what_a_corpus_without_spans_lacks(tmp_path):
  source = _write(tmp_path / 'zh.jsonl', _chinese(4))
  made = _prepare(source, tmp_path / 'made', vocab_size=4000)
  with pytest.raises(ValueError, match='no salient spans.*--spans=random'):
    examples.MaskedSentences(made, config_lib.Config(), 'knowledge')


def test_spans_of_records_are_used_in_any_language(tmp_path, caplog):
  text = '河边有一座古老的塔。它由林海建于很久以前。'
  start = len(text[: text.index('林')].encode())
  items = [{'id': 'a', 'text': text, 'spans': [[start, start + 6]]}]
  made = _prepare(_write(tmp_path / 'a.jsonl', items), tmp_path / 'a')
  assert not caplog.records
  (record,) = _sentences(made)
  a, b = record['span_starts'][0], record['span_limits'][0]
  assert record['text'][a:b].decode() == '林海'
  # Others get none by rules; their sentences are not learned from.
  items += _chinese(3)
  made = _prepare(
      _write(tmp_path / 'b.jsonl', items), tmp_path / 'b', vocab_size=4000
  )
  assert 'Only the records with `spans`' in caplog.text
  assert len(_sentences(made)) == 1


def _thai(seed):
  rng = np.random.default_rng(seed)
  syllables = 'แม่ น้ำ มี หอ คอย เก่า ที่ สร้าง ขึ้น นาน'.split()
  words = [''.join(rng.choice(syllables, 12)) for _ in range(20)]
  return ' '.join(words)


def test_marks_of_thai_and_japanese_stay(tmp_path):
  japanese = '川のほとりにガラスの塔がある。' * 3
  for name, text in (('th', _thai(0)), ('ja', japanese)):
    source = _write(tmp_path / f'{name}.jsonl', [{'id': 'x', 'text': text}])
    made = _prepare(source, tmp_path / name, spans='none')
    assert not made.manifest['tokenizer']['lowercase']
    letters = {*text} - {' '}
    assert letters <= {*''.join(made.tokenizer.vocab)}


_GERMAN = (
    'Der Turm wurde von einem Mann aus der Stadt gebaut. Die Kirche ist am'
    ' Markt und das Dach ist aus Blei. '
)
_ENGLISH = (
    'The tower was built by a man of London in 1204. The church is at the'
    ' market and the roof of it is made of lead. '
)


def test_the_rules_of_english_are_not_applied_to_german(tmp_path, caplog):
  source = _write(
      tmp_path / 'de.jsonl', [{'id': str(i), 'text': _GERMAN} for i in range(3)]
  )
  made = _prepare(source, tmp_path / 'auto')
  assert 'de (100%)' in caplog.text
  assert made.manifest['settings']['spans'] == 'none'
  caplog.clear()
  made = _prepare(source, tmp_path / 'forced', spans='rules')
  assert 'spans' not in caplog.text.lower()
  assert any(len(r['span_starts']) for r in _sentences(made))
  made = _prepare(source, tmp_path / 'said', language='en')
  assert made.manifest['settings']['spans'] == 'rules'
  made = _prepare(source, tmp_path / 'de', language='de', spans='none')
  assert made.manifest['settings']['language'] == 'de'
  with pytest.raises(ValueError, match='language is Deutsch'):
    _prepare(source, tmp_path / 'no', language='Deutsch')
  with pytest.raises(ValueError, match='spans is all; it must be one of'):
    _prepare(source, tmp_path / 'no', spans='all')


def test_records_in_english_have_the_rules_in_a_mixed_corpus(tmp_path, caplog):
  items = [
      {'id': f'{i}', 'title': 'T', 'text': text}
      for i, text in enumerate([_ENGLISH, _GERMAN] * 4)
  ]
  made = _prepare(_write(tmp_path / 'a.jsonl', items), tmp_path / 'a')
  assert 'records in English alone' in caplog.text
  assert {bytes(r['text'])[:10] for r in _sentences(made)} == {b'The tower '}
  # Documents that are added have the same settings.
  added = records.Records([_Source([{'id': 'new', 'text': _GERMAN}])])
  assert len([*added.check()]) == 1
  more = prepare.prepare_more(
      made, added, tmp_path / 'more', workers=1, progress=False
  )
  assert more['settings']['spans'] == 'english'
  assert more['counts']['sentences_without_spans'] == 2
  # A quotation changes nothing.
  caplog.clear()
  text = _ENGLISH * 3 + '「我来了。」 He said so in 1990.'
  items = [{'id': 'x', 'text': text}]
  made = _prepare(_write(tmp_path / 'b.jsonl', items), tmp_path / 'b')
  assert not caplog.records
  assert made.manifest['settings']['language'] == 'en'
  assert b'1990' in _sentences(made)[-1]['text']


@pytest.mark.parametrize('language', ['zh', 'th', 'de'])
def test_random_spans_are_the_same_for_any_number_of_workers(
    tmp_path, language, monkeypatch
):
  items = {
      'zh': _chinese(12),
      'th': [{'id': f'{i}', 'text': _thai(i)} for i in range(12)],
      'de': [{'id': f'{i}', 'text': _GERMAN * 3} for i in range(12)],
  }[language]
  source = _write(tmp_path / 'a.jsonl', items)
  monkeypatch.setattr(prepare, '_CHUNK_BYTES', 300)
  made = [
      _prepare(source, tmp_path / f'{n}', spans='random', workers=n,
               vocab_size=4000, validation_fraction=0)
      for n in (1, 2)
  ]
  assert made[0].fingerprint == made[1].fingerprint
  table = made[0].sentences['knowledge']
  assert (np.diff(table.span_offsets) >= 1).all()
  sizes = np.diff(table.spans, axis=1)
  assert sizes.min() >= 1 and len(table) >= 12
  if language == 'de':  # Whole words, without punctuation.
    for record in _sentences(made[0]):
      text = record['text'].decode()
      for a, b in zip(
          record['span_starts'], record['span_limits'], strict=True
      ):
        span = record['text'][a:b].decode()
        assert re.search(rf'(?<!\w){span}(?!\w)', text)
        assert '.' not in span


def test_random_spans_cover_the_share_of_bert():
  pieces = [f'w{i}' for i in range(40)]
  covered = []
  for seed in range(200):
    spans = salient_spans.random_spans(pieces, [True] * 40, str(seed))
    assert all(
        a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False)
    )
    covered.append(sum(b - a for a, b in spans))
  assert set(covered) == {6}
  assert salient_spans.random_spans(['.', '!'], [True, True], '0') == []
  assert salient_spans.random_spans([], [], '0') == []
  # 'tow ##er': both, or none.
  found = {
      salient_spans.random_spans(['tow', 'er', '.'], [True, False, True], s)[0]
      for s in 'abcdef'
  }
  assert found == {(0, 2)}


@pytest.mark.parametrize('mark', ['', '，'])
def test_a_text_without_sentence_ends_is_cut_and_not_lost(tmp_path, mark):
  characters = [chr(0x4E00 + i) for i in range(700)]
  text = mark.join(''.join(characters[i : i + 7]) for i in range(0, 700, 7))
  source = _write(tmp_path / 'a.jsonl', [{'id': 'x', 'text': text}])
  made = _prepare(source, tmp_path / 'made', max_wordpieces=60,
                  vocab_size=4000, validation_fraction=0)
  assert ''.join(_bodies(made)) == text
  assert made.passages.lengths.max() <= 60
  found = [r['text'].decode() for r in _sentences(made)]
  assert ''.join(found) == text
  if mark:
    assert all(piece.endswith(mark) for piece in found[:-1])
  assert made.manifest['counts']['shortened_sentences'] == 1


def test_a_learned_vocabulary_has_the_characters_of_the_script(caplog):
  characters = [chr(0x4E00 + i) for i in range(6000)]
  texts = [''.join(characters[i : i + 100]) for i in range(0, 6000, 100)] * 3
  with caplog.at_level(logging.INFO):
    made = tokenizer_lib.Tokenizer.train(texts, 14_000)
  assert {*characters[:5000]} <= {*made.vocab}
  assert made.vocab_size >= 5995
  caplog.clear()
  made = tokenizer_lib.Tokenizer.train(texts, 4000)
  unknown = sum(made.encode(texts[i]).count(made.unk_id) for i in range(60))
  assert unknown == 4000
  assert '4000 of 6000 different characters, 66.667 %' in caplog.text


def test_the_command_has_each_kind_of_spans():
  (flag,) = [f for f in commands.COMMANDS['prepare'].flags if f.name == 'spans']
  assert flag.type == languages.SPANS


def test_near_duplicates_in_chinese(tmp_path):
  items = _chinese(3)
  items.append({'id': 'copy', 'text': items[0]['text'][1:]})
  source = records.Records([_Source(items)])
  assert len([*source.check()]) == 4
  assert filters.near_duplicates(source, 0.8, workers.Pool(1)) == {3}


class _Source:
  name, kind, fields = 'items', 'records', sources.OWN

  def __init__(self, items):
    self._items = items

  def __iter__(self):
    for i, item in enumerate(self._items):
      yield f'items:{i}', json.dumps(item).encode()


_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'corpora.md'


@pytest.mark.parametrize('section', ['Chinese', 'German'])
def test_the_examples_of_the_docs(section, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  page = _PAGE.read_text(encoding='utf-8').partition(f'\n### {section}\n')[2]
  page = re.split(r'\n##', page)[0]
  blocks = [
      textwrap.dedent(block)
      for block in re.findall(r'(?:^ {4}.*\n)+', page, re.MULTILINE)
  ]
  (name,) = re.findall('A file `(.*)`', page)
  pathlib.Path(name).write_text(blocks.pop(0), encoding='utf-8')
  assert len(blocks) in (2, 4)
  for command, shown in zip(blocks[::2], blocks[1::2], strict=True):
    program, action, *flags = shlex.split(command)
    assert (program, action) == ('realm-jax', 'prepare')
    options = dict(flag[2:].partition('=')[::2] for flag in flags)
    output = options.pop('output')
    made = _prepare(
        options.pop('source'),
        output,
        overwrite='overwrite' in options and options.pop('overwrite') == '',
        validation_fraction=float(options.pop('validation_fraction')),
        **options,
    )
    found = [record['text'].decode() for record in _sentences(made)]
    assert found == shown.splitlines()
    spans = options.get('spans') != 'none'
    assert all(bool(len(r['span_starts'])) == spans for r in _sentences(made))
