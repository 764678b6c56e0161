"""How the rate changes with the number of streams and with the size of a record, in one run on one broker.

The rate of 1,000 streams with records of 100 bytes is what the others are ratios of. Half of the
records are let pass first: with 100,000 streams and more the first ones are those of new streams. A
million streams are held in host memory, but for those of the device table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import common
import msgspec
from common import Counted, Daemon


class Case(NamedTuple):
    """Streams, bytes of a record, what the daemon is set to for so many, and how often it writes their rows."""

    streams: int
    record_bytes: int
    overrides: tuple[str, ...] = ()
    flush_interval_s: int | None = None

    @property
    def name(self) -> str:
        """Of its row."""
        flushed = "" if self.flush_interval_s is None else f", rows every {self.flush_interval_s} s"
        return f"{self.streams:,} streams, {self.record_bytes:,} B{flushed}"

    @property
    def settings(self) -> list[str]:
        """What the daemon is told."""
        flush = [] if self.flush_interval_s is None else [f"streams.flush_interval_s={self.flush_interval_s}"]
        return [*self.overrides, *flush]


BASE = Case(1_000, 100)
CASES = (
    BASE,
    Case(10, 100),
    Case(100_000, 100, ("streams.capacity=100000",)),
    Case(100_000, 100, ("streams.capacity=100000",), flush_interval_s=60),
    Case(1_000, 2_000),
)
# Every ten minutes, or the rows of all would be the measure.
MILLION = Case(1_000_000, 100, ("streams.capacity=20000", "streams.streams_max=1000000"), flush_interval_s=600)
GOALS = {CASES[1].name: 0.7, CASES[3].name: 0.8}


def main() -> int:
    """Print the table; 1 where a goal is missed."""
    parser = common.arguments(__doc__.partition("\n")[0], records=400_000, rounds=3)
    parser.add_argument("--million", action="store_true", help="a million streams too, each heard of twice")
    chosen = parser.parse_args()
    runs: dict[str, list[Counted]] = {case.name: [] for case in CASES}
    with common.workplace(chosen.bootstrap) as (directory, bootstrap):
        parts = []
        for case in CASES:
            topic = _filled(bootstrap, case, chosen.records)
            parts.append(partial(_daemon, runs[case.name], case, directory, bootstrap, topic, chosen, chosen.records))
        for part in common.rotated(parts, chosen.rounds):
            part()
        if chosen.million:
            records = 2 * MILLION.streams
            topic = _filled(bootstrap, MILLION, records)
            _daemon(runs.setdefault(MILLION.name, []), MILLION, directory, bootstrap, topic, chosen, records)
    return _report(runs, chosen)


def _filled(bootstrap: str, case: Case, records: int) -> str:
    topic = common.unique("ticks")
    common.create_topics(bootstrap, topic)
    common.fill(bootstrap, topic, records, case.streams, case.record_bytes)
    return topic


def _daemon(
    into: list[Counted],
    case: Case,
    directory: Path,
    bootstrap: str,
    topic: str,
    chosen: argparse.Namespace,
    records: int,
) -> None:
    daemon = Daemon(directory, bootstrap, topic, [*case.settings, *chosen.overrides])
    with daemon.running() as running:
        into.append(common.count(bootstrap, daemon.forecasts, running, records, warm_records=records // 2))


def _report(runs: dict[str, list[Counted]], chosen: argparse.Namespace) -> int:
    middle = {name: Counted(*map(statistics.median, zip(*each, strict=True))) for name, each in runs.items()}
    ratio = {name: each.records_per_s / middle[BASE.name].records_per_s for name, each in middle.items()}
    rows = {
        name: (
            f"{each.records_per_s:,.0f}",
            f"{ratio[name]:.2f}",
            f"{GOALS[name]}" if name in GOALS else "",
            f"{each.cpu_s_per_1000:.3f}",
            f"{each.peak_mb:,.0f}",
        )
        for name, each in middle.items()
    }
    load = common.machine()["load_1m"]
    notes = [f"{chosen.records:,} records a run, medians of {chosen.rounds} rounds; load {load} at the end"]
    common.report("exactly once", rows, ("records/s", "ratio", "goal", "CPU s / 1,000", "peak MB"), notes)
    common.save(chosen.json, {"ratio": ratio, "runs": msgspec.to_builtins(runs), **common.machine()})
    return int(any(ratio[name] < goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    sys.exit(main())
