"""How good were the forecasts of the rows that count?

Errors are in units of `deviation`: those of the train rows, or the series' own.

    path   the mean over steps 1..H of every forecast whose whole path lies in the scored rows
    step   the same forecasts at step H alone
    cold   forecasts at step H by how many records their stream had had, wherever they are
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.model.registry import Model
from forecaster.model.runtime import DeviceChoice
from forecaster.prequential import engine_for, play
from forecaster.rivals import filled
from forecaster.series import Rows, Series

# A direction's hit rate is a mean over windows that overlap: its interval comes from so many blocks of time.
BLOCKS = 50
COVERAGE_LOW, COVERAGE_HIGH = 0.1, 0.9
COLD = ((1, 10), (11, 100))
# The last rows of which the quantiles are kept, for a picture.
FAN_ROWS = 200
NAN = float("nan")

Array = NDArray[np.float64]
Floats = NDArray[np.float32]


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a backtest's table; NaN where it does not apply. `target` is "*" for the mean over all."""

    model: str
    target: str
    horizon: int
    scope: str
    count: int
    mse: float
    mae: float
    mase: float = NAN
    pinball: float = NAN
    coverage80: float = NAN
    direction_hit_rate: float = NAN
    direction_count: int = 0
    direction_halfwidth: float = NAN
    brier: float = NAN
    seconds: float = NAN


class Played(NamedTuple):
    """One forecaster's scores by the row that settled them: [T, S, H] each, in the series' own units.

    Attributes:
        steps: the H steps ahead.
        error: observed minus forecast.
        move: observed minus the last value at the forecast's time.
        up, down: the forecast probabilities; 1 and 0 of a forecast that has none.
        pinball, rank: of the quantiles; NaN where there are none.
        fan: the quantiles [FAN_ROWS, S, H, Q] after each of the last rows; none of a point forecast.
        levels: of the quantiles, Q of them.
        row_bytes: a stream's state; 0 where there is none.
    """

    steps: tuple[int, ...]
    error: Floats
    move: Floats
    up: Floats
    down: Floats
    pinball: Floats
    rank: Floats
    seconds: float
    fan: Array
    levels: tuple[float, ...]
    row_bytes: int


def play_model(model: Model, series: Series, device: DeviceChoice = "auto") -> Played:
    """Step every series from its first row to its last; as many streams as the model's targets make of them."""
    count, width = series.values.shape
    spec = model.spec
    histories = series.streams(together=len(spec.targets) > 1)
    engine = engine_for(model, len(histories), device)
    shape = (count, width, len(spec.horizons))
    error, move, up, down, pinball, rank = (np.full(shape, np.nan, np.float32) for _ in range(6))
    fan = np.full((min(FAN_ROWS, count), *shape[1:], len(spec.quantiles)), np.nan)
    started = time.perf_counter()
    for stream, row, outputs in play(engine, histories):
        # The targets of one stream stand side by side, and so do streams of one target.
        where = row[:, None], stream[:, None] + np.arange(len(spec.targets))
        scores = outputs.scores
        parts = (scores.error, scores.naive_error, scores.up, scores.down, scores.pinball, scores.rank)
        for column, part in zip((error, move, up, down, pinball, rank), parts, strict=True):
            column[where] = part
        late = row >= count - len(fan)
        fan[where[0][late] - (count - len(fan)), where[1][late]] = outputs.quantiles[late]
    seconds = time.perf_counter() - started
    row_bytes = engine.layout.width * 4
    return Played(spec.horizons, error, move, up, down, pinball, rank, seconds, fan, tuple(spec.quantiles), row_bytes)


def play_points(series: Series, steps: tuple[int, ...], forecasts: Array, seconds: float) -> Played:
    """The scores of point forecasts [T, S, H], made after each row; NaN where there is none."""
    last = filled(series.values)
    error, move, up, down = (np.full(forecasts.shape, np.nan, np.float32) for _ in range(4))
    for place, step in enumerate(steps):
        forecast = forecasts[:-step, :, place]
        error[step:, :, place] = series.values[step:] - forecast
        move[step:, :, place] = series.values[step:] - last[:-step]
        up[step:, :, place] = forecast > last[:-step]
        down[step:, :, place] = forecast < last[:-step]
    nothing = np.full_like(error, np.nan)
    fan = np.empty((0, *forecasts.shape[1:], 0))
    return Played(steps, error, move, up, down, nothing, nothing, seconds, fan, (), 0)


def table(
    name: str, series: Series, rows: Rows, played: Played, horizons: Sequence[int], deviation: Array
) -> list[Score]:
    """Score what was played at each of `horizons`, and as a path where there is every step up to it."""
    found = []
    for horizon in horizons:
        place = played.steps.index(horizon)
        found += _single(name, series, rows, played, horizon, deviation)
        if played.steps[: place + 1] == tuple(range(1, horizon + 1)):
            path = [_settled(played.error, rows, played.steps, horizon, each) / deviation for each in range(place + 1)]
            square = np.mean([_mean(np.square(part)) for part in path], axis=0)
            absolute = np.mean([_mean(np.abs(part)) for part in path], axis=0)
            count = int(np.isfinite(path[-1]).sum())
            found += _lines(name, series, horizon, "path", count, mse=square, mae=absolute, seconds=played.seconds)
        found += _cold(name, series, played, horizon, deviation)
    return found


def train_deviation(series: Series, rows: Rows) -> Array:
    """Of the train rows, population: [S]. One where a series does not move there."""
    deviation = np.nanstd(series.values[: rows.train], axis=0)
    return np.where(deviation > 0.0, deviation, 1.0)


def _settled(scores: Floats, rows: Rows, steps: tuple[int, ...], horizon: int, place: int) -> Array:
    """Scores at `steps[place]` of the forecasts whose path up to `horizon` lies in the scored rows: [windows, S]."""
    # A forecast made at row t has its path in the rows t + 1 .. t + horizon, and is settled at row t + step.
    first = max(rows.score_from - 1, 0) + steps[place]
    last = rows.score_to - 1 - horizon + steps[place]
    return scores[first : last + 1, :, place].astype(np.float64)


def _cold(name: str, series: Series, played: Played, horizon: int, deviation: Array) -> list[Score]:
    """The first forecasts that the streams ever had."""
    found = []
    place = played.steps.index(horizon)
    for first, last in COLD:
        error = played.error[first - 1 + horizon : last + horizon, :, place] / deviation
        if np.isfinite(error).any():
            square, absolute = _mean(np.square(error)), _mean(np.abs(error))
            count = int(np.isfinite(error).sum())
            found += _lines(name, series, horizon, f"cold {first}-{last}", count, mse=square, mae=absolute)
    return found


def _single(name: str, series: Series, rows: Rows, played: Played, horizon: int, deviation: Array) -> list[Score]:
    place = played.steps.index(horizon)

    def take(scores: Floats) -> Array:
        return _settled(scores, rows, played.steps, horizon, place)

    error, move, pinball, up, down = (
        take(scores) for scores in (played.error, played.move, played.pinball, played.up, played.down)
    )
    moved = np.isfinite(error) & (move != 0.0) & (up != down)
    hits = np.where(moved, (up > down) == (move > 0.0), np.nan)
    usual = _mean(np.abs(np.diff(series.values[: rows.train], axis=0)))
    columns: dict[str, Array | float] = {
        "mse": _mean(np.square(error / deviation)),
        "mae": _mean(np.abs(error / deviation)),
        "mase": _mean(np.abs(error)) / usual,
        "direction_hit_rate": _mean(hits),
        "direction_halfwidth": _halfwidth(hits),
        "seconds": played.seconds,
    }
    if played.levels:
        columns |= {
            "pinball": _mean(pinball / deviation),
            "coverage80": _mean(inside_interval(played.levels, take(played.rank), error)),
            "brier": _mean(np.where(moved, np.square(up / (up + down) - (move > 0.0)), np.nan)),
        }
    count = int(np.isfinite(error).sum())
    return _lines(name, series, horizon, "step", count, int(moved.sum()), **columns)


def inside_interval(levels: tuple[float, ...], rank: NDArray[Any], error: NDArray[Any]) -> Array:
    """1 where the observation lay between the quantiles nearest to 0.1 and 0.9, 0 where not."""
    low, high = (int(np.argmin(np.abs(np.array(levels) - level))) for level in (COVERAGE_LOW, COVERAGE_HIGH))
    return np.where(np.isfinite(error), (rank > low) & (rank <= high), np.nan)


def _mean(windows: Array) -> Array:
    """Over the windows [windows, S]; NaN where there is none."""
    count = np.isfinite(windows).sum(axis=0)
    return np.where(count, np.nansum(windows, axis=0) / np.maximum(count, 1), np.nan)


def _halfwidth(hits: Array) -> float:
    """Half the 95 % interval of a mean over time [windows, S], from BLOCKS blocks."""
    blocks = [np.nanmean(block) for block in np.array_split(hits, BLOCKS) if np.isfinite(block).any()]
    return float(1.96 * np.std(blocks, ddof=1) / np.sqrt(len(blocks))) if len(blocks) > 1 else NAN


def _lines(
    name: str, series: Series, horizon: int, scope: str, count: int, directions: int = 0, **columns: Array | float
) -> list[Score]:
    """One line for each series where there are several, and one for their mean."""
    fixed = {"model": name, "horizon": horizon, "scope": scope}
    mean = {key: float(np.mean(value)) if np.ndim(value) else value for key, value in columns.items()}
    lines = [Score(target="*", count=count, direction_count=directions, **fixed, **mean)]  # type: ignore[arg-type]
    several = len(series.names)
    for place, target in enumerate(series.names if several > 1 else ()):
        own = {key: float(value[place]) for key, value in columns.items() if isinstance(value, np.ndarray)}
        parts = {"count": count // several, "direction_count": directions // several}
        lines.append(Score(target=target, **parts, **fixed, **own))  # type: ignore[arg-type]
    return lines
