"""A year of the worst that a sensor can send: what is learned per stream stays finite, bounded and useful."""

from __future__ import annotations

import numpy as np
import pytest
from networks import make_model, make_spec
from numpy.typing import NDArray

from forecaster.model.columns import StepInputs, StepOutputs
from forecaster.model.step import StepEngine

RECORDS = 10_000_000
STREAMS, DEPTH = 1_024, 8
# The last so many calls are judged: every stream has had 9,000 records by then.
JUDGED = 32
SPEC = make_spec(
    targets=("value",), features=(), categories={}, horizons=(1,), units=2, memory=6,
    readout=True, hedge=True, calibration=True,
)  # fmt: skip

Array = NDArray[np.float64]


def hostile(kind: int, row: Array, random: np.random.Generator) -> Array:
    """The values [DEPTH, streams] of one kind at these rows [DEPTH, 1]."""
    shape = (len(row), STREAMS // 8)
    noise = random.standard_normal(shape)
    walk_free = np.sin(row * 2 * np.pi / 12.0)
    return [
        lambda: np.full(shape, 21.5),  # a month and more of one value
        lambda: np.where(random.random(shape) < 0.01, -9999.0, walk_free + 0.1 * noise),  # sentinels
        lambda: noise * 10.0 ** random.integers(-30, 31, shape),  # sixty orders of magnitude
        lambda: np.where(row % 2 == 0, 1e30, -1e30) + 0.0 * noise,  # from end to end
        lambda: np.where(random.random(shape) < 0.5, np.nan, walk_free + 0.1 * noise),  # half missing
        lambda: 1e6 + 0.1 * noise,  # little on much
        lambda: np.floor(row / 1000.0) % 7 * 1e6 + noise,  # a new regime every thousand records
        lambda: np.exp(np.minimum(row / 150.0, 60.0)) * (1.0 + 0.01 * noise),  # ever faster
    ][kind]()


@pytest.mark.timeout(600)
def test_ten_million_hostile_records_break_nothing() -> None:
    """Every state and forecast stays finite and in order; nobody's median is much worse than the last value."""
    engine = StepEngine(make_model(SPEC, noise=0.05), STREAMS, "cpu")
    engine.compile()
    random = np.random.default_rng(11)
    slots = np.tile(np.arange(STREAMS, dtype=np.int32), DEPTH)
    calls = RECORDS // len(slots)
    errors, naive = np.zeros(STREAMS), np.zeros(STREAMS)
    for call in range(calls):
        row = np.arange(call * DEPTH, (call + 1) * DEPTH, dtype=np.float64)
        values = np.concatenate([hostile(kind, row[:, None], random) for kind in range(8)], axis=1)
        outputs = engine.step(
            StepInputs(
                slots=slots,
                fresh=np.full(len(slots), fill_value=False) if call else np.arange(len(slots)) < STREAMS,
                values=values.reshape(-1, 1),
                features=np.zeros((len(slots), 0), np.float32),
                time_s=1.7e9 + 60.0 * np.repeat(row, STREAMS),
                elapsed_s=np.full(len(slots), 60.0, np.float32),
            )
        )
        require_sound(outputs)
        if call >= calls - JUDGED:
            scores = outputs.scores
            errors += np.nansum(np.abs(scores.error[:, 0, 0]).reshape(DEPTH, STREAMS).astype(np.float64), axis=0)
            naive += np.nansum(np.abs(scores.naive_error[:, 0, 0]).reshape(DEPTH, STREAMS).astype(np.float64), axis=0)
    assert np.isfinite(engine.read(np.arange(STREAMS, dtype=np.int32))).all()
    by_kind = errors.reshape(8, -1).sum(axis=1) / np.maximum(naive.reshape(8, -1).sum(axis=1), 1e-9)
    assert errors[: STREAMS // 8].max() < 1e-3  # what never moves is known
    assert by_kind[1:].max() < 1.15, by_kind


def require_sound(outputs: StepOutputs) -> None:
    """Finite, in order, and probabilities where there is a forecast."""
    has = ~np.isnan(outputs.up[:, 0, 0])
    quantiles = outputs.quantiles[has]
    assert np.isfinite(quantiles).all()
    assert (np.diff(quantiles, axis=-1) >= 0.0).all()
    up, down = outputs.up[has], outputs.down[has]
    assert ((up >= 0.0) & (down >= 0.0) & (up + down <= 1.0 + 1e-5)).all()
