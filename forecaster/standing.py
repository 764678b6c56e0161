"""How each stream stands: how far its forecasts miss and how far its inputs stray, in units of its own scale.

Each stream carries two running means in the stream table. A survey, every few seconds, looks over all of them: how
many drift or have gone stale, and which are the worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forecaster.streams import Slots, StreamKey, StreamTable, usual_interval_s

# A stream is judged once it has settled so many forecasts: before, its scale is not known well enough.
JUDGED_MIN = 32
# A steady stream's inputs are 0.8 on average, whatever its distribution: the scale is 1.25 mean absolute changes.
DRIFT_ZSCORE = 2.0
# A stream's scale follows within some hundred records, seconds at high rates: who drifted counts for so long.
DRIFT_HOLD_S = 60.0
# One value counts for at most this much of a stream's means: a lone spike is no drift.
ZSCORE_MAX, ERROR_MAX = 8.0, 1_000.0
# No record for so many of its usual intervals, and at least so long: a stream is stale.
STALE_INTERVALS, STALE_MIN_S = 10.0, 60.0
# Records from which on an interval is usual.
INTERVALS_MIN = 8
# Who is among the worst stays listed for so long: each name is a time series, and a crowd that takes turns would make
# thousands of them.
STAY_S = 600.0
MEMBERS_MAX = 100


class Settled(Protocol):
    """What one step settled; each [N, D, H], NaN where there is nothing."""

    @property
    def error(self) -> NDArray[np.float32]:
        """Observed minus median, in the target's units."""

    @property
    def naive_error(self) -> NDArray[np.float32]:
        """Observed minus the value when the forecast was made."""

    @property
    def scale(self) -> NDArray[np.float32]:
        """The stream's scale when the forecast was made."""


class Scaled(NamedTuple):
    """Absolute errors in scales, the forecast's and the last value's; [N, D, H], not finite where there is none."""

    error: NDArray[np.float64]
    naive: NDArray[np.float64]

    @property
    def settled(self) -> NDArray[np.bool_]:
        """[N, D, H]: is there a forecast to judge?"""
        both: NDArray[np.bool_] = np.isfinite(self.error) & np.isfinite(self.naive)
        return both


class Worst(NamedTuple):
    """A stream among the worst: its input, itself, the mean of its last scaled errors."""

    input: str
    key: StreamKey
    error: float


def scaled(scores: Settled) -> Scaled:
    """Absolute errors in units of the stream's scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # In float64: 1e30 over 1e-30 has no float32. A scale of zero measures nothing: infinite or NaN, left out.
        scale = scores.scale.astype(np.float64)
        return Scaled(np.abs(scores.error / scale), np.abs(scores.naive_error / scale))


def input_zscores(errors: Scaled, horizons: Sequence[int]) -> NDArray[np.float64]:
    """[N, D]: how far the value moved, in scales: over the shortest horizon, as if over one record."""
    moved: NDArray[np.float64] = np.where(errors.settled[..., 0], errors.naive[..., 0], np.nan) / np.sqrt(horizons[0])
    return moved


def judge(
    table: StreamTable, slots: Slots, by_stream: NDArray[np.int64], scores: Settled, horizons: Sequence[int]
) -> None:
    """Take what a poll of N records settled into its streams' means; `by_stream` sorts them by slot."""
    errors = scaled(scores)
    judged = errors.settled[..., 0]
    rows = by_stream[np.count_nonzero(judged, axis=1)[by_stream] > 0]
    if len(rows):
        settled = errors.settled[rows]
        # At horizon h a random walk's error is sqrt(h) times as large: so long horizons weigh as much as short ones.
        missed = errors.error[rows] / np.sqrt(np.asarray(horizons, float))
        strayed = input_zscores(errors, horizons)[rows]
        table.judge(
            slots[rows],
            _row_means(np.minimum(missed, ERROR_MAX), settled),
            _row_means(np.minimum(strayed, ZSCORE_MAX), settled[..., 0]),
        )
        _note_drift(table, slots[rows])


def _note_drift(table: StreamTable, slots: Slots) -> None:
    columns = table.columns
    far = slots[(columns["zscore_abs"][slots] > DRIFT_ZSCORE) & (columns["judged"][slots] >= JUDGED_MIN)]
    columns["drifted_s"][far] = columns["used_s"][far]


def _row_means(values: NDArray[np.float64], where: NDArray[np.bool_]) -> NDArray[np.float64]:
    inner = tuple(range(1, values.ndim))
    means: NDArray[np.float64] = np.mean(values, axis=inner, where=where)
    return means


def drifting(table: StreamTable, now_s: float) -> int:
    """Streams whose inputs were far outside of what their own past made usual, within DRIFT_HOLD_S."""
    return int(np.count_nonzero(table.columns["drifted_s"] > now_s - DRIFT_HOLD_S))


def stale(table: StreamTable, now_s: float) -> int:
    """Streams that have had no record for far longer than usual: their source may be gone."""
    columns = table.columns
    usual_s = usual_interval_s(columns["count"], columns["first_s"], columns["newest_s"])
    silent_s = now_s - columns["used_s"]
    waited = silent_s > np.maximum(STALE_INTERVALS * usual_s, STALE_MIN_S)
    return int(np.count_nonzero((columns["count"] >= INTERVALS_MIN) & waited))


class WorstStreams:
    """The `places` streams with the largest errors, and who was among them within STAY_S; MEMBERS_MAX at most."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._until_s: dict[tuple[str, StreamKey], float] = {}

    def survey(self, tables: Mapping[str, StreamTable], now_s: float) -> list[Worst]:
        """Who is listed now, by the tables of all inputs."""
        top = [Worst(name, *each) for name, table in tables.items() for each in _largest(table, self._places)]
        errors = {(name, key): _error(tables[name], key) for name, key in self._until_s}
        self._until_s = {who: until for who, until in self._until_s.items() if until > now_s and errors[who]}
        for worst in sorted(top, key=lambda each: -each.error)[: self._places]:
            who = (worst.input, worst.key)
            if who in self._until_s or len(self._until_s) < MEMBERS_MAX:
                self._until_s[who] = now_s + STAY_S
                errors[who] = worst.error
        return [Worst(name, key, errors[name, key]) for name, key in self._until_s]


def _largest(table: StreamTable, count: int) -> list[tuple[StreamKey, float]]:
    judged = np.flatnonzero(table.columns["judged"] >= JUDGED_MIN)
    errors = table.columns["scaled_error"][judged]
    if len(judged) > count:
        place = np.argpartition(errors, len(errors) - count)[len(errors) - count :] if count else judged[:0]
        judged, errors = judged[place], errors[place]
    found = ((table.keys[slot], error) for slot, error in zip(judged.tolist(), errors.tolist(), strict=True))
    return [(key, error) for key, error in found if key is not None]


def _error(table: StreamTable, key: StreamKey) -> float:
    """A member's error now, 0 once its stream has no place in the table."""
    slot = table.find(key.partition, [key.stream])[0]
    return float(table.columns["scaled_error"][slot]) if slot >= 0 else 0.0
