"""Metrics over HTTP, in plain text: OpenMetrics takes half as long again to write, and packing it a third more."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterable, Iterator
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from orchestrator.errors import OrchError

log = logging.getLogger(__name__)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """As an HTTPServer, but no name server is asked what we are called."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


@contextlib.contextmanager
def serving(registry: CollectorRegistry, address: str, port: int) -> Iterator[str]:
    """Serve while the block runs; gives the URL. Raises OrchError if the address is not ours or the port is taken."""
    metrics = make_wsgi_app(registry, disable_compression=True)

    def plain(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        environ.pop("HTTP_ACCEPT", None)
        return metrics(environ, start_response)  # type: ignore[no-any-return]

    with _listening(address, port) as server:
        server.set_app(plain)
        thread = threading.Thread(target=server.serve_forever, name="http", daemon=True)
        thread.start()
        try:
            yield f"http://{_endpoint(server.server_name, server.server_port)}/metrics"
        finally:
            server.shutdown()
            thread.join()


def _listening(address: str, port: int) -> _Server:
    try:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return (_Server6 if family == socket.AF_INET6 else _Server)((str(where[0]), int(where[1])), _Handler)
    except OSError as error:
        raise OrchError(f"cannot serve metrics: {error.strerror}", where=_endpoint(address, port)) from error


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
