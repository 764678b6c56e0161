"""Daemons as processes: started, killed, paused and restarted as a supervisor and bad luck would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

EXIT_TIMEOUT_S = 40.0
TAIL_LINES = 40


class DaemonProcess:
    """One instance, over all its lives: `python -m forecaster run` with its log in a file.

    Args:
        config: the daemon's file.
        instance: its [kafka] instance, the same in each life.
        directory: where its log goes.
    """

    def __init__(self, config: Path, instance: str, directory: Path) -> None:
        self.instance = instance
        self.log_path = directory / f"{instance}.log"
        self.exits: list[tuple[int, str]] = []  # code and last line of the lives that ended by themselves
        sets = ("--set", f"kafka.instance={instance}")
        self._command = [sys.executable, "-m", "forecaster", "run", "--config", str(config), *sets]
        self._environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._process: subprocess.Popen[bytes] | None = None
        self._life_begins = 0

    @property
    def running(self) -> bool:
        """Is there a process?"""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process at hand."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """A new life."""
        assert not self.running
        with self.log_path.open("ab") as log:
            self._life_begins = log.tell()
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment)

    def kill(self) -> None:
        """SIGKILL; also ends a paused process."""
        self._signal(signal.SIGKILL)
        self._reap(EXIT_TIMEOUT_S)

    def kill_if_running(self) -> None:
        """At the end of a test, whatever became of it."""
        if self._process is not None:
            self.kill()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        self._signal(signal.SIGTERM)
        return self._reap(EXIT_TIMEOUT_S)

    def leave(self) -> None:
        """SIGTERM; another exit than 0 goes with those that ended by themselves."""
        code = self.terminate()
        # Before the daemon has said how it wants to be told, a signal does what it does to any process.
        if code not in (0, -signal.SIGTERM):
            self.exits.append((code, (self.tail(1) or [""])[-1]))

    def pause(self) -> None:
        """SIGSTOP."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def wait(self, timeout_s: float) -> int:
        """The exit code once it has ended by itself."""
        return self._reap(timeout_s)

    def revive(self) -> bool:
        """What a supervisor does: start it again where it has ended by itself. True if it had."""
        if self._process is None or self._process.poll() is None:
            return False
        self.exits.append((self._process.returncode, (self.tail(1) or [""])[-1]))
        self.start()
        return True

    def log_of_life(self) -> str:
        """What this life has logged."""
        with self.log_path.open("rb") as log:
            log.seek(self._life_begins)
            return log.read().decode(errors="replace")

    def await_line(self, text: str, timeout_s: float, times: int = 1) -> None:
        """Return when this life has logged `text` so often."""
        deadline = time.monotonic() + timeout_s
        while self.log_of_life().count(text) < times:
            ended = not self.running
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else "did not"
                tail = "\n".join(self.tail(TAIL_LINES))
                raise AssertionError(f"{self.instance} {why} before it logged {text!r}:\n{tail}")
            time.sleep(0.05)

    def tail(self, lines: int) -> list[str]:
        """The last lines of its log."""
        if not self.log_path.exists():
            return []
        with self.log_path.open(errors="replace") as log:
            return [line.rstrip() for line in deque(log, lines)]

    def count_lines(self, text: str) -> int:
        """How many lines of all its lives have this text."""
        if not self.log_path.exists():
            return 0
        with self.log_path.open(errors="replace") as log:
            return sum(text in line for line in log)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _reap(self, timeout_s: float) -> int:
        assert self._process is not None
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout_s)
            tail = "\n".join(self.tail(TAIL_LINES))
            raise AssertionError(f"{self.instance} did not end within {timeout_s:g} s:\n{tail}") from None
        self._process = None
        return code
