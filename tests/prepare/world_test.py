"""The generated world: what it promises to those who train on it."""

import collections
import hashlib
import json
import re
import unicodedata

import pytest

from realm_jax.prepare import world

# Words that relate nothing; every other word of a wording does.
_FUNCTION_WORDS = set(
    'a an and are as at be by did do does every for from had has have he her '
    'him his how in is it its many more most of on one or out s she so some '
    'that the there to up very was were what when where which who with'.split()
)


@pytest.fixture(scope='module')
def small():
  return world.generate(seed=3, entities=300)


@pytest.fixture(scope='module')
def default():
  return world.generate(seed=0)


def _words(text):
  return re.findall(r'\w+', text.lower())


def _articles(generated):
  articles = collections.defaultdict(list)
  for record in generated.knowledge:
    articles[record['article']].append(record)
  return articles


def _span_texts(record):
  text = record['text'].encode()
  return [text[start:limit].decode() for start, limit in record['spans']]


def test_a_seed_always_gives_the_same_world():
  """Recorded runs name a world by its seed alone.

  Change the digest only with a change of the world that is meant, and then say
  so in the release notes: every recorded figure was measured on the old one.
  """
  generated = world.generate(seed=1, entities=40)
  text = json.dumps(
      [generated.knowledge, generated.pretraining, generated.questions]
  )
  assert hashlib.sha256(text.encode()).hexdigest() == (
      '0abbe505f3fedb965666ef7fc2000492def46a6c9b46634d0b172302ba6562f9'
  )


def test_other_seeds_are_other_worlds():
  titles = [
      {r['title'] for r in world.generate(seed, entities=40).knowledge}
      for seed in (0, 1)
  ]
  assert not titles[0] & titles[1]


def test_size_of_the_default_world(default):
  articles = _articles(default)
  assert len(articles) == 1000
  assert len(default.questions) == 6000
  assert 4300 < len(default.knowledge) < 4700
  assert 14_000 < len(default.pretraining) < 16_000
  assert len(world.RELATIONS) == 22


@pytest.mark.parametrize('entities', [20, 21, 777])
def test_any_size(entities):
  articles = _articles(world.generate(seed=5, entities=entities))
  assert len(articles) == entities
  kinds = {article.split('-')[0] for article in articles}
  assert kinds == {'person', 'company', 'town', 'river'}


@pytest.mark.parametrize(
    'seed, entities, message',
    [
        (0, 19, '19 entities .* 20 to 100000'),
        (0, 0, '0 entities'),
        (0, -1, '-1 entities'),
        (0, world.MAX_ENTITIES + 1, '100001 entities'),
        (-1, 100, 'seed is -1'),
    ],
)
def test_arguments_out_of_bounds_are_refused(seed, entities, message):
  with pytest.raises(ValueError, match=message):
    world.generate(seed, entities)


def test_names_are_unique_also_without_case_and_accents(default):
  names = collections.defaultdict(set)
  for record in default.knowledge:
    plain = unicodedata.normalize('NFD', record['title'].lower())
    plain = ''.join(c for c in plain if not unicodedata.combining(c))
    names[plain].add(record['article'])
  assert len(names) == 1000
  assert all(len(articles) == 1 for articles in names.values())


def test_names_share_their_words_and_only_theirs(default):
  names = {r['title'] for r in default.knowledge}
  users = collections.Counter(
      word for name in names for word in _words(name)
  )
  assert all(2 <= len(_words(name)) <= 3 for name in names)
  assert sum(users.values()) / len(users) > 5
  titles = {r['article']: r['title'] for r in default.knowledge}
  for record in default.knowledge + default.pretraining:
    name = titles[re.split('[#/]', record['id'])[0]]
    ordinary = _words(record['text'].replace(name, ''))
    assert not users.keys() & set(ordinary), record


def test_names_need_accents_to_tell_bytes_from_characters(default):
  assert any(not r['title'].isascii() for r in default.knowledge)


def test_records_and_ids(small):
  seen = set()
  for article, records in _articles(small).items():
    for number, record in enumerate(records):
      assert record['id'] == f'{article}#{number}'
      assert re.fullmatch(r'[a-z]+-\d{4}', article)
      assert len({r['title'] for r in records}) == 1
  for record in small.knowledge + small.pretraining:
    assert record['id'] not in seen
    seen.add(record['id'])
    assert record['text'].isprintable()
    assert record['text'].endswith('.')
  rows = [record['article'] for record in small.knowledge]
  changes = sum(a != b for a, b in zip(rows, rows[1:], strict=False))
  assert changes == len(set(rows)) - 1  # The passages of each are in a row.


def test_every_fact_is_in_exactly_one_passage(small):
  stated = collections.Counter()
  passages = {record['id']: record for record in small.knowledge}
  for question in small.questions:
    gold = passages[question['passage_id']]
    [answer] = question['answers']
    assert _span_texts(gold).count(answer) == 1
    assert gold['title'] in question['question']
    stated[gold['id']] += 1
  # As many values as questions: no fact is stated twice.
  assert {i: len(r['spans']) for i, r in passages.items()} == stated
  assert set(stated.values()) == {1, 2}


def test_no_other_passage_of_the_entity_has_the_answer(small):
  articles = _articles(small)
  for question in small.questions:
    [answer] = question['answers']
    article = question['passage_id'].split('#')[0]
    holders = [
        record['id']
        for record in articles[article]
        if set(_words(answer)) & set(_words(record['text']))
    ]
    assert holders == [question['passage_id']]


def test_spans_are_the_values(small):
  values = {q['answers'][0] for q in small.questions}
  for record in small.knowledge + small.pretraining:
    assert record['spans']
    assert set(_span_texts(record)) <= values


def test_passages_read_like_an_encyclopedia(default):
  pronouns = fillers = sentences = 0
  for record in default.knowledge:
    parts = re.findall(r'[^.]+\.', record['text'])
    fillers += len(parts) - len(record['spans'])
    assert len(parts) - len(record['spans']) in (0, 1)
    for part in parts:
      if any(value in part for value in _span_texts(record)):
        sentences += 1
        pronouns += record['title'] not in part
  assert 0.37 < pronouns / sentences < 0.43
  assert 0.47 < fillers / len(default.knowledge) < 0.53
  # Often only the title says whom a passage is about.
  alone = [r for r in default.knowledge if r['title'] not in r['text']]
  assert len(alone) / len(default.knowledge) > 0.15


def test_a_tenth_of_the_facts_is_held_out_of_pretraining(default):
  held_out = [q for q in default.questions if q['held_out']]
  assert len(held_out) == 600
  # An entity has a value once only, so these two name a fact.
  facts = {
      (q['passage_id'].split('#')[0], q['answers'][0]) for q in held_out
  }
  validation = 0
  for record in default.pretraining:
    [value] = _span_texts(record)
    is_held_out = (record['id'].split('/')[0], value) in facts
    assert is_held_out == (record.get('split') == 'validation')
    validation += is_held_out
  assert 2 * len(held_out) <= validation <= 3 * len(held_out)


def test_pretraining_says_each_fact_in_two_or_three_wordings(small):
  titles = {r['article']: r['title'] for r in small.knowledge}
  wordings = collections.defaultdict(list)
  for record in small.pretraining:
    name = titles[record['id'].split('/')[0]]
    assert name in record['text']  # In full: no title goes with it.
    assert record['title'] == ''
    [value] = _span_texts(record)
    wordings[name, value].append(record['text'])
  assert len(wordings) == len(small.questions)
  for texts in wordings.values():
    assert len(set(texts)) == len(texts)
    assert len(texts) in (2, 3)


def test_relation_words_of_the_two_corpora_differ(default):
  """Else ICT alone would learn the relations, which is what REALM is for."""
  values = {w for q in default.questions for w in _words(q['answers'][0])}
  names = {w for r in default.knowledge for w in _words(r['title'])}
  pretraining = [r['text'] for r in default.pretraining]
  pretraining += [q['question'] for q in default.questions]
  knowledge_words, pretraining_words = (
      set(_words(' '.join(texts))) - values - names - _FUNCTION_WORDS
      for texts in ([r['text'] for r in default.knowledge], pretraining)
  )
  assert len(knowledge_words) > 40
  assert len(pretraining_words) > 40
  assert not knowledge_words & pretraining_words


def test_questions_use_the_words_of_pretraining_in_another_order():
  for relation in world.RELATIONS:
    question = set(_words(relation.question)) - _FUNCTION_WORDS - {'n'}
    told = set(_words(' '.join(relation.pretraining)))
    assert question, relation
    assert question <= told, relation
    assert relation.question not in relation.pretraining


def test_wordings_of_a_kind_do_not_share_what_tells_them_apart():
  """Two relations of an entity need words of their own to be told apart."""
  for part in ('knowledge', 'pretraining'):
    users = collections.defaultdict(set)
    for relation in world.RELATIONS:
      for word in set(_words(' '.join(getattr(relation, part)))):
        if word not in _FUNCTION_WORDS | {'n', 'v', 'p'}:
          users[relation.kind, word].add(relation.pool)
    shared = {word for (_, word), pools in users.items() if len(pools) > 1}
    assert not shared, part


def test_many_entities_share_a_value(default):
  users = collections.Counter()
  for question in default.questions:
    kind = question['passage_id'].split('-')[0]
    users[kind, question['answers'][0]] += 1
  shared = sum(n for n in users.values() if n >= 3)
  assert shared / len(default.questions) > 0.95
  per_relation = len(users) / len(world.RELATIONS)
  assert 16 <= per_relation <= 60


def test_articles_and_verbs_fit(small):
  for record in small.knowledge + small.pretraining:
    assert not re.search(r'\b(a [aeiou]|an [^aeiou])', record['text'])
    assert '{' not in record['text']
    assert record['text'][0].isupper() or record['text'][0].isdigit()
