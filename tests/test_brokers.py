"""Which Kafka the tests run on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from brokers import CHOICE, NoContainer, open_broker


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Docker."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")


def test_without_an_engine_the_broker_is_embedded(
    no_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The session says why it runs no container, and its Kafka answers."""
    monkeypatch.delenv(CHOICE, raising=False)
    with open_broker(tmp_path) as broker:
        assert broker.told == "embedded 4.1.1 (no Docker engine answers)"
        host, port = broker.bootstrap_servers.split(":")
        socket.create_connection((host, int(port)), timeout=5).close()


def test_a_container_that_was_asked_for_is_not_replaced(
    no_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`docker` and no engine ends the session."""
    monkeypatch.setenv(CHOICE, "docker")
    with pytest.raises(NoContainer, match="no Docker engine answers"), open_broker(tmp_path):
        pass


def test_a_broker_of_ones_own_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """host:port starts nothing."""
    monkeypatch.setenv(CHOICE, "kafka.example:9092")
    with open_broker(tmp_path) as broker:
        assert broker.bootstrap_servers == "kafka.example:9092"


def test_another_word_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped choice names what it could be."""
    monkeypatch.setenv(CHOICE, "dokcer")
    with pytest.raises(ValueError, match="expected auto, docker, embedded or host:port, got 'dokcer'"):
        open_broker(tmp_path).__enter__()
