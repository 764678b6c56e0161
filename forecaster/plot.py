"""A backtest as a picture: the fan of forecasts, errors and coverage over time, reliability. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from forecaster.backtest import Array, Played, inside_interval
from forecaster.series import Rows, Series

# Rolling means over such a part of the scored rows.
SMOOTH_PART = 20
TENTHS = 10
# The fan is seen from a moment that leaves its path to compare it with.
PAST_ROWS = 96


def plot(path: Path, name: str, played: Played, series: Series, rows: Rows) -> None:
    """Write a PNG of one model's forecasts of the first target.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    places = figure.subplots(2, 2)
    figure.suptitle(f"{series.names[0]}: {name}, {played.steps[0]} to {played.steps[-1]} rows ahead")
    _fan(places[0, 0], played, series)
    _errors(places[0, 1], played, rows)
    _coverage(places[1, 0], played, rows)
    _reliability(places[1, 1], played, rows)
    figure.savefig(path, dpi=110)


def _fan(axes: Any, played: Played, series: Series) -> None:
    axes.set_title("forecast, and what came")
    count, ahead = len(series.values), max(played.steps)
    origin = max(0, count - 1 - ahead)
    first = max(0, origin - PAST_ROWS)
    axes.plot(np.arange(first, count), series.values[first:, 0], color="black", linewidth=1, label="observed")
    if played.levels and len(played.fan) > ahead:
        quantiles = played.fan[origin - count, 0]
        rows = origin + np.array(played.steps)
        middle = len(played.levels) // 2
        for low in range(middle):
            high = len(played.levels) - 1 - low
            axes.fill_between(rows, quantiles[:, low], quantiles[:, high], color="tab:blue", alpha=0.15, linewidth=0)
        axes.plot(rows, quantiles[:, middle], color="tab:blue", label="median and quantiles")
    axes.axvline(origin, color="gray", linewidth=0.5)
    axes.set_xlabel("row")
    axes.legend()


def _errors(axes: Any, played: Played, rows: Rows) -> None:
    axes.set_title("absolute error, rolling mean")
    for place, step in ((0, played.steps[0]), (len(played.steps) - 1, played.steps[-1])):
        error, move = (np.abs(each[rows.score_from :, 0, place]) for each in (played.error, played.move))
        axes.plot(*_rolling(error, rows), label=f"{step} ahead")
        axes.plot(*_rolling(move, rows), linestyle=":", label=f"{step} ahead, last value")
        if len(played.steps) == 1:
            break
    axes.set_ylim(bottom=0)
    axes.set_xlabel("row")
    axes.legend()


def _coverage(axes: Any, played: Played, rows: Rows) -> None:
    axes.set_title("coverage of the 80 % interval, rolling mean")
    for place in sorted({0, len(played.steps) - 1}):
        if played.levels:  # a point forecast has none
            error, rank = (each[rows.score_from :, 0, place] for each in (played.error, played.rank))
            inside = inside_interval(played.levels, rank, error)
            axes.plot(*_rolling(inside, rows), label=f"{played.steps[place]} ahead")
    axes.axhline(0.8, color="gray", linewidth=0.5)
    axes.set_ylim(0, 1)
    axes.set_xlabel("row")


def _reliability(axes: Any, played: Played, rows: Rows) -> None:
    axes.set_title("probability of up: forecast, and how often it rose")
    axes.plot([0, 1], [0, 1], color="gray", linewidth=0.5)
    for place in sorted({0, len(played.steps) - 1}):
        up, down, move = (each[rows.score_from :, 0, place] for each in (played.up, played.down, played.move))
        moved = np.isfinite(move) & (move != 0) & (up + down > 0)
        share = up[moved] / (up + down)[moved]
        tenth = np.minimum((share * TENTHS).astype(int), TENTHS - 1)
        held = [each for each in range(TENTHS) if (tenth == each).sum() >= TENTHS]
        rose = [(move[moved][tenth == each] > 0).mean() for each in held]
        axes.plot([share[tenth == each].mean() for each in held], rose, "o-", label=f"{played.steps[place]} ahead")
    axes.set_xlabel("forecast")
    axes.legend()


def _rolling(scores: NDArray[Any], rows: Rows) -> tuple[Array, Array]:
    """Rows and the mean of the finite scores about them."""
    width = max(1, len(scores) // SMOOTH_PART)
    finite = np.isfinite(scores).astype(float)
    ones = np.ones(width)
    sums, counts = np.convolve(np.nan_to_num(scores), ones, "valid"), np.convolve(finite, ones, "valid")
    means = np.where(counts, sums / np.maximum(counts, 1), np.nan)
    return rows.score_from + width // 2 + np.arange(len(sums), dtype=np.float64), means
