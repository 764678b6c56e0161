"""Calibration: quantiles that hold what they say, and a direction's probability likewise.

    quantile   forecast + usual error * (normal quantile + offset), for each stream and horizon
    offset     += rate (level - [target below the quantile that was issued]): online conformal
               (Gibbs and Candes, 2021); what was issued counts, so coverage is right in the long run
               however the series changes
    direction  a mean of three forecasts of "up": even odds, the quantiles', the head's, weighed by their
               logarithmic losses; then its logit is stretched or shrunk, bent and shifted as past outcomes ask:
               stretch z + bend tanh(BEND_SLOPE z) + shift, and what each tenth of the probability still misses

The offset of an outer quantile moves faster than that of an inner one: the coverage
hangs on the first, and noise in the second costs accuracy.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from forecaster.model.geometry import TENTHS
from forecaster.model.normalise import SIGMA_OF_DEVIATION, TINY
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec

# Of the outermost quantile, one record ahead, in usual errors; a part of it further ahead, since successive errors
# share most of their changes.
OFFSET_RATE, OFFSET_POWER = 0.02, 0.05
# Of the median, as a part of that; and how soon the rate falls from the outermost quantile to it.
INNER_RATE, OUTER_POWER = 0.01, 4
OFFSET_MAX = 1.5
# In usual errors: a target so near to a quantile counts as partly below it. Were it all or nothing, the last bit of a
# number would decide, and the same records stepped in other batches would lead to another offset.
EDGE = 0.02
# Records over which the usual error is measured, one ahead; more further ahead, for the same reason.
USUAL_MEMORY, USUAL_POWER = 50.0, 0.15
# How much of the usual error one error counts for at most.
MISS_MAX = 8.0
# Errors seen until the stream's own spread counts as much as the head's.
TRUSTED_AFTER = 20.0

DIRECTION_RATE, DIRECTION_MEMORY = 0.3, 0.998
# Even odds are believed until the others have shown more: twice as much. What the quantiles say is near even by
# itself where there is no edge.
EVEN_PRIOR = 2.0
ODDS_RATE = 0.005
# A mix with even odds in it claims too little where it is near them, and one of normal distributions too much where
# it is far from them: one stretch cannot mend both.
BEND_SLOPE, BEND_MAX = 4.0, 1.5
# Of a knot, one record ahead; less further ahead.
KNOT_RATE, KNOT_POWER, KNOT_MAX = 0.03, 0.75, 3.0
SAME_MEMORY = 500.0
CHANCE_MIN = 0.005


def rates(spec: NetworkSpec) -> NDArray[np.float32]:
    """[H, Q]: how far an offset moves."""
    levels = np.array(spec.quantiles)
    outer = (2 * np.abs(levels - 0.5) / max(1e-9, 2 * np.abs(levels - 0.5).max())) ** OUTER_POWER
    each = INNER_RATE + (1.0 - INNER_RATE) * outer
    steps = np.array(spec.horizons, float)[:, None] ** OFFSET_POWER
    found: NDArray[np.float32] = (OFFSET_RATE * each / steps).astype(np.float32)
    return found


def learn_quantiles(
    spec: NetworkSpec, state: Fields, settled: Tensor, change: Tensor, issued: Tensor, middle: Tensor, count: Tensor
) -> Fields:
    """Move spread and offsets by what this record settles.

    Args:
        spec: the network's.
        state: the streams' fields.
        settled: bool[batch, D, H].
        change: [batch, D, H], what happened.
        issued: [batch, D, H, Q], the quantiles that were forecast then.
        middle: [batch, D, H], the forecast that they were put around.
        count: int32[batch], records stepped before this one.

    Returns:
        The fields that changed.
    """
    usual = state["calibration/usual"]
    miss = tf.abs(change - middle)
    miss = tf.minimum(miss, tf.where(usual > 0.0, MISS_MAX * usual, miss))
    number = tf.cast(count[:, None] - tf.constant(spec.horizons, tf.int32) + 1, miss.dtype)[:, None, :]
    memory = (USUAL_MEMORY * np.array(spec.horizons, float) ** USUAL_POWER).astype(np.float32)
    moved = usual + (miss - usual) / tf.clip_by_value(number, 1.0, memory)
    edge = tf.maximum(EDGE * usual, TINY)[..., None]
    below = tf.clip_by_value(0.5 + (issued - change[..., None]) / edge, 0.0, 1.0)
    levels = tf.constant(spec.quantiles, change.dtype)
    offsets = state["calibration/offsets"] + rates(spec) * (levels - below)
    offsets = tf.clip_by_value(offsets, -OFFSET_MAX, OFFSET_MAX)
    return {
        "calibration/usual": tf.where(settled, moved, usual),
        "calibration/offsets": tf.where(settled[..., None], offsets, state["calibration/offsets"]),
    }


def quantiles(spec: NetworkSpec, fields: Fields, middle: Tensor, head: Tensor, count: Tensor) -> Tensor:
    """Put quantiles around the forecast.

    Args:
        spec: the network's.
        fields: with what `learn_quantiles` changed.
        middle: [batch, D, H], changes in the target's units.
        head: [batch, D, H, Q], the head's quantiles: their spread is used while the stream's own is unknown.
        count: int32[batch], records stepped before this one.

    Returns:
        [batch, D, H, Q] changes in the target's units, never crossing.
    """
    normal = np.array([NormalDist().inv_cdf(level) for level in spec.quantiles], np.float32)
    own = (normal + fields["calibration/offsets"]) * (SIGMA_OF_DEVIATION * fields["calibration/usual"])[..., None]
    settled = tf.cast(count[:, None] - tf.constant(spec.horizons, tf.int32) + 1, middle.dtype)[:, None, :, None]
    settled = tf.maximum(settled, 0.0)
    trust = settled / (settled + TRUSTED_AFTER)
    spread = trust * own + (1.0 - trust) * (head - head[..., spec.median, None])
    return _uncrossed(spec, middle[..., None] + spread)


def _uncrossed(spec: NetworkSpec, levels: Tensor) -> Tensor:
    """From the median outwards, each quantile is at least the one before."""
    place = np.arange(len(spec.quantiles))
    # above[i, j]: is quantile j between the median and i, on the upper side? One reduction for all i compiles faster
    # than a chain of minima and maxima.
    above = (place[None, :] >= spec.median) & (place[None, :] <= place[:, None])
    below = (place[None, :] <= spec.median) & (place[None, :] >= place[:, None])
    wide = levels[..., None, :]
    highest = tf.reduce_max(tf.where(above, wide, -np.inf), axis=-1)
    lowest = tf.reduce_min(tf.where(below, wide, np.inf), axis=-1)
    return tf.where(place >= spec.median, highest, lowest)


def odds_of_quantiles(spec: NetworkSpec, issued: Tensor) -> Tensor:
    """Logit of P(change > 0), [...], of quantiles [..., Q]: by a normal distribution of their middle and spread."""
    levels = np.array([NormalDist().inv_cdf(level) for level in spec.quantiles])
    wide = levels[-1] - levels[0]
    spread = (issued[..., -1] - issued[..., 0]) / (wide if wide > 0.0 else 1.0)
    ratio = tf.clip_by_value(issued[..., spec.median] / tf.maximum(spread, TINY), -3.0, 3.0)
    # The logistic curve nearest to the normal distribution.
    return 1.702 * ratio


def learn_direction(
    spec: NetworkSpec, state: Fields, settled: Tensor, change: Tensor, said: Tensor, mixed: Tensor, count: Tensor
) -> Fields:
    """Take in which way the settled forecasts went.

    Args:
        spec: the network's.
        state: the streams' fields.
        settled: bool[batch, D, H].
        change: [batch, D, H], what happened.
        said: [batch, D, H, 3], logit of "up" given that it moves, by each expert then.
        mixed: [batch, D, H], the mix's logit then, before it was stretched.
        count: int32[batch], records stepped before this one.

    Returns:
        The fields that changed.
    """
    moved = settled & (change != 0.0)
    up = tf.cast(change > 0.0, change.dtype)
    losses = tf.nn.softplus(said) - up[..., None] * said
    odds, knots = state["calibration/odds"], state["calibration/knots"]
    bent = _bent(odds, mixed)
    wrong = up - tf.sigmoid(bent)
    near = _near(bent)
    left = up - tf.sigmoid(bent + tf.reduce_sum(near * knots, axis=-1))
    each = KNOT_RATE * np.array(spec.horizons, np.float32) ** -KNOT_POWER
    knots = tf.clip_by_value(knots + (each * left)[..., None] * near, -KNOT_MAX, KNOT_MAX)
    slower = 1.0 / np.sqrt(np.array(spec.horizons, np.float32))
    # The shift alone is slowed: where no edge is claimed the mix is near even, and stretching it does no harm.
    by = [wrong * mixed * tf.exp(odds[..., 0]), slower * wrong, wrong * tf.tanh(BEND_SLOPE * mixed)]
    odds = tf.clip_by_value(odds + ODDS_RATE * tf.stack(by, axis=-1), [-1.5, -1.5, 0.0], [1.5, 1.5, BEND_MAX])
    number = tf.cast(count[:, None] - tf.constant(spec.horizons, tf.int32) + 2, change.dtype)[:, None, :]
    same = state["calibration/same"]
    now_same = same + (tf.cast(change == 0.0, change.dtype) - same) / tf.clip_by_value(number, 2.0, SAME_MEMORY)
    old = state["calibration/losses"]
    return {
        "calibration/losses": tf.where(moved[..., None], DIRECTION_MEMORY * old + losses, old),
        "calibration/odds": tf.where(moved[..., None], odds, state["calibration/odds"]),
        "calibration/knots": tf.where(moved[..., None], knots, state["calibration/knots"]),
        "calibration/same": tf.where(settled, now_same, same),
    }


def chances(spec: NetworkSpec, fields: Fields, said: Tensor) -> tuple[Tensor, Tensor]:
    """P(up), P(down) [batch, D, H, 2] and the mix's logit [batch, D, H], of the experts' logits [batch, D, H, 3]."""
    prior = np.log(np.array([EVEN_PRIOR, 1.0, 1.0], np.float32))
    slower = 1.0 / np.sqrt(np.array(spec.horizons, np.float32))[:, None]
    weights = tf.nn.softmax(prior - DIRECTION_RATE * slower * fields["calibration/losses"])
    up = tf.reduce_sum(weights * tf.sigmoid(said), axis=-1)
    mixed = tf.math.log(up) - tf.math.log1p(-up)
    bent = _bent(fields["calibration/odds"], mixed)
    held = bent + tf.reduce_sum(_near(bent) * fields["calibration/knots"], axis=-1)
    up = tf.clip_by_value(tf.sigmoid(held), CHANCE_MIN, 1.0 - CHANCE_MIN)
    moves = 1.0 - fields["calibration/same"]
    return tf.stack([moves * up, moves * (1.0 - up)], axis=-1), mixed


def _near(bent: Tensor) -> Tensor:
    """[..., TENTHS + 1]: how near the probability of a logit [...] is to each edge of a tenth; the sum is 1."""
    apart = TENTHS * tf.sigmoid(bent)[..., None] - np.arange(TENTHS + 1, dtype=np.float32)
    return tf.maximum(1.0 - tf.abs(apart), 0.0)


def _bent(odds: Tensor, mixed: Tensor) -> Tensor:
    """The logit, by the logarithm of the stretch, the shift and the bend."""
    return tf.exp(odds[..., 0]) * mixed + odds[..., 1] + odds[..., 2] * tf.tanh(BEND_SLOPE * mixed)
