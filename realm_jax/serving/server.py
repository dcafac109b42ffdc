"""`realm-jax serve`: opens a port, then the workdir, and answers requests."""

import ipaddress
import logging
import os
import pathlib
import socket

import uvicorn

from realm_jax import config as config_lib
from realm_jax.serving import app as app_lib
from realm_jax.serving import service as service_lib

log = logging.getLogger(__name__)

_BACKLOG = 128
_DRAIN_SECONDS = 30
_TOKEN = 'REALM_JAX_TOKEN'  # Environment variable in place of the flag.


def serve(
    workdir: str,
    host: str,
    port: int,
    follow: bool,
    token: str | None,
    corpus: str | None = None,
) -> None:
  """Serves until SIGTERM or Ctrl-C; then the queue is answered first.

  Raises:
    FileNotFoundError: there is no such workdir.
    ValueError: a host that other machines reach needs a token.
    OSError: the port cannot be used.
  """
  token = token or os.environ.get(_TOKEN)
  if token is None and not _is_loopback(host):
    raise ValueError(
        f'--host={host} can be reached from other machines; give --token, or'
        f' set {_TOKEN}. Clients send it as `Authorization: Bearer TOKEN`.'
    )
  if token is not None and not (token.isascii() and token.isprintable()):
    raise ValueError('The token must be of printable ASCII characters.')
  path = pathlib.Path(workdir)
  config_lib.read(path)  # Names what is wrong with the folder.
  # Before anything expensive; early clients wait in the backlog.
  listening = _listen(host, port)
  with listening:
    service = service_lib.Service(path, follow, corpus=corpus)
    for operation, reason in service.state.missing.items():
      log.info('%s: %s', operation, reason)
    app = app_lib.create(service, token, host)
    shown = f'[{host}]' if ':' in host else host
    number = listening.getsockname()[1]
    print(
        f'Serving {workdir} at http://{shown}:{number}/ until Ctrl-C or'
        ' SIGTERM.',
        flush=True,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level='warning',
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )
    server.run(sockets=[listening])


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


def _listen(host: str, port: int) -> socket.socket:
  if not 0 <= port < 2**16:
    raise ValueError(f'--port={port}: must be between 0 and 65535.')
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  listening = socket.socket(family)
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listening.bind((host, port))
    listening.listen(_BACKLOG)
  except (OSError, UnicodeError) as error:
    listening.close()
    reason = getattr(error, 'strerror', None) or str(error)
    raise OSError(
        f'Port {port} of {host} cannot be used: {reason}. Give another with'
        ' --port; 0 takes any free one.'
    ) from error
  return listening
