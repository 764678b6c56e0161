"""Forecasts whose target has not come yet, and what they turn out to be worth.

For each published horizon h a row keeps a ring of h places; the record that arrives
now settles the forecast made h records ago and takes its place. A place follows from
the count of records, so missing targets and restarts cannot shift it.
"""

from __future__ import annotations

from itertools import accumulate

from forecaster.model.layout import COUNT_BASE
from forecaster.model.normalise import Observed
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec

# Scores, in the order of columns.Scores.
SCORE_COUNT = 7


def record_count(state: Fields) -> Tensor:
    """int32[batch]: records stepped before this one."""
    return tf.cast(state["records_high"], tf.int32) * COUNT_BASE + tf.cast(state["records_low"], tf.int32)


def places(spec: NetworkSpec, state: Fields) -> tuple[Tensor, Tensor]:
    """Where this record's forecasts go: index [batch, H] in the pending axis; and whether one was there, [batch, H]."""
    count = record_count(state)
    horizons = tf.constant(spec.horizons, tf.int32)
    starts = tf.constant([0, *accumulate(spec.horizons[:-1])], tf.int32)
    return starts + count[:, None] % horizons, count[:, None] >= horizons


def arrived(spec: NetworkSpec, due: Tensor, old: Tensor, observed: Observed) -> tuple[Tensor, Tensor, Tensor]:
    """Say what this record settles, bool[batch, D, H], the change since then, and `old` as [batch, D, H, width]."""
    old = tf.transpose(old, [0, 2, 1, 3])
    scale, high, low = (old[..., len(spec.quantiles) + place] for place in range(2, 5))
    change = (observed.high[..., None] - high) + (observed.low[..., None] - low)
    # A scale of 0 marks a forecast made before the target had ever been observed: there was none.
    settled = due[:, None, :] & (observed.missing[..., None] == 0.0) & (scale > 0.0)
    return settled, tf.where(settled, change, 0.0), old


def settle(spec: NetworkSpec, due: Tensor, old: Tensor, observed: Observed) -> Tensor:
    """Score the forecasts that this record settles.

    Args:
        spec: the network's.
        due: [batch, H] bool, whether there was a forecast.
        old: [batch, H, D, pending_width], what `entries` made of it then.
        observed: this record.

    Returns:
        [batch, SCORE_COUNT, D, H], NaN where nothing was settled.
    """
    settled, change, old = arrived(spec, due, old, observed)
    count = len(spec.quantiles)
    quantiles = old[..., :count]
    up, down, scale = (old[..., count + place] for place in range(3))
    above = change[..., None] - quantiles
    levels = tf.constant(spec.quantiles, quantiles.dtype)
    pinball = tf.reduce_mean(tf.maximum(levels * above, (levels - 1.0) * above), axis=-1)
    rank = tf.reduce_sum(tf.cast(above > 0.0, quantiles.dtype), axis=-1)
    scores = tf.stack([above[..., spec.median], change, scale, pinball, rank, up, down], axis=1)
    return tf.where(settled[:, None], scores, float("nan"))


def entries(spec: NetworkSpec, quantiles: Tensor, chances: Tensor, kept: Tensor, observed: Observed) -> Tensor:
    """What to keep of this record's forecasts until their targets come.

    Args:
        spec: the network's.
        quantiles: [batch, D, H, Q], changes in the target's units.
        chances: [batch, D, H, 2], P(up), P(down).
        kept: [batch, D, H, kept_width], what made them.
        observed: this record.

    Returns:
        [batch, H, D, pending_width].
    """
    now = tf.stack([observed.scale * observed.known, observed.high, observed.low], axis=-1)
    now = tf.repeat(now[:, :, None, :], len(spec.horizons), axis=2)
    return tf.transpose(tf.concat([quantiles, chances, now, kept], axis=-1), [0, 2, 1, 3])
