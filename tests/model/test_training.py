"""Training: the gradient is the slope, what can be learned is learned, what cannot be saved is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from networks import START_S, make_history, make_model, make_spec
from numpy.typing import NDArray

from forecaster.errors import Fatal, ModelMismatch
from forecaster.model import learning, training
from forecaster.model.columns import StepInputs, StreamHistory, packed_columns
from forecaster.model.layout import row_layout
from forecaster.model.registry import Model
from forecaster.model.runtime import tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.step import StepEngine
from forecaster.model.training import TrainOptions, train


def plain_spec(**changes: Any) -> NetworkSpec:
    """One target, no features."""
    return make_spec(**({"targets": ("value",), "features": (), "categories": {}} | changes))


def sine(records: int, phase: int) -> NDArray[np.float64]:
    """A day of 24 records over and over, with a little noise: [records, 1]."""
    noise = np.random.default_rng(phase).normal(0.0, 0.3, records)
    return (50.0 + 10.0 * np.sin(2 * np.pi * (np.arange(records) + phase) / 24) + noise)[:, None]


def window(spec: NetworkSpec, steps: int, batch: int) -> learning.Batch:
    """A window of random walks in float64; a lane ends within it, the first record does not count."""
    random = np.random.default_rng(0)
    columns = packed_columns(spec)
    future = random.standard_normal((steps + spec.steps[-1], batch, columns.width))
    future[..., columns.high] = 10.0 + np.cumsum(future[..., columns.high], axis=0)
    future[..., columns.low] = 0.0
    future[..., columns.elapsed] = 60.0
    live = np.ones((steps, batch), np.bool_)
    live[-1, 1] = False
    scored = np.ones((steps, batch), np.bool_)
    scored[0] = False
    return learning.Batch(tf.constant(future, tf.float64), tf.constant(live), tf.constant(scored & live))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "feedforward"])
def test_gradient_is_the_slope_of_the_loss(cell: str) -> None:
    """In float64 the training step's gradient agrees with finite differences to six digits, in every weight array."""
    spec = make_spec(cell=cell, units=3, layers=2)
    weights = {name: tf.constant(value, tf.float64) for name, value in make_model(spec).weights.items()}
    fields = row_layout(spec).fields.values()
    state = {f.name: tf.zeros([2, *f.shape], tf.float64) for f in fields if f.name != "pending"}
    batch = window(spec, 6, 2)
    # Nothing is hidden: what a missing target is filled with follows the weights too, and training takes it as data.
    hidden = tf.zeros([6, 2], tf.bool)
    loss_and_slopes = tf.function(
        lambda weights: learning.gradients(spec, weights, state, batch, hidden)[:2], autograph=False
    )
    _, slopes = loss_and_slopes(weights)
    random = np.random.default_rng(2)
    assert len(slopes) == 8
    for name, slope in slopes.items():
        direction = random.standard_normal(slope.shape)
        ends = [loss_and_slopes({**weights, name: weights[name] + sign * 1e-6 * direction})[0] for sign in (1, -1)]
        expected = float((slope * direction).numpy().sum())
        assert abs((float(ends[0]) - float(ends[1])) / 2e-6 - expected) < 1e-6 * max(1.0, abs(expected)), name


def test_compiled_window_is_the_serving_step() -> None:
    """A window scanned by training leaves the state that the same records leave when served one poll at a time."""
    spec = plain_spec()
    model = make_model(spec)
    values = sine(30, 0)
    history = make_history(values)
    data = training.dataset(spec, [history], training.Cut(1000, 0, 0.0))
    state = training.initial_state(spec, 1)
    weights = {name: tf.constant(value) for name, value in model.weights.items()}
    live = tf.ones([30, 1], tf.bool)
    scan = tf.function(lambda batch: learning.scan(spec, weights, state, batch)[1], jit_compile=True, autograph=False)
    after = scan(learning.Batch(tf.constant(data.packed[:30, None]), live, live))
    engine = StepEngine(model, capacity=4, device="cpu")
    engine.compile()
    serve(engine, history)
    row = engine.read(np.array([0], np.int32))
    for name, value in after.items():
        np.testing.assert_allclose(engine.layout.view(row, name), value.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def serve(engine: StepEngine, history: StreamHistory) -> Any:
    """Step a whole history through slot 0."""
    count = len(history.time_s)
    fresh = np.arange(count) == 0
    elapsed_s = np.diff(history.time_s, prepend=history.time_s[:1]).astype(np.float32)
    slots = np.zeros(count, np.int32)
    return engine.step(StepInputs(slots, fresh, history.values, history.features, history.time_s, elapsed_s))


def test_training_learns_a_daily_curve_the_same_way_each_time() -> None:
    """On a noisy sine the held-out loss falls to less than half the last value's, twice to the same weights."""
    spec = plain_spec(units=16, horizons=(1, 6))
    histories = [make_history(sine(400, phase), seconds=3600.0, stream=f"s{phase}") for phase in (0, 5, 11)]
    options = TrainOptions(steps_max=150, window=32, batch=8)
    seen: list[training.Progress] = []
    model, report = train(spec, histories, options, seen.append)
    again, _ = train(spec, histories, options)
    assert report.held_out_loss < 0.5 * report.untrained_loss
    assert [progress.step for progress in seen] == list(range(1, report.steps + 1))
    assert report.held_out_records == 3 * 80
    assert model.training["report"]["steps"] == report.steps
    for name, value in model.weights.items():
        np.testing.assert_array_equal(again.weights[name], value)


def test_patience_ends_training_with_the_best_weights() -> None:
    """Where nothing can be learned training stops early, and what it returns is no worse than the untrained network."""
    walk = np.cumsum(np.random.default_rng(0).standard_normal((300, 1)), axis=0)
    options = TrainOptions(steps_max=2000, window=16, batch=4, patience=2, learning_rate=0.02)
    _, report = train(plain_spec(), [make_history(walk)], options)
    assert report.steps < 2000
    assert report.held_out_loss <= report.untrained_loss


def test_training_goes_on_from_a_parent() -> None:
    """With a parent training begins at the parent's score and notes whose child it is; another network is refused."""
    history = [make_history(sine(300, 0), seconds=3600.0)]
    options = TrainOptions(steps_max=40, window=16, batch=4)
    parent, first = train(plain_spec(), history, options)
    child, second = train(plain_spec(), history, options, parent=parent)
    assert second.untrained_loss == pytest.approx(first.held_out_loss, rel=1e-4)
    assert child.parent == parent.version
    with pytest.raises(ModelMismatch, match="another network"):
        train(plain_spec(units=5), history, options, parent=parent)


def test_a_hundred_records_are_enough_to_start() -> None:
    """A single short stream trains; a stream of one record is passed over."""
    histories = [make_history(sine(100, 0)), make_history(sine(1, 0))]
    _, report = train(plain_spec(cell="gru"), histories, TrainOptions(steps_max=30, window=16))
    assert report.records == 80


def test_no_history_is_refused() -> None:
    """Nothing to learn from is one line."""
    with pytest.raises(Fatal, match="two records"):
        train(plain_spec(), [make_history(sine(1, 0))])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_that_blows_up_is_refused(optimizer: Any) -> None:
    """A learning rate that makes the weights infinite ends in a Fatal that names the remedy, not in a model."""
    options = TrainOptions(optimizer=optimizer, learning_rate=1e38, clip_norm=1e30, steps_max=60, window=8, holdout=0.0)
    with pytest.raises(Fatal, match="learning rate"):
        train(plain_spec(), [make_history(sine(200, 0))], options)


def test_vanishing_gradient_names_its_remedy() -> None:
    """An Elman cell whose memory fades is told to become an LSTM or GRU, or to take a shorter window."""
    back = tuple(0.5**k for k in range(63))
    (warning,) = training._warnings(plain_spec(cell="rnn"), TrainOptions(), back, 1.0)
    assert "lstm" in warning
    assert "window" in warning


def test_exploding_gradient_names_its_remedy() -> None:
    """A gradient that grows on its way back is told about the clip norm and the learning rate."""
    back = tuple(1.2**k for k in range(63))
    (warning,) = training._warnings(plain_spec(cell="rnn"), TrainOptions(), back, 1.0)
    assert "clip_norm" in warning
    assert "learning_rate" in warning


def test_gradient_back_is_measured() -> None:
    """The report says how far back the gradient reaches: all of the window for an LSTM, nothing without memory."""
    history = [make_history(sine(200, 0))]
    _, lstm = train(plain_spec(), history, TrainOptions(steps_max=20, window=16))
    _, none = train(plain_spec(cell="feedforward"), history, TrainOptions(steps_max=20, window=16))
    assert len(lstm.gradient_back) == 15
    assert lstm.gradient_back[0] == 1.0
    assert none.gradient_back == ()


def test_prior_scale_is_relative_for_prices_and_absolute_for_sensors() -> None:
    """What training takes for a new stream's scale is a percentage where levels differ, an amount where they do not."""
    random = np.random.default_rng(0)
    prices = [make_history(level * np.exp(np.cumsum(random.normal(0, 0.01, (300, 1)), axis=0))) for level in (3, 300)]
    rooms = [make_history(level + np.cumsum(random.normal(0, 0.2, (300, 1)), axis=0)) for level in (15, 400)]
    priors = training.scale_priors(prices)
    assert priors["prior/absolute"] == 0.0
    assert 0.005 < priors["prior/relative"][0] < 0.02
    priors = training.scale_priors(rooms)
    assert priors["prior/relative"] == 0.0
    assert 0.15 < priors["prior/absolute"][0] < 0.25


def gym(days: int, missed: float) -> StreamHistory:
    """Three exercises in turn, one-hot as three targets; some days are missed, the cycle goes on."""
    values = np.eye(3)[np.arange(days) % 3]
    values[np.random.default_rng(0).random(days) < missed] = np.nan
    time_s = START_S + 86_400.0 * np.arange(days)
    return StreamHistory("gym", time_s, values, np.zeros((days, 0), np.float32))


@pytest.fixture(scope="module")
def gym_model() -> Model:
    """A network that has learned the cycle."""
    spec = plain_spec(targets=("legs", "arms", "back"), units=16, horizons=(1, 2))
    return train(spec, [gym(300, 0.05)], TrainOptions(steps_max=250, window=16, batch=8))[0]


def test_gym_knows_todays_exercise_after_a_missed_day(gym_model: Model) -> None:
    """From yesterday's exercise, or from its own forecast where yesterday was missed, the next one is foretold."""
    engine = StepEngine(gym_model, capacity=4, device="cpu")
    engine.compile()
    history = gym(60, 0.0)
    history.values[[40, 47, 51]] = np.nan
    outputs = serve(engine, history)
    days = np.arange(20, 60)
    medians = outputs.quantiles[days, :, :, gym_model.spec.median]
    assert (medians[..., 0].argmax(axis=1) == (days + 1) % 3).all()
    assert (medians[..., 1].argmax(axis=1) == (days + 2) % 3).all()
    np.testing.assert_allclose(outputs.filled[[40, 47, 51]], np.eye(3)[np.array([40, 47, 51]) % 3], atol=0.25)
