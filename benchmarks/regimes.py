"""How soon the forecasts are good again after a regime change, and what the intervals cover meanwhile.

    python benchmarks/regimes.py --data DIR [--sets nyc_taxi,ETTh2] [--json FILE]

Real series (see quality.py), cut and glued: from a row on, the values are 5 deviations
higher (mean), 5 times as far from their mean (scale), or half a season later (season).
Beside each runs the same series uncut, by the same weights: the change is over when the
mean error of the next 100 forecasts is within 1.25 of the uncut run's on the same rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import quality
from numpy.typing import NDArray

from forecaster.backtest import Played, inside_interval, play_model
from forecaster.model.registry import Model
from forecaster.model.training import train
from forecaster.series import Rows, Series

HORIZONS = (1, 24)
CUTS = (0.4, 0.5, 0.6, 0.7)
NEAR, RATIO = 100, 1.25
SINCE = ((1, 100), (101, 500), (501, 2_000))
SIZE = 5.0

Array = NDArray[np.float64]


class Change(NamedTuple):
    """A series that is cut at row `cut`: what it is after that, and which row and size of the uncut one that was."""

    name: str
    values: Array
    cut: int
    skipped: int
    factor: float


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory with the files")
    parser.add_argument("--sets", default="nyc_taxi,ETTh2", help="which of quality.py's, by name")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    found = {}
    for name in arguments.sets.split(","):
        found[name] = measured(name, arguments.data)
        columns = ("records until over, each cut", *(f"coverage {first}-{last}" for first, last in SINCE))
        common.report(name, found[name], columns)
    common.save(arguments.json, found)


def measured(name: str, directory: Path) -> dict[str, list[str]]:
    """One set's figures: its last series, by kind of change and horizon."""
    each = quality.SETS[name]
    series, rows = quality.read(each, directory)
    series = Series(series.time_s, series.values[:, -1:], series.names[-1:])
    options = argparse.Namespace(without="", memory=quality.MEMORY)
    spec = quality.spec_for(series.names, each.seasons, HORIZONS, options)
    model, _ = train(spec, series.streams(rows.train), quality.OPTIONS)
    uncut = play_model(model, series, "cpu")
    figures: dict[str, list[str]] = {}
    played: dict[str, list[tuple[Change, Played]]] = {}
    for share in CUTS:
        for change in changes(series.values, rows, round(share * len(series.values)), each.seasons):
            played.setdefault(change.name, []).append((change, play(model, series, change)))
    for kind, runs in played.items():
        for place, horizon in enumerate(HORIZONS):
            over = [until_over(change, run, uncut, place) for change, run in runs]
            shares = [coverage(runs, place, first, last) for first, last in SINCE]
            figures[f"{kind} H={horizon}"] = [", ".join(map(str, over)), *(f"{share:.3f}" for share in shares)]
    return figures


def changes(values: Array, rows: Rows, cut: int, seasons: tuple[int, ...]) -> list[Change]:
    """Every kind of change at one row."""
    deviation, mean = np.nanstd(values[: rows.train]), np.nanmean(values[: rows.train])
    before, after, late = values[:cut], values[cut:], seasons[0] // 2
    return [
        Change("mean", np.concatenate([before, after + SIZE * deviation]), cut, 0, 1.0),
        Change("scale", np.concatenate([before, mean + SIZE * (after - mean)]), cut, 0, SIZE),
        Change("season", np.concatenate([before, values[cut + late :]]), cut, late, 1.0),
    ]


def play(model: Model, series: Series, change: Change) -> Played:
    """The changed series from its beginning; the clock does not jump."""
    return play_model(model, series._replace(time_s=series.time_s[: len(change.values)], values=change.values), "cpu")


def until_over(change: Change, run: Played, uncut: Played, place: int) -> int:
    """Records after the cut until the forecasts are as good as without it; -1 if never."""
    error = np.abs(run.error[change.cut :, 0, place].astype(np.float64))
    usual = change.factor * np.abs(uncut.error[change.cut + change.skipped :, 0, place].astype(np.float64))
    for first in range(len(error) - NEAR):
        if np.nanmean(error[first : first + NEAR]) <= RATIO * np.nanmean(usual[first : first + NEAR]):
            return first
    return -1


def coverage(runs: list[tuple[Change, Played]], place: int, first: int, last: int) -> float:
    """Of the 80 % interval, of what came from `first` to `last` records after the cuts."""
    inside = [
        inside_interval(
            run.levels,
            run.rank[change.cut + first - 1 : change.cut + last, 0, place],
            run.error[change.cut + first - 1 : change.cut + last, 0, place],
        )
        for change, run in runs
    ]
    return float(np.nanmean(np.concatenate(inside)))


if __name__ == "__main__":
    sys.exit(main())
