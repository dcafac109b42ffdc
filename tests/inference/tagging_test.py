"""Named entities: files, wordpieces, F1, decoding, training, and a corpus."""

import itertools
import json
import lzma

import helpers
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
import training_test

from realm_jax.cli import actions
from realm_jax.corpus import corpus as corpus_lib
from realm_jax.corpus import entities
from realm_jax.corpus import tagged_columns
from realm_jax.corpus import tokenizer as tokenizer_lib
from realm_jax.inference import tagging
from realm_jax.inference import trained as trained_lib
from realm_jax.interop import export
from realm_jax.models import tagger as tagger_lib
from realm_jax.prepare import replace_spans
from realm_jax.runtime import checkpoint
from realm_jax.runtime import files as files_lib
from realm_jax.trainer import loop

_VOCAB = (
    '[PAD] [UNK] [CLS] [SEP] [MASK] ann lives in u s . new york york ##er'
    ' mary bought 7 apples ,'
).split()


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.Tokenizer(list(dict.fromkeys(_VOCAB)))


def sentence(text, tags):
  return entities.TaggedSentence(text.split(), tags.split())


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    'given, want',
    [
        ('O B-PER I-PER O', 'O B-PER I-PER O'),  # IOB2
        ('I-PER I-PER O I-PER', 'B-PER I-PER O B-PER'),  # IO
        ('I-PER B-PER I-LOC', 'B-PER B-PER B-LOC'),  # IOB1
        ('S-PER B-PER E-PER O', 'B-PER B-PER I-PER O'),  # BIOES
        ('B-PER E-PER I-PER', 'B-PER I-PER B-PER'),
        ('U-PER B-PER L-PER', 'B-PER B-PER I-PER'),  # BILOU
        ('B-creative-work I-creative-work', 'B-creative-work I-creative-work'),
    ],
)
def test_notations_become_iob2(tmp_path, given, want):
  path = tmp_path / 'a.jsonl'
  tags = given.split()
  path.write_text(json.dumps({'tokens': ['x'] * len(tags), 'tags': tags}))
  assert entities.read(str(path))[0].tags == want.split()


def test_conll_and_json_lines_give_the_same(tmp_path):
  conll = tmp_path / 'a.conll'
  conll.write_text(
      '-DOCSTART- -X- O\n\nAnn NNP B-PER\nlives VB O\n\n\nYork\tB-LOC\n'
  )
  lines = tmp_path / 'b.jsonl.xz'
  with lzma.open(lines, 'wt') as file:
    file.write('{"tokens": ["Ann", "lives"], "tags": ["I-PER", "O"]}\n\n')
    file.write('{"tokens": ["York"], "tags": ["I-LOC"]}\n')
  want = [sentence('Ann lives', 'B-PER O'), sentence('York', 'B-LOC')]
  assert entities.read(str(conll)) == want
  assert entities.read(f'{lines}, {conll}') == want + want
  assert entities.types_of(want) == ('LOC', 'PER')


@pytest.mark.parametrize(
    'name, text, message',
    [
        ('a.conll', 'Ann B-PER\nlives\n', r'a.conll:2: one column'),
        ('a.conll', 'Ann PER\n', r"a.conll:1: the tag 'PER' is neither"),
        ('a.conll', b'\xff O\n', r'a.conll:1: not UTF-8'),
        ('a.conll', '\n', r'a.conll has no sentence'),
        ('a.jsonl', '{"tokens": ["a"]', r'a.jsonl:1: malformed JSON'),
        ('a.jsonl', '[1]', r'a.jsonl:1: a JSON list; each line must'),
        ('a.jsonl', '\n{"tokens": ["a"]}', r'a.jsonl:2: "tags" must be a list'),
        (
            'a.jsonl',
            '{"tokens": ["a", "b"], "tags": ["O"]}',
            r'a.jsonl:1: 2 tokens and 1 tags',
        ),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, text, message):
  data = text if isinstance(text, bytes) else text.encode()
  (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=message):
    entities.read(str(tmp_path / name))


# ----------------------------------------------------------------- wordpieces


def test_labels_are_those_of_words(tokenizer):
  given = sentence('Ann lives in U.S. Yorker', 'B-PER O O B-LOC I-LOC')
  table = entities.TaggedTable.of([given], ('LOC', 'PER'), 16, tokenizer)
  pieces = [tokenizer.vocab[i] for i in table.ids_NL[0]]
  assert pieces[:11] == (
      '[CLS] ann lives in u . s . york ##er [SEP]'.split()
  )
  assert table.labels_NL[0, :11].tolist() == [
      -1, 3, 0, 0, 1, 2, 2, 2, 2, -1, -1
  ]
  assert table.types_NL[0, :11].tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0]
  assert table.words_NL[0, :11].tolist() == [
      -1, 0, 1, 2, 3, -1, -1, -1, 4, -1, -1
  ]


@pytest.mark.parametrize('length', [4, 5, 7, 64])
def test_labels_become_tags_again(tokenizer, length):
  given = [
      sentence('Ann lives in New York , U.S.', 'B-PER O O B-LOC I-LOC O B-LOC'),
      # Unknown to the vocabulary, no wordpiece at all, combining accents.
      entities.TaggedSentence(
          ['Zoë', '\u200b', 'x\u0301', '北京', 'Ann'],
          ['B-PER', 'O', 'O', 'B-LOC', 'B-PER'],
      ),
  ]
  types = entities.types_of(given)
  table = entities.TaggedTable.of(given, types, length, tokenizer)
  assert (table.ids_NL != 0).sum(axis=1).max() <= length
  tags = entities.tags_of_words(
      table, table.labels_NL, types, [len(s.tokens) for s in given]
  )
  assert tags == [s.tags for s in given]
  found = zip(
      *entities.entities_of_words(table, table.labels_NL), strict=True
  )
  assert [tuple(map(int, entity)) for entity in found] == [
      (i, first, behind)
      for i, s in enumerate(given)
      for _, first, behind in entities.entities(s.tags)
  ]


@pytest.mark.parametrize('length', [4, 5, 64])
def test_running_text_is_tagged_as_its_words(tokenizer, length):
  text = 'Ann lives in Zoë , New York xyz'
  ((ids, starts, _),) = tokenizer.encode_arrays([text])
  begins = tokenizer.starts_word(ids)
  table = entities.TaggedTable.of_wordpieces(
      [entities.Wordpieces.of_text(text, ids, starts, begins)],
      length,
      tokenizer,
  )
  words = entities.TaggedTable.of(
      [sentence(text, 'O O O O O O O O')], None, length, tokenizer
  )
  for name in ('ids_NL', 'types_NL', 'begins_NL', 'words_NL', 'sentences_N'):
    assert np.array_equal(getattr(table, name), getattr(words, name)), name


def test_an_unknown_type_is_refused(tokenizer):
  with pytest.raises(ValueError, match="'B-LOC' of the token 'York'.*'PER'"):
    entities.TaggedTable.of(
        [sentence('York', 'B-LOC')], ('PER',), 8, tokenizer
    )


# ------------------------------------------------------------------------- F1


def test_scores_by_hand():
  gold = [[('PER', 0, 2), ('LOC', 3, 4)], [('LOC', 0, 1)]]
  found = [[('PER', 0, 2), ('PER', 3, 4)], [('LOC', 0, 2)]]
  score, Score = tagging.score, tagging.Score
  scores = score(gold, found)
  assert scores['micro'].f1 == pytest.approx(1 / 3)
  assert scores['any'].precision == pytest.approx(2 / 3)
  assert scores['PER'] == Score(0.5, 1.0, pytest.approx(2 / 3), 1)
  assert scores['LOC'].f1 == 0 and scores['LOC'].count == 2
  assert score([[]], [[]])['micro'] == Score(0, 0, 0, 0)


def test_scores_are_those_of_seqeval():
  metrics = pytest.importorskip('seqeval.metrics', reason='pip install seqeval')
  rng = np.random.default_rng(0)
  tags = entities.labels(('LOC', 'PER'))

  def draw():
    made = []
    for _ in range(40):
      # Any order: an I- behind an O begins an entity for seqeval, and here.
      raw = [tags[i] for i in rng.integers(len(tags), size=8)]
      made.append(tagged_columns.iob2(raw))
    return made

  gold, found = draw(), draw()
  ours = tagging.score(
      *([entities.entities(t) for t in of_all] for of_all in (gold, found))
  )['micro']
  assert ours.precision == pytest.approx(metrics.precision_score(gold, found))
  assert ours.recall == pytest.approx(metrics.recall_score(gold, found))
  assert ours.f1 == pytest.approx(metrics.f1_score(gold, found))


# ------------------------------------------------------------------- decoding


def test_decoding_is_the_best_of_all_allowed_ones():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 5, 5)).astype(np.float32) * 2
  begins = np.ones((6, 5), bool)
  begins[1, [1, 3]] = False
  begins[2, 2:] = False
  got = np.asarray(tagger_lib.decode(jnp.asarray(logits), begins))
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  for b in range(6):
    places = np.flatnonzero(begins[b])

    def allowed(labels):
      return all(
          label not in (2, 4) or before in (label - 1, label)
          for before, label in zip((0, *labels), labels, strict=False)
      )

    best = max(
        filter(allowed, itertools.product(range(5), repeat=len(places))),
        key=lambda labels: logp[b, places, list(labels)].sum(),
    )
    assert got[b, places].tolist() == list(best)
    assert (got[b, ~begins[b]] == -1).all()


def test_the_loss_is_over_the_labels_alone():
  logits = np.random.default_rng(0).normal(size=(2, 3, 5))
  labels = jnp.array([[0, 3, -1], [-1, -1, -1]])
  loss, accuracy = tagger_lib.tagging_loss(jnp.asarray(logits), labels)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  want = -(logp[0, 0, 0] + logp[0, 1, 3]) / 2
  assert float(loss) == pytest.approx(want, rel=1e-5)
  right = (logits[0, 0].argmax() == 0) + (logits[0, 1].argmax() == 3)
  assert float(accuracy) == pytest.approx(int(right) / 2)
  none, _ = tagger_lib.tagging_loss(jnp.asarray(logits), jnp.full((2, 3), -1))
  assert none == 0


# ------------------------------------------------------------------- training


@pytest.fixture(scope='module')
def files(world, tmp_path_factory):
  """The values that the world's passages state, as entities to be found."""
  corpus = corpus_lib.Corpus.open(world)
  path = tmp_path_factory.mktemp('tagged') / 'train.jsonl'
  lines = []
  for _, _, sentences in replace_spans.read(corpus, 'pretraining'):
    for s in sentences:
      words, tags = s.text.split(' '), []
      position = 0
      for word in words:
        inside = any(
            span.byte_start <= position < span.byte_limit for span in s.spans
        )
        tags.append('I-VAL' if inside else 'O')
        position += len(word.encode()) + 1
      lines.append(json.dumps({'tokens': words, 'tags': tags}))
  path.write_text('\n'.join(lines[:200]))
  return path


def make_config(world, files, **values):
  return training_test.make_config(
      world,
      'tagger',
      tagger__files=str(files),
      tagger__length=32,
      **{'steps': 40, 'optimizer__learning_rate': 5e-3, **values},
  )


@pytest.fixture(scope='module')
def workdir(world, files, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('tagger')
  training_test.run(make_config(world, files), workdir)
  return workdir


def test_a_tagger_learns_and_is_measured(workdir, files):
  config = files_lib.read_json(workdir / 'config.json')
  assert config['model']['entity_types'] == ['VAL']
  actions.evaluate(
      workdir=str(workdir), tagged=str(files), tag_column=None, tag_names=None
  )
  result = files_lib.read_json(workdir / 'evaluation' / '40.json')
  assert result['entities']['VAL']['f1'] > 0.5
  assert result['entities']['any']['count'] == 200


def test_killed_and_resumed_is_the_same(world, files, workdir, tmp_path):
  config = make_config(world, files, checkpoint__interval=20)
  refresh = loop._Loop._refresh

  def stop_at_30(self, step):
    if step == 30:
      raise KeyboardInterrupt
    refresh(self, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, '_refresh', stop_at_30)
    with pytest.raises(KeyboardInterrupt):
      training_test.run(config, tmp_path)
  assert checkpoint.steps_in(tmp_path / 'checkpoints') == [20]
  summary = training_test.run(config, tmp_path)
  whole = files_lib.read_json(workdir / 'summary.json')
  assert summary['params_sha256'] == whole['params_sha256']


def test_other_sentences_are_another_job(world, files, workdir, tmp_path):
  other = tmp_path / 'other.jsonl'
  other.write_text('{"tokens": ["Ann"], "tags": ["B-VAL"]}')
  with pytest.raises(ValueError, match='tagged_digest'):
    training_test.run(make_config(world, other), workdir)


def test_it_begins_with_the_bert_of_a_reader(world, files, tmp_path):
  reader = tmp_path / 'mlm'
  training_test.run(
      training_test.make_config(world, 'mlm', steps=1), reader
  )
  started = tmp_path / 'tagger'
  training_test.run(
      make_config(
          world,
          files,
          steps=1,
          init_from=str(reader),
          optimizer__learning_rate=0.0,
      ),
      started,
  )
  name = 'bert.layers.0.query.kernel'
  theirs = trained_lib.Trained.open(reader).load(1)['reader'][name]
  ours = trained_lib.Trained.open(started).load(1)['tagger'][name]
  np.testing.assert_array_equal(theirs, ours)


# ------------------------------------------------------------------ a corpus


def test_a_corpus_is_tagged(world, workdir, tmp_path):
  before = corpus_lib.Corpus.open(world)
  output = tmp_path / 'tagged'
  manifest = tagging.tag_corpus(before, workdir, output)
  after = corpus_lib.Corpus.open(output)
  after.verify()
  assert manifest['fingerprint'] != before.fingerprint
  assert after.manifest['settings']['tagger_types'] == ['VAL']
  np.testing.assert_array_equal(after.passages.tokens, before.passages.tokens)
  assert after.passage_text(3) == before.passage_text(3)
  count = 0
  for split in before.sentences:
    for rows, _, sentences in replace_spans.read(after, split):
      for row, s in zip(rows, sentences, strict=True):
        np.testing.assert_array_equal(
            s.ids, before.sentences[split].ids(row)
        )
        for span in s.spans:
          count += 1
          part = s.text.encode()[span.byte_start : span.byte_limit].decode()
          pieces = after.tokenizer.encode(part)
          assert pieces == s.ids[span.start : span.limit].tolist()
  assert count == sum(s['spans'] for s in manifest['splits'].values()) > 100
  # REALM masks what was found.
  config = training_test.make_config(output, 'realm', steps=1)
  batch = next(helpers.batches(after, config))
  assert batch.inputs.mask_BM.any(axis=1).all()


def test_tagging_goes_on_where_it_was_killed(
    world, workdir, tmp_path, monkeypatch
):
  before = corpus_lib.Corpus.open(world)
  monkeypatch.setattr(replace_spans, '_BLOCK', 64)
  expected = tagging.tag_corpus(before, workdir, tmp_path / 'undisturbed')
  original, calls = replace_spans._save, []

  def save(path, found):
    original(path, found)
    calls.append(path)
    if len(calls) == 2:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(replace_spans, '_save', save)
    with pytest.raises(KeyboardInterrupt):
      tagging.tag_corpus(before, workdir, tmp_path / 'killed')
    assert not (tmp_path / 'killed').exists()
    calls[1].write_bytes(calls[1].read_bytes()[:-1])  # A loss of power.
    calls += [None]
    manifest = tagging.tag_corpus(before, workdir, tmp_path / 'killed')
  assert manifest['fingerprint'] == expected['fingerprint']
  assert calls[0] not in calls[3:] and calls[1] == calls[3]
  assert not list(tmp_path.glob('.killed*'))


class _Otherwise(tokenizer_lib.CachedTokenizer):
  """Cuts sentences that have a word into other wordpieces."""

  word = ''

  def __call__(self, texts):
    return [
        tuple(x[1:] for x in arrays) if self.word in text else arrays
        for text, arrays in zip(texts, super().__call__(texts), strict=True)
    ]


def test_an_odd_sentence_keeps_its_spans(
    world, workdir, tmp_path, monkeypatch
):
  before = corpus_lib.Corpus.open(world)
  sentence = next(replace_spans.read(before, 'pretraining'))[2][5]
  monkeypatch.setattr(_Otherwise, 'word', sentence.text)
  monkeypatch.setattr(tokenizer_lib, 'CachedTokenizer', _Otherwise)
  tagging.tag_corpus(before, workdir, tmp_path / 'tagged')
  after = corpus_lib.Corpus.open(tmp_path / 'tagged')
  rows = [
      row
      for row, record in enumerate(
          tfds.builder_from_directory(
              str(after.directory / 'sentences')
          ).as_data_source(split='pretraining')
      )
      if record['text'].decode() == sentence.text
  ]
  assert rows
  for row in rows:
    assert after.sentences['pretraining'].spans_of(row).tolist() == [
        [span.start, span.limit] for span in sentence.spans
    ]
  monkeypatch.setattr(_Otherwise, 'word', '')  # All of them.
  with pytest.raises(ValueError, match='other wordpieces than the table has'):
    tagging.tag_corpus(before, workdir, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_a_tagger_of_another_vocabulary_is_refused(workdir, tmp_path):
  from realm_jax.prepare import prepare

  prepare.prepare(
      ['world:9:20'], tmp_path / 'other', workers=1, progress=False
  )
  with pytest.raises(ValueError, match='another vocabulary'):
    tagging.tag_corpus(
        corpus_lib.Corpus.open(tmp_path / 'other'), workdir, tmp_path / 'out'
    )
  assert not (tmp_path / 'out').exists()


def test_the_longer_span_stays():
  def span(start, limit):
    return replace_spans.Span(start, limit, 10 * start, 10 * limit)

  names, kept = [span(0, 2), span(5, 6)], [span(1, 4), span(5, 6), span(7, 9)]
  longest = replace_spans.longest
  assert longest(names, kept) == [span(1, 4), span(5, 6), span(7, 9)]
  assert longest([], []) == []


# --------------------------------------------------------------------- export


def test_it_is_exported_for_transformers(workdir, tmp_path):
  """Names, shapes and labels; benchmarks/huggingface_parity.py runs it."""
  safetensors = pytest.importorskip('safetensors.numpy')
  export.run(workdir, 'huggingface', tmp_path / 'out')
  config = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert config['architectures'] == ['BertForTokenClassification']
  assert config['model_type'] == 'bert'
  assert config['id2label'] == {'0': 'O', '1': 'B-VAL', '2': 'I-VAL'}
  tensors = safetensors.load_file(tmp_path / 'out' / 'model.safetensors')
  params = trained_lib.Trained.open(workdir).load(40)['tagger']
  np.testing.assert_array_equal(
      tensors['classifier.weight'], np.asarray(params['output.kernel']).T
  )
  assert not [name for name in tensors if 'pooler' in name]
  assert len(tensors) == len(params)
