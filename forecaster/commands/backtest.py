"""`forecaster backtest`: series from a file, forecast row by row as they would have come, and scored.

Each target is a stream of its own. The shared weights are fitted on the train rows
alone; everything after them is forecast first and learned from afterwards.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import gzip
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.errors import Fatal, InvalidHistory
from forecaster.model.spec import NetworkSpec

if TYPE_CHECKING:
    from forecaster.prequential import Score

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
    parser.add_argument("file", type=Path, metavar="FILE", help="CSV, plain or .gz, one row for each time")
    parser.add_argument("--time", metavar="COLUMN", help="ISO 8601, or seconds since the epoch (the first column)")
    parser.add_argument("--targets", metavar="A,B,C", help="columns to forecast, one stream each (all but the time)")
    parser.add_argument("--train-rows", type=_share, default=0.25, metavar="N", help="rows or part (%(default)s)")
    parser.add_argument("--score-from", type=_share, metavar="N", help="first scored row (after the train rows)")
    parser.add_argument("--score-to", type=_share, default=1.0, metavar="N", help="where scoring ends, exclusive")
    parser.add_argument("--horizons", default="1", metavar="1,24|1..48", help="rows ahead (%(default)s)")
    parser.add_argument("--seasons", default="", metavar="24,168", help="season lengths in rows")
    parser.add_argument("--models", default="lstm", metavar="A,B", help=f"of {', '.join(CELLS)} (%(default)s)")
    parser.add_argument("--units", type=int, default=64, help="hidden units (%(default)s)")
    parser.add_argument("--memory", type=int, default=96, help="features made of memory, at most (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="gradient steps; 0: shared weights that learned nothing")
    change = parser.add_mutually_exclusive_group()
    change.add_argument("--log", action="store_const", dest="change", const=np.log, help="of the values, first")
    change.add_argument("--log1p", action="store_const", dest="change", const=np.log1p, help="of the values, first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every score there, each target's too")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    columns = read(arguments.file, arguments.time, arguments.targets)
    values = columns.values
    if arguments.change is not None:
        with np.errstate(all="ignore"):
            values = arguments.change(values)
    found = scores(arguments, columns._replace(values=values))
    if arguments.json:
        try:
            arguments.json.write_bytes(msgspec.json.encode(found))
        except OSError as error:
            raise Fatal(f"{arguments.json}: cannot be written: {error.strerror}") from None
    sys.stdout.write(text(found))
    return 0


def scores(arguments: argparse.Namespace, columns: Columns) -> list[Score]:
    """Fit, play and score each model, and the last value beside them."""
    from forecaster.model.columns import StreamHistory  # noqa: PLC0415 - TensorFlow, after a wrong file is told
    from forecaster.model.network import initial_weights  # noqa: PLC0415
    from forecaster.model.registry import Model  # noqa: PLC0415
    from forecaster.model.training import TrainOptions, scale_priors, train  # noqa: PLC0415
    from forecaster.prequential import Rows, Series, last_value, play, table  # noqa: PLC0415

    count = len(columns.values)
    trained = _row(arguments.train_rows, count)
    first = trained if arguments.score_from is None else _row(arguments.score_from, count)
    rows = Rows(train=trained, score_from=first, score_to=_row(arguments.score_to, count))
    series = Series(columns.time_s[: rows.score_to], columns.values[: rows.score_to], columns.names)
    nothing = np.zeros((trained, 0), np.float32)
    histories = [
        StreamHistory(name, series.time_s[:trained], series.values[:trained, [place]], nothing)
        for place, name in enumerate(columns.names)
    ]
    horizons = steps(arguments.horizons)
    found: list[Score] = []
    for cell in arguments.models.split(","):
        spec = _spec(arguments, cell, horizons)
        if arguments.steps:
            model, _ = train(spec, histories, TrainOptions(steps_max=arguments.steps, patience=4))
        else:
            weights = initial_weights(spec, 0) | scale_priors(histories)
            model = Model(spec=spec, weights=weights, version="untrained")
        played = play(model, series)
        if not found:
            found += last_value(model, series, rows, played, horizons)
        found += table(cell, model, series, rows, played, horizons)
    return found


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


def _spec(arguments: argparse.Namespace, cell: str, horizons: tuple[int, ...]) -> NetworkSpec:
    words: dict[str, Any] = {"cell": cell, "units": arguments.units, "memory": arguments.memory}
    try:
        seasons = tuple(int(word) for word in arguments.seasons.split(",") if word)
        spec = {"targets": ["value"], "horizons": horizons, "seasons": seasons, **words}
        return msgspec.convert(spec, NetworkSpec)
    except (ValueError, msgspec.ValidationError) as error:
        raise Fatal(f"backtest: {error}") from None


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
