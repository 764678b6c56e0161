"""`forecaster demo`: a real Kafka, real series, the daemon, live in this terminal.

Nothing of it is a mock-up: what is shown is what the daemon commits. The broker, the
training, the daemon and the replay have a thread each; the main thread draws, so that
Ctrl-C is heard at any moment. Importing this package loads none of that.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# 13,460 records in a minute and a half: 12 a second for each stock, 86 for the sensor.
SPEED = 150.0
SECONDS_UNATTENDED = 60.0
LOG_FILE = "daemon.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's flags."""
    parser.description = (
        "Starts a real Kafka, trains on the first part of real series (stock closes, a sea's temperature, the "
        "unemployment rate), plays the rest through its topics, and shows what the daemon makes of it."
    )
    parser.add_argument("--seconds", type=_positive, metavar="S", help="of replay, then a summary (unattended: 60)")
    parser.add_argument("--speed", type=_positive, default=SPEED, metavar="N", help="records per second (%(default)g)")
    parser.add_argument("--bootstrap", metavar="HOST:PORT", help="a Kafka of yours; its topics go when the demo ends")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="keep config, models and log here")


def run(arguments: argparse.Namespace) -> int:
    """The demo, from nothing to nothing: what it started is gone when it returns.

    Raises:
        Fatal: one line that says what to mend.
    """
    from rich.console import Console  # noqa: PLC0415 - not for --help

    from forecaster.demo import display  # noqa: PLC0415
    from forecaster.demo.conductor import Demo  # noqa: PLC0415
    from forecaster.demo.parts import Stopped  # noqa: PLC0415

    stop = threading.Event()
    console = Console(highlight=False)
    show: display.Show = display.Screen(console) if console.is_terminal else display.Lines(console)
    seconds = arguments.seconds or (None if console.is_terminal else SECONDS_UNATTENDED)
    left = False
    with _stopping(stop), _directory(arguments.directory) as directory, _logging(directory):
        demo = Demo(directory, arguments.bootstrap, stop, show, kept=arguments.directory is not None)
        try:
            with show:
                demo.run(arguments.speed, seconds)
        except Stopped:
            show.say("stopped before the first forecast")
        finally:
            left = demo.close()
    if left:
        # Threads inside a compilation: the interpreter's own exit would pull TensorFlow out from under them.
        sys.stdout.flush()
        os._exit(0)
    return 0


@contextlib.contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`; a second one ends the process at once, and the broker with it."""

    def handle(number: int, _: FrameType | None) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _directory(wanted: Path | None) -> Iterator[Path]:
    """The one that was asked for, kept; else one that goes when the demo ends."""
    if wanted is None:
        with tempfile.TemporaryDirectory(prefix="forecaster-demo-", ignore_cleanup_errors=True) as name:
            yield Path(name)
        return
    try:
        wanted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        from forecaster.errors import Fatal  # noqa: PLC0415

        raise Fatal(f"--directory {wanted}: {error.strerror}") from None
    yield wanted.resolve()


@contextlib.contextmanager
def _logging(directory: Path) -> Iterator[None]:
    """The daemon's log goes to a file: the terminal belongs to the screen."""
    from forecaster import log  # noqa: PLC0415

    with (directory / LOG_FILE).open("a", encoding="utf-8") as stream:
        log.configure(stream=stream)
        try:
            yield
        finally:
            log.configure()


def _positive(text: str) -> float:
    number = float(text)
    if not 0.0 < number < float("inf"):
        raise ValueError
    return number


_positive.__name__ = "positive number"  # argparse: "invalid positive number value: '0'"
