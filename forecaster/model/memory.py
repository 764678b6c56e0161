"""What a stream remembers besides its hidden state, and the features made of it.

    changes   the last LAGS changes
    levels    the last value's distance from three exponential means
    seasons   for each season a ring of one place per record of it: the mean distance from
              the level at this phase, over the seasons so far (newest at SEASON_RATE)

A feature is a change from the last value, so a forecast made of them by any linear
readout keeps the level and the unit of the stream. All are divided by one scale per
record: the slow root mean square of the changes, or more where a feature would exceed
FEATURE_MAX, so that one wild record weighs little and clips nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from forecaster.model.columns import VALUE_MAX
from forecaster.model.geometry import LEVELS, anchors
from forecaster.model.layout import season_field
from forecaster.model.normalise import SCALE_FLOOR, SPIKE_MAX, TINY, Observed
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec

# The level that seasons are measured from.
_SEASON_LEVEL = 1
# Weight of the newest season in a phase's mean: half of it is younger than five seasons.
SEASON_RATE = 0.15
# One sentinel moves a phase by at most 0.15 x 64 scales.
SEASON_SPIKE_MAX = 64.0
SCALE_MEMORY = 8192.0
FEATURE_MAX = 20.0


class Remembered(NamedTuple):
    """One record's memory.

    features: [batch, D, memory_width], in `scale`; scale: [batch, D] in the target's units;
    seasonal: [batch, D, S, H], for each season the change that it forecasts, in the target's units.
    """

    features: Tensor
    scale: Tensor
    seasonal: Tensor


def remember(
    spec: NetworkSpec, weights: Weights, state: Fields, observed: Observed, count: Tensor, live: Tensor | None = None
) -> tuple[Remembered, Fields]:
    """Take one record into memory and look back from it.

    Args:
        spec: the network's.
        weights: `prior/pooling` among them.
        state: the streams' fields, [batch, ...] each.
        observed: this record.
        count: int32[batch], records stepped before this one.
        live: bool[batch], where a season's ring may change; everywhere if not given.

    Returns:
        The features, and the fields that changed.
    """
    change = tf.clip_by_value(observed.change, -VALUE_MAX, VALUE_MAX)
    changes = tf.concat([change[..., None], state["memory/changes"][..., :-1]], axis=-1)
    seen = state["seen"]
    rates = 1.0 / tf.minimum(seen[..., None] + 1.0, tf.constant(LEVELS, change.dtype))
    levels = (1.0 - rates) * (state["memory/levels"] - change[..., None])
    slow = _slow_scale(state["memory/scale"], change, observed, seen)
    steady = tf.ones_like(slow) if live is None else tf.cast(live, slow.dtype)[:, None] * tf.ones_like(slow)
    trusted = steady * (1.0 - observed.missing)
    fields = {"memory/changes": changes, "memory/levels": levels, "memory/scale": slow}
    raw, seasonal = [changes, levels], []
    for season in spec.seasons:
        ring = _write(state[season_field(season)], season, count, levels[..., _SEASON_LEVEL], slow, trusted)
        fields[season_field(season)] = ring
        ahead = anchors(spec, season) + spec.horizons
        looked = _read(ring, season, count, ahead) + levels[..., _SEASON_LEVEL, None] * _written(season, count, ahead)
        raw.append(looked[..., : -len(spec.horizons)])
        seasonal.append(looked[..., -len(spec.horizons) :])
    features = tf.einsum("bdr,rm->bdm", tf.concat(raw, axis=-1), weights["prior/pooling"])
    floor = SCALE_FLOOR * tf.abs(observed.high) + TINY
    # Before a first change the scale is what training found usual.
    known = tf.where(slow > floor, slow, observed.scale)
    scale = tf.maximum(known, tf.reduce_max(tf.abs(features), axis=-1) / FEATURE_MAX)
    shape = [tf.shape(change)[0], change.shape[1], 0, len(spec.horizons)]
    stacked = tf.stack(seasonal, axis=2) if seasonal else tf.zeros(shape, change.dtype)
    return Remembered(features / scale[..., None], scale, stacked), fields


def clock_features(clock: Tensor) -> Tensor:
    """[batch, CLOCK_FEATURES] of the clock [batch, 4]: day, half a day, week, as sine and cosine."""
    sine, cosine = clock[:, 0:1], clock[:, 1:2]
    return tf.concat([clock, 2.0 * sine * cosine, cosine * cosine - sine * sine], axis=-1)


def _slow_scale(scale: Tensor, change: Tensor, observed: Observed, seen: Tensor) -> Tensor:
    """Root mean square of the changes so far, one spike counted for SPIKE_MAX of it at most; never squares 1e30."""
    size = tf.abs(change)
    floor = SCALE_FLOOR * tf.abs(observed.high) + TINY
    size = tf.minimum(size, tf.where(scale > floor, SPIKE_MAX * scale, size))
    rate = 1.0 / tf.clip_by_value(seen, 1.0, SCALE_MEMORY)
    return tf.where((seen > 0.0) & (observed.missing == 0.0), root_mean_square(scale, size, rate), scale)


def root_mean_square(mean: Tensor, size: Tensor, rate: Tensor) -> Tensor:
    """Sqrt of mean**2 (1 - rate) + size**2 rate, without squaring anything large."""
    top = tf.maximum(tf.maximum(mean, size), TINY)
    return top * tf.sqrt((1.0 - rate) * tf.square(mean / top) + rate * tf.square(size / top))


def _write(ring: Tensor, season: int, count: Tensor, offset: Tensor, slow: Tensor, trusted: Tensor) -> Tensor:
    """Move this phase's mean [batch, season, D] towards this record; `offset` is the level minus the value."""
    place = count % season
    where = tf.stack([tf.range(tf.shape(place)[0]), place], axis=-1)
    old = tf.gather_nd(ring, where)
    visits = tf.cast(count // season, old.dtype)[:, None]
    bound = SEASON_SPIKE_MAX * slow
    far = -offset - old
    far = tf.where(visits > 0.0, tf.maximum(tf.minimum(far, bound), -bound), far)
    rate = tf.maximum(SEASON_RATE, 1.0 / (visits + 1.0)) * trusted
    return tf.tensor_scatter_nd_update(ring, where, tf.where(rate > 0.0, old + rate * far, old))


def _read(ring: Tensor, season: int, count: Tensor, ahead: tuple[int, ...]) -> Tensor:
    """[batch, D, len(ahead)]: the phases' means so many records ahead."""
    places = (count[:, None] + tf.constant(ahead, tf.int32)) % season
    return tf.transpose(tf.gather(ring, places, batch_dims=1), [0, 2, 1])


def _written(season: int, count: Tensor, ahead: tuple[int, ...]) -> Tensor:
    """[batch, 1, len(ahead)]: 1.0 where that phase has been seen."""
    steps = tf.constant(ahead, tf.int32)
    seen = (count[:, None] + steps % season >= season) | (steps % season == 0)
    return tf.cast(seen, tf.float32)[:, None, :]
