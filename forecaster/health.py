"""Whether the daemon is ready for work, and whether its loop still turns.

Two questions with two consequences. Not ready: nobody is sent here, and the
answer names what is missing. Not alive: a supervisor kills the process. So a
restore, a rebalance or a broker that is away makes the daemon unready and leaves
it alive: each of them is a wait with a limit of its own.

The worker writes, the HTTP server and the metrics read, from other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

LOOP = "loop"


class _Wait(NamedTuple):
    why: str
    until_s: float


class Health:
    """Named checks for readiness, and the loop's progress for liveness.

    Args:
        checks: names that must each be `ok` before the daemon is ready; until
            they are first heard of they fail with "not yet".
        stall_s: seconds without progress, outside any declared wait, after
            which the loop counts as stuck. Above the longest honest poll.
        clock: seconds that only grow.
    """

    def __init__(
        self, checks: Iterable[str] = (), *, stall_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lock = threading.Lock()
        self._checks: dict[str, str | None] = dict.fromkeys(checks, "not yet")
        self._stall_s = stall_s
        self._clock = clock
        self._progressed_s = clock()
        self._wait: _Wait | None = None

    def fail(self, check: str, why: str) -> None:
        """Not ready, and `why` in one line: `"restore", "ticks/3: 40 % of 12,000 rows"`."""
        with self._lock:
            self._checks[check] = why

    def ok(self, check: str) -> None:
        """This check passes."""
        with self._lock:
            self._checks[check] = None

    def progress(self) -> None:
        """The loop has turned once."""
        self._progressed_s = self._clock()

    @contextmanager
    def waiting(self, why: str, limit_s: float) -> Iterator[None]:
        """A wait that is as it should be, for `limit_s` seconds at most: a compile, a back-off, a restore."""
        outer = self._wait
        self._wait = _Wait(why, self._clock() + limit_s)
        try:
            yield
        finally:
            self._wait = outer
            self.progress()

    @property
    def turned_s(self) -> float:
        """When the loop last turned, by the clock; now, while it is in a declared wait within its limit."""
        now, wait = self._clock(), self._wait
        return now if wait is not None and now <= wait.until_s else self._progressed_s

    @property
    def doing(self) -> str:
        """What the loop waits for, or that it runs."""
        wait = self._wait
        return wait.why if wait else "running"

    def stalled(self) -> str | None:
        """Why the process should be killed, or None while it is alive."""
        now, wait, progressed_s = self._clock(), self._wait, self._progressed_s
        if now - progressed_s <= self._stall_s or (wait is not None and now <= wait.until_s):
            return None
        return f"no progress for {now - progressed_s:.0f} s" + (f", {wait.why}" if wait else "")

    def checks(self) -> dict[str, str | None]:
        """Every check with why it fails, None where it passes; the loop's own progress is one of them."""
        with self._lock:
            checks = dict(self._checks)
        # A stuck loop cannot report itself, so that it is looked at from here.
        checks[LOOP] = self.stalled() or checks.get(LOOP)
        return checks

    @property
    def ready(self) -> bool:
        """Whether every check passes."""
        return not any(self.checks().values())
