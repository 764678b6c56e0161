"""The daemon's end of its learners: what is committed goes over, and nobody waits for it; the process is kept alive.

A batch is handed over by reference, and dropped when the queue is full; a thread numbers the streams and writes to the
pipe. A learner that ends is started again after a growing wait. When the daemon ends, in whatever way, the pipe does,
and the learner with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.config import Config
from forecaster.learner import wire
from forecaster.learner.recent import Batch
from forecaster.log import event
from forecaster.metrics import Metrics
from forecaster.outcome import Outcome

log = logging.getLogger(__name__)

QUEUE_BATCHES = 64
BACK_OFF_MIN_S, BACK_OFF_MAX_S = 1.0, 300.0
# A life of so long is no sign that the next one will be short.
LONG_LIFE_S = 120.0
POLL_S = 0.2
LEAVE_S = 1.0


class _Answered(NamedTuple):
    streams: Sequence[str]
    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float32]


class Feed:
    """One input's learner: a process, and a thread that feeds it. Alive between `with` and its end.

    Args:
        config: all of it.
        name: the input.
        metrics: what the learner tells.
    """

    def __init__(self, config: Config, name: str, metrics: Metrics) -> None:
        self._task = wire.Task(config, name)
        self._name = name
        self._metrics = metrics
        self._queue: queue.Queue[_Answered] = queue.Queue(QUEUE_BATCHES)
        self._stop = threading.Event()
        self._slots: dict[str, int] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_alive, name=f"learner-{name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive() and self._process is not None:
            self._process.kill()  # it does not read, so the thread sits in a write
        self._thread.join(LEAVE_S)

    @property
    def pid(self) -> int | None:
        """Of the process at hand."""
        return None if self._process is None else self._process.pid

    def put(self, outcome: Outcome) -> None:
        """Hand over what was committed; never waits."""
        if not outcome.streams:
            return
        answered = _Answered(outcome.streams, outcome.time_s, outcome.values, outcome.features)
        try:
            self._queue.put_nowait(answered)
        except queue.Full:
            self._metrics.count_unlearned(self._name, len(outcome.streams))

    # ------------------------------------------------------------------ the thread

    def _keep_alive(self) -> None:
        failures = 0
        while not self._stop.is_set():
            started_s = time.monotonic()
            with self._running() as process:
                self._serve(process)
            if self._stop.is_set():
                return
            failures = 1 if time.monotonic() - started_s > LONG_LIFE_S else failures + 1
            wait_s = min(BACK_OFF_MAX_S, BACK_OFF_MIN_S * 2.0 ** min(failures - 1, 20))
            self._metrics.count_learner_restart(self._name)
            event(
                log,
                "learner ended, starting another",
                level=logging.WARNING,
                input=self._name,
                code=process.returncode,
                wait_s=wait_s,
            )
            self._stop.wait(wait_s)

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process, which is gone at the end."""
        # What one process was told of streams, the next one does not know.
        self._slots.clear()
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "forecaster.learner"]
        process = subprocess.Popen(  # noqa: S603 - this program itself
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._process = process
        listener = threading.Thread(target=self._listen, args=(process,), name="learner-says", daemon=True)
        listener.start()
        try:
            yield process
        finally:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            listener.join(LEAVE_S)

    def _serve(self, process: subprocess.Popen[bytes]) -> None:
        """Feed it until it ends, or we do."""
        assert process.stdin is not None
        try:
            wire.write_frame(process.stdin, wire.encode_task(self._task))
            while not self._stop.is_set() and process.poll() is None:
                try:
                    answered = self._queue.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                batch = self._numbered(answered)
                if len(batch.slots):
                    wire.write_frame(process.stdin, wire.encode_batch(batch))
        except OSError:
            return  # it has ended: whoever waits for it sees how

    def _numbered(self, answered: _Answered) -> Batch:
        """The records of streams that the learner follows."""
        slots, streams_max = self._slots, self._task.config.learning.streams_max
        for stream in answered.streams:
            if len(slots) >= streams_max:
                break
            slots.setdefault(stream, len(slots))
        numbers = np.array([slots.get(stream, -1) for stream in answered.streams], np.int32)
        kept = np.flatnonzero(numbers >= 0)
        return Batch(numbers[kept], answered.time_s[kept], answered.values[kept], answered.features[kept])

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                try:
                    self._hear(wire.decode_message(line))
                except msgspec.DecodeError as error:
                    event(log, "learner said what nobody understands", level=logging.WARNING, why=error)

    def _hear(self, message: wire.Message) -> None:
        name, metrics = self._name, self._metrics
        match message:
            case wire.Trained():
                metrics.set_training(name, loss=message.loss, norm=message.norm)
                metrics.count_clipped(name, message.clipped)
            case wire.Judged():
                metrics.count_swaps(message.outcome, 1)
                event(log, f"challenger {message.outcome.value}", input=name, version=message.version, why=message.text)
            case wire.Dropped():
                metrics.count_unlearned(name, message.records)
            case wire.Said():
                level = logging.getLevelNamesMapping()[message.level.upper()]
                event(log, "learner", level=level, input=name, says=message.text)
