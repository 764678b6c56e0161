"""How fast the compiled step alone is, by rounds and streams, and how much of the memory's bandwidth that takes.

[T, B]: one call that steps B streams through T rounds. The bytes are those that a call cannot do without: each
stream's row read and written once, inputs read, outputs written. Their share of the bandwidth is of what a copy by
NumPy reaches here, in one thread. Times are those of the fastest twentieth of the calls: what else a machine does can
only add to them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

from forecaster.config import build_config
from forecaster.model.columns import StepInputs, packed_columns
from forecaster.model.network import output_shapes
from forecaster.model.step import StepEngine
from forecaster.shelf import load_model

GRID = ((1, 1), (1_000, 1), (1_000, 2), (1, 10), (200, 10), (1, 64), (16, 125), (1, 256), (1, 1_024), (2, 1_000))
COPY_BYTES = 256 * 1024 * 1024


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results for machines")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--horizons", type=int, nargs="+", default=[1], metavar="H")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each cell (%(default)s)")
    chosen = parser.parse_args()
    engine = _engine(chosen.horizons, chosen.device)
    copied_gb_s = _copy_gb_s()
    results = [_measured(engine, rounds, streams, chosen.seconds, copied_gb_s) for rounds, streams in GRID]
    rows = {
        f"[{each['rounds']}, {each['streams']}]": (
            f"{each['records_per_s']:,.0f}",
            f"{each['call_ms']:.2f}",
            f"{each['bytes'] / 1e6:.2f}",
            f"{each['bandwidth_share']:.1%}",
        )
        for each in results
    }
    columns = ("records/s", "ms a call", "MB a call", "of the bandwidth")
    rows_of, load = f"rows of {engine.layout.width * 4:,} bytes", common.machine()["load_1m"]
    notes = (f"{engine.device_name}, {rows_of}; NumPy copies {copied_gb_s:.1f} GB/s; load {load}",)
    common.report("the step, by rounds and streams of a poll", rows, columns, notes)
    found = {"device": engine.device_name, "row_bytes": engine.layout.width * 4, "copy_gb_s": copied_gb_s}
    common.save(chosen.json, {**found, "cells": results, **common.machine()})
    return 0


def _engine(horizons: list[int], device: Any) -> StepEngine:
    ticks = {"name": "ticks", "topics": ["ticks"], "time": {"field": "time", "unit": "us"}, "targets": ["value"]}
    config = build_config({"inputs": [ticks | {"horizons": horizons}]}, "step")
    engine = StepEngine(load_model(config.inputs[0]), max(streams for _, streams in GRID), device)
    engine.compile()
    return engine


def _measured(engine: StepEngine, rounds: int, streams: int, seconds: float, copied_gb_s: float) -> dict[str, Any]:
    random = np.random.default_rng(1)
    slots = np.tile(np.arange(streams, dtype=np.int32), rounds)
    count = len(slots)
    inputs = StepInputs(
        slots,
        np.zeros(count, np.bool_),
        random.standard_normal((count, 1)).cumsum(axis=0),
        np.zeros((count, 0), np.float32),
        np.full(count, 1.7e9) + np.repeat(np.arange(rounds), streams),
        np.ones(count, np.float32),
    )
    call_s = _fastest_s(lambda: engine.step(inputs), seconds)
    spec = engine.model.spec
    outputs = sum(int(np.prod(shape)) for shape in output_shapes(spec).values())
    size = 4 * (2 * streams * engine.layout.width + count * (packed_columns(spec).width + outputs))
    return {
        "rounds": rounds,
        "streams": streams,
        "records_per_s": count / call_s,
        "call_ms": call_s * 1e3,
        "calls": engine.calls,
        "bytes": size,
        "bandwidth_share": size / call_s / (copied_gb_s * 1e9),
    }


def _copy_gb_s() -> float:
    """Bytes read and written by a copy that no cache holds."""
    source, target = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)
    return 2 * COPY_BYTES / _fastest_s(lambda: np.copyto(target, source), 1.0) / 1e9


def _fastest_s(call: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        call()
    taken = []
    while sum(taken) < seconds:
        started_s = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started_s)
    return float(np.quantile(taken, 0.05))


if __name__ == "__main__":
    sys.exit(main())
