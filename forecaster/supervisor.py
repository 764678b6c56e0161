"""What systemd is told, by the sd_notify protocol: ready, why not, still turning, stopping.

One datagram of `NAME=value` lines to the socket in $NOTIFY_SOCKET; without that variable nothing happens here.
A thread of its own speaks, so that a long poll does not delay a word; but WATCHDOG=1 follows the loop and not
this thread: it goes out when the loop has turned since the last one, or sits in a wait that it declared and whose
limit has not passed. A loop that hangs is killed although this thread lives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from forecaster.health import Health

# While it starts, each honest wait asks for this much more: a broker may be away for longer than TimeoutStartSec.
EXTEND_START_S = 30.0
TICK_MAX_S = 1.0
# systemd advises half of the interval; a quarter leaves room for a busy machine.
FEEDS_IN_INTERVAL = 4
STOP_TIMEOUT_S = 3.0
STATUS_CHARACTERS_MAX = 500


class Supervisor:
    """Tells systemd how `health` is, from `with` to its end, and STOPPING=1 as soon as `stop` is set.

    Args:
        health: what is told.
        stop: the daemon's own.
        environment: NOTIFY_SOCKET, WATCHDOG_USEC, WATCHDOG_PID as systemd sets them.
    """

    def __init__(self, health: Health, stop: threading.Event, environment: Mapping[str, str] = os.environ) -> None:
        self._health = health
        self._stop = stop
        self._address = _address(environment.get("NOTIFY_SOCKET", ""))
        self._watchdog_s = _watchdog_s(environment)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._speak, name="supervisor", daemon=True)
        self._ended = threading.Event()
        self._ready = self._stopping = False
        self._status = ""
        self._fed_s = float("-inf")

    def __enter__(self) -> Self:
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            # A supervisor that does not read must not hold the daemon up.
            self._socket.settimeout(0.0)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._socket is not None:
            self._ended.set()
            self._thread.join(STOP_TIMEOUT_S)
            self._tell_stopping()
            self._socket.close()

    def _speak(self) -> None:
        tick_s = TICK_MAX_S
        if self._watchdog_s:
            tick_s = min(tick_s, self._watchdog_s / FEEDS_IN_INTERVAL)
        while not self._ended.is_set():
            if self._stop.is_set():
                self._tell_stopping()
            else:
                self._tell_state()
            self._feed()
            self._ended.wait(tick_s)

    def _tell_stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._send("STOPPING=1", "STATUS=draining")

    def _tell_state(self) -> None:
        failing = {name: why for name, why in self._health.checks().items() if why}
        told = [self._health.doing, *(f"{name}: {why}" for name, why in failing.items())]
        # One line, whatever a broker said.
        status = " ".join("; ".join(told).split())[:STATUS_CHARACTERS_MAX]
        lines = []
        if not failing and not self._ready:
            self._ready = True
            lines.append("READY=1")
        if not self._ready and self._health.stalled() is None:
            lines.append(f"EXTEND_TIMEOUT_USEC={EXTEND_START_S * 1e6:.0f}")
        if status != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        if lines:
            self._send(*lines)

    def _feed(self) -> None:
        turned_s = self._health.turned_s
        if self._watchdog_s and turned_s > self._fed_s:
            self._fed_s = turned_s
            self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        assert self._socket is not None
        # Nobody listens any more, or the queue is full: no reason to stop forecasting, and there is nobody to tell.
        with contextlib.suppress(OSError):
            self._socket.sendto("\n".join(lines).encode(), self._address)


def _address(text: str) -> str:
    """A path, or a name in the abstract namespace ("@name"); "" for all else."""
    if text.startswith("@"):
        return f"\0{text[1:]}"
    return text if text.startswith("/") else ""


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """The interval in which systemd wants to hear of progress; None where it does not, or from another process."""
    pid, microseconds = environment.get("WATCHDOG_PID", ""), environment.get("WATCHDOG_USEC", "")
    if pid not in {"", str(os.getpid())} or not microseconds.isdecimal():
        return None
    return int(microseconds) / 1e6 or None
