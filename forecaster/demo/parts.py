"""The demo's threads: the embedded broker, the replay, and whatever else takes long while the main thread draws."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from forecaster.config import Config
from forecaster.demo.display import Steps
from forecaster.demo.samples import Planned
from forecaster.devkafka import DevKafka
from forecaster.kafka.publishing import Publisher
from forecaster.records import Output

# A batch for each tick of the replay: 20 ms is below what anybody would notice.
TICK_S = 0.02
# The broker's own limit for a controlled shutdown is 20 s; a second is usual.
STOP_TIMEOUT_S = 30.0

T = TypeVar("T")


class Stopped(Exception):
    """Ctrl-C, on the way out of something long."""


class Job(Generic[T]):
    """A thread with a result. A daemon thread: what cannot be interrupted must not hold the exit."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self._work = work
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Not yet done."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Whether it is done by then."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise what it died of."""
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """What it returned, or raise what it died of. Only when it is done."""
        self.check()
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again where check() is called
            self._error = error


class Broker:
    """The embedded Kafka, in a thread of its own from start to stop.

    One thread: the JVM is told to end when the thread that started it does (PR_SET_PDEATHSIG).
    """

    def __init__(self, directory: Path, steps: Steps, stop: threading.Event) -> None:
        self._steps = steps
        self._stop = stop
        self._kafka = DevKafka(directory, progress=self._fetched)
        self._started = threading.Event()
        self._finish = threading.Event()
        self._job: Job[None] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """host:port, known before it runs."""
        return self._kafka.bootstrap_servers

    @property
    def started(self) -> bool:
        """Whether it serves. Raises what it died of."""
        if self._job is not None:
            self._job.check()
        return self._started.is_set()

    def start(self) -> None:
        """Return at once; see `started`."""
        self._steps.tell("broker", "starting Apache Kafka")
        self._job = Job("broker", self._live)

    def stop(self) -> None:
        """Return when the JVM is gone."""
        self._finish.set()
        if self._job is not None:
            self._job.join(STOP_TIMEOUT_S)

    def _live(self) -> None:
        with self._kafka:
            self._steps.done("broker", f"Apache Kafka on {self.bootstrap_servers}")
            self._started.set()
            self._finish.wait()

    def _fetched(self, done: int, of: int) -> None:
        if self._stop.is_set():
            raise Stopped
        self._steps.tell("broker", f"fetching Apache Kafka, {done / 1e6:.0f} of {of / 1e6:.0f} MB", done / of)


class Feeder:
    """Plays records into the topics at a pace; a thread of its own."""

    def __init__(self, config: Config, planned: list[Planned], speed: float) -> None:
        self.sent = 0
        self.total = len(planned)
        self._config = config
        self._topics = {each.name: each.topics[0] for each in config.inputs}
        self._planned = planned
        self._seconds = len(planned) / speed
        self._stop = threading.Event()
        self._job = Job("replay", self._run)

    @property
    def done(self) -> bool:
        """Whether every record is in its topic. Raises what it died of."""
        self._job.check()
        return self.sent == self.total

    def stop(self) -> None:
        """Return when it is."""
        self._stop.set()
        self._job.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        with contextlib.closing(Publisher(self._config.kafka)) as publisher:
            started_s = time.perf_counter()
            while self.sent < self.total and not self._stop.wait(TICK_S):
                part = (time.perf_counter() - started_s) / self._seconds
                self._send(publisher, part)

    def _send(self, publisher: Publisher, part: float) -> None:
        end = self.sent
        while end < self.total and self._planned[end].due <= part:
            end += 1
        due = [
            Output(self._topics[each.input], None, each.stream.encode(), each.value, [])
            for each in self._planned[self.sent : end]
        ]
        if due:
            # Not tried again: a broker that is away ends the demo, and a record sent twice would be a dead letter.
            publisher.publish(due)
            self.sent = end
