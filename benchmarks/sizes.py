"""How large: the bytes of a forecast and a state row, for sizing a deployment (docs/performance.md)."""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import common
from common import tick

from forecaster.config import build_config
from forecaster.model.layout import row_layout
from forecaster.networks import network_spec
from forecaster.records import MemoryRecord
from forecaster.replay import replay

RECORDS, STREAMS = 640, 16
NETWORKS: dict[str, dict[str, Any]] = {
    "one horizon": {"horizons": [1]},
    "horizons 1, 5, 20, a season of 5": {"horizons": [1, 5, 20], "seasons": [5]},
    "the same, only the network": {
        "horizons": [1, 5, 20],
        "network": {"memory": 0, "readout": False, "hedge": False, "calibration": False},
    },
}


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    rows = {name: [f"{size:,.0f}" for size in _sizes(changes)] for name, changes in NETWORKS.items()}
    columns = ("forecast", "state row")
    common.report("bytes of a value; one target, an LSTM of 64 units, nine quantiles", rows, columns)
    return 0


def _sizes(changes: dict[str, Any]) -> tuple[float, float]:
    ticks = {"name": "ticks", "topics": ["ticks"], "time": {"field": "time", "unit": "us"}, "targets": ["value"]}
    # Small polls: one bucket to compile.
    few = {"kafka": {"poll_records_max": STREAMS}, "streams": {"capacity": STREAMS}}
    config = build_config({"inputs": [ticks | changes], **few}, "sizes")
    sizes: list[int] = []
    writers = {config.kafka.forecast_topic: lambda lines: sizes.extend(map(len, lines))}
    replay(config, config.inputs[0], map(_record, range(RECORDS)), writers)
    row = row_layout(network_spec(config.inputs[0])).initial_row().nbytes
    return statistics.mean(sizes), row


def _record(number: int) -> MemoryRecord:
    stream, n = number % STREAMS, number // STREAMS
    value = 100.0 + stream + (n * n * (stream + 3)) % 17 * 0.37
    time_us = 1_700_000_000_000_000 + n * 60_000_000
    return MemoryRecord("ticks", 0, number, time_us // 1_000, b"stream-%d" % stream, tick(value, time_us))


if __name__ == "__main__":
    sys.exit(main())
