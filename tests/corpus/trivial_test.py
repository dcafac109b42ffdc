"""Trivial candidates: found by content, excluded, in every kind of corpus."""

import json
import logging
import pathlib
import random
import shutil

import helpers
import numpy as np
import pytest

from realm_jax import config as config_lib
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import overlay as overlay_lib
from realm_jax.corpus import trivial
from realm_jax.prepare import compaction
from realm_jax.prepare import prepare
from realm_jax.prepare import replace_spans
from realm_jax.trainer.stages import realm

_PEOPLE = ['Ada Brown', 'Ben Stone', 'Cleo Marsh', 'Dora Finch', 'Egon Frost']


def _sentence(i: int) -> str:
  """Most of its words are in no other."""
  rng = random.Random(i)
  words = [''.join(rng.sample('abdefgiklmnorstu', 5)) for _ in range(7)]
  return f'In {1500 + i} {_PEOPLE[i % 5]} saw the {" ".join(words)}.'


def _texts(count: int, first: int = 0) -> list[dict]:
  """Records of three sentences, two of an article."""
  return [
      {
          'id': f'r{r}',
          'title': f'Chronicle {r // 2}',
          'article': str(r // 2),
          'text': ' '.join(_sentence(3 * r + i) for i in range(3)),
      }
      for r in range(first, first + count)
  ]


def _prepare(folder: pathlib.Path, name: str, texts, others=None, **values):
  sources = []
  for kind, records in (('z', texts), ('x', others)):
    path = folder / f'{name}.{kind}.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in records or []))
    sources.append([str(path)] if records else [])
  prepare.prepare(
      sources[0], folder / name, pretraining_sources=sources[1],
      **{'workers': 1, 'progress': False, 'vocab_size': 400, **values},
  )
  return corpus_lib.Corpus.open(folder / name)


def _config(corpus, **values):
  config = config_lib.Config(objective='realm', corpus=str(corpus.directory))
  config.batch_size, config.num_candidates = 8, 4
  config.lengths = config_lib.LengthsConfig(query=64, document=288, masks=8)
  config = config_lib.resolve(config)
  for name, value in values.items():
    setattr(config, name, value)
  return config


def _holders(corpus, ids) -> set[int]:
  """Rows of the passages that hold all wordpieces in a row, by brute force."""
  wanted = ' '.join(map(str, ids.tolist()))
  found = set()
  for row in range(len(corpus.passages)):
    body = corpus.passages.title_and_body(row)[1].tolist()
    if f' {wanted} ' in f' {" ".join(map(str, body))} ':
      found.add(row)
  return found


def _allowed(corpus, split, batch) -> int:
  """How often a passage with the unmasked sentence may be retrieved."""
  count = 0
  for row, ranges in zip(
      batch.row_B, batch.inputs.exclude_BR2, strict=True
  ):
    held = _holders(corpus, corpus.sentences[split].ids(int(row)))
    assert held
    count += any(not any(a <= r < b for a, b in ranges) for r in held)
  return count


@pytest.mark.parametrize('validation', [False, True])
def test_the_text_of_a_sentence_from_another_source_is_excluded(
    tmp_path, validation
):
  texts = _texts(24)
  fraction = 0.5 if validation else 0.0
  corpus = _prepare(
      tmp_path, 'two', texts, texts, validation_fraction=fraction
  )
  assert set(corpus.sentences['pretraining'].passages) == {-1}
  if validation:
    split = 'validation'
    found = list(realm.evaluation_batches(corpus, _config(corpus), split))
  else:
    split = 'pretraining'
    stream = helpers.batches(corpus, _config(corpus))
    found = [next(stream) for _ in range(4)]
    # All batches of a job have the same shape.
    assert len({batch.inputs.exclude_BR2.shape for batch in found}) == 1
  assert sum(_allowed(corpus, split, batch) for batch in found) == 0
  with_none = _config(corpus, trivial='none')
  (batch,) = list(realm.evaluation_batches(corpus, with_none, split, 8))
  assert _allowed(corpus, split, batch) == len(batch.row_B)


def test_a_copy_among_the_passages_is_excluded(tmp_path):
  texts = _texts(20)
  again = {**texts[3], 'id': 'copy', 'article': 'c', 'title': 'Annals'}
  corpus = _prepare(tmp_path, 'one', [*texts, again], validation_fraction=0)
  found = corpus.trivial('knowledge')
  own = corpus.sentences['knowledge'].passages
  for i in range(len(own)):
    rows = found.rows[found.offsets[i] : found.offsets[i + 1]].tolist()
    expected = {3: [[20, 21]], 20: [[3, 4]]}.get(int(own[i]), [])
    assert rows == expected
  counts = corpus.manifest['counts']
  assert counts['knowledge_sentences_in_other_passages'] == 6
  assert counts['knowledge_sentences_in_too_many'] == 0


def test_whole_articles_of_what_holds_a_sentence_are_excluded(tmp_path):
  texts = _texts(24)
  order = np.random.default_rng(0).permutation(24)  # Articles lie apart.
  corpus = _prepare(
      tmp_path, 'apart', [texts[i] for i in order], texts,
      validation_fraction=0,
  )
  for split in ('pretraining', 'knowledge'):
    config = _config(corpus, trivial='article', sentences=split)
    batch = next(helpers.batches(corpus, config))
    for row, ranges in zip(
        batch.row_B, batch.inputs.exclude_BR2, strict=True
    ):
      held = _holders(corpus, corpus.sentences[split].ids(int(row)))
      articles = corpus.passages.articles
      expected = np.flatnonzero(np.isin(articles, articles[[*held]]))
      rows = [r for a, b in ranges.tolist() for r in range(a, b)]
      assert sorted(rows) == expected.tolist()
      assert len(rows) == 2


def _tables(bodies, sentences, own=None):
  offsets = np.cumsum([0, *map(len, bodies)])
  lengths = np.array([len(s) for s in sentences], np.int32)
  count = len(sentences)
  return (
      corpus_lib.PassageTable(
          np.concatenate(bodies).astype(np.uint16),
          offsets,
          np.zeros(len(bodies), np.int32),
          np.arange(len(bodies), dtype=np.int32),
      ),
      corpus_lib.SentenceTable(
          np.concatenate(sentences).astype(np.uint16),
          np.cumsum(lengths) - lengths,
          lengths,
          np.full(count, -1) if own is None else np.array(own),
          np.zeros(count + 1, np.int64),
          np.zeros((0, 2), np.int32),
      ),
  )


def _found(bodies, sentences, own=None):
  found = trivial.find(*_tables(bodies, sentences, own))
  assert (found.offsets.dtype, found.rows.dtype) == (np.int64, np.int32)
  return [
      found.rows[a:b].tolist()
      for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)
  ]


def test_what_holds_most_of_a_sentence_counts():
  rng = np.random.default_rng(0)
  one, other = rng.integers(0, 3000, (2, 30))
  noise = [rng.integers(3000, 6000, 40) for _ in range(9)]
  edited = one.copy()
  edited[[12, 20]] = 7000
  bodies = [
      noise[0],
      np.concatenate([noise[1], one, noise[2]]),
      np.concatenate([noise[3], edited]),  # Two words replaced.
      np.concatenate([one[:11], noise[4][:2], one[11:]]),  # Two inserted.
      np.concatenate([noise[5], one[:15]]),  # It continues in the next.
      np.concatenate([one[15:], noise[6]]),
      np.concatenate([noise[7], one[:14]]),  # Less than half.
      np.concatenate([noise[8], one[::-1]]),
  ]
  # Only short runs of the other sentence are here, in disorder.
  bodies.append(np.concatenate([other[i : i + 5] for i in (20, 0, 10, 5, 15)]))
  assert _found(bodies, [one, other]) == [[[1, 6]], []]
  # Its own passage is known by number.
  assert _found(bodies, [one, one], [2, -1]) == [
      [[1, 2], [3, 6]], [[1, 6]],
  ]


def test_of_a_short_sentence_all_is_needed():
  bodies = [np.arange(20), np.array([9, 3, 4, 5, 9]), np.array([3, 4, 9, 5])]
  assert _found(bodies, [np.array([3, 4, 5]), np.array([5, 9])]) == [
      [[0, 2]], [[1, 2]],
  ]


@pytest.mark.parametrize('copies', [trivial.MOST, trivial.MOST + 1])
def test_what_stands_in_too_many_passages_has_all_excluded(copies):
  rng = np.random.default_rng(0)
  one = rng.integers(0, 3000, 20)
  bodies = [rng.integers(3000, 6000, 40) for _ in range(40)]
  for i in range(copies):
    bodies[3 * i] = np.concatenate([bodies[3 * i], one])
  found = _found(bodies, [one, bodies[1][:9], one], [-1, -1, 0])
  few = [[3 * i, 3 * i + 1] for i in range(copies)]
  too_many = [[0, 40]] if copies > trivial.MOST else few
  assert found == [too_many, [[1, 2]], few[1:]]


@pytest.mark.parametrize('vocab', [5, 50, 3000])
@pytest.mark.parametrize('seed', range(4))
def test_no_passage_with_the_whole_sentence_is_missed(
    vocab, seed, monkeypatch
):
  """Also in small parts, and with few different wordpieces."""
  monkeypatch.setattr(trivial, '_AT_ONCE', [64, 300, 2**16][seed % 3])
  monkeypatch.setattr(trivial, '_PART', [7, 2**19][seed % 2])
  monkeypatch.setattr(trivial, '_MAX_PARTS', 1000)
  rng = np.random.default_rng(seed)
  bodies = [rng.integers(0, vocab, rng.integers(1, 60)) for _ in range(50)]
  sentences, own = [], []
  for _ in range(150):
    row = int(rng.integers(50))
    body, size = bodies[row], int(rng.integers(1, 30))
    start = int(rng.integers(0, max(1, len(body) - size)))
    sentences.append(body[start : start + size])
    own.append(row if rng.random() < 0.5 else -1)
  # The same ones again in other passages.
  for i in range(0, 150, 4):
    row = int(rng.integers(50))
    bodies[row] = np.concatenate([bodies[row], sentences[i]])
  checked, all_ranges = 0, _found(bodies, sentences, own)
  monkeypatch.setattr(trivial, '_BLOCK', 1)
  assert _found(bodies, sentences, own) == all_ranges  # In smaller blocks.
  for i, ranges in enumerate(all_ranges):
    found = {row for a, b in ranges for row in range(a, b)}
    sentence = sentences[i].tolist()
    for row, body in enumerate(bodies):
      ids = body.tolist()
      if row != own[i] and any(
          ids[j : j + len(sentence)] == sentence
          for j in range(len(ids) - len(sentence) + 1)
      ):
        assert row in found
        checked += 1
  assert checked > 50


def test_a_sentence_with_too_few_candidates_is_left_out(tmp_path):
  texts = _texts(12)
  known = 'In 1999 Eva Green met Tom Bright at the old harbour of Graz.'
  texts = [{**t, 'text': f'{t["text"]} {known}'} for t in texts]
  corpus = _prepare(tmp_path, 'many', texts, validation_fraction=0)
  split = 'knowledge'
  assert corpus.manifest['counts'][f'{split}_sentences_in_too_many'] == 12
  stream = helpers.batches(corpus, _config(corpus))
  for batch in (next(stream) for _ in range(10)):
    for row in batch.row_B:
      assert len(_holders(corpus, corpus.sentences[split].ids(int(row)))) == 1
  with pytest.raises(ValueError, match='48 sentences.*needs 12.*11 at most'):
    realm.MaskedQueries(corpus, _config(corpus, num_candidates=13), split)


def test_other_wordings_are_not_trivial(world):
  corpus = corpus_lib.Corpus.open(world)
  counts = corpus.manifest['counts']
  for split in ('pretraining', 'validation'):
    assert counts[f'{split}_sentences_in_other_passages'] == 0
    offsets = corpus.trivial(split).offsets
    assert len(offsets) == len(corpus.sentences[split]) + 1


def _as_version_1(corpus, output) -> corpus_lib.Corpus:
  """As it was written before there were tables of trivial candidates."""
  shutil.copytree(corpus.directory, output)
  manifest = json.loads((output / 'manifest.json').read_text())
  manifest['version'] = 1
  for name in list(manifest['files']):
    if '.trivial' in name:
      del manifest['files'][name]
      (output / name).unlink()
  (output / 'manifest.json').write_text(json.dumps(manifest))
  return corpus_lib.Corpus.open(output)


def test_an_older_corpus_is_read_with_a_warning(tmp_path, caplog):
  texts = _texts(12)
  new = _prepare(tmp_path, 'new', texts, texts)
  old = _as_version_1(new, tmp_path / 'old')
  with caplog.at_level(logging.WARNING):
    next(helpers.batches(old, _config(old, trivial='none')))
    next(helpers.batches(new, _config(new)))
    assert 'prepare' not in caplog.text
    batch = next(helpers.batches(old, _config(old)))
  assert not batch.inputs.exclude_BR2.any()
  assert 'run `realm-jax prepare` again' in caplog.text
  config = _config(old, sentences='knowledge')
  batch = next(helpers.batches(old, config))
  own = old.sentences['knowledge'].passages[batch.row_B]
  np.testing.assert_array_equal(
      batch.inputs.exclude_BR2, np.stack([own, own + 1], -1)[:, None]
  )

  def same(sentences):
    return [sentence.spans for sentence in sentences]

  # An index of BM25 is no part of the corpus and is not copied.
  (new.directory / 'bm25-0').mkdir()
  (new.directory / 'bm25-0' / 'about.json').write_text('{}')
  # With other spans the sentences are the same, and so are their candidates.
  for i, corpus in enumerate((old, new)):
    replace_spans.replace_spans(
        corpus, tmp_path / str(i), same, {}, progress=False
    )
    again = corpus_lib.Corpus.open(tmp_path / str(i))
    for split in new.sentences:
      np.testing.assert_equal(
          vars(again.trivial(split)), vars(new.trivial(split))
      )
  assert again.manifest['counts'] == new.manifest['counts']
  assert not (again.directory / 'bm25-0').exists()
  assert again.manifest['files'].keys() == new.manifest['files'].keys()


def test_documents_that_come_and_go(tmp_path):
  texts = _texts(20)
  corpus = _prepare(
      tmp_path, 'base', texts, _texts(25), validation_fraction=0
  )
  source = prepare.records_lib.Records(
      [prepare.sources_lib.Items(_texts(6, first=19), 'more')], need_ids=True
  )
  list(source.check())
  prepare.prepare_more(corpus, source, tmp_path / 'more', progress=False)
  added = corpus_lib.Corpus.open(tmp_path / 'more')
  assert len(added.passages) == 6
  changed = overlay_lib.Overlay([corpus, added], np.array([4, 19]))
  compaction.compact(changed, tmp_path / 'compacted', progress=False)
  compacted = corpus_lib.Corpus.open(tmp_path / 'compacted')
  compacted.verify()
  for opened in (changed, compacted):
    for split in opened.sentences:
      config = _config(opened, sentences=split)
      for batch in realm.evaluation_batches(opened, config, split):
        for row, ranges in zip(
            batch.row_B, batch.inputs.exclude_BR2, strict=True
        ):
          ids = opened.sentences[split].ids(int(row))
          held = _holders(opened, ids) - set(opened.removed.tolist())
          rows = {r for a, b in ranges.tolist() for r in range(a, b)}
          assert rows - set(opened.removed.tolist()) == held
  assert len(changed.sentences['pretraining']) == 75
