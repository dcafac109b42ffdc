"""The page in a headless Chromium, at phone and desktop width."""

import contextlib
import threading

import browser
import helpers
import pytest
import served_workdir
import uvicorn

from realm_jax.serving import app as app_lib
from realm_jax.serving import server as server_lib
from realm_jax.serving import service as service_lib
from realm_jax.serving import state as state_lib

pytestmark = pytest.mark.skipif(
    not (browser.CHROMIUM and browser.DRIVER),
    reason='needs chromium and chromedriver (Debian: chromium-driver)',
)

_PHONE, _DESKTOP = (360, 740), (1200, 900)
_SENTENCE = 'The caf\u00e9 of Dunbar sells [MASK].'


@pytest.fixture(scope='module')
def address(tmp_path_factory):
  """The address of a server in this process, without a token."""
  with _serving(tmp_path_factory.mktemp('served')) as found:
    yield found


@contextlib.contextmanager
def _serving(path):
  source = helpers.write_records(path / 'a.jsonl', served_workdir.RECORDS)
  corpus = helpers.prepare_corpus(source, path / 'corpus')
  config = served_workdir.make_config(corpus)
  params = served_workdir.make_params(config)
  job = path / 'job'
  served_workdir.save(job, corpus, config, 7, params)
  served_workdir.publish(job, corpus, config, 7, params)
  helpers.write_records(
      job / 'metrics.jsonl',
      [
          {'step': step, 'train/loss': 9 / step, 'refresh/age_steps': step % 3}
          for step in range(1, 20)
      ],
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(state_lib, '_MAX_BATCH', 1)
    service = service_lib.Service(job)
    app = app_lib.create(service)
    listening = server_lib._listen('127.0.0.1', 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
      yield f'http://127.0.0.1:{listening.getsockname()[1]}'
    finally:
      server.should_exit = True
      thread.join()


def _harmless(window):
  """Whether nothing ran from a passage, was blocked, or is cut off."""
  assert window.run('return window.harmed') is None
  assert not window.log()
  width, inner = window.run(
      'return [document.documentElement.scrollWidth, innerWidth]'
  )
  assert width <= inner
  return True


@pytest.mark.parametrize(
    'size, dark', [(_PHONE, True), (_DESKTOP, False)], ids=['phone', 'desktop']
)
def test_ask_fill_and_follow_a_link(address, size, dark):
  with browser.Browser(*size, dark=dark) as window:
    window.open(address)
    window.wait('document.activeElement.id === "text"')
    # By keyboard alone: the text has the focus.
    window.type('#text', 'What is sold in <i>Dunbar</i>?\ue007')  # Enter.
    window.wait('document.querySelectorAll(".card").length === 3')
    assert '<b>' in window.text('.card h3')  # Markup is shown as text.
    made = 'document.querySelectorAll("#results b, #results i, img").length'
    assert window.run(f'return {made}') == 0
    answer = window.text('.answer h2')
    assert answer and answer in window.text('.card.best mark')
    assert 'without a passage' in window.text('.answer')
    assert 'checkpoint 7' in window.text('#about')
    assert _harmless(window)

    window.click('#bm25')
    window.wait('document.querySelectorAll(".columns.two > div").length === 2')
    tops = window.run(
        'return [...document.querySelectorAll(".columns > div")].map('
        '(e) => e.getBoundingClientRect().top)'
    )
    assert (tops[0] == tops[1]) == (size == _DESKTOP)
    window.click('#bm25')
    window.wait('!document.querySelector(".columns.two")')

    window.click('nav a[data-tab=fill]')
    window.wait('document.activeElement.id === "text"')
    window.type('#text', _SENTENCE)
    window.click('#submit')
    window.wait('document.querySelectorAll(".card").length === 3')
    assert 'p(no passage | x)' in window.text('.answer')
    assert _harmless(window)

    # A link of a card: passages like it, with an address of its own.
    title = window.text('.card h3')
    window.click('.card a')
    window.wait('document.querySelectorAll(".card").length === 10')
    assert window.run('return location.hash').startswith('#search?q=')
    assert title in window.text('#results')
    window.run('history.back()')
    window.wait('document.querySelector(".answer")')
    assert window.run('return document.querySelector("#text").value') == (
        _SENTENCE
    )
    background = window.run('return getComputedStyle(document.body).color')
    assert (background == 'rgb(228, 233, 240)') == dark


def test_errors_and_curves_and_the_page_of_the_api(address):
  with browser.Browser(*_DESKTOP) as window:
    window.open(f'{address}/#fill?q=no+blank')
    window.wait('document.querySelector("#notice .missing")')
    assert 'has no [MASK]' in window.text('#notice')
    assert all('status of 422' in line for line in window.log())
    window.open(f'{address}/#training')
    window.wait('document.querySelectorAll("svg polyline").length === 2')
    label = window.run('return document.querySelector("svg").ariaLabel')
    assert label == 'loss: 0.474 at step 19'
    # Every control has a name, and Tab reaches the link of the API.
    unnamed = (
        '[...document.querySelectorAll("button, input, textarea, a")].filter('
        '(e) => !(e.innerText || e.ariaLabel || e.labels?.length))'
    )
    assert window.run(f'return {unnamed}.length') == 0
    window.open(f'{address}/docs')
    window.wait('document.querySelectorAll(".operation").length > 8')
    assert window.run(f'return {unnamed}.length') == 0
    window.click('button[aria-label="Send /ask"]')
    window.wait('document.querySelector("pre").innerText.startsWith("200")')
    assert _harmless(window)
