"""The daemon under a supervisor that speaks sd_notify, on a real Kafka."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import Broker, NewTopics
from running import PARTITIONS, START_MAX_S, Group

pytestmark = pytest.mark.timeout(300)


def test_systemd_hears_of_the_whole_life(
    kafka: Broker, new_topic: NewTopics, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY=1 with the first assignment and not before, WATCHDOG=1 while it idles, STOPPING=1 and exit 0 at SIGTERM."""
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    heard: list[str] = []
    daemon = Group(kafka, tmp_path, new_topic("ticks", PARTITIONS), group)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(1.0)
        with daemon.running() as process:
            deadline_s = time.monotonic() + START_MAX_S
            while "READY=1" not in heard or heard[-1] != "WATCHDOG=1":
                assert process.poll() is None
                assert time.monotonic() < deadline_s, heard
                heard += receive(manager)
            assert "STATUS=compiling; assignment: not yet; restore: not yet" in heard
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        rest = receive(manager)
        while new := receive(manager):
            rest += new
        assert rest.count("STOPPING=1") == 1


def receive(manager: socket.socket) -> list[str]:
    """One datagram's lines, or none within its timeout."""
    try:
        return manager.recv(4096).decode().split("\n")
    except TimeoutError:
        return []
