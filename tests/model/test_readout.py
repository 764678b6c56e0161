"""Recursive least squares, the hedge and the pooling against a few lines of NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from networks import make_spec
from numpy.typing import NDArray

from forecaster.model import hedge, readout
from forecaster.model.geometry import (
    LAGS,
    anchors,
    experts,
    initial_pooling,
    longest,
    memory_width,
    raw_width,
    readout_width,
)
from forecaster.model.layout import VARIANCE_MAX, row_layout
from forecaster.model.runtime import Tensor, tf
from forecaster.model.spec import NetworkSpec

FORGET = readout.FORGETTING


def adaptive(**changes: object) -> NetworkSpec:
    """One target, horizons 1 and 3, everything on."""
    usual = {"targets": ("level",), "features": (), "categories": {}, "seasons": (6,), "memory": 12}
    return make_spec(**(usual | {"readout": True, "hedge": True, "calibration": True} | changes))


def state_of(spec: NetworkSpec) -> dict[str, Tensor]:
    """One stream that has seen nothing."""
    fields = row_layout(spec).fields.values()
    return {field.name: tf.constant(np.broadcast_to(field.initial, field.shape)[None], tf.float32) for field in fields}


def test_weights_are_those_of_least_squares_in_float64() -> None:
    """After 400 records with delayed targets the weights agree with float64 recursive least squares to 1e-3."""
    spec = adaptive()
    width, horizons = readout_width(spec), spec.horizons
    random = np.random.default_rng(0)
    made = random.standard_normal((400, width))
    true = random.standard_normal((width, len(horizons)))
    noise = 0.1 * random.standard_normal((400, len(horizons)))

    @tf.function(autograph=False)
    def one(state: dict[str, Tensor], features: Tensor, change: Tensor, count: Tensor) -> dict[str, Tensor]:
        settled = (count >= tf.constant(horizons))[None, None]
        weights = readout.learn(spec, state, settled, change, tf.fill([1, 1, 2], 1e6), count[None])
        found, covariance = readout.gain(state["readout/covariance"], features)
        kept = readout.Made(features, tf.ones([1, 1]), found)
        ring = readout.keep_made(spec, state["readout/ring"], kept, tf.constant([True]), count[None])
        return {"readout/weights": weights, "readout/covariance": covariance, "readout/ring": ring}

    state = {name: value for name, value in state_of(spec).items() if name.startswith("readout/")}
    covariance, weights = VARIANCE_MAX * np.eye(width), np.zeros((width, len(horizons)))
    gains = np.zeros((400, width))
    for t in range(400):
        targets = np.array([made[t - h] @ true[:, i] + noise[t, i] if t >= h else 0.0 for i, h in enumerate(horizons)])
        state = one(
            state,
            tf.constant(made[t][None, None], tf.float32),
            tf.constant(targets[None, None], tf.float32),
            tf.constant(t),
        )
        for i, h in enumerate(horizons):
            if t >= h:
                weights[:, i] += gains[t - h] * (targets[i] - made[t - h] @ weights[:, i])
        spread = covariance @ made[t]
        gains[t] = spread / (FORGET + made[t] @ spread)
        covariance = bounded((covariance - np.outer(gains[t], spread)) / FORGET)
    np.testing.assert_allclose(state["readout/weights"].numpy()[0, 0], weights, atol=1e-3)
    np.testing.assert_allclose(state["readout/covariance"].numpy()[0, 0], covariance, atol=1e-5)
    assert np.abs(weights - true).max() < 0.3


def bounded(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """No variance above the first one: rows and columns are scaled alike."""
    shrink = np.sqrt(np.minimum(1.0, VARIANCE_MAX / np.diag(covariance)))
    return covariance * np.outer(shrink, shrink)


def test_a_covariance_without_news_does_not_wind_up() -> None:
    """100,000 records of one and the same feature leave every variance at or below the first one."""
    spec = adaptive()
    width = readout_width(spec)
    features = tf.constant(np.eye(width)[None, :1], tf.float32)

    @tf.function(autograph=False, jit_compile=True)
    def many(covariance: Tensor) -> Tensor:
        def body(number: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
            return number + 1, readout.gain(covariance, features)[1]

        return tf.while_loop(lambda number, _: number < 100_000, body, (tf.constant(0), covariance))[1]

    found = many(state_of(spec)["readout/covariance"]).numpy()[0, 0]
    variance = np.diag(found)
    assert variance.max() < VARIANCE_MAX * 1.001
    assert 0.0 < variance[0] < 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_the_hedge_is_near_its_best_expert(seed: int) -> None:
    """On a bounded series the mix loses at most what the best expert loses, plus the price of finding it."""
    spec = adaptive(horizons=(1,))
    random = np.random.default_rng(seed)
    count, names = 600, experts(spec)
    happened = random.uniform(-1.0, 1.0, count)
    said = random.uniform(-1.0, 1.0, (count, len(names)))
    best = seed % (len(names) - 1) + 1
    said[:, best] = happened + random.uniform(-0.3, 0.3, count)
    said[:, 0] = 0.0
    state = state_of(spec)
    losses = np.zeros(len(names) + 1)
    mixed = hedge.mix(spec, state, tf.constant(said[0][None, None, None], tf.float32))
    for t in range(count - 1):
        losses[:-1] += np.square(said[t] - happened[t])
        losses[-1] += float(np.square(mixed.forecast.numpy()[0, 0, 0] - happened[t]))
        change = tf.constant([[[happened[t]]]], tf.float32)
        before = tf.constant(said[t][None, None, None], tf.float32)
        fields = hedge.learn(spec, state, tf.constant([[[True]]]), change, before, mixed.slopes, tf.constant([t + 1]))
        state = {**state, **fields}
        mixed = hedge.mix(spec, state, tf.constant(said[t + 1][None, None, None], tf.float32))
    # ln(prior) / rate in units of the usual squared error, for each of the two mixes.
    price = np.square(state["hedge/usual"].numpy().item()) * np.log(hedge.NAIVE_PRIOR * len(names))
    price *= 1 / hedge.SQUARES_RATE + 1 / hedge.SLOPES_RATE
    assert losses[-1] <= losses[:-1].min() + price + 1.0


@pytest.mark.parametrize(("memory", "seasons"), [(6, ()), (8, (6,)), (12, (24, 168)), (40, (24,)), (200, (24, 168))])
def test_pooling_uses_every_number_once(memory: int, seasons: tuple[int, ...]) -> None:
    """Each remembered number goes to one feature, changes as sums, a season's neighbours as means."""
    spec = adaptive(memory=memory, seasons=seasons, horizons=(1, 24))
    pooling = initial_pooling(spec)
    assert pooling.shape == (raw_width(spec), memory_width(spec))
    assert ((pooling != 0.0).sum(axis=1) == 1).all()
    assert ((pooling != 0.0).sum(axis=0) >= 1).all()
    assert pooling[:LAGS].sum() == LAGS
    np.testing.assert_allclose(pooling[LAGS + 3 :].sum(), memory_width(spec) - (pooling[: LAGS + 3] != 0).any(0).sum())


def test_anchors_stay_inside_the_season() -> None:
    """A season is looked up at now and ahead, never as far as itself, never beyond the longest horizon."""
    spec = adaptive(seasons=(6, 168), horizons=(1, 24))
    assert anchors(spec, 6) == (0, 1, 2, 4)
    assert max(anchors(spec, 168)) == longest(spec)
