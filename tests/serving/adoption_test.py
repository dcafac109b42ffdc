"""`serve --follow`: what appears in the workdir is served without a restart."""

import shutil
import threading
import time

import helpers
import numpy as np
import pytest
import served_workdir

import realm_jax
from realm_jax.builder import documents
from realm_jax.serving import service as service_lib
from realm_jax.serving import state as state_lib

_QUERY = 'What is sold in Tamlin?'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp('served')
  source = helpers.write_records(path / 'a.jsonl', served_workdir.RECORDS)
  return helpers.prepare_corpus(source, path / 'corpus')


@pytest.fixture(autouse=True)
def single(monkeypatch):
  """Only batches of one request are compiled, which saves time."""
  monkeypatch.setattr(state_lib, '_MAX_BATCH', 1)


def damage(generation, truncate=False):
  """Changes a byte of the table, or empties its file."""
  shard = max(generation.glob('*.npy'), key=lambda path: path.stat().st_size)
  with open(shard, 'r+b') as file:
    if truncate:
      file.truncate(0)
      return
    file.seek(-3, 2)
    byte = file.read(1)[0]
    file.seek(-3, 2)
    file.write(bytes([byte ^ 1]))


def refusals(service):
  return service.metrics.adoptions.labels('refused')._value.get()


def _search(service, query=_QUERY, k=5):
  _, found = service.submit(service_lib.Job('search', query, k)).result(60)
  return found


def _wait(service, condition):
  deadline = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < deadline, service.state.identity
    time.sleep(0.02)


def test_new_files_are_adopted_and_damaged_ones_refused(corpus, tmp_path):
  config = served_workdir.make_config(corpus)
  params = [served_workdir.make_params(config, seed) for seed in range(3)]
  served_workdir.save(tmp_path, corpus, config, 0, params[0])
  served_workdir.publish(tmp_path, corpus, config, 0, params[0])
  service = service_lib.Service(tmp_path, follow=True, poll_seconds=0.05)
  try:
    expected = {0: realm_jax.Retriever.load(tmp_path).search([_QUERY], 5)}
    seen, stop = [], threading.Event()

    def ask_on():
      while not stop.is_set():
        seen.append(_search(service))
        time.sleep(0.02)

    asking = threading.Thread(target=ask_on)
    asking.start()

    served_workdir.publish(tmp_path, corpus, config, 5, params[1])
    _wait(service, lambda: service.state.identity.generation == 5)
    served_workdir.publish(tmp_path, corpus, config, 9, params[2])
    _wait(service, lambda: service.state.identity.generation == 9)

    # A damaged generation, which appears as a whole.
    elsewhere = tmp_path / 'elsewhere'
    served_workdir.publish(elsewhere, corpus, config, 12, params[1])
    damage(elsewhere / 'index' / '12')
    (elsewhere / 'index' / '12').rename(tmp_path / 'index' / '12')
    _wait(service, lambda: service.refused)
    assert '12 is damaged' in service.refused
    assert service.state.identity.generation == 9

    # A checkpoint of the parameters of generation 9, the files of which are
    # damaged while it is served: it stays, and no older one replaces it.
    damage(tmp_path / 'index' / '9', truncate=True)
    served_workdir.save(tmp_path, corpus, config, 20, params[2])
    _wait(service, lambda: refusals(service) >= 2)
    assert service.state.identity.generation == 9
    _search(service)
    shutil.rmtree(tmp_path / 'index' / '12')
    served_workdir.publish(tmp_path, corpus, config, 9, params[2])
    _wait(service, lambda: service.state.identity.checkpoint == 20)
    assert service.refused is None
    expected[9] = realm_jax.Retriever.load(tmp_path).search([_QUERY], 5)

    # A damaged checkpoint.
    before = service.state
    (tmp_path / 'checkpoints' / '30').mkdir()
    _wait(service, lambda: '30' in (service.refused or ''))
    assert service.state is before
    assert 'ask' not in service.state.missing
  finally:
    stop.set()
    asking.join()
    service.close()
  generations = [one['source']['index_generation'] for one in seen]
  assert generations == sorted(generations) and generations[-1] == 9
  for one in seen:  # Nothing but the results of one sound generation.
    hits = expected.get(one['source']['index_generation'])
    if hits is not None:
      scores = [result['score'] for result in one['results']]
      np.testing.assert_allclose(scores, hits.scores[0], rtol=1e-4)
      assert [result['id'] for result in one['results']] == [
          corpus.passage_text(row)['id'] for row in hits.rows[0]
      ]


def test_documents_added_are_found_and_deleted_ones_are_not(corpus, tmp_path):
  config = served_workdir.make_config(corpus)
  params = served_workdir.make_params(config)
  served_workdir.save(tmp_path, corpus, config, 4, params)
  served_workdir.publish(tmp_path, corpus, config, 4, params)
  service = service_lib.Service(tmp_path, follow=True, poll_seconds=0.05)
  try:
    read = service.state.trained._read
    record = {'id': 'new', 'title': 'Zorvel', 'text': 'Zorvel sells maps.'}
    source = helpers.write_records(tmp_path / 'more.jsonl', [record])
    documents.add(tmp_path, [source], workers=1, progress=False)
    _wait(service, lambda: service.state.identity.documents == 1)
    ids = [one['id'] for one in _search(service, k=100)['results']]
    assert len(ids) == 26 and 'new' in ids
    assert service.state.trained._read is read  # Not compiled again.
    gone = tmp_path / 'ids.txt'
    gone.write_text('new\ntown-3\n')
    documents.delete(tmp_path, gone)
    _wait(service, lambda: service.state.identity.documents == 2)
    ids = [one['id'] for one in _search(service, k=100)['results']]
    assert len(ids) == 24 and not {'new', 'town-3'} & set(ids)
  finally:
    service.close()


def test_a_workdir_without_checkpoint_is_served_when_it_has_one(
    corpus, tmp_path
):
  config = served_workdir.make_config(corpus, 'ict')
  names = served_workdir.COMPONENTS['ict']
  params = served_workdir.make_params(config, names=names)
  served_workdir.save(tmp_path, corpus, config, 1, params)
  folder = tmp_path / 'checkpoints'
  (folder / '1').rename(folder / 'later')
  service = service_lib.Service(tmp_path, follow=True, poll_seconds=0.05)
  try:
    assert 'no checkpoint' in service.state.missing['search']
    (folder / 'later').rename(folder / '1')
    _wait(service, lambda: 'embed' not in service.state.missing)
    served_workdir.publish(tmp_path, corpus, config, 1, params)
    _wait(service, lambda: 'search' not in service.state.missing)
    assert len(_search(service)['results']) == 5
  finally:
    service.close()


def test_frozen_documents_keep_their_index_and_queries_are_new(
    corpus, tmp_path
):
  config = served_workdir.make_config(corpus)
  config.model.towers = 'separate'
  config.optimizer.frozen = ('embedder.encoder', 'embedder.projection')
  first, other = (served_workdir.make_params(config, seed) for seed in (0, 1))
  embeddings = served_workdir.publish(tmp_path, corpus, config, 0, first)
  served_workdir.save(tmp_path, corpus, config, 0, first, generation=0)
  service = service_lib.Service(tmp_path, follow=True, poll_seconds=0.05)
  try:
    before = _search(service, k=25)
    trained = first['embedder'] | {
        name: values
        for name, values in other['embedder'].items()
        if name.startswith('query')
    }
    later = first | {'embedder': trained}
    served_workdir.save(tmp_path, corpus, config, 20, later, generation=0)
    _wait(service, lambda: service.state.identity.checkpoint == 20)
    assert service.state.identity.generation == 0
    after = _search(service, k=25)
    (query_emb,) = service.state.embed([_QUERY], None)
  finally:
    service.close()
  scores = {one['id']: one['score'] for one in after['results']}
  for row, score in enumerate(embeddings @ query_emb):
    assert scores[corpus.passage_text(row)['id']] == pytest.approx(
        score, rel=1e-4
    )
  assert scores != {one['id']: one['score'] for one in before['results']}
