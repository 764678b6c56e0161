"""Each way to a guarded broker, with the right secret and with a wrong one: it works, or it is one line and exit 1."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import create_topic
from guarded import SCRAM_USERS, Guarded, guarded_broker
from kafka_witness import poll_records, produce, read_committed, settings, values

from forecaster import cli
from forecaster.config import build_config
from forecaster.kafka import open_sink, open_source, read_range
from forecaster.kafka.oauth import token_provider
from forecaster.kafka.publishing import Publisher
from forecaster.records import Commit, Output, TopicPartition

pytestmark = [
    pytest.mark.timeout(180),
    # The client opens a socket for each try to connect and leaves a failed one to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore:unclosed <(ssl.SSLS|s)ocket:ResourceWarning",
        "ignore:Exception ignored in. <(ssl.SSLS|s)ocket:pytest.PytestUnraisableExceptionWarning",
    ),
]

Section = dict[str, Any]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One locked broker for this file."""
    with guarded_broker(tmp_path_factory.mktemp("guarded")) as guarded:
        yield guarded


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Sockets of failed tries are collected in the test that left them."""
    yield
    gc.collect()


class TokenEndpoint(BaseHTTPRequestHandler):
    """A provider's token endpoint for one client."""

    server: Provider

    def do_POST(self) -> None:
        """A token for the right id and secret, 401 for others."""
        form = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        login = b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
        self.server.asked.append(form)
        right = login == "forecaster:client-8431-secret" and form["grant_type"] == ["client_credentials"]
        lifetime_s = self.server.lifetime_s
        granted = {"access_token": self.server.token(lifetime_s), "expires_in": lifetime_s}
        answer = granted if right else {"error": "invalid_client"}
        self.server.given += [answer] if right else []
        body = json.dumps(answer).encode()
        self.send_response(200 if right else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Provider(ThreadingHTTPServer):
    """An identity provider on this machine."""

    def __init__(self, token: Callable[[int], str]) -> None:
        super().__init__(("127.0.0.1", 0), TokenEndpoint)
        self.token = token
        self.lifetime_s = 600
        self.asked: list[dict[str, list[str]]] = []
        self.given: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/token"


@pytest.fixture
def provider(guarded: Guarded) -> Iterator[Provider]:
    """It gives alice's tokens."""
    with Provider(lambda lifetime_s: guarded.identity.token("alice", lifetime_s)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def secret(directory: Path, text: str) -> str:
    """The path of a file with it."""
    path = directory / f"secret-{uuid.uuid4().hex[:6]}"
    path.write_text(text + "\n")
    return str(path)


def scram(guarded: Guarded, directory: Path, mechanism: str, password: str) -> Section:
    """Alice logs in with a password."""
    login = {"sasl_mechanism": mechanism, "sasl_username": "alice", "sasl_password_file": secret(directory, password)}
    return guarded.kafka("SASL", **login)


def bearer(guarded: Guarded, **changes: str) -> Section:
    """A login with a token."""
    return guarded.kafka("SASL", sasl_mechanism="OAUTHBEARER", **changes)


def mtls(guarded: Guarded, certificate: Path, key: Path, **changes: str) -> Section:
    """A certificate of one's own."""
    return guarded.kafka("MTLS", ssl_certfile=str(certificate), ssl_keyfile=str(key), **changes)


RIGHT: dict[str, Callable[[Guarded, Path, Provider], Section]] = {
    "tls": lambda guarded, _directory, _provider: guarded.kafka("TLS"),
    "mtls": lambda guarded, _directory, _provider: mtls(guarded, guarded.keys.certfile, guarded.keys.keyfile),
    "mtls, a locked key": lambda guarded, directory, _provider: mtls(
        guarded,
        guarded.keys.certfile,
        guarded.keys.locked_keyfile,
        ssl_key_password_file=secret(directory, "open-8431-sesame"),
    ),
    "scram 256": lambda guarded, directory, _provider: scram(guarded, directory, "SCRAM-SHA-256", SCRAM_USERS["alice"]),
    "scram 512": lambda guarded, directory, _provider: scram(guarded, directory, "SCRAM-SHA-512", SCRAM_USERS["alice"]),
    "token file": lambda guarded, directory, _provider: bearer(
        guarded, oauth_token_file=secret(directory, guarded.identity.token("alice"))
    ),
    "token endpoint": lambda guarded, directory, provider: bearer(
        guarded,
        oauth_token_url=provider.url,
        oauth_client_id="forecaster",
        oauth_client_secret_file=secret(directory, "client-8431-secret"),
        oauth_scope="kafka",
    ),
}

WRONG: dict[str, tuple[Callable[[Guarded, Path, Provider], Section], str]] = {
    "tls, another authority": (
        lambda guarded, _directory, _provider: guarded.kafka("TLS", ssl_cafile=str(guarded.keys.other_cafile)),
        "no TLS with",
    ),
    "tls, another host's certificate": (
        lambda guarded, _directory, _provider: guarded.kafka("ELSEWHERE"),
        "no TLS with",
    ),
    "mtls, no certificate": (
        lambda guarded, _directory, _provider: guarded.kafka("MTLS"),
        "ssl_certfile",
    ),
    "mtls, a stranger's": (
        lambda guarded, _directory, _provider: mtls(guarded, guarded.keys.other_certfile, guarded.keys.other_keyfile),
        "ssl_certfile",
    ),
    "mtls, another's key": (
        lambda guarded, _directory, _provider: mtls(guarded, guarded.keys.certfile, guarded.keys.other_keyfile),
        "ssl_keyfile",
    ),
    "mtls, a locked key": (
        lambda guarded, directory, _provider: mtls(
            guarded,
            guarded.keys.certfile,
            guarded.keys.locked_keyfile,
            ssl_key_password_file=secret(directory, "wrong-8431-word"),
        ),
        "another password",
    ),
    "scram 256": (
        lambda guarded, directory, _provider: scram(guarded, directory, "SCRAM-SHA-256", "wrong-8431-word"),
        "refused user alice",
    ),
    "scram 512": (
        lambda guarded, directory, _provider: scram(guarded, directory, "SCRAM-SHA-512", "wrong-8431-word"),
        "refused user alice",
    ),
    "token of a stranger": (
        lambda guarded, directory, _provider: bearer(
            guarded, oauth_token_file=secret(directory, type(guarded.identity)().token("alice"))
        ),
        "refused the token",
    ),
    "token that is over": (
        lambda guarded, directory, _provider: bearer(
            guarded, oauth_token_file=secret(directory, guarded.identity.token("alice", lifetime_s=-60))
        ),
        "refused the token",
    ),
    "token endpoint": (
        lambda guarded, directory, provider: bearer(
            guarded,
            oauth_token_url=provider.url,
            oauth_client_id="forecaster",
            oauth_client_secret_file=secret(directory, "wrong-8431-word"),
        ),
        "refused client forecaster: 401",
    ),
}


def written(directory: Path, kafka: Section, topic: str) -> Path:
    """A config file with this [kafka] section."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in kafka.items()]
    group = topic.replace("ticks", "group")
    names = [f'{kind}_topic = "{group}-{kind}"' for kind in ("forecast", "signal", "dead_letter")]
    text = ["[kafka]", f'group_id = "{group}"', *names, *lines, "[[inputs]]", 'name = "ticks"', f'topics = ["{topic}"]']
    path = directory / "config.toml"
    path.write_text("\n".join(text))
    return path


@pytest.mark.parametrize("way", RIGHT)
def test_right_secret(
    guarded: Guarded, provider: Provider, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Topics are made and checked, a record is written and read back."""
    kafka = RIGHT[way](guarded, tmp_path, provider)
    topic = f"ticks-{uuid.uuid4().hex[:8]}"
    config = str(written(tmp_path, kafka, topic))
    assert cli.main(["topics", "create", "--config", config]) == 0
    assert cli.main(["check", "--connect", "--config", config]) == 0, capsys.readouterr().out
    section = build_config({"kafka": kafka, "inputs": [{"name": "a", "topics": [topic]}]}, "test").kafka
    with closing(Publisher(section)) as publisher:
        publisher.publish([Output(topic, 0, b"key", b"value", [])])
    assert [record.value for batch in read_range(section, topic) for record in batch] == [b"value"]
    assert values(read_committed(guarded.bootstrap_servers, topic)) == ["value"]


@pytest.mark.parametrize("way", RIGHT)
def test_librdkafka_takes_the_same_settings(guarded: Guarded, provider: Provider, tmp_path: Path, way: str) -> None:
    """The other client reads a record and answers it in a transaction, by each of these ways."""
    kafka = RIGHT[way](guarded, tmp_path, provider) | {"client": "librdkafka", "group_id": f"g-{uuid.uuid4().hex[:8]}"}
    topic = f"ticks-{uuid.uuid4().hex[:8]}"
    create_topic(guarded.bootstrap_servers, topic)
    produce(guarded.bootstrap_servers, topic, ["in"])
    section = build_config({"kafka": kafka, "inputs": [{"name": "a", "topics": [topic]}]}, "test").kafka
    with closing(open_source(section, [topic])) as source, closing(open_sink(section, source)) as sink:
        assert [record.value for record in poll_records(source, 1)] == [b"in"]
        sink.begin()
        sink.send([Output(topic, 0, None, b"out", [])])
        sink.commit({TopicPartition(topic, 0): Commit(1, 1)})
    assert values(read_committed(guarded.bootstrap_servers, topic)) == ["in", "out"]


@pytest.mark.parametrize("way", WRONG)
def test_wrong_secret(
    guarded: Guarded, provider: Provider, tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` ends with 1 and one line that says what is wrong, not the secret."""
    make, expected = WRONG[way]
    config = str(written(tmp_path, make(guarded, tmp_path, provider), "ticks-none"))
    assert cli.main(["check", "--connect", "--config", config]) == 1
    told = capsys.readouterr()
    wrong = [line for line in told.out.splitlines() if line.startswith("FAIL")]
    assert len(wrong) == 1
    assert expected in wrong[0]
    assert "8431" not in told.out + told.err


def test_the_daemon_ends_with_one_line(guarded: Guarded, provider: Provider, tmp_path: Path) -> None:
    """`forecaster run` with a wrong password: exit 1, and the last line says what to mend."""
    config = written(tmp_path, WRONG["scram 512"][0](guarded, tmp_path, provider), "ticks-none")
    command = [sys.executable, "-m", "forecaster", "run", "--config", str(config), "--set", "http.listen=127.0.0.1:0"]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"^forecaster: .* refused user alice: .*check \[kafka\] sasl_username", done.stderr, re.MULTILINE)
    assert "8431" not in done.stdout + done.stderr


def test_a_token_is_shared_and_renewed(guarded: Guarded, provider: Provider, tmp_path: Path) -> None:
    """All clients use one token; it is asked for again when most of its time is over."""
    section = build_config(
        {"kafka": RIGHT["token endpoint"](guarded, tmp_path, provider), "inputs": [{"name": "a", "topics": ["a"]}]}, "t"
    ).kafka
    first = token_provider(section)
    assert first.token() == token_provider(section).token()
    assert provider.asked == [{"grant_type": ["client_credentials"], "scope": ["kafka"]}]
    first._renew_s = 0.0
    first.token()
    assert len(provider.asked) == 2


@pytest.mark.parametrize("client", ["kafka-python", "librdkafka"])
def test_a_token_ends_and_the_client_goes_on(guarded: Guarded, provider: Provider, tmp_path: Path, client: str) -> None:
    """The broker ends a login with its token: the client logs in again with a new one, and records keep coming."""
    provider.lifetime_s = 12
    topic = f"ticks-{uuid.uuid4().hex[:8]}"
    create_topic(guarded.bootstrap_servers, topic)
    login = RIGHT["token endpoint"](guarded, tmp_path, provider)
    section = settings(login.pop("bootstrap_servers"), topic, client=client, **login)
    with closing(open_source(section, [topic])) as source:
        begun_s, number = time.monotonic(), 0
        while time.monotonic() < begun_s + 3 * provider.lifetime_s:
            produce(guarded.bootstrap_servers, topic, [str(number)])
            number += 1
            newest = poll_records(source, 1)[-1]
        assert newest.value == str(number - 1).encode()
    assert len(provider.given) >= 3


@pytest.mark.timeout(400)
def test_no_output_has_a_secret(
    guarded: Guarded, provider: Provider, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A daemon with every kind of secret, at level debug, through an outage and each failure: none is ever written."""
    topic = f"ticks-{uuid.uuid4().hex[:8]}"
    kafka = RIGHT["token endpoint"](guarded, tmp_path, provider) | {
        "ssl_certfile": str(guarded.keys.certfile),
        "ssl_keyfile": str(guarded.keys.locked_keyfile),
        "ssl_key_password_file": secret(tmp_path, "open-8431-sesame"),
        "session_timeout_s": 10.0,
        "poll_records_max": 16,
    }
    http = {
        "listen": "127.0.0.1:0",
        "ssl_certfile": str(guarded.keys.server[0]),
        "ssl_keyfile": str(guarded.keys.server[1]),
        "username": "scraper",
        "password_file": secret(tmp_path, "scrape-8431-word"),
        "bearer_token_file": secret(tmp_path, "bearer-8431-text"),
    }
    config = written(tmp_path, kafka, topic)
    text = (
        config.read_text() + '\nnetwork = { cell = "rnn", units = 1, memory = 0, readout = false }\nquantiles = [0.5]\n'
    )
    text += "\n".join(["[http]", *(f"{key} = {json.dumps(value)}" for key, value in http.items())])
    config.write_text(text + '\n[log]\nlevel = "debug"\n[streams]\ncapacity = 16\n')
    assert cli.main(["topics", "create", "--config", str(config)]) == 0
    for words in (["check", "--connect"], ["check", "--connect", "--json"], ["check", "--show"]):
        assert cli.main([*words, "--config", str(config)]) == 0
    assert cli.main(["check", "--config", str(config), "--set", "kafka.sasl_password=other-8431-word"]) == 2
    told = capsys.readouterr()
    pages, log = _watch(config, tmp_path / "log", guarded, http)
    texts = [told.out, told.err, log, *pages]
    basic = b64encode(b"scraper:scrape-8431-word").decode()
    tokens = [_token["access_token"] for _token in provider.given]
    assert tokens
    for found in ("8431", basic, *tokens, *(token.split(".")[2] for token in tokens)):
        assert not [text for text in texts if found in text], found


def _watch(config: Path, log: Path, guarded: Guarded, http: Section) -> tuple[list[str], str]:
    """Run the daemon through an outage and a config with mistakes; what it served and what it logged."""
    command = [sys.executable, "-m", "forecaster", "run", "--config", str(config)]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"})
    pages: list[str] = []

    def wait(said: str) -> None:
        deadline = time.monotonic() + 150
        while said not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def look() -> None:
        address = re.search(r"http=\"?(https://[^\"\s]+)/", log.read_text())
        assert address is not None
        context = ssl.create_default_context(cafile=str(guarded.keys.cafile))
        for path in ("/", "/metrics", "/readyz", "/livez", "/metrics?token=bearer", "/etc/passwd"):
            for login in ("Bearer bearer-8431-text", "Bearer wrong"):
                request = urllib.request.Request(address[1] + path, headers={"Authorization": login})
                try:
                    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
                        pages.append(str(answer.headers) + answer.read().decode())
                except urllib.error.HTTPError as refusal:
                    with refusal:
                        pages.append(str(refusal.headers) + refusal.read().decode())

    try:
        wait("running group=")
        look()
        guarded.broker.kill()
        try:
            wait("trying again")
            look()
        finally:
            guarded.broker.start()
        right = config.read_text()
        config.write_text(right.replace("[http]", '[http]\nbearer_token = "false-8431-text"'))
        process.send_signal(signal.SIGHUP)
        wait("config not taken")
        Path(http["password_file"]).unlink()
        config.write_text(right)
        process.send_signal(signal.SIGHUP)
        wait("password_file: cannot read")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    finally:
        process.kill()
        process.wait(10)
    return pages, log.read_text()
