"""From the shared network's forecast to the one that is published: what a stream has learned by itself.

    learn     by the targets that this record brings: readout, hedge, its correction, calibration
    forecast  readout -> hedge over all experts -> its correction -> quantiles and odds around it
    keep      what each expert said, until the target comes

A forecast of horizon h is learned from h records later, never before.
"""

from __future__ import annotations

from typing import NamedTuple

from forecaster.model import calibration, correction, hedge, readout
from forecaster.model.geometry import experts
from forecaster.model.memory import Remembered, clock_features
from forecaster.model.runtime import Fields, Tensor, tf
from forecaster.model.spec import NetworkSpec


class Said(NamedTuple):
    """The shared network's word, at the published horizons and `spec.steps`.

    quantiles: [batch, D, H, Q] changes in the target's units; chances: [batch, D, H, 2] of up, down;
    medians: [batch, D, steps] changes in the target's units.
    """

    quantiles: Tensor
    chances: Tensor
    medians: Tensor


class Due(NamedTuple):
    """What this record settles: settled bool[batch, D, H], change [batch, D, H], old [batch, D, H, pending_width]."""

    settled: Tensor
    change: Tensor
    old: Tensor


class Adapted(NamedTuple):
    """quantiles [batch, D, H, Q], chances [batch, D, H, 2], kept [batch, D, H, kept_width], and the fields changed."""

    quantiles: Tensor
    chances: Tensor
    kept: Tensor
    fields: Fields


class Kept(NamedTuple):
    """What was kept of the forecasts that are settled now; [batch, D, H, ...]."""

    said: Tensor  # by each expert, the last value's 0 first
    slopes: Tensor
    mixed: Tensor
    corrected: Tensor
    middle: Tensor
    odds: Tensor  # logits: quantiles', head's, mixed


def adapt(
    spec: NetworkSpec,
    state: Fields,
    said: Said,
    remembered: Remembered | None,
    clock: Tensor,
    due: Due,
    live: Tensor,
    count: Tensor,
) -> Adapted:
    """Learn from what this record settles, then forecast.

    Args:
        spec: the network's.
        state: every field of the layout, [batch, ...].
        said: by the shared network, now.
        remembered: the memory's features; None where the spec has none.
        clock: [batch, 4].
        due: what this record settles.
        live: bool[batch], False where there is no record.
        count: int32[batch], records stepped before this one.

    Returns:
        What is published, and what changes.
    """
    if not spec.adaptive:
        return Adapted(said.quantiles, said.chances, said.quantiles[..., :0], {})
    kept = _kept(spec, due.old)
    fields = _learn(spec, state, due, kept, count)
    head = said.quantiles[..., spec.median]
    voices = [tf.zeros_like(head)]
    if remembered is not None:
        voices += tf.unstack(remembered.seasonal, num=len(spec.seasons), axis=2)
    voices.append(head)
    if spec.readout and remembered is not None:
        made, learned = _make(spec, state, said, remembered, clock)
        learned["readout/ring"] = readout.keep_made(spec, state["readout/ring"], made, live, count)
        fields |= learned
        voices.append(readout.forecast(fields["readout/weights"], made))
    voice = tf.stack(voices, axis=-1)
    middle = slopes = whole = corrected = voices[-1]
    if spec.hedge:
        mixed = hedge.mix(spec, fields, voice)
        whole, slopes = mixed.forecast, mixed.slopes
        middle, corrected = correction.correct(spec, fields, voice, whole)
    quantiles, chances, odds = _surround(spec, fields, said, middle, count)
    made_of = tf.stack([slopes, whole, corrected, middle], axis=-1)
    numbers = tf.concat([voice[..., 1:], made_of, odds], axis=-1)
    return Adapted(quantiles, chances, numbers, fields)


def _kept(spec: NetworkSpec, old: Tensor) -> Kept:
    start, count = len(spec.quantiles) + 5, len(experts(spec)) - 1
    said = old[..., start : start + count]
    said = tf.concat([tf.zeros_like(said[..., :1]), said], axis=-1)
    rest = old[..., start + count :]
    return Kept(said, rest[..., 0], rest[..., 1], rest[..., 2], rest[..., 3], rest[..., 4:7])


def _learn(spec: NetworkSpec, state: Fields, due: Due, kept: Kept, count: Tensor) -> Fields:
    fields: Fields = {}
    if spec.hedge:
        fields |= hedge.learn(spec, state, due.settled, due.change, kept.said, kept.slopes, count)
        usual, words = fields["hedge/usual"], (kept.said, kept.mixed, kept.corrected)
        fields |= correction.learn(spec, state, usual, due.settled, due.change, *words)
    if spec.calibration:
        issued = due.old[..., : len(spec.quantiles)]
        fields |= calibration.learn_quantiles(spec, state, due.settled, due.change, issued, kept.middle, count)
        odds = tf.concat([tf.zeros_like(kept.odds[..., :1]), kept.odds[..., :2]], axis=-1)
        fields |= calibration.learn_direction(spec, state, due.settled, due.change, odds, kept.odds[..., 2], count)
    if spec.readout:
        usual = state["hedge/usual"] if spec.hedge else tf.zeros_like(due.change)
        fields["readout/weights"] = readout.learn(spec, state, due.settled, due.change, usual, count)
    return fields


def _make(
    spec: NetworkSpec, state: Fields, said: Said, remembered: Remembered, clock: Tensor
) -> tuple[readout.Made, Fields]:
    features = readout.features(spec, remembered.features, clock_features(clock), said.medians, remembered.scale)
    gain, covariance = readout.gain(state["readout/covariance"], features)
    return readout.Made(features, remembered.scale, gain), {"readout/covariance": covariance}


def _surround(
    spec: NetworkSpec, fields: Fields, said: Said, middle: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantiles and chances around the forecast, and the logits to keep [batch, D, H, 3]."""
    head = said.quantiles
    if not spec.calibration:
        around = middle[..., None] + (head - head[..., spec.median, None])
        return around, said.chances, tf.zeros_like(head[..., :3])
    quantiles = calibration.quantiles(spec, fields, middle, head, count)
    up, down = said.chances[..., 0], said.chances[..., 1]
    logits = [
        tf.zeros_like(up),
        calibration.odds_of_quantiles(spec, quantiles),
        tf.clip_by_value(tf.math.log(tf.maximum(up, 1e-6) / tf.maximum(down, 1e-6)), -5.0, 5.0),
    ]
    chances, mixed = calibration.chances(spec, fields, tf.stack(logits, axis=-1))
    return quantiles, chances, tf.stack([logits[1], logits[2], mixed], axis=-1)
