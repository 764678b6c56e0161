"""A stream's whole memory is one row of float32; this file says where each part of it lies.

The state table on the device, the state topic and the tests all read rows through
the same `RowLayout`, and it is declared once, in `row_layout`. A component that
needs memory adds its fields there and finds them in the state by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from forecaster.model.geometry import LAGS, LEVELS, TENTHS, experts, initial_knots, kept_width, longest, readout_width
from forecaster.model.spec import NetworkSpec

# Changes whenever an old row can no longer be read as a new one.
ROW_FORMAT = 4

# Variance of a readout's weight before anything is known, and at most: that of about 30 records of evidence.
VARIANCE_MAX = 0.03
# The same for the correction of the hedge, one record ahead; divided by the horizon.
CORRECTION_VARIANCE_MAX = 0.1

# A count in one float32 is exact up to 2^24; two fields of 2^20 hold a year at 60,000 records a second.
COUNT_BASE = 1 << 20


Declared: TypeAlias = "tuple[str, tuple[int, ...], float | NDArray[np.float64]]"


class Field(NamedTuple):
    """One named part of a row: `shape` floats from `start` on, `initial` in a stream that has seen nothing."""

    name: str
    shape: tuple[int, ...]
    initial: float | NDArray[np.float64]
    start: int

    @property
    def size(self) -> int:
        """How many floats."""
        return prod(self.shape)

    @property
    def slice(self) -> slice:
        """Where in the row."""
        return slice(self.start, self.start + self.size)


class RowLayout:
    """Named fields over one float32 row of `width` floats."""

    def __init__(self, declared: Iterator[Declared]) -> None:
        """Lay the declared (name, shape, initial value) out one after the other."""
        self.fields: dict[str, Field] = {}
        self.width = 0
        for name, shape, initial in declared:
            assert name not in self.fields, f"{name} is declared twice"
            field = Field(name, shape, initial, self.width)
            self.fields[name] = field
            self.width += field.size

    def initial_row(self) -> NDArray[np.float32]:
        """[width]: the row of a stream that has seen nothing."""
        row = np.empty(self.width, np.float32)
        for field in self.fields.values():
            row[field.slice] = np.ravel(field.initial)
        return row

    def view(self, rows: NDArray[np.float32], name: str) -> NDArray[np.float32]:
        """Return field `name` of rows [n, width] as a view [n, *shape]."""
        field = self.fields[name]
        return rows[:, field.slice].reshape(len(rows), *field.shape)

    def records(self, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        """[n]: how many records each of rows [n, width] has stepped."""
        low, high = self.view(rows, "records_low"), self.view(rows, "records_high")
        return low.astype(np.int64) + high.astype(np.int64) * COUNT_BASE


def row_layout(spec: NetworkSpec) -> RowLayout:
    """Lay out the row of a stream under `spec`."""
    return RowLayout(_fields(spec))


def pending_width(spec: NetworkSpec) -> int:
    """Floats kept of one forecast of one target: quantiles, P(up), P(down), scale, level (high, low), what made it."""
    return len(spec.quantiles) + 5 + kept_width(spec)


def season_field(season: int) -> str:
    """Name the ring of a season."""
    return f"memory/season{season}"


def serving_only(name: str) -> bool:
    """Whether only the whole step needs field `name`: `network.advance`, which training scans, does without."""
    return name == "pending" or name.startswith(("readout/", "hedge/", "correction/", "calibration/"))


def _fields(spec: NetworkSpec) -> Iterator[Declared]:
    targets = (len(spec.targets),)
    numeric = (len(spec.features),)
    # How many records this stream has stepped. 0 is a stream that has seen nothing.
    yield "records_low", (), 0.0
    yield "records_high", (), 0.0
    # The last value as two float32, so that a price of 65,000.01 and a counter of 1.7e9 keep their small changes.
    # Everything else is relative to it, so there is no anchor that a stream could drift away from.
    yield "last_high", targets, 0.0
    yield "last_low", targets, 0.0
    # Observed values (missing ones are not), up to COUNT_BASE: the flag "ever observed" and the weight of a new one.
    yield "seen", targets, 0.0
    # Mean absolute change.
    yield "deviation", targets, 0.0
    # Slow mean of the level, minus the last value.
    yield "mean_offset", targets, 0.0
    # The last forecast one record ahead, as a change: it takes a missing target's place.
    yield "fill", targets, 0.0
    # Mean of log(1 + seconds between records).
    yield "pace", (), 0.0
    yield "feature_seen", numeric, 0.0
    yield "feature_mean", numeric, 0.0
    yield "feature_deviation", numeric, 0.0
    for layer in range(spec.layers):
        for part in CELL_PARTS[spec.cell]:
            yield f"cell{layer}/{part}", (spec.units,), 0.0
    if spec.memory:
        yield from _memory_fields(spec)
    yield from _adaptive_fields(spec)
    # Forecasts whose target has not come yet: for horizon h a ring of h places, one ring after the other.
    yield "pending", (sum(spec.horizons), len(spec.targets), pending_width(spec)), 0.0


def _memory_fields(spec: NetworkSpec) -> Iterator[Declared]:
    targets = len(spec.targets)
    # The newest first.
    yield "memory/changes", (targets, LAGS), 0.0
    # Means minus the last value.
    yield "memory/levels", (targets, len(LEVELS)), 0.0
    # Slow root mean square of the changes.
    yield "memory/scale", (targets,), 0.0
    for season in spec.seasons:
        # By phase, which is the count of records modulo the season: the mean distance from the level.
        yield season_field(season), (season, targets), 0.0


def _adaptive_fields(spec: NetworkSpec) -> Iterator[Declared]:
    targets, width = len(spec.targets), readout_width(spec)
    forecasts = (targets, len(spec.horizons))
    if spec.readout:
        yield "readout/weights", (targets, width, len(spec.horizons)), 0.0
        yield "readout/covariance", (targets, width, width), np.tile(VARIANCE_MAX * np.eye(width), (targets, 1, 1))
        # Features, gain and scale of the last records: a ring of one place for each record of the longest horizon.
        yield "readout/ring", (longest(spec), targets, 2 * width + 1), 0.0
    if spec.hedge:
        yield "hedge/squares", (*forecasts, len(experts(spec))), 0.0
        yield "hedge/slopes", (*forecasts, len(experts(spec))), 0.0
        yield "hedge/usual", forecasts, 0.0
        others = len(experts(spec)) - 1
        variances = CORRECTION_VARIANCE_MAX / np.array(spec.horizons, float)
        yield "correction/weights", (*forecasts, others), 0.0
        start = np.tile(variances[:, None, None] * np.eye(others), (targets, 1, 1, 1))
        yield "correction/covariance", (*forecasts, others, others), start
        # Discounted squared errors that the correction has saved.
        yield "correction/saved", forecasts, 0.0
    if spec.calibration:
        yield "calibration/usual", forecasts, 0.0
        yield "calibration/offsets", (*forecasts, len(spec.quantiles)), 0.0
        # Of even odds, the quantiles' and the head's.
        yield "calibration/losses", (*forecasts, 3), 0.0
        # log of the stretch, the shift, the bend.
        yield "calibration/odds", (*forecasts, 3), 0.0
        # Added to the logit at each edge of a tenth.
        yield "calibration/knots", (*forecasts, TENTHS + 1), np.tile(initial_knots(spec), (targets, 1, 1))
        # How often the value was the same.
        yield "calibration/same", forecasts, 0.0


# What each kind of cell carries from record to record.
CELL_PARTS: dict[str, tuple[str, ...]] = {
    "rnn": ("h",),
    "lstm": ("h", "c"),
    "gru": ("h",),
    "feedforward": (),
}
