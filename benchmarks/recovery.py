"""How soon after a kill -9 forecasts come again, and what the promises cost.

recovery   the daemon is killed with all its streams in the state topic; time from the new process's start
           to its first new forecast, taken apart: import, compile, restore, replay
cost       records/s with exactly-once and at-least-once, and with each flush interval, as ratios in one run
instances  records/s of 1, 2 and 4 instances of one group on 8 partitions
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import common
import psutil
from common import Daemon
from confluent_kafka import Producer

PARTS = ("recovery", "cost", "instances")
FLUSH_S = 5.0
INSTANCES = (1, 2, 4)
COSTS: Mapping[str, Sequence[str]] = {
    "exactly-once, flush 10 s": (),
    "at-least-once, flush 10 s": ("kafka.processing_guarantee=at-least-once",),
    "exactly-once, flush every transaction": ("streams.flush_interval_s=0",),
    "exactly-once, flush 1 s": ("streams.flush_interval_s=1",),
    "exactly-once, never": ("streams.flush_interval_s=1e9",),
}


class Recovery(NamedTuple):
    """Seconds from the start of the process to its first new forecast, and their parts."""

    total_s: float
    import_s: float  # to the first line of its log
    compile_s: float  # to "compiled", the broker's first answer in it
    restore_s: float  # joining the group and reading the states, to the last "restored"
    replay_s: float  # the rest: what the rows lacked, and the first new transaction
    rows: float
    replayed: float


def main() -> int:
    """Print the tables."""
    parser = common.arguments(__doc__.partition("\n")[0], records=100_000, rounds=3)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this one; may be given several times")
    parser.add_argument("--streams", type=int, action="append", metavar="N", help="(1,000 and 100,000)")
    chosen = parser.parse_args()
    parts = chosen.part or PARTS
    results: dict[str, Any] = {}
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        if "recovery" in parts:
            for streams in chosen.streams or (1_000, 100_000):
                results[f"recovery {streams}"] = _recovery(directory, bootstrap, streams, chosen)
        if "cost" in parts:
            results["cost"] = _cost(directory, bootstrap, chosen)
        if "instances" in parts:
            results["instances"] = _instances(directory, bootstrap, chosen)
    common.save(chosen.json, {**results, **common.machine()})
    return 0


def _recovery(directory: Path, bootstrap: str, streams: int, chosen: argparse.Namespace) -> dict[str, float]:
    topic = common.unique(f"recovered-{streams}")
    common.create_topics(bootstrap, topic)
    common.fill(bootstrap, topic, streams, streams)
    settings = (f"streams.flush_interval_s={FLUSH_S}", f"streams.capacity={max(streams, 2_000)}", *chosen.overrides)
    daemon = Daemon(directory, bootstrap, topic, settings)
    found: list[Recovery] = []
    with daemon.lives() as lives:
        life = next(lives)
        consumer = common.reader(bootstrap, daemon.forecasts)
        batches = common.messages(consumer, life)
        _receive(batches, streams)
        time.sleep(2 * FLUSH_S + streams / 10_000)  # until its rows are written, some thousand a transaction
        for number in range(chosen.rounds):
            # Its last second's records are in no row yet.
            _write(bootstrap, topic, range(min(streams, 500)), number)
            _receive(batches, min(streams, 500))
            life.kill()
            life.wait()
            log_start = daemon.log.stat().st_size
            _write(bootstrap, topic, range(1), number)
            started_s, started_clock_s = time.perf_counter(), time.time()
            life = next(lives)
            batches = common.messages(consumer, life)
            _receive(batches, 1)
            total_s = time.perf_counter() - started_s
            found.append(_taken_apart(daemon.log, log_start, started_clock_s, total_s))
        consumer.close()
    middle = Recovery(*map(statistics.median, zip(*found, strict=True)))
    seconds = ("total", "import", "compile", "restore", "replay")
    rows = {name: (f"{value:.2f}",) for name, value in zip(seconds, middle, strict=False)}
    notes = (f"{middle.rows:,.0f} rows read, {middle.replayed:,.0f} records stepped again; medians of {len(found)}",)
    common.report(f"after a kill -9, {streams:,} streams", rows, ("seconds",), notes)
    return middle._asdict()


def _write(bootstrap: str, topic: str, streams: range, number: int) -> None:
    producer = Producer({"bootstrap.servers": bootstrap})
    time_us = 1_700_001_000_000_000 + number * 2_000_000
    for stream in streams:
        producer.produce(topic, common.tick(100.0, time_us), f"stream-{stream}".encode())
    assert producer.flush(60) == 0


def _receive(batches: Iterator[list[Any]], count: int) -> None:
    while count > 0:
        count -= len(next(batches))


_LINE = re.compile(r"^(\S+Z) \w+ +\S+ (.*)$", re.MULTILINE)


def _taken_apart(log: Path, start: int, started_s: float, total_s: float) -> Recovery:
    """From the log's own timestamps."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    at: dict[str, float] = {}
    rows = replayed = 0
    for stamp, line in _LINE.findall(text):
        moment_s = datetime.fromisoformat(stamp).timestamp() - started_s
        for word in ("listening", "compiled", "restored"):
            if line.startswith(word) and (word == "restored" or word not in at):
                at[word] = moment_s
        if line.startswith("restored"):
            rows += int(re.search(r"rows=(\d+)", line)[1])  # type: ignore[index]
            replayed += int(re.search(r"replay=(\d+)", line)[1])  # type: ignore[index]
    listening, compiled, restored = at["listening"], at["compiled"], min(at["restored"], total_s)
    return Recovery(
        total_s, listening, compiled - listening, restored - compiled, total_s - restored, float(rows), float(replayed)
    )


def _cost(directory: Path, bootstrap: str, chosen: argparse.Namespace) -> dict[str, float]:
    topic = common.unique("costs")
    common.create_topics(bootstrap, topic)
    common.fill(bootstrap, topic, chosen.records, 1_000)
    runs: dict[str, list[float]] = {name: [] for name in COSTS}

    def once(name: str) -> None:
        daemon = Daemon(directory, bootstrap, topic, (*COSTS[name], *chosen.overrides))
        with daemon.running() as running:
            counted = common.count(bootstrap, daemon.forecasts, running, chosen.records)
        runs[name].append(counted.records_per_s)

    for part in common.rotated([partial(once, name) for name in COSTS], chosen.rounds):
        part()
    middle = {name: statistics.median(each) for name, each in runs.items()}
    usual = middle[next(iter(COSTS))]
    rows = {name: (f"{each:,.0f}", f"{each / usual:.2f}") for name, each in middle.items()}
    note = f"{chosen.records:,} records of 1,000 streams, medians of {chosen.rounds} rounds"
    common.report("what the promises cost", rows, ("records/s", "of the usual"), (note,))
    return {name: each / usual for name, each in middle.items()} | {"records_per_s": usual}


def _instances(directory: Path, bootstrap: str, chosen: argparse.Namespace) -> dict[str, float]:
    runs: dict[int, list[float]] = {count: [] for count in INSTANCES}

    def once(count: int) -> None:
        topic = common.unique("shared")
        common.create_topics(bootstrap, topic)
        daemon = Daemon(directory, bootstrap, topic, chosen.overrides)
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(daemon.running())
            for number in range(1, count):
                stack.enter_context(daemon.another(f"instance-{number}"))
            _await_shares(daemon.log, count)
            common.fill(bootstrap, topic, chosen.records, 1_000)
            runs[count].append(common.count(bootstrap, daemon.forecasts, first, chosen.records).records_per_s)

    for part in common.rotated([partial(once, count) for count in INSTANCES], chosen.rounds):
        part()
    middle = {count: statistics.median(each) for count, each in runs.items()}
    rows = {f"{count} instances": (f"{each:,.0f}", f"{each / middle[1]:.2f}") for count, each in middle.items()}
    note = f"{common.PARTITIONS} partitions on {psutil.cpu_count()} cores; medians of {chosen.rounds} rounds"
    common.report("one group", rows, ("records/s", "of one"), (note,))
    return {str(count): each for count, each in middle.items()}


def _await_shares(log: Path, instances: int) -> None:
    """Until every instance has partitions of its own."""
    deadline_s = time.perf_counter() + common.START_MAX_S
    while time.perf_counter() < deadline_s:
        logs = [each.read_text(errors="replace") for each in log.parent.glob(f"{log.stem}*.log")]
        if sum("restored" in text for text in logs) == instances:
            time.sleep(3)  # the last one's share was taken from the others: let that end
            return
        time.sleep(0.2)
    sys.exit(f"{instances} instances did not share the partitions in time")


if __name__ == "__main__":
    sys.exit(main())
