"""How good the forecasts are, prequentially: each is judged by what came after it, and only then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forecaster import signals
from forecaster.model.columns import Scores


def direction_hits(scores: Scores, threshold: float) -> NDArray[np.float32]:
    """Which called directions came true: [N, D, H]; 1 hit, 0 miss, NaN where none was called or nothing moved."""
    called = signals.directions(np.nan_to_num(scores.up), np.nan_to_num(scores.down), threshold)
    moved = np.sign(np.nan_to_num(scores.naive_error))
    judged = (called != signals.FLAT) & (moved != 0)
    return np.where(judged, (called == moved).astype(np.float32), np.nan).astype(np.float32)


@dataclass
class Tally:
    """Sums over the forecasts of one stream, target and horizon that have been settled."""

    count: int = 0
    absolute_error: float = 0.0
    naive_absolute_error: float = 0.0
    squared_error: float = 0.0
    naive_squared_error: float = 0.0
    pinball: float = 0.0
    directions: int = 0
    hits: int = 0

    @property
    def error_ratio(self) -> float:
        """Absolute error over that of the last-value forecast: below 1 is better. NaN before the first."""
        return self.absolute_error / self.naive_absolute_error if self.naive_absolute_error else float("nan")

    @property
    def hit_rate(self) -> float:
        """Share of called directions that came true, NaN before the first."""
        return self.hits / self.directions if self.directions else float("nan")


@dataclass
class Evaluation:
    """Running scores of an input by stream, target and horizon: for the demo, replay and backtest.

    Memory grows with the streams seen; the daemon's own metrics are sums over all.
    """

    threshold: float
    tallies: dict[tuple[str, int, int], Tally] = field(default_factory=dict)

    def add(self, streams: list[str], scores: Scores) -> None:
        """Take in what a batch of N records settled."""
        if not streams:
            return
        names, index = np.unique(np.array(streams, object), return_inverse=True)
        hits = direction_hits(scores, self.threshold)
        settled = np.isfinite(scores.error)
        columns = {
            "count": settled,
            "absolute_error": np.abs(scores.error),
            "naive_absolute_error": np.abs(scores.naive_error),
            "squared_error": np.square(scores.error.astype(np.float64)),
            "naive_squared_error": np.square(scores.naive_error.astype(np.float64)),
            "pinball": scores.pinball,
            "directions": np.isfinite(hits),
            "hits": hits,
        }
        _, targets, horizons = scores.error.shape
        for target in range(targets):
            for horizon in range(horizons):
                sums = {
                    name: np.bincount(index, np.nan_to_num(column[:, target, horizon].astype(np.float64)), len(names))
                    for name, column in columns.items()
                }
                for i, stream in enumerate(names):
                    tally = self.tallies.setdefault((stream, target, horizon), Tally())
                    for name, values in sums.items():
                        before: int | float = getattr(tally, name)
                        setattr(tally, name, before + type(before)(values[i]))  # counts stay whole numbers

    def tally(self, stream: str, target: int = 0, horizon: int = 0) -> Tally:
        """Of one stream; an empty one where nothing is settled yet."""
        return self.tallies.get((stream, target, horizon), Tally())
