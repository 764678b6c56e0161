"""`forecaster backtest`: series from a file, forecast row by row as they would have come, and scored.

The shared weights are fitted on the train rows alone; everything after them is forecast
first and learned from afterwards.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import gzip
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.errors import Fatal, InvalidHistory
from forecaster.model.spec import NetworkSpec
from forecaster.rivals import NAIVE, RIVALS, SEASONAL

if TYPE_CHECKING:
    from forecaster.backtest import Played, Score
    from forecaster.model.registry import Model
    from forecaster.series import Rows, Series

CELLS = ("lstm", "gru", "rnn", "feedforward")
COLUMNS = ("model", "target", "horizon", "scope", "count", "mse", "mae", "mase", "pinball", "coverage80")
COLUMNS_DIRECTION = ("direction_hit_rate", "direction_halfwidth", "brier", "seconds")


class Columns(NamedTuple):
    """A file's columns: time_s [T], values [T, S] (NaN = an empty cell), and their names."""

    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    names: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    every = ", ".join((*CELLS, *RIVALS))
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV, plain or .gz, one row for each time")
    parser.add_argument("--time", metavar="COLUMN", help="ISO 8601, or seconds since the epoch (the first column)")
    parser.add_argument("--targets", metavar="A,B,C", help="columns to forecast (all but the time)")
    parser.add_argument("--together", action="store_true", help="as one stream of many targets; else one stream each")
    parser.add_argument("--train-rows", type=_share, default=0.25, metavar="N", help="rows or part (%(default)s)")
    parser.add_argument("--score-from", type=_share, metavar="N", help="first scored row (after the train rows)")
    parser.add_argument("--score-to", type=_share, default=1.0, metavar="N", help="where scoring ends, exclusive")
    parser.add_argument("--horizons", default="1", metavar="1,24|1..48", help="rows ahead (%(default)s)")
    parser.add_argument("--seasons", default="auto", metavar="24,168", help="in rows (auto: found in the train rows)")
    parser.add_argument("--models", metavar="A,B", help=f"of {every} (the cells, {NAIVE} and {SEASONAL})")
    parser.add_argument("--units", type=int, default=64, help="hidden units (%(default)s)")
    parser.add_argument("--memory", type=int, default=96, help="features made of memory, at most (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="gradient steps; 0: shared weights that learned nothing")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--log", action="store_const", dest="change", const=np.log, help="of the values, first")
    change.add_argument("--log1p", action="store_const", dest="change", const=np.log1p, help="of the values, first")
    parser.add_argument("--standardise", action="store_true", help="errors in deviations of the train rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every score there, each target's too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the first model's forecasts of one target")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, and what each model costs."""
    columns = read(arguments.file, arguments.time, arguments.targets)
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise Fatal('backtest --plot: needs more packages: pip install "forecaster[backtest]"')
    values = columns.values
    if arguments.change is not None:
        with np.errstate(all="ignore"):
            values = arguments.change(values)
    found, played, made = scores(arguments, columns._replace(values=values))
    try:
        if arguments.json:
            arguments.json.write_bytes(msgspec.json.encode(found))
        if arguments.plot:
            _plot(arguments.plot, played, *made)
    except OSError as error:
        raise Fatal(f"{error.filename}: cannot be written: {error.strerror}") from None
    sys.stdout.write(text(found) + "".join(_cost(name, each) for name, each in played.items()))
    return 0


def scores(
    arguments: argparse.Namespace, columns: Columns
) -> tuple[list[Score], dict[str, Played], tuple[Series, Rows]]:
    """Fit, play and score each model. Also returns what was played, by model, of which series and rows."""
    from forecaster.backtest import table, train_deviation  # noqa: PLC0415 - TensorFlow
    from forecaster.series import Rows, Series  # noqa: PLC0415

    count = len(columns.values)
    trained = _row(arguments.train_rows, count)
    first = trained if arguments.score_from is None else _row(arguments.score_from, count)
    rows = Rows(train=trained, score_from=first, score_to=_row(arguments.score_to, count))
    series = Series(columns.time_s[: rows.score_to], columns.values[: rows.score_to], columns.names)
    deviation = train_deviation(series, rows) if arguments.standardise else np.ones(len(series.names))
    horizons = steps(arguments.horizons)
    seasons = _seasons(arguments.seasons, series, rows)
    found: list[Score] = []
    played: dict[str, Played] = {}
    for name in _models(arguments.models, seasons):
        if name in CELLS:
            played[name] = _play_cell(name, arguments, series, rows, horizons, seasons)
        else:
            played[name] = _play_rival(name, series, rows, horizons, seasons)
        found += table(name, series, rows, played[name], horizons, deviation)
    return found, played, (series, rows)


def _models(chosen: str | None, seasons: tuple[int, ...]) -> tuple[str, ...]:
    if chosen is None:
        return (*CELLS, NAIVE, *((SEASONAL,) if seasons else ()))
    names = tuple(chosen.split(","))
    for name in names:
        if name not in CELLS and name not in RIVALS:
            raise Fatal(f"--models {name}: expected some of {', '.join((*CELLS, *RIVALS))}")
    return names


def _seasons(words: str, series: Series, rows: Rows) -> tuple[int, ...]:
    from forecaster.model.seasons import find_seasons  # noqa: PLC0415 - TensorFlow, after a wrong file is told

    if words == "auto":
        return find_seasons(series.streams(rows.train))
    try:
        return tuple(int(word) for word in words.split(",") if word)
    except ValueError:
        raise Fatal(f"--seasons {words}: expected auto, or lengths such as 24,168") from None


def _play_cell(
    cell: str,
    arguments: argparse.Namespace,
    series: Series,
    rows: Rows,
    horizons: tuple[int, ...],
    seasons: tuple[int, ...],
) -> Played:
    from forecaster.backtest import play_model  # noqa: PLC0415 - TensorFlow

    targets = series.names if arguments.together else ("value",)
    words = {"targets": targets, "horizons": horizons, "seasons": seasons, "cell": cell}
    sizes = {"units": arguments.units, "memory": arguments.memory}
    try:
        spec = msgspec.convert(words | sizes, NetworkSpec)
    except (ValueError, msgspec.ValidationError) as error:
        raise Fatal(f"backtest: {error}") from None
    return play_model(_fit(spec, series, rows, arguments), series)


def _fit(spec: NetworkSpec, series: Series, rows: Rows, arguments: argparse.Namespace) -> Model:
    from forecaster.model.training import TrainOptions, train, untrained  # noqa: PLC0415 - TensorFlow

    histories = series.streams(rows.train, together=arguments.together)
    if not arguments.steps:
        return untrained(spec, histories)
    return train(spec, histories, TrainOptions(steps_max=arguments.steps, patience=4))[0]


def _play_rival(name: str, series: Series, rows: Rows, horizons: tuple[int, ...], seasons: tuple[int, ...]) -> Played:
    from forecaster.backtest import play_points  # noqa: PLC0415 - TensorFlow

    if name == SEASONAL and not seasons:
        raise Fatal(f"--models {SEASONAL}: no season was found; say --seasons 24")
    started = time.perf_counter()
    forecasts = RIVALS[name](series, rows, horizons, seasons[0] if seasons else 1)
    return play_points(series, horizons, forecasts, time.perf_counter() - started)


def _plot(path: Path, played: dict[str, Played], series: Series, rows: Rows) -> None:
    from forecaster.plot import plot  # noqa: PLC0415 - an extra

    name = next(iter(played))
    plot(path, name, played[name], series, rows)


def _cost(name: str, played: Played) -> str:
    records = int(np.prod(played.error.shape[:2]))
    state = f", {played.row_bytes / 1000:.1f} kB of state a stream" if played.row_bytes else ""
    return f"{name}: {records / max(played.seconds, 1e-9):,.0f} steps/s{state}\n"


def steps(text_of: str) -> tuple[int, ...]:
    """`1,24` or `1..48` as rows ahead.

    Raises:
        Fatal: neither.
    """
    try:
        if ".." in text_of:
            first, last = (int(word) for word in text_of.split(".."))
            return tuple(range(first, last + 1))
        return tuple(sorted({int(word) for word in text_of.split(",")}))
    except ValueError:
        raise Fatal(f"--horizons {text_of}: expected 1,24 or 1..48") from None


def read(path: Path, time: str | None, targets: str | None) -> Columns:
    """A CSV file's columns.

    Raises:
        InvalidHistory: no such file, no such column, or a cell that is no number.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            head, *cells = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidHistory(f"{path}: cannot be read: {error}") from None
    clock = time or head[0]
    names = tuple(targets.split(",")) if targets else tuple(name for name in head if name != clock)
    for name in (clock, *names):
        if name not in head:
            raise InvalidHistory(f"{path}: no column {name}; there are {', '.join(head)}")
    places = [head.index(name) for name in names]
    try:
        values = np.array([[float(row[place] or "nan") for place in places] for row in cells])
        return Columns(np.array([_time_s(row[head.index(clock)]) for row in cells]), values, names)
    except (ValueError, IndexError) as error:
        raise InvalidHistory(f"{path}: {error}") from None


def text(found: list[Score]) -> str:
    """The table, means over the targets."""
    names = (*COLUMNS, *COLUMNS_DIRECTION)
    lines = [names] + [tuple(_cell(getattr(score, name)) for name in names) for score in found if score.target == "*"]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    return "".join(
        "  ".join(f"{word:>{width}}" for word, width in zip(line, widths, strict=True)) + "\n" for line in lines
    )


def _share(word: str) -> float:
    value = float(word)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected rows, or a part of them, got {word}")
    return value


def _row(share: float, count: int) -> int:
    """A number of rows; up to 1.0 it is a part of them."""
    return min(count, round(share * count) if share <= 1.0 else int(share))


def _time_s(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        moment = dt.datetime.fromisoformat(cell)
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)
