"""The cell's output to a forecast: quantiles of the change, and the odds of up, same, down.

The quantiles are the median plus increments that are positive by construction, in
units of scale * sqrt(horizon). The biases are such that a zero kernel forecasts the
last value, with the quantiles of a random walk whose steps have the stream's scale.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.runtime import Tensor, tf
from forecaster.model.spec import NetworkSpec

# P(up), P(same), P(down) of an untrained network.
PRIOR_DIRECTION = (0.45, 0.1, 0.45)


class Forecast(NamedTuple):
    """Of D targets at S steps (`spec.steps`).

    quantiles: [batch, D, S, Q], the change in units of scale * sqrt(step), ascending.
    direction: [batch, D, S, 3], logits of up, same, down.
    """

    quantiles: Tensor
    direction: Tensor


def head_width(spec: NetworkSpec) -> int:
    """Numbers that the head's kernel makes: for each target and step Q quantiles and three directions."""
    return len(spec.targets) * len(spec.steps) * (len(spec.quantiles) + 3)


def head_bias(spec: NetworkSpec) -> NDArray[np.float32]:
    """[head_width]: the bias of an untrained network."""
    normal = NormalDist()
    levels = np.array([normal.inv_cdf(quantile) for quantile in spec.quantiles])
    gaps = np.log(np.expm1(np.diff(levels)))  # softplus undoes it
    one = np.concatenate([gaps[: spec.median], [0.0], gaps[spec.median :], np.log(PRIOR_DIRECTION)])
    return np.tile(one, len(spec.targets) * len(spec.steps)).astype(np.float32)


def forecast(spec: NetworkSpec, kernel: Tensor, bias: Tensor, outputs: Tensor) -> Forecast:
    """Forecast from the cell's outputs [batch, units]."""
    raw = tf.reshape(outputs @ kernel + bias, [-1, len(spec.targets), len(spec.steps), len(spec.quantiles) + 3])
    median, count = spec.median, len(spec.quantiles)
    gaps = tf.nn.softplus(raw[..., :count])
    # Added up one by one: a sum's order, and so its rounding, is then the same for neighbours, and they cannot cross.
    levels = [raw[..., median]]
    for position in reversed(range(median)):
        levels.insert(0, levels[0] - gaps[..., position])
    for position in range(median + 1, count):
        levels.append(levels[-1] + gaps[..., position])
    return Forecast(tf.stack(levels, axis=-1), raw[..., count:])
