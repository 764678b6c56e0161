"""Columns in, columns out: what the worker hands to the network and what it gets back.

N  records, in poll order        H  published horizons
D  targets                       Q  quantiles
F  features: numeric ones (NaN = missing), then the one-hots of the categories
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.spec import NetworkSpec

# Larger values are stepped as this. float32 ends at 3.4e38; the room above is for sums, scales and forecasts.
VALUE_MAX = 1e30

_DAY_S = 86_400.0
_WEEK_S = 7 * _DAY_S
CLOCK_WIDTH = 4


class StepInputs(NamedTuple):
    """N records: a stream's records stand in its order, streams stand in any order.

    Attributes:
        slots: int32[N], each stream's row in the table.
        fresh: bool[N], True at the first record of a stream: it starts from the initial row.
        values: float64[N, D], NaN where the target is missing.
        features: float32[N, F].
        time_s: float64[N], event time since the epoch.
        elapsed_s: float32[N], since the stream's last record; 0 when fresh.
    """

    slots: NDArray[np.int32]
    fresh: NDArray[np.bool_]
    values: NDArray[np.float64]
    features: NDArray[np.float32]
    time_s: NDArray[np.float64]
    elapsed_s: NDArray[np.float32]


class Scores(NamedTuple):
    """Of the forecasts that each record settles, made h records ago in its stream; float32[N, D, H].

    NaN where there is none: the stream is too young, or the target is missing now.

    Attributes:
        error: observed minus median, in the target's units.
        naive_error: observed minus the value at the forecast's time; above 0 the value rose.
        scale: the stream's scale at the forecast's time.
        pinball: pinball loss, mean over the quantiles, in the target's units.
        rank: how many of the quantiles the observation is above.
        up, down: the probabilities that were forecast.
    """

    error: NDArray[np.float32]
    naive_error: NDArray[np.float32]
    scale: NDArray[np.float32]
    pinball: NDArray[np.float32]
    rank: NDArray[np.float32]
    up: NDArray[np.float32]
    down: NDArray[np.float32]


class StepOutputs(NamedTuple):
    """The forecasts after each of the N records, in the order of the inputs.

    A target that its stream has never observed has no forecast: NaN in all four.

    Attributes:
        filled: float64[N, D], the value stepped with: the observed one, or the forecast in its place.
        quantiles: float64[N, D, H, Q] in the target's units, never crossing. Rounded to a hundred-thousandth of
            the stream's scale, so that a number has as many digits as it has meaning.
        up, down: float32[N, D, H], P(value h records on is above / below now).
        scores: of the forecasts settled by these records.
    """

    filled: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    up: NDArray[np.float32]
    down: NDArray[np.float32]
    scores: Scores


class StreamHistory(NamedTuple):
    """One stream's past, in time order: what training reads.

    Attributes:
        stream: its id, for messages.
        time_s: float64[N].
        values: float64[N, D], NaN = missing.
        features: float32[N, F].
    """

    stream: str
    time_s: NDArray[np.float64]
    values: NDArray[np.float64]
    features: NDArray[np.float32]


class PackedColumns(NamedTuple):
    """Where each column lies in the one float32 array that goes to the device."""

    high: slice
    low: slice
    clock: slice
    elapsed: slice
    features: slice
    width: int


def packed_columns(spec: NetworkSpec) -> PackedColumns:
    """Lay the inputs of one record out: values (high, low), clock, elapsed seconds, features."""
    ends = np.cumsum([len(spec.targets), len(spec.targets), CLOCK_WIDTH, 1, spec.feature_width]).tolist()
    high, low, clock, elapsed, features = (slice(a, b) for a, b in zip([0, *ends], ends, strict=False))
    return PackedColumns(high, low, clock, elapsed, features, ends[-1])


def pack(
    spec: NetworkSpec,
    values: NDArray[np.float64],
    features: NDArray[np.float32],
    time_s: NDArray[np.float64],
    elapsed_s: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Pack N records for the device: float32[N, packed_columns(spec).width]. NaN still means missing."""
    columns = packed_columns(spec)
    packed = np.empty((len(values), columns.width), np.float32)
    packed[:, columns.high], packed[:, columns.low] = split(values)
    packed[:, columns.clock] = clock(time_s)
    packed[:, columns.elapsed] = elapsed_s[:, None]
    packed[:, columns.features] = features
    return packed


def split(values: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Split float64 into two float32 whose sum keeps 48 bits of it; NaN goes to both."""
    bounded = np.clip(values, -VALUE_MAX, VALUE_MAX)
    high = bounded.astype(np.float32)
    return high, (bounded - high).astype(np.float32)


def clock(time_s: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32[N, 4]: sine and cosine of the position in the day, then in the week (UTC)."""
    # In float64, on the host: float32 cannot tell two minutes apart 1.7e9 seconds after the epoch.
    day = time_s % _DAY_S * (2 * np.pi / _DAY_S)
    week = time_s % _WEEK_S * (2 * np.pi / _WEEK_S)
    return np.stack([np.sin(day), np.cos(day), np.sin(week), np.cos(week)], axis=-1).astype(np.float32)
