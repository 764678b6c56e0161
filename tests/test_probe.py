"""`forecaster probe`, against a real HTTP server of the daemon's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from forecaster.cli import main
from forecaster.config import HttpConfig
from forecaster.health import Health
from forecaster.web import WebServer

CONFIG = """
[http]
listen = "{listen}"

[[inputs]]
name = "ticks"
topics = ["ticks"]
"""


@pytest.fixture
def health() -> Health:
    """A daemon's."""
    return Health(["broker"], stall_s=1_000.0)


@pytest.fixture
def config(health: Health, tmp_path: Path) -> Iterator[str]:
    """The config of a daemon that listens on every address."""
    path = tmp_path / "config.toml"
    with WebServer(HttpConfig(listen="127.0.0.1:0"), health, lambda _: (b"", "text/plain")) as server:
        path.write_text(CONFIG.format(listen=f"0.0.0.0:{server.address.port}"))
        yield str(path)


def test_probe_tells_alive_from_ready(health: Health, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A daemon that waits for its broker lives, and is not ready: one line, exit 0 and 1."""
    health.fail("broker", "no broker answers")
    assert (main(["probe", "livez", "--config", config]), capsys.readouterr().out) == (0, "running\n")
    assert (main(["probe", "readyz", "--config", config]), capsys.readouterr().out) == (
        1,
        "broker: no broker answers\n",
    )
    health.ok("broker")
    assert (main(["probe", "readyz", "--config", config]), capsys.readouterr().out) == (0, "ready\n")


def test_probe_of_a_locked_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over TLS and without a login it learns the status, which is what it is for."""
    leaf = trustme.CA().issue_cert("elsewhere.test")
    files = {name: tmp_path / name for name in ("certificate", "key", "token")}
    leaf.cert_chain_pems[0].write_to_path(str(files["certificate"]))
    leaf.private_key_pem.write_to_path(str(files["key"]))
    files["token"].write_text("token-8431-text")
    names = ("ssl_certfile", "ssl_keyfile", "bearer_token_file")
    locked = dict(zip(names, map(str, files.values()), strict=True))
    health = Health(["broker"], stall_s=1_000.0)
    with WebServer(HttpConfig(listen="127.0.0.1:0", **locked), health, lambda _: (b"", "text/plain")) as server:
        flags = [word for name, path in locked.items() for word in ("--set", f"http.{name}={path}")]
        path = tmp_path / "config.toml"
        path.write_text(CONFIG.format(listen=f"127.0.0.1:{server.address.port}"))
        probe = ["--config", str(path), *flags]
        assert (main(["probe", "livez", *probe]), capsys.readouterr().out) == (0, "alive\n")
        assert (main(["probe", "readyz", *probe]), capsys.readouterr().out) == (1, "not ready\n")


def test_probe_of_nobody_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No daemon, no traceback."""
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.format(listen="127.0.0.1:1"))
    assert main(["probe", "livez", "--config", str(path)]) == 1
    told = capsys.readouterr().err
    assert told == "forecaster: no answer from http://127.0.0.1:1/livez: [Errno 111] Connection refused\n"
