"""How good the forecasts are, on public series, beside what is published: one config for all of them.

    python benchmarks/quality.py --data DIR [--sets ETTh2,nyc_taxi] [--json FILE]

DIR holds ETTh2.csv, ETTm1.csv(.gz), WTH.csv(.gz) and, from the Numenta benchmark,
nyc_taxi.csv, ec2_cpu_utilization_5f5533.csv and Twitter_volume_AAPL.csv. The closes
come from the package bokeh-sampledata.

Protocol: every row is forecast before it is learned from; a forecast h rows ahead is
learned from h rows later. The variables of a set are the targets of one stream. The
shared weights are fitted on the train rows alone. The
constants of the adaptive parts were chosen on rows before the scored ones.

Reliability: the worst gap between "up" claimed and happened among the tenths that have
enough cases, how many cases that one has, and how many tenths are off by more than .03
beyond chance (reliability.py says what is enough). The JSON has every tenth.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import gzip
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reliability import Tenth, reliability, tenths

from forecaster.backtest import Score, play_model, play_points, table, train_deviation
from forecaster.model import network
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.training import TrainOptions, train, untrained
from forecaster.rivals import NAIVE, naive
from forecaster.series import Rows, Series

PATHS = (1, 24, 48)
NAN = float("nan")
Triple = tuple[float, float, float]


class Set(NamedTuple):
    """A series, its split and what is known of it; figures are at H = 1, 24, 48, NaN where nothing is published."""

    file: str
    train: float  # rows, or a part of them
    score_from: float
    score_to: float
    seasons: tuple[int, ...]
    goal: Triple
    stretch: Triple
    published: Triple = (NAN, NAN, NAN)
    linear: Triple = (NAN, NAN, NAN)
    pinball: Triple = (NAN, NAN, NAN)
    direction: Triple = (NAN, NAN, NAN)
    log: str = ""
    drop: tuple[str, ...] = ()


SETS = {
    "ETTh2": Set("ETTh2.csv", 2880, 3600, 14400, (24, 168), (0.340, 1.64, 2.70), (0.333, 1.60, 2.65),
                 (0.362, 1.694, 2.988), (0.344, 1.644, 2.739), (0.131, 0.276, 0.360), (0.714, 0.635, NAN)),
    "ETTm1 short": Set("ETTm1.csv", 2880, 3600, 14400, (96, 672), (0.0780, 0.31, 0.43), (0.0765, 0.29, 0.41),
                       (0.081, NAN, NAN), (0.0792, 0.335, 0.453)),
    "ETTm1 full": Set("ETTm1.csv", 11520, 14400, 57600, (96, 672), (0.098, 0.43, 0.57), (0.095, 0.41, 0.55),
                      (0.096, 0.418, 0.554), (0.101, 0.465, 0.599), (0.0749, 0.211, 0.224), (0.617, 0.792, NAN)),
    "WTH": Set("WTH.csv", 0.20, 0.25, 1.0, (24, 168), (0.154, 0.336, 0.410), (0.151, 0.330, 0.400),
               (0.153, NAN, NAN), (0.156, 0.341, 0.420), (0.0766, 0.178, 0.208), (0.717, 0.669, NAN), "", ("time",)),
    "nyc_taxi": Set("nyc_taxi.csv", 0.25, 0.25, 1.0, (48, 336), (0.0189, 0.134, 0.151), (0.0183, 0.130, 0.147),
                    (NAN, NAN, NAN), (0.0189, 0.134, 0.151), (0.0377, 0.0977, 0.101), (0.833, 0.950, NAN)),
    "ec2_cpu": Set("ec2_cpu_utilization_5f5533.csv", 0.25, 0.25, 1.0, (288,), (0.250, 0.378, 0.429),
                   (0.243, 0.367, 0.417), (NAN, NAN, NAN), (0.250, 0.378, 0.429), (0.134, 0.185, 0.204),
                   (0.848, 0.696, NAN)),
    "tweets AAPL": Set("Twitter_volume_AAPL.csv", 0.25, 0.25, 1.0, (288,), (0.193, 0.401, 0.483),
                       (0.187, 0.389, 0.468), (NAN, NAN, NAN), (0.193, 0.401, 0.483), (0.120, 0.197, 0.229),
                       (0.681, 0.696, NAN), "log1p"),
    "AAPL close": Set("AAPL", 0.25, 0.25, 1.0, (), (NAN, NAN, NAN), (NAN, NAN, NAN), log="log"),
    "IBM close": Set("IBM", 0.25, 0.25, 1.0, (), (NAN, NAN, NAN), (NAN, NAN, NAN), log="log"),
}  # fmt: skip

# One config for all: few streams, so the readout may see every number that is remembered.
MEMORY = 96
UNITS = 64
OPTIONS = TrainOptions(steps_max=300, patience=4, window=64, batch=32)
# What a row cannot be shortened in: counts, and the values that everything else is relative to.
EXACT = {"records_low", "records_high", "seen", "last_high", "last_low", "pending"}


def main() -> None:
    """Run the sets asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the files")
    parser.add_argument("--sets", default=",".join(SETS), help="which, by name")
    parser.add_argument("--json", type=Path, help="write every score there")
    parser.add_argument("--without", default="", help="parts to leave out: memory,readout,hedge,calibration,recurrence")
    parser.add_argument("--untrained", action="store_true", help="with shared weights that have learned nothing")
    parser.add_argument("--apart", action="store_true", help="each variable of a set as a stream of its own")
    parser.add_argument("--memory", type=int, default=MEMORY, help="features made of memory, at most")
    parser.add_argument("--mantissa", type=int, metavar="BITS", help="of 23 that a row keeps from record to record")
    parser.add_argument("--horizons", default="", help="only these steps, such as 1,24,48: no path scores, but fast")
    arguments = parser.parse_args()
    every: list[dict[str, object]] = []
    if arguments.mantissa is not None:
        shorten(arguments.mantissa)
    print(HEADER)
    for name in arguments.sets.split(","):
        scores, odds = run(name, arguments)
        every += [{"set": name, **msgspec.to_builtins(score)} for score in scores]
        every += [
            {"set": name, "horizon": horizon, "scope": "tenth", **msgspec.to_builtins(tenth)}
            for horizon, found in odds.items()
            for tenth in found
        ]
        show(name, scores, odds)
        if arguments.json:
            arguments.json.write_bytes(msgspec.json.encode(every))


def run(name: str, arguments: argparse.Namespace) -> tuple[list[Score], dict[int, list[Tenth]]]:
    """Train on the train rows, play all of them, score; and by horizon the tenths of the odds."""
    each = SETS[name]
    series, rows = read(each, arguments.data)
    horizons = tuple(int(word) for word in arguments.horizons.split(",")) if arguments.horizons else tuple(range(1, 49))
    targets = ("value",) if arguments.apart else series.names
    spec = spec_for(targets, each.seasons, horizons, arguments)
    started = time.perf_counter()
    histories = series.streams(rows.train, together=not arguments.apart)
    model = untrained(spec, histories) if arguments.untrained else train(spec, histories, OPTIONS)[0]
    trained_s = time.perf_counter() - started
    played = play_model(model, series, "cpu")
    steps = series.values.size / played.seconds
    note = f"{name}: trained {trained_s:.0f} s, {steps:,.0f} steps/s, {played.row_bytes / 1000:.1f} kB a stream"
    print(note, file=sys.stderr, flush=True)
    paths = [path for path in PATHS if path in horizons]
    last = play_points(series, horizons, naive(series, rows, horizons, 1), seconds=0.0)
    deviation = train_deviation(series, rows)
    scores = [
        *table("forecaster", series, rows, played, paths, deviation),
        *table(NAIVE, series, rows, last, paths, deviation),
    ]
    return scores, {path: tenths(played, rows, path) for path in paths}


def shorten(bits: int) -> None:
    """Have rows keep so many bits of each mantissa (bfloat16: 7, float16: 10), but for EXACT."""
    whole, lost = network.step, 23 - bits

    def step(*words: Any) -> tuple[Tensor, Fields]:
        outputs, state = whole(*words)
        return outputs, {name: value if name in EXACT else rounded(value) for name, value in state.items()}

    def rounded(value: Tensor) -> Tensor:
        # By its bits: XLA leaves out a cast there and back. To the nearest, halves to even.
        raw = tf.bitcast(value, tf.int32)
        even = tf.bitwise.bitwise_and(tf.bitwise.right_shift(raw, lost), 1)
        return tf.bitcast(tf.bitwise.bitwise_and(raw + ((1 << (lost - 1)) - 1 + even), -(1 << lost)), tf.float32)

    network.step = step


def spec_for(
    targets: tuple[str, ...], seasons: tuple[int, ...], horizons: tuple[int, ...], arguments: argparse.Namespace
) -> NetworkSpec:
    """The one network, less the parts that are left out."""
    without = set(filter(None, arguments.without.split(",")))
    memory = "memory" not in without
    return NetworkSpec(
        targets=targets,
        horizons=horizons,
        seasons=seasons if memory else (),
        cell="feedforward" if "recurrence" in without else "lstm",
        units=UNITS,
        memory=arguments.memory if memory else 0,
        readout=memory and "readout" not in without,
        hedge="hedge" not in without,
        calibration="calibration" not in without,
    )


def read(each: Set, directory: Path) -> tuple[Series, Rows]:
    """One set: its series, and which rows are for what."""
    time_s, values, names = _closes(each.file) if each.log == "log" else _file(directory / each.file, each.drop)
    values = np.log1p(values) if each.log == "log1p" else np.log(values) if each.log == "log" else values
    count = len(values)
    train_rows, first, last = (
        int(part) if part > 1 else round(part * count) for part in (each.train, each.score_from, each.score_to)
    )
    return Series(time_s[:last], values[:last], names), Rows(train=train_rows, score_from=first, score_to=last)


def _file(path: Path, drop: tuple[str, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    packed = path.with_name(path.name + ".gz")
    with gzip.open(packed, "rt") if packed.exists() else path.open() as lines:
        head, *cells = [row for row in csv.reader(lines) if row]
    kept = [place for place, name in enumerate(head) if place and name not in drop]
    values = np.array([[float(row[place]) for place in kept] for row in cells])
    return np.array([_time(row[0]) for row in cells]), values, tuple(head[place] for place in kept)


def _closes(symbol: str) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    from bokeh_sampledata import stocks  # noqa: PLC0415 - only these two sets need the package

    prices = getattr(stocks, symbol)
    return np.array([_time(day) for day in prices["date"]]), np.array(prices["close"], float)[:, None], (symbol,)


def _time(text: str) -> float:
    form = "%m/%d/%Y %H:%M" if "/" in text else "%Y-%m-%d %H:%M:%S" if " " in text else "%Y-%m-%d"
    return dt.datetime.strptime(text, form).replace(tzinfo=dt.UTC).timestamp()


HEADER = f"""
{"":12} {"":>3} | {"MSE of the path, in deviations of the train rows":^58} | {"step H alone":^49} | {"reliability":^17}
{"set":12} {"H":>3} | {"last":>8} {"publ.":>8} {"linear":>8} {"goal":>8} {"stretch":>8} {"OURS":>8} {"":>4} \
| {"MSE":>7} {"pinball":>8} {"linear":>7} {"cover":>6} {"dir":>6} {"linear":>6} {"+-":>5} \
| {"gap":>6} {"cases":>6} {"off":>3}"""


def show(name: str, scores: list[Score], odds: dict[int, list[Tenth]]) -> None:
    """Print a set's lines."""
    each = SETS[name]
    found = {(score.model, score.horizon, score.scope): score for score in scores if score.target == "*"}
    for place, horizon in enumerate(PATHS):
        ours, single = found.get(("forecaster", horizon, "path")), found.get(("forecaster", horizon, "step"))
        if single is None:
            continue
        ours = ours or single
        last = found.get((NAIVE, horizon, "path")) or found[NAIVE, horizon, "step"]
        goal, stretch = each.goal[place], each.stretch[place]
        if each.log == "log":
            goal, stretch = 1.01 * last.mse, last.mse
        gap, count, off = reliability(odds[horizon])
        mark = "**" if ours.mse <= stretch else "*" if ours.mse <= goal else "-"
        figures = [last.mse, each.published[place], each.linear[place], goal, stretch, ours.mse]
        print(
            f"{name:12} {horizon:3} | {' '.join(f'{_short(figure):>8}' for figure in figures)} {mark:>4} | "
            f"{_short(single.mse):>7} {_short(single.pinball):>8} {_short(each.pinball[place]):>7} "
            f"{single.coverage80:6.3f} {single.direction_hit_rate:6.3f} {_short(each.direction[place]):>6} "
            f"{single.direction_halfwidth:5.3f} | {gap:+6.3f} {count:6} {off:3}",
            flush=True,
        )


def _short(figure: float) -> str:
    return "-" if np.isnan(figure) else f"{figure:.3f}" if figure >= 1 else f"{figure:.4f}"


if __name__ == "__main__":
    main()
