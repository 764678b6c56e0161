"""Several series on one clock, and which of their rows are for what: what a backtest is over."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.model.columns import StreamHistory

Array = NDArray[np.float64]


class Series(NamedTuple):
    """Series on one clock: time_s [T], values [T, S] (NaN = missing), names of the S series."""

    time_s: Array
    values: Array
    names: tuple[str, ...]

    def streams(self, rows: int | None = None, *, together: bool = False) -> list[StreamHistory]:
        """The first `rows` as one stream of S targets, or as S streams of one."""
        time_s, values = self.time_s[:rows], self.values[:rows]
        nothing = np.zeros((len(time_s), 0), np.float32)
        if together:
            return [StreamHistory("all", time_s, values, nothing)]
        return [StreamHistory(name, time_s, values[:, [place]], nothing) for place, name in enumerate(self.names)]


class Rows(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows are for what: the first `train` set the units, those from `score_from` up to `score_to` count."""

    train: int
    score_from: int
    score_to: int
