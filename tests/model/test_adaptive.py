"""What a stream learns by itself inside the step: no look-ahead, finite on anything, calibrated, alike in any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from networks import columns, make_inputs, make_model, make_spec, take
from numpy.typing import NDArray

from forecaster.model import calibration
from forecaster.model.columns import StepOutputs
from forecaster.model.registry import Model
from forecaster.model.runtime import tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine

STREAMS = 16
# Bounds what any row may hold: values end at 1e30, and a mean over 48 of them stays near that.
ROW_MAX = 1e33


@pytest.fixture(scope="module")
def spec() -> NetworkSpec:
    """Everything on, as small as it goes."""
    return make_spec(
        targets=("level",),
        features=(),
        categories={},
        seasons=(6,),
        units=4,
        quantiles=(0.1, 0.5, 0.9),
        memory=12,
        readout=True,
        hedge=True,
        calibration=True,
    )


@pytest.fixture(scope="module")
def compiled(spec: NetworkSpec) -> StepEngine:
    """One engine for the module; its table is blank for each test."""
    engine = StepEngine(make_model(spec, noise=0.1), capacity=STREAMS, device="cpu")
    engine.compile()
    return engine


@pytest.fixture
def engine(compiled: StepEngine) -> Iterator[StepEngine]:
    """The module's engine with no stream in it."""
    every = np.arange(STREAMS, dtype=np.int32)
    compiled.write(every, np.tile(compiled.layout.initial_row(), (STREAMS, 1)))
    return compiled


def play(engine: StepEngine, values: NDArray[np.float64]) -> StepOutputs:
    """Step values [T, S] of S streams, from their beginning, in polls of 50 records each."""
    length, streams = values.shape
    slots = np.tile(np.arange(streams), length)
    inputs = make_inputs(engine.model.spec, slots, values.reshape(-1, 1))
    parts = [engine.step(take(inputs, part)) for part in np.array_split(np.arange(len(slots)), max(1, length // 50))]
    scores = type(parts[0].scores)(*map(np.concatenate, zip(*(part.scores for part in parts), strict=True)))
    whole: list[Any] = [np.concatenate(column) for column in list(zip(*parts, strict=True))[:4]]
    return StepOutputs(*whole, scores)


def shaped(column: NDArray[Any], streams: int) -> NDArray[Any]:
    """Turn [T * S, ...] into [T, S, ...]."""
    return column.reshape(-1, streams, *column.shape[1:])


def rows(engine: StepEngine, streams: int = STREAMS) -> NDArray[np.float32]:
    """Every stream's row."""
    return engine.read(np.arange(streams, dtype=np.int32))


def daily(length: int, streams: int, seed: int) -> NDArray[np.float64]:
    """A season of 6 records, a slow walk and noise."""
    random = np.random.default_rng(seed)
    season = np.tile(3.0 * random.standard_normal((6, streams)), (length // 6 + 1, 1))[:length]
    walk = 0.1 * np.cumsum(random.standard_normal((length, streams)), axis=0)
    return 100.0 + season + walk + 0.5 * random.standard_normal((length, streams))


@pytest.mark.parametrize("when", [1, 2, 7, 60])
def test_nothing_that_comes_later_changes_a_forecast(engine: StepEngine, when: int) -> None:
    """Every forecast issued up to a record is the same to the last bit when all records after it are noise."""
    values = daily(120, 3, seed=1)
    noise = values.copy()
    noise[when:] = 1e3 * np.random.default_rng(2).standard_normal(noise[when:].shape)
    before = columns(play(engine, values))
    for name, column in columns(play(engine, noise)).items():
        np.testing.assert_array_equal(column[: 3 * when], before[name][: 3 * when], err_msg=name)


def test_learning_beats_the_last_value_by_far(engine: StepEngine) -> None:
    """On a season with noise the published median is at least 1.5 times as accurate as the last value."""
    scores = play(engine, daily(600, 8, seed=3)).scores
    late = slice(8 * 300, None)
    error, naive = np.square(scores.error[late]), np.square(scores.naive_error[late])
    assert (error.mean(axis=(0, 1)) < naive.mean(axis=(0, 1)) / 1.5**2).all()


def test_a_random_walk_is_not_made_worse(engine: StepEngine) -> None:
    """Where nothing can be learned the published median is within 5 % of the last value."""
    walks = np.cumsum(np.random.default_rng(4).standard_normal((900, STREAMS)), axis=0)
    scores = play(engine, walks).scores
    late = slice(STREAMS * 300, None)
    ratio = np.nanmean(np.square(scores.error[late])) / np.nanmean(np.square(scores.naive_error[late]))
    assert ratio < 1.05


def hostile() -> dict[str, NDArray[np.float64]]:
    """Series that break what learns without bounds, 1,200 records each."""
    random = np.random.default_rng(5)
    usual = daily(1200, 1, seed=6)[:, 0]
    sentinels = np.where(random.random(1200) < 0.01, -9999.0, usual)
    spikes = np.where(random.random(1200) < 0.005, 1e30 * np.sign(random.standard_normal(1200)), usual)
    stuck = np.where(np.arange(1200) // 400 == 1, usual[400], usual)
    missing = np.where(random.random(1200) < 0.5, np.nan, usual)
    return {
        "constant": np.full(1200, 7.0),
        "zero": np.zeros(1200),
        "stuck": stuck,
        "sentinels": sentinels,
        "spikes": spikes,
        "steps": np.repeat([0.0, 1e6, -1e6, 1e-6], 300),
        "alternating": np.tile([1e30, -1e30], 600),
        "missing": missing,
        "tiny": 1e-25 * random.standard_normal(1200),
        "counter": 1.7e9 + np.arange(1200.0),
    }


def test_hostile_series_stay_finite_and_ordered(engine: StepEngine) -> None:
    """Sentinels, stuck sensors, spikes of 1e30 and gaps leave rows finite, quantiles finite and uncrossed."""
    values = np.stack(list(hostile().values()), axis=1)
    outputs = play(engine, values)
    state = rows(engine, values.shape[1])
    assert np.isfinite(state).all()
    assert np.abs(state).max() < ROW_MAX
    known = np.isfinite(outputs.filled)
    assert np.isfinite(outputs.quantiles[known]).all()
    assert (np.diff(outputs.quantiles[known], axis=-1) >= 0.0).all()
    assert (outputs.up[known] + outputs.down[known] <= 1.0 + 1e-6).all()


def test_sentinels_cost_little_elsewhere(engine: StepEngine) -> None:
    """With one record in a hundred at -9999, the usual error is within 15 % of the last value's or below it."""
    scores = play(engine, hostile()["sentinels"][:, None]).scores
    error, naive = np.abs(scores.error[600:, 0]), np.abs(scores.naive_error[600:, 0])
    assert (np.nanmedian(error, axis=0) < 1.15 * np.nanmedian(naive, axis=0)).all()


def test_covariance_stays_symmetric_and_bounded(engine: StepEngine) -> None:
    """After 1,200 hostile records each covariance is symmetric to the last bit, its variances in (0, the first one]."""
    values = np.stack(list(hostile().values()), axis=1)
    play(engine, values)
    found = engine.layout.view(rows(engine, values.shape[1]), "readout/covariance")
    np.testing.assert_array_equal(found, np.swapaxes(found, -1, -2))
    variance = np.diagonal(found, axis1=-2, axis2=-1)
    assert (variance > 0.0).all()
    assert variance.max() < 0.0301


def test_coverage_holds_through_a_change_of_regime(engine: StepEngine) -> None:
    """The 80 % interval covers 80 % within 0.02 after level, scale and season have all changed at once."""
    before, after = daily(600, STREAMS, seed=7), daily(1500, STREAMS, seed=8)
    values = np.concatenate([before, 40.0 + 5.0 * after])
    rank = shaped(play(engine, values).scores.rank, STREAMS)[900:]
    covered = ((rank >= 1) & (rank <= 2)).mean(axis=(0, 1, 2))
    assert (np.abs(covered - 0.8) <= 0.02).all(), covered


def test_no_edge_is_claimed_in_a_random_walk(engine: StepEngine) -> None:
    """After 600 records of random walks at most 3 % of the directions are called at a threshold of 0.6."""
    walks = np.cumsum(np.random.default_rng(9).standard_normal((900, STREAMS)), axis=0)
    outputs = play(engine, walks)
    late = slice(600 * STREAMS, None)
    assert (np.maximum(outputs.up, outputs.down)[late] > 0.6).mean() < 0.03


def test_any_cut_into_polls_gives_the_same_numbers(engine: StepEngine, spec: NetworkSpec) -> None:
    """One record at a time and one scan over all of them agree in outputs and state."""
    values = daily(40, 3, seed=10)
    inputs = make_inputs(spec, np.tile(np.arange(3), 40), values.reshape(-1, 1))
    whole = engine.step(inputs)
    state = rows(engine, 3)
    for place in range(120):
        one = engine.step(take(inputs, [place]))
        np.testing.assert_allclose(one.quantiles[0], whole.quantiles[place], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(rows(engine, 3), state, rtol=1e-4, atol=1e-4)


def test_a_damaged_row_recovers(engine: StepEngine) -> None:
    """A covariance that is not positive and weights that are not numbers begin anew at the next record."""
    play(engine, daily(60, 1, seed=11))
    state = rows(engine, 1)
    engine.layout.view(state, "readout/covariance")[:] = -1.0
    engine.layout.view(state, "readout/weights")[:] = np.nan
    engine.write(np.array([0], np.int32), state)
    inputs = make_inputs(engine.model.spec, [0] * 20, daily(20, 1, seed=12), fresh=False)
    outputs = engine.step(inputs)
    assert np.isfinite(outputs.quantiles[5:]).all()
    assert np.isfinite(rows(engine, 1)).all()


def test_expert_weights_are_the_hedges(engine: StepEngine) -> None:
    """They sum to one at each horizon; a new stream believes the last value most, and one with a season the others."""
    new = engine.expert_weights(np.zeros(0, np.int32))
    assert list(new) == ["last value", "season 6", "head", "readout"]
    np.testing.assert_allclose(new["last value"], 5 / 8, rtol=1e-6)
    play(engine, daily(600, 8, seed=3))
    learned = engine.expert_weights(np.arange(8, dtype=np.int32))
    np.testing.assert_allclose(sum(learned.values()), 1.0, rtol=1e-5)
    assert (learned["last value"] < 0.1).all()


def test_a_hair_beside_a_quantile_moves_its_offset_by_a_hair(spec: NetworkSpec) -> None:
    """A target that the last bit puts on one side of a quantile, or on the other, teaches the same."""
    shape = (1, len(spec.targets), len(spec.horizons))
    state = {
        "calibration/usual": tf.ones(shape),
        "calibration/offsets": tf.zeros((*shape, len(spec.quantiles))),
    }
    issued = tf.broadcast_to(tf.constant(spec.quantiles), (*shape, len(spec.quantiles)))
    middle, settled, count = tf.zeros(shape), tf.ones(shape, tf.bool), tf.constant([1_000])
    above, below = (
        calibration.learn_quantiles(spec, state, settled, issued[..., 0] + hair, issued, middle, count)
        for hair in (1e-6, -1e-6)
    )
    np.testing.assert_allclose(above["calibration/offsets"], below["calibration/offsets"], atol=1e-5)


@pytest.mark.parametrize("part", ["hedge", "calibration", "readout"])
def test_each_part_can_be_left_out(part: str, spec: NetworkSpec) -> None:
    """Without one of its parts the step still answers with finite, ordered quantiles, in a narrower row."""
    changes: dict[str, Any] = {name: getattr(spec, name) for name in spec.__struct_fields__} | {part: False}
    less = NetworkSpec(**changes)
    model: Model = make_model(less, noise=0.1)
    engine = StepEngine(model, capacity=2, device="cpu")
    engine.compile()
    outputs = play(engine, daily(60, 2, seed=13))
    assert np.isfinite(outputs.quantiles).all()
    assert (np.diff(outputs.quantiles, axis=-1) >= 0.0).all()


Same = Callable[..., None]
