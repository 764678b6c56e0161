"""What training differentiates: the serving network scanned over a window, its loss, and one optimiser step.

Loss, for each scored record, target and step h: the pinball loss of the quantiles, in
the stream's scale * sqrt(h), plus DIRECTION_WEIGHT times the cross-entropy of up, same,
down. A target that is missing when its time comes does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from forecaster.model import network
from forecaster.model.columns import packed_columns
from forecaster.model.normalise import Observed
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec

Optimizer = Literal["adam", "sgd"]

# Both parts then pull on the cell about equally: an untrained pinball loss is near 0.25, a coin's cross-entropy 0.69.
DIRECTION_WEIGHT = 0.2
# In scales; pinball's gradient does not grow with the error, this only keeps the reported loss readable.
CHANGE_MAX = 1e3

_ADAM_MEAN, _ADAM_SQUARE, _ADAM_TINY = 0.9, 0.999, 1e-8


class Scanned(NamedTuple):
    """What the network said at every record of a window: observed and forecast, [T, B, ...] each."""

    high: Tensor
    low: Tensor
    scale: Tensor
    known: Tensor
    quantiles: Tensor
    direction: Tensor


class Batch(NamedTuple):
    """A window's records.

    future: [T + horizon_max, B, K], as they truly were, and those after the window.
    live, scored: bool[T, B], whether there is a record, whether its forecasts count.
    """

    future: Tensor
    live: Tensor
    scored: Tensor


class Descent(Protocol):
    """How to go down a gradient: by which rule, and the global norm that it is cut to first."""

    @property
    def optimizer(self) -> Optimizer:
        """The rule."""

    @property
    def clip_norm(self) -> float:
        """The longest gradient."""


class Pace(NamedTuple):
    """Of one optimiser step, both scalars: learning rate, and the step's number from 1."""

    rate: Tensor
    step: Tensor


class Moments(NamedTuple):
    """Adam's running mean and square of each weight's gradient; SGD leaves them alone."""

    mean: Weights
    square: Weights


class Learner(NamedTuple):
    """What a gradient step moves: the weights, the optimiser's moments, the streams' states [B, ...]."""

    weights: Weights
    moments: Moments
    state: Fields


def learner(weights: Mapping[str, NDArray[np.float32]], state: Fields) -> Learner:
    """Begin at these weights, nothing averaged yet, with the streams' states [B, ...]."""
    tensors = {name: tf.constant(value) for name, value in weights.items()}
    zeros = {name: tf.zeros_like(tensors[name]) for name in trainable(tensors)}
    return Learner(tensors, Moments(zeros, dict(zeros)), state)


def trainable(weights: Weights) -> list[str]:
    """Names of the weights that the gradient moves; the priors are measured, not learned."""
    return sorted(name for name in weights if not name.startswith("prior/"))


def scan(
    spec: NetworkSpec, weights: Weights, state: Fields, batch: Batch, nudge: Fields | None = None
) -> tuple[Scanned, Fields]:
    """Advance B streams through T records with the serving network.

    Args:
        spec: the network's.
        weights: the network's.
        state: fields [B, ...] but `pending`.
        batch: T records of each; where one is not live a stream's state stays.
        nudge: added to the cells' states at each record, [T, B, units] each: zeros whose gradient is wanted.

    Returns:
        What was said, and the next state; the gradient ends at `state` and goes through the cells only.
    """
    length = batch.live.shape[0]
    packed, live = batch.future[:length], batch.live
    shapes = [list(shape) for shape in _scanned_shapes(spec)]
    arrays = tuple(tf.TensorArray(packed.dtype, length, element_shape=[packed.shape[1], *shape]) for shape in shapes)

    def one(place: Tensor, state: Fields, arrays: tuple[Tensor, ...]) -> tuple[Tensor, Fields, tuple[Tensor, ...]]:
        made, fields = network.advance(spec, weights, state, packed[place])
        # Running means and filled values are data: the gradient goes back through the cells' own memory only.
        fields = {name: value if name.startswith("cell") else tf.stop_gradient(value) for name, value in fields.items()}
        if nudge is not None:
            fields |= {name: fields[name] + value[place] for name, value in nudge.items()}
        said = (*_numbers(made.observed), made.forecast.quantiles, made.forecast.direction)
        arrays = tuple(array.write(place, value) for array, value in zip(arrays, said, strict=True))
        return place + 1, {name: network.keep(live[place], fields[name], state[name]) for name in state}, arrays

    begin = (tf.constant(0), state, arrays)
    # XLA needs the static bound: it sizes what the backward pass has to remember.
    _, state, arrays = tf.while_loop(lambda place, *_: place < length, one, begin, maximum_iterations=length)
    return Scanned(*(array.stack() for array in arrays)), state


def loss(spec: NetworkSpec, said: Scanned, batch: Batch) -> tuple[Tensor, Tensor]:
    """Score a window's forecasts.

    Args:
        spec: the network's.
        said: by `scan`, over T records.
        batch: that was scanned.

    Returns:
        The sum of the losses and how many forecasts it is a sum of, both scalars.
    """
    columns = packed_columns(spec)
    length = said.high.shape[0]
    future = batch.future
    high = tf.stack([future[step : step + length, :, columns.high] for step in spec.steps], axis=-1)
    low = tf.stack([future[step : step + length, :, columns.low] for step in spec.steps], axis=-1)
    counts = ~tf.math.is_nan(high) & batch.scored[:, :, None, None] & (said.known[..., None] > 0.0)
    change = tf.where(counts, (high - said.high[..., None]) + (low - said.low[..., None]), 0.0)
    widening = tf.sqrt(tf.constant(spec.steps, change.dtype))
    scaled = tf.clip_by_value(change / (said.scale[..., None] * widening), -CHANGE_MAX, CHANGE_MAX)
    above = scaled[..., None] - said.quantiles
    levels = tf.constant(spec.quantiles, change.dtype)
    pinball = tf.reduce_mean(tf.maximum(levels * above, (levels - 1.0) * above), axis=-1)
    outcome = tf.where(change > 0.0, 0, tf.where(change < 0.0, 2, 1))
    surprise = tf.nn.sparse_softmax_cross_entropy_with_logits(outcome, said.direction)
    weight = tf.cast(counts, change.dtype)
    return tf.reduce_sum(weight * (pinball + DIRECTION_WEIGHT * surprise)), tf.reduce_sum(weight)


def hide(spec: NetworkSpec, batch: Batch, hidden: Tensor) -> Batch:
    """Make every target of the records `hidden`, bool[T, B], missing."""
    length = batch.live.shape[0]
    targets = tf.range(batch.future.shape[-1]) < packed_columns(spec).low.stop
    nan = tf.constant(float("nan"), batch.future.dtype)
    seen = tf.where(hidden[..., None] & targets, nan, batch.future[:length])
    return batch._replace(future=tf.concat([seen, batch.future[length:]], axis=0))


def gradients(
    spec: NetworkSpec, weights: Weights, state: Fields, batch: Batch, hidden: Tensor
) -> tuple[Tensor, Weights, Fields]:
    """Differentiate a window's mean loss by the trainable weights: loss, gradients by name, next state.

    The network does not get to see the targets of the records `hidden`, bool[T, B]; they count nevertheless.
    """
    names = trainable(weights)
    with tf.GradientTape() as tape:
        tape.watch([weights[name] for name in names])
        said, state = scan(spec, weights, state, hide(spec, batch, hidden))
        total, count = loss(spec, said, batch)
        mean = total / tf.maximum(count, 1.0)
    found = tape.gradient(mean, [weights[name] for name in names], unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return mean, dict(zip(names, found, strict=True)), state


def learn(
    spec: NetworkSpec, descent: Descent, learner: Learner, batch: Batch, hidden: Tensor, pace: Pace
) -> tuple[Tensor, Tensor, Learner]:
    """One gradient step on a window: its loss before it, the gradient's global norm before clipping, the next learner.

    The records `hidden`, bool[T, B], are as in `gradients`.
    """
    mean_loss, slopes, state = gradients(spec, learner.weights, learner.state, batch, hidden)
    clipped, norm = tf.clip_by_global_norm(list(slopes.values()), descent.clip_norm)
    slopes = dict(zip(slopes, clipped, strict=True))
    weights, moments = descend(descent.optimizer, learner.weights, learner.moments, slopes, pace)
    return mean_loss, norm, Learner(weights, moments, state)


def descend(
    optimizer: Optimizer, weights: Weights, moments: Moments, slopes: Weights, pace: Pace
) -> tuple[Weights, Moments]:
    """Move the weights one step down the gradients `slopes`."""
    rate, step = pace
    if optimizer == "sgd":
        return {
            name: value - rate * slopes[name] if name in slopes else value for name, value in weights.items()
        }, moments
    mean = {name: _ADAM_MEAN * moments.mean[name] + (1 - _ADAM_MEAN) * slope for name, slope in slopes.items()}
    square = {
        name: _ADAM_SQUARE * moments.square[name] + (1 - _ADAM_SQUARE) * slope**2 for name, slope in slopes.items()
    }
    unbiased = rate * tf.sqrt(1.0 - _ADAM_SQUARE**step) / (1.0 - _ADAM_MEAN**step)
    moved = {name: weights[name] - unbiased * mean[name] / (tf.sqrt(square[name]) + _ADAM_TINY) for name in slopes}
    return {**weights, **moved}, Moments(mean, square)


def _numbers(observed: Observed) -> tuple[Tensor, ...]:
    return tuple(tf.stop_gradient(part) for part in (observed.high, observed.low, observed.scale, observed.known))


def _scanned_shapes(spec: NetworkSpec) -> tuple[tuple[int, ...], ...]:
    targets, steps = len(spec.targets), len(spec.steps)
    one = (targets,)
    return one, one, one, one, (targets, steps, len(spec.quantiles)), (targets, steps, 3)
