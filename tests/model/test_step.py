"""The compiled step: one record, a padded batch and a whole replay are the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from networks import make_inputs, make_model, make_spec, take
from numpy.typing import NDArray

from forecaster.errors import ModelMismatch
from forecaster.model import network
from forecaster.model.columns import StepInputs, StepOutputs, pack
from forecaster.model.layout import row_layout
from forecaster.model.runtime import tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine

Same = Callable[..., None]


def walk(count: int, targets: int, seed: int = 0, start: float = 100.0) -> NDArray[np.float64]:
    """Random walks [count, targets]."""
    return start + np.cumsum(np.random.default_rng(seed).standard_normal((count, targets)), axis=0)


def ragged(spec: NetworkSpec, records: int, streams: int, seed: int) -> StepInputs:
    """Records of streams that are drawn unevenly, a tenth of the targets missing."""
    random = np.random.default_rng(seed)
    slots = (streams * random.random(records) ** 2).astype(np.int32)
    values = walk(records, len(spec.targets), seed)
    values[random.random(values.shape) < 0.1] = np.nan
    return make_inputs(spec, slots, values, seed=seed)


def together(parts: list[StepOutputs]) -> StepOutputs:
    """Outputs of several polls as those of one."""
    scores = type(parts[0].scores)(*map(np.concatenate, zip(*(part.scores for part in parts), strict=True)))
    return StepOutputs(*map(np.concatenate, list(zip(*parts, strict=True))[:4]), scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("polls", [2, 7, 120])
def test_any_cut_into_polls_gives_the_same_numbers(
    engine: StepEngine, spec: NetworkSpec, same: Same, polls: int
) -> None:
    """N single steps, one scan of all records, and ragged polls between them agree in outputs and state."""
    inputs = ragged(spec, 120, 30, seed=4)
    whole = engine.step(inputs)
    every = np.unique(inputs.slots)
    rows = engine.read(every)
    cut = [engine.step(take(inputs, part)) for part in np.array_split(np.arange(120), polls)]
    same(together(cut), whole)
    np.testing.assert_allclose(engine.read(every), rows, rtol=1e-5, atol=1e-5)


def test_compiled_step_is_the_eager_network(engine: StepEngine, spec: NetworkSpec) -> None:
    """The engine's numbers are those of network.step called by hand, one record at a time, uncompiled."""
    inputs = make_inputs(spec, [3] * 12, walk(12, 2))
    outputs = engine.step(inputs)
    layout = row_layout(spec)
    weights = {name: tf.constant(value) for name, value in engine.model.weights.items()}
    state = network.unpack_rows(layout, tf.constant(layout.initial_row()[None]))
    packed = pack(spec, inputs.values, inputs.features, inputs.time_s, inputs.elapsed_s)
    for record in packed:
        _, state = network.step(spec, weights, state, tf.constant(record[None]), tf.constant([True]))
    expected = network.pack_rows(layout, state).numpy()
    np.testing.assert_allclose(engine.read(np.array([3], np.int32)), expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(outputs.quantiles).all()


@pytest.mark.parametrize("cell", ["rnn", "gru", "feedforward"])
def test_every_cell_steps_alike_alone_and_in_a_batch(cell: str, same: Same) -> None:
    """The other cells, two layers deep, step one by one as they do in a batch."""
    spec = make_spec(cell=cell, layers=2, targets=("only",), features=(), categories={}, horizons=(2,))
    engine = StepEngine(make_model(spec), capacity=8, device="cpu")
    engine.compile()
    inputs = ragged(spec, 30, 5, seed=5)
    whole = engine.step(inputs)
    same(together([engine.step(take(inputs, [place])) for place in range(30)]), whole)


def test_undo_puts_the_rows_back(engine: StepEngine, spec: NetworkSpec, same: Same) -> None:
    """After undo the table is bit for bit what it was, and the same step gives the same answer."""
    engine.step(ragged(spec, 200, 150, seed=1))
    every = np.arange(200, dtype=np.int32)
    before = engine.read(every)
    inputs = ragged(spec, 900, 180, seed=2)._replace(fresh=np.zeros(900, np.bool_))
    first = engine.step(inputs)
    assert engine.calls > 1
    assert (engine.read(every) != before).any()
    engine.undo()
    np.testing.assert_array_equal(engine.read(every), before)
    same(engine.step(inputs), first)


def test_undo_of_a_poll_in_which_a_slot_changed_hands(engine: StepEngine, spec: NetworkSpec) -> None:
    """Undo goes back to the stream that had the slot before the poll."""
    engine.step(make_inputs(spec, [0] * 5, walk(5, 2)))
    before = engine.read(np.array([0], np.int32))
    engine.step(make_inputs(spec, [0] * 4, walk(4, 2, seed=9), fresh=[False, False, True, False]))
    assert engine.layout.records(engine.read(np.array([0], np.int32))).tolist() == [2]
    engine.undo()
    np.testing.assert_array_equal(engine.read(np.array([0], np.int32)), before)


def test_stream_that_takes_a_slot_knows_nothing_of_the_last_one(
    engine: StepEngine, spec: NetworkSpec, same: Same
) -> None:
    """A fresh stream in a used slot is answered as in a blank one."""
    values = walk(6, 2, seed=3)
    blank = engine.step(make_inputs(spec, [1] * 6, values))
    engine.step(make_inputs(spec, [2] * 9, walk(9, 2, seed=8)))
    same(engine.step(make_inputs(spec, [2] * 6, values)), blank)


def test_ragged_polls_never_trace_again(engine: StepEngine, spec: NetworkSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred polls of all shapes run on the one trace of compile(), and in the four shapes that it compiled."""
    program, shapes = engine._program, set()
    assert program is not None

    def watched(*arguments: Any) -> Any:
        shapes.add(tuple(tuple(each.shape) for each in arguments))
        return program(*arguments)

    monkeypatch.setattr(engine, "_program", watched)
    random = np.random.default_rng(0)
    for poll in range(200):
        records = int(random.integers(1, 3 + 3 * poll))
        engine.step(ragged(spec, records, int(random.integers(1, 200)), seed=poll))
    assert engine.traces == 1
    assert {shape[0] for shape in shapes} <= {(bucket.streams,) for bucket in engine._buckets}
    assert len(shapes) <= len(engine._buckets) == 4


def test_written_rows_go_on_as_if_never_interrupted(engine: StepEngine, spec: NetworkSpec, same: Same) -> None:
    """Rows read from one slot and written to another continue their stream, forecasts to be scored included."""
    values = walk(20, 2)
    inputs = make_inputs(spec, [4] * 20, values)
    whole = engine.step(inputs)
    engine.step(take(inputs, slice(0, 11)))
    engine.write(np.array([9], np.int32), engine.read(np.array([4], np.int32)))
    rest = take(inputs, slice(11, 20))
    after = engine.step(rest._replace(slots=np.full(9, 9, np.int32)))
    expected = together([whole])
    same(after, StepOutputs(*(c[11:] for c in expected[:4]), type(whole.scores)(*(c[11:] for c in whole.scores))))


def test_rows_of_another_network_are_refused(engine: StepEngine) -> None:
    """A row of another width is a ModelMismatch, not a garbled stream."""
    with pytest.raises(ModelMismatch, match="do not fit this model"):
        engine.write(np.array([0], np.int32), np.zeros((1, 7), np.float32))


def test_missing_target_is_filled_with_the_last_median(engine: StepEngine, spec: NetworkSpec) -> None:
    """A missing target is stepped with the stream's own last forecast one record ahead."""
    values = walk(10, 2)
    values[6:8, 0] = np.nan
    outputs = engine.step(make_inputs(spec, [0] * 10, values))
    medians = outputs.quantiles[:, 0, 0, spec.median]
    np.testing.assert_allclose(outputs.filled[6:8, 0], medians[5:7], rtol=0, atol=1e-4)
    np.testing.assert_allclose(outputs.filled[:, 1], values[:, 1])


def test_missing_target_is_never_scored_and_shifts_nothing(engine: StepEngine, spec: NetworkSpec) -> None:
    """A record without its target settles nothing; those after it settle the forecasts of their own time."""
    values = walk(12, 2)
    values[6, 0] = np.nan
    outputs = engine.step(make_inputs(spec, [0] * 12, values))
    assert np.isnan(outputs.scores.error[6, 0]).all()
    expected = values[9, 0] - outputs.quantiles[6, 0, 1, spec.median]
    np.testing.assert_allclose(outputs.scores.error[9, 0, 1], expected, atol=1e-4)


def test_target_never_observed_has_no_forecast(engine: StepEngine, spec: NetworkSpec) -> None:
    """Until a target has been observed once its columns are NaN, and nothing of it is scored later."""
    values = walk(6, 2)
    values[:3, 1] = np.nan
    outputs = engine.step(make_inputs(spec, [0] * 6, values))
    assert np.isnan(outputs.quantiles[:3, 1]).all()
    assert np.isnan(outputs.up[:3, 1]).all()
    assert np.isfinite(outputs.quantiles[3:, 1]).all()
    assert np.isnan(outputs.scores.error[3, 1]).all()
    assert np.isfinite(outputs.scores.error[4, 1, 0])


def numpy_scores(spec: NetworkSpec, values: NDArray[Any], outputs: StepOutputs) -> dict[str, NDArray[Any]]:
    """Score one stream's published forecasts against its values, record by record."""
    shape = (*values.shape, len(spec.horizons))
    scores = {name: np.full(shape, np.nan) for name in ("error", "naive_error", "pinball", "rank", "up", "down")}
    for now, place in np.ndindex(len(values), len(spec.horizons)):
        then = now - spec.horizons[place]
        for target in range(values.shape[1]):
            if then < 0 or np.isnan(values[now, target]):
                continue
            quantiles, observed = outputs.quantiles[then, target, place], values[now, target]
            at = (now, target, place)
            above = observed - quantiles
            scores["error"][at] = above[spec.median]
            scores["naive_error"][at] = observed - outputs.filled[then, target]
            levels = np.array(spec.quantiles)
            scores["pinball"][at] = np.maximum(levels * above, (levels - 1) * above).mean()
            scores["rank"][at] = (above > 0).sum()
            scores["up"][at], scores["down"][at] = outputs.up[then, target, place], outputs.down[then, target, place]
    return scores


def test_scores_are_those_of_the_published_forecasts(engine: StepEngine, spec: NetworkSpec) -> None:
    """What the step scores inside is what anyone computes from the forecasts that it published."""
    values = walk(40, 2, seed=6)
    values[np.random.default_rng(2).random(values.shape) < 0.15] = np.nan
    values[0] = 100.0
    outputs = engine.step(make_inputs(spec, [0] * 40, values))
    for name, expected in numpy_scores(spec, values, outputs).items():
        np.testing.assert_allclose(getattr(outputs.scores, name), expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_quantiles_never_cross(engine: StepEngine, spec: NetworkSpec) -> None:
    """Whatever the weights and the values, a higher quantile is never below a lower one."""
    wild = make_model(spec, noise=30.0, version="wild")
    engine.swap(wild)
    outputs = engine.step(ragged(spec, 400, 20, seed=3))
    finite = outputs.quantiles[np.isfinite(outputs.quantiles).all(axis=-1)]
    assert len(finite) > 700
    assert (np.diff(finite, axis=-1) >= 0.0).all()


def test_untrained_network_forecasts_the_last_value(engine: StepEngine, spec: NetworkSpec) -> None:
    """Untrained: median = last value, and 80 % of a random walk falls between the outer quantiles, at each horizon."""
    untrained = make_model(spec, noise=0.0, version="untrained")
    engine.swap(untrained)
    values = walk(3000, 2, seed=11)
    outputs = engine.step(make_inputs(spec, [0] * 3000, values))
    medians = outputs.quantiles[..., spec.median]
    np.testing.assert_allclose(medians, np.repeat(values[:, :, None], 2, axis=2), atol=1e-4)
    inside = (outputs.scores.rank[500:] >= 1) & (outputs.scores.rank[500:] <= 2)
    assert np.abs(inside.mean(axis=(0, 1)) - 0.8).max() < 0.04
    np.testing.assert_allclose(outputs.up, 0.45, atol=1e-6)


@pytest.mark.parametrize(("start", "step"), [(1.7e9, 1.0), (65_000.0, 0.01), (-3e12, 100.0)])
def test_small_changes_of_large_values_are_kept(
    engine: StepEngine, spec: NetworkSpec, start: float, step: float
) -> None:
    """A counter of 1.7e9 and a price of 65,000.01 are stepped by their changes, which float32 alone would lose."""
    walked = np.cumsum(np.random.default_rng(1).integers(-3, 4, (60, 2)), axis=0)
    small = engine.step(make_inputs(spec, [0] * 60, step * walked))
    large = engine.step(make_inputs(spec, [1] * 60, start + step * walked))
    # The stream's first forecast takes its scale from the value: from there on only changes count.
    np.testing.assert_allclose(large.quantiles[2:] - start, small.quantiles[2:], atol=1e-2 * step, rtol=1e-3)
    np.testing.assert_allclose(large.filled, start + step * walked, rtol=1e-14)
    np.testing.assert_allclose(large.scores.naive_error, small.scores.naive_error, atol=1e-3 * step)


@pytest.mark.parametrize("wild", [1e30, -1e300, 1e-40])
def test_state_stays_finite_through_a_wild_value(engine: StepEngine, spec: NetworkSpec, wild: float) -> None:
    """A value near the end of float64 and a month of one constant leave every number finite."""
    values = np.full((4000, 2), 20.0)
    values[::500, 0] = wild
    outputs = engine.step(make_inputs(spec, [0] * 4000, values))
    assert np.isfinite(engine.read(np.array([0], np.int32))).all()
    assert np.isfinite(outputs.quantiles).all()
    assert np.isfinite(outputs.up).all()


def test_constant_stream_is_forecast_and_wakes_up(engine: StepEngine, spec: NetworkSpec) -> None:
    """After ten thousand equal values the state is finite, and the scale finds back within 60 records."""
    values = np.full((10_100, 2), 7.5)
    values[10_000:] += np.random.default_rng(0).standard_normal((100, 2))
    outputs = engine.step(make_inputs(spec, [0] * 10_100, values))
    assert np.isfinite(engine.read(np.array([0], np.int32))).all()
    assert np.nanmax(outputs.scores.scale[9_990:10_000]) < 1e-6
    assert 0.2 < np.nanmedian(outputs.scores.scale[10_060:]) < 3.0


def test_one_spike_moves_the_scale_a_little(engine: StepEngine, spec: NetworkSpec) -> None:
    """A sentinel value of -9999 in a quiet stream leaves the scale within half of what it was."""
    values = walk(400, 2)
    values[300] = -9999.0
    outputs = engine.step(make_inputs(spec, [0] * 400, values))
    before, after = outputs.scores.scale[299, :, 0], outputs.scores.scale[303, :, 0]
    assert (after < 1.5 * before).all()


def test_count_of_records_is_exact(engine: StepEngine, spec: NetworkSpec) -> None:
    """A row counts its records over the end of what float32 alone can count."""
    slot = np.array([0], np.int32)
    engine.step(make_inputs(spec, [0] * 3, walk(3, 2)))
    row = engine.read(slot)
    engine.layout.view(row, "records_low")[:] = (1 << 20) - 2
    engine.layout.view(row, "records_high")[:] = 500
    engine.write(slot, row)
    engine.step(make_inputs(spec, [0] * 5, walk(5, 2), fresh=False))
    assert engine.layout.records(engine.read(slot)).tolist() == [500 * (1 << 20) + (1 << 20) + 3]


def test_swapped_weights_are_used_with_no_new_trace(engine: StepEngine, spec: NetworkSpec) -> None:
    """A new version of the weights takes over at the next step, without tracing."""
    inputs = make_inputs(spec, [0] * 5, walk(5, 2))
    before = engine.step(inputs)
    engine.swap(make_model(spec, seed=77, version="v2"))
    after = engine.step(inputs)
    assert np.abs(before.up - after.up).max() > 1e-3
    assert engine.traces == 1


def test_weights_of_another_network_are_refused(spec: NetworkSpec) -> None:
    """Weights that do not have their spec's shapes are one clear error."""
    model = make_model(spec)
    model.weights["head/bias"] = np.zeros(3, np.float32)
    with pytest.raises(ModelMismatch, match="head/bias"):
        StepEngine(model, capacity=8, device="cpu")
