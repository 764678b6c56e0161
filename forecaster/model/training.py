"""Fit the shared weights on history: truncated backpropagation through time over many streams at once.

cut histories into lanes -> walk them in windows, states carried -> gradient, clip, step
every so often the held-out time is scored; the best weights are kept, and patience ends it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from forecaster.errors import Fatal, ModelMismatch
from forecaster.model import learning, network
from forecaster.model.columns import StreamHistory
from forecaster.model.layout import CELL_PARTS, row_layout, serving_only
from forecaster.model.normalise import SIGMA_OF_DEVIATION
from forecaster.model.programs import Compiled
from forecaster.model.registry import Model, new_version, refuse_not_finite
from forecaster.model.runtime import Fields, Tensor, Weights, tf
from forecaster.model.spec import NetworkSpec
from forecaster.model.windows import Cut, Dataset, Lane, Window, dataset, walk

# At most so many held-out records are scored at a time: more would not tell more, and would cost more than learning.
EVALUATE_RECORDS_MAX = 40_000
# Score the held-out time after an epoch, but not more often than this.
EVALUATE_STEPS_MIN = 25
# Below this part of its size at the last record, a gradient teaches nothing.
VANISHED = 1e-4
# A clipped step keeps the gradient's direction; a norm this far above the clip means that the direction is noise.
EXPLODED = 100.0

Arrays = dict[str, NDArray[np.float32]]


class TrainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to train; the same options, histories and machine give the same weights.

    Attributes:
        optimizer: Adam, or plain stochastic gradient descent.
        learning_rate: halved whenever half the patience has passed without a better score.
        clip_norm: the gradient's global norm is cut to this.
        window: records that the gradient goes back through, T.
        batch: streams (or pieces of long ones) side by side, B.
        steps_max: gradient steps.
        seconds_max: stop after this time; None for no limit. Reaching it makes the result depend on the machine.
        patience: evaluations without a better held-out score before stopping.
        holdout: the last part of each stream's time, never learned from.
        warmup: records stepped before the first scored one where a long stream is cut.
        hide: part of the records whose targets are hidden, so that the network learns to go on from its own forecast.
        seed: of the first weights, the order of lanes and what is hidden.
    """

    optimizer: learning.Optimizer = "adam"
    learning_rate: float = 3e-3
    clip_norm: float = 1.0
    window: int = 64
    batch: int = 32
    steps_max: int = 1_500
    seconds_max: float | None = None
    patience: int = 8
    holdout: float = 0.2
    warmup: int = 128
    hide: float = 0.02
    seed: int = 0


class Progress(NamedTuple):
    """Where training stands: loss is the last window's, held_out_loss the last evaluation's (NaN before it)."""

    epoch: int
    step: int
    steps_max: int
    loss: float
    held_out_loss: float


class TrainingReport(msgspec.Struct, frozen=True, kw_only=True):
    """What happened.

    Attributes:
        steps, epochs, seconds: how long it took.
        records: learned from, and `held_out_records` scored to stop.
        loss: of the last windows; held_out_loss: of the weights returned; untrained_loss: before the first step.
        gradient_norm, gradient_norm_max: global norm before clipping: its median, its largest.
        gradient_back: norm of the gradient of the last record's loss by the memory k records before, k = 0 first, in
            units of the first.
        warnings: one line each, with the remedy.
    """

    steps: int
    epochs: int
    seconds: float
    records: int
    held_out_records: int
    loss: float
    held_out_loss: float
    untrained_loss: float
    gradient_norm: float
    gradient_norm_max: float
    gradient_back: tuple[float, ...]
    warnings: tuple[str, ...]


def train(
    spec: NetworkSpec,
    histories: Sequence[StreamHistory],
    options: TrainOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    parent: Model | None = None,
) -> tuple[Model, TrainingReport]:
    """Fit a network to histories.

    Args:
        spec: what to build.
        histories: one per stream, in time order; streams shorter than two records teach nothing.
        options: how; None for the defaults.
        progress: called after each gradient step.
        parent: of the same spec; go on from its weights instead of drawing new ones. `untrained_loss` is then its loss.

    Returns:
        The model with the best held-out score, and the report.

    Raises:
        Fatal: no history, or weights that are not finite.
        ModelMismatch: the parent is another network.
    """
    if parent is not None and parent.spec != spec:
        raise ModelMismatch(f"model {parent.version} is another network: training cannot go on from it")
    started = time.perf_counter()
    options = options or TrainOptions()
    histories = [history for history in histories if len(history.time_s) > 1]
    if not histories:
        raise Fatal("training: no stream with two records or more in this history")
    total = sum(len(history.time_s) for history in histories)
    length = int(np.clip(total / options.batch, 2 * options.window, 4096))
    data = dataset(spec, histories, Cut(length, options.warmup, options.holdout))
    first = parent.weights if parent is not None else network.initial_weights(spec, options.seed)
    weights = first | scale_priors(histories)
    best, report = _Training(spec, options, data, weights).run(started, progress)
    refuse_not_finite(best)
    training = {"report": msgspec.to_builtins(report), "options": msgspec.to_builtins(options)}
    parent_version = parent.version if parent is not None else None
    return Model(spec=spec, weights=best, version=new_version(), parent=parent_version, training=training), report


def untrained(spec: NetworkSpec, histories: Sequence[StreamHistory]) -> Model:
    """A network that has learned nothing of histories but their usual scale."""
    weights = network.initial_weights(spec, TrainOptions().seed) | scale_priors(histories)
    return Model(spec=spec, weights=weights, version="untrained")


def scale_priors(histories: Sequence[StreamHistory]) -> Arrays:
    """Measure the usual scale, for a stream's first forecast: as part of the value, or as an amount.

    Whichever differs less between the streams: prices of 3 and of 3,000 move by like
    percentages, one sensor's readings in two rooms by like amounts.
    """
    targets = histories[0].values.shape[1]
    relative, absolute = np.zeros(targets, np.float32), np.zeros(targets, np.float32)
    for target in range(targets):
        columns = [history.values[:, target] for history in histories]
        columns = [column[np.isfinite(column)] for column in columns]
        sizes = np.array(
            [(np.abs(np.diff(column)).mean(), np.abs(column).mean()) for column in columns if len(column) > 1]
        )
        sizes = sizes[(sizes > 0.0).all(axis=1)] if len(sizes) else np.empty((0, 2))
        if not len(sizes):
            relative[target] = network.PRIOR_RELATIVE
            continue
        change, ratio = np.log(sizes[:, 0]), np.log(sizes[:, 0] / sizes[:, 1])
        if (ratio.std(), ratio.mean()) < (change.std(), 0.0):
            relative[target] = SIGMA_OF_DEVIATION * np.exp(ratio.mean())
        else:
            absolute[target] = SIGMA_OF_DEVIATION * np.exp(change.mean())
    return {"prior/relative": relative, "prior/absolute": absolute}


class _Training:
    """One run: the compiled functions, the weights so far, the best ones."""

    def __init__(self, spec: NetworkSpec, options: TrainOptions, data: Dataset, weights: Arrays) -> None:
        self._spec = spec
        self._options = options
        self._data = data
        self._random = np.random.default_rng(options.seed)
        self._records = tf.constant(data.packed)
        # Fewer lanes than the batch: compile for what there is.
        self._batch = min(options.batch, len(data.trained))
        self._held_out = _up_to(data.held_out, EVALUATE_RECORDS_MAX, self._random)
        self._start = initial_state(spec, self._batch)
        self._learner = learning.learner(weights, self._start)
        self._learn = Compiled(self._learn_window)
        self._score = Compiled(self._score_window)
        self._losses: list[float] = []
        self._norms: list[float] = []

    def run(self, started: float, progress: Callable[[Progress], None] | None) -> tuple[Arrays, TrainingReport]:
        """Train until steps, time or patience run out."""
        options = self._options
        untrained = best_loss = held_out = self._evaluate()
        best, idle, rate, evaluated = self._learner.weights, 0, options.learning_rate, 0
        epoch, steps = 0, 0
        for epoch, window, last in self._windows():
            steps += 1
            self._step(window, rate, steps)
            if progress is not None:
                progress(Progress(epoch, steps, options.steps_max, self._losses[-1], held_out))
            late = options.seconds_max is not None and time.perf_counter() - started > options.seconds_max
            done = steps == options.steps_max or late
            if done or (last and steps - evaluated >= EVALUATE_STEPS_MIN):
                held_out, evaluated = self._evaluate(), steps
                idle = 0 if held_out < best_loss else idle + 1
                if held_out < best_loss or not self._held_out:
                    best, best_loss = self._learner.weights, held_out
                if idle and idle % max(1, options.patience // 2) == 0:
                    rate /= 2
                if not np.isfinite(self._losses[-1]):
                    raise Fatal("training: the loss is not finite any more; lower the learning rate or the clip norm")
                done = done or idle >= options.patience
            if done:
                break
        back = self._gradient_back(best)
        report = TrainingReport(
            steps=steps,
            epochs=epoch + 1,
            seconds=time.perf_counter() - started,
            records=sum(lane.end - lane.scored for lane in self._data.trained),
            held_out_records=sum(lane.end - lane.scored for lane in self._held_out),
            loss=float(np.mean(self._losses[-EVALUATE_STEPS_MIN:])),
            held_out_loss=best_loss,
            untrained_loss=untrained,
            gradient_norm=float(np.median(self._norms)),
            gradient_norm_max=float(np.max(self._norms)),
            gradient_back=back,
            warnings=tuple(_warnings(self._spec, options, back, float(np.max(self._norms)))),
        )
        return {name: value.numpy() for name, value in best.items()}, report

    def _windows(self) -> Iterator[tuple[int, Window, bool]]:
        """Yield windows for ever: the epoch, the window, whether it is the epoch's last."""
        epoch = 0
        while True:
            lanes = [self._data.trained[place] for place in self._random.permutation(len(self._data.trained))]
            windows = list(self._walk(lanes))
            for place, window in enumerate(windows, 1):
                yield epoch, window, place == len(windows)
            epoch += 1

    def _walk(self, lanes: Sequence[Lane]) -> Iterator[Window]:
        return walk(lanes, self._batch, self._options.window, self._spec.steps[-1], len(self._data.packed) - 1)

    def _step(self, window: Window, rate: float, step: int) -> None:
        if window.begins:
            self._learner = self._learner._replace(state=self._start)
        hidden = self._random.random(window.live.shape) < self._options.hide
        pace = learning.Pace(tf.constant(rate, tf.float32), tf.constant(step, tf.float32))
        loss, norm, self._learner = self._learn(self._learner, tensors(window), tf.constant(hidden), pace)
        if window.scored.any():
            self._losses.append(float(loss))
            self._norms.append(float(norm))

    def _evaluate(self) -> float:
        """Mean loss over the held-out time, NaN where there is none."""
        total = count = 0.0
        state = self._start
        for window in self._walk(self._held_out):
            state = self._start if window.begins else state
            loss, losses, state = self._score(self._learner.weights, state, tensors(window))
            total, count = total + float(loss), count + float(losses)
        return total / count if count else float("nan")

    def _learn_window(
        self, learner: learning.Learner, window: learning.Batch, hidden: Tensor, pace: learning.Pace
    ) -> tuple[Tensor, Tensor, learning.Learner]:
        return learning.learn(self._spec, self._options, learner, self._fetch(window), hidden, pace)

    def _score_window(self, weights: Weights, state: Fields, window: learning.Batch) -> tuple[Tensor, Tensor, Fields]:
        batch = self._fetch(window)
        said, state = learning.scan(self._spec, weights, state, batch)
        return *learning.loss(self._spec, said, batch), state

    def _fetch(self, window: learning.Batch) -> learning.Batch:
        """Put the records in the place of their row numbers."""
        return window._replace(future=tf.gather(self._records, window.future))

    def _gradient_back(self, weights: Fields) -> tuple[float, ...]:
        """How much of the last record's loss reaches the memory k records before it; k = 0 first, 1.0 there."""
        spec, length = self._spec, self._options.window
        names = [f"cell{layer}/{part}" for layer in range(spec.layers) for part in CELL_PARTS[spec.cell]]
        whole = [window for window in self._walk(self._data.trained) if window.scored[-1].any()]
        if not names or not whole:
            return ()
        window = whole[0]
        nudge = {name: tf.zeros([length, self._batch, spec.units]) for name in names}
        scored = np.zeros_like(window.scored)
        scored[-1] = window.scored[-1]
        batch = self._fetch(tensors(window._replace(scored=scored)))
        with tf.GradientTape() as tape:
            tape.watch(nudge)
            said, _ = learning.scan(spec, weights, self._start, batch, nudge)
            loss, _ = learning.loss(spec, said, batch)
        found = tape.gradient(loss, nudge, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        squares = sum(np.square(value.numpy()).sum(axis=(1, 2)) for value in found.values())
        # The nudge of the last record comes after its forecast: the first one that its loss can feel is the one before.
        norms = np.sqrt(np.asarray(squares))[-2::-1]
        return tuple((norms / norms[0]).tolist()) if norms[0] > 0.0 else ()


def tensors(window: Window) -> learning.Batch:
    """A window on its way to the device, with the rows of its records instead of the records."""
    return learning.Batch(tf.constant(window.rows), tf.constant(window.live), tf.constant(window.scored))


def _warnings(spec: NetworkSpec, options: TrainOptions, back: tuple[float, ...], norm_max: float) -> Iterator[str]:
    reach = next((place for place, norm in enumerate(back) if norm < VANISHED), len(back))
    if back and reach < len(back) // 2:
        remedy = f"a window of {max(8, 2 * reach)} learns the same, faster"
        if spec.cell == "rnn":
            remedy = f'cell = "lstm" or "gru" remembers longer; otherwise {remedy}'
        yield f"the gradient vanishes {reach} records back (window: {options.window}): {remedy}"
    if back and max(back) > EXPLODED:
        yield (
            f"the gradient grows {max(back):,.0f} times on its way back: it explodes; "
            f"lower clip_norm ({options.clip_norm:g}) or learning_rate ({options.learning_rate:g}), "
            "or shorten the window"
        )
    elif norm_max > EXPLODED * options.clip_norm:
        yield (
            f"a gradient's norm reached {norm_max:,.0f}, clipped to {options.clip_norm:g}: "
            f"lower learning_rate ({options.learning_rate:g})"
        )


def initial_state(spec: NetworkSpec, batch: int) -> Fields:
    """Every field but those that only serving needs, of `batch` streams that have seen nothing."""
    fields = [field for field in row_layout(spec).fields.values() if not serving_only(field.name)]
    return {field.name: tf.fill([batch, *field.shape], tf.constant(field.initial, tf.float32)) for field in fields}


def _up_to(lanes: Sequence[Lane], records_max: int, random: np.random.Generator) -> list[Lane]:
    """Return as many lanes, drawn without order, as have `records_max` records together; one at least."""
    shuffled = [lanes[place] for place in random.permutation(len(lanes))]
    ends = np.cumsum([lane.end - lane.begin for lane in shuffled])
    return shuffled[: max(1, int(np.searchsorted(ends, records_max, side="right")))]
