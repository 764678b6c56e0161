"""Forecast first, then learn: a model over series by the compiled step that serves, scored on the rows that count.

The step scores what each record settles, so a score is that of the published forecast
and cannot have seen its target. Errors are in units of the train rows' deviation.

    path   the mean over steps 1..H of every forecast whose whole path lies in the scored rows
    step   the same forecasts at step H alone
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StepInputs
from forecaster.model.registry import Model
from forecaster.model.runtime import DeviceChoice
from forecaster.model.step import StepEngine

RECORDS_MAX = 4_096
# A direction's hit rate is a mean over windows that overlap: its interval comes from so many blocks of time.
BLOCKS = 50
COVERAGE_LOW, COVERAGE_HIGH = 0.1, 0.9

Array = NDArray[np.float64]


class Series(NamedTuple):
    """Series on one clock, one stream each: time_s [T], values [T, S] (NaN = missing), names of the S series."""

    time_s: Array
    values: Array
    names: tuple[str, ...]


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows are for what: the first `train` set the units, those from `score_from` up to `score_to` count."""

    train: int
    score_from: int
    score_to: int


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a backtest's table; NaN where it does not apply. `target` is "*" for the mean over all."""

    model: str
    target: str
    horizon: int
    scope: str
    count: int
    mse: float
    mae: float
    mase: float = float("nan")
    pinball: float = float("nan")
    coverage80: float = float("nan")
    direction_hit_rate: float = float("nan")
    direction_count: int = 0
    direction_halfwidth: float = float("nan")
    brier: float = float("nan")
    seconds: float = float("nan")


class Played(NamedTuple):
    """What the step scored, by the row that settled it: [T, S, H] each, in the series' own units."""

    error: NDArray[np.float32]
    naive: NDArray[np.float32]
    pinball: NDArray[np.float32]
    rank: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    seconds: float
    row_bytes: int


def play(model: Model, series: Series, device: DeviceChoice = "auto") -> Played:
    """Step every series from its first row to its last, each as a stream of its own.

    Args:
        model: of one target and no features.
        series: what to step.
        device: where to.

    Returns:
        The scores of every forecast.
    """
    length, streams = series.values.shape
    engine = StepEngine(model, streams, device)
    engine.compile()
    shape = (length, streams, len(model.spec.horizons))
    error, naive, pinball, rank, up, down = (np.full(shape, np.nan, np.float32) for _ in range(6))
    elapsed_s = np.diff(series.time_s, prepend=series.time_s[:1]).astype(np.float32)
    started = time.perf_counter()
    edges = [*range(0, length, max(1, RECORDS_MAX // streams)), length]
    for begin, end in pairwise(edges):
        count = end - begin
        scores = engine.step(
            StepInputs(
                slots=np.tile(np.arange(streams, dtype=np.int32), count),
                fresh=np.repeat(np.arange(begin, end) == 0, streams),
                values=series.values[begin:end].reshape(-1, 1),
                features=np.zeros((count * streams, 0), np.float32),
                time_s=np.repeat(series.time_s[begin:end], streams),
                elapsed_s=np.repeat(elapsed_s[begin:end], streams),
            )
        ).scores
        parts = (scores.error, scores.naive_error, scores.pinball, scores.rank, scores.up, scores.down)
        for column, part in zip((error, naive, pinball, rank, up, down), parts, strict=True):
            column[begin:end] = part.reshape(count, *shape[1:])
    seconds = time.perf_counter() - started
    return Played(error, naive, pinball, rank, up, down, seconds, engine.layout.width * 4)


def table(name: str, model: Model, series: Series, rows: Rows, played: Played, horizons: Sequence[int]) -> list[Score]:
    """Score what was played at each of `horizons`, and as a path where the model has every step up to it."""
    found = []
    deviation = np.nanstd(series.values[: rows.train], axis=0)
    steps = model.spec.horizons
    for horizon in horizons:
        place = steps.index(horizon)
        error = _settled(played.error, rows, steps, horizon, place) / deviation
        found += _single(name, model, series, rows, played, horizon, deviation)
        if steps[: place + 1] == tuple(range(1, horizon + 1)):
            path = [_settled(played.error, rows, steps, horizon, each) / deviation for each in range(place + 1)]
            square = np.mean([np.nanmean(np.square(part), axis=0) for part in path], axis=0)
            absolute = np.mean([np.nanmean(np.abs(part), axis=0) for part in path], axis=0)
            count = int(np.isfinite(error).sum())
            found += _lines(name, series, horizon, "path", count, mse=square, mae=absolute, seconds=played.seconds)
    return found


def last_value(model: Model, series: Series, rows: Rows, played: Played, horizons: Sequence[int]) -> list[Score]:
    """The same table for the forecast that nothing changes."""
    naive = played._replace(error=played.naive)
    keep = ("mse", "mae", "mase", "seconds")
    found = []
    for score in table("last value", model, series, rows, naive, horizons):
        nothing = {"pinball": float("nan"), "coverage80": float("nan"), "brier": float("nan"), "seconds": float("nan")}
        nothing |= {"direction_hit_rate": float("nan"), "direction_halfwidth": float("nan"), "direction_count": 0}
        kept = {name: getattr(score, name) for name in score.__struct_fields__}
        found.append(Score(**(kept | {name: value for name, value in nothing.items() if name not in keep})))
    return found


def _settled(scores: NDArray[np.float32], rows: Rows, steps: tuple[int, ...], horizon: int, place: int) -> Array:
    """Scores at `steps[place]` of the forecasts whose path up to `horizon` lies in the scored rows: [windows, S]."""
    # A forecast made at row t has its path in the rows t + 1 .. t + horizon, and is settled at row t + step.
    first = max(rows.score_from - 1, 0) + steps[place]
    last = rows.score_to - 1 - horizon + steps[place]
    return scores[first : last + 1, :, place].astype(np.float64)


def _single(
    name: str, model: Model, series: Series, rows: Rows, played: Played, horizon: int, deviation: Array
) -> list[Score]:
    steps = model.spec.horizons
    place = steps.index(horizon)

    def take(scores: NDArray[np.float32]) -> Array:
        return _settled(scores, rows, steps, horizon, place)

    error, naive, pinball, rank = take(played.error), take(played.naive), take(played.pinball), take(played.rank)
    up, down = take(played.up), take(played.down)
    low, high = (
        int(np.argmin(np.abs(np.array(model.spec.quantiles) - level))) for level in (COVERAGE_LOW, COVERAGE_HIGH)
    )
    inside = np.where(np.isfinite(error), (rank > low) & (rank <= high), np.nan)
    moved = np.isfinite(error) & (naive != 0.0) & (up != down)
    hits = np.where(moved, (up > down) == (naive > 0.0), np.nan)
    usual = np.nanmean(np.abs(np.diff(series.values[: rows.train], axis=0)), axis=0)
    brier = np.where(moved, np.square(up / (up + down) - (naive > 0.0)), np.nan)
    return _lines(
        name,
        series,
        horizon,
        "step",
        int(np.isfinite(error).sum()),
        mse=np.nanmean(np.square(error / deviation), axis=0),
        mae=np.nanmean(np.abs(error / deviation), axis=0),
        mase=np.nanmean(np.abs(error), axis=0) / usual,
        pinball=np.nanmean(pinball / deviation, axis=0),
        coverage80=np.nanmean(inside, axis=0),
        direction_hit_rate=np.nanmean(hits, axis=0),
        direction_count=int(moved.sum()),
        direction_halfwidth=_halfwidth(hits),
        brier=np.nanmean(brier, axis=0),
        seconds=played.seconds,
    )


def _halfwidth(hits: Array) -> float:
    """Half the 95 % interval of a mean over time [windows, S], from BLOCKS blocks."""
    blocks = [np.nanmean(block) for block in np.array_split(hits, BLOCKS) if np.isfinite(block).any()]
    return float(1.96 * np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else float("nan")


def _lines(name: str, series: Series, horizon: int, scope: str, count: int, **columns: Array | float) -> list[Score]:
    """One line for each series where there are several, and one for their mean."""
    fixed = {"model": name, "horizon": horizon, "scope": scope}
    mean = {key: float(np.mean(value)) if np.ndim(value) else value for key, value in columns.items()}
    lines = [Score(target="*", count=count, **fixed, **mean)]  # type: ignore[arg-type]
    for place, target in enumerate(series.names if len(series.names) > 1 else ()):
        own = {key: float(value[place]) for key, value in columns.items() if isinstance(value, np.ndarray)}
        lines.append(Score(target=target, count=count // len(series.names), **fixed, **own))  # type: ignore[arg-type]
    return lines
