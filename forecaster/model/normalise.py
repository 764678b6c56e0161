"""Raw records to what the cell sees: every stream in units of its own scale.

    change   value minus last value, computed on the two float32 of each: exact where it matters
    scale    1.25 * mean absolute change = the standard deviation, were changes normal
    level    slow mean minus value, in scales

A running mean starts as the plain mean and becomes an exponential one after MEMORY
records. One change counts for at most SPIKE_MAX of the mean change so far, so that
one wild value moves the scale by at most SPIKE_MAX / MEMORY of itself.
"""

from __future__ import annotations

from math import pi, sqrt
from typing import NamedTuple

from forecaster.model.columns import VALUE_MAX, packed_columns
from forecaster.model.layout import COUNT_BASE
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec

# Half of what a running mean knows is younger than 89 records.
MEMORY = 128.0
# A lone spike moves the scale by 12 %; a sensor that wakes up grows its scale a thousandfold in 60 records.
SPIKE_MAX = 16.0
# Mean absolute deviation to standard deviation, for a normal distribution.
SIGMA_OF_DEVIATION = sqrt(pi / 2)
# A scale is never below this part of the value: a constant sensor's first change is large, not infinite.
SCALE_FLOOR = 1e-12
# ... and never zero.
TINY = 1e-30
# In scales; asinh makes 14.5 of it. Keeps 1e30 / 1e-30 from becoming infinite.
RATIO_MAX = 1e6
# The slow mean follows a value that has jumped for good within 700 records.
OFFSET_MAX = 256.0
# asinh of the elapsed time's logarithm is about 1 for 20 s, 1.1 for an hour.
LOG_ELAPSED_UNIT = 10.0


class Observed(NamedTuple):
    """What one record says about its stream; [batch, D] each, D targets.

    high, low: the value stepped with; missing: 1.0 where a forecast took its place;
    known: 1.0 once the target has ever been observed; change: since the last record; scale: after this record.
    """

    high: Tensor
    low: Tensor
    missing: Tensor
    known: Tensor
    change: Tensor
    scale: Tensor


def cell_input_width(spec: NetworkSpec) -> int:
    """I, the width of what `normalise` gives to the cell."""
    return 3 * len(spec.targets) + 6 + len(spec.features) + spec.feature_width


def normalise(spec: NetworkSpec, weights: Weights, state: Fields, packed: Tensor) -> tuple[Tensor, Observed, Fields]:
    """Observe one record of each stream.

    Args:
        spec: the network's.
        weights: for the prior of the scale.
        state: the streams' fields, [batch, ...] each.
        packed: [batch, K], the records as `columns.pack` lays them out.

    Returns:
        The cell's inputs [batch, I], what was observed, and the fields that changed.
    """
    columns = packed_columns(spec)
    observed, fields = _observe(weights, state, packed[:, columns.high], packed[:, columns.low])
    level, offset = _level(state, observed)
    pace, timing = _timing(state, packed[:, columns.elapsed])
    features, seen = _features(spec, state, packed[:, columns.features])
    inputs = [
        _squash(observed.change / observed.scale),
        level,
        observed.missing,
        packed[:, columns.clock],
        timing,
        *features,
    ]
    return tf.concat(inputs, axis=-1), observed, {**fields, **offset, **pace, **seen}


def count(state: Fields) -> Fields:
    """Count one more record: two fields, since float32 counts to 2^24 only."""
    low = state["records_low"] + 1.0
    full = low >= COUNT_BASE
    return {
        "records_low": tf.where(full, tf.zeros_like(low), low),
        "records_high": state["records_high"] + tf.cast(full, low.dtype),
    }


def add(high: Tensor, low: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """Add `change` to the value high + low, losing nothing (Knuth's two-sum), within VALUE_MAX."""
    total = high + change
    part = total - high
    rest = low + ((high - (total - part)) + (change - part))
    new_high = total + rest
    new_low = rest - (new_high - total)
    return tf.clip_by_value(new_high, -VALUE_MAX, VALUE_MAX), new_low


def _observe(weights: Weights, state: Fields, high: Tensor, low: Tensor) -> tuple[Observed, Fields]:
    missing = tf.math.is_nan(high)
    known = state["seen"] > 0.0
    # A missing target is stepped with the stream's own last forecast (0 while there has been no value at all).
    filled_high, filled_low = add(state["last_high"], state["last_low"], state["fill"])
    high, low = tf.where(missing, filled_high, high), tf.where(missing, filled_low, low)
    change = tf.where(known, (high - state["last_high"]) + (low - state["last_low"]), 0.0)
    counts = known & ~missing
    floor = SCALE_FLOOR * tf.abs(high) + TINY
    deviation = tf.where(counts, _running(state["deviation"], tf.abs(change), state["seen"], floor), state["deviation"])
    seen = tf.where(missing, state["seen"], tf.minimum(state["seen"] + 1.0, COUNT_BASE))
    # Until a first change has been seen the scale is what training found usual; a stream that stays constant leaves it.
    prior = (weights["prior/relative"] * tf.abs(high) + weights["prior/absolute"]) / tf.square(tf.maximum(seen, 1.0))
    scale = tf.where(deviation > floor, SIGMA_OF_DEVIATION * deviation, tf.maximum(prior, floor))
    one = tf.ones_like(high)
    observed = Observed(high, low, tf.where(missing, one, 0.0), tf.where(seen > 0.0, one, 0.0), change, scale)
    return observed, {"last_high": high, "last_low": low, "seen": seen, "deviation": deviation}


def _running(mean: Tensor, size: Tensor, seen: Tensor, floor: Tensor) -> Tensor:
    """The mean size, `size` included, of `seen` sizes; one spike counts for SPIKE_MAX means at most."""
    # At the floor there is no mean to measure a spike by: a constant stream's first change counts in full.
    limit = tf.where(mean > floor, SPIKE_MAX * mean, size)
    return mean + _rate(seen) * (tf.minimum(size, limit) - mean)


def _rate(seen: Tensor) -> Tensor:
    return 1.0 / tf.clip_by_value(seen, 1.0, MEMORY)


def _level(state: Fields, observed: Observed) -> tuple[Tensor, Fields]:
    bound = OFFSET_MAX * observed.scale
    moved = (1.0 - _rate(state["seen"] + 1.0)) * (state["mean_offset"] - observed.change)
    offset = observed.known * tf.clip_by_value(moved, -bound, bound)
    return _squash(offset / observed.scale), {"mean_offset": offset}


def _timing(state: Fields, elapsed_s: Tensor) -> tuple[Fields, Tensor]:
    """Log of the time since the last record, as it is and against the stream's own pace: [batch, 2]."""
    log_elapsed = tf.math.log1p(tf.maximum(elapsed_s[:, 0], 0.0))
    count_so_far = state["records_low"] + state["records_high"] * COUNT_BASE
    before = count_so_far > 0.0
    pace = tf.where(before, state["pace"] + _rate(count_so_far) * (log_elapsed - state["pace"]), 0.0)
    return {"pace": pace}, tf.stack(
        [log_elapsed / LOG_ELAPSED_UNIT, tf.where(before, log_elapsed - pace, 0.0)], axis=-1
    )


def _features(spec: NetworkSpec, state: Fields, features: Tensor) -> tuple[list[Tensor], Fields]:
    numeric = len(spec.features)
    values, one_hot = features[:, :numeric], features[:, numeric:]
    missing = tf.math.is_nan(values)
    mean, seen = state["feature_mean"], state["feature_seen"]
    values = tf.where(missing, mean, tf.clip_by_value(values, -VALUE_MAX, VALUE_MAX))
    distance = tf.where(seen > 0.0, values - mean, 0.0)
    floor = SCALE_FLOOR * tf.abs(values) + TINY
    deviation = tf.where(
        missing, state["feature_deviation"], _running(state["feature_deviation"], tf.abs(distance), seen, floor)
    )
    bound = SPIKE_MAX * deviation
    step = _rate(seen + 1.0) * tf.clip_by_value(distance, -bound, bound)
    fields = {
        "feature_mean": tf.where(missing, mean, tf.where(seen > 0.0, mean + step, values)),
        "feature_seen": tf.where(missing, seen, tf.minimum(seen + 1.0, COUNT_BASE)),
        "feature_deviation": deviation,
    }
    scaled = _squash(distance / tf.maximum(SIGMA_OF_DEVIATION * deviation, floor))
    return [scaled, tf.where(missing, tf.ones_like(values), 0.0), one_hot], fields


def _squash(ratio: Tensor) -> Tensor:
    """Linear up to about 1, logarithmic beyond: a spike is seen, and cannot saturate everything."""
    return tf.asinh(tf.clip_by_value(ratio, -RATIO_MAX, RATIO_MAX))
