"""How the daemon is told to stop.

Python runs a signal's handler on the main thread and between two lines of Python, and
a compile keeps that thread in C++ for many seconds. So the handlers do nothing: the
interpreter also writes each signal's number to a pipe, at once, and a thread reads it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set `stop`; a second one ends the process at once. Call it on the main thread, once."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in STOP_SIGNALS:
        signal.signal(number, _nothing)
    threading.Thread(target=_listen, args=(reading, stop), name="stop-signals", daemon=True).start()


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Instead of what Python or the system would do."""


def _listen(reading: int, stop: threading.Event) -> None:
    while True:
        for number in os.read(reading, 64):
            if number not in STOP_SIGNALS:
                continue
            if stop.is_set():
                os._exit(128 + number)
            stop.set()
