"""A probability of "up" holds what it says, also where what it is made of does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from networks import make_spec
from numpy.typing import NDArray

from forecaster.model import calibration
from forecaster.model.geometry import TENTHS
from forecaster.model.layout import row_layout
from forecaster.model.runtime import Tensor, tf

SPEC = make_spec(targets=("level",), features=(), categories={}, horizons=(1, 3), calibration=True)
STREAMS, RECORDS, JUDGED = 64, 6_000, 3_000
GAP_MAX, CASES_MIN = 0.03, 5_000

Array = NDArray[np.float32]


def honest(claimed: Array) -> Array:
    """What is said is so."""
    return claimed


def boastful(claimed: Array) -> Array:
    """However sure, five in six at most."""
    return np.clip(claimed, 1 / 6, 5 / 6)


def wavy(claimed: Array) -> Array:
    """Too little here, too much there: no stretch, shift or bend of the logit makes up for it."""
    return claimed + 0.1 * np.sin(4 * np.pi * claimed).astype(np.float32)


def gaps(truth: Callable[[Array], Array]) -> list[float]:
    """How many more rose than was claimed, in each tenth with CASES_MIN, where each expert says p and truth(p) rise."""
    random = np.random.default_rng(5)
    shape = (RECORDS, STREAMS, 1, len(SPEC.horizons))
    logits = 2.0 * random.standard_normal(shape).astype(np.float32)
    change = np.where(random.random(shape) < truth(1.0 / (1.0 + np.exp(-logits))), 1.0, -1.0).astype(np.float32)
    settled = tf.fill(shape[1:], value=True)

    @tf.function(autograph=False)
    def one(
        state: dict[str, Tensor], logits: Tensor, change: Tensor, count: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        said = tf.stack([tf.zeros_like(logits), logits, logits], axis=-1)
        chances, mixed = calibration.chances(SPEC, state, said)
        return chances[..., 0], calibration.learn_direction(SPEC, state, settled, change, said, mixed, count)

    state = {
        field.name: tf.constant(np.broadcast_to(field.initial, (STREAMS, *field.shape)), tf.float32)
        for field in row_layout(SPEC).fields.values()
        if field.name.startswith("calibration/")
    }
    claimed = []
    for place in range(RECORDS):
        up, learned = one(state, logits[place], change[place], tf.fill([STREAMS], place + 3))
        state |= learned
        claimed.append(up.numpy())
    up, rose = np.array(claimed)[-JUDGED:], change[-JUDGED:] > 0.0
    found = []
    for horizon in range(shape[-1]):
        tenth = np.minimum((up[..., horizon] * TENTHS).astype(int), TENTHS - 1)
        missed = (rose - up)[..., horizon]
        found += [missed[tenth == each].mean() for each in range(TENTHS) if np.sum(tenth == each) >= CASES_MIN]
    return found


@pytest.mark.parametrize("truth", [honest, boastful, wavy])
def test_a_probability_holds_what_it_says(truth: Callable[[Array], Array]) -> None:
    """In each tenth with enough cases as many rise as were said to, whatever the experts claim."""
    found = gaps(truth)
    assert len(found) >= len(SPEC.horizons) * TENTHS // 2
    assert np.abs(found).max() < GAP_MAX
