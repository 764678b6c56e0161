"""Season lengths found in history."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from forecaster.model.columns import StreamHistory
from forecaster.model.seasons import find_seasons

ROWS = 1_500


def history(values: NDArray[np.float64]) -> StreamHistory:
    """One stream of one target."""
    rows = len(values)
    return StreamHistory("s", np.arange(rows) * 3600.0, values[:, None], np.zeros((rows, 0), np.float32))


def daily(seed: int, week: float = 0.0, noise: float = 0.5) -> NDArray[np.float64]:
    """Hours with a day in them, another level on two days of seven, noise, and a walk beneath."""
    random = np.random.default_rng(seed)
    hours = np.arange(ROWS)
    weekend = week * (hours // 24 % 7 >= 5)
    walk = 0.05 * np.cumsum(random.standard_normal(ROWS))
    return np.asarray(np.sin(2 * np.pi * hours / 24) + weekend + walk + noise * random.standard_normal(ROWS))


@pytest.mark.parametrize(("week", "expected"), [(0.0, (24,)), (1.0, (24, 168))])
def test_a_day_is_found_and_a_week_where_there_is_one(week: float, expected: tuple[int, ...]) -> None:
    """Several streams with noise and a drift under them have their day's length, and the week's where it matters."""
    assert find_seasons([history(daily(seed, week)) for seed in range(3)]) == expected


def test_missing_values_and_spikes_hide_no_season() -> None:
    """A tenth of the values gone and a few sentinels change nothing."""
    values = daily(0)
    random = np.random.default_rng(1)
    values[random.random(ROWS) < 0.1] = np.nan
    values[[100, 700]] = -9999.0
    assert find_seasons([history(values)]) == (24,)


def test_a_walk_has_no_season() -> None:
    """Of 60 random walks at most one in five seems to repeat by chance, and no three together do."""
    random = np.random.default_rng(2)
    walks = [history(np.cumsum(random.standard_normal(ROWS))) for _ in range(60)]
    assert sum(find_seasons([walk]) != () for walk in walks) <= 12
    assert find_seasons(walks) == ()


@pytest.mark.parametrize("values", [np.zeros(500), np.full(500, np.nan), np.arange(3.0)])
def test_what_says_nothing_has_no_season(values: NDArray[np.float64]) -> None:
    """A constant, nothing observed, and three values: no season and no error."""
    assert find_seasons([history(values)]) == ()
