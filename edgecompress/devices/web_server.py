"""A small server for the pages of bundles: it gives out what their manifests list and takes one result back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from urllib.parse import unquote, urlencode, urlsplit

from edgecompress.errors import DeviceError

RESULT_LIMIT_BYTES = 64_000_000
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # this and the next one allow threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class PageServer:
    """Serves bundles below ``/TOKEN/0/``, ``/TOKEN/1/`` ... while it is open; all else does not exist.

    ``bundles`` maps the relative paths of each bundle's files to the files. The token is new each time and part of
    every address: no other page, whatever the browser has open, can read the files or send a result. ``options`` are
    added to the address that ``/TOKEN/`` leads to. Raises ``DeviceError`` when it cannot listen on ``host`` and
    ``port`` (0: any free one).
    """

    def __init__(
        self, bundles: Sequence[Mapping[str, Path]], options: Sequence[tuple[str, str]], *, host: str, port: int = 0
    ) -> None:
        self._token = secrets.token_hex(5)  # 40 bits, still to be typed into a phone
        self._files = {
            f"/{self._token}/{index}/{path}": file
            for index, bundle in enumerate(bundles)
            for path, file in bundle.items()
        }
        others = [("also", f"../{index}/") for index in range(1, len(bundles))]
        self._query = urlencode([*options, *others, ("report", "../result")])
        self._arrived = Event()
        self._result = b""
        self.opened = Event()
        try:
            self._server = _QuietServer((host, port), _handler(self))
        except OSError as error:
            raise DeviceError(
                f"cannot listen on {host}:{port}: {error.strerror or error}",
                hint="choose another port, or an address of this machine",
            ) from error
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> PageServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def address(self, host: str) -> str:
        """Return what to open in a browser that reaches this server under the name ``host``."""
        return f"http://{host}:{self._server.server_address[1]}/{self._token}/"

    def wait(self, timeout_s: float | None = None) -> bytes | None:
        """Return the first result that was sent, None when none comes within ``timeout_s``."""
        return self._result if self._arrived.wait(timeout_s) else None

    def find(self, target: str) -> tuple[Path | None, str | None]:
        """Return the file that a request's target names, or the address that it leads to; neither for anything else."""
        path = unquote(urlsplit(target).path)
        if path == f"/{self._token}/":
            return None, f"/{self._token}/0/index.html?{self._query}"
        file = self._files.get(path)
        if file:
            self.opened.set()
        return file, None

    def take(self, target: str, length: str, stream: BufferedIOBase) -> HTTPStatus:
        """Read a result that was sent to the right address, keep the first one, and return how to answer.

        Nothing is read for anybody who does not know the token.
        """
        if urlsplit(target).path != f"/{self._token}/result":
            return HTTPStatus.NOT_FOUND
        if not length.isdecimal() or int(length) > RESULT_LIMIT_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        body = stream.read(int(length))
        if not self._arrived.is_set():
            self._result = body
            self._arrived.set()
        return HTTPStatus.NO_CONTENT


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Print nothing where a browser is killed in the middle of an answer."""


def _handler(pages: PageServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "edgecompress", ""
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            file, place = pages.find(self.path)
            if place:
                self._answer(HTTPStatus.FOUND, b"", {"Location": place})
                return
            try:
                content = file.read_bytes() if file else None
            except OSError:  # removed while it was served
                content = None
            if file is None or content is None:
                self._answer(HTTPStatus.NOT_FOUND, b"")
                return
            kind = _TYPES.get(file.suffix, "application/octet-stream")
            self._answer(HTTPStatus.OK, content, {"Content-Type": kind})

        def do_POST(self) -> None:
            status = pages.take(self.path, self.headers.get("Content-Length", ""), self.rfile)
            self.close_connection = status != HTTPStatus.NO_CONTENT  # what was not read is no next request
            self._answer(status, b"")

        def _answer(self, status: HTTPStatus, body: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**_HEADERS, **(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Print nothing: what is worth saying is in the result."""

    return Handler
