"""The JSON API of `serve`: answers, bad input, limits, tokens."""

import base64
import concurrent.futures
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from urllib import request

from fastapi import testclient
import helpers
import numpy as np
import pytest
import served_workdir

import realm_jax
from realm_jax import serving
from realm_jax.cli import actions
from realm_jax.evaluation import inspect
from realm_jax.serving import app as app_lib
from realm_jax.serving import server
from realm_jax.serving import service as service_lib
from realm_jax.serving import state as state_lib

_QUESTION = 'What is sold in Dunbar?'
_SENTENCE = 'The caf\u00e9 of Dunbar sells [MASK] [MASK] and [MASK].'


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp('served')
  source = helpers.write_records(path / 'a.jsonl', served_workdir.RECORDS)
  return helpers.prepare_corpus(source, path / 'corpus')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, corpus):
  path = tmp_path_factory.mktemp('served') / 'job'
  config = served_workdir.make_config(corpus)
  params = served_workdir.make_params(config)
  served_workdir.save(path, corpus, config, 7, params)
  served_workdir.publish(path, corpus, config, 7, params)
  return path


@pytest.fixture
def single(monkeypatch):
  """Only batches of one request are compiled, which saves time."""
  monkeypatch.setattr(state_lib, '_MAX_BATCH', 1)


@pytest.fixture(scope='module')
def client(workdir):
  service = service_lib.Service(workdir)
  with connect(service) as client:
    yield client


def connect(service, **options):
  app = app_lib.create(service, **options)
  return testclient.TestClient(app, base_url='http://127.0.0.1')


def post(client, path, **body):
  answer = client.post(path, json=body)
  assert answer.status_code == 200, answer.text
  return answer.json()


def test_ask_answers_as_open_qa_does(client, workdir):
  found = post(client, '/ask', question=_QUESTION)
  expected = realm_jax.OpenQA.load(workdir).answer(_QUESTION)
  assert found['answer'] == expected.text and expected.text
  assert found['probability'] == pytest.approx(expected.probability, rel=1e-4)
  assert found['best'] == expected.best
  assert [p['id'] for p in found['passages']] == [
      p.id for p in expected.passages
  ]
  for passage in found['passages']:  # Characters, not bytes.
    span = passage['text'][passage['start'] : passage['limit']]
    assert span == passage['answer']
  sums = {}
  for passage in expected.passages:
    sums.setdefault(passage.answer.lower(), []).append(
        passage.answer_probability
    )
  best = found['marginal'][0]
  assert best['probability'] == pytest.approx(
      max(map(sum, sums.values())), rel=1e-3
  )
  assert found['source'] == {
      'checkpoint': 7, 'index_generation': 7, 'documents_version': 0,
  }
  assert found['note'] is None
  long = post(client, '/ask', question='tea ' * 100)
  assert '100 wordpieces were given; the first 22' in long['note']


def test_fill_says_what_inspect_says(client, workdir):
  found = post(client, '/fill', sentence=_SENTENCE)
  expected = inspect.inspect(workdir, _SENTENCE)
  assert found['fillings'] == list(expected.marginal.fillings)
  assert len(found['fillings']) == 2  # Two blanks, three masks.
  assert found['probability'] == pytest.approx(
      expected.marginal.probability, rel=1e-4
  )
  none = found['without_passages']
  assert none['fillings'] == list(expected.null.prediction.fillings)
  assert none['null_probability'] == pytest.approx(
      expected.null.probability, rel=1e-3
  )
  assert [p['id'] for p in found['passages']] == [
      d.id for d in expected.documents
  ]
  for passage, document in zip(
      found['passages'], expected.documents, strict=True
  ):
    assert passage['probability'] == pytest.approx(
        document.probability, rel=1e-3
    )
    said = document.prediction
    assert passage['prediction']['fillings'] == list(said.fillings)


def test_search_and_embeddings_are_those_of_the_retriever(client, workdir):
  retriever = realm_jax.Retriever.load(workdir)
  hits = retriever.search([_QUESTION], k=5)
  found = post(client, '/search', query=_QUESTION, k=5)['results']
  ids = [retriever.passage(row)['id'] for row in hits.rows[0]]
  assert [one['id'] for one in found] == ids
  scores = [one['score'] for one in found]
  np.testing.assert_allclose(scores, hits.scores[0], rtol=1e-4)
  texts = ['figs', 'caf\u00e9 \U0001f600']
  queries = retriever.embed_queries(texts)
  passages = retriever.embed_passages([('Dun', 'figs'), ('', texts[1])])
  found = post(client, '/embed', texts=texts)['embeddings']
  np.testing.assert_allclose(found, queries, atol=1e-4)
  found = post(
      client, '/embed', texts=texts, kind='passage', titles=['Dun', '']
  )
  np.testing.assert_allclose(found['embeddings'], passages, atol=1e-4)
  found = post(client, '/v1/embeddings', input=texts, model='any')
  np.testing.assert_allclose(
      [one['embedding'] for one in found['data']], queries, atol=1e-4
  )
  count = sum(map(len, retriever.tokenizer.encode_batch(texts)))
  assert found['usage'] == {'prompt_tokens': count, 'total_tokens': count}
  found = post(
      client, '/v1/embeddings', input=texts[1], model='realm-jax:passage',
      encoding_format='base64',
  )
  decoded = np.frombuffer(
      base64.b64decode(found['data'][0]['embedding']), '<f4'
  )
  np.testing.assert_allclose(decoded, passages[1], atol=1e-4)


def test_bm25_ranks_by_the_words(client, corpus):
  found = post(client, '/search', query='Keldor soup', k=3, method='bm25')
  assert found['results'][0]['title'] == '<b>Keldor</b>'
  assert len(found['results']) == 3
  assert 'soup' in found['results'][2]['text']
  assert '25 passages, built in ' in found['note']
  assert 'kept as bm25-' in found['note']
  found = post(client, '/search', query='zzz', method='bm25')
  assert found['results'] == []


def test_bm25_that_is_not_installed_gives_the_command(client, monkeypatch):
  monkeypatch.setitem(sys.modules, 'bm25s', None)
  other = connect(client.app.state.service)  # Without an index of its own.
  answer = other.post('/search', json={'query': 'a', 'method': 'bm25'})
  assert answer.status_code == 409
  message = answer.json()['error']['message']
  assert "pip install 'realm_jax[bm25]'" in message


def test_concurrent_requests_answer_as_single_ones_do(client):
  questions = [f'What is sold in {a}bar?' for a in 'Dun Kel Mor Tam'.split()]
  alone = [post(client, '/ask', question=one) for one in questions]
  with concurrent.futures.ThreadPoolExecutor(8) as threads:
    together = list(
        threads.map(
            lambda one: post(client, '/ask', question=one), questions * 3
        )
    )
  for one, expected in zip(together, alone * 3, strict=True):
    assert one['answer'] == expected['answer']
    assert one['question'] == expected['question']
    assert one['probability'] == pytest.approx(
        expected['probability'], rel=1e-3
    )


@pytest.mark.parametrize(
    'path, body, status, message',
    [
        ('/ask', b'', 422, 'Field required'),
        ('/ask', b'{"question": ', 422, 'JSON'),
        ('/ask', b'[' * 100_000, 400, 'pars'),
        ('/ask', b'{"question": "\xff"}', 422, 'not UTF-8'),
        ('/ask', b'{"question": "\\ud800"}', 422, 'unicode'),
        ('/ask', b'{"question": ""}', 422, 'question'),
        ('/ask', b'{"question": " \\n "}', 422, 'empty'),
        ('/ask', b'{"question": 5}', 422, 'question'),
        ('/ask', b'{"question": "%s"}' % (b'x' * 5000), 422, '4096'),
        ('/ask', b'x' * 10_000_000, 413, 'larger than 1048576'),
        ('/fill', b'{"sentence": "no blank"}', 422, 'has no [MASK]'),
        ('/fill', b'{"sentence": "%s"}' % (b'[MASK] ' * 4), 422, 'at most 3'),
        ('/fill', b'{"sentence": "[MASK]%s"}' % (b' tea' * 40), 422,
         'at most 24 fit'),
        ('/search', b'{"query": "a", "k": 0}', 422, 'k: '),
        ('/search', b'{"query": "a", "k": 101}', 422, 'k: '),
        ('/search', b'{"query": "a", "method": "x"}', 422, 'bm25'),
        ('/embed', b'{"texts": []}', 422, 'texts'),
        ('/embed', b'{"texts": ["a"], "titles": ["b"]}', 422, 'titles'),
        ('/embed', b'{"texts": ["a"], "kind": "passage", "titles": []}', 200,
         ''),
        ('/embed', json.dumps({'texts': ['a'] * 257}).encode(), 422, '256'),
        ('/v1/embeddings', b'{"input": [[1, 2]]}', 422, 'input'),
        ('/v1/embeddings', b'{"input": []}', 422, '0 texts'),
        ('/v1/embeddings', b'{"input": "a", "dimensions": 4}', 422, '16'),
        ('/../../etc/passwd', b'{}', 404, '/docs'),
        ('/%2e%2e/setup.py', b'{}', 404, '/docs'),
        ('/', b'{}', 405, 'Method Not Allowed'),
    ],
)
def test_bad_input_is_refused_in_one_line(client, path, body, status, message):
  answer = client.post(
      path, content=body, headers={'content-type': 'application/json'}
  )
  assert answer.status_code == status, answer.text
  if status != 200:
    found = answer.json()['error']['message']
    assert message in found and '\n' not in found and len(found) <= 500
  assert post(client, '/ask', question=_QUESTION)['answer']


def test_a_full_queue_answers_503_and_closing_drains_it(
    workdir, single, monkeypatch
):
  service = service_lib.Service(workdir, capacity=2)
  client = connect(service)
  held, going = threading.Event(), threading.Event()
  run = type(service.state).run

  def slow(*args):
    going.set()
    assert held.wait(60)
    return run(*args)

  monkeypatch.setattr(type(service.state), 'run', slow)
  jobs = [service_lib.Job('ask', _QUESTION) for _ in range(4)]
  futures = [service.submit(jobs[0])]
  assert going.wait(60)
  futures += [service.submit(job) for job in jobs[1:3]]
  futures[1].cancel()  # Its client is gone.
  answer = client.post('/ask', json={'question': _QUESTION})
  assert answer.status_code == 503
  assert int(answer.headers['retry-after']) > 0
  with pytest.raises(service_lib.Busy, match='2 requests are waiting'):
    service.submit(jobs[3])
  threading.Timer(0.1, held.set).start()
  service.close()
  assert futures[0].result(0)[1]['answer'] == futures[2].result(0)[1]['answer']
  with pytest.raises(service_lib.Busy, match='shutting down'):
    service.submit(jobs[3])


def test_token_and_host(client):
  answer = client.get('/about', headers={'host': 'evil.example:80'})
  assert answer.status_code == 400
  assert client.get('/about', headers={'host': '[::1]:80'}).is_success
  service = client.app.state.service
  other = connect(service, token='s3cret', host='0.0.0.0')
  for path in ('/', '/page.js', '/docs', '/health'):
    assert other.get(path).status_code == 200
  for path in ('/about', '/metrics', '/openapi.json', '/training'):
    for header in ({}, {'authorization': 'Bearer s3cre'}):
      assert other.get(path, headers=header).status_code == 401
    right = {'authorization': 'Bearer s3cret'}
    assert other.get(path, headers=right).status_code == 200


def test_hosts_and_ports_that_cannot_be_used(workdir, tmp_path):
  with pytest.raises(ValueError, match='--token'):
    server.serve(str(workdir), '0.0.0.0', 0, False, None)
  with pytest.raises(FileNotFoundError, match='not a workdir'):
    server.serve(str(tmp_path), '127.0.0.1', 0, False, None)
  with server._listen('127.0.0.1', 0) as used:
    port = used.getsockname()[1]
    with pytest.raises(OSError, match=f'Port {port} of 127.* in use.*--port'):
      server.serve(str(workdir), '127.0.0.1', port, False, None)


def test_without_the_extra_the_command_names_it(monkeypatch):
  for name in [*sys.modules]:
    if name.startswith('realm_jax.serving.'):
      monkeypatch.delitem(sys.modules, name)
  monkeypatch.delattr(serving, 'server')
  monkeypatch.setitem(sys.modules, 'uvicorn', None)
  with pytest.raises(ImportError, match=r"pip install 'realm_jax\[serve\]'"):
    actions.serve(
        workdir='none', host='localhost', port=0, follow=False, token=None
    )


def test_the_page_loads_nothing_from_elsewhere(client):
  for path in app_lib._PAGES:
    answer = client.get(path)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers['content-security-policy']
    outside = set(re.findall(r'https?://[^\s\'"<)]+', answer.text))
    assert outside <= {'http://www.w3.org/2000/svg'}
    assert 'innerHTML' not in answer.text


def test_metrics_and_openapi(client):
  post(client, '/ask', question=_QUESTION)
  client.get('/no/such/path')
  text = client.get('/metrics').text
  pattern = r'realm_requests_total\{path="(.*?)",status="\d+"\} (.*)'
  counts = dict(re.findall(pattern, text))
  assert float(counts['/ask']) >= 1 and 'other' in counts
  assert '/no/such/path' not in text
  assert 'realm_index_generation_step 7.0' in text
  paths = client.get('/openapi.json').json()['paths']
  assert {'/ask', '/fill', '/search', '/embed', '/v1/embeddings'} <= set(paths)


@pytest.mark.parametrize(
    'objective, operations, words',
    [
        ('realm', (), ['no checkpoint', 'realm-jax train']),
        ('realm', ('embed',), ['no index', 'realm-jax index --workdir=']),
        ('ict', ('embed', 'search'), ['no reader', 'quickstart.py:realm']),
        ('mlm', (), ['no retriever', 'quickstart.py:ict']),
    ],
)
def test_what_is_missing_is_said_with_the_command(
    corpus, tmp_path, single, objective, operations, words
):
  config = served_workdir.make_config(corpus, objective)
  names = served_workdir.COMPONENTS[objective]
  params = served_workdir.make_params(config, names=names)
  served_workdir.save(tmp_path, corpus, config, 3, params)
  if words[0] == 'no checkpoint':
    (tmp_path / 'checkpoints' / '3').rename(tmp_path / 'checkpoints' / 'gone')
  if 'search' in operations:
    served_workdir.publish(tmp_path, corpus, config, 3, params)
  with connect(service_lib.Service(tmp_path)) as client:
    assert client.get('/health').json()['ready'] == sorted(
        operations, key=('ask', 'fill', 'search', 'embed').index
    )
    message = client.get('/about').json()['missing']['fill']
    assert all(word in message for word in words), message
    answer = client.post('/fill', json={'sentence': '[MASK]'})
    assert answer.status_code == 409
    assert answer.json()['error']['message'] == message


def test_a_corpus_that_has_moved_or_is_lost(corpus, tmp_path, single):
  config = served_workdir.make_config(corpus, 'realm')
  params = served_workdir.make_params(config, names=['embedder', 'reader'])
  workdir = tmp_path / 'job'
  workdir.mkdir()
  corpus.tokenizer.save(workdir, settings=True)
  config.corpus = str(tmp_path / 'gone')
  served_workdir.save(workdir, corpus, config, 3, params)
  served_workdir.publish(workdir, corpus, config, 3, params)
  with connect(service_lib.Service(workdir)) as client:
    assert client.get('/health').json()['ready'] == ['embed']
    assert '--corpus=' in client.get('/about').json()['missing']['search']
    answer = client.post('/embed', json={'texts': ['a town']})
    assert answer.status_code == 200
  moved = service_lib.Service(workdir, corpus=str(corpus.directory))
  with connect(moved) as client:
    assert client.get('/health').json()['ready'] == ['fill', 'search', 'embed']


def test_the_command_serves_until_sigterm_and_answers_the_last_request(
    workdir,
):
  command = [sys.executable, '-m', 'realm_jax', 'serve', f'--workdir={workdir}']
  with subprocess.Popen(
      [*command, '--port=0'], stdout=subprocess.PIPE, text=True
  ) as process:
    line = process.stdout.readline()
    address = re.search(r'http://[\d.]+:\d+', line)[0]
    sent = request.Request(
        f'{address}/ask',
        json.dumps({'question': _QUESTION}).encode(),
        {'Content-Type': 'application/json'},
    )
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
      answers = [threads.submit(request.urlopen, sent) for _ in range(8)]
      # A client that does not wait for its answer.
      host, port = address.removeprefix('http://').split(':')
      with socket.create_connection((host, port)) as gone:
        gone.sendall(b'POST /ask HTTP/1.1\r\nHost: localhost\r\n'
                     b'Content-Length: 100\r\n\r\n{"que')
      answers[0].result(60)
      process.send_signal(signal.SIGTERM)
      found = [json.load(answer.result(60)) for answer in answers]
    assert process.wait(60) == -signal.SIGTERM
  assert len({one['answer'] for one in found}) == 1 and found[0]['answer']
