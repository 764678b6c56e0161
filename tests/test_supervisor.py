"""What systemd hears, on a real datagram socket."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forecaster.health import Health
from forecaster.supervisor import Supervisor

# The watchdog's interval in these tests: fed four times as often.
INTERVAL_S = 0.2


class Manager:
    """The other end: it keeps every line that it was sent."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(0.05)
        self.lines: list[str] = []

    def until(self, line: str, timeout_s: float = 10.0) -> None:
        """Read on until this line comes."""
        deadline_s = time.monotonic() + timeout_s
        while line not in self.read():
            assert time.monotonic() < deadline_s, (line, self.lines)

    def read(self) -> list[str]:
        """What came by now; those before it are in `lines`."""
        new: list[str] = []
        try:
            while True:
                new += self.socket.recv(4096).decode().split("\n")
        except TimeoutError:
            self.lines += new
            return new


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Manager, dict[str, str]]]:
    """A supervisor's socket, by a path and in the abstract namespace, and the environment that it makes."""
    name = f"forecaster-test-{os.getpid()}-{tmp_path.name}"
    told, address = (f"@{name}", f"\0{name}") if request.param == "abstract" else (str(tmp_path / "s"),) * 2
    manager = Manager(address)
    yield manager, {"NOTIFY_SOCKET": told}
    manager.socket.close()


def watchdog(environment: dict[str, str], pid: int | None = None) -> dict[str, str]:
    """With WatchdogSec=."""
    return environment | {"WATCHDOG_USEC": f"{INTERVAL_S * 1e6:.0f}", "WATCHDOG_PID": str(pid or os.getpid())}


def test_ready_is_told_once_and_only_when_every_check_passes(manager: tuple[Manager, dict[str, str]]) -> None:
    """Until then systemd hears what is missing, and is asked for more time."""
    systemd, environment = manager
    health, stop = Health(["broker"]), threading.Event()
    with Supervisor(health, stop, watchdog(environment)):
        systemd.until("STATUS=running; broker: not yet")
        health.fail("broker", "no broker answers\nat kafka:9092")
        systemd.until("STATUS=running; broker: no broker answers at kafka:9092")
        assert "EXTEND_TIMEOUT_USEC=30000000" in systemd.lines
        assert "READY=1" not in systemd.lines
        health.ok("broker")
        systemd.until("STATUS=running")
        health.fail("broker", "away")
        systemd.until("STATUS=running; broker: away")
        health.ok("broker")
        systemd.until("STATUS=running")
        assert systemd.lines.count("READY=1") == 1


def test_the_watchdog_is_fed_by_the_loop(manager: tuple[Manager, dict[str, str]]) -> None:
    """A loop that turns feeds it; one that hangs does not, however well the telling thread is."""
    systemd, environment = manager
    health, stop = Health(), threading.Event()
    with Supervisor(health, stop, watchdog(environment)):
        systemd.until("WATCHDOG=1")
        health.progress()
        systemd.until("WATCHDOG=1")
        time.sleep(INTERVAL_S)
        systemd.read()
        time.sleep(3 * INTERVAL_S)
        assert systemd.read() == []
        health.progress()
        systemd.until("WATCHDOG=1")


def test_a_declared_wait_feeds_the_watchdog_until_its_limit(manager: tuple[Manager, dict[str, str]]) -> None:
    """A compile is no hang; one that takes longer than it may is."""
    systemd, environment = manager
    now_s = [0.0]
    health, stop = Health(clock=lambda: now_s[0]), threading.Event()
    with Supervisor(health, stop, watchdog(environment)), health.waiting("compiling", 600.0):
        systemd.until("STATUS=compiling")
        for seconds in (1.0, 599.0):
            now_s[0] = seconds
            systemd.until("WATCHDOG=1")
        now_s[0] = 601.0
        time.sleep(INTERVAL_S)
        systemd.read()
        time.sleep(2 * INTERVAL_S)
        assert "WATCHDOG=1" not in systemd.read()


def test_stopping_is_told_when_the_drain_begins(manager: tuple[Manager, dict[str, str]]) -> None:
    """And once, also where the daemon ends before anybody asked it to."""
    systemd, environment = manager
    stop = threading.Event()
    with Supervisor(Health(), stop, watchdog(environment)):
        systemd.until("READY=1")
        stop.set()
        systemd.until("STOPPING=1")
    with Supervisor(Health(), threading.Event(), environment):
        systemd.until("READY=1")
    systemd.until("STOPPING=1")
    assert systemd.lines.count("STOPPING=1") == 2


def test_another_process_s_watchdog_is_not_fed(manager: tuple[Manager, dict[str, str]]) -> None:
    """WATCHDOG_PID names who is meant."""
    systemd, environment = manager
    with Supervisor(Health(), threading.Event(), watchdog(environment, pid=1)):
        systemd.until("READY=1")
        time.sleep(2 * INTERVAL_S)
    systemd.read()
    assert "WATCHDOG=1" not in systemd.lines


def test_without_systemd_nothing_runs() -> None:
    """No variable, no thread."""
    with Supervisor(Health(), threading.Event(), {}):
        assert "supervisor" not in {thread.name for thread in threading.enumerate()}


def test_a_supervisor_that_has_gone_harms_nothing(tmp_path: Path) -> None:
    """Nobody at the socket: the daemon runs on."""
    health = Health()
    with Supervisor(health, threading.Event(), watchdog({"NOTIFY_SOCKET": str(tmp_path / "gone")})):
        time.sleep(INTERVAL_S)
        health.progress()
        assert "supervisor" in {thread.name for thread in threading.enumerate()}
