"""What a network has to beat: point forecasts [T, S, H] after each row, from that row and those before it alone.

`naive` and `seasonal-naive` need nothing; the others come with `pip install "forecaster[backtest]"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forecaster.errors import Fatal

if TYPE_CHECKING:
    from forecaster.series import Rows, Series

NAIVE, SEASONAL = "naive", "seasonal-naive"
# A model that is refitted on every row would take days: fitted so often, and in between shown the rows that come.
REFIT_ROWS = 500
# What AutoETS and AutoTheta see of the past, at most and in seasons.
WINDOW_ROWS, WINDOW_SEASONS = 300, 4
# A fit needs two seasons and some.
FIT_SEASONS_MIN, FIT_ROWS_MIN = 2.5, 10

Array = NDArray[np.float64]
Forecast = Callable[["Series", "Rows", tuple[int, ...], int], Array]


def filled(values: Array) -> Array:
    """The last observed value in each row [T, S]; NaN before the first."""
    observed = np.where(np.isfinite(values), np.arange(len(values))[:, None], 0)
    return np.take_along_axis(values, np.maximum.accumulate(observed, axis=0), axis=0)


def naive(series: Series, _rows: Rows, steps: tuple[int, ...], _season: int) -> Array:
    """The last observed value."""
    return np.repeat(filled(series.values)[:, :, None], len(steps), axis=2)


def seasonal_naive(series: Series, _rows: Rows, steps: tuple[int, ...], season: int) -> Array:
    """What was observed a season (or as many as it takes) before the target."""
    last = filled(series.values)
    back = [-(-step // season) * season - step for step in steps]
    forecasts = np.full((*last.shape, len(steps)), np.nan)
    for place, rows in enumerate(back):
        forecasts[rows:, :, place] = last[: len(last) - rows]
    return forecasts


def statsforecast(name: str) -> Forecast:
    """AutoETS or AutoTheta of the package statsforecast."""

    def forecast(series: Series, rows: Rows, steps: tuple[int, ...], season: int) -> Array:
        make = getattr(_package("statsforecast.models", name), name)
        last = filled(series.values)
        forecasts = np.full((*last.shape, len(steps)), np.nan)
        wanted = np.array(steps) - 1
        window = max(WINDOW_ROWS, WINDOW_SEASONS * season)
        for place in range(last.shape[1]):
            first = max(rows.score_from - steps[-1], round(FIT_SEASONS_MIN * season), FIT_ROWS_MIN)
            for fitted in range(first, len(last), REFIT_ROWS):
                # Where a fit begins, what follows it begins too: its states are those of that row.
                begin = max(0, fitted + 1 - window)
                model: Any = make(season_length=season).fit(_finite(last[begin : fitted + 1, place]))
                forecasts[fitted, place] = model.predict(h=steps[-1])["mean"][wanted]
                for row in range(fitted + 1, min(fitted + REFIT_ROWS, len(last))):
                    past = _finite(last[begin : row + 1, place])
                    forecasts[row, place] = model.forward(past, h=steps[-1])["mean"][wanted]
        return forecasts

    return forecast


def river(series: Series, _rows: Rows, steps: tuple[int, ...], season: int) -> Array:
    """Holt-Winters as the package river has it, which learns from every row."""
    make = _package("river.time_series", "river").HoltWinters
    last = filled(series.values)
    forecasts = np.full((*last.shape, len(steps)), np.nan)
    wanted = np.array(steps) - 1
    for place in range(last.shape[1]):
        seasonal = {"gamma": 0.1, "seasonality": season} if season > 1 else {}
        model = make(alpha=0.3, beta=0.01, **seasonal)
        for row, value in enumerate(last[:, place]):
            if np.isfinite(value):
                model.learn_one(float(value))
            # Its own seasons must have been seen once.
            if row > season + 1:
                forecasts[row, place] = np.array(model.forecast(horizon=steps[-1]))[wanted]
    return forecasts


RIVALS: dict[str, Forecast] = {
    NAIVE: naive,
    SEASONAL: seasonal_naive,
    "AutoETS": statsforecast("AutoETS"),
    "AutoTheta": statsforecast("AutoTheta"),
    "river": river,
}


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def _package(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise Fatal(f'backtest --models {name}: needs more packages: pip install "forecaster[backtest]"') from None
