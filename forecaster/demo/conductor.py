"""The demo from its first part to its last: who starts when, who waits for whom, who ends first.

broker starts  |  networks train on the first part of the series  |  their steps are compiled
topics -> the daemon that `run` runs -> the rest is replayed -> a screen of it
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from forecaster.demo import display, samples
from forecaster.demo.board import Board
from forecaster.demo.learn import train
from forecaster.demo.parts import STOP_TIMEOUT_S, Broker, Feeder, Job, Stopped
from forecaster.demo.settings import ABOUT, AHEAD, CONFIG_FILE, write_config
from forecaster.errors import Fatal, ForecasterError
from forecaster.health import Health
from forecaster.kafka import create_topics
from forecaster.kafka.publishing import delete_topics

if TYPE_CHECKING:
    # For its type only: it brings TensorFlow.
    from forecaster.service import Engines

# In time, from each input's beginning: so much is learned from, the rest is replayed.
TRAINED_PART = 0.6
PARTITIONS = 3
DRAW_S = 0.2
READY_TIMEOUT_S = 360.0
# A compilation cannot be interrupted; who pressed Ctrl-C need not wait for its end.
COMPILE_GRACE_S = 5.0


class Demo:
    """The parts, in the order of their beginning; `close` ends them backwards."""

    def __init__(
        self, directory: Path, bootstrap: str | None, stop: threading.Event, show: display.Show, *, kept: bool
    ) -> None:
        self._directory = directory
        self._kept = kept
        self._stop = stop
        self._show = show
        self._steps = display.Steps()
        self._broker = None if bootstrap else Broker(directory / "kafka", self._steps, stop)
        # On a broker of somebody's own: names that nobody else has.
        prefix = f"demo-{uuid.uuid4().hex[:6]}." if bootstrap else ""
        address = bootstrap if self._broker is None else self._broker.bootstrap_servers
        assert address is not None
        self._config = write_config(directory, address, prefix)
        self._topics: list[str] = []
        self._training: Job[Engines] | None = None
        self._service: Job[None] | None = None
        self._service_stop = threading.Event()
        self._feeder: Feeder | None = None
        self._web: list[tuple[str, Health]] = []

    def run(self, speed: float, seconds: float | None) -> None:
        """Get ready, play, sum up."""
        trained, replayed = samples.split(samples.load(), TRAINED_PART)
        if self._broker is not None:
            self._broker.start()
        self._training = Job("training", lambda: train(self._config, trained, self._steps, self._stop))
        self._prepare()
        engines = self._training.result()
        board = Board(self._config.inputs)
        self._service = Job("daemon", lambda: self._serve(board, engines))
        self._await(self._ready)
        self._feeder = Feeder(self._config, samples.replay(replayed), speed)
        self._await(lambda: board.answering)
        self._steps.done("first forecast")
        self._show.preparing(self._steps)
        self._play(board, self._feeder, seconds)

    def close(self) -> bool:
        """End what runs, backwards. Whether something would not end."""
        if self._feeder is not None:
            self._feeder.stop()
        self._service_stop.set()
        left = self._service is not None and not self._service.join(STOP_TIMEOUT_S if self._feeder else COMPILE_GRACE_S)
        if self._broker is None and self._topics:
            self._delete_topics()
        if self._broker is not None:
            self._broker.stop()
        return (self._training is not None and not self._training.join(COMPILE_GRACE_S)) or left

    def _prepare(self) -> None:
        """Until the broker has the topics and the networks are trained."""
        training = self._training
        assert training is not None
        self._await(lambda: self._broker is None or self._broker.started)
        inputs = [topic for each in self._config.inputs for topic in each.topics]
        self._topics = create_topics(self._config.kafka, inputs, PARTITIONS)
        self._await(lambda: not training.running)
        self._steps.tell("first forecast", "joining the group")

    def _serve(self, board: Board, engines: Engines) -> None:
        from forecaster import service  # noqa: PLC0415 - TensorFlow

        service.run(
            self._config,
            self._service_stop,
            observe=board.watch,
            started=lambda url, health: self._web.append((url, health)),
            compiled=lambda *_: engines,
        )

    def _ready(self) -> bool:
        assert self._service is not None
        if not self._service.running:
            self._service.result()
        return bool(self._web) and self._web[0][1].ready

    def _await(self, condition: Callable[[], bool]) -> None:
        """Draw until the condition holds. Raises Stopped where Ctrl-C comes first, and what any part died of."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not condition():
            self._show.preparing(self._steps)
            if self._stop.wait(0.05):
                raise Stopped
            for job in (self._training, self._service):
                if job is not None:
                    job.check()
            if time.monotonic() > deadline_s:
                told = (
                    "; ".join(why for why in self._web[0][1].checks().values() if why) if self._web else "not started"
                )
                raise Fatal(f"the demo did not get ready within {READY_TIMEOUT_S:.0f} s: {told}")
        self._show.preparing(self._steps)

    def _play(self, board: Board, feeder: Feeder, seconds: float | None) -> None:
        """Show it until time, records or patience run out; then the summary."""
        assert self._service is not None
        started_s = time.perf_counter()
        facts = self._facts()
        while not self._stop.is_set():
            elapsed_s = time.perf_counter() - started_s
            snapshot = board.snapshot()
            self._show.running(facts, snapshot, display.Replay(feeder.sent, feeder.total, elapsed_s))
            everything = feeder.done and snapshot.totals.records >= feeder.total
            if seconds is not None and (elapsed_s >= seconds or everything):
                break
            self._service.check()
            self._stop.wait(DRAW_S)
        feeder.stop()
        _settle(board, feeder.sent)
        self._show.say(display.summary_view(board.snapshot(), facts))
        self._show.say(self._steps.time_line())
        self._show.say(
            f"config, models and log: {self._directory}"
            if self._kept
            else "[dim]--directory DIR keeps config, models and log"
        )

    def _facts(self) -> display.Facts:
        kafka = self._config.kafka
        return display.Facts(
            broker=kafka.bootstrap_servers,
            http=self._web[0][0],
            config=str(self._directory / CONFIG_FILE),
            kept=self._kept,
            subscribe=f"kcat -b {kafka.bootstrap_servers} -t {kafka.signal_topic}",
            about=ABOUT,
            ahead=AHEAD,
        )

    def _delete_topics(self) -> None:
        try:
            delete_topics(self._config.kafka, self._topics)
        except ForecasterError as error:
            self._show.say(
                f"left behind on {self._config.kafka.bootstrap_servers}: {', '.join(self._topics)} ({error})"
            )


def _settle(board: Board, sent: int) -> None:
    """Let the daemon answer what was sent: it is counted before the summary."""
    deadline_s = time.monotonic() + 5.0
    while board.snapshot().totals.records < sent and time.monotonic() < deadline_s:
        time.sleep(0.02)
