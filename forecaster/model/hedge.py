"""The hedge: per stream, target and horizon a mean of several experts, weighed by what each has lost.

    experts   the last value, each season's mean, the shared head, the adaptive readout
    squares   weights ~ prior exp(-eta L), L the discounted squared errors: near the best single expert;
              the mean of a cautious rate and a quick one, which is the same at every horizon
    slopes    the same over 2 (mix - y)(expert - mix), the loss's slope: near the best fixed mean of them
              (Cesa-Bianchi and Lugosi, 2006, 2.5)
    forecast  the mean of both mixes

Losses are in units of the mix's own usual squared error and end at LOSS_MAX, so that no
sentinel decides a weight. At horizon h successive errors share h - 1 of their changes and
say little new: the cautious rate is eta / h^(3/4), and losses are remembered h^(1/4) times as long.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from forecaster.model.geometry import experts
from forecaster.model.memory import root_mean_square
from forecaster.model.normalise import TINY
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec

# The last value is believed until the others have shown more: five times as much as each.
NAIVE_PRIOR = 5.0
SQUARES_RATE, SQUARES_MEMORY = 0.2, 0.995
SLOPES_RATE, SLOPES_MEMORY = 0.05, 0.999
RATE_POWER, MEMORY_POWER = 0.75, 0.25
LOSS_MAX = 30.0
# Records over which the usual error is measured.
USUAL_MEMORY = 500.0


class Mixed(NamedTuple):
    """forecast, slopes: changes [batch, D, H] in the target's units, the whole and the mix that learns by slopes.

    weights: [batch, D, H, E] of the last value and the experts in the forecast.
    """

    forecast: Tensor
    slopes: Tensor
    weights: Tensor


def learn(
    spec: NetworkSpec, state: Fields, settled: Tensor, change: Tensor, said: Tensor, mixed: Tensor, count: Tensor
) -> Fields:
    """Take in the losses of the forecasts that this record settles.

    Args:
        spec: the network's.
        state: the streams' fields.
        settled: bool[batch, D, H].
        change: [batch, D, H], what happened.
        said: [batch, D, H, E], what each expert said then.
        mixed: [batch, D, H], what the mix by slopes said then.
        count: int32[batch], records stepped before this one.

    Returns:
        The fields that changed.
    """
    usual = state["hedge/usual"]
    miss = tf.abs(change - mixed)
    missed = tf.minimum(miss, tf.where(usual > 0.0, np.sqrt(LOSS_MAX) * usual, miss))
    number = tf.cast(count[:, None] - tf.constant(spec.horizons, tf.int32) + 1, miss.dtype)[:, None, :]
    rate = 1.0 / tf.clip_by_value(number, 1.0, USUAL_MEMORY)
    usual = tf.where(settled, root_mean_square(usual, missed, rate), usual)
    unit = tf.maximum(usual, TINY)[..., None]
    errors = tf.clip_by_value((change[..., None] - said) / unit, -1e3, 1e3)
    squares = tf.minimum(tf.square(errors), LOSS_MAX)
    limit = np.sqrt(LOSS_MAX)
    slope = tf.clip_by_value((mixed - change)[..., None] / unit, -limit, limit)
    apart = tf.clip_by_value((said - mixed[..., None]) / unit, -1e3, 1e3)
    slopes = tf.clip_by_value(2.0 * slope * apart, -LOSS_MAX, LOSS_MAX)
    now = settled[..., None]
    old_squares, old_slopes = state["hedge/squares"], state["hedge/slopes"]
    return {
        "hedge/usual": usual,
        "hedge/squares": tf.where(now, memory(spec, SQUARES_MEMORY) * old_squares + squares, old_squares),
        "hedge/slopes": tf.where(now, memory(spec, SLOPES_MEMORY) * old_slopes + slopes, old_slopes),
    }


def mix(spec: NetworkSpec, fields: Fields, said: Tensor) -> Mixed:
    """Mix what the experts say [batch, D, H, E], changes in the target's units, by the losses in `fields`."""
    weights, slopes = weigh(spec, fields["hedge/squares"], fields["hedge/slopes"])
    return Mixed(tf.reduce_sum(weights * said, axis=-1), tf.reduce_sum(slopes * said, axis=-1), weights)


def weigh(spec: NetworkSpec, squares: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The experts' weights in the forecast and in the mix by slopes, both [..., H, E], by their losses so far."""
    prior = np.log([NAIVE_PRIOR] + [1.0] * (len(experts(spec)) - 1)).astype(np.float32)
    slower = (np.array(spec.horizons, np.float32) ** -RATE_POWER)[:, None]
    cautious = tf.nn.softmax(prior - SQUARES_RATE * slower * squares)
    # Where errors far ahead are not alike after all, caution keeps an expert that has long lost.
    quick = tf.nn.softmax(prior - SQUARES_RATE * squares)
    by_slopes = tf.nn.softmax(prior - SLOPES_RATE * slower * slopes)
    return 0.25 * (cautious + quick) + 0.5 * by_slopes, by_slopes


def memory(spec: NetworkSpec, nearest: float) -> NDArray[np.float32]:
    """[H, 1]: the part of a loss that is remembered at the next record; `nearest` at one record ahead."""
    forgotten = (1.0 - nearest) * np.array(spec.horizons, float) ** -MEMORY_POWER
    kept: NDArray[np.float32] = (1.0 - forgotten)[:, None].astype(np.float32)
    return kept
