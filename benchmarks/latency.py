"""How soon: from a record's send to the receipt of its forecast by a read_committed reader, exactly once.

Records are sent at a steady pace by one client and received by another, both of another
author; the clock is one process's. Percentiles are of each round, then the median round.

    python benchmarks/latency.py --burst 10    # then so many times the rate for a while
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import common
import numpy as np
import psutil
from common import Daemon
from confluent_kafka import KafkaError, Message, Producer

STREAMS = 1_000
P99_MAX_MS = 50.0
# The first transactions find cold caches on both sides.
WARM_UP_S = 5.0
# Until the first answer, or the daemon would have its start to catch up with.
FIRST_RATE_MAX = 500
LINGER_RATE_MIN = 5_000
BURST_S = 10.0
AFTER_BURST_S = 30.0

Record = tuple[int, int] | tuple[bytes, int]
"""Where it is, partition and offset; or what it says, stream and time."""
Received = tuple[float, list[tuple[float, Record]]]


class Pace:
    """Sends one record each `1 / rate` seconds, and remembers when. The rate may be changed."""

    def __init__(self, bootstrap: str, topic: str, rate: int) -> None:
        # At a high rate a request for each record would be most of what the broker does.
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0 if rate <= LINGER_RATE_MIN else 5})
        self._topic = topic
        self._full_rate = rate
        self.rate = min(FIRST_RATE_MAX, rate)
        self._stop = threading.Event()
        self.sent_s: dict[Record, float] = {}  # as the broker acknowledged them
        self.late_s = 0.0
        self._thread = threading.Thread(target=self._run, name="pace", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Go on at the full rate."""
        self.rate = self._full_rate

    def stop(self) -> None:
        """Return when all of it is at the broker."""
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        due_s, number = time.perf_counter(), 0
        while not self._stop.is_set():
            due_s += 1 / self.rate
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                time.sleep(wait_s)
            self.late_s = max(self.late_s, -wait_s)
            stream = b"stream-%d" % (number % STREAMS)
            time_us = 1_700_000_000_000_000 + number // STREAMS * 1_000_000
            value = common.tick(100.0 + number % 7, time_us)
            self._producer.produce(
                self._topic, value, stream, on_delivery=partial(self._delivered, time.perf_counter(), (stream, time_us))
            )
            self._producer.poll(0)
            number += 1
        self._producer.flush(30)

    def _delivered(self, sent_s: float, said: Record, error: KafkaError | None, message: Message) -> None:
        assert error is None, error
        self.sent_s[said] = self.sent_s[message.partition(), message.offset()] = sent_s


def main() -> int:
    """Print the table; 1 where the goal is missed."""
    parser = common.arguments(__doc__.partition("\n")[0], rate=500, seconds=20, rounds=3, burst=0)
    chosen = parser.parse_args()
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        topic = common.unique("paced")
        common.create_topics(bootstrap, topic)
        daemon = Daemon(directory, bootstrap, topic, chosen.overrides)
        with daemon.running() as running:
            consumer = common.reader(bootstrap, daemon.forecasts)
            pace = Pace(bootstrap, topic, chosen.rate)
            batches = common.messages(consumer, running)
            received = receive(batches, chosen.seconds * chosen.rounds, begun=pace.begin)
            burst = _burst(batches, pace, running, chosen.burst) if chosen.burst else None
            pace.stop()
            consumer.close()
    return _report(latencies(received, pace), pace, chosen, [burst.note(pace)] if burst else [])


def source(message: Message) -> Record:
    """Which record a forecast answers. Not by its number in its stream: a young stream may change its partition."""
    _, partition, offset = dict(message.headers())["source"].decode().rsplit("/", 2)
    return int(partition), int(offset)


def receive(
    batches: Iterator[list[Message]],
    seconds: float,
    begun: Callable[[], None] = lambda: None,
    which: Callable[[Message], Record] = source,
    warm_up_s: float = WARM_UP_S,
) -> Received:
    """When each answer came after the warm-up, for `seconds`, and to which record it is."""
    received: list[tuple[float, Record]] = []
    from_s = None
    for batch in batches:
        now_s = time.perf_counter()
        if from_s is None and batch:
            # What was sent before the daemon was ready waited for that.
            from_s = now_s + warm_up_s
            begun()
        if from_s is not None and now_s > from_s + seconds:
            break
        received += [(now_s, which(message)) for message in batch]
    assert from_s is not None
    return from_s, [(now_s, record) for now_s, record in received if now_s > from_s]


def latencies(received: Received, pace: Pace) -> list[tuple[float, float]]:
    """(received, latency) in seconds; received counts from the end of the warm-up."""
    from_s, records = received
    return [(now_s - from_s, now_s - pace.sent_s[record]) for now_s, record in records]


class _Burst(NamedTuple):
    """What came during it and after it, and the daemon's resident memory before it and at most."""

    factor: int
    during: Received
    after: Received
    before_mb: float
    peak_mb: float

    def note(self, pace: Pace) -> str:
        """How it was taken."""
        waits = np.array([latency_s for _, latency_s in latencies(self.during, pace)])
        settled_s, waited_s = np.array(latencies(self.after, pace)).T
        # Worked off: from there on a record waits no longer than one in a hundred does at the end.
        usual_s = np.percentile(waited_s[settled_s > AFTER_BURST_S / 2], 99)
        behind_s = settled_s[waited_s > 2 * usual_s]
        return (
            f"{self.factor} times the rate for {BURST_S:.0f} s: p50 {np.percentile(waits, 50) * 1e3:.0f},"
            f" p99 {np.percentile(waits, 99) * 1e3:.0f} ms; worked off {max(behind_s, default=0.0):.1f} s after it;"
            f" memory {self.before_mb:.0f} MB before, {self.peak_mb:.0f} at most"
        )


def _burst(batches: Iterator[list[Message]], pace: Pace, running: psutil.Process, factor: int) -> _Burst:
    before_mb = running.memory_info().rss / 1e6
    peak_mb = before_mb

    def watched() -> Iterator[list[Message]]:
        nonlocal peak_mb
        for batch in batches:
            peak_mb = max(peak_mb, running.memory_info().rss / 1e6)
            yield batch

    pace.rate *= factor
    during = receive(watched(), BURST_S, warm_up_s=0.0)
    pace.begin()
    after = receive(watched(), AFTER_BURST_S, warm_up_s=0.0)
    return _Burst(factor, during, after, before_mb, peak_mb)


def _report(latencies: list[tuple[float, float]], pace: Pace, chosen: argparse.Namespace, more: Sequence[str]) -> int:
    received_s, latency_ms = np.array(latencies).T
    latency_ms = latency_ms * 1e3
    rounds = [latency_ms[(received_s // chosen.seconds).astype(int) == number] for number in range(chosen.rounds)]
    p50, p95, p99 = (
        statistics.median(float(np.percentile(each, level)) for each in rounds if len(each)) for level in (50, 95, 99)
    )
    every = [[float(np.percentile(each, level)) for level in (50, 95, 99, 100)] for each in rounds if len(each)]
    rows = {
        f"round {number}": [f"{len(each):,}", *(f"{value:.1f}" for value in values)]
        for number, (each, values) in enumerate(zip(rounds, every, strict=True), 1)
    }
    rows["median"] = ["", f"{p50:.1f}", f"{p95:.1f}", f"{p99:.1f}", ""]
    machine = common.machine()
    notes = (
        f"{chosen.rate} records/s of {STREAMS:,} streams; load {machine['load_1m']} at the end",
        f"the sender was at most {pace.late_s * 1e3:.0f} ms late",
        f"p99 {p99:.1f} ms (goal {P99_MAX_MS:g})",
        *more,
    )
    common.report("send to receipt, ms", rows, ("records", "p50", "p95", "p99", "max"), notes)
    results = {"p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "rate": chosen.rate, "rounds_ms": every, "burst": more}
    common.save(chosen.json, results | {"sender_late_ms": pace.late_s * 1e3} | machine)
    return 0 if p99 < P99_MAX_MS else 1


if __name__ == "__main__":
    sys.exit(main())
