"""Records that `prepare` leaves out: by kind, and near-duplicates."""

import json

import pytest

from realm_jax.corpus import corpus as corpus_lib
from realm_jax.prepare import filters
from realm_jax.prepare import prepare

_TEXT = 'In 1990 somebody came to Rome with his old friend Paul.'


def _prepare(source, output, **arguments) -> corpus_lib.Corpus:
  arguments = {'workers': 1, 'progress': False, 'vocab_size': 400, **arguments}
  prepare.prepare([str(source)], output, **arguments)
  return corpus_lib.Corpus.open(output)


@pytest.mark.parametrize(
    ('title', 'text', 'kind'),
    [
        ('List of towns', '', 'lists'),
        ('Lists of towns', '', 'lists'),
        ('Listening', '', None),
        ('A List of towns', '', None),
        ('Index of towns', '', 'indices'),
        ('Outline of history', '', 'outlines'),
        ('Mercury (disambiguation)', '', 'disambiguation'),
        ('Mercury', 'Mercury may refer to:\nA planet', 'disambiguation'),
        (
            'Mercury',
            '\nMercury or mercury can also refer to the following:',
            'disambiguation',
        ),
        ('Law', 'The law may refer to a person. It says:\n1.', None),
        ('Mercury', '{{disambiguation}}', None),  # It is no markup.
    ],
)
def test_what_the_filters_take(title, text, kind):
  assert filters.reason(title, text, filters.KINDS) == kind
  assert filters.reason(title, text, ()) is None


def test_filtered_articles_are_counted_by_reason(tmp_path):
  source = tmp_path / 'in.jsonl'
  titles = ['Rome', 'List of towns', 'List of men', 'Index of men']
  source.write_text(
      '\n'.join(json.dumps({'title': t, 'text': _TEXT}) for t in titles)
  )
  made = _prepare(source, tmp_path / 'out', exclude=['lists', 'indices'])
  counts = made.manifest['counts']
  assert (counts['records'], counts['passages']) == (4, 1)
  assert (counts['excluded_lists'], counts['excluded_indices']) == (2, 1)
  assert made.manifest['settings']['exclude'] == ['lists', 'indices']
  assert len(_prepare(source, tmp_path / 'all').passages) == 4
  with pytest.raises(ValueError, match='exclude is .*stubs.* some of lists'):
    _prepare(source, tmp_path / 'no', exclude=['stubs'])


def _near(count: int) -> list[dict]:
  """Texts of which every third is the one before with a word changed."""
  items = []
  for i in range(count):
    words = [f'word{(i - i % 3 // 2) * 37 + j * j}' for j in range(200)]
    if i % 3 == 2:
      words[i % 200] = 'other'
    text = f'{" ".join(words)}. In 1990 somebody came.'
    items.append({'id': f'a{i}', 'text': text, 'article': f'{i}'})
  return items


def test_near_duplicates_are_left_out(tmp_path, monkeypatch):
  pytest.importorskip('rensa')
  monkeypatch.setattr(filters, '_BATCH_CHARACTERS', 5000)
  source = tmp_path / 'in.jsonl'
  items = [*_near(60), {'id': 'z', 'text': '...'}, {'id': 'y', 'text': '...'}]
  source.write_text('\n'.join(map(json.dumps, items)))
  found = {
      workers: _prepare(
          source, tmp_path / f'{workers}', near_duplicates=0.8, workers=workers
      )
      for workers in (1, 2)
  }
  assert found[1].fingerprint == found[2].fingerprint
  assert found[1].manifest['counts']['near_duplicates'] == 20
  assert found[1].manifest['settings']['near_duplicates'] == 0.8
  kept = {found[1].passage_text(i)['id'] for i in range(len(found[1].passages))}
  # The first stays; texts without a word are no duplicates.
  names = {name.partition('#')[0] for name in kept}
  assert names == {f'a{i}' for i in range(60) if i % 3 != 2} | {'z', 'y'}
  with pytest.raises(ValueError, match='near_duplicates is 1.5'):
    _prepare(source, tmp_path / 'no', near_duplicates=1.5)
