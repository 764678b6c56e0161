"""How long: hours at a steady rate with streams coming and going, and nothing that grows.

Over the run come ten times as many streams as the table has slots for; what loses its
slot goes to the second tier, and beyond it is dropped. Looked at from outside: resident
memory, descriptors, threads, how often the step was traced, and how long a record waits
for its forecast at a read_committed reader.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import psutil
from common import Daemon
from confluent_kafka import Consumer, Producer
from numpy.typing import NDArray

CAPACITY = 4_000
TIERS_MAX = 8_000  # streams in both tiers
ALIVE = 2_500  # streams that are written to at the same time
TURNOVER = 10  # streams over the run, in tables
SAMPLE_S = 2.0
# Caches fill, the table and the second tier too: memory is looked at in the second half.
MEMORY_GROWTH_MAX = 0.05
P99_GROWTH_MAX = 1.5


class Sample(NamedTuple):
    """The daemon at one moment."""

    at_s: float
    memory_mb: float
    descriptors: int
    threads: int
    traces: float
    evicted: float
    answered: int


class Load:
    """Records at a steady pace, of a window of streams that slides over all of them."""

    def __init__(self, bootstrap: str, topic: str, rate: int, seconds: float) -> None:
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 2})
        self._topic, self._rate, self._seconds = topic, rate, seconds
        self.sent = 0
        self.late_s = 0.0
        self.thread = threading.Thread(target=self._run, name="load", daemon=True)

    def _run(self) -> None:
        random = np.random.default_rng(1)
        begun_s, records = time.perf_counter(), round(self._rate * self._seconds)
        while self.sent < records:
            due = min(records, round((time.perf_counter() - begun_s) * self._rate))
            if due <= self.sent:
                time.sleep(0.005)
                continue
            self.late_s = max(self.late_s, (due - self.sent) / self._rate)
            for number in range(self.sent, due):
                first = number * (CAPACITY * TURNOVER - ALIVE) // records
                stream = first + int(random.integers(ALIVE))
                now_us = time.time_ns() // 1_000
                self._producer.produce(
                    self._topic, common.tick(100.0 + stream % 7 + random.random(), now_us), b"stream-%d" % stream
                )
                self._producer.poll(0)
            self.sent = due
        self._producer.flush(30)


class Latencies:
    """From each record's own timestamp to the receipt of its forecast, in milliseconds."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._stop = threading.Event()
        self._at_s: list[float] = []
        self._ms: list[float] = []
        self.thread = threading.Thread(target=self._run, name="latencies", daemon=True)
        self.thread.start()

    @property
    def answered(self) -> int:
        """Forecasts received."""
        return len(self._ms)

    def stop(self) -> None:
        """No more."""
        self._stop.set()
        self.thread.join(30)
        self._consumer.close()

    def p99_ms(self, start_s: float, end_s: float) -> float:
        """Of the forecasts received between two moments."""
        at_s, ms = np.array(self._at_s), np.array(self._ms)
        chosen = ms[(at_s >= start_s) & (at_s < end_s)]
        return float(np.percentile(chosen, 99)) if len(chosen) else float("nan")

    def _run(self) -> None:
        while not self._stop.is_set():
            first = self._consumer.poll(0.05)
            batch = [] if first is None else [first, *self._consumer.consume(10_000, timeout=0)]
            now_s, now_ms = time.perf_counter(), time.time_ns() / 1e6
            for message in batch:
                if message.error() is None:
                    self._at_s.append(now_s)
                    self._ms.append(now_ms - message.timestamp()[1])


def main() -> int:
    """Print what was seen; 1 where something grew."""
    parser = common.arguments(__doc__.partition("\n")[0], minutes=20, rate=2_000)
    chosen = parser.parse_args()
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        topic = common.unique("soaked")
        common.create_topics(bootstrap, topic)
        settings = [f"streams.capacity={CAPACITY}", f"streams.streams_max={TIERS_MAX}", *chosen.overrides]
        daemon = Daemon(directory, bootstrap, topic, settings)
        with daemon.running() as running:
            url = _await_url(daemon.log, running)
            latencies = Latencies(common.reader(bootstrap, daemon.forecasts))
            load = Load(bootstrap, topic, chosen.rate, chosen.minutes * 60.0)
            load.thread.start()
            samples = _watch(running, url, load, latencies)
            latencies.stop()
    return _report(samples, latencies, load, chosen)


def _await_url(log: Path, running: psutil.Popen) -> str:
    """The HTTP server's address, once the daemon is running."""
    deadline_s = time.perf_counter() + common.START_MAX_S
    while time.perf_counter() < deadline_s:
        text = log.read_text(errors="replace") if log.exists() else ""
        found = re.search(r"http=(http://\S+?)/?\s", text)
        if found and "running" in text:
            return found[1]
        if running.poll() is not None:
            sys.exit(text[-2_000:])
        time.sleep(0.2)
    sys.exit(f"not running within {common.START_MAX_S:.0f} s")


def _watch(running: psutil.Popen, url: str, load: Load, latencies: Latencies) -> list[Sample]:
    """A sample every SAMPLE_S, until all is written and answered."""
    samples: list[Sample] = []
    silent_s, before = time.perf_counter(), 0
    while load.thread.is_alive() or latencies.answered < load.sent:
        samples.append(_sample(running, url, latencies))
        if latencies.answered > before:
            silent_s, before = time.perf_counter(), latencies.answered
        if running.poll() is not None or time.perf_counter() - silent_s > common.SILENCE_MAX_S:
            sys.exit(f"{load.sent - latencies.answered} records are not answered")
        time.sleep(SAMPLE_S)
    samples.append(_sample(running, url, latencies))
    return samples


def _sample(running: psutil.Popen, url: str, latencies: Latencies) -> Sample:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:  # noqa: S310 - the daemon's own
        text = answer.read().decode()
    with running.oneshot():
        memory, descriptors, threads = running.memory_info().rss, running.num_fds(), running.num_threads()
    return Sample(
        time.perf_counter(),
        memory / 1e6,
        descriptors,
        threads,
        _total(text, "forecaster_traces_total"),
        _total(text, "forecaster_streams_evicted_total"),
        latencies.answered,
    )


def _total(text: str, name: str) -> float:
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(sum(map(float, values)))


def _report(samples: list[Sample], latencies: Latencies, load: Load, chosen: argparse.Namespace) -> int:
    table: NDArray[np.float64] = np.array(samples)
    names = Sample._fields
    start_s, end_s = table[0, 0], table[-1, 0]
    at = {name: table[:, names.index(name)] for name in names}
    part_s = (end_s - start_s) / 6
    # Medians of a sixth each: single samples fall into a batch or beside it.
    middle = (at["at_s"] >= start_s + 3 * part_s) & (at["at_s"] < start_s + 4 * part_s)
    last = at["at_s"] >= start_s + 5 * part_s
    begun = int(np.argmax(at["traces"] > 0))  # the metric is set with the first batch
    growth = float(np.median(at["memory_mb"][last]) / np.median(at["memory_mb"][middle]) - 1)
    # The very first records meet cold caches.
    first_p99 = latencies.p99_ms(start_s + part_s / 2, start_s + 1.5 * part_s)
    last_p99 = latencies.p99_ms(start_s + 5 * part_s, end_s)
    found: dict[str, tuple[str, bool]] = {
        "memory, middle sixth to last": (f"{growth:+.1%}", growth < MEMORY_GROWTH_MAX),
        "descriptors, middle to last": _same(at["descriptors"][middle], at["descriptors"][last]),
        "threads, middle to last": _same(at["threads"][middle], at["threads"][last]),
        "step traces, first to last": (
            f"{at['traces'][begun]:.0f} to {at['traces'][-1]:.0f}",
            bool(at["traces"][begun] == at["traces"][-1]),
        ),
        "p99 ms, first minutes to last": (
            f"{first_p99:.1f} to {last_p99:.1f}",
            last_p99 <= P99_GROWTH_MAX * first_p99,
        ),
    }
    rows = {name: (text, "" if good else "too much") for name, (text, good) in found.items()}
    notes = (
        f"{load.sent:,} records at {chosen.rate:,}/s in {(end_s - start_s) / 60:.1f} min",
        f"the writer was late by at most {load.late_s:.2f} s; load {common.machine()['load_1m']}",
        f"{CAPACITY * TURNOVER:,} streams through {CAPACITY:,} slots, {at['evicted'][-1]:,.0f} evictions",
        f"memory {at['memory_mb'].min():,.0f} to {at['memory_mb'].max():,.0f} MB",
    )
    common.report("soak", rows, ("", ""), notes)
    good = all(good for _, good in found.values())
    results: dict[str, Any] = {
        "records": load.sent,
        "memory_growth": growth,
        "p99_first_ms": first_p99,
        "p99_last_ms": last_p99,
        "good": good,
        "samples": [sample._asdict() for sample in samples],
        **common.machine(),
    }
    common.save(chosen.json, results)
    return 0 if good else 1


def _same(middle: NDArray[np.float64], last: NDArray[np.float64]) -> tuple[str, bool]:
    """A leak grows; a connection more or less does not."""
    return f"{np.median(middle):.0f} to {np.median(last):.0f}", bool(np.median(last) <= np.median(middle) + 2)


if __name__ == "__main__":
    sys.exit(main())
