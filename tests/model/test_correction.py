"""What the hedge misses in the same way again and again is corrected; what it misses by chance is not."""

from __future__ import annotations

import numpy as np
import pytest
from networks import make_spec
from numpy.typing import NDArray

from forecaster.model import correction
from forecaster.model.geometry import experts
from forecaster.model.layout import row_layout
from forecaster.model.runtime import Tensor, tf

SPEC = make_spec(
    targets=("level",), features=(), categories={}, horizons=(1, 3), seasons=(6,), memory=12,
    readout=True, hedge=True, calibration=True,
)  # fmt: skip
RECORDS, JUDGED = 600, 300


def errors(part: float, size: float) -> NDArray[np.float32]:
    """Of the correction, by record and horizon, where the mix is the experts' mean and the truth `part` of it more."""
    random = np.random.default_rng(3)
    shape = (RECORDS, 1, 1, len(SPEC.horizons), len(experts(SPEC)))
    said = random.standard_normal(shape).astype(np.float32)
    said[..., 0] = 0.0
    mixed = said.mean(axis=-1)
    change = (1.0 + part) * mixed + size * random.standard_normal(mixed.shape).astype(np.float32)
    usual = tf.fill([1, 1, 2], float(np.sqrt(np.mean((change - mixed) ** 2))))
    settled = tf.fill([1, 1, 2], value=True)

    @tf.function(autograph=False)
    def one(state: dict[str, Tensor], said: Tensor, mixed: Tensor, change: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        forecast, whole = correction.correct(SPEC, state, said, mixed)
        return forecast, correction.learn(SPEC, state, usual, settled, change, said, mixed, whole)

    fields = row_layout(SPEC).fields.values()
    state = {field.name: tf.constant(np.broadcast_to(field.initial, field.shape)[None], tf.float32) for field in fields}
    state = {name: value for name, value in state.items() if name.startswith("correction/")} | {"hedge/usual": usual}
    found = []
    for place in range(RECORDS):
        forecast, learned = one(state, said[place], mixed[place], change[place])
        state |= learned
        found.append(((change[place] - forecast) / usual).numpy()[0, 0])
    return np.array(found)[-JUDGED:]


def test_what_is_always_too_little_is_made_up_for() -> None:
    """Where the truth is twice the mix, less than a tenth of the error is left."""
    assert np.mean(errors(part=1.0, size=0.01) ** 2) < 0.1


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_noise_is_left_alone(size: float) -> None:
    """Where the mix misses by chance alone, correcting it costs less than a part in fifty."""
    assert np.mean(errors(part=0.0, size=size) ** 2) < 1.02 * 1.1
