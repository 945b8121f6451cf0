"""What the server of web bundles gives out, and to whom."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edgecompress.devices.web_server import RESULT_LIMIT_BYTES, PageServer
from edgecompress.errors import DeviceError


@pytest.fixture(name="server")
def server_of_two(tmp_path: Path) -> Iterator[PageServer]:
    for name in ("index.html", "other.mjs", "secret.txt"):
        (tmp_path / name).write_text(name)
    bundles = [
        {"index.html": tmp_path / "index.html", "lib/a.mjs": tmp_path / "other.mjs"},
        {"m": tmp_path / "other.mjs"},
    ]
    with PageServer(bundles, [("runs", "7")], host="127.0.0.1") as server:
        yield server


def ask(server: PageServer, path: str, method: str = "GET", body: bytes | None = None) -> http.client.HTTPResponse:
    """Ask with the path exactly as it is; ``%T`` stands for the token."""
    address = urlsplit(server.address("127.0.0.1"))
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=10)
    connection.putrequest(method, path.replace("%T", address.path.strip("/")), skip_accept_encoding=True)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    return connection.getresponse()


def test_the_listed_files_come_with_their_types_and_the_headers_that_threads_need(server: PageServer) -> None:
    answer = ask(server, "/%T/0/lib/a.mjs?x=1")
    assert (answer.status, answer.read()) == (200, b"other.mjs")
    assert answer.headers["Content-Type"] == "text/javascript"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_short_address_leads_to_the_page_with_its_options(server: PageServer) -> None:
    answer = ask(server, "/%T/")
    token = urlsplit(server.address("h")).path
    assert answer.status == 302
    assert answer.headers["Location"] == f"{token}0/index.html?runs=7&also=..%2F1%2F&report=..%2Fresult"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/0/index.html",
        "/%T",
        "/%T/0/",
        "/%T/0/secret.txt",
        "/%T/0/../secret.txt",
        "/%T/0/%2e%2e/secret.txt",
        "/%T/0/..%2fsecret.txt",
        "/%T/0//index.html",
        "/%T/0/lib/../index.html",
        "/%T/0/index.html%00",
        "/%T/2/index.html",
        "/%T/0/lib",
        "//etc/passwd",
    ],
)
def test_nothing_else_exists(server: PageServer, path: str) -> None:
    answer = ask(server, path)
    assert (answer.status, answer.read()) == (404, b"")


def test_the_first_result_sent_to_the_right_address_counts(server: PageServer) -> None:
    assert server.wait(0) is None
    for path in ("/result", "/0000000000/result", "/%T/0/result", "/%T/"):
        assert ask(server, path, "POST", b"forged").status == 404
    assert server.wait(0) is None
    assert ask(server, "/%T/result", "POST", b"first").status == 204
    assert ask(server, "/%T/result", "POST", b"second").status == 204
    assert server.wait(0) == b"first"


def test_a_result_of_unknown_or_absurd_size_is_refused_unread(server: PageServer) -> None:
    assert ask(server, "/%T/result", "POST").status == 413
    port = urlsplit(server.address("h")).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        path = urlsplit(server.address("h")).path
        line.sendall(
            f"POST {path}result HTTP/1.1\r\nHost: h\r\nContent-Length: {RESULT_LIMIT_BYTES + 1}\r\n\r\n".encode()
        )
        assert line.recv(100).startswith(b"HTTP/1.1 413")
    assert server.wait(0) is None


def test_nothing_is_read_for_those_who_do_not_know_the_token(server: PageServer) -> None:
    port = urlsplit(server.address("h")).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        # The body never comes: a server that waited for it would not answer.
        line.sendall(b"POST /0000000000/result HTTP/1.1\r\nHost: h\r\nContent-Length: 1000\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 404")


def test_every_server_has_another_token(server: PageServer) -> None:
    with PageServer([{}], [], host="127.0.0.1") as other:
        assert urlsplit(server.address("h")).path != urlsplit(other.address("h")).path


def test_a_port_that_is_taken_is_a_device_error(server: PageServer) -> None:
    port = urlsplit(server.address("h")).port or 0
    with pytest.raises(DeviceError, match=f"cannot listen on 127.0.0.1:{port}"):
        PageServer([{}], [], host="127.0.0.1", port=port)
