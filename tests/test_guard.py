"""Who may ask the HTTP server and how often; and that nothing sent to it gets more than its four pages out of it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster import guard
from forecaster.config import HttpConfig
from forecaster.errors import InvalidConfig
from forecaster.guard import ASKERS_MAX, BURST, RATE_PER_S, Guard, Rate, is_loopback
from forecaster.health import Health
from forecaster.web import CONNECTIONS_MAX, HANDSHAKES_MAX, WebServer

TIMEOUT_S = 10.0
PASSWORD, TOKEN = "pass-8431-word", "token-8431-text"


class Files(NamedTuple):
    """An authority, a certificate for this machine and its key."""

    authority: Path
    certificate: Path
    key: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Made for one test."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    made = Files(tmp_path / "ca.pem", tmp_path / "server.pem", tmp_path / "server.key")
    authority.cert_pem.write_to_path(str(made.authority))
    leaf.cert_chain_pems[0].write_to_path(str(made.certificate))
    leaf.private_key_pem.write_to_path(str(made.key))
    return made


@pytest.fixture
def locked(tmp_path: Path, files: Files) -> HttpConfig:
    """TLS, a user and a token, on every address."""
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "token").write_text(TOKEN)
    return HttpConfig(
        listen="0.0.0.0:0",
        ssl_certfile=str(files.certificate),
        ssl_keyfile=str(files.key),
        username="scraper",
        password_file=str(tmp_path / "password"),
        bearer_token_file=str(tmp_path / "token"),
    )


@contextlib.contextmanager
def serving(config: HttpConfig, health: Health | None = None) -> Iterator[WebServer]:
    """The server with one metric."""
    with WebServer(config, health or Health(), lambda _: (b"metric 1\n", "text/plain")) as server:
        yield server


def ask(server: WebServer, path: str, authority: Path | None = None, **headers: str) -> tuple[int, str]:
    """Status and body."""
    scheme = "https" if authority else "http"
    context = ssl.create_default_context(cafile=str(authority)) if authority else None
    request = urllib.request.Request(f"{scheme}://127.0.0.1:{server.address.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read().decode()


def basic(user: str, password: str) -> str:
    """The header of a user."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (basic("scraper", PASSWORD), 200),
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN} ", 200),
        ("", 401),
        (basic("scraper", "wrong"), 401),
        (basic("someone", PASSWORD), 401),
        (f"Bearer {PASSWORD}", 401),
        (f"Basic {TOKEN}", 401),
        ("Bearer", 401),
        ("Basic !!", 401),
        (f"Digest {TOKEN}", 401),
    ],
)
def test_only_a_login_is_served(locked: HttpConfig, files: Files, authorization: str, status: int) -> None:
    """Over TLS, with a password or a token: the metrics; with anything else 401 and nothing."""
    with serving(locked) as server:
        headers = {"Authorization": authorization} if authorization else {}
        assert ask(server, "/metrics", files.authority, **headers) == (status, "metric 1\n" if status == 200 else "")
        assert ask(server, "/", files.authority, **headers)[0] == status


def test_probes_need_no_login_and_tell_their_status_only(locked: HttpConfig, files: Files) -> None:
    """An orchestrator has no secret; why a check fails is told to those who have one."""
    health = Health()
    health.fail("broker", "no answer from 10.1.2.3:9092")
    with serving(locked, health) as server:
        assert ask(server, "/readyz", files.authority) == (503, '{"ready":false}')
        assert ask(server, "/livez", files.authority) == (200, '{"alive":true}')
        told = ask(server, "/readyz", files.authority, Authorization=f"Bearer {TOKEN}")[1]
        assert json.loads(told)["checks"]["broker"] == "no answer from 10.1.2.3:9092"


def test_plain_http_gets_nothing_from_a_tls_port(locked: HttpConfig) -> None:
    """No redirect, no page."""
    with serving(locked) as server, pytest.raises((ConnectionError, OSError)):
        ask(server, "/livez")


@pytest.mark.parametrize("changes", [{}, {"ssl_certfile": None, "ssl_keyfile": None}, {"username": None}])
def test_open_to_other_machines_is_refused(locked: HttpConfig, changes: dict[str, None]) -> None:
    """Without TLS, or without a login, it listens to other machines only where the config says so in so many words."""
    bare = dict.fromkeys(("username", "password_file", "bearer_token_file"))
    settings = {name: getattr(locked, name) for name in HttpConfig.__struct_fields__} | (changes or bare)
    if "username" in changes:
        settings |= bare
    with pytest.raises(InvalidConfig, match=r"^\[http\] listen: 0\.0\.0\.0:0 is open to other machines: it needs"):
        Guard(HttpConfig(**settings), "0.0.0.0")  # noqa: S104
    Guard(HttpConfig(**settings | {"unprotected": True}), "0.0.0.0")  # noqa: S104
    Guard(HttpConfig(**settings), "127.0.0.1")


@pytest.mark.parametrize(
    ("host", "is_one"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "::ffff:10.0.0.1")),  # noqa: S104
    ],
)
def test_loopback_is_known(host: str, is_one: bool) -> None:
    """Only what no other machine can come to counts."""
    assert is_loopback(host) == is_one


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"password_file": None}, "[http] username: has no password"),
        ({"username": None}, "[http] username: a password needs one"),
        ({"ssl_keyfile": "ssl_certfile"}, "[http] ssl_certfile: "),
        ({"ssl_certfile": "/no/such"}, "[http] ssl_certfile: cannot read /no/such or "),
    ],
)
def test_a_login_or_certificate_that_is_none_is_one_line(
    locked: HttpConfig, changes: dict[str, str | None], complaint: str
) -> None:
    """What cannot be used is named."""
    settings = {name: getattr(locked, name) for name in HttpConfig.__struct_fields__}
    settings |= {name: settings.get(str(value), value) for name, value in changes.items()}
    with pytest.raises(InvalidConfig) as refused:
        Guard(HttpConfig(**settings), "127.0.0.1")
    assert str(refused.value).startswith(complaint)
    assert "\n" not in str(refused.value)


def test_renewed_secrets_and_certificates_hold(locked: HttpConfig, files: Files, tmp_path: Path) -> None:
    """After load() a running server takes the new token and shows the new certificate."""
    with serving(locked) as server:
        assert ask(server, "/metrics", files.authority, Authorization=f"Bearer {TOKEN}")[0] == 200
        (tmp_path / "token").write_text("another-8431-token")
        authority = trustme.CA()
        leaf = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(str(files.authority))
        leaf.cert_chain_pems[0].write_to_path(str(files.certificate))
        leaf.private_key_pem.write_to_path(str(files.key))
        server.guard.load()
        assert ask(server, "/metrics", files.authority, Authorization=f"Bearer {TOKEN}")[0] == 401
        assert ask(server, "/metrics", files.authority, Authorization="Bearer another-8431-token")[0] == 200


def test_rate_is_bounded_for_each_asker() -> None:
    """A burst, then so many a second; another asker has its own, and the memory of askers is bounded."""
    now_s = [0.0]
    rate = Rate(lambda: now_s[0])
    assert [rate.admits("a") for _ in range(int(BURST) + 3)] == [True] * int(BURST) + [False] * 3
    assert rate.admits("b")
    now_s[0] = 1.0
    assert sum(rate.admits("a") for _ in range(100)) == RATE_PER_S
    for asker in range(2 * ASKERS_MAX):
        rate.admits(asker)
    assert len(rate._left) == ASKERS_MAX


def test_too_many_requests_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """429 beyond the rate, and the probes are counted by themselves."""
    monkeypatch.setattr(guard, "BURST", 3.0)
    monkeypatch.setattr(guard, "RATE_PER_S", 0.001)
    with serving(HttpConfig(listen="127.0.0.1:0")) as server:
        assert [ask(server, "/metrics")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
        assert ask(server, "/livez")[0] == 200


def open_descriptors() -> int:
    """Of this process."""
    return psutil.Process(os.getpid()).num_fds()


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01"], ids=["silent", "half a hello"])
def test_handshakes_that_never_end_shut_nobody_out(locked: HttpConfig, files: Files, sent: bytes) -> None:
    """With 500 half-open TLS connections a scrape is answered, few are kept, and in the end no descriptor is left."""
    with serving(locked) as server:
        before = open_descriptors()
        with contextlib.ExitStack() as stack:
            for _ in range(500):
                held = stack.enter_context(socket.create_connection(("127.0.0.1", server.address.port), TIMEOUT_S))
                with contextlib.suppress(ConnectionError):
                    held.sendall(sent)
            start_s = time.monotonic()
            assert ask(server, "/metrics", files.authority, Authorization=f"Bearer {TOKEN}")[0] == 200
            assert time.monotonic() - start_s < 5
            assert open_descriptors() - before - 500 <= HANDSHAKES_MAX + CONNECTIONS_MAX + 2
        deadline = time.monotonic() + TIMEOUT_S
        while open_descriptors() > before:
            assert time.monotonic() < deadline, open_descriptors() - before
            time.sleep(0.05)


PATHS = st.one_of(
    st.sampled_from(["/", "/metrics", "/livez", "/readyz", "*", "", "http://elsewhere/metrics", "//etc/passwd"]),
    st.lists(
        st.sampled_from(["..", "etc", "passwd", "proc", "self", "environ", "%2e%2e", "%2f", "%00", "\\", "~", ".", "?"])
    ).map(lambda parts: "/" + "/".join(parts)),
    st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=60),
)
METHODS = st.one_of(st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "TRACE", "CONNECT", "PRI"]), st.text(max_size=9))
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            ["Host", "Accept", "Range", "Expect", "Content-Length", "Transfer-Encoding", "Upgrade", "X", ""]
        ),
        st.one_of(st.sampled_from(["chunked", "100-continue", "-1", "0", "99999999999", "websocket", "x"]), st.text()),
    ),
    max_size=6,
)
KNOWN = {b"200", b"400", b"401", b"404", b"405", b"429", b"503"}


def test_nothing_but_its_pages_comes_out() -> None:
    """Whatever is sent: an answer that HTTP knows or a closed connection, never a file, and the next one is served."""
    secrets = [Path("/etc/passwd").read_bytes()[:20], Path("pyproject.toml").resolve().parent.as_posix().encode()]
    with pytest.MonkeyPatch.context() as patch, serving(HttpConfig(listen="127.0.0.1:0")) as server:
        patch.setattr(guard, "BURST", 1e9)

        @settings(max_examples=300, deadline=None)
        @given(METHODS, PATHS, HEADERS, st.binary(max_size=200))
        def fuzz(method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> None:
            lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
            with socket.create_connection(server.address, TIMEOUT_S) as connection:
                answer = bytearray()
                with contextlib.suppress(ConnectionError):
                    connection.sendall("\r\n".join(lines).encode(errors="replace") + body)
                    connection.shutdown(socket.SHUT_WR)
                    while chunk := connection.recv(65_536):
                        answer += chunk
            assert not answer or bytes(answer.split()[1]) in KNOWN, answer
            assert not any(secret in answer for secret in secrets)

        before = open_descriptors()
        fuzz()
        assert ask(server, "/livez")[0] == 200
        deadline = time.monotonic() + TIMEOUT_S
        while open_descriptors() > before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
