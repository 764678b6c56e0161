"""The adaptive readout: recursive least squares per stream and target, learning on every record.

For the features z_t made at record t, with forgetting lambda:

    gain        g_t = P z_t / (lambda + z_t' P z_t)        when the features are made
    covariance  P   = (P - g_t z_t' P) / lambda            at once, one for all horizons
    weights     w_h = w_h + g_t (y_t+h - w_h' z_t)         h records later, when the target has come

The gain needs the features alone, so it waits with them in a ring of one place for each
record of the longest horizon. Where no feature excites a direction, 1 / lambda would let
the covariance grow for ever (0.9998^-1,000,000 overflows): no variance may exceed that of
the start, which is a congruence (D P D), so P stays symmetric and positive.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.geometry import head_steps, longest, readout_width
from forecaster.model.layout import VARIANCE_MAX
from forecaster.model.normalise import TINY
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec

# Remembers 5,000 records; 0.999 blows up at long horizons.
FORGETTING = 0.9998
# Rounding takes 1e-8 of a variance at most: this keeps the smallest ones positive.
VARIANCE_ADDED = 1e-8
# An error beyond so many times the usual one counts for as much, and in scales, never more than this,
ERROR_MAX, ERROR_SCALES_MAX = 64.0, 1e3
# nor the very first one more than this: what is usual is not known yet.
FIRST_ERROR_MAX = 16.0
# Of the head's forecasts, in scales, as the memory's features have it.
FEATURE_MAX = 20.0

Array = NDArray[np.float32]


class Made(NamedTuple):
    """The features z of one record [batch, D, k], what they are divided by [batch, D], their gain [batch, D, k]."""

    features: Tensor
    scale: Tensor
    gain: Tensor


def features(spec: NetworkSpec, remembered: Tensor, clock: Tensor, head: Tensor, scale: Tensor) -> Tensor:
    """Put z together.

    Args:
        spec: the network's.
        remembered: [batch, D, memory_width] in `scale`.
        clock: [batch, CLOCK_FEATURES].
        head: [batch, D, steps], the head's medians as changes in the target's units.
        scale: [batch, D].

    Returns:
        [batch, D, k].
    """
    targets = len(spec.targets)
    times = tf.repeat(clock[:, None, :], targets, axis=1)
    said = tf.gather(head, head_steps(spec), axis=-1) / scale[..., None]
    said = tf.clip_by_value(said, -FEATURE_MAX, FEATURE_MAX)
    return tf.concat([remembered, times, said, tf.ones_like(said[..., :1])], axis=-1)


def learn(spec: NetworkSpec, state: Fields, settled: Tensor, change: Tensor, usual: Tensor, count: Tensor) -> Tensor:
    """Move each horizon's weights by the target that came with this record.

    Args:
        spec: the network's.
        state: the streams' fields.
        settled: bool[batch, D, H], whether the target of the forecast made h records ago is here.
        change: [batch, D, H], from the value then to the value now, in the target's units.
        usual: [batch, D, H], the usual error in the target's units; 0 while unknown.
        count: int32[batch], records stepped before this one.

    Returns:
        The weights [batch, D, k, H].
    """
    weights, width = state["readout/weights"], readout_width(spec)
    places = (count[:, None] - tf.constant(spec.horizons, tf.int32)) % longest(spec)
    old = tf.transpose(tf.gather(state["readout/ring"], places, batch_dims=1), [0, 2, 3, 1])
    made, gain, scale = old[:, :, :width], old[:, :, width:-1], old[:, :, -1]
    scale = tf.maximum(scale, TINY)
    error = change / scale - tf.reduce_sum(weights * made, axis=2)
    limit = tf.where(usual > 0.0, tf.minimum(ERROR_MAX * usual / scale, ERROR_SCALES_MAX), FIRST_ERROR_MAX)
    error = tf.maximum(tf.minimum(error, limit), -limit)
    moved = weights + gain * tf.where(settled, error, 0.0)[:, :, None, :]
    # A row that came in damaged begins anew.
    return tf.where(tf.math.is_finite(moved), moved, 0.0)


def gain(
    covariance: Tensor, made: Tensor, forgetting: float | Array = FORGETTING, most: float | Array = VARIANCE_MAX
) -> tuple[Tensor, Tensor]:
    """Compute the gain [..., k] of features z [..., k], and the covariance [..., k, k] after them.

    Args:
        covariance: [..., k, k], before them.
        made: z.
        forgetting: lambda, against [..., 1].
        most: variance of a weight at most, and at the start; against [..., 1].

    Returns:
        Both.
    """
    kept, highest = np.asarray(forgetting, np.float32), np.asarray(most, np.float32)
    unit = tf.eye(made.shape[-1], dtype=made.dtype)
    # Summed over the first axis of the symmetric matrix: the inner loop then runs over neighbours.
    spread = tf.reduce_sum(covariance * made[..., :, None], axis=-2)
    evidence = kept + tf.maximum(tf.reduce_sum(spread * made, axis=-1, keepdims=True), 0.0)
    # One vector's product with itself, and one scaling of both sides: symmetric to the last bit.
    root = spread / tf.sqrt(evidence)
    variance = (tf.linalg.diag_part(covariance) - root * root) / kept
    bound = tf.sqrt(highest / tf.maximum(variance, highest))
    shrunk = (bound[..., :, None] * bound[..., None, :]) / kept[..., None]
    after = (covariance - root[..., :, None] * root[..., None, :]) * shrunk + VARIANCE_ADDED * unit
    # Degraded by rounding, or a row that came in damaged: begin anew.
    whole = tf.reduce_all(tf.math.is_finite(variance) & (variance > 0.0), axis=-1)[..., None]
    found = tf.where(whole, spread / evidence, highest * made)
    return found, tf.where(whole[..., None], after, highest[..., None] * unit)


def keep_made(spec: NetworkSpec, ring: Tensor, made: Made, live: Tensor, count: Tensor) -> Tensor:
    """Put this record's features, gain and scale into the ring [batch, longest, D, 2k + 1]."""
    place = count % longest(spec)
    where = tf.stack([tf.range(tf.shape(place)[0]), place], axis=-1)
    new = tf.concat([made.features, made.gain, made.scale[..., None]], axis=-1)
    return tf.tensor_scatter_nd_update(ring, where, tf.where(live[:, None, None], new, tf.gather_nd(ring, where)))


def forecast(weights: Tensor, made: Made) -> Tensor:
    """[batch, D, H]: the changes that the readout forecasts, in the target's units."""
    return tf.reduce_sum(weights * made.features[..., None], axis=2) * made.scale[..., None]
