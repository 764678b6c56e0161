"""Real requests over loopback to the real server, and clients that mean no good."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from forecaster import web
from forecaster.config import HttpConfig
from forecaster.errors import InvalidConfig
from forecaster.guard import Address, parse_listen
from forecaster.health import Health
from forecaster.metrics import Metrics
from forecaster.web import CONNECTIONS_MAX, REQUEST_HEAD_BYTES_MAX, WebServer

TIMEOUT_S = 10.0


@pytest.fixture
def health() -> Health:
    """A daemon with nothing to complain of."""
    return Health()


@pytest.fixture
def server(health: Health) -> Iterator[WebServer]:
    """The server on a free port, with the real metrics."""
    metrics = Metrics()
    metrics.ready_when(lambda: health.ready)
    with WebServer(HttpConfig(listen="127.0.0.1:0"), health, metrics.exposition) as server:
        yield server


def get(server: WebServer, path: str, **headers: str) -> tuple[int, str, Any]:
    """Ask for a path: status, body, headers."""
    request = urllib.request.Request(server.url.rstrip("/") + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return answer.status, answer.read().decode(), answer.headers
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read().decode(), refusal.headers


def connect(server: WebServer) -> socket.socket:
    """Open a connection, and send nothing."""
    return socket.create_connection(server.address, timeout=TIMEOUT_S)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server closes; a reset is a close."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65_536):
            received += chunk
    return bytes(received)


def test_metrics_are_served_as_asked(server: WebServer) -> None:
    """Prometheus gets OpenMetrics, and a person with curl gets text."""
    status, body, headers = get(server, "/metrics", Accept="application/openmetrics-text;version=1.0.0")
    assert (status, headers["content-type"].split(";")[0]) == (200, "application/openmetrics-text")
    assert body.endswith("# EOF\n")
    status, body, headers = get(server, "/metrics")
    assert (status, headers["content-type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert "forecaster_ready 1.0\n" in body


def test_the_index_links_to_every_page(server: WebServer) -> None:
    """What the index names is there."""
    status, body, _ = get(server, "/")
    assert status == 200
    for path in ("/metrics", "/livez", "/readyz"):
        assert f'href="{path}"' in body
        assert get(server, path)[0] == 200


def test_readyz_flips_and_says_why(server: WebServer, health: Health) -> None:
    """A failing check makes it 503 with its name and reason, and passing makes it 200 again; the metric agrees."""
    health.fail("restore", "ticks/3: 40 % of 12,000 rows")
    status, body, _ = get(server, "/readyz")
    assert status == 503
    assert json.loads(body) == {"ready": False, "checks": {"restore": "ticks/3: 40 % of 12,000 rows", "loop": "ok"}}
    assert "forecaster_ready 0.0\n" in get(server, "/metrics")[1]
    assert get(server, "/livez")[0] == 200
    health.ok("restore")
    status, body, _ = get(server, "/readyz")
    assert (status, json.loads(body)) == (200, {"ready": True, "checks": {"restore": "ok", "loop": "ok"}})


def test_livez_fails_only_when_the_loop_hangs() -> None:
    """Without progress it is 503, and within a declared wait it is 200 and says what for."""
    health = Health(stall_s=0.0)
    with WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"", "text/plain")) as server:
        status, body, _ = get(server, "/livez")
        assert status == 503
        assert json.loads(body) == {"alive": False, "doing": "no progress for 0 s"}
        with health.waiting("compiling 6 buckets", limit_s=TIMEOUT_S):
            status, body, _ = get(server, "/livez")
        assert (status, json.loads(body)) == (200, {"alive": True, "doing": "compiling 6 buckets"})


def test_nothing_else_is_served(server: WebServer) -> None:
    """Other paths are 404, other methods 405, and neither says where a file might be."""
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/etc/passwd", "/metrics/", "//metrics", "/docs"):
        assert get(server, path)[0] == 404
    request = urllib.request.Request(server.url + "metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=TIMEOUT_S)
    with refusal.value:
        assert refusal.value.code == 405


def test_head_has_no_body(server: WebServer) -> None:
    """A HEAD is answered like its GET, less the body."""
    with connect(server) as connection:
        connection.sendall(b"HEAD /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert body == b""


def test_a_port_in_use_is_one_clear_line(server: WebServer, health: Health) -> None:
    """The second server on a port does not start, and says which key of the config to mend."""
    second = WebServer(HttpConfig(listen=str(server.address)), health, lambda _: (b"", "text/plain"))
    with pytest.raises(InvalidConfig) as refusal:
        second.start()
    assert str(refusal.value) == f"[http] listen: cannot listen here (address already in use), got '{server.address}'"
    second.stop()


def test_a_host_that_is_not_here_is_one_clear_line(health: Health) -> None:
    """An address of another machine is refused in one line."""
    with pytest.raises(InvalidConfig, match=r"^\[http\] listen: cannot listen here \(.*\), got '192\.0\.2\.1:0'$"):
        WebServer(HttpConfig(listen="192.0.2.1:0", unprotected=True), health, lambda _: (b"", "text/plain")).start()


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1:9108", ("127.0.0.1", 9108)), ("localhost:0", ("localhost", 0)), ("[::1]:80", ("::1", 80))],
)
def test_listen_is_read(listen: str, address: tuple[str, int]) -> None:
    """Host and port, and written again they are the same text."""
    assert parse_listen(listen) == address
    assert str(Address(*address)) == listen


@pytest.mark.parametrize(
    "listen", ["", "9108", ":9108", "localhost", "a:b", "a:-1", "a:65536", "::1:80", "[a]:1", "a: 1", "a:\u0661"]
)
def test_what_is_no_address_is_refused(listen: str) -> None:
    """A listen address that is none is refused by name."""
    with pytest.raises(InvalidConfig, match=r"^\[http\] listen: "):
        parse_listen(listen)


def test_a_port_is_free_again_after_stop(health: Health) -> None:
    """A restart on the same port works at once, though a connection was just served."""
    with WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"", "text/plain")) as first:
        get(first, "/livez")
    with WebServer(HttpConfig(listen=str(first.address)), health, lambda _: (b"", "text/plain")) as second:
        assert get(second, "/livez")[0] == 200


def test_stop_is_bounded_and_leaves_no_thread(health: Health) -> None:
    """With half-sent requests open, stop takes seconds at most, and twice is fine."""
    threads = threading.active_count()
    server = WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"", "text/plain"))
    server.start()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connect(server)).sendall(b"GET /livez HTTP/1.1\r\nHost")
        start_s = time.monotonic()
        server.stop()
        assert time.monotonic() - start_s < web.STOP_TIMEOUT_S
    server.stop()
    assert threading.active_count() == threads


def test_signal_handlers_are_untouched(health: Health) -> None:
    """SIGTERM and SIGINT stay the daemon's own while the server runs."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"", "text/plain")):
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "opening",
    [
        b"",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n",
        # The answer comes at once; the body that it announced never ends.
        b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
        # A second request on a connection that was served once.
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\n",
    ],
    ids=["silent", "head", "body", "second"],
)
def test_a_slow_client_is_cut_off(server: WebServer, monkeypatch: pytest.MonkeyPatch, opening: bytes) -> None:
    """A byte now and then does not keep a connection open past the limit for a request."""
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.5)
    start_s = time.monotonic()
    with connect(server) as connection:
        connection.sendall(opening)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start_s < TIMEOUT_S:
                if opening:
                    connection.sendall(b"x")
                connection.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(65_536):
                        break
    assert 0.4 < time.monotonic() - start_s < 3


def test_a_client_that_does_not_read_is_cut_off(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that nobody takes is given up after its time."""
    monkeypatch.setattr(web, "RESPONSE_TIMEOUT_S", 0.3)
    with (
        WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"x" * 50_000_000, "text/plain")) as server,
        connect(server) as slow,
    ):
        slow.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(5.0)  # a busy machine is late
        assert len(read_to_end(slow)) < 50_000_000
        assert get(server, "/livez")[0] == 200


def test_a_head_without_end_is_refused(server: WebServer) -> None:
    """A request's head is bounded in size."""
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 4 * REQUEST_HEAD_BYTES_MAX)
        assert read_to_end(connection)[:12] in (b"HTTP/1.1 400", b"")
    assert get(server, "/livez")[0] == 200


def test_idle_connections_do_not_shut_out_prometheus(server: WebServer) -> None:
    """With 500 connections that never finish a request, each scrape is answered at once, and few are kept."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(500)]
        for connection in held:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(5):
            start_s = time.monotonic()
            assert get(server, "/metrics")[0] == 200
            assert time.monotonic() - start_s < 2
        for connection in held:
            connection.setblocking(False)
        assert sum(is_open(connection) for connection in held) <= CONNECTIONS_MAX


def is_open(connection: socket.socket) -> bool:
    """Whether the server has kept this connection, which has nothing to read."""
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n"])
def test_garbage_is_answered_or_dropped(server: WebServer, garbage: bytes) -> None:
    """What is no HTTP costs that connection only."""
    with connect(server) as connection:
        connection.sendall(garbage + b"\r\n\r\n")
        assert read_to_end(connection)[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400", b"")
    assert get(server, "/livez")[0] == 200
