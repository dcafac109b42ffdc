"""A headless Chromium, driven by the W3C WebDriver protocol."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from urllib import error as errors
from urllib import request

CHROMIUM, DRIVER = shutil.which('chromium'), shutil.which('chromedriver')
_ELEMENT = 'element-6066-11e4-a52e-4f735466cecf'  # Key of the protocol.


class Browser:
  """A window of a given size, in light or dark; a context."""

  def __init__(self, width, height, dark=False):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    self._process = subprocess.Popen(
        [DRIVER, f'--port={port}'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    self._base = f'http://127.0.0.1:{port}'
    arguments = [
        '--headless=new', '--no-sandbox', '--disable-gpu',
        '--disable-dev-shm-usage', '--hide-scrollbars',
        '--disable-background-networking', '--no-first-run',
    ]
    if dark:
      arguments.append('--force-dark-mode')
    capabilities = {
        'browserName': 'chrome',
        'goog:chromeOptions': {
            'binary': CHROMIUM,
            'args': arguments,
            'mobileEmulation': {
                'deviceMetrics': {
                    'width': width, 'height': height, 'pixelRatio': 1,
                    'mobile': width < 600, 'touch': width < 600,
                }
            },
        },
        'goog:loggingPrefs': {'browser': 'ALL'},
    }
    self._session = ''
    deadline = time.monotonic() + 20
    while True:
      try:
        made = self._call(
            'POST', '/session', {'capabilities': {'alwaysMatch': capabilities}}
        )
        break
      except ConnectionError:
        if time.monotonic() > deadline:
          self._process.kill()
          raise
        time.sleep(0.05)
      except Exception:
        self._process.kill()
        raise
    self._session = f'/session/{made["sessionId"]}'
    if dark:
      self.cdp(
          'Emulation.setEmulatedMedia',
          features=[{'name': 'prefers-color-scheme', 'value': 'dark'}],
      )

  def _call(self, method, path, body=None):
    sent = request.Request(
        self._base + path,
        None if body is None else json.dumps(body).encode(),
        {'Content-Type': 'application/json'},
        method=method,
    )
    try:
      with request.urlopen(sent, timeout=60) as answer:
        return json.load(answer)['value']
    except errors.HTTPError as error:
      raise RuntimeError(error.read().decode()) from None
    except errors.URLError as error:
      raise ConnectionError(str(error)) from None

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    try:
      self._call('DELETE', self._session)
    finally:
      self._process.terminate()
      self._process.wait(10)

  def open(self, url):
    self._call('POST', f'{self._session}/url', {'url': url})

  def run(self, script, *arguments):
    """Runs JavaScript; returns what it returns."""
    body = {'script': script, 'args': list(arguments)}
    return self._call('POST', f'{self._session}/execute/sync', body)

  def cdp(self, command, **parameters):
    body = {'cmd': command, 'params': parameters}
    return self._call('POST', f'{self._session}/goog/cdp/execute', body)

  def _find(self, css):
    body = {'using': 'css selector', 'value': css}
    found = self._call('POST', f'{self._session}/element', body)
    return f'{self._session}/element/{found[_ELEMENT]}'

  def click(self, css):
    self._call('POST', f'{self._find(css)}/click', {})

  def type(self, css, text):
    self._call('POST', f'{self._find(css)}/value', {'text': text})

  def press(self, key):
    """Presses a key where the focus is."""
    actions = [{'type': kind, 'value': key} for kind in ('keyDown', 'keyUp')]
    self._call(
        'POST', f'{self._session}/actions',
        {'actions': [{'type': 'key', 'id': 'keys', 'actions': actions}]},
    )

  def text(self, css):
    return self.run(
        'const e = document.querySelector(arguments[0]);'
        'return e ? e.innerText : ""', css
    )

  def wait(self, script, seconds=30):
    """Waits until an expression of JavaScript is true."""
    deadline = time.monotonic() + seconds
    while not self.run(f'return Boolean({script})'):
      if time.monotonic() > deadline:
        raise TimeoutError(f'{script}: {self.text("body")[:2000]}')
      time.sleep(0.05)

  def log(self):
    """Returns the messages of the console, such as blocked requests."""
    found = self._call(
        'POST', f'{self._session}/se/log', {'type': 'browser'}
    )
    return [line['message'] for line in found]

  def picture(self, path):
    """Writes the whole page as PNG."""
    found = self.cdp(
        'Page.captureScreenshot', format='png', captureBeyondViewport=True
    )
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path, 'wb') as file:
      file.write(base64.b64decode(found['data']))
