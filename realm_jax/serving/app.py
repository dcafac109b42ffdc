"""The page and the JSON API of a service, as a FastAPI application."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
import contextlib
import hmac
import importlib.resources
import time
from typing import Annotated, Any, Literal
from urllib import parse

import fastapi
from fastapi import exceptions
from fastapi import responses
import prometheus_client as prometheus

from realm_jax.evaluation import report
from realm_jax.index import bm25 as bm25_lib
from realm_jax.runtime import metrics as metrics_lib
from realm_jax.serving import elements
from realm_jax.serving import service as service_lib
from realm_jax.serving import state as state_lib

Service = service_lib.Service
Json = dict[str, Any]

_MAX_BODY = 2**20  # Bytes.
_MAX_TEXT = 4096  # Characters of a question, a sentence or a query.
_MAX_PASSAGE = 20_000  # Characters of a text to embed.
_RETRY_SECONDS = 1  # For clients that find the queue full.
_BODY_SECONDS = 30.0  # For a client to send its body.
_ANSWER_SECONDS = 120.0
_MAX_MESSAGE = 500  # Characters.
_MAX_INDEXED = 1_000_000  # Passages that a search indexes for BM25.
_QUERY_MODEL, _PASSAGE_MODEL = 'realm-jax:query', 'realm-jax:passage'
_LOOPBACK = ('localhost', '127.0.0.1', '::1')

# The files of the page. No path of a request names a file.
_PAGES = {
    '/': ('index.html', 'text/html'),
    '/page.js': ('page.js', 'text/javascript'),
    '/page.css': ('page.css', 'text/css'),
    '/docs': ('docs.html', 'text/html'),
    '/docs.js': ('docs.js', 'text/javascript'),
}
_OPEN = {*_PAGES, '/health'}  # Without a token; they say nothing of the data.
_HEADERS = {
    'content-security-policy': (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src"
        " 'self' data:; connect-src 'self'; base-uri 'none'; form-action"
        " 'self'; frame-ancestors 'none'"
    ),
    'x-content-type-options': 'nosniff',
    'referrer-policy': 'no-referrer',
    'cache-control': 'no-store',
}

_Scope = Any  # The types of ASGI.
_Receive = Callable[[], Awaitable[Any]]
_Send = Callable[[Any], Awaitable[None]]

Text = Annotated[
    str, fastapi.Body(embed=True, min_length=1, max_length=_MAX_TEXT)
]
Item = Annotated[str, fastapi.Body(max_length=_MAX_PASSAGE)]


class Problem(Exception):
  """An answer other than 200, with a message of one line."""

  def __init__(self, status: int, message: str, kind: str = 'invalid_request'):
    super().__init__(message)
    self.status, self.message, self.kind = status, message, kind

  def response(self) -> responses.JSONResponse:
    """The form of errors that clients of OpenAI's API read."""
    error = {
        'message': self.message, 'type': self.kind, 'param': None, 'code': None
    }
    headers = {}
    if self.status == 503:
      headers['retry-after'] = str(_RETRY_SECONDS)
    if self.status == 401:
      headers['www-authenticate'] = 'Bearer'
    return responses.JSONResponse({'error': error}, self.status, headers)


class _Gate:
  """Checks host, token and body of every request; adds headers; counts."""

  def __init__(
      self,
      app: Any,
      metrics: service_lib.Metrics,
      token: str | None,
      hosts: tuple[str, ...],
  ):
    self._app, self._metrics = app, metrics
    self._token, self._hosts = token, hosts

  async def __call__(
      self, scope: _Scope, receive: _Receive, send: _Send
  ) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    start, status = time.perf_counter(), 499  # The client is gone.

    async def send_with_headers(message: Any) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        message['headers'] = [
            *message.get('headers', ()),
            *((k.encode(), v.encode()) for k, v in _HEADERS.items()),
        ]
      await send(message)

    try:
      self._check(scope)
      body = await _body(receive)
    except Problem as problem:
      await problem.response()(scope, receive, send_with_headers)
    else:
      sent = False

      async def replay() -> Any:
        nonlocal sent
        if sent:
          return await receive()
        sent = True
        return {'type': 'http.request', 'body': body, 'more_body': False}

      await self._app(scope, replay, send_with_headers)
    finally:
      # Unknown paths are one, so that the number of labels is bounded.
      route = scope.get('route')
      path = 'other' if route is None else route.path
      self._metrics.requests.labels(path, str(status)).inc()
      self._metrics.seconds.labels(path).observe(time.perf_counter() - start)

  def _check(self, scope: _Scope) -> None:
    headers = dict(scope['headers'])
    if self._token is None:
      # A page of another name that resolves to this machine is not served.
      given = headers.get(b'host', b'').decode('latin-1')
      try:
        host = parse.urlsplit(f'//{given}').hostname
      except ValueError:
        host = None
      if host not in self._hosts:
        raise Problem(
            400,
            f'The host {given[:100]!r} is not served; use'
            f' {" or ".join(self._hosts)}.',
        )
    elif scope['path'] not in _OPEN:
      given = headers.get(b'authorization', b'').decode('latin-1')
      expected = f'Bearer {self._token}'
      if not hmac.compare_digest(given.encode(), expected.encode()):
        raise Problem(
            401,
            'Send the token of --token in the header `Authorization: Bearer'
            ' TOKEN`.',
            'authentication',
        )


async def _body(receive: _Receive) -> bytes:
  """Returns the whole body; refuses a large one before it is read."""
  body = bytearray()
  try:
    async with asyncio.timeout(_BODY_SECONDS):
      while True:
        message = await receive()
        if message['type'] == 'http.disconnect':
          raise Problem(400, 'The client is gone.')
        body += message.get('body', b'')
        if len(body) > _MAX_BODY:
          raise Problem(413, f'The body is larger than {_MAX_BODY} bytes.')
        if not message.get('more_body'):
          break
  except TimeoutError:
    raise Problem(408, 'The body did not arrive in time.') from None
  try:
    body.decode('utf-8')
  except UnicodeDecodeError as error:
    raise Problem(
        422, f'The body is not UTF-8: {error.reason} at byte {error.start}.'
    ) from None
  return bytes(body)


def create(
    service: Service, token: str | None = None, host: str = '127.0.0.1'
) -> fastapi.FastAPI:
  """Returns the application, which closes the service at its end.

  Every request must carry the token; without one, this machine alone is served,
  under the names of the loopback and `host`.
  """
  bm25 = bm25_lib.Cache(_MAX_INDEXED)
  bm25_thread = asyncio.Semaphore(1)  # One scoring at a time.

  @contextlib.asynccontextmanager
  async def lifespan(_: fastapi.FastAPI) -> AsyncIterator[None]:
    yield
    await asyncio.to_thread(service.close)

  app = fastapi.FastAPI(
      title='realm-jax serve',
      description='A retriever and a reader over the passages of a corpus.',
      docs_url=None,  # FastAPI's pages load scripts from elsewhere.
      redoc_url=None,
      lifespan=lifespan,
  )
  app.state.service = service
  hosts = tuple(dict.fromkeys((*_LOOPBACK, host)))
  app.add_middleware(_Gate, metrics=service.metrics, token=token, hosts=hosts)

  @app.exception_handler(Problem)
  async def on_problem(_: Any, problem: Problem) -> responses.JSONResponse:
    return problem.response()

  @app.exception_handler(exceptions.RequestValidationError)
  async def on_invalid(
      _: Any, error: exceptions.RequestValidationError
  ) -> responses.JSONResponse:
    first = error.errors()[0]
    where = '.'.join(str(part) for part in first['loc'])
    return Problem(422, _short(f'{where}: {first["msg"]}.')).response()

  @app.exception_handler(400)
  @app.exception_handler(404)
  @app.exception_handler(405)
  async def on_http_error(_: Any, error: Any) -> responses.JSONResponse:
    message = f'{error.detail}. The paths are listed at /docs.'
    return Problem(error.status_code, _short(message)).response()

  @app.exception_handler(Exception)
  async def on_failure(_: Any, error: Exception) -> responses.JSONResponse:
    name = type(error).__name__
    return Problem(500, f'Internal error: {name}.', 'internal').response()

  async def run(job: service_lib.Job) -> tuple[state_lib.State, Any]:
    """Runs a job; missing operations and wrong texts become `Problem`s."""
    state = service.state
    if job.operation in state.missing:
      raise Problem(409, state.missing[job.operation], 'missing')
    if not job.texts and not job.text.strip():
      raise Problem(422, 'The text is empty.')
    try:
      state.check(job.operation, job.text)
    except ValueError as error:
      raise Problem(422, _short(str(error))) from None
    try:
      future = asyncio.wrap_future(service.submit(job))
      return await asyncio.wait_for(future, _ANSWER_SECONDS)
    except service_lib.Busy as error:
      raise Problem(503, str(error), 'busy') from None
    except TimeoutError:
      raise Problem(503, 'The answer took too long.', 'busy') from None

  async def noted(job: service_lib.Job) -> Json:
    state, found = await run(job)
    note = state.note(job.text) if job.operation != 'fill' else None
    return {**found, 'note': note}

  @app.post('/ask', summary='Answer a question from passages.')
  async def ask(question: Text) -> Json:
    return await noted(service_lib.Job('ask', question))

  @app.post('/fill', summary='Fill in each [MASK] of a sentence.')
  async def fill(sentence: Text) -> Json:
    return await noted(service_lib.Job('fill', sentence))

  @app.post('/search', summary='Find passages by the retriever or by BM25.')
  async def search(
      query: Text,
      k: Annotated[int, fastapi.Body(ge=1, le=state_lib.MAX_RESULTS)] = 10,
      method: Annotated[
          Literal['retriever', 'bm25'], fastapi.Body()
      ] = 'retriever',
  ) -> Json:
    if method == 'retriever':
      return await noted(service_lib.Job('search', query, k))
    state = service.state
    if state.trained is None or state.num_passages is None:
      raise Problem(409, state.missing['search'], 'missing')
    corpus = state.trained.corpus

    def by_bm25() -> Json:
      index = bm25.get(corpus)
      rows_BK, score_BK = index.search([query], k)
      found = rows_BK[0] >= 0
      results = state.passages(
          rows_BK[0, found].tolist(), score_BK[0, found].tolist()
      )
      about = f'BM25 of {len(index):,} passages, {index.origin}.'
      return {'results': results, 'source': state.source(), 'note': about}

    async with bm25_thread:
      try:
        return await asyncio.to_thread(by_bm25)
      except (ImportError, ValueError) as error:
        raise Problem(409, state_lib.one_line(error), 'missing') from None

  @app.post('/embed', summary='Embed queries, or passages with titles.')
  async def embed(
      texts: Annotated[
          list[Item],
          fastapi.Body(min_length=1, max_length=state_lib.MAX_EMBEDDED),
      ],
      kind: Annotated[Literal['query', 'passage'], fastapi.Body()] = 'query',
      titles: Annotated[list[Item] | None, fastapi.Body()] = None,
  ) -> Json:
    if kind == 'query' and titles is not None:
      raise Problem(422, 'titles: only passages have titles.')
    if kind == 'passage':
      titles = titles or [''] * len(texts)
      if len(titles) != len(texts):
        raise Problem(422, f'titles: {len(titles)} for {len(texts)} texts.')
    job = service_lib.Job('embed', texts=texts, titles=titles)
    state, emb_BE = await run(job)
    return {'embeddings': emb_BE.tolist(), 'source': state.source()}

  @app.post('/v1/embeddings', summary="Embed texts, as OpenAI's API.")
  async def embeddings(
      input: Annotated[Item | list[Item], fastapi.Body()],
      model: Annotated[
          str,
          fastapi.Body(
              max_length=200,
              description='A name that ends in `:passage` embeds passages'
              ' without title; any other name embeds queries.',
          ),
      ] = _QUERY_MODEL,
      encoding_format: Annotated[
          Literal['float', 'base64'], fastapi.Body()
      ] = 'float',
      dimensions: Annotated[int | None, fastapi.Body()] = None,
  ) -> Json:
    texts = [input] if isinstance(input, str) else input
    if not 1 <= len(texts) <= state_lib.MAX_EMBEDDED:
      raise Problem(
          422,
          f'input: {len(texts)} texts; 1 to {state_lib.MAX_EMBEDDED} are'
          ' possible.',
      )
    passages = model.endswith(':passage')
    titles = [''] * len(texts) if passages else None
    job = service_lib.Job('embed', texts=texts, titles=titles)
    state, emb_BE = await run(job)
    if dimensions not in (None, emb_BE.shape[1]):
      raise Problem(422, f'dimensions: the model has {emb_BE.shape[1]}.')
    assert state.trained is not None
    tokens = sum(map(len, state.trained.tokenizer.encode_batch(texts)))
    values: list[Any] = emb_BE.tolist()
    if encoding_format == 'base64':
      values = [base64.b64encode(x).decode() for x in emb_BE.astype('<f4')]
    return {
        'object': 'list',
        'model': _PASSAGE_MODEL if passages else _QUERY_MODEL,
        'data': [
            {'object': 'embedding', 'index': index, 'embedding': value}
            for index, value in enumerate(values)
        ],
        'usage': {'prompt_tokens': tokens, 'total_tokens': tokens},
    }

  @app.get('/v1/models', summary="List the models, as OpenAI's API.")
  async def models() -> Json:
    names = (_QUERY_MODEL, _PASSAGE_MODEL)
    return {
        'object': 'list',
        'data': [
            {'id': name, 'object': 'model', 'created': 0, 'owned_by': 'local'}
            for name in names
        ],
    }

  @app.get('/about', summary='The models that are served, and what is missing.')
  async def about() -> Json:
    state = service.state
    return {
        **state.about(),
        'refused': service.refused,
        'examples': await asyncio.to_thread(lambda: state.examples),
    }

  @app.get('/training', summary='Curves of the training of the workdir.')
  def training() -> Json:
    recall = report.recall_panels(report.load_all(service.workdir))
    panels = {k: v for k, v in recall.items() if not k.startswith('answer')}
    metrics = metrics_lib.read_metrics(service.workdir)
    panels |= report.training_panels(metrics)
    found = []
    for title, curves in panels.items():
      lines = [
          {'label': label, 'points': elements.thinned(points)}
          for label, points in curves.items()
      ]
      html = elements.panel(title, curves, 'h2')
      found.append({'title': title, 'curves': lines, 'html': html})
    return {'panels': found}

  @app.get('/health', summary='Whether the server answers.')
  async def health() -> Json:
    missing = service.state.missing
    ready = [name for name in state_lib.OPERATIONS if name not in missing]
    return {'status': 'ok' if ready else 'nothing to serve', 'ready': ready}

  @app.get('/metrics', summary='Metrics for Prometheus.')
  async def metrics() -> responses.Response:
    return responses.Response(
        prometheus.generate_latest(service.metrics.registry),
        media_type=prometheus.CONTENT_TYPE_LATEST,
    )

  for path, (name, media_type) in _PAGES.items():
    app.add_api_route(
        path, _page(name, media_type), include_in_schema=False, methods=['GET']
    )
  return app


def _page(
    name: str, media_type: str
) -> Callable[[], Awaitable[responses.Response]]:
  folder = importlib.resources.files('realm_jax.serving') / 'static'
  content = (folder / name).read_bytes()

  async def page() -> responses.Response:
    return responses.Response(content, media_type=media_type)

  return page


def _short(message: str) -> str:
  """Returns a message of one line and of a bounded length."""
  return ' '.join(message.split())[:_MAX_MESSAGE]
